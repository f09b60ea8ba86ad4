/* Properties of every quantized type: error bounds, fixed points, threads, odd sizes, refusals. The
 * values themselves are held to bitsandbytes in golden/test_blockquant.c. */
#include "kernels/blockquant.h"
#include "kernels/quant_tables.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const gn_qtype types[] = {GN_Q_NF4,      GN_Q_FP4,  GN_Q_FP4_E2M1,
                                 GN_Q_FP4_E3M0, GN_Q_INT4, GN_Q_INT8};
enum { N_TYPES = sizeof types / sizeof *types };

typedef struct quantized {
    gn_quant_out out;
    gn_matrix m;
} quantized;

static quantized quantize(gn_qtype type, bool double_quant, const float *src, int64_t rows,
                          int64_t cols, int threads) {
    const gn_quant_sizes s = gn_quant_sizes_of(type, double_quant, rows, cols);
    quantized q = {.out = {calloc(s.data + 1, 1), calloc(s.absmax + 1, 1),
                           s.absmax_u8 ? calloc(s.absmax_u8, 1) : NULL,
                           s.nested_absmax ? calloc(s.nested_absmax, 1) : NULL, 0}};
    gn_error err = {0};
    cr_assert_eq(gn_quantize(&q.out, type, src, GN_F32, rows, cols, threads, &err), GN_OK, "%s",
                 err.message);
    q.m = (gn_matrix){.qtype = type, .dtype = GN_F32, .rows = rows, .cols = cols};
    q.m.data = q.out.data;
    q.m.code = type == GN_Q_INT8 ? NULL : gn_code_values(type);
    q.m.absmax = q.out.absmax;
    q.m.absmax_u8 = q.out.absmax_u8;
    q.m.nested_code = gn_dynamic_map();
    q.m.nested_absmax = q.out.nested_absmax;
    q.m.offset = q.out.offset;
    return q;
}

static void discard(quantized *q) {
    free(q->out.data);
    free(q->out.absmax);
    free(q->out.absmax_u8);
    free(q->out.nested_absmax);
}

static float *random_values(int64_t n, unsigned seed) {
    float *v = malloc((size_t)n * sizeof *v + 1);
    srand(seed);
    for (int64_t i = 0; i < n; i++) {
        double sum = 0;
        for (int k = 0; k < 4; k++) sum += (double)rand() / RAND_MAX - 0.5;
        v[i] = (float)(sum * 0.03);
    }
    return v;
}

/* Half the widest gap between neighbouring code values bounds the error, relative to absmax. */
static double widest_half_gap(gn_qtype type) {
    if (type == GN_Q_INT8) return 0.5 / 127;
    const float *values = gn_code_values(type);
    double widest = 0;
    for (int i = 0; i < 16; i++) {
        double next = 2;
        for (int j = 0; j < 16; j++) {
            if (values[j] > values[i] && values[j] - values[i] < next) next = values[j] - values[i];
        }
        if (values[i] < 1 && next > widest) widest = next;
    }
    return widest / 2;
}

Test(blockquant, errors_stay_within_half_a_gap) {
    const int64_t shapes[][2] = {{1, 1}, {1, 63}, {3, 64}, {5, 65}, {7, 352}, {33, 257}, {64, 320}};
    for (int t = 0; t < N_TYPES; t++) {
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
            const int64_t rows = shapes[s][0], cols = shapes[s][1], n = rows * cols;
            float *src = random_values(n, 5), *back = malloc((size_t)n * sizeof *back);
            quantized q = quantize(types[t], false, src, rows, cols, 1);
            gn_dequantize(back, &q.m, 0, n);
            for (int64_t i = 0; i < n; i++) {
                const int64_t unit = types[t] == GN_Q_INT8 ? i / cols : i / GN_BLOCK;
                const double bound = widest_half_gap(types[t]) * 1.00001 * q.out.absmax[unit];
                cr_assert(fabs((double)back[i] - src[i]) <= bound,
                          "%s (%d, %d) element %d: %g for %g", gn_qtype_name(types[t]), (int)rows,
                          (int)cols, (int)i, (double)back[i], (double)src[i]);
            }
            discard(&q);
            free(src);
            free(back);
        }
    }
}

Test(blockquant, what_was_dequantized_quantizes_to_itself) {
    enum { ROWS = 16, COLS = 192 };
    for (int t = 0; t < N_TYPES; t++) {
        float *src = random_values(ROWS * COLS, 6), back[ROWS * COLS], again[ROWS * COLS];
        quantized q = quantize(types[t], false, src, ROWS, COLS, 1);
        gn_dequantize(back, &q.m, 0, ROWS * COLS);
        quantized r = quantize(types[t], false, back, ROWS, COLS, 1);
        gn_dequantize(again, &r.m, 0, ROWS * COLS);
        for (int i = 0; i < ROWS * COLS; i++)
            cr_assert_float_eq(again[i], back[i], 1e-6f * fabsf(back[i]) + 1e-12f);
        discard(&q);
        discard(&r);
        free(src);
    }
}

