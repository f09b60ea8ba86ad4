/* linear.c - products with quantized weights. */
#include "linear.h"

void gn_linear_input_row(float *dst, const gn_linear_args *args, int64_t t, gn_dtype compute) {
    const float *x = gn_cpu_row(&args->x, t);
    const int64_t K = args->x.shape[1];
    if (args->norm) {
        gn_cpu_rmsnorm_row(dst, x, args->norm->data, args->eps, K);
        x = dst;
    }
    for (int64_t k = 0; k < K; k++) dst[k] = gn_linear_round(x[k], compute);
}

size_t gn_cpu_linear_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                               int64_t max_rank, int max_terms) {
    (void)max_n;
    const size_t slack = 64 * (2 + GN_MAX_PARTS);
    return ((size_t)(rows + ctx->threads) * (size_t)max_k +
            GN_MAX_PARTS * (size_t)rows * (size_t)max_rank * (size_t)max_terms) *
               sizeof(float) +
           slack;
}

gn_status gn_cpu_linear(gn_ctx *ctx, const gn_linear_args *args) {
    return gn_cpu_linear_reference(ctx, args);
}
