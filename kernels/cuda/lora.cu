/* lora.cu - LoRA terms of a batch whose rows use different adapters, in bfloat16.
 *
 * Two launches for all terms and parts. shrink: h = scale A x, by term. expand: the sums of B h of
 * all terms that cover a row, by row. Made for decoding many streams over many adapters, where each
 * row reads matrices of its own: bound by reading every A and B once. So both keep many 8- or
 * 16-byte loads of weights in flight, the first ones before they wait for their predecessor, and
 * cut their work so that every SM has some:
 *   - shrink: a block takes up to 32 rows of a term and a part, its warps a slice of K each. Where
 *     there are few such blocks, K is cut into pieces for several; the last of them to end adds up.
 *   - expand: a block takes 8, 16 or 32 rows of the batch by 128 columns of a part, a warp 16 of
 *     them, and goes through the terms that cover its rows in steps of 16 ranks.
 * Weights are the mma's A operand (16 ranks or columns), rows of x or h its B operand (8 of them;
 * unused ones are zero). Both read k in an order that gives a lane 8 or 4 values in a row.
 *
 * More rows than FEW_ROWS shrink in lora_prefill.cu. */
#include "lora.cuh"

enum {
    FEW_ROWS = 256,
    THREADS = LORA_THREADS,
    WARPS = LORA_WARPS,
    CHUNK = 32,
    TILES = CHUNK / LORA_TILE_ROWS,
    RANKS = 16,    /* of A at once: m of an mma */
    COLUMNS = 32,  /* of A at once, for 4 lanes: two mma's */
    A_AHEAD = 4,   /* loads of 16 ranks by 32 columns in flight */
    SUM_PITCH = 20 /* floats; lanes of a store then differ in their banks */
};

/* ---- shrink ---- */

/* What a warp of a block multiplies: columns [32 first, 32 (first + n)). */
struct slice {
    int64_t first;
    int n;
};

static __device__ struct slice slice_of(const struct lora_call &c) {
    const int64_t steps = (c.K + COLUMNS - 1) / COLUMNS, slices = (int64_t)gridDim.x * WARPS;
    const int64_t slice = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    const int64_t first = steps * slice / slices;
    return {first, (int)(steps * (slice + 1) / slices - first)};
}

/* 16 ranks from `rank0` on by `n` times 32 columns from 32 k on; zeros where there are none. */
template <int AHEAD, bool VECTOR>
static __device__ __forceinline__ void load_a(uint4 v[AHEAD][2], const gn_tensor &a, int rank0,
                                              int64_t k, int n, int lane) {
    const int64_t col = k * COLUMNS + lane % 4 * 8;
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int64_t rank = rank0 + lane / 4 + 8 * i, left = a.shape[1] - col - j * COLUMNS;
            v[j][i] = {};
            if (j < n && rank < a.shape[0])
                v[j][i] = load8<VECTOR>(a, rank * a.ld + col + j * COLUMNS, (int)min(left, 8l));
        }
}

/* 8 columns of a row of x, which other kernels wrote. */
template <bool VECTOR>
static __device__ __forceinline__ uint4 load_x(const struct lora_call &c, int64_t row,
                                               int64_t col) {
    if (col >= c.K) return {};
    const bf16 *at = c.x + row * c.x_ld + col;
    if (VECTOR) return *(const uint4 *)at;
    return load8<false>(x_of(c), at - c.x, (int)min(c.K - col, 8l));
}

/* acc += those ranks times the chunk's rows. */
template <int AHEAD, bool VECTOR>
static __device__ __forceinline__ void
multiply(float acc[TILES][4], const uint4 a[AHEAD][2], const struct lora_call &c,
         const struct chunk &chunk, int64_t k, int n, int lane) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        if (tile * LORA_TILE_ROWS >= chunk.rows) break;
        const int row = tile * LORA_TILE_ROWS + lane / 4;
        uint4 x[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            x[j] = {};
            if (j < n && row < chunk.rows)
                x[j] = load_x<VECTOR>(c, chunk.row + row, (k + j) * COLUMNS + lane % 4 * 8);
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const uint4 low = a[j][0], high = a[j][1];
            const uint32_t a0[4] = {low.x, high.x, low.y, high.y}, b0[2] = {x[j].x, x[j].y};
            const uint32_t a1[4] = {low.z, high.z, low.w, high.w}, b1[2] = {x[j].z, x[j].w};
            mma_bf16(acc[tile], a0, b0);
            mma_bf16(acc[tile], a1, b1);
        }
    }
}

/* The warps' sums of 16 ranks, added up: into h, or into the block's piece of it. */
static __device__ void add_warps(float sums[WARPS][CHUNK * SUM_PITCH], const float acc[TILES][4],
                                 const struct lora_call &c, const struct chunk &chunk, int part,
                                 float scale, int rank0, float *piece) {
    const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, l = threadIdx.x % 4;
    __syncthreads(); /* of the last ranks' readers */
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = tile * LORA_TILE_ROWS + 2 * l + i % 2;
            if (row < chunk.rows) sums[warp][row * SUM_PITCH + g + i / 2 * 8] = acc[tile][i];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < chunk.rows * RANKS; i += THREADS) {
        const int row = i / RANKS, rank = i % RANKS;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += sums[w][row * SUM_PITCH + rank];
        if (piece)
            piece[row * c.pitch + rank0 + rank] = sum;
        else
            h_at(c, chunk.h_row + row, part)[rank0 + rank] = from_float<bf16>(scale * sum);
    }
}

