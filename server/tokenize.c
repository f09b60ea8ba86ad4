/* tokenize.c - POST /tokenize and /detokenize, as vLLM has them. */
#include <stdlib.h>
#include <string.h>

#include "server/messages.h"
#include "server/routes.h"
#include "server/state.h"

typedef struct tokenize_job {
    uv_work_t work;
    gn_server *server;
    gn_exchange *exchange; /* NULL: the client left */
    cJSON *json;
    const char *prompt; /* or NULL and messages */
    gn_message *messages;
    int n_messages;
    gn_buffer joined;
    bool add_bos;
    int32_t *ids, n_ids;
    gn_error error;
} tokenize_job;

static void free_job(tokenize_job *job) {
    cJSON_Delete(job->json);
    gn_buffer_free(&job->joined);
    free(job->messages);
    free(job->ids);
    free(job);
}

static void encode(uv_work_t *work) {
    tokenize_job *job = work->data;
    const gn_model *model = job->server->model;
    job->error.status = job->prompt ? gn_tokenize(model, job->prompt, strlen(job->prompt),
                                                  job->add_bos, &job->ids, &job->n_ids, &job->error)
                                    : gn_chat_encode(model, job->messages, job->n_messages,
                                                     &job->ids, &job->n_ids, &job->error);
}

static void write_ids(gn_buffer *b, const int32_t *ids, int32_t n) {
    for (int32_t i = 0; i < n; i++) gn_buffer_format(b, "%s%d", i ? "," : "", ids[i]);
}

/* Answers and frees the job. */
static void respond(tokenize_job *job) {
    gn_exchange *x = job->exchange;
    gn_buffer body = {0};
    if (x && job->error.status) {
        gn_http_fail_with(&x->refusal, job->prompt ? "prompt" : "messages", &job->error);
        gn_respond_error(x, &x->refusal);
    } else if (x) {
        gn_buffer_format(&body, "{\"count\":%d,\"max_model_len\":%d,\"tokens\":[", job->n_ids,
                         gn_engine_read_stats(job->server->engine).context);
        write_ids(&body, job->ids, job->n_ids);
        gn_buffer_text(&body, "]}");
        gn_respond_json(x, 200, &body);
    }
    gn_buffer_free(&body);
    free_job(job);
}

static void encoded_on_worker(uv_work_t *work, int canceled) {
    tokenize_job *job = work->data;
    gn_server *s = job->server;
    if (canceled) job->error.status = gn_fail(&job->error, GN_ECANCELED, "shutting down");
    respond(job);
    gn_connections_flush(s);
}

static void on_abort(void *user) {
    tokenize_job *job = user;
    job->exchange = NULL;
}

static void read_request(tokenize_job *job, const gn_json *j) {
    static const char *const fields[] = {"model", "prompt", "messages", "add_special_tokens"};
    job->add_bos = true;
    gn_json_known(j, fields, 4, NULL, 0);
    gn_json_bool(j, "add_special_tokens", &job->add_bos);
    gn_json_string(j, "prompt", &job->prompt);
    if (!job->prompt && !gn_json_get(j, "messages"))
        gn_http_fail(j->error, 400, NULL, "prompt", "Give prompt, a string, or messages.");
    if (job->prompt && gn_json_get(j, "messages"))
        gn_http_fail(j->error, 400, NULL, "prompt", "Give prompt or messages, not both.");
    if (!job->prompt) gn_messages_read(j, &job->messages, &job->n_messages, &job->joined);
}

void gn_post_tokenize(gn_exchange *x) {
    const size_t size = x->body.size;
    cJSON *json = gn_json_body(x);
    tokenize_job *job = calloc(1, sizeof *job);
    if (!job) {
        cJSON_Delete(json);
        gn_http_no_memory(&x->refusal);
        gn_respond_error(x, &x->refusal);
        return;
    }
    const gn_json j = {json, &x->refusal};
    job->json = json;
    job->server = x->server;
    job->exchange = x;
    job->work.data = job;
    if (json) read_request(job, &j);
    if (x->refusal.status) {
        gn_respond_error(x, &x->refusal);
        free_job(job);
        return;
    }
    x->on_abort = on_abort;
    x->user = job;
    if (size > GN_INLINE_BYTES &&
        uv_queue_work(&x->server->loop, &job->work, encode, encoded_on_worker) == 0)
        return;
    encode(&job->work);
    respond(job);
}

/* The text of the field "tokens"; NULL with the error filled. */
static char *decode(gn_exchange *x, const gn_json *j, size_t *size) {
    static const char *const fields[] = {"model", "tokens"};
    const gn_model *model = x->server->model;
    gn_json_known(j, fields, 2, NULL, 0);
    const cJSON *tokens = gn_json_get(j, "tokens");
    int32_t *ids = NULL, n = 0;
    char *text = NULL;
    gn_error err = {0};
    if (!cJSON_IsArray(tokens))
        gn_http_fail(j->error, 400, NULL, "tokens", "tokens must be an array of token ids.");
    if (!j->error->status)
        gn_json_ids(tokens, "tokens", gn_model_describe(model).vocab - 1, &ids, &n, j->error);
    if (!j->error->status) {
        const gn_status status = gn_detokenize(model, ids, n, &text, size, &err);
        if (status) gn_http_fail_with(j->error, "tokens", &err);
    }
    free(ids);
    return text;
}

void gn_post_detokenize(gn_exchange *x) {
    cJSON *json = gn_json_body(x);
    const gn_json j = {json, &x->refusal};
    size_t size = 0;
    char *text = json ? decode(x, &j, &size) : NULL;
    cJSON_Delete(json);
    if (x->refusal.status) {
        gn_respond_error(x, &x->refusal);
        return;
    }
    gn_buffer body = {0};
    gn_buffer_text(&body, "{\"prompt\":");
    gn_buffer_json(&body, text, size);
    gn_buffer_text(&body, "}");
    free(text);
    gn_respond_json(x, 200, &body);
    gn_buffer_free(&body);
}
