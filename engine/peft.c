/* peft.c - a table of the options that matter, a list of those that do not, and an error for the
 * rest: PEFT grows options with every release, and an adapter must not load as something it is
 * not. The parsed file is kept, so that names stay where they are. */
#include "engine/peft.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/json_file.h"
#include "engine/module_pattern.h"

/* Patterns are tried on every module of the base, so their work is bounded. */
enum { MAX_RANK = 65536, MAX_OPTIONS = 1000, MAX_PATTERNS = 4096, MAX_EXPRESSIONS = 32 };

typedef struct {
    gn_module_pattern pattern;
    double value;
} exception;

typedef struct {
    exception *items;
    size_t count;
} exceptions;

struct gn_peft {
    char *path;
    cJSON *json;
    int rank; /* 0: not yet seen */
    double alpha;
    bool has_type, has_alpha, rslora;
    exceptions ranks, alphas;
    const cJSON *targets; /* a list, or NULL */
};

static gn_status refuse(const gn_peft *peft, const cJSON *option, const char *hint, gn_error *err) {
    char *value = cJSON_PrintUnformatted(option);
    gn_fail(err, GN_EUNSUPPORTED, "%s: \"%s\": %.100s is not supported%s%s", peft->path,
            option->string, value ? value : "?", *hint ? ": " : "", hint);
    cJSON_free(value);
    return GN_EUNSUPPORTED;
}

static gn_status expect(const gn_peft *peft, const cJSON *option, const char *what, gn_error *err) {
    return gn_fail(err, GN_EFORMAT, "%s: \"%s\": expected %s", peft->path, option->string, what);
}

/* ---- options ---- */

static gn_status read_type(gn_peft *peft, const cJSON *option, gn_error *err) {
    if (!cJSON_IsString(option) || strcmp(option->valuestring, "LORA") != 0)
        return refuse(peft, option, "only LORA adapters are", err);
    peft->has_type = true;
    return GN_OK;
}

static bool is_rank(const cJSON *value) {
    return cJSON_IsNumber(value) && value->valuedouble >= 1 && value->valuedouble <= MAX_RANK &&
           value->valuedouble == floor(value->valuedouble);
}

static bool is_alpha(const cJSON *value) {
    return cJSON_IsNumber(value) && fabs(value->valuedouble) <= 1e30;
}

static gn_status read_rank(gn_peft *peft, const cJSON *option, gn_error *err) {
    if (!is_rank(option)) return expect(peft, option, "an integer from 1 to 65536", err);
    peft->rank = (int)option->valuedouble;
    return GN_OK;
}

static gn_status read_alpha(gn_peft *peft, const cJSON *option, gn_error *err) {
    if (!is_alpha(option)) return expect(peft, option, "a finite number", err);
    peft->alpha = option->valuedouble;
    peft->has_alpha = true;
    return GN_OK;
}

static gn_status read_rslora(gn_peft *peft, const cJSON *option, gn_error *err) {
    if (!cJSON_IsBool(option) && !cJSON_IsNull(option))
        return expect(peft, option, "true or false", err);
    peft->rslora = cJSON_IsTrue(option);
    return GN_OK;
}

static gn_status read_exceptions(gn_peft *peft, const cJSON *option, exceptions *list,
                                 bool (*valid)(const cJSON *value), gn_error *err) {
    if (cJSON_IsNull(option)) return GN_OK;
    const int n = cJSON_GetArraySize(option);
    if (!cJSON_IsObject(option) || n > MAX_PATTERNS)
        return expect(peft, option, "an object of at most 4096 patterns", err);
    if (n == 0) return GN_OK;
    list->items = calloc((size_t)n, sizeof *list->items);
    if (!list->items) return gn_fail(err, GN_ENOMEM, "%s: out of memory", peft->path);
    const cJSON *value;
    int expressions = 0;
    cJSON_ArrayForEach(value, option) {
        if (!valid(value))
            return gn_fail(err, GN_EFORMAT, "%s: \"%s\": the value of \"%s\" is out of range",
                           peft->path, option->string, value->string);
        exception *e = &list->items[list->count];
        const gn_status status =
            gn_module_pattern_open(&e->pattern, value->string, peft->path, err);
        if (status) return status;
        e->value = value->valuedouble;
        list->count++;
        expressions += e->pattern.program != NULL;
    }
    if (expressions > MAX_EXPRESSIONS)
        return gn_fail(err, GN_ETOOBIG, "%s: \"%s\": over %d regular expressions", peft->path,
                       option->string, MAX_EXPRESSIONS);
    return GN_OK;
}

static gn_status read_rank_pattern(gn_peft *peft, const cJSON *option, gn_error *err) {
    return read_exceptions(peft, option, &peft->ranks, is_rank, err);
}

static gn_status read_alpha_pattern(gn_peft *peft, const cJSON *option, gn_error *err) {
    return read_exceptions(peft, option, &peft->alphas, is_alpha, err);
}

/* A string is "all-linear" or an expression that chose modules when training; the weights tell
 * what it chose. */
static gn_status read_targets(gn_peft *peft, const cJSON *option, gn_error *err) {
    if (cJSON_IsNull(option) || cJSON_IsString(option)) return GN_OK;
    if (!cJSON_IsArray(option)) return expect(peft, option, "a string or a list of strings", err);
    const cJSON *name;
    cJSON_ArrayForEach(name, option) {
        if (!cJSON_IsString(name))
            return expect(peft, option, "a string or a list of strings", err);
    }
    peft->targets = option;
    return GN_OK;
}

static gn_status read_bias(gn_peft *peft, const cJSON *option, gn_error *err) {
    if (cJSON_IsString(option) && strcmp(option->valuestring, "none") == 0) return GN_OK;
    return refuse(peft, option, "only \"none\" is", err);
}

/* PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take their starting point out of the base's weights, so
 * their adapters fit the base that is left, not the one that was named. */
static gn_status read_init(gn_peft *peft, const cJSON *option, gn_error *err) {
    static const char *const harmless[] = {"gaussian", "eva", "orthogonal"};
    if (!cJSON_IsString(option)) return GN_OK;
    for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++) {
        if (strcmp(option->valuestring, harmless[i]) == 0) return GN_OK;
    }
    return refuse(peft, option,
                  "it may have changed the base's weights; convert the adapter to plain LoRA when "
                  "saving it in PEFT (path_initial_model_for_weight_conversion)",
                  err);
}

static const struct {
    const char *name;
    gn_status (*read)(gn_peft *peft, const cJSON *option, gn_error *err);
} readers[] = {
    {"peft_type", read_type},
    {"r", read_rank},
    {"lora_alpha", read_alpha},
    {"use_rslora", read_rslora},
    {"rank_pattern", read_rank_pattern},
    {"alpha_pattern", read_alpha_pattern},
    {"target_modules", read_targets},
    {"bias", read_bias},
    {"init_lora_weights", read_init},
};

/* About training, about where it came from, about which modules (the weights tell), or without
 * meaning unless another option is set. */
static const char *const harmless_options[] = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
};

static bool is_harmless(const cJSON *option) {
    for (size_t i = 0; i < sizeof harmless_options / sizeof *harmless_options; i++) {
        if (strcmp(option->string, harmless_options[i]) == 0) return true;
    }
    return cJSON_IsNull(option) || cJSON_IsFalse(option) ||
           (cJSON_IsNumber(option) && option->valuedouble == 0) ||
           (cJSON_IsString(option) && !*option->valuestring) ||
           ((cJSON_IsArray(option) || cJSON_IsObject(option)) && !option->child);
}

static gn_status read_option(gn_peft *peft, const cJSON *option, gn_error *err) {
    if (cJSON_GetObjectItemCaseSensitive(peft->json, option->string) != option)
        return gn_fail(err, GN_EFORMAT, "%s: \"%s\" appears twice", peft->path, option->string);
    for (size_t i = 0; i < sizeof readers / sizeof *readers; i++) {
        if (strcmp(option->string, readers[i].name) == 0) return readers[i].read(peft, option, err);
    }
    return is_harmless(option) ? GN_OK : refuse(peft, option, "", err);
}

static gn_status read_options(gn_peft *peft, gn_error *err) {
    if (cJSON_GetArraySize(peft->json) > MAX_OPTIONS)
        return gn_fail(err, GN_ETOOBIG, "%s: over %d options", peft->path, MAX_OPTIONS);
    const cJSON *option;
    cJSON_ArrayForEach(option, peft->json) {
        const gn_status status = read_option(peft, option, err);
        if (status) return status;
    }
    const char *missing = !peft->has_type    ? "peft_type"
                          : peft->rank == 0  ? "r"
                          : !peft->has_alpha ? "lora_alpha"
                                             : NULL;
    if (missing) return gn_fail(err, GN_EFORMAT, "%s: \"%s\" is missing", peft->path, missing);
    return GN_OK;
}

gn_status gn_peft_open(gn_peft **out, const char *dir, gn_error *err) {
    *out = NULL;
    gn_peft *peft = calloc(1, sizeof *peft);
    if (!peft || asprintf(&peft->path, "%s/adapter_config.json", dir) < 0) {
        free(peft);
        return gn_fail(err, GN_ENOMEM, "%s: out of memory", dir);
    }
    gn_status status = gn_json_read(&peft->json, peft->path, err);
    if (status == GN_OK) status = read_options(peft, err);
    if (status)
        gn_peft_close(peft);
    else
        *out = peft;
    return status;
}

static void free_exceptions(exceptions *list) {
    for (size_t i = 0; i < list->count; i++) gn_module_pattern_close(&list->items[i].pattern);
    free(list->items);
}

void gn_peft_close(gn_peft *peft) {
    if (!peft) return;
    free_exceptions(&peft->ranks);
    free_exceptions(&peft->alphas);
    cJSON_Delete(peft->json);
    free(peft->path);
    free(peft);
}

/* ---- what they mean for a module ---- */

const char *gn_peft_path(const gn_peft *peft) {
    return peft->path;
}

/* The first pattern that matches wins, in the file's order, as in PEFT. */
static double look_up(const exceptions *list, const char *module, double otherwise) {
    for (size_t i = 0; i < list->count; i++) {
        if (gn_module_pattern_match(&list->items[i].pattern, module)) return list->items[i].value;
    }
    return otherwise;
}

int gn_peft_rank(const gn_peft *peft, const char *module) {
    return (int)look_up(&peft->ranks, module, peft->rank);
}

double gn_peft_alpha(const gn_peft *peft, const char *module) {
    return look_up(&peft->alphas, module, peft->alpha);
}

bool gn_peft_is_rslora(const gn_peft *peft) {
    return peft->rslora;
}

float gn_peft_scale(const gn_peft *peft, const char *module) {
    const double rank = gn_peft_rank(peft, module);
    return (float)(gn_peft_alpha(peft, module) / (peft->rslora ? sqrt(rank) : rank));
}

bool gn_peft_targets(const gn_peft *peft, const char *module) {
    if (!peft->targets) return true;
    const size_t len = strlen(module);
    const cJSON *name;
    cJSON_ArrayForEach(name, peft->targets) {
        const size_t n = strlen(name->valuestring);
        if (n > len || strcmp(module + len - n, name->valuestring) != 0) continue;
        if (n == len || module[len - n - 1] == '.') return true;
    }
    return false;
}
