/* linear_simd.h - tiles of a product, over vector primitives.
 *
 * An instruction set's file defines, and then includes this:
 *
 *   operand, sum        vectors of operands and of partial sums; elem, one operand
 *   VECTORS             operand vectors that make a block of 64
 *   WAYS                codes that a lane of packed bytes gives: 32 * WAYS are a group
 *   TILE_TOKENS         tokens whose sums fit in registers, beside 4 rows of operands: 6 or 2
 *   zero_sum(), store_sum(float *, sum)
 *   load_operand(const elem *), store_operand(elem *, operand)
 *   dot(sum, operand, operand)
 *   elem_of(float)      for a value already rounded to the compute dtype
 *   load_group(operand[], tile, row, block, dtype, whole)    nibbles as operands, from `block`
 *       on; dtype is the tile's, and whole says that all of the group's blocks exist: constants,
 *       so that the loop has no tests
 *   load_block(operand[], tile, row, block, source)          one block of any other source */
#include "linear.h"

#include <string.h>

enum {
    DIRECT_TOKENS = TILE_TOKENS == 6 ? 4 : 2,
    GROUP = 32 * WAYS,
    GROUP_BLOCKS = GROUP / GN_BLOCK,
};

INLINE const elem *x_of(const gn_linear_tile *tile, int token, int64_t block) {
    return (const elem *)(tile->x + token * tile->x_stride) + block * GN_BLOCK;
}

/* Asks for what the same row of a tile to come has where this one has the `bytes` from `at` on.
 * The hardware's own prefetching does not follow the four short streams of a tile: half as
 * fast again. */
INLINE void prefetch(const gn_linear_tile *tile, int r, int64_t at, int bytes) {
    const uintptr_t then = (uintptr_t)tile->w[r] + (uintptr_t)(tile->ahead + at);
    for (int line = 0; line < bytes; line += 64)
        __builtin_prefetch((const char *)then + line, 0, 2);
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
            for (int r = 0; r < GN_TILE_ROWS; r++) {
                const int64_t from = b * GN_BLOCK + at;
                w[r] = load_operand((const elem *)tile->w[r] + from);
                if (tokens <= 2)
                    prefetch(tile, r, from * (int64_t)sizeof(elem), (int)sizeof(operand));
            }
#pragma GCC unroll 6
            for (int t = 0; t < tokens; t++) {
                const operand x = load_operand(x_of(tile, t, b) + at);
#pragma GCC unroll 4
                for (int r = 0; r < GN_TILE_ROWS; r++) sums[t][r] = dot(sums[t][r], w[r], x);
            }
        }
    }
}

/* Bytes of a row that a block takes. */
INLINE int block_bytes(gn_dtype dtype, gn_linear_source source) {
    if (source == GN_SOURCE_NIBBLES) return GN_BLOCK / 2;
    if (source == GN_SOURCE_INT8) return GN_BLOCK;
    return GN_BLOCK * (dtype == GN_F32 ? 4 : 2);
}

/* Weights from block b on, a group of nibbles or a block, are unpacked into registers and used
 * for all tokens at once. */
INLINE void add_step(sum sums[TILE_TOKENS][GN_TILE_ROWS], const gn_linear_tile *tile, int tokens,
                     gn_linear_source source, gn_dtype dtype, int64_t b, bool whole) {
    const int blocks = source == GN_SOURCE_NIBBLES ? GROUP_BLOCKS : 1;
    const int bytes = block_bytes(dtype, source);
#pragma GCC unroll 4
    for (int r = 0; r < GN_TILE_ROWS; r++) {
        operand w[GROUP_BLOCKS * VECTORS];
        if (source == GN_SOURCE_NIBBLES)
            load_group(w, tile, r, b, dtype, whole);
        else
            load_block(w, tile, r, b, source);
        prefetch(tile, r, b * bytes, blocks * bytes);
#pragma GCC unroll 6
        for (int t = 0; t < tokens; t++) {
#pragma GCC unroll 8
            for (int v = 0; v < blocks * VECTORS; v++)
                sums[t][r] = dot(sums[t][r], w[v],
                                 load_operand(x_of(tile, t, b) + v * (GN_BLOCK / VECTORS)));
        }
    }
}

INLINE void add_unpacked(sum sums[TILE_TOKENS][GN_TILE_ROWS], const gn_linear_tile *tile,
                         int tokens, gn_linear_source source, gn_dtype dtype) {
    const int step = source == GN_SOURCE_NIBBLES ? GROUP_BLOCKS : 1;
    const int64_t whole = tile->blocks / step * step;
    for (int64_t b = 0; b < whole; b += step) add_step(sums, tile, tokens, source, dtype, b, true);
    if (whole < tile->blocks) add_step(sums, tile, tokens, source, dtype, whole, false);
}

