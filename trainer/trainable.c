/* trainable.c - what LoRA and full training have in common, and LoRA. trainable_full.c: all
 * weights. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/adapter.h"
#include "engine/peft.h"
#include "trainer/gradients.h"
#include "trainer/shuffle.h"
#include "trainer/trainable_internal.h"

gn_model *gn_trainable_model(const gn_trainable *t) {
    return t->model;
}

const gn_parameter *gn_trainable_items(const gn_trainable *t, size_t *n) {
    *n = t->n_items;
    return t->items;
}

const size_t *gn_trainable_groups(const gn_trainable *t, size_t *n) {
    *n = t->has_groups ? (size_t)t->model->config.layers : 0;
    return t->groups;
}

void gn_trainable_lodge(gn_trainable *t, gn_pages *pages) {
    t->trained.lodger = pages;
}

gn_parameters *gn_trainable_parameters(const gn_trainable *t) {
    return t->parameters;
}

const gn_trained *gn_trainable_views(const gn_trainable *t) {
    return &t->trained;
}

const gn_adapter_config *gn_trainable_adapter(const gn_trainable *t) {
    return t->pairs ? &t->adapter : NULL;
}

int gn_trainable_max_rank(const gn_trainable *t) {
    return t->pairs ? t->adapter.rank : 0;
}

void gn_trainable_close(gn_trainable *t) {
    if (!t) return;
    if (t->model) gn_ctx_free(t->model->ctx, t->placed);
    gn_adapter_close(t->init);
    gn_parameters_close(t->parameters);
    gn_page_device_close(t->grad_device);
    if (t->owns_model) gn_model_close(t->model);
    for (size_t i = 0; i < t->n_items; i++) free((char *)t->items[i].name);
    free(t->items);
    free(t->pairs);
    free(t->grads);
    free(t->pair_of);
    free(t->groups);
    free(t->layers);
    free(t->places);
    free(t->norm);
    free(t);
}

gn_status gn_trainable_set(gn_optimizer *o, size_t parameter, const float *values, gn_error *err) {
    const gn_status status = gn_optimizer_set(o, GN_STATE_MASTER, parameter, values);
    return status
               ? gn_fail(err, status, "%s: %s", gn_optimizer_parameters(o)->items[parameter].name,
                         gn_status_text(status))
               : GN_OK;
}

gn_status gn_trainable_check_finite(const gn_file_tensor *tensor, gn_error *err) {
    const int64_t n = (int64_t)(tensor->bytes / gn_dtype_size(tensor->dtype));
    const int64_t bad = gn_find_not_finite(tensor->data, tensor->dtype, n);
    return bad < 0 ? GN_OK
                   : gn_fail(err, GN_EFORMAT, "%s: tensor %s: value %lld is not finite",
                             tensor->path, tensor->name, (long long)bad);
}

/* ---- LoRA: the base ---- */

/* Projections that were quantized while loading were looked at then; random weights are finite. */
static gn_status check_base(const gn_model *m, bool quantized, gn_error *err) {
    for (size_t i = 0; m->file && i < gn_tensor_file_count(m->file); i++) {
        const gn_file_tensor *tensor = gn_tensor_file_at(m->file, i);
        if (!gn_dtype_is_float(tensor->dtype) ||
            (quantized && strstr(tensor->name, "_proj.weight")))
            continue;
        const gn_status status = gn_trainable_check_finite(tensor, err);
        if (status) return status;
    }
    return GN_OK;
}

static gn_status open_base(gn_model **out, const gn_model_choice *choice, gn_error *err) {
    gn_adapter *none;
    gn_status status = gn_model_choice_open(choice, out, &none, err);
    if (status) return status;
    const bool quantized = choice->quant != GN_Q_NONE && !(*out)->config.bnb_4bit;
    status = check_base(*out, quantized, err);
    if (status) gn_model_close(*out);
    return status;
}

/* ---- LoRA: which modules ---- */

/* Without "self_attn." or "mlp.". */
static const char *short_name(int proj) {
    return strchr(gn_proj_names[proj], '.') + 1;
}

