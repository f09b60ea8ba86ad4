/* attention_decode.cuh - 16 positions of the cache against up to 8 queries that share a kv head, on
 * the matrix units of one warp. Lane 4g + c holds what is said of g and c. */
#ifndef GN_CUDA_ATTENTION_DECODE_CUH
#define GN_CUDA_ATTENTION_DECODE_CUH

#include "attention.h"

enum {
    TOKENS = GN_CUDA_KV_TOKENS,
    QUERIES = 8 /* of a tile: the columns of a fragment */
};

/* A thread's share of 16 keys: positions g and g + 8, dimensions 32s + 8c to 32s + 8c + 7. */
template <int P, typename C>
static __device__ __forceinline__ void load_keys(typename eight_of<C>::type keys[P / 32][2],
                                                 const C *from, int D) {
    typedef typename eight_of<C>::type eight;
    const int g = threadIdx.x % WARP / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int s = 0; s < P / 32; s++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int d = 32 * s + 8 * c;
            keys[s][i] = {};
            if (d < D) keys[s][i] = __ldcg((const eight *)(from + (g + 8 * i) * D + d));
        }
}

/* And of 16 values: positions 2c, 2c + 1, 2c + 8, 2c + 9, dimensions 64h + 8g to 64h + 8g + 7.
 * Positions from `n` on hold anything, even NaN, and count as zeros. */
template <int P, typename C>
static __device__ __forceinline__ void load_values(typename eight_of<C>::type values[P / 64][4],
                                                   const C *from, int n, int D) {
    typedef typename eight_of<C>::type eight;
    const int g = threadIdx.x % WARP / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < P / 64; h++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int position = 2 * c + i % 2 + i / 2 * 8, d = 64 * h + 8 * g;
            values[h][i] = {};
            if (position < n && d < D)
                values[h][i] = __ldcg((const eight *)(from + position * D + d));
        }
}

static __device__ __forceinline__ uint32_t word(const uint4 &v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

/* score[i] of position g + i/2 * 8 and query 2c + i%2. An F8 cache's scales are left out here and
 * below: they belong to positions. */
template <int P, typename E>
static __device__ __forceinline__ void multiply_keys(float score[4], const E keys[P / 32][2],
                                                     const uint4 query[P / 32]) {
    float even[4] = {0.0f}, odd[4] = {0.0f};
#pragma unroll
    for (int s = 0; s < P / 32; s++) {
        const uint4 k0 = widen_eight(keys[s][0]), k1 = widen_eight(keys[s][1]);
        const uint32_t a0[4] = {k0.x, k1.x, k0.y, k1.y}, a1[4] = {k0.z, k1.z, k0.w, k1.w};
        const uint32_t b0[2] = {query[s].x, query[s].y}, b1[2] = {query[s].z, query[s].w};
        mma_bf16(even, a0, b0);
        mma_bf16(odd, a1, b1);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) score[i] = even[i] + odd[i];
}

/* out[h][j][i] is dimension 64h + 8g + 2j + i/2 of query 2c + i%2. */
template <int P, typename E>
static __device__ __forceinline__ void
multiply_values(float out[P / 64][4][4], const E values[P / 64][4], const float weight[4]) {
    const uint32_t b[2] = {turn_matrix(pack_bf16(weight[0], weight[1])),
                           turn_matrix(pack_bf16(weight[2], weight[3]))};
#pragma unroll
    for (int h = 0; h < P / 64; h++) {
        const uint4 first = widen_eight(values[h][0]), second = widen_eight(values[h][1]);
        const uint4 third = widen_eight(values[h][2]), fourth = widen_eight(values[h][3]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t v0 = word(first, j), v1 = word(second, j);
            const uint32_t v2 = word(third, j), v3 = word(fourth, j);
            const uint32_t a[4] = {__byte_perm(v0, v1, 0x5410), __byte_perm(v0, v1, 0x7632),
                                   __byte_perm(v2, v3, 0x5410), __byte_perm(v2, v3, 0x7632)};
            mma_bf16(out[h][j], a, b);
        }
    }
}

#endif
