/* linear_bwd.cu - gradients of gn_linear: products of cuBLAS in the compute dtype, with float32
 * sums. Twin: cpu/linear_bwd.c. With x as products see it, x' = dropout(x), and for each part s the
 * term's scale:
 *
 *   dx  = dy W               W dequantized some columns at a time
 *   v   = s dy B             u = x' A^T
 *   dB += s dy^T u           dA += v^T x'           dx += dropout(v A)
 *   dW += dy^T x
 *
 * The floor is that of dx = dy W, 2 T N K operations. LoRA's products are bound by memory: each of
 * x' and dy is read twice, and dx read and written once more. Masks are computed anew, into the
 * working memory that holds x' and then v A.
 *
 * x, x' and dy in the compute dtype take working memory; rows are taken as many at a time as fit
 * into what is reserved, which for every product of a model is all of them. */
#include "gemm.h"
#include "linear.cuh"
#include "operands.h"

typedef gn_linear_grads::gn_linear_part_grads part_grads;

/* Some rows of the batch. */
struct span {
    int64_t row0, rows;
};

/* Working memory. x, dropped and dy hold the rows of a span; the others what a part needs. */
struct memory {
    int64_t rows; /* at a time */
    char *x, *dropped, *dy, *weight, *a, *b, *u, *v;
};

struct call {
    gn_ctx *ctx;
    const gn_linear_args *args;
    const gn_linear_grads *grads;
    gn_dtype dtype; /* of what products multiply */
    int64_t T, K;
    struct memory memory;
};

static const gn_lora_pair *pair_of(const gn_linear_args *args, int part) {
    const gn_lora_pair *pair = args->n_lora ? &args->lora->pairs[args->pair + part] : NULL;
    return pair && pair->rank > 0 ? pair : NULL;
}

/* ---- working memory ---- */

/* Values of x, dropped and dy together: enough for all rows of products of a single part, and of
 * any whose dy has the compute dtype. */
static int64_t span_values(int64_t T, int64_t K, int64_t N) {
    return T * (K + (K < N ? K : N)) + 2 * K + N;
}

static size_t backward_bytes(int64_t T, int64_t K, int64_t N, int64_t rank, size_t size) {
    return align_up((size_t)span_values(T, K, N) * size) + 3 * align_up(1) +
           align_up((size_t)gn_cuda_piece_bound(N, K) * size) +
           align_up((size_t)(rank * K) * size) + align_up((size_t)(N * rank) * size) +
           2 * align_up((size_t)(T * rank) * size);
}

/* What x, dropped and dy take of each row, 0 where they are not needed. */
struct widths {
    int64_t x, dropped, dy;
};

static bool wants_x(const struct call *op) {
    for (int i = 0; i < op->args->n_parts; i++) {
        const part_grads *grads = &op->grads->part[i];
        if (grads->da.data || grads->db.data || grads->dw.data) return true;
    }
    return false;
}

static struct widths widths_of(const struct call *op) {
    const gn_linear_args *args = op->args;
    struct widths w = {};
    if (args->norm && wants_x(op)) w.x = op->K;
    for (int i = 0; i < args->n_parts; i++) {
        const part_grads *grads = &op->grads->part[i];
        const int64_t N = args->part[i].w->rows;
        if (args->dropout.p > 0 && pair_of(args, i)) w.dropped = op->K;
        if (grads->dy.dtype != op->dtype && N > w.dy) w.dy = N;
    }
    return w;
}

static gn_status lay_out(struct call *op) {
    const gn_linear_args *args = op->args;
    const size_t size = gn_dtype_size(op->dtype);
    const int64_t T = op->T, K = op->K, columns = parts_of(args).first[args->n_parts];
    const int64_t rank = max_rank_of(args);
    if (backward_bytes(T, K, columns, rank, size) > op->ctx->workspace_bytes) return GN_ENOMEM;
    const struct widths w = widths_of(op);
    const int64_t width = w.x + w.dropped + w.dy, values = span_values(T, K, columns);
    struct memory *m = &op->memory;
    m->rows = width * T <= values ? T : values / width;
    char *at = (char *)op->ctx->workspace;
    m->weight = carve(&at, (size_t)gn_cuda_piece_bound(columns, K) * size);
    m->a = carve(&at, (size_t)(rank * K) * size);
    m->b = carve(&at, (size_t)(columns * rank) * size);
    m->u = carve(&at, (size_t)(T * rank) * size);
    m->v = carve(&at, (size_t)(T * rank) * size);
    m->x = carve(&at, (size_t)(m->rows * w.x) * size);
    m->dropped = carve(&at, (size_t)(m->rows * w.dropped) * size);
    m->dy = carve(&at, (size_t)(m->rows * w.dy) * size);
    return GN_OK;
}

