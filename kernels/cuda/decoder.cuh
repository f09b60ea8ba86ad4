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
    MAX_T = GN_DECODER_MAX_ROWS,
    MAX_D = 128,
    GROUP_ROWS = 2 * GN_CUDA_TILE_ROWS,
};

/* ---- the program ---- */

/* A weight in tiles. */
struct alignas(16) weight {
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
    /* RMSNorm's input times its weights, and the squares of that input, summed by groups; its
     * factor, one number a row, is applied to the product's sums. */
    bf16 *normed;           /* (T, hidden) */
    float *squares;         /* (MAX_T, hidden / GROUP_ROWS) */
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

/* Offsets. The table of decoded bytes is elsewhere: at an address whose low half is zero. */
enum {
    NESTED_AT = 0,
    FACTORS_AT = NESTED_AT + 256 * (int)sizeof(float),       /* (MAX_T) RMSNorm's */
    SLOTS_AT = FACTORS_AT + MAX_T * (int)sizeof(float),      /* (MAX_T) */
    ANGLES_AT = SLOTS_AT + MAX_T * (int)sizeof(struct slot), /* (MAX_T, MAX_D / 2) */
    PHASES_AT = ANGLES_AT + MAX_T * MAX_D / 2 * (int)sizeof(float2),
    PHASES = 3, /* at hand: the current one, the next, and one that is on its way */
    ITEM_AT = PHASES_AT + PHASES * (int)sizeof(struct phase), /* decoder_attention.cuh */
    LAST_AT = ITEM_AT + 32,                                   /* likewise */
    CURSORS_AT = LAST_AT + 32,                                /* (WARPS) during attention */
    LOW_BYTES = CURSORS_AT + WARPS * 64,
    TABLE = 1 << 16,   /* its address */
    ENTRY_BYTES = 256, /* of which it fills half */
    TABLE_BYTES = 256 * ENTRY_BYTES,
    SUMS_AT = TABLE + TABLE_BYTES, /* of a batch's groups; attention's records */
    SUMS_FLOATS = 24 * 1024,
    SHARED_BYTES = SUMS_AT + SUMS_FLOATS * (int)sizeof(float),
    RESERVED_BYTES = 1024, /* by the system, before all others */
};
static_assert(RESERVED_BYTES + LOW_BYTES <= TABLE, "the table begins after them");

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
    uint32_t scales[2];    /* of block lane % 4 of these rows; without double quantization (DQ) */
    float absmax[2], offset[2]; /* absmax is the scale */
};

/* A warp's steps in their order: for each phase, for each batch of groups, for each UNITS of its
 * blocks of columns, for each group. The cursor is at the step after the one that registers hold,
 * also across barriers. All lanes have the same. */
struct alignas(16) cursor {
    int at; /* phase */
    int batch_begin, batch_end, group, block;
    int left;  /* blocks of the warp from this one on; UNITS of them are the step's */
    int holds; /* registers hold a step */
    /* Offsets, in shared memory, of its halves' weights. The first half's blocks begin with
     * tile_block, the second's `apart` further, where a row has row_blocks. The next group's are
     * `stride` further, for `run` groups with this one; 0: to be found out. */
    int weight, other, tile_block, apart, row_blocks, stride, run;
};

static_assert(sizeof(struct cursor) == 64, "as there is room for");

static __device__ __forceinline__ void begin_batch(struct cursor *cur, const struct program &p,
                                                   struct range groups, struct range blocks,
                                                   int group) {
    cur->batch_begin = cur->group = group;
    cur->batch_end = min(group + p.batch_groups, groups.end);
    cur->block = blocks.begin;
    cur->left = blocks.end - blocks.begin;
}

/* From the end of a batch's groups to its next blocks, the next batch, or the next phase; false:
 * nothing for this warp. It does not look beyond attention, which needs the registers. */
