/* parallel.h - a context's threads. */
#ifndef GN_CPU_PARALLEL_H
#define GN_CPU_PARALLEL_H

#include "kernels/base.h"

typedef struct gn_cpu_pool gn_cpu_pool;

/* Who is calling: thread `thread` of `n_threads`. */
typedef struct gn_cpu_team {
    gn_cpu_pool *pool;
    int thread, n_threads;
} gn_cpu_team;

typedef void gn_cpu_fn(void *arg, const gn_cpu_team *team);

/* A pool of `threads` threads, of which the caller is one. NULL: they could not be started. */
gn_cpu_pool *gn_cpu_pool_open(int threads);
void gn_cpu_pool_close(gn_cpu_pool *pool);

/* Calls fn once on every thread of the pool, or only here when `alone`; returns when all have. */
void gn_cpu_parallel(gn_cpu_pool *pool, bool alone, gn_cpu_fn *fn, void *arg);

/* Calls fn(arg, i) for every i in [0, n), each on whichever thread is free. */
void gn_cpu_for(gn_cpu_pool *pool, int64_t n, void (*fn)(void *arg, int64_t i), void *arg);

/* Waits, inside fn, until the whole team has come here. */
void gn_cpu_barrier(const gn_cpu_team *team);

/* The first of `of` equal shares of [0, n): share i is [gn_cpu_share(n, i, of),
 * gn_cpu_share(n, i + 1, of)). */
static inline int64_t gn_cpu_share(int64_t n, int i, int of) {
    return n / of * i + (n % of < i ? n % of : i);
}

#endif
