/* linear_mma_pack.cuh - x as linear_mma.cu multiplies it: the kernel before the product normalises
 * and rounds it, and puts it in the order that stages have. */
#ifndef GN_CUDA_LINEAR_MMA_PACK_CUH
#define GN_CUDA_LINEAR_MMA_PACK_CUH

#include "linear_tiles.cuh"

enum { PACK_THREADS = 128, PACK_REGISTERS = 56 };

struct x_source {
    const void *x;
    int64_t ld;
    const float *norm;
    float eps;
    int T, blocks; /* of 64 columns */
    bool in_pairs; /* everything is aligned to two values */
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

static __device__ __forceinline__ float squares_of(const struct chunk &a) {
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < 4; c++) sum += a.v[c].x * a.v[c].x + a.v[c].y * a.v[c].y;
    return sum;
}

/* Number i of x's row t, times `factor` and the norm's weights, if any. */
static __device__ __forceinline__ void put_chunk(uint4 *to, bf16 *dense, const struct x_source &s,
                                                 int t, int tile_tokens, int i, struct chunk a,
                                                 float factor) {
    const int tile = t / tile_tokens, row = t % tile_tokens;
    uint32_t pairs[4] = {};
    if (t < s.T) {
        struct chunk w = {};
        if (s.norm) w = load_chunk(s.norm, i, s.in_pairs);
#pragma unroll
        for (int c = 0; c < 4; c++) {
            pairs[c] = s.norm
                           ? pack_bf16(a.v[c].x * factor * w.v[c].x, a.v[c].y * factor * w.v[c].y)
                           : pack_bf16(a.v[c].x, a.v[c].y);
            if (dense)
                *(uint32_t *)(dense + (int64_t)t * s.blocks * GN_BLOCK + chunk_column(i, c)) =
                    pairs[c];
        }
    }
    to[(((int64_t)tile * s.blocks + i / 8) * tile_tokens + row) * 8 + (i % 8 ^ row % 8)] =
        make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

/* Row blockIdx.x by blocks of the grid's other dimension, or, where it is normalised, by one block;
 * those that fill the last tile too: they are zero.
 * `dense` (T, K), if given, gets the same values in their own order. A thread's first chunks wait
 * in registers for the norm's factor. The block is small, to have room beside those of products. */
template <typename X>
static __global__ void __launch_bounds__(PACK_THREADS, 65536 / PACK_THREADS / PACK_REGISTERS)
    pack_kernel(uint4 *to, bf16 *dense, struct x_source s, int tile_tokens) {
    enum { HELD = 4 };
    const int t = (int)blockIdx.x, first = blockIdx.y * PACK_THREADS + threadIdx.x;
    const int chunks = t < s.T ? s.blocks * 8 : 0, step = gridDim.y * PACK_THREADS;
    const X *x = (const X *)s.x + t * s.ld;
    pdl_trigger();
    for (int i = threadIdx.x * 32; s.norm && i < s.blocks * GN_BLOCK; i += PACK_THREADS * 32)
        prefetch_line(s.norm + i);
    pdl_wait();
    struct chunk held[HELD] = {};
#pragma unroll
    for (int j = 0; j < HELD; j++)
        if (first + j * step < chunks) held[j] = load_chunk(x, first + j * step, s.in_pairs);
    float factor = 1.0f;
    if (s.norm) {
        float squares = 0.0f;
#pragma unroll
        for (int j = 0; j < HELD; j++) squares += squares_of(held[j]);
#pragma unroll 1
        for (int i = first + HELD * step; i < chunks; i += step)
            squares += squares_of(load_chunk(x, i, s.in_pairs));
        factor = rsqrtf(block_sum(squares) / (float)(s.blocks * GN_BLOCK) + s.eps);
    }
#pragma unroll
    for (int j = 0; j < HELD; j++)
        if (first + j * step < s.blocks * 8)
            put_chunk(to, dense, s, t, tile_tokens, first + j * step, held[j], factor);
#pragma unroll 1
    for (int i = first + HELD * step; i < s.blocks * 8; i += step) {
        struct chunk a = {};
        if (i < chunks) a = load_chunk(x, i, s.in_pairs);
        put_chunk(to, dense, s, t, tile_tokens, i, a, factor);
    }
}

#endif
