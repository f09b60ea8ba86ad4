/* linear_bwd.cu - gradients of gn_linear: products of cuBLAS in the compute dtype, with float32
 * sums. Twin: cpu/linear_bwd.c. With x as products see it, x' = dropout(x), and for each part s the
 * term's scale:
 *
 *   v   = s dy B             u = x' A^T
 *   dB += s dy^T u           dA += v^T x'           dW += dy^T x
 *   dx  = dy W + dropout(v A)                       W dequantized some columns at a time
 *
 * The floor is that of dx = dy W, 2 T N K operations. LoRA's products are bound by memory: each of
 * x' and dy is read twice. Without dropout all parts see one x: their A's stand below one another,
 * their u's and v's side by side, so that u, v A and dA are one product of all parts. Where rows of
 * a dy have columns to spare, v stands in them and A below W, and v A comes with dy W; else v A is
 * what dy W is added to. Masks are computed anew, into the working memory that holds x' and then
 * v A.
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

/* Working memory. x, dropped and dy hold the rows of a span; a, u and v what all parts' pairs need,
 * b what a part's does. `weight` also holds the sum of all parts' dA, before any weight. */
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

/* The ranks of all parts' pairs, side by side. */
static gn_cuda_parts ranks_of(const gn_linear_args *args) {
    gn_cuda_parts ranks = {};
    ranks.n = args->n_parts;
    for (int i = 0; i < ranks.n; i++) ranks.first[i + 1] = ranks.first[i] + part_rank_of(args, i);
    return ranks;
}

static const gn_lora_pair *pair_of(const gn_linear_args *args, int part) {
    const gn_lora_pair *pair = args->n_lora ? &args->lora->pairs[args->pair + part] : NULL;
    return pair && pair->rank > 0 ? pair : NULL;
}

/* ---- working memory ---- */

/* Values of x, dropped and dy together that are reserved: enough for all rows of a product whose x
 * and dy have the compute dtype and whose x has no norm, and for one row of any. */
static int64_t span_values(int64_t T, int64_t K, int64_t N) {
    return T * K + 2 * K + N;
}

static size_t weight_bytes(int64_t K, int64_t N, int64_t ranks, size_t size) {
    const size_t weight = (size_t)gn_cuda_piece_bound(N + ranks, K) * size;
    const size_t sums = (size_t)(ranks * K) * sizeof(float);
    return weight > sums ? weight : sums;
}

/* ranks: of all parts together. */
static size_t backward_bytes(int64_t T, int64_t K, int64_t N, int64_t rank, int64_t ranks,
                             size_t size) {
    return align_up((size_t)span_values(T, K, N) * size) + 3 * align_up(1) +
           align_up(weight_bytes(K, N, ranks, size)) + align_up((size_t)(ranks * K) * size) +
           align_up((size_t)(N * rank) * size) + 2 * align_up((size_t)(T * ranks) * size);
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
        if (args->dropout.p > 0 && pair_of(args, i)) w.dropped = op->K;
        if (grads->dy.dtype != op->dtype) w.dy = parts_of(args).first[args->n_parts];
    }
    return w;
}

static gn_status lay_out(struct call *op) {
    const gn_linear_args *args = op->args;
    const size_t size = gn_dtype_size(op->dtype);
    const int64_t T = op->T, K = op->K, columns = parts_of(args).first[args->n_parts];
    const int64_t rank = max_rank_of(args), ranks = ranks_of(args).first[args->n_parts];
    if (backward_bytes(T, K, columns, rank, ranks, size) > op->ctx->workspace_bytes)
        return GN_ENOMEM;
    struct memory *m = &op->memory;
    char *at = (char *)op->ctx->workspace, *end = at + op->ctx->workspace_bytes - 3 * align_up(1);
    m->weight = carve(&at, weight_bytes(K, columns, ranks, size));
    m->a = carve(&at, (size_t)(ranks * K) * size);
    m->b = carve(&at, (size_t)(columns * rank) * size);
    m->u = carve(&at, (size_t)(T * ranks) * size);
    m->v = carve(&at, (size_t)(T * ranks) * size);
    const struct widths w = widths_of(op);
    const int64_t row = (w.x + w.dropped + w.dy) * (int64_t)size;
    m->rows = row * T <= end - at ? T : (end - at) / row;
    m->x = carve(&at, (size_t)(m->rows * w.x) * size);
    m->dropped = carve(&at, (size_t)(m->rows * w.dropped) * size);
    m->dy = carve(&at, (size_t)(m->rows * w.dy) * size);
    return GN_OK;
}

