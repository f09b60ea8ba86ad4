/* norm.cu - RMSNorm by itself, and its gradients; most norms ride in products. Twin: cpu/norm.c.
 *
 * One block per row. Forward the sum of squares is taken in double, as on the CPU: a few operations
 * a thread, so that it is the launch that costs. The backward pass, of many rows, is bound by
 * memory, and sums float32: chips that are not made for computing centers are slow at double. It
 * reads x, dy and skip and writes dx, and dx rounded: a thread takes 8 columns, which it reads
 * once; of rows that are not aligned, or too long for that, x and dy are read again, from cache. */
#include "operands.h"
#include "rows.cuh"

enum { THREADS = 256, MAX_THREADS = 1024 };

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

/* ---- backward ---- */

struct norm_bwd {
    struct rows dx, rounded, dy, skip, x, w; /* w: one row */
    float eps;
    int64_t C;
    float *rms; /* (T) inverse, for dw; or NULL */
};

/* With r = 1/rms(x) and g = w * dy: dx = skip + r g - x r^3 mean(g x). dx may be skip, and rounded
 * dy: a thread writes what it alone has read. */
struct weights {
    float g, x;
};

static __device__ __forceinline__ struct weights weights_of(const struct norm_bwd &o, float squares,
                                                            float dot) {
    const float r = 1.0f / sqrtf(block_sum(squares) / (float)o.C + o.eps);
    if (o.rms && threadIdx.x == 0) o.rms[blockIdx.x] = r;
    return {r, r * r * r * (block_sum(dot) / (float)o.C)};
}

static __global__ void __launch_bounds__(MAX_THREADS)
    rmsnorm_bwd_once_kernel(const struct norm_bwd o) {
    enum { N = ROW_VECTOR };
    const int64_t row = blockIdx.x, c = (int64_t)threadIdx.x * N;
    float x[N] = {}, g[N] = {}, dx[N] = {}, squares = 0.0f, dot = 0.0f;
    pdl_trigger();
    pdl_wait();
    if (c < o.C) {
        float w[N];
        load<N>(x, o.x, row, c);
        load<N>(g, o.dy, row, c);
        if (o.skip.data) load<N>(dx, o.skip, row, c);
        load<N>(w, o.w, 0, c);
#pragma unroll
        for (int i = 0; i < N; i++) g[i] *= w[i];
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        squares += x[i] * x[i];
        dot += g[i] * x[i];
    }
    const struct weights by = weights_of(o, squares, dot);
    if (c >= o.C) return;
#pragma unroll
    for (int i = 0; i < N; i++) dx[i] += by.g * g[i] - by.x * x[i];
    store<N>(o.dx, row, c, dx);
    if (o.rounded.data) store<N>(o.rounded, row, c, dx);
}

template <int N>
static __global__ void __launch_bounds__(THREADS) rmsnorm_bwd_kernel(const struct norm_bwd o) {
    const int64_t row = blockIdx.x;
    float squares = 0.0f, dot = 0.0f;
    pdl_trigger();
    pdl_wait();
    for (int64_t c = threadIdx.x * N; c < o.C; c += THREADS * N) {
        float x[N], dy[N], w[N];
        load<N>(x, o.x, row, c);
        load<N>(dy, o.dy, row, c);
        load<N>(w, o.w, 0, c);
#pragma unroll
        for (int i = 0; i < N; i++) {
            squares += x[i] * x[i];
            dot += w[i] * dy[i] * x[i];
        }
    }
    const struct weights by = weights_of(o, squares, dot);
    for (int64_t c = threadIdx.x * N; c < o.C; c += THREADS * N) {
        float x[N], dy[N], w[N], dx[N] = {};
        load<N>(x, o.x, row, c);
        load<N>(dy, o.dy, row, c);
        load<N>(w, o.w, 0, c);
        if (o.skip.data) load<N>(dx, o.skip, row, c);
#pragma unroll
        for (int i = 0; i < N; i++) dx[i] += by.g * w[i] * dy[i] - by.x * x[i];
        store<N>(o.dx, row, c, dx);
        if (o.rounded.data) store<N>(o.rounded, row, c, dx);
    }
}

enum { DW_COLUMNS = 32, DW_ROWS = THREADS / DW_COLUMNS };

/* A block takes 32 columns, a warp every eighth row of them, in order. */
static __global__ void __launch_bounds__(THREADS)
    rmsnorm_dw_kernel(float *dw, const struct norm_bwd o, int64_t T) {
    __shared__ float sums[DW_ROWS][DW_COLUMNS];
    const int lane = threadIdx.x % DW_COLUMNS, warp = threadIdx.x / DW_COLUMNS;
    const int64_t c = (int64_t)blockIdx.x * DW_COLUMNS + lane;
    float sum = 0.0f;
    pdl_trigger();
    pdl_wait();
    for (int64_t t = warp; t < T && c < o.C; t += DW_ROWS) {
        float x, dy;
        load<1>(&x, o.x, t, c);
        load<1>(&dy, o.dy, t, c);
        sum += o.rms[t] * x * dy;
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || c >= o.C) return;
    for (int i = 1; i < DW_ROWS; i++) sum += sums[i][lane];
    dw[c] += sum;
}

size_t gn_cuda_rmsnorm_bwd_bytes(int64_t rows) {
    return (size_t)rows * sizeof(float);
}

gn_status gn_cuda_rmsnorm_bwd(gn_ctx *ctx, gn_tensor *dx, gn_tensor *rounded, gn_tensor *dw,
                              const gn_tensor *dy, const gn_tensor *skip, const gn_tensor *x,
                              const gn_tensor *w, float eps) {
    const int64_t T = x->shape[0], C = x->shape[1];
    struct norm_bwd o = {};
    o.dx = rows_of(dx);
    if (rounded && !dw->data) o.rounded = rows_of(rounded);
    o.dy = rows_of(dy);
    if (skip) o.skip = rows_of(skip);
    o.x = rows_of(x);
    o.w = {w->data, 0, false};
    o.eps = eps;
    o.C = C;
    if (dw->data) {
        if (gn_cuda_rmsnorm_bwd_bytes(T) > ctx->workspace_bytes) return GN_ENOMEM;
        o.rms = (float *)ctx->workspace;
    }
    const bool vectors = in_vectors(o.dx, C) && in_vectors(o.dy, C) && in_vectors(o.x, C) &&
                         in_vectors(o.w, C) && in_vectors(o.rounded, C) && in_vectors(o.skip, C);
    const int64_t pieces = C / ROW_VECTOR;
    const bool once = vectors && pieces <= MAX_THREADS;
    const int64_t threads = once ? (pieces + WARP - 1) / WARP * WARP : (int64_t)THREADS;
    gn_status status = launch(ctx,
                              once      ? rmsnorm_bwd_once_kernel
                              : vectors ? rmsnorm_bwd_kernel<ROW_VECTOR>
                                        : rmsnorm_bwd_kernel<1>,
                              dim3((unsigned)T), dim3((unsigned)threads), 0, o);
    if (status || !dw->data) return status;
    status = launch(ctx, rmsnorm_dw_kernel, dim3((unsigned)((C + DW_COLUMNS - 1) / DW_COLUMNS)),
                    dim3(THREADS), 0, (float *)dw->data, o, T);
    return status || !rounded ? status : gn_cuda_operands(ctx, rounded, dx, NULL);
}
