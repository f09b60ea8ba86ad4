/* linear_decode.cu - products of 1 to 16 rows of x with 4-bit weights in tiles: a step of decoding.
 *
 * Bound by reading the weights once, so everything is made to keep loads in flight:
 *   - One block an SM. It owns whole groups of 16 weight rows (32 with more than 8 rows of x; half
 *     of them gate's and half up's for SWIGLU), so that no sum crosses blocks. For large x blocks
 *     form clusters that share groups, each with a slice of K: less of x a block, finer dealing.
 *   - A unit is a group by 64 columns. Each warp takes a run of consecutive units, equally many:
 *     few warps meet in a group, and their sums meet in shared memory, in a fixed order, once.
 *   - Before it waits for its predecessor (pdl_wait) a block has its first weights in registers,
 *     the next ones on their way into L2, scales decoded and the table below filled.
 *   - Weights are the mma's A operand (16 rows), tokens its B operand (8 columns; the unused ones
 *     are zero and cost nothing). A packed byte becomes two bf16 codes by one lookup in a table of
 *     256 pairs, of which every lane has a copy in its own bank. Entries are 256 bytes apart: the
 *     address is then (byte << 8 | 4 * lane), which one byte permutation makes. A block's scale
 *     multiplies its float32 sums. The entries' upper halves hold the scales.
 *   - RMSNorm's factor, one number a row of x, is applied to the sums: x is read only once.
 * What then limits it is shared memory: of the ~31 cycles that 512 bytes take an SM of an H200 at
 * full bandwidth, lookups take 16, weights passing through 4, x 2 (1 row) to 8, scales 1.
 *
 * LoRA's terms are the work of HELPERS warps a block beside the others: they compute u = A x,
 * spread over all blocks, then wait for all of u and add B u for the rows of their block. */
#include "common.cuh"
#include "linear.h"

enum {
    WARPS = 16,
    THREADS = WARPS * WARP,
    MAX_TOKENS = 16,
    MAX_RANK_BITS = 3, /* 8 blocks in a cluster */
    UNIT_TILES = 2,
    DEPTH = 4,     /* units a warp has in registers or on their way there */
    L2_AHEAD = 16, /* units on their way into L2 */
    ENTRY_BYTES = 256,
    TABLE_BYTES = 256 * ENTRY_BYTES,
    WARP_ENTRIES = 256 / WARPS,
    IN_TABLE = 2 * WARP_ENTRIES, /* scales of 16 rows by 64 columns, 64 bytes, of a warp */
    HELPERS = 2,
    MAX_TERMS = 64,
    MAX_PIECES = 8, /* of K, that u is summed from */
    RANK_STEP = 64, /* ranks whose u is in shared memory at once */
};

struct matrix {
    const uint8_t *tiles;
    const void *scales; /* uint8, or float without double quantization */
    const float *code, *nested_code, *nested_absmax; /* nested_code NULL: without */
    float offset;
    int rows;
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

/* Weights: read once, so they stay out of L1. */
static __device__ __forceinline__ uint2 load_weights(const uint8_t *at) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(at));
    return v;
}

/* What other kernels or blocks write: from L2, never from a stale L1. */
static __device__ __forceinline__ uint4 load_fresh16(const void *at) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at)
                 : "memory");
    return v;
}
static __device__ __forceinline__ float load_fresh(const float *at) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(at) : "memory");
    return v;
}
static __device__ __forceinline__ uint32_t load_acquire(const uint32_t *at) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}

static __device__ __forceinline__ void prefetch_line(const void *at) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

static __device__ __forceinline__ uint32_t shared_address(const void *at) {
    return (uint32_t)__cvta_generic_to_shared(at);
}

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

static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const bf162 v = __floats2bfloat162_rn(low, high);
    return *(const uint32_t *)&v;
}
static __device__ __forceinline__ float low_of(uint32_t pair) {
    return __uint_as_float(pair << 16);
}
static __device__ __forceinline__ float high_of(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
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

/* ---- weights ---- */

/* The units that a warp loads, one after another: at the same offset from each half's base. Where
 * the last group lacks a half, `most` keeps to the one before. */
template <int R> struct stream {
    const uint8_t *base[2 * R]; /* in the batch's first group */
    int most[2 * R];            /* offset */
    int offset, left;           /* units of the group */
};

/* Bytes from a half's tile in one group to that in the next. */
template <int R> static __device__ __forceinline__ int group_bytes(const struct product &p) {
    return (p.swiglu ? R : 2 * R) * p.blocks * GN_CUDA_TILE_BYTES;
}

template <int R>
static __device__ __forceinline__ void point(struct stream<R> *s, const struct product &p,
                                             const struct work &w, int group0, int unit, int lane) {
    const int in_group = p.swiglu ? R : 2 * R;
#pragma unroll
    for (int h = 0; h < 2 * R; h++) {
        const struct matrix &m = p.part[w.part].m[p.swiglu ? h % 2 : 0];
        const int tiles = (m.rows + GN_CUDA_TILE_ROWS - 1) / GN_CUDA_TILE_ROWS;
        const int tile = min(group0 * in_group + (p.swiglu ? h / 2 : h), tiles - 1);
        s->base[h] = m.tiles + ((int64_t)tile * p.blocks + w.k0) * GN_CUDA_TILE_BYTES + lane * 8;
        keep(s->base[h]);
        s->most[h] =
            (tiles - 1 - tile) / in_group * group_bytes<R>(p) + (w.ks - 1) * GN_CUDA_TILE_BYTES;
    }
    const int group = (int)__umulhi(2 * (uint32_t)unit, w.inverse), k = unit - group * w.ks;
    s->offset = group * group_bytes<R>(p) + k * GN_CUDA_TILE_BYTES;
    s->left = w.ks - k;
}

/* Asks for DEPTH units that begin `ahead` after the next one, if the group has them: each of the
 * first lanes for a line of every half. */
template <int R>
static __device__ __forceinline__ void prefetch_units(const struct stream<R> *s, int ahead,
                                                      int lane) {
    if (s->left < ahead + DEPTH || lane * 128 >= DEPTH * GN_CUDA_TILE_BYTES) return;
    const int offset = s->offset + ahead * GN_CUDA_TILE_BYTES;
#pragma unroll
    for (int h = 0; h < 2 * R; h++)
        prefetch_line(s->base[h] + (h > 0 ? min(offset, s->most[h]) : offset) + lane * (128 - 8));
}

/* The first units of a group. */
template <int R>
static __device__ __forceinline__ void prefetch_group(const struct stream<R> *s, int lane) {
#pragma unroll 1
    for (int ahead = 0; ahead < L2_AHEAD; ahead += DEPTH) prefetch_units<R>(s, ahead, lane);
}

/* `more`: the run goes on after this unit. */
template <int R>
static __device__ __forceinline__ void load_unit(uint2 dst[2 * R], struct stream<R> *s,
                                                 const struct product &p, const struct work &w,
                                                 bool more, int lane) {
    for (int h = 0; h < 2 * R; h++) {
        const int offset = h > 0 ? min(s->offset, s->most[h]) : s->offset;
        dst[h] = load_weights(s->base[h] + (uint32_t)offset);
    }
    s->offset += GN_CUDA_TILE_BYTES;
    if (--s->left == 0) {
        s->offset += group_bytes<R>(p) - w.ks * GN_CUDA_TILE_BYTES;
        s->left = w.ks;
        if (more) prefetch_group<R>(s, here(lane));
    }
}

/* ---- scales ---- */

static __device__ __forceinline__ float decode_scale(const struct product &p,
                                                     const struct matrix &m, int which, int row,
                                                     int k, uint32_t code) {
    const float *nested = (const float *)(shared + p.nested) + which * 256;
    const int block = min(row, m.rows - 1) * p.blocks + k;
    const float absmax = __ldg(m.nested_absmax + block / GN_NESTED_BLOCK);
    return __fadd_rn(__fmul_rn(nested[code], absmax), m.offset);
}

/* A warp's place for the scales of the 16 rows and 64 columns that are i-th in its run: the first
 * are in the table's entries, two in each, the others in memory of their own. */
static __device__ __forceinline__ uint8_t *scales_at(const struct product &p, int warp, int i) {
    if (i < IN_TABLE)
        return shared + (warp * WARP_ENTRIES + i / 2) * ENTRY_BYTES + ENTRY_BYTES / 2 + i % 2 * 64;
    return shared + p.scales + (warp * p.scale_tiles + i - IN_TABLE) * 64;
}

/* Unit `unit` of a batch. */
struct spot {
    int group, k;
};

static __device__ __forceinline__ struct spot spot_of(const struct work &w, struct batch b,
                                                      int unit) {
    const int group = (int)__umulhi(2 * (uint32_t)unit, w.inverse);
    return {b.group0 + group, w.k0 + unit - group * w.ks};
}

static __device__ __forceinline__ void copy_async(void *to, const void *from, bool is_16) {
    if (is_16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)),
                     "l"(from)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(to)), "l"(from)
                     : "memory");
}

