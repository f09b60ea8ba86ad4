/* attention_train.c - causal attention within the sequences of a batch, forward and backward.
 *
 * An item is one sequence under one kv head, taken by whichever thread is free: it alone writes
 * that head's dk and dv, summed over the query heads of its group. Queries go ROWS at a time, whose
 * probabilities P over all keys up to the last of them are a matrix in working memory; the backward
 * pass computes them again from the scores and lse. So everything is a product of matrices:
 *
 *   P = softmax(Q K^T / sqrt(D))   Y = P V
 *   dP = dY V^T   dS = P * (dP - rowsum(dY * Y)) / sqrt(D)
 *   dQ = dS K     dK += dS^T Q     dV += P^T dY */
#include "exp.h"
#include "gemm.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

enum { ROWS = 64 };

struct call {
    const gn_attention_rows *rows;
    const gn_tensor *dq, *dk, *dv, *dy; /* NULL: forward */
    const gn_gemm_kernel *kernel;
    char *scratch;
    size_t scratch_bytes; /* a thread */
    int64_t stride;       /* of a row of scores */
    atomic_llong next;    /* item */
};

/* What one thread works in. */
struct scratch {
    float *p, *ds; /* (ROWS, stride) */
    float *gemm;
};

/* ROWS queries of a head, or fewer: rows [row0, row0 + n) of the batch, and the keys they see, rows
 * [key0, key0 + keys), the last `n` of which are their own. */
struct block {
    int64_t row0, key0, head, kv_head;
    int n;
    int64_t keys;
};

static int64_t stride_of(int64_t context) {
    return gn_cpu_round_up(context, 16);
}

static size_t scores_bytes(int64_t context) {
    return ROWS * (size_t)stride_of(context) * sizeof(float);
}

static size_t thread_bytes(int64_t context) {
    return 2 * scores_bytes(context) + gn_gemm_scratch_bytes();
}

size_t gn_cpu_attention_train_workspace(const gn_ctx *ctx, int64_t rows, int64_t heads,
                                        int64_t head_dim, int64_t context) {
    (void)rows, (void)heads, (void)head_dim;
    return (size_t)ctx->threads * thread_bytes(context);
}

static float *head_row(const gn_tensor *t, int64_t row, int64_t head) {
    return gn_cpu_row(t, row) + head * t->shape[2];
}

static void multiply(const struct call *op, const struct scratch *scratch, gn_gemm gemm) {
    gn_gemm_run(&gemm, op->kernel, &(gn_cpu_team){.n_threads = 1}, scratch->gemm);
}

/* A head of the rows of t from `row` on. */
static gn_operand rows_of(const gn_tensor *t, int64_t row, int64_t head) {
    return (gn_operand){head_row(t, row, head), t->ld, 1};
}

/* out = alpha * (the block's rows of x) (its keys' rows of y)^T. */
static void score(const struct call *op, const struct scratch *scratch, const struct block *b,
                  float *out, const gn_tensor *x, const gn_tensor *y, float alpha) {
    const gn_operand turned = gn_turned(rows_of(y, b->key0, b->kv_head));
    multiply(op, scratch,
             gn_gemm_of(b->n, b->keys, x->shape[2], rows_of(x, b->row0, b->head), turned, out,
                        op->stride, alpha, false));
}

/* The block's rows of out = p (its keys' rows of y). */
static void weigh(const struct call *op, const struct scratch *scratch, const struct block *b,
                  const gn_tensor *out, const float *p, const gn_tensor *y) {
    const gn_operand weights = {p, op->stride, 1};
    multiply(op, scratch,
             gn_gemm_of(b->n, y->shape[2], b->keys, weights, rows_of(y, b->key0, b->kv_head),
                        head_row(out, b->row0, b->head), out->ld, 1, false));
}

/* The keys' rows of out += p^T (the block's rows of x). */
static void spread(const struct call *op, const struct scratch *scratch, const struct block *b,
                   const gn_tensor *out, const float *p, const gn_tensor *x) {
    const gn_operand turned = {p, 1, op->stride};
    multiply(op, scratch,
             gn_gemm_of(b->keys, x->shape[2], b->n, turned, rows_of(x, b->row0, b->head),
                        head_row(out, b->key0, b->kv_head), out->ld, 1, true));
}

/* The first key that query i of the block does not see. */
static int64_t end_of(const struct block *b, int i) {
    return b->keys - b->n + i + 1;
}

static float softmax_scale(const struct call *op) {
    return (float)(1.0 / sqrt((double)op->rows->q.shape[2]));
}

static void forward_block(const struct call *op, const struct scratch *scratch,
                          const struct block *b) {
    const gn_attention_rows *rows = op->rows;
    score(op, scratch, b, scratch->p, &rows->q, &rows->k, softmax_scale(op));
    for (int i = 0; i < b->n; i++) {
        float *p = scratch->p + i * op->stride;
        const int64_t end = end_of(b, i);
        float most = p[0];
        double sum = 0;
        for (int64_t j = 1; j < end; j++) most = p[j] > most ? p[j] : most;
        for (int64_t j = 0; j < end; j++) p[j] = gn_exp(p[j] - most);
        for (int64_t j = 0; j < end; j++) sum += p[j];
        const float share = (float)(1.0 / sum);
        for (int64_t j = 0; j < end; j++) p[j] *= share;
        memset(p + end, 0, (size_t)(b->keys - end) * sizeof *p);
        gn_cpu_row(&rows->lse, b->row0 + i)[b->head] = (float)(most + log(sum));
    }
    weigh(op, scratch, b, &rows->y, scratch->p, &rows->v);
}

