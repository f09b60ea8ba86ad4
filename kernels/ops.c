/* ops.c - checks a call, then hands it to the context's backend.
 *
 * Every pointer, shape, id and position is looked at here, once, so that backends need not
 * and refuse exactly the same calls. */
#include "backend.h"

#include <limits.h>

static bool is_aligned(const void *p, size_t to) {
    return (uintptr_t)p % to == 0;
}

/* Elements of one step along the first dimension, or -1 if a size is below 1 or overflows. */
static int64_t inner_numel(const gn_tensor *t) {
    int64_t n = 1;
    for (int i = 1; i < t->ndim; i++)
        if (t->shape[i] < 1 || __builtin_mul_overflow(n, t->shape[i], &n)) return -1;
    return n;
}

/* Memory, `ndim` dimensions, rows that do not overlap, and a size in bytes that a pointer
 * difference can hold. Zero rows are fine, and then need no memory. */
static bool is_array(const gn_tensor *t, int ndim) {
    if (!t || t->ndim != ndim || t->shape[0] < 0) return false;
    const int64_t inner = inner_numel(t);
    int64_t bytes;
    if (inner < 0 || t->ld < inner || __builtin_mul_overflow(t->shape[0], t->ld, &bytes) ||
        bytes > PTRDIFF_MAX / 8)
        return false;
    return t->shape[0] == 0 || t->data;
}

/* Of a float dtype that ops compute with. */
static bool is_tensor(const gn_tensor *t, int ndim) {
    return is_array(t, ndim) && gn_dtype_is_float(t->dtype);
}

static bool is_f32(const gn_tensor *t, int ndim) {
    return is_tensor(t, ndim) && t->dtype == GN_F32 && is_aligned(t->data, sizeof(float));
}

/* An activation that is not the residual stream. */
static bool is_activation(const gn_ctx *ctx, const gn_tensor *t, int ndim) {
    const gn_dtype dtype = gn_ctx_activation(ctx);
    return is_tensor(t, ndim) && t->dtype == dtype && is_aligned(t->data, gn_dtype_size(dtype));
}

static bool is_vector(const gn_tensor *t, int64_t n) {
    return is_f32(t, 1) && t->ld == 1 && t->shape[0] == n;
}

static bool is_rows(const gn_tensor *t, int64_t rows, int64_t cols) {
    return is_f32(t, 2) && t->shape[0] == rows && t->shape[1] == cols;
}

static bool is_matrix(const gn_matrix *m) {
    int64_t numel;
    if (!m || !m->data || m->qtype < 0 || m->qtype >= GN_QTYPE_COUNT) return false;
    if (m->rows < 1 || m->cols < 1 || __builtin_mul_overflow(m->rows, m->cols, &numel) ||
        numel > PTRDIFF_MAX / 8 || !gn_dtype_is_float(m->dtype))
        return false;
    if (m->qtype == GN_Q_NONE) return true;
    if (m->qtype == GN_Q_INT8) return m->absmax && is_aligned(m->absmax, sizeof(float));
    if (!m->code || !is_aligned(m->code, sizeof(float))) return false;
    if (!m->absmax_u8) return m->absmax && is_aligned(m->absmax, sizeof(float));
    return m->nested_code && m->nested_absmax && is_aligned(m->nested_code, sizeof(float)) &&
           is_aligned(m->nested_absmax, sizeof(float));
}

gn_status gn_embed(gn_ctx *ctx, gn_tensor *y, const gn_matrix *table, const int32_t *ids,
                   const int32_t *drawn, int32_t n_drawn) {
    if (!ctx || !is_f32(y, 2) || !is_matrix(table) || table->qtype != GN_Q_NONE ||
        y->shape[1] != table->cols)
        return GN_EINVAL;
    if (y->shape[0] == 0) return GN_OK;
    if (!ids || n_drawn < 0 || (n_drawn > 0 && !drawn)) return GN_EINVAL;
    for (int64_t t = 0; t < y->shape[0]; t++)
        if (ids[t] < -n_drawn || ids[t] >= table->rows) return GN_EINVAL;
    return ctx->backend->embed(ctx, y, table, ids, drawn);
}

