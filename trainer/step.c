/* step.c - forward, loss and backward, composed from ops.
 *
 * A layer, on the residual stream S:
 *
 *   x = S;  q, k, v = W norm(S); rotate q, k; a = attention; S += W_o a
 *   m = S;  gate, up = W norm(S); h = silu(gate) * up; S += W_d h
 *
 * The forward pass keeps x of every layer, and of some layers more. The backward pass, from the
 * last layer to the first, computes what is missing and then goes back through the layer. The
 * gradient of the stream is one tensor, dstream, to which each half of a layer adds. */
#include "trainer/step.h"

#include <stdlib.h>

#include "trainer/activations.h"

struct gn_train_step {
    gn_model *model;
    gn_train_limits limits;
    gn_activations act;
    float *host_loss; /* (max_rows) */
    int32_t *next;    /* (max_rows): the label that a row is to predict */
    /* of the batch at hand */
    const gn_train_batch *batch;
    const gn_trained *trained;
    bool wants_grads;
    gn_lora term;
    /* the inputs of the layers from lent_from on are lent to it; NULL: none are */
    gn_pages *lodger;
    int lent_from;
};

/* ---- open and close ---- */

static gn_status open_parts(gn_train_step *s) {
    const size_t rows = (size_t)s->limits.max_rows;
    const gn_stage_limits limits = {
        .rows = s->limits.max_rows, .seqs = s->limits.max_seqs, .max_blocks = 1, .terms = 1};
    s->host_loss = malloc(rows * sizeof *s->host_loss);
    s->next = malloc(rows * sizeof *s->next);
    if (!s->host_loss || !s->next) return GN_ENOMEM;
    const gn_status status = gn_activations_open(&s->act, s->model, &s->limits);
    return status ? status : gn_stage_reserve(s->model->ctx, &limits);
}

/* ---- memory that is lent ---- */

/* Lends the input of a layer whose backward pass is over: as soon as it makes a page, with those of
 * later layers, behind it, that did not. */
static gn_status lend_input(gn_train_step *s, int i) {
    gn_pages *pages = s->trained->lodger;
    if (!pages || !s->batch->is_last) return GN_OK;
    if (!s->lodger) s->lent_from = s->model->config.layers;
    s->lodger = pages;
    const gn_tensor x = gn_activations_at(&s->act, i, GN_ACT_X);
    const size_t bytes = (size_t)(s->lent_from - i) * gn_activations_stride(&s->act, GN_ACT_X);
    if (bytes < gn_pages_page_bytes(pages)) return GN_OK;
    s->lent_from = i;
    return gn_pages_lend(pages, x.data, bytes);
}

/* Before anything is written to the input of layer i. */
static gn_status take_back(const gn_train_step *s, int i) {
    if (!s->lodger) return GN_OK;
    const gn_tensor x = gn_activations_at(&s->act, i, GN_ACT_X);
    return gn_pages_return(s->lodger, x.data, gn_activations_stride(&s->act, GN_ACT_X));
}

static gn_status take_back_all(gn_train_step *s) {
    gn_status status = s->lodger ? gn_pages_recall(s->lodger) : GN_OK;
    for (int i = 0; !status && s->lodger && i < s->model->config.layers; i++)
        status = take_back(s, i);
    s->lodger = NULL;
    return status;
}

static bool are_limits(const gn_train_limits *l, int32_t layers) {
    for (int i = 0; i < GN_KEEP_COUNT; i++)
        if (l->keep[i] < 0 || l->keep[i] >= layers) return false;
    return l->max_rows >= 1 && l->max_seqs >= 1 && l->context >= 1 && l->max_rank >= 0;
}

gn_status gn_train_step_open(gn_train_step **out, gn_model *model, const gn_train_limits *limits,
                             gn_error *err) {
    if (!are_limits(limits, model->config.layers))
        return gn_fail(err, GN_EINVAL, "a training step of %d rows, %d sequences", limits->max_rows,
                       limits->max_seqs);
    gn_train_step *s = calloc(1, sizeof *s);
    if (!s) return gn_fail(err, GN_ENOMEM, "out of memory");
    s->model = model;
    s->limits = *limits;
    const gn_status status = open_parts(s);
    if (status) {
        gn_train_step_close(s);
        return gn_fail(err, status, "%s for the activations of %d tokens", gn_status_text(status),
                       limits->max_rows);
    }
    *out = s;
    return GN_OK;
}

