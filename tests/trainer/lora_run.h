/* lora_run.h - for tests: a model whose projections all have LoRA pairs that are trained, with
 * gradients in one array or in pages. */
#ifndef GN_TEST_LORA_RUN_H
#define GN_TEST_LORA_RUN_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "trainer/gradients.h"
#include "trainer/optimizer.h"
#include "trainer/step.h"
#include "trainer/train_memory.h"

enum { PER_LAYER = 2 * GN_PROJ_COUNT };

/* For tests and benchmarks alike. */
static inline void must(gn_status status, const gn_error *err) {
    if (status == GN_OK) return;
    fprintf(stderr, "%s\n", err && err->message[0] ? err->message : gn_status_text(status));
    abort();
}

typedef struct lora_run {
    gn_model *model; /* borrowed */
    gn_parameters *p;
    gn_optimizer *o;
    gn_train_step *step;
    gn_lora_pair *pairs, *grads;
    void *placed; /* pairs, where the device reads them */
    gn_trained trained;
    double loss;
} lora_run;

/* What there is to train: parameters, and the first of each layer. */
typedef struct lora_list {
    gn_parameter *items;
    size_t *groups;
    size_t n, layers;
    int rank;
} lora_list;

static inline lora_list list_lora(const gn_model *model, int rank) {
    const size_t layers = (size_t)model->config.layers;
    lora_list l = {.n = layers * PER_LAYER, .layers = layers, .rank = rank};
    l.items = calloc(l.n, sizeof *l.items);
    l.groups = calloc(layers, sizeof *l.groups);
    for (size_t i = 0; i < l.n / 2; i++) {
        const gn_matrix *w = &model->layers[i / GN_PROJ_COUNT].proj[i % GN_PROJ_COUNT];
        l.items[2 * i] =
            (gn_parameter){.name = "x.lora_A.weight", .ndim = 2, .shape = {rank, w->cols}};
        l.items[2 * i + 1] =
            (gn_parameter){.name = "x.lora_B.weight", .ndim = 2, .shape = {w->rows, rank}};
    }
    for (size_t i = 0; i < layers; i++) l.groups[i] = i * PER_LAYER;
    return l;
}

static inline void free_list(lora_list *l) {
    free(l->items);
    free(l->groups);
}

/* Where a layer's gradients are. */
static inline void find_grads(lora_run *r, int layer) {
    for (int i = layer * GN_PROJ_COUNT; i < (layer + 1) * GN_PROJ_COUNT; i++) {
        r->grads[i].a = gn_parameter_grad(r->p, (size_t)i * 2);
        r->grads[i].b = gn_parameter_grad(r->p, (size_t)i * 2 + 1);
    }
}

static inline gn_status begin_layer(void *user, int layer) {
    lora_run *r = user;
    gn_status status = gn_grads_acquire(r->p, (size_t)layer);
    if (!status && layer > 0) status = gn_grads_prefetch(r->p, (size_t)layer - 1);
    if (!status) find_grads(r, layer);
    return status;
}

static inline gn_status end_layer(void *user, int layer) {
    return gn_grads_release(((lora_run *)user)->p, (size_t)layer, true);
}

static inline void set_weights(lora_run *r) {
    for (size_t i = 0; i < r->p->n; i++) {
        const int64_t n = r->p->items[i].numel;
        float *values = malloc((size_t)n * sizeof *values);
        for (int64_t j = 0; j < n; j++) values[j] = 0.05f * sinf((float)(j * 3 + (int64_t)i));
        must(gn_optimizer_set(r->o, GN_STATE_MASTER, i, values), NULL);
        free(values);
    }
}

static inline void make_pairs(lora_run *r, int rank) {
    const size_t n = (size_t)r->model->config.layers * GN_PROJ_COUNT;
    gn_ctx *ctx = r->model->ctx;
    r->pairs = calloc(n, sizeof *r->pairs);
    r->grads = calloc(n, sizeof *r->grads);
    for (size_t i = 0; i < n; i++)
        r->pairs[i] = (gn_lora_pair){.rank = rank,
                                     .scale = 2,
                                     .a = gn_parameter_weight(r->p, i * 2),
                                     .b = gn_parameter_weight(r->p, i * 2 + 1)};
    r->trained = (gn_trained){.pairs = r->pairs, .placed = r->pairs, .grads = r->grads};
    if (gn_ctx_is_host(ctx)) return;
    r->placed = gn_ctx_alloc(ctx, n * sizeof *r->pairs);
    must(gn_ctx_write(ctx, r->placed, r->pairs, n * sizeof *r->pairs), NULL);
    r->trained.placed = r->placed;
}

typedef struct lora_options {
    const gn_grad_options *grads; /* NULL: in one array */
    gn_optimizer_options optimizer;
    const gn_page_device *device; /* of the optimizer */
    gn_train_limits limits;
} lora_options;

