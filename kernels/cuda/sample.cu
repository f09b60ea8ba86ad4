/* sample.cu - from rows of logits to tokens. Twin: engine/sample.c.
 *
 * Every truncation and the draw ask one question: of tokens in a defined order, where does the
 * shortest leading part end whose weights reach some mass? `leading` answers it without sorting:
 * a histogram of the weights by distance from the first token tells the bucket in which the part
 * ends, and its few members are compared one by one; when they are many, finer histograms between
 * their bounds come first. A truncation is then just a bound on rank, tested in every later pass,
 * and nothing is moved. Weights are summed as integers (2^44 is the likeliest token's), so that the
 * result depends on no order of addition, and a row's token on no other row.
 *
 * A row is the work of a team: one block, or a cluster of up to 8 when there are few rows, each
 * with its part of the row and all with the same totals, which they read from each other's shared
 * memory. A pass reads the logits anew, from the L1 cache when a block's part fits there. Greedy
 * rows take one pass, plain draws three, each truncation two more.
 *
 * Bound by latency: a pass is some 30 instructions a logit and two or three barriers. Parameters
 * are read from and results written to the host's memory directly, which saves two copies; the
 * former while the kernel before still runs. */
#include <stdlib.h>

#include "sample.cuh"

/* ---- selection ---- */

/* Weighs the range's tokens in buckets, by distance or (shift >= 0) by rank, and returns the one
 * in which a leading part that weighs *rest ends. *rest becomes what is missing before that bucket.
 * *rest of 0 stands for `mass`: a number of tokens, or a share of the weight. */
static __device__ __noinline__ int locate(team *t, const pool *p, order o, const range *r,
                                          int shift, double mass, u64 *rest) {
    block_memory *m = t->own;
    const int turn = t->turn ^= 1;
    for (int b = threadIdx.x; b < BUCKETS; b += THREADS) m->low[turn][b] = m->high[turn][b] = 0;
    __syncthreads();
    each(p, o, r, [&](const token &k) {
        const int b = shift < 0 ? bucket_of(k.distance) : (int)((k.rank - r->low) >> shift);
        const uint32_t low = (uint32_t)k.weight;
        const uint32_t carry = atomicAdd(&m->low[turn][b], low) > ~low;
        const uint32_t high = (uint32_t)(k.weight >> 32) + carry;
        if (high) atomicAdd(&m->high[turn][b], high);
    });
    team_sync(t);
    for (int b = threadIdx.x; b < BUCKETS; b += THREADS) {
        u64 sum = 0;
        for (int i = 0; i < t->size; i++) {
            const block_memory *other = peer(t, i);
            sum += (u64)other->high[turn][b] << 32 | other->low[turn][b];
        }
        m->sums[b + b / LANE_BUCKETS] = sum;
    }
    __syncthreads();
    if (threadIdx.x < WARP) {
        const u64 *sums = m->sums + threadIdx.x * (LANE_BUCKETS + 1);
        u64 own = 0;
        for (int j = 0; j < LANE_BUCKETS; j++) own += sums[j];
        u64 end = own;
        for (int d = 1; d < WARP; d *= 2) {
            const u64 before = __shfl_up_sync(~0u, end, d);
            if ((int)threadIdx.x >= d) end += before;
        }
        const u64 total = __shfl_sync(~0u, end, WARP - 1);
        u64 target = *rest;
        if (target == 0) {
            target = (u64)ceil(o == COUNTED ? mass : mass * (double)total);
            target = target < 1 ? 1 : target > total ? total : target;
        }
        u64 before = end - own;
        if (before < target && target <= end) {
            int j = 0;
            for (; before + sums[j] < target; j++) before += sums[j];
            m->bucket = (int)threadIdx.x * LANE_BUCKETS + j;
            m->rest = target - before;
        }
    }
    __syncthreads();
    *rest = m->rest;
    return m->bucket;
}

/* Lists the range's tokens, in no order, and returns how many there are; no list when more than
 * LIST. */
