/* bench.h - what benchmarks that are run by hand share. */
#ifndef GN_GPU_BENCH_H
#define GN_GPU_BENCH_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "kernels/base.h"

static inline double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Ends the program when something failed. err: what is known of it, or NULL. */
static inline void check(gn_status status, const gn_error *err) {
    if (status == GN_OK) return;
    fprintf(stderr, "%s: %s\n", program_invocation_short_name,
            err && err->message[0] ? err->message : gn_status_text(status));
    exit(1);
}

#endif
