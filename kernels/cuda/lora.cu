/* lora.cu - LoRA terms of a batch whose rows use different adapters, in bfloat16.
 *
 * Two launches for all terms and parts. shrink: h = scale A x, by term. expand: the sums of B h of
 * all terms that cover a row, by row. Made for decoding many streams over many adapters, where each
 * row reads matrices of its own: bound by reading every A and B once. So both keep many 8- or
 * 16-byte loads of weights in flight, the first ones before they wait for their predecessor, and
 * cut their work so that every SM has some:
 *   - shrink: a block takes up to 16 rows of a term and a part, its warps a slice of K each. Where
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
    CHUNK = 16,
    TILES = CHUNK / LORA_TILE_ROWS,
    RANKS = 16,    /* of A at once: m of an mma */
    COLUMNS = 32,  /* of A at once, for 4 lanes: two mma's */
    A_AHEAD = 4,   /* loads of 16 ranks by 32 columns in flight */
    SUM_PITCH = 20 /* floats; lanes of a store then differ in their banks */
};

/* ---- shrink ---- */

/* What a warp of a block multiplies: columns [begin, end). */
struct slice {
    int begin, end;
};

static __device__ struct slice slice_of(const struct lora_call &c) {
    const int steps = (c.K + COLUMNS - 1) / COLUMNS, slices = (int)gridDim.x * WARPS;
    const int64_t slice = (int)blockIdx.x * WARPS + (int)threadIdx.x / WARP;
    const int begin = (int)(steps * slice / slices), end = (int)(steps * (slice + 1) / slices);
    return {begin * COLUMNS, min(end * COLUMNS, c.K)};
}

/* 16 ranks from `rank0` on by AHEAD times 32 columns from k on, those before `end`; zeros where
 * there are none. */
template <int AHEAD, bool VECTOR>
static __device__ __forceinline__ void load_a(uint4 v[AHEAD][2], const gn_tensor &a, int rank0,
                                              int k, int end, int lane) {
    const int rank = rank0 + lane / 4, left = end - k - lane % 4 * 8;
    const int64_t at = rank * a.ld + k + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const int n = rank + 8 * i < a.shape[0] ? left - j * COLUMNS : 0;
            v[j][i] = load8<VECTOR>(a, at + 8 * i * a.ld + j * COLUMNS, n);
        }
}

/* 8 columns of a row of x, which other kernels wrote, of which n exist. */
template <bool VECTOR>
static __device__ __forceinline__ uint4 load_x(const struct lora_call &c, int64_t at, int n) {
    if (n <= 0) return {};
    return VECTOR ? *(const uint4 *)(c.x + at) : load8<false>(x_of(c), at, n);
}

/* acc += those ranks times the chunk's rows. */
template <int AHEAD, bool VECTOR>
static __device__ __forceinline__ void
multiply(float acc[TILES][4], const uint4 a[AHEAD][2], const struct lora_call &c,
         const struct chunk &chunk, int k, int end, int lane) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        if (tile * LORA_TILE_ROWS >= chunk.rows) break;
        const int row = tile * LORA_TILE_ROWS + lane / 4, column = k + lane % 4 * 8;
        const int64_t at = (int64_t)(chunk.row + row) * c.x_ld + column;
        uint4 x[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            x[j] = load_x<VECTOR>(c, at + j * COLUMNS,
                                  row < chunk.rows ? end - column - j * COLUMNS : 0);
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
    load_a<AHEAD, VECTOR>(a, pair.a, 0, slice.begin, slice.end, lane);
    pdl_wait();
#pragma unroll 1
    for (int rank0 = 0; rank0 < pair.rank; rank0 += RANKS) {
        float acc[TILES][4] = {};
#pragma unroll 1
        for (int k = slice.begin; k < slice.end; k += AHEAD * COLUMNS) {
            multiply<AHEAD, VECTOR>(acc, a, c, chunk, k, slice.end, lane);
            const bool more = k + AHEAD * COLUMNS < slice.end;
            load_a<AHEAD, VECTOR>(a, pair.a, more ? rank0 : rank0 + RANKS,
                                  more ? k + AHEAD * COLUMNS : slice.begin, slice.end, lane);
        }
        add_warps(sums, acc, c, chunk, part, scale, rank0, piece);
    }
}

