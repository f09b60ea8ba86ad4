/* merge.c - a model folder with an adapter added into its projections.
 *
 * An adapter corrects the weights that it was trained over. With QLoRA those are the quantized
 * ones: added to them once they are dequantized, it gives the model that was trained; added to the
 * 16-bit weights that they were made from, it gives another one, close by. Which of the two a
 * folder holds stands in its merge.json. */
#include "engine/merge.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/adapter.h"
#include "engine/bnb.h"
#include "engine/model_copy.h"
#include "engine/model_files.h"
#include "kernels/ops.h"

enum { ROWS = 256 }; /* of a weight that are merged together */

/* Rows of a weight on their way from the base to the file; the buffers hold those of any weight. */
typedef struct sum {
    const gn_matrix *base;
    const gn_lora_pair *pair; /* rank 0: nothing is added */
    gn_dtype dtype;
    int64_t row0;
    float *rows; /* (ROWS, cols) */
    float *a;    /* (cols, rank): A transposed, times the pair's scale */
    float *b;    /* (ROWS, rank) */
    char *out;   /* (ROWS, cols) of dtype */
    atomic_bool finite;
} sum;

typedef struct job {
    const gn_merge_options *options;
    gn_adapter *adapter;
    gn_ctx *ctx;
    sum sum;
    gn_merge_result result;
} job;

static const gn_lora_pair *pair_of(const job *j, const gn_copy_item *item) {
    return &j->adapter->pairs[item->layer][item->proj];
}

/* ---- the base's weight ---- */

/* What the adapter is added to; values are dequantized as they are needed. */
typedef struct base {
    gn_matrix matrix;
    void *memory; /* what of it is not in the file */
} base;

/* In the file floats may stand unaligned. */
static const float *take_floats(float **memory, const gn_file_tensor *t) {
    const float *taken = memcpy(*memory, t->data, t->bytes);
    *memory += t->bytes / sizeof(float);
    return taken;
}

static gn_status dequantize_stored(base *b, gn_model_copy *c, const gn_copy_item *item) {
    gn_bnb_weight w;
    gn_matrix *m = &b->matrix;
    const gn_status status =
        gn_bnb_find(&w, c->file, c->in, item->from[0]->name, m->rows, m->cols, c->err);
    if (status) return status;
    const bool nested = w.nested_absmax;
    const size_t scale_bytes =
        nested ? w.nested_absmax->bytes + w.nested_quant_map->bytes : w.absmax->bytes;
    float *memory = b->memory = malloc(w.quant_map->bytes + scale_bytes);
    if (!memory) return gn_fail(c->err, GN_ENOMEM, "out of memory for %s", w.codes->name);
    m->qtype = w.qtype;
    m->dtype = w.dtype;
    m->data = w.codes->data;
    m->code = take_floats(&memory, w.quant_map);
    m->offset = w.offset;
    if (!nested) {
        m->absmax = take_floats(&memory, w.absmax);
        return GN_OK;
    }
    m->absmax_u8 = w.absmax->data;
    m->nested_absmax = take_floats(&memory, w.nested_absmax);
    m->nested_code = take_floats(&memory, w.nested_quant_map);
    return GN_OK;
}

static gn_status quantize(base *b, const job *j, const gn_file_tensor *t, gn_error *err) {
    const gn_merge_options *o = j->options;
    const int64_t rows = b->matrix.rows, cols = b->matrix.cols;
    gn_error cause = {0};
    b->memory = malloc(gn_quantize_place_bytes(j->ctx, o->quant, o->double_quant, rows, cols));
    if (!b->memory) return gn_fail(err, GN_ENOMEM, "out of memory for %s", t->name);
    const gn_status status = gn_quantize_place(j->ctx, &b->matrix, o->quant, o->double_quant,
                                               t->data, t->dtype, rows, cols, b->memory, &cause);
    return status ? gn_fail(err, status, "%s: tensor %s: %s", t->path, t->name, cause.message)
                  : GN_OK;
}

static gn_status open_base(base *b, gn_model_copy *c, const gn_copy_item *item) {
    const job *j = c->user;
    const gn_file_tensor *t = item->from[0];
    *b = (base){.matrix = {.dtype = t->dtype,
                           .rows = gn_proj_rows(&c->config, item->proj),
                           .cols = gn_proj_cols(&c->config, item->proj),
                           .data = t->data}};
    if (c->config.bnb_4bit) return dequantize_stored(b, c, item);
    return j->options->quant == GN_Q_NONE ? GN_OK : quantize(b, j, t, c->err);
}

/* ---- the sum ---- */

static bool open_sum(sum *s, int64_t max_cols, int64_t max_rank) {
    const size_t cols = (size_t)max_cols, rank = (size_t)max_rank;
    s->rows = malloc(ROWS * cols * sizeof *s->rows);
    s->out = malloc(ROWS * cols * sizeof(float));
    s->a = malloc(cols * rank * sizeof *s->a);
    s->b = malloc(ROWS * rank * sizeof *s->b);
    atomic_init(&s->finite, true);
    return s->rows && s->out && s->a && s->b;
}

