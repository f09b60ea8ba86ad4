/* json.c - reading requests: typed fields with errors that name the field. */
#include "server/json.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/options.h" /* gn_nearest */
#include "engine/utf8.h"

/* ---- the body ---- */

/* cJSON ends a string at an escaped zero, which would cut a text silently. */
static bool has_zero(const char *p, size_t size) {
    for (size_t i = 0; i + 5 < size; i++) {
        if (p[i] != '\\') continue;
        if (memcmp(p + i, "\\u0000", 6) == 0) return true;
        i++;
    }
    return memchr(p, 0, size) != NULL;
}

static void name_syntax_error(gn_exchange *x, const char *end) {
    const char *data = x->body.data;
    size_t line = 1, column = 1;
    for (const char *c = data; c < end; c++) {
        column++;
        if (*c != '\n') continue;
        line++;
        column = 1;
    }
    gn_http_fail(&x->refusal, 400, "invalid_json", "",
                 "The body is not valid JSON: error at line %zu, column %zu (byte %zu).", line,
                 column, (size_t)(end - data));
}

cJSON *gn_json_body(gn_exchange *x) {
    const char *data = x->body.data, *end = NULL;
    const size_t size = x->body.size, valid = gn_utf8_check(data, size);
    gn_http_error *e = &x->refusal;
    cJSON *json = NULL;
    if (size == 0) {
        gn_http_fail(e, 400, "invalid_json", "", "The request needs a body with a JSON object.");
    } else if (valid < size) {
        gn_http_fail(e, 400, "invalid_json", "", "The body is not UTF-8 at byte %zu.", valid);
    } else if (has_zero(data, size)) {
        gn_http_fail(e, 400, "invalid_json", "", "The body holds a zero character (\\u0000).");
    } else {
        gn_buffer_append(&x->body, "", 1); /* cJSON wants an end it can look at */
        if (!x->body.failed) json = cJSON_ParseWithLengthOpts(x->body.data, size + 1, &end, true);
        if (x->body.failed)
            gn_http_no_memory(e);
        else if (!json)
            name_syntax_error(x, end ? end : x->body.data);
        else if (!cJSON_IsObject(json))
            gn_http_fail(e, 400, NULL, "", "The body must be a JSON object.");
    }
    gn_buffer_free(&x->body); /* everything is in the tree now */
    if (e->status) {
        cJSON_Delete(json);
        json = NULL;
    }
    return json;
}

/* ---- fields ---- */

static bool in_list(const char *name, const char *const *list, int n) {
    for (int i = 0; i < n; i++) {
        if (strcmp(name, list[i]) == 0) return true;
    }
    return false;
}

void gn_json_known(const gn_json *j, const char *const *known, int n, const char *const *ignored,
                   int n_ignored) {
    const cJSON *field;
    cJSON_ArrayForEach(field, j->object) {
        const char *name = field->string;
        if (in_list(name, known, n) || in_list(name, ignored, n_ignored)) continue;
        if (j->error->status) return;
        const char *nearest = gn_nearest(name, known, n);
        gn_http_fail(j->error, 400, "unknown_parameter", name,
                     nearest ? "Unknown parameter \"%.200s\"; did you mean \"%s\"?"
                             : "Unknown parameter \"%.200s\".",
                     name, nearest);
    }
}

const cJSON *gn_json_get(const gn_json *j, const char *name) {
    const cJSON *field = cJSON_GetObjectItemCaseSensitive(j->object, name);
    return field && !cJSON_IsNull(field) ? field : NULL;
}

void gn_json_bool(const gn_json *j, const char *name, bool *out) {
    const cJSON *field = gn_json_get(j, name);
    if (!field) return;
    if (cJSON_IsBool(field))
        *out = cJSON_IsTrue(field);
    else
        gn_http_fail(j->error, 400, NULL, name, "%s must be true or false.", name);
}

bool gn_json_is_int(const cJSON *value, int64_t min, int64_t max) {
    if (!cJSON_IsNumber(value)) return false;
    const double d = value->valuedouble;
    return d == floor(d) && d >= (double)min && d <= (double)max;
}

void gn_json_int(const gn_json *j, const char *name, int64_t min, int64_t max, int64_t *out) {
    const cJSON *field = gn_json_get(j, name);
    if (!field) return;
    if (gn_json_is_int(field, min, max))
        *out = (int64_t)field->valuedouble;
    else
        gn_http_fail(j->error, 400, NULL, name, "%s must be a whole number from %lld to %lld.",
                     name, (long long)min, (long long)max);
}

void gn_json_float(const gn_json *j, const char *name, double min, double max, float *out) {
    const cJSON *field = gn_json_get(j, name);
    if (!field) return;
    const double d = cJSON_IsNumber(field) ? field->valuedouble : NAN;
    if (d >= min && d <= max)
        *out = (float)d;
    else
        gn_http_fail(j->error, 400, NULL, name, "%s must be a number from %g to %g.", name, min,
                     max);
}

void gn_json_string(const gn_json *j, const char *name, const char **out) {
    const cJSON *field = gn_json_get(j, name);
    if (!field) return;
    if (cJSON_IsString(field))
        *out = field->valuestring;
    else
        gn_http_fail(j->error, 400, NULL, name, "%s must be a string.", name);
}

bool gn_json_ids(const cJSON *array, const char *name, int64_t max, int32_t **out, int32_t *n,
                 gn_http_error *error) {
    const int size = cJSON_GetArraySize(array);
    int32_t *ids = malloc((size_t)size * sizeof *ids + 1);
    if (!ids) return gn_http_no_memory(error);
    const cJSON *item;
    int32_t at = 0;
    cJSON_ArrayForEach(item, array) {
        if (!gn_json_is_int(item, 0, max)) {
            free(ids);
            return gn_http_fail(error, 400, NULL, name,
                                "%s[%d] must be a token id, a whole number from 0 to %lld.", name,
                                at, (long long)max);
        }
        ids[at++] = (int32_t)item->valuedouble;
    }
    *out = ids;
    *n = at;
    return true;
}
