/* config.c - config.json of a LLaMA-family folder: what is understood, and what is refused. */
#include "engine/config.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "engine/json_file.h"

const char *const gn_proj_names[GN_PROJ_COUNT] = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj",
};

int64_t gn_proj_rows(const gn_config *c, gn_proj proj) {
    switch (proj) {
    case GN_Q: return (int64_t)c->heads * c->head_dim;
    case GN_K:
    case GN_V: return (int64_t)c->kv_heads * c->head_dim;
    case GN_GATE:
    case GN_UP: return c->intermediate;
    default: return c->hidden;
    }
}

int64_t gn_proj_cols(const gn_config *c, gn_proj proj) {
    if (proj == GN_O) return (int64_t)c->heads * c->head_dim;
    return proj == GN_DOWN ? c->intermediate : c->hidden;
}

void gn_config_inv_freq(const gn_config *c, float *inv_freq) {
    const int half = c->head_dim / 2;
    for (int i = 0; i < half; i++) {
        /* transformers computes the exponent and the power in float32 */
        const float exponent = (float)(2 * i) / (float)c->head_dim;
        double f = 1.0f / powf((float)c->rope_theta, exponent);
        if (c->rope_type == GN_ROPE_LINEAR) f /= c->rope_factor;
        if (c->rope_type == GN_ROPE_LLAMA3) {
            const double wavelength = 2 * M_PI / f;
            const double low = c->rope_original_positions / c->rope_low_freq_factor;
            const double high = c->rope_original_positions / c->rope_high_freq_factor;
            if (wavelength > low)
                f /= c->rope_factor;
            else if (wavelength >= high) {
                const double smooth =
                    (c->rope_original_positions / wavelength - c->rope_low_freq_factor) /
                    (c->rope_high_freq_factor - c->rope_low_freq_factor);
                f = (1 - smooth) * f / c->rope_factor + smooth * f;
            }
        }
        inv_freq[i] = (float)f;
    }
}

/* ---- typed readers; every message names file and key ---- */

typedef struct reader {
    const char *path;
    gn_error *err;
} reader;

/* NULL when missing or null. Of a repeated key the last counts, as in Python. */
static const cJSON *get(const cJSON *object, const char *key) {
    const cJSON *item, *found = NULL;
    if (!cJSON_IsObject(object)) return NULL;
    cJSON_ArrayForEach(item, object) {
        if (!strcmp(item->string, key)) found = item;
    }
    return cJSON_IsNull(found) ? NULL : found;
}

static gn_status read_int(reader *r, const cJSON *object, const char *key, int fallback, int *out) {
    const cJSON *item = get(object, key);
    if (!item && fallback > 0) {
        *out = fallback;
        return GN_OK;
    }
    if (!item) return gn_fail(r->err, GN_EFORMAT, "%s: %s is missing", r->path, key);
    const double v = cJSON_IsNumber(item) ? item->valuedouble : NAN;
    if (!(v >= 1 && v <= 1 << 20) || v != floor(v))
        return gn_fail(r->err, GN_EFORMAT, "%s: %s must be a whole number from 1 to %d", r->path,
                       key, 1 << 20);
    *out = (int)v;
    return GN_OK;
}

/* A fallback of NAN makes the key a required one. */
static gn_status read_number(reader *r, const cJSON *object, const char *key, double low,
                             double high, double fallback, double *out) {
    const cJSON *item = get(object, key);
    *out = !item ? fallback : cJSON_IsNumber(item) ? item->valuedouble : NAN;
    if (*out >= low && *out <= high) return GN_OK;
    return gn_fail(r->err, GN_EFORMAT, "%s: %s must be a number from %g to %g", r->path, key, low,
                   high);
}

static gn_status read_object(reader *r, const cJSON *object, const char *key, const cJSON **out) {
    *out = get(object, key);
    if (!*out || cJSON_IsObject(*out)) return GN_OK;
    return gn_fail(r->err, GN_EFORMAT, "%s: %s is not an object", r->path, key);
}

static gn_status read_bool(reader *r, const cJSON *object, const char *key, bool *out) {
    const cJSON *item = get(object, key);
    *out = cJSON_IsTrue(item);
    if (!item || cJSON_IsBool(item)) return GN_OK;
    return gn_fail(r->err, GN_EFORMAT, "%s: %s must be true or false", r->path, key);
}

static gn_status refuse_true(reader *r, const cJSON *root, const char *key) {
    bool value;
    const gn_status status = read_bool(r, root, key, &value);
    if (status || !value) return status;
    return gn_fail(r->err, GN_EUNSUPPORTED, "%s: %s is true, which is not supported", r->path, key);
}

