/* cross_entropy.cu - logits, their losses and gradients, ROWS labelled rows at a time. Twin:
 * cpu/cross_entropy.c. With p = softmax(W x):
 *
 *   loss = -log p[label]   dlogits = scale (p - onehot(label))
 *   dx = dlogits W         dW += dlogits^T x
 *
 * Rows without a label cost nothing: the labelled ones are gathered, in turns that pass by up to
 * SPAN rows. Labels are on the host; those of a turn travel with the numbers of their rows. The
 * floor is that of the products, 4 V C operations a labelled row; logits are written and read once,
 * and their gradients too. */
#include <float.h>

#include "gemm.h"
#include "linear.cuh"
#include "operands.h"
#include "rows.cuh"

enum { ROWS = 512, SPAN = 4096, THREADS = 512 };

/* The rows of a turn, as they go to the device. */
struct turn {
    int32_t row[ROWS], label[ROWS]; /* of the labelled ones */
    int32_t slot[SPAN];             /* of all that are passed by: which of those it is, or -1 */
};

struct call {
    gn_ctx *ctx;
    const gn_cross_entropy_args *args;
    gn_dtype dtype; /* of what products multiply */
    int64_t C, V;
    struct turn *turn; /* working memory, all of these */
    char *x;           /* (ROWS, C) in dtype */
    float *dx;         /* (ROWS, C) */
    float *logits;     /* (ROWS, V) */
    char *dlogits;     /* the same in dtype; in float32 the same memory */
    char *weight;      /* a piece of lm_head in dtype, where that differs from its own */
};

static size_t lay_out(struct call *op, char *memory) {
    const size_t size = gn_dtype_size(op->dtype), C = (size_t)op->C, V = (size_t)op->V;
    char *at = memory;
    op->turn = (struct turn *)carve(&at, sizeof *op->turn);
    op->x = carve(&at, ROWS * C * size);
    op->dx = (float *)carve(&at, ROWS * C * sizeof(float));
    op->logits = (float *)carve(&at, ROWS * V * sizeof(float));
    op->dlogits = op->dtype == GN_F32 ? (char *)op->logits : carve(&at, ROWS * V * size);
    op->weight = carve(&at, (size_t)gn_cuda_piece_bound(op->V, op->C) * size);
    return (size_t)(at - memory);
}

size_t gn_cuda_cross_entropy_workspace(const gn_ctx *ctx, int64_t max_c, int64_t vocab) {
    struct call op = {};
    op.dtype = ctx->compute;
    op.C = max_c;
    op.V = vocab;
    return lay_out(&op, NULL);
}

/* ---- kernels ---- */

template <int N>
static __global__ void __launch_bounds__(THREADS)
    gather_kernel(struct rows to, struct rows x, int64_t C, const int32_t *row) {
    pdl_trigger();
    pdl_wait();
    const int64_t from = row[blockIdx.x];
    for (int64_t c = threadIdx.x * N; c < C; c += blockDim.x * N) {
        float v[N];
        load<N>(v, x, from, c);
        store<N>(to, blockIdx.x, c, v);
    }
}

/* Of the rows passed by: dx of the labelled ones, and zeros for the others. */
template <int N>
static __global__ void __launch_bounds__(THREADS)
    scatter_kernel(struct rows dx, float *loss, struct rows from, int64_t C, const int32_t *slot) {
    pdl_trigger();
    pdl_wait();
    const int64_t row = blockIdx.x;
    const int32_t at = slot[row];
    if (at < 0 && threadIdx.x == 0) loss[row] = 0.0f;
    for (int64_t c = threadIdx.x * N; c < C && dx.data; c += blockDim.x * N) {
        float v[N] = {};
        if (at >= 0) load<N>(v, from, at, c);
        store<N>(dx, row, c, v);
    }
}

/* The largest value seen, and the sum of exponentials over it. */
struct softmax {
    float most, sum;
};

static __device__ __forceinline__ struct softmax both(struct softmax a, struct softmax b) {
    const float most = fmaxf(a.most, b.most);
    return {most, a.sum * expf(a.most - most) + b.sum * expf(b.most - most)};
}