/* A run's scales as they are stored, on their way to where they will be decoded: those of half h 32
 * h bytes on. Two lanes a unit. */
template <int R>
static __device__ __forceinline__ void load_scales(const struct product &p, const struct work &w,
                                                   struct batch b, int first, int n, int warp,
                                                   int lane) {
#pragma unroll 1
    for (int i = lane / 2; i < n; i += WARP / 2) {
        const struct spot s = spot_of(w, b, first + i);
        for (int r = 0; r < R; r++) {
            int m;
            const int tile = tile_of<R>(p, w, s.group, 2 * r + lane % 2, &m);
            const struct matrix &matrix = p.part[w.part].m[m];
            const int64_t at = ((int64_t)tile * p.blocks + s.k) * GN_CUDA_TILE_ROWS;
            uint8_t *to = scales_at(p, warp, i * R + r) + lane % 2 * 32;
            if (matrix.nested_code) {
                copy_async(to, (const uint8_t *)matrix.scales + at, false);
            } else {
                copy_async(to, (const float *)matrix.scales + at, true);
                copy_async(to + 16, (const float *)matrix.scales + at + 4, true);
            }
        }
    }
}

/* Decodes them in place, to (8 rows, 2 halves) floats. Four lanes a unit, with 2 rows each. */
template <int R>
static __device__ __forceinline__ void decode_scales(const struct product &p, const struct work &w,
                                                     struct batch b, int first, int n, int warp,
                                                     int lane) {
    const int q = lane % 4;
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
#pragma unroll 1
    for (int i0 = 0; i0 < n; i0 += WARP / 4) {
        const int i = min(i0 + lane / 4, n - 1);
        const struct spot s = spot_of(w, b, first + i);
        for (int r = 0; r < R; r++) {
            uint8_t *at = scales_at(p, warp, i * R + r);
            float2 scale[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int m;
                const int row = tile_of<R>(p, w, s.group, 2 * r + h, &m) * GN_CUDA_TILE_ROWS;
                const struct matrix &matrix = p.part[w.part].m[m];
                if (matrix.nested_code) {
                    const uint32_t codes = *(const uint16_t *)(at + h * 32 + q * 2);
                    scale[h] =
                        make_float2(decode_scale(p, matrix, m, row + 2 * q, s.k, codes & 255),
                                    decode_scale(p, matrix, m, row + 2 * q + 1, s.k, codes >> 8));
                } else {
                    scale[h] = *(const float2 *)(at + h * 32 + q * 8);
                }
            }
            __syncwarp();
            if (i0 + lane / 4 < n)
                *(float4 *)(at + q * 16) =
                    make_float4(scale[0].x, scale[1].x, scale[0].y, scale[1].y);
        }
        __syncwarp();
    }
}

/* ---- before the wait ---- */

/* The table, and what decodes scales. Lanes' copies are written 16 bytes at a time, turned by the
 * entry so that writes of a warp spread over the banks. */
static __device__ void fill_tables(const struct product &p, const struct work &w) {
    const struct matrix &first = p.part[w.part].m[0];
    const int entry = (int)threadIdx.x / 2, half = (int)threadIdx.x % 2;
    const uint32_t pair = pack(__ldg(first.code + entry / 16), __ldg(first.code + entry % 16));
    for (int i = 0; i < 4; i++)
        *(uint4 *)(shared + entry * ENTRY_BYTES + half * 64 + (i + entry) % 4 * 16) =
            make_uint4(pair, pair, pair, pair);
    const int m = (int)threadIdx.x / 256, i = (int)threadIdx.x % 256;
    const float *nested_code = p.part[w.part].m[m].nested_code;
    if (nested_code) ((float *)(shared + p.nested))[m * 256 + i] = __ldg(nested_code + i);
    if (threadIdx.x < MAX_TOKENS * WARPS) ((float *)(shared + p.squares))[threadIdx.x] = 0.0f;
    if (p.norm && (int)threadIdx.x * WARP < w.ks * GN_BLOCK)
        prefetch_line(p.norm + w.k0 * GN_BLOCK + threadIdx.x * WARP);
}

/* ---- x ---- */

/* An item of x is 256 columns of a row, 8 a lane. Where a lane's are, if it has any. */
struct item {
    int t, col;
    bool exists;
};

static __device__ __forceinline__ struct item item_of(const struct product &p, const struct work &w,
                                                      int i, int lane) {
    const int columns = w.ks * GN_BLOCK, chunks = (columns + 255) / 256;
    const int t = i / chunks, col = (i - t * chunks) * 256 + lane * 8;
    return {t, col, t < p.T && col < columns};
}

static __device__ __forceinline__ uint4 *staged(const struct product &p, struct item item) {
    return (uint4 *)(shared + p.x_at + item.t * p.pitch + item.col * 2);
}

