/* quantize.c - folder to folder, one tensor at a time.
 *
 * A safetensors header must give every length before the first byte of data, but the text of a
 * quant state depends on the offset found while quantizing; so states are padded with spaces,
 * which JSON allows, to a fixed length. The new folder is filled under a temporary name beside
 * its final one and renamed at the end. */
#include "engine/quantize.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/bnb.h"
#include "engine/json_file.h"
#include "engine/model_internal.h"
#include "engine/save_folder.h"
#include "engine/tensor_file_internal.h"

enum { STATE_BYTES = 256, MAX_PATH_BYTES = 4096, MAX_PARTS = 6 };
#define SHARD_BYTES 5000000000u

/* An input tensor and what it becomes. */
typedef struct item {
    const gn_file_tensor *source;
    bool quantized;
    int shard;
    int n_parts;
    gn_file_tensor parts[MAX_PARTS]; /* names are owned */
} item;

typedef struct job {
    const gn_quantize_options *options;
    gn_config config;
    gn_tensor_file *file;
    item *items;
    size_t n_items;
    int n_shards;
    char folder[MAX_PATH_BYTES]; /* the temporary one */
    int64_t done, total, bytes_out;
    gn_error *err;
} job;

static gn_status no_memory(job *j) {
    return gn_fail(j->err, GN_ENOMEM, "out of memory");
}

/* ---- planning ---- */

/* Every projection must be there, in the shape that config.json gives. */
static gn_status find_projections(job *j) {
    for (int layer = 0; layer < j->config.layers; layer++) {
        for (int p = 0; p < GN_PROJ_COUNT; p++) {
            char name[128];
            const gn_file_tensor *t;
            snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, gn_proj_names[p]);
            const gn_status status = gn_model_find_weight(
                &t, j->file, j->options->in, name, 2, gn_proj_rows(&j->config, (gn_proj)p),
                gn_proj_cols(&j->config, (gn_proj)p), j->err);
            if (status) return status;
            j->items[t - gn_tensor_file_at(j->file, 0)].quantized = true;
        }
    }
    return GN_OK;
}

static bool add_part(item *i, const char *suffix, gn_dtype dtype, size_t bytes) {
    gn_file_tensor *part = &i->parts[i->n_parts];
    char *name;
    if (asprintf(&name, "%s%s", i->source->name, suffix) < 0) return false;
    *part = (gn_file_tensor){.name = name, .dtype = dtype, .ndim = 1, .bytes = bytes};
    part->shape[0] = (int64_t)(bytes / gn_dtype_size(dtype));
    i->n_parts++;
    return true;
}

static bool plan_quantized(item *i, const gn_quantize_options *o) {
    const gn_quant_sizes s =
        gn_quant_sizes_of(o->type, o->double_quant, i->source->shape[0], i->source->shape[1]);
    char state[64];
    snprintf(state, sizeof state, GN_BNB_STATE "%s", gn_qtype_name(o->type));
    if (!add_part(i, "", GN_U8, s.data)) return false;
    i->parts[0].ndim = 2; /* (bytes, 1) */
    i->parts[0].shape[1] = 1;
    if (!add_part(i, GN_BNB_QUANT_MAP, GN_F32, 16 * sizeof(float))) return false;
    if (!o->double_quant) {
        if (!add_part(i, GN_BNB_ABSMAX, GN_F32, s.absmax)) return false;
    } else if (!add_part(i, GN_BNB_ABSMAX, GN_U8, s.absmax_u8) ||
               !add_part(i, GN_BNB_NESTED_ABSMAX, GN_F32, s.nested_absmax) ||
               !add_part(i, GN_BNB_NESTED_QUANT_MAP, GN_F32, 256 * sizeof(float))) {
        return false;
    }
    return add_part(i, state, GN_U8, STATE_BYTES);
}

static bool plan_copied(item *i) {
    if (!add_part(i, "", i->source->dtype, i->source->bytes)) return false;
    i->parts[0].ndim = i->source->ndim;
    memcpy(i->parts[0].shape, i->source->shape, sizeof i->parts[0].shape);
    return true;
}

static gn_status plan(job *j) {
    const gn_quantize_options *o = j->options;
    const size_t max_bytes = o->max_shard_bytes ? (size_t)o->max_shard_bytes : SHARD_BYTES;
    size_t shard_bytes = 0;
    j->n_items = gn_tensor_file_count(j->file);
    j->items = calloc(j->n_items + 1, sizeof *j->items);
    if (!j->items) return no_memory(j);
    const gn_status status = find_projections(j);
    if (status) return status;
    for (size_t n = 0; n < j->n_items; n++) {
        item *i = &j->items[n];
        i->source = gn_tensor_file_at(j->file, n);
        if (!(i->quantized ? plan_quantized(i, o) : plan_copied(i))) return no_memory(j);
        size_t bytes = 0;
        for (int p = 0; p < i->n_parts; p++) bytes += i->parts[p].bytes;
        if (shard_bytes > 0 && shard_bytes + bytes > max_bytes) {
            j->n_shards++;
            shard_bytes = 0;
        }
        shard_bytes += bytes;
        i->shard = j->n_shards;
        j->total += (int64_t)i->source->bytes;
        j->bytes_out += (int64_t)bytes;
    }
    j->n_shards++;
    return GN_OK;
}