void gn_train_step_close(gn_train_step *s) {
    if (!s) return;
    const gn_status status = take_back_all(s);
    (void)status; /* the device has failed, and its pages are lost */
    gn_activations_close(&s->act);
    free(s->host_loss);
    free(s->next);
    free(s);
}

/* ---- views of the batch's rows ---- */

static gn_tensor rows_of(const gn_train_step *s, const gn_tensor *t) {
    gn_tensor rows = *t;
    rows.shape[0] = s->batch->rows;
    return rows;
}

static gn_tensor heads_of(const gn_train_step *s, const gn_tensor *t, int64_t heads) {
    const gn_tensor view = {
        t->data, t->dtype, 3, {s->batch->rows, heads, t->shape[1] / heads, 1}, t->ld};
    return view;
}

static gn_tensor act(const gn_train_step *s, int layer, gn_activation which) {
    const gn_tensor t = gn_activations_at(&s->act, layer, which);
    return rows_of(s, &t);
}

static gn_tensor act_heads(const gn_train_step *s, int layer, gn_activation which, int64_t heads) {
    const gn_tensor t = gn_activations_at(&s->act, layer, which);
    return heads_of(s, &t, heads);
}

static gn_tensor stream_of(const gn_train_step *s) {
    return rows_of(s, &s->act.stream);
}

static gn_attention_rows attention_rows(const gn_train_step *s, int layer) {
    const gn_config *c = &s->model->config;
    return (gn_attention_rows){.q = act_heads(s, layer, GN_ACT_Q, c->heads),
                               .k = act_heads(s, layer, GN_ACT_K, c->kv_heads),
                               .v = act_heads(s, layer, GN_ACT_V, c->kv_heads),
                               .y = act_heads(s, layer, GN_ACT_A, c->heads),
                               .lse = act(s, layer, GN_ACT_LSE),
                               .seqs = &s->batch->seqs};
}

/* ---- products ---- */

/* The layer's input as its products read it: as it was kept, or the stream. */
static bool reads_kept(const gn_train_step *s) {
    return s->act.at[GN_ACT_X].dtype == gn_ctx_activation(s->model->ctx);
}

static gn_tensor input_of(const gn_train_step *s, int layer) {
    return reads_kept(s) ? act(s, layer, GN_ACT_X) : stream_of(s);
}

/* The products of x with projections first, first+1, ... of a layer, into y. */
static gn_linear_args product(const gn_train_step *s, int layer, gn_proj first, int n_parts,
                              gn_tensor x, const gn_tensor *norm, gn_epilogue epilogue,
                              const gn_tensor *y) {
    const gn_trained *t = s->trained;
    gn_linear_args args = {.x = x,
                           .x_spare = x.ld - x.shape[1],
                           .norm = norm,
                           .eps = s->model->config.rms_eps,
                           .epilogue = epilogue,
                           .lora = &s->term,
                           .n_lora = t->pairs != NULL,
                           .pair = layer * GN_PROJ_COUNT + (int)first,
                           .n_parts = n_parts};
    if (s->wants_grads)
        args.dropout = (gn_dropout){.p = t->dropout, .step = s->batch->number, .seed = t->seed};
    for (int i = 0; i < n_parts; i++) {
        args.part[i].y = y[i];
        args.part[i].w = &s->model->layers[layer].proj[(int)first + i];
    }
    return args;
}

static gn_linear_args qkv_product(const gn_train_step *s, int i) {
    const gn_tensor y[] = {act(s, i, GN_ACT_Q), act(s, i, GN_ACT_K), act(s, i, GN_ACT_V)};
    return product(s, i, GN_Q, 3, input_of(s, i), &s->model->layers[i].attn_norm, GN_STORE, y);
}

static gn_linear_args o_product(const gn_train_step *s, int i) {
    const gn_tensor y = stream_of(s);
    return product(s, i, GN_O, 1, act(s, i, GN_ACT_A), NULL, GN_ADD, &y);
}

static gn_linear_args gate_up_product(const gn_train_step *s, int i, gn_tensor m) {
    const gn_tensor y[] = {act(s, i, GN_ACT_GATE), act(s, i, GN_ACT_UP)};
    return product(s, i, GN_GATE, 2, m, &s->model->layers[i].mlp_norm, GN_STORE, y);
}

