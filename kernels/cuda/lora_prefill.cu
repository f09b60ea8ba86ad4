/* lora_prefill.cu - LoRA terms of batches of many rows, bound by the tensor cores.
 *
 * Shrinking is a product of its own. That of a single term is one of cuBLAS for all parts, whose
 * A's are copied below one another. For several terms, a block computes 64 ranks for 128 rows of a
 * term, 64 columns of K at a time, three of which are in shared memory or on their way there. What
 * expanding adds to a product is part of the product: x and the weight are made wider by one column
 * a rank, which hold h = scale A x and B. The rows of other terms hold zeros there. So nothing is
 * read or written again, and K grows by what all ranks together are of it. */
#include "gemm.h"
#include "lora.cuh"
#include "operands.h"

enum {
    THREADS = LORA_THREADS,
    CHUNK = 128,
    RANKS = 64,
    ROWS = CHUNK + RANKS, /* of x, then of A */
    COLUMNS = 64,         /* 128 bytes, 8 pieces of 16 */
    ROW_BYTES = COLUMNS * 2,
    STAGE_BYTES = ROWS * ROW_BYTES,
    STAGES = 3,
    WARP_ROWS = 32, /* a warp's share of a block: 4 by 2 warps */
    WARP_RANKS = 32,
};

/* ---- shrink ---- */

struct tile {
    struct chunk chunk;
    gn_tensor a;
    int rank0;
    bool vector;
};

/* Piece `at` of a row stands where odd rows have their halves swapped: a quarter of a warp reads
 * half of two rows, from all banks. */
static __device__ __forceinline__ int place_of(int row, int at) {
    return row * ROW_BYTES + (at ^ (row % 2 * 4)) * 16;
}

/* Columns [64 k, 64 k + 64) of the block's rows of x and A; zeros where there are none. */
static __device__ __forceinline__ void copy_stage(uint8_t *stage, const struct lora_call &c,
                                                  const struct tile &t, int64_t k) {
#pragma unroll
    for (int i = 0; i < ROWS * 8 / THREADS; i++) {
        const int row = i * (THREADS / 8) + (int)threadIdx.x / 8, at = (int)threadIdx.x % 8;
        const bool is_x = i < CHUNK * 8 / THREADS;
        const gn_tensor m = is_x ? x_of(c) : t.a;
        const int64_t from = is_x ? t.chunk.row + row : t.rank0 + row - CHUNK;
        const int64_t end = is_x ? t.chunk.row + t.chunk.rows : t.a.shape[0];
        const int64_t column = k * COLUMNS + at * 8;
        const bool exists = from < end && column < c.K;
        uint8_t *to = stage + place_of(row, at);
        if (t.vector)
            copy_async_or_zeros(shared_address(to),
                                (const bf16 *)m.data + (exists ? from * m.ld + column : 0), exists);
        else
            *(uint4 *)to = load8<false>(m, from * m.ld + column, exists ? (int)(c.K - column) : 0);
    }
    commit_copies();
}

/* acc += a warp's 32 ranks times its 32 rows, over a stage's columns. */
static __device__ __forceinline__ void multiply_stage(float acc[2][4][4], const uint8_t *stage,
                                                      int row0, int rank0, int ranks) {
    const int lane = threadIdx.x % WARP, g = lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int at = half * 4 + lane % 4;
        uint4 x[4];
#pragma unroll
        for (int n = 0; n < 4; n++) x[n] = *(const uint4 *)(stage + place_of(row0 + 8 * n + g, at));
#pragma unroll
        for (int m = 0; m < 2; m++) {
            if (rank0 + 16 * m >= ranks) break;
            const int row = CHUNK + rank0 + 16 * m + g;
            const uint4 low = *(const uint4 *)(stage + place_of(row, at));
            const uint4 high = *(const uint4 *)(stage + place_of(row + 8, at));
            const uint32_t a0[4] = {low.x, high.x, low.y, high.y};
            const uint32_t a1[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const uint32_t b0[2] = {x[n].x, x[n].y}, b1[2] = {x[n].z, x[n].w};
                mma_bf16(acc[m][n], a0, b0);
                mma_bf16(acc[m][n], a1, b1);
            }
        }
    }
}

/* acc = the product over stages [first, first + n) of K, two of them ahead on their way. */
static __device__ __forceinline__ void multiply(float acc[2][4][4], uint8_t *stages,
                                                const struct lora_call &c, const struct tile &t,
                                                int row0, int rank0, int64_t first, int n) {
    for (int k = 0; k < STAGES - 1; k++) {
        if (k < n)
            copy_stage(stages + k * STAGE_BYTES, c, t, first + k);
        else
            commit_copies();
    }
#pragma unroll 1
    for (int k = 0; k < n; k++) {
        const int next = k + STAGES - 1;
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        if (next < n)
            copy_stage(stages + next % STAGES * STAGE_BYTES, c, t, first + next);
        else
            commit_copies();
        if (row0 < t.chunk.rows)
            multiply_stage(acc, stages + k % STAGES * STAGE_BYTES, row0, rank0,
                           (int)min(t.a.shape[0] - t.rank0, (int64_t)RANKS));
    }
}

