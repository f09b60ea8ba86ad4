/* bench_train.c - QLoRA updates of random tokens: forward, backward and paged AdamW, with LoRA on
 * all projections, memory divided as `train` divides it. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "trainer/bench.h"
#include "trainer/trainable.h"

enum { ROUNDS = 5 };
static const double LEARNING_RATE = 1e-4, SCALE = 0.25;

/* A training run, as much of one as a benchmark needs. */
typedef struct run {
    gn_bench *bench;
    gn_model *model;
    gn_trainable *trainable;
    gn_train_limits limits;
    gn_optimizer_options options;
    gn_train_memory plan;
    gn_page_device *device; /* of the optimizer's pages */
    gn_optimizer *optimizer;
    gn_train_step *step;
    int32_t *ids, *row0, *pos0;
} run;

/* ---- open and close ---- */

static gn_status plan_memory(run *r) {
    const gn_bench *b = r->bench;
    r->limits = (gn_train_limits){.max_rows = b->streams * b->prompt,
                                  .max_seqs = b->streams,
                                  .context = b->prompt,
                                  .max_rank = b->rank};
    r->options = (gn_optimizer_options){.beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f};
    gn_train_wanted wanted = {.limits = r->limits,
                              .weights = gn_ctx_activation(r->model->ctx),
                              .grads = GN_F32,
                              .optimizer = r->options,
                              .paged = true,
                              .accumulation = 1};
    wanted.items = gn_trainable_items(r->trainable, &wanted.n_items);
    wanted.groups = gn_trainable_groups(r->trainable, &wanted.n_groups);
    const gn_status status = gn_train_memory_plan(&r->plan, r->model, &wanted, b->memory, b->err);
    if (status) return status;
    memcpy(r->limits.keep, r->plan.keep, sizeof r->limits.keep);
    r->options.budget = r->plan.optimizer_budget;
    return GN_OK;
}

/* Any values will do, B's too: zeros would be as fast, but measure nothing. */
static gn_status set_weights(const run *r) {
    const gn_parameters *p = gn_trainable_parameters(r->trainable);
    gn_status status = GN_OK;
    for (size_t i = 0; i < p->n && !status; i++) {
        const int64_t n = p->items[i].numel;
        float *values = malloc((size_t)n * sizeof *values);
        if (!values) return GN_ENOMEM;
        for (int64_t j = 0; j < n; j++) values[j] = 0.01f * sinf((float)(j % 1009 + (int64_t)i));
        status = gn_optimizer_set(r->optimizer, GN_STATE_MASTER, i, values);
        free(values);
    }
    return status;
}

static gn_status open_optimizer(run *r) {
    gn_error *err = r->bench->err;
    gn_status status = gn_page_device_open(&r->device, r->model->ctx);
    if (status) return gn_fail(err, status, "pages: %s", gn_status_text(status));
    status = gn_optimizer_open(&r->optimizer, gn_trainable_parameters(r->trainable), &r->options,
                               r->device, err);
    if (status) return status;
    gn_trainable_lodge(r->trainable, gn_optimizer_pages(r->optimizer));
    status = set_weights(r);
    return status ? gn_fail(err, status, "LoRA weights: %s", gn_status_text(status)) : GN_OK;
}

static gn_status open_batch(run *r) {
    const gn_bench *b = r->bench;
    const size_t rows = (size_t)b->streams * (size_t)b->prompt, n = (size_t)b->streams;
    r->ids = malloc(rows * sizeof *r->ids);
    r->row0 = malloc((n + 1) * sizeof *r->row0);
    r->pos0 = calloc(n, sizeof *r->pos0);
    if (!r->ids || !r->row0 || !r->pos0) return gn_fail(b->err, GN_ENOMEM, "out of memory");
    for (size_t i = 0; i <= n; i++) r->row0[i] = (int32_t)i * b->prompt;
    return GN_OK;
}

static gn_status open_run(run *r) {
    const gn_bench *b = r->bench;
    const gn_lora_options lora = {
        .rank = b->rank, .alpha = SCALE * b->rank, .dropout = (double)b->dropout, .modules = "all"};
    gn_status status = gn_trainable_open_over(&r->trainable, r->model, &lora, b->err);
    if (!status) status = plan_memory(r);
    if (!status) status = gn_trainable_allocate(r->trainable, &r->plan, b->err);
    if (!status) status = open_optimizer(r);
    if (!status) status = open_batch(r);
    if (!status) status = gn_train_step_open(&r->step, r->model, &r->limits, b->err);
    return status;
}

static void close_run(run *r) {
    gn_train_step_close(r->step);
    gn_optimizer_close(r->optimizer);
    gn_page_device_close(r->device);
    gn_trainable_close(r->trainable);
    free(r->ids);
    free(r->row0);
    free(r->pos0);
}

/* ---- measuring ---- */