static gn_status expect_string(reader *r, const cJSON *object, const char *key, const char *a,
                               const char *b) {
    const cJSON *item = get(object, key);
    const char *value = cJSON_GetStringValue(item);
    if (!item || (value && (!strcmp(value, a) || (b && !strcmp(value, b))))) return GN_OK;
    return gn_fail(r->err, GN_EUNSUPPORTED, "%s: %s is %.64s; supported: %s%s%s", r->path, key,
                   value ? value : "not a string", a, b ? ", " : "", b ? b : "");
}

/* ---- parts of the file ---- */

static gn_status read_architecture(reader *r, const cJSON *root, gn_config *c) {
    const char *name = cJSON_GetStringValue(get(root, "model_type"));
    if (!name) name = "";
    if (strcmp(name, "llama") && strcmp(name, "mistral"))
        return gn_fail(r->err, GN_EUNSUPPORTED,
                       "%s: model_type is \"%.32s\"; supported: llama, mistral", r->path, name);
    snprintf(c->model_type, sizeof c->model_type, "%s", name);
    if (!strcmp(name, "mistral") && get(root, "sliding_window"))
        return gn_fail(r->err, GN_EUNSUPPORTED, "%s: sliding_window is not supported", r->path);
    gn_status status = expect_string(r, root, "hidden_act", "silu", NULL);
    if (!status) status = refuse_true(r, root, "attention_bias");
    if (!status) status = refuse_true(r, root, "mlp_bias");
    return status;
}

static gn_status read_sizes(reader *r, const cJSON *root, gn_config *c) {
    gn_status status = read_int(r, root, "num_hidden_layers", 0, &c->layers);
    if (!status) status = read_int(r, root, "hidden_size", 0, &c->hidden);
    if (!status) status = read_int(r, root, "intermediate_size", 0, &c->intermediate);
    if (!status) status = read_int(r, root, "num_attention_heads", 0, &c->heads);
    if (!status) status = read_int(r, root, "num_key_value_heads", c->heads, &c->kv_heads);
    if (!status) status = read_int(r, root, "vocab_size", 0, &c->vocab);
    if (!status) status = read_int(r, root, "max_position_embeddings", 2048, &c->max_positions);
    if (status) return status;
    const int head_dim = c->hidden / c->heads;
    if (!get(root, "head_dim") && head_dim * c->heads != c->hidden)
        return gn_fail(r->err, GN_EFORMAT, "%s: hidden_size %d is not a multiple of %d heads",
                       r->path, c->hidden, c->heads);
    status = read_int(r, root, "head_dim", head_dim, &c->head_dim);
    if (status) return status;
    if (c->heads % c->kv_heads)
        return gn_fail(r->err, GN_EFORMAT,
                       "%s: num_attention_heads %d is not a multiple of num_key_value_heads %d",
                       r->path, c->heads, c->kv_heads);
    if (c->head_dim % 2 || c->head_dim > 1024 || (int64_t)c->heads * c->head_dim > 1 << 20)
        return gn_fail(r->err, GN_EFORMAT, "%s: head_dim %d with %d heads is not supported",
                       r->path, c->head_dim, c->heads);
    return GN_OK;
}

static gn_status read_rope(reader *r, const cJSON *root, gn_config *c) {
    const cJSON *scaling, *parameters;
    gn_status status = read_object(r, root, "rope_scaling", &scaling);
    if (!status) status = read_object(r, root, "rope_parameters", &parameters);
    if (status) return status;
    if (!scaling) scaling = parameters; /* as transformers 5 writes it, theta included */
    status = read_number(r, get(parameters, "rope_theta") ? parameters : root, "rope_theta", 1,
                         1e15, 10000, &c->rope_theta);
    if (status || !scaling) return status;
    const cJSON *type = get(scaling, "rope_type");
    if (!type) type = get(scaling, "type");
    const char *name = cJSON_IsString(type) ? type->valuestring : "";
    if (!strcmp(name, "default") || (!type && !get(scaling, "factor"))) return GN_OK;
    if (strcmp(name, "linear") && strcmp(name, "llama3"))
        return gn_fail(r->err, GN_EUNSUPPORTED,
                       "%s: rope scaling \"%.32s\" is not supported; supported: linear, llama3",
                       r->path, name);
    c->rope_type = strcmp(name, "linear") ? GN_ROPE_LLAMA3 : GN_ROPE_LINEAR;
    status = read_number(r, scaling, "factor", 1, 1e6, NAN, &c->rope_factor);
    if (status || c->rope_type == GN_ROPE_LINEAR) return status;
    status = read_number(r, scaling, "low_freq_factor", 1e-3, 1e6, NAN, &c->rope_low_freq_factor);
    if (!status)
        status =
            read_number(r, scaling, "high_freq_factor", 1e-3, 1e6, NAN, &c->rope_high_freq_factor);
    if (!status)
        status = read_number(r, scaling, "original_max_position_embeddings", 1, 1 << 30, NAN,
                             &c->rope_original_positions);
    if (!status && c->rope_high_freq_factor <= c->rope_low_freq_factor)
        status = gn_fail(r->err, GN_EFORMAT, "%s: high_freq_factor is not above low_freq_factor",
                         r->path);
    return status;
}