/* Over the block, in a fixed order; every thread gets it. */
static __device__ struct softmax block_softmax(struct softmax own) {
    __shared__ struct softmax all[THREADS / WARP];
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) {
        const struct softmax other = {__shfl_xor_sync(0xffffffffu, own.most, d),
                                      __shfl_xor_sync(0xffffffffu, own.sum, d)};
        own = both(own, other);
    }
    if (threadIdx.x % WARP == 0) all[threadIdx.x / WARP] = own;
    __syncthreads();
    own = all[0];
    for (int i = 1; i < THREADS / WARP; i++) own = both(own, all[i]);
    return own;
}

/* A block a row: its loss, and unless dlogits.data is NULL the gradients of its logits. */
template <int N>
static __global__ void __launch_bounds__(THREADS)
    loss_kernel(float *loss, struct rows dlogits, struct rows logits, int64_t V, float scale,
                const int32_t *rows, const int32_t *labels) {
    const int64_t row = blockIdx.x;
    struct softmax own = {-FLT_MAX, 0.0f};
    pdl_trigger();
    pdl_wait();
    const int32_t label = labels[row];
    for (int64_t c = threadIdx.x * N; c < V; c += THREADS * N) {
        float v[N];
        load<N>(v, logits, row, c);
        float most = own.most;
#pragma unroll
        for (int i = 0; i < N; i++) most = fmaxf(most, v[i]);
        own.sum *= expf(own.most - most);
        own.most = most;
#pragma unroll
        for (int i = 0; i < N; i++) own.sum += expf(v[i] - most);
    }
    const struct softmax all = block_softmax(own);
    if (threadIdx.x == 0) {
        float at_label;
        load<1>(&at_label, logits, row, label);
        loss[rows[row]] = (float)(log((double)all.sum) - ((double)at_label - all.most));
    }
    if (!dlogits.data) return;
    __syncthreads(); /* dlogits may be logits */
    const float share = scale / all.sum;
    for (int64_t c = threadIdx.x * N; c < V; c += THREADS * N) {
        float v[N];
        load<N>(v, logits, row, c);
#pragma unroll
        for (int i = 0; i < N; i++)
            v[i] = share * expf(v[i] - all.most) - (c + i == label ? scale : 0.0f);
        store<N>(dlogits, row, c, v);
    }
}

/* ---- a turn ---- */

/* From row t on: how many have a label, and where the search ended. */
static int find_rows(const gn_cross_entropy_args *args, int64_t t, struct turn *turn,
                     int64_t *end) {
    const int64_t T = args->x.shape[0], last = T - t < SPAN ? T : t + SPAN;
    const int64_t first = t;
    int n = 0;
    for (; t < last && n < ROWS; t++) {
        const bool labelled = args->labels[t] != GN_IGNORED_LABEL;
        turn->slot[t - first] = labelled ? n : -1;
        if (!labelled) continue;
        turn->row[n] = (int32_t)t;
        turn->label[n++] = args->labels[t];
    }
    *end = t;
    return n;
}

/* A region of lm_head, as products multiply it. */
static gn_status weight_of(const struct call *op, gn_cuda_region r, gn_cuda_factor *w) {
    const gn_matrix *m = op->args->lm_head;
    if (gn_cuda_is_stored(op->ctx, m)) {
        const int64_t at = (r.row0 * m->cols + r.col0) * (int64_t)gn_dtype_size(m->dtype);
        *w = {(const char *)m->data + at, m->cols, false};
        return GN_OK;
    }
    *w = {op->weight, r.cols, false};
    return gn_cuda_dequantize(op->ctx, m, &r, op->weight, r.cols, op->dtype);
}

/* In float32 a row's losses do not depend on the other rows. */
static gn_status find_logits(const struct call *op, int n) {
    if (op->dtype == GN_F32)
        return gn_cuda_exact_product(op->ctx, op->logits, op->V, op->args->lm_head,
                                     (const float *)op->x, op->C, n);
    const gn_cuda_factor x = {op->x, op->C, false};
    const bool stored = gn_cuda_is_stored(op->ctx, op->args->lm_head);
    const int64_t step = stored ? op->V : gn_cuda_piece_rows(op->V, op->C);
    gn_status status = GN_OK;
    for (int64_t v0 = 0; v0 < op->V && !status; v0 += step) {
        const int64_t v = op->V - v0 < step ? op->V - v0 : step;
        gn_cuda_factor w;
        status = weight_of(op, {v0, v, 0, op->C}, &w);
        if (!status)
            status = gn_cuda_gemm(op->ctx, n, v, op->C, 1, x, gn_cuda_turned(w), 0, op->logits + v0,
                                  GN_F32, op->V);
    }
    return status;
}

