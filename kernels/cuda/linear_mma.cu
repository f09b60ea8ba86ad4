/* linear_mma.cu - products of up to some hundred rows of x with 4-bit weights in tiles, on Hopper:
 * prefill of short prompts, decoding of many streams.
 *
 * Past some 50 rows it is the tensor cores that bound a product, not the memory: so what matters is
 * that they never wait. A weight is decoded once for up to 128 rows of x, in registers.
 *   - wgmma m64nNk16: 64 weight rows, decoded into registers, are its A operand; N rows of x are B,
 *     in shared memory. Four of them make a 64-wide block's float32 sums, to which the block's
 *     scales are applied as they are added up: exactly, once a sum. Meanwhile the warpgroup decodes
 *     the next block, by linear_decode.cu's table (a byte, a lookup, two bf16 codes).
 *   - A warp copies ahead, into a ring of stages of two blocks: weights and scales for all
 *     warpgroups (64 rows each), and x, which the two blocks of a cluster get together, each
 *     asking L2 for half: x is most of the traffic. Weights start before pdl_wait.
 *   - x comes from a kernel before this one, normalised, rounded, and in the very order that
 *     stages have: by block of K, swizzled, its columns permuted as tiles permute those of weights.
 *   - All (tile of outputs, step of K) pairs stand in one line, of which every cluster takes an
 *     equal piece, whatever the shape. Where a piece ends within a tile, its sums go to working
 *     memory; those who share a tile wait for each other when they have nothing else left to do,
 *     and each finishes a part of its outputs, adding in a fixed order.
 *
 * What one 64-wide block of 64 rows costs an SM, in cycles, with 64 (128) rows of x: the tensor
 * cores 128 (256); each of four schedulers 32 for lookups, 32 (64) for scales, some 80 around them;
 * shared memory 64 for lookups, 64 (128) for B, 32 for weights on their way, and x. Reading its
 * 2064 bytes from memory at 4.3 TB/s takes 114. */
#include "linear.cuh"
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
    TABLES_BARRIER = 1,           /* of hardware; those after it are the warpgroups' */
    FEW_REGISTERS = 24,           /* of a thread that copies */
    LINE = 128,                   /* of L2 */
    L2_AHEAD = 16, /* blocks of K that are asked for behind the stages at the start */
    AT_ONCE = 4,   /* eights of tokens that a thread finishes at once */
};

