/* schedule.c - transformers' optimization.py. */
#include "trainer/schedule.h"

#include <math.h>

static double max(double a, double b) {
    return a > b ? a : b;
}

double gn_lr_at(const gn_lr_schedule *s, int64_t step) {
    if (s->kind == GN_LR_CONSTANT) return s->peak;
    if (step < s->warmup) return s->peak * (double)step / (double)s->warmup;
    if (s->kind == GN_LR_CONSTANT_WITH_WARMUP) return s->peak;
    const double decay = max(1, (double)(s->total - s->warmup));
    if (s->kind == GN_LR_LINEAR) return s->peak * max(0, (double)(s->total - step) / decay);
    const double progress = (double)(step - s->warmup) / decay;
    return s->peak * max(0, 0.5 * (1 + cos(M_PI * progress)));
}

int64_t gn_lr_warmup_steps(double ratio, int64_t total) {
    return (int64_t)ceil((double)total * ratio);
}
