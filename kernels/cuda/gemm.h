/* gemm.h - products of matrices by cuBLAS, for training and for many rows. */
#ifndef GN_CUDA_GEMM_H
#define GN_CUDA_GEMM_H

#include "cuda.h"

/* A row-major matrix in the compute dtype, rows `ld` apart; turned: what stands there is its
 * transpose. */
typedef struct gn_cuda_factor {
    const void *data;
    int64_t ld;
    bool turned;
} gn_cuda_factor;

static inline gn_cuda_factor gn_cuda_turned(gn_cuda_factor f) {
    f.turned = !f.turned;
    return f;
}

/* c (m, n) = alpha a b + beta c, with a (m, k) and b (k, n); c is float32, or has the compute
 * dtype. Sums are float32, in an order that only the sizes decide. In float32 every product is
 * exact to float32 (no TF32). */
gn_status gn_cuda_gemm(gn_ctx *ctx, int64_t m, int64_t n, int64_t k, float alpha, gn_cuda_factor a,
                       gn_cuda_factor b, float beta, void *c, gn_dtype c_dtype, int64_t ldc);

#endif
