/* linear_dense.cu - gn_linear in bfloat16 through cuBLAS: many rows, or weights that no kernel of
 * ours multiplies as they are, or dropout.
 *
 * A part at a time is dequantized into working memory, 2 bytes a value, and multiplied; a large one
 * piece by piece. cuBLAS writes straight into y (adding, for the residual stream) and reads x where
 * it stands if it can. LoRA terms make x and the weight wider (see linear.h), x too where it stands
 * if there are columns to spare; for few rows, or
 * where that would cost too much, cuBLAS adds to a float32 buffer that holds what the terms give.
 * Under dropout each part's A sees an x of its own, which stands where x itself will stand. Few
 * rows with a stored bfloat16 weight (the output layer of a step of decoding) are bound by reading
 * it once: a kernel of warps that each take a weight's row. */
#include "gemm.h"
#include "linear.cuh"
#include "operands.h"
#include "rows.cuh"

enum { THREADS = 256, WARPS = THREADS / WARP, MAX_STORED_ROWS = 8, MIN_EXTENDED_ROWS = 257 };

/* ---- products ---- */

/* What products multiply. */
struct operands {
    bf16 *x; /* (T, ld), rows x_ld apart; written when extended, from column K on */
    int64_t x_ld;
    bf16 *weight; /* a piece of a part's weight, rows ld apart, in working memory */
    int64_t ld;   /* K, or that and the ranks of LoRA's terms */
    bool extended;
    void *lora; /* scratch */
};

/* y (T, N) = x W^T + beta y for rows of W ld apart. */
static gn_status multiply(gn_ctx *ctx, const gn_tensor *y, const struct operands *o, const bf16 *w,
                          float beta) {
    const gn_cuda_factor x = {o->x, o->x_ld, false}, turned_w = {w, o->ld, true};
    return gn_cuda_gemm(ctx, y->shape[0], y->shape[1], o->ld, 1, x, turned_w, beta, y->data,
                        y->dtype, y->ld);
}

