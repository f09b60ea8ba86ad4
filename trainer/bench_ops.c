/* bench_ops.c - the products of a layer, one by one, and quantizing.
 *
 * Each call goes on to the next layer's weights, so that they come from memory as they do in a
 * forward pass, and not from a cache. A call on a GPU takes less time than its launch, so there
 * calls run in trains: recorded once, repeated back to back, and waited for at the end. */
#include <stdio.h>
#include <stdlib.h>

#include "kernels/ops.h"
#include "trainer/bench.h"

enum { MIN_SAMPLES = 9, MAX_SAMPLES = 200, TRAIN = 128, MAX_REPEATS = 1000 };
static const double MIN_SECONDS = 0.3, SAMPLE_SECONDS = 0.02;
static const int cpu_rows[] = {1, 4, 16, 128};
static const int gpu_rows[] = {1, 4, 8, 16, 32, 64, 128, 256, 512, 2048};

/* A product as the forward pass asks for it: parts are neighbours in gn_proj. */
typedef struct op {
    const char *name;
    gn_proj first;
    int n_parts;
    bool normed;
    gn_epilogue epilogue;
} op;

static const op ops[] = {{"qkv", GN_Q, 3, true, GN_STORE},
                         {"o", GN_O, 1, false, GN_ADD},
                         {"gate+up", GN_GATE, 2, true, GN_SWIGLU},
                         {"down", GN_DOWN, 1, false, GN_ADD},
                         {"gate", GN_GATE, 1, false, GN_STORE}}; /* a product and nothing else */
enum { N_OPS = sizeof ops / sizeof *ops };

/* What the products read and write, on the device. */
typedef struct buffers {
    void *normed; /* (rows, columns) f32: what a norm reads */
    void *x;      /* the same as an activation */
    void *y;      /* (rows, columns of all parts), of f32 or less */
} buffers;

typedef struct train {
    const gn_bench *bench;
    const op *op;
    const buffers *at;
    int rows, calls; /* rows of a call; calls of one run */
    int layer;       /* whose turn it is */
} train;

static int64_t columns_of(const gn_config *c, const op *o) {
    int64_t n = 0;
    for (int i = 0; i < o->n_parts; i++) n += gn_proj_rows(c, o->first + i);
    return n;
}

static gn_status run_op(const train *t) {
    const gn_model *m = t->bench->model;
    const gn_layer *layer = &m->layers[t->layer];
    const op *o = t->op;
    const gn_dtype activation = gn_ctx_activation(m->ctx);
    const gn_dtype to = o->epilogue == GN_ADD ? GN_F32 : activation;
    gn_linear_args args = {.norm = o->normed ? &layer->attn_norm : NULL,
                           .eps = m->config.rms_eps,
                           .epilogue = o->epilogue,
                           .n_parts = o->n_parts};
    args.x = gn_tensor_2d(o->normed ? t->at->normed : t->at->x, o->normed ? GN_F32 : activation,
                          t->rows, layer->proj[o->first].cols);
    char *y = t->at->y;
    for (int i = 0; i < o->n_parts; i++) {
        const gn_matrix *w = &layer->proj[o->first + i];
        args.part[i].w = w;
        args.part[i].y = gn_tensor_2d(y, to, t->rows, w->rows);
        y += (size_t)t->rows * (size_t)w->rows * gn_dtype_size(to);
    }
    return gn_linear(m->ctx, &args);
}

static gn_status run_train(void *arg) {
    train *t = arg;
    gn_status status = GN_OK;
    for (int i = 0; !status && i < t->calls; i++) {
        status = run_op(t);
        t->layer = (t->layer + 1) % t->bench->model->config.layers;
    }
    return status;
}

/* Runs it `repeats` times; *seconds is what one call took of that. */
static gn_status time_trains(train *t, int repeats, double *seconds) {
    gn_ctx *ctx = t->bench->model->ctx;
    const uint64_t key = (uint64_t)(t->op - ops) << 32 | (uint64_t)t->rows;
    const double begin = gn_seconds();
    gn_status status = GN_OK;
    for (int i = 0; !status && i < repeats; i++) status = gn_ctx_replay(ctx, key, run_train, t);
    if (!status) status = gn_ctx_wait(ctx);
    *seconds = (gn_seconds() - begin) / repeats / t->calls;
    return status;
}

static int within(double wanted, int most) {
    return wanted > most ? most : wanted > 1 ? (int)wanted : 1;
}

