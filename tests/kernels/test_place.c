/* Weights placed on a device, or quantized on their way there, hold the host's codes and scales to
 * the bit, in the order that kernels/cuda/cuda.h describes. Runs on the CPU, and on the GPU where
 * there is one. */
#include "kernels/ops.h"
#include "kernels/quant_tables.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 64 };

static const int64_t shapes[][2] = {{1, 1},    {1, 64},    {3, 64},    {8, 128},  {13, 77},
                                    {17, 192}, {9, 576},   {33, 1024}, {300, 64}, {5, 31},
                                    {70, 65},  {64, 4096}, {37, 11008}};
static const gn_dtype dtypes[] = {GN_F32, GN_F16, GN_BF16};

typedef enum kind { SMALL, THRESHOLDS, WILD, KINDS } kind;

/* Values that try what differs between implementations: those next to thresholds, blocks of zeros
 * and of subnormals, and blocks so unlike that the sum of their scales is not exact. */
static float value(kind k, gn_qtype type, int64_t i) {
    const float x = (float)(rand() % 20001 - 10000) * 5e-6f;
    if (k == SMALL || type == GN_Q_INT8) return k == SMALL ? x : (float)(rand() % 255 - 127) / 2;
    const gn_code_rule *rule = gn_code_rule_of(type);
    if (k == THRESHOLDS) {
        const float t = rule->thresholds[rand() % rule->n_thresholds];
        const float near[] = {nextafterf(t, -2.0f), t, nextafterf(t, 2.0f), -t};
        return i % 64 == 5 ? 1.0f : near[rand() % 4];
    }
    const int64_t block = i / 64;
    if (block % 3 == 0) return 0.0f;
    if (block % 5 == 0) return (float)(rand() % 3 - 1) * 1e-42f;
    return ldexpf(x, (int)(block * 7 % 61) - 40);
}

static char *make(kind k, gn_qtype type, gn_dtype dtype, int64_t n) {
    float *v = malloc((size_t)n * sizeof *v);
    char *src = malloc((size_t)n * gn_dtype_size(dtype) + 1);
    for (int64_t i = 0; i < n; i++) v[i] = value(k, type, i);
    gn_narrow(src + 1, dtype, v, n); /* of no alignment */
    free(v);
    return src;
}

/* Device memory between two guards, and what it held when read back. */
typedef struct region {
    char *memory, *copy;
    size_t bytes;
} region;

static region region_of(gn_ctx *ctx, size_t bytes) {
    region r = {gn_ctx_alloc(ctx, bytes + GUARD), malloc(bytes + GUARD), bytes};
    memset(r.copy, 0xee, bytes + GUARD);
    cr_assert_eq(gn_ctx_write(ctx, r.memory, r.copy, bytes + GUARD), GN_OK);
    return r;
}

static const void *copied(const region *r, const void *p) {
    const char *c = p;
    return p && c >= r->memory && c < r->memory + r->bytes ? r->copy + (c - r->memory) : p;
}

/* m as the host can read it. */
static gn_matrix read_back(gn_ctx *ctx, const region *r, gn_matrix m) {
    cr_assert_eq(gn_ctx_read(ctx, r->copy, r->memory, r->bytes + GUARD), GN_OK);
    for (int i = 0; i < GUARD; i++) cr_assert_eq((uint8_t)r->copy[r->bytes + (size_t)i], 0xee);
    m.data = copied(r, m.data);
    m.code = copied(r, m.code);
    m.absmax = copied(r, m.absmax);
    m.absmax_u8 = copied(r, m.absmax_u8);
    m.nested_code = copied(r, m.nested_code);
    m.nested_absmax = copied(r, m.nested_absmax);
    return m;
}

static void discard(gn_ctx *ctx, region *r) {
    gn_ctx_free(ctx, r->memory);
    free(r->copy);
}

/* Where block `block` of the file stands, in blocks. */
static int64_t place_of(const gn_matrix *m, int64_t block, bool tiled) {
    if (!tiled) return block;
    const int64_t S = m->cols / 64, row = block / S, s = block % S;
    return (row / 8 * S + s) * 8 + row % 8;
}

