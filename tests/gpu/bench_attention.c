/* bench_attention.c - how long attention takes in a step of decoding on the GPU; run by hand, not a
 * test.
 *
 * Microseconds a call, of a recorded train of CALLS in a row that goes round as many layers as
 * keep keys and values out of the L2 cache, the best of RUNS; and the share of the read bandwidth,
 * measured in the same run, at which it read them. rope: the same of the call before it, which
 * rotates and stores. Contexts are all of one length, or (mixed) from an eighth of it to all of
 * it. */
#include "kernels/measure.h"
#include "kernels/ops.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/bench.h"

enum { RUNS = 5, CALLS = 64, TOKENS = 16, MAX_ROWS = 128, MAX_LAYERS = 32 };

#define LAYERS_BYTES 0x1p30

typedef struct {
    int heads, kv_heads, D;
    gn_dtype kv_dtype;
} shape;

typedef struct {
    gn_ctx *ctx;
    int layers;
    gn_kv kv[MAX_LAYERS];
    gn_tensor q, k, v, y, cos, sin;
    gn_seqs seqs;
} problem;

/* Values in [-1, 1) over and over; codes and scales are made of the same bytes. */
static void *random_memory(gn_ctx *ctx, size_t bytes) {
    enum { N = 1 << 20 };
    static uint16_t piece[N];
    float *wide = malloc(N * sizeof *wide);
    char *memory = gn_ctx_alloc(ctx, bytes);
    if (!wide || !memory) check(GN_ENOMEM, NULL);
    for (int i = 0; i < N; i++) wide[i] = 2 * (float)rand() / (float)RAND_MAX - 1;
    gn_narrow(piece, GN_BF16, wide, N);
    free(wide);
    size_t done = (size_t)gn_min((int64_t)bytes, sizeof piece);
    check(gn_ctx_write(ctx, memory, piece, done), NULL);
    for (size_t n; done < bytes; done += n) {
        n = (size_t)gn_min((int64_t)done, (int64_t)(bytes - done));
        check(gn_ctx_copy(ctx, memory + done, memory, n), NULL);
    }
    return memory;
}

static gn_tensor blocks_of(char *memory, const shape *s, gn_dtype dtype, int blocks, int ndim,
                           int cols) {
    return (gn_tensor){memory,
                       dtype,
                       ndim,
                       {blocks, s->kv_heads, TOKENS, cols},
                       (int64_t)s->kv_heads * TOKENS * cols};
}

static gn_tensor rows_of(gn_ctx *ctx, int rows, int heads, int D) {
    const int64_t cols = (int64_t)heads * D;
    void *memory = random_memory(ctx, (size_t)(rows * cols) * gn_dtype_size(GN_BF16));
    return (gn_tensor){memory, GN_BF16, 3, {rows, heads, D, 1}, cols};
}

static gn_status attend(void *arg) {
    problem *p = arg;
    gn_status status = GN_OK;
    for (int i = 0; i < CALLS && !status; i++)
        status = gn_attention(p->ctx, &p->y, &p->q, &p->kv[i % p->layers], &p->seqs);
    return status;
}

static gn_status rotate(void *arg) {
    problem *p = arg;
    gn_status status = GN_OK;
    for (int i = 0; i < CALLS && !status; i++)
        status = gn_rope_store(p->ctx, &p->q, &p->k, &p->v, &p->cos, &p->sin, &p->seqs,
                               &p->kv[i % p->layers]);
    return status;
}

static double time_of(problem *p, gn_ctx_ops *fn) {
    static uint64_t key;
    double best = INFINITY;
    key++;
    for (int run = 0; run <= RUNS; run++) { /* the first one records */
        const double start = seconds();
        check(gn_ctx_replay(p->ctx, key, fn, p), NULL);
        check(gn_ctx_wait(p->ctx), NULL);
        if (run > 0) best = fmin(best, (seconds() - start) / CALLS);
    }
    return best;
}

static int length_of(int row, int rows, int context, bool mixed) {
    return mixed ? (int)(context * exp2(-3.0 * (row * 7 % rows) / rows)) : context;
}