/* ---- writing ---- */

static gn_status write_quantized(job *j, gn_safetensors_writer *w, const item *i) {
    const gn_quantize_options *o = j->options;
    const gn_file_tensor *t = i->source;
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
        gn_fail(j->err, status, "%s: tensor %s: %s", t->path, t->name,
                status == GN_ENOMEM ? "out of memory" : cause.message);
    char state[STATE_BYTES + 1];
    const int length = gn_bnb_write_state(state, sizeof state, o->type, t->dtype, t->shape[0],
                                          t->shape[1], o->double_quant, out.offset);
    memset(state + length, ' ', sizeof state - (size_t)length);
    const void *data[MAX_PARTS] = {out.data, gn_code_values(o->type), out.absmax, state};
    if (o->double_quant) {
        data[2] = out.absmax_u8;
        data[3] = out.nested_absmax;
        data[4] = gn_dynamic_map();
        data[5] = state;
    }
    for (int p = 0; !status && p < i->n_parts; p++)
        status = gn_safetensors_write(w, data[p], i->parts[p].bytes, j->err);
    free(out.data);
    free(out.absmax);
    free(out.absmax_u8);
    free(out.nested_absmax);
    return status;
}

static void shard_name(const job *j, int shard, char *name, size_t size) {
    if (j->n_shards == 1)
        snprintf(name, size, "model.safetensors");
    else
        snprintf(name, size, "model-%05d-of-%05d.safetensors", shard + 1, j->n_shards);
}

/* All output tensors of a shard, in the order they are written; NULL without memory. */
static gn_file_tensor *shard_entries(const job *j, int shard, size_t *n) {
    gn_file_tensor *entries = malloc((j->n_items * MAX_PARTS + 1) * sizeof *entries);
    *n = 0;
    for (size_t k = 0; entries && k < j->n_items; k++) {
        const item *i = &j->items[k];
        for (int p = 0; i->shard == shard && p < i->n_parts; p++) entries[(*n)++] = i->parts[p];
    }
    return entries;
}

static gn_status write_shard(job *j, int shard) {
    static const char *const metadata[] = {"format", "pt", NULL};
    char name[64], path[MAX_PATH_BYTES + 80];
    size_t n;
    gn_safetensors_writer *w;
    shard_name(j, shard, name, sizeof name);
    snprintf(path, sizeof path, "%s/%s", j->folder, name);
    gn_file_tensor *entries = shard_entries(j, shard, &n);
    if (!entries) return no_memory(j);
    gn_status status = gn_safetensors_create(&w, path, entries, n, metadata, j->err);
    free(entries);
    if (status) return status;
    for (size_t k = 0; !status && k < j->n_items; k++) {
        const item *i = &j->items[k];
        if (i->shard != shard) continue;
        status = i->quantized ? write_quantized(j, w, i)
                              : gn_safetensors_write(w, i->source->data, i->source->bytes, j->err);
        gn_file_tensor_release(i->source);
        j->done += (int64_t)i->source->bytes;
        if (j->options->progress) j->options->progress(j->options->user, j->done, j->total);
    }
    if (!status) return gn_safetensors_commit(w, j->err);
    gn_safetensors_abort(w);
    return status;
}

static gn_status write_text(job *j, const char *name, const char *text) {
    char path[MAX_PATH_BYTES + 80];
    snprintf(path, sizeof path, "%s/%s", j->folder, name);
    return gn_text_write(path, text, j->err);
}

static gn_status write_json(job *j, const char *name, const cJSON *root) {
    char *text = cJSON_Print(root);
    if (!text) return no_memory(j);
    const gn_status status = write_text(j, name, text);
    free(text);
    return status;
}

static gn_status write_index(job *j) {
    cJSON *root = cJSON_CreateObject();
    cJSON *metadata = cJSON_AddObjectToObject(root, "metadata");
    cJSON_AddNumberToObject(metadata, "total_size", (double)j->bytes_out);
    cJSON *map = cJSON_AddObjectToObject(root, "weight_map");
    bool ok = map != NULL;
    for (size_t k = 0; ok && k < j->n_items; k++) {
        const item *i = &j->items[k];
        char name[64];
        shard_name(j, i->shard, name, sizeof name);
        for (int p = 0; ok && p < i->n_parts; p++)
            ok = cJSON_AddStringToObject(map, i->parts[p].name, name) != NULL;
    }
    const gn_status status =
        ok ? write_json(j, "model.safetensors.index.json", root) : no_memory(j);
    cJSON_Delete(root);
    return status;
}

