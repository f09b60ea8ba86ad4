/* AdamW against its formula in double, for every mix of types; what threads may not change; and
 * calls that every backend must refuse. tests/golden/test_optimizer.c has bitsandbytes' values. */
#include "adamw_cases.h"

#include "kernels/quant_tables.h"

static gn_ctx *open_threads(int threads) {
    gn_ctx *ctx;
    gn_error err = {0};
    cr_assert_eq(gn_ctx_open(&ctx, &(gn_ctx_options){.device = "cpu", .threads = threads}, &err),
                 GN_OK, "%s", err.message);
    cr_assert_eq(gn_ctx_reserve(ctx, GN_SUM_WORKSPACE), GN_OK);
    return ctx;
}

Test(adamw, first_step_follows_the_formula_in_every_mix_of_types) {
    for (int k = 0; k < COUNT(adamw_cases); k++) {
        adamw_arrays a = adamw_arrays_open(&adamw_cases[k], (uint64_t)k);
        const size_t n = (size_t)a.c.n;
        float *before = malloc(n * sizeof *before), *grad = malloc(n * sizeof *grad);
        float *weight = malloc(n * sizeof *weight);
        memcpy(before, a.master, n * sizeof *before);
        gn_widen(grad, a.grad, a.c.grad, a.c.n);
        gn_ctx *ctx = open_threads(2);
        const gn_adamw_args args = adamw_args_of(&a, 1);
        cr_assert_eq(gn_adamw(ctx, &args), GN_OK);
        if (args.weight.data) gn_widen(weight, a.weight, a.c.weight, a.c.n);
        for (size_t i = 0; i < n; i++) {
            /* After one step the moments, corrected, are the gradient and its square. */
            const double g = (double)grad[i] * args.grad_scale;
            const double p = (before[i] - args.lr * g / (fabs(g) + args.eps)) *
                             (1 - (double)args.lr * args.weight_decay);
            cr_assert(fabs(a.master[i] - p) <= 8 * 0x1p-24 * (fabs(p) + args.lr),
                      "case %d: parameter %zu is %.9g, expected %.9g", k, i, (double)a.master[i],
                      p);
            if (args.weight.data)
                cr_assert_eq(weight[i], a.c.weight == GN_BF16
                                            ? gn_bf16_to_f32(gn_f32_to_bf16(a.master[i]))
                                            : a.master[i]);
        }
        gn_ctx_close(ctx);
        free(before);
        free(grad);
        free(weight);
        adamw_arrays_close(&a);
    }
}

Test(adamw, eight_bit_moments_are_the_nearest_codes_and_keep_their_sign) {
    const adamw_case c = {1000, GN_U8, GN_F32, GN_I32};
    adamw_arrays a = adamw_arrays_open(&c, 5);
    float *grad = a.grad;
    grad[3] = -1e-12f; /* too small for a code, but negative */
    grad[4] = 1e-12f;
    grad[5] = 0;
    gn_ctx *ctx = open_threads(1);
    const gn_adamw_args args = adamw_args_of(&a, 1);
    cr_assert_eq(gn_adamw(ctx, &args), GN_OK);
    const uint8_t *m = a.m, *v = a.v;
    for (int i = 0; i < c.n; i++) {
        const float g = grad[i] * args.grad_scale;
        const float value = (1 - args.beta1) * g / a.m_absmax[i / GN_MOMENT_BLOCK];
        if (i != 3) cr_assert_eq(m[i], gn_nearest_of_256(gn_dynamic_map(), value), "%d", i);
        cr_assert_eq(v[i],
                     gn_nearest_of_256(gn_dynamic_map_unsigned(),
                                       (1 - args.beta2) * g * g / a.v_absmax[i / GN_MOMENT_BLOCK]));
    }
    cr_assert_lt(gn_dynamic_map()[m[3]], 0);
    cr_assert_eq(m[4], GN_ZERO_CODE);
    cr_assert_eq(m[5], GN_ZERO_CODE);
    cr_assert_eq(gn_dynamic_map()[GN_ZERO_CODE], 0);
    gn_ctx_close(ctx);
    adamw_arrays_close(&a);
}

Test(adamw, a_block_without_gradients_stays_at_rest) {
    const adamw_case c = {300, GN_U8, GN_F32, GN_I32};
    adamw_arrays a = adamw_arrays_open(&c, 6);
    memset(a.grad, 0, (size_t)c.n * sizeof(float));
    memset(a.master, 0, (size_t)c.n * sizeof(float));
    gn_ctx *ctx = open_threads(1);
    for (int step = 1; step <= 2; step++) {
        const gn_adamw_args args = adamw_args_of(&a, step);
        cr_assert_eq(gn_adamw(ctx, &args), GN_OK);
    }
    for (int i = 0; i < c.n; i++) cr_assert_eq(a.master[i], 0);
    cr_assert_eq(a.m_absmax[0], 0);
    cr_assert_eq(a.v_absmax[1], 0);
    gn_ctx_close(ctx);
    adamw_arrays_close(&a);
}