size_t gn_cuda_linear_bwd_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                                    int64_t max_rank) {
    const bool exact = ctx->compute == GN_F32;
    const size_t bytes[] = {
        backward_bytes(rows, max_k, max_n, max_rank, GN_MAX_PARTS * max_rank,
                       gn_dtype_size(ctx->compute)),
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

/* dy of every part. */
static gn_status dys_of(const struct call *op, struct span s, gn_cuda_factor dy[GN_MAX_PARTS]) {
    const gn_cuda_parts parts = parts_of(op->args);
    gn_status status = GN_OK;
    for (int i = 0; i < parts.n && !status; i++) {
        char *buffer = op->memory.dy + s.rows * parts.first[i] * (int64_t)gn_dtype_size(op->dtype);
        status = rows_in(op, &op->grads->part[i].dy, s, buffer, NULL, &dy[i]);
    }
    return status;
}

/* A factor that is not turned, from an element on. */
static gn_cuda_factor from(const struct call *op, gn_cuda_factor f, int64_t row, int64_t column) {
    f.data = (const char *)f.data + (row * f.ld + column) * (int64_t)gn_dtype_size(op->dtype);
    return f;
}

/* ---- through LoRA ---- */

/* The call's term: the rows that it covers, of those at hand, and factors of these rows. */
struct term {
    struct span s; /* no rows: there is nothing to do */
    gn_cuda_parts ranks;
    gn_cuda_factor x, dy[GN_MAX_PARTS];
    gn_cuda_factor a, u, v; /* (ranks, K), (rows, ranks) */
    int beside;             /* the part beside whose dy v stands; -1: none */
};

/* The rows of s that the term covers. */
static struct span covered(const gn_lora *term, struct span s) {
    const int64_t from = term->row0 > s.row0 ? term->row0 : s.row0;
    const int64_t term_end = (int64_t)term->row0 + term->rows, end = s.row0 + s.rows;
    const int64_t to = term_end < end ? term_end : end;
    return {from, to > from ? to - from : 0};
}

/* The first part whose dy has room for v, if v A may come with dy W; or -1. */
static int part_with_room(const struct call *op, const struct term *t, int64_t rows) {
    if (!op->grads->dx.data || op->args->dropout.p > 0 || t->s.rows < rows) return -1;
    for (int i = 0; i < t->ranks.n; i++) {
        const part_grads *grads = &op->grads->part[i];
        if (grads->dy.dtype == op->dtype && grads->dy_spare >= t->ranks.first[t->ranks.n] &&
            !gn_cuda_is_stored(op->ctx, op->args->part[i].w))
            return i;
    }
    return -1;
}

static struct term term_of(const struct call *op, struct span s, const gn_cuda_factor dy[],
                           gn_cuda_factor x) {
    struct term t = {};
    t.beside = -1;
    t.ranks = ranks_of(op->args);
    const int64_t ranks = t.ranks.first[t.ranks.n];
    bool is_wanted = op->grads->dx.data;
    for (int i = 0; i < t.ranks.n; i++)
        is_wanted |= op->grads->part[i].da.data || op->grads->part[i].db.data;
    if (ranks == 0 || !is_wanted) return t;
    t.s = covered(op->args->lora, s);
    t.x = from(op, x, t.s.row0 - s.row0, 0);
    for (int i = 0; i < t.ranks.n; i++) t.dy[i] = from(op, dy[i], t.s.row0 - s.row0, 0);
    t.a = {op->memory.a, op->K, false};
    t.u = {op->memory.u, ranks, false};
    t.v = {op->memory.v, ranks, false};
    t.beside = part_with_room(op, &t, s.rows);
    if (t.beside >= 0) t.v = from(op, t.dy[t.beside], 0, op->args->part[t.beside].w->rows);
    return t;
}

static float scale_of(const struct call *op, int part) {
    return op->args->lora->scale * pair_of(op->args, part)->scale;
}

static gn_cuda_operands_args mask_of(const struct call *op, const struct term *t, int part) {
    gn_cuda_operands_args mask = {};
    mask.dropout = op->args->dropout;
    mask.module = op->args->pair + part;
    mask.row0 = t->s.row0;
    return mask;
}

/* A of every part, in the compute dtype: of a single part where it stands, if it can. */
static gn_status stack_a(const struct call *op, struct term *t) {
    if (t->ranks.n == 1)
        return rows_in(op, &pair_of(op->args, 0)->a, {0, t->ranks.first[1]}, op->memory.a, NULL,
                       &t->a);
    gn_status status = GN_OK;
    for (int i = 0; i < t->ranks.n && !status; i++) {
        const gn_lora_pair *pair = pair_of(op->args, i);
        if (!pair) continue;
        void *to = (void *)from(op, t->a, t->ranks.first[i], 0).data;
        const gn_tensor rows = gn_tensor_2d(to, op->dtype, pair->rank, op->K);
        status = gn_cuda_operands(op->ctx, &rows, &pair->a, NULL);
    }
    return status;
}

/* v = s dy B of every part. */
static gn_status find_v(const struct call *op, const struct term *t) {
    gn_status status = GN_OK;
    for (int i = 0; i < t->ranks.n && !status; i++) {
        const gn_lora_pair *pair = pair_of(op->args, i);
        const int64_t N = op->args->part[i].w->rows;
        gn_cuda_factor b;
        if (!pair) continue;
        status = rows_in(op, &pair->b, {0, N}, op->memory.b, NULL, &b);
        if (!status)
            status =
                gn_cuda_gemm(op->ctx, t->s.rows, pair->rank, N, scale_of(op, i), t->dy[i], b, 0,
                             (void *)from(op, t->v, 0, t->ranks.first[i]).data, op->dtype, t->v.ld);
    }
    return status;
}

/* Neighbouring parts whose A sees one and the same x: [begin, end). */
struct group {
    int begin, end;
    int64_t rank0, ranks;
    bool has_da, has_db;
};

static struct group group_of(const struct call *op, const struct term *t, int begin) {
    struct group g = {};
    g.begin = begin;
    g.end = op->args->dropout.p > 0 ? begin + 1 : t->ranks.n;
    g.rank0 = t->ranks.first[g.begin];
    g.ranks = t->ranks.first[g.end] - g.rank0;
    for (int i = g.begin; i < g.end && g.ranks > 0; i++) {
        g.has_da |= op->grads->part[i].da.data != NULL;
        g.has_db |= op->grads->part[i].db.data != NULL;
    }
    return g;
}

/* u, and dB += s dy^T u. */
static gn_status add_db(const struct call *op, const struct term *t, struct group g,
                        gn_cuda_factor x) {
    const gn_cuda_factor a = from(op, t->a, g.rank0, 0);
    gn_status status = gn_cuda_gemm(op->ctx, t->s.rows, g.ranks, op->K, 1, x, gn_cuda_turned(a), 0,
                                    (void *)from(op, t->u, 0, g.rank0).data, op->dtype, t->u.ld);
    for (int i = g.begin; i < g.end && !status; i++) {
        const gn_tensor *db = &op->grads->part[i].db;
        if (db->data && pair_of(op->args, i))
            status = gn_cuda_gemm(op->ctx, db->shape[0], db->shape[1], t->s.rows, scale_of(op, i),
                                  gn_cuda_turned(t->dy[i]), from(op, t->u, 0, t->ranks.first[i]), 1,
                                  db->data, GN_F32, db->ld);
    }
    return status;
}

/* dA += v^T x: of a single pair where it is to stand, of several through their sum. */
static gn_status add_da(const struct call *op, const struct term *t, struct group g,
                        gn_cuda_factor x) {
    const gn_cuda_factor v = gn_cuda_turned(from(op, t->v, 0, g.rank0));
    float *sums = (float *)op->memory.weight;
    for (int i = g.begin; i < g.end; i++) {
        const gn_tensor *da = &op->grads->part[i].da;
        if (da->data && da->shape[0] == g.ranks)
            return gn_cuda_gemm(op->ctx, g.ranks, op->K, t->s.rows, 1, v, x, 1, da->data, GN_F32,
                                da->ld);
    }
    gn_status status =
        gn_cuda_gemm(op->ctx, g.ranks, op->K, t->s.rows, 1, v, x, 0, sums, GN_F32, op->K);
    for (int i = g.begin; i < g.end && !status; i++) {
        const gn_tensor *da = &op->grads->part[i].da;
        float *at = sums + (t->ranks.first[i] - g.rank0) * op->K;
        if (!da->data || !pair_of(op->args, i)) continue;
        const gn_tensor sum = gn_tensor_2d(at, GN_F32, da->shape[0], op->K);
        status = gn_cuda_add(op->ctx, da, &sum, NULL);
    }
    return status;
}

static gn_status add_pair_gradients(const struct call *op, const struct term *t) {
    gn_status status = GN_OK;
    for (int i = 0; i < t->ranks.n && !status;) {
        const struct group g = group_of(op, t, i);
        gn_cuda_factor x = t->x;
        i = g.end;
        if (op->args->dropout.p > 0 && (g.has_da || g.has_db)) {
            const gn_tensor rows = {(void *)x.data, op->dtype, 2, {t->s.rows, op->K, 1, 1}, x.ld};
            const gn_tensor to = gn_tensor_2d(op->memory.dropped, op->dtype, t->s.rows, op->K);
            const gn_cuda_operands_args mask = mask_of(op, t, g.begin);
            status = gn_cuda_operands(op->ctx, &to, &rows, &mask);
            x = {to.data, to.ld, false};
        }
        if (!status && g.has_db) status = add_db(op, t, g, x);
        if (!status && g.has_da) status = add_da(op, t, g, x);
    }
    return status;
}

/* dx = v A + beta dx of the rows that the term covers, without dropout. */
static gn_status find_dx(const struct call *op, const struct term *t, float beta) {
    const gn_tensor *dx = &op->grads->dx;
    return gn_cuda_gemm(op->ctx, t->s.rows, op->K, t->ranks.first[t->ranks.n], 1, t->v, t->a, beta,
                        at_row(dx, t->s.row0), dx->dtype, dx->ld);
}

/* dx += dropout(v A) of each part. */
static gn_status add_dropped_dx(const struct call *op, const struct term *t) {
    const int64_t n = t->s.rows, K = op->K;
    gn_tensor dx = op->grads->dx;
    dx.data = at_row(&dx, t->s.row0);
    dx.shape[0] = n;
    gn_status status = GN_OK;
    for (int i = 0; i < t->ranks.n && !status; i++) {
        const gn_lora_pair *pair = pair_of(op->args, i);
        const gn_tensor through = gn_tensor_2d(op->memory.dropped, op->dtype, n, K);
        const gn_cuda_operands_args mask = mask_of(op, t, i);
        if (!pair) continue;
        status = gn_cuda_gemm(op->ctx, n, K, pair->rank, 1, from(op, t->v, 0, t->ranks.first[i]),
                              from(op, t->a, t->ranks.first[i], 0), 0, through.data, through.dtype,
                              through.ld);
        if (!status) status = gn_cuda_add(op->ctx, &dx, &through, &mask);
    }
    return status;
}

/* ---- through the weight ---- */

static gn_status add_weight_gradient(const struct call *op, int part, struct span s,
                                     gn_cuda_factor dy, gn_cuda_factor x) {
    const gn_tensor *dw = &op->grads->part[part].dw;
    return gn_cuda_gemm(op->ctx, dw->shape[0], op->K, s.rows, 1, gn_cuda_turned(dy), x, 1, dw->data,
                        GN_F32, dw->ld);
}

/* Columns [k0, k0 + k) of W, and of A below it where v stands beside dy. */
static gn_status fill_weight(const struct call *op, int part, const struct term *t, int64_t k0,
                             int64_t k) {
    const gn_matrix *m = op->args->part[part].w;
    const gn_cuda_region columns = {0, m->rows, k0, k};
    const gn_status status =
        gn_cuda_dequantize(op->ctx, m, &columns, op->memory.weight, k, op->dtype);
    if (status || part != t->beside) return status;
    const gn_cuda_factor weight = {op->memory.weight, k, false};
    const int64_t ranks = t->ranks.first[t->ranks.n];
    const gn_tensor a = {
        (void *)from(op, t->a, 0, k0).data, op->dtype, 2, {ranks, k, 1, 1}, t->a.ld};
    const gn_tensor to =
        gn_tensor_2d((void *)from(op, weight, m->rows, 0).data, op->dtype, ranks, k);
    return gn_cuda_operands(op->ctx, &to, &a, NULL);
}

/* dx = dy W + beta dx. */
static gn_status through_weight(const struct call *op, int part, struct span s,
                                const struct term *t, gn_cuda_factor dy, float beta) {
    const gn_matrix *m = op->args->part[part].w;
    const gn_tensor *dx = &op->grads->dx;
    const bool stored = gn_cuda_is_stored(op->ctx, m);
    const int64_t rows = m->rows + (part == t->beside ? t->ranks.first[t->ranks.n] : 0);
    const int64_t step = stored ? m->cols : gn_cuda_piece_cols(rows, m->cols);
    char *to = (char *)at_row(dx, s.row0);
    gn_status status = GN_OK;
    for (int64_t k0 = 0; k0 < m->cols && !status; k0 += step) {
        const int64_t k = m->cols - k0 < step ? m->cols - k0 : step;
        const gn_cuda_factor w = {stored ? m->data : op->memory.weight, k, false};
        if (!stored) status = fill_weight(op, part, t, k0, k);
        if (!status)
            status = gn_cuda_gemm(op->ctx, s.rows, k, rows, 1, dy, w, beta,
                                  to + k0 * (int64_t)gn_dtype_size(dx->dtype), dx->dtype, dx->ld);
    }
    return status;
}

/* ---- the call ---- */

/* v A comes with dy W, or is written before it where the term covers all rows, or added. */
static gn_status run_dx(const struct call *op, struct span s, const struct term *t,
                        const gn_cuda_factor dy[]) {
    const bool drops = op->args->dropout.p > 0, has_lora = t->s.rows > 0;
    const bool comes = t->beside >= 0;
    const bool begins = has_lora && !drops && !comes && t->s.rows == s.rows;
    gn_status status = begins ? find_dx(op, t, 0) : GN_OK;
    for (int i = 0; i < op->args->n_parts && !status; i++)
        status = through_weight(op, i, s, t, dy[i], begins || i > 0 ? 1.0f : 0.0f);
    if (status || !has_lora || comes || begins) return status;
    return drops ? add_dropped_dx(op, t) : find_dx(op, t, 1);
}

/* Of a single part, x is not read any more when dx is written: they may be the same. */
static gn_status run_span(const struct call *op, struct span s) {
    gn_cuda_factor x = {}, dy[GN_MAX_PARTS];
    gn_status status = wants_x(op) ? x_of(op, s, &x) : GN_OK;
    if (!status) status = dys_of(op, s, dy);
    if (status) return status;
    struct term t = term_of(op, s, dy, x);
    if (t.s.rows > 0) {
        status = stack_a(op, &t);
        if (!status) status = find_v(op, &t);
        if (!status) status = add_pair_gradients(op, &t);
    }
    for (int i = 0; i < op->args->n_parts && !status; i++)
        if (op->grads->part[i].dw.data) status = add_weight_gradient(op, i, s, dy[i], x);
    return status || !op->grads->dx.data ? status : run_dx(op, s, &t, dy);
}

gn_status gn_cuda_linear_bwd(gn_ctx *ctx, const gn_linear_args *args,
                             const gn_linear_grads *grads) {
    struct call op = {ctx, args, grads, ctx->compute, args->x.shape[0], args->x.shape[1], {}};
    gn_status status = lay_out(&op);
    for (int64_t t = 0; t < op.T && !status; t += op.memory.rows)
        status = run_span(&op, {t, op.T - t < op.memory.rows ? op.T - t : op.memory.rows});
    return status;
}
