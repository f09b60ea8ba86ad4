/* model.c - a base model from a Hugging Face folder.
 *
 * Weights that can be used as they stand in the file stay in its mapping: 16-bit embeddings, and
 * the codes and scales of a folder that is 4-bit already, so that such a model is ready at once.
 * 16- and 32-bit projections are quantized tensor by tensor. Every tensor of the folder must have
 * a place in the model, and every place its tensor. */
#include "engine/model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/bnb.h"
#include "engine/model_internal.h"
#include "kernels/ops.h"

enum { MAX_NAME = 256, OWNED_ALIGN = 256 };

typedef struct loader {
    gn_model *m;
    gn_model_options options;
    int64_t done, total; /* bytes of the file */
    bool *used;          /* which tensors of the file found their place */
    gn_error *err;
} loader;

/* Adds memory to a list; NULL, and nothing happens, when there is none for the list. */
static void *keep(void ***list, size_t *n, void *memory) {
    void **grown = realloc(*list, (*n + 1) * sizeof *grown);
    if (!grown) return NULL;
    *list = grown;
    grown[(*n)++] = memory;
    return memory;
}

static void *allocate(gn_model *m, size_t bytes) {
    void *memory = gn_ctx_alloc(m->ctx, bytes ? bytes : 1);
    if (!memory || !keep(&m->owned, &m->n_owned, memory)) {
        gn_ctx_free(m->ctx, memory);
        return NULL;
    }
    m->owned_bytes += (int64_t)bytes;
    return memory;
}

size_t gn_model_owned_size(size_t bytes) {
    return (bytes + OWNED_ALIGN - 1) / OWNED_ALIGN * OWNED_ALIGN;
}

void *gn_model_own(gn_model *m, size_t bytes) {
    const size_t size = gn_model_owned_size(bytes);
    if (size > m->reserved_bytes) return allocate(m, bytes);
    void *memory = m->reserved;
    m->reserved += size;
    m->reserved_bytes -= size;
    return memory;
}

gn_status gn_model_reserve(gn_model *m, size_t bytes, gn_error *err) {
    if (gn_ctx_is_host(m->ctx)) return GN_OK;
    m->reserved = allocate(m, bytes);
    if (!m->reserved)
        return gn_fail(err, GN_ENOMEM, "%s: no memory on %s for weights of %.1f MiB", m->dir,
                       gn_ctx_device(m->ctx), (double)bytes / 0x1p20);
    m->reserved_bytes = bytes;
    return GN_OK;
}

size_t gn_model_vectors_size(const gn_model *m) {
    const gn_config *c = &m->config;
    return (2 * (size_t)c->layers + 1) * gn_model_owned_size((size_t)c->hidden * sizeof(float)) +
           gn_model_owned_size((size_t)c->head_dim / 2 * sizeof(float));
}

void *gn_model_own_host(gn_model *m, size_t bytes) {
    if (gn_ctx_is_host(m->ctx)) return gn_model_own(m, bytes);
    void *memory = malloc(bytes ? bytes : 1);
    if (memory && keep(&m->staging, &m->n_staging, memory)) return memory;
    free(memory);
    return NULL;
}

static void free_staging(gn_model *m) {
    for (size_t i = 0; i < m->n_staging; i++) free(m->staging[i]);
    m->n_staging = 0;
}

gn_status gn_model_place(gn_model *m, gn_matrix *w, gn_error *err) {
    const gn_matrix host = *w;
    const size_t bytes = gn_place_bytes(m->ctx, &host);
    void *memory = bytes ? gn_model_own(m, bytes) : NULL;
    const gn_status status = bytes && !memory ? GN_ENOMEM : gn_place(m->ctx, w, &host, memory);
    free_staging(m);
    return status ? gn_fail(err, status, "%s: %s for a weight of %lld by %lld", m->dir,
                            gn_status_text(status), (long long)host.rows, (long long)host.cols)
                  : GN_OK;
}

gn_status gn_model_place_vector(gn_model *m, gn_tensor *out, const float *values, int64_t n,
                                gn_error *err) {
    float *w = gn_model_own(m, (size_t)n * sizeof *w);
    const gn_status status = w ? gn_ctx_write(m->ctx, w, values, (size_t)n * sizeof *w) : GN_ENOMEM;
    *out = gn_tensor_1d(w, GN_F32, n);
    return status ? gn_fail(err, status, "%s: %s for a vector of %lld", m->dir,
                            gn_status_text(status), (long long)n)
                  : GN_OK;
}

