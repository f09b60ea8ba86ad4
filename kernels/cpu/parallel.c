/* parallel.c - threads, through OpenMP where the build has it; alone without.
 *
 * OpenMP keeps its threads between calls and lets them spin for a moment, which is what a
 * model's hundred small products a token need. */
#include "cpu.h"

#ifdef _OPENMP
#include <omp.h>

void gn_cpu_parallel(int threads, gn_cpu_fn *fn, void *arg) {
    if (threads <= 1) {
        fn(arg, 0, 1);
        return;
    }
#pragma omp parallel num_threads(threads)
    fn(arg, omp_get_thread_num(), omp_get_num_threads());
}

void gn_cpu_barrier(void) {
#pragma omp barrier
}

#else

void gn_cpu_parallel(int threads, gn_cpu_fn *fn, void *arg) {
    (void)threads;
    fn(arg, 0, 1);
}

void gn_cpu_barrier(void) {}

#endif
