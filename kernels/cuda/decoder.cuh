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
    STAGE_OFFSETS = STAGE_CODES + 2 * UNITS * GN_CUDA_TILE_ROWS,
    STAGE_BYTES = STAGE_OFFSETS + 16,
    STAGES_AT = TABLE_BYTES,
    NESTED_AT = STAGES_AT + WARPS * STAGES * STAGE_BYTES,
    SQUARES_AT = NESTED_AT + 256 * (int)sizeof(float),
    SCRATCH_BYTES = UNITS * GN_BLOCK * 2,
    SCRATCH_AT = SQUARES_AT + WARPS * MAX_T * (int)sizeof(float),
    PHASES_AT = SCRATCH_AT + WARPS * SCRATCH_BYTES,
    PHASES = 4, /* at hand: the current one, two more, and one that is on its way */
    SHARED_BYTES = PHASES_AT + PHASES * (int)sizeof(struct phase),
};

extern __shared__ __align__(1024) uint8_t shared[];

static __device__ __forceinline__ float *gap(int i) {
    return (float *)(shared + i / 32 * ENTRY_BYTES + ENTRY_BYTES / 2 + i % 32 * 4);
}

static __device__ __forceinline__ struct phase *phase_at(int i) {
    return (struct phase *)(shared + PHASES_AT) + i % PHASES;
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
    return {n * i / of, n * (i + 1) / of};
}

static __device__ __forceinline__ struct range groups_of(const struct phase &ph) {
    return share(ph.groups, (int)blockIdx.x, (int)gridDim.x);
}

static __device__ __forceinline__ struct range blocks_of(const struct phase &ph, int warp) {
    return share(ph.blocks, warp, WARPS);
}

/* A warp's sums of a group, (GROUP_ROWS, T), fill whole gaps: T counts as even. */
static __host__ __device__ __forceinline__ int even(int T) {
    return (T + 1) / 2 * 2;
}

/* Groups whose sums fit in the gaps together. */
static __device__ __forceinline__ int batch_groups(int T) {
    return GAP_FLOATS / (WARPS * GROUP_ROWS * even(T));
}

/* ---- the stream of weights ---- */

/* A warp's steps in their order: for each phase, for each batch of groups, for each UNITS of its
 * blocks of columns, for each group. The cursor is at the next step to ask for, up to STAGES ahead
 * of the one being multiplied, also across barriers. */
struct cursor {
    int at; /* phase */
    struct range groups, blocks;
    int batch_begin, batch_end, block, group;
    uint32_t asked, taken; /* steps so far */
    /* The step's halves: their weights, and their first block by number, in tiles' order and (for
     * this lane's scale) 8 times that and `in_file` in the file's. The next group's is `stride`
     * further, for `run` groups with this one; 0: to be found out. */
    const struct weight *w[2];
    int tile_block[2], in_file, run, stride;
};

static __device__ __forceinline__ void begin_batch(struct cursor *cur, const struct program &p,
                                                   int group) {
    cur->batch_begin = cur->group = group;
    cur->batch_end = min(group + batch_groups(p.T), cur->groups.end);
    cur->block = cur->blocks.begin;
}

/* Whether there is a step to ask for: of the cursor's phase or, where it has none for this warp, of
 * a later one. Phases up to current + 2 are at hand. */
static __device__ __forceinline__ bool find_step(struct cursor *cur, const struct program &p,
                                                 int current, int warp) {
    while (cur->group >= cur->groups.end) {
        if (cur->at >= p.n_phases - 1 || cur->at >= current + 2) return false;
        const struct phase &ph = *phase_at(++cur->at);
        cur->groups = groups_of(ph);
        cur->blocks = blocks_of(ph, warp);
        if (ph.kind == ATTEND || cur->blocks.begin == cur->blocks.end)
            cur->groups.begin = cur->groups.end;
        begin_batch(cur, p, cur->groups.begin);
    }
    return true;
}

/* Which of q, k and v a group is of, and the first group of that. */
static __device__ __forceinline__ int head_weight(const struct program &p, int group, int *first) {
    const int half = p.D / GROUP_ROWS, k = p.heads * half, v = k + p.kv_heads * half;
    *first = group < k ? 0 : group < v ? k : v;
    return group < k ? 0 : group < v ? 1 : 2;
}

