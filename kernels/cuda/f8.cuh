/* f8.cuh - e4m3 codes, as the KV cache holds them (GN_F8, see base.h and ops.h). */
#ifndef GN_CUDA_F8_CUH
#define GN_CUDA_F8_CUH

#include <cuda_fp8.h>

#include "common.cuh"

typedef struct f8 {
    uint8_t code;
} f8;

template <typename C> constexpr bool is_f8 = false;
template <> constexpr bool is_f8<f8> = true;

static __device__ __forceinline__ float to_float(f8 x) {
    const uint32_t code = x.code, bits = (code & 0x80) << 24 | (code & 0x7f) << 20;
    return *(const float *)&bits * 0x1p120f;
}

template <> __device__ __forceinline__ f8 from_float<f8>(float x) {
    return {__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)};
}

/* Two codes, each the upper byte of a half of `x`, as bf16: exact, for any chip. */
static __device__ __forceinline__ uint32_t widen_pair(uint32_t x) {
    const uint32_t bits = (x & 0x80008000) | (x >> 4 & 0x07f007f0), power = 0x7b807b80; /* 2^120 */
    const bf162 pair = __hmul2(*(const bf162 *)&bits, *(const bf162 *)&power);
    return *(const uint32_t *)&pair;
}

/* Eight elements of the cache as bf16, in their order. */
static __device__ __forceinline__ uint4 widen_eight(uint4 values) {
    return values;
}
static __device__ __forceinline__ uint4 widen_eight(uint2 codes) {
    return make_uint4(
        widen_pair(__byte_perm(codes.x, 0, 0x1404)), widen_pair(__byte_perm(codes.x, 0, 0x3424)),
        widen_pair(__byte_perm(codes.y, 0, 0x1404)), widen_pair(__byte_perm(codes.y, 0, 0x3424)));
}

/* As they are loaded. */
template <typename C> struct eight_of { typedef uint4 type; };
template <> struct eight_of<f8> { typedef uint2 type; };

#endif