static gn_linear_args down_product(const gn_train_step *s, int i) {
    const gn_tensor y = stream_of(s);
    return product(s, i, GN_DOWN, 1, act(s, i, GN_ACT_H), NULL, GN_ADD, &y);
}

/* Gradients of such a product, from dy of each part into dx (data NULL: nobody wants it). */
static gn_status product_bwd(const gn_train_step *s, const gn_linear_args *args, gn_tensor dx,
                             const gn_tensor *dy) {
    const gn_trained *t = s->trained;
    const int layer = args->pair / GN_PROJ_COUNT, first = args->pair % GN_PROJ_COUNT;
    gn_linear_grads grads = {.dx = dx};
    for (int i = 0; i < args->n_parts; i++) {
        struct gn_linear_part_grads *part = &grads.part[i];
        part->dy = dy[i];
        part->dy_spare = dy[i].ld - dy[i].shape[1];
        if (t->pairs && t->pairs[args->pair + i].rank > 0) {
            part->da = t->grads[args->pair + i].a;
            part->db = t->grads[args->pair + i].b;
        }
        if (t->layers) part->dw = t->layers[layer].proj[first + i];
    }
    return gn_linear_bwd(s->model->ctx, args, &grads);
}

/* ---- the parts of a layer ---- */

/* The stream becomes the layer's input, as it is kept. */
static gn_status load_input(const gn_train_step *s, int i) {
    gn_tensor stream = stream_of(s);
    const gn_tensor x = act(s, i, GN_ACT_X);
    return gn_convert(s->model->ctx, &stream, &x);
}

/* Keeps the stream as the layer's input, and rounds it to what is kept. */
static gn_status store_input(const gn_train_step *s, int i) {
    const gn_tensor stream = stream_of(s);
    gn_tensor x = act(s, i, GN_ACT_X);
    const gn_status status = gn_convert(s->model->ctx, &x, &stream);
    return status || x.dtype == GN_F32 ? status : load_input(s, i);
}

static gn_status run_qkv(const gn_train_step *s, int i) {
    gn_ctx *ctx = s->model->ctx;
    const gn_linear_args qkv = qkv_product(s, i);
    const gn_tensor cos = rows_of(s, &s->act.cos), sin = rows_of(s, &s->act.sin);
    gn_attention_rows rows = attention_rows(s, i);
    gn_status status = gn_linear(ctx, &qkv);
    if (!status) status = gn_rope(ctx, &rows.q, &cos, &sin);
    if (!status) status = gn_rope(ctx, &rows.k, &cos, &sin);
    return status;
}

static gn_status run_attention(const gn_train_step *s, int i) {
    const gn_attention_rows rows = attention_rows(s, i);
    return gn_attention_train(s->model->ctx, &rows);
}

static gn_status add_attention(const gn_train_step *s, int i) {
    const gn_linear_args o = o_product(s, i);
    return gn_linear(s->model->ctx, &o);
}

static gn_status run_gate_up(const gn_train_step *s, int i, gn_tensor m) {
    const gn_linear_args gate_up = gate_up_product(s, i, m);
    return gn_linear(s->model->ctx, &gate_up);
}

static gn_status run_swiglu(const gn_train_step *s, int i) {
    const gn_tensor gate = act(s, i, GN_ACT_GATE), up = act(s, i, GN_ACT_UP);
    gn_tensor h = act(s, i, GN_ACT_H);
    return gn_swiglu(s->model->ctx, &h, &gate, &up);
}

/* ---- forward ---- */

static gn_status keep_residual(const gn_train_step *s, int i) {
    gn_tensor m = act(s, i, GN_ACT_M);
    const gn_tensor stream = stream_of(s);
    return m.data == stream.data ? GN_OK : gn_convert(s->model->ctx, &m, &stream);
}

static gn_status run_layer(const gn_train_step *s, int i) {
    const gn_linear_args down = down_product(s, i);
    gn_status status = take_back(s, i);
    if (!status) status = store_input(s, i);
    if (!status) status = run_qkv(s, i);
    if (!status) status = run_attention(s, i);
    if (!status) status = add_attention(s, i);
    if (!status) status = keep_residual(s, i);
    if (!status) status = run_gate_up(s, i, stream_of(s));
    if (!status) status = run_swiglu(s, i);
    if (!status) status = gn_linear(s->model->ctx, &down);
    return status;
}