template <int AHEAD, bool VECTOR>
static __device__ __forceinline__ void
shrink(float sums[WARPS][CHUNK * SUM_PITCH], const struct lora_call &c, const struct chunk &chunk,
       const gn_lora_pair &pair, int part, float scale, float *piece) {
    const int lane = threadIdx.x % WARP;
    const struct slice slice = slice_of(c);
    uint4 a[AHEAD][2];
    load_a<AHEAD, VECTOR>(a, pair.a, 0, slice.first, slice.n, lane);
    pdl_wait();
#pragma unroll 1
    for (int rank0 = 0; rank0 < pair.rank; rank0 += RANKS) {
        float acc[TILES][4] = {};
#pragma unroll 1
        for (int k = 0; k < slice.n; k += AHEAD) {
            multiply<AHEAD, VECTOR>(acc, a, c, chunk, slice.first + k, slice.n - k, lane);
            const int next = k + AHEAD < slice.n ? k + AHEAD : 0;
            load_a<AHEAD, VECTOR>(a, pair.a, next > 0 ? rank0 : rank0 + RANKS, slice.first + next,
                                  slice.n - next, lane);
        }
        add_warps(sums, acc, c, chunk, part, scale, rank0, piece);
    }
}

/* Block (piece, part, chunk). */
static __global__ void __launch_bounds__(THREADS, 2)
    shrink_kernel(const __grid_constant__ struct lora_call c) {
    __shared__ float sums[WARPS][CHUNK * SUM_PITCH];
    pdl_trigger();
    const int part = blockIdx.y, pieces = gridDim.x;
    const struct chunk chunk = find_chunk(c, blockIdx.z, CHUNK);
    if (!chunk.term || chunk.term->placed[c.pair + part].rank == 0) {
        pdl_wait();
        return;
    }
    const gn_lora_pair pair = chunk.term->placed[c.pair + part];
    const float scale = chunk.term->scale * pair.scale;
    const int sum = blockIdx.z * c.n_parts + part;
    float *partial = c.partial + (int64_t)sum * pieces * CHUNK * c.pitch;
    float *piece = pieces > 1 ? partial + (int64_t)blockIdx.x * CHUNK * c.pitch : NULL;
    if (is_vector(pair.a, 8) && c.x_ld % 8 == 0)
        shrink<A_AHEAD, true>(sums, c, chunk, pair, part, scale, piece);
    else
        shrink<1, false>(sums, c, chunk, pair, part, scale, piece);
    if (pieces > 1)
        finish_pieces(c, chunk, part, scale, 0, whole_steps(pair.rank), partial, pieces, CHUNK,
                      c.pitch, &c.counters[sum]);
}

/* ---- expand ---- */

enum { BLOCK_COLUMNS = WARPS * 16, B_AHEAD = 8 };

struct expansion {
    struct lora_call call;
    gn_cuda_parts parts;
    int block0[GN_MAX_PARTS]; /* the first of a part's blocks */
    float *out;
};

/* acc += the steps' B h, for 16 columns of which the lane loads `n` and `n8`. */
template <int NT, int AHEAD, bool VECTOR>
static __device__ __forceinline__ void take_steps(float acc[NT][4], const struct lora_call &c,
                                                  const struct step *steps, int n_steps, int64_t n,
                                                  int64_t n8, int lane) {
    const int g = lane / 4, rank = lane % 4 * 4;
    const int64_t h_ld = (int64_t)c.n_parts * c.pitch;
#pragma unroll 1
    for (int first = 0; first < n_steps; first += AHEAD) {
        uint2 b[AHEAD][2];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            b[j][0] = b[j][1] = {};
            if (first + j >= n_steps) continue;
            const gn_tensor &m = steps[first + j].b;
            const int left = (int)m.shape[1] - rank;
            b[j][0] = load4<VECTOR>(m, n * m.ld + rank, left);
            b[j][1] = load4<VECTOR>(m, n8 * m.ld + rank, left);
        }
        pdl_wait();
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            if (first + j >= n_steps) continue;
            const struct step &s = steps[first + j];
            const uint32_t a[4] = {b[j][0].x, b[j][1].x, b[j][0].y, b[j][1].y};
#pragma unroll
            for (int tile = 0; tile < NT; tile++) {
                const int row0 = tile * LORA_TILE_ROWS, row = row0 + g;
                if (s.from >= row0 + LORA_TILE_ROWS || s.to <= row0) continue;
                uint2 h = {};
                if (row >= s.from && row < s.to)
                    h = *(const uint2 *)(c.h + s.h + row * h_ld + rank);
                const uint32_t x[2] = {h.x, h.y};
                mma_bf16(acc[tile], a, x);
            }
        }
    }
}

