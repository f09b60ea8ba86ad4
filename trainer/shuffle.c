/* shuffle.c - SplitMix64, Lemire's bounded integers, Fisher and Yates' shuffle, Knuth's selection
 * sampling (algorithm S). */
#include "trainer/shuffle.h"

static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static uint64_t next(gn_random *r) {
    return mix(r->state += 0x9e3779b97f4a7c15u);
}

gn_random gn_random_open(uint64_t seed, uint64_t purpose) {
    return (gn_random){mix(mix(seed + 0x9e3779b97f4a7c15u) ^ purpose)};
}

uint64_t gn_random_below(gn_random *r, uint64_t bound) {
    const uint64_t threshold = -bound % bound;
    for (;;) {
        const unsigned __int128 product = (unsigned __int128)next(r) * bound;
        if ((uint64_t)product >= threshold) return (uint64_t)(product >> 64);
    }
}

void gn_shuffle(gn_random *r, int64_t *items, int64_t n) {
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t j = (int64_t)gn_random_below(r, (uint64_t)i + 1), item = items[i];
        items[i] = items[j];
        items[j] = item;
    }
}

bool gn_draw_next(gn_draw_some *d) {
    const bool drawn =
        (int64_t)gn_random_below(&d->random, (uint64_t)d->left) < d->wanted; /* left >= 1 */
    d->left--;
    d->wanted -= drawn;
    return drawn;
}
