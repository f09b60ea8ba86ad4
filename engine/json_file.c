/* json_file.c - reads and parses; cJSON itself bounds the nesting. */
#include "engine/json_file.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_BYTES = 16 << 20 };

static gn_status read_all(FILE *file, const char *path, char **text, size_t *len, gn_error *err) {
    size_t capacity = 4096;
    *text = NULL;
    *len = 0;
    for (;;) {
        char *grown = realloc(*text, capacity + 1);
        if (!grown) return gn_fail(err, GN_ENOMEM, "%s: out of memory", path);
        *text = grown;
        errno = 0;
        *len += fread(*text + *len, 1, capacity - *len, file);
        if (ferror(file)) return gn_fail(err, GN_EIO, "%s: %s", path, strerror(errno));
        if (*len > MAX_BYTES)
            return gn_fail(err, GN_ETOOBIG, "%s: over %d MiB", path, MAX_BYTES >> 20);
        if (*len < capacity) break;
        capacity *= 2;
    }
    (*text)[*len] = 0;
    return GN_OK;
}

gn_status gn_text_read(char **text, size_t *len, const char *path, gn_error *err) {
    FILE *file = fopen(path, "rbe");
    if (!file)
        return gn_fail(err, errno == ENOENT ? GN_ENOENT : GN_EIO, "%s: %s", path, strerror(errno));
    const gn_status status = read_all(file, path, text, len, err);
    fclose(file);
    if (status) {
        free(*text);
        *text = NULL;
    }
    return status;
}

static int line_of(const char *text, const char *at) {
    int line = 1;
    for (; text < at; text++) line += *text == '\n';
    return line;
}

static gn_status parse(cJSON **out, const char *text, size_t len, const char *path, gn_error *err) {
    const char *end = text;
    cJSON *json = cJSON_ParseWithLengthOpts(text, len + 1, &end, true);
    if (!json)
        return gn_fail(err, GN_EFORMAT, "%s: line %d: not valid JSON", path, line_of(text, end));
    if (!cJSON_IsObject(json)) {
        cJSON_Delete(json);
        return gn_fail(err, GN_EFORMAT, "%s: expected a JSON object", path);
    }
    *out = json;
    return GN_OK;
}

gn_status gn_json_read(cJSON **out, const char *path, gn_error *err) {
    *out = NULL;
    char *text;
    size_t len;
    gn_status status = gn_text_read(&text, &len, path, err);
    if (status) return status;
    status = parse(out, text, len, path, err);
    free(text);
    return status;
}
