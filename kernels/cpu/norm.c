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

static double inverse_rms(const float *x, float eps, int64_t n) {
    return 1.0 / sqrt(sum_of_squares(x, n) / (double)n + eps);
}

void gn_cpu_rmsnorm_row(float *y, const float *x, const float *w, float eps, int64_t n) {
    const float r = (float)inverse_rms(x, eps, n);
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

struct rmsnorm_bwd {
    const gn_tensor *dx, *dw, *dy, *skip, *x;
    const float *w;
    float eps;
    float *rms; /* (T) inverse, for dw */
};

/* With r = 1/rms(x) and g = w * dy: dx = r g - x r^3 mean(g x). */
static void rmsnorm_bwd_row(const struct rmsnorm_bwd *op, int64_t t) {
    const int64_t C = op->x->shape[1];
    const float *x = gn_cpu_row(op->x, t), *dy = gn_cpu_row(op->dy, t), *w = op->w;
    const float *skip = op->skip ? gn_cpu_row(op->skip, t) : NULL;
    float *dx = gn_cpu_row(op->dx, t);
    const double r = inverse_rms(x, op->eps, C);
    double dot = 0;
    for (int64_t c = 0; c < C; c++) dot += (double)w[c] * dy[c] * x[c];
    const float scale = (float)r, along = (float)(r * r * r * dot / (double)C);
    if (op->rms) op->rms[t] = scale;
    for (int64_t c = 0; c < C; c++)
        dx[c] = (skip ? skip[c] : 0.0f) + (scale * w[c] * dy[c] - along * x[c]);
}

static void add_weight_gradient(const struct rmsnorm_bwd *op, int64_t c) {
    double sum = 0;
    for (int64_t t = 0; t < op->x->shape[0]; t++)
        sum += (double)op->rms[t] * gn_cpu_row(op->x, t)[c] * gn_cpu_row(op->dy, t)[c];
    ((float *)op->dw->data)[c] += (float)sum;
}

static void rmsnorm_bwd_rows(void *arg, const gn_cpu_team *team) {
    const struct rmsnorm_bwd *op = arg;
    const int64_t T = op->x->shape[0], C = op->x->shape[1];
    int64_t last = gn_cpu_share(T, team->thread + 1, team->n_threads);
    for (int64_t t = gn_cpu_share(T, team->thread, team->n_threads); t < last; t++)
        rmsnorm_bwd_row(op, t);
    if (!op->rms) return;
    gn_cpu_barrier(team);
    last = gn_cpu_share(C, team->thread + 1, team->n_threads);
    for (int64_t c = gn_cpu_share(C, team->thread, team->n_threads); c < last; c++)
        add_weight_gradient(op, c);
}

gn_status gn_cpu_rmsnorm_bwd(gn_ctx *ctx, gn_tensor *dx, gn_tensor *rounded, gn_tensor *dw,
                             const gn_tensor *dy, const gn_tensor *skip, const gn_tensor *x,
                             const gn_tensor *w, float eps) {
    struct rmsnorm_bwd op = {dx, dw, dy, skip, x, w->data, eps, NULL};
    if (dw->data) {
        if ((size_t)x->shape[0] * sizeof *op.rms > ctx->workspace_bytes) return GN_ENOMEM;
        op.rms = ctx->workspace;
    }
    gn_cpu_parallel(ctx->pool, gn_tensor_numel(x) < GN_CPU_SERIAL, rmsnorm_bwd_rows, &op);
    return rounded ? gn_cpu_convert(ctx, rounded, dx) : GN_OK;
}