static __device__ __noinline__ int gather(team *t, const pool *p, order o, const range *r) {
    block_memory *m = t->own;
    const int turn = t->turn ^= 1;
    if (threadIdx.x == 0) m->listed[turn] = 0;
    __syncthreads();
    each(p, o, r, [&](const token &k) {
        const int at = atomicAdd(&m->listed[turn], 1);
        if (at >= LIST) return;
        m->rank[turn][at] = k.rank;
        m->weight[turn][at] = k.weight;
    });
    team_sync(t);
    int total = 0;
    for (int i = 0; i < t->size; i++) {
        const block_memory *other = peer(t, i);
        const int n = other->listed[turn];
        if (total + n <= LIST)
            for (int j = threadIdx.x; j < n; j += THREADS) {
                m->list_rank[total + j] = other->rank[turn][j];
                m->list_weight[total + j] = other->weight[turn][j];
            }
        total += n;
    }
    __syncthreads();
    return total;
}

/* Of n listed tokens the rank of the one with which a leading part weighs `target`. */
static __device__ u64 last_of(block_memory *m, int n, u64 target) {
    for (int i = threadIdx.x; i < n; i += THREADS) {
        const u64 rank = m->list_rank[i];
        u64 before = 0;
        for (int j = 0; j < n; j++) before += m->list_rank[j] < rank ? m->list_weight[j] : 0;
        if (before < target && target <= before + m->list_weight[i]) m->cut = rank;
    }
    __syncthreads();
    return m->cut;
}

/* The least and the greatest rank in the range. */
static __device__ __noinline__ range bounds(team *t, const pool *p, order o, const range *r) {
    u64 low = ~0ull, high = 0;
    each(p, o, r, [&](const token &k) {
        low = k.rank < low ? k.rank : low;
        high = k.rank > high ? k.rank : high;
    });
    low = team_fold<LEAST>(t, low);
    return {-1, low, ~team_fold<LEAST>(t, ~high)};
}

/* The rank of the last token in the shortest leading part that has `mass`: so many tokens
 * (COUNTED) or that share of the pool's weight. At least one is in it, and all when that is too
 * little. */
static __device__ u64 leading(team *t, const pool *p, order o, double mass) {
    range r = WHOLE_RANGE;
    u64 rest = 0;
    r.bucket = locate(t, p, o, &r, -1, mass, &rest);
    for (;;) {
        const int n = gather(t, p, o, &r);
        if (n <= LIST) return last_of(t->own, n, rest);
        r = bounds(t, p, o, &r);
        const int bits = 64 - __clzll((long long)(r.high - r.low));
        const int shift = bits > 8 ? bits - 8 : 0;
        r.low += (u64)locate(t, p, o, &r, shift, 0, &rest) << shift;
        const u64 width = (1ull << shift) - 1;
        if (r.high - r.low > width) r.high = r.low + width;
    }
}

/* The first rank of the pool by logit; ~0 when it is empty. */
static __device__ __noinline__ u64 first(team *t, const pool *p, order o) {
    const range all = WHOLE_RANGE;
    u64 least = ~0ull;
    each(p, o, &all, [&](const token &k) { least = k.rank < least ? k.rank : least; });
    return team_fold<LEAST>(t, least);
}

/* The mean distance from the largest logit: the entropy, less a constant. */
static __device__ __noinline__ float mean_distance(team *t, const pool *p) {
    const range all = WHOLE_RANGE;
    u64 sum = 0, weight = 0;
    each(p, BY_LOGIT, &all, [&](const token &k) {
        weight += k.weight;
        sum += fixed(expf(-k.distance) * k.distance);
    });
    sum = team_fold<SUM>(t, sum);
    weight = team_fold<SUM>(t, weight);
    return (float)sum / (float)weight;
}

/* ---- a row ---- */

/* log(sum(exp(x))) of raw logits, in m->log_sum. */
static __device__ __noinline__ void sum_exp(team *t, pool *p) {
    block_memory *m = t->own;
    const range all = WHOLE_RANGE;
    u64 sum = 0;
    if (!isinf(p->largest)) each(p, BY_LOGIT, &all, [&](const token &k) { sum += k.weight; });
    sum = team_fold<SUM>(t, sum);
    if (threadIdx.x == 0)
        m->log_sum = isinf(p->largest) ? (double)p->largest
                                       : (double)p->largest + log((double)sum * 0x1p-44);
    __syncthreads();
}

