/* model_copy.c - folder to folder. The new folder is filled under a temporary name beside its
 * final one and renamed at the end. */
#include "engine/model_copy.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/bnb.h"
#include "engine/model_files.h"
#include "engine/model_internal.h"
#include "engine/save_folder.h"
#include "engine/tensor_file_internal.h"

enum { MAX_PATH_BYTES = 4096, MAX_NAME = 128 };
#define SHARD_BYTES 5000000000u

static gn_status no_memory(const gn_model_copy *c) {
    return gn_fail(c->err, GN_ENOMEM, "out of memory");
}

/* ---- reading ---- */

/* Item k is tensor k of the file until what belongs to another's weight is taken out. */
static gn_copy_item *item_of(const gn_model_copy *c, const gn_file_tensor *t) {
    return &c->items[t - gn_tensor_file_at(c->file, 0)];
}

static gn_status find_projection(gn_model_copy *c, int layer, gn_proj proj) {
    const int64_t rows = gn_proj_rows(&c->config, proj), cols = gn_proj_cols(&c->config, proj);
    char name[MAX_NAME];
    gn_bnb_weight w = {0};
    const gn_file_tensor *t = NULL;
    snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, gn_proj_names[proj]);
    const gn_status status =
        c->config.bnb_4bit ? gn_bnb_find(&w, c->file, c->in, name, rows, cols, c->err)
                           : gn_model_find_weight(&t, c->file, c->in, name, 2, rows, cols, c->err);
    if (status) return status;
    gn_copy_item *item = item_of(c, c->config.bnb_4bit ? w.codes : t);
    item->layer = layer;
    item->proj = proj;
    if (!c->config.bnb_4bit) return GN_OK;
    const gn_file_tensor *const others[] = {w.state, w.quant_map, w.absmax, w.nested_absmax,
                                            w.nested_quant_map};
    for (size_t i = 0; i < sizeof others / sizeof *others && others[i]; i++) {
        item->from[item->n_from++] = others[i];
        item_of(c, others[i])->n_from = 0;
    }
    return GN_OK;
}

/* Only projections may be in a form that one tensor alone does not tell. */
static gn_status check_others(const gn_model_copy *c) {
    for (size_t k = 0; k < c->n_items; k++) {
        const gn_copy_item *item = &c->items[k];
        const gn_file_tensor *t = item->from[0];
        if (item->n_from > 0 && item->layer < 0 && !gn_dtype_is_float(t->dtype))
            return gn_fail(c->err, GN_EFORMAT, "%s: tensor %s has no place in this model", t->path,
                           t->name);
    }
    return GN_OK;
}

static void take_out_parts(gn_model_copy *c) {
    size_t n = 0;
    for (size_t k = 0; k < c->n_items; k++)
        if (c->items[k].n_from > 0) c->items[n++] = c->items[k];
    c->n_items = n;
}

static gn_status find_weights(gn_model_copy *c) {
    c->n_items = gn_tensor_file_count(c->file);
    c->items = calloc(c->n_items + 1, sizeof *c->items);
    if (!c->items) return no_memory(c);
    for (size_t k = 0; k < c->n_items; k++) {
        const gn_file_tensor *t = gn_tensor_file_at(c->file, k);
        c->items[k] = (gn_copy_item){.layer = -1, .n_from = 1, .from = {t}};
        c->bytes_in += (int64_t)t->bytes;
    }
    gn_status status = GN_OK;
    for (int i = 0; !status && i < c->config.layers * GN_PROJ_COUNT; i++)
        status = find_projection(c, i / GN_PROJ_COUNT, (gn_proj)(i % GN_PROJ_COUNT));
    if (!status) status = check_others(c);
    if (!status) take_out_parts(c);
    return status;
}

gn_status gn_model_copy_open(gn_model_copy *c) {
    gn_status status = gn_config_read(&c->config, c->in, c->err);
    if (!status) status = gn_safetensors_open_dir(&c->file, c->in, c->err);
    return status ? status : find_weights(c);
}