INLINE void multiply_tile(const gn_linear_tile *tile, int tokens, gn_linear_source source,
                          gn_dtype dtype) {
    sum sums[TILE_TOKENS][GN_TILE_ROWS];
#pragma GCC unroll 6
    for (int t = 0; t < tokens; t++) {
#pragma GCC unroll 4
        for (int r = 0; r < GN_TILE_ROWS; r++) sums[t][r] = zero_sum();
    }
    if (source == GN_SOURCE_OPERANDS)
        add_operands(sums, tile, tokens);
    else
        add_unpacked(sums, tile, tokens, source, dtype);
    const int lanes = (int)(sizeof(sum) / sizeof(float));
#pragma GCC unroll 6
    for (int t = 0; t < tokens; t++) {
#pragma GCC unroll 4
        for (int r = 0; r < GN_TILE_ROWS; r++)
            store_sum(tile->sums + (t * GN_TILE_ROWS + r) * lanes, sums[t][r]);
    }
}

/* One loop per source and number of tokens, so that sums stay in registers. */
#define CASE(n, ...)                                                                               \
    case n:                                                                                        \
        multiply_tile(tile, n, __VA_ARGS__);                                                       \
        return;
#if TILE_TOKENS == 6
#define DIRECT_CASES(...)                                                                          \
    CASE(1, __VA_ARGS__) CASE(2, __VA_ARGS__) CASE(3, __VA_ARGS__) CASE(4, __VA_ARGS__)
#define TILE_CASES(...) DIRECT_CASES(__VA_ARGS__) CASE(5, __VA_ARGS__) CASE(6, __VA_ARGS__)
#else
#define DIRECT_CASES(...) CASE(1, __VA_ARGS__) CASE(2, __VA_ARGS__)
#define TILE_CASES(...)   DIRECT_CASES(__VA_ARGS__)
#endif

static void multiply_operands(const gn_linear_tile *tile) {
    switch (tile->tokens) { TILE_CASES(GN_SOURCE_OPERANDS, tile->dtype) }
}

static void multiply_nibbles(const gn_linear_tile *tile) {
    if (tile->dtype == GN_BF16) /* what models are made from, and so what is worth a loop */
        switch (tile->tokens) { DIRECT_CASES(GN_SOURCE_NIBBLES, GN_BF16) }
    switch (tile->tokens) { DIRECT_CASES(GN_SOURCE_NIBBLES, tile->dtype) }
}

static void multiply_int8(const gn_linear_tile *tile) {
    switch (tile->tokens) { DIRECT_CASES(GN_SOURCE_INT8, tile->dtype) }
}

static void multiply_stored(const gn_linear_tile *tile) {
    switch (tile->tokens) { DIRECT_CASES(GN_SOURCE_STORED, tile->dtype) }
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
    const int step = source == GN_SOURCE_NIBBLES ? GROUP_BLOCKS : 1;
    for (int64_t b = 0; b < tile->blocks; b += step) {
        operand w[GROUP_BLOCKS * VECTORS];
        if (source == GN_SOURCE_NIBBLES)
            load_group(w, tile, 0, b, tile->dtype, b + step <= tile->blocks);
        else
            load_block(w, tile, 0, b, source);
        for (int v = 0; v < step * VECTORS; v++)
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

INLINE void encode_group(elem *restrict dst, const float *x) {
    for (int way = 0; way < WAYS; way++)
        for (int i = 0; i < 32; i++) dst[way * 32 + i] = elem_of(x[WAYS * i + way]);
}

INLINE void encode_block(elem *restrict dst, const float *x) {
    for (int i = 0; i < GN_BLOCK; i++) dst[i] = elem_of(x[i]);
}

static void encode(void *dst, const float *x, int64_t n, bool nibbles) {
    const int64_t step = nibbles ? GROUP : GN_BLOCK, whole = n / step * step;
    elem *out = dst;
    for (int64_t i = 0; i < whole; i += step)
        if (nibbles)
            encode_group(out + i, x + i);
        else
            encode_block(out + i, x + i);
    if (whole == n) return;
    float last[GROUP] = {0};
    memcpy(last, x + whole, (size_t)(n - whole) * sizeof *x);
    if (nibbles)
        encode_group(out + whole, last);
    else
        encode_block(out + whole, last);
}
