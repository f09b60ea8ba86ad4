/* model_writer.c - model.safetensors from an optimizer's masters, and what stands beside it. */
#include "trainer/model_writer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/model_files.h"
#include "engine/save_folder.h"
#include "engine/tensor_file.h"

static gn_status no_memory(const char *where, gn_error *err) {
    return gn_fail(err, GN_ENOMEM, "%s: out of memory", where);
}

static char *join(const char *dir, const char *name) {
    char *path;
    return asprintf(&path, "%s/%s", dir, name) < 0 ? NULL : path;
}

/* ---- weights ---- */

static gn_status write_tensor(gn_safetensors_writer *w, gn_optimizer *o, size_t i, gn_dtype dtype,
                              gn_error *err) {
    const gn_parameter *item = &gn_optimizer_parameters(o)->items[i];
    const size_t bytes = (size_t)item->numel * gn_dtype_size(dtype);
    float *values = malloc((size_t)item->numel * sizeof *values);
    void *narrow = malloc(bytes);
    gn_status status = values && narrow ? GN_OK : GN_ENOMEM;
    if (!status) status = gn_optimizer_get(o, GN_STATE_MASTER, i, values);
    if (status) {
        gn_fail(err, status, "%s: %s", item->name, gn_status_text(status));
    } else {
        gn_narrow(narrow, dtype, values, item->numel);
        status = gn_safetensors_write(w, narrow, bytes, err);
    }
    free(values);
    free(narrow);
    return status;
}

static gn_status write_tensors(const char *path, const gn_file_tensor *tensors, gn_optimizer *o,
                               gn_error *err) {
    static const char *const metadata[] = {"format", "pt", NULL};
    const size_t n = gn_optimizer_parameters(o)->n;
    gn_safetensors_writer *w;
    gn_status status = gn_safetensors_create(&w, path, tensors, n, metadata, err);
    if (status) return status;
    for (size_t i = 0; i < n && !status; i++) status = write_tensor(w, o, i, tensors[i].dtype, err);
    if (!status) return gn_safetensors_commit(w, err);
    gn_safetensors_abort(w);
    return status;
}

static gn_status write_weights(const char *dir, gn_dtype dtype, gn_optimizer *o, gn_error *err) {
    const gn_parameters *p = gn_optimizer_parameters(o);
    char *path = join(dir, "model.safetensors");
    gn_file_tensor *tensors = calloc(p->n + 1, sizeof *tensors);
    gn_status status = path && tensors ? GN_OK : no_memory(dir, err);
    for (size_t i = 0; i < p->n && !status; i++) {
        const gn_parameter *item = &p->items[i];
        tensors[i] = (gn_file_tensor){.name = item->name, .dtype = dtype, .ndim = item->ndim};
        tensors[i].bytes = (size_t)item->numel * gn_dtype_size(dtype);
        memcpy(tensors[i].shape, item->shape, sizeof tensors[i].shape);
    }
    if (!status && (status = gn_pages_flush(gn_optimizer_pages(o))) != GN_OK)
        gn_fail(err, status, "%s: %s", path, gn_status_text(status));
    if (!status) status = write_tensors(path, tensors, o, err);
    free(tensors);
    free(path);
    return status;
}

static gn_status fill(const char *dir, const char *base, gn_dtype dtype, gn_optimizer *o,
                      gn_error *err) {
    gn_status status = write_weights(dir, dtype, o, err);
    if (!status) status = gn_model_config_write(base, dir, dtype, err);
    return status ? status : gn_model_files_copy(base, dir, err);
}

/* ---- the folder ---- */

static gn_status check_place(const char *dir, gn_error *err) {
    char *config = join(dir, "config.json");
    if (!config) return no_memory(dir, err);
    const bool is_free = access(dir, F_OK) != 0 || rmdir(dir) == 0 || access(config, F_OK) == 0;
    free(config);
    return is_free ? GN_OK : gn_fail(err, GN_EEXIST, "%s exists already, and is no model", dir);
}

gn_status gn_model_save(const char *dir, const char *base, gn_dtype dtype, gn_optimizer *o,
                        gn_error *err) {
    gn_save_folder folder;
    gn_status status = check_place(dir, err);
    if (!status) status = gn_save_folder_open(&folder, dir, err);
    if (status) return status;
    status = fill(folder.temporary, base, dtype, o, err);
    if (!status) return gn_save_folder_commit(&folder, err);
    gn_save_folder_abort(&folder);
    return status;
}
