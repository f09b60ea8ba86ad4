/* embed.c - rows of the embedding table, widened to float32. */
#include "cpu.h"

gn_status gn_cpu_embed(gn_ctx *ctx, gn_tensor *y, const gn_matrix *table, const int32_t *ids) {
    (void)ctx; /* a copy of a few rows: not worth waking threads for */
    const size_t row_bytes = (size_t)table->cols * gn_dtype_size(table->dtype);
    for (int64_t t = 0; t < y->shape[0]; t++)
        gn_widen(gn_cpu_row(y, t), (const char *)table->data + (size_t)ids[t] * row_bytes,
                 table->dtype, table->cols);
    return GN_OK;
}