/* A warp a row of W, for N_ROWS rows of x (the last may be repeated past T). K % 8 == 0. */
template <int N_ROWS, typename Y>
static __global__ void __launch_bounds__(THREADS)
    stored_kernel(Y *y, int64_t ld, const bf16 *x, const bf16 *w, int64_t N, int64_t K, int T,
                  float beta) {
    pdl_trigger();
    const int64_t n = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    pdl_wait();
    if (n >= N) return;
    float sums[N_ROWS] = {};
#pragma unroll 4
    for (int64_t k = lane * 8; k < K; k += WARP * 8) {
        const uint4 packed = __ldcs((const uint4 *)(w + n * K + k));
        const bf162 *values = (const bf162 *)&packed;
#pragma unroll
        for (int t = 0; t < N_ROWS; t++) {
            const uint4 packed_x = *(const uint4 *)(x + (t < T ? t : T - 1) * K + k);
            const bf162 *xs = (const bf162 *)&packed_x;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                sums[t] = fmaf(to_float(values[i].x), to_float(xs[i].x), sums[t]);
                sums[t] = fmaf(to_float(values[i].y), to_float(xs[i].y), sums[t]);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < N_ROWS; t++) {
        const float sum = warp_sum(sums[t]);
        if (lane != 0 || t >= T) continue;
        Y *at = y + t * ld + n;
        *at = from_float<Y>(beta != 0 ? sum + to_float(*at) : sum);
    }
}

template <typename Y>
static gn_status multiply_stored(gn_ctx *ctx, const gn_tensor *y, const bf16 *x, const bf16 *w,
                                 int64_t K, float beta) {
    const int T = (int)y->shape[0];
    const dim3 grid((unsigned)((y->shape[1] + WARPS - 1) / WARPS));
    void (*kernel)(Y *, int64_t, const bf16 *, const bf16 *, int64_t, int64_t, int, float) =
        T == 1   ? stored_kernel<1, Y>
        : T == 2 ? stored_kernel<2, Y>
        : T <= 4 ? stored_kernel<4, Y>
                 : stored_kernel<8, Y>;
    return launch(ctx, kernel, grid, dim3(THREADS), 0, (Y *)y->data, y->ld, x, w, y->shape[1], K, T,
                  beta);
}

/* Few rows read the weight where it stands. */
static bool reads_stored(const gn_ctx *ctx, const struct operands *o, const gn_matrix *m,
                         int64_t T) {
    return gn_cuda_is_stored(ctx, m) && o->ld == m->cols && o->x_ld == m->cols &&
           T <= MAX_STORED_ROWS && m->cols % 8 == 0 && (uintptr_t)m->data % 16 == 0;
}

/* Rows [n0, n0 + n) of a part's weight, times x, into those columns of y. */
static gn_status multiply_piece(gn_ctx *ctx, const struct operands *o, const gn_linear_args *args,
                                int part, const gn_tensor *y, float beta, int64_t n0, int64_t n) {
    const gn_matrix *m = args->part[part].w;
    const gn_cuda_region rows = {n0, n, 0, m->cols};
    gn_tensor columns = *y;
    columns.data = (char *)y->data + n0 * (int64_t)gn_dtype_size(y->dtype);
    columns.shape[1] = n;
    gn_status status = gn_cuda_dequantize(ctx, m, &rows, o->weight, o->ld, GN_BF16);
    if (!status && o->extended)
        status = gn_cuda_lora_extend(ctx, args, part, o->lora, n0 == 0 ? o->x : NULL, o->x_ld,
                                     o->weight, n0, n, o->ld);
    return status ? status : multiply(ctx, &columns, o, o->weight, beta);
}

/* A part's product: into y with beta. */
static gn_status multiply_part(gn_ctx *ctx, const struct operands *o, const gn_linear_args *args,
                               int part, const gn_tensor *y, float beta) {
    const gn_matrix *m = args->part[part].w;
    const bf16 *stored = (const bf16 *)m->data;
    if (reads_stored(ctx, o, m, y->shape[0]))
        return y->dtype == GN_F32 ? multiply_stored<float>(ctx, y, o->x, stored, m->cols, beta)
                                  : multiply_stored<bf16>(ctx, y, o->x, stored, m->cols, beta);
    if (gn_cuda_is_stored(ctx, m) && o->ld == m->cols) return multiply(ctx, y, o, stored, beta);
    const int64_t step = gn_cuda_piece_rows(m->rows, o->ld);
    gn_status status = GN_OK;
    for (int64_t n0 = 0; n0 < m->rows && !status; n0 += step)
        status = multiply_piece(ctx, o, args, part, y, beta, n0,
                                m->rows - n0 < step ? m->rows - n0 : step);
    return status;
}

/* Into `sums`, (T, columns of all parts) in one of two dtypes. */
static gn_status multiply_into_sums(gn_ctx *ctx, const struct operands *o,
                                    const gn_linear_args *args, void *sums, gn_dtype dtype,
                                    const gn_cuda_parts *parts, float beta) {
    gn_status status = GN_OK;
    for (int i = 0; i < parts->n && !status; i++) {
        gn_tensor y = gn_tensor_2d((char *)sums + parts->first[i] * (int64_t)gn_dtype_size(dtype),
                                   dtype, args->x.shape[0], args->part[i].w->rows);
        y.ld = parts->first[parts->n];
        status = multiply_part(ctx, o, args, i, &y, beta);
    }
    return status;
}

/* ---- epilogues ---- */

enum { FINISH_ROWS = 2 }; /* of a thread */

struct finish {
    struct rows y, sums; /* sums: a part's; with SwiGLU up's are N columns further */
    int64_t T, N;
    gn_epilogue epilogue;
};

/* grid: rows, pieces of a row. */
template <int V>
static __global__ void __launch_bounds__(THREADS) finish_kernel(const struct finish f) {
    pdl_trigger();
    pdl_wait();
    const int64_t n = ((int64_t)blockIdx.y * THREADS + threadIdx.x) * V;
    if (n >= f.N) return;
#pragma unroll
    for (int i = 0; i < FINISH_ROWS; i++) {
        const int64_t t = (int64_t)blockIdx.x * FINISH_ROWS + i;
        if (t >= f.T) return;
        float value[V], other[V];
        load<V>(value, f.sums, t, n);
        if (f.epilogue == GN_ADD) load<V>(other, f.y, t, n);
        if (f.epilogue == GN_SWIGLU) load<V>(other, f.sums, t, f.N + n);
#pragma unroll
        for (int v = 0; v < V; v++) {
            if (f.epilogue == GN_ADD) value[v] += other[v];
            if (f.epilogue == GN_SWIGLU)
                value[v] = (f.y.is_bf16 ? silu_fast(value[v]) : silu(value[v])) * other[v];
        }
        store<V>(f.y, t, n, value);
    }
}

/* y = f(sums): sums (T, columns of all parts). */
static gn_status finish(gn_ctx *ctx, const gn_linear_args *args, int part, const void *sums,
                        gn_dtype dtype, const gn_cuda_parts *parts) {
    const gn_tensor *y = &args->part[part].y;
    struct finish f = {};
    f.y = rows_of(y);
    f.sums = {(char *)sums + parts->first[part] * (int64_t)gn_dtype_size(dtype),
              parts->first[parts->n], dtype == GN_BF16};
    f.T = y->shape[0];
    f.N = y->shape[1];
    f.epilogue = args->epilogue;
    const bool vectors = in_vectors(f.y, f.N) && in_vectors(f.sums, f.N);
    const int64_t pieces = (f.N / (vectors ? ROW_VECTOR : 1) + THREADS - 1) / THREADS;
    if (pieces > 0xffff) return GN_EINVAL;
    const dim3 grid((unsigned)((f.T + FINISH_ROWS - 1) / FINISH_ROWS), (unsigned)pieces);
    return launch(ctx, vectors ? finish_kernel<ROW_VECTOR> : finish_kernel<1>, grid, dim3(THREADS),
                  0, f);
}

/* ---- the call ---- */

/* x as products see it: where it stands, or in working memory. */
static gn_status make_x(gn_ctx *ctx, const gn_linear_args *args, struct operands *o, bf16 *buffer) {
    const gn_tensor *x = &args->x;
    if (x->dtype == GN_BF16 && !args->norm && o->ld - x->shape[1] <= args->x_spare &&
        x->ld % 8 == 0 && (uintptr_t)x->data % 16 == 0) {
        o->x = (bf16 *)x->data;
        o->x_ld = x->ld;
        return GN_OK;
    }
    gn_cuda_operands_args how = {};
    how.norm = args->norm;
    how.eps = args->eps;
    gn_tensor to = gn_tensor_2d(buffer, GN_BF16, x->shape[0], x->shape[1]);
    to.ld = o->x_ld = o->ld;
    o->x = buffer;
    return gn_cuda_operands(ctx, &to, x, &how);
}

/* h of each part's terms, from an x under that part's mask in `buffer`. */
static gn_status shrink_dropped(gn_ctx *ctx, const gn_linear_args *args, const struct operands *o,
                                bf16 *buffer) {
    const gn_tensor *x = &args->x;
    gn_tensor to = gn_tensor_2d(buffer, GN_BF16, x->shape[0], x->shape[1]);
    to.ld = o->ld;
    gn_status status = GN_OK;
    for (int i = 0; i < args->n_parts && !status; i++) {
        if (part_rank_of(args, i) == 0) continue;
        gn_cuda_operands_args how = {};
        how.norm = args->norm;
        how.eps = args->eps;
        how.dropout = args->dropout;
        how.module = args->pair + i;
        status = gn_cuda_operands(ctx, &to, x, &how);
        if (!status) status = gn_cuda_lora_shrink(ctx, args, i, 1, buffer, o->ld, o->lora);
    }
    return status;
}

/* x, and h of LoRA's terms. */
static gn_status make_operands(gn_ctx *ctx, const gn_linear_args *args, struct operands *o,
                               bf16 *buffer) {
    const bool has_lora = max_rank_of(args) > 0, drops = has_lora && args->dropout.p > 0;
    gn_status status = drops ? shrink_dropped(ctx, args, o, buffer) : GN_OK;
    if (!status) status = make_x(ctx, args, o, buffer);
    if (status || drops || !has_lora) return status;
    return gn_cuda_lora_shrink(ctx, args, 0, args->n_parts, o->x, o->x_ld, o->lora);
}

/* LoRA may make operands wider by an eighth; a single term always may. */
static int64_t widest(int64_t K, int64_t rank) {
    const int64_t many = K + K / 8, one = (K + rank + 15 + 63) / 64 * 64;
    return many > one ? many : one;
}

/* `sum_rows` rows of sums; N: rows of the largest part, or of all; columns: all parts'. */
static size_t dense_bytes(const gn_ctx *ctx, int64_t rows, int64_t ld, int64_t N, int64_t sum_rows,
                          int64_t columns, int64_t rank, int terms) {
    return align_up((size_t)(rows * ld) * sizeof(bf16)) +
           align_up((size_t)gn_cuda_piece_bound(N, ld) * sizeof(bf16)) +
           align_up((size_t)(sum_rows * columns) * sizeof(float)) +
           (rank > 0 ? gn_cuda_lora_bytes(ctx, rows, rank, terms) : 0);
}

size_t gn_cuda_linear_dense_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                                      int64_t max_rank, int max_terms) {
    return dense_bytes(ctx, rows, widest(max_k, max_rank), max_n, rows, max_n, max_rank, max_terms);
}