static void assert_same(gn_ctx *ctx, const gn_matrix *m, const gn_matrix *host) {
    const bool is_4bit = gn_qtype_is_4bit(host->qtype);
    const bool tiled = !gn_ctx_is_host(ctx) && is_4bit && host->cols % 64 == 0;
    const int64_t n = host->rows * host->cols, blocks = (n + 63) / 64;
    cr_assert(m->qtype == host->qtype && m->dtype == host->dtype && m->rows == host->rows &&
              m->cols == host->cols && m->offset == host->offset);
    if (!is_4bit) {
        const size_t scales = host->qtype == GN_Q_INT8 ? (size_t)host->rows * sizeof(float) : 0;
        cr_assert_arr_eq(m->data, host->data, gn_matrix_bytes(host) - scales);
        if (scales) cr_assert_arr_eq(m->absmax, host->absmax, scales);
        return;
    }
    cr_assert_arr_eq(m->code, host->code, 16 * sizeof(float));
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t at = place_of(m, b, tiled);
        const size_t left = (size_t)(n - b * 64 + 1) / 2;
        cr_assert_arr_eq((const char *)m->data + at * 32, (const char *)host->data + b * 32,
                         left < 32 ? left : 32);
        if (host->absmax_u8)
            cr_assert_eq(m->absmax_u8[at], host->absmax_u8[b]);
        else
            cr_assert_eq(m->absmax[at], host->absmax[b]);
    }
    if (!host->absmax_u8) return;
    cr_assert_arr_eq(m->nested_code, host->nested_code, 256 * sizeof(float));
    cr_assert_arr_eq(m->nested_absmax, host->nested_absmax,
                     (size_t)(blocks + 255) / 256 * sizeof(float));
}

/* On the CPU, with every array to be freed. */
static gn_matrix quantize(gn_qtype type, bool nested, const void *src, gn_dtype dtype, int64_t rows,
                          int64_t cols, float **absmax) {
    const gn_quant_sizes s = gn_quant_sizes_of(type, nested, rows, cols);
    gn_quant_out out = {malloc(s.data), malloc(s.absmax), nested ? malloc(s.absmax_u8) : NULL,
                        nested ? malloc(s.nested_absmax) : NULL, 0};
    cr_assert_eq(gn_quantize(&out, type, src, dtype, rows, cols, 1, NULL), GN_OK);
    *absmax = out.absmax;
    gn_matrix m = {.qtype = type, .dtype = dtype, .rows = rows, .cols = cols, .data = out.data};
    m.code = gn_qtype_is_4bit(type) ? gn_code_values(type) : NULL;
    m.absmax = nested ? NULL : out.absmax;
    m.absmax_u8 = out.absmax_u8;
    m.nested_code = nested ? gn_dynamic_map() : NULL;
    m.nested_absmax = out.nested_absmax;
    m.offset = out.offset;
    return m;
}

static void check(gn_ctx *ctx, gn_qtype type, bool nested, gn_dtype dtype, int64_t rows,
                  int64_t cols, kind k) {
    char *src = make(k, type, dtype, rows * cols);
    float *absmax;
    const gn_matrix host = quantize(type, nested, src + 1, dtype, rows, cols, &absmax);
    gn_matrix placed, quantized;
    gn_error err = {0};
    region r = region_of(ctx, gn_place_bytes(ctx, &host));
    cr_assert_eq(gn_place(ctx, &placed, &host, r.memory), GN_OK);
    placed = read_back(ctx, &r, placed);
    assert_same(ctx, &placed, &host);
    discard(ctx, &r);
    r = region_of(ctx, gn_quantize_place_bytes(ctx, type, nested, rows, cols));
    cr_assert_eq(gn_quantize_place(ctx, &quantized, type, nested, src + 1, dtype, rows, cols,
                                   r.memory, &err),
                 GN_OK, "%s", err.message);
    quantized = read_back(ctx, &r, quantized);
    assert_same(ctx, &quantized, &host);
    /* A value that is not finite is named. */
    const float bad = NAN;
    char expected[64];
    gn_narrow(src + 1 + (size_t)(rows * cols / 2) * gn_dtype_size(dtype), dtype, &bad, 1);
    snprintf(expected, sizeof expected, "row %lld, column %lld ",
             (long long)(rows * cols / 2 / cols), (long long)(rows * cols / 2 % cols));
    cr_assert_eq(gn_quantize_place(ctx, &quantized, type, nested, src + 1, dtype, rows, cols,
                                   r.memory, &err),
                 GN_EINVAL);
    cr_assert(strstr(err.message, expected), "%s", err.message);
    discard(ctx, &r);
    free(src);
    free(absmax);
    free((void *)host.data);
    free((void *)host.absmax_u8);
    free((void *)host.nested_absmax);
}

