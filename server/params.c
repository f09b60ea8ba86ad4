/* params.c - what both completion families read from a request. */
#include "server/params.h"

#include <float.h>
#include <stdlib.h>
#include <string.h>

#include "server/state.h"

enum { MAX_STOPS = 16, MAX_STOP_IDS = 256, MAX_N = 16, MAX_FIELDS = 64 };

static const double max_exact_int = 9007199254740992.0; /* 2^53, as far as JSON numbers count */

static const char *const shared_fields[] = {"model",
                                            "adapters",
                                            "stream",
                                            "stream_options",
                                            "max_tokens",
                                            "min_tokens",
                                            "temperature",
                                            "top_p",
                                            "top_k",
                                            "min_p",
                                            "typical_p",
                                            "repetition_penalty",
                                            "logit_bias",
                                            "presence_penalty",
                                            "frequency_penalty",
                                            "seed",
                                            "stop",
                                            "stop_token_ids",
                                            "ignore_eos",
                                            "n",
                                            "logprobs"};
enum { N_SHARED = sizeof shared_fields / sizeof *shared_fields };

/* OpenAI's fields that would change nothing here. */
static const char *const harmless[] = {"user",
                                       "metadata",
                                       "store",
                                       "service_tier",
                                       "parallel_tool_calls",
                                       "prompt_cache_key",
                                       "prompt_cache_retention",
                                       "safety_identifier"};

void gn_params_check_names(const gn_json *j, const char *const *own, int n_own) {
    const char *known[MAX_FIELDS];
    int n = 0;
    for (int i = 0; i < N_SHARED; i++) known[n++] = shared_fields[i];
    for (int i = 0; i < n_own && n < MAX_FIELDS; i++) known[n++] = own[i];
    gn_json_known(j, known, n, harmless, sizeof harmless / sizeof *harmless);
}

/* ---- model and adapters ---- */

static void use_adapter(gn_params *p, gn_adapter *adapter, float scale) {
    gn_request *r = &p->request;
    r->adapters[r->n_adapters++] = (gn_adapter_use){gn_adapter_ref(adapter), scale};
}

static void refuse_name(gn_http_error *e, const gn_server *s, const char *param, const char *kind,
                        const char *name) {
    gn_buffer known = {0};
    if (param[0] == 'm') gn_buffer_text(&known, s->model_name);
    for (int i = 0; i < s->registry.n && known.size < 300; i++)
        gn_buffer_format(&known, "%s%s", known.size ? ", " : "", s->registry.items[i].name);
    gn_http_fail(e, 404, "model_not_found", param,
                 "There is no %s \"%.128s\" here; there is: %.*s.", kind, name, (int)known.size,
                 known.data ? known.data : "");
    gn_buffer_free(&known);
}

static void read_model(gn_params *p, const gn_server *s, const gn_json *j) {
    const char *name = NULL;
    gn_json_string(j, "model", &name);
    p->model = s->model_name;
    if (!name || !*name || strcmp(name, s->model_name) == 0) return;
    const gn_registered *item = gn_registry_find(&s->registry, name);
    if (!item) {
        refuse_name(j->error, s, "model", "model", name);
        return;
    }
    p->model = name;
    use_adapter(p, item->adapter, 1);
}

static void read_adapter(gn_params *p, const gn_server *s, const cJSON *entry,
                         gn_http_error *error) {
    static const char *const fields[] = {"name", "scale"};
    const gn_json j = {entry, error};
    const char *name = NULL;
    float scale = 1;
    if (!cJSON_IsObject(entry)) {
        gn_http_fail(error, 400, NULL, "adapters",
                     "adapters must hold objects like {\"name\": \"x\", \"scale\": 1}.");
        return;
    }
    gn_json_known(&j, fields, 2, NULL, 0);
    gn_json_string(&j, "name", &name);
    gn_json_float(&j, "scale", -FLT_MAX, FLT_MAX, &scale);
    if (error->status) return;
    const gn_registered *item = name ? gn_registry_find(&s->registry, name) : NULL;
    if (!name)
        gn_http_fail(error, 400, NULL, "adapters", "An entry of adapters has no name.");
    else if (!item)
        refuse_name(error, s, "adapters", "adapter", name);
    else
        use_adapter(p, item->adapter, scale);
}

