/* activations.c - the table of a step's tensors, and two blocks of memory cut by it. */
#include "trainer/activations.h"

enum { ALIGN = 256, ALWAYS = GN_KEEP_COUNT };

/* ---- the table ---- */

typedef struct kind {
    int64_t cols;
    gn_dtype dtype;
    int keep;      /* a gn_keep, or ALWAYS */
    int64_t spare; /* columns between rows */
} kind;

static void make_table(kind table[GN_ACT_COUNT], const gn_model *model,
                       const gn_train_limits *limits) {
    const gn_config *c = &model->config;
    const int64_t dim = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
    const gn_dtype act = gn_ctx_activation(model->ctx);
    const int64_t spare = gn_ctx_is_host(model->ctx) ? 0 : gn_linear_spare(limits->max_rank);
    table[GN_ACT_X] = (kind){c->hidden, gn_ctx_compute(model->ctx), ALWAYS, 0};
    table[GN_ACT_Q] = (kind){dim, act, GN_KEEP_QKV, 0};
    table[GN_ACT_K] = table[GN_ACT_V] = (kind){kv, act, GN_KEEP_QKV, 0};
    table[GN_ACT_A] = (kind){dim, act, GN_KEEP_ATTENTION, spare};
    table[GN_ACT_LSE] = (kind){c->heads, GN_F32, GN_KEEP_ATTENTION, 0};
    table[GN_ACT_M] = (kind){c->hidden, GN_F32, GN_KEEP_RESIDUAL, 0};
    table[GN_ACT_GATE] = table[GN_ACT_UP] = (kind){c->intermediate, act, GN_KEEP_GATE_UP, 0};
    table[GN_ACT_H] = (kind){c->intermediate, act, GN_KEEP_SWIGLU, spare};
}

static int64_t padded(int64_t rows, int64_t ld, gn_dtype dtype) {
    const int64_t bytes = rows * ld * (int64_t)gn_dtype_size(dtype);
    return (bytes + ALIGN - 1) / ALIGN * ALIGN;
}

static int64_t bytes_of(const kind *k, int64_t rows) {
    return padded(rows, k->cols + k->spare, k->dtype);
}

static int32_t layers_of(const kind *k, const gn_model *model, const gn_train_limits *limits) {
    return k->keep == ALWAYS ? model->config.layers : limits->keep[k->keep];
}

int64_t gn_train_keep_bytes(const gn_model *model, const gn_train_limits *limits, gn_keep what) {
    kind table[GN_ACT_COUNT];
    int64_t bytes = 0;
    make_table(table, model, limits);
    for (int i = 0; i < GN_ACT_COUNT; i++)
        if (table[i].keep == (int)what) bytes += bytes_of(&table[i], limits->max_rows);
    return bytes;
}

/* ---- the ops' working memory ---- */

/* The most that any op of a step needs. */
static int64_t workspace_bytes(const gn_model *model, const gn_train_limits *limits) {
    const gn_config *c = &model->config;
    const gn_ctx *ctx = model->ctx;
    const int64_t dim = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
    const int64_t products[][2] = {{c->hidden, dim + 2 * kv},
                                   {dim, c->hidden},
                                   {c->hidden, 2 * (int64_t)c->intermediate},
                                   {c->intermediate, c->hidden}};
    int64_t most = gn_max((int64_t)gn_attention_train_workspace(ctx, limits->max_rows, c->heads,
                                                                c->head_dim, limits->context),
                          (int64_t)gn_cross_entropy_workspace(ctx, c->hidden, c->vocab));
    for (size_t i = 0; i < sizeof products / sizeof *products; i++)
        most = gn_max(most, (int64_t)gn_linear_bwd_workspace(ctx, limits->max_rows, products[i][0],
                                                             products[i][1], limits->max_rank));
    return most;
}

/* ---- layout ---- */

/* Cuts tensors out of a block, or only counts where there is none. */
typedef struct block {
    char *memory;
    int64_t used;
} block;

static gn_tensor cut(block *b, int64_t rows, int64_t cols, gn_dtype dtype) {
    const gn_tensor t = gn_tensor_2d(b->memory ? b->memory + b->used : NULL, dtype, rows, cols);
    b->used += padded(rows, cols, dtype);
    return t;
}

static gn_tensor cut_kind(block *b, int64_t rows, const kind *k) {
    gn_tensor t = cut(b, rows, k->cols + k->spare, k->dtype);
    t.shape[1] = k->cols;
    return t;
}

