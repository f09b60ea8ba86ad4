/* linear_dense.cu - gn_linear in bfloat16 through cuBLAS: many rows, or weights that no kernel of
 * ours multiplies as they are.
 *
 * A part at a time is dequantized into working memory, 2 bytes a value, and multiplied. For 512
 * rows and more that costs a tenth to a quarter of the product itself. cuBLAS writes straight into
 * y (adding, for the residual stream). LoRA terms make x and the weight wider (see linear.h); for
 * few rows, or where that would cost too much, cuBLAS adds to a float32 buffer that holds what the
 * terms give. Few rows with a stored bfloat16 weight (the output layer of a step of decoding) are
 * bound by reading it once: a kernel of warps that each take a weight's row. */
#include "linear.cuh"

enum { THREADS = 256, WARPS = THREADS / WARP, MAX_STORED_ROWS = 8, MIN_EXTENDED_ROWS = 257 };

/* ---- x as products see it ---- */

/* to (T, K) bf16 = x, normalised when w is given. A block a row. */
template <typename X>
static __global__ void __launch_bounds__(THREADS)
    operands_kernel(bf16 *to, int64_t to_ld, const X *x, int64_t ld, const float *w, float eps,
                    int64_t K) {
    pdl_trigger();
    pdl_wait();
    x += blockIdx.x * ld;
    to += blockIdx.x * to_ld;
    float r = 1;
    if (w) {
        float sum = 0;
        for (int64_t k = threadIdx.x; k < K; k += THREADS) sum += to_float(x[k]) * to_float(x[k]);
        r = rsqrtf(block_sum(sum) / (float)K + eps);
    }
    for (int64_t k = threadIdx.x; k < K; k += THREADS)
        to[k] = from_float<bf16>(w ? to_float(x[k]) * r * w[k] : to_float(x[k]));
}

/* ---- dequantizing ---- */

/* A weight in tiles: a thread takes 16 columns of a row, 8 bytes, and writes 32. */
static __global__ void __launch_bounds__(THREADS)
    dequantize_tiles_kernel(bf16 *to, int64_t ld, gn_matrix m, int64_t n_tiles) {
    __shared__ float code[16];
    if (threadIdx.x < 16) code[threadIdx.x] = m.code[threadIdx.x];
    __syncthreads();
    pdl_trigger();
    pdl_wait();
    const int64_t tile = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (tile >= n_tiles) return;
    const int lane = threadIdx.x % WARP, g = lane / 4, c = lane % 4;
    const int64_t per_row = m.cols / GN_BLOCK, s = tile % per_row;
    const int64_t row = tile / per_row * GN_CUDA_TILE_ROWS + g;
    if (row >= m.rows) return;
    const uint2 codes = ((const uint2 *)((const char *)m.data + tile * GN_CUDA_TILE_BYTES))[lane];
    const float scale = block_scale(m, row * per_row + s, tile * GN_CUDA_TILE_ROWS + g);
    bf162 values[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t byte = ((i < 4 ? codes.x : codes.y) >> (8 * (i % 4))) & 0xff;
        values[i].x = from_float<bf16>(round_to(code[byte >> 4] * scale, m.dtype));
        values[i].y = from_float<bf16>(round_to(code[byte & 15] * scale, m.dtype));
    }
    uint4 *at = (uint4 *)(to + row * ld + s * GN_BLOCK + c * 16);
    at[0] = ((const uint4 *)values)[0];
    at[1] = ((const uint4 *)values)[1];
}

static __global__ void __launch_bounds__(THREADS)
    dequantize_kernel(bf16 *to, int64_t ld, gn_matrix m) {
    pdl_trigger();
    pdl_wait();
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < m.rows * m.cols)
        to[i / m.cols * ld + i % m.cols] =
            from_float<bf16>(weight_value(m, false, i / m.cols, i % m.cols));
}

static bool is_stored(const gn_matrix *m) {
    return m->qtype == GN_Q_NONE && m->dtype == GN_BF16;
}

/* *w: the weight in bf16, rows ld apart: where it stands, or in `buffer`. */
static gn_status dequantize(gn_ctx *ctx, const gn_matrix *m, bf16 *buffer, int64_t ld,
                            const bf16 **w) {
    *w = is_stored(m) && ld == m->cols ? (const bf16 *)m->data : buffer;
    if (*w != buffer) return GN_OK;
    if (gn_cuda_is_tiled(m)) {
        const int64_t n =
            (m->rows + GN_CUDA_TILE_ROWS - 1) / GN_CUDA_TILE_ROWS * (m->cols / GN_BLOCK);
        return launch(ctx, dequantize_tiles_kernel, dim3((unsigned)((n + WARPS - 1) / WARPS)),
                      dim3(THREADS), 0, buffer, ld, *m, n);
    }
    const int64_t n = m->rows * m->cols;
    return launch(ctx, dequantize_kernel, dim3((unsigned)((n + THREADS - 1) / THREADS)),
                  dim3(THREADS), 0, buffer, ld, *m);
}