static gn_status forward(gn_train_step *s) {
    const gn_train_batch *b = s->batch;
    const gn_model *model = s->model;
    gn_tensor x = stream_of(s), cos = rows_of(s, &s->act.cos), sin = rows_of(s, &s->act.sin);
    gn_status status = s->lodger ? gn_pages_recall(s->lodger) : GN_OK;
    if (!status) status = gn_stage(model->ctx, b->ids, &b->seqs, &s->term, s->term.pairs != NULL);
    if (!status) status = gn_embed(model->ctx, &x, &model->embed, b->ids, NULL, 0);
    if (!status) status = gn_rope_table(model->ctx, &cos, &sin, &model->inv_freq, &b->seqs);
    for (int i = 0; !status && i < model->config.layers; i++) status = run_layer(s, i);
    if (!status) s->lodger = NULL;
    return status;
}

/* ---- loss ---- */

/* The losses, and where gradients are wanted the stream's, in dstream: which until then holds the
 * normalised stream, and then its gradient. */
static gn_status find_loss(const gn_train_step *s) {
    gn_ctx *ctx = s->model->ctx;
    const gn_model *model = s->model;
    const gn_trained *t = s->trained;
    const float eps = model->config.rms_eps;
    const gn_tensor x = stream_of(s);
    gn_tensor dx = rows_of(s, &s->act.dstream), dy = rows_of(s, &s->act.dnorm), dw = t->norm;
    gn_tensor *rounded = dy.dtype == GN_F32 ? NULL : &dy;
    gn_cross_entropy_args args = {
        .x = dx,
        .lm_head = &model->lm_head,
        .labels = s->next,
        .scale = s->batch->scale,
        .loss = gn_tensor_1d(s->act.loss.data, GN_F32, s->batch->rows),
    };
    if (s->wants_grads) {
        args.dx = dx;
        args.dw = t->lm_head;
    }
    gn_status status = gn_rmsnorm(ctx, &dx, &x, &model->norm, eps);
    if (!status) status = gn_cross_entropy(ctx, &args);
    if (status || !s->wants_grads) return status;
    status = gn_convert(ctx, &dy, &dx);
    if (!status) status = gn_rmsnorm_bwd(ctx, &dx, rounded, &dw, &dy, NULL, &x, &model->norm, eps);
    return status;
}

/* ---- backward ---- */

/* All that the layer's backward pass reads, but for what was kept and, of the last layer, what its
 * forward pass left. Then *m is the residual stream after attention. */
static gn_status fill_layer(const gn_train_step *s, int i, gn_tensor *m) {
    const gn_activations *a = &s->act;
    const bool is_last = i + 1 == s->model->config.layers;
    const bool has_qkv = is_last || gn_activations_keeps(a, i, GN_ACT_Q);
    const bool has_attention = is_last || gn_activations_keeps(a, i, GN_ACT_A);
    const bool has_residual = gn_activations_keeps(a, i, GN_ACT_M);
    const bool has_gate_up = is_last || gn_activations_keeps(a, i, GN_ACT_GATE);
    const bool has_swiglu = is_last || gn_activations_keeps(a, i, GN_ACT_H);
    gn_status status = has_qkv && has_residual ? GN_OK : load_input(s, i);
    if (!status && !has_qkv) status = run_qkv(s, i);
    if (!status && !has_attention) status = run_attention(s, i);
    if (!status && !has_residual) status = add_attention(s, i);
    *m = act(s, i, GN_ACT_M);
    if (!status && !has_gate_up) status = run_gate_up(s, i, *m);
    if (!status && !has_swiglu) status = run_swiglu(s, i);
    return status;
}

/* dstream as products read it: rounded into dnorm, where activations are. */
static gn_tensor rounded_dstream(const gn_train_step *s) {
    return rows_of(s, s->act.dnorm.dtype == GN_F32 ? &s->act.dstream : &s->act.dnorm);
}

/* Back through norm(x), in front of products: dstream += the gradient that dnorm leaves in x. */
static gn_status norm_bwd(const gn_train_step *s, gn_tensor dw, const gn_tensor *x,
                          const gn_tensor *norm) {
    gn_tensor dx = rows_of(s, &s->act.dstream);
    gn_tensor dy = rows_of(s, &s->act.dnorm), *rounded = dy.dtype == GN_F32 ? NULL : &dy;
    return gn_rmsnorm_bwd(s->model->ctx, &dx, rounded, &dw, &dy, &dx, x, norm,
                          s->model->config.rms_eps);
}