/* How a block is cut for tiles of N tokens. */
template <int N> struct cut {
    static constexpr int GROUPS = N <= 64 ? 3 : 2; /* what registers allow */
    static constexpr int TILES = GROUPS * GROUP_TILES;
    static constexpr int X_BYTES = N * ROW_BYTES;
    static constexpr int WEIGHTS = STEP * X_BYTES; /* offset in a stage */
    static constexpr int STAGE_BYTES = WEIGHTS + TILES * STEP * GN_CUDA_TILE_BYTES;
    static constexpr int STAGES = (227 * 1024 - TABLE_BYTES) / STAGE_BYTES;
    static constexpr int SHARED_BYTES = TABLE_BYTES + STAGES * STAGE_BYTES;
    static constexpr int THREADS = (GROUPS + 1) * GROUP_THREADS;
    /* Of a thread: at the start, and of those that multiply when the others have given theirs. */
    static constexpr int REGISTERS = 65536 / THREADS / 8 * 8;
    static constexpr int MORE_REGISTERS =
        (REGISTERS * THREADS - FEW_REGISTERS * GROUP_THREADS) / (GROUPS * GROUP_THREADS) / 8 * 8;
    static_assert(STAGES <= MAX_STAGES, "barriers stand above the table's entries");
    static_assert(STAGE_BYTES % 1024 == 0 && X_BYTES / PEERS % 1024 == 0, "whole swizzled eights");
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
    int blocks, steps; /* of 64 columns; of two blocks */
    int tiles;         /* of outputs, for a whole cluster: GROUPS groups a block by N tokens */
    int clusters;
    const uint8_t *x;  /* (token_tiles, 2 steps, N) rows of a block */
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
static __device__ __forceinline__ float *nested_at(int table, int code) {
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

/* The table of pairs (see linear_decode.cu), and what decodes scales: of every part, or of gate and
 * up. By the warpgroups. */
template <int N> static __device__ void fill_tables(const struct product &p) {
    enum { THREADS = cut<N>::GROUPS * GROUP_THREADS };
    const float *code = p.part[0].m[0].code;
    for (int i = threadIdx.x; i < 256 * 8; i += THREADS) {
        const uint32_t pair = pack(__ldg(code + i / 8 / 16), __ldg(code + i / 8 % 16));
        *(uint4 *)(shared + i / 8 * ENTRY_BYTES + i % 8 * 16) = make_uint4(pair, pair, pair, pair);
    }
    for (int i = threadIdx.x; i < 256 * (p.swiglu ? 2 : p.n_parts); i += THREADS) {
        const struct matrix &m = p.swiglu ? p.part[0].m[i / 256] : p.part[i / 256].m[0];
        if (m.nested_code) *nested_at(i / 256, i % 256) = __ldg(m.nested_code + i % 256);
    }
    sync_some(TABLES_BARRIER, THREADS);
}

/* ---- the warp that copies ---- */

/* What a lane copies: its tile of 8 rows, from the first block of K on. */
struct source {
    const uint8_t *tiles, *scales;
    int scale_bytes; /* of a block */
};

template <int N>
static __device__ __forceinline__ struct source source_of(const struct product &p, int tile,
                                                          int lane) {
    const struct group g = group_of<N>(p, tile, lane / GROUP_TILES);
    int which;
    const int64_t at = (int64_t)tile_of(p, g, lane % GROUP_TILES, &which) * p.blocks;
    const struct matrix &m = p.part[g.part].m[which];
    const int bytes = GN_CUDA_TILE_ROWS * (m.nested_code ? 1 : (int)sizeof(float));
    return {m.tiles + at * GN_CUDA_TILE_BYTES, (const uint8_t *)m.scales + at * bytes, bytes};
}

/* A step's tile, of which the run has steps up to `end`: its scales, too, are on their way to L2,
 * for those who multiply ask a step ahead only. */
template <int N>
static __device__ __forceinline__ struct source begin_tile(const struct product &p, int step,
                                                           int end, int lane) {
    const struct source s = source_of<N>(p, step / p.steps, lane);
    const int k = step % p.steps * STEP, n = min((end - step) * STEP, p.blocks - k);
    const uint8_t *scales = s.scales + k * s.scale_bytes;
    const int bytes = n * s.scale_bytes;
    if (lane < cut<N>::TILES)
        for (int i = 0; i < bytes + LINE; i += LINE) prefetch_line(scales + min(i, bytes - 1));
    return s;
}

/* Step `step` of a tile: its weights. */
template <int N>
static __device__ __forceinline__ void copy_weights(const struct product &p, const struct source &s,
                                                    int step, int stage, int lane) {
    typedef cut<N> C;
    const int k = step * STEP, n = min(STEP, p.blocks - k);
    if (lane == 0)
        barrier_expect(full_at(stage), n * C::TILES * GN_CUDA_TILE_BYTES + STEP * C::X_BYTES);
    if (lane < C::TILES)
        copy_bulk(
            shared_address(stage_at<N>(stage) + C::WEIGHTS + lane * STEP * GN_CUDA_TILE_BYTES),
            s.tiles + (int64_t)k * GN_CUDA_TILE_BYTES, n * GN_CUDA_TILE_BYTES, full_at(stage));
}

/* x, this block's share of it, to the cluster. */
template <int N>
static __device__ __forceinline__ void copy_x(const struct product &p, int tile, int step,
                                              int stage, int lane) {
    typedef cut<N> C;
    enum { SHARE = C::X_BYTES / PEERS };
    if (lane >= STEP) return;
    const int64_t block = ((int64_t)(tile % p.token_tiles) * p.steps + step) * STEP + lane;
    const int share = (int)blockIdx.x % PEERS * SHARE;
    copy_bulk_to((1 << PEERS) - 1, shared_address(stage_at<N>(stage) + lane * C::X_BYTES + share),
                 p.x + block * C::X_BYTES + share, SHARE, full_at(stage));
}

template <int N>
static __device__ __forceinline__ void copy_run(const struct product &p, struct run run, int lane) {
    const int ahead = min(run.end, run.first + cut<N>::STAGES);
    struct turn t = {0, 1};
    struct source s = {};
    for (int i = run.first; i < ahead; i++) { /* into stages that are empty, before the wait */
        if (i == run.first || i % p.steps == 0) s = begin_tile<N>(p, i, run.end, lane);
        copy_weights<N>(p, s, i % p.steps, i - run.first, lane);
    }
    const int k = ahead % p.steps * STEP;
    if (ahead < run.end && k > 0 && lane < cut<N>::TILES)
        prefetch_bulk(s.tiles + (int64_t)k * GN_CUDA_TILE_BYTES,
                      min(p.blocks - k, L2_AHEAD) * GN_CUDA_TILE_BYTES);
    pdl_wait();
    for (int i = run.first; i < ahead; i++)
        copy_x<N>(p, i / p.steps, i % p.steps, i - run.first, lane);
    for (int i = ahead; i < run.end; i++) {
        if (t.stage == 0) t.parity ^= 1;
        if (i % p.steps == 0) s = begin_tile<N>(p, i, run.end, lane);
        barrier_wait(empty_at(t.stage), t.parity);
        copy_weights<N>(p, s, i % p.steps, t.stage, lane);
        copy_x<N>(p, i / p.steps, i % p.steps, t.stage, lane);
        t.stage = t.stage + 1 < cut<N>::STAGES ? t.stage + 1 : 0;
    }
}

/* ---- the end of a tile ---- */

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
    sync_some(TABLES_BARRIER + 1 + warpgroup, GROUP_THREADS);
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

/* A tile's sums, of the steps that this run has: to y or, if they are not all, to working memory.
 * Registers move up, so that the loop is short: it runs once a tile, from cold memory. */
template <int N>
static __device__ __forceinline__ void leave(const struct product &p, float (&acc)[N / 2], int tile,
                                             bool whole, int warpgroup, int thread) {
    const struct outputs o = outputs_of<N>(p, tile, warpgroup, thread / WARP, thread % WARP);
    float4 *to = partials_at<N>(p, (int)blockIdx.x / PEERS, tile, warpgroup) + thread;
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
    __threadfence();
    sync_warpgroup(warpgroup);
    if (thread == 0) atomicAdd(counters_of(p, tile), 1u);
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

/* ---- warpgroups that multiply ---- */

/* Scales of a tile, as a lane loads them: those of row lane % 16 of the warp, of block lane / 16 of
 * a step. */
struct scale_source {
    const uint8_t *scales;      /* of the row's first block of K */
    const float *nested_absmax; /* NULL: scales are stored as they are */
    float offset;
    int block0, table;
};

template <int N>
static __device__ __forceinline__ struct scale_source
scale_source_of(const struct product &p, int tile, int warpgroup, int warp, int lane) {
    const struct group g = group_of<N>(p, tile, warpgroup);
    int which;
    const int t = tile_of(p, g, warp * 2 + lane / 8 % 2, &which);
    const struct matrix &m = p.part[g.part].m[which];
    const int64_t at = (int64_t)t * p.blocks * GN_CUDA_TILE_ROWS + lane % 8;
    const int row = min(t * GN_CUDA_TILE_ROWS + lane % 8, m.rows - 1);
    return {(const uint8_t *)m.scales + at * (m.nested_code ? 1 : (int)sizeof(float)),
            m.nested_code ? m.nested_absmax : NULL, m.offset, row * p.blocks,
            p.swiglu ? which : g.part};
}

/* As it is stored, and what it is in units of. */
struct stored_scale {
    uint32_t value;
    float absmax;
};

/* Past the last block, where x is zero: the last one's again. */
static __device__ __forceinline__ struct stored_scale
load_scale(const struct product &p, const struct scale_source &s, int step, int lane) {
    const int k = min(step * STEP + lane / 16, p.blocks - 1);
    if (!s.nested_absmax) return {__ldg((const uint32_t *)s.scales + k * GN_CUDA_TILE_ROWS), 0.0f};
    return {__ldg(s.scales + k * GN_CUDA_TILE_ROWS),
            __ldg(s.nested_absmax + (uint32_t)(s.block0 + k) / GN_NESTED_BLOCK)};
}

static __device__ __forceinline__ float decode_scale(const struct scale_source &s,
                                                     struct stored_scale stored) {
    if (!s.nested_absmax) return __uint_as_float(stored.value);
    return __fadd_rn(__fmul_rn(*nested_at(s.table, (int)stored.value), stored.absmax), s.offset);
}

static __device__ __forceinline__ uint32_t look_up(uint32_t word, int byte, uint32_t lane4) {
    return *(const uint32_t *)(shared + __byte_perm(word, lane4, 0x5504 | byte << 4));
}

/* The A operands of a warp's 16 rows and 64 columns: of two tiles. */
static __device__ __forceinline__ void decode(uint32_t a[16], const uint8_t *tiles,
                                              uint32_t lane4) {
    const uint2 top = *(const uint2 *)(tiles + 2 * lane4);
    const uint2 bottom = *(const uint2 *)(tiles + STEP * GN_CUDA_TILE_BYTES + 2 * lane4);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const uint32_t t = j < 2 ? top.x : top.y, b = j < 2 ? bottom.x : bottom.y;
        const int byte = j % 2 * 2;
        a[4 * j] = look_up(t, byte, lane4);
        a[4 * j + 1] = look_up(b, byte, lane4);
        a[4 * j + 2] = look_up(t, byte + 1, lane4);
        a[4 * j + 3] = look_up(b, byte + 1, lane4);
    }
}

/* Starts c = a times a block of x. */
template <int N>
static __device__ __forceinline__ void start(float (&c)[N / 2], const uint32_t a[16],
                                             const uint8_t *x) {
    const uint64_t rows = describe_rows(shared_address(x));
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; j++) wgmma(c, a + 4 * j, rows + j * (32 >> 4), j > 0);
    wgmma_commit();
}

/* Waits for c, and adds it. */
template <int N>
static __device__ __forceinline__ void add_up(float (&acc)[N / 2], float (&c)[N / 2], float top,
                                              float bottom) {
    wgmma_wait(c);
#pragma unroll
    for (int i = 0; i < N / 2; i++) acc[i] += (i % 4 < 2 ? top : bottom) * c[i];
}

template <int N>
static __device__ __forceinline__ void multiply_run(const struct product &p, struct run run,
                                                    int warpgroup, int thread) {
    typedef cut<N> C;
    const int lane = thread % WARP, warp = thread / WARP;
    const uint32_t lane4 = lane * 4, peer_empty = peer_address(empty_at(0), lane % PEERS);
    /* offset in a stage */
    const int tiles = C::WEIGHTS + (warpgroup * GROUP_TILES + warp * 2) * STEP * GN_CUDA_TILE_BYTES;
    float acc[N / 2] = {}, c[N / 2] = {};
    uint32_t a[2][16];
    int tile = run.first / p.steps, from = run.first - tile * p.steps;
    struct turn t = {0, 0};
    struct scale_source source = scale_source_of<N>(p, tile, warpgroup, warp, lane);
    struct stored_scale stored = load_scale(p, source, from, lane);
    barrier_wait(full_at(0), 0);
    decode(a[0], stage_at<N>(0) + tiles, lane4);
    for (int left = run.end - run.first; left > 0; tile++, from = 0) {
        const int end = min(p.steps, from + left);
#pragma unroll 1
        for (int step = from; step < end; step++) {
            const uint8_t *stage = stage_at<N>(t.stage);
            start<N>(c, a[0], stage);
            const float scale = decode_scale(source, stored);
            stored = load_scale(p, source, step + 1, lane);
            float scales[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                scales[j] = __shfl_sync(0xffffffffu, scale, 8 * j + lane / 4);
            decode(a[1], stage + tiles + GN_CUDA_TILE_BYTES, lane4);
            add_up<N>(acc, c, scales[0], scales[1]);

            start<N>(c, a[1], stage + C::X_BYTES);
            const struct turn ahead = --left > 0 ? next<N>(t) : t; /* at the end: in vain */
            barrier_wait(full_at(ahead.stage), ahead.parity);
            decode(a[0], stage_at<N>(ahead.stage) + tiles, lane4);
            add_up<N>(acc, c, scales[2], scales[3]);
            if (lane < PEERS) barrier_arrive_cluster(peer_empty + t.stage * 8);
            t = ahead;
        }
        if (left > 0) {
            source = scale_source_of<N>(p, tile + 1, warpgroup, warp, lane);
            stored = load_scale(p, source, 0, lane);
        }
        leave<N>(p, acc, tile, from == 0 && end == p.steps, warpgroup, thread);
    }
}

/* The tiles that a run shares with others. */
template <int N>
static __device__ __forceinline__ void finish_run(const struct product &p, struct run run,
                                                  int warpgroup, int thread) {
#pragma unroll 1
    for (int tile = run.first / p.steps; tile * p.steps < run.end; tile++)
        if (run.first > tile * p.steps || run.end < (tile + 1) * p.steps)
            finish_shared<N>(p, tile, warpgroup, thread);
}

template <int N>
static __global__ void __launch_bounds__(cut<N>::THREADS, 1)
    mma_kernel(const __grid_constant__ struct product p) {
    typedef cut<N> C;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / WARP, 0);
    const int warpgroup = warp / (GROUP_THREADS / WARP);
    const struct run run = run_of(p, (int)blockIdx.x / PEERS);
    pdl_trigger();
    if (threadIdx.x < C::STAGES) {
        barrier_init(full_at(threadIdx.x), 1);
        barrier_init(empty_at(threadIdx.x), PEERS * C::GROUPS * (GROUP_THREADS / WARP));
        barriers_ready();
    }
    sync_cluster();
    if (warpgroup == C::GROUPS) {
        give_registers<FEW_REGISTERS>();
        if (warp == C::GROUPS * (GROUP_THREADS / WARP)) copy_run<N>(p, run, threadIdx.x % WARP);
    } else {
        take_registers<C::MORE_REGISTERS>();
        int thread = threadIdx.x % GROUP_THREADS;
        asm("" : "+r"(thread)); /* or it is made again in each step */
        fill_tables<N>(p);
        pdl_wait();
        multiply_run<N>(p, run, warpgroup, thread);
        finish_run<N>(p, run, warpgroup, thread);
    }
    sync_cluster(); /* copies and arrivals of the other have come */
}

/* ---- the call ---- */

typedef void mma_fn(const struct product);

/* A kernel, by how many tokens its tiles have. */
struct variant {
    mma_fn *kernel;
    int tokens, groups, threads, shared_bytes;
};

template <int N> static struct variant variant_of(void) {
    return {mma_kernel<N>, N, cut<N>::GROUPS, cut<N>::THREADS, cut<N>::SHARED_BYTES};
}

static struct variant variant_for(int tokens) {
    return tokens <= 32   ? variant_of<32>()
           : tokens <= 64 ? variant_of<64>()
           : tokens <= 96 ? variant_of<96>()
                          : variant_of<128>();
}

static cudaLaunchConfig_t config_of(const struct variant *v, int clusters,
                                    cudaLaunchAttribute *attributes) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = PEERS;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)(clusters * PEERS));
    config.blockDim = dim3((unsigned)v->threads);
    config.dynamicSmemBytes = (size_t)v->shared_bytes;
    config.attrs = attributes;
    config.numAttrs = 1;
    return config;
}

