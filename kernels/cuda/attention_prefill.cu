/* attention_prefill.cu - causal attention of long chunks over the paged cache, in bfloat16: the
 * forward pass of attention_tiles.cuh. An F8 cache is widened on its way into shared memory, where
 * its scales follow the tiles. */
#include "attention_tiles.cuh"

#include <limits.h>

enum { TOKENS = GN_CUDA_KV_TOKENS };

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

/* Of two tiles in turn, the scales of their keys and then of their values. */
template <typename C> constexpr int SCALES = is_f8<C> ? 2 * 2 * KEYS : 0;

/* A thread takes one. */
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
static __device__ __forceinline__ void apply_scales(float (*score)[KEYS / 8][4],
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

/* grid: heads, tiles. C: what the cache holds. */
template <int D, int M, typename C>
static __global__ void __launch_bounds__(THREADS, 2)
    prefill_kernel(const gn_cuda_attention_args a) {
    extern __shared__ __align__(128) char memory[];
    pdl_trigger();
    const int lane = threadIdx.x % WARP;
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

    const uint32_t at = shared_address(memory);
    float *scales = (float *)(memory + SHARED<D, M>);
    const C *k = (const C *)a.k + (int64_t)kv_head * TOKENS * D;
    const C *v = (const C *)a.v + (int64_t)kv_head * TOKENS * D;
    const int64_t head_at = (int64_t)head * D;
    copy_rows<D, ROWS<M>, THREADS>(at, (const bf16 *)a.q + row0 * a.q_ld + head_at, a.q_ld, n_rows);
    attended<D, M> mine = {};
    attend(
        mine, at, position0, n_tiles, a.scale * LOG2_E,
        [&](uint32_t keys, uint32_t values, int j) {
            const int p0 = j * KEYS, block = p0 / TOKENS;
            if (j > 0 && block % WARP == 0)
                entries = block + lane < n_blocks ? table[block + lane] : 0;
            copy_tile<D>(keys, k, a.k_ld, entries, block % WARP, p0, end);
            copy_tile<D>(values, v, a.v_ld, entries, block % WARP, p0, end);
            copy_scales<C>(scales + j % 2 * 2 * KEYS, a, kv_head, entries, block % WARP, p0, end);
        },
        [&](float(*score)[KEYS / 8][4], int j, bool are_weights) {
            apply_scales<M, C>(score, scales + (j % 2 * 2 + are_weights) * KEYS);
        });
    store_attended((bf16 *)a.y + row0 * a.y_ld + head_at, a.y_ld, n_rows, mine, memory);
}

static int64_t tiles_of(const gn_cuda_attention_args *args, int64_t size) {
    return max_tiles(args->rows, args->n_seqs, GN_CUDA_DECODE_ROWS + 1, size);
}

template <int D, int M, typename C>
static gn_status launch_prefill(gn_ctx *ctx, const gn_cuda_attention_args *args) {
    constexpr int BYTES = SHARED<D, M> + SCALES<C> * (int)sizeof(float);
    const int64_t tiles = tiles_of(args, ROWS<M>);
    if (tiles > 0xffff) return GN_EINVAL;
    const gn_status status = gn_cuda_status(cudaFuncSetAttribute(
        prefill_kernel<D, M, C>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES));
    return status
               ? status
               : launch(ctx, prefill_kernel<D, M, C>, dim3((unsigned)args->heads, (unsigned)tiles),
                        dim3(THREADS), BYTES, *args);
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
