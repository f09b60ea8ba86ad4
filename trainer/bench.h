/* bench.h - what the benchmarks share: floors measured in the same run, and reporting. */
#ifndef GN_BENCH_H
#define GN_BENCH_H

#include "engine/model.h"
#include "trainer/trainer.h"

/* What the machine can do at best, measured before anything else. */
typedef struct gn_machine {
    double read_bytes_s; /* all threads reading an array much larger than the caches */
    double flop_s;       /* all threads in the widest multiply-add of the context; 0: unknown */
} gn_machine;

/* Takes a second and, for that long, a gibibyte. */
GN_CHECKED gn_status gn_machine_measure(gn_machine *machine, const gn_ctx *ctx, gn_error *err);

typedef struct gn_bench {
    const char *kind, *name; /* "decode"; the model's name for reports */
    gn_model *model;
    gn_adapter *adapter; /* or NULL */
    gn_machine machine;
    int tokens, streams;
    bool json;
    gn_error *err;
} gn_bench;

GN_CHECKED gn_status gn_bench_decode(const gn_bench *b);
GN_CHECKED gn_status gn_bench_prefill(const gn_bench *b);
GN_CHECKED gn_status gn_bench_ops(const gn_bench *b);

/* Seconds that moving `bytes` and computing `flop` must take. */
double gn_bench_floor(const gn_bench *b, double bytes, double flop);
/* A report line with what all have in common; the caller adds its own and prints it. */
cJSON *gn_bench_line(const gn_bench *b);

double gn_median(double *values, int n); /* sorts them */
void gn_peak_reset(void);   /* where the kernel lets us; else the peak is since start */
double gn_peak_bytes(void); /* of resident memory */

#endif
