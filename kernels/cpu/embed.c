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
