/* decoder.cuh - what the parts of decoder.cu share: the program that its kernel runs, its shared
 * memory, and the stream of weights. */
#ifndef GN_CUDA_DECODER_CUH
#define GN_CUDA_DECODER_CUH

#include "attention_decode.cuh"
#include "kernels/decoder.h"

enum {
    WARPS = 16, /* that multiply */
    THREADS = WARPS * WARP,
    HELPERS = 2, /* warps beside them, for LoRA */
    UNITS = 4,   /* blocks of 64 columns in a step */
    STAGES = 3,  /* steps of a warp that are on their way */
    MAX_T = GN_DECODER_MAX_ROWS,
    MAX_D = 128,
    GROUP_ROWS = 2 * GN_CUDA_TILE_ROWS,
};

/* ---- the program ---- */

/* A weight in tiles. */
struct weight {
    const uint8_t *tiles;
    const uint8_t *scales; /* or floats, without double quantization */
    const float *nested_absmax;
    float offset;
};

enum kind { PREPARE, QKV, ATTEND, ADD, SWIGLU };

/* What happens between two barriers of the grid. A product's group is two tiles of 8 rows: halves
 * of a head that rotate together, gate's and up's, or neighbours. */
struct alignas(16) phase {
    struct weight w[3];
    const bf16 *x;       /* what is multiplied, (T, 64 blocks) */
    const float *norm;   /* PREPARE, ADD: of the next product's x, or NULL */
    bf16 *keys, *values; /* the layer's cache */
    enum kind kind;
    int pair, n_parts;            /* LoRA's, of the phase's first weight */
    int groups_each, groups_left; /* of a block; one more for each of the first blocks */
    int blocks;                   /* of 64 columns */
};

/* To divide small numbers by: x / d is the upper half of x inverse. */
struct divisor {
    int d;
    uint32_t inverse;
};

struct program {
    const struct phase *phases; /* on the device */
    int n_phases, T, heads, kv_heads, D, hidden, intermediate;
    float eps;
    float *x;
    int64_t x_ld, cos_ld, sin_ld, k_ld, v_ld; /* of a row; of a cache block */
    const float *cosines, *sines;
    /* RMSNorm's input times its weights, and the squares of that input, summed by each block of the
     * grid; its factor, one number a row, is applied to the product's sums. */
    bf16 *normed;           /* (T, hidden) */
    float *squares;         /* (MAX_T, blocks of the grid) */
    bf16 *q, *attended, *h; /* (T, heads D) twice, (T, intermediate) */
    float *partials;        /* (T, heads, splits, D + 4): see decoder_attention.cuh */
    uint32_t *splits_done;  /* (T, kv heads, tiles) */
    int splits, max_blocks;
    gn_cuda_batch batch;
    const float *code, *nested_code;    /* of all weights; NULL without double quantization */
    int batch_groups;                   /* whose sums fit in the gaps together */
    struct divisor by_T, by_half, by_D; /* rows; groups of a head; its columns */
    int n_terms;                        /* of LoRA, in batch.terms */
    float *u;                           /* decoder_lora.cuh */
    uint32_t *sync; /* blocks that arrived, blocks that left, helpers whose u is there */
};

/* Rows of x, for a kernel that is made for up to MOST: a constant where that is 1. */
template <int MOST> static __device__ __forceinline__ int rows_of(const struct program &p) {
    return MOST == 1 ? 1 : p.T;
}

/* ---- shared memory ---- */

/* Where the cache takes a row's key and value. */
struct slot {
    int block, token;
};

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
    FACTORS_AT = NESTED_AT + 256 * (int)sizeof(float),       /* (MAX_T) RMSNorm's */
    SQUARES_AT = FACTORS_AT + MAX_T * (int)sizeof(float),    /* (groups of a batch, T) */
    SLOTS_AT = SQUARES_AT + 2 * MAX_T * (int)sizeof(float),  /* (MAX_T) */
    ANGLES_AT = SLOTS_AT + MAX_T * (int)sizeof(struct slot), /* (MAX_T, MAX_D / 2) */
    SCRATCH_BYTES = UNITS * GN_BLOCK * 2,
    SCRATCH_AT = ANGLES_AT + MAX_T * MAX_D / 2 * (int)sizeof(float2),
    PHASES_AT = SCRATCH_AT + WARPS * SCRATCH_BYTES,
    PHASES = 4, /* at hand: the current one, two more, and one that is on its way */
    ITEM_AT = PHASES_AT + PHASES * (int)sizeof(struct phase), /* decoder_attention.cuh */
    LAST_AT = ITEM_AT + 32,                                   /* likewise */
    SHARED_BYTES = ITEM_AT + 64,
};

