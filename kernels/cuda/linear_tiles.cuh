/* linear_tiles.cuh - 4-bit weights in tiles as product kernels take them. */
#ifndef GN_CUDA_LINEAR_TILES_CUH
#define GN_CUDA_LINEAR_TILES_CUH

#include "common.cuh"

struct matrix {
    const uint8_t *tiles;
    const void *scales; /* uint8, or float without double quantization */
    const float *code, *nested_code, *nested_absmax; /* nested_code NULL: without */
    float offset;
    int rows;
};

static inline struct matrix matrix_of(const gn_matrix *m) {
    struct matrix out = {};
    out.tiles = (const uint8_t *)m->data;
    out.scales = m->absmax_u8 ? (const void *)m->absmax_u8 : m->absmax;
    out.code = m->code;
    out.nested_code = m->absmax_u8 ? m->nested_code : NULL;
    out.nested_absmax = m->nested_absmax;
    out.offset = m->offset;
    out.rows = (int)m->rows;
    return out;
}

static inline bool is_aligned(const void *p, size_t to) {
    return (uintptr_t)p % to == 0;
}

/* Whether kernels can take it as it is: in tiles, aligned, blocks counted in 32 bits. */
static inline bool is_matrix(const gn_matrix *m) {
    const size_t scale = m->absmax_u8 ? 8 : 16;
    return gn_cuda_is_tiled(m) && m->rows * (m->cols / GN_BLOCK) < INT32_MAX / 8 &&
           is_aligned(m->data, 8) &&
           is_aligned(m->absmax_u8 ? (const void *)m->absmax_u8 : m->absmax, scale);
}

/* Weights: read once, so they stay out of L1. */
static __device__ __forceinline__ uint2 load_weights(const uint8_t *at) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(at));
    return v;
}

#endif
