/* safetensors.c - reading .safetensors files, single and sharded.
 *
 * A file is an 8-byte little-endian length, that many bytes of JSON, and the data. The JSON names
 * each tensor's dtype, shape and byte range in the data. As in the reference implementation, the
 * ranges must cover the data exactly: no overlap, no hole, nothing behind the last. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/bytes.h"
#include "engine/json_file.h"
#include "engine/tensor_file_internal.h"

enum { MAX_HEADER = 100 << 20, MAX_PATH_BYTES = 4096 };

static bool dtype_of(gn_dtype *dtype, const char *name) {
    for (int i = 0; i < GN_DTYPE_COUNT; i++) {
        if (strcmp(name, gn_dtype_name((gn_dtype)i))) continue;
        *dtype = (gn_dtype)i;
        return true;
    }
    return false;
}

/* A whole number in [0, 2^53], which a JSON double holds exactly. */
static bool whole(const cJSON *item, uint64_t *value) {
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0) || item->valuedouble > 0x1p53 ||
        item->valuedouble != floor(item->valuedouble))
        return false;
    *value = (uint64_t)item->valuedouble;
    return true;
}

static gn_status parse_shape(const cJSON *entry, gn_file_tensor *t, gn_error *err) {
    const cJSON *shape = cJSON_GetObjectItemCaseSensitive(entry, "shape"), *item;
    if (!cJSON_IsArray(shape))
        return gn_fail(err, GN_EFORMAT, "%s: tensor %s has no shape", t->path, t->name);
    if (cJSON_GetArraySize(shape) > GN_MAX_DIMS)
        return gn_fail(err, GN_EUNSUPPORTED, "%s: tensor %s has more than %d dimensions", t->path,
                       t->name, GN_MAX_DIMS);
    uint64_t bytes = gn_dtype_size(t->dtype), n;
    cJSON_ArrayForEach(item, shape) {
        if (!whole(item, &n))
            return gn_fail(err, GN_EFORMAT, "%s: tensor %s has a shape that is not whole numbers",
                           t->path, t->name);
        if (__builtin_mul_overflow(bytes, n, &bytes) || bytes > INT64_MAX)
            return gn_fail(err, GN_EFORMAT, "%s: tensor %s has an impossible shape", t->path,
                           t->name);
        t->shape[t->ndim++] = (int64_t)n;
    }
    t->bytes = (size_t)bytes;
    return GN_OK;
}

/* cJSON ends strings at a NUL, so that two names could look like one. */
static bool has_nul(const char *text, size_t n) {
    const char *end = text + n, *at = text;
    if (memchr(text, '\0', n)) return true;
    for (; (at = memmem(at, (size_t)(end - at), "\\u0000", 6)); at++) {
        size_t before = 0; /* a backslash that is itself escaped begins no escape */
        while (at - before > text && at[-(ptrdiff_t)before - 1] == '\\') before++;
        if (before % 2 == 0) return true;
    }
    return false;
}

/* The header as an object; NULL with err filled when it is not exactly one. */
static cJSON *parse_header(const gn_mapping *m, size_t length, gn_error *err) {
    const char *text = (const char *)m->data + 8, *end = text;
    if (has_nul(text, length)) {
        gn_fail(err, GN_EFORMAT, "%s: the header holds a NUL character", m->path);
        return NULL;
    }
    cJSON *header = cJSON_ParseWithLengthOpts(text, length, &end, false);
    while (header && end < text + length && strchr(" \t\r\n", *end)) end++;
    if (cJSON_IsObject(header) && *text == '{' && end == text + length) return header;
    gn_fail(err, GN_EFORMAT, "%s: the header is not one JSON object", m->path);
    cJSON_Delete(header);
    return NULL;
}