/* This block's columns of a bf16 x to shared memory. */
static __device__ __forceinline__ void copy_x(const struct product &p, const struct work &w, int n,
                                              int warp, int lane) {
    enum { AT_ONCE = 3 };
    const bf16 *x = (const bf16 *)p.x + w.k0 * GN_BLOCK;
#pragma unroll 1
    for (int i0 = warp; i0 < n; i0 += AT_ONCE * WARPS) {
        uint4 v[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const struct item item = item_of(p, w, i0 + j * WARPS, lane);
            if (item.exists) v[j] = load_fresh16(x + item.t * p.x_ld + item.col);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const struct item item = item_of(p, w, i0 + j * WARPS, lane);
            if (item.exists) *staged(p, item) = v[j];
        }
    }
}

static __device__ __forceinline__ float4 scaled(uint4 x, float4 weight, float *squares) {
    const float4 v = make_float4(__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z),
                                 __uint_as_float(x.w));
    *squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    return make_float4(v.x * weight.x, v.y * weight.y, v.z * weight.z, v.w * weight.w);
}

/* The same of a float32 x, times the norm's weights, and each warp's sums of squares. */
static __device__ __forceinline__ void scale_x(const struct product &p, const struct work &w, int n,
                                               int warp, int lane) {
    const float *x = (const float *)p.x + w.k0 * GN_BLOCK;
    float *all = (float *)(shared + p.squares);
#pragma unroll 1
    for (int i = warp; i < n; i += WARPS) {
        const struct item item = item_of(p, w, i, lane);
        float squares = 0.0f;
        if (item.exists) {
            const float *at = x + item.t * p.x_ld + item.col;
            const uint4 x0 = load_fresh16(at), x1 = load_fresh16(at + 4);
            float4 w0 = make_float4(1.0f, 1.0f, 1.0f, 1.0f), w1 = w0;
            if (p.norm) {
                const float4 *weights = (const float4 *)(p.norm + w.k0 * GN_BLOCK + item.col);
                w0 = __ldg(weights);
                w1 = __ldg(weights + 1);
            }
            const float4 y0 = scaled(x0, w0, &squares), y1 = scaled(x1, w1, &squares);
            *staged(p, item) =
                make_uint4(pack(y0.x, y0.y), pack(y0.z, y0.w), pack(y1.x, y1.y), pack(y1.z, y1.w));
        }
        squares = warp_sum(squares);
        if (lane == 0) all[item.t * WARPS + warp] += squares;
    }
}