gn_status gn_rmsnorm(gn_ctx *ctx, gn_tensor *y, const gn_tensor *x, const gn_tensor *w, float eps) {
    if (!ctx || !is_f32(x, 2) || !is_rows(y, x->shape[0], x->shape[1]) ||
        !is_vector(w, x->shape[1]))
        return GN_EINVAL;
    return x->shape[0] == 0 ? GN_OK : ctx->backend->rmsnorm(ctx, y, x, w, eps);
}

static bool is_pair(const gn_lora_pair *pair, int64_t K, int64_t N) {
    if (pair->rank == 0) return true;
    const gn_tensor *a = &pair->a, *b = &pair->b;
    if (!is_tensor(a, 2) || !is_tensor(b, 2) || a->dtype != b->dtype || a->dtype == GN_F16)
        return false;
    return pair->rank > 0 && a->shape[0] == pair->rank && a->shape[1] == K && b->shape[0] == N &&
           b->shape[1] == pair->rank;
}

static bool is_term(const gn_lora *term, int64_t T) {
    return term->row0 >= 0 && term->rows >= 0 && (int64_t)term->row0 + term->rows <= T &&
           term->pairs;
}

/* What a part writes: nothing for SwiGLU's up; the residual stream; an activation, or logits. */
static bool is_output(const gn_ctx *ctx, const gn_linear_args *args, int i) {
    const gn_tensor *y = &args->part[i].y;
    if (args->epilogue == GN_SWIGLU && i == 1) return true;
    const bool fits = args->epilogue == GN_SWIGLU ? is_activation(ctx, y, 2)
                                                  : is_f32(y, 2) || (args->epilogue == GN_STORE &&
                                                                     is_activation(ctx, y, 2));
    return fits && y->shape[0] == args->x.shape[0] && y->shape[1] == args->part[i].w->rows;
}

static bool is_part(const gn_ctx *ctx, const gn_linear_args *args, int i) {
    const struct gn_linear_part *part = &args->part[i];
    const int64_t K = args->x.shape[1];
    if (!is_matrix(part->w) || part->w->cols != K || !is_output(ctx, args, i)) return false;
    for (int j = 0; j < args->n_lora; j++)
        if (!is_pair(&args->lora[j].pairs[args->pair + i], K, part->w->rows)) return false;
    return true;
}

static gn_status check_linear(const gn_ctx *ctx, const gn_linear_args *args) {
    if (!ctx || !args) return GN_EINVAL;
    if (!is_activation(ctx, &args->x, 2) && !(args->norm && is_f32(&args->x, 2))) return GN_EINVAL;
    const int64_t T = args->x.shape[0], K = args->x.shape[1];
    const bool swiglu = args->epilogue == GN_SWIGLU;
    if (args->epilogue != GN_STORE && args->epilogue != GN_ADD && !swiglu) return GN_EINVAL;
    if (args->n_parts < 1 || args->n_parts > GN_MAX_PARTS || (swiglu && args->n_parts != 2))
        return GN_EINVAL;
    if (args->norm && !is_vector(args->norm, K)) return GN_EINVAL;
    if (args->x_spare < 0 || args->x_spare > args->x.ld - K) return GN_EINVAL;
    if (args->n_lora < 0 || args->pair < 0 || (args->n_lora > 0 && !args->lora)) return GN_EINVAL;
    if (!(args->dropout.p >= 0 && args->dropout.p < 1)) return GN_EINVAL;
    for (int i = 0; i < args->n_lora; i++)
        if (!is_term(&args->lora[i], T)) return GN_EINVAL;
    for (int i = 0; i < args->n_parts; i++)
        if (!is_part(ctx, args, i)) return GN_EINVAL;
    return swiglu && args->part[0].w->rows != args->part[1].w->rows ? GN_EINVAL : GN_OK;
}

