/* attention.cu - causal attention over the paged cache: the exact way and decoding. Twin:
 * cpu/attention.c. attention_prefill.cu has the way of long chunks.
 *
 * Exact: a block per row and head, in float32 and in an order that depends on the row's own
 * length alone. It serves compute F32, and every shape that the other two do not take.
 *
 * Decoding reads each key and value once for a handful of queries, so it is bound by memory: 16 KiB
 * a token and layer of a 7B model. A unit is up to 8 queries that share a kv head (the heads of a
 * GQA group, the rows of a short chunk) and all cache blocks, of 16 positions, of their sequence.
 * Cache blocks of all units stand on a line, of which each warp of a grid that fills the device
 * takes an equal share, whatever the sequences' lengths: no wave of blocks is left half full, and
 * a long context is no longer under way than the short ones. But where every unit can have a block
 * to itself and none would be late, it has one. Warps read straight from global memory into matrix
 * fragments. Keys are the A operand of S' = K Q' (16 positions by 8 queries), with the dimensions
 * in the order in which a lane reads 8 at once; values, two positions zipped, are the A operand of
 * O' = V' P'. An F8 cache's scales multiply scores after the product, and weights before theirs.
 * What the matrix units waste on absent queries costs nothing here, and a lane's running maximum
 * belongs to the columns of its own accumulators. The next keys are under way while values are
 * multiplied: 8 KiB a warp, twice what the memory needs.
 *
 * Partial results (maximum, sum, output) of a block's warps are combined in shared memory; of a
 * unit that several blocks read for, the last to arrive combines theirs. */
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
    DECODE_WARPS = 2,
    BLOCKS_PER_SM = 6,
    LEAST_SHARE = 2,   /* cache blocks of a warp */
    MOST_PARTS = 64,   /* blocks that share a unit, about */
    SATURATION = 3,    /* so many times more warps are resident than the memory needs */
    COMBINE_STEPS = 2, /* what combining the results of several blocks takes, in cache blocks */
};

/* A partial result: outputs (QUERIES, P) before the division by their sum, then maximum (of
 * scores by log2 e) and sum of each query. P is the head's size padded to whole fragments. */
template <int P> constexpr int RECORD = QUERIES *(P + 2);

/* Of one sequence: how many units it has, and how many cache blocks each of them reads. */
typedef struct extent {
    int units, blocks;
} extent;

static __device__ __forceinline__ extent extent_of(const gn_cuda_attention_args &a, int seq) {
    const int rows = seq < a.n_seqs ? a.batch.row0[seq + 1] - a.batch.row0[seq] : 0;
    if (rows < 1 || rows > GN_CUDA_DECODE_ROWS) return {0, 0};
    const int queries = rows * (a.heads / a.kv_heads);
    return {(queries + QUERIES - 1) / QUERIES * a.kv_heads,
            (a.batch.pos0[seq] + rows + TOKENS - 1) / TOKENS};
}

/* Places on a line: each unit has `pitch` of them, one for each of its cache blocks and maybe some
 * that are empty; each warp takes `share` in a row. */
typedef struct cut {
    int share;
    int pitch; /* 0: as many as it has blocks */
} cut;

static __device__ __forceinline__ cut cut_line(const gn_cuda_attention_args &a) {
    const int lane = threadIdx.x % WARP, warps = gridDim.x * DECODE_WARPS;
    int units = 0, places = 0, longest = 0;
    for (int base = 0; base < a.n_seqs; base += WARP) {
        const extent e = extent_of(a, base + lane);
        units += e.units;
        places += e.units * e.blocks;
        longest = max(longest, e.blocks);
    }
    units = __reduce_add_sync(~0u, units);
    places = __reduce_add_sync(~0u, places);
    longest = __reduce_max_sync(~0u, longest);
    const int even = (places + warps - 1) / warps,
              own = (longest + DECODE_WARPS - 1) / DECODE_WARPS;
    if (units <= (int)gridDim.x && own <= SATURATION * even + COMBINE_STEPS)
        return {own, own * DECODE_WARPS};
    return {max(max(even, (int)LEAST_SHARE), own / MOST_PARTS), 0};
}

/* Whose place it is. */
typedef struct place {
    int seq; /* -1: nobody's */
    int at;  /* from the sequence's first place */
    int blocks, pitch;
} place;

