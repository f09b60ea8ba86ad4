/* step.c - forward, loss and backward, composed from ops.
 *
 * The forward pass writes each layer's input; the backward pass, from the last layer to the first,
 * computes a layer's inside again from its input and then goes back through it:
 *
 *   q, k, v = W norm(x); rotate q, k; a = attention; m = x + W_o a
 *   gate, up = W norm(m); h = silu(gate) * up; next x = m + W_d h
 *
 * The gradient of the residual stream is one tensor, dx, to which each half of a layer adds. */
#include "trainer/step.h"

#include <stdlib.h>

/* What a layer's backward pass reads. */
enum { X, Q, K, V, A, LSE, M, GATE, UP, H, ACTIVATIONS };
/* Gradients on their way. */
enum { DX, DNORM, DH, DA, DQ, DK, DV, GRADIENTS };

typedef struct activations {
    gn_tensor at[ACTIVATIONS];
} activations;

struct gn_train_step {
    gn_model *model;
    gn_train_limits limits;
    activations *layers; /* views: X is each layer's own, the others are shared */
    gn_tensor last;      /* (max_rows, hidden) f32: the last layer's output */
    gn_tensor normed;    /* the same, normalised, and then its gradient */
    gn_tensor loss;      /* (max_rows) f32 */
    gn_tensor cos, sin;  /* (max_rows, head_dim/2) */
    gn_tensor grads[GRADIENTS];
    float *host_loss; /* (max_rows) */
    int32_t *next;    /* (max_rows): the label that a row is to predict */
    void **owned;     /* allocations on the device */
    int n_owned;
    /* of the batch at hand */
    const gn_train_batch *batch;
    const gn_trained *trained;
    bool wants_grads;
    gn_lora term;
};

/* ---- memory ---- */

static bool allocate(gn_train_step *s, gn_tensor *t, gn_dtype dtype, int64_t cols) {
    const int64_t rows = s->limits.max_rows;
    void *memory = gn_ctx_alloc(s->model->ctx, (size_t)(rows * cols) * gn_dtype_size(dtype));
    *t = gn_tensor_2d(memory, dtype, rows, cols);
    if (memory) s->owned[s->n_owned++] = memory;
    return memory != NULL;
}

static bool allocate_all(gn_train_step *s, const int64_t *cols, const gn_dtype *dtypes,
                         gn_tensor *tensors, int n) {
    for (int i = 0; i < n; i++)
        if (!allocate(s, &tensors[i], dtypes[i], cols[i])) return false;
    return true;
}

static bool allocate_tensors(gn_train_step *s) {
    const gn_config *c = &s->model->config;
    const int64_t hidden = c->hidden, inter = c->intermediate, half = c->head_dim / 2;
    const int64_t dim = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
    const gn_dtype act = gn_ctx_activation(s->model->ctx);
    const int64_t cols[ACTIVATIONS] = {hidden,   dim,    kv,    kv,    dim,
                                       c->heads, hidden, inter, inter, inter};
    const gn_dtype dtypes[ACTIVATIONS] = {GN_F32, act,    act, act, act,
                                          GN_F32, GN_F32, act, act, act};
    const int64_t grad_cols[GRADIENTS] = {hidden, hidden, inter, dim, dim, kv, kv};
    const gn_dtype grad_dtypes[GRADIENTS] = {GN_F32, GN_F32, act, act, act, act, act};
    activations shared;
    if (!allocate_all(s, cols, dtypes, shared.at, ACTIVATIONS)) return false;
    for (int i = 0; i < c->layers; i++) {
        s->layers[i] = shared;
        if (i > 0 && !allocate(s, &s->layers[i].at[X], GN_F32, hidden)) return false;
    }
    return allocate_all(s, grad_cols, grad_dtypes, s->grads, GRADIENTS) &&
           allocate(s, &s->last, GN_F32, hidden) && allocate(s, &s->normed, GN_F32, hidden) &&
           allocate(s, &s->loss, GN_F32, 1) && allocate(s, &s->cos, GN_F32, half) &&
           allocate(s, &s->sin, GN_F32, half);
}