static void close_sum(sum *s) {
    free(s->rows);
    free(s->out);
    free(s->a);
    free(s->b);
}

static void widen_part(float *dst, const gn_tensor *t, int64_t first, int64_t n) {
    gn_widen(dst, (const char *)t->data + (size_t)first * gn_dtype_size(t->dtype), t->dtype, n);
}

static void transpose_a(const sum *s) {
    const int64_t cols = s->base->cols, rank = s->pair->rank;
    for (int64_t i = 0; i < rank; i++) {
        widen_part(s->rows, &s->pair->a, i * cols, cols);
        for (int64_t k = 0; k < cols; k++) s->a[k * rank + i] = s->pair->scale * s->rows[k];
    }
}

static void load_row(void *arg, int64_t i) {
    const sum *s = arg;
    const int64_t cols = s->base->cols;
    gn_dequantize(s->rows + i * cols, s->base, (s->row0 + i) * cols, cols);
}

static void store_row(void *arg, int64_t i) {
    sum *s = arg;
    const int64_t cols = s->base->cols;
    float *row = s->rows + i * cols;
    char *out = s->out + (size_t)(i * cols) * gn_dtype_size(s->dtype);
    gn_narrow(out, s->dtype, row, cols);
    gn_widen(row, out, s->dtype, cols);
    bool finite = true;
    for (int64_t k = 0; k < cols; k++) finite &= isfinite(row[k]);
    if (!finite) atomic_store(&s->finite, false);
}

/* rows += B (scale A), of rows [row0, row0 + n). */
static gn_status add_product(const sum *s, gn_ctx *ctx, int64_t n) {
    const int64_t cols = s->base->cols, rank = s->pair->rank;
    const gn_matrix a = {.dtype = GN_F32, .rows = cols, .cols = rank, .data = s->a};
    const gn_linear_args args = {
        .x = gn_tensor_2d(s->b, GN_F32, n, rank),
        .epilogue = GN_ADD,
        .n_parts = 1,
        .part = {{.y = gn_tensor_2d(s->rows, GN_F32, n, cols), .w = &a}},
    };
    if (rank == 0) return GN_OK;
    widen_part(s->b, &s->pair->b, s->row0 * rank, n * rank);
    return gn_linear(ctx, &args);
}

static gn_status write_sum(sum *s, gn_ctx *ctx, const char *name, gn_safetensors_writer *w,
                           gn_error *err) {
    const int64_t rows = s->base->rows, cols = s->base->cols;
    transpose_a(s);
    for (s->row0 = 0; s->row0 < rows; s->row0 += ROWS) {
        const int64_t n = rows - s->row0 < ROWS ? rows - s->row0 : ROWS;
        gn_ctx_for(ctx, n, load_row, s);
        gn_status status = add_product(s, ctx, n);
        if (status) return gn_fail(err, status, "tensor %s: %s", name, gn_status_text(status));
        gn_ctx_for(ctx, n, store_row, s);
        if (!s->finite)
            return gn_fail(err, GN_EFORMAT, "tensor %s, rows from %lld: a sum is not finite in %s",
                           name, (long long)s->row0, gn_torch_dtype_name(s->dtype));
        status = gn_safetensors_write(w, s->out, (size_t)(n * cols) * gn_dtype_size(s->dtype), err);
        if (status) return status;
    }
    return GN_OK;
}

/* ---- what a copy asks of its maker ---- */

static gn_status plan(gn_model_copy *c, gn_copy_item *item) {
    job *j = c->user;
    const gn_merge_options *o = j->options;
    const gn_dtype stored = j->result.over == GN_Q_NONE ? item->from[0]->dtype : GN_BF16;
    const gn_dtype dtype = o->set_dtype ? o->dtype : stored;
    const int64_t shape[] = {gn_proj_rows(&c->config, item->proj),
                             gn_proj_cols(&c->config, item->proj)};
    if (item->layer == 0 && item->proj == GN_Q) j->result.dtype = dtype;
    j->result.projections += pair_of(j, item)->rank > 0;
    return gn_copy_add(c, item, "", dtype, 2, shape);
}

static gn_status write_merged(gn_model_copy *c, const gn_copy_item *item,
                              gn_safetensors_writer *w) {
    job *j = c->user;
    const gn_file_tensor *t = item->from[0];
    base b;
    sum *s = &j->sum;
    s->base = &b.matrix;
    s->pair = pair_of(j, item);
    s->dtype = item->to[0].dtype;
    if (s->pair->rank == 0 && j->result.over == GN_Q_NONE && s->dtype == t->dtype)
        return gn_safetensors_write(w, t->data, t->bytes, c->err);
    gn_status status = open_base(&b, c, item);
    if (!status) status = write_sum(s, j->ctx, t->name, w, c->err);
    free(b.memory);
    return status;
}