gn_status gn_linear(gn_ctx *ctx, const gn_linear_args *args) {
    const gn_status status = check_linear(ctx, args);
    return status || args->x.shape[0] == 0 ? status : ctx->backend->linear(ctx, args);
}

size_t gn_linear_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                           int64_t max_rank, int max_terms) {
    return ctx->backend->linear_workspace(ctx, rows, max_k, max_n, max_rank, max_terms);
}

/* Rows 0 ... T in order, and positions that fit in an int32. */
static bool is_seqs(const gn_seqs *seqs, int64_t T) {
    if (!seqs || seqs->n < 0 || T > INT32_MAX) return false;
    if (seqs->n == 0) return T == 0;
    if (!seqs->row0 || !seqs->pos0 || seqs->row0[0] != 0 || seqs->row0[seqs->n] != T) return false;
    for (int32_t i = 0; i < seqs->n; i++) {
        if (seqs->row0[i + 1] < seqs->row0[i] || seqs->pos0[i] < 0) return false;
        if ((int64_t)seqs->pos0[i] + (seqs->row0[i + 1] - seqs->row0[i]) > INT32_MAX) return false;
    }
    return true;
}

static bool is_scales(const gn_tensor *t, const gn_tensor *cache) {
    if (!is_f32(t, 3) || t->ld != t->shape[1] * t->shape[2]) return false;
    for (int i = 0; i < 3; i++)
        if (t->shape[i] != cache->shape[i]) return false;
    return true;
}

static bool is_kv(const gn_kv *kv, int64_t kv_heads, int64_t head_dim) {
    if (!kv || !is_array(&kv->k, 4) || !is_array(&kv->v, 4)) return false;
    const gn_dtype dtype = kv->k.dtype;
    if (kv->v.dtype != dtype || (dtype != GN_F32 && dtype != GN_BF16 && dtype != GN_F8))
        return false;
    for (int i = 0; i < 4; i++)
        if (kv->k.shape[i] != kv->v.shape[i]) return false;
    if (dtype == GN_F8 && (!is_scales(&kv->k_scales, &kv->k) || !is_scales(&kv->v_scales, &kv->v)))
        return false;
    return kv->k.shape[1] == kv_heads && kv->k.shape[3] == head_dim && head_dim % 2 == 0 &&
           head_dim <= GN_MAX_HEAD_DIM;
}

/* Every position up to each sequence's last has a block, and the block exists. */
static bool has_blocks(const gn_seqs *seqs, const gn_kv *kv) {
    const int64_t tokens = kv->k.shape[2];
    for (int32_t i = 0; i < seqs->n; i++) {
        const int64_t rows = seqs->row0[i + 1] - seqs->row0[i];
        if (rows == 0) continue;
        const int64_t needed = (seqs->pos0[i] + rows - 1) / tokens + 1;
        if (needed > seqs->max_blocks || !seqs->blocks) return false;
        const int32_t *blocks = seqs->blocks + (int64_t)i * seqs->max_blocks;
        for (int64_t j = 0; j < needed; j++)
            if (blocks[j] < 0 || blocks[j] >= kv->k.shape[0]) return false;
    }
    return true;
}

gn_status gn_rope_table(gn_ctx *ctx, gn_tensor *cos, gn_tensor *sin, const gn_tensor *inv_freq,
                        const gn_seqs *seqs) {
    if (!ctx || !is_f32(cos, 2) || !is_rows(sin, cos->shape[0], cos->shape[1]) ||
        !is_vector(inv_freq, cos->shape[1]) || !is_seqs(seqs, cos->shape[0]))
        return GN_EINVAL;
    return cos->shape[0] == 0 ? GN_OK : ctx->backend->rope_table(ctx, cos, sin, inv_freq, seqs);
}

