/* bench_attention_train.c - how long attention takes in training on the GPU; run by hand, not a
 * test.
 *
 * Microseconds a call, of CALLS in a row, the best of RUNS; TFLOP/s by what causal attention has to
 * multiply: four operations a dimension, query and key that it sees, backward ten. */
#include "kernels/ops_train.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "tests/gpu/bench.h"

enum { RUNS = 5, CALLS = 20 };

typedef struct {
    int seqs, tokens, heads, kv_heads, D;
} shape;

/* (rows, heads, D) of random values in [-1, 1). */
static gn_tensor random_heads(gn_ctx *ctx, int64_t rows, int heads, int D) {
    const gn_dtype dtype = gn_ctx_activation(ctx);
    const int64_t cols = (int64_t)heads * D, n = rows * cols;
    const size_t bytes = (size_t)n * gn_dtype_size(dtype);
    float *wide = malloc((size_t)n * sizeof *wide);
    void *host = malloc(bytes), *device = gn_ctx_alloc(ctx, bytes);
    if (!wide || !host || !device) check(GN_ENOMEM, NULL);
    for (int64_t i = 0; i < n; i++) wide[i] = 2 * (float)rand() / (float)RAND_MAX - 1;
    gn_narrow(host, dtype, wide, n);
    check(gn_ctx_write(ctx, device, host, bytes), NULL);
    free(wide);
    free(host);
    return (gn_tensor){device, dtype, 3, {rows, heads, D, 1}, cols};
}

typedef struct {
    gn_ctx *ctx;
    gn_attention_rows rows;
    gn_tensor dq, dk, dv, dy;
} problem;

static gn_status forward(problem *p) {
    return gn_attention_train(p->ctx, &p->rows);
}

static gn_status backward(problem *p) {
    return gn_attention_bwd(p->ctx, &p->dq, &p->dk, &p->dv, &p->dy, &p->rows);
}

static void time_calls(problem *p, const char *name, gn_status (*call)(problem *), double flop) {
    double best = INFINITY;
    for (int run = 0; run <= RUNS; run++) { /* the first one warms up */
        const double start = seconds();
        for (int i = 0; i < CALLS; i++) check(call(p), NULL);
        check(gn_ctx_wait(p->ctx), NULL);
        if (run > 0) best = fmin(best, (seconds() - start) / CALLS);
    }
    printf(" %s %8.1f us %6.1f TFLOP/s", name, best * 1e6, flop / best * 1e-12);
}

static void bench(gn_ctx *ctx, const shape *s) {
    const int T = s->seqs * s->tokens;
    int32_t *row0 = malloc((size_t)(s->seqs + 1) * sizeof *row0);
    int32_t *pos0 = calloc((size_t)s->seqs, sizeof *pos0), *ids = calloc((size_t)T, sizeof *ids);
    if (!row0 || !pos0 || !ids) check(GN_ENOMEM, NULL);
    for (int i = 0; i <= s->seqs; i++) row0[i] = i * s->tokens;
    const gn_seqs seqs = {.n = s->seqs, .row0 = row0, .pos0 = pos0};
    void *lse = gn_ctx_alloc(ctx, (size_t)T * (size_t)s->heads * sizeof(float));
    if (!lse) check(GN_ENOMEM, NULL);
    problem p = {.ctx = ctx,
                 .rows = {.q = random_heads(ctx, T, s->heads, s->D),
                          .k = random_heads(ctx, T, s->kv_heads, s->D),
                          .v = random_heads(ctx, T, s->kv_heads, s->D),
                          .y = random_heads(ctx, T, s->heads, s->D),
                          .lse = gn_tensor_2d(lse, GN_F32, T, s->heads),
                          .seqs = &seqs},
                 .dq = random_heads(ctx, T, s->heads, s->D),
                 .dk = random_heads(ctx, T, s->kv_heads, s->D),
                 .dv = random_heads(ctx, T, s->kv_heads, s->D),
                 .dy = random_heads(ctx, T, s->heads, s->D)};
    const gn_stage_limits limits = {.rows = T, .seqs = s->seqs, .max_blocks = 1, .terms = 1};
    check(gn_stage_reserve(ctx, &limits), NULL);
    check(gn_stage(ctx, ids, &seqs, NULL, 0), NULL);
    check(gn_ctx_reserve(ctx, gn_attention_train_workspace(ctx, T, s->heads, s->D, s->tokens)),
          NULL);

    const double pairs = (double)s->seqs * s->heads * s->tokens * (s->tokens + 1.0) / 2;
    printf("%3d x %5d, heads %2d/%2d x %3d:", s->seqs, s->tokens, s->heads, s->kv_heads, s->D);
    time_calls(&p, "forward", forward, 4 * pairs * s->D);
    time_calls(&p, " backward", backward, 10 * pairs * s->D);
    printf("\n");
    void *const owned[] = {p.rows.q.data, p.rows.k.data, p.rows.v.data, p.rows.y.data, lse,
                           p.dq.data,     p.dk.data,     p.dv.data,     p.dy.data};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) gn_ctx_free(ctx, owned[i]);
    free(row0);
    free(pos0);
    free(ids);
}

int main(void) {
    static const shape shapes[] = {
        {16, 512, 32, 32, 128}, {4, 2048, 32, 32, 128}, {1, 8192, 32, 32, 128},
        {1, 512, 64, 64, 128},  {1, 2048, 32, 32, 128}, {16, 512, 32, 8, 128},
        {16, 512, 32, 4, 64},   {16, 512, 32, 32, 80},  {16, 512, 32, 32, 96},
    };
    gn_error err = {0};
    gn_ctx *ctx;
    const gn_ctx_options options = {.device = "cuda", .auto_compute = true};
    if (gn_ctx_open(&ctx, &options, &err) != GN_OK) {
        fprintf(stderr, "bench_attention_train: %s\n", err.message);
        return 1;
    }
    printf("%s\n", gn_ctx_device(ctx));
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) bench(ctx, &shapes[i]);
    gn_ctx_close(ctx);
    return 0;
}
