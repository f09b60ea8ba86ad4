/* json.h - reading requests: typed fields with errors that name the field.
 *
 * A reader remembers the first thing that was wrong and does nothing afterwards, so a handler
 * reads all fields and asks once. A field that is absent or null leaves *out as it was. */
#ifndef GN_JSON_H
#define GN_JSON_H

#include <cjson/cJSON.h>

#include "server/http.h"

typedef struct gn_json {
    const cJSON *object;
    gn_http_error *error;
} gn_json;

/* The request's body as an object; NULL with x->refusal filled when it is not JSON (with the
 * position), not UTF-8, not an object, or holds a zero character. */
cJSON *gn_json_body(gn_exchange *x);

/* Refuses fields that are in neither list, with the nearest known name. */
void gn_json_known(const gn_json *j, const char *const *known, int n, const char *const *ignored,
                   int n_ignored);
/* The field, or NULL when it is absent or null. */
const cJSON *gn_json_get(const gn_json *j, const char *name);
void gn_json_bool(const gn_json *j, const char *name, bool *out);
void gn_json_int(const gn_json *j, const char *name, int64_t min, int64_t max, int64_t *out);
void gn_json_float(const gn_json *j, const char *name, double min, double max, float *out);
void gn_json_string(const gn_json *j, const char *name, const char **out);
/* An array of whole numbers in [min, max]; *out is malloc'ed, also when there are none. */
bool gn_json_ids(const cJSON *array, const char *name, int64_t max, int32_t **out, int32_t *n,
                 gn_http_error *error);
/* Is the value a whole number in [min, max]? */
bool gn_json_is_int(const cJSON *value, int64_t min, int64_t max);

#endif
