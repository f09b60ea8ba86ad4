/* forward.c - the LLaMA forward pass, composed from ops.
 *
 * Per layer: q, k, v = W norm(x); rotate and store; attend; x += W_o a; h = silu(W_g norm(x)) *
 * W_u norm(x); x += W_d h. Six ops a layer; the norms ride in the products' prologues, the
 * residual additions and SwiGLU in their epilogues, LoRA in the products themselves.
 *
 * A step of decoding is the same ops on the same memory each time, so a device that can may record
 * and repeat it (gn_ctx_replay). What a recording depends on is its key. */
#include "engine/forward.h"

#include <stdlib.h>

#include "engine/adapter_memory.h"
#include "engine/hash.h"
#include "kernels/decoder.h"

/* Terms of up to this rank find working memory from the beginning; it grows for larger ones. */
enum { PLANNED_RANK = 64 };

struct gn_forward {
    gn_model *model;
    gn_forward_options limits;
    gn_tensor x;             /* (max_rows, hidden) f32: the residual stream */
    gn_tensor q, k, v, a, h; /* (max_rows, ...) activations */
    gn_tensor cos, sin;      /* (max_rows, head_dim/2) */
    gn_tensor last, logits;  /* (max_logits, hidden), (max_logits, vocab) */
    gn_kv *kv;               /* one a layer */
    gn_decoder *decoder;     /* NULL: this device has none */
    float *host_logits;      /* (max_logits, vocab), where the device's are out of reach */
    gn_adapter_memory *adapters;
    gn_lora *terms;       /* (max_terms) */
    uint64_t *term_ranks; /* (max_terms) hashes of their ranks */
    int32_t max_terms, n_terms;
    int rank; /* reserved for */
};

static gn_dtype kv_dtype(const gn_model *model, gn_kv_dtype dtype) {
    if (dtype == GN_KV_AUTO) return gn_ctx_compute(model->ctx);
    return dtype == GN_KV_FP8 ? GN_F8 : GN_BF16;
}

/* Rows of head_dim that a block has in each of a layer's tensors. */
static int64_t kv_block_rows(const gn_config *c) {
    return (int64_t)c->kv_heads * GN_KV_BLOCK_TOKENS;
}

size_t gn_forward_kv_block_bytes(const gn_model *model, gn_kv_dtype option) {
    const gn_config *c = &model->config;
    const gn_dtype dtype = kv_dtype(model, option);
    const size_t scale = dtype == GN_F8 ? sizeof(float) : 0;
    return 2 * (size_t)c->layers * (size_t)kv_block_rows(c) *
           ((size_t)c->head_dim * gn_dtype_size(dtype) + scale);
}

static bool allocate(gn_ctx *ctx, gn_tensor *t, gn_dtype dtype, int64_t rows, int64_t cols) {
    *t = gn_tensor_2d(gn_ctx_alloc(ctx, (size_t)(rows * cols) * gn_dtype_size(dtype)), dtype, rows,
                      cols);
    return t->data != NULL;
}

/* (blocks, kv_heads, tokens) rows of `cols`; with `ndim` 3 of one, which is no dimension. */
static bool allocate_rows(gn_forward *f, gn_tensor *t, gn_dtype dtype, int ndim, int64_t cols) {
    const gn_config *c = &f->model->config;
    if (!allocate(f->model->ctx, t, dtype, f->limits.kv_blocks, kv_block_rows(c) * cols))
        return false;
    t->ndim = ndim;
    t->shape[1] = c->kv_heads;
    t->shape[2] = GN_KV_BLOCK_TOKENS;
    t->shape[3] = cols;
    return true;
}

static bool allocate_cache(gn_forward *f) {
    const gn_config *c = &f->model->config;
    const gn_dtype dtype = kv_dtype(f->model, f->limits.kv_dtype);
    f->kv = calloc((size_t)c->layers, sizeof *f->kv);
    bool is_there = f->kv != NULL;
    for (int i = 0; i < c->layers && is_there; i++) {
        gn_kv *kv = &f->kv[i];
        is_there = allocate_rows(f, &kv->k, dtype, 4, c->head_dim) &&
                   allocate_rows(f, &kv->v, dtype, 4, c->head_dim);
        if (is_there && dtype == GN_F8)
            is_there = allocate_rows(f, &kv->k_scales, GN_F32, 3, 1) &&
                       allocate_rows(f, &kv->v_scales, GN_F32, 3, 1);
    }
    return is_there;
}

