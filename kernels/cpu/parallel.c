/* parallel.c - a context's threads.
 *
 * A model is a hundred small products a token, so waking a thread must cost about a microsecond:
 * threads look out for work, or for each other at a barrier, for a moment before they sleep. The
 * moment is short, unlike an OpenMP library's milliseconds, because on a machine that is shared
 * the thread one waits for may not be running, and the time is better left to it.
 *
 * The calling thread is one of the team. There is one job at a time, and every thread takes part
 * in every job. */
#include "parallel.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { SPINS = 2000 /* pauses: tens of microseconds */ };

struct gn_cpu_pool {
    int n_workers;
    pthread_t *workers;
    gn_cpu_fn *fn;
    void *arg;
    atomic_uint job;     /* a new number says that fn and arg are there */
    atomic_uint left;    /* workers still busy with it */
    atomic_uint arrived; /* at the barrier */
    atomic_uint phase;   /* a new number opens it */
    atomic_uint sleepers;
    atomic_bool closing;
    pthread_mutex_t mutex; /* for sleeping only */
    pthread_cond_t changed;
};

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Waits while *word is `old`. A sleeper counts itself before it looks again, and a waker changes
 * the word before it looks for sleepers, so that one of them sees the other. */
static void wait_while(gn_cpu_pool *pool, atomic_uint *word, unsigned old) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load(word) != old) return;
        pause_briefly();
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(word) == old) pthread_cond_wait(&pool->changed, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

/* After a change of any word that is waited for. */
static void wake(gn_cpu_pool *pool) {
    if (atomic_load(&pool->sleepers) == 0) return;
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->changed);
    pthread_mutex_unlock(&pool->mutex);
}

struct worker {
    gn_cpu_pool *pool;
    int thread;
};

static void *work(void *arg) {
    const struct worker self = *(struct worker *)arg;
    free(arg);
    gn_cpu_pool *pool = self.pool;
    const gn_cpu_team team = {pool, self.thread, pool->n_workers + 1};
    for (unsigned seen = 0;; seen++) {
        wait_while(pool, &pool->job, seen);
        if (atomic_load(&pool->closing)) return NULL;
        pool->fn(pool->arg, &team);
        if (atomic_fetch_sub(&pool->left, 1) == 1) wake(pool);
    }
}

static bool start_worker(gn_cpu_pool *pool, int i) {
    struct worker *worker = malloc(sizeof *worker);
    if (!worker) return false;
    *worker = (struct worker){pool, i + 1};
    if (pthread_create(&pool->workers[i], NULL, work, worker) == 0) return true;
    free(worker);
    return false;
}

gn_cpu_pool *gn_cpu_pool_open(int threads) {
    gn_cpu_pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->changed, NULL);
    pool->n_workers = threads - 1;
    pool->workers = calloc((size_t)threads, sizeof *pool->workers);
    int started = 0;
    if (pool->workers) {
        sigset_t all, before; /* signals are for the program's own threads */
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        while (started < pool->n_workers && start_worker(pool, started)) started++;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    if (started == pool->n_workers && pool->workers) return pool;
    pool->n_workers = started;
    gn_cpu_pool_close(pool);
    return NULL;
}

void gn_cpu_pool_close(gn_cpu_pool *pool) {
    if (!pool) return;
    atomic_store(&pool->closing, true);
    atomic_fetch_add(&pool->job, 1);
    wake(pool);
    for (int i = 0; i < pool->n_workers; i++) pthread_join(pool->workers[i], NULL);
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->changed);
    free(pool->workers);
    free(pool);
}

void gn_cpu_parallel(gn_cpu_pool *pool, bool alone, gn_cpu_fn *fn, void *arg) {
    if (alone || pool->n_workers == 0) {
        fn(arg, &(gn_cpu_team){pool, 0, 1});
        return;
    }
    pool->fn = fn;
    pool->arg = arg;
    atomic_store(&pool->left, (unsigned)pool->n_workers);
    atomic_fetch_add(&pool->job, 1);
    wake(pool);
    fn(arg, &(gn_cpu_team){pool, 0, pool->n_workers + 1});
    for (unsigned left; (left = atomic_load(&pool->left)) != 0;)
        wait_while(pool, &pool->left, left);
}

void gn_cpu_barrier(const gn_cpu_team *team) {
    if (team->n_threads == 1) return;
    gn_cpu_pool *pool = team->pool;
    const unsigned phase = atomic_load(&pool->phase);
    if (atomic_fetch_add(&pool->arrived, 1) + 1 < (unsigned)team->n_threads) {
        wait_while(pool, &pool->phase, phase);
        return;
    }
    atomic_store(&pool->arrived, 0);
    atomic_fetch_add(&pool->phase, 1);
    wake(pool);
}

struct items {
    void (*fn)(void *arg, int64_t i);
    void *arg;
    int64_t n;
    atomic_llong next;
};

static void take_items(void *arg, const gn_cpu_team *team) {
    (void)team;
    struct items *items = arg;
    for (int64_t i; (i = atomic_fetch_add(&items->next, 1)) < items->n;) items->fn(items->arg, i);
}

void gn_cpu_for(gn_cpu_pool *pool, int64_t n, void (*fn)(void *arg, int64_t i), void *arg) {
    struct items items = {.fn = fn, .arg = arg, .n = n};
    gn_cpu_parallel(pool, n <= 1, take_items, &items);
}