static gn_status read_token(reader *r, const cJSON *item, const char *key, int vocab,
                            int32_t *out) {
    const double v = cJSON_IsNumber(item) ? item->valuedouble : NAN;
    if (!(v >= 0 && v < vocab) || v != floor(v))
        return gn_fail(r->err, GN_EFORMAT, "%s: %s must be a token below %d", r->path, key, vocab);
    *out = (int32_t)v;
    return GN_OK;
}

static gn_status read_tokens(reader *r, const cJSON *root, gn_config *c) {
    const cJSON *bos = get(root, "bos_token_id"), *eos = get(root, "eos_token_id"), *item;
    gn_status status = GN_OK;
    c->bos = -1;
    if (bos) status = read_token(r, bos, "bos_token_id", c->vocab, &c->bos);
    if (status || !eos) return status;
    if (!cJSON_IsArray(eos)) {
        c->n_eos = 1;
        return read_token(r, eos, "eos_token_id", c->vocab, &c->eos[0]);
    }
    if (cJSON_GetArraySize(eos) > GN_MAX_EOS)
        return gn_fail(r->err, GN_EUNSUPPORTED, "%s: more than %d eos_token_id", r->path,
                       GN_MAX_EOS);
    cJSON_ArrayForEach(item, eos) {
        status = read_token(r, item, "eos_token_id", c->vocab, &c->eos[c->n_eos++]);
        if (status) return status;
    }
    return GN_OK;
}

static gn_status read_quantization(reader *r, const cJSON *root, gn_config *c) {
    const cJSON *q;
    gn_status status = read_object(r, root, "quantization_config", &q);
    if (status || !q) return status;
    status = expect_string(r, q, "quant_method", "bitsandbytes", NULL);
    if (!status) status = expect_string(r, q, "bnb_4bit_quant_type", "nf4", "fp4");
    if (!status) status = expect_string(r, q, "bnb_4bit_quant_storage", "uint8", NULL);
    if (!status) status = read_bool(r, q, "load_in_4bit", &c->bnb_4bit);
    if (status || c->bnb_4bit) return status;
    return gn_fail(r->err, GN_EUNSUPPORTED,
                   "%s: quantization_config without load_in_4bit is not supported", r->path);
}

static gn_status read_file(cJSON **root, const char *dir, const char *path, gn_error *err) {
    struct stat st;
    if (stat(dir, &st) == 0 && !S_ISDIR(st.st_mode))
        return gn_fail(err, GN_ENOENT, "%s: not a folder; --model wants a Hugging Face folder",
                       dir);
    const gn_status status = gn_json_read(root, path, err);
    if (status != GN_ENOENT) return status;
    return gn_fail(err, GN_ENOENT, "%s: no such file; --model wants a Hugging Face folder", path);
}

gn_status gn_config_read(gn_config *c, const char *dir, gn_error *err) {
    char path[4096];
    reader r = {path, err};
    double eps = 0;
    cJSON *root;
    *c = (gn_config){0};
    snprintf(path, sizeof path, "%s/config.json", dir);
    gn_status status = read_file(&root, dir, path, err);
    if (status) return status;
    status = read_architecture(&r, root, c);
    if (!status) status = read_sizes(&r, root, c);
    if (!status) status = read_rope(&r, root, c);
    if (!status) status = read_tokens(&r, root, c);
    if (!status) status = read_quantization(&r, root, c);
    if (!status) status = read_number(&r, root, "rms_norm_eps", 1e-20, 1, 1e-6, &eps);
    if (!status) status = read_bool(&r, root, "tie_word_embeddings", &c->tied_embeddings);
    c->rms_eps = (float)eps;
    cJSON_Delete(root);
    return status;
}