static bool allocate_activations(gn_forward *f) {
    const gn_config *c = &f->model->config;
    gn_ctx *ctx = f->model->ctx;
    const int64_t rows = f->limits.max_rows, outputs = f->limits.max_logits;
    const int64_t dim = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
    const gn_dtype dtype = gn_ctx_activation(ctx);
    if (!gn_ctx_is_host(ctx)) {
        f->host_logits = malloc((size_t)(outputs * c->vocab) * sizeof *f->host_logits);
        if (!f->host_logits) return false;
    }
    return allocate(ctx, &f->x, GN_F32, rows, c->hidden) &&
           allocate(ctx, &f->q, dtype, rows, dim) && allocate(ctx, &f->k, dtype, rows, kv) &&
           allocate(ctx, &f->v, dtype, rows, kv) && allocate(ctx, &f->a, dtype, rows, dim) &&
           allocate(ctx, &f->h, dtype, rows, c->intermediate) &&
           allocate(ctx, &f->cos, GN_F32, rows, c->head_dim / 2) &&
           allocate(ctx, &f->sin, GN_F32, rows, c->head_dim / 2) &&
           allocate(ctx, &f->last, GN_F32, outputs, c->hidden) &&
           allocate(ctx, &f->logits, GN_F32, outputs, c->vocab);
}

/* For LoRA terms of up to `rank`. */
static size_t workspace_bytes(const gn_model *model, const gn_forward_options *limits, int rank) {
    const gn_config *c = &model->config;
    const gn_ctx *ctx = model->ctx;
    const int64_t dim = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
    const int64_t max_k = gn_max(gn_max(c->hidden, c->intermediate), dim);
    const int64_t max_n = gn_max(gn_max(dim + 2 * kv, 2 * (int64_t)c->intermediate), c->vocab);
    const int64_t rows = gn_max(limits->max_rows, limits->max_logits);
    const size_t linear = gn_linear_workspace(ctx, rows, max_k, max_n, rank, GN_MAX_ADAPTERS);
    const size_t attention = gn_attention_workspace(ctx, limits->context);
    return linear > attention ? linear : attention;
}

size_t gn_forward_scratch_bytes(const gn_model *model, const gn_forward_options *limits) {
    const gn_config *c = &model->config;
    const size_t value = gn_dtype_size(gn_ctx_activation(model->ctx)), real = sizeof(float);
    const int64_t heads = c->heads + c->heads + 2 * (int64_t)c->kv_heads; /* of q, a, k and v */
    const size_t row = (size_t)c->hidden * real +
                       (size_t)(heads * c->head_dim + c->intermediate) * value +
                       (size_t)c->head_dim * real;
    const size_t output = (size_t)(c->hidden + c->vocab) * real;
    return (size_t)limits->max_rows * row + (size_t)limits->max_logits * output +
           workspace_bytes(model, limits, PLANNED_RANK);
}

static gn_status reserve(gn_forward *f, int rank) {
    if (rank <= f->rank) return GN_OK;
    const gn_status status =
        gn_ctx_reserve(f->model->ctx, workspace_bytes(f->model, &f->limits, rank));
    if (status == GN_OK) f->rank = rank;
    return status;
}

gn_status gn_forward_acquire(gn_forward *f, const gn_adapter_use *uses, int32_t n, gn_error *err) {
    for (int32_t i = 0; i < n; i++) {
        const int rank = uses[i].adapter->max_rank;
        const gn_status status = reserve(f, rank);
        if (status)
            return gn_fail(err, status, "no working memory for an adapter of rank %d: %s", rank,
                           gn_status_text(status));
    }
    return gn_adapter_memory_acquire(f->adapters, uses, n, err);
}

void gn_forward_release(gn_forward *f, const gn_adapter_use *uses, int32_t n) {
    gn_adapter_memory_release(f->adapters, uses, n);
}

bool gn_forward_holds(const gn_forward *f, const gn_adapter_use *uses, int32_t n) {
    return gn_adapter_memory_holds(f->adapters, uses, n);
}

gn_status gn_forward_poll(gn_forward *f, const gn_adapter_use *uses, int32_t n, bool *ready,
                          gn_error *err) {
    return gn_adapter_memory_poll(f->adapters, uses, n, ready, err);
}

