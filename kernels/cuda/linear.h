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

#endif
