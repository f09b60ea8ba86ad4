/* model_writer.c - model.safetensors from an optimizer's masters, and what stands beside it. */
#include "trainer/model_writer.h"

#include <stdio.h>
#include <stdlib.h>

#include "engine/model_files.h"
#include "engine/save_folder.h"
#include "trainer/masters.h"

static gn_status no_memory(const char *where, gn_error *err) {
    return gn_fail(err, GN_ENOMEM, "%s: out of memory", where);
}

/* ---- weights ---- */

static gn_status write_tensors(const char *path, const gn_file_tensor *tensors, gn_optimizer *o,
                               gn_error *err) {
    static const char *const metadata[] = {"format", "pt", NULL};
    const size_t n = gn_optimizer_parameters(o)->n;
    gn_safetensors_writer *w;
    gn_status status = gn_safetensors_create(&w, path, tensors, n, metadata, err);
    if (status) return status;
    for (size_t i = 0; i < n && !status; i++)
        status = gn_master_write(w, o, i, tensors[i].dtype, err);
    if (!status) return gn_safetensors_commit(w, err);
    gn_safetensors_abort(w);
    return status;
}

static gn_status write_weights(const char *dir, gn_dtype dtype, gn_optimizer *o, gn_error *err) {
    const gn_parameters *p = gn_optimizer_parameters(o);
    char *path;
    if (asprintf(&path, "%s/model.safetensors", dir) < 0) return no_memory(dir, err);
    gn_file_tensor *tensors = calloc(p->n + 1, sizeof *tensors);
    gn_status status = tensors ? GN_OK : no_memory(dir, err);
    for (size_t i = 0; i < p->n && !status; i++)
        tensors[i] = gn_master_tensor(&p->items[i], p->items[i].name, dtype);
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

gn_status gn_model_save(const char *dir, const char *base, gn_dtype dtype, gn_optimizer *o,
                        gn_error *err) {
    gn_save_folder folder;
    gn_status status = gn_save_folder_check(dir, "config.json", "model", err);
    if (!status) status = gn_save_folder_open(&folder, dir, err);
    if (status) return status;
    status = fill(folder.temporary, base, dtype, o, err);
    if (!status) return gn_save_folder_commit(&folder, err);
    gn_save_folder_abort(&folder);
    return status;
}