gn_status gn_cuda_dequantize(gn_ctx *ctx, const gn_matrix *m, void *to) {
    const bf16 *w;
    return dequantize(ctx, m, (bf16 *)to, m->cols, &w);
}

/* ---- products ---- */

/* What products multiply, in working memory. */
struct operands {
    bf16 *x, *weight; /* (T, ld); (rows of a part, ld) */
    int64_t ld;       /* K, or that and the ranks of LoRA's terms */
    bool extended;
    void *lora; /* scratch */
};

/* y (T, N) = x W^T + beta y; cuBLAS counts by columns, so that it sees y^T = W x^T. */
static gn_status multiply(gn_ctx *ctx, const gn_tensor *y, const bf16 *x, const bf16 *w, int64_t K,
                          float beta) {
    const float one = 1;
    const cudaDataType_t type = y->dtype == GN_BF16 ? CUDA_R_16BF : CUDA_R_32F;
    const cublasStatus_t status =
        cublasGemmEx(ctx->cuda->blas, CUBLAS_OP_T, CUBLAS_OP_N, (int)y->shape[1], (int)y->shape[0],
                     (int)K, &one, w, CUDA_R_16BF, (int)K, x, CUDA_R_16BF, (int)K, &beta, y->data,
                     type, (int)y->ld, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    return status == CUBLAS_STATUS_SUCCESS ? GN_OK : GN_EDEVICE;
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

/* A part's product: into y with beta. */
static gn_status multiply_part(gn_ctx *ctx, const struct operands *o, const gn_linear_args *args,
                               int part, const gn_tensor *y, float beta) {
    const gn_matrix *m = args->part[part].w;
    const bf16 *w;
    gn_status status = dequantize(ctx, m, o->weight, o->ld, &w);
    if (!status && o->extended)
        status = gn_cuda_lora_extend(ctx, args, part, o->lora, o->x, o->weight, o->ld);
    if (status) return status;
    if (!is_stored(m) || y->shape[0] > MAX_STORED_ROWS || m->cols % 8 != 0 ||
        (uintptr_t)w % 16 != 0)
        return multiply(ctx, y, o->x, w, o->ld, beta);
    return y->dtype == GN_F32 ? multiply_stored<float>(ctx, y, o->x, w, m->cols, beta)
                              : multiply_stored<bf16>(ctx, y, o->x, w, m->cols, beta);
}

/* ---- epilogues ---- */

/* y (T, N) = f(sums): sums stand side by side for all parts, part's own from `first` on. */
template <typename Y, typename S>
static __global__ void __launch_bounds__(THREADS)
    finish_kernel(Y *y, int64_t ld, const S *sums, int64_t columns, int64_t first, int64_t N,
                  gn_epilogue epilogue) {
    pdl_trigger();
    pdl_wait();
    const int64_t n = (int64_t)blockIdx.x * THREADS + threadIdx.x, t = blockIdx.y;
    if (n >= N) return;
    const S *at = sums + t * columns + first + n;
    Y *to = y + t * ld + n;
    float value = to_float(*at);
    if (epilogue == GN_ADD) value += to_float(*to);
    if (epilogue == GN_SWIGLU) value = silu(value) * to_float(at[N]);
    *to = from_float<Y>(value);
}

template <typename S>
static gn_status finish(gn_ctx *ctx, const gn_linear_args *args, int part, const S *sums,
                        const gn_cuda_parts *parts) {
    const gn_tensor *y = &args->part[part].y;
    const int64_t N = y->shape[1];
    const dim3 grid((unsigned)((N + THREADS - 1) / THREADS), (unsigned)y->shape[0]);
    gn_status status = GN_OK;
    GN_FOR_FLOAT(y->dtype, status = launch(ctx, finish_kernel<T, S>, grid, dim3(THREADS), 0,
                                           (T *)y->data, y->ld, sums, parts->first[parts->n],
                                           parts->first[part], N, args->epilogue));
    return status;
}

/* ---- the call ---- */

/* Every part's product into `sums` (T, columns of all parts), adding to what is there with beta. */
static gn_status multiply_all(gn_ctx *ctx, const struct operands *o, const gn_linear_args *args,
                              void *sums, gn_dtype dtype, const gn_cuda_parts *parts, float beta) {
    gn_status status = GN_OK;
    for (int i = 0; i < args->n_parts && !status; i++) {
        gn_tensor y = gn_tensor_2d((char *)sums + (size_t)parts->first[i] * gn_dtype_size(dtype),
                                   dtype, args->x.shape[0], args->part[i].w->rows);
        y.ld = parts->first[parts->n];
        status = multiply_part(ctx, o, args, i, &y, beta);
    }
    return status;
}

static gn_status make_x(gn_ctx *ctx, const gn_linear_args *args, const struct operands *o) {
    const dim3 grid((unsigned)args->x.shape[0]);
    const float *w = args->norm ? (const float *)args->norm->data : NULL;
    gn_status status = GN_OK;
    GN_FOR_FLOAT(args->x.dtype, status = launch(ctx, operands_kernel<T>, grid, dim3(THREADS), 0,
                                                o->x, o->ld, (const T *)args->x.data, args->x.ld, w,
                                                args->eps, args->x.shape[1]));
    return status;
}

/* LoRA may make operands wider by an eighth. */
static int64_t widest(int64_t K) {
    return K + K / 8;
}

size_t gn_cuda_linear_dense_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                                      int64_t max_rank, int max_terms) {
    return align_up((size_t)(rows * widest(max_k)) * sizeof(bf16)) +
           align_up((size_t)(max_n * widest(max_k)) * sizeof(bf16)) +
           align_up((size_t)(rows * max_n) * sizeof(float)) +
           gn_cuda_lora_bytes(ctx, rows, max_rank, max_terms);
}

/* The product with LoRA's terms added up beside it. */
static gn_status add_to_lora(gn_ctx *ctx, const gn_linear_args *args, const struct operands *o,
                             float *sums, const gn_cuda_parts *parts) {
    gn_status status = gn_cuda_lora(ctx, args, o->x, o->ld, o->lora, sums);
    if (!status) status = multiply_all(ctx, o, args, sums, GN_F32, parts, 1);
    const int n = args->epilogue == GN_SWIGLU ? 1 : args->n_parts;
    for (int i = 0; i < n && !status; i++) status = finish(ctx, args, i, sums, parts);
    return status;
}

gn_status gn_cuda_linear_dense(gn_ctx *ctx, const gn_linear_args *args) {
    const int64_t T = args->x.shape[0], K = args->x.shape[1];
    const gn_cuda_parts parts = parts_of(args);
    const int64_t columns = parts.first[parts.n];
    const int rank = max_rank_of(args);
    if (gn_cuda_linear_dense_workspace(ctx, T, K, columns, rank, gn_cuda_lora_terms_a_row(args)) >
        ctx->workspace_bytes)
        return GN_ENOMEM;
    const int64_t extended = rank > 0 ? gn_cuda_lora_extended(args) : K;
    struct operands o = {};
    o.extended = rank > 0 && T >= MIN_EXTENDED_ROWS && extended <= widest(K);
    o.ld = o.extended ? extended : K;
    char *at = (char *)ctx->workspace;
    o.x = (bf16 *)carve(&at, (size_t)(T * o.ld) * sizeof(bf16));
    o.weight = (bf16 *)carve(&at, (size_t)(columns * o.ld) * sizeof(bf16));
    void *sums = carve(&at, (size_t)(T * columns) * sizeof(float));
    o.lora = at;
    gn_status status = make_x(ctx, args, &o);
    if (!status && rank > 0 && !o.extended)
        return add_to_lora(ctx, args, &o, (float *)sums, &parts);
    if (!status && o.extended) status = gn_cuda_lora_shrink(ctx, args, o.x, o.ld, o.lora);
    if (!status && args->epilogue == GN_SWIGLU) {
        /* Beside the rounding of quantized weights that of gate and up hardly counts; beside stored
         * ones, which are exact, it would be the largest error. */
        const gn_dtype dtype = is_stored(args->part[0].w) ? GN_F32 : GN_BF16;
        status = multiply_all(ctx, &o, args, sums, dtype, &parts, 0);
        if (status) return status;
        return dtype == GN_F32 ? finish(ctx, args, 0, (const float *)sums, &parts)
                               : finish(ctx, args, 0, (const bf16 *)sums, &parts);
    }
    for (int i = 0; i < args->n_parts && !status; i++)
        status = multiply_part(ctx, &o, args, i, &args->part[i].y,
                               args->epilogue == GN_ADD ? 1.0f : 0.0f);
    return status;
}
