/* bench_context.cu - what a context takes of a GPU's memory, by the stack that is set aside for
 * each thread that the device can hold (cudaLimitStackSize); run by hand, not a test. Each line is
 * a process of its own: bytes in use once the context is open, and after a product of cuBLAS. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/cuda/cuda.h"
#include "kernels/measure.h"

static void must(gn_status status, const char *what) {
    if (status == GN_OK) return;
    fprintf(stderr, "%s: %s\n", what, gn_status_text(status));
    exit(1);
}

static void set_stack(size_t bytes) {
    const cudaError_t error = cudaDeviceSetLimit(cudaLimitStackSize, bytes);
    if (error == cudaSuccess) return;
    fprintf(stderr, "a stack of %zu bytes: %s\n", bytes, cudaGetErrorString(error));
    exit(1);
}

/* stack -1: the driver's own. */
static void show(long stack) {
    gn_ctx_options options = {};
    gn_ctx *ctx;
    gn_rates rates;
    gn_error err = {};
    options.device = "cuda";
    options.auto_compute = true;
    if (stack >= 0) set_stack((size_t)stack);
    must(gn_ctx_open(&ctx, &options, &err), err.message);
    const double opened = (double)gn_measure_used_bytes(ctx);
    must(gn_measure_rates(ctx, &rates), "a product");
    printf("stack %5ld: %8.1f MiB, after a product %8.1f\n", stack, opened / 0x1p20,
           (double)gn_measure_used_bytes(ctx) / 0x1p20);
    gn_ctx_close(ctx);
}

int main(void) {
    static const long stacks[] = {-1, 1024, 512, 256, 0};
    for (size_t i = 0; i < sizeof stacks / sizeof *stacks; i++) {
        int how;
        const pid_t child = fork();
        if (child == 0) {
            show(stacks[i]);
            return 0;
        }
        if (child < 0 || waitpid(child, &how, 0) != child || how != 0) return 1;
    }
    return 0;
}
