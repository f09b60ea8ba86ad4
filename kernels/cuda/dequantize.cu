/* dequantize.cu - a region of a weight as plain values, for cuBLAS. For 512 rows and more this
 * costs a tenth to a quarter of the product itself. The floor: codes and scales are read once,
 * values written once. */
#include "linear.cuh"
#include "operands.h"

enum { THREADS = 256, WARPS = THREADS / WARP };

/* Sixteen values at once. */
static __device__ __forceinline__ void store16(bf16 *to, const float v[16]) {
    bf162 pairs[8];
#pragma unroll
    for (int i = 0; i < 8; i++) pairs[i] = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
    ((uint4 *)to)[0] = ((const uint4 *)pairs)[0];
    ((uint4 *)to)[1] = ((const uint4 *)pairs)[1];
}
static __device__ __forceinline__ void store16(float *to, const float v[16]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        ((float4 *)to)[i] = make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
}

/* A weight in tiles: a thread takes 16 columns of a row, 8 bytes. `tiles` of the region, of which
 * per_row stand side by side. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    dequantize_tiles_kernel(T *to, int64_t ld, gn_matrix m, gn_cuda_region r, int64_t tiles,
                            int64_t per_row) {
    __shared__ float code[16];
    if (threadIdx.x < 16) code[threadIdx.x] = m.code[threadIdx.x];
    __syncthreads();
    pdl_trigger();
    pdl_wait();
    const int64_t i = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (i >= tiles) return;
    const int lane = threadIdx.x % WARP, g = lane / 4, c = lane % 4;
    const int64_t blocks = m.cols / GN_BLOCK, s = r.col0 / GN_BLOCK + i % per_row;
    const int64_t tile = (r.row0 / GN_CUDA_TILE_ROWS + i / per_row) * blocks + s;
    const int64_t row = i / per_row * GN_CUDA_TILE_ROWS + g;
    if (row >= r.rows) return;
    const uint2 codes = ((const uint2 *)((const char *)m.data + tile * GN_CUDA_TILE_BYTES))[lane];
    const float scale = block_scale(m, (r.row0 + row) * blocks + s, tile * GN_CUDA_TILE_ROWS + g);
    float values[16];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const uint32_t byte = ((j < 4 ? codes.x : codes.y) >> (8 * (j % 4))) & 0xff;
        values[2 * j] = round_to(code[byte >> 4] * scale, m.dtype);
        values[2 * j + 1] = round_to(code[byte & 15] * scale, m.dtype);
    }
    store16(to + row * ld + i % per_row * GN_BLOCK + c * 16, values);
}

template <typename T>
static __global__ void __launch_bounds__(THREADS)
    dequantize_kernel(T *to, int64_t ld, gn_matrix m, gn_cuda_region r) {
    pdl_trigger();
    pdl_wait();
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= r.rows * r.cols) return;
    const int64_t row = i / r.cols, col = i % r.cols;
    to[row * ld + col] = from_float<T>(weight_value(m, false, r.row0 + row, r.col0 + col));
}

template <typename T>
static gn_status dequantize(gn_ctx *ctx, const gn_matrix *m, const gn_cuda_region *r, T *to,
                            int64_t ld) {
    if (gn_cuda_is_tiled(m)) {
        const int64_t per_row = r->cols / GN_BLOCK;
        const int64_t tiles = (r->rows + GN_CUDA_TILE_ROWS - 1) / GN_CUDA_TILE_ROWS * per_row;
        return launch(ctx, dequantize_tiles_kernel<T>,
                      dim3((unsigned)((tiles + WARPS - 1) / WARPS)), dim3(THREADS), 0, to, ld, *m,
                      *r, tiles, per_row);
    }
    const int64_t n = r->rows * r->cols;
    return launch(ctx, dequantize_kernel<T>, dim3((unsigned)((n + THREADS - 1) / THREADS)),
                  dim3(THREADS), 0, to, ld, *m, *r);
}

gn_status gn_cuda_dequantize(gn_ctx *ctx, const gn_matrix *m, const gn_cuda_region *r, void *to,
                             int64_t ld, gn_dtype dtype) {
    return dtype == GN_F32 ? dequantize(ctx, m, r, (float *)to, ld)
                           : dequantize(ctx, m, r, (bf16 *)to, ld);
}
