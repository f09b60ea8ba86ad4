/* convert.cu - tensors from one dtype to another. Twin: cpu/convert.c.
 *
 * Bound by memory. Four neighbouring values a thread where rows allow it, else one. */
#include "common.cuh"

enum { THREADS = 256, VALUES = 4 };

template <typename T, int N> struct __align__(N * sizeof(T)) pack {
    T at[N];
};

template <typename Y, typename X, int N>
static __global__ void __launch_bounds__(THREADS)
    convert_kernel(Y *y, int64_t y_ld, const X *x, int64_t x_ld, int64_t cols, int64_t numel) {
    pdl_trigger();
    const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * N;
    pdl_wait();
    if (i >= numel) return;
    const int64_t row = i / cols, col = i % cols;
    const pack<X, N> in = *(const pack<X, N> *)(x + row * x_ld + col);
    pack<Y, N> out;
#pragma unroll
    for (int j = 0; j < N; j++) out.at[j] = from_float<Y>(to_float(in.at[j]));
    *(pack<Y, N> *)(y + row * y_ld + col) = out;
}

static bool in_packs(const gn_tensor *t) {
    return t->shape[1] % VALUES == 0 && t->ld % VALUES == 0 &&
           (uintptr_t)t->data % (VALUES * gn_dtype_size(t->dtype)) == 0;
}

template <typename Y, typename X>
static gn_status convert(gn_ctx *ctx, const gn_tensor *y, const gn_tensor *x) {
    const int64_t numel = gn_tensor_numel(x);
    const bool packs = in_packs(x) && in_packs(y);
    const int64_t threads = packs ? numel / VALUES : numel;
    const dim3 grid((unsigned)((threads + THREADS - 1) / THREADS));
    return launch(ctx, packs ? convert_kernel<Y, X, VALUES> : convert_kernel<Y, X, 1>, grid,
                  dim3(THREADS), 0, (Y *)y->data, y->ld, (const X *)x->data, x->ld, x->shape[1],
                  numel);
}

gn_status gn_cuda_convert(gn_ctx *ctx, gn_tensor *y, const gn_tensor *x) {
    gn_status status;
    if (y->dtype == GN_F32)
        GN_FOR_FLOAT(x->dtype, status = convert<float, T>(ctx, y, x));
    else
        GN_FOR_FLOAT(x->dtype, status = convert<bf16, T>(ctx, y, x));
    return status;
}
