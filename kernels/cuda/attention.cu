/* attention.cu - causal attention over the paged cache: the exact way and decoding. Twin:
 * cpu/attention.c. attention_prefill.cu has the way of long chunks.
 *
 * Exact: a block per row and head, in float32 and in an order that depends on the row's own
 * length alone. It serves compute F32, and every shape that the other two do not take.
 *
 * Decoding reads each key and value once for a handful of queries, so it is bound by memory: 16 KiB
 * a token and layer of a 7B model. A tile is up to 8 queries that share a kv head (the heads of a
 * GQA group, the rows of a short chunk); a block takes one tile and kv head, its warps take cache
 * blocks of 16 positions in turn, straight from global memory into matrix fragments. Keys are the A
 * operand of S' = K Q' (16 positions by 8 queries), with the dimensions in the order in which a
 * lane reads 8 at once; values, two positions zipped, are the A operand of O' = V' P'. An F8
 * cache's scales multiply scores after the product, and weights before theirs. What the
 * matrix units waste on absent queries costs nothing here, and a lane's running maximum belongs to
 * the columns of its own accumulators. The next keys are under way while values are multiplied.
 *
 * Partial results (maximum, sum, output) of the warps are combined in shared memory. Where
 * tiles are few and contexts long, several blocks split a context as well, and the last to
 * arrive combines theirs. */
#include "attention_decode.cuh"

#include <limits.h>

/* ---- exact ---- */

enum { EXACT_THREADS = 128, MAX_OWN_DIMS = GN_MAX_HEAD_DIM / EXACT_THREADS };

/* EXACT_THREADS positions at a time: a score a thread, then dimensions over the threads. */
template <typename T, typename C>
static __global__ void __launch_bounds__(EXACT_THREADS)
    exact_kernel(const gn_cuda_attention_args a) {
    __shared__ float query[GN_MAX_HEAD_DIM],
        weight[EXACT_THREADS]; /* weight: by the value's scale */
    __shared__ int64_t value_at[EXACT_THREADS];
    pdl_trigger();
    const int row = blockIdx.x / a.heads, head = blockIdx.x % a.heads, D = a.D;
    const int kv_head = head / (a.heads / a.kv_heads), thread = threadIdx.x;
    const int length = a.batch.row_pos[row] + 1;
    const int32_t *blocks = a.batch.blocks + (int64_t)a.batch.row_seq[row] * a.max_blocks;
    const C *keys = (const C *)a.k, *values = (const C *)a.v;
    pdl_wait();

    const T *q = (const T *)a.q + row * a.q_ld + (int64_t)head * D;
    for (int d = thread; d < D; d += EXACT_THREADS) query[d] = to_float(q[d]);
    __syncthreads();
    float top = -INFINITY, sum = 0.0f, out[MAX_OWN_DIMS] = {0.0f};
    for (int p0 = 0; p0 < length; p0 += EXACT_THREADS) {
        const int p = p0 + thread, n = min(EXACT_THREADS, length - p0);
        float score = -INFINITY, value_scale = 0.0f;
        if (thread < n) {
            const int64_t block = blocks[p / a.tokens];
            const int64_t in_block = (int64_t)(kv_head * a.tokens + p % a.tokens) * D;
            const C *key = keys + block * a.k_ld + in_block;
            score = 0.0f;
            for (int d = 0; d < D; d++) score += query[d] * to_float(key[d]);
            score *= a.scale * scale_of<C>(a, a.k_scales, block, kv_head, p % a.tokens);
            value_scale = scale_of<C>(a, a.v_scales, block, kv_head, p % a.tokens);
            value_at[thread] = block * a.v_ld + in_block;
        }
        const float new_top = fmaxf(top, block_max<EXACT_THREADS>(score));
        const float shrink = expf(top - new_top), e = expf(score - new_top);
        weight[thread] = e * value_scale;
        sum = sum * shrink + block_sum(e); /* its barriers publish weight and value_at */
        top = new_top;
        for (int i = 0; i < MAX_OWN_DIMS; i++) {
            const int d = thread + i * EXACT_THREADS;
            if (d >= D) break;
            out[i] *= shrink;
            for (int j = 0; j < n; j++) out[i] += weight[j] * to_float(values[value_at[j] + d]);
        }
        __syncthreads();
    }
    T *y = (T *)a.y + row * a.y_ld + (int64_t)head * D;
    for (int i = 0; i < MAX_OWN_DIMS; i++) {
        const int d = thread + i * EXACT_THREADS;
        if (d < D) y[d] = from_float<T>(out[i] / sum);
    }
}