/* Block (piece, part, chunk). */
static __global__ void __launch_bounds__(THREADS, 3)
    shrink_kernel(const __grid_constant__ struct lora_call c) {
    __shared__ float sums[WARPS][CHUNK * SUM_PITCH];
    pdl_trigger();
    const int part = c.part0 + blockIdx.y, pieces = gridDim.x;
    const struct chunk chunk = find_chunk(c, blockIdx.z, CHUNK);
    if (!chunk.term || chunk.term->placed[c.pair + part].rank == 0) {
        pdl_wait();
        return;
    }
    const gn_lora_pair pair = chunk.term->placed[c.pair + part];
    const float scale = chunk.term->scale * pair.scale;
    const int sum = blockIdx.z * gridDim.y + blockIdx.y;
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

enum {
    BLOCK_COLUMNS = WARPS * 16,
    B_AHEAD = 8,         /* loads of 16 columns' step in flight */
    H_BYTES = 32 * 1024, /* of h in shared memory, 32 a row and step */
};

struct expansion {
    struct lora_call call;
    gn_cuda_parts parts;
    int block0[GN_MAX_PARTS]; /* the first of a part's blocks */
    float *out;
};

/* What a warp's lane has to do with B: rows n and n8 of its 16, four ranks of a step. */
struct lane_of_b {
    int n, n8, rank;
};

/* AHEAD steps of B from `first` on; zeros where there are none. */
template <int AHEAD, bool VECTOR>
static __device__ __forceinline__ void load_b(uint2 v[AHEAD][2], const struct step *steps,
                                              int n_steps, int first, struct lane_of_b at) {
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
        const gn_tensor &m = steps[min(first + j, LORA_MAX_STEPS - 1)].b;
        const int left = first + j < n_steps ? (int)m.shape[1] - at.rank : 0;
        v[j][0] = load4<VECTOR>(m, at.n * m.ld + at.rank, left);
        v[j][1] = load4<VECTOR>(m, at.n8 * m.ld + at.rank, left);
    }
}

/* h of steps [0, n) for the block's rows to shared memory, (steps, rows, 16); zeros where a term
 * does not cover a row. */
static __device__ void stage_h(uint4 *to, const struct lora_call &c, const struct step *steps,
                               int n, int rows) {
    for (int i = threadIdx.x; i < n * rows * 2; i += THREADS) {
        const struct step &s = steps[i / 2 / rows];
        const int row = i / 2 % rows;
        uint4 v = {};
        if (row >= s.from && row < s.to)
            v = ((const uint4 *)(c.h + s.h + (int64_t)row * c.n_parts * c.pitch))[i % 2];
        to[i] = v;
    }
}

/* acc += the listed steps' B h. */
template <int NT, int AHEAD, bool VECTOR>
static __device__ __forceinline__ void
take_steps(float acc[NT][4], uint4 *h, const struct lora_call &c, const struct step *steps,
           int n_steps, struct lane_of_b at, int lane) {
    enum { ROWS = NT * LORA_TILE_ROWS, STAGED = H_BYTES / (ROWS * 32) };
    uint2 b[AHEAD][2];
    load_b<AHEAD, VECTOR>(b, steps, n_steps, 0, at);
    pdl_wait();
#pragma unroll 1
    for (int first = 0; first < n_steps; first += STAGED) {
        const int end = min(n_steps, first + STAGED);
        __syncthreads(); /* of those staged before, their readers */
        stage_h(h, c, steps + first, end - first, ROWS);
        __syncthreads();
#pragma unroll 1
        for (int i = first; i < end; i += AHEAD) {
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                if (i + j >= end) break;
                const uint32_t a[4] = {b[j][0].x, b[j][1].x, b[j][0].y, b[j][1].y};
                const uint2 *step_h = (const uint2 *)h + (i + j - first) * ROWS * 4 + lane;
#pragma unroll
                for (int tile = 0; tile < NT; tile++) {
                    const int row0 = tile * LORA_TILE_ROWS;
                    if (NT > 1 &&
                        (steps[i + j].from >= row0 + LORA_TILE_ROWS || steps[i + j].to <= row0))
                        continue;
                    const uint2 pairs = step_h[row0 * 4];
                    const uint32_t x[2] = {pairs.x, pairs.y};
                    mma_bf16(acc[tile], a, x);
                }
            }
            load_b<AHEAD, VECTOR>(b, steps, n_steps, i + AHEAD, at);
        }
    }
}