/* The gradient of h takes its place. */
static gn_status down_bwd(const gn_train_step *s, int i) {
    const gn_linear_args down = down_product(s, i);
    const gn_tensor dy = rounded_dstream(s);
    return product_bwd(s, &down, down.x, &dy);
}

static gn_status mlp_bwd(const gn_train_step *s, int i, gn_tensor m) {
    const gn_linear_args gate_up = gate_up_product(s, i, m);
    const gn_tensor dh = act(s, i, GN_ACT_H);
    gn_tensor gate = act(s, i, GN_ACT_GATE), up = act(s, i, GN_ACT_UP); /* and their gradients */
    const gn_tensor dw = s->trained->layers ? s->trained->layers[i].mlp_norm : (gn_tensor){0};

    gn_status status = down_bwd(s, i);
    if (!status) status = gn_swiglu_bwd(s->model->ctx, &gate, &up, &dh, &gate, &up);
    const gn_tensor dy[] = {gate, up};
    if (!status) status = product_bwd(s, &gate_up, rows_of(s, &s->act.dnorm), dy);
    if (!status) status = norm_bwd(s, dw, &m, &s->model->layers[i].mlp_norm);
    return status;
}

static gn_status attention_bwd(const gn_train_step *s, int i) {
    gn_ctx *ctx = s->model->ctx;
    const gn_config *c = &s->model->config;
    const gn_activations *a = &s->act;
    const gn_linear_args qkv = qkv_product(s, i), o = o_product(s, i);
    const gn_attention_rows rows = attention_rows(s, i);
    const gn_tensor dx = rounded_dstream(s), x = input_of(s, i);
    const gn_tensor cos = rows_of(s, &a->cos), sin = rows_of(s, &a->sin);
    const gn_tensor da = heads_of(s, &a->da, c->heads);
    gn_tensor dq = heads_of(s, &a->dq, c->heads), dk = heads_of(s, &a->dk, c->kv_heads);
    gn_tensor dv = heads_of(s, &a->dv, c->kv_heads);
    const gn_tensor dy[] = {rows_of(s, &a->dq), rows_of(s, &a->dk), rows_of(s, &a->dv)};
    const bool ends_here = i == 0 && !s->trained->layers; /* the embedding is frozen */
    const gn_tensor dnorm = ends_here ? (gn_tensor){0} : rows_of(s, &a->dnorm);
    const gn_tensor dw = s->trained->layers ? s->trained->layers[i].attn_norm : (gn_tensor){0};

    gn_status status = product_bwd(s, &o, rows_of(s, &a->da), &dx);
    if (!status) status = gn_attention_bwd(ctx, &dq, &dk, &dv, &da, &rows);
    if (!status) status = gn_rope_bwd(ctx, &dq, &cos, &sin);
    if (!status) status = gn_rope_bwd(ctx, &dk, &cos, &sin);
    if (!status && !reads_kept(s)) status = load_input(s, i);
    if (!status) status = product_bwd(s, &qkv, dnorm, dy);
    if (!status && !ends_here) status = norm_bwd(s, dw, &x, &s->model->layers[i].attn_norm);
    return status;
}

static gn_status layer_bwd(gn_train_step *s, int i) {
    const gn_trained *t = s->trained;
    gn_tensor m;
    gn_status status = fill_layer(s, i, &m);
    if (!status && t->begin_layer) status = t->begin_layer(t->user, i);
    if (status) return status;
    status = mlp_bwd(s, i, m);
    if (!status) status = attention_bwd(s, i);
    const gn_status ended = t->begin_layer ? t->end_layer(t->user, i) : GN_OK;
    if (!status) status = ended;
    return status ? status : lend_input(s, i);
}

static gn_status backward(gn_train_step *s) {
    gn_status status = GN_OK;
    for (int i = s->model->config.layers - 1; !status && i >= 0; i--) status = layer_bwd(s, i);
    if (status || !s->trained->embed.data) return status;
    gn_tensor dtable = s->trained->embed;
    const gn_tensor dx = rows_of(s, &s->act.dstream);
    return gn_embed_bwd(s->model->ctx, &dtable, &dx, s->batch->ids);
}

/* ---- the step ---- */