static __device__ __forceinline__ void stage_x(const struct product &p, const struct work &w,
                                               int warp, int lane) {
    const int items = p.T * ((w.ks * GN_BLOCK + 255) / 256);
    if (p.x_f32)
        scale_x(p, w, items, warp, lane);
    else
        copy_x(p, w, items, warp, lane);
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

/* ---- the product ---- */

static __device__ __forceinline__ uint32_t look_up(uint32_t word, int byte, uint32_t lane4) {
    return *(const uint32_t *)(shared + __byte_perm(word, lane4, 0x5504 | byte << 4));
}

/* acc += a unit; `scales` are the lane's, for rows g and g + 8. */
template <int R, int NT>
static __device__ __forceinline__ void multiply(float acc[R][NT][4], const uint2 unit[2 * R],
                                                uint32_t x[NT][8], const uint8_t *scales,
                                                uint32_t lane4) {
#pragma unroll
    for (int r = 0; r < R; r++) {
        float c[NT][4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t top = j < 2 ? unit[2 * r].x : unit[2 * r].y;
            const uint32_t bottom = j < 2 ? unit[2 * r + 1].x : unit[2 * r + 1].y;
            const int byte = j % 2 * 2;
            const uint32_t a[4] = {look_up(top, byte, lane4), look_up(bottom, byte, lane4),
                                   look_up(top, byte + 1, lane4), look_up(bottom, byte + 1, lane4)};
#pragma unroll
            for (int n = 0; n < NT; n++) mma_bf16(c[n], a, &x[n][2 * j]);
        }
        const float2 scale = *(const float2 *)(scales + r * 64);
#pragma unroll
        for (int n = 0; n < NT; n++)
            for (int i = 0; i < 4; i++) acc[r][n][i] += (i < 2 ? scale.x : scale.y) * c[n][i];
    }
}

/* A warp's run of units of a batch. */
template <int R> struct run {
    int first, n;
    struct stream<R> stream;
    uint2 ahead[DEPTH][2 * R];
};

/* Everything on its way that needs nothing but weights. */
template <int R>
static __device__ __forceinline__ void begin(struct run<R> *run, const struct product &p,
                                             const struct work &w, struct batch b, int movers,
                                             int warp, int lane) {
    const int units = b.groups * w.ks;
    run->first = first_unit(units, warp, movers);
    run->n = first_unit(units, warp + 1, movers) - run->first;
    point<R>(&run->stream, p, w, b.group0, run->first, lane);
#pragma unroll
    for (int j = 0; j < DEPTH; j++)
        if (j < run->n) load_unit<R>(run->ahead[j], &run->stream, p, w, false, lane);
    if (run->n > DEPTH) prefetch_group<R>(&run->stream, lane);
    load_scales<R>(p, w, b, run->first, run->n, warp, lane);
}

/* Sums of a warp's part of a group, (16 R rows, T): slot warp + group is its own, because where a
 * run passes from one group to the next, or units pass from one warp to the next, that grows. */
static __device__ __forceinline__ float *slot_at(const struct product &p, int slot, int rows) {
    return (float *)(shared + p.slots) + slot * rows * p.T;
}

template <int R, int NT>
static __device__ __forceinline__ void flush(float acc[R][NT][4], float *slot, int T, int lane) {
    const int g = lane / 4, c = lane % 4;
#pragma unroll
    for (int r = 0; r < R; r++)
        for (int n = 0; n < NT; n++)
            for (int i = 0; i < 4; i++) {
                const int t = 8 * n + 2 * c + i % 2;
                if (t < T) slot[(16 * r + g + i / 2 * 8) * T + t] = acc[r][n][i];
                acc[r][n][i] = 0.0f;
            }
}

template <int R, int NT>
static __device__ __forceinline__ void multiply_run(struct run<R> *run, const struct product &p,
                                                    const struct work &w, struct batch b, int warp,
                                                    int lane) {
    const int g = lane / 4, n = run->n;
    uint32_t lane4 = lane * 4;
    uint32_t x_row = shared_address(shared + p.x_at) + g * p.pitch + lane % 4 * 32;
    keep(lane4);
    keep(x_row);
    float acc[R][NT][4] = {};
    uint32_t x[NT][8] = {};
    int k = run->first - (int)__umulhi(2 * (uint32_t)run->first, w.inverse) * w.ks;
#pragma unroll 1
    for (int i0 = 0; i0 < n; i0 += DEPTH) {
        const uint8_t *scales = scales_at(p, warp, i0 * R) + g * 8;
        const int two = i0 * R < IN_TABLE ? ENTRY_BYTES : 128; /* from two scales to the next two */
        if (i0 + DEPTH + L2_AHEAD < n) prefetch_units<R>(&run->stream, L2_AHEAD, here(lane));
#pragma unroll
        for (int j = 0; j < DEPTH; j++) {
            const int i = i0 + j;
            if (i >= n) break;
#pragma unroll
            for (int t = 0; t < NT; t++)
                load_x(x[t], x_row + 8 * t * p.pitch + k * (GN_BLOCK * 2), g + 8 * t < p.T);
            multiply<R, NT>(acc, run->ahead[j], x, scales + j * R / 2 * two + j * R % 2 * 64,
                            lane4);
            if (i + DEPTH < n)
                load_unit<R>(run->ahead[j], &run->stream, p, w, i + DEPTH + 1 < n, lane);
            k++;
            if (k == w.ks || i + 1 == n) {
                const int group = (int)__umulhi(2 * (uint32_t)(run->first + i), w.inverse);
                flush<R, NT>(acc, slot_at(p, warp + group, 16 * R), p.T, here(lane));
                k = 0;
            }
        }
    }
}

/* ---- LoRA ---- */

/* A term's pair for one matrix. */
struct term {
    const gn_lora_pair *pair;
    int row0, rows, rank;
    float scale;
    int tile0; /* 8 ranks of A are a tile; those of the terms before */
    int u0;    /* where its u begins, for one piece of K: (rows, rank rounded up to 8) */
};

static __device__ __forceinline__ float element(const gn_tensor *t, int64_t i) {
    return t->dtype == GN_F32 ? __ldg((const float *)t->data + i)
                              : to_float(((const bf16 *)t->data)[i]);
}

static __device__ __forceinline__ bool is_bf16_vector(const gn_tensor *t, int64_t i) {
    return t->dtype == GN_BF16 && (uintptr_t)((const bf16 *)t->data + i) % 16 == 0;
}

/* Eight values, of which n exist, as bf16 pairs; the others are zero. */
static __device__ __forceinline__ uint4 load_bf16x8(const gn_tensor *t, int64_t i, int n) {
    if (n >= 8 && is_bf16_vector(t, i)) return __ldg((const uint4 *)((const bf16 *)t->data + i));
    float v[8];
    for (int j = 0; j < 8; j++) v[j] = j < n ? element(t, i + j) : 0.0f;
    return make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
}

static __device__ __forceinline__ void load_f32x8(float v[8], const gn_tensor *t, int64_t i,
                                                  int n) {
    if (n >= 8 && is_bf16_vector(t, i)) {
        const uint4 eight = __ldg((const uint4 *)((const bf16 *)t->data + i));
        const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
        for (int j = 0; j < 4; j++) v[2 * j] = low_of(pairs[j]), v[2 * j + 1] = high_of(pairs[j]);
        return;
    }
    for (int j = 0; j < 8; j++) v[j] = j < n ? element(t, i + j) : 0.0f;
}

static __device__ __forceinline__ struct term *terms_of(const struct product &p) {
    return (struct term *)(shared + p.terms);
}

/* Lists the terms' pairs in shared memory and returns the tiles of all their A. Every helper writes
 * the same and needs no other. */
static __device__ int list_terms(const struct product &p, int lane) {
    const int n = p.n_terms * p.n_pairs;
    int tiles = 0, u = 0;
    for (int base = 0; base < n; base += WARP) {
        const int i = base + lane;
        struct term term = {};
        if (i < n) {
            const gn_lora *lora = &p.lora_terms[i / p.n_pairs];
            term.pair = lora->placed + p.pair + i % p.n_pairs;
            term.row0 = lora->row0;
            term.rows = lora->rows;
            term.rank = lora->rows > 0 ? term.pair->rank : 0;
            term.scale = lora->scale * term.pair->scale;
        }
        const int own = (term.rank + 7) / 8, own_u = own * 8 * term.rows;
        int tile_sum = own, u_sum = own_u;
        for (int d = 1; d < WARP; d *= 2) {
            const int more = __shfl_up_sync(0xffffffffu, tile_sum, d);
            const int more_u = __shfl_up_sync(0xffffffffu, u_sum, d);
            if (lane >= d) tile_sum += more, u_sum += more_u;
        }
        term.tile0 = tiles + tile_sum - own;
        term.u0 = u + u_sum - own_u;
        if (i < n) terms_of(p)[i] = term;
        tiles += __shfl_sync(0xffffffffu, tile_sum, WARP - 1);
        u += __shfl_sync(0xffffffffu, u_sum, WARP - 1);
    }
    __syncwarp();
    return tiles;
}

/* Pieces of a block's columns: so many that every helper has an item, a tile by a piece. */
static __device__ __forceinline__ int pieces_of(const struct product &p, int tiles) {
    if (tiles == 0) return 1;
    return max(1, min(p.clusters * HELPERS / tiles, MAX_PIECES / p.ranks));
}

static __device__ __forceinline__ float *u_at(const struct product &p, const struct term &term,
                                              int pieces, int piece, int row) {
    const int width = (term.rank + 7) / 8 * 8;
    return p.lora_u + (int64_t)term.u0 * pieces + ((int64_t)piece * term.rows + row) * width;
}

/* The last term that begins at or before a tile: it has it, for the others there are empty. */
static __device__ const struct term &term_of(const struct product &p, int tile, int lane) {
    const int n = p.n_terms * p.n_pairs;
    int before = 0;
    for (int base = 0; base < n; base += WARP)
        before += __popc(
            __ballot_sync(0xffffffffu, base + lane < n && terms_of(p)[base + lane].tile0 <= tile));
    return terms_of(p)[before - 1];
}

/* u of 8 ranks for all rows of x, over the k-blocks [first, last) of the block: an mma with x as A
 * and the ranks as B. Then stores the rows that the term covers. */
static __device__ void project(const struct product &p, const struct work &w,
                               const struct term &term, int tile, int first, int last, int pieces,
                               int piece, int lane) {
    const int g = lane / 4, c = lane % 4;
    const gn_tensor a = term.pair->a;
    const int rank = min((tile - term.tile0) * 8 + g, term.rank - 1);
    const int64_t from = rank * a.ld + w.k0 * GN_BLOCK + 16 * c;
    const uint32_t x_row = shared_address(shared + p.x_at) + g * p.pitch + c * 32;
    float sums[4] = {};
    uint32_t x[2][8] = {};
#pragma unroll 2
    for (int k = first; k < last; k++) {
        const uint4 low = load_bf16x8(&a, from + k * GN_BLOCK, 8);
        const uint4 high = load_bf16x8(&a, from + k * GN_BLOCK + 8, 8);
        const uint32_t b[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        for (int n = 0; n < 2; n++)
            load_x(x[n], x_row + 8 * n * p.pitch + k * (GN_BLOCK * 2), g + 8 * n < p.T);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t rows[4] = {x[0][2 * j], x[1][2 * j], x[0][2 * j + 1], x[1][2 * j + 1]};
            mma_bf16(sums, rows, &b[2 * j]);
        }
    }
    for (int i = 0; i < 2; i++) {
        const int row = g + 8 * i - term.row0;
        if (row < 0 || row >= term.rows) continue;
        float *u = u_at(p, term, pieces, piece, row) + (tile - term.tile0) * 8 + 2 * c;
        *(float2 *)u = make_float2(sums[2 * i], sums[2 * i + 1]);
    }
}

/* The items of all blocks with the same columns, dealt out among their helpers. */
struct items {
    int first, n, step, tiles, pieces;
};

static __device__ struct items items_of(const struct product &p, const struct work &w, int helper,
                                        int tiles) {
    const int pieces = pieces_of(p, tiles);
    return {w.cluster + helper * p.clusters, tiles * pieces, p.clusters * HELPERS, tiles, pieces};
}

/* Asks for the A of this helper's items. */
static __device__ void prefetch_items(const struct product &p, const struct work &w,
                                      const struct items &items, int lane) {
    for (int i = items.first; i < items.n; i += items.step) {
        const int tile = i % items.tiles, piece = i / items.tiles;
        const struct term &term = term_of(p, tile, lane);
        const gn_tensor *a = &term.pair->a;
        const int rank = min((tile - term.tile0) * 8 + lane / 4, term.rank - 1);
        const int last = w.ks * (piece + 1) / items.pieces;
        for (int k = w.ks * piece / items.pieces + lane % 4; k < last; k += 4)
            prefetch_line((const char *)a->data + (rank * a->ld + (int64_t)(w.k0 + k) * GN_BLOCK) *
                                                      (a->dtype == GN_F32 ? 4 : 2));
    }
}

/* All blocks are resident, or will be when the kernel before is done, and the next kernel's start
 * only when all of these run: so this ends. */
static __device__ void wait_for_u(const struct product &p, const struct items &items, int lane) {
    if (lane == 0)
        while (load_acquire(&p.counters[0]) < (uint32_t)(items.n * p.ranks)) __nanosleep(64);
    __syncwarp();
}

/* Computes this helper's items, counts them as done and waits for everybody's. */
static __device__ void project_items(const struct product &p, const struct work &w,
                                     const struct items &items, int lane) {
    for (int i = items.first; i < items.n; i += items.step) {
        const int tile = i % items.tiles, piece = i / items.tiles;
        project(p, w, term_of(p, tile, lane), tile, w.ks * piece / items.pieces,
                w.ks * (piece + 1) / items.pieces, items.pieces * p.ranks,
                w.rank * items.pieces + piece, lane);
        __syncwarp();
        if (lane == 0) {
            __threadfence();
            atomicAdd(&p.counters[0], 1);
        }
    }
    wait_for_u(p, items, lane);
}

/* The last helper of all to be done with u sets the counters back, for the next op or replay. */
static __device__ void leave_u(const struct product &p, int lane) {
    __syncwarp();
    if (lane != 0) return;
    __threadfence();
    if (atomicAdd(&p.counters[1], 1) + 1 < gridDim.x * gridDim.y * HELPERS) return;
    p.counters[0] = 0;
    p.counters[1] = 0;
}

/* Ranks [rank0, rank0 + RANK_STEP) of a term's u times its scale: (rows, RANK_STEP), zero where
 * there is no such rank. */
static __device__ void stage_u(float *u, const struct product &p, const struct term &term,
                               int pieces, int rank0, int lane) {
    __syncwarp();
    for (int i = lane; i < term.rows * RANK_STEP; i += WARP) {
        const int row = i / RANK_STEP, rank = rank0 + i % RANK_STEP;
        float sum = 0.0f;
        if (rank < term.rank)
            for (int piece = 0; piece < pieces; piece++)
                sum += load_fresh(u_at(p, term, pieces, piece, row) + rank);
        u[i] = sum * term.scale;
    }
    __syncwarp();
}

/* The rows of B that one helper adds: rows [first, last) of those that the block finishes of one
 * matrix, in groups of `in_group`. */
struct rows {
    int m, in_group, first, last;
};

template <int R>
static __device__ struct rows rows_of(const struct product &p, const struct work &w, struct batch b,
                                      int m, int helper) {
    const int in_group = p.swiglu ? 8 * R : 16 * R;
    const int n = ((b.groups - w.rank + p.ranks - 1) >> p.rank_bits) * in_group;
    return {m, in_group, n * helper / HELPERS, n * (helper + 1) / HELPERS};
}

/* Row i of `rows` in the matrix. */
static __device__ __forceinline__ int matrix_row(const struct product &p, const struct work &w,
                                                 struct batch b, const struct rows &rows, int i) {
    const int group = b.group0 + w.rank + i / rows.in_group * p.ranks;
    return min(group * rows.in_group + i % rows.in_group, p.part[w.part].m[rows.m].rows - 1);
}

/* And in the block's LoRA sums, (groups it finishes, 16 R rows, T). */
template <int R>
static __device__ __forceinline__ float *lora_at(const struct product &p, const struct rows &rows,
                                                 int i) {
    const int in_group = i % rows.in_group;
    const int row = p.swiglu ? in_group / 8 * 16 + rows.m * 8 + in_group % 8 : in_group;
    return (float *)(shared + p.lora) + (i / rows.in_group * 16 * R + row) * p.T;
}

static __device__ __forceinline__ const struct term &term_at(const struct product &p,
                                                             const struct work &w, int i, int m) {
    return terms_of(p)[i * p.n_pairs + (p.swiglu ? m : w.part)];
}

/* Asks for those rows of every term's B. */
template <int R>
static __device__ void prefetch_rows(const struct product &p, const struct work &w, struct batch b,
                                     int helper, int lane) {
    for (int i = 0; i < p.n_terms * (p.swiglu ? 2 : 1); i++) {
        const int m = i / p.n_terms;
        const struct term &term = term_at(p, w, i % p.n_terms, m);
        if (term.rank == 0) continue;
        const struct rows rows = rows_of<R>(p, w, b, m, helper);
        const gn_tensor *t = &term.pair->b;
        const int size = t->dtype == GN_F32 ? 4 : 2;
        for (int row = rows.first + lane; row < rows.last; row += WARP) {
            const char *at = (const char *)t->data + matrix_row(p, w, b, rows, row) * t->ld * size;
            for (int line = 0; line < term.rank * size; line += 128) prefetch_line(at + line);
        }
    }
}

/* += scale * B u for one term and matrix. `lanes` lanes share a row, 8 ranks each. */
template <int R>
static __device__ void add_term(const struct product &p, const struct work &w, struct batch b,
                                const struct rows &rows, const struct term &term, int pieces,
                                float *u, int lane) {
    const gn_tensor matrix = term.pair->b;
    for (int rank0 = 0; rank0 < term.rank; rank0 += RANK_STEP) {
        const int left = term.rank - rank0;
        const int lanes = left > 32 ? 8 : left > 16 ? 4 : left > 8 ? 2 : 1;
        const int own = lane % lanes * 8;
        stage_u(u, p, term, pieces, rank0, lane);
#pragma unroll 2
        for (int row0 = rows.first; row0 < rows.last; row0 += WARP / lanes) {
            const int row = row0 + lane / lanes;
            float v[8];
            load_f32x8(v, &matrix,
                       matrix_row(p, w, b, rows, min(row, rows.last - 1)) * matrix.ld + rank0 + own,
                       left - own);
            for (int t = 0; t < term.rows; t++) {
                float sum = 0.0f;
                for (int j = 0; j < 8; j++) sum += v[j] * u[t * RANK_STEP + own + j];
                for (int d = 1; d < lanes; d *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
                if (own == 0 && row < rows.last) lora_at<R>(p, rows, row)[term.row0 + t] += sum;
            }
        }
    }
}

/* LoRA's sums for the helper's rows: of all terms, in their order. */
template <int R>
static __device__ void add_rows(const struct product &p, const struct work &w, struct batch b,
                                int pieces, int helper, int lane) {
    float *u = (float *)(shared + p.u) + helper * p.T * RANK_STEP;
    for (int m = 0; m < (p.swiglu ? 2 : 1); m++) {
        const struct rows rows = rows_of<R>(p, w, b, m, helper);
        for (int i = rows.first + lane; i < rows.last; i += WARP)
            for (int t = 0; t < p.T; t++) lora_at<R>(p, rows, i)[t] = 0.0f;
        for (int i = 0; i < p.n_terms; i++) {
            const struct term &term = term_at(p, w, i, m);
            if (term.rank > 0) add_term<R>(p, w, b, rows, term, pieces, u, lane);
        }
    }
}

/* ---- the end ---- */

/* A group's sum at one place of its slots, over the cluster's blocks and their warps, in order. */
static __device__ __forceinline__ float sum_slots(const struct product &p, struct batch b,
                                                  int group, int rows, int at, int movers) {
    float sum = 0.0f;
    for (int rank = 0; rank < p.ranks; rank++) {
        const int ks = first_block(p, rank + 1) - first_block(p, rank);
        const int units = b.groups * ks, last = warp_of(units, (group + 1) * ks - 1, movers);
        for (int warp = warp_of(units, group * ks, movers); warp <= last; warp++) {
            if (first_unit(units, warp, movers) == first_unit(units, warp + 1, movers)) continue;
            const float *slot = slot_at(p, warp + group, rows) + at;
            sum += p.ranks == 1 ? *slot : load_peer(slot, rank);
        }
    }
    return sum;
}

/* RMSNorm's factor of a row. */
static __device__ __forceinline__ float factor_of(const struct product &p, int t) {
    const float *squares = (const float *)(shared + p.squares) + MAX_TOKENS * WARPS + t;
    float sum = 0.0f;
    for (int rank = 0; rank < p.ranks; rank++)
        sum += p.ranks == 1 ? *squares : load_peer(squares, rank);
    return rsqrtf(sum / (float)(p.blocks * GN_BLOCK) + p.eps);
}

/* One output of those that a block finishes: of the batch's groups, every ranks-th one. */
struct output {
    int group, row, t; /* group of the batch, row of its slots (of the gate's) */
    int64_t at;        /* in y */
    bool exists;
};

template <int R>
static __device__ __forceinline__ struct output
output_of(const struct product &p, const struct work &w, struct batch b, int i) {
    const int in_group = p.swiglu ? 8 * R : 16 * R;
    const int row = i % in_group, rest = i / in_group;
    struct output o;
    o.t = rest % p.T;
    o.group = w.rank + rest / p.T * p.ranks;
    o.row = p.swiglu ? row / 8 * 16 + row % 8 : row;
    const int n = (b.group0 + o.group) * in_group + row;
    o.at = o.t * p.part[w.part].y_ld + n;
    o.exists = o.group < b.groups && n < p.part[w.part].m[0].rows;
    return o;
}

template <int R, bool LORA>
static __device__ __forceinline__ void finish(const struct product &p, const struct work &w,
                                              struct batch b, bool has_residual, int movers) {
    const int owned = (b.groups - w.rank + p.ranks - 1) >> p.rank_bits;
    const int n = owned * p.T * (p.swiglu ? 8 * R : 16 * R);
    const float *lora = (const float *)(shared + p.lora);
    void *y = p.part[w.part].y;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        const struct output o = output_of<R>(p, w, b, i);
        if (!o.exists) continue;
        const int at = o.row * p.T + o.t, up_at = at + 8 * p.T;
        float v = sum_slots(p, b, o.group, 16 * R, at, movers), up = 0.0f;
        if (p.swiglu) up = sum_slots(p, b, o.group, 16 * R, up_at, movers);
        if (LORA) {
            const float *sums = lora + (o.group >> p.rank_bits) * 16 * R * p.T;
            v += sums[at];
            if (p.swiglu) up += sums[up_at];
        }
        if (p.norm) {
            const float factor = factor_of(p, o.t);
            v *= factor;
            up *= factor;
        }
        if (p.swiglu) v = v / (1.0f + __expf(-v)) * up;
        if (p.add)
            v += has_residual && i < THREADS ? ((const float *)(shared + p.residual))[i]
                                             : load_fresh((const float *)y + o.at);
        if (p.y_f32)
            ((float *)y)[o.at] = v;
        else
            ((bf16 *)y)[o.at] = from_float<bf16>(v);
    }
}

/* What the product needs of other kernels' results: x, and what ADD adds to. */
template <int R>
static __device__ __forceinline__ void stage(const struct product &p, const struct work &w,
                                             struct batch b, int warp, int lane) {
    float residual = 0.0f;
    if (p.add) {
        const struct output o = output_of<R>(p, w, b, threadIdx.x);
        if (o.exists) residual = load_fresh((const float *)p.part[w.part].y + o.at);
    }
    stage_x(p, w, warp, lane);
    if (p.add) ((float *)(shared + p.residual))[threadIdx.x] = residual;
    __syncthreads();
    if (threadIdx.x < MAX_TOKENS) {
        float *squares = (float *)(shared + p.squares), sum = 0.0f;
        for (int i = 0; i < WARPS; i++) sum += squares[threadIdx.x * WARPS + i];
        squares[MAX_TOKENS * WARPS + threadIdx.x] = sum;
    }
}

/* What one warp does. Helpers' code is apart from that of the warps that multiply, which would else
 * lose registers to it; they meet at the block's barriers. */
template <int R, int NT, bool LORA, bool HELPS>
static __device__ __forceinline__ void work_through(const struct product &p, int warp, int lane) {
    const int movers = LORA ? WARPS - HELPERS : WARPS, helper = warp - movers;
    const struct work w = work_of(p);
    struct run<R> run;
    struct items items = {};
    for (int group = 0; group < w.groups; group += p.batch) {
        const struct batch b = batch_of(p, w, group);
        if (!HELPS) begin<R>(&run, p, w, b, movers, warp, lane);
        if (group == 0) {
            fill_tables(p, w);
            if (HELPS) {
                items = items_of(p, w, helper, list_terms(p, lane));
                prefetch_items(p, w, items, lane);
                prefetch_rows<R>(p, w, b, helper, lane);
            }
            __syncthreads();
        }
        if (!HELPS) decode_scales<R>(p, w, b, run.first, run.n, warp, lane);
        if (group == 0) {
            pdl_wait();
            stage<R>(p, w, b, warp, lane);
            if (HELPS) project_items(p, w, items, lane);
        }
        const bool last = group + p.batch >= w.groups;
        if (!HELPS) multiply_run<R, NT>(&run, p, w, b, warp, lane);
        if (HELPS) add_rows<R>(p, w, b, items.pieces * p.ranks, helper, lane);
        if (HELPS && last) leave_u(p, lane);
        sync_ranks(p.ranks);
        finish<R, LORA>(p, w, b, group == 0, movers);
        if (!last || p.ranks > 1) sync_ranks(p.ranks); /* all sums have been read */
    }
}

/* R: 16-row tiles in a group. NT: columns of x, in eights. */
template <int R, int NT, bool LORA>
static __global__ void __launch_bounds__(THREADS, NT == 1 ? 2 : 1)
    decode_kernel(const __grid_constant__ struct product p) {
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / WARP, 0), lane = threadIdx.x % WARP;
    pdl_trigger();
    if (LORA && warp >= WARPS - HELPERS)
        work_through<R, NT, LORA, true>(p, warp, lane);
    else
        work_through<R, NT, LORA, false>(p, warp, lane);
}

