/* embed.cu - rows of the embedding table, widened to float32. Twin: cpu/embed.c.
 *
 * A block copies a piece of a row; the launch is what it costs. */
#include <cuda_fp16.h>

#include "common.cuh"

enum { THREADS = 256 };

static __device__ __forceinline__ float widen(float x) {
    return x;
}
static __device__ __forceinline__ float widen(bf16 x) {
    return __bfloat162float(x);
}
static __device__ __forceinline__ float widen(__half x) {
    return __half2float(x);
}

/* grid: rows, pieces of THREADS columns. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    embed_kernel(float *y, int64_t ld, const T *table, int64_t C, const int32_t *ids,
                 const int32_t *drawn) {
    pdl_trigger();
    const int64_t column = (int64_t)blockIdx.y * THREADS + threadIdx.x;
    const int64_t row = blockIdx.x;
    const int32_t staged = ids[row], id = staged < 0 ? drawn[-1 - staged] : staged;
    float x = 0.0f;
    if (column < C) x = widen(table[id * C + column]);
    pdl_wait(); /* for y's readers */
    if (column < C) y[row * ld + column] = x;
}

gn_status gn_cuda_embed(gn_ctx *ctx, gn_tensor *y, const gn_matrix *table, const int32_t *ids,
                        const int32_t *drawn) {
    (void)ids; /* staged */
    const int64_t C = table->cols, pieces = (C + THREADS - 1) / THREADS;
    if (pieces > 0xffff) return GN_EINVAL;
    const dim3 grid((unsigned)y->shape[0], (unsigned)pieces), block(THREADS);
    const int32_t *staged = ctx->cuda->batch.ids;
    float *to = (float *)y->data;
    switch (table->dtype) {
    case GN_F32:
        return launch(ctx, embed_kernel<float>, grid, block, 0, to, y->ld,
                      (const float *)table->data, C, staged, drawn);
    case GN_BF16:
        return launch(ctx, embed_kernel<bf16>, grid, block, 0, to, y->ld, (const bf16 *)table->data,
                      C, staged, drawn);
    default:
        return launch(ctx, embed_kernel<__half>, grid, block, 0, to, y->ld,
                      (const __half *)table->data, C, staged, drawn);
    }
}