static gn_status choose_modules(bool chosen[GN_PROJ_COUNT], const char *list, gn_error *err) {
    if (!strcmp(list, "all")) {
        for (int p = 0; p < GN_PROJ_COUNT; p++) chosen[p] = true;
        return GN_OK;
    }
    for (const char *name = list;; name++) {
        const size_t length = strcspn(name, ",");
        int p = 0;
        while (p < GN_PROJ_COUNT &&
               (strlen(short_name(p)) != length || strncmp(short_name(p), name, length) != 0))
            p++;
        if (p == GN_PROJ_COUNT)
            return gn_fail(err, GN_EINVAL,
                           "--lora-modules: '%.*s' is none of q_proj, k_proj, v_proj, o_proj, "
                           "gate_proj, up_proj and down_proj",
                           (int)length, name);
        chosen[p] = true;
        name += length;
        if (!*name) return GN_OK;
    }
}

static int count_pairs(const gn_trainable *t) {
    return t->model->config.layers * GN_PROJ_COUNT;
}

static void module_name(char *name, size_t size, int pair) {
    snprintf(name, size, "model.layers.%d.%s", pair / GN_PROJ_COUNT,
             gn_proj_names[pair % GN_PROJ_COUNT]);
}

static gn_status adapt_chosen(gn_trainable *t, const gn_lora_options *o, gn_error *err) {
    bool chosen[GN_PROJ_COUNT] = {0};
    const gn_status status = choose_modules(chosen, o->modules, err);
    const double scale = o->alpha / (o->rslora ? sqrt(o->rank) : o->rank);
    for (int i = 0; i < count_pairs(t); i++)
        if (chosen[i % GN_PROJ_COUNT])
            t->pairs[i] = (gn_lora_pair){.rank = o->rank, .scale = (float)scale};
    t->adapter.rank = o->rank;
    t->adapter.alpha = o->alpha;
    t->adapter.rslora = o->rslora;
    return status;
}

/* As in the adapter to start from, which must be what one line of a config can say. */
static gn_status adapt_as_init(gn_trainable *t, const char *dir, gn_error *err) {
    gn_peft *peft;
    gn_status status = gn_adapter_load(&t->init, &t->model->config, t->model->dir, dir, err);
    if (!status) status = gn_peft_open(&peft, dir, err);
    if (status) return status;
    t->adapter.rslora = gn_peft_is_rslora(peft);
    for (int i = 0; !status && i < count_pairs(t); i++) {
        const gn_lora_pair *pair = &t->init->pairs[i / GN_PROJ_COUNT][i % GN_PROJ_COUNT];
        char module[64];
        if (pair->rank == 0) continue;
        module_name(module, sizeof module, i);
        const double alpha = gn_peft_alpha(peft, module);
        if (t->adapter.rank != 0 && (pair->rank != t->adapter.rank || alpha != t->adapter.alpha))
            status = gn_fail(err, GN_EUNSUPPORTED,
                             "%s: modules of different rank or alpha cannot be trained on", dir);
        t->adapter.rank = pair->rank;
        t->adapter.alpha = alpha;
        t->pairs[i] = (gn_lora_pair){.rank = pair->rank, .scale = pair->scale};
    }
    gn_peft_close(peft);
    return status;
}

/* ---- LoRA: parameters ---- */

