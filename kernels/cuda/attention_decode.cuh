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
template <int P>
static __device__ __forceinline__ void load_keys(uint4 keys[P / 32][2], const bf16 *from, int D) {
    const int g = threadIdx.x % WARP / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int s = 0; s < P / 32; s++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int d = 32 * s + 8 * c;
            keys[s][i] = make_uint4(0, 0, 0, 0);
            if (d < D) keys[s][i] = __ldcg((const uint4 *)(from + (g + 8 * i) * D + d));
        }
}

/* And of 16 values: positions 2c, 2c + 1, 2c + 8, 2c + 9, dimensions 64h + 8g to 64h + 8g + 7.
 * Positions from `n` on hold anything, even NaN, and count as zeros. */
template <int P>
static __device__ __forceinline__ void load_values(uint4 values[P / 64][4], const bf16 *from, int n,
                                                   int D) {
    const int g = threadIdx.x % WARP / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < P / 64; h++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int position = 2 * c + i % 2 + i / 2 * 8, d = 64 * h + 8 * g;
            values[h][i] = make_uint4(0, 0, 0, 0);
            if (position < n && d < D)
                values[h][i] = __ldcg((const uint4 *)(from + position * D + d));
        }
}

static __device__ __forceinline__ uint32_t word(const uint4 &v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

/* score[i] of position g + i/2 * 8 and query 2c + i%2. */
template <int P>
static __device__ __forceinline__ void multiply_keys(float score[4], const uint4 keys[P / 32][2],
                                                     const uint4 query[P / 32]) {
    float even[4] = {0.0f}, odd[4] = {0.0f};
#pragma unroll
    for (int s = 0; s < P / 32; s++) {
        const uint32_t a0[4] = {keys[s][0].x, keys[s][1].x, keys[s][0].y, keys[s][1].y};
        const uint32_t a1[4] = {keys[s][0].z, keys[s][1].z, keys[s][0].w, keys[s][1].w};
        const uint32_t b0[2] = {query[s].x, query[s].y}, b1[2] = {query[s].z, query[s].w};
        mma_bf16(even, a0, b0);
        mma_bf16(odd, a1, b1);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) score[i] = even[i] + odd[i];
}

/* out[h][j][i] is dimension 64h + 8g + 2j + i/2 of query 2c + i%2. */
template <int P>
static __device__ __forceinline__ void
multiply_values(float out[P / 64][4][4], const uint4 values[P / 64][4], const float weight[4]) {
    const uint32_t b[2] = {turn_matrix(pack_bf16(weight[0], weight[1])),
                           turn_matrix(pack_bf16(weight[2], weight[3]))};
#pragma unroll
    for (int h = 0; h < P / 64; h++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t v0 = word(values[h][0], j), v1 = word(values[h][1], j);
            const uint32_t v2 = word(values[h][2], j), v3 = word(values[h][3], j);
            const uint32_t a[4] = {__byte_perm(v0, v1, 0x5410), __byte_perm(v0, v1, 0x7632),
                                   __byte_perm(v2, v3, 0x5410), __byte_perm(v2, v3, 0x7632)};
            mma_bf16(out[h][j], a, b);
        }
}

#endif
