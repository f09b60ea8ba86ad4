/* bnb.c - finding and checking a weight in bitsandbytes' serialized form. */
#include "engine/bnb.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MAX_NAME = 512 };

static const struct {
    gn_dtype dtype;
    const char *name;
} torch_dtypes[] = {{GN_F32, "float32"}, {GN_F16, "float16"}, {GN_BF16, "bfloat16"}};

/* Where a weight's tensors are looked for. */
typedef struct search {
    const gn_tensor_file *file;
    const char *where, *name;
    gn_error *err;
} search;

static gn_status part(const search *s, const char *suffix, gn_dtype dtype, int64_t numel,
                      const gn_file_tensor **out) {
    char full[MAX_NAME];
    snprintf(full, sizeof full, "%s%s", s->name, suffix);
    const gn_file_tensor *t = gn_tensor_file_find(s->file, full);
    if (!t) return gn_fail(s->err, GN_EFORMAT, "%s: tensor %s is missing", s->where, full);
    *out = t;
    const int64_t bytes = numel * (int64_t)gn_dtype_size(dtype);
    if (t->dtype == dtype && (int64_t)t->bytes == bytes) return GN_OK;
    return gn_fail(s->err, t->dtype == dtype ? GN_EMISMATCH : GN_EFORMAT,
                   "%s: tensor %s is %s of %zu bytes; expected %s of %lld", t->path, full,
                   gn_dtype_name(t->dtype), t->bytes, gn_dtype_name(dtype), (long long)bytes);
}

static gn_status check_finite(const gn_file_tensor *t, gn_error *err) {
    for (size_t i = 0; i < t->bytes / sizeof(float); i++) {
        float v;
        memcpy(&v, (const char *)t->data + i * sizeof v, sizeof v);
        if (!isfinite(v))
            return gn_fail(err, GN_EFORMAT, "%s: tensor %s has a value that is not finite at %zu",
                           t->path, t->name, i);
    }
    return GN_OK;
}

static const gn_file_tensor *find_state(gn_qtype *qtype, const search *s) {
    static const gn_qtype types[] = {GN_Q_NF4, GN_Q_FP4};
    for (int i = 0; i < 2; i++) {
        char full[MAX_NAME];
        snprintf(full, sizeof full, "%s" GN_BNB_STATE "%s", s->name, gn_qtype_name(types[i]));
        *qtype = types[i];
        const gn_file_tensor *t = gn_tensor_file_find(s->file, full);
        if (t) return t;
    }
    return NULL;
}

static bool number_is(const cJSON *root, const char *key, double expected) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(root, key);
    return cJSON_IsNumber(item) && item->valuedouble == expected;
}

static bool string_is(const cJSON *root, const char *key, const char *expected) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(root, key);
    return cJSON_IsString(item) && !strcmp(item->valuestring, expected);
}

static gn_status parse_state(gn_bnb_weight *w, const cJSON *root, int64_t rows, int64_t cols,
                             bool *nested, gn_error *err) {
    const char *path = w->state->path, *name = w->state->name;
    const cJSON *shape = cJSON_GetObjectItemCaseSensitive(root, "shape");
    const cJSON *offset = cJSON_GetObjectItemCaseSensitive(root, "nested_offset");
    const cJSON *n = cJSON_GetArrayItem(shape, 0), *k = cJSON_GetArrayItem(shape, 1);
    if (!string_is(root, "quant_type", gn_qtype_name(w->qtype)))
        return gn_fail(err, GN_EFORMAT, "%s: %s: quant_type is not %s", path, name,
                       gn_qtype_name(w->qtype));
    if (!number_is(root, "blocksize", GN_BLOCK))
        return gn_fail(err, GN_EUNSUPPORTED, "%s: %s: blocksize is not %d", path, name, GN_BLOCK);
    if (cJSON_GetArraySize(shape) != 2 || !cJSON_IsNumber(n) || !cJSON_IsNumber(k) ||
        n->valuedouble != (double)rows || k->valuedouble != (double)cols)
        return gn_fail(err, GN_EMISMATCH,
                       "%s: %s: the shape is not (%lld, %lld), as config.json makes it", path, name,
                       (long long)rows, (long long)cols);
    bool known = false;
    for (size_t i = 0; i < sizeof torch_dtypes / sizeof *torch_dtypes; i++) {
        if (!string_is(root, "dtype", torch_dtypes[i].name)) continue;
        w->dtype = torch_dtypes[i].dtype;
        known = true;
    }
    if (!known)
        return gn_fail(err, GN_EUNSUPPORTED, "%s: %s: dtype is not float32, float16 or bfloat16",
                       path, name);
    *nested = offset != NULL;
    if (!*nested) return GN_OK;
    if (!number_is(root, "nested_blocksize", GN_NESTED_BLOCK))
        return gn_fail(err, GN_EUNSUPPORTED, "%s: %s: nested_blocksize is not %d", path, name,
                       GN_NESTED_BLOCK);
    w->offset = cJSON_IsNumber(offset) ? (float)offset->valuedouble : NAN;
    if (isfinite(w->offset)) return GN_OK;
    return gn_fail(err, GN_EFORMAT, "%s: %s: nested_offset is not a finite number", path, name);
}