/* ---- the call ---- */

typedef void decode_fn(const struct product);

/* How a call is cut up. */
struct plan {
    decode_fn *kernel;
    int rows;   /* of a group: 16 R */
    int movers; /* warps that multiply */
    size_t shared_bytes;
    double ns; /* estimate */
};

static int piece(int *total, int64_t bytes) {
    const int at = *total;
    *total = (int)(at + (bytes + 15) / 16 * 16);
    return at;
}

/* Lays out a block's shared memory and returns how much it is. */
static int lay_out(struct product *p, const struct plan *plan, int ks) {
    const int slot = plan->rows * p->T * (int)sizeof(float);
    const bool lora = p->n_terms > 0;
    int total = TABLE_BYTES;
    const int tiles = plan->rows / 16 * ((p->batch * ks + plan->movers - 1) / plan->movers);
    p->scale_tiles = tiles > IN_TABLE ? tiles - IN_TABLE : 0;
    p->scales = piece(&total, (int64_t)p->scale_tiles * plan->movers * 64);
    p->nested = piece(&total, 2 * 256 * sizeof(float));
    p->squares = piece(&total, MAX_TOKENS * (WARPS + 1) * sizeof(float));
    p->residual = piece(&total, p->add ? THREADS * sizeof(float) : 0);
    p->slots = piece(&total, (int64_t)(plan->movers + p->batch - 1) * slot);
    p->lora = piece(&total, lora ? (p->batch + p->ranks - 1) / p->ranks * slot : 0);
    p->u = piece(&total, lora ? HELPERS * p->T * RANK_STEP * sizeof(float) : 0);
    p->terms = piece(&total, (int64_t)p->n_terms * p->n_pairs * sizeof(struct term));
    p->pitch = ks * GN_BLOCK * 2 + 16; /* lanes of two rows then read different banks */
    p->x_at = piece(&total, (int64_t)p->T * p->pitch);
    return total;
}