static double dot(const float *a, const float *b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)a[i] * b[i];
    return sum;
}

static void backward_block(const struct call *op, const struct scratch *scratch,
                           const struct block *b) {
    const gn_attention_rows *rows = op->rows;
    const int64_t D = rows->q.shape[2];
    const float scale = softmax_scale(op);
    score(op, scratch, b, scratch->p, &rows->q, &rows->k, scale);
    score(op, scratch, b, scratch->ds, op->dy, &rows->v, 1);
    for (int i = 0; i < b->n; i++) {
        float *p = scratch->p + i * op->stride, *ds = scratch->ds + i * op->stride;
        const int64_t end = end_of(b, i), row = b->row0 + i;
        const float lse = gn_cpu_row(&rows->lse, row)[b->head];
        const float delta =
            (float)dot(head_row(op->dy, row, b->head), head_row(&rows->y, row, b->head), D);
        for (int64_t j = 0; j < end; j++) {
            p[j] = gn_exp(p[j] - lse);
            ds[j] = p[j] * (ds[j] - delta) * scale;
        }
        memset(p + end, 0, (size_t)(b->keys - end) * sizeof *p);
        memset(ds + end, 0, (size_t)(b->keys - end) * sizeof *ds);
    }
    weigh(op, scratch, b, op->dq, scratch->ds, &rows->k);
    spread(op, scratch, b, op->dk, scratch->ds, &rows->q);
    spread(op, scratch, b, op->dv, scratch->p, op->dy);
}

static void run_item(const struct call *op, const struct scratch *scratch, int32_t seq,
                     int64_t kv_head) {
    const gn_attention_rows *rows = op->rows;
    const int64_t group = rows->q.shape[1] / rows->k.shape[1], D = rows->q.shape[2];
    const int64_t first = rows->seqs->row0[seq], last = rows->seqs->row0[seq + 1];
    for (int64_t t = first; op->dq && t < last; t++) {
        memset(head_row(op->dk, t, kv_head), 0, (size_t)D * sizeof(float));
        memset(head_row(op->dv, t, kv_head), 0, (size_t)D * sizeof(float));
    }
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int64_t t = first; t < last; t += ROWS) {
            const int n = (int)(last - t < ROWS ? last - t : ROWS);
            const struct block b = {t, first, head, kv_head, n, t + n - first};
            if (op->dq)
                backward_block(op, scratch, &b);
            else
                forward_block(op, scratch, &b);
        }
}

static void run_items(void *arg, const gn_cpu_team *team) {
    struct call *op = arg;
    char *memory = op->scratch + (size_t)team->thread * op->scratch_bytes;
    const size_t scores = ROWS * (size_t)op->stride * sizeof(float);
    const struct scratch scratch = {(float *)memory, (float *)(memory + scores),
                                    (float *)(memory + 2 * scores)};
    const int64_t kv_heads = op->rows->k.shape[1], items = op->rows->seqs->n * kv_heads;
    for (int64_t i; (i = atomic_fetch_add(&op->next, 1)) < items;)
        run_item(op, &scratch, (int32_t)(i / kv_heads), i % kv_heads);
}

static gn_status run(gn_ctx *ctx, struct call *op) {
    const gn_seqs *seqs = op->rows->seqs;
    int64_t context = 1, work = 0;
    for (int32_t i = 0; i < seqs->n; i++) {
        const int64_t rows = seqs->row0[i + 1] - seqs->row0[i];
        if (rows > context) context = rows;
        work += rows * rows * op->rows->q.shape[1] * op->rows->q.shape[2];
    }
    if ((size_t)ctx->threads * thread_bytes(context) > ctx->workspace_bytes) return GN_ENOMEM;
    op->kernel = gn_gemm_kernel_of(ctx->isa);
    op->scratch = ctx->workspace;
    op->scratch_bytes = thread_bytes(context);
    op->stride = stride_of(context);
    gn_cpu_parallel(ctx->pool, work < GN_CPU_SERIAL, run_items, op);
    return GN_OK;
}

gn_status gn_cpu_attention_train(gn_ctx *ctx, const gn_attention_rows *rows) {
    struct call op = {.rows = rows};
    return run(ctx, &op);
}

gn_status gn_cpu_attention_bwd(gn_ctx *ctx, gn_tensor *dq, gn_tensor *dk, gn_tensor *dv,
                               const gn_tensor *dy, const gn_attention_rows *rows) {
    struct call op = {.rows = rows, .dq = dq, .dk = dk, .dv = dv, .dy = dy};
    return run(ctx, &op);
}
