/* rows.cuh - rows of float32 or bfloat16, a few neighbouring values at a time. Kernels that read
 * and write memory once are written over these: N is 8 where alignment allows, else 1. */
#ifndef GN_CUDA_ROWS_CUH
#define GN_CUDA_ROWS_CUH

#include "common.cuh"

enum { ROW_VECTOR = 8 };

/* A tensor's rows as a kernel sees them; data NULL: there are none. */
struct rows {
    void *data;
    int64_t ld;
    bool is_bf16;
};

/* From row `row0` on. */
static inline struct rows rows_of(const gn_tensor *t, int64_t row0 = 0) {
    const int64_t at = row0 * t->ld * (int64_t)gn_dtype_size(t->dtype);
    return {t->data ? (char *)t->data + at : NULL, t->ld, t->dtype == GN_BF16};
}

/* Whether its rows of `cols` values may be read and written ROW_VECTOR at a time. */
static inline bool in_vectors(const struct rows &r, int64_t cols) {
    const int64_t size = r.is_bf16 ? 2 : 4;
    return cols % ROW_VECTOR == 0 && (uintptr_t)r.data % 16 == 0 && r.ld * size % 16 == 0;
}

template <int N>
static __device__ __forceinline__ void load(float v[N], const struct rows &r, int64_t row,
                                            int64_t col) {
    const int64_t at = row * r.ld + col;
    if (N == 1) {
        v[0] = r.is_bf16 ? to_float(((const bf16 *)r.data)[at]) : ((const float *)r.data)[at];
    } else if (r.is_bf16) {
        const uint4 packed = *(const uint4 *)((const bf16 *)r.data + at);
        const bf162 *pairs = (const bf162 *)&packed;
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            v[2 * i] = to_float(pairs[i].x);
            v[2 * i + 1] = to_float(pairs[i].y);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            const float4 four = ((const float4 *)((const float *)r.data + at))[i];
            v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
        }
    }
}

template <int N>
static __device__ __forceinline__ void store(const struct rows &r, int64_t row, int64_t col,
                                             const float v[N]) {
    const int64_t at = row * r.ld + col;
    if (N == 1) {
        if (r.is_bf16)
            ((bf16 *)r.data)[at] = from_float<bf16>(v[0]);
        else
            ((float *)r.data)[at] = v[0];
    } else if (r.is_bf16) {
        uint4 packed;
        bf162 *pairs = (bf162 *)&packed;
#pragma unroll
        for (int i = 0; i < N / 2; i++) pairs[i] = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
        *(uint4 *)((bf16 *)r.data + at) = packed;
    } else {
#pragma unroll
        for (int i = 0; i < N / 4; i++)
            ((float4 *)((float *)r.data + at))[i] =
                make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
    }
}

/* A dropout mask as kernels see it: rows count from the batch's row0. */
struct mask {
    gn_dropout dropout;
    uint32_t module, row0;
};

/* v = the mask of those columns times v; col is a multiple of N. */
template <int N>
static __device__ __forceinline__ void drop(float v[N], const struct mask &m, int64_t row,
                                            int64_t col) {
    float factor[4];
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (N == 1 || i % 4 == 0)
            gn_dropout_quad(factor, &m.dropout, m.module, m.row0 + (uint32_t)row,
                            (uint32_t)((col + i) / 4));
        v[i] *= factor[N == 1 ? col % 4 : i % 4];
    }
}

#endif
