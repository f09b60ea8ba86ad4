/* adamw.cu - AdamW and the gradient's norm. Twin: cpu/adamw.c, to the bit: every operation is
 * rounded by itself, which costs nothing, as memory is what bounds an update.
 *
 * One block a moment block, one thread a parameter. 8-bit moments are decoded from and encoded to
 * the maps in shared memory. */
#include <string.h>

#include "../adamw.h"
#include "../quant_tables.h"
#include "common.cuh"

enum { BLOCK = GN_MOMENT_BLOCK, SUM_BLOCKS = GN_SUM_WORKSPACE / sizeof(double) };

/* Travels as a kernel parameter. */
struct moment_maps {
    float m[256], v[256];
};

struct update {
    float *master;
    void *weight; /* or NULL */
    const void *grad;
    void *m, *v;
    float *m_absmax, *v_absmax;
    int64_t n;
    bool weight_is_bf16, grad_is_bf16;
    float beta1, beta2, grad_scale, step_size, eps, keep;
};

static __device__ __forceinline__ float load(const void *p, bool is_bf16, int64_t i) {
    return is_bf16 ? to_float(((const bf16 *)p)[i]) : ((const float *)p)[i];
}

/* The code of the nearest value, as gn_nearest_of_256 finds it; a negative value never gets that
 * of zero. */
static __device__ __forceinline__ uint8_t encode(const float *map, float x) {
    int below = 0;
#pragma unroll
    for (int step = 128; step > 0; step /= 2)
        if (x > map[below + step]) below += step;
    int code = below;
    if (below < 255) {
        const float middle = __fmul_rn(__fadd_rn(map[below], map[below + 1]), 0.5f);
        code += (x > middle) | ((x == middle) & below & 1);
    }
    return (uint8_t)(code - (x < 0 && map[code] == 0));
}

static __device__ __forceinline__ void store_codes(uint8_t *codes, float *absmax, const float *map,
                                                   float x, int64_t i, bool is_in) {
    const float max = block_max<BLOCK>(fabsf(x));
    if (threadIdx.x == 0) absmax[blockIdx.x] = max;
    if (is_in) codes[i] = encode(map, __fdiv_rn(x, max > 0 ? max : 1));
}

/* beta old + (1 - beta) g, and g times another g for the second moment. */
static __device__ __forceinline__ float mean(float old, float beta, float g, float with) {
    const float share = __fmul_rn(__fmul_rn(__fsub_rn(1, beta), g), with);
    return __fadd_rn(__fmul_rn(old, beta), share);
}

template <bool EIGHT>
static __global__ void __launch_bounds__(BLOCK)
    adamw_kernel(const update u, const __grid_constant__ moment_maps maps) {
    __shared__ float m_map[256], v_map[256];
    const int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
    const bool is_in = i < u.n;
    if (EIGHT) {
        m_map[threadIdx.x] = maps.m[threadIdx.x];
        v_map[threadIdx.x] = maps.v[threadIdx.x];
        __syncthreads();
    }
    pdl_trigger();
    pdl_wait();
    float m = 0, v = 0;
    if (is_in) {
        if (EIGHT) {
            m = __fmul_rn(m_map[((uint8_t *)u.m)[i]], u.m_absmax[blockIdx.x]);
            v = __fmul_rn(v_map[((uint8_t *)u.v)[i]], u.v_absmax[blockIdx.x]);
        } else {
            m = ((float *)u.m)[i];
            v = ((float *)u.v)[i];
        }
        const float g = __fmul_rn(load(u.grad, u.grad_is_bf16, i), u.grad_scale);
        m = mean(m, u.beta1, g, 1);
        v = mean(v, u.beta2, g, g);
        const float change = __fmul_rn(u.step_size, __fdiv_rn(m, __fadd_rn(__fsqrt_rn(v), u.eps)));
        const float p = __fmul_rn(__fadd_rn(u.master[i], change), u.keep);
        u.master[i] = p;
        if (u.weight && u.weight_is_bf16) ((bf16 *)u.weight)[i] = from_float<bf16>(p);
        if (u.weight && !u.weight_is_bf16) ((float *)u.weight)[i] = p;
    }
    if (EIGHT) {
        /* block_max has every thread past its reading of absmax before one writes it. */
        store_codes((uint8_t *)u.m, u.m_absmax, m_map, m, i, is_in);
        store_codes((uint8_t *)u.v, u.v_absmax, v_map, v, i, is_in);
    } else if (is_in) {
        ((float *)u.m)[i] = m;
        ((float *)u.v)[i] = v;
    }
}

gn_status gn_cuda_adamw(gn_ctx *ctx, const gn_adamw_args *args) {
    const gn_adamw_factors f = gn_adamw_factors_of(args);
    const int64_t n = args->master.shape[0];
    const update u = {(float *)args->master.data,
                      args->weight.data,
                      args->grad.data,
                      args->m.values.data,
                      args->v.values.data,
                      args->m.absmax,
                      args->v.absmax,
                      n,
                      args->weight.dtype == GN_BF16,
                      args->grad.dtype == GN_BF16,
                      args->beta1,
                      args->beta2,
                      args->grad_scale,
                      f.step_size,
                      f.eps,
                      f.keep};
    moment_maps maps;
    memcpy(maps.m, gn_dynamic_map(), sizeof maps.m);
    memcpy(maps.v, gn_dynamic_map_unsigned(), sizeof maps.v);
    const dim3 grid((unsigned)((n + BLOCK - 1) / BLOCK));
    return args->m.values.dtype == GN_U8
               ? launch(ctx, adamw_kernel<true>, grid, dim3(BLOCK), 0, u, maps)
               : launch(ctx, adamw_kernel<false>, grid, dim3(BLOCK), 0, u, maps);
}

/* ---- the gradient's norm ---- */

static __global__ void __launch_bounds__(BLOCK)
    squares_kernel(double *part, const void *x, bool is_bf16, int64_t n) {
    pdl_trigger();
    pdl_wait();
    double sum = 0;
    for (int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x; i < n; i += SUM_BLOCKS * BLOCK) {
        const double value = load(x, is_bf16, i);
        sum += value * value;
    }
    sum = block_sum_double<BLOCK>(sum);
    if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

static __global__ void __launch_bounds__(BLOCK) total_kernel(double *sum, const double *part) {
    pdl_trigger();
    pdl_wait();
    double x = 0;
    for (int i = threadIdx.x; i < SUM_BLOCKS; i += BLOCK) x += part[i];
    x = block_sum_double<BLOCK>(x);
    if (threadIdx.x == 0) *sum += x;
}

gn_status gn_cuda_sum_squares(gn_ctx *ctx, double *sum, const gn_tensor *x) {
    double *part = (double *)ctx->workspace;
    const gn_status status = launch(ctx, squares_kernel, dim3(SUM_BLOCKS), dim3(BLOCK), 0, part,
                                    (const void *)x->data, x->dtype == GN_BF16, x->shape[0]);
    return status ? status
                  : launch(ctx, total_kernel, dim3(1), dim3(BLOCK), 0, sum, (const double *)part);
}