static inline void open_lora(lora_run *r, gn_model *model, const lora_list *list,
                             const lora_options *o) {
    gn_error err = {0};
    *r = (lora_run){.model = model};
    must(gn_parameters_open_paged(&r->p, model->ctx, list->items, list->n, GN_BF16, GN_F32,
                                  o->grads, &err),
         &err);
    must(gn_optimizer_open(&r->o, r->p, &o->optimizer, o->device, &err), &err);
    set_weights(r);
    make_pairs(r, list->rank);
    if (o->grads) {
        r->trained.begin_layer = begin_layer;
        r->trained.end_layer = end_layer;
        r->trained.user = r;
    } else {
        for (int i = 0; i < model->config.layers; i++) find_grads(r, i);
    }
    must(gn_train_step_open(&r->step, model, &o->limits, &err), &err);
}

/* Samples of `tokens` tokens, `seqs` at a time; paged AdamW. */
static inline gn_train_wanted want_lora(const lora_list *list, int seqs, int tokens,
                                        int accumulation) {
    return (gn_train_wanted){.limits = {.max_rows = seqs * tokens,
                                        .max_seqs = seqs,
                                        .context = tokens,
                                        .max_rank = list->rank},
                             .items = list->items,
                             .n_items = list->n,
                             .groups = list->groups,
                             .n_groups = list->layers,
                             .weights = GN_BF16,
                             .grads = GN_F32,
                             .optimizer = {.beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f},
                             .paged = true,
                             .accumulation = accumulation};
}

/* As planned. devices: of gradients' pages and of the optimizer's. */
static inline void open_planned(lora_run *r, gn_model *model, const lora_list *list,
                                const gn_train_wanted *w, const gn_train_memory *plan,
                                gn_page_device *const devices[2]) {
    const gn_grad_options grads = {w->groups, w->n_groups, plan->grad_budget, devices[0]};
    lora_options o = {.grads = plan->grads_travel ? &grads : NULL,
                      .optimizer = w->optimizer,
                      .device = devices[1],
                      .limits = w->limits};
    o.optimizer.budget = plan->optimizer_budget;
    memcpy(o.limits.keep, plan->keep, sizeof o.limits.keep);
    open_lora(r, model, list, &o);
    r->trained.lodger = gn_optimizer_pages(r->o);
}

static inline void close_lora(lora_run *r) {
    gn_train_step_close(r->step);
    gn_optimizer_close(r->o);
    gn_parameters_close(r->p);
    gn_ctx_free(r->model->ctx, r->placed);
    free(r->pairs);
    free(r->grads);
}

/* Gradients of micro-batches of `seqs` sequences of `tokens` tokens each. */
static inline void accumulate_lora(lora_run *r, int number, int micro_batches, int seqs,
                                   int tokens) {
    int32_t *ids = calloc((size_t)(seqs * tokens), sizeof *ids);
    int32_t *row0 = calloc((size_t)seqs + 1, sizeof *row0),
            *pos0 = calloc((size_t)seqs, sizeof *pos0);
    for (int i = 0; i <= seqs; i++) row0[i] = i * tokens;
    must(gn_grads_clear(r->p), NULL);
    for (int m = 0; m < micro_batches; m++) {
        for (int i = 0; i < seqs * tokens; i++) ids[i] = (i * 7 + m * 31 + number * 5) % 512;
        const gn_train_batch b = {.rows = seqs * tokens,
                                  .ids = ids,
                                  .labels = ids,
                                  .seqs = {.n = seqs, .row0 = row0, .pos0 = pos0},
                                  .scale = 1.0f / (float)(seqs * tokens * micro_batches),
                                  .is_last = m + 1 == micro_batches};
        must(gn_train_step_run(r->step, &b, &r->trained, &r->loss), NULL);
    }
    free(ids);
    free(row0);
    free(pos0);
}

static inline void apply_lora(lora_run *r) {
    double norm;
    must(gn_optimizer_prefetch(r->o), NULL);
    must(gn_optimizer_grad_norm(r->o, &norm), NULL);
    if (!(norm > 0)) must(GN_EINVAL, NULL);
    must(gn_optimizer_step(r->o, 1e-3, gn_clip_scale(norm, 0)), NULL);
}

static inline void update_lora(lora_run *r, int number, int micro_batches, int seqs, int tokens) {
    accumulate_lora(r, number, micro_batches, seqs, tokens);
    apply_lora(r);
}

/* All trained weights, on the host; malloc'ed. */
static inline uint16_t *read_weights(const lora_run *r, size_t *bytes) {
    *bytes = (size_t)r->p->weights.shape[0] * sizeof(uint16_t);
    uint16_t *weights = malloc(*bytes);
    must(gn_ctx_read(r->model->ctx, weights, r->p->weights.data, *bytes), NULL);
    return weights;
}

static inline gn_model *open_shape(const char *shape, const char *device, gn_compute compute) {
    const gn_model_options options = {.device = device, .compute = compute, .threads = 2};
    gn_model *model;
    gn_error err = {0};
    must(gn_model_synthetic(&model, shape, &options, &err), &err);
    return model;
}

static inline gn_model *open_tiny(void) {
    return open_shape("llama-tiny", "cpu", GN_COMPUTE_F32);
}

#endif