/* Called by whole warps. */
static __device__ __forceinline__ place find_place(const gn_cuda_attention_args &a, cut c, int at) {
    const int lane = threadIdx.x % WARP;
    for (int base = 0; base < a.n_seqs; base += WARP) {
        const extent e = extent_of(a, base + lane);
        const int pitch = c.pitch ? c.pitch : e.blocks, places = e.units * pitch;
        int end = places;
#pragma unroll
        for (int d = 1; d < WARP; d *= 2) {
            const int before = __shfl_up_sync(~0u, end, d);
            if (lane >= d) end += before;
        }
        const uint32_t past = __ballot_sync(~0u, end > at);
        if (past) {
            const int from = __ffs((int)past) - 1;
            return {base + from, at - __shfl_sync(~0u, end - places, from),
                    __shfl_sync(~0u, e.blocks, from), __shfl_sync(~0u, pitch, from)};
        }
        at -= __shfl_sync(~0u, end, WARP - 1);
    }
    return {-1, 0, 0, 0};
}

/* Up to 8 queries of a sequence and kv head. */
typedef struct unit {
    int row0, kv_head;
    int first, n_queries;      /* of the sequence's rows and the head's group; 0: no unit */
    int first_warp, last_warp; /* of the grid, that read for it */
} unit;

/* Where its query `i` lies in q or y. */
static __device__ __forceinline__ int64_t query_at(const gn_cuda_attention_args &a, int64_t ld,
                                                   const unit &u, int i) {
    const int group = a.heads / a.kv_heads, query = u.first + i;
    return (u.row0 + query / group) * ld + (int64_t)(u.kv_head * group + query % group) * a.D;
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

/* A warp's result: out[h][j][i] is dimension 64h + 8g + 2j + i/2 of query 2c + i%2. */
template <int P> struct result { float top[2], sum[2], out[P / 64][4][4]; };

/* Cache blocks b to end - 1 of a sequence. Only positions from pos0 on are written by kernels that
 * may still run: what is older is on its way before this one waits for them. */
template <int P, typename C>
static __device__ __forceinline__ void read_blocks(result<P> &r, const gn_cuda_attention_args &a,
                                                   const unit &u, int seq, int b, int end) {
    const int lane = threadIdx.x % WARP, g = lane / 4, c = lane % 4, D = a.D;
    const int pos0 = a.batch.pos0[seq], group = a.heads / a.kv_heads;
    const int longest = pos0 + (u.first + u.n_queries - 1) / group + 1;
    int length[2]; /* that this lane's queries see */
#pragma unroll
    for (int i = 0; i < 2; i++)
        length[i] = 2 * c + i < u.n_queries ? pos0 + (u.first + 2 * c + i) / group + 1 : 0;

    const int32_t *table = a.batch.blocks + (int64_t)seq * a.max_blocks;
    const int64_t head_at = (int64_t)u.kv_head * TOKENS * D;
    typename eight_of<C>::type keys[P / 32][2], values[P / 64][4];
    float key_scale[2], value_scale[2];
    int entries = 0; /* of the block table: each lane has one of 32 */
    auto block_at = [&](int i) {
        if (i % WARP == 0) entries = b + i + lane < end ? table[b + i + lane] : 0;
        return (int64_t)__shfl_sync(~0u, entries, i % WARP);
    };
    auto read_keys = [&](int64_t block) {
        load_keys<P>(keys, (const C *)a.k + head_at + block * a.k_ld, D);
        load_scales<C>(key_scale, a, a.k_scales, block, u.kv_head, TOKENS);
    };
    auto read_values = [&](int64_t block, int n) {
        load_values<P>(values, (const C *)a.v + head_at + block * a.v_ld, n, D);
        load_scales<C>(value_scale, a, a.v_scales, block, u.kv_head, n);
    };

    int64_t block = block_at(0);
    const bool is_settled = (b + 1) * TOKENS <= pos0;
    if (is_settled) {
        read_keys(block);
        read_values(block, TOKENS);
    }
    pdl_wait();
    if (!is_settled) {
        read_keys(block);
        read_values(block, longest - b * TOKENS);
    }
    const bf16 *q = (const bf16 *)a.q + query_at(a, a.q_ld, u, g);
    uint4 query[P / 32];
#pragma unroll
    for (int s = 0; s < P / 32; s++) {
        const int d = 32 * s + 8 * c;
        query[s] = make_uint4(0, 0, 0, 0);
        if (g < u.n_queries && d < D) query[s] = *(const uint4 *)(q + d);
    }

    const float scale = a.scale * LOG2_E;
    for (int i = 0; i < end - b; i++) {
        const int p0 = (b + i) * TOKENS;
        float score[4], shrink[2];
        multiply_keys<P>(score, keys, query);
        apply_scales<C>(score, key_scale);
        const bool has_next = b + i + 1 < end;
        if (has_next) {
            block = block_at(i + 1);
            read_keys(block);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            score[j] = p0 + g < length[j] ? score[j] * scale : -INFINITY;
            score[2 + j] = p0 + 8 + g < length[j] ? score[2 + j] * scale : -INFINITY;
            float new_top = fmaxf(r.top[j], fmaxf(score[j], score[2 + j]));
#pragma unroll
            for (int d = 4; d < WARP; d *= 2)
                new_top = fmaxf(new_top, __shfl_xor_sync(~0u, new_top, d));
            const float base = new_top == -INFINITY ? 0.0f : new_top;
            shrink[j] = exp2_fast(r.top[j] - base);
            score[j] = exp2_fast(score[j] - base);
            score[2 + j] = exp2_fast(score[2 + j] - base);
            r.sum[j] = r.sum[j] * shrink[j] + score[j] + score[2 + j];
            r.top[j] = new_top;
        }
#pragma unroll
        for (int x = 0; x < P / 64 * 16; x++) r.out[x / 16][x / 4 % 4][x % 4] *= shrink[x % 2];
        apply_scales<C>(score, value_scale);
        multiply_values<P>(r.out, values, score);
        if (has_next) read_values(block, longest - p0 - TOKENS);
    }
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int d = 4; d < WARP; d *= 2) r.sum[j] += __shfl_xor_sync(~0u, r.sum[j], d);
}

