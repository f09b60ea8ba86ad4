/* Block quantization against bitsandbytes (golden/blockquant.safetensors): every case, both types,
 * with and without double quantization.
 *
 * bitsandbytes is built with fast math: its reciprocal of absmax and its mean of the scales may be
 * off by one ulp. So a code may differ where value/absmax lies within one ulp of a threshold, the
 * offset by one ulp, and what is derived from it likewise. Those are counted and printed; anything
 * else fails. Dequantizing from the golden codes and scales must be equal to the bit. */
#include "engine/tensor_file.h"
#include "kernels/blockquant.h"
#include "kernels/quant_tables.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FILE_NAME GN_SOURCE_DIR "/tests/golden/data/blockquant.safetensors"

static gn_tensor_file *file;

static const gn_file_tensor *get(const char *test_case, const char *suffix) {
    char name[128];
    snprintf(name, sizeof name, "%s.%s", test_case, suffix);
    const gn_file_tensor *t = gn_tensor_file_find(file, name);
    cr_assert(t, "%s is missing", name);
    return t;
}

/* An aligned copy, which the caller frees. */
static void *copy_of(const gn_file_tensor *t) {
    void *data = malloc(t->bytes + 1);
    memcpy(data, t->data, t->bytes);
    return data;
}

static int64_t numel(const gn_file_tensor *t) {
    int64_t n = 1;
    for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
    return n;
}

static bool within_ulps(float a, float b, int ulps) {
    float low = b, high = b;
    for (int i = 0; i < ulps; i++) {
        low = nextafterf(low, -INFINITY);
        high = nextafterf(high, INFINITY);
    }
    return a >= low && a <= high;
}

static int code_at(const uint8_t *packed, int64_t i) {
    return i & 1 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
}

static bool near_threshold(float value, float absmax, const gn_code_rule *rule) {
    const float x = value * (1.0f / absmax);
    if (rule->sign_bit && x == 0.0f) return true;
    for (int t = 0; t < rule->n_thresholds; t++) {
        if (within_ulps(rule->sign_bit ? fabsf(x) : x, rule->thresholds[t], 1)) return true;
    }
    return false;
}

typedef struct counts {
    int64_t values, codes_at_threshold, scales, scale_codes, offsets_off;
} counts;

static void check_codes(const char *name, gn_qtype type, const gn_file_tensor *input,
                        const uint8_t *packed, const float *absmax, const uint8_t *golden,
                        counts *c) {
    const int64_t n = numel(input);
    float *values = malloc((size_t)n * sizeof *values);
    gn_widen(values, input->data, input->dtype, n);
    for (int64_t i = 0; i < n; i++) {
        c->values++;
        if (code_at(packed, i) == code_at(golden, i)) continue;
        cr_assert(near_threshold(values[i], absmax[i / GN_BLOCK], gn_code_rule_of(type)),
                  "%s.%s: element %lld has code %d, bitsandbytes %d", name, gn_qtype_name(type),
                  (long long)i, code_at(packed, i), code_at(golden, i));
        c->codes_at_threshold++;
    }
    free(values);
}

static void check_nested(const char *name, const gn_quant_out *out, const uint8_t *golden_u8,
                         const float *golden_nested, float golden_offset, int64_t blocks,
                         counts *c) {
    cr_assert(within_ulps(out->offset, golden_offset, 1), "%s: offset %a, bitsandbytes %a", name,
              (double)out->offset, (double)golden_offset);
    c->offsets_off += out->offset != golden_offset;
    for (int64_t b = 0; b < blocks; b++) {
        const float nested = golden_nested[b / GN_NESTED_BLOCK];
        /* One ulp of the offset, seen from the difference, may be several of the difference. */
        cr_assert(fabsf(out->nested_absmax[b / GN_NESTED_BLOCK] - nested) <=
                      fabsf(nextafterf(golden_offset, INFINITY) - golden_offset) + nested * 6e-8f,
                  "%s: nested absmax of block %lld", name, (long long)b);
        cr_assert_eq(out->absmax_u8[b], golden_u8[b], "%s: scale %lld has code %d, bitsandbytes %d",
                     name, (long long)b, out->absmax_u8[b], golden_u8[b]);
        c->scale_codes++;
    }
}

