/* trainable_full.c - training all weights of a model.
 *
 * The model has no weights of its own: its matrices and vectors are views of the parameters, which
 * are filled from the folder's files or at random. RMSNorm's weights are float32 to the ops: where
 * parameters are BF16 they have arrays of their own, which follow the parameters after each update.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/model_internal.h"
#include "trainer/trainable_internal.h"

enum { MAX_NAME = 64 };

/* ---- the weights of a model ---- */

static void add(gn_trainable *t, const char *name, gn_weight_place place) {
    gn_parameter *item = &t->items[t->n_items];
    char *full;
    if (asprintf(&full, "%s.weight", name) < 0) full = NULL;
    *item = (gn_parameter){.name = full, .ndim = place.matrix ? 2 : 1};
    item->shape[0] = place.rows;
    item->shape[1] = place.cols;
    t->places[t->n_items++] = place;
}

static void add_matrix(gn_trainable *t, const char *name, gn_matrix *matrix, gn_tensor *grad,
                       int64_t rows, int64_t cols) {
    add(t, name, (gn_weight_place){.matrix = matrix, .grad = grad, .rows = rows, .cols = cols});
}

static void add_vector(gn_trainable *t, const char *name, gn_tensor *vector, gn_tensor *grad) {
    const int64_t n = t->model->config.hidden;
    add(t, name, (gn_weight_place){.vector = vector, .grad = grad, .rows = n});
}

static void add_layer(gn_trainable *t, int i) {
    const gn_config *c = &t->model->config;
    gn_layer *layer = &t->model->layers[i];
    gn_layer_grads *grads = &t->layers[i];
    char name[MAX_NAME];
    snprintf(name, sizeof name, "model.layers.%d.input_layernorm", i);
    add_vector(t, name, &layer->attn_norm, &grads->attn_norm);
    snprintf(name, sizeof name, "model.layers.%d.post_attention_layernorm", i);
    add_vector(t, name, &layer->mlp_norm, &grads->mlp_norm);
    for (int p = 0; p < GN_PROJ_COUNT; p++) {
        snprintf(name, sizeof name, "model.layers.%d.%s", i, gn_proj_names[p]);
        add_matrix(t, name, &layer->proj[p], &grads->proj[p], gn_proj_rows(c, (gn_proj)p),
                   gn_proj_cols(c, (gn_proj)p));
    }
}

static void add_all(gn_trainable *t) {
    gn_model *m = t->model;
    const gn_config *c = &m->config;
    add_matrix(t, "model.embed_tokens", &m->embed, &t->trained.embed, c->vocab, c->hidden);
    for (int i = 0; i < c->layers; i++) add_layer(t, i);
    add_vector(t, "model.norm", &m->norm, &t->trained.norm);
    if (!c->tied_embeddings)
        add_matrix(t, "lm_head", &m->lm_head, &t->trained.lm_head, c->vocab, c->hidden);
}

static gn_status list_items(gn_trainable *t, gn_error *err) {
    const size_t layers = (size_t)t->model->config.layers, most = layers * (GN_PROJ_COUNT + 2) + 3;
    t->layers = calloc(layers, sizeof *t->layers);
    t->items = calloc(most, sizeof *t->items);
    t->places = calloc(most, sizeof *t->places);
    bool ok = t->layers && t->items && t->places;
    if (ok) add_all(t);
    for (size_t i = 0; i < t->n_items; i++) ok = ok && t->items[i].name;
    return ok ? GN_OK : gn_fail(err, GN_ENOMEM, "out of memory");
}

/* ---- views ---- */

gn_status gn_trainable_bind_full(gn_trainable *t, gn_error *err) {
    gn_model *m = t->model;
    const int64_t hidden = m->config.hidden;
    const bool copies = t->parameters->weights.dtype != GN_F32;
    if (copies && !(t->norm = malloc((size_t)hidden * 2 * sizeof *t->norm)))
        return gn_fail(err, GN_ENOMEM, "out of memory");
    for (size_t i = 0; i < t->parameters->n; i++) {
        const gn_weight_place *place = &t->places[i];
        gn_tensor w = gn_parameter_weight(t->parameters, i);
        *place->grad = gn_parameter_grad(t->parameters, i);
        if (place->matrix) {
            *place->matrix = (gn_matrix){
                .qtype = GN_Q_NONE, .dtype = w.dtype, .rows = place->rows, .cols = place->cols};
            place->matrix->data = w.data;
            continue;
        }
        if (copies) {
            w = gn_tensor_1d(gn_model_own(m, (size_t)hidden * sizeof(float)), GN_F32, hidden);
            if (!w.data) return gn_fail(err, GN_ENOMEM, "no memory for a norm's weights");
        }
        *place->vector = w;
    }
    if (m->config.tied_embeddings) {
        m->lm_head = m->embed;
        t->trained.lm_head = t->trained.embed;
    }
    t->trained.layers = t->layers;
    return gn_model_finish(m, err);
}

