/* quant_tables.h - how each 4-bit type maps values to codes and back.
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

#ifdef __cplusplus
}
#endif
#endif
