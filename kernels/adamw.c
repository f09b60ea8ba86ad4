/* adamw.c - checks an update, then hands it to the context's backend. */
#include "adamw.h"

#include <math.h>

#include "backend.h"

static bool is_vector(const gn_tensor *t, int64_t n) {
    return t->ndim == 1 && t->ld == 1 && t->shape[0] == n && (t->data || n == 0) &&
           (uintptr_t)t->data % gn_dtype_size(t->dtype) == 0;
}

static bool is_f32_or_bf16(const gn_tensor *t) {
    return t->dtype == GN_F32 || t->dtype == GN_BF16;
}

static bool is_moment(const gn_moment *m, gn_dtype dtype, int64_t n) {
    if (m->values.dtype != dtype || !is_vector(&m->values, n)) return false;
    return dtype == GN_F32 || n == 0 ||
           (m->absmax && (uintptr_t)m->absmax % sizeof *m->absmax == 0);
}

static bool is_share(float x) {
    return x >= 0 && x < 1;
}

gn_status gn_adamw(gn_ctx *ctx, const gn_adamw_args *args) {
    if (!ctx || !args || args->step < 1 || !is_share(args->beta1) || !is_share(args->beta2))
        return GN_EINVAL;
    if (!isfinite(args->lr) || !isfinite(args->grad_scale) || !isfinite(args->weight_decay) ||
        !(args->eps >= 0) || !isfinite(args->eps))
        return GN_EINVAL;
    const int64_t n = args->master.shape[0];
    const gn_dtype moments = args->m.values.dtype;
    if (n < 0 || n > PTRDIFF_MAX / 8 || args->master.dtype != GN_F32 ||
        !is_vector(&args->master, n) || !is_f32_or_bf16(&args->grad) || !is_vector(&args->grad, n))
        return GN_EINVAL;
    if (args->weight.data && (!is_f32_or_bf16(&args->weight) || !is_vector(&args->weight, n)))
        return GN_EINVAL;
    if ((moments != GN_F32 && moments != GN_U8) || !is_moment(&args->m, moments, n) ||
        !is_moment(&args->v, moments, n))
        return GN_EINVAL;
    return n == 0 ? GN_OK : ctx->backend->adamw(ctx, args);
}

gn_status gn_sum_squares(gn_ctx *ctx, double *sum, const gn_tensor *x) {
    if (!ctx || !sum || !x || !is_f32_or_bf16(x) || x->shape[0] < 0 ||
        x->shape[0] > PTRDIFF_MAX / 8 || !is_vector(x, x->shape[0]))
        return GN_EINVAL;
    if (ctx->workspace_bytes < GN_SUM_WORKSPACE) return GN_ENOMEM;
    return x->shape[0] == 0 ? GN_OK : ctx->backend->sum_squares(ctx, sum, x);
}

float gn_clip_scale(double norm, double max_norm) {
    if (max_norm <= 0) return 1;
    const double scale = max_norm / (norm + 1e-6);
    return scale < 1 ? (float)scale : 1;
}

gn_adamw_factors gn_adamw_factors_of(const gn_adamw_args *args) {
    const double correction1 = 1 - pow(args->beta1, (double)args->step);
    const double correction2 = sqrt(1 - pow(args->beta2, (double)args->step));
    return (gn_adamw_factors){
        .step_size = (float)(-args->lr * correction2 / correction1),
        .eps = (float)(args->eps * correction2),
        .keep = 1 - args->lr * args->weight_decay,
    };
}
