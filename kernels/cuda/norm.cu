/* norm.cu - RMSNorm by itself; most norms ride in products. Twin: cpu/norm.c.
 *
 * One block per row. The sum of squares is taken in double, as on the CPU: a few operations a
 * thread, so that it is the launch that costs. */
#include "common.cuh"

enum { THREADS = 256 };

static __device__ double block_sum_double(double x) {
    __shared__ double sums[THREADS / WARP];
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = x;
    __syncthreads();
    x = 0;
    for (int i = 0; i < THREADS / WARP; i++) x += sums[i];
    return x;
}

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
    const float r = (float)(1.0 / sqrt(block_sum_double(sum) / (double)C + eps));
    for (int64_t i = threadIdx.x; i < C; i += THREADS) y[i] = x[i] * r * w[i];
}

gn_status gn_cuda_rmsnorm(gn_ctx *ctx, gn_tensor *y, const gn_tensor *x, const gn_tensor *w,
                          float eps) {
    return launch(ctx, rmsnorm_kernel, dim3((unsigned)x->shape[0]), dim3(THREADS), 0,
                  (float *)y->data, y->ld, (const float *)x->data, x->ld, (const float *)w->data,
                  x->shape[1], eps);
}
