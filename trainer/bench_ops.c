/* bench_ops.c - the products of a layer, one by one.
 *
 * Each repetition goes on to the next layer's weights, so that they come from memory as they do
 * in a forward pass, and not from a cache. */
#include <stdio.h>
#include <stdlib.h>

#include "kernels/ops.h"
#include "trainer/bench.h"

enum { MIN_REPEATS = 9, MAX_REPEATS = 200 };
static const double MIN_SECONDS = 0.5;
static const int row_counts[] = {1, 4, 16, 128};

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
                         {"down", GN_DOWN, 1, false, GN_ADD}};

static gn_status run_op(const gn_bench *b, const op *o, int layer, int rows, float *x, float *y) {
    const gn_layer *weights = &b->model->layers[layer];
    gn_linear_args args = {.norm = o->normed ? &weights->attn_norm : NULL,
                           .eps = b->model->config.rms_eps,
                           .epilogue = o->epilogue,
                           .n_parts = o->n_parts};
    for (int i = 0; i < o->n_parts; i++) {
        const gn_matrix *w = &weights->proj[o->first + i];
        args.x = gn_tensor_2d(x, GN_F32, rows, w->cols);
        args.part[i].w = w;
        args.part[i].y = gn_tensor_2d(y, GN_F32, rows, w->rows);
        y += (size_t)rows * (size_t)w->rows;
    }
    return gn_linear(b->model->ctx, &args);
}

static gn_status report(const gn_bench *b, const op *o, int rows, double seconds) {
    double bytes = 0, flop = 0;
    for (int i = 0; i < o->n_parts; i++) {
        const gn_matrix *w = &b->model->layers[0].proj[o->first + i];
        bytes += (double)gn_matrix_bytes(w);
        flop += 2.0 * rows * (double)w->rows * (double)w->cols;
    }
    const double floor = gn_bench_floor(b, bytes, flop);
    if (!b->json) {
        printf("%-8s %4d rows  %9.1f us  %6.1f GB/s  floor %9.1f us  %3.0f %%\n", o->name, rows,
               1e6 * seconds, 1e-9 * bytes / seconds, 1e6 * floor, 100 * floor / seconds);
        fflush(stdout);
        return GN_OK;
    }
    cJSON *line = gn_bench_line(b);
    cJSON_AddStringToObject(line, "op", o->name);
    cJSON_AddNumberToObject(line, "rows", rows);
    cJSON_AddNumberToObject(line, "us", 1e6 * seconds);
    cJSON_AddNumberToObject(line, "gb_s", 1e-9 * bytes / seconds);
    cJSON_AddNumberToObject(line, "floor", 1e6 * floor);
    cJSON_AddNumberToObject(line, "ratio", floor / seconds);
    cJSON_AddNumberToObject(line, "peak_bytes", b->peak_bytes);
    return gn_print_json_take(line, b->err);
}

static gn_status time_op(gn_bench *b, const op *o, int rows, float *x, float *y) {
    double times[MAX_REPEATS], total = 0;
    int n = 0;
    gn_status status = gn_round_begin(b);
    for (int i = -2; !status && (i < MIN_REPEATS || (total < MIN_SECONDS && i < MAX_REPEATS));
         i++) {
        const double begin = gn_seconds();
        status = run_op(b, o, (i + 2) % b->model->config.layers, rows, x, y);
        if (status)
            gn_fail(b->err, status, "%s, %d rows: %s", o->name, rows, gn_status_text(status));
        if (i < 0) continue; /* warm-up */
        times[n] = gn_seconds() - begin;
        total += times[n++];
    }
    gn_round_end(b);
    return status ? status : report(b, o, rows, gn_median(times, n));
}

gn_status gn_bench_ops(gn_bench *b) {
    const gn_config *c = &b->model->config;
    const int max_rows = row_counts[sizeof row_counts / sizeof *row_counts - 1];
    int64_t widest = 0, tallest = 0; /* a product's columns; its rows in all parts */
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++) {
        int64_t rows = 0;
        for (int p = 0; p < ops[i].n_parts; p++) rows += gn_proj_rows(c, ops[i].first + p);
        if (rows > tallest) tallest = rows;
        if (gn_proj_cols(c, ops[i].first) > widest) widest = gn_proj_cols(c, ops[i].first);
    }
    gn_ctx *ctx = b->model->ctx;
    gn_status status =
        gn_ctx_reserve(ctx, gn_linear_workspace(ctx, max_rows, widest, tallest, 0, 0));
    float *x = calloc((size_t)max_rows * (size_t)widest, sizeof *x);
    float *y = calloc((size_t)max_rows * (size_t)tallest, sizeof *y);
    if (status || !x || !y) status = gn_fail(b->err, GN_ENOMEM, "no memory for the activations");
    for (int64_t i = 0; !status && i < max_rows * widest; i++)
        x[i] = (float)(i % 255 - 127) / 128.0f;
    for (size_t i = 0; !status && i < sizeof ops / sizeof *ops; i++)
        for (size_t r = 0; !status && r < sizeof row_counts / sizeof *row_counts; r++)
            status = time_op(b, &ops[i], row_counts[r], x, y);
    free(x);
    free(y);
    return status;
}
