/* manifest.c - the manifest needs no hash itself: a change in it is no JSON, or another file's
 * name, length or hash, which is then not found. */
#include "trainer/manifest.h"

#include <cjson/cJSON.h>
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/hash.h"
#include "engine/json_file.h"
#include "engine/save_folder.h"

static const char manifest_file[] = "manifest.json", format[] = "guanaco-checkpoint-1";

typedef struct content {
    uint64_t bytes;
    char hash[33]; /* of pieces of PIECE bytes */
} content;

enum { PIECE = 1 << 20 };

static gn_status read_content(content *c, const char *dir, const char *name, gn_error *err) {
    char *path = gn_path_join(dir, name), *piece = malloc(PIECE);
    gn_hash hash = GN_HASH_INIT;
    c->bytes = 0;
    FILE *f = path && piece ? fopen(path, "rbe") : NULL;
    for (size_t n; f && (n = fread(piece, 1, PIECE, f)) > 0; c->bytes += n)
        gn_hash_add(&hash, piece, n);
    gn_status status = GN_OK;
    if (!path || !piece)
        status = gn_fail(err, GN_ENOMEM, "%s: out of memory", dir);
    else if (!f || ferror(f))
        status = gn_fail(err, f || errno != ENOENT ? GN_EIO : GN_EFORMAT, "%s: %s", path,
                         strerror(errno));
    snprintf(c->hash, sizeof c->hash, "%016llx%016llx", (unsigned long long)hash.h[0],
             (unsigned long long)hash.h[1]);
    if (f) fclose(f);
    free(path);
    free(piece);
    return status;
}

/* ---- write ---- */

static gn_status add_file(cJSON *files, const char *dir, const char *name, gn_error *err) {
    content c;
    const gn_status status = read_content(&c, dir, name, err);
    if (status) return status;
    cJSON *file = cJSON_AddObjectToObject(files, name);
    if (file && cJSON_AddNumberToObject(file, "bytes", (double)c.bytes) &&
        cJSON_AddStringToObject(file, "hash", c.hash))
        return GN_OK;
    return gn_fail(err, GN_ENOMEM, "%s: out of memory", dir);
}

static gn_status add_files(cJSON *files, const char *dir, gn_error *err) {
    DIR *d = opendir(dir);
    if (!d) return gn_fail(err, GN_EIO, "%s: %s", dir, strerror(errno));
    gn_status status = GN_OK;
    for (struct dirent *entry; !status && (entry = readdir(d));) {
        if (entry->d_name[0] != '.') status = add_file(files, dir, entry->d_name, err);
    }
    closedir(d);
    return status;
}

gn_status gn_manifest_write(const char *dir, gn_error *err) {
    char *path = gn_path_join(dir, manifest_file), *text = NULL;
    if (!path) return gn_fail(err, GN_ENOMEM, "%s: out of memory", dir);
    cJSON *root = cJSON_CreateObject();
    cJSON *files = root && cJSON_AddStringToObject(root, "format", format)
                       ? cJSON_AddObjectToObject(root, "files")
                       : NULL;
    gn_status status = files ? add_files(files, dir, err) : GN_ENOMEM;
    if (!status) text = cJSON_Print(root);
    if (text)
        status = gn_text_write(path, text, err);
    else if (!status || !files)
        status = gn_fail(err, GN_ENOMEM, "%s: out of memory", dir);
    cJSON_free(text);
    cJSON_Delete(root);
    free(path);
    return status;
}

/* ---- check ---- */

static gn_status check_file(const char *dir, const cJSON *file, gn_error *err) {
    const cJSON *bytes = cJSON_GetObjectItemCaseSensitive(file, "bytes");
    const cJSON *hash = cJSON_GetObjectItemCaseSensitive(file, "hash");
    content c;
    if (!*file->string || strchr(file->string, '/') || file->string[0] == '.' ||
        !cJSON_IsNumber(bytes) || !cJSON_IsString(hash))
        return gn_fail(err, GN_EFORMAT, "%s/%s: \"%.100s\" makes no sense", dir, manifest_file,
                       file->string);
    const gn_status status = read_content(&c, dir, file->string, err);
    if (status) return status;
    if ((double)c.bytes != bytes->valuedouble)
        return gn_fail(err, GN_EFORMAT, "%s/%s has %llu bytes; %.0f were saved", dir, file->string,
                       (unsigned long long)c.bytes, bytes->valuedouble);
    if (strcmp(c.hash, hash->valuestring) != 0)
        return gn_fail(err, GN_EFORMAT, "%s/%s is damaged: its hash is another than was saved", dir,
                       file->string);
    return GN_OK;
}

static gn_status check_all(const char *dir, const cJSON *root, const char *const *needed,
                           gn_error *err) {
    const cJSON *name = cJSON_GetObjectItemCaseSensitive(root, "format");
    const cJSON *files = cJSON_GetObjectItemCaseSensitive(root, "files"), *file;
    if (!cJSON_IsString(name) || strcmp(name->valuestring, format) != 0 || !cJSON_IsObject(files))
        return gn_fail(err, GN_EFORMAT, "%s/%s: expected the format %s", dir, manifest_file,
                       format);
    for (; *needed; needed++) {
        if (!cJSON_GetObjectItemCaseSensitive(files, *needed))
            return gn_fail(err, GN_EFORMAT, "%s/%s: %s is missing", dir, manifest_file, *needed);
    }
    cJSON_ArrayForEach(file, files) {
        const gn_status status = check_file(dir, file, err);
        if (status) return status;
    }
    return GN_OK;
}

gn_status gn_manifest_check(const char *dir, const char *const *needed, gn_error *err) {
    char *path = gn_path_join(dir, manifest_file);
    cJSON *root;
    if (!path) return gn_fail(err, GN_ENOMEM, "%s: out of memory", dir);
    gn_status status = gn_json_read(&root, path, err);
    free(path);
    if (status) return status;
    status = check_all(dir, root, needed, err);
    cJSON_Delete(root);
    return status;
}