/* How many calls make a train, and how many trains a sample. A second call tells how long one
 * takes: the first has preparations to make, which may not be recorded. */
static gn_status plan(train *t, int *repeats) {
    gn_ctx *ctx = t->bench->model->ctx;
    double call = 0;
    gn_status status = GN_OK;
    t->calls = *repeats = 1;
    for (int i = 0; !status && i < 2; i++) {
        const double begin = gn_seconds();
        status = run_train(t);
        if (!status) status = gn_ctx_wait(ctx);
        call = gn_seconds() - begin;
    }
    if (status || gn_ctx_is_host(ctx)) return status;
    t->calls = within(SAMPLE_SECONDS / call, TRAIN);
    *repeats = within(SAMPLE_SECONDS / call / t->calls, MAX_REPEATS);
    double recording;
    return time_trains(t, 1, &recording);
}

/* The median of samples that are each long enough for the launches not to count. */
static gn_status time_op(train *t, double *seconds) {
    double times[MAX_SAMPLES], total = 0;
    int repeats, n = 0;
    gn_status status = plan(t, &repeats);
    while (!status && n < MAX_SAMPLES && (n < MIN_SAMPLES || total < MIN_SECONDS)) {
        status = time_trains(t, repeats, &times[n]);
        total += times[n++] * repeats * t->calls;
    }
    if (!status) *seconds = gn_median(times, n);
    return status;
}

/* ---- reports ---- */

typedef struct result {
    const char *op;
    int64_t n, k;
    int rows; /* 0: it has none */
    double seconds, bytes, flop, floor;
} result;

static gn_status report(const gn_bench *b, const result *r) {
    if (!b->json) {
        char rows[24] = "";
        if (r->rows) snprintf(rows, sizeof rows, "%d row%s", r->rows, r->rows == 1 ? "" : "s");
        printf("%-10s %5lldx%-5lld %9s  %9.1f us  %7.1f GB/s", r->op, (long long)r->n,
               (long long)r->k, rows, 1e6 * r->seconds, 1e-9 * r->bytes / r->seconds);
        if (r->flop > 0) printf("  %8.3f TFLOP/s", 1e-12 * r->flop / r->seconds);
        printf("  floor %9.1f us  %3.0f %%\n", 1e6 * r->floor, 100 * r->floor / r->seconds);
        fflush(stdout);
        return GN_OK;
    }
    cJSON *line = gn_bench_line(b);
    cJSON_AddStringToObject(line, "op", r->op);
    cJSON_AddNumberToObject(line, "n", (double)r->n);
    cJSON_AddNumberToObject(line, "k", (double)r->k);
    if (r->rows) cJSON_AddNumberToObject(line, "rows", r->rows);
    cJSON_AddNumberToObject(line, "us", 1e6 * r->seconds);
    cJSON_AddNumberToObject(line, "gb_s", 1e-9 * r->bytes / r->seconds);
    if (r->flop > 0) cJSON_AddNumberToObject(line, "tflop_s", 1e-12 * r->flop / r->seconds);
    cJSON_AddNumberToObject(line, "floor", 1e6 * r->floor);
    cJSON_AddNumberToObject(line, "ratio", r->floor / r->seconds);
    cJSON_AddNumberToObject(line, "peak_bytes", b->peak_bytes);
    return gn_print_json_take(line, b->err);
}

static gn_status bench_product(gn_bench *b, const op *o, const buffers *at, int rows) {
    const gn_config *c = &b->model->config;
    train t = {.bench = b, .op = o, .at = at, .rows = rows};
    result r = {.op = o->name, .n = columns_of(c, o), .k = gn_proj_cols(c, o->first), .rows = rows};
    const gn_status status = time_op(&t, &r.seconds);
    if (status)
        return gn_fail(b->err, status, "%s, %d rows: %s", o->name, rows, gn_status_text(status));
    gn_round_end(b);
    for (int i = 0; i < o->n_parts; i++)
        r.bytes += (double)gn_matrix_bytes(&b->model->layers[0].proj[o->first + i]);
    r.flop = 2.0 * rows * (double)r.n * (double)r.k;
    r.floor = gn_bench_floor(b, r.bytes, r.flop);
    return report(b, &r);
}