/* Clusters of p->ranks blocks that run at once. Pairs of SMs are always together; how many fours
 * and eights there are depends on the chip. */
static int clusters_at_once(const gn_ctx *ctx, const struct product *p, decode_fn *kernel) {
    const int most = ctx->cuda->sms / p->ranks;
    if (p->ranks <= 2) return most;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = (unsigned)p->ranks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)p->ranks, (unsigned)most);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = ctx->cuda->shared_limit; /* so that no SM counts twice */
    config.attrs = &attribute;
    config.numAttrs = 1;
    int n = 0;
    if (cudaOccupancyMaxActiveClusters(&n, kernel, &config) != cudaSuccess) {
        (void)cudaGetLastError();
        return 0;
    }
    return n < most ? n : most;
}

/* Deals the parts' groups to clusters of p->ranks blocks, no cluster to two parts. False if that
 * does not fit. */
static bool deal(struct product *p, struct plan *plan, const gn_ctx *ctx) {
    const int most = clusters_at_once(ctx, p, plan->kernel);
    if (most < p->n_parts || p->ranks > p->blocks) return false;
    for (p->per_cluster = 1;; p->per_cluster++) {
        p->clusters = 0;
        for (int i = 0; i < p->n_parts; i++) {
            p->part[i].cluster0 = p->clusters;
            p->clusters += (p->part[i].groups + p->per_cluster - 1) / p->per_cluster;
        }
        if (p->clusters <= most) break;
    }
    const int limit = (int)ctx->cuda->shared_limit, ks = (p->blocks + p->ranks - 1) / p->ranks;
    for (p->batch = p->per_cluster; p->batch > 0; p->batch--)
        if (lay_out(p, plan, ks) <= limit) break;
    if (p->batch == 0) return false;
    plan->shared_bytes = (size_t)lay_out(p, plan, ks);
    /* An H200's SM reads 33 bytes a ns from memory and about 40 from L2. Blocks that leave room for
     * the next kernel's hide its start. */
    const bool leaves_room =
        p->T <= 8 && plan->shared_bytes <= (ctx->cuda->shared_limit + 1024) / 2 - 1024;
    const int batches = (p->per_cluster + p->batch - 1) / p->batch;
    plan->ns = p->per_cluster * (double)ks * plan->rows * 32 / 33.0 +
               p->T * (double)ks * GN_BLOCK * (p->x_f32 ? 4 : 2) / 40.0 + (batches - 1) * 1500 +
               (p->ranks > 1 ? 300 : 0) + (leaves_room ? 0 : 700);
    return true;
}