size_t gn_cuda_linear_dense_train_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k,
                                            int64_t max_n, int64_t max_rank) {
    const int64_t sum_rows = rows < MIN_EXTENDED_ROWS ? rows : (int64_t)MIN_EXTENDED_ROWS;
    return dense_bytes(ctx, rows, widest(max_k, max_rank), max_n, sum_rows, max_n, max_rank, 1);
}

/* The product added to what LoRA's terms give. */
static gn_status add_to_lora(gn_ctx *ctx, const gn_linear_args *args, const struct operands *o,
                             float *sums, const gn_cuda_parts *parts) {
    gn_status status = gn_cuda_lora_expand(ctx, args, o->lora, sums);
    if (!status) status = multiply_into_sums(ctx, o, args, sums, GN_F32, parts, 1);
    const int n = args->epilogue == GN_SWIGLU ? 1 : args->n_parts;
    for (int i = 0; i < n && !status; i++) status = finish(ctx, args, i, sums, GN_F32, parts);
    return status;
}

static gn_status multiply_swiglu(gn_ctx *ctx, const gn_linear_args *args, const struct operands *o,
                                 void *sums, const gn_cuda_parts *parts) {
    /* Beside the rounding of quantized weights that of gate and up hardly counts; beside stored
     * ones, which are exact, it would be the largest error. */
    const gn_dtype dtype = args->part[0].w->qtype == GN_Q_NONE ? GN_F32 : GN_BF16;
    const gn_status status = multiply_into_sums(ctx, o, args, sums, dtype, parts, 0);
    return status ? status : finish(ctx, args, 0, sums, dtype, parts);
}