/* Of a unit that no other warp reads for. */
template <int P>
static __device__ __forceinline__ void write_result(const gn_cuda_attention_args &a, const unit &u,
                                                    const result<P> &r) {
    const int g = threadIdx.x % WARP / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        if (2 * c + j >= u.n_queries) continue;
        const float over = 1.0f / r.sum[j];
        bf16 *y = (bf16 *)a.y + query_at(a, a.y_ld, u, 2 * c + j);
#pragma unroll
        for (int h = 0; h < P / 64; h++) {
            uint32_t v[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                v[i] = pack_bf16(r.out[h][i][j] * over, r.out[h][i][2 + j] * over);
            if (64 * h + 8 * g < a.D)
                *(uint4 *)(y + 64 * h + 8 * g) = make_uint4(v[0], v[1], v[2], v[3]);
        }
    }
}

template <int P>
static __device__ __forceinline__ void leave_record(float *record, int n_queries,
                                                    const result<P> &r) {
    const int g = threadIdx.x % WARP / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int query = 2 * c + j;
        if (query >= n_queries) continue;
#pragma unroll
        for (int h = 0; h < P / 64; h++) {
            float4 *to = (float4 *)(record + query * P + 64 * h + 8 * g);
            to[0] =
                make_float4(r.out[h][0][j], r.out[h][0][2 + j], r.out[h][1][j], r.out[h][1][2 + j]);
            to[1] =
                make_float4(r.out[h][2][j], r.out[h][2][2 + j], r.out[h][3][j], r.out[h][3][2 + j]);
        }
        if (g == 0) *(float2 *)(record + QUERIES * P + 2 * query) = make_float2(r.top[j], r.sum[j]);
    }
}

/* Whoever reads for a unit has two records: one for a unit that began before, one for a unit that
 * begins with it. Which one is that of the i-th reader, of those from `first` on? */
static __device__ __forceinline__ int record_of(int first, bool begins, int i) {
    return 2 * (first + i) + (i == 0 && begins);
}

/* Four dimensions of a query from n readers' results, and their common maximum and sum. FAR: other
 * blocks wrote them, to be read past the first cache. */
