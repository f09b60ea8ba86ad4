/* linear_mma_finish.cuh - the end of a tile in linear_mma.cu: its sums to y, or to working memory
 * and together with those of other clusters to y. */
#ifndef GN_CUDA_LINEAR_MMA_FINISH_CUH
#define GN_CUDA_LINEAR_MMA_FINISH_CUH

#include "linear.cuh"
#include "linear_mma_cut.cuh"

enum {
    AT_ONCE = 2,          /* eights of tokens that a thread finishes at once */
    PARTIALS_AT_ONCE = 8, /* clusters whose sums it reads at once */
};

/* The outputs of a thread: of rows `row` and `row` + 8 of a part, for some tokens; or with SWIGLU
 * of one row, of which the second value is up's. */
struct outputs {
    char *y; /* for the first token */
    int ld, tokens;
    const float *lora[2];
    bool has[2];
};

template <int N>
static __device__ __forceinline__ struct outputs outputs_of(const struct product &p, int tile,
                                                            int warpgroup, int warp, int lane) {
    const struct group g = group_of<N>(p, tile, warpgroup);
    const struct part &part = p.part[g.part];
    const int in_group = p.swiglu ? GROUP_ROWS / 2 : GROUP_ROWS, second = p.swiglu ? 0 : 8;
    const int row = g.i * in_group + warp * (in_group / 4) + lane / 4;
    const int token = tile % p.token_tiles * N + 2 * (lane % 4);
    struct outputs o;
    o.ld = (int)part.y_ld;
    o.y = (char *)part.y + ((int64_t)token * o.ld + row) * (p.y_f32 ? 4 : 2);
    o.tokens = p.T - token;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        o.lora[h] = p.lora + token * p.lora_ld + part.column[p.swiglu ? h : 0] + row + h * second;
        o.has[h] = g.exists && row + h * second < part.m[0].rows;
    }
    return o;
}

/* Sums of two rows of two tokens each, of n eights of tokens. */
typedef float some_sums[AT_ONCE][2][2];

/* The first token of eights first, first + step, ... and the next; past the n-th, none. */
static __device__ __forceinline__ int token_of(int first, int step, int n, int i) {
    return i / 4 < n ? 8 * (first + i / 4 * step) + i % 2 : INT32_MAX;
}

/* What those eights' sums are added to: y as it is, what LoRA adds. */
static __device__ __forceinline__ void read_addends(const struct product &p,
                                                    const struct outputs &o, int first, int step,
                                                    int n, some_sums &addends) {
    float old[AT_ONCE][2][2] = {}, lora[AT_ONCE][2][2] = {};
#pragma unroll
    for (int i = 0; i < AT_ONCE * 4; i++) {
        const int t = token_of(first, step, n, i), h = i / 2 % 2;
        if (t >= o.tokens || !o.has[h]) continue;
        if (p.add) old[i / 4][h][i % 2] = load_fresh((const float *)o.y + t * o.ld + h * 8);
        if (p.lora) lora[i / 4][h][i % 2] = o.lora[h][t * (int)p.lora_ld];
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE * 4; i++)
        addends[i / 4][i / 2 % 2][i % 2] =
            old[i / 4][i / 2 % 2][i % 2] + lora[i / 4][i / 2 % 2][i % 2];
}

/* Those eights of y. */
static __device__ __forceinline__ void finish(const struct product &p, const struct outputs &o,
                                              int first, int step, int n, some_sums &sums,
                                              const some_sums &addends) {
    const int second = p.swiglu ? 0 : 8;
#pragma unroll
    for (int i = 0; i < AT_ONCE * 4; i++)
        sums[i / 4][i / 2 % 2][i % 2] += addends[i / 4][i / 2 % 2][i % 2];
    if (p.swiglu) {
#pragma unroll
        for (int i = 0; i < AT_ONCE * 2; i++)
            sums[i / 2][0][i % 2] = silu(sums[i / 2][0][i % 2]) * sums[i / 2][1][i % 2];
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE * 4; i++) {
        const int t = token_of(first, step, n, i), h = i / 2 % 2;
        if (t >= o.tokens || !o.has[h] || (h > 0 && p.swiglu)) continue;
        const int at = t * o.ld + h * second;
        if (p.y_f32)
            ((float *)o.y)[at] = sums[i / 4][h][i % 2];
        else
            ((bf16 *)o.y)[at] = from_float<bf16>(sums[i / 4][h][i % 2]);
    }
}

static __device__ __forceinline__ void sync_warpgroup(int warpgroup) {
    sync_some(FIRST_BARRIER + warpgroup, GROUP_THREADS);
}

/* Two counters of a block's tile: warpgroups that have left their sums; those that have done with
 * them. */
static __device__ __forceinline__ uint32_t *counters_of(const struct product &p, int tile) {
    return p.counters + 2 * (tile * PEERS + (int)blockIdx.x % PEERS);
}