/* The text of config.json with one more key, so that every number stays as it is written. */
static gn_status write_config(job *j) {
    char path[MAX_PATH_BYTES], *text, *changed;
    size_t length;
    snprintf(path, sizeof path, "%s/config.json", j->options->in);
    gn_status status = gn_text_read(&text, &length, path, j->err);
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
                 text, gn_qtype_name(j->options->type),
                 j->options->double_quant ? "true" : "false") < 0)
        changed = NULL;
    status = changed ? write_text(j, "config.json", changed) : no_memory(j);
    free(changed);
    free(text);
    return status;
}

/* ---- the other files of the folder ---- */

static gn_status copy_file(job *j, const char *name) {
    char from[MAX_PATH_BYTES + 80], to[MAX_PATH_BYTES + 80], buffer[1 << 16];
    snprintf(from, sizeof from, "%s/%s", j->options->in, name);
    snprintf(to, sizeof to, "%s/%s", j->folder, name);
    FILE *in = fopen(from, "rb");
    if (!in && errno == ENOENT) return GN_OK;
    if (!in) return gn_fail(j->err, GN_EIO, "%s: %s", from, strerror(errno));
    FILE *out = fopen(to, "wb");
    bool ok = out != NULL;
    for (size_t n; ok && (n = fread(buffer, 1, sizeof buffer, in)) > 0;)
        ok = fwrite(buffer, 1, n, out) == n;
    if (ok) ok = !ferror(in) && fflush(out) == 0 && fsync(fileno(out)) == 0;
    const gn_status status = ok ? GN_OK : gn_fail(j->err, GN_EIO, "%s: %s", to, strerror(errno));
    fclose(in);
    if (out) fclose(out);
    return status;
}

static gn_status copy_others(job *j) {
    static const char *const names[] = {
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.json",
        "generation_config.json",
        "added_tokens.json",
        "tokenizer.json",
        "LICENSE",
        "LICENSE.txt",
        "README.md",
        "USE_POLICY.md",
    };
    gn_status status = GN_OK;
    for (size_t i = 0; !status && i < sizeof names / sizeof *names; i++)
        status = copy_file(j, names[i]);
    return status;
}

static gn_status fill_folder(job *j) {
    gn_status status = GN_OK;
    for (int shard = 0; !status && shard < j->n_shards; shard++) status = write_shard(j, shard);
    if (!status && j->n_shards > 1) status = write_index(j);
    if (!status) status = write_config(j);
    if (!status) status = copy_others(j);
    char inside[MAX_PATH_BYTES + 80];
    snprintf(inside, sizeof inside, "%s/config.json", j->folder);
    if (!status) status = gn_sync_parent(inside, j->err);
    if (!status && rename(j->folder, j->options->out) != 0)
        status = gn_fail(j->err, GN_EIO, "%s: %s", j->options->out, strerror(errno));
    return status ? status : gn_sync_parent(j->options->out, j->err);
}

static gn_status make_folder(job *j) {
    const char *out = j->options->out;
    struct stat st;
    size_t length = strlen(out);
    while (length > 1 && out[length - 1] == '/') length--;
    if (lstat(out, &st) == 0)
        return gn_fail(j->err, GN_EEXIST, "%s exists already; choose another --out", out);
    snprintf(j->folder, sizeof j->folder, "%.*s.partial", (int)length, out);
    if (mkdir(j->folder, 0777) == 0) return GN_OK;
    return gn_fail(j->err, errno == EEXIST ? GN_EEXIST : GN_EIO, "%s: %s%s", j->folder,
                   strerror(errno), errno == EEXIST ? "; an earlier run left it: remove it" : "");
}

static gn_status run(job *j) {
    const gn_quantize_options *o = j->options;
    gn_status status = gn_config_read(&j->config, o->in, j->err);
    if (status) return status;
    if (j->config.bnb_4bit)
        return gn_fail(j->err, GN_EINVAL, "%s: its weights are 4-bit already", o->in);
    status = gn_safetensors_open_dir(&j->file, o->in, j->err);
    if (!status) status = plan(j);
    if (!status) status = make_folder(j);
    if (status) return status;
    status = fill_folder(j);
    if (status) gn_folder_remove(j->folder);
    return status;
}

gn_status gn_quantize_folder(const gn_quantize_options *options, gn_quantize_result *result,
                             gn_error *err) {
    job j = {.options = options, .err = err};
    if (options->type != GN_Q_NF4 && options->type != GN_Q_FP4)
        return gn_fail(err, GN_EINVAL, "a folder is written as nf4 or fp4, not %s",
                       gn_qtype_name(options->type));
    const gn_status status = run(&j);
    if (!status) *result = (gn_quantize_result){j.total, j.bytes_out};
    for (size_t k = 0; j.items && k < j.n_items; k++) {
        for (int p = 0; p < j.items[k].n_parts; p++) free((char *)j.items[k].parts[p].name);
    }
    free(j.items);
    gn_tensor_file_close(j.file);
    return status;
}