/* Golden codes and scales to values, compared to the bit. */
static void check_dequantized(const gn_matrix *m, const gn_file_tensor *golden) {
    const int64_t n = numel(golden);
    float *values = malloc((size_t)n * sizeof *values),
          *expected = malloc((size_t)n * sizeof *values);
    gn_dequantize(values, m, 0, n);
    gn_widen(expected, golden->data, golden->dtype, n);
    for (int64_t i = 0; i < n; i++)
        cr_assert(memcmp(&values[i], &expected[i], sizeof *values) == 0,
                  "%s: element %lld is %a, bitsandbytes %a", golden->name, (long long)i,
                  (double)values[i], (double)expected[i]);
    free(values);
    free(expected);
}

static void check_case(const char *name, gn_qtype type, counts *c) {
    char suffix[64];
#define TENSOR(what)                                                                               \
    (snprintf(suffix, sizeof suffix, "%s" what, gn_qtype_name(type)), get(name, suffix))
    const gn_file_tensor *input = get(name, "input");
    const int64_t n = numel(input), rows = input->shape[0], cols = n / rows;
    const int64_t blocks = (n + GN_BLOCK - 1) / GN_BLOCK;
    const gn_quant_sizes sizes = gn_quant_sizes_of(type, true, rows, cols);
    uint8_t *packed = copy_of(TENSOR(".packed")), *u8 = copy_of(TENSOR("_dq.absmax_u8"));
    float *absmax = copy_of(TENSOR(".absmax")), *nested = copy_of(TENSOR("_dq.nested_absmax"));
    float *offset = copy_of(TENSOR("_dq.offset"));

    gn_quant_out out = {malloc(sizes.data), malloc(sizes.absmax), malloc(sizes.absmax_u8),
                        malloc(sizes.nested_absmax), 0};
    gn_error err = {0};
    cr_assert_eq(gn_quantize(&out, type, input->data, input->dtype, rows, cols, 2, &err), GN_OK,
                 "%s: %s", name, err.message);
    check_codes(name, type, input, out.data, absmax, packed, c);
    for (int64_t b = 0; b < blocks; b++, c->scales++)
        cr_assert_eq(out.absmax[b], absmax[b], "%s: absmax %lld", name, (long long)b);
    check_nested(name, &out, u8, nested, *offset, blocks, c);

    gn_matrix m = {.qtype = type, .dtype = input->dtype, .rows = rows, .cols = cols};
    m.data = packed;
    m.code = gn_code_values(type);
    m.absmax = absmax;
    check_dequantized(&m, TENSOR(".dequant"));
    m.absmax_u8 = u8;
    m.nested_code = gn_dynamic_map();
    m.nested_absmax = nested;
    m.offset = *offset;
    check_dequantized(&m, TENSOR("_dq.dequant"));
    void *memory[] = {packed,   u8,         absmax,        nested,           offset,
                      out.data, out.absmax, out.absmax_u8, out.nested_absmax};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free(memory[i]);
#undef TENSOR
}

Test(golden_blockquant, every_case_equals_bitsandbytes) {
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_open(&file, FILE_NAME, &err), GN_OK, "%s", err.message);
    int cases = 0;
    counts c = {0};
    for (size_t i = 0; i < gn_tensor_file_count(file); i++) {
        char name[128];
        snprintf(name, sizeof name, "%s", gn_tensor_file_at(file, i)->name);
        char *dot = strchr(name, '.');
        if (!dot || strcmp(dot, ".input")) continue;
        *dot = '\0';
        check_case(name, GN_Q_NF4, &c);
        check_case(name, GN_Q_FP4, &c);
        cases++;
    }
    fprintf(stderr,
            "%d cases, 2 types: %lld codes (%lld differ within 1 ulp of a threshold), %lld scales, "
            "%lld 8-bit scales, %lld of %d offsets 1 ulp off\n",
            cases, (long long)c.values, (long long)c.codes_at_threshold, (long long)c.scales,
            (long long)c.scale_codes, (long long)c.offsets_off, 2 * cases);
    cr_assert_eq(cases, 10);
    gn_tensor_file_close(file);
}

Test(golden_blockquant, code_values_equal_bitsandbytes) {
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_open(&file, FILE_NAME, &err), GN_OK, "%s", err.message);
    cr_assert_arr_eq(gn_code_values(GN_Q_NF4), get("code", "nf4")->data, 16 * sizeof(float));
    cr_assert_arr_eq(gn_dynamic_map(), get("code", "dynamic_map_signed")->data,
                     256 * sizeof(float));
    float fp4[16];
    memcpy(fp4, get("code", "fp4")->data, sizeof fp4);
    for (int i = 0; i < 16; i++) cr_assert_eq(gn_code_values(GN_Q_FP4)[i], fp4[i]);
    gn_tensor_file_close(file);
}