static gn_status find_dx(const struct call *op, int n) {
    const gn_cuda_factor dlogits = {op->dlogits, op->V, false};
    const bool stored = gn_cuda_is_stored(op->ctx, op->args->lm_head);
    const int64_t step = stored ? op->C : gn_cuda_piece_cols(op->V, op->C);
    gn_status status = GN_OK;
    for (int64_t c0 = 0; c0 < op->C && !status; c0 += step) {
        const int64_t c = op->C - c0 < step ? op->C - c0 : step;
        gn_cuda_factor w;
        status = weight_of(op, {0, op->V, c0, c}, &w);
        if (!status)
            status =
                gn_cuda_gemm(op->ctx, n, c, op->V, 1, dlogits, w, 0, op->dx + c0, GN_F32, op->C);
    }
    return status;
}

static gn_status gather(const struct call *op, int n) {
    const struct rows x = rows_of(&op->args->x), to = {op->x, op->C, op->dtype == GN_BF16};
    const bool vectors = in_vectors(x, op->C) && in_vectors(to, op->C);
    return launch(op->ctx, vectors ? gather_kernel<ROW_VECTOR> : gather_kernel<1>,
                  dim3((unsigned)n), dim3(THREADS), 0, to, x, op->C, op->turn->row);
}

/* Of `rows` rows from t on. */
static gn_status scatter(const struct call *op, int64_t t, int64_t rows) {
    const struct rows from = {op->dx, op->C, false}, dx = rows_of(&op->args->dx, t);
    const bool vectors = in_vectors(from, op->C) && in_vectors(dx, op->C);
    return launch(op->ctx, vectors ? scatter_kernel<ROW_VECTOR> : scatter_kernel<1>,
                  dim3((unsigned)rows), dim3(THREADS), 0, dx, (float *)op->args->loss.data + t,
                  from, op->C, op->turn->slot);
}

static gn_status find_losses(const struct call *op, int n) {
    const gn_cross_entropy_args *args = op->args;
    const struct rows logits = {op->logits, op->V, false};
    const struct rows dlogits = {args->dx.data ? op->dlogits : NULL, op->V, op->dtype == GN_BF16};
    const bool vectors = in_vectors(logits, op->V) && in_vectors(dlogits, op->V);
    return launch(op->ctx, vectors ? loss_kernel<ROW_VECTOR> : loss_kernel<1>, dim3((unsigned)n),
                  dim3(THREADS), 0, (float *)args->loss.data, dlogits, logits, op->V, args->scale,
                  op->turn->row, op->turn->label);
}

static gn_status add_weight_gradient(const struct call *op, int n) {
    const gn_tensor *dw = &op->args->dw;
    const gn_cuda_factor dlogits = {op->dlogits, op->V, false}, x = {op->x, op->C, false};
    return gn_cuda_gemm(op->ctx, op->V, op->C, n, 1, gn_cuda_turned(dlogits), x, 1, dw->data,
                        GN_F32, dw->ld);
}

static gn_status run_turn(const struct call *op, int n) {
    const gn_cross_entropy_args *args = op->args;
    gn_status status = gather(op, n);
    if (!status) status = find_logits(op, n);
    if (!status) status = find_losses(op, n);
    if (!status && args->dx.data) status = find_dx(op, n);
    if (!status && args->dw.data) status = add_weight_gradient(op, n);
    return status;
}

/* ---- the call ---- */

gn_status gn_cuda_cross_entropy(gn_ctx *ctx, const gn_cross_entropy_args *args) {
    struct call op = {};
    op.ctx = ctx;
    op.args = args;
    op.dtype = ctx->compute;
    op.C = args->x.shape[1];
    op.V = args->lm_head->rows;
    if (lay_out(&op, NULL) > ctx->workspace_bytes) return GN_ENOMEM;
    lay_out(&op, (char *)ctx->workspace);
    gn_status status = GN_OK;
    for (int64_t t = 0, end; t < args->x.shape[0] && !status; t = end) {
        struct turn turn = {};
        const int n = find_rows(args, t, &turn, &end);
        status = gn_cuda_upload(ctx, op.turn, &turn, sizeof turn);
        if (!status && n > 0) status = run_turn(&op, n);
        if (!status) status = scatter(&op, t, end - t);
    }
    return status;
}
