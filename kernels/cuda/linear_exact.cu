/* linear_exact.cu - gn_linear in float32, for parity: any weight, any shape, no tensor cores.
 *
 * A block computes 64 columns of a part for 16 rows, 32 of K at a time through shared memory. Each
 * output is one thread's sum over K in order, so that it does not depend on the batch. */
#include "linear.cuh"

enum { COLUMNS = 64, ROWS = 16, STEP = 32, THREADS = 256, OUTPUTS = COLUMNS * ROWS / THREADS };

typedef struct output {
    float *y;
    int64_t ld;
    gn_epilogue epilogue;
    const float *lora; /* at the part's first column, or NULL */
    int64_t lora_ld;
} output;

/* Thread (n, r): column n of the block, rows r, r + 4, ... For SwiGLU the gate comes first and is
 * stored, then up multiplies onto silu of it. */
static __global__ void __launch_bounds__(THREADS)
    exact_kernel(output out, gn_matrix m, bool tiled, const float *x, int64_t x_ld, int64_t T,
                 bool is_up) {
    __shared__ float w[COLUMNS][STEP + 1], xs[ROWS][STEP];
    pdl_trigger();
    pdl_wait();
    const int64_t n0 = (int64_t)blockIdx.x * COLUMNS, t0 = (int64_t)blockIdx.y * ROWS;
    const int n = threadIdx.x % COLUMNS, r = threadIdx.x / COLUMNS;
    float sums[OUTPUTS] = {};
    for (int64_t k0 = 0; k0 < m.cols; k0 += STEP) {
        for (int i = threadIdx.x; i < COLUMNS * STEP; i += THREADS) {
            const int64_t row = n0 + i / STEP, k = k0 + i % STEP;
            w[i / STEP][i % STEP] =
                row < m.rows && k < m.cols ? weight_value(m, tiled, row, k) : 0.0f;
        }
        for (int i = threadIdx.x; i < ROWS * STEP; i += THREADS) {
            const int64_t t = t0 + i / STEP, k = k0 + i % STEP;
            xs[i / STEP][i % STEP] = t < T && k < m.cols ? x[t * x_ld + k] : 0.0f;
        }
        __syncthreads();
        for (int k = 0; k < STEP; k++)
#pragma unroll
            for (int i = 0; i < OUTPUTS; i++)
                sums[i] = fmaf(w[n][k], xs[r + i * (THREADS / COLUMNS)][k], sums[i]);
        __syncthreads();
    }
    if (n0 + n >= m.rows) return;
    for (int i = 0; i < OUTPUTS; i++) {
        const int64_t t = t0 + r + i * (THREADS / COLUMNS);
        if (t >= T) return;
        float value = sums[i];
        if (out.lora) value += out.lora[t * out.lora_ld + n0 + n];
        float *y = out.y + t * out.ld + n0 + n;
        if (out.epilogue == GN_ADD) value += *y;
        if (is_up) value *= silu(*y);
        *y = value;
    }
}

gn_status gn_cuda_linear_exact(gn_ctx *ctx, const gn_linear_args *args) {
    const int64_t T = args->x.shape[0], K = args->x.shape[1];
    const gn_cuda_parts parts = parts_of(args);
    const int rank = max_rank_of(args);
    if (gn_cuda_linear_general_workspace(T, K, parts.first[parts.n], rank) > ctx->workspace_bytes)
        return GN_ENOMEM;
    char *at = (char *)ctx->workspace;
    gn_tensor x = gn_tensor_2d(carve(&at, (size_t)(T * K) * sizeof(float)), GN_F32, T, K);
    float *lora = NULL;
    gn_status status = args->norm
                           ? gn_cuda_rmsnorm(ctx, &x, &args->x, args->norm, args->eps)
                           : gn_cuda_status(cudaMemcpy2DAsync(
                                 x.data, (size_t)K * sizeof(float), args->x.data,
                                 (size_t)args->x.ld * sizeof(float), (size_t)K * sizeof(float),
                                 (size_t)T, cudaMemcpyDeviceToDevice, gn_cuda_stream(ctx)));
    if (!status && rank > 0) {
        float *u = (float *)carve(&at, gn_cuda_lora_bytes(T, rank));
        lora = (float *)at;
        status = gn_cuda_lora(ctx, args, x.data, GN_F32, u, lora);
    }
    for (int i = 0; i < args->n_parts && !status; i++) {
        const bool is_up = args->epilogue == GN_SWIGLU && i == 1;
        const gn_tensor *y = &args->part[is_up ? 0 : i].y;
        const gn_matrix *m = args->part[i].w;
        const output out = {(float *)y->data, y->ld, args->epilogue,
                            lora ? lora + parts.first[i] : NULL, parts.first[parts.n]};
        status = launch(
            ctx, exact_kernel,
            dim3((unsigned)((m->rows + COLUMNS - 1) / COLUMNS), (unsigned)((T + ROWS - 1) / ROWS)),
            dim3(THREADS), 0, out, *m, gn_cuda_is_tiled(m), (const float *)x.data, K, T, is_up);
    }
    return status;
}
