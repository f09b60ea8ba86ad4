/* quant_tables.h - how each 4-bit type, and an 8-bit map, maps values to codes and back.
 *
 * A code is found by counting the thresholds that a value exceeds: ties go down. Types with a
 * sign bit do so by magnitude. Thresholds are the midpoints of neighbouring code values, spelled
 * as bitsandbytes' kernels spell them where they have them. */
#ifndef GN_QUANT_TABLES_H
#define GN_QUANT_TABLES_H

#include "blockquant.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct gn_code_rule {
    float values[16];     /* by code */
    int n_thresholds;     /* 14 or 15; 7 for the magnitudes of a type with a sign bit */
    float thresholds[15]; /* ascending */
    uint8_t codes[16];    /* by the number of thresholds exceeded */
    bool sign_bit;        /* bit 3 of the code is the sign */
} gn_code_rule;

const gn_code_rule *gn_code_rule_of(gn_qtype type); /* a 4-bit type */

/* bitsandbytes' unsigned 8-bit dynamic map, ascending, 256 values: the signed one's twin for what
 * is never negative. */
const float *gn_dynamic_map_unsigned(void);

/* The code of the nearest value of an ascending map of 256. On a midpoint bitsandbytes' kernels
 * take the candidate their bisection ended at, which is always the even one. NaN gets 0. Without
 * branches, as no branch here could be predicted. */
static inline uint8_t gn_nearest_of_256(const float *map, float x) {
    int below = 0; /* the last code whose value is less than x; or 0 */
    for (int step = 128; step > 0; step /= 2) below += -(x > map[below + step]) & step;
    if (below == 255) return 255;
    const float middle = (map[below] + map[below + 1]) * 0.5f;
    return (uint8_t)(below + ((x > middle) | ((x == middle) & below & 1)));
}

#ifdef __cplusplus
}
#endif
#endif
