/* linear_simd.h - tiles of a product, over vector primitives.
 *
 * An instruction set's file defines, and then includes this:
 *
 *   operand, sum        vectors of operands and of partial sums; elem, one operand
 *   VECTORS             operand vectors that make a block of 64
 *   TILE_TOKENS         tokens whose sums fit in registers, beside 4 rows of operands: 6 or 2
 *   zero_sum(), store_sum(float *, sum)
 *   load_operand(const elem *), store_operand(elem *, operand)
 *   dot(sum, operand, operand)
 *   elem_of(float)      for a value already rounded to the compute dtype
 *   load_block(operand[VECTORS], tile, row, block, source)   weights of any source as operands */
#include "linear.h"

#include <string.h>

enum { DIRECT_TOKENS = TILE_TOKENS == 6 ? 4 : 2 };

INLINE const elem *x_of(const gn_linear_tile *tile, int token, int64_t block) {
    return (const elem *)(tile->x + token * tile->x_stride) + block * GN_BLOCK;
}

/* Each vector of x meets 4 rows, each vector of w all tokens: loads are a third of the work. */
INLINE void add_operands(sum sums[TILE_TOKENS][GN_TILE_ROWS], const gn_linear_tile *tile,
                         int tokens) {
    for (int64_t b = 0; b < tile->blocks; b++) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            const int at = v * (GN_BLOCK / VECTORS);
            operand w[GN_TILE_ROWS];
#pragma GCC unroll 4
            for (int r = 0; r < GN_TILE_ROWS; r++)
                w[r] = load_operand((const elem *)tile->w[r] + b * GN_BLOCK + at);
#pragma GCC unroll 6
            for (int t = 0; t < tokens; t++) {
                const operand x = load_operand(x_of(tile, t, b) + at);
#pragma GCC unroll 4
                for (int r = 0; r < GN_TILE_ROWS; r++) sums[t][r] = dot(sums[t][r], w[r], x);
            }
        }
    }
}

/* A block of weights is unpacked into registers and used for all tokens at once. */
INLINE void add_unpacked(sum sums[TILE_TOKENS][GN_TILE_ROWS], const gn_linear_tile *tile,
                         int tokens, gn_linear_source source) {
    for (int64_t b = 0; b < tile->blocks; b++) {
#pragma GCC unroll 4
        for (int r = 0; r < GN_TILE_ROWS; r++) {
            operand w[VECTORS];
            load_block(w, tile, r, b, source);
#pragma GCC unroll 6
            for (int t = 0; t < tokens; t++) {
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++)
                    sums[t][r] = dot(sums[t][r], w[v],
                                     load_operand(x_of(tile, t, b) + v * (GN_BLOCK / VECTORS)));
            }
        }
    }
}

INLINE void multiply_tile(const gn_linear_tile *tile, int tokens, gn_linear_source source) {
    sum sums[TILE_TOKENS][GN_TILE_ROWS];
#pragma GCC unroll 6
    for (int t = 0; t < tokens; t++) {
#pragma GCC unroll 4
        for (int r = 0; r < GN_TILE_ROWS; r++) sums[t][r] = zero_sum();
    }
    if (source == GN_SOURCE_OPERANDS)
        add_operands(sums, tile, tokens);
    else
        add_unpacked(sums, tile, tokens, source);
    const int lanes = (int)(sizeof(sum) / sizeof(float));
#pragma GCC unroll 6
    for (int t = 0; t < tokens; t++) {
#pragma GCC unroll 4
        for (int r = 0; r < GN_TILE_ROWS; r++)
            store_sum(tile->sums + (t * GN_TILE_ROWS + r) * lanes, sums[t][r]);
    }
}

/* One loop per source and number of tokens, so that sums stay in registers. */
#define CASE(n, source)                                                                            \
    case n:                                                                                        \
        multiply_tile(tile, n, source);                                                            \
        return;
#if TILE_TOKENS == 6
#define DIRECT_CASES(source) CASE(1, source) CASE(2, source) CASE(3, source) CASE(4, source)
#define TILE_CASES(source)   DIRECT_CASES(source) CASE(5, source) CASE(6, source)
#else
#define DIRECT_CASES(source) CASE(1, source) CASE(2, source)
#define TILE_CASES(source)   DIRECT_CASES(source)
#endif

static void multiply_operands(const gn_linear_tile *tile) {
    switch (tile->tokens) { TILE_CASES(GN_SOURCE_OPERANDS) }
}

static void multiply_nibbles(const gn_linear_tile *tile) {
    switch (tile->tokens) { DIRECT_CASES(GN_SOURCE_NIBBLES) }
}

static void multiply_int8(const gn_linear_tile *tile) {
    switch (tile->tokens) { DIRECT_CASES(GN_SOURCE_INT8) }
}

static void multiply_stored(const gn_linear_tile *tile) {
    switch (tile->tokens) { DIRECT_CASES(GN_SOURCE_STORED) }
}

static void multiply(const gn_linear_tile *tile) {
    switch (tile->source) {
    case GN_SOURCE_OPERANDS: multiply_operands(tile); return;
    case GN_SOURCE_NIBBLES: multiply_nibbles(tile); return;
    case GN_SOURCE_INT8: multiply_int8(tile); return;
    case GN_SOURCE_STORED: multiply_stored(tile); return;
    }
}

INLINE void decode_row(elem *dst, const gn_linear_tile *tile, gn_linear_source source) {
    for (int64_t b = 0; b < tile->blocks; b++) {
        operand w[VECTORS];
        load_block(w, tile, 0, b, source);
        for (int v = 0; v < VECTORS; v++)
            store_operand(dst + b * GN_BLOCK + v * (GN_BLOCK / VECTORS), w[v]);
    }
}

static void decode(void *dst, const gn_linear_tile *tile) {
    switch (tile->source) {
    case GN_SOURCE_OPERANDS: return; /* nothing to decode */
    case GN_SOURCE_NIBBLES: decode_row(dst, tile, GN_SOURCE_NIBBLES); return;
    case GN_SOURCE_INT8: decode_row(dst, tile, GN_SOURCE_INT8); return;
    case GN_SOURCE_STORED: decode_row(dst, tile, GN_SOURCE_STORED); return;
    }
}

INLINE void encode_block(elem *dst, const float *x, bool nibbles) {
    enum { HALF = GN_BLOCK / 2 };
    if (nibbles) {
        for (int i = 0; i < HALF; i++) {
            dst[i] = elem_of(x[2 * i]);
            dst[i + HALF] = elem_of(x[2 * i + 1]);
        }
    } else {
        for (int i = 0; i < GN_BLOCK; i++) dst[i] = elem_of(x[i]);
    }
}

static void encode(void *dst, const float *x, int64_t n, bool nibbles) {
    elem *out = dst;
    int64_t i = 0;
    for (; i + GN_BLOCK <= n; i += GN_BLOCK) encode_block(out + i, x + i, nibbles);
    if (i == n) return;
    float last[GN_BLOCK] = {0};
    memcpy(last, x + i, (size_t)(n - i) * sizeof *x);
    encode_block(out + i, last, nibbles);
}