/* Block (columns of a part, rows of the batch). */
template <int NT>
static __global__ void __launch_bounds__(THREADS, 3)
    expand_kernel(const __grid_constant__ struct expansion e) {
    __shared__ struct step steps[LORA_MAX_STEPS];
    __shared__ uint4 h[H_BYTES / sizeof(uint4)];
    pdl_trigger();
    const int lane = threadIdx.x % WARP, g = lane / 4, row0 = blockIdx.y * NT * LORA_TILE_ROWS;
    int part = 0;
    while (part + 1 < e.parts.n && (int)blockIdx.x >= e.block0[part + 1]) part++;
    const int N = (int)(e.parts.first[part + 1] - e.parts.first[part]);
    const int n0 = ((int)blockIdx.x - e.block0[part]) * BLOCK_COLUMNS + threadIdx.x / WARP * 16;
    const struct lane_of_b at = {min(n0 + g, N - 1), min(n0 + g + 8, N - 1), lane % 4 * 4};
    float acc[NT][4] = {};
    for (int first = 0, all = 1; first < all; first += LORA_MAX_STEPS) {
        bool vector;
        all = list_steps(steps, e.call, part, row0, NT * LORA_TILE_ROWS, first, &vector);
        const int n_steps = min(all - first, (int)LORA_MAX_STEPS);
        if (vector)
            take_steps<NT, NT == 4 ? B_AHEAD / 2 : B_AHEAD, true>(acc, h, e.call, steps, n_steps,
                                                                  at, lane);
        else
            take_steps<NT, 1, false>(acc, h, e.call, steps, n_steps, at, lane);
        __syncthreads(); /* of the list's readers */
    }
    const int64_t ld = e.parts.first[e.parts.n];
    float *out = e.out + row0 * ld + e.parts.first[part] + n0;
#pragma unroll
    for (int tile = 0; tile < NT; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = tile * LORA_TILE_ROWS + lane % 4 * 2 + i % 2, column = g + i / 2 * 8;
            if (row0 + row < e.call.T && n0 + column < N) out[row * ld + column] = acc[tile][i];
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

gn_status gn_cuda_lora_shrink(gn_ctx *ctx, const gn_linear_args *args, int part0, int n_parts,
                              const void *x, int64_t x_ld, void *scratch) {
    struct lora_call c = call_of(ctx, args, x, x_ld, scratch);
    c.part0 = part0;
    if (c.T > FEW_ROWS) return gn_cuda_lora_shrink_many(ctx, args, &c, n_parts);
    const int64_t chunks = chunks_bound(c.n_terms, covered_rows(args), CHUNK);
    const int pieces = lora_pieces(ctx, chunks * n_parts, c.K / (COLUMNS * WARPS));
    return launch(ctx, shrink_kernel, dim3((unsigned)pieces, (unsigned)n_parts, (unsigned)chunks),
                  dim3(THREADS), 0, c);
}

gn_status gn_cuda_lora_expand(gn_ctx *ctx, const gn_linear_args *args, void *scratch, float *out) {
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
    const gn_status status = gn_cuda_lora_shrink(ctx, args, 0, args->n_parts, x, x_ld, scratch);
    return status ? status : gn_cuda_lora_expand(ctx, args, scratch, out);
}
