/* Learning rates at points where the formulas of transformers' optimization.py are easily worked
 * out. */
#include "trainer/schedule.h"

#include <criterion/criterion.h>
#include <math.h>

static void expect(gn_lr_kind kind, int64_t warmup, int64_t total, int64_t step, double expected) {
    const gn_lr_schedule s = {kind, 2e-4, warmup, total};
    const double got = gn_lr_at(&s, step);
    cr_assert(fabs(got - expected) <= 1e-18, "step %lld of %lld: %.17g, expected %.17g",
              (long long)step, (long long)total, got, expected);
}

Test(lr_schedule, constant) {
    expect(GN_LR_CONSTANT, 57, 1875, 0, 2e-4);
    expect(GN_LR_CONSTANT, 57, 1875, 1874, 2e-4);
    expect(GN_LR_CONSTANT_WITH_WARMUP, 4, 10, 0, 0);
    expect(GN_LR_CONSTANT_WITH_WARMUP, 4, 10, 1, 0.5e-4);
    expect(GN_LR_CONSTANT_WITH_WARMUP, 4, 10, 4, 2e-4);
    expect(GN_LR_CONSTANT_WITH_WARMUP, 0, 10, 0, 2e-4);
}

Test(lr_schedule, linear) {
    expect(GN_LR_LINEAR, 0, 10, 0, 2e-4);
    expect(GN_LR_LINEAR, 0, 10, 9, 0.2e-4);
    expect(GN_LR_LINEAR, 2, 10, 0, 0);
    expect(GN_LR_LINEAR, 2, 10, 1, 1e-4);
    expect(GN_LR_LINEAR, 2, 10, 2, 2e-4);
    expect(GN_LR_LINEAR, 2, 10, 6, 1e-4);
    expect(GN_LR_LINEAR, 2, 10, 10, 0);
    expect(GN_LR_LINEAR, 2, 10, 11, 0); /* never below zero */
}

Test(lr_schedule, cosine) {
    expect(GN_LR_COSINE, 0, 10, 0, 2e-4);
    expect(GN_LR_COSINE, 0, 10, 5, 1e-4);
    expect(GN_LR_COSINE, 2, 10, 1, 1e-4);
    expect(GN_LR_COSINE, 2, 10, 4, 1e-4 * (1 + sqrt(0.5)));
    expect(GN_LR_COSINE, 2, 10, 8, 1e-4 * (1 - sqrt(0.5)));
    expect(GN_LR_COSINE, 2, 10, 10, 0);
}

Test(lr_schedule, all_warmup_and_no_steps) {
    expect(GN_LR_LINEAR, 10, 10, 5, 1e-4);
    expect(GN_LR_LINEAR, 10, 10, 10, 0);
    expect(GN_LR_COSINE, 0, 0, 0, 2e-4);
    expect(GN_LR_LINEAR, 0, 0, 0, 0);
}

Test(lr_schedule, warmup_of_a_ratio) {
    cr_assert_eq(gn_lr_warmup_steps(0.03, 1875), 57);
    cr_assert_eq(gn_lr_warmup_steps(0, 1875), 0);
    cr_assert_eq(gn_lr_warmup_steps(0.5, 3), 2);
    cr_assert_eq(gn_lr_warmup_steps(1, 10), 10);
}

Test(lr_schedule, names) {
    for (int i = 0; i < GN_LR_KIND_COUNT; i++) {
        gn_lr_kind kind;
        cr_assert_eq(gn_lr_parse(&kind, gn_lr_name((gn_lr_kind)i)), GN_OK);
        cr_assert_eq((int)kind, i);
    }
    gn_lr_kind kind;
    cr_assert_eq(gn_lr_parse(&kind, "polynomial"), GN_EINVAL);
}