static gn_status attend_exactly(gn_ctx *ctx, const gn_cuda_attention_args *args, gn_dtype dtype,
                                gn_dtype cache) {
    const int64_t grid = (int64_t)args->rows * args->heads;
    if (grid > INT_MAX) return GN_EINVAL;
    const dim3 blocks((unsigned)grid), threads(EXACT_THREADS);
    GN_FOR_FLOAT(dtype, {
        if (cache == GN_F8) return launch(ctx, exact_kernel<T, f8>, blocks, threads, 0, *args);
        return cache == GN_F32 ? launch(ctx, exact_kernel<T, float>, blocks, threads, 0, *args)
                               : launch(ctx, exact_kernel<T, bf16>, blocks, threads, 0, *args);
    });
    return GN_OK;
}

/* ---- decoding ---- */

enum {
    FEW_WARPS = 4,  /* of a block where there are many; BLOCKS_PER_SM fit */
    MANY_WARPS = 8, /* where there are few; one fits */
    BLOCKS_PER_SM = 3,
    MAX_SPLITS = 32,
};

/* A partial result: outputs (QUERIES, P) before the division by their sum, then maximum (of
 * scores by log2 e) and sum of each query. P is the head's size padded to whole fragments. */
template <int P> constexpr int RECORD = QUERIES *(P + 2);

/* Two dimensions of a query from n partial results, and their common maximum and sum. FAR: other
 * blocks wrote them, to be read past the first cache. */
template <int P, bool FAR>
static __device__ __forceinline__ float2 combine(const float *records, int n, int query, int d,
                                                 float *top, float *sum) {
    const float *state = records + QUERIES * P + 2 * query, *out = records + query * P + d;
    float2 total = make_float2(0.0f, 0.0f);
    *top = -INFINITY;
    *sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < n; i++) {
        const float2 *s = (const float2 *)(state + i * RECORD<P>);
        const float2 *o = (const float2 *)(out + i * RECORD<P>);
        const float2 top_sum = FAR ? __ldcg(s) : *s, part = FAR ? __ldcg(o) : *o;
        if (top_sum.x == -INFINITY) continue; /* saw no position of this query's */
        const float new_top = fmaxf(*top, top_sum.x);
        const float old_scale = exp2_fast(*top - new_top), scale = exp2_fast(top_sum.x - new_top);
        total.x = total.x * old_scale + part.x * scale;
        total.y = total.y * old_scale + part.y * scale;
        *sum = *sum * old_scale + top_sum.y * scale;
        *top = new_top;
    }
    return total;
}

/* Where query `i` of a sequence lies in q or y. */
static __device__ __forceinline__ int64_t query_at(const gn_cuda_attention_args &a, int64_t ld,
                                                   int row0, int kv_head, int i) {
    const int group = a.heads / a.kv_heads;
    return (row0 + i / group) * ld + (int64_t)(kv_head * group + i % group) * a.D;
}

/* Those of positions g and g + 8 of a cache block; of the first n. */
template <typename C>
static __device__ __forceinline__ void load_scales(float scale[2], const gn_cuda_attention_args &a,
                                                   const float *scales, int64_t block, int kv_head,
                                                   int n) {
    const int g = threadIdx.x % WARP / 4;
#pragma unroll
    for (int i = 0; i < 2; i++)
        scale[i] = g + 8 * i < n ? scale_of<C>(a, scales, block, kv_head, g + 8 * i) : 0.0f;
}

/* scores[i] of position g + i/2 * 8. */
template <typename C>
static __device__ __forceinline__ void apply_scales(float scores[4], const float scale[2]) {
    if constexpr (is_f8<C>) {
#pragma unroll
        for (int i = 0; i < 4; i++) scores[i] *= scale[i / 2];
    }
}

