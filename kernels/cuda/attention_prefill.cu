/* attention_prefill.cu - causal attention of long chunks over the paged cache, in bfloat16. An F8
 * cache is widened on its way into shared memory.
 *
 * Flash attention: a block takes 64 or 128 rows of one sequence and head, and passes over the keys
 * and values 64 positions at a time with a running maximum and sum. It is bound by matrix
 * operations (4 D of them a query and position); then by shared memory, whose fragments of keys and
 * values a warp uses for 32 rows where there are enough rows to fill the device. While one tile of
 * keys and values is multiplied the next is copied; two blocks to an SM fill each other's gaps.
 *
 * Rows of a tile in shared memory are whole 16-byte chunks, an odd number of them or permuted, so
 * that the 8 rows that one matrix load reads lie in different banks. */
#include "attention.h"

#include <limits.h>

enum { WARPS = 4, THREADS = WARPS * WARP, KEYS = 64, TOKENS = GN_CUDA_KV_TOKENS };

/* Of a row of D values: its chunks, and the step to the next row in bytes. */
template <int D> constexpr int CHUNKS = D / 8;
template <int D> constexpr int STEP = (D % 64 == 0 ? CHUNKS<D> : CHUNKS<D> | 1) * 16;

/* M: pieces of 16 rows a warp. */
template <int M> constexpr int ROWS = M * 16 * WARPS;
/* Rows of the queries' tile, then two tiles each of keys and of values; then their scales, twice
 * those of the keys and of the values. */
template <int D, int M> constexpr int TILES = (ROWS<M> + 4 * KEYS) * STEP<D>;
template <int D, int M, typename C>
constexpr int SHARED = TILES<D, M> + (is_f8<C> ? 4 * KEYS * (int)sizeof(float) : 0);

/* Byte of a chunk in a tile. */
template <int D> static __device__ __forceinline__ int chunk_at(int row, int chunk) {
    return row * STEP<D> + (D % 64 == 0 ? chunk ^ (row % 8) : chunk) * 16;
}

/* Starts copying KEYS positions from p0 on of one tensor of the cache; zeros from `end` on, where
 * memory holds anything. entries: of the block table, 32 from the one at lane 0 on, of which
 * the tile's first is `entry`. */
template <int D>
static __device__ __forceinline__ void copy_tile(uint32_t to, const bf16 *cache, int64_t ld,
                                                 int entries, int entry, int p0, int end) {
#pragma unroll
    for (int i = 0; i < KEYS * CHUNKS<D> / THREADS; i++) {
        const int at = threadIdx.x + i * THREADS, row = at / CHUNKS<D>, chunk = at % CHUNKS<D>;
        const int64_t block = __shfl_sync(0xffffffffu, entries, entry + row / TOKENS);
        copy_async_or_zeros(to + chunk_at<D>(row, chunk),
                            cache + block * ld + row % TOKENS * D + chunk * 8, p0 + row < end);
    }
}

template <int D>
static __device__ __forceinline__ void copy_tile(uint32_t to, const f8 *cache, int64_t ld,
                                                 int entries, int entry, int p0, int end) {
    constexpr int SHARE = KEYS * CHUNKS<D> / THREADS;
    uint2 codes[SHARE];
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        const int at = threadIdx.x + i * THREADS, row = at / CHUNKS<D>, chunk = at % CHUNKS<D>;
        const int64_t block = __shfl_sync(0xffffffffu, entries, entry + row / TOKENS);
        const f8 *from = cache + block * ld + row % TOKENS * D + chunk * 8;
        codes[i] = p0 + row < end ? __ldcg((const uint2 *)from) : make_uint2(0, 0);
    }
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        const int at = threadIdx.x + i * THREADS, row = at / CHUNKS<D>, chunk = at % CHUNKS<D>;
        store_shared(to + chunk_at<D>(row, chunk), widen_eight(codes[i]));
    }
}

