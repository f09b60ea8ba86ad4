/* decoder_attention.cuh - attention within decoder.cu: one row of each sequence over its cache.
 *
 * An item is a row, a kv head, up to 8 of the queries that share it, and every splits-th run of
 * cache blocks. A block takes an item at a time; its warps take cache blocks in turn and combine
 * their results in shared memory. Where a context is long enough for several splits, each leaves a
 * sum of values (D) by weights relative to their maximum, that maximum (of scores by log2 e) and
 * the sum of the weights in program.partials, and the last to come combines them. */
#ifndef GN_CUDA_DECODER_ATTENTION_CUH
#define GN_CUDA_DECODER_ATTENTION_CUH

#include "decoder.cuh"

struct item {
    int t, kv_head, first_query, n_queries, split;
};

/* A warp's record: outputs (n_queries, P), then maximum and sum of each query. */
static __device__ __forceinline__ int record_floats(int n_queries, int P) {
    return n_queries * (P + 2);
}
static_assert(WARPS * QUERIES * (MAX_D + 2) <= SUMS_FLOATS, "the records stand where sums do");

static __device__ __forceinline__ struct item item_of(const struct program &p, int i) {
    const int group = p.heads / p.kv_heads, tiles = (group + QUERIES - 1) / QUERIES;
    struct item item;
    item.split = i % p.splits;
    i /= p.splits;
    item.first_query = i % tiles * QUERIES;
    i /= tiles;
    item.kv_head = i % p.kv_heads;
    item.t = i / p.kv_heads;
    item.n_queries = min(QUERIES, group - item.first_query);
    return item;
}

/* The block's first item is the same in every layer, so it is worked out once. */
static __device__ __forceinline__ struct item *first_item(void) {
    return (struct item *)(shared + ITEM_AT);
}

static __device__ __forceinline__ int n_items(const struct program &p) {
    const int group = p.heads / p.kv_heads, tiles = (group + QUERIES - 1) / QUERIES;
    return p.T * p.kv_heads * tiles * p.splits;
}

static __device__ __forceinline__ int n_cache_blocks(const struct program &p, int t) {
    return p.batch.row_pos[t] / TOKENS + 1;
}

/* Where this warp of the block's first item will begin, on its way into L2. */
static __device__ __forceinline__ void prefetch_cache(const struct program &p,
                                                      const struct phase &ph, int warp, int lane) {
    if ((int)blockIdx.x >= n_items(p)) return;
    const struct item item = *first_item();
    const int b = item.split * WARPS + warp;
    if (warp >= WARPS || b >= n_cache_blocks(p, item.t)) return;
    const int64_t block = p.batch.blocks[(int64_t)p.batch.row_seq[item.t] * p.max_blocks + b];
    const int64_t head_at = (int64_t)item.kv_head * TOKENS * p.D;
    for (int i = lane * 64; i < TOKENS * p.D; i += WARP * 64) { /* 128 bytes each */
        prefetch_line(ph.keys + block * p.k_ld + head_at + i);
        prefetch_line(ph.values + block * p.v_ld + head_at + i);
    }
}

/* Outputs of one warp; out[h][j][i] is dimension 64h + 8g + 2j + i/2 of query 2c + i%2. */
template <int P> struct result { float top[2], sum[2], out[P / 64][4][4]; };

/* Cache blocks first, first + step, ... of a row at position `pos`. */
template <int P>
static __device__ __forceinline__ void attend_blocks(struct result<P> *r, const struct program &p,
                                                     const struct phase &ph, struct item item,
                                                     int first, int step, int lane) {
    const int g = lane / 4, c = lane % 4, group = p.heads / p.kv_heads;
    const int length = p.batch.row_pos[item.t] + 1;
    const int head = item.kv_head * group + item.first_query;
    const bf16 *q = p.q + ((int64_t)item.t * p.heads + head + g) * p.D;
    uint4 query[P / 32];
#pragma unroll
    for (int s = 0; s < P / 32; s++) {
        const int d = 32 * s + 8 * c;
        query[s] = make_uint4(0, 0, 0, 0);
        if (g < item.n_queries && d < p.D) query[s] = load_fresh16(q + d);
    }
    const int32_t *table = p.batch.blocks + (int64_t)p.batch.row_seq[item.t] * p.max_blocks;
    const int64_t head_at = (int64_t)item.kv_head * TOKENS * p.D;
    const float scale = rsqrtf((float)p.D) * LOG2_E;
#pragma unroll 1
    for (int b = first; b * TOKENS < length; b += step) {
        const int64_t block = table[b];
        const int n = length - b * TOKENS;
        float score[4], shrink[2];
        {
            uint4 keys[P / 32][2];
            load_keys<P>(keys, ph.keys + block * p.k_ld + head_at, p.D);
            multiply_keys<P>(score, keys, query);
        }
        uint4 values[P / 64][4];
        load_values<P>(values, ph.values + block * p.v_ld + head_at, n, p.D);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            score[j] = g < n ? score[j] * scale : -INFINITY;
            score[2 + j] = g + 8 < n ? score[2 + j] * scale : -INFINITY;
            float top = fmaxf(r->top[j], fmaxf(score[j], score[2 + j]));
#pragma unroll
            for (int d = 4; d < WARP; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
            shrink[j] = exp2_fast(r->top[j] - top);
            score[j] = exp2_fast(score[j] - top);
            score[2 + j] = exp2_fast(score[2 + j] - top);
            r->sum[j] = r->sum[j] * shrink[j] + score[j] + score[2 + j];
            r->top[j] = top;
        }
#pragma unroll
        for (int x = 0; x < P / 64 * 16; x++) r->out[x / 16][x / 4 % 4][x % 4] *= shrink[x % 2];
        multiply_values<P>(r->out, values, score);
    }
}

