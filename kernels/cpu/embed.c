/* embed.c - rows of the embedding table, widened to float32. */
#include "cpu.h"

gn_status gn_cpu_embed(gn_ctx *ctx, gn_tensor *y, const gn_matrix *table, const int32_t *ids,
                       const int32_t *drawn) {
    (void)ctx; /* a copy of a few rows: not worth waking threads for */
    const size_t row_bytes = (size_t)table->cols * gn_dtype_size(table->dtype);
    for (int64_t t = 0; t < y->shape[0]; t++) {
        const int32_t id = ids[t] < 0 ? drawn[-1 - ids[t]] : ids[t];
        gn_widen(gn_cpu_row(y, t), (const char *)table->data + (size_t)id * row_bytes, table->dtype,
                 table->cols);
    }
    return GN_OK;
}

struct embed_bwd {
    const gn_tensor *dtable, *dy;
    const int32_t *ids;
};

/* A thread owns columns, so that rows of the same id add up in order. */
static void add_columns(void *arg, const gn_cpu_team *team) {
    const struct embed_bwd *op = arg;
    const int64_t C = op->dy->shape[1];
    const int64_t first = gn_cpu_share(C, team->thread, team->n_threads);
    const int64_t last = gn_cpu_share(C, team->thread + 1, team->n_threads);
    for (int64_t t = 0; t < op->dy->shape[0]; t++) {
        float *to = gn_cpu_row(op->dtable, op->ids[t]);
        const float *from = gn_cpu_row(op->dy, t);
        for (int64_t c = first; c < last; c++) to[c] += from[c];
    }
}

gn_status gn_cpu_embed_bwd(gn_ctx *ctx, gn_tensor *dtable, const gn_tensor *dy,
                           const int32_t *ids) {
    struct embed_bwd op = {dtable, dy, ids};
    gn_cpu_parallel(ctx->pool, gn_tensor_numel(dy) < GN_CPU_SERIAL, add_columns, &op);
    return GN_OK;
}
