/* sample.cuh - what sample.cu's kernel works with: the parameters of a row, the team of blocks that
 * has a row, the tokens still in its draw. */
#ifndef GN_CUDA_SAMPLE_CUH
#define GN_CUDA_SAMPLE_CUH

#include <float.h>

#include "common.cuh"
#include "kernels/sample.h"

typedef unsigned long long u64;

enum {
    THREADS = 1024,
    WARPS = THREADS / WARP,
    LOADS = 4, /* of a thread at once: they come from the L2 cache at first */
    MAX_TEAM = 8,
    LEAST_PART = 2048, /* logits that make another block worth its barriers */
    BUCKETS = 256,
    LANE_BUCKETS = BUCKETS / WARP,
    LIST = 128 /* members compared one by one */
};
static_assert(THREADS >= (int)GN_SAMPLE_MAX_EDITS, "a thread has one edit");
static_assert(LIST >= (int)GN_SAMPLE_MAX_TOP, "the alternatives are a list");

/* One row's parameters, in the host's memory. */
typedef struct row_params {
    double uniform;            /* in (0, 1]: the random number */
    float inverse_temperature; /* 0: greedy */
    int32_t top_k;             /* 0: off */
    float top_p, min_p, typical_p;
    float repetition, presence, frequency;
    uint16_t *counts; /* (vocab) or NULL */
    int32_t edits;    /* where they begin: n_bias biases, then bans, n_edits in all */
    int32_t n_bias, n_edits;
    int32_t given; /* or -1 */
    int32_t n_top;
    bool penalize, logprob;
} row_params;

/* Shared memory. What other blocks of the team read exists twice, and exchanges take turns: a
 * block that writes for the next but one has passed the barrier of the next, and so has every
 * reader. */
typedef struct block_memory {
    row_params row;
    u64 reduced[2];
    uint32_t low[2][BUCKETS], high[2][BUCKETS]; /* sums of weights, in halves */
    u64 rank[2][LIST], weight[2][LIST];
    int listed[2]; /* may exceed LIST */

    u64 parts[WARPS];
    u64 sums[BUCKETS + WARP]; /* of the team; a gap after each lane's, against bank conflicts */
    u64 list_rank[LIST], list_weight[LIST];
    u64 rest, cut;
    double log_sum;
    int bucket;
} block_memory;

/* ---- the team ---- */

typedef struct team {
    block_memory *own;
    int size, turn;
} team;

/* A barrier for all threads of the team; what they wrote to shared memory is there. */
static __device__ __forceinline__ void team_sync(const team *t) {
#if __CUDA_ARCH__ >= 900
    if (t->size > 1) {
        __syncwarp();
        asm volatile("barrier.cluster.arrive.release.aligned;\n"
                     "barrier.cluster.wait.acquire.aligned;" ::
                         : "memory");
        return;
    }
#endif
    (void)t;
    __syncthreads();
}

/* Block `rank`'s shared memory, where this block can read it. */
static __device__ __forceinline__ const block_memory *peer(const team *t, int rank) {
#if __CUDA_ARCH__ >= 900
    uint64_t address = (uint64_t)t->own;
    asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(address), "r"(rank));
    return (const block_memory *)address;
#else
    (void)rank;
    return t->own;
#endif
}

typedef enum fold { LEAST, SUM } fold;

template <fold F> static __device__ __forceinline__ u64 fold_of(u64 a, u64 b) {
    return F == SUM ? a + b : a < b ? a : b;
}

template <fold F> static __device__ __forceinline__ u64 warp_fold(u64 x) {
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) x = fold_of<F>(x, __shfl_xor_sync(~0u, x, d));
    return x;
}

/* The least value or the sum over all threads of the team; every thread gets it. */
template <fold F> static __device__ u64 team_fold(team *t, u64 x) {
    block_memory *m = t->own;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, turn = t->turn ^= 1;
    x = warp_fold<F>(x);
    if (lane == 0) m->parts[warp] = x;
    __syncthreads();
    if (warp == 0) {
        x = warp_fold<F>(lane < WARPS ? m->parts[lane] : F == SUM ? 0 : ~0ull);
        if (lane == 0) m->reduced[turn] = x;
    }
    team_sync(t);
    x = peer(t, 0)->reduced[turn];
    for (int i = 1; i < t->size; i++) x = fold_of<F>(x, peer(t, i)->reduced[turn]);
    return x;
}

/* ---- tokens ---- */

/* Tokens still in the draw. A rank orders them, the first has the least: its upper half is a float
 * made monotonic, its lower half the id. */