void gn_model_copy_close(gn_model_copy *c) {
    for (size_t k = 0; k < c->n_items; k++) {
        for (int i = 0; i < c->items[k].n_to; i++) free((char *)c->items[k].to[i].name);
    }
    free(c->items);
    free(c->folder);
    gn_tensor_file_close(c->file);
}

/* ---- planning ---- */

gn_status gn_copy_add(gn_model_copy *c, gn_copy_item *item, const char *suffix, gn_dtype dtype,
                      int ndim, const int64_t *shape) {
    gn_file_tensor *t = &item->to[item->n_to];
    char *name;
    if (asprintf(&name, "%s%s", item->from[0]->name, suffix) < 0) return no_memory(c);
    *t =
        (gn_file_tensor){.name = name, .dtype = dtype, .ndim = ndim, .bytes = gn_dtype_size(dtype)};
    for (int i = 0; i < ndim; i++) {
        t->shape[i] = shape[i];
        t->bytes *= (size_t)shape[i];
    }
    item->n_to++;
    return GN_OK;
}

static gn_status plan(gn_model_copy *c) {
    const size_t max_bytes = c->max_shard_bytes ? (size_t)c->max_shard_bytes : SHARD_BYTES;
    size_t shard_bytes = 0;
    for (size_t k = 0; k < c->n_items; k++) {
        gn_copy_item *item = &c->items[k];
        const gn_file_tensor *t = item->from[0];
        const gn_status status = item->layer < 0
                                     ? gn_copy_add(c, item, "", t->dtype, t->ndim, t->shape)
                                     : c->maker.plan(c, item);
        if (status) return status;
        size_t bytes = 0;
        for (int i = 0; i < item->n_to; i++) bytes += item->to[i].bytes;
        if (shard_bytes > 0 && shard_bytes + bytes > max_bytes) {
            c->n_shards++;
            shard_bytes = 0;
        }
        shard_bytes += bytes;
        item->shard = c->n_shards;
        c->bytes_out += (int64_t)bytes;
    }
    c->n_shards++;
    return GN_OK;
}

/* ---- weights ---- */

static void shard_name(const gn_model_copy *c, int shard, char *name, size_t size) {
    if (c->n_shards == 1)
        snprintf(name, size, "model.safetensors");
    else
        snprintf(name, size, "model-%05d-of-%05d.safetensors", shard + 1, c->n_shards);
}

/* All tensors of a shard, in the order they are written; NULL without memory. */
static gn_file_tensor *shard_entries(const gn_model_copy *c, int shard, size_t *n) {
    gn_file_tensor *entries = malloc((c->n_items * GN_COPY_MAX_TENSORS + 1) * sizeof *entries);
    *n = 0;
    for (size_t k = 0; entries && k < c->n_items; k++) {
        const gn_copy_item *item = &c->items[k];
        for (int i = 0; item->shard == shard && i < item->n_to; i++) entries[(*n)++] = item->to[i];
    }
    return entries;
}

static void advance(gn_model_copy *c, const gn_copy_item *item) {
    for (int i = 0; i < item->n_from; i++) {
        gn_file_tensor_release(item->from[i]);
        c->done += (int64_t)item->from[i]->bytes;
    }
    if (c->progress) c->progress(c->progress_user, c->done, c->bytes_in);
}

static gn_status write_shard(gn_model_copy *c, int shard) {
    static const char *const metadata[] = {"format", "pt", NULL};
    char name[64], path[MAX_PATH_BYTES];
    size_t n;
    gn_safetensors_writer *w;
    shard_name(c, shard, name, sizeof name);
    snprintf(path, sizeof path, "%s/%s", c->folder, name);
    gn_file_tensor *entries = shard_entries(c, shard, &n);
    if (!entries) return no_memory(c);
    gn_status status = gn_safetensors_create(&w, path, entries, n, metadata, c->err);
    free(entries);
    if (status) return status;
    for (size_t k = 0; !status && k < c->n_items; k++) {
        const gn_copy_item *item = &c->items[k];
        if (item->shard != shard) continue;
        status = item->layer < 0
                     ? gn_safetensors_write(w, item->from[0]->data, item->from[0]->bytes, c->err)
                     : c->maker.write(c, item, w);
        advance(c, item);
    }
    if (!status) return gn_safetensors_commit(w, c->err);
    gn_safetensors_abort(w);
    return status;
}