static void read_adapters(gn_params *p, const gn_server *s, const gn_json *j) {
    const cJSON *list = gn_json_get(j, "adapters"), *entry;
    if (!list || j->error->status) return;
    if (!cJSON_IsArray(list)) {
        gn_http_fail(j->error, 400, NULL, "adapters", "adapters must be an array of objects.");
        return;
    }
    const int n = cJSON_GetArraySize(list);
    if (n > 0 && p->request.n_adapters > 0)
        gn_http_fail(j->error, 400, NULL, "adapters",
                     "model names an adapter already; with adapters, it must be the base \"%s\".",
                     s->model_name);
    if (n > GN_MAX_ADAPTERS)
        gn_http_fail(j->error, 400, NULL, "adapters", "A request may blend up to %d adapters.",
                     GN_MAX_ADAPTERS);
    if (j->error->status) return;
    cJSON_ArrayForEach(entry, list) {
        read_adapter(p, s, entry, j->error);
        if (j->error->status) return;
    }
}

/* ---- sampling ---- */

static void read_seed(gn_params *p, const gn_json *j) {
    int64_t seed = 0;
    if (gn_json_get(j, "seed"))
        gn_json_int(j, "seed", (int64_t)-max_exact_int, (int64_t)max_exact_int, &seed);
    else if (uv_random(NULL, NULL, &seed, sizeof seed, 0, NULL))
        seed = (int64_t)uv_hrtime();
    p->request.sampling.seed = (uint64_t)seed;
}

/* A token id written as an object's key; -1 when it is none. */
static int32_t id_of_key(const char *key, int vocab) {
    char *end = NULL;
    if (*key < '0' || *key > '9') return -1;
    const long id = strtol(key, &end, 10);
    return *end == 0 && id < vocab ? (int32_t)id : -1;
}

static void read_bias(gn_params *p, const gn_json *j, int vocab) {
    const cJSON *object = gn_json_get(j, "logit_bias"), *item;
    if (!object || j->error->status) return;
    const int size = cJSON_GetArraySize(object);
    if (!cJSON_IsObject(object))
        gn_http_fail(j->error, 400, NULL, "logit_bias",
                     "logit_bias must be an object from token ids to numbers.");
    else if (size > vocab) /* repeated keys, to make the server hold them */
        gn_http_fail(j->error, 400, NULL, "logit_bias", "logit_bias has %d entries for %d tokens.",
                     size, vocab);
    else if (!(p->bias = malloc((size_t)size * sizeof *p->bias + 1)))
        gn_http_no_memory(j->error);
    if (j->error->status) return;
    int32_t n = 0;
    cJSON_ArrayForEach(item, object) {
        const int32_t id = id_of_key(item->string, vocab);
        if (id < 0 || !cJSON_IsNumber(item) || !(item->valuedouble >= -100) ||
            item->valuedouble > 100) {
            gn_http_fail(j->error, 400, NULL, "logit_bias",
                         "logit_bias[\"%.32s\"]: keys are token ids from 0 to %d, values numbers "
                         "from -100 to 100.",
                         item->string, vocab - 1);
            return;
        }
        p->bias[n++] = (gn_token_prob){id, (float)item->valuedouble};
    }
    p->request.sampling.bias = p->bias;
    p->request.sampling.n_bias = n;
}

static void read_sampling(gn_params *p, const gn_json *j, int vocab) {
    gn_sampling *s = &p->request.sampling;
    int64_t top_k = 0;
    *s = (gn_sampling)GN_SAMPLING_DEFAULT;
    gn_json_float(j, "temperature", 0, 2, &s->temperature);
    gn_json_float(j, "top_p", 0, 1, &s->top_p);
    gn_json_float(j, "min_p", 0, 1, &s->min_p);
    gn_json_float(j, "typical_p", 0, 1, &s->typical_p);
    gn_json_float(j, "repetition_penalty", 0.01, 100, &s->repetition_penalty);
    gn_json_float(j, "presence_penalty", -2, 2, &s->presence_penalty);
    gn_json_float(j, "frequency_penalty", -2, 2, &s->frequency_penalty);
    gn_json_int(j, "top_k", -1, INT32_MAX, &top_k);
    s->top_k = top_k < 0 ? 0 : (int32_t)top_k; /* vLLM's -1 is off */
    read_seed(p, j);
    read_bias(p, j, vocab);
}