/* grid: tiles, kv heads, splits. C: what the cache holds. */
template <int P, int WARPS, typename C>
static __global__ void __launch_bounds__(WARPS *WARP, WARPS == FEW_WARPS ? BLOCKS_PER_SM : 1)
    decode_kernel(const gn_cuda_attention_args a, float *partials, uint32_t *counters) {
    extern __shared__ float records[]; /* one a warp */
    __shared__ bool is_last;
    pdl_trigger();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int g = lane / 4, c = lane % 4, D = a.D, group = a.heads / a.kv_heads;
    const int kv_head = blockIdx.y, splits = gridDim.z;
    const tile_of_seq tile =
        find_tile(a.batch.row0, a.n_seqs, blockIdx.x, 1, GN_CUDA_DECODE_ROWS, group, QUERIES);
    if (tile.seq < 0) {
        pdl_wait(); /* a chain of launches is as good as its weakest link */
        return;
    }
    const int row0 = a.batch.row0[tile.seq], pos0 = a.batch.pos0[tile.seq];
    const int n_queries = min(QUERIES, tile.rows * group - tile.first);
    int length[2]; /* that this lane's queries see */
#pragma unroll
    for (int i = 0; i < 2; i++)
        length[i] = 2 * c + i < n_queries ? pos0 + (tile.first + 2 * c + i) / group + 1 : 0;
    const int longest = pos0 + (tile.first + n_queries - 1) / group + 1;

    /* This warp's cache blocks are first, first + step, ...; each lane knows one of the next 32. */
    const int first = blockIdx.z * WARPS + warp, step = splits * WARPS;
    const int n_blocks = (longest + TOKENS - 1) / TOKENS;
    const int32_t *table = a.batch.blocks + (int64_t)tile.seq * a.max_blocks;
    const int64_t head_at = (int64_t)kv_head * TOKENS * D;
    const C *keys_of_head = (const C *)a.k + head_at;
    const C *values_of_head = (const C *)a.v + head_at;
    const int64_t mine = first + (int64_t)lane * step;
    int32_t entries = mine < n_blocks ? table[mine] : 0;
    int64_t block = __shfl_sync(0xffffffffu, entries, 0);

    /* Only positions from pos0 on are written by kernels that may still run. */
    uint4 query[P / 32];
    typename eight_of<C>::type keys[P / 32][2], values[P / 64][4];
    float key_scale[2], value_scale[2];
    const bool is_settled = (first + 1) * TOKENS <= pos0;
    if (is_settled) {
        load_keys<P>(keys, keys_of_head + block * a.k_ld, D);
        load_scales<C>(key_scale, a, a.k_scales, block, kv_head, TOKENS);
    }
    pdl_wait();
    if (!is_settled && first < n_blocks) {
        load_keys<P>(keys, keys_of_head + block * a.k_ld, D);
        load_scales<C>(key_scale, a, a.k_scales, block, kv_head, TOKENS);
    }
    const bf16 *q = (const bf16 *)a.q + query_at(a, a.q_ld, row0, kv_head, tile.first + g);
#pragma unroll
    for (int s = 0; s < P / 32; s++) {
        const int d = 32 * s + 8 * c;
        query[s] = make_uint4(0, 0, 0, 0);
        if (g < n_queries && d < D) query[s] = *(const uint4 *)(q + d);
    }

    const float scale = a.scale * LOG2_E;
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, out[P / 64][4][4] = {};
    for (int b = first, i = 0; b < n_blocks; b += step) {
        const int p0 = b * TOKENS;
        load_values<P>(values, values_of_head + block * a.v_ld, longest - p0, D);
        load_scales<C>(value_scale, a, a.v_scales, block, kv_head, longest - p0);
        float score[4];
        multiply_keys<P>(score, keys, query);
        apply_scales<C>(score, key_scale);
        if (++i == WARP) {
            const int64_t next = b + (lane + 1) * (int64_t)step;
            entries = next < n_blocks ? table[next] : 0;
            i = 0;
        }
        block = __shfl_sync(0xffffffffu, entries, i);
        if (b + step < n_blocks) {
            load_keys<P>(keys, keys_of_head + block * a.k_ld, D);
            load_scales<C>(key_scale, a, a.k_scales, block, kv_head, TOKENS);
        }

        float shrink[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            score[j] = p0 + g < length[j] ? score[j] * scale : -INFINITY;
            score[2 + j] = p0 + 8 + g < length[j] ? score[2 + j] * scale : -INFINITY;
            float new_top = fmaxf(top[j], fmaxf(score[j], score[2 + j]));
#pragma unroll
            for (int d = 4; d < WARP; d *= 2)
                new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, d));
            const float base = new_top == -INFINITY ? 0.0f : new_top;
            shrink[j] = exp2_fast(top[j] - base);
            score[j] = exp2_fast(score[j] - base);
            score[2 + j] = exp2_fast(score[2 + j] - base);
            sum[j] = sum[j] * shrink[j] + score[j] + score[2 + j];
            top[j] = new_top;
        }