/* The cut that should be fastest. */
static bool choose(struct product *p, struct plan *plan, const gn_ctx *ctx) {
    bool found = false;
    for (int bits = 0; bits <= (ctx->cuda->overlaps ? MAX_RANK_BITS : 0); bits++) {
        if (found && bits > 1 && p->T <= 4) break;
        struct product other = *p;
        struct plan other_plan = *plan;
        other.rank_bits = bits;
        other.ranks = 1 << bits;
        for (int i = 0; i < 2; i++) {
            const uint32_t ks = (uint32_t)(p->blocks >> bits) + (uint32_t)i;
            other.inverse[i] = ks > 0 ? (0x80000000u + ks - 1) / ks : 0;
        }
        if (!deal(&other, &other_plan, ctx) || (found && other_plan.ns >= plan->ns)) continue;
        *p = other;
        *plan = other_plan;
        found = true;
    }
    return found;
}

static struct matrix matrix_of(const gn_matrix *m) {
    struct matrix out = {};
    out.tiles = (const uint8_t *)m->data;
    out.scales = m->absmax_u8 ? (const void *)m->absmax_u8 : m->absmax;
    out.code = m->code;
    out.nested_code = m->absmax_u8 ? m->nested_code : NULL;
    out.nested_absmax = m->nested_absmax;
    out.offset = m->offset;
    out.rows = (int)m->rows;
    return out;
}