/* All the SM's memory for sharing: a split that differs from the last kernel's waits for it. */
static bool set_shared(const void *kernel, int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) ==
               cudaSuccess &&
           cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                cudaSharedmemCarveoutMaxShared) == cudaSuccess;
}

/* Also on chips whose code is not here, which is no failure. */
void gn_cuda_linear_mma_open(struct gn_cuda *cuda) {
    int least = cuda->sms / PEERS;
    if (!set_shared((const void *)pack_kernel<float>, 0) ||
        !set_shared((const void *)pack_kernel<bf16>, 0))
        least = 0;
    for (int tokens = 32; tokens <= MAX_TOKENS; tokens += 32) {
        const struct variant v = variant_for(tokens);
        cudaLaunchAttribute attributes[1] = {};
        const cudaLaunchConfig_t config = config_of(&v, cuda->sms / PEERS, attributes);
        int n = 0;
        if (!set_shared((const void *)v.kernel, v.shared_bytes) ||
            cudaOccupancyMaxActiveClusters(&n, v.kernel, &config) != cudaSuccess)
            n = 0;
        least = n < least ? n : least;
    }
    (void)cudaGetLastError();
    cuda->mma_clusters = least;
}

/* How a call is cut up, and what of the working memory it takes. */
struct plan {
    struct variant variant;
    int token_tiles, tiles, steps, clusters;
    size_t x_bytes, dense_bytes, sums_bytes, partials_bytes;
};