/* The tile's scales: KEYS of the keys, then of the values. A thread takes one. */
template <typename C>
static __device__ __forceinline__ void copy_scales(float *to, const gn_cuda_attention_args &a,
                                                   int kv_head, int entries, int entry, int p0,
                                                   int end) {
    static_assert(THREADS == 2 * KEYS, "a scale a thread");
    if constexpr (is_f8<C>) {
        const int position = threadIdx.x % KEYS;
        const int64_t block = __shfl_sync(0xffffffffu, entries, entry + position / TOKENS);
        const float *scales = threadIdx.x < KEYS ? a.k_scales : a.v_scales;
        to[threadIdx.x] =
            p0 + position < end ? scale_of<C>(a, scales, block, kv_head, position % TOKENS) : 0.0f;
    }
}

/* Of positions 8n + 2c (and + 1), for score[m][n]. */
template <int M, typename C>
static __device__ __forceinline__ void apply_scales(float score[M][KEYS / 8][4],
                                                    const float *scales) {
    if constexpr (is_f8<C>) {
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
            const float2 scale = *(const float2 *)(scales + 8 * n + threadIdx.x % 4 * 2);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) score[m][n][i] *= i % 2 ? scale.y : scale.x;
        }
    }
}

/* score[m][n] of rows 16m + g (and + 8) of the warp, positions 8n + 2c (and + 1). */
template <int D, int M>
static __device__ __forceinline__ void multiply_keys(float score[M][KEYS / 8][4], uint32_t queries,
                                                     uint32_t keys) {
    const int lane = threadIdx.x % WARP;
    const int q_row = lane % 16, q_chunk = lane / 16;
    const int k_row = lane / 16 * 8 + lane % 8, k_chunk = lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
            load_matrices(a[m], queries + 16 * m * STEP<D> + chunk_at<D>(q_row, 2 * k + q_chunk));
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            uint32_t b[4];
            load_matrices(b, keys + 16 * n * STEP<D> + chunk_at<D>(k_row, 2 * k + k_chunk));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(score[m][2 * n], a[m], b);
                mma_bf16(score[m][2 * n + 1], a[m], b + 2);
            }
        }
    }
}

/* out[m][n] of the same rows, dimensions 8n + 2c (and + 1). */
template <int D, int M>
static __device__ __forceinline__ void
multiply_values(float out[M][D / 8][4], const float weight[M][KEYS / 8][4], uint32_t values) {
    const int row = threadIdx.x % 16, chunk = threadIdx.x % WARP / 16;
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *w = &weight[m][2 * k + i / 2][i % 2 * 2];
                a[m][i] = pack_bf16(w[0], w[1]);
            }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[4];
            load_turned_matrices(b, values + 16 * k * STEP<D> + chunk_at<D>(row, 2 * n + chunk));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(out[m][2 * n], a[m], b);
                mma_bf16(out[m][2 * n + 1], a[m], b + 2);
            }
        }
    }
}

/* One row's turn: scores become weights against the new maximum, what was summed shrinks to it.
 * Its elements are score[n][2 half], score[n][2 half + 1] of four lanes. `scale`: to powers of 2.
 */
template <int D>
static __device__ __forceinline__ void soften(float score[KEYS / 8][4], float out[D / 8][4],
                                              int half, float *top, float *sum, float scale) {
    float new_top = *top;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
        new_top = fmaxf(new_top, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
    new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, 1));
    new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, 2));
    const float shrink = exp2_fast((*top - new_top) * scale), base = new_top * scale;
    float added = 0.0f;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; i++) {
            score[n][i] = exp2_fast(score[n][i] * scale - base);
            added += score[n][i];
        }
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        out[n][2 * half] *= shrink;
        out[n][2 * half + 1] *= shrink;
    }
    *sum = *sum * shrink + added;
    *top = new_top;
}

