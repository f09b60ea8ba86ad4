/* norm.cu - RMSNorm by itself; most norms ride in products. Twin: cpu/norm.c.
 *
 * One block per row. The sum of squares is taken in double, as on the CPU: a few operations a
 * thread, so that it is the launch that costs. */
#include "common.cuh"

enum { THREADS = 256 };

/* y may be x: a thread writes the elements that it alone reads again. */
static __global__ void __launch_bounds__(THREADS)
    rmsnorm_kernel(float *y, int64_t y_ld, const float *x, int64_t x_ld, const float *w, int64_t C,
                   float eps) {
    pdl_trigger();
    y += blockIdx.x * y_ld;
    x += blockIdx.x * x_ld;
    pdl_wait();
    double sum = 0;
    for (int64_t i = threadIdx.x; i < C; i += THREADS) sum += (double)x[i] * x[i];
    const float r = (float)(1.0 / sqrt(block_sum_double<THREADS>(sum) / (double)C + eps));
    for (int64_t i = threadIdx.x; i < C; i += THREADS) y[i] = x[i] * r * w[i];
}

gn_status gn_cuda_rmsnorm(gn_ctx *ctx, gn_tensor *y, const gn_tensor *x, const gn_tensor *w,
                          float eps) {
    return launch(ctx, rmsnorm_kernel, dim3((unsigned)x->shape[0]), dim3(THREADS), 0,
                  (float *)y->data, y->ld, (const float *)x->data, x->ld, (const float *)w->data,
                  x->shape[1], eps);
}