typedef struct pool {
    float *x;               /* (vocab) */
    const uint16_t *counts; /* NULL: no penalties */
    int begin, end;         /* this block's part */
    bool raw;               /* as the model gave them: nothing but NaN is changed */
    const row_params *penalties;
    float largest, inverse_temperature;
    u64 cut;         /* last rank by logit */
    u64 typical_cut; /* last rank by typicality */
    float center;    /* typical distance: the mean one */
    float least;     /* weight, of 1 */
} pool;

/* In which order tokens come, and what each weighs: one or its probability. */
typedef enum order { COUNTED, BY_LOGIT, BY_TYPICALITY } order;

typedef struct token {
    u64 rank, weight;
    float distance; /* from the first in order, rising with rank */
} token;

/* Tokens of one bucket (-1: any) between two ranks. */
typedef struct range {
    int bucket;
    u64 low, high;
} range;

#define WHOLE_RANGE                                                                                \
    { -1, 0, ~0ull }

static __device__ __forceinline__ u64 rank_of(float x, int id) {
    const uint32_t bits = __float_as_uint(x + 0.0f); /* zeros of either sign tie */
    return (u64)((int32_t)bits < 0 ? bits : ~bits & 0x7fffffffu) << 32 | (uint32_t)id;
}

static __device__ __forceinline__ float logit_of(u64 rank) {
    const uint32_t bits = (uint32_t)(rank >> 32);
    return __uint_as_float((int32_t)bits < 0 ? bits : ~bits & 0x7fffffffu);
}

static __device__ __forceinline__ int id_of(u64 rank) {
    return (int)(uint32_t)rank;
}

/* NaN cannot be drawn; infinity would make every other weight NaN. */
static __device__ __forceinline__ float finite_above(float x) {
    return isnan(x) ? -INFINITY : x > FLT_MAX ? FLT_MAX : x;
}

/* Rounded after each step, as on the host. */
static __device__ __forceinline__ float logit(const pool *p, int i, float x) {
    if (p->raw) return isnan(x) ? -INFINITY : x;
    x = finite_above(x);
    const int count = p->counts ? p->counts[i] : 0;
    if (count == 0) return x;
    const row_params *by = p->penalties;
    const float times = (float)(count & GN_MAX_COUNT);
    if (by->repetition != 1)
        x = x > 0 ? __fdiv_rn(x, by->repetition) : __fmul_rn(x, by->repetition);
    if (times > 0) x = __fsub_rn(x, __fadd_rn(by->presence, __fmul_rn(by->frequency, times)));
    return finite_above(x);
}

static __device__ __forceinline__ u64 fixed(float weight) {
    return __float2ull_rn(weight * 0x1p44f);
}

/* 1/8 of a natural logarithm wide: those of the last one weigh nothing, or are counted. */
static __device__ __forceinline__ int bucket_of(float distance) {
    const float at = distance * 8;
    return at < BUCKETS - 1 ? (int)at : BUCKETS - 1; /* infinity less infinity goes last */
}

/* Token i, of logit `raw`, as it stands in the order; false when it is not in the pool or the
 * range. */
static __device__ __forceinline__ bool look(const pool *p, int i, float raw, order o,
                                            const range *r, token *t) {
    const float x = logit(p, i, raw);
    t->rank = rank_of(x, i);
    if (t->rank > p->cut) return false;
    const float below = __fmul_rn(p->largest - x, p->inverse_temperature); /* -log(weight) */
    t->distance = below;
    t->weight = 1;
    if (o != COUNTED) {
        const float atypical = fabsf(__fsub_rn(below, p->center));
        const u64 rank = (u64)__float_as_uint(atypical) << 32 | (uint32_t)i;
        if (rank > p->typical_cut) return false;
        if (o == BY_TYPICALITY) {
            t->rank = rank;
            t->distance = atypical;
        }
    }
    if (r->bucket >= 0 && bucket_of(t->distance) != r->bucket) return false;
    if (t->rank < r->low || t->rank > r->high) return false;
    if (o == COUNTED) return true;
    const float weight = expf(-below);
    t->weight = fixed(weight);
    return t->weight > 0 && weight >= p->least;
}

/* visit(token) for this thread's share of the block's tokens in the range. */
template <typename F>
static __device__ __forceinline__ void each(const pool *from, order o, const range *in, F visit) {
    const pool p = *from; /* in registers, whatever visit writes */
    const range r = *in;
    for (int i = p.begin + (int)threadIdx.x; i < p.end; i += LOADS * THREADS) {
        float x[LOADS];
#pragma unroll
        for (int j = 0; j < LOADS; j++) x[j] = i + j * THREADS < p.end ? p.x[i + j * THREADS] : 0;
#pragma unroll
        for (int j = 0; j < LOADS; j++) {
            token k;
            if (i + j * THREADS < p.end && look(&p, i + j * THREADS, x[j], o, &r, &k)) visit(k);
        }
    }
}

#endif
