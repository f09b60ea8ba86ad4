/* schedule.h - the learning rate of each step, as transformers' schedulers give it. */
#ifndef GN_TRAINER_SCHEDULE_H
#define GN_TRAINER_SCHEDULE_H

#include "kernels/base.h"

/* enum, command line's name. As in transformers, CONSTANT has no warm-up. */
#define GN_LR_MAP(X)                                                                               \
    X(CONSTANT, "constant")                                                                        \
    X(CONSTANT_WITH_WARMUP, "constant_with_warmup")                                                \
    X(LINEAR, "linear") /* down to zero at the last step */                                        \
    X(COSINE, "cosine") /* half a wave, down to zero */

typedef enum gn_lr_kind {
#define X(name, text) GN_LR_##name,
    GN_LR_MAP(X)
#undef X
        GN_LR_KIND_COUNT
} gn_lr_kind;

const char *gn_lr_name(gn_lr_kind kind);
/* GN_EINVAL for a name not in GN_LR_MAP. */
GN_CHECKED gn_status gn_lr_parse(gn_lr_kind *out, const char *name);

typedef struct gn_lr_schedule {
    gn_lr_kind kind;
    double peak;
    int64_t warmup, total; /* steps */
} gn_lr_schedule;

/* The learning rate of a step, counted from 0. During the warm-up it rises from zero in equal
 * parts. */
double gn_lr_at(const gn_lr_schedule *schedule, int64_t step);

/* Warm-up steps of a share of all steps, rounded up. */
int64_t gn_lr_warmup_steps(double ratio, int64_t total);

#endif
