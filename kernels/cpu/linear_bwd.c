/* linear_bwd.c - gradients of gn_linear, as products of float32 matrices.
 *
 * With x as products see it, x' = dropout(x), and for each part s the term's scale:
 *
 *   dx  = dy W               W dequantized CHUNK rows at a time
 *   v   = s dy B             u = x' A^T
 *   dB += s dy^T u           dA += v^T x'           dx += dropout(v A)
 *   dW += dy^T x
 *
 * All threads go through the steps together, each computing its share of every product; between a
 * product and the next that reads or overwrites what it touched stands a barrier. */
#include "gemm.h"
#include "linear.h"

enum { CHUNK = 256 };

struct call {
    const gn_linear_args *args;
    const gn_linear_grads *grads;
    const gn_gemm_kernel *kernel;
    gn_dtype compute;
    int64_t T, K;
    float *x, *dropped; /* (T, K); x' of a part, and then what comes back through A */
    float *w;           /* (CHUNK, K) */
    float *a, *b;       /* (rank, K), (N, rank) */
    float *u, *v;       /* (T, rank) */
    char *gemm;         /* scratch of each thread */
};

static const gn_lora_pair *pair_of(const gn_linear_args *args, int part) {
    const gn_lora_pair *pair = args->n_lora ? gn_linear_pair(args, part, 0) : NULL;
    return pair && pair->rank > 0 ? pair : NULL;
}

static bool wants_lora(const struct call *op, int part) {
    const struct gn_linear_part_grads *grads = &op->grads->part[part];
    return pair_of(op->args, part) && (op->grads->dx.data || grads->da.data || grads->db.data);
}

static bool wants_x(const struct call *op) {
    for (int i = 0; i < op->args->n_parts; i++) {
        const struct gn_linear_part_grads *grads = &op->grads->part[i];
        if (grads->da.data || grads->db.data || grads->dw.data) return true;
    }
    return false;
}

/* Points op into `memory`; with NULL only counts. */
static size_t lay_out(struct call *op, char *memory, int threads, int64_t N, int64_t rank) {
    const size_t size = sizeof(float);
    const size_t T = (size_t)op->T, K = (size_t)op->K, r = (size_t)rank, n = (size_t)N;
    size_t total = 0;
    const size_t x = gn_linear_piece(&total, T * K * size);
    const size_t dropped = gn_linear_piece(&total, T * K * size);
    const size_t w = gn_linear_piece(&total, CHUNK * K * size);
    const size_t a = gn_linear_piece(&total, r * K * size);
    const size_t b = gn_linear_piece(&total, n * r * size);
    const size_t u = gn_linear_piece(&total, T * r * size);
    const size_t v = gn_linear_piece(&total, T * r * size);
    const size_t gemm = gn_linear_piece(&total, (size_t)threads * gn_gemm_scratch_bytes());
    if (!memory) return total;
    op->x = (float *)(memory + x);
    op->dropped = (float *)(memory + dropped);
    op->w = (float *)(memory + w);
    op->a = (float *)(memory + a);
    op->b = (float *)(memory + b);
    op->u = (float *)(memory + u);
    op->v = (float *)(memory + v);
    op->gemm = memory + gemm;
    return total;
}

static void multiply(const struct call *op, const gn_cpu_team *team, gn_gemm gemm) {
    gn_gemm_run(&gemm, op->kernel, team,
                (float *)(op->gemm + (size_t)team->thread * gn_gemm_scratch_bytes()));
}

static void prepare_rows(const struct call *op, const gn_cpu_team *team) {
    const int64_t last = gn_cpu_share(op->T, team->thread + 1, team->n_threads);
    for (int64_t t = gn_cpu_share(op->T, team->thread, team->n_threads); t < last; t++)
        gn_linear_input_row(op->x + t * op->K, op->args, t, op->compute);
    gn_cpu_barrier(team);
}

