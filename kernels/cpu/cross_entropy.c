/* cross_entropy.c - logits, their losses and gradients, ROWS labelled rows at a time.
 *
 * Rows without a label cost nothing: the labelled ones are gathered. lm_head is widened CHUNK rows
 * at a time, once for the logits and once for dx. With p = softmax(W x):
 *
 *   loss = -log p[label]   dlogits = scale (p - onehot(label))
 *   dx = dlogits W         dW += dlogits^T x */
#include "exp.h"
#include "gemm.h"

#include <math.h>
#include <string.h>

enum { ROWS = 192, CHUNK = 1024 };

struct call {
    const gn_cross_entropy_args *args;
    const gn_gemm_kernel *kernel;
    gn_dtype compute;
    int64_t C, V;
    float *x, *dx; /* (ROWS, C) gathered */
    float *logits; /* (ROWS, V), and then their gradients */
    float *w;      /* (CHUNK, C) */
    char *gemm;    /* scratch of each thread */
};

/* The rows of a turn. */
struct turn {
    int n;
    int64_t row[ROWS];
};

static size_t lay_out(struct call *op, char *memory, int threads) {
    const size_t x = ROWS * (size_t)op->C, logits = ROWS * (size_t)op->V;
    const size_t w = CHUNK * (size_t)op->C;
    if (memory) {
        op->x = (float *)memory;
        op->dx = op->x + x;
        op->logits = op->dx + x;
        op->w = op->logits + logits;
        op->gemm = (char *)(op->w + w);
    }
    return (2 * x + logits + w) * sizeof(float) + (size_t)threads * gn_gemm_scratch_bytes();
}

size_t gn_cpu_cross_entropy_workspace(const gn_ctx *ctx, int64_t max_c, int64_t vocab) {
    return lay_out(&(struct call){.C = max_c, .V = vocab}, NULL, ctx->threads);
}

static void multiply(const struct call *op, const gn_cpu_team *team, gn_gemm gemm) {
    gn_gemm_run(&gemm, op->kernel, team,
                (float *)(op->gemm + (size_t)team->thread * gn_gemm_scratch_bytes()));
}

/* The next labelled rows from t on; returns where the search ended. Those passed by get their
 * zeros from one thread. */
static int64_t find_rows(const struct call *op, int64_t t, struct turn *turn, bool clear) {
    const gn_cross_entropy_args *args = op->args;
    turn->n = 0;
    for (; t < args->x.shape[0] && turn->n < ROWS; t++) {
        if (args->labels[t] != GN_IGNORED_LABEL) {
            turn->row[turn->n++] = t;
        } else if (clear) {
            ((float *)args->loss.data)[t] = 0;
            if (args->dx.data) memset(gn_cpu_row(&args->dx, t), 0, (size_t)op->C * sizeof(float));
        }
    }
    return t;
}

static void find_logits(const struct call *op, const struct turn *turn, const gn_cpu_team *team) {
    const gn_operand x = {op->x, op->C, 1}, turned_w = {op->w, 1, op->C};
    for (int64_t v0 = 0; v0 < op->V; v0 += CHUNK) {
        const int64_t n = op->V - v0 < CHUNK ? op->V - v0 : CHUNK;
        gn_gemm_load_weight(op->w, op->args->lm_head, v0, n, op->compute, team);
        gn_cpu_barrier(team);
        multiply(op, team,
                 gn_gemm_of(turn->n, n, op->C, x, turned_w, op->logits + v0, op->V, 1, false));
        gn_cpu_barrier(team);
    }
}

/* Leaves the gradient in `logits`. */
static float loss_of(float *logits, int64_t V, int32_t label, float scale) {
    float most = logits[0];
    double sum = 0;
    for (int64_t v = 1; v < V; v++) most = logits[v] > most ? logits[v] : most;
    const double at_label = (double)logits[label] - most;
    for (int64_t v = 0; v < V; v++) logits[v] = gn_exp(logits[v] - most);
    for (int64_t v = 0; v < V; v++) sum += logits[v];
    const float share = (float)(scale / sum);
    for (int64_t v = 0; v < V; v++) logits[v] *= share;
    logits[label] -= scale;
    return (float)(log(sum) - at_label);
}

static void find_dx(const struct call *op, const struct turn *turn, const gn_cpu_team *team) {
    const gn_operand w = {op->w, op->C, 1};
    for (int64_t v0 = 0; v0 < op->V; v0 += CHUNK) {
        const int64_t n = op->V - v0 < CHUNK ? op->V - v0 : CHUNK;
        gn_gemm_load_weight(op->w, op->args->lm_head, v0, n, op->compute, team);
        gn_cpu_barrier(team);
        const gn_operand dlogits = {op->logits + v0, op->V, 1};
        multiply(op, team, gn_gemm_of(turn->n, op->C, n, dlogits, w, op->dx, op->C, 1, v0 > 0));
        gn_cpu_barrier(team);
    }
}

static void add_weight_gradient(const struct call *op, const struct turn *turn,
                                const gn_cpu_team *team) {
    const gn_tensor *dw = &op->args->dw;
    const gn_operand turned_dlogits = {op->logits, 1, op->V}, x = {op->x, op->C, 1};
    multiply(op, team,
             gn_gemm_of(op->V, op->C, turn->n, turned_dlogits, x, dw->data, dw->ld, 1, true));
}

static void run_turn(const struct call *op, const struct turn *turn, const gn_cpu_team *team) {
    const gn_cross_entropy_args *args = op->args;
    const int first = (int)gn_cpu_share(turn->n, team->thread, team->n_threads);
    const int last = (int)gn_cpu_share(turn->n, team->thread + 1, team->n_threads);
    const size_t bytes = (size_t)op->C * sizeof(float);
    for (int i = first; i < last; i++)
        memcpy(op->x + i * op->C, gn_cpu_row(&args->x, turn->row[i]), bytes);
    gn_cpu_barrier(team);
    find_logits(op, turn, team);
    for (int i = first; i < last; i++)
        ((float *)args->loss.data)[turn->row[i]] =
            loss_of(op->logits + i * op->V, op->V, args->labels[turn->row[i]], args->scale);
    gn_cpu_barrier(team);
    if (!args->dx.data) return;
    find_dx(op, turn, team);
    for (int i = first; i < last; i++)
        memcpy(gn_cpu_row(&args->dx, turn->row[i]), op->dx + i * op->C, bytes);
    if (args->dw.data) add_weight_gradient(op, turn, team);
    gn_cpu_barrier(team);
}

static void run(void *arg, const gn_cpu_team *team) {
    const struct call *op = arg;
    struct turn turn;
    for (int64_t t = 0; t < op->args->x.shape[0];) {
        t = find_rows(op, t, &turn, team->thread == 0);
        if (turn.n > 0) run_turn(op, &turn, team);
    }
}

gn_status gn_cpu_cross_entropy(gn_ctx *ctx, const gn_cross_entropy_args *args) {
    struct call op = {.args = args,
                      .kernel = gn_gemm_kernel_of(ctx->isa),
                      .compute = ctx->compute,
                      .C = args->x.shape[1],
                      .V = args->lm_head->rows};
    if (lay_out(&op, NULL, ctx->threads) > ctx->workspace_bytes) return GN_ENOMEM;
    lay_out(&op, ctx->workspace, ctx->threads);
    gn_cpu_parallel(ctx->pool, args->x.shape[0] * op.C < GN_CPU_SERIAL, run, &op);
    return GN_OK;
}
