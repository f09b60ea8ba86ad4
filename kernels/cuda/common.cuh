/* common.cuh - what kernels share: reductions, conversions, dependent launches. */
#ifndef GN_CUDA_COMMON_CUH
#define GN_CUDA_COMMON_CUH

#include <cuda_bf16.h>
#include <stdint.h>

#include "cuda.h"
#include "ptx.cuh"

typedef __nv_bfloat16 bf16;
typedef __nv_bfloat162 bf162;

enum { WARP = 32 };

static __device__ __forceinline__ float to_float(float x) {
    return x;
}
static __device__ __forceinline__ float to_float(bf16 x) {
    return __bfloat162float(x);
}
template <typename T> static __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16(x);
}

/* Two floats as a register of a matrix fragment, `low` first. */
static __device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    const bf162 pair = __floats2bfloat162_rn(low, high);
    return *(const uint32_t *)&pair;
}

/* What other kernels or blocks write: from L2, never from a stale L1. */
static __device__ __forceinline__ uint4 load_fresh16(const void *at) {
    return __ldcg((const uint4 *)at);
}

static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}

/* Sum over a block of up to 1024 threads, whole warps; every thread gets it. */
static __device__ __forceinline__ float block_sum(float x) {
    __shared__ float sums[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    x = warp_sum(x);
    __syncthreads(); /* of an earlier call's readers */
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    return warp_sum(lane < (int)blockDim.x / WARP ? sums[lane] : 0.0f);
}

/* Maximum over a block of THREADS; every thread gets it. */
template <int THREADS> static __device__ __forceinline__ float block_max(float x) {
    __shared__ float maxima[THREADS / WARP];
    x = warp_max(x);
    __syncthreads(); /* of an earlier call's readers */
    if (threadIdx.x % WARP == 0) maxima[threadIdx.x / WARP] = x;
    __syncthreads();
    x = maxima[0];
#pragma unroll
    for (int i = 1; i < THREADS / WARP; i++) x = fmaxf(x, maxima[i]);
    return x;
}

/* A block's sum in double, over THREADS, in a fixed order; once a kernel. */
template <int THREADS> static __device__ __forceinline__ double block_sum_double(double x) {
    __shared__ double sums[THREADS / WARP];
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = x;
    __syncthreads();
    x = 0;
    for (int i = 0; i < THREADS / WARP; i++) x += sums[i];
    return x;
}

/* Launches `kernel` on the context's stream, allowed to start before its predecessor ends: so it
 * must call pdl_wait before it touches what another kernel wrote or reads. */
template <typename... P, typename... A>
static gn_status launch(const gn_ctx *ctx, void (*kernel)(P...), dim3 grid, dim3 block,
                        size_t shared, A... args) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = gn_cuda_stream(ctx);
    config.attrs = &attribute;
    config.numAttrs = ctx->cuda->overlaps ? 1 : 0;
    return gn_cuda_status(cudaLaunchKernelEx(&config, kernel, (P)args...));
}

/* Runs the statement with T as the C++ type of a dtype that is F32 or BF16. */
#define GN_FOR_FLOAT(dtype, ...)                                                                   \
    do {                                                                                           \
        if ((dtype) == GN_F32) {                                                                   \
            typedef float T;                                                                       \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            typedef bf16 T;                                                                        \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

#endif