template <int P, bool FAR>
static __device__ __forceinline__ float4 combine(const float *records, int first, bool begins,
                                                 int n, int query, int d, float2 *top_sum) {
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float top = -INFINITY, sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < n; i++) {
        const float *record = records + record_of(first, begins, i) * RECORD<P>;
        const float2 *s = (const float2 *)(record + QUERIES * P) + query;
        const float4 *o = (const float4 *)(record + query * P + d);
        const float2 its = FAR ? __ldcg(s) : *s;
        const float4 part = FAR ? __ldcg(o) : *o;
        if (its.x == -INFINITY) continue; /* saw no position of this query's */
        const float new_top = fmaxf(top, its.x);
        const float old_scale = exp2_fast(top - new_top), scale = exp2_fast(its.x - new_top);
        total.x = total.x * old_scale + part.x * scale;
        total.y = total.y * old_scale + part.y * scale;
        total.z = total.z * old_scale + part.z * scale;
        total.w = total.w * old_scale + part.w * scale;
        sum = sum * old_scale + its.y * scale;
        top = new_top;
    }
    *top_sum = make_float2(top, sum);
    return total;
}

/* n readers' results of a unit as its output, or (`to`) as a record. By whole blocks. */
template <int P, bool FAR>
static __device__ __forceinline__ void combine_unit(const gn_cuda_attention_args &a, const unit &u,
                                                    const float *records, int first, bool begins,
                                                    int n, float *to) {
    const int per_query = a.D / 4;
    for (int i = threadIdx.x; i < u.n_queries * per_query; i += DECODE_WARPS * WARP) {
        const int query = i / per_query, d = i % per_query * 4;
        float2 top_sum;
        const float4 o = combine<P, FAR>(records, first, begins, n, query, d, &top_sum);
        if (to) {
            *(float4 *)(to + query * P + d) = o;
            if (d == 0) *(float2 *)(to + QUERIES * P + 2 * query) = top_sum;
        } else {
            const float over = 1.0f / top_sum.y;
            *(uint2 *)((bf16 *)a.y + query_at(a, a.y_ld, u, query) + d) =
                make_uint2(pack_bf16(o.x * over, o.y * over), pack_bf16(o.z * over, o.w * over));
        }
    }
}

/* C: what the cache holds. */
template <int P, typename C>
static __global__ void __launch_bounds__(DECODE_WARPS *WARP, BLOCKS_PER_SM)
    decode_kernel(const gn_cuda_attention_args a, float *partials, uint32_t *counters) {
    extern __shared__ float records[];             /* two a warp */
    __shared__ unit shared_units[DECODE_WARPS][2]; /* whose they are */
    __shared__ bool is_last[2];
    pdl_trigger();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int warp0 = blockIdx.x * DECODE_WARPS, group = a.heads / a.kv_heads;
    if (lane < 2) shared_units[warp][lane].n_queries = 0;
    __syncwarp();

    const cut c = cut_line(a);
    const int end = (warp0 + warp + 1) * c.share;
    for (int at = end - c.share; at < end;) {
        const place p = find_place(a, c, at);
        if (p.seq < 0) break;
        const int index = p.at / p.pitch, b = p.at % p.pitch, begin = at - b;
        const int stop = min(p.blocks, b + end - at);
        at = stop < p.blocks ? end : begin + p.pitch;
        if (b >= stop) continue;
        const int row0 = a.batch.row0[p.seq], rows = a.batch.row0[p.seq + 1] - row0;
        const int first = index / a.kv_heads * QUERIES;
        const unit u = {row0,
                        index % a.kv_heads,
                        first,
                        min(QUERIES, rows * group - first),
                        begin / c.share,
                        (begin + p.blocks - 1) / c.share};
        result<P> r = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}, {}};
        read_blocks<P, C>(r, a, u, p.seq, b, stop);
        if (u.first_warp == u.last_warp) {
            write_result(a, u, r);
        } else {
            leave_record(records + record_of(warp, b == 0, 0) * RECORD<P>, u.n_queries, r);
            if (lane == 0) shared_units[warp][b == 0] = u;
        }
    }
    pdl_wait(); /* a chain of launches is as good as its weakest link */
    __syncthreads();

    /* Units that the block's warps share: one that began before, and those that begin with one of
     * them. The former and the last of the latter may be shared with other blocks, too. */
    const unit *across[2] = {NULL, NULL};