static __device__ __forceinline__ void point(struct cursor *cur, const struct program &p, int lane) {
    const struct phase &ph = *phase_at(cur->at);
    int w[2] = {0, 0}, tile[2] = {2 * cur->group, 2 * cur->group + 1};
    cur->run = cur->batch_end - cur->group;
    cur->stride = 2 * ph.blocks;
    if (ph.kind == SWIGLU) {
        w[1] = 1;
        tile[0] = tile[1] = cur->group;
        cur->stride = ph.blocks;
    } else if (ph.kind == QKV) {
        const int half = p.D / GROUP_ROWS;
        int first;
        w[0] = w[1] = head_weight(p, cur->group, &first);
        const int in_head = (cur->group - first) % half;
        tile[0] = 2 * (cur->group - first) - in_head;
        tile[1] = tile[0] + half;
        cur->run = min(cur->run, half - in_head);
        cur->stride = ph.blocks;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        cur->w[h] = &ph.w[w[h]];
        cur->tile_block[h] = tile[h] * ph.blocks + cur->block;
    }
    cur->in_file = lane / 4 * ph.blocks + lane % 4 - (GN_CUDA_TILE_ROWS - 1) * cur->block;
}

static __device__ __forceinline__ void advance(struct cursor *cur, const struct program &p) {
    cur->group++;
    if (--cur->run > 0) {
        cur->tile_block[0] += cur->stride;
        cur->tile_block[1] += cur->stride;
        return;
    }
    if (cur->group < cur->batch_end) return;
    cur->block += UNITS;
    if (cur->block < cur->blocks.end)
        cur->group = cur->batch_begin;
    else
        begin_batch(cur, p, cur->batch_end);
}

static __device__ __forceinline__ uint8_t *stage_at(uint32_t step, int warp) {
    return shared + STAGES_AT + (warp * STAGES + step % STAGES) * STAGE_BYTES;
}

/* Asks for the n blocks of the cursor's step. Codes: (2 halves, UNITS, 256 bytes). With double
 * quantization, scales (2, UNITS, 8 rows) bytes, what the scale of (row g, block c) is multiplied
 * with, a float for lane 4g + c, and what is added to it. Without it, scales (2, UNITS, 8 rows)
 * floats. */
static __device__ __forceinline__ void load_step(const struct cursor *cur, const struct program &p,
                                                 int n, int warp, int lane) {
    uint8_t *stage = stage_at(cur->asked, warp);
    uint8_t *codes = stage + lane * 16;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const struct weight &w = *cur->w[h];
        const int at = cur->tile_block[h];
        const uint8_t *tiles = w.tiles + (int64_t)at * GN_CUDA_TILE_BYTES + lane * 16;
#pragma unroll
        for (int i = 0; i < UNITS / 2; i++)
            if (lane * 16 + i * WARP * 16 < n * GN_CUDA_TILE_BYTES)
                copy_async<16>(codes + h * UNITS * GN_CUDA_TILE_BYTES + i * WARP * 16,
                               tiles + i * WARP * 16);
        if (!p.nested_code) {
            if (lane < 2 * n)
                copy_async<16>(stage + STAGE_ABSMAX + (h * 2 * UNITS + lane) * 16,
                               w.scales + ((int64_t)at * 2 + lane) * 16);
            continue;
        }
        if (lane < n)
            copy_async<8>(stage + STAGE_CODES + (h * UNITS + lane) * GN_CUDA_TILE_ROWS,
                          w.scales + (int64_t)(at + lane) * GN_CUDA_TILE_ROWS);
        if (lane % 4 < n)
            copy_async<4>(stage + STAGE_ABSMAX + (h * WARP + lane) * 4,
                          w.nested_absmax +
                              (uint32_t)(at * GN_CUDA_TILE_ROWS + cur->in_file) / GN_NESTED_BLOCK);
        if (lane == 0) ((float *)(stage + STAGE_OFFSETS))[h] = w.offset;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Asks for steps until STAGES are under way or there are no more. */
static __device__ __forceinline__ void ask(struct cursor *cur, const struct program &p, int current,
                                           int warp, int lane) {
    while (cur->asked - cur->taken < STAGES) {
        if (cur->run <= 0) {
            if (!find_step(cur, p, current, warp)) return;
            point(cur, p, lane);
        }
        load_step(cur, p, min(UNITS, cur->blocks.end - cur->block), warp, lane);
        cur->asked++;
        advance(cur, p);
    }
}

/* Until the oldest step is here, for all lanes. */
static __device__ __forceinline__ void await(const struct cursor *cur) {
    if (cur->asked - cur->taken == STAGES)
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
    else
        asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncwarp();
}

#endif