static gn_status update(run *r, int number) {
    const gn_bench *b = r->bench;
    const int rows = b->streams * b->prompt;
    gn_bench_prompt(r->ids, rows, r->model->config.vocab, (uint32_t)number + 1);
    gn_train_batch batch = {.rows = rows,
                            .ids = r->ids,
                            .labels = r->ids,
                            .seqs = {.n = b->streams, .row0 = r->row0, .pos0 = r->pos0},
                            .number = (uint32_t)number,
                            .is_last = true};
    batch.scale = 1.0f / (float)gn_train_count(&batch);
    double loss, norm;
    gn_status status = gn_grads_clear(gn_trainable_parameters(r->trainable));
    if (!status)
        status = gn_train_step_run(r->step, &batch, gn_trainable_views(r->trainable), &loss);
    if (!status) status = gn_optimizer_prefetch(r->optimizer);
    if (!status) status = gn_optimizer_grad_norm(r->optimizer, &norm);
    if (!status) status = gn_optimizer_step(r->optimizer, LEARNING_RATE, gn_clip_scale(norm, 0.3));
    if (!status) status = gn_ctx_wait(r->model->ctx);
    if (!status && !isfinite(loss)) status = GN_EINVAL;
    return status ? gn_fail(b->err, status, "an update: %s", gn_status_text(status)) : GN_OK;
}

static gn_status measure(run *r, double *seconds) {
    gn_bench *b = r->bench;
    double rounds[ROUNDS];
    for (int round = -1; round < ROUNDS; round++) { /* -1 warms up */
        gn_progress("%s: update %d of %d", b->kind, round + 1, ROUNDS);
        gn_status status = gn_round_begin(b);
        const double begin = gn_seconds();
        if (!status) status = update(r, round + 1);
        if (round >= 0) rounds[round] = gn_seconds() - begin;
        gn_round_end(b);
        if (status) return status;
    }
    *seconds = gn_median(rounds, ROUNDS);
    return GN_OK;
}

/* Operations of an update. A weight's product counts once forward, once for what is computed again
 * and once backward; of LoRA's two products each has two more backward; attention's backward has
 * five products for the two of its forward pass. lm_head's are logits and dx. */
static double flop_of(const run *r) {
    const gn_config *c = &r->model->config;
    const double rows = (double)r->bench->streams * r->bench->prompt;
    const double again = 1 + r->plan.recomputed;
    double weights = 0, lora = 0;
    for (int i = 0; i < c->layers * GN_PROJ_COUNT; i++) {
        const gn_matrix *w = &r->model->layers[i / GN_PROJ_COUNT].proj[i % GN_PROJ_COUNT];
        weights += 2.0 * (double)w->rows * (double)w->cols;
        lora += 2.0 * r->bench->rank * (double)(w->rows + w->cols);
    }
    const double head = 2.0 * c->vocab * c->hidden;
    const double attention = 2.0 * c->layers * c->heads * c->head_dim * r->bench->prompt;
    return rows *
           (weights * (again + 1) + lora * (again + 2) + attention * (again + 2.5) + head * 2);
}

/* The plan beside what was found. */
static gn_status show_memory(const run *r) {
    gn_train_measured found;
    if (gn_ctx_is_host(r->model->ctx)) return GN_OK;
    const gn_status status = gn_train_memory_measure(
        &found, &r->plan, r->model, gn_trainable_parameters(r->trainable), r->optimizer);
    if (status) return gn_fail(r->bench->err, status, "memory: %s", gn_status_text(status));
    char *text = gn_train_memory_text(&r->plan, &found);
    if (text) fputs(text, stderr);
    free(text);
    return GN_OK;
}

static gn_status report(const run *r, double seconds) {
    const gn_bench *b = r->bench;
    const double rows = (double)b->streams * b->prompt, tok_s = rows / seconds;
    const double floor = rows / gn_bench_floor(b, 0, flop_of(r));
    if (!b->json) {
        gn_bench_heading(b);
        printf("  %d x %d tokens, LoRA of rank %d, dropout %g; %.0f %% of the forward pass is "
               "computed again; peak memory %.2f GiB\n",
               b->streams, b->prompt, b->rank, (double)b->dropout, 100 * r->plan.recomputed,
               b->peak_bytes / 0x1p30);
        printf("  %.1f tok/s; the floor is %.1f (%.0f %% of it reached)\n", tok_s, floor,
               100 * tok_s / floor);
        return GN_OK;
    }
    cJSON *line = gn_bench_line(b);
    cJSON_AddNumberToObject(line, "batch", b->streams);
    cJSON_AddNumberToObject(line, "length", b->prompt);
    cJSON_AddNumberToObject(line, "rank", b->rank);
    cJSON_AddNumberToObject(line, "dropout", (double)b->dropout);
    cJSON_AddNumberToObject(line, "recomputed", r->plan.recomputed);
    cJSON_AddNumberToObject(line, "tok_s", tok_s);
    cJSON_AddNumberToObject(line, "floor", floor);
    cJSON_AddNumberToObject(line, "ratio", tok_s / floor);
    cJSON_AddNumberToObject(line, "peak_bytes", b->peak_bytes);
    cJSON_AddNumberToObject(line, "planned_bytes", (double)gn_train_memory_sum(&r->plan));
    return gn_print_json_take(line, b->err);
}

gn_status gn_bench_train(gn_bench *b) {
    run r = {.bench = b, .model = b->model};
    double seconds;
    gn_config *config = &b->model->config;
    if (!b->model->tokenizer && config->max_positions < b->prompt)
        config->max_positions = b->prompt; /* random weights know no longest context */
    gn_status status = open_run(&r);
    if (!status) status = measure(&r, &seconds);
    gn_progress("%s", "");
    if (!status) status = show_memory(&r);
    if (!status) status = report(&r, seconds);
    close_run(&r);
    return status;
}