size_t gn_cuda_linear_bwd_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                                    int64_t max_rank) {
    const bool exact = ctx->compute == GN_F32;
    const size_t bytes[] = {
        backward_bytes(rows, max_k, max_n, max_rank, gn_dtype_size(ctx->compute)),
        exact ? gn_cuda_linear_exact_workspace(rows, max_k, max_n, max_rank, 1)
              : gn_cuda_linear_dense_train_workspace(ctx, rows, max_k, max_n, max_rank),
        exact ? 0 : gn_cuda_linear_mma_workspace(ctx, rows, max_k, max_n, max_rank, 1),
        exact ? 0 : gn_cuda_linear_decode_workspace(max_rank, 1), gn_cuda_rmsnorm_bwd_bytes(rows)};
    size_t most = 0;
    for (size_t i = 0; i < sizeof bytes / sizeof *bytes; i++)
        if (bytes[i] > most) most = bytes[i];
    return most;
}

/* ---- factors ---- */

static void *at_row(const gn_tensor *t, int64_t row) {
    return (char *)t->data + row * t->ld * (int64_t)gn_dtype_size(t->dtype);
}

/* Those rows of t in the compute dtype: where they stand, or in `buffer`, dense. */
static gn_status rows_in(const struct call *op, const gn_tensor *t, struct span s, void *buffer,
                         const gn_cuda_operands_args *how, gn_cuda_factor *out) {
    gn_tensor from = *t;
    from.data = at_row(t, s.row0);
    from.shape[0] = s.rows;
    *out = {from.data, from.ld, false};
    if (t->dtype == op->dtype && !how) return GN_OK;
    const gn_tensor to = gn_tensor_2d(buffer, op->dtype, s.rows, t->shape[1]);
    *out = {to.data, to.ld, false};
    return gn_cuda_operands(op->ctx, &to, &from, how);
}

/* x as products see it. */
static gn_status x_of(const struct call *op, struct span s, gn_cuda_factor *x) {
    gn_cuda_operands_args how = {};
    how.norm = op->args->norm;
    how.eps = op->args->eps;
    return rows_in(op, &op->args->x, s, op->memory.x, how.norm ? &how : NULL, x);
}

static gn_cuda_factor from_row(const struct call *op, gn_cuda_factor f, int64_t row) {
    f.data = (const char *)f.data + row * f.ld * (int64_t)gn_dtype_size(op->dtype);
    return f;
}

/* ---- through the weight ---- */

/* dx = dy W, or with the later parts dx += dy W. */
static gn_status through_weight(const struct call *op, int part, struct span s, gn_cuda_factor dy) {
    const gn_matrix *m = op->args->part[part].w;
    const gn_tensor *dx = &op->grads->dx;
    char *to = (char *)at_row(dx, s.row0);
    const bool stored = gn_cuda_is_stored(op->ctx, m);
    const int64_t step = stored ? m->cols : gn_cuda_piece_cols(m->rows, m->cols);
    gn_status status = GN_OK;
    for (int64_t k0 = 0; k0 < m->cols && !status; k0 += step) {
        const int64_t k = m->cols - k0 < step ? m->cols - k0 : step;
        const gn_cuda_region columns = {0, m->rows, k0, k};
        const gn_cuda_factor w = {stored ? m->data : op->memory.weight, k, false};
        if (!stored)
            status = gn_cuda_dequantize(op->ctx, m, &columns, op->memory.weight, k, op->dtype);
        if (!status)
            status = gn_cuda_gemm(op->ctx, s.rows, k, m->rows, 1, dy, w, part > 0 ? 1.0f : 0.0f,
                                  to + k0 * (int64_t)gn_dtype_size(dx->dtype), dx->dtype, dx->ld);
    }
    return status;
}

static gn_status add_weight_gradient(const struct call *op, int part, struct span s,
                                     gn_cuda_factor dy, gn_cuda_factor x) {
    const gn_tensor *dw = &op->grads->part[part].dw;
    return gn_cuda_gemm(op->ctx, dw->shape[0], op->K, s.rows, 1, gn_cuda_turned(dy), x, 1, dw->data,
                        GN_F32, dw->ld);
}

/* ---- through LoRA ---- */

/* A part's term: the rows that it covers, of those at hand; factors of these rows. */
struct term {
    const gn_lora_pair *pair;
    struct span s; /* no rows: there is nothing to do */
    gn_cuda_factor dy, x, a, v;
    gn_cuda_operands_args mask;
};

/* The rows of s that the term covers. */
static struct span covered(const gn_lora *term, struct span s) {
    const int64_t from = term->row0 > s.row0 ? term->row0 : s.row0;
    const int64_t term_end = (int64_t)term->row0 + term->rows, end = s.row0 + s.rows;
    const int64_t to = term_end < end ? term_end : end;
    return {from, to > from ? to - from : 0};
}

static struct term term_of(const struct call *op, int part, struct span s, gn_cuda_factor dy,
                           gn_cuda_factor x) {
    const part_grads *grads = &op->grads->part[part];
    struct term t = {};
    t.pair = pair_of(op->args, part);
    if (!t.pair || !(op->grads->dx.data || grads->da.data || grads->db.data)) return t;
    t.s = covered(op->args->lora, s);
    t.dy = from_row(op, dy, t.s.row0 - s.row0);
    t.x = from_row(op, x, t.s.row0 - s.row0);
    t.v = {op->memory.v, t.pair->rank, false};
    t.mask.dropout = op->args->dropout;
    t.mask.module = op->args->pair + part;
    t.mask.row0 = t.s.row0;
    return t;
}