Test(blockquant, threads_change_nothing) {
    enum { ROWS = 301, COLS = 1000 };
    float *src = random_values(ROWS * COLS, 7);
    for (int t = 0; t < N_TYPES; t++) {
        const bool nested = types[t] != GN_Q_INT8;
        const gn_quant_sizes s = gn_quant_sizes_of(types[t], nested, ROWS, COLS);
        quantized one = quantize(types[t], nested, src, ROWS, COLS, 1);
        for (int threads = 0; threads <= 3; threads++) {
            quantized many = quantize(types[t], nested, src, ROWS, COLS, threads);
            cr_assert_arr_eq(one.out.data, many.out.data, s.data);
            cr_assert_arr_eq(one.out.absmax, many.out.absmax, s.absmax);
            cr_assert_eq(one.out.offset, many.out.offset);
            if (nested) cr_assert_arr_eq(one.out.absmax_u8, many.out.absmax_u8, s.absmax_u8);
            discard(&many);
        }
        discard(&one);
    }
    free(src);
}

Test(blockquant, any_range_dequantizes_like_the_whole) {
    enum { ROWS = 5, COLS = 77, N = ROWS * COLS };
    float *src = random_values(N, 8), whole[N], part[N];
    for (int t = 0; t < N_TYPES; t++) {
        quantized q = quantize(types[t], types[t] != GN_Q_INT8, src, ROWS, COLS, 1);
        gn_dequantize(whole, &q.m, 0, N);
        for (int first = 0; first < N; first += 3) {
            for (int n = 0; first + n <= N; n += 13) {
                gn_dequantize(part, &q.m, first, n);
                cr_assert_arr_eq(part, whole + first, (size_t)n * sizeof *part);
            }
        }
        discard(&q);
    }
    free(src);
}

Test(blockquant, double_quantization_costs_little) {
    enum { ROWS = 64, COLS = 512, N = ROWS * COLS };
    float *src = random_values(N, 9), plain[N], nested[N];
    quantized a = quantize(GN_Q_NF4, false, src, ROWS, COLS, 1);
    quantized b = quantize(GN_Q_NF4, true, src, ROWS, COLS, 1);
    gn_dequantize(plain, &a.m, 0, N);
    gn_dequantize(nested, &b.m, 0, N);
    double difference = 0, norm = 0;
    for (int i = 0; i < N; i++) {
        difference += (plain[i] - nested[i]) * (plain[i] - nested[i]);
        norm += plain[i] * plain[i];
    }
    cr_assert_lt(sqrt(difference / norm), 0.01);
    cr_assert_eq(gn_matrix_bytes(&a.m), N / 2 + N / 64 * 4);
    cr_assert_eq(gn_matrix_bytes(&b.m), N / 2 + N / 64 + N / 64 / 256 * 4);
    discard(&a);
    discard(&b);
    free(src);
}

Test(blockquant, refuses_values_that_are_not_finite) {
    const float bad[] = {INFINITY, -INFINITY, NAN};
    for (int t = 0; t < N_TYPES; t++) {
        for (int k = 0; k < 3; k++) {
            float src[3 * 100] = {0};
            uint8_t data[300];
            float absmax[8];
            gn_error err = {0};
            src[2 * 100 + 17] = bad[k];
            gn_quant_out out = {data, absmax, NULL, NULL, 0};
            cr_assert_eq(gn_quantize(&out, types[t], src, GN_F32, 3, 100, 1, &err), GN_EINVAL);
            cr_assert(strstr(err.message, "row 2, column 17"), "%s", err.message);
        }
    }
}

Test(blockquant, names_go_both_ways) {
    for (int t = 0; t < GN_QTYPE_COUNT; t++) {
        gn_qtype type;
        cr_assert_eq(gn_qtype_parse(&type, gn_qtype_name((gn_qtype)t)), GN_OK);
        cr_assert_eq((int)type, t);
    }
    gn_qtype type;
    cr_assert_eq(gn_qtype_parse(&type, "nf5"), GN_EINVAL);
}

static int code_at(const quantized *q, int i) {
    const uint8_t *packed = q->out.data;
    return i & 1 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
}

/* A block whose absmax is 1, so that values are compared with the thresholds as they stand. */
Test(blockquant, a_value_on_a_threshold_takes_the_lower_code) {
    for (int t = 0; t < N_TYPES; t++) {
        if (types[t] == GN_Q_INT8) continue;
        const gn_code_rule *rule = gn_code_rule_of(types[t]);
        float src[GN_BLOCK] = {1.0f};
        int n = 1;
        for (int k = 0; k < rule->n_thresholds; k++) {
            src[n++] = rule->thresholds[k];
            src[n++] = nextafterf(rule->thresholds[k], 2.0f);
            if (!rule->sign_bit) continue;
            src[n++] = -rule->thresholds[k];
            src[n++] = nextafterf(-rule->thresholds[k], -2.0f);
        }
        quantized q = quantize(types[t], false, src, 1, GN_BLOCK, 1);
        for (int k = 0, i = 1; k < rule->n_thresholds; k++) {
            for (int sign = 0; sign <= (rule->sign_bit ? 8 : 0); sign += 8) {
                cr_assert_eq(code_at(&q, i++), rule->codes[k] | sign);
                cr_assert_eq(code_at(&q, i++), rule->codes[k + 1] | sign);
            }
        }
        discard(&q);
    }
}

