/* gn_cuda_dequantize, emulated, against gn_dequantize: equal to the bit, and nothing else written.
 */
#include "kernels/cuda/operands.h"

#include "tests/gpu/device.h"

static const struct {
    gn_qtype qtype;
    bool double_quant;
    gn_dtype dtype;
} types[] = {
    {GN_Q_NF4, true, GN_BF16},      {GN_Q_NF4, false, GN_BF16}, {GN_Q_FP4, true, GN_F16},
    {GN_Q_FP4_E2M1, false, GN_F32}, {GN_Q_INT4, false, GN_F16},
};

enum { PARTS = 3, PAD = 8 };

/* Weights of `cols` columns, on the device. */
typedef struct {
    gn_ctx *ctx;
    device_memory memory;
    int n;
    random_matrix host[PARTS];
    gn_matrix placed[PARTS];
} weights;

static void open_weights(weights *w, int sms, int n, const int *type, const int64_t *rows,
                         int64_t cols) {
    rng r = {(uint64_t)cols};
    *w = (weights){.ctx = open_on("cuda", GN_BF16), .n = n};
    w->ctx->cuda->sms = sms;
    w->memory.ctx = w->ctx;
    for (int i = 0; i < n; i++) {
        w->host[i] = make_matrix(&r, types[type[i]].qtype, types[type[i]].double_quant,
                                 types[type[i]].dtype, rows[i], cols);
        w->placed[i] = device_matrix(&w->memory, &w->host[i].m);
    }
}

static void close_weights(weights *w) {
    for (int i = 0; i < w->n; i++) free_matrix(&w->host[i]);
    device_free(&w->memory);
    gn_ctx_close(w->ctx);
}

/* Whether a region stands at `at`, rows ld apart, and the gaps hold 0xff. Zeros have any sign: of
 * half precision the host's CUDA header loses it. */
static bool is_there(const gn_matrix *m, const gn_cuda_region *r, const char *at, int64_t ld,
                     gn_dtype dtype) {
    const size_t size = gn_dtype_size(dtype), row_bytes = (size_t)r->cols * size;
    float *want = malloc((size_t)r->cols * sizeof *want);
    float *found = malloc((size_t)r->cols * sizeof *found);
    bool same = true;
    for (int64_t i = 0; i < r->rows && same; i++, at += (size_t)ld * size) {
        gn_dequantize(want, m, (r->row0 + i) * m->cols + r->col0, r->cols);
        round_floats(want, dtype, r->cols);
        gn_widen(found, at, dtype, r->cols);
        for (int64_t c = 0; c < r->cols; c++) same &= found[c] == want[c];
        for (size_t b = row_bytes; b < (size_t)ld * size; b++) same &= at[b] == (char)0xff;
    }
    free(want);
    free(found);
    return same;
}

Test(dequantize, regions) {
    const gn_cuda_region regions[] = {
        {0, 24, 0, 64}, {8, 13, 64, 320}, {16, 8, 128, 64}, {0, 64, 0, 448}, {40, 24, 192, 256}};
    const int64_t rows = 64, cols = 448;
    for (int i = 0; i < COUNT(types) * COUNT(regions) * 2; i++) {
        const int type = i % COUNT(types);
        const gn_cuda_region *r = &regions[i / COUNT(types) % COUNT(regions)];
        const gn_dtype dtype = i < COUNT(types) * COUNT(regions) ? GN_BF16 : GN_F32;
        weights w;
        open_weights(&w, 1 + i % 2, 1, &type, &rows, cols);
        const int64_t ld = r->cols + (i % 3 == 0 ? 0 : PAD);
        const gn_tensor to = device_rows(&w.memory, NULL, dtype, r->rows, ld, 0, 0);
        cr_assert_eq(gn_cuda_dequantize(w.ctx, &w.placed[0], r, to.data, ld, dtype), GN_OK);
        cr_assert(is_there(&w.host[0].m, r, to.data, ld, dtype), "type %d, region %d, %s", type,
                  (int)(r - regions), gn_dtype_name(dtype));
        cr_assert(guards_stand(&w.memory));
        close_weights(&w);
    }
}

/* Weights of a call, of different types, one below the other: all at once, and beside. */
Test(dequantize, weights_of_a_call) {
    const int64_t rows[PARTS] = {48, 8, 136}, cols[] = {64, 192, 512, 704};
    const int type[PARTS] = {0, 2, 3};
    for (int i = 0; i < COUNT(cols) * PARTS * 2; i++) {
        const int n = 1 + i % PARTS;
        const int64_t K = cols[i / PARTS % COUNT(cols)], ld = K + PAD * (i % 2);
        const gn_cuda_beside beside = {.sms = 4};
        gn_linear_weights call = {.n = n};
        int64_t all = 0;
        weights w;
        open_weights(&w, 5, n, type, rows, K);
        for (int p = 0; p < n; p++) call.w[p] = &w.placed[p], all += rows[p];
        const gn_tensor to = device_rows(&w.memory, NULL, GN_BF16, all, ld, 0, 0);
        cr_assert_eq(gn_cuda_dequantize_product(w.ctx, &call, to.data, ld,
                                                i < COUNT(cols) * PARTS ? &beside : NULL),
                     GN_OK);
        const char *at = to.data;
        for (int p = 0; p < n; at += (size_t)(rows[p++] * ld) * sizeof(uint16_t)) {
            const gn_cuda_region whole = {0, rows[p], 0, K};
            cr_assert(is_there(&w.host[p].m, &whole, at, ld, GN_BF16), "%d weights, %d columns, %d",
                      n, (int)K, p);
        }
        cr_assert(guards_stand(&w.memory));
        close_weights(&w);
    }
}
