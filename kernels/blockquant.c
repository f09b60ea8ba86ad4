/* blockquant.c - quantizing and dequantizing, in plain C that compilers vectorize.
 *
 * bitsandbytes multiplies by the reciprocal of absmax and compares with thresholds; doing the same
 * in float32 gives its codes. Its kernels take an approximate reciprocal, so values within one ulp
 * of a threshold may differ. A block of zeros has an infinite reciprocal; its products are NaN,
 * exceed no threshold, and get the code of rank zero, there as here. */
#include "blockquant.h"

#include <float.h>
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

/* The largest magnitude of v (n); *finite is cleared when a value is not finite. */
static float absmax_of(const float *v, int64_t n, bool *finite) {
    float max = 0.0f;
    int bad = 0;
    for (int64_t i = 0; i < n; i++) {
        const float a = fabsf(v[i]);
        max = a > max ? a : max;
        bad |= !(a <= FLT_MAX);
    }
    if (bad) *finite = false;
    return max;
}

static void encode_block(uint8_t *packed, const float *v, int n, float absmax,
                         const gn_code_rule *rule) {
    const float inverse = 1.0f / absmax;
    uint8_t codes[GN_BLOCK] = {0};
    int32_t rank[GN_BLOCK] = {0};
    float x[GN_BLOCK] = {0};
    for (int i = 0; i < n; i++) x[i] = v[i] * inverse;
    for (int t = 0; t < rule->n_thresholds; t++) {
        const float threshold = rule->thresholds[t];
        if (rule->sign_bit)
            for (int i = 0; i < GN_BLOCK; i++) rank[i] += fabsf(x[i]) > threshold;
        else
            for (int i = 0; i < GN_BLOCK; i++) rank[i] += x[i] > threshold;
    }
    for (int i = 0; i < n; i++) codes[i] = rule->codes[rank[i]];
    if (rule->sign_bit)
        for (int i = 0; i < n; i++) codes[i] |= x[i] < 0.0f ? 8 : 0;
    for (int i = 0; i < (n + 1) / 2; i++)
        packed[i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
}

static bool encode_4bit(gn_quant_out *out, gn_qtype type, const void *src, gn_dtype dtype,
                        int64_t n, int threads) {
    const gn_code_rule *rule = gn_code_rule_of(type);
    const int64_t blocks = ceil_div(n, GN_BLOCK);
    const char *bytes = src;
    const size_t size = gn_dtype_size(dtype);
    int bad = 0;
    (void)threads;
#pragma omp parallel for schedule(static, CHUNK_BLOCKS) num_threads(threads) reduction(| : bad)
    for (int64_t b = 0; b < blocks; b++) {
        float v[GN_BLOCK];
        bool finite = true;
        const int64_t first = b * GN_BLOCK;
        const int count = (int)(n - first < GN_BLOCK ? n - first : GN_BLOCK);
        gn_widen(v, bytes + (size_t)first * size, dtype, count);
        out->absmax[b] = absmax_of(v, count, &finite);
        bad |= !finite;
        encode_block((uint8_t *)out->data + first / 2, v, count, out->absmax[b], rule);
    }
    return !bad;
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
        float v[GN_BLOCK], max = 0.0f;
        bool finite = true;
        for (int64_t c = 0; c < cols; c += GN_BLOCK) {
            const int64_t n = cols - c < GN_BLOCK ? cols - c : GN_BLOCK;
            gn_widen(v, row + (size_t)c * size, dtype, n);
            const float m = absmax_of(v, n, &finite);
            max = m > max ? m : max;
        }
        bad |= !finite;
        out->absmax[r] = max;
        const float inverse = max > 0.0f && finite ? 127.0f / max : 0.0f;
        for (int64_t c = 0; c < cols; c += GN_BLOCK) {
            const int64_t n = cols - c < GN_BLOCK ? cols - c : GN_BLOCK;
            gn_widen(v, row + (size_t)c * size, dtype, n);
            for (int64_t i = 0; finite && i < n; i++)
                codes[c + i] = (int8_t)fmaxf(-127.0f, fminf(127.0f, rintf(v[i] * inverse)));
        }
    }
    return !bad;
}

