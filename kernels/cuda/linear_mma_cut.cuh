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
    GROUP_WARPS = GROUP_THREADS / WARP,
    MAX_TOKENS = 256,         /* of a tile of outputs */
    ROW_BYTES = GN_BLOCK * 2, /* of x, in a block of K */
    MAX_STAGES = 8,
    MAX_STEP = 4,      /* of any cut */
    FIRST_BARRIER = 1, /* of hardware, of a warpgroup */
    LINE = 128,        /* of L2 */
    L2_BLOCKS = 16,    /* of K, whose weights are on their way to L2 before those of registers */
};

/* Where things are in shared memory, counted from base_address. */
enum {
    RESERVED_BYTES = 1024, /* by the system, before all others */
    STAGES_AT = RESERVED_BYTES,
    TABLE = 1 << 17,   /* see look_up: the low half is zero */
    ENTRY_BYTES = 256, /* of which it fills half */
    TABLE_BYTES = 256 * ENTRY_BYTES,
    NESTED_BYTES = 256 * (int)sizeof(float),
    BARRIERS_AT = TABLE - 2 * MAX_STAGES * 8,
    NESTED_AT = TABLE - 4096,       /* what decodes scales, a part's after another's */
    UPPER_AT = TABLE + TABLE_BYTES, /* a stage for which there is no room below */
};
static_assert(NESTED_AT + GN_MAX_PARTS * NESTED_BYTES <= BARRIERS_AT, "in this order");
static_assert(STAGES_AT % 1024 == 0, "swizzled eights of rows");

/* How a block is cut for tiles of N tokens. But with most tokens, whose calls are long, registers
 * and shared memory are left for a block of pack_kernel, which then runs beside this kernel's. */
template <int N> struct cut {
    static constexpr bool MANY = N > 64;
    static constexpr int GROUPS = MANY ? 2 : 3; /* what registers allow */
    static constexpr int STEP = MANY ? 2 : 4;   /* 64-wide blocks of K */
    static constexpr int L2_STEPS = L2_BLOCKS / STEP;
    static constexpr int STAGE_BLOCKS = N <= 32 ? 4 : N <= 64 ? 2 : 1; /* of x, in a stage */
    static constexpr int STEP_STAGES = STEP / STAGE_BLOCKS;
    static constexpr int X_BYTES = N * ROW_BYTES;
    static constexpr int STAGE_BYTES = STAGE_BLOCKS * X_BYTES;
    static constexpr int STAGES = N <= 128 ? 7 : N <= 192 ? 5 : 4;
    static constexpr int UPPER = N > 192 ? STAGES - 1 : STAGES; /* the stage at UPPER_AT, if any */
    static constexpr int SHARED_BYTES = UPPER_AT + (STAGES - UPPER) * STAGE_BYTES;
    static constexpr int X_AHEAD = STAGES - 2; /* stages; the other two let warps drift apart */
    static constexpr int THREADS = GROUPS * GROUP_THREADS;
    static constexpr int REGISTERS = N > 192 ? 255 : MANY ? 224 : 152; /* of a thread */
    /* of eights of tokens, at the end of a tile: a thread leaves at once; finishes at once; of how
     * many clusters it then reads sums at once */
    static constexpr int LEAVE = N / 8 < 8 ? N / 8 : 8;
    static constexpr int FINISH = MANY ? 4 : 2;
    static constexpr int PARTIALS = MANY ? 4 : 8;
    static_assert(N > 192 || THREADS * REGISTERS + PACK_THREADS * PACK_REGISTERS <= 65536,
                  "room beside it");
    static_assert(STAGES_AT + UPPER * STAGE_BYTES <= NESTED_AT, "in this order");
    static_assert(SHARED_BYTES <= 227 * 1024, "of Hopper");
    static_assert(STAGES <= MAX_STAGES, "barriers");
    static_assert(STAGE_BYTES / PEERS % 1024 == 0, "a block copies whole swizzled eights of rows");
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
    int steps; /* of STEP 64-wide blocks of K */
    int tiles; /* of outputs, for a whole cluster: GROUPS groups a block by N tokens */
    int clusters;
    const uint8_t *x;  /* (token_tiles, blocks of K, N) rows of a block */
    const float *lora; /* (T, columns of all parts), or NULL */
    int64_t lora_ld;
    float4 *partials;
    uint32_t *counters;
    bool y_f32, swiglu, add;
};

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

extern __shared__ __align__(1024) uint8_t shared[];

/* Of shared memory, of which the system reserves up to RESERVED_BYTES. In a cluster it is the
 * block's rank, shifted: made once, and kept in a register. */
static __device__ __forceinline__ uint32_t base_address(void) {
    int base = (int)(shared_address(shared) & 0xff000000u);
    keep(base);
    return (uint32_t)base;
}
template <int N> static __device__ __forceinline__ uint32_t stage_at(uint32_t base, int stage) {
    return base +
           (stage == cut<N>::UPPER ? (int)UPPER_AT : STAGES_AT + stage * cut<N>::STAGE_BYTES);
}
/* Barriers: a stage is full; it is empty. */
static __device__ __forceinline__ uint32_t full_at(uint32_t base, int stage) {
    return base + BARRIERS_AT + stage * 8;
}
static __device__ __forceinline__ uint32_t empty_at(uint32_t base, int stage) {
    return base + BARRIERS_AT + (MAX_STAGES + stage) * 8;
}

/* A stage of the ring, and the parity of its phase. */
struct turn {
    int stage;
    uint32_t parity;
};

template <int N> static __device__ __forceinline__ struct turn next(struct turn t) {
    return t.stage + 1 < cut<N>::STAGES ? turn{t.stage + 1, t.parity} : turn{0, t.parity ^ 1};
}
template <int N> static __device__ __forceinline__ int before(struct turn t) {
    return t.stage > 0 ? t.stage - 1 : cut<N>::STAGES - 1;
}
/* The stage to fill in that turn, and the parity of when it has been emptied. */
template <int N> static __device__ __forceinline__ struct turn to_fill(struct turn t) {
    const int stage = t.stage + cut<N>::X_AHEAD;
    return stage < cut<N>::STAGES ? turn{stage, t.parity ^ 1}
                                  : turn{stage - cut<N>::STAGES, t.parity};
}

#endif
