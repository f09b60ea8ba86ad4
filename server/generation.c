/* generation.c - one request for text: its choices in the engine, and the response they make. */
#include "server/generation.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "server/sse.h"
#include "server/state.h"

enum {
    MAX_CHOICES = 1024,
    MAX_TOKEN_BYTES = 256 /* no tokenizer has longer tokens: an upper bound for texts */
};

/* ---- life ---- */

static void free_generation(gn_generation *g) {
    for (int i = 0; i < g->n_choices; i++) {
        gn_choice *c = &g->choices[i];
        if (c->ticket) {
            gn_ticket_mute(c->ticket);
            gn_engine_cancel(g->server->engine, c->id);
        }
        gn_buffer *buffers[] = {&c->text, &c->tokens, &c->probs, &c->tops, &c->offsets};
        for (size_t b = 0; b < sizeof buffers / sizeof *buffers; b++) gn_buffer_free(buffers[b]);
    }
    for (int i = 0; i < g->n_prompts; i++) free(g->prompts[i].ids);
    gn_params_close(&g->params);
    cJSON_Delete(g->json);
    gn_buffer_free(&g->joined);
    gn_buffer_free(&g->chunk);
    gn_buffer_free(&g->head);
    free(g->prompts);
    free(g->messages);
    free(g->choices);
    free(g);
}

/* The client left. A worker may still be reading the texts; it frees the rest when it is done. */
static void on_abort(void *user) {
    gn_generation *g = user;
    g->exchange = NULL;
    if (!g->work.data) free_generation(g);
}

static void name_response(gn_generation *g) {
    unsigned char random[12] = {0};
    if (uv_random(NULL, NULL, random, sizeof random, 0, NULL)) {
        const uint64_t clock = uv_hrtime();
        memcpy(random, &clock, sizeof clock);
    }
    int n = snprintf(g->id, sizeof g->id, "%s", g->family->id_prefix);
    for (size_t i = 0; i < sizeof random; i++)
        n += snprintf(g->id + n, sizeof g->id - (size_t)n, "%02x", random[i]);
    g->created = (int64_t)time(NULL);
}

gn_generation *gn_generation_open(gn_exchange *x, const gn_family *family) {
    cJSON *json = gn_json_body(x);
    if (!json) {
        gn_respond_error(x, &x->refusal);
        return NULL;
    }
    gn_generation *g = calloc(1, sizeof *g);
    if (!g) {
        cJSON_Delete(json);
        gn_http_no_memory(&x->refusal);
        gn_respond_error(x, &x->refusal);
        return NULL;
    }
    g->exchange = x;
    g->server = x->server;
    g->family = family;
    g->json = json;
    name_response(g);
    x->on_abort = on_abort;
    x->user = g;
    return g;
}

void gn_generation_refuse(gn_generation *g) {
    gn_exchange *x = g->exchange;
    free_generation(g);
    gn_respond_error(x, &x->refusal);
}

/* ---- JSON ---- */

const char *gn_finish_json(gn_finish finish) {
    switch (finish) {
    case GN_FINISH_STOP: return "\"stop\"";
    case GN_FINISH_LENGTH: return "\"length\"";
    default: return "null";
    }
}

static void write_head(gn_generation *g, gn_buffer *b, const char *object) {
    gn_buffer_format(b, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%lld,\"model\":", g->id,
                     object, (long long)g->created);
    gn_buffer_json_text(b, g->model);
    gn_buffer_format(b, ",\"system_fingerprint\":\"%s\",\"choices\":[", g->server->fingerprint);
}

