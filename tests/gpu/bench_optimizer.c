/* bench_optimizer.c - what an update costs, and what paging adds; run by hand, not a test.
 *
 * usage: bench_optimizer [MILLIONS] (160: LLaMA-7B's LoRA at r 64 on all linear layers) [DEVICE].
 * For 32- and 8-bit moments: milliseconds of the gradient's norm and of the update, with all state
 * on the device and with shares of it; the bytes an update moves in device memory over its time;
 * and the traffic of pages a step. */
#include "trainer/optimizer.h"

#include <stdio.h>
#include <stdlib.h>

#include "tests/gpu/bench.h"

enum { WARM = 2, STEPS = 10 };

static double norm_ms(gn_optimizer *o, const gn_error *err) {
    double norm, begin = 0;
    for (int i = -WARM; i < STEPS; i++) {
        if (i == 0) begin = seconds();
        check(gn_optimizer_grad_norm(o, &norm), err);
    }
    return (seconds() - begin) / STEPS * 1e3;
}

static double step_ms(gn_ctx *ctx, gn_optimizer *o, const gn_error *err) {
    double begin = 0;
    for (int i = -WARM; i < STEPS; i++) {
        if (i == 0) {
            check(gn_ctx_wait(ctx), err);
            begin = seconds();
        }
        check(gn_optimizer_prefetch(o), err);
        check(gn_optimizer_step(o, 1e-4, 1), err);
    }
    check(gn_ctx_wait(ctx), err);
    return (seconds() - begin) / STEPS * 1e3;
}

static void measure(gn_ctx *ctx, gn_parameters *p, bool eight_bit, double share) {
    gn_error err = {0};
    gn_page_device *pages;
    gn_optimizer *o;
    const double n = (double)p->weights.shape[0];
    const double state = n * (eight_bit ? 6 + 8.0 / GN_MOMENT_BLOCK : 12);
    const gn_optimizer_options options = {.eight_bit = eight_bit,
                                          .beta1 = 0.9f,
                                          .beta2 = 0.999f,
                                          .eps = 1e-8f,
                                          .budget = share < 1 ? (size_t)(share * state) : SIZE_MAX};
    check(gn_page_device_open(&pages, ctx), &err);
    check(gn_optimizer_open(&o, p, &options, pages, &err), &err);
    const double norm = norm_ms(o, &err);
    const double ms = step_ms(ctx, o, &err);
    const gn_page_stats s = gn_pages_read_stats(gn_optimizer_pages(o));
    const double moved =
        2 * state + n * (double)(gn_dtype_size(p->grads.dtype) + gn_dtype_size(p->weights.dtype));
    printf("%2d-bit moments, %3.0f%% resident: norm %7.3f ms, update %8.3f ms (%6.0f GB/s), "
           "pages %6.2f GB up, %6.2f GB down a step, peak %5.2f GB\n",
           eight_bit ? 8 : 32, 100 * share, norm, ms, moved / ms / 1e6,
           (double)s.uploaded / (WARM + STEPS) / 1e9, (double)s.downloaded / (WARM + STEPS) / 1e9,
           (double)s.peak / 1e9);
    fflush(stdout);
    gn_optimizer_close(o);
    gn_page_device_close(pages);
}

int main(int argc, char **argv) {
    static const double shares[] = {1, 0.5, 0.1};
    gn_error err = {0};
    gn_ctx *ctx;
    gn_parameters *p;
    const double millions = argc > 1 ? atof(argv[1]) : 160;
    const gn_parameter item = {.name = "x", .ndim = 1, .shape = {(int64_t)(millions * 1e6)}};
    check(gn_ctx_open(&ctx, &(gn_ctx_options){.device = argc > 2 ? argv[2] : "cuda"}, &err), &err);
    check(gn_parameters_open(&p, ctx, &item, 1, GN_BF16, GN_F32, &err), &err);
    printf("%s, %.0f million parameters, BF16 weights, F32 gradients\n", gn_ctx_device(ctx),
           millions);
    for (int eight_bit = 0; eight_bit < 2; eight_bit++)
        for (size_t i = 0; i < sizeof shares / sizeof *shares; i++)
            measure(ctx, p, eight_bit, shares[i]);
    gn_parameters_close(p);
    gn_ctx_close(ctx);
    return 0;
}
