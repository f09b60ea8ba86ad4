/* blockquant.h - block-wise 4-bit and row-wise 8-bit weights: the specification.
 *
 * A weight (rows, cols) is cut along its flattened row-major order into blocks of 64
 * values. Each block stores its largest magnitude (absmax, float32) and one 4-bit code
 * a value: the nearest of 16 code values to value/absmax. Two codes share a byte, the
 * even element in the high nibble. With double quantization (QLoRA, section 3) the
 * absmax values themselves are stored in 8 bits: less their mean (the offset), in blocks
 * of 256 with a float32 absmax each, on bitsandbytes' signed dynamic map.
 *
 * Layout and values are those of bitsandbytes, so that its files load here and ours
 * there. Int8 is row-wise: code = round(127 * value / absmax(row)). */
#ifndef GN_BLOCKQUANT_H
#define GN_BLOCKQUANT_H

#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { GN_BLOCK = 64, GN_NESTED_BLOCK = 256 };

/* enum, command line's name */
#define GN_QTYPE_MAP(X)                                                                            \
    X(NONE, "none")         /* plain 16- or 32-bit values */                                       \
    X(NF4, "nf4")           /* NormalFloat 4 (QLoRA, appendix E) */                                \
    X(FP4, "fp4")           /* bitsandbytes' FP4 */                                                \
    X(FP4_E2M1, "fp4-e2m1") /* sign, 2 exponent bits, 1 mantissa bit */                            \
    X(FP4_E3M0, "fp4-e3m0") /* sign, 3 exponent bits */                                            \
    X(INT4, "int4")         /* -7 ... 7 over absmax */                                             \
    X(INT8, "int8")         /* row-wise, -127 ... 127 */

typedef enum gn_qtype {
#define X(name, text) GN_Q_##name,
    GN_QTYPE_MAP(X)
#undef X
        GN_QTYPE_COUNT
} gn_qtype;

const char *gn_qtype_name(gn_qtype type);
/* GN_EINVAL for a name not in GN_QTYPE_MAP. */
GN_CHECKED gn_status gn_qtype_parse(gn_qtype *out, const char *name);
static inline bool gn_qtype_is_4bit(gn_qtype t) {
    return t >= GN_Q_NF4 && t <= GN_Q_INT4;
}

/* The 16 values a 4-bit type's codes stand for, by code. */
const float *gn_code_values(gn_qtype type);
/* bitsandbytes' signed 8-bit dynamic map, ascending, 256 values. */
const float *gn_dynamic_map(void);

/* One weight of a linear map, y = W x, in any of the types. Pointers are borrowed.
 * NONE: data holds (rows, cols) values of `dtype`.
 * 4-bit: data holds ceil(rows*cols/2) bytes, and ceil(rows*cols/64) scales stand either
 *   in absmax, or double-quantized in absmax_u8 + nested_absmax + offset, where
 *   scale(b) = nested_code[absmax_u8[b]] * nested_absmax[b/256] + offset, rounded after each step.
 * INT8: data holds (rows, cols) int8, absmax one float a row.
 * `dtype` is the float type a dequantized value is rounded to (bitsandbytes dequantizes
 * to the type the weight was made from, whatever the arithmetic). */
typedef struct gn_matrix {
    gn_qtype qtype;
    gn_dtype dtype;
    int64_t rows, cols;
    const void *data;
    const float *code; /* 16 values; gn_code_values(qtype), or a file's own */
    const float *absmax;
    const uint8_t *absmax_u8;
    const float *nested_code; /* 256 values */
    const float *nested_absmax;
    float offset;
} gn_matrix;

/* Bytes each array of a quantized (rows, cols) matrix needs. */
typedef struct gn_quant_sizes {
    size_t data, absmax, absmax_u8, nested_absmax; /* absmax, or the other two with double_quant */
} gn_quant_sizes;
gn_quant_sizes gn_quant_sizes_of(gn_qtype type, bool double_quant, int64_t rows, int64_t cols);
/* Sum of the bytes a matrix holds, codes and scales. */
size_t gn_matrix_bytes(const gn_matrix *m);

static inline float gn_matrix_scale(const gn_matrix *m, int64_t block) {
    if (!m->absmax_u8) return m->absmax[block];
    const float s = m->nested_code[m->absmax_u8[block]] * m->nested_absmax[block / GN_NESTED_BLOCK];
    return s + m->offset;
}

/* Where gn_quantize writes; sizes from gn_quant_sizes_of. */
typedef struct gn_quant_out {
    void *data;
    float *absmax; /* single quantization and INT8; also scratch with double_quant: always needed */
    uint8_t *absmax_u8; /* NULL: no double quantization */
    float *nested_absmax;
    float offset; /* written */
} gn_quant_out;

/* Quantizes src, (rows, cols) of F32, F16 or BF16, row-major and dense, on `threads` cores
 * (0: all). A value that is not finite gives GN_EINVAL and err names its row and column. */
GN_CHECKED gn_status gn_quantize(gn_quant_out *out, gn_qtype type, const void *src, gn_dtype dtype,
                                 int64_t rows, int64_t cols, int threads, gn_error *err);

/* Elements [first, first+n) of the flattened matrix as float32, each rounded to m->dtype. */
void gn_dequantize(float *dst, const gn_matrix *m, int64_t first, int64_t n);

#ifdef __cplusplus
}
#endif
#endif
