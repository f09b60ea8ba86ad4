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
    AHEAD = 2,   /* steps of a warp that are on their way into L2 */
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
    int batch_groups;                   /* whose sums fit in shared memory together */
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

enum {
    ENTRY_BYTES = 256, /* of the table of decoded bytes, which fills half of each */
    TABLE_BYTES = 256 * ENTRY_BYTES,
    SUMS_AT = TABLE_BYTES, /* of a batch's groups; attention's records */
    SUMS_FLOATS = 30 * 1024,
    NESTED_AT = SUMS_AT + SUMS_FLOATS * (int)sizeof(float),
    FACTORS_AT = NESTED_AT + 256 * (int)sizeof(float),    /* (MAX_T) RMSNorm's */
    SQUARES_AT = FACTORS_AT + MAX_T * (int)sizeof(float), /* (groups of a batch, T) */
    MAX_SQUARES = 256,
    SLOTS_AT = SQUARES_AT + MAX_SQUARES * (int)sizeof(float), /* (MAX_T) */
    ANGLES_AT = SLOTS_AT + MAX_T * (int)sizeof(struct slot),  /* (MAX_T, MAX_D / 2) */
    SCRATCH_BYTES = UNITS * GN_BLOCK * 2,
    SCRATCH_AT = ANGLES_AT + MAX_T * MAX_D / 2 * (int)sizeof(float2),
    PHASES_AT = SCRATCH_AT + WARPS * SCRATCH_BYTES,
    PHASES = 4, /* at hand: the current one, two more, and one that is on its way */
    ITEM_AT = PHASES_AT + PHASES * (int)sizeof(struct phase), /* decoder_attention.cuh */
    LAST_AT = ITEM_AT + 32,                                   /* likewise */
    SHARED_BYTES = ITEM_AT + 64,
};

extern __shared__ __align__(1024) uint8_t shared[];

