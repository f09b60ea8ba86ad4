/* decoder.cuh - what the parts of decoder.cu share: the program that its kernel runs, its shared
 * memory, and the stream of weights. */
#ifndef GN_CUDA_DECODER_CUH
#define GN_CUDA_DECODER_CUH

#include "attention_decode.cuh"
#include "kernels/decoder.h"

enum {
    WARPS = 16,
    THREADS = WARPS * WARP,
    UNITS = 4,  /* blocks of 64 columns in a step */
    STAGES = 4, /* steps of a warp that are on their way */
    MAX_T = GN_DECODER_MAX_ROWS,
    GROUP_ROWS = 2 * GN_CUDA_TILE_ROWS,
};

/* ---- the program ---- */

/* A weight in tiles. */
struct weight {
    const uint8_t *tiles;
    const uint8_t *scales; /* or floats, without double quantization */
    const float *nested_absmax;
    float offset;
    int rows;
};

enum kind { QKV, ATTEND, ADD, SWIGLU };

/* What happens between two barriers of the grid. A product's group is two tiles of 8 rows: halves
 * of a head that rotate together, gate's and up's, or neighbours. */
struct alignas(16) phase {
    struct weight w[3];
    const float *norm;   /* of x first, or NULL */
    bf16 *keys, *values; /* the layer's cache */
    enum kind kind;
    int groups, blocks; /* of 64 columns */
    int x_is_attention; /* else x is the residual stream (with a norm) or h */
};

struct program {
    const struct phase *phases; /* on the device */
    int n_phases, T, heads, kv_heads, D, hidden, intermediate;
    float eps;
    float *x;
    int64_t x_ld, cos_ld, sin_ld, k_ld, v_ld; /* of a row; of a cache block */
    const float *cosines, *sines;
    bf16 *q, *h;     /* (T, heads D), (T, intermediate) */
    float *partials; /* (T, heads, splits, D + 4): see decoder_attention.cuh */
    int splits, max_blocks;
    gn_cuda_batch batch;
    const float *code, *nested_code; /* of all weights; NULL without double quantization */
    uint32_t *sync;                  /* blocks that arrived, blocks that left */
};

/* ---- shared memory ---- */

/* The table of decoded bytes has an entry every 256 bytes and leaves every other 128 free: a "gap".
 * Float i of the gaps is here. */
enum {
    ENTRY_BYTES = 256,
    TABLE_BYTES = 256 * ENTRY_BYTES,
    GAP_FLOATS = TABLE_BYTES / 2 / (int)sizeof(float),
    STAGE_ABSMAX = UNITS * 2 * GN_CUDA_TILE_BYTES,
    STAGE_CODES = STAGE_ABSMAX + 2 * WARP * (int)sizeof(float),
    STAGE_BYTES = STAGE_CODES + 2 * UNITS * GN_CUDA_TILE_ROWS,
    STAGES_AT = TABLE_BYTES,
    NESTED_AT = STAGES_AT + WARPS * STAGES * STAGE_BYTES,
    SQUARES_AT = NESTED_AT + 256 * (int)sizeof(float),
    SCRATCH_BYTES = UNITS * GN_BLOCK * 2,
    SCRATCH_AT = SQUARES_AT + WARPS * MAX_T * (int)sizeof(float),
    CURSORS_AT = SCRATCH_AT + WARPS * SCRATCH_BYTES,
    PHASES_AT = CURSORS_AT + WARPS * (int)sizeof(struct phase),
    SHARED_BYTES = PHASES_AT + 2 * (int)sizeof(struct phase),
};

extern __shared__ __align__(1024) uint8_t shared[];

static __device__ __forceinline__ float *gap(int i) {
    return (float *)(shared + i / 32 * ENTRY_BYTES + ENTRY_BYTES / 2 + i % 32 * 4);
}

static __device__ __forceinline__ void copy_phase(void *to, const struct phase *from, int lane) {
    if (lane < (int)sizeof(struct phase) / 16) ((uint4 *)to)[lane] = __ldg((const uint4 *)from + lane);
}

/* ---- memory ---- */

/* What other blocks write: from L2, never from a stale L1. */
static __device__ __forceinline__ uint4 load_fresh16(const void *at) {
    return __ldcg((const uint4 *)at);
}

static __device__ __forceinline__ uint32_t load_acquire(const uint32_t *at) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}

template <int BYTES>
static __device__ __forceinline__ void copy_async(const void *to, const void *from) {
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES)
                     : "memory");
}

/* ---- who does what ---- */

/* A block's groups of a phase; a warp's blocks of columns. */
struct range {
    int begin, end;
};

static __device__ __forceinline__ struct range share(int n, int i, int of) {
    return {(int)((int64_t)n * i / of), (int)((int64_t)n * (i + 1) / of)};
}

static __device__ __forceinline__ struct range groups_of(const struct phase &ph) {
    return share(ph.groups, (int)blockIdx.x, (int)gridDim.x);
}

static __device__ __forceinline__ struct range blocks_of(const struct phase &ph, int warp) {
    return share(ph.blocks, warp, WARPS);
}

/* Groups whose sums fit in the gaps together. */
static __device__ __forceinline__ int batch_groups(int T) {
    return GAP_FLOATS / (WARPS * GROUP_ROWS * T);
}

