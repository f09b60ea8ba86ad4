/* blas.cc - the call of cuBLAS that kernels/cuda makes, as plain loops with double sums. */
#include "kernels/cuda/cuda.h"

static float value(const void *m, cudaDataType type, int64_t i) {
    return type == CUDA_R_16BF ? gn_bf16_to_f32(((const uint16_t *)m)[i]) : ((const float *)m)[i];
}

extern "C" cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t op_a,
                                       cublasOperation_t op_b, int m, int n, int k,
                                       const void *alpha, const void *a, cudaDataType a_type,
                                       int lda, const void *b, cudaDataType b_type, int ldb,
                                       const void *beta, void *c, cudaDataType c_type, int ldc,
                                       cublasComputeType_t, cublasGemmAlgo_t) {
    const float scale = *(const float *)alpha, keep = *(const float *)beta;
    if (lda < (op_a == CUBLAS_OP_N ? m : k) || ldb < (op_b == CUBLAS_OP_N ? k : n) || ldc < m ||
        m < 1 || n < 1 || k < 1)
        return CUBLAS_STATUS_INVALID_VALUE;
#pragma omp parallel for
    for (int j = 0; j < n; j++)
        for (int i = 0; i < m; i++) {
            double sum = 0;
            for (int64_t l = 0; l < k; l++)
                sum += (double)value(a, a_type, op_a == CUBLAS_OP_N ? l * lda + i : i * lda + l) *
                       value(b, b_type, op_b == CUBLAS_OP_N ? (int64_t)j * ldb + l : l * ldb + j);
            const int64_t at = (int64_t)j * ldc + i;
            double result = scale * sum;
            if (keep != 0) result += keep * (double)value(c, c_type, at);
            if (c_type == CUDA_R_16BF)
                ((uint16_t *)c)[at] = gn_f32_to_bf16((float)result);
            else
                ((float *)c)[at] = (float)result;
        }
    return CUBLAS_STATUS_SUCCESS;
}