static __device__ __forceinline__ float logprob_of(float x, double log_sum) {
    if (isnan(x) || x == -INFINITY) return -INFINITY;
    return x == INFINITY ? 0.0f : (float)((double)x - log_sum);
}

/* The n_top likeliest tokens of raw logits. */
static __device__ void list_top(team *t, pool *p, gn_sample_pair *top) {
    block_memory *m = t->own;
    const int n_top = m->row.n_top;
    range r = WHOLE_RANGE;
    r.high = leading(t, p, COUNTED, (double)n_top);
    const int n = gather(t, p, COUNTED, &r);
    if (blockIdx.x > 0) return;
    for (int i = threadIdx.x; i < n_top; i += THREADS) {
        int at = i;
        gn_sample_pair pair = {-1, -INFINITY};
        if (i < n) {
            const u64 rank = m->list_rank[i];
            at = 0;
            for (int j = 0; j < n; j++) at += m->list_rank[j] < rank;
            pair.id = id_of(rank);
            pair.value = logprob_of(logit_of(rank), m->log_sum);
        }
        top[at] = pair;
    }
}

/* A token of the pool, which is not empty: `best` is its first rank by logit. */
static __device__ int draw(team *t, pool *p, u64 best) {
    const row_params *row = &t->own->row;
    p->largest = logit_of(best);
    if (row->top_k > 0) p->cut = leading(t, p, COUNTED, (double)row->top_k);
    if (row->typical_p < 1) {
        p->center = mean_distance(t, p);
        p->typical_cut = leading(t, p, BY_TYPICALITY, (double)row->typical_p);
        best = first(t, p, BY_LOGIT);
    }
    if (row->top_p < 1) p->cut = leading(t, p, BY_LOGIT, (double)row->top_p);
    if (row->min_p > 0)
        p->least =
            row->min_p * expf(-__fmul_rn(p->largest - logit_of(best), p->inverse_temperature));
    return id_of(leading(t, p, BY_LOGIT, row->uniform));
}

/* logits: (n, vocab), rows ld apart. grid: (blocks of a team, n). */
static __global__ void __launch_bounds__(THREADS)
    sample_kernel(float *logits, int64_t ld, int vocab, const row_params *rows,
                  const gn_sample_pair *edits, gn_sampled *results, int32_t *ids) {
    __shared__ block_memory memory;
    block_memory *m = &memory;
    team t = {m, (int)gridDim.x, 0};
    pdl_trigger();
    if (threadIdx.x < sizeof(row_params) / sizeof(uint32_t))
        ((uint32_t *)&m->row)[threadIdx.x] = ((const uint32_t *)&rows[blockIdx.y])[threadIdx.x];
    __syncthreads();
    const row_params *row = &m->row;
    gn_sample_pair edit = {-1, 0};
    if ((int)threadIdx.x < row->n_edits) edit = edits[row->edits + threadIdx.x];
    gn_sampled *result = &results[blockIdx.y];

    const int part = (vocab + t.size - 1) / t.size;
    pool p = {};
    p.x = logits + blockIdx.y * ld;
    p.begin = min((int)blockIdx.x * part, vocab);
    p.end = min(p.begin + part, vocab);
    p.raw = true;
    p.penalties = row;
    p.inverse_temperature = 1;
    p.cut = p.typical_cut = ~0ull;
    const bool edits_here = edit.id >= p.begin && edit.id < p.end;
    const bool bans = (int)threadIdx.x >= row->n_bias;
    pdl_wait();

    if (row->logprob || row->n_top > 0) {
        p.largest = logit_of(first(&t, &p, COUNTED));
        sum_exp(&t, &p);
        if (row->n_top > 0) list_top(&t, &p, result->top);
    }
    int id = row->given;
    if (id < 0) {
        /* Edits are made in place, and undone when the token is drawn. */
        const float before = edits_here ? p.x[edit.id] : 0;
        if (row->n_edits > 0) {
            __syncthreads();
            if (edits_here && !bans) atomicAdd(&p.x[edit.id], edit.value);
            __syncthreads();
            if (edits_here && bans) p.x[edit.id] = -INFINITY;
            __syncthreads();
        }
        p.raw = false;
        p.counts = row->penalize ? row->counts : NULL;
        p.inverse_temperature = row->inverse_temperature;
        p.cut = rank_of(-FLT_MAX, INT32_MAX);
        const u64 best = first(&t, &p, COUNTED);
        if (best == ~0ull) { /* the lowest id that is not banned, or 0 */
            for (id = 0; id < vocab && __syncthreads_or(bans && edit.id == id);) id++;
            if (id == vocab) id = 0;
        } else {
            id = row->inverse_temperature == 0 ? id_of(best) : draw(&t, &p, best);
        }
        if (row->n_edits > 0) {
            if (edits_here) p.x[edit.id] = before;
            __syncthreads();
        }
    }
    if (threadIdx.x == 0 && id >= p.begin && id < p.end) { /* one block of the team */
        result->id = id;
        result->logprob = row->logprob ? logprob_of(p.x[id], m->log_sum) : 0;
        ids[blockIdx.y] = id;
        if (row->given < 0 && row->counts) {
            const int count = row->counts[id] & GN_MAX_COUNT;
            row->counts[id] = (uint16_t)(GN_SEEN | min(count + 1, (int)GN_MAX_COUNT));
        }
    }
    team_sync(&t); /* others may still read this block's memory */
}

