/* gn_convert, every pair of dtypes, shapes with and without whole packs, rows apart: the bits of
 * gn_widen and gn_narrow, and nothing outside. GN_TEST_DEVICE=cuda tests a GPU. */
#include "cases.h"

#include "kernels/ops_train.h"

enum { UNTOUCHED = 0xa5 };

static const struct {
    int64_t rows, cols, x_ld, y_ld;
    int shift; /* elements that x and y begin after the beginning of their memory */
} shapes[] = {
    {1, 1, 1, 1, 0},    {3, 64, 64, 64, 0}, {5, 7, 7, 7, 0},         {4, 12, 16, 20, 4},
    {4, 12, 16, 20, 1}, {2, 64, 67, 64, 0}, {130, 256, 256, 260, 0}, {1, 1022, 1022, 1022, 2},
};

static float value(int64_t i) {
    static const float special[] = {0.0f, -0.0f, INFINITY, -INFINITY, 3.4e38f, 1e-40f, 1.00390625f};
    return i % 11 < COUNT(special) ? special[i % 11] : sinf((float)i) * 100.0f;
}

/* x widened and then narrowed; the dtypes are F32 and BF16. */
static void expect(char *y, gn_dtype to, const char *x, gn_dtype from, int64_t n) {
    float wide[2048];
    gn_widen(wide, x, from, n);
    gn_narrow(y, to, wide, n);
}

static void check(gn_ctx *ctx, int shape, gn_dtype to, gn_dtype from) {
    const int64_t rows = shapes[shape].rows, cols = shapes[shape].cols;
    const int64_t x_ld = shapes[shape].x_ld, y_ld = shapes[shape].y_ld;
    const size_t in = gn_dtype_size(from), out = gn_dtype_size(to);
    const size_t x0 = (size_t)shapes[shape].shift * in, y0 = (size_t)shapes[shape].shift * out;
    const size_t x_bytes = x0 + (size_t)(rows * x_ld) * in;
    const size_t y_bytes = y0 + (size_t)(rows * y_ld) * out + 64;
    char *x = malloc(x_bytes), *expected = malloc(y_bytes), *found = malloc(y_bytes);
    for (int64_t i = 0; i < (int64_t)(x_bytes / in); i++) {
        const float v = value(i);
        gn_narrow(x + (size_t)i * in, from, &v, 1);
    }
    memset(expected, UNTOUCHED, y_bytes);
    char *x_memory = gn_ctx_alloc(ctx, x_bytes), *y_memory = gn_ctx_alloc(ctx, y_bytes);
    cr_assert_eq(gn_ctx_write(ctx, x_memory, x, x_bytes), GN_OK);
    cr_assert_eq(gn_ctx_write(ctx, y_memory, expected, y_bytes), GN_OK);
    for (int64_t t = 0; t < rows; t++)
        expect(expected + y0 + (size_t)(t * y_ld) * out, to, x + x0 + (size_t)(t * x_ld) * in, from,
               cols);
    gn_tensor xt = gn_tensor_2d(x_memory + x0, from, rows, cols);
    gn_tensor yt = gn_tensor_2d(y_memory + y0, to, rows, cols);
    xt.ld = x_ld;
    yt.ld = y_ld;
    cr_assert_eq(gn_convert(ctx, &yt, &xt), GN_OK);
    cr_assert_eq(gn_ctx_read(ctx, found, y_memory, y_bytes), GN_OK);
    cr_assert(!memcmp(found, expected, y_bytes), "shape %d, %s from %s", shape, gn_dtype_name(to),
              gn_dtype_name(from));
    gn_ctx_free(ctx, x_memory);
    gn_ctx_free(ctx, y_memory);
    free(x);
    free(expected);
    free(found);
}

Test(convert, gives_the_bits_of_widen_and_narrow) {
    static const gn_dtype dtypes[] = {GN_F32, GN_BF16};
    const char *device = getenv("GN_TEST_DEVICE");
    gn_ctx *ctx = NULL;
    gn_error err = {0};
    const gn_ctx_options options = {.device = device ? device : "cpu", .threads = 3};
    cr_assert_eq(gn_ctx_open(&ctx, &options, &err), GN_OK, "%s", err.message);
    for (int i = 0; i < COUNT(shapes); i++)
        for (int to = 0; to < 2; to++)
            for (int from = 0; from < 2; from++) check(ctx, i, dtypes[to], dtypes[from]);
    gn_ctx_close(ctx);
}
