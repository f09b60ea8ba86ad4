/* chat.c - POST /v1/chat/completions. */
#include <stdlib.h>
#include <string.h>

#include "server/generation.h"
#include "server/logprobs.h"
#include "server/messages.h"
#include "server/routes.h"

/* ---- the response ---- */

static void write_choice(gn_buffer *b, gn_choice *c) {
    gn_buffer_format(b, "{\"index\":%d,\"message\":{\"role\":\"assistant\",\"content\":", c->index);
    gn_buffer_json(b, c->text.data, c->text.size);
    gn_buffer_text(b, ",\"refusal\":null},\"logprobs\":");
    gn_logprobs_write_chat(b, c);
    gn_buffer_format(b, ",\"finish_reason\":%s}", gn_finish_json(c->finish));
}

static void write_part(gn_buffer *b, gn_choice *c) {
    gn_buffer_format(b, "{\"index\":%d,\"delta\":{\"content\":", c->index);
    gn_buffer_json(b, c->text.data, c->text.size);
    gn_buffer_text(b, "},\"logprobs\":");
    gn_logprobs_write_chat(b, c);
    gn_buffer_text(b, ",\"finish_reason\":null}");
}

static void write_first(gn_buffer *b, gn_choice *c) {
    gn_buffer_format(b,
                     "{\"index\":%d,\"delta\":{\"role\":\"assistant\",\"content\":\"\","
                     "\"refusal\":null},\"logprobs\":null,\"finish_reason\":null}",
                     c->index);
}

static void write_last(gn_buffer *b, gn_choice *c) {
    gn_buffer_format(b, "{\"index\":%d,\"delta\":{},\"logprobs\":null,\"finish_reason\":%s}",
                     c->index, gn_finish_json(c->finish));
}

static const gn_family chat_family = {.id_prefix = "chatcmpl-",
                                      .object = "chat.completion",
                                      .chunk_object = "chat.completion.chunk",
                                      .add_token = gn_logprobs_add_chat,
                                      .write_choice = write_choice,
                                      .write_part = write_part,
                                      .write_first = write_first,
                                      .write_last = write_last};

/* ---- the request ---- */

static const char *const fields[] = {
    "messages",  "max_completion_tokens", "top_logprobs",    "tools",      "tool_choice",
    "functions", "function_call",         "response_format", "modalities", "audio"};

/* Is the field absent, an empty array, or the word that means "without"? */
static bool is_without(const cJSON *field, const char *word) {
    if (!field) return true;
    if (cJSON_IsArray(field) && cJSON_GetArraySize(field) == 0) return true;
    return word && cJSON_IsString(field) && strcmp(field->valuestring, word) == 0;
}

static void refuse_unsupported(const gn_json *j) {
    static const struct {
        const char *name, *without;
    } features[] = {{"tools", NULL},
                    {"tool_choice", "none"},
                    {"functions", NULL},
                    {"function_call", "none"},
                    {"audio", NULL}};
    for (size_t i = 0; i < sizeof features / sizeof *features; i++) {
        const char *name = features[i].name;
        if (is_without(gn_json_get(j, name), features[i].without)) continue;
        gn_http_fail(j->error, 400, "unsupported_parameter", name,
                     "%s is not supported: this server answers with text only.", name);
    }
    const cJSON *format = gn_json_get(j, "response_format");
    if (format && !is_without(cJSON_GetObjectItemCaseSensitive(format, "type"), "text"))
        gn_http_fail(j->error, 400, "unsupported_parameter", "response_format",
                     "response_format may only be {\"type\": \"text\"}.");
    const cJSON *modality;
    cJSON_ArrayForEach(modality, gn_json_get(j, "modalities")) {
        if (!is_without(modality, "text"))
            gn_http_fail(j->error, 400, "unsupported_parameter", "modalities",
                         "modalities may only be [\"text\"].");
    }
}

static void read_limits(gn_params *p, const gn_json *j) {
    int64_t max_tokens = -1;
    gn_json_int(j, "max_tokens", 1, INT32_MAX, &max_tokens);
    gn_json_int(j, "max_completion_tokens", 1, INT32_MAX, &max_tokens);
    p->request.max_tokens = (int32_t)max_tokens;
    p->request.strip_space = true;
}

static void read_logprobs(gn_params *p, const gn_json *j) {
    bool wanted = false;
    int64_t top = 0;
    gn_json_bool(j, "logprobs", &wanted);
    gn_json_int(j, "top_logprobs", 0, GN_MAX_TOP_LOGPROBS, &top);
    if (top > 0 && !wanted)
        gn_http_fail(j->error, 400, NULL, "top_logprobs",
                     "top_logprobs may only be given with \"logprobs\": true.");
    p->request.logprobs = wanted ? (int32_t)top : -1;
}

void gn_post_chat_completions(gn_exchange *x) {
    gn_generation *g = gn_generation_open(x, &chat_family);
    if (!g) return;
    const gn_json j = {g->json, &x->refusal};
    gn_params_check_names(&j, fields, sizeof fields / sizeof *fields);
    refuse_unsupported(&j);
    g->prompts = calloc(1, sizeof *g->prompts);
    g->n_prompts = g->prompts != NULL;
    if (!g->prompts) gn_http_no_memory(j.error);
    gn_messages_read(&j, &g->messages, &g->n_messages, &g->joined);
    gn_params_read(&g->params, x->server, &j, true);
    read_limits(&g->params, &j);
    read_logprobs(&g->params, &j);
    if (j.error->status)
        gn_generation_refuse(g);
    else
        gn_generation_start(g);
}