Test(blockquant, zeros_of_either_sign) {
    const float src[2 * GN_BLOCK] = {1.0f, 0.0f, -0.0f, -1e-6f};
    for (int t = 0; t < N_TYPES; t++) {
        quantized q = quantize(types[t], false, src, 2, GN_BLOCK, 1);
        float back[2 * GN_BLOCK];
        gn_dequantize(back, &q.m, 0, 2 * GN_BLOCK);
        for (int i = 1; i < 2 * GN_BLOCK; i++) cr_assert_eq(back[i], 0.0f);
        if (types[t] == GN_Q_FP4) {
            cr_assert_eq(code_at(&q, 1), 0);
            cr_assert_eq(code_at(&q, 2), 0);
            cr_assert_eq(code_at(&q, 3), 8);
            cr_assert(!signbit(back[2]) && signbit(back[3]));
        }
        if (types[t] != GN_Q_INT8) /* a block of zeros takes code 0 in bitsandbytes, even in NF4 */
            for (int i = GN_BLOCK; i < 2 * GN_BLOCK; i++) cr_assert_eq(code_at(&q, i), 0);
        discard(&q);
    }
}

Test(blockquant, int8_rounds_ties_to_even_at_any_magnitude) {
    const float values[] = {127, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, 63.5f, 0.75f, -127, 0};
    const int codes[] = {127, 0, 2, 2, 0, -2, 64, 1, -127, 0};
    const int exponents[] = {0, 120, -60, -130};
    for (int e = 0; e < 4; e++) {
        float src[10];
        for (int i = 0; i < 10; i++) src[i] = ldexpf(values[i], exponents[e]);
        quantized q = quantize(GN_Q_INT8, false, src, 1, 10, 1);
        for (int i = 0; i < 10; i++) cr_assert_eq(((int8_t *)q.out.data)[i], codes[i]);
        discard(&q);
    }
}

Test(blockquant, equal_scales_leave_only_their_mean) {
    float src[3 * GN_BLOCK], back[3 * GN_BLOCK];
    for (int i = 0; i < 3 * GN_BLOCK; i++) src[i] = i & 1 ? -0.25f : 0.25f;
    quantized q = quantize(GN_Q_NF4, true, src, 3, GN_BLOCK, 1);
    cr_assert_eq(q.out.offset, 0.25f);
    cr_assert_eq(q.out.nested_absmax[0], 0.0f);
    gn_dequantize(back, &q.m, 0, 3 * GN_BLOCK);
    cr_assert_arr_eq(back, src, sizeof src);
    discard(&q);
}

Test(blockquant, empty_matrices_and_wrong_types) {
    gn_error err = {0};
    gn_quant_out out = {.offset = 7};
    cr_assert_eq(gn_quantize(&out, GN_Q_NF4, NULL, GN_BF16, 0, 64, 1, &err), GN_OK);
    cr_assert_eq(gn_quantize(&out, GN_Q_INT8, NULL, GN_BF16, 5, 0, 1, &err), GN_OK);
    cr_assert_eq(out.offset, 0.0f);
    cr_assert_eq(gn_quantize(&out, GN_Q_NONE, NULL, GN_BF16, 1, 1, 1, &err), GN_EINVAL);
    cr_assert_eq(gn_quantize(&out, GN_Q_NF4, NULL, GN_I8, 1, 1, 1, &err), GN_EINVAL);
    cr_assert_eq(gn_quantize(&out, GN_Q_NF4, NULL, GN_BF16, -1, 1, 1, &err), GN_EINVAL);
}

/* Sources may start at any byte, and the ends of a ragged matrix are not overrun. */
Test(blockquant, unaligned_sources_and_guarded_outputs) {
    enum { N = 13 * 77 }; /* odd, and not whole blocks */
    for (int t = 0; t < N_TYPES; t++) {
        float *src = random_values(N, 10);
        const gn_quant_sizes s = gn_quant_sizes_of(types[t], false, 13, 77);
        quantized expected = quantize(types[t], false, src, 13, 77, 1);
        char *shifted = malloc(N * sizeof *src + 1);
        memcpy(shifted + 1, src, N * sizeof *src);
        uint8_t *data = malloc(s.data + 1), *absmax = malloc(s.absmax + 1);
        data[s.data] = absmax[s.absmax] = 0xa5;
        gn_quant_out out = {data, (float *)absmax, NULL, NULL, 0};
        cr_assert_eq(gn_quantize(&out, types[t], shifted + 1, GN_F32, 13, 77, 2, NULL), GN_OK);
        cr_assert_arr_eq(data, expected.out.data, s.data);
        cr_assert_arr_eq(absmax, expected.out.absmax, s.absmax);
        cr_assert_eq(data[s.data], 0xa5);
        cr_assert_eq(absmax[s.absmax], 0xa5);
        free(shifted);
        free(data);
        free(absmax);
        free(src);
        discard(&expected);
    }
}