/* All layers at once, where the device can. */
static gn_status open_decoder(gn_forward *f) {
    const gn_config *c = &f->model->config;
    gn_decoder_layer *layers = calloc((size_t)c->layers, sizeof *layers);
    if (!layers) return GN_ENOMEM;
    for (int i = 0; i < c->layers; i++) {
        const gn_layer *layer = &f->model->layers[i];
        const gn_matrix *w = layer->proj;
        layers[i] = (gn_decoder_layer){&layer->attn_norm, &layer->mlp_norm, &w[GN_Q],    &w[GN_K],
                                       &w[GN_V],          &w[GN_O],         &w[GN_GATE], &w[GN_UP],
                                       &w[GN_DOWN],       &f->kv[i]};
    }
    const gn_decoder_options options = {layers,      c->layers,   c->heads,
                                        c->kv_heads, c->head_dim, c->rms_eps};
    const gn_status status = gn_decoder_open(&f->decoder, f->model->ctx, &options);
    free(layers);
    return status == GN_EUNSUPPORTED ? GN_OK : status;
}

static gn_status open_parts(gn_forward *f) {
    gn_ctx *ctx = f->model->ctx;
    const gn_stage_limits limits = {
        .rows = f->limits.max_rows,
        .seqs = f->limits.max_seqs,
        .max_blocks = f->limits.context / GN_KV_BLOCK_TOKENS + 1,
        .terms = f->max_terms,
    };
    f->terms = calloc((size_t)f->max_terms, sizeof *f->terms);
    f->term_ranks = calloc((size_t)f->max_terms, sizeof *f->term_ranks);
    if (!f->terms || !f->term_ranks || !allocate_cache(f) || !allocate_activations(f))
        return GN_ENOMEM;
    gn_status status = reserve(f, PLANNED_RANK);
    if (!status) status = gn_stage_reserve(ctx, &limits);
    if (!status) status = gn_adapter_memory_open(&f->adapters, ctx, f->limits.adapter_bytes);
    if (!status) status = open_decoder(f);
    return status;
}

gn_status gn_forward_open(gn_forward **out, gn_model *model, const gn_forward_options *options,
                          gn_error *err) {
    gn_forward *f = calloc(1, sizeof *f);
    if (!f) return gn_fail(err, GN_ENOMEM, "out of memory");
    f->model = model;
    f->limits = *options;
    f->max_terms = options->max_seqs * GN_MAX_ADAPTERS;
    const gn_status status = open_parts(f);
    if (status) {
        gn_forward_close(f);
        return gn_fail(err, status, "%s for activations of %d tokens and %d KV blocks (%.2f GiB)",
                       gn_status_text(status), options->max_rows, options->kv_blocks,
                       (double)gn_forward_kv_block_bytes(model, options->kv_dtype) *
                           options->kv_blocks / 0x1p30);
    }
    *out = f;
    return GN_OK;
}

void gn_forward_close(gn_forward *f) {
    if (!f) return;
    gn_ctx *ctx = f->model->ctx;
    gn_tensor *tensors[] = {&f->x, &f->q,   &f->k,   &f->v,    &f->a,
                            &f->h, &f->cos, &f->sin, &f->last, &f->logits};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        gn_ctx_free(ctx, tensors[i]->data);
    for (int i = 0; f->kv && i < f->model->config.layers; i++) {
        gn_ctx_free(ctx, f->kv[i].k.data);
        gn_ctx_free(ctx, f->kv[i].v.data);
        gn_ctx_free(ctx, f->kv[i].k_scales.data);
        gn_ctx_free(ctx, f->kv[i].v_scales.data);
    }
    gn_decoder_close(f->decoder);
    gn_adapter_memory_close(f->adapters);
    free(f->host_logits);
    free(f->kv);
    free(f->terms);
    free(f->term_ranks);
    free(f);
}

/* The first `rows` rows, seen as (rows, cols) or as (rows, heads, dim). */
static gn_tensor rows_of(const gn_tensor *t, int64_t rows) {
    return gn_tensor_2d(t->data, t->dtype, rows, t->shape[1]);
}

static gn_tensor heads_of(const gn_tensor *t, int64_t rows, int64_t heads) {
    const gn_tensor view = {
        t->data, t->dtype, 3, {rows, heads, t->shape[1] / heads, 1}, t->shape[1]};
    return view;
}

static bool same_uses(const gn_batch *b, int i, int j) {
    const int n = b->use0[i + 1] - b->use0[i];
    if (n != b->use0[j + 1] - b->use0[j]) return false;
    for (int u = 0; u < n; u++) {
        const gn_adapter_use *p = &b->uses[b->use0[i] + u], *q = &b->uses[b->use0[j] + u];
        if (p->adapter != q->adapter || p->scale != q->scale) return false;
    }
    return true;
}