/* A and B of each adapted module, in order. */
static gn_status list_items(gn_trainable *t, gn_error *err) {
    t->items = calloc(2 * (size_t)count_pairs(t), sizeof *t->items);
    if (!t->items) return gn_fail(err, GN_ENOMEM, "out of memory");
    for (int i = 0; i < count_pairs(t); i++) {
        char module[64];
        const gn_proj proj = (gn_proj)(i % GN_PROJ_COUNT);
        if (proj == 0) t->groups[i / GN_PROJ_COUNT] = t->n_items;
        if (t->pairs[i].rank == 0) continue;
        module_name(module, sizeof module, i);
        for (int b = 0; b < 2; b++) {
            char *name;
            if (asprintf(&name, "%s.lora_%c.weight", module, b ? 'B' : 'A') < 0)
                return gn_fail(err, GN_ENOMEM, "out of memory");
            gn_parameter *item = &t->items[t->n_items++];
            *item = (gn_parameter){.name = name, .ndim = 2};
            item->shape[0] = b ? gn_proj_rows(&t->model->config, proj) : t->adapter.rank;
            item->shape[1] = b ? t->adapter.rank : gn_proj_cols(&t->model->config, proj);
        }
    }
    t->has_groups = true;
    for (int i = 0; i < t->model->config.layers; i++) {
        const bool is_last = i + 1 == t->model->config.layers;
        if (t->groups[i] == (is_last ? t->n_items : t->groups[i + 1])) t->has_groups = false;
    }
    return GN_OK;
}

/* Finds the gradients of a layer, or of all. */
static void find_grads(gn_trainable *t, size_t begin, size_t end) {
    for (size_t i = begin; i < end; i += 2) {
        gn_lora_pair *grad = &t->grads[t->pair_of[i / 2]];
        grad->a = gn_parameter_grad(t->parameters, i);
        grad->b = gn_parameter_grad(t->parameters, i + 1);
    }
}

static gn_status begin_layer(void *user, int layer) {
    gn_trainable *t = user;
    gn_status status = gn_grads_acquire(t->parameters, (size_t)layer);
    if (!status && layer > 0) status = gn_grads_prefetch(t->parameters, (size_t)layer - 1);
    if (status) return status;
    const bool is_last = layer + 1 == t->model->config.layers;
    find_grads(t, t->groups[layer], is_last ? t->n_items : t->groups[layer + 1]);
    return GN_OK;
}

static gn_status end_layer(void *user, int layer) {
    return gn_grads_release(((gn_trainable *)user)->parameters, (size_t)layer, true);
}

/* Points the pairs into the parameters. */
static gn_status bind_pairs(gn_trainable *t, gn_error *err) {
    gn_ctx *ctx = t->model->ctx;
    size_t next = 0;
    for (int i = 0; i < count_pairs(t); i++) {
        gn_lora_pair *pair = &t->pairs[i];
        if (pair->rank == 0) continue;
        t->pair_of[next / 2] = i;
        t->grads[i] = *pair;
        pair->a = gn_parameter_weight(t->parameters, next++);
        pair->b = gn_parameter_weight(t->parameters, next++);
    }
    if (gn_grads_pages(t->parameters)) {
        t->trained.begin_layer = begin_layer;
        t->trained.end_layer = end_layer;
        t->trained.user = t;
    } else {
        find_grads(t, 0, t->n_items);
    }
    t->trained.pairs = t->trained.placed = t->pairs;
    t->trained.grads = t->grads;
    if (gn_ctx_is_host(ctx)) return GN_OK;
    const size_t bytes = (size_t)count_pairs(t) * sizeof *t->pairs;
    t->trained.placed = t->placed = gn_ctx_alloc(ctx, bytes);
    const gn_status status = t->placed ? gn_ctx_write(ctx, t->placed, t->pairs, bytes) : GN_ENOMEM;
    return status ? gn_fail(err, status, "the adapter's table: %s", gn_status_text(status)) : GN_OK;
}

static gn_status open_lora(gn_trainable *t, const gn_lora_options *o, gn_error *err) {
    t->pairs = calloc((size_t)count_pairs(t), sizeof *t->pairs);
    t->grads = calloc((size_t)count_pairs(t), sizeof *t->grads);
    t->pair_of = calloc((size_t)count_pairs(t), sizeof *t->pair_of);
    t->groups = calloc((size_t)t->model->config.layers, sizeof *t->groups);
    if (!t->pairs || !t->grads || !t->pair_of || !t->groups)
        return gn_fail(err, GN_ENOMEM, "out of memory");
    t->adapter = (gn_adapter_config){.base = t->model->dir, .dropout = o->dropout, .dtype = GN_F32};
    gn_status status =
        o->init_adapter ? adapt_as_init(t, o->init_adapter, err) : adapt_chosen(t, o, err);
    if (!status) status = list_items(t, err);
    t->trained.dropout = (float)o->dropout;
    t->trained.seed = t->seed = o->seed;
    return status;
}

