/* lora.cu - LoRA terms of a batch whose rows use different adapters, for any number of rows.
 *
 * Two launches: u = scale * A x for each row, part and term that covers the row, then B u. Both
 * look the terms up on the device, so that a recorded launch serves other adapters of the same
 * ranks. A row's sums run in an order that its own terms alone decide. B is read again for every
 * row; calls of few rows with tiled weights do not come here (linear_decode.cu). */
#include "linear.cuh"

enum { THREADS = 256, MAX_TERMS_A_ROW = 16 };

typedef struct call {
    const gn_lora *terms;
    int n_terms, pair, max_rank;
    int64_t K;
    gn_cuda_parts parts;
} call;

/* The terms that cover row t, in their order. */
static __device__ int find_terms(const call &c, int64_t t, int found[MAX_TERMS_A_ROW]) {
    int n = 0;
    for (int i = 0; i < c.n_terms && n < MAX_TERMS_A_ROW; i++) {
        const gn_lora *term = &c.terms[i];
        if (t >= term->row0 && t < term->row0 + term->rows) found[n++] = i;
    }
    return n;
}

/* u of one row, part and term: (max_rank). */
static __device__ float *u_of(const call &c, float *u, int64_t t, int part, int slot) {
    return u + ((t * GN_MAX_PARTS + part) * MAX_TERMS_A_ROW + slot) * c.max_rank;
}

template <typename W, typename X>
static __device__ float dot_of_warp(const W *a, const X *x, int64_t n) {
    float sum = 0;
    for (int64_t i = threadIdx.x % WARP; i < n; i += WARP)
        sum = fmaf(to_float(a[i]), to_float(x[i]), sum);
    return warp_sum(sum);
}

/* Block (t, part): a warp a rank. */
template <typename X>
static __global__ void __launch_bounds__(THREADS) down_kernel(call c, const X *x, float *u) {
    pdl_trigger();
    pdl_wait();
    const int64_t t = blockIdx.x;
    const int part = blockIdx.y;
    int found[MAX_TERMS_A_ROW];
    const int n = find_terms(c, t, found);
    for (int slot = 0; slot < n; slot++) {
        const gn_lora *term = &c.terms[found[slot]];
        const gn_lora_pair *pair = &term->placed[c.pair + part];
        for (int r = threadIdx.x / WARP; r < pair->rank; r += THREADS / WARP) {
            const int64_t at = r * pair->a.ld;
            const float sum = pair->a.dtype == GN_F32
                                  ? dot_of_warp((const float *)pair->a.data + at, x + t * c.K, c.K)
                                  : dot_of_warp((const bf16 *)pair->a.data + at, x + t * c.K, c.K);
            if (threadIdx.x % WARP == 0)
                u_of(c, u, t, part, slot)[r] = term->scale * pair->scale * sum;
        }
    }
}

template <typename W> static __device__ float dot_of_thread(const W *b, const float *u, int n) {
    float sum = 0;
    for (int i = 0; i < n; i++) sum = fmaf(to_float(b[i]), u[i], sum);
    return sum;
}

/* A thread a column of all parts; blockIdx.y is the row. */
static __global__ void __launch_bounds__(THREADS) up_kernel(call c, float *u, float *out) {
    pdl_trigger();
    pdl_wait();
    const int64_t t = blockIdx.y, column = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    const int64_t columns = c.parts.first[c.parts.n];
    if (column >= columns) return;
    int part = 0;
    while (column >= c.parts.first[part + 1]) part++;
    int found[MAX_TERMS_A_ROW];
    const int n = find_terms(c, t, found);
    float sum = 0;
    for (int slot = 0; slot < n; slot++) {
        const gn_lora_pair *pair = &c.terms[found[slot]].placed[c.pair + part];
        if (pair->rank == 0) continue;
        const int64_t at = (column - c.parts.first[part]) * pair->b.ld;
        const float *row = u_of(c, u, t, part, slot);
        sum += pair->b.dtype == GN_F32
                   ? dot_of_thread((const float *)pair->b.data + at, row, pair->rank)
                   : dot_of_thread((const bf16 *)pair->b.data + at, row, pair->rank);
    }
    out[t * columns + column] = sum;
}

size_t gn_cuda_lora_bytes(int64_t rows, int64_t max_rank) {
    return align_up(sizeof(float) * GN_MAX_PARTS * MAX_TERMS_A_ROW * (size_t)(rows * max_rank));
}

gn_status gn_cuda_lora(gn_ctx *ctx, const gn_linear_args *args, const void *x, gn_dtype x_dtype,
                       float *u, float *out) {
    call c = {};
    c.terms = ctx->cuda->batch.terms;
    c.n_terms = args->n_lora;
    c.pair = args->pair;
    c.max_rank = max_rank_of(args);
    c.K = args->x.shape[1];
    c.parts = parts_of(args);
    const unsigned rows = (unsigned)args->x.shape[0];
    const int64_t columns = c.parts.first[c.parts.n];
    gn_status status = GN_OK;
    GN_FOR_FLOAT(x_dtype, status = launch(ctx, down_kernel<T>, dim3(rows, (unsigned)c.parts.n),
                                          dim3(THREADS), 0, c, (const T *)x, u));
    if (status) return status;
    return launch(ctx, up_kernel, dim3((unsigned)((columns + THREADS - 1) / THREADS), rows),
                  dim3(THREADS), 0, c, u, out);
}