Test(adamw, neither_threads_nor_pieces_change_a_bit) {
    for (int k = 0; k < COUNT(adamw_cases); k++) {
        adamw_arrays a = adamw_arrays_open(&adamw_cases[k], (uint64_t)k);
        adamw_arrays b = adamw_arrays_open(&adamw_cases[k], (uint64_t)k);
        gn_ctx *one = open_threads(1), *three = open_threads(3);
        for (int step = 1; step <= 3; step++) {
            const gn_adamw_args whole = adamw_args_of(&a, step);
            cr_assert_eq(gn_adamw(three, &whole), GN_OK);
            for (int64_t first = 0; first < a.c.n; first += 8192) {
                const int64_t n = a.c.n - first < 8192 ? a.c.n - first : 8192;
                gn_adamw_args piece = adamw_args_of(&b, step);
                gn_tensor *all[] = {&piece.master, &piece.weight, &piece.grad, &piece.m.values,
                                    &piece.v.values};
                for (int i = 0; i < COUNT(all); i++) {
                    if (!all[i]->data) continue;
                    all[i]->data =
                        (char *)all[i]->data + (size_t)first * gn_dtype_size(all[i]->dtype);
                    all[i]->shape[0] = n;
                }
                piece.m.absmax += first / GN_MOMENT_BLOCK;
                piece.v.absmax += first / GN_MOMENT_BLOCK;
                cr_assert_eq(gn_adamw(one, &piece), GN_OK);
            }
        }
        const size_t n = (size_t)a.c.n;
        cr_assert(memcmp(a.master, b.master, n * sizeof(float)) == 0, "case %d", k);
        cr_assert(memcmp(a.weight, b.weight, n * sizeof(float)) == 0, "case %d", k);
        cr_assert(memcmp(a.m, b.m, n * gn_dtype_size(a.c.moments)) == 0, "case %d", k);
        cr_assert(memcmp(a.v, b.v, n * gn_dtype_size(a.c.moments)) == 0, "case %d", k);
        gn_ctx_close(one);
        gn_ctx_close(three);
        adamw_arrays_close(&a);
        adamw_arrays_close(&b);
    }
}

Test(adamw, sums_of_squares) {
    const int64_t sizes[] = {0, 1, 255, 16384, 16385, 1000003, 9000001};
    const gn_dtype dtypes[] = {GN_F32, GN_BF16};
    gn_ctx *one = open_threads(1), *three = open_threads(3);
    for (int k = 0; k < COUNT(sizes) * COUNT(dtypes); k++) {
        const int64_t n = sizes[k / 2];
        rng r = {(uint64_t)k};
        void *values = random_values(&r, dtypes[k % 2], (size_t)n);
        float *wide = malloc((size_t)(n + 1) * sizeof *wide);
        gn_widen(wide, values, dtypes[k % 2], n);
        double expected = 0, a = 5, b = 5;
        for (int64_t i = 0; i < n; i++) expected += (double)wide[i] * wide[i];
        const gn_tensor x = gn_tensor_1d(values, dtypes[k % 2], n);
        cr_assert_eq(gn_sum_squares(one, &a, &x), GN_OK);
        cr_assert_eq(gn_sum_squares(three, &b, &x), GN_OK);
        cr_assert(fabs(a - 5 - expected) <= 1e-11 * (expected + 5), "n=%lld", (long long)n);
        cr_assert(memcmp(&a, &b, sizeof a) == 0, "n=%lld: threads change the sum", (long long)n);
        free(values);
        free(wide);
    }
    gn_ctx_close(one);
    gn_ctx_close(three);
}

Test(adamw, clipping_is_torchs) {
    cr_assert_eq(gn_clip_scale(0.2, 0.3), 1);
    cr_assert_eq(gn_clip_scale(3, 0.3), (float)(0.3 / (3 + 1e-6)));
    cr_assert_eq(gn_clip_scale(3, 0), 1);
    cr_assert_eq(gn_clip_scale(0, 0.3), 1);
}

Test(adamw, refusals) {
    const adamw_case c = {300, GN_U8, GN_F32, GN_BF16};
    adamw_arrays a = adamw_arrays_open(&c, 9);
    gn_ctx *ctx = open_threads(1);
    const gn_adamw_args good = adamw_args_of(&a, 1);
    gn_adamw_args bad;
    cr_assert_eq(gn_adamw(NULL, &good), GN_EINVAL);
    cr_assert_eq(gn_adamw(ctx, NULL), GN_EINVAL);
#define REFUSE(change)                                                                             \
    do {                                                                                           \
        bad = good;                                                                                \
        change;                                                                                    \
        cr_assert_eq(gn_adamw(ctx, &bad), GN_EINVAL, #change);                                     \
    } while (0)
    REFUSE(bad.step = 0);
    REFUSE(bad.beta1 = 1);
    REFUSE(bad.beta2 = -0.1f);
    REFUSE(bad.beta2 = NAN);
    REFUSE(bad.lr = INFINITY);
    REFUSE(bad.eps = -1);
    REFUSE(bad.grad_scale = NAN);
    REFUSE(bad.master.dtype = GN_BF16);
    REFUSE(bad.master.data = NULL);
    REFUSE(bad.grad.shape[0] = 299);
    REFUSE(bad.grad.dtype = GN_F16);
    REFUSE(bad.weight.shape[0] = 299);
    REFUSE(bad.weight.dtype = GN_F16);
    REFUSE(bad.m.values.dtype = GN_F32);
    REFUSE(bad.m.absmax = NULL);
    REFUSE(bad.v.absmax = (float *)((char *)bad.v.absmax + 1));
    REFUSE(bad.v.values.shape[0] = 301);
#undef REFUSE
    double sum = 0;
    gn_tensor x = good.grad;
    cr_assert_eq(gn_sum_squares(ctx, NULL, &x), GN_EINVAL);
    x.dtype = GN_I32;
    cr_assert_eq(gn_sum_squares(ctx, &sum, &x), GN_EINVAL);
    gn_ctx *bare;
    cr_assert_eq(gn_ctx_open(&bare, &(gn_ctx_options){.device = "cpu", .threads = 1}, NULL), GN_OK);
    cr_assert_eq(gn_sum_squares(bare, &sum, &good.grad), GN_ENOMEM);
    gn_ctx_close(bare);
    gn_ctx_close(ctx);
    adamw_arrays_close(&a);
}