gn_status gn_rope_store(gn_ctx *ctx, gn_tensor *q, const gn_tensor *k, const gn_tensor *v,
                        const gn_tensor *cos, const gn_tensor *sin, const gn_seqs *seqs,
                        gn_kv *kv) {
    if (!ctx || !is_activation(ctx, q, 3) || !is_activation(ctx, k, 3) || !is_activation(ctx, v, 3))
        return GN_EINVAL;
    const int64_t T = q->shape[0], kv_heads = k->shape[1], D = q->shape[2];
    if (k->shape[0] != T || k->shape[2] != D || v->shape[0] != T || v->shape[1] != kv_heads ||
        v->shape[2] != D)
        return GN_EINVAL;
    if (!is_kv(kv, kv_heads, D) || !is_rows(cos, T, D / 2) || !is_rows(sin, T, D / 2) ||
        !is_seqs(seqs, T) || !has_blocks(seqs, kv))
        return GN_EINVAL;
    return T == 0 ? GN_OK : ctx->backend->rope_store(ctx, q, k, v, cos, sin, seqs, kv);
}

gn_status gn_attention(gn_ctx *ctx, gn_tensor *y, const gn_tensor *q, const gn_kv *kv,
                       const gn_seqs *seqs) {
    if (!ctx || !kv || !is_activation(ctx, q, 3) || !is_activation(ctx, y, 3)) return GN_EINVAL;
    const int64_t T = q->shape[0], heads = q->shape[1], D = q->shape[2];
    const int64_t kv_heads = kv->k.shape[1];
    if (y->shape[0] != T || y->shape[1] != heads || y->shape[2] != D) return GN_EINVAL;
    if (!is_kv(kv, kv_heads, D) || heads % kv_heads != 0 || !is_seqs(seqs, T) ||
        !has_blocks(seqs, kv))
        return GN_EINVAL;
    return T == 0 ? GN_OK : ctx->backend->attention(ctx, y, q, kv, seqs);
}

size_t gn_attention_workspace(const gn_ctx *ctx, int64_t context) {
    return ctx->backend->attention_workspace(ctx, context);
}

size_t gn_place_bytes(const gn_ctx *ctx, const gn_matrix *host) {
    return ctx->backend->place_bytes(ctx, host);
}

gn_status gn_place(gn_ctx *ctx, gn_matrix *out, const gn_matrix *host, void *memory) {
    if (!ctx || !out || !is_matrix(host) || (!memory && gn_place_bytes(ctx, host) > 0))
        return GN_EINVAL;
    return ctx->backend->place(ctx, out, host, memory);
}

size_t gn_quantize_place_bytes(const gn_ctx *ctx, gn_qtype type, bool double_quant, int64_t rows,
                               int64_t cols) {
    return ctx->backend->quantize_place_bytes(ctx, type, double_quant && gn_qtype_is_4bit(type),
                                              rows, cols);
}

gn_status gn_quantize_place(gn_ctx *ctx, gn_matrix *out, gn_qtype type, bool double_quant,
                            const void *src, gn_dtype dtype, int64_t rows, int64_t cols,
                            void *memory, gn_error *err) {
    int64_t numel;
    if (!ctx || !out || !src || !memory)
        return gn_fail(err, GN_EINVAL, "gn_quantize_place: an argument is NULL");
    if (!gn_dtype_is_float(dtype) || (type != GN_Q_INT8 && !gn_qtype_is_4bit(type)))
        return gn_fail(err, GN_EINVAL, "cannot quantize %s to %s", gn_dtype_name(dtype),
                       gn_qtype_name(type));
    if (rows < 1 || cols < 1 || __builtin_mul_overflow(rows, cols, &numel) ||
        numel > PTRDIFF_MAX / 8)
        return gn_fail(err, GN_EINVAL, "a weight of %lld by %lld values", (long long)rows,
                       (long long)cols);
    return ctx->backend->quantize_place(ctx, out, type, double_quant && gn_qtype_is_4bit(type), src,
                                        dtype, rows, cols, memory, err);
}

