/* linear_mma_pack.cuh - x as linear_mma.cu multiplies it: the kernel before the product normalises
 * and rounds it, and puts it in the order that stages have. */
#ifndef GN_CUDA_LINEAR_MMA_PACK_CUH
#define GN_CUDA_LINEAR_MMA_PACK_CUH

#include "linear_tiles.cuh"

enum {
    STEP = 2, /* 64-wide blocks of K in a stage */
    PACK_THREADS = 256,
};

struct x_source {
    const void *x;
    int64_t ld;
    const float *norm;
    float eps;
    int T, blocks;
    bool in_pairs; /* everything is aligned to two values */
};

static __device__ __forceinline__ float2 two(const float *x, bool in_pairs) {
    return in_pairs ? *(const float2 *)x : make_float2(x[0], x[1]);
}
static __device__ __forceinline__ float2 two(const bf16 *x, bool in_pairs) {
    return in_pairs ? __bfloat1622float2(*(const bf162 *)x)
                    : make_float2(to_float(x[0]), to_float(x[1]));
}

/* A block a row, those that fill the last tile too: they are zero, and so is the block that fills
 * the last step. Pair 8j + 4h + c of a block is its columns 16c + 4j + 2h and the next (see
 * cuda.h), so that 16 bytes, number 2j + h, take one pair of each c. `dense` (T, K), if given, gets
 * the same values in their own order. */
template <typename X>
static __global__ void __launch_bounds__(PACK_THREADS)
    pack_kernel(uint4 *to, bf16 *dense, struct x_source s, int tile_tokens) {
    const int t = (int)blockIdx.x, tile = t / tile_tokens, row = t % tile_tokens;
    const int K = s.blocks * GN_BLOCK, blocks = (s.blocks + STEP - 1) / STEP * STEP;
    const X *x = (const X *)s.x + t * s.ld;
    pdl_trigger();
    pdl_wait();
    float factor = 1.0f;
    if (s.norm && t < s.T) {
        float squares = 0.0f;
        for (int k = 2 * (int)threadIdx.x; k < K; k += 2 * PACK_THREADS) {
            const float2 v = two(x + k, s.in_pairs);
            squares += v.x * v.x + v.y * v.y;
        }
        factor = rsqrtf(block_sum(squares) / (float)K + s.eps);
    }
    for (int i = threadIdx.x; i < blocks * 8; i += PACK_THREADS) {
        const int block = i / 8, chunk = i % 8;
        uint32_t pairs[4] = {};
        for (int c = 0; c < 4 && t < s.T && block < s.blocks; c++) {
            const int k = block * GN_BLOCK + 16 * c + 2 * chunk;
            float2 v = two(x + k, s.in_pairs);
            if (s.norm) {
                const float2 w = two(s.norm + k, s.in_pairs);
                v = make_float2(v.x * factor * w.x, v.y * factor * w.y);
            }
            pairs[c] = pack(v.x, v.y);
            if (dense) *(uint32_t *)(dense + (int64_t)t * K + k) = pairs[c];
        }
        to[(((int64_t)tile * blocks + block) * tile_tokens + row) * 8 + (chunk ^ row % 8)] =
            make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

#endif