/* A, and v = s dy B. */
static gn_status find_v(const struct call *op, int part, struct term *t) {
    const int64_t N = op->args->part[part].w->rows, r = t->pair->rank;
    gn_cuda_factor b;
    gn_status status = rows_in(op, &t->pair->a, {0, r}, op->memory.a, NULL, &t->a);
    if (!status) status = rows_in(op, &t->pair->b, {0, N}, op->memory.b, NULL, &b);
    if (status) return status;
    return gn_cuda_gemm(op->ctx, t->s.rows, r, N, op->args->lora->scale * t->pair->scale, t->dy, b,
                        0, op->memory.v, op->dtype, r);
}

/* dA and dB. */
static gn_status add_pair_gradients(const struct call *op, int part, const struct term *t) {
    gn_ctx *ctx = op->ctx;
    const part_grads *grads = &op->grads->part[part];
    const int64_t N = op->args->part[part].w->rows, K = op->K, n = t->s.rows, r = t->pair->rank;
    const float scale = op->args->lora->scale * t->pair->scale;
    const gn_cuda_factor u = {op->memory.u, r, false};
    gn_cuda_factor x = t->x;
    gn_status status = GN_OK;
    if (t->mask.dropout.p > 0) {
        const gn_tensor from = {(void *)x.data, op->dtype, 2, {n, K, 1, 1}, x.ld};
        const gn_tensor to = gn_tensor_2d(op->memory.dropped, op->dtype, n, K);
        status = gn_cuda_operands(ctx, &to, &from, &t->mask);
        x = {to.data, to.ld, false};
    }
    if (!status && grads->db.data) {
        status =
            gn_cuda_gemm(ctx, n, r, K, 1, x, gn_cuda_turned(t->a), 0, op->memory.u, op->dtype, r);
        if (!status)
            status = gn_cuda_gemm(ctx, N, r, n, scale, gn_cuda_turned(t->dy), u, 1, grads->db.data,
                                  GN_F32, grads->db.ld);
    }
    if (!status && grads->da.data)
        status = gn_cuda_gemm(ctx, r, K, n, 1, gn_cuda_turned(t->v), x, 1, grads->da.data, GN_F32,
                              grads->da.ld);
    return status;
}

/* dx += dropout(v A). */
static gn_status add_dx(const struct call *op, const struct term *t) {
    const int64_t n = t->s.rows, K = op->K, r = t->pair->rank;
    gn_tensor dx = op->grads->dx;
    dx.data = at_row(&dx, t->s.row0);
    dx.shape[0] = n;
    if (!(t->mask.dropout.p > 0))
        return gn_cuda_gemm(op->ctx, n, K, r, 1, t->v, t->a, 1, dx.data, dx.dtype, dx.ld);
    const gn_tensor through = gn_tensor_2d(op->memory.dropped, op->dtype, n, K);
    const gn_status status =
        gn_cuda_gemm(op->ctx, n, K, r, 1, t->v, t->a, 0, through.data, through.dtype, through.ld);
    return status ? status : gn_cuda_add_dropped(op->ctx, &dx, &through, &t->mask);
}

/* ---- the call ---- */

/* Of a single part, x is not read any more when dx is written: they may be the same. */
static gn_status run_part(const struct call *op, int part, struct span s, gn_cuda_factor x) {
    const part_grads *grads = &op->grads->part[part];
    gn_cuda_factor dy;
    gn_status status = rows_in(op, &grads->dy, s, op->memory.dy, NULL, &dy);
    if (status) return status;
    struct term t = term_of(op, part, s, dy, x);
    if (t.s.rows > 0) status = find_v(op, part, &t);
    if (!status && t.s.rows > 0 && (grads->da.data || grads->db.data))
        status = add_pair_gradients(op, part, &t);
    if (!status && grads->dw.data) status = add_weight_gradient(op, part, s, dy, x);
    if (status || !op->grads->dx.data) return status;
    status = through_weight(op, part, s, dy);
    return status || t.s.rows == 0 ? status : add_dx(op, &t);
}

gn_status gn_cuda_linear_bwd(gn_ctx *ctx, const gn_linear_args *args,
                             const gn_linear_grads *grads) {
    struct call op = {ctx, args, grads, ctx->compute, args->x.shape[0], args->x.shape[1], {}};
    gn_status status = lay_out(&op);
    for (int64_t t = 0; t < op.T && !status; t += op.memory.rows) {
        const struct span s = {t, op.T - t < op.memory.rows ? op.T - t : op.memory.rows};
        gn_cuda_factor x = {};
        if (wants_x(&op)) status = x_of(&op, s, &x);
        for (int i = 0; i < args->n_parts && !status; i++) status = run_part(&op, i, s, x);
    }
    return status;
}
