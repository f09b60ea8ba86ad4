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

enum { PAD = 8 };

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

/* All types, as bf16 and as float32. */
static void check_regions(int64_t rows, int64_t cols, const gn_cuda_region *regions, int n) {
    for (int i = 0; i < COUNT(types) * n * 2; i++) {
        const int type = i % COUNT(types);
        const gn_cuda_region *r = &regions[i / COUNT(types) % n];
        const gn_dtype dtype = i < COUNT(types) * n ? GN_BF16 : GN_F32;
        rng random = {(uint64_t)cols};
        gn_ctx *ctx = open_on("cuda", GN_BF16);
        device_memory memory = {.ctx = ctx};
        random_matrix host = make_matrix(&random, types[type].qtype, types[type].double_quant,
                                         types[type].dtype, rows, cols);
        const gn_matrix placed = device_matrix(&memory, &host.m);
        const int64_t ld = r->cols + (i % 3 == 0 ? 0 : PAD);
        const gn_tensor to = device_rows(&memory, NULL, dtype, r->rows, ld, 0, 0);
        cr_assert_eq(gn_cuda_dequantize(ctx, &placed, r, to.data, ld, dtype), GN_OK);
        cr_assert(is_there(&host.m, r, to.data, ld, dtype), "type %d, region %d of %dx%d, %s", type,
                  (int)(r - regions), (int)rows, (int)cols, gn_dtype_name(dtype));
        cr_assert(guards_stand(&memory));
        free_matrix(&host);
        device_free(&memory);
        gn_ctx_close(ctx);
    }
}

Test(dequantize, regions) {
    const gn_cuda_region regions[] = {
        {0, 24, 0, 64}, {8, 13, 64, 320}, {16, 8, 128, 64}, {0, 64, 0, 448}, {40, 24, 192, 256}};
    check_regions(64, 448, regions, COUNT(regions));
}

Test(dequantize, whole_weights) {
    const int64_t rows[] = {5, 48, 139}, cols[] = {64, 192, 512, 704};
    for (int i = 0; i < COUNT(rows) * COUNT(cols); i++) {
        const gn_cuda_region whole = {0, rows[i % COUNT(rows)], 0, cols[i / COUNT(rows)]};
        check_regions(whole.rows, whole.cols, &whole, 1);
    }
}