#pragma unroll
    for (int i = 0; i <= DECODE_WARPS; i++) {
        const bool begins = i > 0;
        const int first = begins ? i - 1 : 0;
        const unit *u = &shared_units[first][begins];
        if (u->n_queries == 0) continue;
        const int n = min(u->last_warp - warp0, DECODE_WARPS - 1) - first + 1;
        const bool is_whole = begins && u->last_warp < warp0 + DECODE_WARPS;
        float *to = is_whole ? NULL : partials + record_of(blockIdx.x, begins, 0) * RECORD<P>;
        combine_unit<P, false>(a, *u, records, first, begins, n, to);
        if (!is_whole) across[begins] = u;
    }
    if (!across[0] && !across[1]) return;
    __threadfence();
    __syncthreads();
    const unit *mine = threadIdx.x == 0 ? across[0] : threadIdx.x == 1 ? across[1] : NULL;
    if (mine) {
        const unit *u = mine;
        const int first = u->first_warp / DECODE_WARPS, last = u->last_warp / DECODE_WARPS;
        is_last[threadIdx.x] = atomicAdd(&counters[first], 1u) == (uint32_t)(last - first);
        if (is_last[threadIdx.x]) counters[first] = 0;
        __threadfence();
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const unit *u = across[i];
        if (!u || !is_last[i]) continue;
        const int first = u->first_warp / DECODE_WARPS, last = u->last_warp / DECODE_WARPS;
        combine_unit<P, true>(a, *u, partials, first, true, last - first + 1, NULL);
    }
}

static int decode_blocks(const gn_ctx *ctx) {
    return (int)gn_min((int64_t)ctx->cuda->sms * BLOCKS_PER_SM, GN_CUDA_COUNTERS);
}

template <int P, typename C>
static gn_status launch_decode(gn_ctx *ctx, const gn_cuda_attention_args *args) {
    const unsigned blocks = (unsigned)decode_blocks(ctx);
    constexpr size_t RECORDS = 2 * RECORD<P> * sizeof(float);
    if (blocks * RECORDS > ctx->workspace_bytes) return GN_ENOMEM;
    return launch(ctx, decode_kernel<P, C>, dim3(blocks), dim3(DECODE_WARPS * WARP),
                  DECODE_WARPS * RECORDS, *args, (float *)ctx->workspace, ctx->cuda->counters);
}

template <typename C> static gn_status decode(gn_ctx *ctx, const gn_cuda_attention_args *args) {
    return args->D <= 64 ? launch_decode<64, C>(ctx, args) : launch_decode<128, C>(ctx, args);
}

size_t gn_cuda_attention_workspace(const gn_ctx *ctx, int64_t context) {
    (void)context;
    return (size_t)decode_blocks(ctx) * 2 * RECORD<128> * sizeof(float);
}

/* ---- which way ---- */

static bool is_aligned(const void *p, int64_t ld) {
    return (uintptr_t)p % 16 == 0 && ld % 8 == 0;
}

/* Whether all cache blocks that decoding may read can be counted. */
static bool is_countable(const gn_cuda_attention_args *args) {
    const int64_t group = args->heads / args->kv_heads;
    const int64_t units = args->rows * ((group + QUERIES - 1) / QUERIES) * args->kv_heads;
    return units * args->max_blocks <= INT_MAX / 2;
}

static bool is_fast(const gn_ctx *ctx, const gn_cuda_attention_args *args, const gn_tensor *q,
                    const gn_kv *kv) {
    const int D = args->D;
    return ctx->compute == GN_BF16 && q->dtype == GN_BF16 && kv->k.dtype != GN_F32 &&
           args->tokens == GN_CUDA_KV_TOKENS && (D == 64 || D == 80 || D == 96 || D == 128) &&
           args->heads <= 0xffff && is_countable(args) && is_aligned(args->y, args->y_ld) &&
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
    const bool has_codes = kv->k.dtype == GN_F8;
    if (has_short) status = has_codes ? decode<f8>(ctx, &args) : decode<bf16>(ctx, &args);
    if (has_long && !status) status = gn_cuda_attention_prefill(ctx, &args, has_codes);
    return status;
}
