/* linear_mma_finish.cuh - the end of a tile in linear_mma.cu: its sums to y, or to working memory
 * and together with those of other clusters to y. */
#ifndef GN_CUDA_LINEAR_MMA_FINISH_CUH
#define GN_CUDA_LINEAR_MMA_FINISH_CUH

#include "linear.cuh"
#include "linear_mma_cut.cuh"

enum { AT_ONCE = 2 }; /* eights of tokens that a thread finishes at once */

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

/* Those of eights first, first + step, .... What is read is read before anything is written, so as
 * to wait once. */
static __device__ __forceinline__ void finish(const struct product &p, const struct outputs &o,
                                              int first, int step, int n, some_sums &sums) {
    enum { VALUES = AT_ONCE * 4 };
    const int second = p.swiglu ? 0 : 8;
    int token[AT_ONCE][2];
#pragma unroll
    for (int i = 0; i < AT_ONCE * 2; i++) {
        token[i / 2][i % 2] = 8 * (first + i / 2 * step) + i % 2;
        if (i / 2 >= n) token[i / 2][i % 2] = INT32_MAX;
    }
    if (p.add) {
        float old[AT_ONCE][2][2] = {};
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const int t = token[i / 4][i % 2], h = i / 2 % 2;
            if (t < o.tokens && o.has[h])
                old[i / 4][h][i % 2] = load_fresh((const float *)o.y + t * o.ld + h * 8);
        }
#pragma unroll
        for (int i = 0; i < VALUES; i++)
            sums[i / 4][i / 2 % 2][i % 2] += old[i / 4][i / 2 % 2][i % 2];
    }
    if (p.lora) {
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const int t = token[i / 4][i % 2], h = i / 2 % 2;
            if (t < o.tokens && o.has[h]) sums[i / 4][h][i % 2] += o.lora[h][t * (int)p.lora_ld];
        }
    }
    if (p.swiglu) {
#pragma unroll
        for (int i = 0; i < AT_ONCE * 2; i++)
            sums[i / 2][0][i % 2] = silu(sums[i / 2][0][i % 2]) * sums[i / 2][1][i % 2];
    }
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
        const int t = token[i / 4][i % 2], h = i / 2 % 2;
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
 * such tiles at most, the one it begins in and the one it ends in. */
template <int N>
static __device__ __forceinline__ float4 *partials_at(const struct product &p, int cluster,
                                                      int tile, int warpgroup) {
    const int slot = run_of(p, cluster).first < tile * p.steps ? 1 : 0;
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
    keep(cluster), keep(thread), keep(warpgroup); /* nothing of this waits through the loop */
    const int tile = last / p.steps;
    const bool whole = tile * p.steps >= run.first && (tile + 1) * p.steps == last + 1;
    const struct outputs o = outputs_of<N>(p, tile, warpgroup, thread / WARP, thread % WARP);
    float4 *to = partials_at<N>(p, cluster, tile, warpgroup) + thread;
#pragma unroll 1
    for (int i = 0; i < N / 8; i += AT_ONCE) {
        if (whole) {
            some_sums sums;
#pragma unroll
            for (int j = 0; j < AT_ONCE * 4; j++) sums[j / 4][j / 2 % 2][j % 2] = acc[j];
            finish(p, o, i, 1, AT_ONCE, sums);
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
    if (thread == 0)
        while (load_acquire(counters) < (uint32_t)(n * cut<N>::GROUPS)) __nanosleep(32);
    sync_warpgroup(warpgroup);
    const struct outputs o = outputs_of<N>(p, tile, warpgroup, thread / WARP, thread % WARP);
#pragma unroll 1
    for (int i = (int)blockIdx.x / PEERS - first; i < N / 8; i += AT_ONCE * n) {
        some_sums sums = {};
        const int some = min(AT_ONCE, (N / 8 - i + n - 1) / n);
#pragma unroll 2
        for (int cluster = first; cluster <= last; cluster++) {
            const float4 *from = partials_at<N>(p, cluster, tile, warpgroup) + thread;
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                if (j >= some) continue;
                const float4 v = __ldcg(from + (i + j * n) * GROUP_THREADS);
                sums[j][0][0] += v.x;
                sums[j][0][1] += v.y;
                sums[j][1][0] += v.z;
                sums[j][1][1] += v.w;
            }
        }
        finish(p, o, i, n, some, sums);
    }
    sync_warpgroup(warpgroup);
    if (thread == 0 && atomicAdd(counters + 1, 1u) == (uint32_t)(n * cut<N>::GROUPS) - 1) {
        counters[0] = 0;
        counters[1] = 0;
    }
}

#endif