gn_status gn_stage_reserve(gn_ctx *ctx, const gn_stage_limits *limits) {
    if (!ctx || !limits || limits->rows < 1 || limits->seqs < 1 || limits->max_blocks < 1 ||
        limits->terms < 0)
        return GN_EINVAL;
    return ctx->backend->stage_reserve(ctx, limits);
}

gn_status gn_stage(gn_ctx *ctx, const int32_t *ids, const gn_seqs *seqs, const gn_lora *terms,
                   int32_t n_terms) {
    if (!ctx || !seqs || seqs->n < 1 || !seqs->row0 || !is_seqs(seqs, seqs->row0[seqs->n]) ||
        seqs->row0[seqs->n] < 1 || !ids || n_terms < 0 || (n_terms > 0 && !terms) ||
        (seqs->max_blocks != 0 && !seqs->blocks))
        return GN_EINVAL;
    for (int32_t i = 0; i < n_terms; i++)
        if (!is_term(&terms[i], seqs->row0[seqs->n])) return GN_EINVAL;
    return ctx->backend->stage(ctx, ids, seqs, terms, n_terms);
}

/* ---- training ---- */

static bool is_gradient(const gn_ctx *ctx, const gn_tensor *t, int ndim) {
    return is_f32(t, ndim) || is_activation(ctx, t, ndim);
}

static bool is_gradient_rows(const gn_ctx *ctx, const gn_tensor *t, int64_t rows, int64_t cols) {
    return is_gradient(ctx, t, 2) && t->shape[0] == rows && t->shape[1] == cols;
}

/* Of a parameter; or none, where none is wanted. */
static bool is_sum(const gn_tensor *t, int64_t rows, int64_t cols) {
    return !t->data || is_rows(t, rows, cols);
}

static bool same_shape(const gn_tensor *a, const gn_tensor *b) {
    if (a->ndim != b->ndim) return false;
    for (int i = 0; i < a->ndim; i++)
        if (a->shape[i] != b->shape[i]) return false;
    return true;
}

static bool is_f32_or_bf16(const gn_tensor *t) {
    return is_tensor(t, 2) && t->dtype != GN_F16 && is_aligned(t->data, gn_dtype_size(t->dtype));
}

gn_status gn_convert(gn_ctx *ctx, gn_tensor *y, const gn_tensor *x) {
    if (!ctx || !is_f32_or_bf16(x) || !is_f32_or_bf16(y) || !same_shape(x, y)) return GN_EINVAL;
    return x->shape[0] == 0 ? GN_OK : ctx->backend->convert(ctx, y, x);
}

gn_status gn_embed_bwd(gn_ctx *ctx, gn_tensor *dtable, const gn_tensor *dy, const int32_t *ids) {
    if (!ctx || !is_f32(dtable, 2) || !is_f32(dy, 2) || dy->shape[1] != dtable->shape[1])
        return GN_EINVAL;
    if (dy->shape[0] == 0) return GN_OK;
    if (!ids) return GN_EINVAL;
    for (int64_t t = 0; t < dy->shape[0]; t++)
        if (ids[t] < 0 || ids[t] >= dtable->shape[0]) return GN_EINVAL;
    return ctx->backend->embed_bwd(ctx, dtable, dy, ids);
}

gn_status gn_rmsnorm_bwd(gn_ctx *ctx, gn_tensor *dx, gn_tensor *rounded, gn_tensor *dw,
                         const gn_tensor *dy, const gn_tensor *skip, const gn_tensor *x,
                         const gn_tensor *w, float eps) {
    if (!ctx || !dw || !(is_f32(x, 2) || is_activation(ctx, x, 2))) return GN_EINVAL;
    const int64_t T = x->shape[0], C = x->shape[1];
    if (!is_gradient_rows(ctx, dx, T, C) || !is_gradient_rows(ctx, dy, T, C) ||
        (skip && !is_gradient_rows(ctx, skip, T, C)) || !is_vector(w, C) ||
        (rounded && !is_gradient_rows(ctx, rounded, T, C)) || (dw->data && !is_vector(dw, C)))
        return GN_EINVAL;
    return T == 0 ? GN_OK : ctx->backend->rmsnorm_bwd(ctx, dx, rounded, dw, dy, skip, x, w, eps);
}