static void through_weight(const struct call *op, int part, const gn_cpu_team *team) {
    const gn_matrix *w = op->args->part[part].w;
    const gn_tensor *dy = &op->grads->part[part].dy, *dx = &op->grads->dx;
    const gn_operand rows = {op->w, op->K, 1};
    for (int64_t n0 = 0; n0 < w->rows; n0 += CHUNK) {
        const int64_t n = w->rows - n0 < CHUNK ? w->rows - n0 : CHUNK;
        gn_gemm_load_weight(op->w, w, n0, n, op->compute, team);
        gn_cpu_barrier(team);
        const gn_operand columns = {(const float *)dy->data + n0, dy->ld, 1};
        multiply(
            op, team,
            gn_gemm_of(op->T, op->K, n, columns, rows, dx->data, dx->ld, 1, part > 0 || n0 > 0));
        gn_cpu_barrier(team);
    }
}

/* ---- LoRA ---- */

/* A thread's share of the rows of `t` as float32, one after another. */
static void widen_rows(float *to, const gn_tensor *t, const gn_cpu_team *team) {
    const int64_t cols = t->shape[1];
    const int64_t last = gn_cpu_share(t->shape[0], team->thread + 1, team->n_threads);
    for (int64_t i = gn_cpu_share(t->shape[0], team->thread, team->n_threads); i < last; i++)
        gn_widen(to + i * cols, (char *)t->data + (size_t)(i * t->ld) * gn_dtype_size(t->dtype),
                 t->dtype, cols);
}

/* dx += dropout(v A), which stands in `dropped`. */
static void add_dropped(const struct call *op, int part, const gn_cpu_team *team) {
    const gn_lora *term = op->args->lora;
    const int64_t last = gn_cpu_share(term->rows, team->thread + 1, team->n_threads);
    for (int64_t i = gn_cpu_share(term->rows, team->thread, team->n_threads); i < last; i++) {
        const int64_t t = term->row0 + i;
        float *row = op->dropped + t * op->K, *dx = gn_cpu_row(&op->grads->dx, t);
        gn_linear_drop_row(row, row, op->args, part, t);
        for (int64_t k = 0; k < op->K; k++) dx[k] += row[k];
    }
}

/* A and B as operands, and x'. */
static void prepare_lora(const struct call *op, int part, bool wants_x, const gn_cpu_team *team) {
    const gn_lora *term = op->args->lora;
    const gn_lora_pair *pair = pair_of(op->args, part);
    widen_rows(op->a, &pair->a, team);
    widen_rows(op->b, &pair->b, team);
    const int64_t last = gn_cpu_share(term->rows, team->thread + 1, team->n_threads);
    for (int64_t i = gn_cpu_share(term->rows, team->thread, team->n_threads); wants_x && i < last;
         i++) {
        const int64_t t = term->row0 + i;
        gn_linear_drop_row(op->dropped + t * op->K, op->x + t * op->K, op->args, part, t);
    }
    gn_cpu_barrier(team);
}