static gn_status read_state(gn_bnb_weight *w, const search *s, int64_t rows, int64_t cols,
                            bool *nested) {
    w->state = find_state(&w->qtype, s);
    if (!w->state)
        return gn_fail(s->err, GN_EFORMAT, "%s: tensor %s" GN_BNB_STATE "nf4 (or fp4) is missing",
                       s->where, s->name);
    cJSON *root = cJSON_ParseWithLength(w->state->data, w->state->bytes);
    const gn_status status = cJSON_IsObject(root)
                                 ? parse_state(w, root, rows, cols, nested, s->err)
                                 : gn_fail(s->err, GN_EFORMAT, "%s: tensor %s is not a JSON object",
                                           w->state->path, w->state->name);
    cJSON_Delete(root);
    return status;
}

gn_status gn_bnb_find(gn_bnb_weight *w, const gn_tensor_file *file, const char *where,
                      const char *name, int64_t rows, int64_t cols, gn_error *err) {
    const search s = {file, where, name, err};
    const int64_t n = rows * cols, blocks = (n + GN_BLOCK - 1) / GN_BLOCK;
    bool nested = false;
    *w = (gn_bnb_weight){0};
    gn_status status = part(&s, "", GN_U8, (n + 1) / 2, &w->codes);
    if (!status) status = read_state(w, &s, rows, cols, &nested);
    if (!status) status = part(&s, GN_BNB_QUANT_MAP, GN_F32, 16, &w->quant_map);
    if (!status) status = check_finite(w->quant_map, err);
    if (!status) status = part(&s, GN_BNB_ABSMAX, nested ? GN_U8 : GN_F32, blocks, &w->absmax);
    if (status) return status;
    if (!nested) return check_finite(w->absmax, err);
    status = part(&s, GN_BNB_NESTED_ABSMAX, GN_F32,
                  (blocks + GN_NESTED_BLOCK - 1) / GN_NESTED_BLOCK, &w->nested_absmax);
    if (!status) status = part(&s, GN_BNB_NESTED_QUANT_MAP, GN_F32, 256, &w->nested_quant_map);
    if (!status) status = check_finite(w->nested_absmax, err);
    if (!status) status = check_finite(w->nested_quant_map, err);
    return status;
}

const char *gn_torch_dtype_name(gn_dtype dtype) {
    size_t i = 0;
    while (torch_dtypes[i].dtype != dtype) i++;
    return torch_dtypes[i].name;
}

int gn_bnb_write_state(char *json, size_t size, gn_qtype qtype, gn_dtype dtype, int64_t rows,
                       int64_t cols, bool nested, float offset) {
    int n = snprintf(json, size,
                     "{\"quant_type\": \"%s\", \"blocksize\": %d, \"dtype\": \"%s\", "
                     "\"shape\": [%lld, %lld]",
                     gn_qtype_name(qtype), GN_BLOCK, gn_torch_dtype_name(dtype), (long long)rows,
                     (long long)cols);
    if (nested)
        n += snprintf(json + n, size - (size_t)n,
                      ", \"nested_blocksize\": %d, \"nested_dtype\": \"float32\", "
                      "\"nested_offset\": %.17g",
                      GN_NESTED_BLOCK, (double)offset);
    return n + snprintf(json + n, size - (size_t)n, "}");
}
