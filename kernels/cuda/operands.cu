/* operands.cu - rows converted to what products multiply: normalised, under a dropout mask, in the
 * compute dtype. A block a row; the floor is one read and one write. A norm reads its row twice,
 * the second time from cache; a mask costs about as much arithmetic as memory allows time for.
 * Twin, as far as they are only converted: cpu/convert.c. */
#include "operands.h"
#include "rows.cuh"

enum { THREADS = 256 };

struct operands {
    struct rows to, x, norm; /* norm: one row */
    float eps;
    struct mask mask;
    int64_t C;
};

template <int N>
static __global__ void __launch_bounds__(THREADS) operands_kernel(const struct operands o) {
    const int64_t row = blockIdx.x;
    float r = 1.0f;
    pdl_trigger();
    pdl_wait();
    if (o.norm.data) {
        float sum = 0.0f;
        for (int64_t c = threadIdx.x * N; c < o.C; c += blockDim.x * N) {
            float v[N];
            load<N>(v, o.x, row, c);
#pragma unroll
            for (int i = 0; i < N; i++) sum += v[i] * v[i];
        }
        r = rsqrtf(block_sum(sum) / (float)o.C + o.eps);
    }
    for (int64_t c = threadIdx.x * N; c < o.C; c += blockDim.x * N) {
        float v[N], w[N];
        load<N>(v, o.x, row, c);
        if (o.norm.data) load<N>(w, o.norm, 0, c);
#pragma unroll
        for (int i = 0; i < N; i++)
            if (o.norm.data) v[i] = v[i] * r * w[i];
        if (o.mask.dropout.p > 0) drop<N>(v, o.mask, row, c);
        store<N>(o.to, row, c, v);
    }
}

template <int N>
static __global__ void __launch_bounds__(THREADS) add_kernel(const struct operands o) {
    const int64_t row = blockIdx.x;
    pdl_trigger();
    pdl_wait();
    for (int64_t c = threadIdx.x * N; c < o.C; c += blockDim.x * N) {
        float x[N], y[N];
        load<N>(x, o.x, row, c);
        load<N>(y, o.to, row, c);
        if (o.mask.dropout.p > 0) drop<N>(x, o.mask, row, c);
#pragma unroll
        for (int i = 0; i < N; i++) y[i] += x[i];
        store<N>(o.to, row, c, y);
    }
}

static struct operands operands_of(const gn_tensor *to, const gn_tensor *x,
                                   const gn_cuda_operands_args *args) {
    struct operands o = {};
    o.to = rows_of(to);
    o.x = rows_of(x);
    o.C = x->shape[1];
    if (!args) return o;
    if (args->norm) o.norm = {args->norm->data, 0, false};
    o.eps = args->eps;
    o.mask = {args->dropout, (uint32_t)args->module, (uint32_t)args->row0};
    return o;
}

static gn_status run(gn_ctx *ctx, void (*in_vectors_kernel)(struct operands),
                     void (*plain_kernel)(struct operands), const struct operands &o, int64_t T) {
    const bool vectors = in_vectors(o.to, o.C) && in_vectors(o.x, o.C) && in_vectors(o.norm, o.C);
    const int64_t items = o.C / (vectors ? ROW_VECTOR : 1);
    const int64_t threads = items < THREADS ? (items + WARP - 1) / WARP * WARP : (int64_t)THREADS;
    return launch(ctx, vectors ? in_vectors_kernel : plain_kernel, dim3((unsigned)T),
                  dim3((unsigned)threads), 0, o);
}

gn_status gn_cuda_operands(gn_ctx *ctx, const gn_tensor *to, const gn_tensor *x,
                           const gn_cuda_operands_args *args) {
    return run(ctx, operands_kernel<ROW_VECTOR>, operands_kernel<1>, operands_of(to, x, args),
               x->shape[0]);
}

gn_status gn_cuda_convert(gn_ctx *ctx, gn_tensor *y, const gn_tensor *x) {
    return gn_cuda_operands(ctx, y, x, NULL);
}

gn_status gn_cuda_add(gn_ctx *ctx, const gn_tensor *y, const gn_tensor *x,
                      const gn_cuda_operands_args *args) {
    return run(ctx, add_kernel<ROW_VECTOR>, add_kernel<1>, operands_of(y, x, args), x->shape[0]);
}