/* A group's two tiles. */
struct pair {
    int w[2], tile[2];
};

static __device__ __forceinline__ struct pair pair_of(const struct program &p,
                                                      const struct phase &ph, int group) {
    if (ph.kind == SWIGLU) return {{0, 1}, {group, group}};
    if (ph.kind == ADD) return {{0, 0}, {2 * group, 2 * group + 1}};
    const int half = p.D / GROUP_ROWS, q = p.heads * half, kv = p.kv_heads * half;
    const int w = group < q ? 0 : group < q + kv ? 1 : 2;
    const int i = group - (w == 0 ? 0 : w == 1 ? q : q + kv);
    const int tile = i / half * 2 * half + i % half;
    return {{w, w}, {tile, tile + half}};
}

/* ---- the stream of weights ---- */

/* A warp's steps in their order: for each phase, for each batch of groups, for each UNITS of its
 * blocks of columns, for each group. The cursor is at the next step to ask for, up to STAGES ahead
 * of the one being multiplied, also across barriers. */
struct cursor {
    int at; /* phase */
    struct range groups; /* of the phase that are not done */
    int batch_end, block, group;
};

static __device__ __forceinline__ const struct phase &cursor_phase(int warp) {
    return *(const struct phase *)(shared + CURSORS_AT + warp * (int)sizeof(struct phase));
}

/* To the first step of phase `from` or, where it has none for this warp, of a later one. */
static __device__ __forceinline__ void enter(struct cursor *cur, const struct program &p, int from,
                                             int warp, int lane) {
    for (cur->at = from; cur->at < p.n_phases; cur->at++) {
        __syncwarp();
        copy_phase((void *)&cursor_phase(warp), p.phases + cur->at, lane);
        __syncwarp();
        const struct phase &ph = cursor_phase(warp);
        cur->groups = groups_of(ph);
        const struct range blocks = blocks_of(ph, warp);
        if (ph.kind == ATTEND || cur->groups.begin == cur->groups.end || blocks.begin == blocks.end)
            continue;
        cur->block = blocks.begin;
        cur->group = cur->groups.begin;
        cur->batch_end = min(cur->groups.begin + batch_groups(p.T), cur->groups.end);
        return;
    }
}

static __device__ __forceinline__ void advance(struct cursor *cur, const struct program &p, int warp,
                                               int lane) {
    if (++cur->group < cur->batch_end) return;
    const struct range blocks = blocks_of(cursor_phase(warp), warp);
    cur->block += UNITS;
    if (cur->block >= blocks.end) {
        if (cur->batch_end == cur->groups.end) {
            enter(cur, p, cur->at + 1, warp, lane);
            return;
        }
        cur->block = blocks.begin;
        cur->groups.begin = cur->batch_end;
        cur->batch_end = min(cur->batch_end + batch_groups(p.T), cur->groups.end);
    }
    cur->group = cur->groups.begin;
}

/* Asks for the cursor's step. Codes: (2 tiles, UNITS, 256 bytes). With double quantization, scales
 * (2, UNITS, 8 rows) bytes, and what each scale of (row g, block c) is multiplied with, a float for
 * lane 4g + c. Without it, scales (2, UNITS, 8 rows) floats. */
static __device__ __forceinline__ void load_step(struct cursor *cur, const struct program &p,
                                                 uint8_t *stage, int warp, int lane) {
    if (cur->at < p.n_phases) {
        const struct phase &ph = cursor_phase(warp);
        const struct pair pair = pair_of(p, ph, cur->group);
        const int n = min(UNITS, blocks_of(ph, warp).end - cur->block);
        const int g = lane / 4, c = lane % 4;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const struct weight &w = ph.w[pair.w[h]];
            const int64_t at = (int64_t)pair.tile[h] * ph.blocks + cur->block;
            const uint8_t *tiles = w.tiles + at * GN_CUDA_TILE_BYTES;
            uint8_t *codes = stage + h * UNITS * GN_CUDA_TILE_BYTES;
#pragma unroll
            for (int i = lane * 16; i < UNITS * GN_CUDA_TILE_BYTES; i += WARP * 16)
                if (i < n * GN_CUDA_TILE_BYTES) copy_async<16>(codes + i, tiles + i);
            if (p.nested_code) {
                if (lane < n)
                    copy_async<8>(stage + STAGE_CODES + (h * UNITS + lane) * GN_CUDA_TILE_ROWS,
                                  w.scales + (at + lane) * GN_CUDA_TILE_ROWS);
                const int block =
                    (pair.tile[h] * GN_CUDA_TILE_ROWS + g) * ph.blocks + cur->block + c;
                if (c < n)
                    copy_async<4>(stage + STAGE_ABSMAX + (h * WARP + lane) * 4,
                                  w.nested_absmax + block / GN_NESTED_BLOCK);
            } else if (lane < 2 * n) {
                copy_async<16>(stage + STAGE_ABSMAX + (h * 2 * UNITS + lane) * 16,
                               w.scales + (at * 2 + lane) * 16);
            }
        }
        advance(cur, p, warp, lane);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* The oldest step is here, for all lanes. */
static __device__ __forceinline__ void await_step(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
    __syncwarp();
}

#endif