/* A prompt counts once, however many choices answer it. */
static void write_usage(const gn_generation *g, gn_buffer *b) {
    int64_t prompt = 0, cached = 0, completion = 0;
    for (int i = 0; i < g->n_choices; i++) {
        const gn_choice *c = &g->choices[i];
        completion += c->completion_tokens;
        if (i % g->params.n != 0) continue;
        prompt += c->prompt_tokens;
        cached += c->cached_tokens;
    }
    gn_buffer_format(b,
                     "\"usage\":{\"prompt_tokens\":%lld,\"completion_tokens\":%lld,"
                     "\"total_tokens\":%lld,\"prompt_tokens_details\":{\"cached_tokens\":%lld}}",
                     (long long)prompt, (long long)completion, (long long)(prompt + completion),
                     (long long)cached);
    g->exchange->prompt_tokens = prompt;
    g->exchange->completion_tokens = completion;
}

/* ---- streaming ---- */

static void send_part(gn_generation *g, gn_choice *c, void (*write)(gn_buffer *, gn_choice *)) {
    gn_buffer *b = &g->chunk;
    gn_sse_open(b);
    gn_buffer_append(b, g->head.data, g->head.size);
    write(b, c);
    gn_buffer_text(b, g->params.include_usage ? "],\"usage\":null}" : "]}");
    gn_sse_send(g->exchange, b);
}

static void begin_stream(gn_generation *g) {
    write_head(g, &g->head, g->family->chunk_object);
    gn_sse_begin(g->exchange);
    for (int i = 0; i < g->n_choices && g->family->write_first; i++)
        send_part(g, &g->choices[i], g->family->write_first);
}

static void end_stream(gn_generation *g) {
    gn_buffer *b = &g->chunk;
    gn_buffer usage = {0};
    write_usage(g, &usage);
    if (g->params.include_usage) {
        gn_sse_open(b);
        gn_buffer_append(b, g->head.data, g->head.size);
        gn_buffer_text(b, "],");
        gn_buffer_append(b, usage.data, usage.size);
        gn_buffer_text(b, "}");
        gn_sse_send(g->exchange, b);
    }
    gn_buffer_free(&usage);
    gn_sse_done(g->exchange);
}

static void clear_unsent(gn_choice *c) {
    c->text.size = c->tokens.size = c->probs.size = c->tops.size = c->offsets.size = 0;
}

static void stream_choice(gn_generation *g, gn_choice *c) {
    if (c->text.size || c->tokens.size) send_part(g, c, g->family->write_part);
    clear_unsent(c);
    if (c->finish != GN_FINISH_NONE) send_part(g, c, g->family->write_last);
}

/* ---- events ---- */

static void respond_whole(gn_generation *g) {
    gn_buffer body = {0};
    write_head(g, &body, g->family->object);
    for (int i = 0; i < g->n_choices; i++) {
        if (i) gn_buffer_text(&body, ",");
        g->family->write_choice(&body, &g->choices[i]);
    }
    gn_buffer_text(&body, "],");
    write_usage(g, &body);
    gn_buffer_text(&body, "}");
    gn_respond_json(g->exchange, 200, &body);
    gn_buffer_free(&body);
}

/* Frees the generation. */
static void fail(gn_generation *g, const gn_error *cause) {
    static const gn_error stopping = {GN_ECANCELED, "The server is shutting down."};
    gn_exchange *x = g->exchange;
    gn_http_error error = {0};
    const gn_error *e = cause ? cause : &stopping;
    if (e->status == GN_ECANCELED || e->status == GN_ENOMEM)
        gn_http_fail_with(&error, "", e);
    else if (e->status == GN_ETOOBIG)
        gn_http_fail(&error, 400, "adapters_too_large", "adapters", "%s", e->message);
    else
        gn_http_fail(&error, 500, "engine_error", "", "%s", e->message);
    const bool streaming = x->status != 0;
    free_generation(g);
    if (streaming)
        gn_sse_fail(x, &error);
    else
        gn_respond_error(x, &error);
}

static bool any_failed(const gn_choice *c) {
    return c->text.failed || c->tokens.failed || c->probs.failed || c->tops.failed ||
           c->offsets.failed || c->generation->chunk.failed;
}