gn_status gn_model_new(gn_model **out, const char *dir, const gn_config *config,
                       const gn_model_options *options, gn_error *err) {
    gn_model *m = calloc(1, sizeof *m);
    if (!m) return gn_fail(err, GN_ENOMEM, "out of memory");
    const gn_ctx_options ctx = {.device = options->device,
                                .compute = options->compute == GN_COMPUTE_BF16 ? GN_BF16 : GN_F32,
                                .auto_compute = options->compute == GN_COMPUTE_AUTO,
                                .threads = options->threads};
    m->config = *config;
    m->dir = strdup(dir);
    m->layers = calloc((size_t)config->layers, sizeof *m->layers);
    gn_status status = m->dir && m->layers ? gn_ctx_open(&m->ctx, &ctx, err)
                                           : gn_fail(err, GN_ENOMEM, "out of memory");
    if (status)
        gn_model_close(m);
    else
        *out = m;
    return status;
}

void gn_model_close(gn_model *m) {
    if (!m) return;
    gn_adapter_host_close(m->adapters);
    for (size_t i = 0; i < m->n_owned; i++) gn_ctx_free(m->ctx, m->owned[i]);
    free(m->owned);
    free_staging(m);
    free(m->staging);
    gn_ctx_close(m->ctx);
    gn_tokenizer_close(m->tokenizer);
    gn_chat_template_close(m->chat);
    gn_tensor_file_close(m->file);
    free(m->layers);
    free(m->dir);
    free(m);
}

static void count(gn_model *m, const gn_matrix *w) {
    m->parameters += w->rows * w->cols;
    m->weight_bytes += (int64_t)gn_matrix_bytes(w);
}

gn_status gn_model_finish(gn_model *m, gn_error *err) {
    const gn_config *c = &m->config;
    float inv_freq[GN_MAX_HEAD_DIM / 2];
    gn_config_inv_freq(c, inv_freq);
    const gn_status status = gn_model_place_vector(m, &m->inv_freq, inv_freq, c->head_dim / 2, err);
    if (status) return status;
    gn_ctx_trim(m->ctx);
    count(m, &m->embed);
    if (m->lm_head.data != m->embed.data) count(m, &m->lm_head);
    for (int i = 0; i < c->layers; i++) {
        for (int p = 0; p < GN_PROJ_COUNT; p++) count(m, &m->layers[i].proj[p]);
    }
    const int64_t norms = (2 * (int64_t)c->layers + 1) * c->hidden;
    m->parameters += norms;
    m->weight_bytes += norms * (int64_t)sizeof(float);
    return GN_OK;
}

/* ---- from the folder ---- */

static void shape_text(char *text, size_t size, int ndim, const int64_t *shape) {
    int n = snprintf(text, size, "(");
    for (int i = 0; i < ndim; i++)
        n += snprintf(text + n, size - (size_t)n, "%s%lld", i ? ", " : "", (long long)shape[i]);
    snprintf(text + n, size - (size_t)n, ")");
}

gn_status gn_model_find_weight(const gn_file_tensor **out, const gn_tensor_file *file,
                               const char *where, const char *name, int ndim, int64_t rows,
                               int64_t cols, gn_error *err) {
    const int64_t expected[] = {rows, cols};
    const gn_file_tensor *t = gn_tensor_file_find(file, name);
    if (!t) return gn_fail(err, GN_EFORMAT, "%s: tensor %s is missing", where, name);
    if (!gn_dtype_is_float(t->dtype))
        return gn_fail(err, GN_EFORMAT, "%s: tensor %s is %s; expected F32, F16 or BF16", t->path,
                       name, gn_dtype_name(t->dtype));
    *out = t;
    if (t->ndim == ndim && !memcmp(t->shape, expected, (size_t)ndim * sizeof *expected))
        return GN_OK;
    char found[128], wanted[128];
    shape_text(found, sizeof found, t->ndim, t->shape);
    shape_text(wanted, sizeof wanted, ndim, expected);
    return gn_fail(err, GN_EMISMATCH, "%s: tensor %s has shape %s, but config.json makes it %s",
                   t->path, name, found, wanted);
}

