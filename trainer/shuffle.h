/* shuffle.h - random numbers that are the same on every machine: integers only. */
#ifndef GN_SHUFFLE_H
#define GN_SHUFFLE_H

#include <stdbool.h>
#include <stdint.h>

typedef struct gn_random {
    uint64_t state;
} gn_random;

/* A generator for one purpose: what different purposes draw has nothing to do with each other. */
gn_random gn_random_open(uint64_t seed, uint64_t purpose);
/* Uniform in [0, bound); bound is at least 1. */
uint64_t gn_random_below(gn_random *r, uint64_t bound);
void gn_shuffle(gn_random *r, int64_t *items, int64_t n);

/* Draws `wanted` of `n` things that are looked at one after another: asked once for each, says
 * whether it is drawn. */
typedef struct gn_draw_some {
    gn_random random;
    int64_t wanted, left;
} gn_draw_some;
bool gn_draw_next(gn_draw_some *d);

#endif