static void take_event(gn_generation *g, gn_choice *c, const gn_event *e) {
    const int32_t n_top = e->n_top;
    if (g->params.request.logprobs >= 0) {
        for (int32_t i = 0; i < e->n_prompt && g->echo; i++)
            g->family->add_token(c, e->prompt[i],
                                 e->prompt_top ? e->prompt_top + (size_t)i * (size_t)n_top : NULL,
                                 e->prompt_top && i > 0 ? n_top : 0);
        size_t size = 0;
        if (e->has_token) gn_token_bytes(g->server->model, e->token.id, &size);
        if (size) g->family->add_token(c, e->token, e->top, e->top ? n_top : 0);
    }
    gn_buffer_append(&c->text, e->text, e->text_len);
    c->prompt_tokens = e->prompt_tokens;
    c->cached_tokens = e->cached_tokens;
    c->completion_tokens = e->completion_tokens;
    c->finish = e->finish;
}

static void on_event(void *user, const gn_event *e) {
    static const gn_error no_memory = {GN_ENOMEM, "The server is out of memory for the reply."};
    gn_choice *c = user;
    gn_generation *g = c->generation;
    if (e->finish != GN_FINISH_NONE) c->ticket = NULL;
    take_event(g, c, e);
    if (e->finish == GN_FINISH_ERROR || e->finish == GN_FINISH_CANCEL || any_failed(c)) {
        fail(g, any_failed(c) ? &no_memory : e->error);
        return;
    }
    if (g->params.stream) stream_choice(g, c);
    if (e->finish == GN_FINISH_NONE || --g->remaining > 0) return;
    if (g->params.stream)
        end_stream(g);
    else
        respond_whole(g);
    free_generation(g);
}

/* ---- encoding and submitting ---- */

static gn_status encode(gn_generation *g, gn_error *err) {
    const gn_model *model = g->server->model;
    if (g->messages)
        return gn_chat_encode(model, g->messages, g->n_messages, &g->prompts[0].ids,
                              &g->prompts[0].n_ids, err);
    for (int i = 0; i < g->n_prompts; i++) {
        gn_prompt *p = &g->prompts[i];
        if (!p->text) continue;
        const gn_status status =
            gn_tokenize(model, p->text, p->size, true, &p->ids, &p->n_ids, err);
        if (status) return status;
    }
    return GN_OK;
}

static bool refuse_if_empty(gn_generation *g) {
    for (int i = 0; i < g->n_prompts; i++) {
        if (g->prompts[i].n_ids > 0) continue;
        return gn_http_fail(&g->exchange->refusal, 400, NULL, "prompt", "The prompt is empty.");
    }
    return true;
}

static bool submit_choice(gn_generation *g, gn_choice *c) {
    gn_request *r = &g->params.request;
    const gn_prompt *p = &g->prompts[c->prompt];
    gn_error err = {0};
    const uint64_t seed = r->sampling.seed;
    r->prompt = p->ids;
    r->n_prompt = p->n_ids;
    r->on_event = gn_ticket_on_event;
    r->user = c->ticket = gn_ticket_open(&g->server->mailbox, on_event, c);
    if (!c->ticket) {
        gn_fail(&err, GN_ENOMEM, "The server is out of memory.");
    } else {
        r->sampling.seed = seed + (uint64_t)(c->index % g->params.n);
        const gn_status status = gn_engine_submit(g->server->engine, r, &c->id, &err);
        r->sampling.seed = seed;
        if (status == GN_OK) return true;
        err.status = status;
        gn_ticket_close(c->ticket);
        c->ticket = NULL;
    }
    return gn_http_fail_with(&g->exchange->refusal, "", &err);
}