gn_status gn_trainable_open_lora(gn_trainable **out, const gn_model_choice *choice,
                                 const gn_lora_options *options, gn_error *err) {
    *out = NULL;
    gn_model *model;
    gn_status status = open_base(&model, choice, err);
    if (status) return status;
    status = gn_trainable_open_over(out, model, options, err);
    if (status)
        gn_model_close(model);
    else
        (*out)->owns_model = true;
    return status;
}

gn_status gn_trainable_open_over(gn_trainable **out, gn_model *model,
                                 const gn_lora_options *options, gn_error *err) {
    *out = NULL;
    gn_trainable *t = calloc(1, sizeof *t);
    if (!t) return gn_fail(err, GN_ENOMEM, "out of memory");
    t->model = model;
    const gn_status status = open_lora(t, options, err);
    if (status)
        gn_trainable_close(t);
    else
        *out = t;
    return status;
}

gn_status gn_trainable_allocate(gn_trainable *t, const gn_train_memory *plan, gn_error *err) {
    gn_ctx *ctx = t->model->ctx;
    gn_grad_options pages = {.groups = t->groups,
                             .n_groups = (size_t)t->model->config.layers,
                             .budget = plan->grad_budget};
    gn_status status = gn_page_device_open(&t->grad_device, ctx);
    if (status) return gn_fail(err, status, "pages: %s", gn_status_text(status));
    pages.device = t->grad_device;
    status =
        gn_parameters_open_paged(&t->parameters, ctx, t->items, t->n_items, gn_ctx_activation(ctx),
                                 GN_F32, plan->grads_travel ? &pages : NULL, err);
    if (status) return status;
    return t->pairs ? bind_pairs(t, err) : gn_trainable_bind_full(t, err);
}

/* ---- what a run starts from ---- */

/* As PEFT: A uniform in +-1/sqrt(columns) (Kaiming's with a = sqrt(5)), B zero. */
static void draw_lora(const gn_trainable *t, size_t parameter, float *values) {
    const gn_parameter *item = &t->parameters->items[parameter];
    const bool is_b = parameter % 2 == 1;
    const double bound = 1 / sqrt((double)item->shape[1]);
    gn_random random = gn_random_open(t->seed, parameter);
    for (int64_t i = 0; i < item->numel; i++)
        values[i] = is_b ? 0 : (float)(bound * (2 * gn_trainable_uniform(&random) - 1));
}

/* Of the pair that the parameter is half of. */
static void copy_init(const gn_trainable *t, size_t parameter, float *values) {
    const int pair = t->pair_of[parameter / 2];
    const gn_lora_pair *from = &t->init->pairs[pair / GN_PROJ_COUNT][pair % GN_PROJ_COUNT];
    const gn_tensor *half = parameter % 2 ? &from->b : &from->a;
    gn_widen(values, half->data, half->dtype, gn_tensor_numel(half));
}

gn_status gn_trainable_start(gn_trainable *t, gn_optimizer *o, gn_error *err) {
    gn_status status = GN_OK;
    for (size_t i = 0; !status && i < t->parameters->n; i++) {
        float *values = malloc((size_t)t->parameters->items[i].numel * sizeof *values);
        if (!values) return gn_fail(err, GN_ENOMEM, "out of memory");
        if (!t->pairs)
            status = gn_trainable_fill_place(t, i, values, err);
        else if (t->init)
            copy_init(t, i, values);
        else
            draw_lora(t, i, values);
        if (!status) status = gn_trainable_set(o, i, values, err);
        free(values);
    }
    if (!status) status = gn_trainable_refresh(t);
    return status;
}

double gn_trainable_uniform(gn_random *random) {
    return (double)gn_random_below(random, (uint64_t)1 << 53) * 0x1p-53;
}