extern __shared__ __align__(1024) uint8_t shared[];

static __device__ __forceinline__ float *gap(int i) {
    return (float *)(shared + i / 32 * ENTRY_BYTES + ENTRY_BYTES / 2 + i % 32 * 4);
}

static __device__ __forceinline__ struct slot *slot_of(int t) {
    return (struct slot *)(shared + SLOTS_AT) + t;
}

/* Cosine and sine of angle j of row t. */
static __device__ __forceinline__ float2 *angle_of(int t, int j) {
    return (float2 *)(shared + ANGLES_AT) + t * (MAX_D / 2) + j;
}

static __device__ __forceinline__ struct phase *phase_at(int i) {
    return (struct phase *)(shared + PHASES_AT) + i % PHASES;
}

/* ---- memory ---- */

/* What other blocks write: from L2, never from a stale L1. */
static __device__ __forceinline__ uint4 load_fresh16(const void *at) {
    return __ldcg((const uint4 *)at);
}

/* ---- who does what ---- */

/* A block's groups of a phase; a warp's blocks of columns. */
struct range {
    int begin, end;
};

static __device__ __forceinline__ struct range groups_of(const struct phase &ph) {
    const int i = (int)blockIdx.x, begin = i * ph.groups_each + min(i, ph.groups_left);
    return {begin, begin + ph.groups_each + (i < ph.groups_left)};
}

static __device__ __forceinline__ struct range blocks_of(const struct phase &ph, int warp) {
    return {ph.blocks * warp / WARPS, ph.blocks * (warp + 1) / WARPS};
}

static __device__ __forceinline__ int quotient(int x, struct divisor by) {
    return by.d == 1 ? x : (int)__umulhi((uint32_t)x, by.inverse);
}

/* A warp's sums of a group are (T, GROUP_ROWS), two rows of x a gap. */
static __host__ __device__ __forceinline__ int sums_bytes(int T) {
    return (T + 1) / 2 * ENTRY_BYTES;
}

/* ---- the stream of weights ---- */

/* A warp's steps in their order: for each phase, for each batch of groups, for each UNITS of its
 * blocks of columns, for each group. The cursor is at the next step to ask for, up to STAGES ahead
 * of the one being multiplied, also across barriers. Half a warp asks for each of a step's two
 * tiles. */
struct cursor {
    int at; /* phase */
    struct range groups, blocks;
    int batch_begin, batch_end, block, group;
    uint32_t asked, taken; /* steps so far */
    /* The lane's half: its weight, and its first block by number, in tiles' order and (for scales
     * of the lane's row) 8 times that and `in_file` in the file's. The next group's is `stride`
     * further, for `run` groups with this one; 0: to be found out. */
    const uint8_t *tiles, *scales;
    const float *nested_absmax;
    float offset;
    int tile_block, in_file, row_blocks, run, stride;
};

static __device__ __forceinline__ void begin_batch(struct cursor *cur, const struct program &p,
                                                   int group) {
    cur->batch_begin = cur->group = group;
    cur->batch_end = min(group + p.batch_groups, cur->groups.end);
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
        if (cur->blocks.begin == cur->blocks.end) cur->groups.begin = cur->groups.end;
        begin_batch(cur, p, cur->groups.begin);
    }
    return true;
}

/* Which of q, k and v a group is of, and the first group of that. */
static __device__ __forceinline__ int head_weight(const struct program &p, int group, int *first) {
    const int k = p.heads * p.by_half.d, v = k + p.kv_heads * p.by_half.d;
    *first = group < k ? 0 : group < v ? k : v;
    return group < k ? 0 : group < v ? 1 : 2;
}

