/* linear_decode.cuh - what the parts of linear_decode.cu share: the call as its kernel gets it, the
 * ways to memory, and who does what. */
#ifndef GN_CUDA_LINEAR_DECODE_CUH
#define GN_CUDA_LINEAR_DECODE_CUH

#include "linear_tiles.cuh"

enum {
    WARPS = 16,
    THREADS = WARPS * WARP,
    MAX_TOKENS = 16,
    MAX_RANK_BITS = 3, /* 8 blocks in a cluster */
    DEPTH = 4,         /* units a warp has in registers or on their way there */
    L2_AHEAD = 16,     /* units on their way into L2 */
    ENTRY_BYTES = 256,
    TABLE_BYTES = 256 * ENTRY_BYTES,
    WARP_ENTRIES = 256 / WARPS,
    IN_TABLE = 2 * WARP_ENTRIES, /* scales of 16 rows by 64 columns, 64 bytes, of a warp */
    HELPERS = 2,
    MAX_TERMS = 64,
    MAX_PIECES = 8, /* of K, that u is summed from */
    RANK_STEP = 64, /* ranks whose u is in shared memory at once */
};

/* One y: a part, or gate and up together. */
struct part {
    struct matrix m[2];
    void *y;
    int64_t y_ld;
    int groups, cluster0; /* its clusters are [cluster0, the next part's) */
};

struct product {
    struct part part[GN_MAX_PARTS];
    const void *x;
    int64_t x_ld;
    const float *norm;
    float eps;
    int n_parts, T, blocks; /* of 64 columns */
    uint32_t inverse[2];    /* of a block's least and greatest number of k-blocks */
    int ranks, rank_bits, clusters, per_cluster, batch; /* groups of a cluster: all, at once */
    bool x_f32, y_f32, swiglu, add;
    /* offsets in shared memory */
    int scales, scale_tiles; /* tiles of 16 rows, a warp */
    int nested, squares, residual, slots, lora, u, terms, x_at, pitch;
    const gn_lora *lora_terms;
    int n_terms, n_pairs, pair;
    float *lora_u;
    uint32_t *counters;
};

/* What a block works on: groups from group0 on, and k-blocks [k0, k0 + ks) of them. */
struct work {
    int cluster, rank, part, group0, groups, k0, ks;
    uint32_t inverse; /* 2^31 / ks, rounded up: u / ks is the upper half of 2 u inverse */
};

extern __shared__ __align__(1024) uint8_t shared[];

/* ---- memory ---- */

/* The floats at the same place of another block of the cluster. */
static __device__ __forceinline__ float load_peer(const float *at, int rank) {
    float v = 0.0f;
#if __CUDA_ARCH__ >= 900
    uint32_t peer;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(peer)
                 : "r"(shared_address(at)), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(peer) : "memory");
#endif
    return v;
}

/* Of all blocks that share sums. */
static __device__ __forceinline__ void sync_ranks(int ranks) {
#if __CUDA_ARCH__ >= 900
    if (ranks > 1) {
        asm volatile("barrier.cluster.arrive.release.aligned;\n"
                     "barrier.cluster.wait.acquire.aligned;" ::
                         : "memory");
        return;
    }
#endif
    __syncthreads();
}

/* Keeps a value as it is in a register, where the compiler would rather keep what it is made of and
 * make it again and again. */
static __device__ __forceinline__ void keep(const uint8_t *&v) {
    asm("" : "+l"(v));
}
static __device__ __forceinline__ void keep(uint32_t &v) {
    asm("" : "+r"(v));
}
/* The same number, but nothing made of it can move out of a loop and wait there in registers. */
static __device__ __forceinline__ int here(int v) {
    asm volatile("" : "+r"(v));
    return v;
}

static __device__ __forceinline__ float low_of(uint32_t pair) {
    return __uint_as_float(pair << 16);
}
static __device__ __forceinline__ float high_of(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

/* 16 columns of one row of x, for lanes that have a row; the others keep their zeros, at no cost in
 * bandwidth. */
static __device__ __forceinline__ void load_x(uint32_t x[8], uint32_t at, bool has_row) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.u32 p, %9, 0;\n"
                 "@p ld.shared.v4.u32 {%0, %1, %2, %3}, [%8];\n"
                 "@p ld.shared.v4.u32 {%4, %5, %6, %7}, [%8 + 16];\n"
                 "}"
                 : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3]), "+r"(x[4]), "+r"(x[5]),
                   "+r"(x[6]), "+r"(x[7])
                 : "r"(at), "r"((uint32_t)has_row));
}

/* ---- who does what ---- */

/* A block's first k-block. */
static __device__ __forceinline__ int first_block(const struct product &p, int rank) {
    return (rank * p.blocks) >> p.rank_bits;
}

static __device__ __forceinline__ struct work work_of(const struct product &p) {
    struct work w;
    w.cluster = (int)blockIdx.y;
    w.rank = (int)blockIdx.x;
    w.part = 0;
    while (w.part + 1 < p.n_parts && w.cluster >= p.part[w.part + 1].cluster0) w.part++;
    w.group0 = (w.cluster - p.part[w.part].cluster0) * p.per_cluster;
    w.groups = min(p.part[w.part].groups - w.group0, p.per_cluster);
    w.k0 = first_block(p, w.rank);
    w.ks = first_block(p, w.rank + 1) - w.k0;
    w.inverse = p.inverse[w.ks - (p.blocks >> p.rank_bits)];
    return w;
}

/* Some consecutive groups of the block, whose sums fit in shared memory together. */
struct batch {
    int group0, groups;
};

static __device__ __forceinline__ struct batch batch_of(const struct product &p,
                                                        const struct work &w, int group) {
    return {w.group0 + group, min(w.groups - group, p.batch)};
}

/* The first of `units` units that a warp of `movers` takes. */
static __host__ __device__ __forceinline__ int first_unit(int units, int warp, int movers) {
    return units * warp / movers;
}

/* The warp that takes a unit. */
static __host__ __device__ __forceinline__ int warp_of(int units, int unit, int movers) {
    return ((unit + 1) * movers - 1) / units;
}

/* Half h of a group: tile (of 8 rows) of matrix m. A last group that lacks some reads its last one
 * again, and nobody looks at the result. */
template <int R>
static __device__ __forceinline__ int tile_of(const struct product &p, const struct work &w,
                                              int group, int h, int *m) {
    *m = p.swiglu ? h % 2 : 0;
    const int tile = p.swiglu ? group * R + h / 2 : group * 2 * R + h;
    return min(tile, (p.part[w.part].m[*m].rows - 1) / GN_CUDA_TILE_ROWS);
}

#endif