/* next[t]: the label of the token after row t, in the same sequence. */
static void shift_labels(gn_train_step *s, const gn_train_batch *b) {
    for (int32_t i = 0; i < b->seqs.n; i++)
        for (int32_t t = b->seqs.row0[i], end = b->seqs.row0[i + 1]; t < end; t++)
            s->next[t] = t + 1 < end ? b->labels[t + 1] : GN_IGNORED_LABEL;
}

int64_t gn_train_count(const gn_train_batch *b) {
    int64_t n = 0;
    for (int32_t i = 0; i < b->seqs.n; i++)
        for (int32_t t = b->seqs.row0[i] + 1; t < b->seqs.row0[i + 1]; t++)
            n += b->labels[t] != GN_IGNORED_LABEL;
    return n;
}

static gn_status sum_loss(const gn_train_step *s, double *loss) {
    const int32_t rows = s->batch->rows;
    const gn_status status = gn_ctx_read(s->model->ctx, s->host_loss, s->act.loss.data,
                                         (size_t)rows * sizeof *s->host_loss);
    *loss = 0;
    for (int32_t t = 0; t < rows; t++) *loss += s->host_loss[t];
    return status;
}

/* The sequences cover the rows in order, and fit. */
static bool is_batch(const gn_train_step *s, const gn_train_batch *b) {
    const gn_seqs *seqs = &b->seqs;
    if (b->rows < 1 || b->rows > s->limits.max_rows || !b->ids || !b->labels) return false;
    if (seqs->n < 1 || seqs->n > s->limits.max_seqs || seqs->max_blocks != 0) return false;
    if (seqs->row0[0] != 0 || seqs->row0[seqs->n] != b->rows) return false;
    for (int32_t i = 0; i < seqs->n; i++) {
        const int64_t rows = (int64_t)seqs->row0[i + 1] - seqs->row0[i];
        if (rows < 0 || rows > s->limits.context) return false;
    }
    return true;
}

static gn_status run(gn_train_step *s, const gn_train_batch *batch, const gn_trained *trained,
                     bool wants_grads, double *loss) {
    if (!trained || !is_batch(s, batch)) return GN_EINVAL;
    s->batch = batch;
    s->trained = trained;
    s->wants_grads = wants_grads;
    s->term = (gn_lora){
        .rows = batch->rows, .scale = 1, .pairs = trained->pairs, .placed = trained->placed};
    shift_labels(s, batch);
    gn_status status = forward(s);
    if (!status) status = find_loss(s);
    if (!status && wants_grads) status = backward(s);
    return status ? status : sum_loss(s, loss);
}

gn_status gn_train_step_run(gn_train_step *s, const gn_train_batch *batch,
                            const gn_trained *trained, double *loss) {
    return run(s, batch, trained, true, loss);
}

gn_status gn_train_step_loss(gn_train_step *s, const gn_train_batch *batch,
                             const gn_trained *trained, double *loss) {
    return run(s, batch, trained, false, loss);
}

/* Lets every sequence learn a token alone, where its first label is; false: one has no label. */
static bool choose_label(gn_train_step *s, const gn_train_batch *b, int32_t id) {
    bool ok = true;
    shift_labels(s, b);
    for (int32_t i = 0; i < b->seqs.n; i++) {
        int32_t n = 0;
        for (int32_t t = b->seqs.row0[i]; t < b->seqs.row0[i + 1]; t++)
            if (s->next[t] != GN_IGNORED_LABEL) s->next[t] = n++ ? GN_IGNORED_LABEL : id;
        ok = ok && n > 0;
    }
    return ok;
}

gn_status gn_train_step_choose(gn_train_step *s, const gn_train_batch *batch,
                               const gn_trained *trained, const int32_t *choices, int n,
                               double *loss, float *nll) {
    gn_status status = run(s, batch, trained, false, loss);
    for (int c = 0; c < n && !status; c++) {
        double sum;
        if (!choose_label(s, batch, choices[c])) return GN_EINVAL;
        status = find_loss(s);
        if (!status) status = sum_loss(s, &sum);
        for (int32_t i = 0; i < batch->seqs.n && !status; i++) {
            int32_t t = batch->seqs.row0[i];
            while (s->next[t] == GN_IGNORED_LABEL) t++;
            nll[(int64_t)i * n + c] = s->host_loss[t];
        }
    }
    return status;
}