static bool ends_with(const char *s, const char *end) {
    const size_t n = strlen(s), k = strlen(end);
    return n >= k && !strcmp(s + n - k, end);
}

bool gn_model_is_redundant(const gn_config *config, const char *name) {
    return ends_with(name, ".rotary_emb.inv_freq") ||
           (config->tied_embeddings && !strcmp(name, "lm_head.weight"));
}

static void advance(loader *l, const gn_file_tensor *t) {
    l->used[t - gn_tensor_file_at(l->m->file, 0)] = true;
    l->done += (int64_t)t->bytes;
    if (l->options.progress) l->options.progress(l->options.user, l->done, l->total);
}

/* The tensor's data for typed access: in the mapping, or an aligned copy. */
static gn_status find_data(loader *l, const gn_file_tensor *t, const void **data) {
    *data = t->data;
    if ((uintptr_t)t->data % gn_dtype_size(t->dtype) != 0) {
        void *copy = gn_model_own_host(l->m, t->bytes);
        if (!copy) return gn_fail(l->err, GN_ENOMEM, "out of memory for %s", t->name);
        memcpy(copy, t->data, t->bytes);
        *data = copy;
    }
    advance(l, t);
    return GN_OK;
}

static gn_status load_norm(loader *l, const char *name, gn_tensor *out) {
    const gn_file_tensor *t = NULL;
    const int64_t n = l->m->config.hidden;
    const gn_status status = gn_model_find_weight(&t, l->m->file, l->m->dir, name, 1, n, 0, l->err);
    if (status) return status;
    float *w = malloc((size_t)n * sizeof *w);
    if (!w) return gn_fail(l->err, GN_ENOMEM, "out of memory for %s", name);
    gn_widen(w, t->data, t->dtype, n);
    const gn_status placed = gn_model_place_vector(l->m, out, w, n, l->err);
    free(w);
    advance(l, t);
    return placed;
}

static gn_status load_plain(loader *l, const char *name, int64_t rows, int64_t cols, gn_matrix *w) {
    const gn_file_tensor *t = NULL;
    const gn_status status =
        gn_model_find_weight(&t, l->m->file, l->m->dir, name, 2, rows, cols, l->err);
    if (status) return status;
    *w = (gn_matrix){.qtype = GN_Q_NONE, .dtype = t->dtype, .rows = rows, .cols = cols};
    const gn_status found = find_data(l, t, &w->data);
    return found ? found : gn_model_place(l->m, w, l->err);
}

static gn_status load_bnb(loader *l, const char *name, int64_t rows, int64_t cols, gn_matrix *w) {
    gn_bnb_weight b;
    gn_status status = gn_bnb_find(&b, l->m->file, l->m->dir, name, rows, cols, l->err);
    if (status) return status;
    if (!l->options.as_stored && l->options.quant != GN_Q_NONE && l->options.quant != b.qtype)
        return gn_fail(l->err, GN_EINVAL,
                       "%s: the weights are %s already and cannot become %s; start from the 16-bit "
                       "model",
                       l->m->dir, gn_qtype_name(b.qtype), gn_qtype_name(l->options.quant));
    l->m->quant = b.qtype;
    *w = (gn_matrix){.qtype = b.qtype, .dtype = b.dtype, .rows = rows, .cols = cols};
    w->offset = b.offset;
    advance(l, b.state);
    status = find_data(l, b.codes, &w->data);
    if (!status) status = find_data(l, b.quant_map, (const void **)&w->code);
    if (!status)
        status =
            find_data(l, b.absmax,
                      b.nested_absmax ? (const void **)&w->absmax_u8 : (const void **)&w->absmax);
    if (!status && b.nested_absmax) {
        status = find_data(l, b.nested_absmax, (const void **)&w->nested_absmax);
        if (!status) status = find_data(l, b.nested_quant_map, (const void **)&w->nested_code);
    }
    return status ? status : gn_model_place(l->m, w, l->err);
}

static gn_qtype quant_of(const loader *l) {
    return l->options.quant == GN_Q_NONE ? GN_Q_NF4 : l->options.quant;
}

static size_t quantized_bytes(const loader *l, int64_t rows, int64_t cols) {
    return gn_quantize_place_bytes(l->m->ctx, quant_of(l), !l->options.no_double_quant, rows, cols);
}

