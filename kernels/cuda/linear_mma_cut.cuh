/* linear_mma_cut.cuh - how linear_mma.cu deals a call out to clusters, blocks and warpgroups, and
 * where things are in shared memory. */
#ifndef GN_CUDA_LINEAR_MMA_CUT_CUH
#define GN_CUDA_LINEAR_MMA_CUT_CUH

#include "linear_mma.cuh"
#include "linear_mma_pack.cuh"

enum {
    PEERS = 2,       /* blocks of a cluster, which share x */
    GROUP_ROWS = 64, /* weight rows of a warpgroup */
    GROUP_TILES = GROUP_ROWS / GN_CUDA_TILE_ROWS,
    GROUP_THREADS = 128,
    MAX_TOKENS = 128,         /* of a tile of outputs */
    ROW_BYTES = GN_BLOCK * 2, /* of x, in a block of K */
    ENTRY_BYTES = 256,        /* of the table; the upper half is free */
    TABLE_BYTES = 256 * ENTRY_BYTES,
    MAX_STAGES = 8,
    BARRIER_ENTRY = 3 * 256 / 32, /* first entry above those of the tables that decode scales */
    FIRST_BARRIER = 1,            /* of hardware, of a warpgroup */
    LINE = 128,                   /* of L2 */
    L2_BLOCKS = 16,               /* of K, whose weights are in registers or on their way to L2 */
};

/* How a block is cut for tiles of N tokens. Registers and shared memory are left for a block of
 * pack_kernel, which then runs beside this kernel's. */
template <int N> struct cut {
    static constexpr bool FEW = N <= 64;
    static constexpr int GROUPS = FEW ? 3 : 2;   /* what registers allow */
    static constexpr int STEP = N <= 32 ? 4 : 2; /* 64-wide blocks of K in a stage */
    static constexpr int L2_STEPS = L2_BLOCKS / STEP;
    static constexpr int X_BYTES = N * ROW_BYTES;
    static constexpr int STAGE_BYTES = STEP * X_BYTES;
    static constexpr int STAGES = N <= 32 ? 4 : N <= 64 ? 8 : N <= 96 ? 6 : 5;
    static constexpr int SHARED_BYTES = TABLE_BYTES + STAGES * STAGE_BYTES;
    static constexpr int X_AHEAD = STAGES - 2; /* steps; the other two let warps drift apart */
    static constexpr int THREADS = GROUPS * GROUP_THREADS;
    static constexpr int REGISTERS = FEW ? 152 : 224; /* of a thread */
    static_assert(THREADS * REGISTERS + PACK_THREADS * PACK_REGISTERS <= 65536, "room beside it");
    static_assert(SHARED_BYTES <= 224 * 1024, "the same");
    static_assert(STAGES <= MAX_STAGES, "barriers stand above the table's entries");
    static_assert(X_BYTES % 1024 == 0, "whole swizzled eights");
    static_assert(STEP % PEERS == 0, "a block copies whole blocks of K for the cluster");
};

/* One y: a part, or gate and up together, whose tiles of 8 rows then alternate. */
struct part {
    struct matrix m[2];
    void *y;
    int64_t y_ld;
    int group0, column[2]; /* first group of 64 rows; where LoRA's sums have a matrix's rows */
};

struct product {
    struct part part[GN_MAX_PARTS];
    int n_parts, groups, T, token_tiles;
    int blocks, steps; /* of 64 columns; of STEP blocks */
    int tiles;         /* of outputs, for a whole cluster: GROUPS groups a block by N tokens */
    int clusters;
    const uint8_t *x;  /* (token_tiles, STEP steps, N) rows of a block */
    const float *lora; /* (T, columns of all parts), or NULL */
    int64_t lora_ld;
    float4 *partials;
    uint32_t *counters;
    bool y_f32, swiglu, add;
};

extern __shared__ __align__(1024) uint8_t shared[];

/* ---- who does what ---- */

/* A cluster's piece of all steps. */
struct run {
    int first, end;
};

static __device__ __forceinline__ struct run run_of(const struct product &p, int cluster) {
    const int all = p.tiles * p.steps;
    return {all * cluster / p.clusters, all * (cluster + 1) / p.clusters};
}
/* The cluster that takes a step. */
static __device__ __forceinline__ int cluster_of(const struct product &p, int step) {
    return ((step + 1) * p.clusters - 1) / (p.tiles * p.steps);
}

/* A group of 64 weight rows. */
struct group {
    int part, i; /* i-th of the part */
    bool exists;
};

/* Of a warpgroup in a tile. Those that fill the last tile read the last group again, in vain. */
template <int N>
static __device__ __forceinline__ struct group group_of(const struct product &p, int tile,
                                                        int warpgroup) {
    const int rank = (int)blockIdx.x % PEERS;
    const int i = (tile / p.token_tiles * PEERS + rank) * cut<N>::GROUPS + warpgroup;
    const int at = min(i, p.groups - 1);
    struct group g = {0, 0, i < p.groups};
    while (g.part + 1 < p.n_parts && at >= p.part[g.part + 1].group0) g.part++;
    g.i = at - p.part[g.part].group0;
    return g;
}

/* Tile h of a group: of matrix *m. */
static __device__ __forceinline__ int tile_of(const struct product &p, struct group g, int h,
                                              int *m) {
    *m = p.swiglu ? h % 2 : 0;
    const int tile = p.swiglu ? g.i * (GROUP_TILES / 2) + h / 2 : g.i * GROUP_TILES + h;
    return min(tile, (p.part[g.part].m[*m].rows - 1) / GN_CUDA_TILE_ROWS);
}

/* ---- where things are in shared memory ---- */

template <int N> static __device__ __forceinline__ uint8_t *stage_at(int stage) {
    return shared + TABLE_BYTES + stage * cut<N>::STAGE_BYTES;
}
static __device__ __forceinline__ uint8_t *above_entry(int entry) {
    return shared + entry * ENTRY_BYTES + ENTRY_BYTES / 2;
}
static __device__ __forceinline__ float *nested_at(int table, uint32_t code) {
    return (float *)above_entry(table * 8 + code / 32) + code % 32;
}
/* Barriers: a stage is full; it is empty. */
static __device__ __forceinline__ uint32_t full_at(int stage) {
    return shared_address(above_entry(BARRIER_ENTRY)) + stage * 8;
}
static __device__ __forceinline__ uint32_t empty_at(int stage) {
    return full_at(stage) + MAX_STAGES * 8;
}

/* The next stage of the ring, and the parity of its phase. */
struct turn {
    int stage;
    uint32_t parity;
};

template <int N> static __device__ __forceinline__ struct turn next(struct turn t) {
    return t.stage + 1 < cut<N>::STAGES ? turn{t.stage + 1, t.parity} : turn{0, t.parity ^ 1};
}
/* The stage to fill in that turn, and the parity of when it has been emptied. */
template <int N> static __device__ __forceinline__ struct turn to_fill(struct turn t) {
    const int stage = t.stage + cut<N>::X_AHEAD;
    return stage < cut<N>::STAGES ? turn{stage, t.parity ^ 1}
                                  : turn{stage - cut<N>::STAGES, t.parity};
}

#endif