/* Where a cluster leaves its sums of a tile: (N / 8) times a float4 of every thread. A run has two
 * such tiles at most, the one that it begins in (slot 0) and the one that it ends in. */
template <int N>
static __device__ __forceinline__ float4 *partials_at(const struct product &p, int cluster,
                                                      int slot, int warpgroup) {
    const int block = cluster * PEERS + (int)blockIdx.x % PEERS;
    return p.partials +
           (int64_t)((block * 2 + slot) * cut<N>::GROUPS + warpgroup) * (N / 8 * GROUP_THREADS);
}

/* A tile's sums, of the steps that this run has, up to `last`: to y or, if they are not all, to
 * working memory. Registers move up, so that the loop is short: it runs once a tile, from cold
 * memory. */
template <int N>
static __device__ __forceinline__ void leave(const struct product &p, float (&acc)[N / 2],
                                             struct run run, int last, int warpgroup, int thread) {
    int cluster = (int)blockIdx.x / PEERS;
    keep(cluster), keep(thread), keep(warpgroup); /* nothing made of them waits through the loop */
    const int tile = last / p.steps;
    const bool whole = tile * p.steps >= run.first && (tile + 1) * p.steps == last + 1;
    const struct outputs o = outputs_of<N>(p, tile, warpgroup, thread / WARP, thread % WARP);
    float4 *to = partials_at<N>(p, cluster, run.first < tile * p.steps, warpgroup) + thread;
#pragma unroll 1
    for (int i = 0; i < N / 8; i += AT_ONCE) {
        if (whole) {
            some_sums sums, addends;
            read_addends(p, o, i, 1, AT_ONCE, addends);
#pragma unroll
            for (int j = 0; j < AT_ONCE * 4; j++) sums[j / 4][j / 2 % 2][j % 2] = acc[j];
            finish(p, o, i, 1, AT_ONCE, sums, addends);
        } else {
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
                to[(i + j) * GROUP_THREADS] =
                    make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
        }
#pragma unroll
        for (int j = 0; j < N / 2; j++)
            acc[j] = j + 4 * AT_ONCE < N / 2 ? acc[j + 4 * AT_ONCE] : 0.0f;
    }
    if (whole) return;
    sync_warpgroup(warpgroup);
    if (thread == 0) add_release(counters_of(p, tile), 1);
}

/* Of a tile that several clusters have a part of: finishes every n-th eight of its tokens, when all
 * sums are there. */
template <int N>
static __device__ __forceinline__ void finish_shared(const struct product &p, int tile,
                                                     int warpgroup, int thread) {
    const int first = cluster_of(p, tile * p.steps), last = cluster_of(p, (tile + 1) * p.steps - 1);
    const int n = last - first + 1;
    uint32_t *counters = counters_of(p, tile);
    const struct outputs o = outputs_of<N>(p, tile, warpgroup, thread / WARP, thread % WARP);
    /* of the first cluster, and of the second, which begins in the tile, as all after it do */
    const float4 *head =
        partials_at<N>(p, first, run_of(p, first).first < tile * p.steps, warpgroup) + thread;
    const float4 *rest = partials_at<N>(p, first + 1, 0, warpgroup) + thread;
    const int64_t apart = PEERS * 2 * cut<N>::GROUPS * (N / 8 * GROUP_THREADS);
    bool ready = false;
#pragma unroll 1
    for (int i = (int)blockIdx.x / PEERS - first; i < N / 8; i += AT_ONCE * n) {
        some_sums sums = {}, addends;
        const int some = min(AT_ONCE, (N / 8 - i + n - 1) / n);
        read_addends(p, o, i, n, some, addends);
        if (!ready && thread == 0)
            while (load_acquire(counters) < (uint32_t)(n * cut<N>::GROUPS)) __nanosleep(32);
        sync_warpgroup(warpgroup);
        ready = true;
#pragma unroll 1
        for (int begin = 0; begin < n; begin += PARTIALS_AT_ONCE) {
            float4 v[PARTIALS_AT_ONCE][AT_ONCE] = {};
#pragma unroll
            for (int c = 0; c < PARTIALS_AT_ONCE; c++)
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++)
                    if (begin + c < n && j < some)
                        v[c][j] = __ldcg((begin + c == 0 ? head : rest + (begin + c - 1) * apart) +
                                         (i + j * n) * GROUP_THREADS);
#pragma unroll
            for (int c = 0; c < PARTIALS_AT_ONCE; c++)
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++) {
                    sums[j][0][0] += v[c][j].x;
                    sums[j][0][1] += v[c][j].y;
                    sums[j][1][0] += v[c][j].z;
                    sums[j][1][1] += v[c][j].w;
                }
        }
        finish(p, o, i, n, some, sums, addends);
    }
    sync_warpgroup(warpgroup);
    if (thread == 0 && atomicAdd(counters + 1, 1u) == (uint32_t)(n * cut<N>::GROUPS) - 1) {
        counters[0] = 0;
        counters[1] = 0;
    }
}

#endif