/* The nearest value of an ascending map of 256, as bitsandbytes' dQuantize finds it: by bisection,
 * then between the last two candidates; a midpoint goes to the one bisection ended at. */
static uint8_t nearest(const float *map, float x) {
    int pivot = 127, upper_pivot = 255, lower_pivot = 0;
    for (int i = 64; i > 0; i >>= 1) {
        if (x > map[pivot]) {
            lower_pivot = pivot;
            pivot += i;
        } else {
            upper_pivot = pivot;
            pivot -= i;
        }
    }
    const float value = map[pivot];
    if (x > value) return (uint8_t)(x > (map[upper_pivot] + value) * 0.5f ? upper_pivot : pivot);
    return (uint8_t)(x < (map[lower_pivot] + value) * 0.5f ? lower_pivot : pivot);
}

static void quantize_scales(gn_quant_out *out, int64_t blocks) {
    const float *map = gn_dynamic_map();
    double sum = 0.0;
    for (int64_t b = 0; b < blocks; b++) sum += out->absmax[b];
    out->offset = (float)(sum / (double)blocks);
    for (int64_t first = 0; first < blocks; first += GN_NESTED_BLOCK) {
        const int64_t end = first + GN_NESTED_BLOCK < blocks ? first + GN_NESTED_BLOCK : blocks;
        float max = 0.0f;
        for (int64_t b = first; b < end; b++) max = fmaxf(max, fabsf(out->absmax[b] - out->offset));
        out->nested_absmax[first / GN_NESTED_BLOCK] = max;
        const float inverse = 1.0f / max;
        for (int64_t b = first; b < end; b++)
            out->absmax_u8[b] = nearest(map, (out->absmax[b] - out->offset) * inverse);
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
    if (rows == 0 || cols == 0) return GN_OK;
#ifdef _OPENMP
    if (threads <= 0) threads = omp_get_num_procs();
#endif
    const bool finite = type == GN_Q_INT8
                            ? encode_int8(out, src, dtype, rows, cols, threads)
                            : encode_4bit(out, type, src, dtype, rows * cols, threads);
    if (!finite) return report_not_finite(src, dtype, rows, cols, err);
    if (type != GN_Q_INT8 && out->absmax_u8) quantize_scales(out, ceil_div(rows * cols, GN_BLOCK));
    return GN_OK;
}

/* ---- dequantizing ---- */

static void round_to(float *v, gn_dtype dtype, int n) {
    if (dtype == GN_BF16)
        for (int i = 0; i < n; i++) v[i] = gn_bf16_to_f32(gn_f32_to_bf16(v[i]));
    else if (dtype == GN_F16)
        for (int i = 0; i < n; i++) v[i] = gn_f16_to_f32(gn_f32_to_f16(v[i]));
}

static void decode_4bit(float *dst, const gn_matrix *m, int64_t first, int64_t n) {
    const uint8_t *packed = m->data;
    for (int64_t i = first, end; i < first + n; i = end) {
        const int64_t block = i / GN_BLOCK;
        const float scale = gn_matrix_scale(m, block);
        float values[16]; /* what the codes stand for in this block */
        for (int c = 0; c < 16; c++) values[c] = m->code[c] * scale;
        round_to(values, m->dtype, 16);
        end = (block + 1) * GN_BLOCK < first + n ? (block + 1) * GN_BLOCK : first + n;
        for (int64_t j = i; j < end; j++)
            *dst++ = values[j & 1 ? packed[j / 2] & 15 : packed[j / 2] >> 4];
    }
}

static void decode_int8(float *dst, const gn_matrix *m, int64_t first, int64_t n) {
    const int8_t *codes = m->data;
    for (int64_t i = first; i < first + n; i++, dst++) {
        *dst = (float)codes[i] * (m->absmax[i / m->cols] / 127.0f);
        round_to(dst, m->dtype, 1);
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