static gn_status quantize(loader *l, const gn_file_tensor *t, gn_matrix *w) {
    const gn_qtype type = quant_of(l);
    const bool nested = gn_qtype_is_4bit(type) && !l->options.no_double_quant;
    gn_model *m = l->m;
    const gn_matrix shape = *w;
    void *memory = gn_model_own(m, quantized_bytes(l, shape.rows, shape.cols));
    gn_error cause = {0};
    const gn_status status = memory ? gn_quantize_place(m->ctx, w, type, nested, t->data, t->dtype,
                                                        shape.rows, shape.cols, memory, &cause)
                                    : GN_ENOMEM;
    if (status)
        return gn_fail(l->err, status, "%s: tensor %s: %s", t->path, t->name,
                       cause.status ? cause.message : gn_status_text(status));
    m->quant = type;
    gn_file_tensor_release(t);
    advance(l, t);
    return GN_OK;
}

static void projection_name(char name[MAX_NAME], int layer, gn_proj proj) {
    snprintf(name, MAX_NAME, "model.layers.%d.%s.weight", layer, gn_proj_names[proj]);
}

static gn_status load_projection(loader *l, int layer, gn_proj proj) {
    char name[MAX_NAME];
    const int64_t rows = gn_proj_rows(&l->m->config, proj),
                  cols = gn_proj_cols(&l->m->config, proj);
    gn_matrix *w = &l->m->layers[layer].proj[proj];
    projection_name(name, layer, proj);
    if (l->m->config.bnb_4bit) return load_bnb(l, name, rows, cols, w);
    if (l->options.as_stored) return load_plain(l, name, rows, cols, w);
    const gn_file_tensor *t = NULL;
    const gn_status status =
        gn_model_find_weight(&t, l->m->file, l->m->dir, name, 2, rows, cols, l->err);
    if (status) return status;
    *w = (gn_matrix){.dtype = t->dtype, .rows = rows, .cols = cols};
    return quantize(l, t, w);
}

static gn_status load_layer(loader *l, int i) {
    char name[MAX_NAME];
    gn_layer *layer = &l->m->layers[i];
    snprintf(name, sizeof name, "model.layers.%d.input_layernorm.weight", i);
    gn_status status = load_norm(l, name, &layer->attn_norm);
    snprintf(name, sizeof name, "model.layers.%d.post_attention_layernorm.weight", i);
    if (!status) status = load_norm(l, name, &layer->mlp_norm);
    for (int p = 0; !status && p < GN_PROJ_COUNT; p++) status = load_projection(l, i, (gn_proj)p);
    return status;
}

static gn_status refuse_unused(loader *l) {
    for (size_t i = 0; i < gn_tensor_file_count(l->m->file); i++) {
        const gn_file_tensor *t = gn_tensor_file_at(l->m->file, i);
        if (!l->used[i] && !gn_model_is_redundant(&l->m->config, t->name))
            return gn_fail(l->err, GN_EFORMAT, "%s: tensor %s has no place in this model", t->path,
                           t->name);
    }
    return GN_OK;
}

static gn_status fill_places(loader *l) {
    gn_model *m = l->m;
    const gn_config *c = &m->config;
    gn_status status = load_plain(l, "model.embed_tokens.weight", c->vocab, c->hidden, &m->embed);
    for (int i = 0; !status && i < c->layers; i++) status = load_layer(l, i);
    if (!status) status = load_norm(l, "model.norm.weight", &m->norm);
    if (!status && c->tied_embeddings)
        m->lm_head = m->embed;
    else if (!status)
        status = load_plain(l, "lm_head.weight", c->vocab, c->hidden, &m->lm_head);
    return status;
}

/* ---- how much that will be ---- */

static size_t placed_size(const loader *l, gn_matrix host) {
    return gn_model_owned_size(gn_place_bytes(l->m->ctx, &host));
}

static gn_status add_plain(const loader *l, const char *name, int64_t rows, int64_t cols,
                           size_t *sum) {
    const gn_file_tensor *t;
    const gn_status status =
        gn_model_find_weight(&t, l->m->file, l->m->dir, name, 2, rows, cols, l->err);
    if (!status)
        *sum += placed_size(
            l, (gn_matrix){.qtype = GN_Q_NONE, .dtype = t->dtype, .rows = rows, .cols = cols});
    return status;
}

