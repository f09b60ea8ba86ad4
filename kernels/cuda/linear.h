/* linear.h - the ways to a product, between the files that gn_cuda_linear chooses from. */
#ifndef GN_CUDA_LINEAR_H
#define GN_CUDA_LINEAR_H

#include "cuda.h"

/* linear_decode.cu: up to 16 rows in bfloat16 with 4-bit weights in tiles. `fits` says whether it
 * takes a call, whatever its LoRA terms; workspace is what terms need then. Gate and up of a SWIGLU
 * must have one and the same table of code values, as all weights of one type from one file do. */
bool gn_cuda_linear_decode_fits(const gn_ctx *ctx, const gn_linear_args *args);
gn_status gn_cuda_linear_decode(gn_ctx *ctx, const gn_linear_args *args);
size_t gn_cuda_linear_decode_workspace(int64_t max_rank, int max_terms);

/* linear_mma.cu: up to GN_CUDA_MMA_ROWS rows in bfloat16 with 4-bit weights in tiles, on Hopper;
 * faster than linear_decode.cu from GN_CUDA_MMA_MIN_ROWS on, and than linear_dense.cu as long as it
 * fits. All parts' weights must be of one type with one and the same table of code values, and have
 * a multiple of 256 columns. */
enum { GN_CUDA_MMA_MIN_ROWS = 9, GN_CUDA_MMA_ROWS = 512 };
bool gn_cuda_linear_mma_fits(const gn_ctx *ctx, const gn_linear_args *args);
gn_status gn_cuda_linear_mma(gn_ctx *ctx, const gn_linear_args *args);
size_t gn_cuda_linear_mma_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                                    int64_t max_rank, int max_terms);

/* linear_exact.cu: float32, any weight and shape; a row's sums run in an order of their own. */
gn_status gn_cuda_linear_exact(gn_ctx *ctx, const gn_linear_args *args);
/* y (T, rows of m) = x m^T by the same kernel; rows y_ld and x_ld apart. */
gn_status gn_cuda_exact_product(gn_ctx *ctx, float *y, int64_t y_ld, const gn_matrix *m,
                                const float *x, int64_t x_ld, int64_t T);
/* max_n: columns of all parts together. */
size_t gn_cuda_linear_exact_workspace(int64_t rows, int64_t max_k, int64_t max_n, int64_t max_rank,
                                      int max_terms);

/* linear_dense.cu: bfloat16, any weight and shape: dequantized, then multiplied by cuBLAS. The only
 * one of these in bfloat16 that knows dropout, and a norm of bfloat16 rows. */
gn_status gn_cuda_linear_dense(gn_ctx *ctx, const gn_linear_args *args);
size_t gn_cuda_linear_dense_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                                      int64_t max_rank, int max_terms);
/* What it needs for the calls of training: of at most one term, and without GN_SWIGLU. */
size_t gn_cuda_linear_dense_train_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k,
                                            int64_t max_n, int64_t max_rank);

/* lora.cu, in bfloat16: out (T, columns of all parts) f32 = what the call's terms add to each row,
 * zero where none does. x: (T, K) bf16, rows x_ld apart, aligned to 16 bytes. scratch:
 * gn_cuda_lora_bytes for calls of up to `rows` rows that up to `max_terms` terms cover each. Two
 * launches, whatever the terms; a recording serves any terms of the same number, ranks and rows
 * together. */
gn_status gn_cuda_lora(gn_ctx *ctx, const gn_linear_args *args, const void *x, int64_t x_ld,
                       void *scratch, float *out);
size_t gn_cuda_lora_bytes(const gn_ctx *ctx, int64_t rows, int64_t max_rank, int max_terms);
/* The call's `max_terms` for gn_cuda_lora_bytes: terms that cover a row, on the average. */
int gn_cuda_lora_terms_a_row(const gn_linear_args *args);

/* Its two launches; shrink for parts [part0, part0 + n_parts), of which x may be a copy under a
 * mask of their own. */
gn_status gn_cuda_lora_shrink(gn_ctx *ctx, const gn_linear_args *args, int part0, int n_parts,
                              const void *x, int64_t x_ld, void *scratch);
gn_status gn_cuda_lora_expand(gn_ctx *ctx, const gn_linear_args *args, void *scratch, float *out);

/* Instead of expanding, columns of the product: x and a part's weight w (N, K) become `columns`
 * wide, which is gn_cuda_lora_extended; extend writes them for one part: what shrink computed for
 * all rows of x (NULL: they have it already), and for rows [row0, row0 + rows) of the weight, which
 * begin at w, `columns` apart. The product is then that of x and w and what the terms add. */
int64_t gn_cuda_lora_extended(const gn_linear_args *args);
gn_status gn_cuda_lora_extend(gn_ctx *ctx, const gn_linear_args *args, int part, void *scratch,
                              void *x, int64_t x_ld, void *w, int64_t row0, int64_t rows,
                              int64_t columns);

#endif
