/* bench_train.c - QLoRA updates of random tokens: forward, backward and paged AdamW, with LoRA on
 * all projections, memory divided as `train` divides it. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "trainer/bench.h"
#include "trainer/train_memory.h"

enum { ROUNDS = 5, PER_PAIR = 2 };
static const double LEARNING_RATE = 1e-4;

/* A training run, as much of one as a benchmark needs. */
typedef struct run {
    gn_bench *bench;
    gn_model *model;
    gn_train_wanted wanted;
    gn_train_memory plan;
    gn_parameter *items;
    size_t *groups;
    gn_page_device *devices[2]; /* of gradients' pages, and of the optimizer's */
    gn_parameters *parameters;
    gn_optimizer *optimizer;
    gn_train_step *step;
    gn_lora_pair *pairs, *grads;
    void *placed; /* pairs, where the device reads them */
    gn_trained trained;
    int32_t *ids, *row0, *pos0;
} run;

static size_t count_pairs(const run *r) {
    return (size_t)r->model->config.layers * GN_PROJ_COUNT;
}

/* ---- what is trained ---- */

static gn_status want(run *r) {
    const gn_bench *b = r->bench;
    const size_t layers = (size_t)r->model->config.layers, n = PER_PAIR * count_pairs(r);
    r->items = calloc(n, sizeof *r->items);
    r->groups = calloc(layers, sizeof *r->groups);
    r->pairs = calloc(count_pairs(r), sizeof *r->pairs);
    r->grads = calloc(count_pairs(r), sizeof *r->grads);
    if (!r->items || !r->groups || !r->pairs || !r->grads)
        return gn_fail(b->err, GN_ENOMEM, "out of memory");
    for (size_t i = 0; i < count_pairs(r); i++) {
        const gn_matrix *w = &r->model->layers[i / GN_PROJ_COUNT].proj[i % GN_PROJ_COUNT];
        r->items[2 * i] = (gn_parameter){.name = "A", .ndim = 2, .shape = {b->rank, w->cols}};
        r->items[2 * i + 1] = (gn_parameter){.name = "B", .ndim = 2, .shape = {w->rows, b->rank}};
    }
    for (size_t i = 0; i < layers; i++) r->groups[i] = i * PER_PAIR * GN_PROJ_COUNT;
    r->wanted = (gn_train_wanted){.limits = {.max_rows = b->streams * b->prompt,
                                             .max_seqs = b->streams,
                                             .context = b->prompt,
                                             .max_rank = b->rank},
                                  .items = r->items,
                                  .n_items = n,
                                  .groups = r->groups,
                                  .n_groups = layers,
                                  .weights = GN_BF16,
                                  .grads = GN_F32,
                                  .optimizer = {.beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f},
                                  .paged = true,
                                  .accumulation = 1};
    return gn_train_memory_plan(&r->plan, r->model, &r->wanted, b->memory, b->err);
}

static void find_grads(run *r, int layer) {
    const size_t first = (size_t)layer * GN_PROJ_COUNT;
    for (size_t i = first; i < first + GN_PROJ_COUNT; i++) {
        r->grads[i].a = gn_parameter_grad(r->parameters, PER_PAIR * i);
        r->grads[i].b = gn_parameter_grad(r->parameters, PER_PAIR * i + 1);
    }
}

static gn_status begin_layer(void *user, int layer) {
    run *r = user;
    gn_status status = gn_grads_acquire(r->parameters, (size_t)layer);
    if (!status && layer > 0) status = gn_grads_prefetch(r->parameters, (size_t)layer - 1);
    if (!status) find_grads(r, layer);
    return status;
}

static gn_status end_layer(void *user, int layer) {
    return gn_grads_release(((run *)user)->parameters, (size_t)layer, true);
}

/* Any values will do, B's too: zeros would be as fast, but measure nothing. */
static gn_status set_weights(run *r) {
    gn_status status = GN_OK;
    for (size_t i = 0; i < r->parameters->n && !status; i++) {
        const int64_t n = r->parameters->items[i].numel;
        float *values = malloc((size_t)n * sizeof *values);
        if (!values) return GN_ENOMEM;
        for (int64_t j = 0; j < n; j++) values[j] = 0.01f * sinf((float)(j % 1009 + (int64_t)i));
        status = gn_optimizer_set(r->optimizer, GN_STATE_MASTER, i, values);
        free(values);
    }
    return status;
}