/* ---- the host's side ---- */

struct gn_cuda_sampler {
    gn_ctx *ctx;
    int32_t max_rows, vocab;
    char *shared;          /* the host's memory, which the device reads and writes: */
    row_params *rows;      /* (max_rows) */
    gn_sampled *results;   /* (max_rows) */
    gn_sample_pair *edits; /* (max_rows, GN_SAMPLE_MAX_EDITS) at most, one row's after another's */
    ptrdiff_t to_device;   /* from its address on the host to the device's */
    int32_t *ids;          /* (max_rows) on the device */
    cudaEvent_t done;
};

template <typename T> static T *on_device(const gn_cuda_sampler *s, T *host) {
    return (T *)((char *)host + s->to_device);
}

static gn_status allocate(gn_cuda_sampler *s) {
    const size_t n = (size_t)s->max_rows, rows = n * sizeof *s->rows,
                 results = n * sizeof *s->results,
                 edits = n * GN_SAMPLE_MAX_EDITS * sizeof *s->edits;
    void *device = NULL;
    cudaError_t error = cudaSetDevice(s->ctx->cuda->device);
    if (!error)
        error = cudaHostAlloc((void **)&s->shared, rows + results + edits, cudaHostAllocMapped);
    if (!error) error = cudaHostGetDevicePointer(&device, s->shared, 0);
    if (!error) error = cudaMalloc((void **)&s->ids, n * sizeof *s->ids);
    if (!error) error = cudaEventCreateWithFlags(&s->done, cudaEventDisableTiming);
    if (error) return gn_cuda_status(error);
    s->rows = (row_params *)s->shared;
    s->edits = (gn_sample_pair *)(s->shared + rows);
    s->results = (gn_sampled *)(s->shared + rows + edits);
    s->to_device = (char *)device - s->shared;
    return GN_OK;
}

gn_status gn_cuda_sampler_open(gn_cuda_sampler **out, gn_ctx *ctx, int32_t max_rows,
                               int32_t vocab) {
    gn_cuda_sampler *s = (gn_cuda_sampler *)calloc(1, sizeof *s);
    if (!s) return GN_ENOMEM;
    s->ctx = ctx;
    s->max_rows = max_rows;
    s->vocab = vocab;
    const gn_status status = allocate(s);
    if (status)
        gn_cuda_sampler_close(s);
    else
        *out = s;
    return status;
}

void gn_cuda_sampler_close(gn_cuda_sampler *s) {
    if (!s) return;
    (void)cudaStreamSynchronize(gn_cuda_stream(s->ctx));
    if (s->done) (void)cudaEventDestroy(s->done);
    (void)cudaFree(s->ids);
    (void)cudaFreeHost(s->shared);
    free(s);
}