static struct plan plan_of(const gn_ctx *ctx, int64_t rows, int64_t K, int64_t columns,
                           int64_t groups, bool lora) {
    struct plan plan = {};
    plan.token_tiles = (int)((rows + MAX_TOKENS - 1) / MAX_TOKENS);
    plan.variant = variant_for((int)((rows + plan.token_tiles - 1) / plan.token_tiles));
    const int64_t tile_groups = plan.variant.groups * PEERS;
    plan.tiles = (int)((groups + tile_groups - 1) / tile_groups) * plan.token_tiles;
    plan.steps = (int)((K / GN_BLOCK + STEP - 1) / STEP);
    const int64_t all = (int64_t)plan.tiles * plan.steps;
    plan.clusters = (int)(all < ctx->cuda->mma_clusters ? all : ctx->cuda->mma_clusters);
    plan.x_bytes = (size_t)plan.token_tiles * plan.variant.tokens * plan.steps * STEP * ROW_BYTES;
    plan.dense_bytes = lora ? (size_t)(rows * K) * sizeof(bf16) : 0;
    plan.sums_bytes = lora ? (size_t)(rows * columns) * sizeof(float) : 0;
    plan.partials_bytes = (size_t)plan.clusters * PEERS * 2 * plan.variant.groups * GROUP_ROWS *
                          plan.variant.tokens * sizeof(float);
    return plan;
}

