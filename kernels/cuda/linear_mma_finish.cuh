/* linear_mma_finish.cuh - the end of a tile in linear_mma.cu: its sums to y, or to working memory
 * and together with those of other clusters to y. */
#ifndef GN_CUDA_LINEAR_MMA_FINISH_CUH
#define GN_CUDA_LINEAR_MMA_FINISH_CUH

#include "linear.cuh"
#include "linear_mma_cut.cuh"

/* A thread's sums are of rows `row` and `row` + 8 of a part, of tokens 2c and 2c + 1 of every eight
 * (c = lane % 4); with SWIGLU of one row, the second of up. In bf16 its outputs are others: of
 * token lane / 4 of an eight, two rows side by side, and those 8 further. */
struct outputs {
    char *y;       /* the first */
    int64_t token; /* bytes from a token to the next */
    int tokens;    /* that exist, counted from the first output's */
    bool has[2];   /* whether the rows of its outputs exist */
    /* with LoRA, what is added to its sums, of the first token; and the same of them */
    const float *lora[2];
    int lora_tokens;
    bool has_lora[2];
};

template <int N>
static __device__ __forceinline__ struct outputs outputs_of(const struct product &p, int tile,
                                                            int warpgroup, int warp, int lane) {
    const struct group g = group_of<N>(p, tile, warpgroup);
    const struct part &part = p.part[g.part];
    const int in_group = p.swiglu ? GROUP_ROWS / 2 : GROUP_ROWS, second = p.swiglu ? 0 : 8;
    const int row0 = g.i * in_group + warp * (in_group / 4), token0 = tile % p.token_tiles * N;
    const int row = row0 + (p.y_f32 ? lane / 4 : 2 * (lane % 4));
    const int token = token0 + (p.y_f32 ? 2 * (lane % 4) : lane / 4);
    const int sum_row = row0 + lane / 4, sum_token = token0 + 2 * (lane % 4);
    const int size = p.y_f32 ? 4 : 2;
    struct outputs o;
    o.token = part.y_ld * size;
    o.y = (char *)part.y + token * o.token + row * size;
    o.tokens = p.T - token;
    o.lora_tokens = p.T - sum_token;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        o.lora[h] =
            p.lora + sum_token * p.lora_ld + part.column[p.swiglu ? h : 0] + sum_row + h * second;
        o.has[h] = g.exists && row + h * second < part.m[0].rows;
        o.has_lora[h] = p.lora && g.exists && sum_row + h * second < part.m[0].rows;
    }
    return o;
}

/* y + v; each y by one thread. */
static __device__ __forceinline__ void add_to(float *y, float v) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(y), "f"(v) : "memory");
}

/* Sums of eight e of tokens to y, by a warp. */
static __device__ __forceinline__ void finish(const struct product &p, const struct outputs &o,
                                              int e, float4 sums) {
    float v[2][2] = {{sums.x, sums.y}, {sums.z, sums.w}};
    if (p.lora) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (o.has_lora[i / 2] && 8 * e + i % 2 < o.lora_tokens)
                v[i / 2][i % 2] += o.lora[i / 2][(8 * e + i % 2) * p.lora_ld];
    }
    if (p.swiglu) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            v[0][i] = (p.y_f32 ? silu(v[0][i]) : silu_fast(v[0][i])) * v[1][i];
    }
    char *y = o.y + 8 * e * o.token;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (h > 0 && p.swiglu) break;
        if (!p.y_f32) {
            const uint32_t pair = turn_matrix(pack_bf16(v[h][0], v[h][1]));
            if (o.has[h] && 8 * e < o.tokens) *(uint32_t *)(y + h * 8 * sizeof(bf16)) = pair;
            continue;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float *to = (float *)(y + i * o.token) + h * 8;
            if (!o.has[h] || 8 * e + i >= o.tokens) continue;
            if (p.add)
                add_to(to, v[h][i]);
            else
                *to = v[h][i];
        }
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
    constexpr int LEAVE = cut<N>::LEAVE;
#pragma unroll 1
    for (int i = 0; i < N / 8; i += LEAVE) {
#pragma unroll
        for (int j = 0; j < LEAVE; j++) {
            const float4 sums =
                make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
            if (whole)
                finish(p, o, i + j, sums);
            else
                to[(i + j) * GROUP_THREADS] = sums;
        }
#pragma unroll
        for (int j = 0; j < N / 2; j++) acc[j] = j + 4 * LEAVE < N / 2 ? acc[j + 4 * LEAVE] : 0.0f;
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
    constexpr int FINISH = cut<N>::FINISH, PARTIALS = cut<N>::PARTIALS;
    const struct outputs o = outputs_of<N>(p, tile, warpgroup, thread / WARP, thread % WARP);
    /* of the first cluster, and of the second, which begins in the tile, as all after it do */
    const float4 *head =
        partials_at<N>(p, first, run_of(p, first).first < tile * p.steps, warpgroup) + thread;
    const float4 *rest = partials_at<N>(p, first + 1, 0, warpgroup) + thread;
    const int64_t apart = PEERS * 2 * cut<N>::GROUPS * (N / 8 * GROUP_THREADS);
    const int own = (int)blockIdx.x / PEERS - first;
    if (thread == 0 && own < N / 8)
        while (load_acquire(counters) < (uint32_t)(n * cut<N>::GROUPS)) __nanosleep(32);
    sync_warpgroup(warpgroup);
#pragma unroll 1
    for (int i = own; i < N / 8; i += FINISH * n) {
        float4 sums[FINISH] = {};
#pragma unroll 1
        for (int begin = 0; begin < n; begin += PARTIALS) {
            float4 v[PARTIALS][FINISH] = {};
#pragma unroll
            for (int c = 0; c < PARTIALS; c++)
#pragma unroll
                for (int j = 0; j < FINISH; j++)
                    if (begin + c < n && i + j * n < N / 8)
                        v[c][j] = __ldcg((begin + c == 0 ? head : rest + (begin + c - 1) * apart) +
                                         (i + j * n) * GROUP_THREADS);
#pragma unroll
            for (int c = 0; c < PARTIALS; c++)
#pragma unroll
                for (int j = 0; j < FINISH; j++) {
                    sums[j].x += v[c][j].x;
                    sums[j].y += v[c][j].y;
                    sums[j].z += v[c][j].z;
                    sums[j].w += v[c][j].w;
                }
        }
#pragma unroll
        for (int j = 0; j < FINISH; j++)
            if (i + j * n < N / 8) finish(p, o, i + j * n, sums[j]);
    }
    sync_warpgroup(warpgroup);
    if (thread == 0 && atomicAdd(counters + 1, 1u) == (uint32_t)(n * cut<N>::GROUPS) - 1) {
        counters[0] = 0;
        counters[1] = 0;
    }
}

#endif
