/* What a device can do at best, and what is refused. With GN_TEST_DEVICE on that device. */
#include "kernels/measure.h"

#include <criterion/criterion.h>
#include <stdlib.h>

static gn_ctx *open_device(gn_dtype compute) {
    gn_ctx *ctx = NULL;
    gn_error err = {0};
    const char *device = getenv("GN_TEST_DEVICE");
    const gn_ctx_options options = {.device = device ? device : "cpu", .compute = compute};
    cr_assert_eq(gn_ctx_open(&ctx, &options, &err), GN_OK, "%s", err.message);
    return ctx;
}

/* Between what a machine of the last decades does and what none does. */
Test(measure, rates_are_plausible) {
    static const gn_dtype dtypes[] = {GN_F32, GN_BF16};
    for (int i = 0; i < 2; i++) {
        gn_ctx *ctx = open_device(dtypes[i]);
        gn_rates rates;
        cr_assert_eq(gn_measure_rates(ctx, &rates), GN_OK);
        cr_assert(rates.read_bytes > 1e8 && rates.read_bytes < 1e14, "%g", rates.read_bytes);
        cr_assert(rates.copy_bytes > 1e8 && rates.copy_bytes < 1e14, "%g", rates.copy_bytes);
        cr_assert(rates.flop == 0 || (rates.flop > 1e8 && rates.flop < 1e17), "%g", rates.flop);
        cr_assert(gn_ctx_is_host(ctx) || rates.flop > 0);
        gn_ctx_close(ctx);
    }
}

Test(measure, memory_in_use) {
    gn_ctx *ctx = open_device(GN_F32);
    const size_t bytes = (size_t)64 << 20, before = gn_measure_used_bytes(ctx);
    void *memory = gn_ctx_alloc(ctx, bytes);
    cr_assert(memory);
    const size_t with = gn_measure_used_bytes(ctx);
    if (gn_ctx_is_host(ctx))
        cr_assert_eq(with, 0);
    else
        cr_assert(with >= before + bytes, "%zu after %zu", with, before);
    gn_ctx_free(ctx, memory);
    gn_ctx_close(ctx);
}

Test(measure, quantizing) {
    static const int64_t shapes[][2] = {{1024, 1024}, {257, 192}, {3, 50}, {1, 1}};
    gn_ctx *ctx = open_device(GN_F32);
    for (gn_qtype type = GN_Q_NF4; type < GN_QTYPE_COUNT; type++)
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
            for (int nested = 0; nested < 2; nested++) {
                double seconds = -1, back = -1;
                cr_assert_eq(gn_measure_quantize(ctx, type, nested, shapes[i][0], shapes[i][1],
                                                 &seconds, &back),
                             GN_OK);
                cr_assert(seconds > 0 && seconds < 10, "%s: %g s", gn_qtype_name(type), seconds);
                cr_assert(gn_ctx_is_host(ctx) ? back == 0 : back > 0 && back < 10, "%g s", back);
            }
    double seconds, back;
    cr_assert_eq(gn_measure_quantize(ctx, GN_Q_NONE, false, 8, 64, &seconds, &back), GN_EINVAL);
    cr_assert_eq(gn_measure_quantize(ctx, GN_Q_NF4, false, 0, 64, &seconds, &back), GN_EINVAL);
    cr_assert_eq(gn_measure_quantize(ctx, GN_Q_NF4, false, INT64_MAX, 64, &seconds, &back),
                 GN_EINVAL);
    cr_assert_eq(gn_measure_quantize(ctx, GN_Q_NF4, false, 8, 64, NULL, &back), GN_EINVAL);
    cr_assert_eq(gn_measure_rates(ctx, NULL), GN_EINVAL);
    gn_ctx_close(ctx);
}
