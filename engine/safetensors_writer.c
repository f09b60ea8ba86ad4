/* safetensors_writer.c - writing a .safetensors file tensor by tensor, atomically. */
#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/tensor_file_internal.h"

struct gn_safetensors_writer {
    char *path, *temporary;
    int fd;
    uint64_t written, total; /* bytes of tensor data */
};

static gn_status write_all(gn_safetensors_writer *w, const void *data, size_t bytes,
                           gn_error *err) {
    const char *p = data;
    while (bytes > 0) {
        const ssize_t n = write(w->fd, p, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return gn_fail(err, GN_EIO, "%s: %s", w->temporary, strerror(errno));
        p += n;
        bytes -= (size_t)n;
    }
    return GN_OK;
}

static bool add_entry(cJSON *root, const gn_file_tensor *t, uint64_t begin) {
    cJSON *entry = cJSON_AddObjectToObject(root, t->name);
    cJSON *shape = entry && cJSON_AddStringToObject(entry, "dtype", gn_dtype_name(t->dtype))
                       ? cJSON_AddArrayToObject(entry, "shape")
                       : NULL;
    cJSON *offsets = shape ? cJSON_AddArrayToObject(entry, "data_offsets") : NULL;
    if (!offsets) return false;
    for (int i = 0; i < t->ndim; i++)
        if (!cJSON_AddItemToArray(shape, cJSON_CreateNumber((double)t->shape[i]))) return false;
    return cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)begin)) &&
           cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)(begin + t->bytes)));
}

/* The header's text, padded with spaces so that the data starts at a multiple of 8. */
static char *header_of(const gn_file_tensor *entries, size_t n, const char *const *metadata,
                       uint64_t *total) {
    cJSON *root = cJSON_CreateObject();
    bool ok = root != NULL;
    if (ok && metadata) {
        cJSON *m = cJSON_AddObjectToObject(root, "__metadata__");
        for (; ok && *metadata; metadata += 2)
            ok = cJSON_AddStringToObject(m, metadata[0], metadata[1]) != NULL;
    }
    for (size_t i = 0; ok && i < n; i++) {
        ok = add_entry(root, &entries[i], *total);
        *total += entries[i].bytes;
    }
    char *json = ok ? cJSON_PrintUnformatted(root) : NULL;
    cJSON_Delete(root);
    if (!json) return NULL;
    const size_t length = strlen(json), padded = (length + 7) / 8 * 8;
    char *text = realloc(json, padded + 1);
    if (!text) {
        free(json);
        return NULL;
    }
    memset(text + length, ' ', padded - length);
    text[padded] = '\0';
    return text;
}

gn_status gn_safetensors_create(gn_safetensors_writer **out, const char *path,
                                const gn_file_tensor *entries, size_t n,
                                const char *const *metadata, gn_error *err) {
    gn_safetensors_writer *w = calloc(1, sizeof *w);
    if (!w) return gn_fail(err, GN_ENOMEM, "out of memory");
    w->fd = -1;
    w->path = strdup(path);
    if (asprintf(&w->temporary, "%s.partial", path) < 0) w->temporary = NULL;
    char *header = w->path && w->temporary ? header_of(entries, n, metadata, &w->total) : NULL;
    gn_status status = header ? GN_OK : gn_fail(err, GN_ENOMEM, "out of memory");
    if (!status) {
        w->fd = open(w->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        if (w->fd < 0) status = gn_fail(err, GN_EIO, "%s: %s", w->temporary, strerror(errno));
    }
    if (!status) {
        const uint64_t length = strlen(header);
        unsigned char prefix[8];
        for (int i = 0; i < 8; i++) prefix[i] = (unsigned char)(length >> (8 * i));
        status = write_all(w, prefix, sizeof prefix, err);
        if (!status) status = write_all(w, header, length, err);
    }
    free(header);
    if (status)
        gn_safetensors_abort(w);
    else
        *out = w;
    return status;
}

gn_status gn_safetensors_write(gn_safetensors_writer *w, const void *data, size_t bytes,
                               gn_error *err) {
    w->written += bytes;
    return write_all(w, data, bytes, err);
}

gn_status gn_sync_parent(const char *path, gn_error *err) {
    char *copy = strdup(path);
    if (!copy) return gn_fail(err, GN_ENOMEM, "out of memory");
    const int fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    const bool ok = fd >= 0 && fsync(fd) == 0;
    const gn_status status = ok ? GN_OK : gn_fail(err, GN_EIO, "%s: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
    free(copy);
    return status;
}

gn_status gn_safetensors_commit(gn_safetensors_writer *w, gn_error *err) {
    gn_status status = GN_OK;
    if (w->written != w->total)
        status = gn_fail(err, GN_EINVAL, "%s: %llu bytes were written; the tensors have %llu",
                         w->path, (unsigned long long)w->written, (unsigned long long)w->total);
    if (!status && fsync(w->fd) != 0)
        status = gn_fail(err, GN_EIO, "%s: %s", w->temporary, strerror(errno));
    if (!status && rename(w->temporary, w->path) != 0)
        status = gn_fail(err, GN_EIO, "%s: %s", w->path, strerror(errno));
    if (status) {
        gn_safetensors_abort(w);
        return status;
    }
    status = gn_sync_parent(w->path, err);
    close(w->fd);
    free(w->temporary);
    free(w->path);
    free(w);
    return status;
}

void gn_safetensors_abort(gn_safetensors_writer *w) {
    if (!w) return;
    if (w->fd >= 0) {
        close(w->fd);
        unlink(w->temporary);
    }
    free(w->temporary);
    free(w->path);
    free(w);
}
