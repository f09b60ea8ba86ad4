/* blockquant.c - quantizing and dequantizing, in plain C that compilers vectorize.
 *
 * bitsandbytes multiplies by the reciprocal of absmax and compares with thresholds; doing the same
 * in float32 gives its codes. Its kernels take an approximate reciprocal, so values within one ulp
 * of a threshold may differ. A block of zeros has an infinite reciprocal; its products are NaN,
 * exceed no threshold, and get the code of rank zero, there as here. */
#include "blockquant.h"

#include <math.h>
#include <string.h>

#include "quant_tables.h"

#ifdef _OPENMP
#include <omp.h>
#endif

enum { CHUNK_BLOCKS = 1024 }; /* blocks a thread takes at a time */

static const char *const type_names[] = {
#define X(name, text) text,
    GN_QTYPE_MAP(X)
#undef X
};

const char *gn_qtype_name(gn_qtype type) {
    return type_names[type];
}

gn_status gn_qtype_parse(gn_qtype *out, const char *name) {
    for (int i = 0; i < GN_QTYPE_COUNT; i++) {
        if (strcmp(name, type_names[i])) continue;
        *out = (gn_qtype)i;
        return GN_OK;
    }
    return GN_EINVAL;
}

static int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

gn_quant_sizes gn_quant_sizes_of(gn_qtype type, bool double_quant, int64_t rows, int64_t cols) {
    const int64_t n = rows * cols, blocks = ceil_div(n, GN_BLOCK);
    gn_quant_sizes sizes = {0};
    if (type == GN_Q_INT8) {
        sizes.data = (size_t)n;
        sizes.absmax = (size_t)rows * sizeof(float);
    } else if (gn_qtype_is_4bit(type)) {
        sizes.data = (size_t)ceil_div(n, 2);
        sizes.absmax = (size_t)blocks * sizeof(float);
        if (double_quant) {
            sizes.absmax_u8 = (size_t)blocks;
            sizes.nested_absmax = (size_t)ceil_div(blocks, GN_NESTED_BLOCK) * sizeof(float);
        }
    }
    return sizes;
}

size_t gn_matrix_bytes(const gn_matrix *m) {
    if (m->qtype == GN_Q_NONE) return (size_t)(m->rows * m->cols) * gn_dtype_size(m->dtype);
    const gn_quant_sizes s = gn_quant_sizes_of(m->qtype, m->absmax_u8 != NULL, m->rows, m->cols);
    return s.data + (m->absmax_u8 ? s.absmax_u8 + s.nested_absmax : s.absmax);
}

/* ---- quantizing ---- */

/* The largest magnitude of v (n). Found among the bits, whose order is that of the magnitudes, with
 * infinities and NaNs above all: integers are what compilers find maxima of in vectors. */
static float absmax_of(const float *v, int64_t n) {
    int32_t max = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, v + i, sizeof bits);
        bits &= INT32_MAX;
        max = bits > max ? bits : max;
    }
    float absmax;
    memcpy(&absmax, &max, sizeof absmax);
    return absmax;
}

/* A gn_code_rule made for speed. Codes of a type without a sign bit are the number of thresholds
 * exceeded, of 15: an unused one is infinite. With one, there are 7 thresholds for the magnitude,
 * and steps from the code below each to the code above. */
typedef struct encoder {
    float thresholds[15];
    int32_t steps[7];
    bool sign_bit;
} encoder;

static encoder encoder_of(const gn_code_rule *rule) {
    encoder e = {.sign_bit = rule->sign_bit};
    for (int t = 0; t < 15; t++)
        e.thresholds[t] = t < rule->n_thresholds ? rule->thresholds[t] : INFINITY;
    for (int t = 0; t < 7; t++) e.steps[t] = rule->codes[t + 1] - rule->codes[t];
    return e;
}

/* Codes of v / absmax, both GN_BLOCK long. Adding up takes no branch and no table: the loops over v
 * run in vectors, with those over thresholds unrolled. */
static void encode(int32_t *restrict codes, const float *restrict v, float inverse,
                   const encoder *from) {
    const encoder e = *from; /* a copy, which nothing aliases */
    for (int i = 0; i < GN_BLOCK; i++) {
        const float x = v[i] * inverse;
        int32_t code = 0;
#pragma GCC unroll 15
        for (int t = 0; t < 15; t++) code += x > e.thresholds[t];
        codes[i] = code;
    }
}

static void encode_by_magnitude(int32_t *restrict codes, const float *restrict v, float inverse,
                                const encoder *from) {
    const encoder e = *from;
    for (int i = 0; i < GN_BLOCK; i++) {
        const float x = v[i] * inverse;
        int32_t code = x < 0.0f ? 8 : 0;
#pragma GCC unroll 7
        for (int t = 0; t < 7; t++) code += -(fabsf(x) > e.thresholds[t]) & e.steps[t];
        codes[i] = code;
    }
}