static size_t bytes_of(const gn_ctx *ctx, const struct plan *plan, int64_t rows, int64_t max_rank,
                       int max_terms) {
    return align_up(plan->x_bytes) + align_up(plan->dense_bytes) + align_up(plan->sums_bytes) +
           align_up(plan->partials_bytes) +
           (max_rank > 0 ? gn_cuda_lora_bytes(ctx, rows, max_rank, max_terms) : 0);
}

size_t gn_cuda_linear_mma_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                                    int64_t max_rank, int max_terms) {
    if (ctx->cuda->mma_clusters == 0) return 0;
    const int64_t groups = max_n / GROUP_ROWS + GN_MAX_PARTS;
    size_t most = 0;
    for (int64_t n = 32; n <= GN_CUDA_MMA_ROWS; n += 32) {
        const int64_t used = rows < n ? rows : n;
        const struct plan plan = plan_of(ctx, used, max_k, max_n, groups, max_rank > 0);
        const size_t bytes = bytes_of(ctx, &plan, used, max_rank, max_terms);
        most = bytes > most ? bytes : most;
    }
    return most;
}

/* Groups of 64 rows; of gate and up together, 32 of each. */
static int64_t groups_of(const gn_linear_args *args) {
    const bool swiglu = args->epilogue == GN_SWIGLU;
    const int64_t in_group = swiglu ? GROUP_ROWS / 2 : GROUP_ROWS;
    int64_t n = 0;
    for (int i = 0; i < (swiglu ? 1 : args->n_parts); i++)
        n += (args->part[i].w->rows + in_group - 1) / in_group;
    return n;
}