static bool is_part_grads(const gn_ctx *ctx, const gn_linear_args *args,
                          const gn_linear_grads *grads, int i) {
    const gn_matrix *w = args->part[i].w;
    const struct gn_linear_part_grads *part = &grads->part[i];
    if (!is_gradient_rows(ctx, &part->dy, args->x.shape[0], w->rows)) return false;
    if (part->dy_spare < 0 || part->dy_spare > part->dy.ld - w->rows) return false;
    if (!is_sum(&part->dw, w->rows, w->cols) || (part->dw.data && w->qtype != GN_Q_NONE))
        return false;
    const int64_t rank = args->n_lora ? args->lora[0].pairs[args->pair + i].rank : 0;
    if (rank == 0) return !part->da.data && !part->db.data;
    return is_sum(&part->da, rank, w->cols) && is_sum(&part->db, w->rows, rank);
}

gn_status gn_linear_bwd(gn_ctx *ctx, const gn_linear_args *args, const gn_linear_grads *grads) {
    const gn_status status = check_linear(ctx, args);
    if (status) return status;
    const int64_t T = args->x.shape[0];
    if (!grads || args->epilogue == GN_SWIGLU || args->n_lora > 1 ||
        (grads->dx.data && !is_gradient_rows(ctx, &grads->dx, T, args->x.shape[1])))
        return GN_EINVAL;
    for (int i = 0; i < args->n_parts; i++)
        if (!is_part_grads(ctx, args, grads, i)) return GN_EINVAL;
    return T == 0 ? GN_OK : ctx->backend->linear_bwd(ctx, args, grads);
}

size_t gn_linear_bwd_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                               int64_t max_rank) {
    return ctx->backend->linear_bwd_workspace(ctx, rows, max_k, max_n, max_rank);
}

gn_status gn_swiglu(gn_ctx *ctx, gn_tensor *y, const gn_tensor *gate, const gn_tensor *up) {
    if (!ctx || !is_activation(ctx, y, 2) || !is_activation(ctx, gate, 2) ||
        !is_activation(ctx, up, 2) || !same_shape(y, gate) || !same_shape(y, up))
        return GN_EINVAL;
    return y->shape[0] == 0 ? GN_OK : ctx->backend->swiglu(ctx, y, gate, up);
}

gn_status gn_swiglu_bwd(gn_ctx *ctx, gn_tensor *dgate, gn_tensor *dup, const gn_tensor *dy,
                        const gn_tensor *gate, const gn_tensor *up) {
    if (!ctx || !is_gradient(ctx, dgate, 2) || !is_gradient(ctx, dup, 2) ||
        !is_gradient(ctx, dy, 2) || !is_activation(ctx, gate, 2) || !is_activation(ctx, up, 2))
        return GN_EINVAL;
    if (!same_shape(dgate, dy) || !same_shape(dup, dy) || !same_shape(gate, dy) ||
        !same_shape(up, dy))
        return GN_EINVAL;
    return dy->shape[0] == 0 ? GN_OK : ctx->backend->swiglu_bwd(ctx, dgate, dup, dy, gate, up);
}

/* Heads of an even size, and a row of cosines and sines for each of x. */
static bool has_angles(const gn_tensor *x, const gn_tensor *cos, const gn_tensor *sin) {
    return x->shape[2] % 2 == 0 && x->shape[2] <= GN_MAX_HEAD_DIM &&
           is_rows(cos, x->shape[0], x->shape[2] / 2) && is_rows(sin, x->shape[0], x->shape[2] / 2);
}

gn_status gn_rope(gn_ctx *ctx, gn_tensor *x, const gn_tensor *cos, const gn_tensor *sin) {
    if (!ctx || !is_activation(ctx, x, 3) || !has_angles(x, cos, sin)) return GN_EINVAL;
    return x->shape[0] == 0 ? GN_OK : ctx->backend->rope(ctx, x, cos, sin);
}