static gn_status write_statement(gn_model_copy *c) {
    const job *j = c->user;
    const gn_merge_result *r = &j->result;
    char hash[33];
    snprintf(hash, sizeof hash, "%016llx%016llx", (unsigned long long)j->adapter->hash[0],
             (unsigned long long)j->adapter->hash[1]);
    cJSON *root = cJSON_CreateObject();
    bool ok = cJSON_AddStringToObject(root, "base", c->in) &&
              cJSON_AddStringToObject(root, "adapter", j->options->adapter) &&
              cJSON_AddStringToObject(root, "adapter_hash", hash) &&
              cJSON_AddStringToObject(root, "added_to",
                                      r->over == GN_Q_NONE ? "stored" : "dequantized") &&
              cJSON_AddStringToObject(root, "dtype", gn_torch_dtype_name(r->dtype));
    if (ok && r->over != GN_Q_NONE)
        ok = cJSON_AddStringToObject(root, "quant_type", gn_qtype_name(r->over)) &&
             cJSON_AddBoolToObject(root, "double_quant", r->double_quant);
    const gn_status status = ok ? gn_copy_write_json(c, "merge.json", root)
                                : gn_fail(c->err, GN_ENOMEM, "out of memory");
    cJSON_Delete(root);
    return status;
}

static gn_status describe(gn_model_copy *c) {
    const job *j = c->user;
    const gn_status status = j->result.over == GN_Q_NONE && !j->options->set_dtype
                                 ? gn_model_config_copy(c->in, c->folder, c->err)
                                 : gn_model_config_write(c->in, c->folder, j->result.dtype, c->err);
    return status ? status : write_statement(c);
}

/* ---- the call ---- */

/* What the projections are, or become, before anything is added. */
static gn_status find_form(job *j, gn_model_copy *c) {
    const gn_merge_options *o = j->options;
    gn_merge_result *r = &j->result;
    gn_bnb_weight w;
    r->over = o->quant;
    r->double_quant = gn_qtype_is_4bit(o->quant) && o->double_quant;
    if (!c->config.bnb_4bit) return GN_OK;
    const gn_status status =
        gn_bnb_find(&w, c->file, c->in, "model.layers.0.self_attn.q_proj.weight",
                    gn_proj_rows(&c->config, GN_Q), gn_proj_cols(&c->config, GN_Q), c->err);
    if (status) return status;
    r->over = w.qtype;
    r->double_quant = w.nested_absmax;
    if (o->quant == GN_Q_NONE || o->quant == w.qtype) return GN_OK;
    return gn_fail(c->err, GN_EINVAL,
                   "%s: the weights are %s already and cannot become %s; start from the 16-bit "
                   "model",
                   c->in, gn_qtype_name(w.qtype), gn_qtype_name(o->quant));
}

static gn_status prepare(job *j, gn_model_copy *c) {
    const gn_ctx_options ctx = {.device = "cpu", .compute = GN_F32, .threads = j->options->threads};
    gn_status status = gn_model_copy_open(c);
    if (!status) status = find_form(j, c);
    if (!status)
        status = gn_adapter_load(&j->adapter, &c->config, c->in, j->options->adapter, c->err);
    if (!status) status = gn_ctx_open(&j->ctx, &ctx, c->err);
    if (status) return status;
    j->result.rank = j->adapter->max_rank;
    int64_t cols = 0;
    for (int p = 0; p < GN_PROJ_COUNT; p++)
        if (gn_proj_cols(&c->config, (gn_proj)p) > cols)
            cols = gn_proj_cols(&c->config, (gn_proj)p);
    status = gn_ctx_reserve(j->ctx, gn_linear_workspace(j->ctx, ROWS, j->result.rank, cols, 0, 0));
    if (!status && !open_sum(&j->sum, cols, j->result.rank)) status = GN_ENOMEM;
    return status ? gn_fail(c->err, status, "%s: out of memory", c->in) : GN_OK;
}

gn_status gn_merge_folder(const gn_merge_options *options, gn_merge_result *result, gn_error *err) {
    job j = {.options = options};
    gn_model_copy copy = {.in = options->model,
                          .out = options->out,
                          .maker = {plan, write_merged, describe},
                          .user = &j,
                          .max_shard_bytes = options->max_shard_bytes,
                          .progress = options->progress,
                          .progress_user = options->user,
                          .err = err};
    gn_status status = prepare(&j, &copy);
    if (!status) status = gn_model_copy_run(&copy);
    j.result.bytes_in = copy.bytes_in;
    j.result.bytes_out = copy.bytes_out;
    if (!status) *result = j.result;
    gn_model_copy_close(&copy);
    close_sum(&j.sum);
    gn_adapter_close(j.adapter);
    gn_ctx_close(j.ctx);
    return status;
}
