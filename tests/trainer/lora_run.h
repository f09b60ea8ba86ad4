/* lora_run.h - for tests: a model whose projections all have LoRA pairs that are trained, with
 * gradients in one array or in pages. */
#ifndef GN_TEST_LORA_RUN_H
#define GN_TEST_LORA_RUN_H

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "trainer/gradients.h"
#include "trainer/optimizer.h"
#include "trainer/step.h"

enum { PER_LAYER = 2 * GN_PROJ_COUNT };

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
        cr_assert_eq(gn_optimizer_set(r->o, GN_STATE_MASTER, i, values), GN_OK);
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
    cr_assert_eq(gn_ctx_write(ctx, r->placed, r->pairs, n * sizeof *r->pairs), GN_OK);
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
    cr_assert_eq(gn_parameters_open_paged(&r->p, model->ctx, list->items, list->n, GN_BF16, GN_F32,
                                          o->grads, &err),
                 GN_OK, "%s", err.message);
    cr_assert_eq(gn_optimizer_open(&r->o, r->p, &o->optimizer, o->device, &err), GN_OK, "%s",
                 err.message);
    set_weights(r);
    make_pairs(r, list->rank);
    if (o->grads) {
        r->trained.begin_layer = begin_layer;
        r->trained.end_layer = end_layer;
        r->trained.user = r;
    } else {
        for (int i = 0; i < model->config.layers; i++) find_grads(r, i);
    }
    cr_assert_eq(gn_train_step_open(&r->step, model, &o->limits, &err), GN_OK, "%s", err.message);
}

static inline void close_lora(lora_run *r) {
    gn_train_step_close(r->step);
    gn_optimizer_close(r->o);
    gn_parameters_close(r->p);
    gn_ctx_free(r->model->ctx, r->placed);
    free(r->pairs);
    free(r->grads);
}

/* One update from micro-batches of `seqs` sequences of `tokens` tokens each. */
static inline void update_lora(lora_run *r, int number, int micro_batches, int seqs, int tokens) {
    int32_t *ids = calloc((size_t)(seqs * tokens), sizeof *ids);
    int32_t *row0 = calloc((size_t)seqs + 1, sizeof *row0),
            *pos0 = calloc((size_t)seqs, sizeof *pos0);
    double norm;
    for (int i = 0; i <= seqs; i++) row0[i] = i * tokens;
    cr_assert_eq(gn_grads_clear(r->p), GN_OK);
    for (int m = 0; m < micro_batches; m++) {
        for (int i = 0; i < seqs * tokens; i++) ids[i] = (i * 7 + m * 31 + number * 5) % 512;
        const gn_train_batch b = {.rows = seqs * tokens,
                                  .ids = ids,
                                  .labels = ids,
                                  .seqs = {.n = seqs, .row0 = row0, .pos0 = pos0},
                                  .scale = 1.0f / (float)(seqs * tokens * micro_batches)};
        cr_assert_eq(gn_train_step_run(r->step, &b, &r->trained, &r->loss), GN_OK);
    }
    cr_assert_eq(gn_optimizer_prefetch(r->o), GN_OK);
    cr_assert_eq(gn_optimizer_grad_norm(r->o, &norm), GN_OK);
    cr_assert(norm > 0);
    cr_assert_eq(gn_optimizer_step(r->o, 1e-3, gn_clip_scale(norm, 0)), GN_OK);
    free(ids);
    free(row0);
    free(pos0);
}

/* All trained weights, on the host; malloc'ed. */
static inline uint16_t *read_weights(const lora_run *r, size_t *bytes) {
    *bytes = (size_t)r->p->weights.shape[0] * sizeof(uint16_t);
    uint16_t *weights = malloc(*bytes);
    cr_assert_eq(gn_ctx_read(r->model->ctx, weights, r->p->weights.data, *bytes), GN_OK);
    return weights;
}

static inline gn_model *open_shape(const char *shape, const char *device, gn_compute compute) {
    const gn_model_options options = {.device = device, .compute = compute, .threads = 2};
    gn_model *model;
    gn_error err = {0};
    cr_assert_eq(gn_model_synthetic(&model, shape, &options, &err), GN_OK, "%s", err.message);
    return model;
}

static inline gn_model *open_tiny(void) {
    return open_shape("llama-tiny", "cpu", GN_COMPUTE_F32);
}

#endif
