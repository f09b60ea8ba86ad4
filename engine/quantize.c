/* quantize.c - folder to folder, one tensor at a time.
 *
 * A safetensors header must give every length before the first byte of data, but the text of a
 * quant state depends on the offset found while quantizing; so states are padded with spaces,
 * which JSON allows, to a fixed length. */
#include "engine/quantize.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/bnb.h"
#include "engine/json_file.h"
#include "engine/model_copy.h"

enum { STATE_BYTES = 256 };

static const gn_quantize_options *options_of(const gn_model_copy *c) {
    return c->user;
}

static gn_status add(gn_model_copy *c, gn_copy_item *item, const char *suffix, gn_dtype dtype,
                     size_t bytes) {
    const int64_t shape[] = {(int64_t)(bytes / gn_dtype_size(dtype)), 1};
    return gn_copy_add(c, item, suffix, dtype, *suffix ? 1 : 2, shape);
}

static gn_status plan(gn_model_copy *c, gn_copy_item *item) {
    const gn_quantize_options *o = options_of(c);
    const gn_file_tensor *t = item->from[0];
    const gn_quant_sizes s = gn_quant_sizes_of(o->type, o->double_quant, t->shape[0], t->shape[1]);
    const struct {
        const char *suffix;
        gn_dtype dtype;
        size_t bytes;
    } scales[] = {{GN_BNB_ABSMAX, GN_F32, s.absmax},
                  {GN_BNB_ABSMAX, GN_U8, s.absmax_u8},
                  {GN_BNB_NESTED_ABSMAX, GN_F32, s.nested_absmax},
                  {GN_BNB_NESTED_QUANT_MAP, GN_F32, 256 * sizeof(float)}};
    const int first = o->double_quant ? 1 : 0, last = o->double_quant ? 4 : 1;
    char state[64];
    snprintf(state, sizeof state, GN_BNB_STATE "%s", gn_qtype_name(o->type));
    gn_status status = add(c, item, "", GN_U8, s.data); /* (bytes, 1) */
    if (!status) status = add(c, item, GN_BNB_QUANT_MAP, GN_F32, 16 * sizeof(float));
    for (int i = first; !status && i < last; i++)
        status = add(c, item, scales[i].suffix, scales[i].dtype, scales[i].bytes);
    return status ? status : add(c, item, state, GN_U8, STATE_BYTES);
}

static gn_status write_quantized(gn_model_copy *c, const gn_copy_item *item,
                                 gn_safetensors_writer *w) {
    const gn_quantize_options *o = options_of(c);
    const gn_file_tensor *t = item->from[0];
    const gn_quant_sizes s = gn_quant_sizes_of(o->type, o->double_quant, t->shape[0], t->shape[1]);
    gn_quant_out out = {.data = malloc(s.data + 1), .absmax = malloc(s.absmax + 1)};
    if (o->double_quant) {
        out.absmax_u8 = malloc(s.absmax_u8 + 1);
        out.nested_absmax = malloc(s.nested_absmax + 1);
    }
    gn_error cause = {0};
    gn_status status = GN_ENOMEM;
    if (out.data && out.absmax && (!o->double_quant || (out.absmax_u8 && out.nested_absmax)))
        status = gn_quantize(&out, o->type, t->data, t->dtype, t->shape[0], t->shape[1], o->threads,
                             &cause);
    if (status)
        gn_fail(c->err, status, "%s: tensor %s: %s", t->path, t->name,
                status == GN_ENOMEM ? "out of memory" : cause.message);
    char state[STATE_BYTES + 1];
    const int length = gn_bnb_write_state(state, sizeof state, o->type, t->dtype, t->shape[0],
                                          t->shape[1], o->double_quant, out.offset);
    memset(state + length, ' ', sizeof state - (size_t)length);
    const void *data[GN_COPY_MAX_TENSORS] = {out.data, gn_code_values(o->type), out.absmax, state};
    if (o->double_quant) {
        data[2] = out.absmax_u8;
        data[3] = out.nested_absmax;
        data[4] = gn_dynamic_map();
        data[5] = state;
    }
    for (int i = 0; !status && i < item->n_to; i++)
        status = gn_safetensors_write(w, data[i], item->to[i].bytes, c->err);
    free(out.data);
    free(out.absmax);
    free(out.absmax_u8);
    free(out.nested_absmax);
    return status;
}

/* The text of config.json with one more key, so that every number stays as it is written. */
static gn_status write_config(gn_model_copy *c) {
    char *path, *text, *changed;
    size_t length;
    if (asprintf(&path, "%s/config.json", c->in) < 0)
        return gn_fail(c->err, GN_ENOMEM, "out of memory");
    gn_status status = gn_text_read(&text, &length, path, c->err);
    free(path);
    if (status) return status;
    char *end = strrchr(text, '}'); /* of an object that is not empty: gn_config_read took it */
    while (end && end > text && strchr(" \t\r\n", end[-1])) end--;
    if (end) *end = '\0';
    if (asprintf(&changed,
                 "%s,\n"
                 "  \"quantization_config\": {\n"
                 "    \"quant_method\": \"bitsandbytes\",\n"
                 "    \"load_in_4bit\": true,\n"
                 "    \"bnb_4bit_quant_type\": \"%s\",\n"
                 "    \"bnb_4bit_use_double_quant\": %s,\n"
                 "    \"bnb_4bit_compute_dtype\": \"bfloat16\",\n"
                 "    \"bnb_4bit_quant_storage\": \"uint8\"\n"
                 "  }\n}\n",
                 text, gn_qtype_name(options_of(c)->type),
                 options_of(c)->double_quant ? "true" : "false") < 0)
        changed = NULL;
    status = changed ? gn_copy_write_text(c, "config.json", changed)
                     : gn_fail(c->err, GN_ENOMEM, "out of memory");
    free(changed);
    free(text);
    return status;
}

static gn_status run(gn_model_copy *c) {
    const gn_status status = gn_model_copy_open(c);
    if (!status && c->config.bnb_4bit)
        return gn_fail(c->err, GN_EINVAL, "%s: its weights are 4-bit already", c->in);
    return status ? status : gn_model_copy_run(c);
}

gn_status gn_quantize_folder(const gn_quantize_options *options, gn_quantize_result *result,
                             gn_error *err) {
    if (options->type != GN_Q_NF4 && options->type != GN_Q_FP4)
        return gn_fail(err, GN_EINVAL, "a folder is written as nf4 or fp4, not %s",
                       gn_qtype_name(options->type));
    gn_model_copy copy = {.in = options->in,
                          .out = options->out,
                          .maker = {plan, write_quantized, write_config},
                          .user = (void *)options,
                          .max_shard_bytes = options->max_shard_bytes,
                          .progress = options->progress,
                          .progress_user = options->user,
                          .err = err};
    const gn_status status = run(&copy);
    if (!status) *result = (gn_quantize_result){copy.bytes_in, copy.bytes_out};
    gn_model_copy_close(&copy);
    return status;
}