/* Block (piece, rank tile and part, chunk). `parts` of them from c.part0 on. */
static __global__ void __launch_bounds__(THREADS, 2)
    shrink_many_kernel(const __grid_constant__ struct lora_call c, int parts) {
    extern __shared__ __align__(128) uint8_t stages[];
    pdl_trigger();
    const int part = c.part0 + blockIdx.y % parts, pieces = gridDim.x;
    struct tile t;
    t.rank0 = blockIdx.y / parts * RANKS;
    t.chunk = find_chunk(c, blockIdx.z, CHUNK);
    pdl_wait();
    if (!t.chunk.term) return;
    const gn_lora_pair pair = t.chunk.term->placed[c.pair + part];
    if (t.rank0 >= pair.rank) return;
    t.a = pair.a;
    t.vector = is_vector(pair.a, 8) && c.x_ld % 8 == 0;
    const float scale = t.chunk.term->scale * pair.scale;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int row0 = warp % 4 * WARP_ROWS, rank0 = warp / 4 * WARP_RANKS;
    const int64_t steps = (c.K + COLUMNS - 1) / COLUMNS;
    const int64_t first = steps * blockIdx.x / pieces, end = steps * (blockIdx.x + 1) / pieces;
    float acc[2][4][4] = {};
    multiply(acc, stages, c, t, row0, rank0, first, (int)(end - first));

    const int ranks = min(whole_steps(pair.rank) - t.rank0, (int)RANKS);
    const int sum = blockIdx.z * gridDim.y + blockIdx.y;
    float *partial = c.partial + (int64_t)sum * pieces * CHUNK * RANKS;
    float *piece = partial + (int64_t)blockIdx.x * CHUNK * RANKS;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int rank = rank0 + 16 * m + lane / 4 + i / 2 * 8;
                const int row = row0 + 8 * n + lane % 4 * 2 + i % 2;
                if (row >= t.chunk.rows || rank >= ranks) continue;
                if (pieces > 1)
                    piece[row * RANKS + rank] = acc[m][n][i];
                else
                    h_at(c, t.chunk.h_row + row, part)[t.rank0 + rank] =
                        from_float<bf16>(scale * acc[m][n][i]);
            }
    if (pieces > 1)
        finish_pieces(c, t.chunk, part, scale, t.rank0, ranks, partial, pieces, CHUNK, RANKS,
                      &c.counters[sum]);
}

size_t gn_cuda_lora_partial_bytes(const gn_ctx *ctx) {
    return (size_t)lora_slots(ctx) * CHUNK * RANKS * sizeof(float);
}

static const gn_lora_pair *pairs_of(const gn_linear_args *args, const struct lora_call *c) {
    return args->lora->pairs + c->pair + c->part0;
}

/* A single term whose h has no gaps, and one scale. Not where launches are recorded: those must
 * look their terms up. */
static bool is_one_product(const gn_ctx *ctx, const gn_linear_args *args, const struct lora_call *c,
                           int n_parts) {
    const int64_t stack = (int64_t)n_parts * c->pitch * c->K * (int64_t)sizeof(bf16);
    if (c->n_terms != 1 || stack > (int64_t)gn_cuda_lora_partial_bytes(ctx)) return false;
    const gn_lora_pair *pairs = pairs_of(args, c);
    for (int i = 0; i < n_parts; i++)
        if (pairs[i].rank != c->pitch || pairs[i].scale != pairs[0].scale) return false;
    cudaStreamCaptureStatus capture;
    return cudaStreamIsCapturing(gn_cuda_stream(ctx), &capture) == cudaSuccess &&
           capture == cudaStreamCaptureStatusNone;
}

static gn_status shrink_in_one_product(gn_ctx *ctx, const gn_linear_args *args,
                                       const struct lora_call *c, int n_parts) {
    const gn_lora *term = args->lora;
    const gn_lora_pair *pairs = pairs_of(args, c);
    const bool in_place = n_parts == 1 && pairs->a.dtype == GN_BF16;
    gn_cuda_factor a = {c->partial, c->K, true};
    if (in_place) a = {pairs->a.data, pairs->a.ld, true};
    gn_status status = GN_OK;
    for (int i = 0; i < n_parts && !in_place && !status; i++) {
        bf16 *at = (bf16 *)c->partial + (int64_t)i * c->pitch * c->K;
        const gn_tensor to = gn_tensor_2d(at, GN_BF16, c->pitch, c->K);
        status = gn_cuda_operands(ctx, &to, &pairs[i].a, NULL);
    }
    if (status || term->rows == 0) return status;
    const gn_cuda_factor x = {c->x + term->row0 * c->x_ld, c->x_ld, false};
    return gn_cuda_gemm(ctx, term->rows, (int64_t)n_parts * c->pitch, c->K,
                        term->scale * pairs->scale, x, a, 0, c->h + c->part0 * c->pitch, GN_BF16,
                        (int64_t)c->n_parts * c->pitch);
}