static gn_status multiply_and_finish(gn_ctx *ctx, const gn_linear_args *args,
                                     const struct operands *o, void *sums,
                                     const gn_cuda_parts *parts) {
    if (max_rank_of(args) > 0 && !o->extended)
        return add_to_lora(ctx, args, o, (float *)sums, parts);
    if (args->epilogue == GN_SWIGLU) return multiply_swiglu(ctx, args, o, sums, parts);
    const float beta = args->epilogue == GN_ADD ? 1.0f : 0.0f;
    gn_status status = GN_OK;
    for (int i = 0; i < args->n_parts && !status; i++)
        status = multiply_part(ctx, o, args, i, &args->part[i].y, beta);
    return status;
}

gn_status gn_cuda_linear_dense(gn_ctx *ctx, const gn_linear_args *args) {
    const int64_t T = args->x.shape[0], K = args->x.shape[1];
    const gn_cuda_parts parts = parts_of(args);
    const int64_t columns = parts.first[parts.n];
    const int rank = max_rank_of(args);
    const int64_t extended = rank > 0 ? gn_cuda_lora_extended(args) : K;
    struct operands o = {};
    o.extended = rank > 0 && T >= MIN_EXTENDED_ROWS && extended <= widest(K, rank);
    o.ld = o.extended ? extended : K;
    const bool has_sums = (rank > 0 && !o.extended) || args->epilogue == GN_SWIGLU;
    const int64_t sum_rows = has_sums ? T : 0;
    int64_t N = 0;
    for (int i = 0; i < args->n_parts; i++)
        if (args->part[i].w->rows > N) N = args->part[i].w->rows;
    if (dense_bytes(ctx, T, o.ld, N, sum_rows, columns, rank, gn_cuda_lora_terms_a_row(args)) >
        ctx->workspace_bytes)
        return GN_ENOMEM;
    char *at = (char *)ctx->workspace;
    bf16 *x = (bf16 *)carve(&at, (size_t)(T * o.ld) * sizeof(bf16));
    o.weight = (bf16 *)carve(&at, (size_t)gn_cuda_piece_bound(N, o.ld) * sizeof(bf16));
    void *sums = carve(&at, (size_t)(sum_rows * columns) * sizeof(float));
    o.lora = at;
    const gn_status status = make_operands(ctx, args, &o, x);
    return status ? status : multiply_and_finish(ctx, args, &o, sums, &parts);
}