/* ---- when to stop ---- */

static void add_stop(gn_params *p, const cJSON *item, gn_http_error *e) {
    if (cJSON_IsString(item) && item->valuestring[0])
        p->stops[p->request.n_stop++] = item->valuestring;
    else
        gn_http_fail(e, 400, NULL, "stop",
                     "stop must be a string or an array of strings, none empty.");
}

static void read_stops(gn_params *p, const gn_server *s, const gn_json *j, bool chat) {
    const cJSON *stop = gn_json_get(j, "stop"), *item;
    int n_template = 0;
    const char *const *template_stops = chat ? gn_chat_stops(s->model, &n_template) : NULL;
    const int n = cJSON_IsArray(stop) ? cJSON_GetArraySize(stop) : 1;
    if (j->error->status) return;
    if (n > MAX_STOPS) {
        gn_http_fail(j->error, 400, NULL, "stop", "stop may hold up to %d strings.", MAX_STOPS);
        return;
    }
    p->stops = malloc((size_t)(n + n_template + 1) * sizeof *p->stops);
    if (!p->stops) {
        gn_http_no_memory(j->error);
        return;
    }
    for (int i = 0; i < n_template; i++) p->stops[p->request.n_stop++] = template_stops[i];
    if (cJSON_IsArray(stop)) {
        cJSON_ArrayForEach(item, stop) add_stop(p, item, j->error);
    } else if (stop) {
        add_stop(p, stop, j->error);
    }
    p->request.stop = p->stops;
}

static void read_stop_ids(gn_params *p, const gn_json *j, int vocab) {
    const cJSON *ids = gn_json_get(j, "stop_token_ids");
    if (!ids || j->error->status) return;
    if (!cJSON_IsArray(ids) || cJSON_GetArraySize(ids) > MAX_STOP_IDS) {
        gn_http_fail(j->error, 400, NULL, "stop_token_ids",
                     "stop_token_ids must be an array of up to %d token ids.", MAX_STOP_IDS);
        return;
    }
    gn_json_ids(ids, "stop_token_ids", vocab - 1, &p->stop_ids, &p->request.n_stop_ids, j->error);
    p->request.stop_ids = p->stop_ids;
}

/* ---- the whole ---- */

static void read_stream(gn_params *p, const gn_json *j) {
    static const char *const fields[] = {"include_usage"}, *const ignored[] = {
                                                               "include_obfuscation"};
    const cJSON *options = gn_json_get(j, "stream_options");
    const gn_json inner = {options, j->error};
    gn_json_bool(j, "stream", &p->stream);
    if (!options || j->error->status) return;
    if (!p->stream)
        gn_http_fail(j->error, 400, NULL, "stream_options",
                     "stream_options may only be given with \"stream\": true.");
    else if (!cJSON_IsObject(options))
        gn_http_fail(j->error, 400, NULL, "stream_options", "stream_options must be an object.");
    if (j->error->status) return;
    gn_json_known(&inner, fields, 1, ignored, 1);
    gn_json_bool(&inner, "include_usage", &p->include_usage);
}

void gn_params_read(gn_params *p, const gn_server *s, const gn_json *j, bool chat) {
    const int vocab = gn_model_describe(s->model).vocab;
    int64_t min_tokens = 0;
    p->n = 1;
    read_model(p, s, j);
    read_adapters(p, s, j);
    read_stream(p, j);
    read_sampling(p, j, vocab);
    gn_json_int(j, "min_tokens", 0, INT32_MAX, &min_tokens);
    p->request.min_tokens = (int32_t)min_tokens;
    gn_json_bool(j, "ignore_eos", &p->request.ignore_eos);
    gn_json_int(j, "n", 1, MAX_N, &p->n);
    read_stops(p, s, j, chat);
    read_stop_ids(p, j, vocab);
}

void gn_params_close(gn_params *p) {
    for (int i = 0; i < p->request.n_adapters; i++)
        gn_adapter_close(p->request.adapters[i].adapter);
    p->request.n_adapters = 0;
    free(p->bias);
    free(p->stops);
    free(p->stop_ids);
    p->bias = NULL;
    p->stops = NULL;
    p->stop_ids = NULL;
}