/* v holds GN_BLOCK values, zeros after the first n. */
static void encode_block(uint8_t *packed, const float *v, int n, float absmax, const encoder *e) {
    const float inverse = 1.0f / absmax;
    int32_t codes[GN_BLOCK];
    uint8_t pairs[GN_BLOCK / 2];
    (e->sign_bit ? encode_by_magnitude : encode)(codes, v, inverse, e);
    for (int i = 0; i < GN_BLOCK / 2; i++)
        pairs[i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
    memcpy(packed, pairs, (size_t)(n + 1) / 2);
}

static bool encode_4bit(gn_quant_out *out, gn_qtype type, const void *src, gn_dtype dtype,
                        int64_t n, int threads) {
    const encoder e = encoder_of(gn_code_rule_of(type));
    const int64_t blocks = ceil_div(n, GN_BLOCK);
    const char *bytes = src;
    const size_t size = gn_dtype_size(dtype);
    int bad = 0;
    (void)threads;
#pragma omp parallel for schedule(static, CHUNK_BLOCKS) num_threads(threads) reduction(| : bad)
    for (int64_t b = 0; b < blocks; b++) {
        float v[GN_BLOCK] = {0};
        const int64_t first = b * GN_BLOCK;
        const int count = (int)(n - first < GN_BLOCK ? n - first : GN_BLOCK);
        gn_widen(v, bytes + (size_t)first * size, dtype, count);
        out->absmax[b] = absmax_of(v, GN_BLOCK);
        bad |= !isfinite(out->absmax[b]);
        encode_block((uint8_t *)out->data + first / 2, v, count, out->absmax[b], &e);
    }
    return !bad;
}

/* codes = round(127 * v / absmax), in double, where a tie is a tie and nothing overflows. */
static void encode_int8_block(int8_t *codes, const float *v, int64_t n, float absmax) {
    const double no_fraction = 0x1.8p52; /* added, it leaves the sum no bits below one */
    const double divisor = absmax > 0.0f ? absmax : 1.0;
    int8_t rounded[GN_BLOCK];
    for (int i = 0; i < GN_BLOCK; i++) {
        const double x = 127.0 * (double)v[i] / divisor;
        rounded[i] = (int8_t)(int)(x + no_fraction - no_fraction);
    }
    memcpy(codes, rounded, (size_t)n);
}

static bool encode_int8(gn_quant_out *out, const void *src, gn_dtype dtype, int64_t rows,
                        int64_t cols, int threads) {
    const char *bytes = src;
    const size_t size = gn_dtype_size(dtype);
    int bad = 0;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : bad)
    for (int64_t r = 0; r < rows; r++) {
        int8_t *codes = (int8_t *)out->data + r * cols;
        const char *row = bytes + (size_t)(r * cols) * size;
        float v[GN_BLOCK] = {0}, max = 0.0f;
        bool finite = true;
        for (int64_t c = 0; c < cols; c += GN_BLOCK) {
            const int64_t n = cols - c < GN_BLOCK ? cols - c : GN_BLOCK;
            gn_widen(v, row + (size_t)c * size, dtype, n);
            const float m = absmax_of(v, n);
            finite = finite && isfinite(m);
            max = m > max ? m : max;
        }
        bad |= !finite;
        out->absmax[r] = max;
        for (int64_t c = 0; finite && c < cols; c += GN_BLOCK) {
            const int64_t n = cols - c < GN_BLOCK ? cols - c : GN_BLOCK;
            gn_widen(v, row + (size_t)c * size, dtype, n);
            /* What v holds after n is from the same row, and not kept. */
            encode_int8_block(codes + c, v, n, max);
        }
    }
    return !bad;
}

static void quantize_scales(gn_quant_out *out, int64_t blocks, int threads) {
    const float *map = gn_dynamic_map();
    double sum = 0.0;
    for (int64_t b = 0; b < blocks; b++) sum += out->absmax[b];
    out->offset = (float)(sum / (double)blocks);
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t nested = 0; nested < ceil_div(blocks, GN_NESTED_BLOCK); nested++) {
        const int64_t first = nested * GN_NESTED_BLOCK, left = blocks - first;
        const int64_t n = left < GN_NESTED_BLOCK ? left : GN_NESTED_BLOCK;
        float differences[GN_NESTED_BLOCK];
        for (int64_t i = 0; i < n; i++) differences[i] = out->absmax[first + i] - out->offset;
        const float max = absmax_of(differences, n), inverse = 1.0f / max;
        out->nested_absmax[nested] = max;
        for (int64_t i = 0; i < n; i++)
            out->absmax_u8[first + i] = gn_nearest_of_256(map, differences[i] * inverse);
    }
}