gn_status gn_cuda_lora_shrink_many(gn_ctx *ctx, const gn_linear_args *args,
                                   const struct lora_call *c, int n_parts) {
    if (is_one_product(ctx, args, c, n_parts)) return shrink_in_one_product(ctx, args, c, n_parts);
    const int64_t chunks = chunks_bound(c->n_terms, covered_rows(args), CHUNK);
    const int64_t tiles = (int64_t)n_parts * ((max_rank_of(args) + RANKS - 1) / RANKS);
    const int pieces = lora_pieces(ctx, chunks * tiles, c->K / (4 * COLUMNS));
    const size_t shared = STAGES * STAGE_BYTES;
    if (cudaFuncSetAttribute(shrink_many_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)shared) != cudaSuccess)
        return GN_EDEVICE;
    return launch(ctx, shrink_many_kernel,
                  dim3((unsigned)pieces, (unsigned)tiles, (unsigned)chunks), dim3(THREADS), shared,
                  *c, n_parts);
}

/* ---- wider operands ---- */

enum { EXTEND_ROWS = 16 };

struct extension {
    struct lora_call call;
    int part;
    int64_t row0, rows; /* of the weight */
    int64_t columns;    /* of both, of which those from K on are written */
    bf16 *x, *w;        /* x NULL: only w; rows of w are as far apart */
};

/* Where the rest of a row stands: of x the h of steps, of w their B. */
static __device__ __forceinline__ bf16 extended(const struct extension &e, const struct step &s,
                                                bool is_x, int64_t row, int rank) {
    if (is_x) {
        const int64_t h_ld = (int64_t)e.call.n_parts * e.call.pitch;
        const bool covers = row >= s.from && row < s.to;
        return covers ? e.call.h[s.h + row * h_ld + rank] : from_float<bf16>(0.0f);
    }
    if (rank >= s.b.shape[1]) return from_float<bf16>(0.0f);
    const int64_t at = (e.row0 + row) * s.b.ld + rank;
    return s.b.dtype == GN_F32 ? from_float<bf16>(((const float *)s.b.data)[at])
                               : ((const bf16 *)s.b.data)[at];
}

/* A block takes 16 rows of x, or, after those, of w. */
static __global__ void __launch_bounds__(THREADS)
    extend_kernel(const __grid_constant__ struct extension e) {
    __shared__ struct step steps[LORA_MAX_STEPS];
    pdl_trigger();
    pdl_wait();
    const int64_t x_blocks = e.x ? (e.call.T + EXTEND_ROWS - 1) / EXTEND_ROWS : 0;
    const bool is_x = blockIdx.x < x_blocks;
    const int64_t row0 = (is_x ? blockIdx.x : blockIdx.x - x_blocks) * EXTEND_ROWS;
    const int rows = (int)min((is_x ? (int64_t)e.call.T : e.rows) - row0, (int64_t)EXTEND_ROWS);
    const int64_t ld = is_x ? e.call.x_ld : e.columns;
    bf16 *to = (is_x ? e.x : e.w) + row0 * ld;
    int all = 0;
    for (int first = 0; first == 0 || first < all; first += LORA_MAX_STEPS) {
        bool vector;
        all = list_steps(steps, e.call, e.part, 0, (int)e.call.T, first, &vector);
        const int width = min(all - first, (int)LORA_MAX_STEPS) * LORA_STEP;
        for (int i = threadIdx.x; i < rows * width; i += THREADS) {
            const int row = i / width, column = i % width;
            to[row * ld + e.call.K + first * LORA_STEP + column] =
                extended(e, steps[column / LORA_STEP], is_x, row0 + row, column % LORA_STEP);
        }
        __syncthreads(); /* of the list's readers */
    }
    const int64_t filled = e.call.K + (int64_t)all * LORA_STEP, width = e.columns - filled;
    for (int64_t i = threadIdx.x; i < rows * width; i += THREADS)
        to[i / width * ld + filled + i % width] = from_float<bf16>(0.0f);
}

int64_t gn_cuda_lora_extended(const gn_linear_args *args) {
    int64_t most = 0;
    for (int part = 0; part < args->n_parts; part++) {
        int64_t ranks = 0;
        for (int i = 0; i < args->n_lora; i++)
            ranks += whole_steps(args->lora[i].pairs[args->pair + part].rank);
        most = ranks > most ? ranks : most;
    }
    return (args->x.shape[1] + most + 63) / 64 * 64;
}

gn_status gn_cuda_lora_extend(gn_ctx *ctx, const gn_linear_args *args, int part, void *scratch,
                              void *x, int64_t x_ld, void *w, int64_t row0, int64_t rows,
                              int64_t columns) {
    struct extension e = {};
    e.call = call_of(ctx, args, x, x_ld, scratch);
    e.part = part;
    e.row0 = row0;
    e.rows = rows;
    e.columns = columns;
    e.x = (bf16 *)x;
    e.w = (bf16 *)w;
    const int64_t blocks = (x ? (e.call.T + EXTEND_ROWS - 1) / EXTEND_ROWS : 0) +
                           (rows + EXTEND_ROWS - 1) / EXTEND_ROWS;
    return launch(ctx, extend_kernel, dim3((unsigned)blocks), dim3(THREADS), 0, e);
}
