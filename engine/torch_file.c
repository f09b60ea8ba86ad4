/* torch_file.c - what torch.save writes: a zip of one pickle that describes tensors and one entry
 * for each storage they are views of.
 *
 *   NAME/data.pkl     the state dict                 (pickle.c)
 *   NAME/data/KEY     the bytes of storage KEY
 *   NAME/byteorder    "little"; torch before 2.1 leaves it out
 *
 * Tensors may share a storage, as tied weights do: reading alias bytes is harmless. */
#include <string.h>

#include "engine/bytes.h"
#include "engine/pickle.h"
#include "engine/tensor_file_internal.h"
#include "engine/zip.h"

static const char PICKLE_NAME[] = "/data.pkl";

enum { MAX_ENTRY_NAME = 1024 };

typedef struct {
    gn_tensor_file *file;
    gn_mapping map;
    gn_zip zip;
    gn_pickle pickle;
    const char *prefix; /* NAME, not terminated */
    size_t prefix_len;
} reader;

/* Before torch 1.6 a file was a row of pickles, the first of them this magic number. */
static bool is_legacy(const gn_mapping *map) {
    static const unsigned char magic[] = {0x80, 2, 0x8a, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9};
    return map->bytes >= sizeof magic && memcmp(map->data, magic, sizeof magic) == 0;
}

static gn_status check_kind(const gn_mapping *map, gn_error *err) {
    if (is_legacy(map))
        return gn_fail(err, GN_EUNSUPPORTED,
                       "%s: written in torch's format from before version 1.6; load it and save it "
                       "again with a newer torch, or convert it to safetensors",
                       map->path);
    if (map->bytes < 4 || memcmp(map->data, "PK\3\4", 4) != 0)
        return gn_fail(err, GN_EFORMAT, "%s: not a file written by torch.save (no zip file)",
                       map->path);
    return GN_OK;
}

/* The entry NAME/data.pkl, which also tells NAME. */
static gn_status find_pickle(reader *r, const gn_zip_entry **found, gn_error *err) {
    const size_t len = sizeof PICKLE_NAME - 1;
    *found = NULL;
    for (size_t i = 0; i < r->zip.count; i++) {
        const gn_zip_entry *entry = &r->zip.entries[i];
        if (entry->name_len <= len ||
            memcmp(entry->name + entry->name_len - len, PICKLE_NAME, len) != 0)
            continue;
        if (*found)
            return gn_fail(err, GN_EFORMAT, "%s: holds more than one data.pkl", r->map.path);
        *found = entry;
        r->prefix = entry->name;
        r->prefix_len = entry->name_len - len;
    }
    if (!*found)
        return gn_fail(err, GN_EFORMAT,
                       "%s: a zip file without NAME/data.pkl (not written by torch.save)",
                       r->map.path);
    return GN_OK;
}

/* The entry NAME + suffix, or NULL. */
static const gn_zip_entry *find_entry(const reader *r, const char *suffix, size_t suffix_len) {
    char name[MAX_ENTRY_NAME];
    if (r->prefix_len + suffix_len > sizeof name) return NULL;
    memcpy(name, r->prefix, r->prefix_len);
    memcpy(name + r->prefix_len, suffix, suffix_len);
    return gn_zip_find(&r->zip, name, r->prefix_len + suffix_len);
}

static gn_status check_byteorder(const reader *r, gn_error *err) {
    static const char suffix[] = "/byteorder", little[] = "little";
    const gn_zip_entry *entry = find_entry(r, suffix, sizeof suffix - 1);
    if (!entry) return GN_OK;
    if (entry->bytes == sizeof little - 1 &&
        memcmp(r->map.data + entry->data, little, sizeof little - 1) == 0)
        return GN_OK;
    return gn_fail(err, GN_EUNSUPPORTED, "%s: byteorder is not \"little\"", r->map.path);
}

static const gn_zip_entry *find_storage(const reader *r, const gn_pickle_tensor *t) {
    char suffix[MAX_ENTRY_NAME] = "/data/";
    const size_t used = strlen(suffix);
    if (t->storage_len > sizeof suffix - used) return NULL;
    memcpy(suffix + used, t->storage, t->storage_len);
    return find_entry(r, suffix, used + t->storage_len);
}

static gn_status add_tensor(const reader *r, const gn_pickle_tensor *t, gn_error *err) {
    char name[MAX_ENTRY_NAME];
    if (t->name_len >= sizeof name)
        return gn_fail(err, GN_ETOOBIG, "%s: a tensor's name is too long", r->map.path);
    memcpy(name, t->name, t->name_len);
    name[t->name_len] = 0;
    const gn_zip_entry *entry = find_storage(r, t);
    if (!entry)
        return gn_fail(err, GN_EFORMAT, "%s: the storage of %s is missing", r->map.path, name);
    const size_t size = gn_dtype_size(t->dtype);
    if (entry->bytes % size || entry->bytes / size != (uint64_t)t->storage_numel)
        return gn_fail(err, GN_EFORMAT,
                       "%s: the storage of %s has %zu bytes, expected %lld numbers of %zu",
                       r->map.path, name, entry->bytes, (long long)t->storage_numel, size);
    /* The pickle reader kept offset and shape inside storage_numel, so nothing overflows. */
    gn_file_tensor tensor = {.name = name,
                             .dtype = t->dtype,
                             .ndim = t->ndim,
                             .data = r->map.data + entry->data + (size_t)t->offset * size,
                             .bytes = size,
                             .path = r->map.path};
    for (int i = 0; i < t->ndim; i++) {
        tensor.shape[i] = t->shape[i];
        tensor.bytes *= (size_t)t->shape[i];
    }
    return gn_tensor_file_add(r->file, &tensor, err);
}

static gn_status read_tensors(reader *r, gn_error *err) {
    const gn_zip_entry *pickle;
    gn_status status = find_pickle(r, &pickle, err);
    if (status == GN_OK) status = check_byteorder(r, err);
    if (status) return status;
    status =
        gn_pickle_read(&r->pickle, r->map.data + pickle->data, pickle->bytes, r->map.path, err);
    for (size_t i = 0; status == GN_OK && i < r->pickle.count; i++)
        status = add_tensor(r, &r->pickle.tensors[i], err);
    gn_pickle_free(&r->pickle);
    return status;
}

gn_status gn_torch_open(gn_tensor_file **out, const char *path, gn_error *err) {
    *out = NULL;
    reader r = {0};
    gn_status status = gn_tensor_file_new(&r.file, true, err);
    if (status) return status;
    status = gn_tensor_file_map(r.file, path, &r.map, err);
    if (status == GN_OK) status = check_kind(&r.map, err);
    if (status == GN_OK) status = gn_zip_open(&r.zip, r.map.data, r.map.bytes, r.map.path, err);
    if (status == GN_OK) {
        status = read_tensors(&r, err);
        gn_zip_close(&r.zip);
    }
    if (status == GN_OK) status = gn_tensor_file_seal(r.file, err);
    if (status)
        gn_tensor_file_close(r.file);
    else
        *out = r.file;
    return status;
}