static int64_t max_of(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static gn_status reserve(gn_train_step *s) {
    const gn_config *c = &s->model->config;
    gn_ctx *ctx = s->model->ctx;
    const int64_t dim = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
    const int64_t max_k = max_of(max_of(c->hidden, c->intermediate), dim);
    const int64_t max_n = max_of(max_of(dim + 2 * kv, 2 * (int64_t)c->intermediate), c->hidden);
    const int64_t rows = s->limits.max_rows;
    const size_t bytes[] = {
        gn_linear_bwd_workspace(ctx, rows, max_k, max_n, s->limits.max_rank),
        gn_attention_train_workspace(ctx, rows, c->heads, c->head_dim, s->limits.context),
        gn_cross_entropy_workspace(ctx, c->hidden, c->vocab),
    };
    size_t most = 0;
    for (size_t i = 0; i < sizeof bytes / sizeof *bytes; i++)
        most = bytes[i] > most ? bytes[i] : most;
    const gn_stage_limits limits = {
        .rows = s->limits.max_rows, .seqs = s->limits.max_seqs, .max_blocks = 1, .terms = 1};
    const gn_status status = gn_ctx_reserve(ctx, most);
    return status ? status : gn_stage_reserve(ctx, &limits);
}

static gn_status open_parts(gn_train_step *s) {
    const size_t rows = (size_t)s->limits.max_rows, layers = (size_t)s->model->config.layers;
    s->layers = calloc(layers, sizeof *s->layers);
    s->owned = calloc(layers + ACTIVATIONS + GRADIENTS + 5, sizeof *s->owned);
    s->host_loss = malloc(rows * sizeof *s->host_loss);
    s->next = malloc(rows * sizeof *s->next);
    if (!s->layers || !s->owned || !s->host_loss || !s->next || !allocate_tensors(s))
        return GN_ENOMEM;
    return reserve(s);
}

gn_status gn_train_step_open(gn_train_step **out, gn_model *model, const gn_train_limits *limits,
                             gn_error *err) {
    if (limits->max_rows < 1 || limits->max_seqs < 1 || limits->context < 1 || limits->max_rank < 0)
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
    for (int i = 0; i < s->n_owned; i++) gn_ctx_free(s->model->ctx, s->owned[i]);
    free(s->owned);
    free(s->layers);
    free(s->host_loss);
    free(s->next);
    free(s);
}

/* ---- views of the batch's rows ---- */

static gn_tensor rows_of(const gn_train_step *s, const gn_tensor *t) {
    return gn_tensor_2d(t->data, t->dtype, s->batch->rows, t->shape[1]);
}

static gn_tensor heads_of(const gn_train_step *s, const gn_tensor *t, int64_t heads) {
    const gn_tensor view = {
        t->data, t->dtype, 3, {s->batch->rows, heads, t->shape[1] / heads, 1}, t->shape[1]};
    return view;
}

static gn_tensor act(const gn_train_step *s, int layer, int which) {
    return rows_of(s, &s->layers[layer].at[which]);
}

static gn_tensor grad(const gn_train_step *s, int which) {
    return rows_of(s, &s->grads[which]);
}

static gn_attention_rows attention_rows(const gn_train_step *s, int layer) {
    const gn_config *c = &s->model->config;
    const gn_tensor *at = s->layers[layer].at;
    return (gn_attention_rows){.q = heads_of(s, &at[Q], c->heads),
                               .k = heads_of(s, &at[K], c->kv_heads),
                               .v = heads_of(s, &at[V], c->kv_heads),
                               .y = heads_of(s, &at[A], c->heads),
                               .lse = rows_of(s, &at[LSE]),
                               .seqs = &s->batch->seqs};
}

/* ---- products ---- */

/* The products of x with projections first, first+1, ... of a layer, into y. */
static gn_linear_args product(const gn_train_step *s, int layer, gn_proj first, int n_parts,
                              gn_tensor x, const gn_tensor *norm, gn_epilogue epilogue,
                              const gn_tensor *y) {
    const gn_trained *t = s->trained;
    gn_linear_args args = {.x = x,
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
    const gn_tensor y[] = {act(s, i, Q), act(s, i, K), act(s, i, V)};
    return product(s, i, GN_Q, 3, act(s, i, X), &s->model->layers[i].attn_norm, GN_STORE, y);
}

static gn_linear_args o_product(const gn_train_step *s, int i) {
    const gn_tensor m = act(s, i, M);
    return product(s, i, GN_O, 1, act(s, i, A), NULL, GN_ADD, &m);
}

static gn_linear_args gate_up_product(const gn_train_step *s, int i) {
    const gn_tensor y[] = {act(s, i, GATE), act(s, i, UP)};
    return product(s, i, GN_GATE, 2, act(s, i, M), &s->model->layers[i].mlp_norm, GN_STORE, y);
}

/* Into the next layer's input. */
static gn_linear_args down_product(const gn_train_step *s, int i) {
    const bool is_last = i + 1 == s->model->config.layers;
    const gn_tensor y = is_last ? rows_of(s, &s->last) : act(s, i + 1, X);
    return product(s, i, GN_DOWN, 1, act(s, i, H), NULL, GN_ADD, &y);
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
        if (t->pairs && t->pairs[args->pair + i].rank > 0) {
            part->da = t->grads[args->pair + i].a;
            part->db = t->grads[args->pair + i].b;
        }
        if (t->layers) part->dw = t->layers[layer].proj[first + i];
    }
    return gn_linear_bwd(s->model->ctx, args, &grads);
}

/* ---- forward ---- */

/* y = x, to be added to. */
static gn_status copy_rows(const gn_train_step *s, const gn_tensor *y, const gn_tensor *x) {
    return gn_ctx_copy(s->model->ctx, y->data, x->data,
                       (size_t)gn_tensor_numel(x) * gn_dtype_size(x->dtype));
}

/* From a layer's input to all that its backward pass reads. */
static gn_status fill_layer(const gn_train_step *s, int i) {
    gn_ctx *ctx = s->model->ctx;
    const gn_linear_args qkv = qkv_product(s, i), o = o_product(s, i), gu = gate_up_product(s, i);
    gn_attention_rows attention = attention_rows(s, i);
    const gn_tensor cos = rows_of(s, &s->cos), sin = rows_of(s, &s->sin);
    const gn_tensor x = act(s, i, X), m = act(s, i, M), gate = act(s, i, GATE), up = act(s, i, UP);
    gn_tensor h = act(s, i, H);

    gn_status status = gn_linear(ctx, &qkv);
    if (!status) status = gn_rope(ctx, &attention.q, &cos, &sin);
    if (!status) status = gn_rope(ctx, &attention.k, &cos, &sin);
    if (!status) status = gn_attention_train(ctx, &attention);
    if (!status) status = copy_rows(s, &m, &x);
    if (!status) status = gn_linear(ctx, &o);
    if (!status) status = gn_linear(ctx, &gu);
    if (!status) status = gn_swiglu(ctx, &h, &gate, &up);
    return status;
}

static gn_status run_layer(const gn_train_step *s, int i) {
    const gn_linear_args down = down_product(s, i);
    const gn_tensor m = act(s, i, M);
    gn_status status = fill_layer(s, i);
    if (!status) status = copy_rows(s, &down.part[0].y, &m);
    if (!status) status = gn_linear(s->model->ctx, &down);
    return status;
}

static gn_status forward(const gn_train_step *s) {
    const gn_train_batch *b = s->batch;
    const gn_model *model = s->model;
    gn_tensor x = act(s, 0, X), cos = rows_of(s, &s->cos), sin = rows_of(s, &s->sin);
    gn_status status = gn_stage(model->ctx, b->ids, &b->seqs, &s->term, s->term.pairs != NULL);
    if (!status) status = gn_embed(model->ctx, &x, &model->embed, b->ids, NULL, 0);
    if (!status) status = gn_rope_table(model->ctx, &cos, &sin, &model->inv_freq, &b->seqs);
    for (int i = 0; !status && i < model->config.layers; i++) status = run_layer(s, i);
    return status;
}

/* ---- loss ---- */

/* The losses, and where gradients are wanted the last layer's output's, in DX. */
static gn_status find_loss(const gn_train_step *s) {
    const gn_model *model = s->model;
    const gn_trained *t = s->trained;
    const float eps = model->config.rms_eps;
    const gn_tensor x = rows_of(s, &s->last);
    gn_tensor normed = rows_of(s, &s->normed), dx = grad(s, DX);
    gn_cross_entropy_args args = {.x = normed,
                                  .lm_head = &model->lm_head,
                                  .labels = s->next,
                                  .scale = s->batch->scale,
                                  .loss = gn_tensor_1d(s->loss.data, GN_F32, s->batch->rows)};
    if (s->wants_grads) {
        args.dx = normed;
        args.dw = t->lm_head;
    }
    gn_status status = gn_rmsnorm(model->ctx, &normed, &x, &model->norm, eps);
    if (!status) status = gn_cross_entropy(model->ctx, &args);
    if (!status && s->wants_grads) {
        gn_tensor dw = t->norm;
        status = gn_rmsnorm_bwd(model->ctx, &dx, &dw, &normed, NULL, &x, &model->norm, eps);
    }
    return status;
}

/* ---- backward ---- */

/* Back through norm(x), in front of products: DX += the gradient DNORM leaves in x. */
static gn_status norm_bwd(const gn_train_step *s, gn_tensor dw, const gn_tensor *x,
                          const gn_tensor *norm) {
    gn_tensor dx = grad(s, DX);
    const gn_tensor dy = grad(s, DNORM);
    return gn_rmsnorm_bwd(s->model->ctx, &dx, &dw, &dy, &dx, x, norm, s->model->config.rms_eps);
}

static gn_status mlp_bwd(const gn_train_step *s, int i) {
    gn_ctx *ctx = s->model->ctx;
    const gn_linear_args down = down_product(s, i), gu = gate_up_product(s, i);
    const gn_tensor dx = grad(s, DX), dh = grad(s, DH), m = act(s, i, M);
    gn_tensor gate_up[] = {act(s, i, GATE), act(s, i, UP)}; /* and their gradients */
    const gn_tensor dw = s->trained->layers ? s->trained->layers[i].mlp_norm : (gn_tensor){0};

    gn_status status = product_bwd(s, &down, dh, &dx);
    if (!status)
        status = gn_swiglu_bwd(ctx, &gate_up[0], &gate_up[1], &dh, &gate_up[0], &gate_up[1]);
    if (!status) status = product_bwd(s, &gu, grad(s, DNORM), gate_up);
    if (!status) status = norm_bwd(s, dw, &m, &s->model->layers[i].mlp_norm);
    return status;
}

static gn_status attention_bwd(const gn_train_step *s, int i) {
    gn_ctx *ctx = s->model->ctx;
    const gn_config *c = &s->model->config;
    const gn_linear_args qkv = qkv_product(s, i), o = o_product(s, i);
    const gn_attention_rows attention = attention_rows(s, i);
    const gn_tensor dx = grad(s, DX), x = act(s, i, X);
    const gn_tensor cos = rows_of(s, &s->cos), sin = rows_of(s, &s->sin);
    const gn_tensor da = heads_of(s, &s->grads[DA], c->heads);
    gn_tensor dq = heads_of(s, &s->grads[DQ], c->heads);
    gn_tensor dk = heads_of(s, &s->grads[DK], c->kv_heads);
    gn_tensor dv = heads_of(s, &s->grads[DV], c->kv_heads);
    const gn_tensor dqkv[] = {grad(s, DQ), grad(s, DK), grad(s, DV)};
    const bool ends_here = i == 0 && !s->trained->layers; /* the embedding is frozen */
    const gn_tensor dw = s->trained->layers ? s->trained->layers[i].attn_norm : (gn_tensor){0};

    gn_status status = product_bwd(s, &o, grad(s, DA), &dx);
    if (!status) status = gn_attention_bwd(ctx, &dq, &dk, &dv, &da, &attention);
    if (!status) status = gn_rope_bwd(ctx, &dq, &cos, &sin);
    if (!status) status = gn_rope_bwd(ctx, &dk, &cos, &sin);
    if (!status) status = product_bwd(s, &qkv, ends_here ? (gn_tensor){0} : grad(s, DNORM), dqkv);
    if (!status && !ends_here) status = norm_bwd(s, dw, &x, &s->model->layers[i].attn_norm);
    return status;
}

static gn_status backward(const gn_train_step *s) {
    gn_status status = GN_OK;
    for (int i = s->model->config.layers - 1; !status && i >= 0; i--) {
        status = fill_layer(s, i);
        if (!status) status = mlp_bwd(s, i);
        if (!status) status = attention_bwd(s, i);
    }
    if (status || !s->trained->embed.data) return status;
    gn_tensor dtable = s->trained->embed;
    const gn_tensor dx = grad(s, DX);
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
    const gn_status status =
        gn_ctx_read(s->model->ctx, s->host_loss, s->loss.data, (size_t)rows * sizeof *s->host_loss);
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
