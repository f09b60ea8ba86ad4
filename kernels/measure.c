/* measure.c - checks what is to be measured, and lets the backend do it. */
#include "measure.h"

#include "backend.h"

gn_status gn_measure_rates(gn_ctx *ctx, gn_rates *rates) {
    return ctx && rates ? ctx->backend->measure_rates(ctx, rates) : GN_EINVAL;
}

gn_status gn_measure_quantize(gn_ctx *ctx, gn_qtype type, bool double_quant, int64_t rows,
                              int64_t cols, double *quantize, double *dequantize) {
    int64_t numel;
    if (!ctx || !quantize || !dequantize || rows < 1 || cols < 1 ||
        (type != GN_Q_INT8 && !gn_qtype_is_4bit(type)) ||
        __builtin_mul_overflow(rows, cols, &numel) || numel > PTRDIFF_MAX / 8)
        return GN_EINVAL;
    return ctx->backend->measure_quantize(ctx, type, double_quant && gn_qtype_is_4bit(type), rows,
                                          cols, quantize, dequantize);
}

size_t gn_measure_used_bytes(gn_ctx *ctx) {
    gn_ctx_memory memory;
    if (gn_ctx_is_host(ctx) || gn_ctx_read_memory(ctx, &memory)) return 0;
    return (size_t)(memory.total - memory.free);
}
