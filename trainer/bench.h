/* bench.h - what the benchmarks share: floors measured in the same run, and reporting. */
#ifndef GN_BENCH_H
#define GN_BENCH_H

#include "engine/model.h"
#include "trainer/trainer.h"

/* Bytes a second at which all threads together read an array much larger than the caches. Takes a
 * gibibyte and half a second. */
GN_CHECKED gn_status gn_measure_reads(double *bytes_s, int threads, gn_error *err);
/* Operations a second of all threads in the context's widest multiply-add; 0: unknown. */
double gn_measure_flop(const gn_ctx *ctx);

typedef struct gn_bench {
    const char *kind, *name; /* "decode"; the model's name for reports */
    gn_model *model;
    gn_adapter *adapter;         /* or NULL */
    double read_bytes_s, flop_s; /* what the machine can do at best */
    double peak_bytes;           /* of resident memory */
    int tokens, streams;
    bool json;
    gn_error *err;
} gn_bench;

GN_CHECKED gn_status gn_bench_decode(gn_bench *b);
GN_CHECKED gn_status gn_bench_prefill(gn_bench *b);
GN_CHECKED gn_status gn_bench_ops(gn_bench *b);

/* Seconds that moving `bytes` and computing `flop` must take. */
double gn_bench_floor(const gn_bench *b, double bytes, double flop);
/* A report line with what all have in common; the caller adds its own and prints it. */
cJSON *gn_bench_line(const gn_bench *b);

double gn_median(double *values, int n); /* sorts them */

/* Around a round: measures b->read_bytes_s, then forgets the memory that took; and afterwards
 * raises b->peak_bytes to the most memory that the round held. */
GN_CHECKED gn_status gn_round_begin(gn_bench *b);
void gn_round_end(gn_bench *b);

#endif
