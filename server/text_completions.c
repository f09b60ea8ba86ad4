/* text_completions.c - POST /v1/completions, the family without a conversation. Evaluation
 * harnesses use it: "echo" with "logprobs" and "max_tokens": 0 scores a prompt. */
#include <stdlib.h>
#include <string.h>

#include "server/generation.h"
#include "server/logprobs.h"
#include "server/routes.h"
#include "server/state.h"

/* ---- the response ---- */

static void write_with(gn_buffer *b, gn_choice *c, gn_finish finish) {
    gn_buffer_text(b, "{\"text\":");
    gn_buffer_json(b, c->text.data, c->text.size);
    gn_buffer_format(b, ",\"index\":%d,\"logprobs\":", c->index);
    gn_logprobs_write_legacy(b, c);
    gn_buffer_format(b, ",\"finish_reason\":%s}", gn_finish_json(finish));
}

static void write_choice(gn_buffer *b, gn_choice *c) {
    write_with(b, c, c->finish);
}

static void write_part(gn_buffer *b, gn_choice *c) {
    write_with(b, c, GN_FINISH_NONE);
}

static void write_last(gn_buffer *b, gn_choice *c) {
    gn_buffer_format(b, "{\"text\":\"\",\"index\":%d,\"logprobs\":null,\"finish_reason\":%s}",
                     c->index, gn_finish_json(c->finish));
}

static const gn_family text_family = {.id_prefix = "cmpl-",
                                      .object = "text_completion",
                                      .chunk_object = "text_completion",
                                      .add_token = gn_logprobs_add_legacy,
                                      .write_choice = write_choice,
                                      .write_part = write_part,
                                      .write_last = write_last};

/* ---- the request ---- */

static const char *const fields[] = {"prompt", "echo", "best_of", "suffix"};

static bool refuse_prompt(gn_http_error *e) {
    return gn_http_fail(e, 400, NULL, "prompt",
                        "prompt must be a string, an array of strings, an array of token ids, or "
                        "an array of such arrays, and not empty.");
}

static void take_text(gn_prompt *p, const cJSON *text) {
    p->text = text->valuestring;
    p->size = strlen(text->valuestring);
}

static bool read_prompt(gn_prompt *p, const cJSON *item, int vocab, gn_http_error *e) {
    if (cJSON_IsString(item)) {
        take_text(p, item);
        return true;
    }
    if (!cJSON_IsArray(item) || !cJSON_IsNumber(item->child)) return refuse_prompt(e);
    return gn_json_ids(item, "prompt", vocab - 1, &p->ids, &p->n_ids, e);
}

static bool read_prompts(gn_generation *g, const gn_json *j) {
    const int vocab = gn_model_describe(g->server->model).vocab;
    const cJSON *prompt = gn_json_get(j, "prompt"), *item;
    if (j->error->status) return false;
    if (!cJSON_IsString(prompt) && !cJSON_IsArray(prompt)) return refuse_prompt(j->error);
    const bool several = cJSON_IsArray(prompt) && !cJSON_IsNumber(prompt->child);
    const int n = several ? cJSON_GetArraySize(prompt) : 1;
    g->prompts = calloc((size_t)n + 1, sizeof *g->prompts);
    if (!g->prompts) return gn_http_no_memory(j->error);
    g->n_prompts = n;
    if (n == 0) return refuse_prompt(j->error);
    if (!several) return read_prompt(&g->prompts[0], prompt, vocab, j->error);
    int at = 0;
    cJSON_ArrayForEach(item, prompt) {
        if (!read_prompt(&g->prompts[at++], item, vocab, j->error)) return false;
    }
    return true;
}

static void read_options(gn_generation *g, const gn_json *j) {
    gn_request *r = &g->params.request;
    int64_t max_tokens = 16, logprobs = -1, best_of = g->params.n;
    const char *suffix = NULL;
    gn_json_bool(j, "echo", &g->echo);
    gn_json_int(j, "max_tokens", g->echo ? 0 : 1, INT32_MAX, &max_tokens);
    gn_json_int(j, "logprobs", 0, GN_MAX_TOP_LOGPROBS, &logprobs);
    gn_json_int(j, "best_of", 1, INT32_MAX, &best_of);
    gn_json_string(j, "suffix", &suffix);
    if (suffix && *suffix)
        gn_http_fail(j->error, 400, "unsupported_parameter", "suffix",
                     "suffix is not supported: the model cannot fill in.");
    if (best_of != g->params.n)
        gn_http_fail(j->error, 400, "unsupported_parameter", "best_of",
                     "best_of may only equal n, which is %d.", (int)g->params.n);
    r->max_tokens = (int32_t)max_tokens;
    r->logprobs = (int32_t)logprobs;
    r->prompt_logprobs = g->echo && logprobs >= 0;
}

void gn_post_completions(gn_exchange *x) {
    gn_generation *g = gn_generation_open(x, &text_family);
    if (!g) return;
    const gn_json j = {g->json, &x->refusal};
    gn_params_check_names(&j, fields, sizeof fields / sizeof *fields);
    read_prompts(g, &j);
    gn_params_read(&g->params, x->server, &j, false);
    read_options(g, &j);
    if (j.error->status)
        gn_generation_refuse(g);
    else
        gn_generation_start(g);
}