gn_status gn_trainable_refresh(gn_trainable *t) {
    gn_status status = GN_OK;
    for (size_t i = 0; t->norm && !status && i < t->parameters->n; i++) {
        const gn_tensor *vector = t->places[i].vector;
        if (!vector) continue;
        const gn_tensor w = gn_parameter_weight(t->parameters, i);
        const int64_t n = vector->shape[0];
        float *stored = t->norm + n;
        status = gn_ctx_read(t->model->ctx, stored, w.data, (size_t)n * gn_dtype_size(w.dtype));
        gn_widen(t->norm, stored, w.dtype, n);
        if (!status)
            status = gn_ctx_write(t->model->ctx, vector->data, t->norm, (size_t)n * sizeof(float));
    }
    return status;
}

/* ---- opening ---- */

/* Every tensor of the folder must have a place. */
static gn_status refuse_others(const gn_trainable *t, gn_error *err) {
    const gn_model *m = t->model;
    size_t known = 0;
    for (size_t i = 0; i < t->n_items; i++)
        known += gn_tensor_file_find(m->file, t->items[i].name) != NULL;
    for (size_t i = 0; known < gn_tensor_file_count(m->file) && i < gn_tensor_file_count(m->file);
         i++) {
        const gn_file_tensor *tensor = gn_tensor_file_at(m->file, i);
        bool found = gn_model_is_redundant(&m->config, tensor->name);
        for (size_t k = 0; !found && k < t->n_items; k++)
            found = strcmp(tensor->name, t->items[k].name) == 0;
        if (!found)
            return gn_fail(err, GN_EFORMAT, "%s: tensor %s has no place in this model",
                           tensor->path, tensor->name);
    }
    return GN_OK;
}

static gn_status open_full(gn_trainable *t, const gn_model_choice *choice, gn_error *err) {
    const gn_model_options options = {.device = choice->device,
                                      .compute = (gn_compute)choice->compute,
                                      .threads = choice->threads};
    gn_config config;
    gn_status status = gn_config_read(&config, choice->dir, err);
    if (status) return status;
    if (config.bnb_4bit && !t->random)
        return gn_fail(err, GN_EINVAL,
                       "%s: its weights are 4-bit; --mode full trains 16- or 32-bit "
                       "ones",
                       choice->dir);
    status = gn_model_new(&t->model, choice->dir, &config, &options, err);
    if (!status && !t->random) status = gn_safetensors_open_dir(&t->model->file, choice->dir, err);
    if (!status) status = list_items(t, err);
    if (!status && !t->random) status = refuse_others(t, err);
    return status;
}

gn_status gn_trainable_open_full(gn_trainable **out, const gn_model_choice *choice, bool random,
                                 uint64_t seed, gn_error *err) {
    *out = NULL;
    gn_trainable *t = calloc(1, sizeof *t);
    if (!t) return gn_fail(err, GN_ENOMEM, "out of memory");
    t->owns_model = true;
    t->random = random;
    t->seed = seed;
    const gn_status status = open_full(t, choice, err);
    if (status)
        gn_trainable_close(t);
    else
        *out = t;
    return status;
}

/* ---- what a run starts from ---- */

/* As transformers initialises LLaMA: matrices normal with a deviation of 0.02, norms one. */
static void draw_place(const gn_trainable *t, size_t i, float *values) {
    const int64_t n = t->parameters->items[i].numel;
    gn_random random = gn_random_open(t->seed, i);
    if (t->places[i].vector) {
        for (int64_t k = 0; k < n; k++) values[k] = 1;
        return;
    }
    for (int64_t k = 0; k < n; k += 2) { /* Box and Muller */
        const double radius = 0.02 * sqrt(-2 * log(1 - gn_trainable_uniform(&random)));
        const double angle = 2 * M_PI * gn_trainable_uniform(&random);
        values[k] = (float)(radius * cos(angle));
        if (k + 1 < n) values[k + 1] = (float)(radius * sin(angle));
    }
}

gn_status gn_trainable_fill_place(const gn_trainable *t, size_t i, float *values, gn_error *err) {
    const gn_weight_place *place = &t->places[i];
    const gn_parameter *item = &t->parameters->items[i];
    const gn_file_tensor *tensor;
    if (t->random) {
        draw_place(t, i, values);
        return GN_OK;
    }
    gn_status status = gn_model_find_weight(&tensor, t->model->file, t->model->dir, item->name,
                                            item->ndim, place->rows, place->cols, err);
    if (!status) status = gn_trainable_check_finite(tensor, err);
    if (status) return status;
    gn_widen(values, tensor->data, tensor->dtype, item->numel);
    gn_file_tensor_release(tensor);
    return GN_OK;
}