bool gn_cuda_linear_mma_fits(const gn_ctx *ctx, const gn_linear_args *args) {
    const gn_tensor *x = &args->x;
    if (ctx->cuda->mma_clusters == 0 || ctx->compute != GN_BF16 || x->shape[0] > GN_CUDA_MMA_ROWS ||
        x->dtype == GN_F16)
        return false;
    for (int i = 0; i < args->n_parts; i++) {
        const gn_matrix *w = args->part[i].w;
        if (!is_matrix(w) || !is_aligned(w->data, 16) || w->qtype != args->part[0].w->qtype)
            return false;
        if (args->epilogue == GN_SWIGLU && i > 0) continue;
        const gn_dtype dtype = args->part[i].y.dtype;
        if (x->shape[0] * args->part[i].y.ld >= INT32_MAX) return false;
        if (dtype != args->part[0].y.dtype || dtype == GN_F16 ||
            (args->epilogue == GN_ADD && dtype != GN_F32))
            return false;
    }
    const struct plan plan = plan_of(ctx, x->shape[0], x->shape[1], 0, groups_of(args), false);
    return plan.tiles <= GN_CUDA_COUNTERS / (2 * PEERS) &&
           (int64_t)plan.tiles * plan.steps < INT32_MAX / (plan.clusters + 1);
}