/* NULL on a machine without that device. */
static gn_ctx *open(const char *device) {
    gn_ctx *ctx;
    const gn_ctx_options options = {.device = device, .compute = GN_F32, .threads = 2};
    const gn_status status = gn_ctx_open(&ctx, &options, NULL);
    cr_assert(status == GN_OK || status == GN_EDEVICE);
    return ctx;
}

static void check_all(const char *device) {
    gn_ctx *ctx = open(device);
    if (!ctx) cr_skip_test("no %s", device);
    srand(7);
    for (int type = GN_Q_NF4; type <= GN_Q_INT8; type++)
        for (size_t d = 0; d < sizeof dtypes / sizeof *dtypes; d++)
            for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
                for (int k = 0; k < KINDS; k++)
                    for (int nested = 0; nested < (gn_qtype_is_4bit((gn_qtype)type) ? 2 : 1);
                         nested++)
                        check(ctx, (gn_qtype)type, nested, dtypes[d], shapes[s][0], shapes[s][1],
                              dtypes[d] == GN_F16 && k == WILD ? SMALL : (kind)k);
    gn_ctx_close(ctx);
}

Test(place, quantized_on_the_cpu) {
    check_all("cpu");
}

Test(place, quantized_on_the_gpu) {
    check_all("cuda");
}

/* More than crosses the bus at a time, and rows that do not fill the last tiles. */
static void check_large(const char *device) {
    gn_ctx *ctx = open(device);
    if (!ctx) cr_skip_test("no %s", device);
    srand(8);
    check(ctx, GN_Q_NF4, true, GN_F32, 1101, 4096, SMALL);
    check(ctx, GN_Q_FP4, false, GN_F32, 1101, 4097, SMALL);
    check(ctx, GN_Q_INT8, false, GN_F32, 1101, 4096, SMALL);
    gn_ctx_close(ctx);
}

Test(place, large_on_the_cpu) {
    check_large("cpu");
}

Test(place, large_on_the_gpu) {
    check_large("cuda");
}

static void check_plain(const char *device) {
    gn_ctx *ctx = open(device);
    if (!ctx) cr_skip_test("no %s", device);
    const int64_t rows = 1031,
                  cols = 4099; /* several buffers of the upload, none full at the end */
    for (size_t d = 0; d < sizeof dtypes / sizeof *dtypes; d++) {
        char *src = make(SMALL, GN_Q_NF4, dtypes[d], rows * cols);
        const gn_matrix host = {.dtype = dtypes[d], .rows = rows, .cols = cols, .data = src + 1};
        gn_matrix placed;
        region r = region_of(ctx, gn_place_bytes(ctx, &host));
        cr_assert_eq(gn_place(ctx, &placed, &host, r.memory), GN_OK);
        placed = read_back(ctx, &r, placed);
        assert_same(ctx, &placed, &host);
        discard(ctx, &r);
        free(src);
    }
    gn_ctx_close(ctx);
}

Test(place, plain_on_the_cpu) {
    check_plain("cpu");
}

Test(place, plain_on_the_gpu) {
    check_plain("cuda");
}

Test(place, refusals) {
    gn_ctx *ctx = open("cpu");
    gn_matrix m;
    gn_error err = {0};
    float v[64] = {0};
    _Alignas(64) char memory[1024];
    cr_assert_eq(gn_quantize_place(NULL, &m, GN_Q_NF4, true, v, GN_F32, 1, 64, memory, &err),
                 GN_EINVAL);
    cr_assert_eq(gn_quantize_place(ctx, &m, GN_Q_NF4, true, NULL, GN_F32, 1, 64, memory, &err),
                 GN_EINVAL);
    cr_assert_eq(gn_quantize_place(ctx, &m, GN_Q_NONE, true, v, GN_F32, 1, 64, memory, &err),
                 GN_EINVAL);
    cr_assert_eq(gn_quantize_place(ctx, &m, GN_Q_NF4, true, v, GN_I32, 1, 64, memory, &err),
                 GN_EINVAL);
    cr_assert_eq(gn_quantize_place(ctx, &m, GN_Q_NF4, true, v, GN_F32, 0, 64, memory, &err),
                 GN_EINVAL);
    cr_assert_eq(gn_quantize_place(ctx, &m, GN_Q_NF4, true, v, GN_F32, INT64_MAX, 2, memory, &err),
                 GN_EINVAL);
    gn_ctx_close(ctx);
}
