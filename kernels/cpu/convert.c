/* convert.c - tensors from one dtype to another. Twin: cuda/convert.cu. */
#include "cpu.h"

#include <string.h>

struct convert {
    const gn_tensor *y, *x;
};

static void *row_of(const gn_tensor *t, int64_t row) {
    return (char *)t->data + (size_t)(row * t->ld) * gn_dtype_size(t->dtype);
}

static void convert_row(void *y, gn_dtype to, const void *x, gn_dtype from, int64_t n) {
    if (to == from)
        memcpy(y, x, (size_t)n * gn_dtype_size(to));
    else if (to == GN_F32)
        gn_widen(y, x, from, n);
    else
        gn_narrow(y, to, x, n);
}

static void convert_rows(void *arg, const gn_cpu_team *team) {
    const struct convert *op = arg;
    const int64_t T = op->x->shape[0];
    const int64_t last = gn_cpu_share(T, team->thread + 1, team->n_threads);
    for (int64_t t = gn_cpu_share(T, team->thread, team->n_threads); t < last; t++)
        convert_row(row_of(op->y, t), op->y->dtype, row_of(op->x, t), op->x->dtype,
                    op->x->shape[1]);
}

gn_status gn_cpu_convert(gn_ctx *ctx, gn_tensor *y, const gn_tensor *x) {
    struct convert op = {y, x};
    gn_cpu_parallel(ctx->pool, gn_tensor_numel(x) < GN_CPU_SERIAL, convert_rows, &op);
    return GN_OK;
}
