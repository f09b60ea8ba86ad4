/* norm.c - RMSNorm. The sum of squares is taken in double, in eight interleaved partial sums
 * that the compiler can keep in vectors; a norm is a thousandth of the product after it. */
#include "cpu.h"

#include <math.h>

static double sum_of_squares(const float *x, int64_t n) {
    double part[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) part[j] += (double)x[i + j] * x[i + j];
    for (int j = 0; i < n; i++, j++) part[j] += (double)x[i] * x[i];
    return ((part[0] + part[1]) + (part[2] + part[3])) +
           ((part[4] + part[5]) + (part[6] + part[7]));
}

void gn_cpu_rmsnorm_row(float *y, const float *x, const float *w, float eps, int64_t n) {
    const float r = (float)(1.0 / sqrt(sum_of_squares(x, n) / (double)n + eps));
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * r * w[i];
}

struct rmsnorm {
    const gn_tensor *y, *x;
    const float *w;
    float eps;
};

static void rmsnorm_rows(void *arg, const gn_cpu_team *team) {
    const struct rmsnorm *op = arg;
    const int64_t T = op->x->shape[0];
    const int64_t last = gn_cpu_share(T, team->thread + 1, team->n_threads);
    for (int64_t t = gn_cpu_share(T, team->thread, team->n_threads); t < last; t++)
        gn_cpu_rmsnorm_row(gn_cpu_row(op->y, t), gn_cpu_row(op->x, t), op->w, op->eps,
                           op->x->shape[1]);
}

gn_status gn_cpu_rmsnorm(gn_ctx *ctx, gn_tensor *y, const gn_tensor *x, const gn_tensor *w,
                         float eps) {
    struct rmsnorm op = {y, x, w->data, eps};
    gn_cpu_parallel(ctx->pool, gn_tensor_numel(x) < GN_CPU_SERIAL, rmsnorm_rows, &op);
    return GN_OK;
}
