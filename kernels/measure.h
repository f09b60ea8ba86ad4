/* measure.h - what a context's device can do at best, and how fast it quantizes, for benchmarks.
 *
 * A benchmark compares with what was measured in the same run and not with numbers from a data
 * sheet: machines share memory and clocks with strangers, or run hot. Nothing else may use the
 * context meanwhile. */
#ifndef GN_MEASURE_H
#define GN_MEASURE_H

#include "blockquant.h"
#include "ctx.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A second of all threads, or of the whole GPU. */
typedef struct gn_rates {
    double read_bytes; /* reading an array much larger than the caches */
    double copy_bytes; /* copying one: the bytes read and the bytes written */
    double flop;       /* multiply-adds count twice: products in the context's compute dtype on a
                        * GPU, the widest such instruction on a CPU; 0: unknown */
} gn_rates;

/* Takes 1 GiB and half a second on a CPU; at most 4 GiB, and less than that time, on a GPU. */
GN_CHECKED gn_status gn_measure_rates(gn_ctx *ctx, gn_rates *rates);

/* Seconds that quantizing a (rows, cols) weight takes, from random bfloat16 values in the device's
 * memory to codes and scales there; and those that making bfloat16 of it again takes, as a product
 * of many rows does on a GPU. *dequantize is 0 on a CPU, whose products never do. */
GN_CHECKED gn_status gn_measure_quantize(gn_ctx *ctx, gn_qtype type, bool double_quant,
                                         int64_t rows, int64_t cols, double *quantize,
                                         double *dequantize);

/* Bytes of a GPU's memory that are in use, by this program or another; 0 on a CPU. */
size_t gn_measure_used_bytes(gn_ctx *ctx);

#ifdef __cplusplus
}
#endif
#endif