/* What a weight of the model takes, from 16 bits to its type; GB/s of bfloat16 in. */
static gn_status bench_quantize(gn_bench *b) {
    const gn_matrix *w = &b->model->layers[0].proj[GN_GATE];
    if (w->qtype == GN_Q_NONE) return GN_OK;
    result r = {.op = "quantize", .n = w->rows, .k = w->cols};
    double dequantize;
    const gn_status status = gn_measure_quantize(b->model->ctx, w->qtype, w->absmax_u8 != NULL,
                                                 w->rows, w->cols, &r.seconds, &dequantize);
    if (status) return gn_fail(b->err, status, "quantizing: %s", gn_status_text(status));
    r.bytes = 2.0 * (double)w->rows * (double)w->cols;
    r.floor = (r.bytes + (double)gn_matrix_bytes(w)) / b->rates.copy_bytes;
    const gn_status reported = report(b, &r);
    if (reported || dequantize == 0) return reported;
    r.op = "dequantize";
    r.seconds = dequantize;
    return report(b, &r); /* the same bytes, the other way */
}

/* ---- the command ---- */

/* Values that every dtype holds exactly; y begins as zeros. */
static gn_status fill(gn_ctx *ctx, const buffers *at, int64_t n_x, int64_t n_y) {
    const gn_dtype activation = gn_ctx_activation(ctx);
    float *values = calloc((size_t)(n_x > n_y ? n_x : n_y), sizeof *values);
    void *narrow = malloc((size_t)n_x * gn_dtype_size(activation));
    gn_status status = values && narrow ? GN_OK : GN_ENOMEM;
    if (!status) status = gn_ctx_write(ctx, at->y, values, (size_t)n_y * sizeof *values);
    if (!status) {
        for (int64_t i = 0; i < n_x; i++) values[i] = (float)(i % 255 - 127) / 128.0f;
        gn_narrow(narrow, activation, values, n_x);
        status = gn_ctx_write(ctx, at->normed, values, (size_t)n_x * sizeof *values);
    }
    if (!status) status = gn_ctx_write(ctx, at->x, narrow, (size_t)n_x * gn_dtype_size(activation));
    free(values);
    free(narrow);
    return status;
}

static gn_status prepare(gn_ctx *ctx, const gn_config *c, int rows, buffers *at) {
    int64_t widest = 0, tallest = 0; /* a product's columns; its rows in all parts */
    for (int i = 0; i < N_OPS; i++) {
        if (columns_of(c, &ops[i]) > tallest) tallest = columns_of(c, &ops[i]);
        if (gn_proj_cols(c, ops[i].first) > widest) widest = gn_proj_cols(c, ops[i].first);
    }
    const int64_t n_x = rows * widest, n_y = rows * tallest;
    at->normed = gn_ctx_alloc(ctx, (size_t)n_x * sizeof(float));
    at->x = gn_ctx_alloc(ctx, (size_t)n_x * sizeof(float));
    at->y = gn_ctx_alloc(ctx, (size_t)n_y * sizeof(float));
    if (!at->normed || !at->x || !at->y) return GN_ENOMEM;
    const gn_status status =
        gn_ctx_reserve(ctx, gn_linear_workspace(ctx, rows, widest, tallest, 0, 0));
    return status ? status : fill(ctx, at, n_x, n_y);
}

/* An op for all numbers of rows, between measurements of what the device can do. */
static gn_status bench_rows(gn_bench *b, const op *o, const buffers *at, const int *rows, int n) {
    gn_status status = gn_round_begin(b);
    if (!status && o == ops) gn_bench_heading(b);
    for (int i = 0; !status && i < n; i++) status = bench_product(b, o, at, rows[i]);
    return status;
}

gn_status gn_bench_ops(gn_bench *b) {
    gn_ctx *ctx = b->model->ctx;
    const bool is_host = gn_ctx_is_host(ctx);
    const int *rows = is_host ? cpu_rows : gpu_rows;
    const int n = (int)(is_host ? sizeof cpu_rows : sizeof gpu_rows) / (int)sizeof *rows;
    buffers at = {0};
    gn_status status = prepare(ctx, &b->model->config, rows[n - 1], &at);
    if (status) gn_fail(b->err, status, "the activations: %s", gn_status_text(status));
    for (int i = 0; !status && i < N_OPS; i++) status = bench_rows(b, &ops[i], &at, rows, n);
    gn_ctx_free(ctx, at.normed);
    gn_ctx_free(ctx, at.x);
    gn_ctx_free(ctx, at.y);
    return status ? status : bench_quantize(b);
}