/* grid: heads, tiles. C: what the cache holds. */
template <int D, int M, typename C>
static __global__ void __launch_bounds__(THREADS, 2)
    prefill_kernel(const gn_cuda_attention_args a) {
    extern __shared__ __align__(128) char memory[];
    pdl_trigger();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    /* A sequence's last rows have most to do: they go first. */
    const tile_of_seq tile = find_tile(a.batch.row0, a.n_seqs, gridDim.y - 1 - blockIdx.y,
                                       GN_CUDA_DECODE_ROWS + 1, INT_MAX, 1, ROWS<M>);
    if (tile.seq < 0) {
        pdl_wait(); /* the next kernel relies on this one having waited */
        return;
    }
    const int head = blockIdx.x, kv_head = head / (a.heads / a.kv_heads);
    const int64_t row0 = a.batch.row0[tile.seq] + tile.first;
    const int position0 = a.batch.pos0[tile.seq] + tile.first;
    const int n_rows = min(ROWS<M>, tile.rows - tile.first), end = position0 + n_rows;
    const int n_tiles = (end + KEYS - 1) / KEYS, n_blocks = (end + TOKENS - 1) / TOKENS;
    const int32_t *table = a.batch.blocks + (int64_t)tile.seq * a.max_blocks;
    int entries = lane < n_blocks ? table[lane] : 0; /* of 32 blocks: 8 tiles */
    pdl_wait();

    const uint32_t queries = shared_address(memory);
    const uint32_t keys = queries + ROWS<M> * STEP<D>, values = keys + 2 * KEYS * STEP<D>;
    float *scales = (float *)(memory + TILES<D, M>);
    const C *k = (const C *)a.k + (int64_t)kv_head * TOKENS * D;
    const C *v = (const C *)a.v + (int64_t)kv_head * TOKENS * D;
    const bf16 *q = (const bf16 *)a.q + row0 * a.q_ld + (int64_t)head * D;
    for (int at = threadIdx.x; at < ROWS<M> * CHUNKS<D>; at += THREADS) {
        const int row = at / CHUNKS<D>, chunk = at % CHUNKS<D>;
        const bool is_there = row < n_rows;
        copy_async_or_zeros(queries + chunk_at<D>(row, chunk),
                            q + (is_there ? row : 0) * a.q_ld + chunk * 8, is_there);
    }
    copy_tile<D>(keys, k, a.k_ld, entries, 0, 0, end);
    copy_tile<D>(values, v, a.v_ld, entries, 0, 0, end);
    copy_scales<C>(scales, a, kv_head, entries, 0, 0, end);

    const float scale = a.scale * 1.44269504f;
    const int warp_row = 16 * M * warp;
    const uint32_t my_queries = queries + warp_row * STEP<D>;
    float out[M][D / 8][4] = {}, top[M][2], sum[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
        for (int half = 0; half < 2; half++) top[m][half] = -INFINITY, sum[m][half] = 0.0f;

    for (int j = 0; j < n_tiles; j++) {
        const int now = j % 2 * KEYS * STEP<D>, then = KEYS * STEP<D> - now;
        const float *key_scales = scales + j % 2 * 2 * KEYS;
        wait_for_all_copies();
        __syncthreads(); /* everybody's are there, and nobody reads the other pair of tiles */
        if (j + 1 < n_tiles) {
            const int p0 = (j + 1) * KEYS, block = p0 / TOKENS;
            if (block % WARP == 0) entries = block + lane < n_blocks ? table[block + lane] : 0;
            copy_tile<D>(keys + then, k, a.k_ld, entries, block % WARP, p0, end);
            copy_tile<D>(values + then, v, a.v_ld, entries, block % WARP, p0, end);
            copy_scales<C>(scales + (j + 1) % 2 * 2 * KEYS, a, kv_head, entries, block % WARP, p0,
                           end);
        }
        if (j * KEYS > position0 + warp_row + 16 * M - 1) continue; /* all after the warp's rows */
        float score[M][KEYS / 8][4] = {};
        multiply_keys<D, M>(score, my_queries, keys + now);
        apply_scales<M, C>(score, key_scales);
        if ((j + 1) * KEYS - 1 > position0 + warp_row) {
#pragma unroll
            for (int x = 0; x < M * KEYS / 8 * 4; x++) {
                const int m = x / (KEYS / 8 * 4), n = x / 4 % (KEYS / 8), i = x % 4;
                const int row = warp_row + 16 * m + lane / 4 + i / 2 * 8;
                const int p = j * KEYS + 8 * n + lane % 4 * 2 + i % 2;
                if (p > position0 + row) score[m][n][i] = -INFINITY;
            }
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                soften<D>(score[m], out[m], half, &top[m][half], &sum[m][half], scale);
        apply_scales<M, C>(score, key_scales + KEYS);
        multiply_values<D, M>(out, score, values + now);
    }

    /* By way of the warp's own queries, which are no longer needed, for whole rows at once. */
    char *mine = memory + warp_row * STEP<D>;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[m][half];
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            const float over = 1.0f / total;
            const int row = 16 * m + 8 * half + lane / 4;
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                *(uint32_t *)(mine + chunk_at<D>(row, n) + lane % 4 * 4) =
                    pack_bf16(out[m][n][2 * half] * over, out[m][n][2 * half + 1] * over);
        }
    __syncwarp();
    for (int at = lane; at < 16 * M * CHUNKS<D>; at += WARP) {
        const int row = at / CHUNKS<D>, chunk = at % CHUNKS<D>;
        if (warp_row + row >= n_rows) break;
        bf16 *y = (bf16 *)a.y + (row0 + warp_row + row) * a.y_ld + (int64_t)head * D;
        *(uint4 *)(y + chunk * 8) = *(const uint4 *)(mine + chunk_at<D>(row, chunk));
    }
}

/* No more tiles than this, whatever rows each of the sequences has. */
static int64_t tiles_of(const gn_cuda_attention_args *args, int64_t size) {
    const int64_t T = args->rows, most = T / (GN_CUDA_DECODE_ROWS + 1);
    const int64_t seqs = args->n_seqs < most ? args->n_seqs : most;
    return (T + (size - 1) * seqs) / size;
}

template <int D, int M, typename C>
static gn_status launch_prefill(gn_ctx *ctx, const gn_cuda_attention_args *args) {
    const int64_t tiles = tiles_of(args, ROWS<M>);
    if (tiles > 0xffff) return GN_EINVAL;
    const gn_status status = gn_cuda_status(cudaFuncSetAttribute(
        prefill_kernel<D, M, C>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED<D, M, C>));
    return status
               ? status
               : launch(ctx, prefill_kernel<D, M, C>, dim3((unsigned)args->heads, (unsigned)tiles),
                        dim3(THREADS), SHARED<D, M, C>, *args);
}

template <int D>
static gn_status prefill(gn_ctx *ctx, const gn_cuda_attention_args *args, bool has_codes) {
    if (has_codes) return launch_prefill<D, 1, f8>(ctx, args); /* one kernel less to compile */
    /* Tall tiles where they still make three blocks for every two SMs. */
    const bool tall = 2 * tiles_of(args, ROWS<2>) * args->heads >= 3 * (int64_t)ctx->cuda->sms;
    return tall ? launch_prefill<D, 2, bf16>(ctx, args) : launch_prefill<D, 1, bf16>(ctx, args);
}

gn_status gn_cuda_attention_prefill(gn_ctx *ctx, const gn_cuda_attention_args *args,
                                    bool has_codes) {
    switch (args->D) {
    case 64: return prefill<64>(ctx, args, has_codes);
    case 80: return prefill<80>(ctx, args, has_codes);
    case 96: return prefill<96>(ctx, args, has_codes);
    default: return prefill<128>(ctx, args, has_codes);
    }
}
