/* embed.cu - rows of the embedding table, widened to float32, and their gradient. Twin:
 * cpu/embed.c.
 *
 * Forward a block copies a piece of a row; the launch is what it costs. Backward the block of the
 * first row that has an id adds up those of all rows that have it, in order: as the CPU does, to
 * the bit. The floor is one read of dy, and one read and one write of the table's rows. */
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

/* ---- backward ---- */

/* grid: rows, pieces of THREADS columns. */
static __global__ void __launch_bounds__(THREADS)
    embed_bwd_kernel(float *dtable, int64_t table_ld, const float *dy, int64_t ld, int64_t T,
                     int64_t C, const int32_t *ids) {
    const int64_t first = blockIdx.x, column = (int64_t)blockIdx.y * THREADS + threadIdx.x;
    pdl_trigger();
    pdl_wait();
    const int32_t id = ids[first];
    bool seen = false;
    for (int64_t t = threadIdx.x; t < first; t += THREADS) seen |= ids[t] == id;
    if (__syncthreads_or(seen)) return; /* an earlier block's */
    float *to = dtable + id * table_ld + column;
    float sum = column < C ? *to : 0.0f;
    __shared__ bool has_id[THREADS];
    for (int64_t t0 = first; t0 < T; t0 += THREADS) {
        const bool mine = t0 + threadIdx.x < T && ids[t0 + threadIdx.x] == id;
        has_id[threadIdx.x] = mine;
        if (!__syncthreads_or(mine)) continue;
        for (int i = 0; i < THREADS; i++)
            if (has_id[i] && column < C) sum += dy[(t0 + i) * ld + column];
        __syncthreads(); /* of has_id's readers */
    }
    if (column < C) *to = sum;
}

gn_status gn_cuda_embed_bwd(gn_ctx *ctx, gn_tensor *dtable, const gn_tensor *dy,
                            const int32_t *ids) {
    (void)ids; /* staged */
    const int64_t T = dy->shape[0], C = dy->shape[1], pieces = (C + THREADS - 1) / THREADS;
    if (pieces > 0xffff) return GN_EINVAL;
    return launch(ctx, embed_bwd_kernel, dim3((unsigned)T, (unsigned)pieces), dim3(THREADS), 0,
                  (float *)dtable->data, dtable->ld, (const float *)dy->data, dy->ld, T, C,
                  (const int32_t *)ctx->cuda->batch.ids);
}