static void bench(gn_ctx *ctx, const shape *s, int rows, int context, bool mixed,
                  double read_bytes) {
    const int max_blocks = (context + TOKENS - 1) / TOKENS, blocks = rows * max_blocks;
    const size_t cache_rows = (size_t)blocks * (size_t)s->kv_heads * TOKENS;
    const size_t cache = cache_rows * (size_t)s->D * gn_dtype_size(s->kv_dtype);
    const size_t scales = s->kv_dtype == GN_F8 ? cache_rows * sizeof(float) : 0;
    int32_t row0[MAX_ROWS + 1], pos0[MAX_ROWS], ids[MAX_ROWS] = {0};
    int32_t *table = malloc((size_t)blocks * sizeof *table);
    if (!table) check(GN_ENOMEM, NULL);
    for (int i = 0; i < blocks; i++) table[i] = i;
    for (int i = blocks - 1; i > 0; i--) {
        const int j = rand() % (i + 1);
        const int32_t swap = table[i];
        table[i] = table[j];
        table[j] = swap;
    }
    int64_t tokens = 0;
    for (int i = 0; i <= rows; i++) row0[i] = i;
    for (int i = 0; i < rows; i++) {
        pos0[i] = length_of(i, rows, context, mixed) - 1;
        tokens += pos0[i] + 1;
    }
    problem p = {.ctx = ctx,
                 .layers = (int)gn_max(
                     1, gn_min(MAX_LAYERS, (int64_t)(LAYERS_BYTES / (2.0 * (double)cache)))),
                 .q = rows_of(ctx, rows, s->heads, s->D),
                 .k = rows_of(ctx, rows, s->kv_heads, s->D),
                 .v = rows_of(ctx, rows, s->kv_heads, s->D),
                 .y = rows_of(ctx, rows, s->heads, s->D),
                 .seqs = {rows, max_blocks, row0, pos0, table}};
    char *memory = random_memory(ctx, 2 * (cache + scales) * (size_t)p.layers), *at = memory;
    for (int i = 0; i < p.layers; i++) {
        p.kv[i].k = blocks_of(at, s, s->kv_dtype, blocks, 4, s->D);
        p.kv[i].v = blocks_of(at + cache, s, s->kv_dtype, blocks, 4, s->D);
        at += 2 * cache;
        if (scales == 0) continue;
        p.kv[i].k_scales = blocks_of(at, s, GN_F32, blocks, 3, 1);
        p.kv[i].v_scales = blocks_of(at + scales, s, GN_F32, blocks, 3, 1);
        at += 2 * scales;
    }
    const size_t angles = (size_t)rows * (size_t)s->D / 2 * sizeof(float);
    p.cos = gn_tensor_2d(random_memory(ctx, angles), GN_F32, rows, s->D / 2);
    p.sin = gn_tensor_2d(random_memory(ctx, angles), GN_F32, rows, s->D / 2);
    const gn_stage_limits limits = {rows, rows, max_blocks, 1};
    check(gn_stage_reserve(ctx, &limits), NULL);
    check(gn_stage(ctx, ids, &p.seqs, NULL, 0), NULL);
    check(gn_ctx_reserve(ctx, gn_attention_workspace(ctx, context)), NULL);

    const double bytes =
        2.0 * (double)tokens * (double)(cache + scales) / ((double)blocks * TOKENS);
    const double taken = time_of(&p, attend), rope = time_of(&p, rotate);
    printf("%4d x %5d%s %2d/%2d x %3d %4s: %8.2f us %6.0f GB/s %4.0f %%; rope %6.2f us\n", rows,
           context, mixed ? " mixed" : "      ", s->heads, s->kv_heads, s->D,
           gn_dtype_name(s->kv_dtype), taken * 1e6, bytes / taken * 1e-9,
           100 * bytes / taken / read_bytes, rope * 1e6);
    fflush(stdout);
    void *const owned[] = {memory, p.q.data, p.k.data, p.v.data, p.y.data, p.cos.data, p.sin.data};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) gn_ctx_free(ctx, owned[i]);
    free(table);
}

int main(void) {
    static const shape shapes[] = {
        {32, 32, 128, GN_BF16}, {32, 8, 128, GN_BF16}, {32, 32, 128, GN_F8},  {32, 8, 128, GN_F8},
        {32, 4, 64, GN_BF16},   {32, 32, 80, GN_BF16}, {32, 32, 96, GN_BF16},
    };
    static const int rows[] = {16, 64, MAX_ROWS}, contexts[] = {128, 192, 256, 1024, 4096};
    gn_error err = {0};
    gn_rates rates;
    gn_ctx *ctx;
    const gn_ctx_options options = {.device = "cuda", .compute = GN_BF16};
    if (gn_ctx_open(&ctx, &options, &err) != GN_OK) {
        fprintf(stderr, "bench_attention: %s\n", err.message);
        return 1;
    }
    check(gn_measure_rates(ctx, &rates), NULL);
    printf("%s, reads at %.0f GB/s\n", gn_ctx_device(ctx), rates.read_bytes * 1e-9);
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
            for (size_t c = 0; c < sizeof contexts / sizeof *contexts; c++)
                for (int mixed = 0; mixed <= (contexts[c] >= 1024); mixed++)
                    bench(ctx, &shapes[s], rows[r], contexts[c], mixed, rates.read_bytes);
    gn_ctx_close(ctx);
    return 0;
}