static gn_status report_not_finite(const void *src, gn_dtype dtype, int64_t rows, int64_t cols,
                                   gn_error *err) {
    for (int64_t i = 0; i < rows * cols; i++) {
        float v;
        gn_widen(&v, (const char *)src + (size_t)i * gn_dtype_size(dtype), dtype, 1);
        if (!isfinite(v))
            return gn_fail(err, GN_EINVAL, "the value at row %lld, column %lld is %f",
                           (long long)(i / cols), (long long)(i % cols), (double)v);
    }
    return gn_fail(err, GN_EINVAL, "a value is not finite");
}

gn_status gn_quantize(gn_quant_out *out, gn_qtype type, const void *src, gn_dtype dtype,
                      int64_t rows, int64_t cols, int threads, gn_error *err) {
    if (!gn_dtype_is_float(dtype) || (type != GN_Q_INT8 && !gn_qtype_is_4bit(type)))
        return gn_fail(err, GN_EINVAL, "cannot quantize %s to %s", gn_dtype_name(dtype),
                       gn_qtype_name(type));
    if (rows < 0 || cols < 0) return gn_fail(err, GN_EINVAL, "a negative shape");
    out->offset = 0.0f;
    if (rows == 0 || cols == 0) return GN_OK;
#ifdef _OPENMP
    if (threads <= 0) threads = omp_get_num_procs();
#endif
    const bool finite = type == GN_Q_INT8
                            ? encode_int8(out, src, dtype, rows, cols, threads)
                            : encode_4bit(out, type, src, dtype, rows * cols, threads);
    if (!finite) return report_not_finite(src, dtype, rows, cols, err);
    if (type != GN_Q_INT8 && out->absmax_u8)
        quantize_scales(out, ceil_div(rows * cols, GN_BLOCK), threads);
    return GN_OK;
}

/* ---- dequantizing ---- */

static void round_to(float *v, gn_dtype dtype, int64_t n) {
    if (dtype == GN_BF16)
        for (int64_t i = 0; i < n; i++) v[i] = gn_bf16_to_f32(gn_f32_to_bf16(v[i]));
    else if (dtype == GN_F16)
        for (int64_t i = 0; i < n; i++) v[i] = gn_f16_to_f32(gn_f32_to_f16(v[i]));
}

static void decode_4bit(float *dst, const gn_matrix *m, int64_t first, int64_t n) {
    const uint8_t *packed = m->data;
    for (int64_t i = first, end; i < first + n; i = end) {
        const int64_t block = i / GN_BLOCK;
        const float scale = gn_matrix_scale(m, block);
        float values[16]; /* what the codes stand for in this block */
        for (int c = 0; c < 16; c++) values[c] = m->code[c] * scale;
        /* Its table says 0, but bitsandbytes' kernel negates the magnitude. */
        if (m->qtype == GN_Q_FP4) values[8] = -values[0];
        round_to(values, m->dtype, 16);
        end = (block + 1) * GN_BLOCK < first + n ? (block + 1) * GN_BLOCK : first + n;
        int64_t j = i;
        if (j & 1) *dst++ = values[packed[j++ / 2] & 15];
        for (; j + 1 < end; j += 2, dst += 2) {
            const uint8_t pair = packed[j / 2];
            dst[0] = values[pair >> 4];
            dst[1] = values[pair & 15];
        }
        if (j < end) *dst++ = values[packed[j / 2] >> 4];
    }
}

static void decode_int8(float *dst, const gn_matrix *m, int64_t first, int64_t n) {
    const int8_t *codes = m->data;
    for (int64_t i = first, end; i < first + n; i = end) {
        const int64_t row = i / m->cols;
        const float scale = m->absmax[row] / 127.0f;
        end = (row + 1) * m->cols < first + n ? (row + 1) * m->cols : first + n;
        float *part = dst + (i - first);
        for (int64_t j = 0; j < end - i; j++) part[j] = (float)codes[i + j] * scale;
        round_to(part, m->dtype, end - i);
    }
}

void gn_dequantize(float *dst, const gn_matrix *m, int64_t first, int64_t n) {
    if (m->qtype == GN_Q_NONE)
        gn_widen(dst, (const char *)m->data + (size_t)first * gn_dtype_size(m->dtype), m->dtype, n);
    else if (m->qtype == GN_Q_INT8)
        decode_int8(dst, m, first, n);
    else
        decode_4bit(dst, m, first, n);
}