static struct product product_of(const gn_ctx *ctx, const gn_linear_args *args,
                                 const struct plan *plan) {
    const gn_cuda_parts parts = parts_of(args);
    struct product p = {};
    p.swiglu = args->epilogue == GN_SWIGLU;
    p.add = args->epilogue == GN_ADD;
    p.y_f32 = args->part[0].y.dtype == GN_F32;
    p.n_parts = p.swiglu ? 1 : args->n_parts;
    for (int i = 0; i < p.n_parts; i++) {
        struct part *part = &p.part[i];
        const int64_t in_group = p.swiglu ? GROUP_ROWS / 2 : GROUP_ROWS;
        for (int j = 0; j < (p.swiglu ? 2 : 1); j++) {
            part->m[j] = matrix_of(args->part[i + j].w);
            part->column[j] = (int)parts.first[i + j];
        }
        part->y = args->part[i].y.data;
        part->y_ld = args->part[i].y.ld;
        part->group0 = p.groups;
        p.groups += (int)((part->m[0].rows + in_group - 1) / in_group);
    }
    p.T = (int)args->x.shape[0];
    p.blocks = (int)(args->x.shape[1] / GN_BLOCK);
    p.token_tiles = plan->token_tiles;
    p.steps = plan->steps;
    p.tiles = plan->tiles;
    p.clusters = plan->clusters;
    p.lora_ld = parts.first[parts.n];
    p.counters = ctx->cuda->counters;
    return p;
}

/* x as `to` and `dense` have it. */
static gn_status pack_x(gn_ctx *ctx, const gn_linear_args *args, const struct plan *plan, void *to,
                        bf16 *dense) {
    const gn_tensor *x = &args->x;
    struct x_source s = {};
    s.x = x->data;
    s.ld = x->ld;
    s.norm = args->norm ? (const float *)args->norm->data : NULL;
    s.eps = args->eps;
    s.T = (int)x->shape[0];
    s.blocks = (int)(x->shape[1] / GN_BLOCK);
    s.in_pairs = x->ld % 2 == 0 && is_aligned(x->data, 2 * gn_dtype_size(x->dtype)) &&
                 is_aligned(s.norm, sizeof(float2));
    const int tokens = plan->variant.tokens, chunks = plan->steps * STEP * 8;
    const dim3 grid((unsigned)(plan->token_tiles * tokens),
                    s.norm ? 1 : (unsigned)((chunks + PACK_THREADS - 1) / PACK_THREADS));
    gn_status status = GN_OK;
    GN_FOR_FLOAT(x->dtype, status = launch(ctx, pack_kernel<T>, grid, dim3(PACK_THREADS), 0,
                                           (uint4 *)to, dense, s, tokens));
    return status;
}

gn_status gn_cuda_linear_mma(gn_ctx *ctx, const gn_linear_args *args) {
    const int64_t T = args->x.shape[0], K = args->x.shape[1];
    const int rank = max_rank_of(args);
    const struct plan plan =
        plan_of(ctx, T, K, parts_of(args).first[args->n_parts], groups_of(args), rank > 0);
    if (bytes_of(ctx, &plan, T, rank, gn_cuda_lora_terms_a_row(args)) > ctx->workspace_bytes)
        return GN_ENOMEM;
    struct product p = product_of(ctx, args, &plan);
    char *at = (char *)ctx->workspace;
    char *x = carve(&at, plan.x_bytes);
    bf16 *dense = (bf16 *)carve(&at, plan.dense_bytes);
    float *lora = (float *)carve(&at, plan.sums_bytes);
    p.x = (const uint8_t *)x;
    p.partials = (float4 *)carve(&at, plan.partials_bytes);
    gn_status status = pack_x(ctx, args, &plan, x, rank > 0 ? dense : NULL);
    if (!status && rank > 0) {
        p.lora = lora;
        status = gn_cuda_lora(ctx, args, dense, args->x.shape[1], at, lora);
    }
    if (status) return status;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = config_of(&plan.variant, plan.clusters, attributes);
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 2;
    config.stream = gn_cuda_stream(ctx);
    return gn_cuda_status(cudaLaunchKernelEx(&config, plan.variant.kernel, p));
}