static gn_status parse_entry(const cJSON *entry, const gn_mapping *m, uint64_t data0,
                             gn_file_tensor *t, gn_error *err) {
    *t = (gn_file_tensor){.name = entry->string, .path = m->path};
    const cJSON *dtype = cJSON_GetObjectItemCaseSensitive(entry, "dtype");
    const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(entry, "data_offsets");
    if (cJSON_GetArraySize(entry) != 3)
        return gn_fail(err, GN_EFORMAT,
                       "%s: tensor %s needs dtype, shape and data_offsets, each once, and no more",
                       m->path, t->name);
    if (!cJSON_IsString(dtype))
        return gn_fail(err, GN_EFORMAT, "%s: tensor %s has no dtype", m->path, t->name);
    if (!dtype_of(&t->dtype, dtype->valuestring))
        return gn_fail(err, GN_EUNSUPPORTED,
                       "%s: tensor %s has dtype %.32s, which is not supported", m->path, t->name,
                       dtype->valuestring);
    const gn_status status = parse_shape(entry, t, err);
    if (status) return status;
    uint64_t begin, end;
    if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2 ||
        !whole(cJSON_GetArrayItem(offsets, 0), &begin) ||
        !whole(cJSON_GetArrayItem(offsets, 1), &end) || begin > end)
        return gn_fail(err, GN_EFORMAT, "%s: tensor %s has no valid data_offsets", m->path,
                       t->name);
    if (end > m->bytes - data0)
        return gn_fail(err, GN_EFORMAT,
                       "%s: tensor %s ends at byte %llu of the data, but there are only %llu; the "
                       "file is truncated",
                       m->path, t->name, (unsigned long long)end,
                       (unsigned long long)(m->bytes - data0));
    if (end - begin != t->bytes)
        return gn_fail(err, GN_EFORMAT, "%s: tensor %s has %llu bytes, but its shape needs %zu",
                       m->path, t->name, (unsigned long long)(end - begin), t->bytes);
    t->data = m->data + data0 + begin;
    return GN_OK;
}

static int by_place(const void *a, const void *b) {
    const gn_file_tensor *p = a, *q = b;
    if (p->data != q->data) return (const char *)p->data < (const char *)q->data ? -1 : 1;
    return (p->bytes > q->bytes) - (p->bytes < q->bytes);
}

/* The tensors of one mapping must tile its data. Reorders them. */
static gn_status check_coverage(gn_file_tensor *tensors, size_t n, const gn_mapping *m,
                                uint64_t data0, gn_error *err) {
    const unsigned char *at = m->data + data0;
    if (n) qsort(tensors, n, sizeof *tensors, by_place);
    for (size_t i = 0; i < n; i++) {
        const unsigned char *data = tensors[i].data;
        if (data < at)
            return gn_fail(err, GN_EFORMAT, "%s: tensors %s and %s overlap", m->path,
                           tensors[i - 1].name, tensors[i].name);
        if (data > at)
            return gn_fail(err, GN_EFORMAT, "%s: %td bytes before tensor %s belong to no tensor",
                           m->path, data - at, tensors[i].name);
        at = data + tensors[i].bytes;
    }
    if (at != m->data + m->bytes)
        return gn_fail(err, GN_EFORMAT, "%s: %td bytes at the end belong to no tensor", m->path,
                       m->data + m->bytes - at);
    return GN_OK;
}

static gn_status add_tensors(gn_tensor_file *file, const cJSON *header, const gn_mapping *m,
                             uint64_t data0, gn_error *err) {
    const size_t first = file->count;
    const cJSON *entry;
    cJSON_ArrayForEach(entry, header) {
        gn_file_tensor t;
        if (!strcmp(entry->string, "__metadata__")) continue;
        gn_status status = parse_entry(entry, m, data0, &t, err);
        if (!status) status = gn_tensor_file_add(file, &t, err);
        if (status) return status;
    }
    return check_coverage(file->tensors + first, file->count - first, m, data0, err);
}