template <int P>
static __device__ __forceinline__ void leave_record(struct result<P> *r, struct item item, int warp,
                                                    int lane) {
    const int g = lane / 4, c = lane % 4, floats = record_floats(item.n_queries, P);
    float *record = sums() + warp * floats;
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int d = 4; d < WARP; d *= 2) r->sum[j] += __shfl_xor_sync(~0u, r->sum[j], d);
        const int query = 2 * c + j;
        if (query >= item.n_queries) continue;
#pragma unroll
        for (int x = 0; x < P / 64 * 8; x++) {
            const int h = x / 8, d = x % 8;
            record[query * P + 64 * h + 8 * g + d] = r->out[h][d / 2][d % 2 * 2 + j];
        }
        if (g == 0) {
            record[item.n_queries * P + 2 * query] = r->top[j];
            record[item.n_queries * P + 2 * query + 1] = r->sum[j];
        }
    }
}

static __device__ __forceinline__ float *partial_at(const struct program &p, int t, int head,
                                                    int split) {
    return p.partials + (((int64_t)t * p.heads + head) * p.splits + split) * (p.D + 4);
}

/* Dimension d of a query from `n` results: its maximum, its sum and its outputs are where `state`
 * and `out` say for result i. */
template <typename State, typename Out>
static __device__ __forceinline__ float combine(int n, State state, Out out, float2 *top_sum) {
    float top = -INFINITY, sum = 0.0f, total = 0.0f;
    for (int i = 0; i < n; i++) top = fmaxf(top, state(i).x);
#pragma unroll 4
    for (int i = 0; i < n; i++) {
        const float2 its = state(i);
        const float by = exp2_fast(its.x - top);
        sum += by * its.y;
        total += by * out(i);
    }
    *top_sum = make_float2(top, sum);
    return total;
}

/* The records of the first `n` warps, one float of a query a thread. is_whole: there are no other
 * splits. */
template <int P>
static __device__ __forceinline__ void combine_records(const struct program &p, struct item item,
                                                       int n, bool is_whole) {
    const int head = item.kv_head * (p.heads / p.kv_heads) + item.first_query;
    const int size = record_floats(item.n_queries, P);
    for (int i = threadIdx.x; i < item.n_queries * p.D; i += THREADS) {
        const int query = quotient(i, p.by_D), d = i - query * p.D;
        const int state = item.n_queries * P + 2 * query, at = query * P + d;
        float2 top_sum;
        const float out = combine(
            n, [=](int w) { return *(const float2 *)(sums() + w * size + state); },
            [=](int w) { return sums()[w * size + at]; }, &top_sum);
        if (is_whole) {
            p.attended[((int64_t)item.t * p.heads + head + query) * p.D + d] =
                __float2bfloat16(out / top_sum.y);
            continue;
        }
        float *to = partial_at(p, item.t, head + query, item.split);
        to[d] = out;
        if (d == 0) *(float2 *)(to + p.D) = top_sum;
    }
}

/* Whether this block is the last of `n` to have left its part of the item. */
static __device__ __forceinline__ bool is_last(const struct program &p, int i, int n) {
    bool *last = (bool *)(shared + LAST_AT);
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        uint32_t *done = &p.splits_done[i / p.splits];
        *last = atomicAdd(done, 1u) == (uint32_t)n - 1;
        if (*last) *done = 0;
        __threadfence();
    }
    __syncthreads();
    return *last;
}

static __device__ __forceinline__ void combine_splits(const struct program &p, struct item item,
                                                      int n) {
    const int head = item.kv_head * (p.heads / p.kv_heads) + item.first_query;
    for (int i = threadIdx.x; i < item.n_queries * p.D; i += THREADS) {
        const int query = quotient(i, p.by_D), d = i - query * p.D;
        float2 top_sum;
        const float out = combine(
            n,
            [=](int s) {
                return __ldcg((const float2 *)(partial_at(p, item.t, head + query, s) + p.D));
            },
            [=](int s) { return __ldcg(partial_at(p, item.t, head + query, s) + d); }, &top_sum);
        p.attended[((int64_t)item.t * p.heads + head + query) * p.D + d] =
            __float2bfloat16(out / top_sum.y);
    }
}

template <int P>
static __device__ __forceinline__ void attend_to(const struct program &p, const struct phase &ph,
                                                 int warp, int lane) {
    const int n = n_items(p);
    for (int i = blockIdx.x; i < n; i += gridDim.x) {
        const struct item item = i == (int)blockIdx.x ? *first_item() : item_of(p, i);
        const int blocks = n_cache_blocks(p, item.t), first = item.split * WARPS;
        const int busy = min(WARPS, blocks - first);
        const int splits = min(p.splits, (blocks + WARPS - 1) / WARPS);
        if (busy <= 0) continue;
        if (warp < busy) {
            struct result<P> r = {
                {-INFINITY, -INFINITY}, {0.0f, 0.0f}, {}
            };
            attend_blocks<P>(&r, p, ph, item, first + warp, p.splits * WARPS, lane);
            leave_record<P>(&r, item, warp, lane);
        }
        __syncthreads();
        if (warp < WARPS) combine_records<P>(p, item, busy, splits == 1);
        if (splits > 1 && is_last(p, i, splits) && warp < WARPS) combine_splits(p, item, splits);
        __syncthreads();
    }
}

static __device__ __forceinline__ void attend(const struct program &p, const struct phase &ph,
                                              int warp, int lane) {
    if (p.D <= 64)
        attend_to<64>(p, ph, warp, lane);
    else
        attend_to<128>(p, ph, warp, lane);
}

#endif