static __device__ __forceinline__ bool find_step(struct cursor *cur, const struct program &p,
                                                 int current, int warp) {
    if (cur->batch_begin < cur->batch_end) {
        const struct phase &ph = *phase_at(cur->at);
        const struct range groups = groups_of(ph), blocks = blocks_of(ph, warp);
        cur->group = cur->batch_begin;
        cur->block += UNITS;
        cur->left -= UNITS;
        if (cur->left > 0) return true;
        begin_batch(cur, p, groups, blocks, cur->batch_end);
    }
    const int last = phase_at(current)->kind == QKV ? current : min(current + 1, p.n_phases - 1);
    while (cur->group == cur->batch_end && cur->at < last) {
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

/* Of half h of the cursor's step. */
static __device__ __forceinline__ const struct weight &weight_of(const struct cursor *cur, int h) {
    return *(const struct weight *)(shared + (h ? cur->other : cur->weight));
}
static __device__ __forceinline__ int block_of(const struct cursor *cur, int h) {
    return cur->tile_block + h * cur->apart;
}

/* The cursor's step, or that of a later group, on its way into L2: 8 lanes for each half. */
static __device__ __forceinline__ void prefetch_step(const struct cursor *cur, int groups,
                                                     int lane) {
    const int h = lane / 8 % 2, line = lane % 8 * 128;
    const int block = block_of(cur, h) + groups * cur->stride;
    if (lane < 16 && line < min(UNITS, cur->left) * GN_CUDA_TILE_BYTES)
        prefetch_line(weight_of(cur, h).tiles + (int64_t)block * GN_CUDA_TILE_BYTES + line);
}

static __device__ __forceinline__ void point(struct cursor *cur, const struct program &p,
                                             int lane) {
    const struct phase &ph = *phase_at(cur->at);
    int tile = 2 * cur->group, w = 0, other = 0;
    cur->apart = ph.blocks;
    cur->run = cur->batch_end - cur->group;
    cur->stride = 2 * ph.blocks;
    if (ph.kind == SWIGLU) {
        tile = cur->group;
        other = 1;
        cur->apart = 0;
        cur->stride = ph.blocks;
    } else if (ph.kind == QKV) {
        const int half = p.by_half.d;
        int first;
        w = other = head_weight(p, cur->group, &first);
        const int i = cur->group - first, in_head = i - quotient(i, p.by_half) * half;
        tile = 2 * i - in_head;
        cur->apart = half * ph.blocks;
        cur->run = min(cur->run, half - in_head);
        cur->stride = ph.blocks;
    }
    cur->weight = (int)((const uint8_t *)&ph.w[w] - shared);
    cur->other = (int)((const uint8_t *)&ph.w[other] - shared);
    cur->tile_block = tile * ph.blocks + cur->block;
    cur->row_blocks = ph.blocks;
    if (cur->run > 1) prefetch_step(cur, 1, lane);
}

static __device__ __forceinline__ void advance(struct cursor *cur, int lane) {
    cur->group++;
    cur->tile_block += cur->stride;
    cur->run--;
    if (cur->run > 1) prefetch_step(cur, 1, lane);
}

/* Blocks of the cursor's step; 0: there is none yet. */
static __device__ __forceinline__ int next_units(struct cursor *cur, const struct program &p,
                                                 int current, int warp, int lane) {
    if (cur->run <= 0) {
        if (cur->group == cur->batch_end && !find_step(cur, p, current, warp)) return 0;
        point(cur, p, lane);
    }
    return min(UNITS, cur->left);
}

/* Where a lane's codes of both halves of the cursor's step are. */
struct halves {
    const uint8_t *at[2];
};

/* Asks for the scales of the n blocks of the cursor's step; where its codes are. */
template <bool DQ>
static __device__ __forceinline__ struct halves
load_scales(struct step *s, const struct cursor *cur, int n, int lane) {
    struct halves codes;
    const int exists = n - lane % 4;
    const int in_file =
        lane / 4 * cur->row_blocks + lane % 4 - (GN_CUDA_TILE_ROWS - 1) * cur->block;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const struct weight w = weight_of(cur, h);
        const uint32_t first = (uint32_t)(block_of(cur, h) * GN_CUDA_TILE_ROWS);
        const uint32_t in_tiles = first + (uint32_t)(lane % 4 * GN_CUDA_TILE_ROWS + lane / 4);
        codes.at[h] = w.tiles + (int64_t)block_of(cur, h) * GN_CUDA_TILE_BYTES + lane * 8;
        if (DQ) {
            load_once(s->scales[h], w.scales + in_tiles, exists);
            load_once(s->absmax[h], w.nested_absmax + (first + (uint32_t)in_file) / GN_NESTED_BLOCK,
                      exists);
            s->offset[h] = w.offset;
        } else {
            load_once(s->absmax[h], (const float *)w.scales + in_tiles, exists);
        }
    }
    return codes;
}

/* Block j, if the step has n > j. */
static __device__ __forceinline__ void load_unit(struct step *s, struct halves codes, int j,
                                                 int n) {
#pragma unroll
    for (int h = 0; h < 2; h++)
        load_once(s->codes[j][h], codes.at[h] + j * GN_CUDA_TILE_BYTES, n - j);
}

/* A step into registers that hold none. */
template <bool DQ>
static __device__ __forceinline__ void load_step(struct step *s, struct cursor *cur,
                                                 const struct program &p, int current, int warp,
                                                 int lane) {
    if (cur->holds) return;
    const int n = next_units(cur, p, current, warp, lane);
    if (n == 0) return;
    const struct halves codes = load_scales<DQ>(s, cur, n, lane);
#pragma unroll
    for (int j = 0; j < UNITS; j++) load_unit(s, codes, j, n);
    cur->holds = 1;
    advance(cur, lane);
}

#endif
