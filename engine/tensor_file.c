/* tensor_file.c - the set of tensors behind every file format. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/tensor_file_internal.h"

gn_status gn_tensor_file_new(gn_tensor_file **out, bool reads, gn_error *err) {
    *out = calloc(1, sizeof **out);
    if (!*out) return gn_fail(err, GN_ENOMEM, "out of memory");
    (*out)->reads = reads;
    return GN_OK;
}

void gn_tensor_file_close(gn_tensor_file *file) {
    if (!file) return;
    for (size_t i = 0; i < file->count; i++) free((char *)file->tensors[i].name);
    for (size_t i = 0; i < file->n_mappings; i++) {
        gn_mapping *m = &file->mappings[i];
        if (file->reads)
            free(m->data);
        else if (m->data)
            munmap(m->data, m->bytes);
        free(m->path);
    }
    free(file->tensors);
    free(file->mappings);
    free(file);
}

static gn_status read_open_file(int fd, gn_mapping *m, gn_error *err) {
    m->data = malloc(m->bytes);
    if (!m->data) return gn_fail(err, GN_ENOMEM, "%s: no memory for %zu bytes", m->path, m->bytes);
    size_t done = 0;
    int reason = 0;
    while (done < m->bytes) {
        const ssize_t n = read(fd, m->data + done, m->bytes - done);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) reason = errno;
        if (n <= 0) break;
        done += (size_t)n;
    }
    if (done == m->bytes) return GN_OK;
    free(m->data);
    return gn_fail(err, GN_EIO, "%s: %zu of %zu bytes can be read%s%s", m->path, done, m->bytes,
                   reason ? ": " : "", reason ? strerror(reason) : "");
}

static gn_status map_open_file(int fd, gn_mapping *m, gn_error *err) {
    void *data = mmap(NULL, m->bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED) return gn_fail(err, GN_EIO, "%s: %s", m->path, strerror(errno));
    m->data = data;
    return GN_OK;
}

static gn_status take_open_file(int fd, bool reads, gn_mapping *m, gn_error *err) {
    struct stat st;
    if (fstat(fd, &st) != 0) return gn_fail(err, GN_EIO, "%s: %s", m->path, strerror(errno));
    if (!S_ISREG(st.st_mode)) return gn_fail(err, GN_EIO, "%s: not a regular file", m->path);
    m->bytes = (size_t)st.st_size;
    if (m->bytes == 0) return GN_OK;
    return reads ? read_open_file(fd, m, err) : map_open_file(fd, m, err);
}

gn_status gn_tensor_file_map(gn_tensor_file *file, const char *path, gn_mapping *mapping,
                             gn_error *err) {
    gn_mapping *grown = realloc(file->mappings, (file->n_mappings + 1) * sizeof *grown);
    if (!grown) return gn_fail(err, GN_ENOMEM, "out of memory");
    file->mappings = grown;
    gn_mapping m = {.path = strdup(path)};
    if (!m.path) return gn_fail(err, GN_ENOMEM, "out of memory");
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    const int reason = errno;
    gn_status status = fd < 0 ? gn_fail(err, reason == ENOENT ? GN_ENOENT : GN_EIO, "%s: %s", path,
                                        strerror(reason))
                              : take_open_file(fd, file->reads, &m, err);
    if (fd >= 0) close(fd);
    if (status) {
        free(m.path);
        return status;
    }
    file->mappings[file->n_mappings++] = m;
    *mapping = m;
    return GN_OK;
}

gn_status gn_tensor_file_add(gn_tensor_file *file, const gn_file_tensor *tensor, gn_error *err) {
    if (file->count == file->capacity) {
        const size_t capacity = file->capacity ? 2 * file->capacity : 64;
        gn_file_tensor *grown = realloc(file->tensors, capacity * sizeof *grown);
        if (!grown) return gn_fail(err, GN_ENOMEM, "out of memory");
        file->tensors = grown;
        file->capacity = capacity;
    }
    gn_file_tensor copy = *tensor;
    copy.name = strdup(tensor->name);
    if (!copy.name) return gn_fail(err, GN_ENOMEM, "out of memory");
    file->tensors[file->count++] = copy;
    return GN_OK;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const gn_file_tensor *)a)->name, ((const gn_file_tensor *)b)->name);
}

gn_status gn_tensor_file_seal(gn_tensor_file *file, gn_error *err) {
    if (file->count) qsort(file->tensors, file->count, sizeof *file->tensors, by_name);
    for (size_t i = 1; i < file->count; i++) {
        if (by_name(&file->tensors[i - 1], &file->tensors[i]) == 0)
            return gn_fail(err, GN_EFORMAT, "%s: tensor %s stands there twice",
                           file->tensors[i].path, file->tensors[i].name);
    }
    return GN_OK;
}

void gn_file_tensor_release(const gn_file_tensor *t) {
    if (t->bytes == 0) return;
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t begin = (uintptr_t)t->data / page * page;
    madvise((void *)begin, (uintptr_t)t->data + t->bytes - begin, MADV_DONTNEED);
}

size_t gn_tensor_file_count(const gn_tensor_file *file) {
    return file->count;
}

const gn_file_tensor *gn_tensor_file_at(const gn_tensor_file *file, size_t index) {
    return index < file->count ? &file->tensors[index] : NULL;
}

const gn_file_tensor *gn_tensor_file_find(const gn_tensor_file *file, const char *name) {
    const gn_file_tensor key = {.name = name};
    if (file->count == 0) return NULL;
    return bsearch(&key, file->tensors, file->count, sizeof key, by_name);
}
