/* schedule.c - transformers' optimization.py. */
#include "trainer/schedule.h"

#include <math.h>
#include <string.h>

static const char *const names[] = {
#define X(name, text) text,
    GN_LR_MAP(X)
#undef X
};

const char *gn_lr_name(gn_lr_kind kind) {
    return names[kind];
}

gn_status gn_lr_parse(gn_lr_kind *out, const char *name) {
    for (int i = 0; i < GN_LR_KIND_COUNT; i++) {
        if (strcmp(name, names[i]) != 0) continue;
        *out = (gn_lr_kind)i;
        return GN_OK;
    }
    return GN_EINVAL;
}

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
