/* linear_exact.cu - gn_linear in float32, for parity: any weight, any shape, no tensor cores.
 *
 * A block computes 64 columns of a part for 16 rows, 32 of K at a time through shared memory. Each
 * output is one thread's sum over K in order, so that it does not depend on the batch. LoRA's terms
 * come first: u = scale A x for each row of a term, then B u, also in orders of their own. */
#include "linear.cuh"
#include "operands.h"
#include "rows.cuh"

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

static gn_status multiply(gn_ctx *ctx, const output *out, const gn_matrix *m, const float *x,
                          int64_t x_ld, int64_t T, bool is_up) {
    const dim3 grid((unsigned)((m->rows + COLUMNS - 1) / COLUMNS),
                    (unsigned)((T + ROWS - 1) / ROWS));
    return launch(ctx, exact_kernel, grid, dim3(THREADS), 0, *out, *m, gn_cuda_is_tiled(m), x, x_ld,
                  T, is_up);
}

gn_status gn_cuda_exact_product(gn_ctx *ctx, float *y, int64_t y_ld, const gn_matrix *m,
                                const float *x, int64_t x_ld, int64_t T) {
    const output out = {y, y_ld, GN_STORE, NULL, 0};
    return multiply(ctx, &out, m, x, x_ld, T, false);
}

/* ---- LoRA ---- */

struct terms {
    const gn_lora *terms;
    int n, pair, n_parts, max_rank;
    int64_t K;
    float *u; /* (rows of all terms, n_parts, max_rank) */
    gn_dropout dropout;
};

/* u of one row of a term, `row` counting those of the terms before. */
static __device__ __forceinline__ float *u_at(const struct terms &c, int64_t row, int part) {
    return c.u + (row * c.n_parts + part) * c.max_rank;
}

static __device__ __forceinline__ float value_of(const gn_tensor &m, int64_t i) {
    return m.dtype == GN_F32 ? ((const float *)m.data)[i] : to_float(((const bf16 *)m.data)[i]);
}

/* Block (t, part): a warp a rank. */
static __global__ void __launch_bounds__(THREADS) project_kernel(struct terms c, const float *x) {
    pdl_trigger();
    pdl_wait();
    const int64_t t = blockIdx.x;
    const int part = blockIdx.y, lane = threadIdx.x % WARP;
    const struct mask mask = {c.dropout, (uint32_t)(c.pair + part), 0};
    int64_t before = 0;
    for (int i = 0; i < c.n; before += c.terms[i++].rows) {
        const gn_lora *term = &c.terms[i];
        if (t < term->row0 || t >= term->row0 + term->rows) continue;
        const gn_lora_pair *pair = &term->placed[c.pair + part];
        for (int r = threadIdx.x / WARP; r < pair->rank; r += THREADS / WARP) {
            float sum = 0.0f;
            for (int64_t k = lane; k < c.K; k += WARP) {
                float v = x[t * c.K + k];
                if (c.dropout.p > 0) drop<1>(&v, mask, t, k);
                sum = fmaf(value_of(pair->a, r * pair->a.ld + k), v, sum);
            }
            sum = warp_sum(sum);
            if (lane == 0)
                u_at(c, before + t - term->row0, part)[r] = term->scale * pair->scale * sum;
        }
    }
}

/* out (T, ld), the columns of one part: a thread a column; blockIdx.y is the row. */
static __global__ void __launch_bounds__(THREADS)
    add_terms_kernel(struct terms c, int part, float *out, int64_t ld, int64_t N) {
    pdl_trigger();
    pdl_wait();
    const int64_t t = blockIdx.y, n = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (n >= N) return;
    float all = 0.0f;
    int64_t before = 0;
    for (int i = 0; i < c.n; before += c.terms[i++].rows) {
        const gn_lora *term = &c.terms[i];
        if (t < term->row0 || t >= term->row0 + term->rows) continue;
        const gn_lora_pair *pair = &term->placed[c.pair + part];
        const float *u = u_at(c, before + t - term->row0, part);
        float sum = 0.0f;
        for (int r = 0; r < pair->rank; r++)
            sum = fmaf(value_of(pair->b, n * pair->b.ld + r), u[r], sum);
        all += sum;
    }
    out[t * ld + n] = all;
}

static size_t u_bytes(int64_t rows, int64_t max_rank) {
    return align_up((size_t)(rows * GN_MAX_PARTS * max_rank) * sizeof(float));
}

/* out (T, columns of all parts) = what the call's terms add to each row. */
static gn_status add_terms(gn_ctx *ctx, const gn_linear_args *args, const float *x, float *u,
                           const gn_cuda_parts *parts, float *out) {
    const unsigned T = (unsigned)args->x.shape[0];
    const struct terms c = {ctx->cuda->batch.terms, args->n_lora,     args->pair, args->n_parts,
                            max_rank_of(args),      args->x.shape[1], u,          args->dropout};
    gn_status status =
        launch(ctx, project_kernel, dim3(T, (unsigned)args->n_parts), dim3(THREADS), 0, c, x);
    for (int i = 0; i < args->n_parts && !status; i++) {
        const int64_t N = args->part[i].w->rows;
        status = launch(ctx, add_terms_kernel, dim3((unsigned)((N + THREADS - 1) / THREADS), T),
                        dim3(THREADS), 0, c, i, out + parts->first[i], parts->first[parts->n], N);
    }
    return status;
}

/* ---- the call ---- */

size_t gn_cuda_linear_exact_workspace(int64_t rows, int64_t max_k, int64_t max_n, int64_t max_rank,
                                      int max_terms) {
    return align_up((size_t)(rows * max_k) * sizeof(float)) +
           align_up((size_t)(rows * max_n) * sizeof(float)) + u_bytes(rows * max_terms, max_rank);
}

gn_status gn_cuda_linear_exact(gn_ctx *ctx, const gn_linear_args *args) {
    const int64_t T = args->x.shape[0], K = args->x.shape[1];
    const gn_cuda_parts parts = parts_of(args);
    const int rank = max_rank_of(args);
    if (gn_cuda_linear_exact_workspace(T, K, parts.first[parts.n], rank,
                                       gn_cuda_lora_terms_a_row(args)) > ctx->workspace_bytes)
        return GN_ENOMEM;
    char *at = (char *)ctx->workspace;
    gn_tensor x = gn_tensor_2d(carve(&at, (size_t)(T * K) * sizeof(float)), GN_F32, T, K);
    float *lora = NULL;
    gn_status status = args->norm ? gn_cuda_rmsnorm(ctx, &x, &args->x, args->norm, args->eps)
                                  : gn_cuda_operands(ctx, &x, &args->x, NULL);
    if (!status && rank > 0) {
        lora = (float *)carve(&at, (size_t)(T * parts.first[parts.n]) * sizeof(float));
        status = add_terms(ctx, args, (const float *)x.data, (float *)at, &parts, lora);
    }
    for (int i = 0; i < args->n_parts && !status; i++) {
        const bool is_up = args->epilogue == GN_SWIGLU && i == 1;
        const gn_tensor *y = &args->part[is_up ? 0 : i].y;
        const gn_matrix *m = args->part[i].w;
        const output out = {(float *)y->data, y->ld, args->epilogue,
                            lora ? lora + parts.first[i] : NULL, parts.first[parts.n]};
        status = multiply(ctx, &out, m, (const float *)x.data, K, T, is_up);
    }
    return status;
}
