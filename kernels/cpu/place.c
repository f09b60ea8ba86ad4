/* place.c - weights on the CPU are used where they are, or quantized into the caller's memory. */
#include "cpu.h"

#include <stdlib.h>

size_t gn_cpu_place_bytes(const gn_ctx *ctx, const gn_matrix *host) {
    (void)ctx, (void)host;
    return 0;
}

gn_status gn_cpu_place(gn_ctx *ctx, gn_matrix *out, const gn_matrix *host, void *memory) {
    (void)ctx, (void)memory;
    *out = *host;
    return GN_OK;
}

/* Where the scales and the scales' own scales stand after the codes, on cache lines of their own.
 */
typedef struct layout {
    size_t scales, nested_absmax, bytes;
} layout;

static layout layout_of(gn_quant_sizes sizes, bool nested) {
    const size_t line = 64;
    layout l = {.scales = (sizes.data + line - 1) / line * line};
    l.nested_absmax = l.scales + (sizes.absmax_u8 + line - 1) / line * line;
    l.bytes = nested ? l.nested_absmax + sizes.nested_absmax : l.scales + sizes.absmax;
    return l;
}

size_t gn_cpu_quantize_place_bytes(const gn_ctx *ctx, gn_qtype type, bool double_quant,
                                   int64_t rows, int64_t cols) {
    (void)ctx;
    return layout_of(gn_quant_sizes_of(type, double_quant, rows, cols), double_quant).bytes;
}

gn_status gn_cpu_quantize_place(gn_ctx *ctx, gn_matrix *out, gn_qtype type, bool double_quant,
                                const void *src, gn_dtype dtype, int64_t rows, int64_t cols,
                                void *memory, gn_error *err) {
    const gn_quant_sizes sizes = gn_quant_sizes_of(type, double_quant, rows, cols);
    const layout l = layout_of(sizes, double_quant);
    char *bytes = memory;
    float *scratch = double_quant ? malloc(sizes.absmax) : NULL;
    if (double_quant && !scratch) return gn_fail(err, GN_ENOMEM, "out of memory");
    gn_quant_out to = {.data = memory};
    to.absmax = double_quant ? scratch : (float *)(bytes + l.scales);
    to.absmax_u8 = double_quant ? (uint8_t *)bytes + l.scales : NULL;
    to.nested_absmax = double_quant ? (float *)(bytes + l.nested_absmax) : NULL;
    const gn_status status =
        gn_quantize(&to, type, src, dtype, rows, cols, gn_ctx_threads(ctx), err);
    free(scratch);
    if (status) return status;
    const bool is_4bit = gn_qtype_is_4bit(type);
    *out = (gn_matrix){.qtype = type, .dtype = dtype, .rows = rows, .cols = cols, .data = to.data};
    out->code = is_4bit ? gn_code_values(type) : NULL;
    out->absmax = double_quant ? NULL : to.absmax;
    out->absmax_u8 = to.absmax_u8;
    out->nested_code = double_quant ? gn_dynamic_map() : NULL;
    out->nested_absmax = to.nested_absmax;
    out->offset = to.offset;
    return GN_OK;
}
