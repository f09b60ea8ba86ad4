/* linear_mma_pack.cuh - x as linear_mma.cu multiplies it: the kernel before the product normalises
 * and rounds it, and puts it in the order that stages have. */
#ifndef GN_CUDA_LINEAR_MMA_PACK_CUH
#define GN_CUDA_LINEAR_MMA_PACK_CUH

#include "linear_tiles.cuh"

enum { PACK_THREADS = 128 };

struct x_source {
    const void *x;
    int64_t ld;
    const float *norm;
    float eps;
    int T, blocks, all_blocks; /* of 64 columns; with those that fill the last step */
    bool in_pairs;             /* everything is aligned to two values */
};

static __device__ __forceinline__ float2 two(const float *x, bool in_pairs) {
    return in_pairs ? *(const float2 *)x : make_float2(x[0], x[1]);
}
static __device__ __forceinline__ float2 two(const bf16 *x, bool in_pairs) {
    return in_pairs ? __bfloat1622float2(*(const bf162 *)x)
                    : make_float2(to_float(x[0]), to_float(x[1]));
}

/* 16 bytes of what is packed: number i of a row takes one pair of every 16 columns of a block. Pair
 * 8j + 4h + c of a block is its columns 16c + 4j + 2h and the next (see cuda.h), so number 2j + h
 * takes one pair of each c. */
struct chunk {
    float2 v[4];
};

static __device__ __forceinline__ int chunk_column(int i, int c) {
    return i / 8 * GN_BLOCK + 16 * c + 2 * (i % 8);
}
template <typename X>
static __device__ __forceinline__ struct chunk load_chunk(const X *x, int i, bool in_pairs) {
    struct chunk out;
#pragma unroll
    for (int c = 0; c < 4; c++) out.v[c] = two(x + chunk_column(i, c), in_pairs);
    return out;
}

/* Row blockIdx.x by blocks of the grid's other dimension, or, where it is normalised, by one block;
 * those that fill the last tile too: they are zero, and so are the blocks that fill the last step.
 * `dense` (T, K), if given, gets the same values in their own order. A thread's first chunk waits
 * in registers for the norm's factor. */
template <typename X>
static __global__ void __launch_bounds__(PACK_THREADS, 9)
    pack_kernel(uint4 *to, bf16 *dense, struct x_source s, int tile_tokens) {
    const int t = (int)blockIdx.x, tile = t / tile_tokens, row = t % tile_tokens;
    const int first = blockIdx.y * PACK_THREADS + threadIdx.x;
    const int chunks = t < s.T ? s.blocks * 8 : 0, step = gridDim.y * PACK_THREADS;
    const X *x = (const X *)s.x + t * s.ld;
    struct chunk mine = {}, weights = {};
    pdl_trigger();
    if (s.norm && first < chunks) weights = load_chunk(s.norm, first, s.in_pairs);
    pdl_wait();
    if (first < chunks) mine = load_chunk(x, first, s.in_pairs);
    float factor = 1.0f;
    if (s.norm) {
        float squares = 0.0f;
        for (int i = first; i < chunks; i += step) {
            const struct chunk a = i == first ? mine : load_chunk(x, i, s.in_pairs);
#pragma unroll
            for (int c = 0; c < 4; c++) squares += a.v[c].x * a.v[c].x + a.v[c].y * a.v[c].y;
        }
        factor = rsqrtf(block_sum(squares) / (float)(s.blocks * GN_BLOCK) + s.eps);
    }
    for (int i = first; i < s.all_blocks * 8; i += step) {
        uint32_t pairs[4] = {};
        if (i < chunks) {
            const struct chunk a = i == first ? mine : load_chunk(x, i, s.in_pairs);
            const struct chunk w =
                i == first || !s.norm ? weights : load_chunk(s.norm, i, s.in_pairs);
#pragma unroll
            for (int c = 0; c < 4; c++) {
                pairs[c] = s.norm ? pack(a.v[c].x * factor * w.v[c].x, a.v[c].y * factor * w.v[c].y)
                                  : pack(a.v[c].x, a.v[c].y);
                if (dense)
                    *(uint32_t *)(dense + (int64_t)t * s.blocks * GN_BLOCK + chunk_column(i, c)) =
                        pairs[c];
            }
        }
        to[(((int64_t)tile * s.all_blocks + i / 8) * tile_tokens + row) * 8 + (i % 8 ^ row % 8)] =
            make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

#endif
