/* operands.h - what products multiply, made from what ops are given. */
#ifndef GN_CUDA_OPERANDS_H
#define GN_CUDA_OPERANDS_H

#include "cuda.h"

/* What is done to rows on their way: first the norm, then the mask. */
typedef struct gn_cuda_operands_args {
    const gn_tensor *norm; /* or NULL */
    float eps;
    gn_dropout dropout;
    int module;   /* of the mask */
    int64_t row0; /* the batch's row that is row 0 here, for the mask */
} gn_cuda_operands_args;

/* to (T, C) = x (T, C), converted to to's dtype; args NULL: nothing else is done. */
gn_status gn_cuda_operands(gn_ctx *ctx, const gn_tensor *to, const gn_tensor *x,
                           const gn_cuda_operands_args *args);
/* y += the mask times x; args NULL: y += x. */
gn_status gn_cuda_add(gn_ctx *ctx, const gn_tensor *y, const gn_tensor *x,
                      const gn_cuda_operands_args *args);

/* ---- weights ---- */

/* Some rows and columns of a weight. Of one in tiles (cuda.h): whole tiles, but at its end. */
typedef struct gn_cuda_region {
    int64_t row0, rows, col0, cols;
} gn_cuda_region;

/* to (rows, cols), rows ld apart = those values; dtype F32 or BF16. Rows of `to` start at multiples
 * of 16 bytes when the weight is in tiles. */
gn_status gn_cuda_dequantize(gn_ctx *ctx, const gn_matrix *m, const gn_cuda_region *r, void *to,
                             int64_t ld, gn_dtype dtype);

/* A weight that products multiply as it stands. */
static inline bool gn_cuda_is_stored(const gn_ctx *ctx, const gn_matrix *m) {
    return m->qtype == GN_Q_NONE && m->dtype == ctx->compute;
}

/* A large weight is dequantized in pieces of about so many values: enough rows or columns for a
 * product of full speed, in little memory. */
enum { GN_CUDA_PIECE = 48 << 20 };

static inline int64_t gn_cuda_piece(int64_t all, int64_t per_one, int64_t step) {
    const int64_t n = GN_CUDA_PIECE / per_one / step * step;
    return n >= all ? all : n > step ? n : step < all ? step : all;
}
/* Rows at a time of `cols` values each, and columns at a time of a weight of so many rows. */
static inline int64_t gn_cuda_piece_rows(int64_t rows, int64_t cols) {
    return gn_cuda_piece(rows, cols, GN_CUDA_TILE_ROWS);
}
static inline int64_t gn_cuda_piece_cols(int64_t rows, int64_t cols) {
    return gn_cuda_piece(cols, rows, GN_BLOCK);
}
/* No piece of a weight of at most this size has more values. */
static inline int64_t gn_cuda_piece_bound(int64_t rows, int64_t cols) {
    int64_t most = GN_CUDA_PIECE;
    if (most < rows * GN_BLOCK) most = rows * GN_BLOCK;
    if (most < cols * GN_CUDA_TILE_ROWS) most = cols * GN_CUDA_TILE_ROWS;
    return most < rows * cols ? most : rows * cols;
}

#endif
