/* linear.cuh - single values of a weight on the device, and small parts of products. */
#ifndef GN_CUDA_LINEAR_CUH
#define GN_CUDA_LINEAR_CUH

#include <cuda_fp16.h>

#include "common.cuh"
#include "linear.h"

static __device__ __forceinline__ float round_to(float x, gn_dtype dtype) {
    if (dtype == GN_BF16) return __bfloat162float(__float2bfloat16(x));
    return dtype == GN_F16 ? __half2float(__float2half(x)) : x;
}

/* Of block `block` in the file's order, whose scale stands at `at`. Rounded after each step, as
 * gn_matrix_scale. */
static __device__ __forceinline__ float block_scale(const gn_matrix &m, int64_t block, int64_t at) {
    if (!m.absmax_u8) return m.absmax[at];
    return __fadd_rn(
        __fmul_rn(m.nested_code[m.absmax_u8[at]], m.nested_absmax[block / GN_NESTED_BLOCK]),
        m.offset);
}

/* Where a weight in tiles has the byte of (row, col), and its scale. */
static __device__ __forceinline__ int64_t tile_of(const gn_matrix &m, int64_t row, int64_t col) {
    return row / GN_CUDA_TILE_ROWS * (m.cols / GN_BLOCK) + col / GN_BLOCK;
}
static __device__ __forceinline__ int64_t tile_byte(const gn_matrix &m, int64_t row, int64_t col) {
    return tile_of(m, row, col) * GN_CUDA_TILE_BYTES + row % GN_CUDA_TILE_ROWS * (GN_BLOCK / 2) +
           col % GN_BLOCK / 2;
}

/* Dequantized, rounded to the weight's dtype: the bits of gn_dequantize. */
static __device__ float weight_value(const gn_matrix &m, bool tiled, int64_t row, int64_t col) {
    const int64_t i = row * m.cols + col;
    if (m.qtype == GN_Q_NONE) {
        if (m.dtype == GN_F32) return ((const float *)m.data)[i];
        if (m.dtype == GN_F16) return __half2float(((const __half *)m.data)[i]);
        return __bfloat162float(((const bf16 *)m.data)[i]);
    }
    if (m.qtype == GN_Q_INT8)
        return round_to(__fmul_rn((float)((const int8_t *)m.data)[i], m.absmax[row] / 127.0f),
                        m.dtype);
    const uint8_t byte = ((const uint8_t *)m.data)[tiled ? tile_byte(m, row, col) : i / 2];
    const int64_t at =
        tiled ? tile_of(m, row, col) * GN_CUDA_TILE_ROWS + row % GN_CUDA_TILE_ROWS : i / GN_BLOCK;
    const bool high = tiled ? col % 2 == 0 : i % 2 == 0;
    return round_to(
        __fmul_rn(m.code[high ? byte >> 4 : byte & 15], block_scale(m, i / GN_BLOCK, at)), m.dtype);
}

static __device__ __forceinline__ float silu(float x) {
    return x / (1.0f + expf(-x));
}

/* To some 2^-20 of it: where the result becomes bfloat16. */
static __device__ __forceinline__ float silu_fast(float x) {
    return __fdividef(x, 1.0f + __expf(-x));
}

/* Where the parts of a call write: y[part] of (T, columns of all parts before it, then its own). */
typedef struct gn_cuda_parts {
    int n;
    int64_t first[GN_MAX_PARTS + 1]; /* column at which a part begins when all stand side by side */
} gn_cuda_parts;

static inline gn_cuda_parts parts_of(const gn_linear_args *args) {
    gn_cuda_parts p = {};
    p.n = args->n_parts;
    for (int i = 0; i < p.n; i++) p.first[i + 1] = p.first[i] + args->part[i].w->rows;
    return p;
}

/* The largest rank that a part meets, or any part; 0: there is nothing to add. */
static inline int part_rank_of(const gn_linear_args *args, int part) {
    int most = 0;
    for (int i = 0; i < args->n_lora; i++) {
        const int rank = args->lora[i].pairs[args->pair + part].rank;
        most = rank > most ? rank : most;
    }
    return most;
}
static inline int max_rank_of(const gn_linear_args *args) {
    int most = 0;
    for (int part = 0; part < args->n_parts; part++) {
        const int rank = part_rank_of(args, part);
        most = rank > most ? rank : most;
    }
    return most;
}

static inline size_t align_up(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

/* Carves working memory: *at moves past `bytes`. */
static inline char *carve(char **at, size_t bytes) {
    char *piece = *at;
    *at += align_up(bytes);
    return piece;
}

#endif