/* Block (columns of a part, rows of the batch). Sums of more steps than fit in the list are taken
 * up again from where they were written. */
template <int NT>
static __global__ void __launch_bounds__(THREADS, 2)
    expand_kernel(const __grid_constant__ struct expansion e) {
    __shared__ struct step steps[LORA_MAX_STEPS];
    pdl_trigger();
    const int lane = threadIdx.x % WARP, g = lane / 4, row0 = blockIdx.y * NT * LORA_TILE_ROWS;
    int part = 0;
    while (part + 1 < e.parts.n && (int)blockIdx.x >= e.block0[part + 1]) part++;
    const int64_t N = e.parts.first[part + 1] - e.parts.first[part], ld = e.parts.first[e.parts.n];
    const int64_t n0 =
        ((int64_t)blockIdx.x - e.block0[part]) * BLOCK_COLUMNS + threadIdx.x / WARP * 16;
    const int64_t n = min(n0 + g, N - 1), n8 = min(n0 + g + 8, N - 1);
    float *out = e.out + row0 * ld + e.parts.first[part];
    for (int first = 0, all = 1; first < all; first += LORA_MAX_STEPS) {
        bool vector;
        all = list_steps(steps, e.call, part, row0, NT * LORA_TILE_ROWS, first, &vector);
        const int n_steps = min(all - first, (int)LORA_MAX_STEPS);
        float acc[NT][4] = {};
        if (vector)
            take_steps<NT, B_AHEAD, true>(acc, e.call, steps, n_steps, n, n8, lane);
        else
            take_steps<NT, 1, false>(acc, e.call, steps, n_steps, n, n8, lane);
        pdl_wait();
#pragma unroll
        for (int tile = 0; tile < NT; tile++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = tile * LORA_TILE_ROWS + lane % 4 * 2 + i % 2;
                const int64_t column = n0 + g + i / 2 * 8;
                if (row0 + row >= e.call.T || column >= N) continue;
                float *at = out + row * ld + column;
                *at = first > 0 ? *at + acc[tile][i] : acc[tile][i];
            }
        __syncthreads(); /* of the list's readers */
    }
}

/* ---- the calls ---- */

int gn_cuda_lora_terms_a_row(const gn_linear_args *args) {
    const int64_t T = args->x.shape[0];
    return (int)((covered_rows(args) + T - 1) / T);
}

size_t gn_cuda_lora_bytes(const gn_ctx *ctx, int64_t rows, int64_t max_rank, int max_terms) {
    const int64_t pitch = whole_steps((int)max_rank);
    const size_t few = (size_t)lora_slots(ctx) * CHUNK * (size_t)pitch * sizeof(float);
    const size_t many = gn_cuda_lora_partial_bytes(ctx);
    return h_bytes(rows * max_terms, pitch) + (few > many ? few : many);
}

gn_status gn_cuda_lora_shrink(gn_ctx *ctx, const gn_linear_args *args, const void *x, int64_t x_ld,
                              void *scratch) {
    const struct lora_call c = call_of(ctx, args, x, x_ld, scratch);
    if (c.T > FEW_ROWS)
        return gn_cuda_lora_shrink_many(ctx, &c, max_rank_of(args), covered_rows(args));
    const int64_t chunks = chunks_bound(c.n_terms, covered_rows(args), CHUNK);
    const int pieces = lora_pieces(ctx, chunks * c.n_parts, c.K / (COLUMNS * WARPS));
    return launch(ctx, shrink_kernel, dim3((unsigned)pieces, (unsigned)c.n_parts, (unsigned)chunks),
                  dim3(THREADS), 0, c);
}

static gn_status expand(gn_ctx *ctx, const gn_linear_args *args, void *scratch, float *out) {
    struct expansion e = {};
    e.call = call_of(ctx, args, NULL, 0, scratch);
    e.parts = parts_of(args);
    e.out = out;
    int blocks = 0;
    for (int i = 0; i < e.parts.n; i++) {
        e.block0[i] = blocks;
        blocks += (int)((args->part[i].w->rows + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS);
    }
    void (*kernel)(const struct expansion) = expand_kernel<1>;
    int64_t tiles = (e.call.T + LORA_TILE_ROWS - 1) / LORA_TILE_ROWS;
    for (int nt = 2; nt <= 4; nt *= 2) {
        const int64_t rows = nt * LORA_TILE_ROWS, fewer = (e.call.T + rows - 1) / rows;
        if (fewer * blocks < 2 * ctx->cuda->sms) break;
        kernel = nt == 2 ? expand_kernel<2> : expand_kernel<4>;
        tiles = fewer;
    }
    return launch(ctx, kernel, dim3((unsigned)blocks, (unsigned)tiles), dim3(THREADS), 0, e);
}

gn_status gn_cuda_lora(gn_ctx *ctx, const gn_linear_args *args, const void *x, int64_t x_ld,
                       void *scratch, float *out) {
    const gn_status status = gn_cuda_lora_shrink(ctx, args, x, x_ld, scratch);
    return status ? status : expand(ctx, args, scratch, out);
}