#pragma unroll
        for (int x = 0; x < P / 64 * 16; x++) out[x / 16][x / 4 % 4][x % 4] *= shrink[x % 2];
        apply_scales<C>(score, value_scale);
        multiply_values<P>(out, values, score);
    }

    float *record = records + warp * RECORD<P>;
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int d = 4; d < WARP; d *= 2) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], d);
        const int at = 2 * c + j;
        if (at >= n_queries) continue;
#pragma unroll
        for (int h = 0; h < P / 64; h++) {
            float4 *to = (float4 *)(record + at * P + 64 * h + 8 * g);
            to[0] = make_float4(out[h][0][j], out[h][0][2 + j], out[h][1][j], out[h][1][2 + j]);
            to[1] = make_float4(out[h][2][j], out[h][2][2 + j], out[h][3][j], out[h][3][2 + j]);
        }
        if (g == 0) *(float2 *)(record + QUERIES * P + 2 * at) = make_float2(top[j], sum[j]);
    }
    __syncthreads();

    const int unit = blockIdx.x * a.kv_heads + kv_head;
    float *shared_by_splits = partials + (int64_t)unit * splits * RECORD<P>;
    if (splits > 1) {
        float *to = shared_by_splits + blockIdx.z * RECORD<P>;
        for (int i = threadIdx.x; i < n_queries * D / 2; i += blockDim.x) {
            const int at = i / (D / 2), d = i % (D / 2) * 2;
            float2 top_sum;
            *(float2 *)(to + at * P + d) =
                combine<P, false>(records, WARPS, at, d, &top_sum.x, &top_sum.y);
            if (d == 0) *(float2 *)(to + QUERIES * P + 2 * at) = top_sum;
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) is_last = atomicAdd(&counters[unit], 1u) == (uint32_t)splits - 1;
        __syncthreads();
        if (!is_last) return;
        if (threadIdx.x == 0) counters[unit] = 0;
        __threadfence();
    }
    for (int i = threadIdx.x; i < n_queries * D / 2; i += blockDim.x) {
        const int at = i / (D / 2), d = i % (D / 2) * 2;
        float most, total;
        const float2 o = splits > 1
                             ? combine<P, true>(shared_by_splits, splits, at, d, &most, &total)
                             : combine<P, false>(records, WARPS, at, d, &most, &total);
        bf16 *y = (bf16 *)a.y + query_at(a, a.y_ld, row0, kv_head, tile.first + at) + d;
        *(bf162 *)y = __floats2bfloat162_rn(o.x / total, o.y / total);
    }
}

/* No more tiles than this, whatever rows each of the sequences has. */
static int64_t decode_tiles(const gn_cuda_attention_args *args) {
    const int64_t group = args->heads / args->kv_heads, n = args->n_seqs;
    const int64_t rows = gn_min(args->rows, GN_CUDA_DECODE_ROWS * n);
    return gn_min(rows * ((group + QUERIES - 1) / QUERIES),
                  (rows * group + (QUERIES - 1) * n) / QUERIES);
}

/* As many records as blocks can be resident: contexts are split only to fill the device. */
static int64_t max_records(const gn_ctx *ctx) {
    return (int64_t)ctx->cuda->sms * BLOCKS_PER_SM;
}