static void through_lora(const struct call *op, int part, const gn_cpu_team *team) {
    const struct gn_linear_part_grads *grads = &op->grads->part[part];
    const gn_lora *term = op->args->lora;
    const gn_lora_pair *pair = pair_of(op->args, part);
    const int64_t N = op->args->part[part].w->rows, K = op->K, r = pair->rank, rows = term->rows;
    const float scale = term->scale * pair->scale;
    const bool drops = op->args->dropout.p > 0, wants_x = grads->da.data || grads->db.data;
    const gn_tensor *dx = &op->grads->dx;
    const gn_operand x = {(drops ? op->dropped : op->x) + term->row0 * K, K, 1};
    const gn_operand dy = {gn_cpu_row(&grads->dy, term->row0), grads->dy.ld, 1};
    const gn_operand a = {op->a, K, 1}, b = {op->b, r, 1}, u = {op->u, r, 1}, v = {op->v, r, 1};

    prepare_lora(op, part, wants_x && drops, team);
    multiply(op, team, gn_gemm_of(rows, r, N, dy, b, op->v, r, scale, false));
    if (grads->db.data)
        multiply(op, team, gn_gemm_of(rows, r, K, x, gn_turned(a), op->u, r, 1, false));
    gn_cpu_barrier(team);
    if (grads->db.data)
        multiply(
            op, team,
            gn_gemm_of(N, r, rows, gn_turned(dy), u, grads->db.data, grads->db.ld, scale, true));
    if (grads->da.data)
        multiply(op, team,
                 gn_gemm_of(r, K, rows, gn_turned(v), x, grads->da.data, grads->da.ld, 1, true));
    if (drops) gn_cpu_barrier(team);
    if (dx->data) {
        float *to = drops ? op->dropped + term->row0 * K : gn_cpu_row(dx, term->row0);
        multiply(op, team, gn_gemm_of(rows, K, r, v, a, to, drops ? K : dx->ld, 1, !drops));
    }
    gn_cpu_barrier(team);
    if (dx->data && drops) {
        add_dropped(op, part, team);
        gn_cpu_barrier(team);
    }
}

/* ---- the call ---- */

static void add_weight_gradient(const struct call *op, int part, const gn_cpu_team *team) {
    const gn_tensor *dy = &op->grads->part[part].dy, *dw = &op->grads->part[part].dw;
    const gn_operand turned_dy = {dy->data, 1, dy->ld}, x = {op->x, op->K, 1};
    multiply(op, team,
             gn_gemm_of(dw->shape[0], op->K, op->T, turned_dy, x, dw->data, dw->ld, 1, true));
}

static void run(void *arg, const gn_cpu_team *team) {
    const struct call *op = arg;
    if (wants_x(op)) prepare_rows(op, team);
    for (int i = 0; i < op->args->n_parts; i++) {
        if (op->grads->dx.data) through_weight(op, i, team);
        if (wants_lora(op, i)) through_lora(op, i, team);
        if (op->grads->part[i].dw.data) add_weight_gradient(op, i, team);
    }
}

gn_status gn_cpu_linear_bwd(gn_ctx *ctx, const gn_linear_args *args, const gn_linear_grads *grads) {
    struct call op = {.args = args,
                      .grads = grads,
                      .kernel = gn_gemm_kernel_of(ctx->isa),
                      .compute = ctx->compute,
                      .T = args->x.shape[0],
                      .K = args->x.shape[1]};
    int64_t N = 0, rank = 0;
    for (int i = 0; i < args->n_parts; i++) {
        const gn_lora_pair *pair = pair_of(args, i);
        if (args->part[i].w->rows > N) N = args->part[i].w->rows;
        if (pair && pair->rank > rank) rank = pair->rank;
    }
    if (lay_out(&op, NULL, ctx->threads, N, rank) > ctx->workspace_bytes) return GN_ENOMEM;
    lay_out(&op, ctx->workspace, ctx->threads, N, rank);
    gn_cpu_parallel(ctx->pool, gn_linear_is_small(args), run, &op);
    return GN_OK;
}

/* gn_linear with dropout needs a masked copy of x for each part beside its usual memory. */
size_t gn_cpu_linear_bwd_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                                   int64_t max_rank) {
    struct call op = {.T = rows, .K = max_k};
    const size_t backward = lay_out(&op, NULL, ctx->threads, max_n, max_rank);
    const size_t masked = (size_t)rows * (size_t)(gn_cpu_round_up(max_k, 2 * GN_BLOCK) + GN_BLOCK);
    const size_t forward = gn_cpu_linear_workspace(ctx, rows, max_k, max_n, max_rank, 1) +
                           GN_MAX_PARTS * (masked * sizeof(float) + 64);
    return backward > forward ? backward : forward;
}