static gn_status bind(run *r) {
    gn_ctx *ctx = r->model->ctx;
    const size_t bytes = count_pairs(r) * sizeof *r->pairs;
    for (size_t i = 0; i < count_pairs(r); i++)
        r->pairs[i] = (gn_lora_pair){.rank = r->bench->rank,
                                     .scale = 0.25f,
                                     .a = gn_parameter_weight(r->parameters, PER_PAIR * i),
                                     .b = gn_parameter_weight(r->parameters, PER_PAIR * i + 1)};
    r->placed = gn_ctx_alloc(ctx, bytes);
    if (!r->placed) return GN_ENOMEM;
    r->trained = (gn_trained){.pairs = r->pairs,
                              .placed = r->placed,
                              .grads = r->grads,
                              .dropout = r->bench->dropout,
                              .lodger = gn_optimizer_pages(r->optimizer)};
    if (r->plan.grads_travel) {
        r->trained.begin_layer = begin_layer;
        r->trained.end_layer = end_layer;
        r->trained.user = r;
    } else {
        for (int i = 0; i < r->model->config.layers; i++) find_grads(r, i);
    }
    return gn_ctx_write(ctx, r->placed, r->pairs, bytes);
}

/* ---- open and close ---- */

static gn_status open_trained(run *r) {
    const gn_train_wanted *w = &r->wanted;
    const gn_grad_options paged = {r->groups, w->n_groups, r->plan.grad_budget, r->devices[0]};
    gn_optimizer_options options = w->optimizer;
    options.budget = r->plan.optimizer_budget;
    gn_status status =
        gn_parameters_open_paged(&r->parameters, r->model->ctx, w->items, w->n_items, w->weights,
                                 w->grads, r->plan.grads_travel ? &paged : NULL, r->bench->err);
    if (!status)
        status =
            gn_optimizer_open(&r->optimizer, r->parameters, &options, r->devices[1], r->bench->err);
    if (status) return status;
    status = set_weights(r);
    if (!status) status = bind(r);
    return status ? gn_fail(r->bench->err, status, "LoRA weights: %s", gn_status_text(status))
                  : GN_OK;
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
    gn_status status = want(r);
    for (int i = 0; i < 2 && !status; i++) {
        status = gn_page_device_open(&r->devices[i], r->model->ctx);
        if (status) gn_fail(r->bench->err, status, "pages: %s", gn_status_text(status));
    }
    if (!status) status = open_trained(r);
    if (!status) status = open_batch(r);
    if (status) return status;
    gn_train_limits limits = r->wanted.limits;
    for (int i = 0; i < GN_KEEP_COUNT; i++) limits.keep[i] = r->plan.keep[i];
    return gn_train_step_open(&r->step, r->model, &limits, r->bench->err);
}

static void close_run(run *r) {
    gn_train_step_close(r->step);
    gn_optimizer_close(r->optimizer);
    gn_parameters_close(r->parameters);
    for (int i = 0; i < 2; i++) gn_page_device_close(r->devices[i]);
    gn_ctx_free(r->model->ctx, r->placed);
    free(r->items);
    free(r->groups);
    free(r->pairs);
    free(r->grads);
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
    gn_status status = gn_grads_clear(r->parameters);
    if (!status) status = gn_train_step_run(r->step, &batch, &r->trained, &loss);
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
    for (size_t i = 0; i < count_pairs(r); i++) {
        const gn_matrix *w = &r->model->layers[i / GN_PROJ_COUNT].proj[i % GN_PROJ_COUNT];
        weights += 2.0 * (double)w->rows * (double)w->cols;
        lora += 2.0 * r->bench->rank * (double)(w->rows + w->cols);
    }
    const double head = 2.0 * c->vocab * c->hidden;
    const double attention = 2.0 * c->layers * c->heads * c->head_dim * r->bench->prompt;
    return rows *
           (weights * (again + 1) + lora * (again + 2) + attention * (again + 2.5) + head * 2);
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
    if (!status) status = report(&r, seconds);
    close_run(&r);
    return status;
}
