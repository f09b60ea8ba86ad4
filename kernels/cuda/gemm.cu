/* gemm.cu - cuBLAS, which counts by columns: it is asked for c^T = b^T a^T. */
#include "gemm.h"

static cudaDataType_t type_of(gn_dtype dtype) {
    return dtype == GN_BF16 ? CUDA_R_16BF : CUDA_R_32F;
}

gn_status gn_cuda_gemm(gn_ctx *ctx, int64_t m, int64_t n, int64_t k, float alpha, gn_cuda_factor a,
                       gn_cuda_factor b, float beta, void *c, gn_dtype c_dtype, int64_t ldc) {
    const int64_t sizes[] = {m, n, k, a.ld, b.ld, ldc};
    for (int i = 0; i < 6; i++)
        if (sizes[i] > INT32_MAX) return GN_ETOOBIG;
    const cudaDataType_t type = type_of(ctx->compute);
    const cublasComputeType_t compute =
        ctx->compute == GN_F32 ? CUBLAS_COMPUTE_32F_PEDANTIC : CUBLAS_COMPUTE_32F;
    const cublasStatus_t status = cublasGemmEx(
        ctx->cuda->blas, b.turned ? CUBLAS_OP_T : CUBLAS_OP_N, a.turned ? CUBLAS_OP_T : CUBLAS_OP_N,
        (int)n, (int)m, (int)k, &alpha, b.data, type, (int)b.ld, a.data, type, (int)a.ld, &beta, c,
        type_of(c_dtype), (int)ldc, compute, CUBLAS_GEMM_DEFAULT);
    return status == CUBLAS_STATUS_SUCCESS ? GN_OK : GN_EDEVICE;
}