static gn_status add_file(gn_tensor_file *file, const char *path, gn_error *err) {
    gn_mapping m;
    gn_status status = gn_tensor_file_map(file, path, &m, err);
    if (status) return status;
    if (m.bytes < 8)
        return gn_fail(err, GN_EFORMAT, "%s: %zu bytes are too few for a safetensors file", m.path,
                       m.bytes);
    const uint64_t length = gn_le64(m.data);
    if (length > MAX_HEADER || !gn_within(8, length, m.bytes))
        return gn_fail(err, GN_EFORMAT,
                       "%s: a header of %llu bytes in a file of %zu; truncated, or not safetensors",
                       m.path, (unsigned long long)length, m.bytes);
    cJSON *header = parse_header(&m, (size_t)length, err);
    if (!header) return GN_EFORMAT;
    status = add_tensors(file, header, &m, 8 + length, err);
    cJSON_Delete(header);
    return status;
}

static gn_status open_file(gn_tensor_file **out, const char *path, bool reads, gn_error *err) {
    gn_tensor_file *file;
    gn_status status = gn_tensor_file_new(&file, reads, err);
    if (status) return status;
    status = add_file(file, path, err);
    if (!status) status = gn_tensor_file_seal(file, err);
    if (status)
        gn_tensor_file_close(file);
    else
        *out = file;
    return status;
}

gn_status gn_safetensors_open(gn_tensor_file **out, const char *path, gn_error *err) {
    return open_file(out, path, false, err);
}

gn_status gn_safetensors_read(gn_tensor_file **out, const char *path, gn_error *err) {
    return open_file(out, path, true, err);
}

/* ---- shards ---- */

static bool is_plain_name(const char *name) {
    return *name && !strchr(name, '/') && strcmp(name, ".") && strcmp(name, "..");
}

static bool is_mapped(const gn_tensor_file *file, const char *path) {
    for (size_t i = 0; i < file->n_mappings; i++) {
        if (!strcmp(file->mappings[i].path, path)) return true;
    }
    return false;
}

static gn_status add_shards(gn_tensor_file *file, const char *dir, const cJSON *map,
                            const char *index, gn_error *err) {
    char path[MAX_PATH_BYTES];
    const cJSON *item;
    cJSON_ArrayForEach(item, map) {
        if (!cJSON_IsString(item) || !is_plain_name(item->valuestring))
            return gn_fail(err, GN_EFORMAT, "%s: tensor %s has no valid shard name", index,
                           item->string);
        snprintf(path, sizeof path, "%s/%s", dir, item->valuestring);
        const gn_status status = is_mapped(file, path) ? GN_OK : add_file(file, path, err);
        if (status) return status;
    }
    const gn_status status = gn_tensor_file_seal(file, err);
    if (status) return status;
    cJSON_ArrayForEach(item, map) {
        const gn_file_tensor *t = gn_tensor_file_find(file, item->string);
        snprintf(path, sizeof path, "%s/%s", dir, item->valuestring);
        if (!t || strcmp(t->path, path))
            return gn_fail(err, GN_EFORMAT, "%s: tensor %s is not in %s, where the index has it",
                           index, item->string, item->valuestring);
    }
    return GN_OK;
}

gn_status gn_safetensors_open_dir(gn_tensor_file **out, const char *dir, gn_error *err) {
    char path[MAX_PATH_BYTES];
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    if (access(path, F_OK) == 0) return gn_safetensors_open(out, path, err);
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", dir);
    if (access(path, F_OK) != 0)
        return gn_fail(err, GN_ENOENT,
                       "%s: neither model.safetensors nor model.safetensors.index.json is there; "
                       "weights in other formats must be converted",
                       dir);
    cJSON *index;
    gn_status status = gn_json_read(&index, path, err);
    if (status) return status;
    const cJSON *map = cJSON_GetObjectItemCaseSensitive(index, "weight_map");
    gn_tensor_file *file = NULL;
    if (!cJSON_IsObject(map))
        status = gn_fail(err, GN_EFORMAT, "%s: no weight_map", path);
    else
        status = gn_tensor_file_new(&file, false, err);
    if (!status) status = add_shards(file, dir, map, path, err);
    cJSON_Delete(index);
    if (status)
        gn_tensor_file_close(file);
    else
        *out = file;
    return status;
}