/* The batch's LoRA terms, the same for every layer. */
static void gather_terms(gn_forward *f, const gn_batch *b) {
    f->n_terms = 0;
    for (int i = 0, end; b->use0 && i < b->seqs.n; i = end) {
        for (end = i + 1; end < b->seqs.n && same_uses(b, i, end);) end++;
        for (int u = b->use0[i]; u < b->use0[i + 1]; u++) {
            f->term_ranks[f->n_terms] = b->uses[u].adapter->ranks_hash;
            gn_lora *term = &f->terms[f->n_terms++];
            *term = (gn_lora){.row0 = b->seqs.row0[i],
                              .rows = b->seqs.row0[end] - b->seqs.row0[i],
                              .scale = b->uses[u].scale};
            gn_adapter_memory_find(f->adapters, b->uses[u].adapter, &term->pairs, &term->placed);
        }
    }
}

/* Products of x with the projections first, first+1, ... first+n_parts-1 of a layer. */
static gn_status project(gn_forward *f, int layer, gn_proj first, int n_parts, gn_tensor x,
                         const gn_tensor *norm, gn_epilogue epilogue, const gn_tensor *y) {
    gn_linear_args args = {.x = x,
                           .norm = norm,
                           .eps = f->model->config.rms_eps,
                           .epilogue = epilogue,
                           .lora = f->terms,
                           .n_lora = f->n_terms,
                           .pair = layer * GN_PROJ_COUNT + (int)first,
                           .n_parts = n_parts};
    for (int i = 0; i < n_parts; i++) {
        args.part[i].y = y[i];
        args.part[i].w = &f->model->layers[layer].proj[(int)first + i];
    }
    return gn_linear(f->model->ctx, &args);
}

static gn_status run_layer(gn_forward *f, const gn_batch *b, int i) {
    const gn_config *c = &f->model->config;
    gn_ctx *ctx = f->model->ctx;
    const gn_layer *layer = &f->model->layers[i];
    const int64_t n = b->rows;
    const gn_tensor x = rows_of(&f->x, n), a = rows_of(&f->a, n), h = rows_of(&f->h, n);
    const gn_tensor qkv[] = {rows_of(&f->q, n), rows_of(&f->k, n), rows_of(&f->v, n)};
    const gn_tensor gate_up[] = {h, h};
    gn_tensor q = heads_of(&f->q, n, c->heads), y = heads_of(&f->a, n, c->heads);
    const gn_tensor k = heads_of(&f->k, n, c->kv_heads), v = heads_of(&f->v, n, c->kv_heads);
    const gn_tensor cos = rows_of(&f->cos, n), sin = rows_of(&f->sin, n);

    gn_status status = project(f, i, GN_Q, 3, x, &layer->attn_norm, GN_STORE, qkv);
    if (status == GN_OK) status = gn_rope_store(ctx, &q, &k, &v, &cos, &sin, &b->seqs, &f->kv[i]);
    if (status == GN_OK) status = gn_attention(ctx, &y, &q, &f->kv[i], &b->seqs);
    if (status == GN_OK) status = project(f, i, GN_O, 1, a, NULL, GN_ADD, &x);
    if (status == GN_OK)
        status = project(f, i, GN_GATE, 2, x, &layer->mlp_norm, GN_SWIGLU, gate_up);
    if (status == GN_OK) status = project(f, i, GN_DOWN, 1, h, NULL, GN_ADD, &x);
    return status;
}

/* One token of each sequence. */
static bool is_decoding(const gn_batch *b) {
    return b->rows == b->seqs.n;
}

typedef struct pass {
    gn_forward *f;
    const gn_batch *batch;
} pass;

static gn_status run_layers(void *arg) {
    gn_forward *f = ((pass *)arg)->f;
    const gn_batch *b = ((pass *)arg)->batch;
    gn_tensor x = rows_of(&f->x, b->rows), cos = rows_of(&f->cos, b->rows),
              sin = rows_of(&f->sin, b->rows);
    gn_status status = gn_embed(f->model->ctx, &x, &f->model->embed, b->ids, b->drawn, b->n_drawn);
    if (status == GN_OK)
        status = gn_rope_table(f->model->ctx, &cos, &sin, &f->model->inv_freq, &b->seqs);
    if (status == GN_OK && f->decoder && is_decoding(b) && b->rows <= GN_DECODER_MAX_ROWS) {
        status = gn_decoder_run(f->decoder, &x, &cos, &sin, &b->seqs, f->terms, f->n_terms);
        if (status != GN_EUNSUPPORTED) return status;
        status = GN_OK;
    }
    for (int i = 0; status == GN_OK && i < f->model->config.layers; i++)
        status = run_layer(f, b, i);
    return status;
}