static gn_status write_index(gn_model_copy *c) {
    cJSON *root = cJSON_CreateObject();
    cJSON *metadata = cJSON_AddObjectToObject(root, "metadata");
    cJSON_AddNumberToObject(metadata, "total_size", (double)c->bytes_out);
    cJSON *map = cJSON_AddObjectToObject(root, "weight_map");
    bool ok = map != NULL;
    for (size_t k = 0; ok && k < c->n_items; k++) {
        const gn_copy_item *item = &c->items[k];
        char name[64];
        shard_name(c, item->shard, name, sizeof name);
        for (int i = 0; ok && i < item->n_to; i++)
            ok = cJSON_AddStringToObject(map, item->to[i].name, name) != NULL;
    }
    const gn_status status =
        ok ? gn_copy_write_json(c, "model.safetensors.index.json", root) : no_memory(c);
    cJSON_Delete(root);
    return status;
}

/* ---- the other files of the folder ---- */

gn_status gn_copy_write_text(gn_model_copy *c, const char *name, const char *text) {
    char path[MAX_PATH_BYTES];
    snprintf(path, sizeof path, "%s/%s", c->folder, name);
    return gn_text_write(path, text, c->err);
}

gn_status gn_copy_write_json(gn_model_copy *c, const char *name, const cJSON *root) {
    char *text = root ? cJSON_Print(root) : NULL;
    if (!text) return no_memory(c);
    const gn_status status = gn_copy_write_text(c, name, text);
    cJSON_free(text);
    return status;
}

/* ---- the folder ---- */

static gn_status make_folder(gn_model_copy *c) {
    struct stat st;
    size_t length = strlen(c->out);
    while (length > 1 && c->out[length - 1] == '/') length--;
    if (lstat(c->out, &st) == 0)
        return gn_fail(c->err, GN_EEXIST, "%s exists already; choose another --out", c->out);
    if (asprintf(&c->folder, "%.*s.partial", (int)length, c->out) < 0) {
        c->folder = NULL;
        return no_memory(c);
    }
    if (mkdir(c->folder, 0777) == 0) return GN_OK;
    return gn_fail(c->err, errno == EEXIST ? GN_EEXIST : GN_EIO, "%s: %s%s", c->folder,
                   strerror(errno), errno == EEXIST ? "; an earlier run left it: remove it" : "");
}

static gn_status fill_folder(gn_model_copy *c) {
    gn_status status = GN_OK;
    for (int shard = 0; !status && shard < c->n_shards; shard++) status = write_shard(c, shard);
    if (!status && c->n_shards > 1) status = write_index(c);
    if (!status) status = c->maker.describe(c);
    if (!status) status = gn_model_files_copy(c->in, c->folder, c->err);
    char inside[MAX_PATH_BYTES];
    snprintf(inside, sizeof inside, "%s/config.json", c->folder);
    if (!status) status = gn_sync_parent(inside, c->err);
    if (!status && rename(c->folder, c->out) != 0)
        status = gn_fail(c->err, GN_EIO, "%s: %s", c->out, strerror(errno));
    return status ? status : gn_sync_parent(c->out, c->err);
}

gn_status gn_model_copy_run(gn_model_copy *c) {
    gn_status status = plan(c);
    if (!status) status = make_folder(c);
    if (status) return status;
    status = fill_folder(c);
    if (status) gn_folder_remove(c->folder);
    return status;
}