static __device__ __forceinline__ float *sums(void) {
    return (float *)(shared + SUMS_AT);
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

/* ---- the stream of weights ---- */

/* What a lane has of a step, or of what is here of it. */
struct step {
    uint2 codes[UNITS][2]; /* of the mma's rows lane / 4 and, in the second half, those + 8 */
    uint32_t scales[2];    /* of block lane % 4 of these rows: a byte, or a float without DQ */
    float absmax[2], offset[2];
};

/* A warp's steps in their order: for each phase, for each batch of groups, for each UNITS of its
 * blocks of columns, for each group. The cursor is at the step after the one that registers hold,
 * also across barriers. */
struct cursor {
    int at; /* phase */
    int batch_begin, batch_end, group, block, units;
    bool holds; /* registers hold a step */
    /* Its first tile's blocks begin with tile_block of weight w, the other's `apart` further or, 0,
     * with the same of the next weight. In the file's order the lane's scale is the 8 tile_block +
     * in_file-th. The next group's blocks are `stride` further, for `run` groups with this one; 0:
     * to be found out. */
    int w, tile_block, apart, in_file, stride, run;
};

static __device__ __forceinline__ void begin_batch(struct cursor *cur, const struct program &p,
                                                   struct range groups, struct range blocks,
                                                   int group) {
    cur->batch_begin = cur->group = group;
    cur->batch_end = min(group + p.batch_groups, groups.end);
    cur->block = blocks.begin;
    cur->units = min(UNITS, blocks.end - blocks.begin);
}

/* From the end of a batch's groups to its next blocks, the next batch, or the next phase that has
 * something for this warp; false: there is none yet. Phases up to current + 2 are at hand. */
static __device__ __forceinline__ bool find_step(struct cursor *cur, const struct program &p,
                                                 int current, int warp) {
    if (cur->batch_begin < cur->batch_end) {
        const struct phase &ph = *phase_at(cur->at);
        const struct range groups = groups_of(ph), blocks = blocks_of(ph, warp);
        cur->group = cur->batch_begin;
        cur->block += UNITS;
        cur->units = min(UNITS, blocks.end - cur->block);
        if (cur->units > 0) return true;
        begin_batch(cur, p, groups, blocks, cur->batch_end);
    }
    while (cur->group == cur->batch_end && cur->at < p.n_phases - 1 && cur->at < current + 2) {
        const struct phase &ph = *phase_at(++cur->at);
        const struct range groups = groups_of(ph), blocks = blocks_of(ph, warp);
        begin_batch(cur, p, groups, blocks, blocks.begin < blocks.end ? groups.begin : groups.end);
    }
    return cur->group < cur->batch_end;
}

/* Which of q, k and v a group is of, and the first group of that. */
static __device__ __forceinline__ int head_weight(const struct program &p, int group, int *first) {
    const int k = p.heads * p.by_half.d, v = k + p.kv_heads * p.by_half.d;
    *first = group < k ? 0 : group < v ? k : v;
    return group < k ? 0 : group < v ? 1 : 2;
}

static __device__ __forceinline__ const struct weight &weight_of(const struct cursor *cur, int h) {
    return phase_at(cur->at)->w[cur->w + (h == 1 && cur->apart == 0)];
}
static __device__ __forceinline__ int block_of(const struct cursor *cur, int h) {
    return cur->tile_block + h * cur->apart;
}

/* Half h of the step that is `later` groups after the cursor's, on its way into L2. */
static __device__ __forceinline__ void prefetch_half(const struct cursor *cur, int later, int h) {
    prefetch_bulk(weight_of(cur, h).tiles +
                      (int64_t)(block_of(cur, h) + later * cur->stride) * GN_CUDA_TILE_BYTES,
                  cur->units * GN_CUDA_TILE_BYTES);
}

static __device__ __forceinline__ void point(struct cursor *cur, const struct program &p,
                                             int lane) {
    const struct phase &ph = *phase_at(cur->at);
    int tile = 2 * cur->group;
    cur->w = 0;
    cur->apart = ph.blocks;
    cur->run = cur->batch_end - cur->group;
    cur->stride = 2 * ph.blocks;
    if (ph.kind == SWIGLU) {
        tile = cur->group;
        cur->apart = 0;
        cur->stride = ph.blocks;
    } else if (ph.kind == QKV) {
        const int half = p.by_half.d;
        int first;
        cur->w = head_weight(p, cur->group, &first);
        const int i = cur->group - first, in_head = i - quotient(i, p.by_half) * half;
        tile = 2 * i - in_head;
        cur->apart = half * ph.blocks;
        cur->run = min(cur->run, half - in_head);
        cur->stride = ph.blocks;
    }
    cur->tile_block = tile * ph.blocks + cur->block;
    cur->in_file = lane / 4 * ph.blocks + lane % 4 - (GN_CUDA_TILE_ROWS - 1) * cur->block;
    if (lane / 2 < min(AHEAD, cur->run - 1)) prefetch_half(cur, 1 + lane / 2, lane % 2);
}

static __device__ __forceinline__ void advance(struct cursor *cur, int lane) {
    cur->group++;
    cur->tile_block += cur->stride;
    cur->run--;
    if (lane < 2 && cur->run > AHEAD) prefetch_half(cur, AHEAD, lane);
}

/* Blocks of the cursor's step; 0: there is none yet. */
static __device__ __forceinline__ int next_units(struct cursor *cur, const struct program &p,
                                                 int current, int warp, int lane) {
    if (cur->run <= 0) {
        if (cur->group == cur->batch_end && !find_step(cur, p, current, warp)) return 0;
        point(cur, p, lane);
    }
    return cur->units;
}

/* Where a lane's codes of both halves of the cursor's step are. */
struct halves {
    const uint8_t *at[2];
};

static __device__ __forceinline__ struct halves codes_of(const struct cursor *cur, int lane) {
    struct halves codes;
#pragma unroll
    for (int h = 0; h < 2; h++)
        codes.at[h] =
            weight_of(cur, h).tiles + (int64_t)block_of(cur, h) * GN_CUDA_TILE_BYTES + lane * 8;
    return codes;
}

static __device__ __forceinline__ void load_unit(struct step *s, struct halves codes, int j) {
#pragma unroll
    for (int h = 0; h < 2; h++) load_once(s->codes[j][h], codes.at[h] + j * GN_CUDA_TILE_BYTES);
}

/* Those of the n blocks of the cursor's step. */
template <bool DQ>
static __device__ __forceinline__ void load_scales(struct step *s, const struct cursor *cur, int n,
                                                   int lane) {
    if (lane % 4 >= n) return;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const struct weight &w = weight_of(cur, h);
        const int first = block_of(cur, h) * GN_CUDA_TILE_ROWS;
        const int64_t in_tiles = first + lane % 4 * GN_CUDA_TILE_ROWS + lane / 4;
        if (DQ) {
            s->scales[h] = __ldg(w.scales + in_tiles);
            s->absmax[h] = __ldg(w.nested_absmax + (first + cur->in_file) / GN_NESTED_BLOCK);
            s->offset[h] = w.offset;
        } else {
            s->scales[h] = __ldg((const uint32_t *)w.scales + in_tiles);
        }
    }
}

/* A step into registers that hold none. */
template <bool DQ>
static __device__ __forceinline__ void load_step(struct step *s, struct cursor *cur,
                                                 const struct program &p, int current, int warp,
                                                 int lane) {
    if (cur->holds) return;
    const int n = next_units(cur, p, current, warp, lane);
    if (n == 0) return;
    load_scales<DQ>(s, cur, n, lane);
    const struct halves codes = codes_of(cur, lane);
#pragma unroll
    for (int j = 0; j < UNITS; j++)
        if (j < n) load_unit(s, codes, j);
    cur->holds = true;
    advance(cur, lane);
}

#endif