static __device__ __forceinline__ void point(struct cursor *cur, const struct program &p,
                                             int lane) {
    const struct phase &ph = *phase_at(cur->at);
    const int h = lane / 16;
    int w = 0, tile = 2 * cur->group + h;
    cur->run = cur->batch_end - cur->group;
    cur->stride = 2 * ph.blocks;
    if (ph.kind == SWIGLU) {
        w = h;
        tile = cur->group;
        cur->stride = ph.blocks;
    } else if (ph.kind == QKV) {
        const int half = p.by_half.d;
        int first;
        w = head_weight(p, cur->group, &first);
        const int i = cur->group - first, in_head = i - quotient(i, p.by_half) * half;
        tile = 2 * i - in_head + h * half;
        cur->run = min(cur->run, half - in_head);
        cur->stride = ph.blocks;
    }
    const struct weight &weight = ph.w[w];
    cur->tiles = weight.tiles;
    cur->scales = weight.scales;
    cur->nested_absmax = weight.nested_absmax;
    cur->offset = weight.offset;
    cur->tile_block = tile * ph.blocks + cur->block;
    cur->row_blocks = ph.blocks;
    cur->in_file = lane % 16 / 4 * ph.blocks + lane % 4 - (GN_CUDA_TILE_ROWS - 1) * cur->block;
}

static __device__ __forceinline__ void advance(struct cursor *cur, const struct program &p) {
    cur->group++;
    cur->tile_block += cur->stride;
    if (--cur->run > 0 || cur->group < cur->batch_end) return;
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
 * quantization (DQ), scales (2, UNITS, 8 rows) bytes; what they are multiplied with, (2, 8 rows,
 * UNITS) floats; what is added to them, 2 floats. Without it, scales (2, UNITS, 8 rows) floats. */
template <bool DQ>
static __device__ __forceinline__ void load_step(const struct cursor *cur, int n, int warp,
                                                 int lane) {
    const int h = lane / 16, l = lane % 16, at = cur->tile_block;
    uint8_t *stage = stage_at(cur->asked, warp);
    uint8_t *codes = stage + h * UNITS * GN_CUDA_TILE_BYTES + l * 16;
    const uint8_t *tiles = cur->tiles + (int64_t)at * GN_CUDA_TILE_BYTES + l * 16;
#pragma unroll
    for (int j = 0; j < UNITS; j++)
        if (j < n) copy_async<16>(codes + j * GN_CUDA_TILE_BYTES, tiles + j * GN_CUDA_TILE_BYTES);
    if (DQ) {
        if (l < n)
            copy_async<8>(stage + STAGE_CODES + (h * UNITS + l) * GN_CUDA_TILE_ROWS,
                          cur->scales + (int64_t)(at + l) * GN_CUDA_TILE_ROWS);
        float *absmax = (float *)(stage + STAGE_ABSMAX) + h * WARP + l;
        const uint32_t block = (uint32_t)(at * GN_CUDA_TILE_ROWS + cur->in_file);
        if (l % 4 < n) {
            copy_async<4>(absmax, cur->nested_absmax + block / GN_NESTED_BLOCK);
            copy_async<4>(absmax + 16,
                          cur->nested_absmax +
                              (block + 4 * (uint32_t)cur->row_blocks) / GN_NESTED_BLOCK);
        }
        if (l == 0) ((float *)(stage + STAGE_OFFSETS))[h] = cur->offset;
    } else if (l < 2 * n) {
        copy_async<16>(stage + STAGE_ABSMAX + (h * 2 * UNITS + l) * 16,
                       cur->scales + ((int64_t)at * 2 + l) * 16);
    }
    commit_copies();
}

/* Asks for steps until STAGES are under way or there are no more. */
template <bool DQ>
static __device__ __forceinline__ void ask(struct cursor *cur, const struct program &p, int current,
                                           int warp, int lane) {
    while (cur->asked - cur->taken < STAGES) {
        if (cur->run <= 0) {
            if (!find_step(cur, p, current, warp)) return;
            point(cur, p, lane);
        }
        load_step<DQ>(cur, min(UNITS, cur->blocks.end - cur->block), warp, lane);
        cur->asked++;
        advance(cur, p);
    }
}

/* Until the oldest step is here, for all lanes. */
static __device__ __forceinline__ void await(const struct cursor *cur) {
    if (cur->asked - cur->taken == STAGES)
        wait_for_copies<STAGES - 1>();
    else
        wait_for_copies<0>();
    __syncwarp();
}

#endif