static struct product product_of(const gn_ctx *ctx, const gn_linear_args *args, int group_rows) {
    struct product p = {};
    p.x = args->x.data;
    p.x_ld = args->x.ld;
    p.x_f32 = args->x.dtype == GN_F32;
    p.norm = args->norm ? (const float *)args->norm->data : NULL;
    p.eps = args->eps;
    p.T = (int)args->x.shape[0];
    p.blocks = (int)(args->x.shape[1] / GN_BLOCK);
    p.swiglu = args->epilogue == GN_SWIGLU;
    p.add = args->epilogue == GN_ADD;
    p.y_f32 = args->part[0].y.dtype == GN_F32;
    p.n_parts = p.swiglu ? 1 : args->n_parts;
    for (int i = 0; i < p.n_parts; i++) {
        const int rows = p.swiglu ? group_rows / 2 : group_rows;
        p.part[i].m[0] = matrix_of(args->part[i].w);
        if (p.swiglu) p.part[i].m[1] = matrix_of(args->part[1].w);
        p.part[i].y = args->part[i].y.data;
        p.part[i].y_ld = args->part[i].y.ld;
        p.part[i].groups = (p.part[i].m[0].rows + rows - 1) / rows;
    }
    p.lora_terms = ctx->cuda->batch.terms;
    p.n_terms = args->lora ? args->n_lora : 0;
    p.n_pairs = args->n_parts;
    p.pair = args->pair;
    p.lora_u = (float *)ctx->workspace;
    p.counters = ctx->cuda->counters;
    return p;
}

static bool is_aligned(const void *p, size_t to) {
    return (uintptr_t)p % to == 0;
}

static bool is_matrix(const gn_matrix *m) {
    const size_t scale = m->absmax_u8 ? 8 : 16;
    return gn_cuda_is_tiled(m) && m->rows * (m->cols / GN_BLOCK) < INT32_MAX / 8 &&
           is_aligned(m->data, 8) &&
           is_aligned(m->absmax_u8 ? (const void *)m->absmax_u8 : m->absmax, scale);
}

static bool is_call(const gn_ctx *ctx, const gn_linear_args *args) {
    const gn_tensor *x = &args->x;
    const int64_t per_16 = x->dtype == GN_F32 ? 4 : 8;
    if (ctx->compute != GN_BF16 || x->shape[0] > MAX_TOKENS || x->dtype == GN_F16 ||
        x->ld % per_16 || !is_aligned(x->data, 16) || (args->norm && x->dtype != GN_F32))
        return false;
    if (args->norm && !is_aligned(args->norm->data, 16)) return false;
    if (args->lora && args->n_lora > MAX_TERMS) return false;
    for (int i = 0; i < args->n_parts; i++) {
        if (!is_matrix(args->part[i].w)) return false;
        if (args->epilogue == GN_SWIGLU && i > 0) continue;
        if (args->part[i].y.dtype != args->part[0].y.dtype || args->part[i].y.dtype == GN_F16)
            return false;
    }
    return args->epilogue != GN_SWIGLU || args->part[0].w->qtype == args->part[1].w->qtype;
}

/* Everything but the launch; false where this kernel is not for it. */
static bool prepare(const gn_ctx *ctx, const gn_linear_args *args, struct product *p,
                    struct plan *plan) {
    if (!is_call(ctx, args)) return false;
    const bool few = args->x.shape[0] <= 8, lora = args->lora && args->n_lora > 0;
    *plan = {};
    plan->rows = few ? 16 : 32;
    plan->movers = lora ? WARPS - HELPERS : WARPS;
    plan->kernel = few ? (lora ? decode_kernel<1, 1, true> : decode_kernel<1, 1, false>)
                       : (lora ? decode_kernel<2, 2, true> : decode_kernel<2, 2, false>);
    *p = product_of(ctx, args, plan->rows);
    /* All the SM's memory for sharing: a split that differs from the last kernel's would have to
     * wait for it. */
    if (cudaFuncSetAttribute(plan->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)ctx->cuda->shared_limit) != cudaSuccess ||
        cudaFuncSetAttribute(plan->kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared) != cudaSuccess) {
        (void)cudaGetLastError();
        return false;
    }
    return choose(p, plan, ctx);
}

bool gn_cuda_linear_decode_fits(const gn_ctx *ctx, const gn_linear_args *args) {
    struct product p;
    struct plan plan;
    return prepare(ctx, args, &p, &plan);
}

/* For u: every row of every term, in pieces. */
size_t gn_cuda_linear_decode_workspace(int64_t max_rank, int max_terms) {
    const int64_t rank = (max_rank + 7) / 8 * 8;
    return sizeof(float) * GN_MAX_PARTS * MAX_PIECES * MAX_TOKENS * (size_t)(rank * max_terms);
}

static size_t u_bytes(const gn_linear_args *args) {
    size_t n = 0;
    for (int i = 0; args->lora && i < args->n_lora; i++)
        for (int j = 0; j < args->n_parts; j++) {
            const gn_lora *term = &args->lora[i];
            n += (size_t)term->rows * (size_t)((term->pairs[args->pair + j].rank + 7) / 8 * 8);
        }
    return n * MAX_PIECES * sizeof(float);
}

gn_status gn_cuda_linear_decode(gn_ctx *ctx, const gn_linear_args *args) {
    struct product p;
    struct plan plan;
    if (!prepare(ctx, args, &p, &plan)) return GN_EUNSUPPORTED;
    if (u_bytes(args) > ctx->workspace_bytes) return GN_ENOMEM;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)p.ranks, (unsigned)p.clusters);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = gn_cuda_stream(ctx);
    config.attrs = attributes;
    if (ctx->cuda->overlaps) {
        attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[0].val.programmaticStreamSerializationAllowed = 1;
        config.numAttrs = 1;
    }
    if (p.ranks > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = (unsigned)p.ranks;
        attributes[config.numAttrs].val.clusterDim.y = 1;
        attributes[config.numAttrs].val.clusterDim.z = 1;
        config.numAttrs++;
    }
    return gn_cuda_status(cudaLaunchKernelEx(&config, plan.kernel, p));
}