static gn_status add_projection(const loader *l, int layer, gn_proj proj, size_t *sum) {
    const gn_model *m = l->m;
    const int64_t rows = gn_proj_rows(&m->config, proj), cols = gn_proj_cols(&m->config, proj);
    char name[MAX_NAME];
    projection_name(name, layer, proj);
    if (m->config.bnb_4bit) {
        gn_bnb_weight b;
        const gn_status status = gn_bnb_find(&b, m->file, m->dir, name, rows, cols, l->err);
        if (status) return status;
        *sum += placed_size(l, (gn_matrix){.qtype = b.qtype,
                                           .dtype = b.dtype,
                                           .rows = rows,
                                           .cols = cols,
                                           .absmax_u8 = b.nested_absmax ? b.absmax->data : NULL});
        return GN_OK;
    }
    if (l->options.as_stored) return add_plain(l, name, rows, cols, sum);
    *sum += gn_model_owned_size(quantized_bytes(l, rows, cols));
    return GN_OK;
}

static gn_status reserve(const loader *l) {
    const gn_config *c = &l->m->config;
    size_t sum = gn_model_vectors_size(l->m);
    if (gn_ctx_is_host(l->m->ctx)) return GN_OK;
    gn_status status = add_plain(l, "model.embed_tokens.weight", c->vocab, c->hidden, &sum);
    if (!status && !c->tied_embeddings)
        status = add_plain(l, "lm_head.weight", c->vocab, c->hidden, &sum);
    for (int i = 0; !status && i < c->layers * GN_PROJ_COUNT; i++)
        status = add_projection(l, i / GN_PROJ_COUNT, (gn_proj)(i % GN_PROJ_COUNT), &sum);
    return status ? status : gn_model_reserve(l->m, sum, l->err);
}

static gn_status load_weights(loader *l) {
    gn_status status = gn_safetensors_open_dir(&l->m->file, l->m->dir, l->err);
    if (status) return status;
    const size_t n = gn_tensor_file_count(l->m->file);
    for (size_t i = 0; i < n; i++) {
        const gn_file_tensor *t = gn_tensor_file_at(l->m->file, i);
        if (!gn_model_is_redundant(&l->m->config, t->name)) l->total += (int64_t)t->bytes;
    }
    l->used = calloc(n + 1, sizeof *l->used);
    status = l->used ? reserve(l) : gn_fail(l->err, GN_ENOMEM, "out of memory");
    if (!status) status = fill_places(l);
    if (!status) status = refuse_unused(l);
    free(l->used);
    return status;
}

static gn_status load(loader *l) {
    gn_model *m = l->m;
    gn_status status = gn_tokenizer_open(&m->tokenizer, m->dir, m->config.vocab, l->err);
    if (!status) status = gn_chat_template_open(&m->chat, l->options.chat_template, m->dir, l->err);
    if (!status) status = load_weights(l);
    if (!status) status = gn_model_finish(m, l->err);
    if (status) return status;
    return gn_adapter_host_open(&m->adapters, m, l->options.adapter_host_bytes, l->err);
}

gn_status gn_model_open(gn_model **out, const char *dir, const gn_model_options *options,
                        gn_error *err) {
    const gn_model_options defaults = {0};
    gn_config config;
    loader l = {.options = options ? *options : defaults, .err = err};
    gn_status status = gn_config_read(&config, dir, err);
    if (!status) status = gn_model_new(&l.m, dir, &config, &l.options, err);
    if (status) return status;
    status = load(&l);
    if (status)
        gn_model_close(l.m);
    else
        *out = l.m;
    return status;
}

/* ---- what the public header says of a model ---- */

gn_model_info gn_model_describe(const gn_model *m) {
    const gn_config *c = &m->config;
    return (gn_model_info){
        .dir = m->dir,
        .device = gn_ctx_device(m->ctx),
        .quant = m->quant,
        .compute = gn_ctx_compute(m->ctx) == GN_BF16 ? GN_COMPUTE_BF16 : GN_COMPUTE_F32,
        .parameters = m->parameters,
        .weight_bytes = m->weight_bytes,
        .layers = c->layers,
        .hidden = c->hidden,
        .intermediate = c->intermediate,
        .heads = c->heads,
        .kv_heads = c->kv_heads,
        .head_dim = c->head_dim,
        .vocab = c->vocab,
        .context = c->max_positions,
    };
}