/* All that decides what a step of decoding launches: how many rows and terms, of which ranks, how
 * many rows those cover together, and the longest context, to the next power of two; and where
 * drawn tokens are. */
static uint64_t key_of(const gn_forward *f, const gn_batch *b) {
    int32_t longest = 0;
    for (int32_t i = 0; i < b->seqs.n; i++)
        if (b->seqs.pos0[i] > longest) longest = b->seqs.pos0[i];
    int32_t bucket = 256;
    while (bucket < longest + 1) bucket *= 2;
    const int32_t uses = b->use0 ? b->use0[b->seqs.n] : 0;
    const int32_t sizes[] = {b->rows, bucket, b->seqs.max_blocks, f->n_terms, uses};
    gn_hash key = GN_HASH_INIT;
    gn_hash_add(&key, sizes, sizeof sizes);
    gn_hash_add(&key, f->term_ranks, (size_t)f->n_terms * sizeof *f->term_ranks);
    gn_hash_add(&key, &b->drawn, sizeof b->drawn);
    return key.h[0];
}

gn_status gn_forward_run(gn_forward *f, const gn_batch *b) {
    if (b->rows < 1 || b->rows > f->limits.max_rows || b->seqs.n > f->limits.max_seqs)
        return GN_EINVAL;
    gather_terms(f, b);
    const gn_status status = gn_stage(f->model->ctx, b->ids, &b->seqs, f->terms, f->n_terms);
    if (status) return status;
    pass p = {f, b};
    return is_decoding(b) ? gn_ctx_replay(f->model->ctx, key_of(f, b), run_layers, &p)
                          : run_layers(&p);
}

/* The end of the run of neighbours that begins at rows[i]. */
static int32_t end_of_run(const int32_t *rows, int32_t i, int32_t n) {
    for (i++; i < n && rows[i] == rows[i - 1] + 1;) i++;
    return i;
}

/* The hidden states of some rows, one after another: where they stand, or copied. */
static gn_status gather_rows(gn_forward *f, const int32_t *rows, int32_t n, gn_tensor *x) {
    const int64_t hidden = f->model->config.hidden;
    float *from = f->x.data, *to = f->last.data;
    const bool in_place = end_of_run(rows, 0, n) == n;
    *x = rows_of(in_place ? &f->x : &f->last, n);
    if (in_place) {
        x->data = from + rows[0] * hidden;
        return GN_OK;
    }
    gn_status status = GN_OK;
    for (int32_t i = 0, end; i < n && !status; i = end) {
        end = end_of_run(rows, i, n);
        status = gn_ctx_copy(f->model->ctx, to + i * hidden, from + rows[i] * hidden,
                             (size_t)(end - i) * (size_t)hidden * sizeof *from);
    }
    return status;
}

gn_status gn_forward_device_logits(gn_forward *f, const int32_t *rows, int32_t n,
                                   gn_tensor *logits) {
    if (n < 1 || n > f->limits.max_logits) return GN_EINVAL;
    gn_linear_args args = {.norm = &f->model->norm,
                           .eps = f->model->config.rms_eps,
                           .epilogue = GN_STORE,
                           .n_parts = 1};
    *logits = rows_of(&f->logits, n);
    args.part[0].y = *logits;
    args.part[0].w = &f->model->lm_head;
    const gn_status status = gather_rows(f, rows, n, &args.x);
    return status ? status : gn_linear(f->model->ctx, &args);
}

gn_status gn_forward_logits(gn_forward *f, const int32_t *rows, int32_t n, const float **logits) {
    gn_tensor on_device;
    const gn_status status = gn_forward_device_logits(f, rows, n, &on_device);
    if (status) return status;
    *logits = f->host_logits ? f->host_logits : on_device.data;
    if (!f->host_logits) return GN_OK;
    return gn_ctx_read(f->model->ctx, f->host_logits, on_device.data,
                       (size_t)n * (size_t)f->model->config.vocab * sizeof **logits);
}
