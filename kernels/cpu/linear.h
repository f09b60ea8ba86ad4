/* linear.h - what the files of the CPU's gn_linear share.
 *
 *   linear.c             lays out working memory, cuts the product into tiles, runs threads
 *   linear_reference.c   the whole op in plain loops with double sums: the yardstick, and all
 *                        there is on machines without SIMD code here
 *   linear_simd.h        the inner loops, written once over a few vector primitives
 *   linear_ISA.c         those primitives for one instruction set
 *
 * Products are dot products along K. A tile is 4 weight rows by a few tokens; each of its
 * sums has one vector of partial sums, to which the blocks of 64 columns are added in order,
 * then the LoRA terms, and which is folded into one number at the end. The steps for one
 * (token, row) are the same in a tile of any size, wherever the weight comes from. So one
 * token alone gives the same bits as in a batch.
 *
 * Operands are float32, or bfloat16 where the machine multiplies those. In a row of operands,
 * K is padded with zeros to whole blocks. Where 4-bit weights are concerned, operands stand in
 * the order in which codes fall out of a vector of packed bytes: a kernel reads `ways` codes
 * from each of 32 lanes by shifting, so that 32 * ways elements are a group, which holds first
 * its elements 0, ways, 2 ways, ..., then 1, ways + 1, and so on. */
#ifndef GN_CPU_LINEAR_H
#define GN_CPU_LINEAR_H

#include "cpu.h"

enum { GN_TILE_ROWS = 4, GN_TILE_TOKENS = 6 /* at most */, GN_TILE_LANES = 16 /* at most */ };

/* What a row of weights is made of. */
typedef enum gn_linear_source {
    GN_SOURCE_OPERANDS, /* ready to multiply */
    GN_SOURCE_NIBBLES,  /* 4-bit codes and a scale a block of 64 */
    GN_SOURCE_INT8,     /* codes and one scale */
    GN_SOURCE_STORED,   /* F32, F16 or BF16 */
} gn_linear_source;

typedef struct gn_linear_tile {
    gn_linear_source source;
    gn_dtype dtype, compute; /* what a value is rounded to: first, and then */
    int tokens;
    int64_t blocks; /* of 64 columns */
    const void *w[GN_TILE_ROWS];
    const float *scale[GN_TILE_ROWS]; /* nibbles: one a block; INT8: one */
    const float *code;                /* of nibbles */
    const char *x;                    /* operands */
    int64_t x_stride;                 /* bytes */
    int64_t ahead;                    /* bytes from w[0] to what is wanted soon */
    float *sums;                      /* [tokens][GN_TILE_ROWS][lanes] */
} gn_linear_tile;

typedef struct gn_linear_kernel {
    int operand_bytes;
    int lanes;         /* floats of a vector of sums */
    int ways;          /* see above: 2 or 4 */
    int tile_tokens;   /* with operands */
    int direct_tokens; /* with any other source; for more tokens make operands first */
    void (*multiply)(const gn_linear_tile *tile);
    /* Row w[0] as operands; nibbles in whole groups. */
    void (*decode)(void *dst, const gn_linear_tile *tile);
    /* n floats, already rounded to the compute dtype, as operands: in order and padded to a whole
     * block, or as nibbles fall and padded to a whole group. */
    void (*encode)(void *dst, const float *x, int64_t n, bool nibbles);
    /* Scales of n blocks from `first` on, a multiple of 16, double-quantized. */
    void (*scales)(float *dst, const gn_matrix *m, int64_t first, int64_t n);
    /* sums += B u for `tokens` rows u (rank, padded with zeros to whole vectors) and 4 rows of B.
     */
    void (*add_low_rank)(float *sums, int tokens, const void *const b[GN_TILE_ROWS], gn_dtype dtype,
                         const float *u, int64_t u_stride, int64_t rank);
    /* values[tokens][4] = the lanes' sums. */
    void (*finish)(float *values, const float *sums, int tokens);
} gn_linear_kernel;

extern const gn_linear_kernel gn_linear_avx2, gn_linear_avx512, gn_linear_avx512bf16;

/* Members that kernels share. */
void gn_linear_scales_plain(float *dst, const gn_matrix *m, int64_t first, int64_t n);
void gn_linear_scales_avx512(float *dst, const gn_matrix *m, int64_t first, int64_t n);
void gn_linear_add_low_rank_avx512(float *sums, int tokens, const void *const b[GN_TILE_ROWS],
                                   gn_dtype dtype, const float *u, int64_t u_stride, int64_t rank);
void gn_linear_finish_avx512(float *values, const float *sums, int tokens);

/* A piece of working memory, on cache lines of its own: adds its size, returns where it starts. */
static inline size_t gn_linear_piece(size_t *total, size_t bytes) {
    const size_t at = *total;
    *total += (bytes + 63) / 64 * 64;
    return at;
}

/* Takes less time than waking a thread. */
bool gn_linear_is_small(const gn_linear_args *args);

gn_status gn_cpu_linear_reference(gn_ctx *ctx, const gn_linear_args *args);

/* What a term adds to a part: rank 0 when nothing. */
static inline const gn_lora_pair *gn_linear_pair(const gn_linear_args *args, int part, int term) {
    return &args->lora[term].pairs[args->pair + part];
}

/* Rounds to the compute dtype, staying float32. */
static inline float gn_linear_round(float x, gn_dtype compute) {
    return compute == GN_BF16 ? gn_bf16_to_f32(gn_f32_to_bf16(x)) : x;
}

/* dst = row t of x, normalised if asked, rounded to the compute dtype. */
void gn_linear_input_row(float *dst, const gn_linear_args *args, int64_t t, gn_dtype compute);
/* dst = x under the dropout mask of row t of `part`'s A: what A multiplies, or what comes back
 * through it. dst may be x. */
void gn_linear_drop_row(float *dst, const float *x, const gn_linear_args *args, int part,
                        int64_t t);

#endif