static void echo_prompt(gn_generation *g, gn_choice *c) {
    const gn_prompt *p = &g->prompts[c->prompt];
    char *text = NULL;
    size_t size = 0;
    if (p->text) {
        gn_buffer_append(&c->text, p->text, p->size);
    } else if (gn_detokenize(g->server->model, p->ids, p->n_ids, &text, &size, NULL) == GN_OK) {
        gn_buffer_append(&c->text, text, size);
        free(text);
    }
}

static bool submit_all(gn_generation *g) {
    const int n = g->n_prompts * (int)g->params.n;
    g->choices = calloc((size_t)n, sizeof *g->choices);
    if (!g->choices) return gn_http_no_memory(&g->exchange->refusal);
    g->n_choices = g->remaining = n;
    for (int i = 0; i < n; i++) {
        gn_choice *c = &g->choices[i];
        c->generation = g;
        c->index = i;
        c->prompt = i / (int)g->params.n;
        if (g->echo) echo_prompt(g, c);
        if (!submit_choice(g, c)) return false;
    }
    return true;
}

static void name_in_log(gn_generation *g) {
    gn_exchange *x = g->exchange;
    snprintf(x->model_name, sizeof x->model_name, "%s%s", g->params.model,
             g->params.request.n_adapters > 0 && g->params.model == g->server->model_name
                 ? " + adapters"
                 : "");
}

static void submit(gn_generation *g, gn_status encoded) {
    gn_exchange *x = g->exchange;
    if (encoded) {
        g->encode_error.status = encoded;
        gn_http_fail_with(&x->refusal, g->messages ? "messages" : "prompt", &g->encode_error);
    }
    snprintf(g->model, sizeof g->model, "%s", g->params.model);
    name_in_log(g);
    if (encoded || !refuse_if_empty(g) || !submit_all(g)) {
        gn_generation_refuse(g);
        return;
    }
    gn_params_close(&g->params); /* the engine has its own copies */
    cJSON_Delete(g->json);
    g->json = NULL;
    if (g->params.stream) begin_stream(g);
}

static void encode_on_worker(uv_work_t *work) {
    gn_generation *g = work->data;
    g->encode_error.status = encode(g, &g->encode_error);
}

static void encoded_on_worker(uv_work_t *work, int canceled) {
    gn_generation *g = work->data;
    gn_server *s = g->server;
    work->data = NULL;
    if (!g->exchange) {
        free_generation(g);
        return;
    }
    submit(g, canceled ? GN_ECANCELED : g->encode_error.status);
    gn_connections_flush(s);
}

static size_t longest_text(const gn_generation *g, size_t *all) {
    size_t longest = 0;
    *all = 0;
    for (int i = 0; i < g->n_prompts; i++) {
        *all += g->prompts[i].size;
        if (g->prompts[i].size > longest) longest = g->prompts[i].size;
    }
    if (!g->messages) return longest;
    for (int i = 0; i < g->n_messages; i++) *all += strlen(g->messages[i].content);
    return *all;
}

void gn_generation_start(gn_generation *g) {
    gn_exchange *x = g->exchange;
    const int32_t context = gn_engine_read_stats(g->server->engine).context;
    size_t all;
    if (longest_text(g, &all) / MAX_TOKEN_BYTES > (size_t)context)
        gn_http_fail(&x->refusal, 400, "context_length_exceeded",
                     g->messages ? "messages" : "prompt",
                     "The prompt is longer than the context of %d tokens.", context);
    if (g->n_prompts * g->params.n > MAX_CHOICES)
        gn_http_fail(&x->refusal, 400, NULL, "prompt",
                     "%d prompts of %d choices each are more than %d.", g->n_prompts,
                     (int)g->params.n, MAX_CHOICES);
    if (x->refusal.status) {
        gn_generation_refuse(g);
        return;
    }
    g->work.data = g;
    if (all > GN_INLINE_BYTES &&
        uv_queue_work(&g->server->loop, &g->work, encode_on_worker, encoded_on_worker) == 0)
        return;
    g->work.data = NULL;
    submit(g, encode(g, &g->encode_error));
}