gn_status gn_rope_bwd(gn_ctx *ctx, gn_tensor *dx, const gn_tensor *cos, const gn_tensor *sin) {
    if (!ctx || !is_gradient(ctx, dx, 3) || !has_angles(dx, cos, sin)) return GN_EINVAL;
    return dx->shape[0] == 0 ? GN_OK : ctx->backend->rope_bwd(ctx, dx, cos, sin);
}

static bool is_attention_rows(const gn_ctx *ctx, const gn_attention_rows *r) {
    if (!ctx || !r || !is_activation(ctx, &r->q, 3) || !is_activation(ctx, &r->k, 3) ||
        !is_activation(ctx, &r->v, 3) || !is_activation(ctx, &r->y, 3))
        return false;
    const int64_t T = r->q.shape[0], heads = r->q.shape[1], D = r->q.shape[2];
    return same_shape(&r->y, &r->q) && same_shape(&r->v, &r->k) && r->k.shape[0] == T &&
           r->k.shape[2] == D && D <= GN_MAX_HEAD_DIM && heads % r->k.shape[1] == 0 &&
           is_rows(&r->lse, T, heads) && is_seqs(r->seqs, T);
}

gn_status gn_attention_train(gn_ctx *ctx, const gn_attention_rows *rows) {
    if (!is_attention_rows(ctx, rows)) return GN_EINVAL;
    return rows->q.shape[0] == 0 ? GN_OK : ctx->backend->attention_train(ctx, rows);
}

gn_status gn_attention_bwd(gn_ctx *ctx, gn_tensor *dq, gn_tensor *dk, gn_tensor *dv,
                           const gn_tensor *dy, const gn_attention_rows *rows) {
    if (!is_attention_rows(ctx, rows) || !is_gradient(ctx, dq, 3) || !is_gradient(ctx, dk, 3) ||
        !is_gradient(ctx, dv, 3) || !is_gradient(ctx, dy, 3))
        return GN_EINVAL;
    if (!same_shape(dq, &rows->q) || !same_shape(dk, &rows->k) || !same_shape(dv, &rows->v) ||
        !same_shape(dy, &rows->y))
        return GN_EINVAL;
    return dy->shape[0] == 0 ? GN_OK : ctx->backend->attention_bwd(ctx, dq, dk, dv, dy, rows);
}

size_t gn_attention_train_workspace(const gn_ctx *ctx, int64_t rows, int64_t heads,
                                    int64_t head_dim, int64_t context) {
    return ctx->backend->attention_train_workspace(ctx, rows, heads, head_dim, context);
}

gn_status gn_cross_entropy(gn_ctx *ctx, const gn_cross_entropy_args *args) {
    if (!ctx || !args || !is_f32(&args->x, 2) || !is_matrix(args->lm_head) ||
        args->lm_head->qtype != GN_Q_NONE || args->x.shape[1] != args->lm_head->cols)
        return GN_EINVAL;
    const int64_t T = args->x.shape[0], C = args->x.shape[1], V = args->lm_head->rows;
    if (!is_vector(&args->loss, T) || !is_sum(&args->dx, T, C) || !is_sum(&args->dw, V, C) ||
        (args->dw.data && !args->dx.data))
        return GN_EINVAL;
    if (T == 0) return GN_OK;
    if (!args->labels) return GN_EINVAL;
    for (int64_t t = 0; t < T; t++)
        if (args->labels[t] != GN_IGNORED_LABEL && (args->labels[t] < 0 || args->labels[t] >= V))
            return GN_EINVAL;
    return ctx->backend->cross_entropy(ctx, args);
}

size_t gn_cross_entropy_workspace(const gn_ctx *ctx, int64_t max_c, int64_t vocab) {
    return ctx->backend->cross_entropy_workspace(ctx, max_c, vocab);
}