static void lay_out_kept(gn_activations *a, const gn_model *model, const gn_train_limits *limits,
                         block *b) {
    kind table[GN_ACT_COUNT];
    make_table(table, model, limits);
    for (int i = 0; i < GN_ACT_COUNT; i++) {
        a->n_kept[i] = layers_of(&table[i], model, limits);
        a->kept[i] = b->memory ? b->memory + b->used : NULL;
        b->used += a->n_kept[i] * bytes_of(&table[i], limits->max_rows);
    }
}

static void lay_out_scratch(gn_activations *a, const gn_model *model, const gn_train_limits *limits,
                            block *b) {
    const gn_config *c = &model->config;
    const int64_t rows = limits->max_rows;
    kind table[GN_ACT_COUNT];
    make_table(table, model, limits);
    const kind *q = &table[GN_ACT_Q], *k = &table[GN_ACT_K];
    const kind dnorm = {c->hidden, q->dtype, ALWAYS, table[GN_ACT_A].spare};
    a->stream = cut(b, rows, c->hidden, GN_F32);
    a->dstream = cut(b, rows, c->hidden, GN_F32);
    a->dnorm = cut_kind(b, rows, &dnorm);
    a->loss = cut(b, rows, 1, GN_F32);
    a->cos = cut(b, rows, c->head_dim / 2, GN_F32);
    a->sin = cut(b, rows, c->head_dim / 2, GN_F32);
    a->at[GN_ACT_X] = gn_tensor_2d(NULL, table[GN_ACT_X].dtype, rows, c->hidden);
    a->at[GN_ACT_M] = a->stream;
    for (int i = GN_ACT_Q; i <= GN_ACT_LSE; i++) a->at[i] = cut_kind(b, rows, &table[i]);

    block gradients = *b; /* of attention, once the MLP's backward pass is over */
    for (int i = GN_ACT_GATE; i <= GN_ACT_H; i++) a->at[i] = cut_kind(b, rows, &table[i]);
    a->da = cut(&gradients, rows, q->cols, q->dtype);
    a->dq = cut(&gradients, rows, q->cols, q->dtype);
    a->dk = cut(&gradients, rows, k->cols, k->dtype);
    a->dv = cut(&gradients, rows, k->cols, k->dtype);
    b->used = gn_max(b->used, gradients.used);
}

gn_train_step_bytes gn_train_step_measure(const gn_model *model, const gn_train_limits *limits) {
    gn_activations a;
    block kept = {0}, scratch = {0};
    lay_out_kept(&a, model, limits, &kept);
    lay_out_scratch(&a, model, limits, &scratch);
    const int64_t inputs = model->config.layers * padded(limits->max_rows, model->config.hidden,
                                                         gn_ctx_compute(model->ctx));
    return (gn_train_step_bytes){.inputs = inputs,
                                 .kept = kept.used - inputs,
                                 .scratch = scratch.used,
                                 .workspace = workspace_bytes(model, limits)};
}

/* ---- open, close, views ---- */

gn_status gn_activations_open(gn_activations *a, const gn_model *model,
                              const gn_train_limits *limits) {
    const gn_train_step_bytes bytes = gn_train_step_measure(model, limits);
    gn_ctx *ctx = model->ctx;
    *a = (gn_activations){.ctx = ctx};
    a->kept_memory = gn_ctx_alloc(ctx, (size_t)(bytes.inputs + bytes.kept));
    a->scratch_memory = gn_ctx_alloc(ctx, (size_t)bytes.scratch);
    if (!a->kept_memory || !a->scratch_memory) return GN_ENOMEM;
    lay_out_kept(a, model, limits, &(block){.memory = a->kept_memory});
    lay_out_scratch(a, model, limits, &(block){.memory = a->scratch_memory});
    return gn_ctx_reserve(ctx, (size_t)bytes.workspace);
}

void gn_activations_close(gn_activations *a) {
    gn_ctx_free(a->ctx, a->kept_memory);
    gn_ctx_free(a->ctx, a->scratch_memory);
}

bool gn_activations_keeps(const gn_activations *a, int layer, gn_activation which) {
    return layer < a->n_kept[which];
}

size_t gn_activations_stride(const gn_activations *a, gn_activation which) {
    const gn_tensor *t = &a->at[which];
    return (size_t)padded(t->shape[0], t->ld, t->dtype);
}

gn_tensor gn_activations_at(const gn_activations *a, int layer, gn_activation which) {
    gn_tensor t = a->at[which];
    if (gn_activations_keeps(a, layer, which))
        t.data = a->kept[which] + (size_t)layer * gn_activations_stride(a, which);
    return t;
}