/* The finalizer of splitmix64 (Steele et al. 2014), as in engine/sample.c. */
static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static double uniform(uint64_t seed, int64_t step) {
    const uint64_t golden = 0x9e3779b97f4a7c15u;
    const uint64_t bits = mix(mix(seed + golden) + golden * ((uint64_t)step + 1));
    return (double)((bits >> 11) + 1) * 0x1p-53;
}

static row_params params_of(const gn_sample_row *r, int32_t vocab, uint16_t *const *counts) {
    row_params p = {};
    p.uniform = uniform(r->seed, r->step);
    if (r->temperature > 0) {
        const double inverse = 1 / (double)r->temperature;
        p.inverse_temperature = inverse < FLT_MAX ? (float)inverse : FLT_MAX;
    }
    p.top_k = r->top_k < vocab ? r->top_k : 0;
    p.top_p = r->top_p;
    p.min_p = r->min_p;
    p.typical_p = r->typical_p;
    p.repetition = r->repetition_penalty;
    p.presence = r->presence_penalty;
    p.frequency = r->frequency_penalty;
    p.counts = r->counts >= 0 ? counts[r->counts] : NULL;
    p.penalize = p.counts && (p.repetition != 1 || p.presence != 0 || p.frequency != 0);
    p.given = r->given;
    p.n_top = r->n_top;
    p.logprob = r->logprob;
    return p;
}

/* Lists the rows' edits, one row's after another's. */
static void fill(gn_cuda_sampler *s, const gn_sample_row *rows, int32_t n,
                 uint16_t *const *counts) {
    int32_t at = 0;
    for (int32_t i = 0; i < n; i++) {
        const gn_sample_row *r = &rows[i];
        row_params p = params_of(r, s->vocab, counts);
        p.edits = at;
        p.n_bias = r->n_bias;
        for (int32_t j = 0; j < r->n_bias; j++) s->edits[at++] = r->bias[j];
        for (int32_t j = 0; j < r->n_banned; j++)
            if (r->banned[j] >= 0 && r->banned[j] < s->vocab)
                s->edits[at++] = {r->banned[j], -INFINITY};
        p.n_edits = at - p.edits;
        s->rows[i] = p;
    }
}

/* Blocks a row: as many as there are multiprocessors to run them. Clusters came with overlap. */
static unsigned team_size(const struct gn_cuda *cuda, int32_t n, int32_t vocab) {
    unsigned size = 1;
    while (cuda->overlaps && size < MAX_TEAM && 2 * size * (unsigned)n <= (unsigned)cuda->sms &&
           2 * size * LEAST_PART <= (unsigned)vocab)
        size *= 2;
    return size;
}

gn_status gn_cuda_sampler_run(gn_cuda_sampler *s, const gn_tensor *logits,
                              const gn_sample_row *rows, int32_t n, uint16_t *const *counts) {
    const struct gn_cuda *cuda = s->ctx->cuda;
    cudaError_t error = cudaSetDevice(cuda->device);
    if (!error) error = cudaEventSynchronize(s->done); /* of the last call, whose memory this is */
    if (error) return gn_cuda_status(error);
    fill(s, rows, n, counts);
    const unsigned size = team_size(cuda, n, s->vocab);
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {size, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(size, (unsigned)n);
    config.blockDim = dim3(THREADS);
    config.stream = cuda->stream;
    config.attrs = attributes;
    config.numAttrs = cuda->overlaps ? 2 : 0;
    error = cudaLaunchKernelEx(&config, sample_kernel, (float *)logits->data, logits->ld,
                               (int)s->vocab, (const row_params *)on_device(s, s->rows),
                               (const gn_sample_pair *)on_device(s, s->edits),
                               on_device(s, s->results), s->ids);
    if (!error) error = cudaEventRecord(s->done, cuda->stream);
    return gn_cuda_status(error);
}

gn_status gn_cuda_sampler_wait(gn_cuda_sampler *s, const gn_sampled **results) {
    *results = s->results;
    return gn_cuda_status(cudaEventSynchronize(s->done));
}

const int32_t *gn_cuda_sampler_ids(const gn_cuda_sampler *s) {
    return s->ids;
}
