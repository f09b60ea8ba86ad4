/* linear.cu - gn_linear on the GPU: which way a call goes. */
#include "linear.cuh"

gn_status gn_cuda_linear(gn_ctx *ctx, const gn_linear_args *args) {
    if (ctx->compute == GN_F32) return gn_cuda_linear_exact(ctx, args);
    if (args->dropout.p > 0 && max_rank_of(args) > 0) return gn_cuda_linear_dense(ctx, args);
    if (args->norm && args->x.dtype != GN_F32) return gn_cuda_linear_dense(ctx, args);
    const bool uses_mma = gn_cuda_linear_mma_fits(ctx, args);
    if (uses_mma && args->x.shape[0] >= GN_CUDA_MMA_MIN_ROWS) return gn_cuda_linear_mma(ctx, args);
    if (gn_cuda_linear_decode_fits(ctx, args)) return gn_cuda_linear_decode(ctx, args);
    return uses_mma ? gn_cuda_linear_mma(ctx, args) : gn_cuda_linear_dense(ctx, args);
}

size_t gn_cuda_linear_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                                int64_t max_rank, int max_terms) {
    if (ctx->compute == GN_F32)
        return gn_cuda_linear_exact_workspace(rows, max_k, max_n, max_rank, max_terms);
    const size_t bytes[] = {
        gn_cuda_linear_decode_workspace(max_rank, max_terms),
        gn_cuda_linear_mma_workspace(ctx, rows, max_k, max_n, max_rank, max_terms),
        gn_cuda_linear_dense_workspace(ctx, rows, max_k, max_n, max_rank, max_terms)};
    size_t most = 0;
    for (size_t i = 0; i < sizeof bytes / sizeof *bytes; i++)
        if (bytes[i] > most) most = bytes[i];
    return most;
}