template <int P, int WARPS, typename C>
static gn_status launch_decode(gn_ctx *ctx, const gn_cuda_attention_args *args, int64_t bucket) {
    const int64_t tiles = decode_tiles(args), units = tiles * args->kv_heads;
    const int64_t resident = WARPS == FEW_WARPS ? max_records(ctx) : ctx->cuda->sms;
    const int64_t worth = bucket / TOKENS / (2 * WARPS); /* two cache blocks a warp at least */
    int64_t splits = gn_min(gn_min(resident / units, worth), MAX_SPLITS);
    if (splits < 1) splits = 1;
    const size_t record = RECORD<P> * sizeof(float);
    if (splits > 1 && (size_t)(units * splits) * record > ctx->workspace_bytes) return GN_ENOMEM;
    return launch(ctx, decode_kernel<P, WARPS, C>,
                  dim3((unsigned)tiles, (unsigned)args->kv_heads, (unsigned)splits),
                  dim3(WARPS * WARP), WARPS * record, *args, (float *)ctx->workspace,
                  ctx->cuda->counters);
}

template <typename C>
static gn_status decode(gn_ctx *ctx, const gn_cuda_attention_args *args, int64_t bucket) {
    const bool many = decode_tiles(args) * args->kv_heads > ctx->cuda->sms;
    if (args->D <= 64)
        return many ? launch_decode<64, FEW_WARPS, C>(ctx, args, bucket)
                    : launch_decode<64, MANY_WARPS, C>(ctx, args, bucket);
    return many ? launch_decode<128, FEW_WARPS, C>(ctx, args, bucket)
                : launch_decode<128, MANY_WARPS, C>(ctx, args, bucket);
}

size_t gn_cuda_attention_workspace(const gn_ctx *ctx, int64_t context) {
    (void)context;
    return (size_t)max_records(ctx) * RECORD<128> * sizeof(float);
}

/* ---- which way ---- */

static bool is_aligned(const void *p, int64_t ld) {
    return (uintptr_t)p % 16 == 0 && ld % 8 == 0;
}

static bool is_fast(const gn_ctx *ctx, const gn_cuda_attention_args *args, const gn_tensor *q,
                    const gn_kv *kv) {
    const int D = args->D;
    return ctx->compute == GN_BF16 && q->dtype == GN_BF16 && kv->k.dtype != GN_F32 &&
           args->tokens == GN_CUDA_KV_TOKENS && (D == 64 || D == 80 || D == 96 || D == 128) &&
           args->heads <= 0xffff && is_aligned(args->y, args->y_ld) &&
           is_aligned(args->q, args->q_ld) && is_aligned(args->k, args->k_ld) &&
           is_aligned(args->v, args->v_ld);
}

gn_status gn_cuda_attention(gn_ctx *ctx, gn_tensor *y, const gn_tensor *q, const gn_kv *kv,
                            const gn_seqs *seqs) {
    gn_cuda_attention_args args = {};
    args.y = y->data;
    args.q = q->data;
    args.k = kv->k.data;
    args.v = kv->v.data;
    args.k_scales = (const float *)kv->k_scales.data;
    args.v_scales = (const float *)kv->v_scales.data;
    args.y_ld = y->ld;
    args.q_ld = q->ld;
    args.k_ld = kv->k.ld;
    args.v_ld = kv->v.ld;
    args.rows = (int)q->shape[0];
    args.heads = (int)q->shape[1];
    args.kv_heads = (int)kv->k.shape[1];
    args.D = (int)q->shape[2];
    args.tokens = (int)kv->k.shape[2];
    args.n_seqs = seqs->n;
    args.max_blocks = seqs->max_blocks;
    args.batch = ctx->cuda->batch;
    args.scale = (float)(1.0 / sqrt((double)args.D));
    if (!is_fast(ctx, &args, q, kv)) return attend_exactly(ctx, &args, q->dtype, kv->k.dtype);

    bool has_short = false, has_long = false;
    for (int32_t i = 0; i < seqs->n; i++) {
        const int32_t rows = seqs->row0[i + 1] - seqs->row0[i];
        has_short |= rows >= 1 && rows <= GN_CUDA_DECODE_ROWS;
        has_long |= rows > GN_CUDA_DECODE_ROWS;
    }
    gn_status status = GN_OK;
    const int64_t bucket = gn_cuda_context_bucket(seqs);
    const bool has_codes = kv->k.dtype == GN_F8;
    if (has_short)
        status = has_codes ? decode<f8>(ctx, &args, bucket) : decode<bf16>(ctx, &args, bucket);
    if (has_long && !status) status = gn_cuda_attention_prefill(ctx, &args, has_codes);
    return status;
}
