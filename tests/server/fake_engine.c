/* fake_engine.c - a model that repeats what it was told, for tests of the server alone.
 *
 * Included by a test, it takes the place of the engine's public functions. A token is a byte;
 * 256 begins a prompt and 257 ends a reply. The reply is the prompt's text, after "[name scale]"
 * for each adapter. fake_delay_us makes every step take that long. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/guanaco.h"

enum { FAKE_BOS = 256, FAKE_EOS = 257, FAKE_VOCAB = 258, FAKE_CONTEXT = 8192 };

static atomic_int fake_delay_us;
static atomic_int fake_max_queue = 64;
static atomic_int fake_canceled, fake_live;
static atomic_int fake_fail_at = -1; /* the step at which a reply fails */

struct gn_model {
    int unused;
};

gn_model_info gn_model_describe(const gn_model *model) {
    (void)model;
    return (gn_model_info){.dir = "/models/fake",
                           .device = "cpu",
                           .quant = GN_Q_NF4,
                           .vocab = FAKE_VOCAB,
                           .context = FAKE_CONTEXT,
                           .parameters = 1};
}

/* ---- text ---- */

gn_status gn_tokenize(const gn_model *model, const char *text, size_t len, bool add_bos,
                      int32_t **ids, int32_t *n, gn_error *err) {
    (void)model;
    (void)err;
    *ids = malloc((len + 1) * sizeof **ids);
    *n = 0;
    if (add_bos) (*ids)[(*n)++] = FAKE_BOS;
    for (size_t i = 0; i < len; i++) (*ids)[(*n)++] = (unsigned char)text[i];
    return GN_OK;
}

gn_status gn_detokenize(const gn_model *model, const int32_t *ids, int32_t n, char **text,
                        size_t *len, gn_error *err) {
    (void)model;
    *text = calloc((size_t)n + 1, 1);
    *len = 0;
    for (int32_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= FAKE_VOCAB) {
            free(*text);
            return gn_fail(err, GN_EINVAL, "tokens[%d] is %d", i, ids[i]);
        }
        if (ids[i] < 256) (*text)[(*len)++] = (char)ids[i];
    }
    return GN_OK;
}

const char *gn_token_bytes(const gn_model *model, int32_t id, size_t *len) {
    static char bytes[256];
    (void)model;
    *len = id < 256;
    if (id >= 256) return "";
    bytes[id] = (char)id;
    return &bytes[id];
}

gn_status gn_chat_encode(const gn_model *model, const gn_message *messages, int n_messages,
                         int32_t **ids, int32_t *n, gn_error *err) {
    const char *last = messages[n_messages - 1].content;
    return gn_tokenize(model, last, strlen(last), true, ids, n, err);
}

const char *const *gn_chat_stops(const gn_model *model, int *n) {
    static const char *const stops[] = {"### Human:"};
    (void)model;
    *n = 1;
    return stops;
}

/* ---- adapters ---- */

struct gn_adapter {
    atomic_int references;
    char name[64];
};
static atomic_int fake_adapters; /* that are open */

gn_status gn_adapter_open(gn_adapter **out, const gn_model *model, const char *dir, gn_error *err) {
    (void)model;
    const char *name = strrchr(dir, '/') ? strrchr(dir, '/') + 1 : dir;
    if (strstr(name, "broken")) return gn_fail(err, GN_EFORMAT, "%s: broken", dir);
    *out = calloc(1, sizeof **out);
    (*out)->references = 1;
    snprintf((*out)->name, sizeof(*out)->name, "%s", name);
    fake_adapters++;
    return GN_OK;
}

gn_adapter *gn_adapter_ref(gn_adapter *adapter) {
    adapter->references++;
    return adapter;
}

void gn_adapter_close(gn_adapter *adapter) {
    if (!adapter || --adapter->references > 0) return;
    fake_adapters--;
    free(adapter);
}

gn_status gn_engine_check_adapter(const gn_engine *engine, const gn_adapter *adapter,
                                  gn_error *err) {
    (void)engine;
    if (!strstr(adapter->name, "large")) return GN_OK;
    return gn_fail(err, GN_ETOOBIG, "%s: the adapter takes 2.0 MiB, and there is 1.0 MiB",
                   adapter->name);
}

/* ---- the engine ---- */

typedef struct fake_sequence {
    struct fake_sequence *next;
    uint64_t id;
    gn_request request;
    char *reply;
    int32_t n_reply, step, n_prompt, *prompt;
    atomic_bool canceled;
} fake_sequence;

struct gn_engine {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    fake_sequence *first, *current; /* those that wait for a step; the one that has it */
    bool stopping;
    uint64_t last_id;
    gn_engine_stats stats;
};

static void fake_make_reply(fake_sequence *s, const gn_request *r) {
    size_t size = (size_t)r->n_prompt + 128 * (size_t)r->n_adapters + 1, at = 0;
    s->reply = malloc(size);
    for (int32_t i = 0; i < r->n_adapters; i++)
        at += (size_t)snprintf(s->reply + at, size - at, "[%s %g]", r->adapters[i].adapter->name,
                               (double)r->adapters[i].scale);
    for (int32_t i = 0; i < r->n_prompt; i++) {
        if (r->prompt[i] < 256) s->reply[at++] = (char)r->prompt[i];
    }
    s->n_reply = (int32_t)at;
}

static void fake_end(fake_sequence *s) {
    for (int32_t i = 0; i < s->request.n_adapters; i++)
        gn_adapter_close(s->request.adapters[i].adapter);
    free(s->reply);
    free(s->prompt);
    free(s);
    fake_live--;
}

static gn_event fake_event(const fake_sequence *s) {
    return (gn_event){.id = s->id,
                      .text = "",
                      .prompt_tokens = s->n_prompt,
                      .cached_tokens = 1,
                      .completion_tokens = s->step};
}

static gn_finish fake_report_prompt(fake_sequence *s) {
    const gn_request *r = &s->request;
    gn_event e = fake_event(s);
    const int32_t n_top = r->logprobs > 0 ? r->logprobs : 0;
    gn_token_prob *prompt = calloc((size_t)s->n_prompt * (size_t)(n_top + 1), sizeof *prompt);
    for (int32_t i = 0; i < s->n_prompt; i++)
        prompt[i] = (gn_token_prob){s->prompt[i], i ? -0.5f : __builtin_nanf("")};
    for (int32_t i = 0; i < s->n_prompt * n_top; i++)
        prompt[s->n_prompt + i] = (gn_token_prob){'a' + i % n_top, -1.0f};
    e.n_prompt = r->prompt_logprobs ? s->n_prompt : 0;
    e.prompt = prompt;
    e.prompt_top = prompt + s->n_prompt;
    e.n_top = n_top;
    e.finish = r->max_tokens == 0 ? GN_FINISH_LENGTH : GN_FINISH_NONE;
    r->on_event(r->user, &e);
    free(prompt);
    return e.finish;
}

/* Characters leave whole: a byte that continues one waits for the last. */
static void fake_text(const fake_sequence *s, int32_t at, gn_event *e) {
    const unsigned char *p = (const unsigned char *)s->reply;
    if (at + 1 < s->n_reply && (p[at + 1] & 0xc0) == 0x80) return;
    int32_t start = at;
    while (start > 0 && (p[start] & 0xc0) == 0x80) start--;
    e->text = s->reply + start;
    e->text_len = (size_t)(at - start + 1);
}

static gn_finish fake_step(fake_sequence *s) {
    static const gn_error broken = {GN_EDEVICE, "the device broke"};
    const gn_request *r = &s->request;
    gn_token_prob top[GN_MAX_TOP_LOGPROBS];
    if (s->canceled) {
        gn_event e = fake_event(s);
        e.finish = GN_FINISH_CANCEL;
        fake_canceled++;
        r->on_event(r->user, &e);
        return e.finish;
    }
    if (s->step == 0 && (r->prompt_logprobs || r->max_tokens == 0) &&
        fake_report_prompt(s) != GN_FINISH_NONE)
        return GN_FINISH_LENGTH;
    const bool over = s->step >= s->n_reply && !r->ignore_eos;
    const int32_t at = s->n_reply ? s->step % s->n_reply : 0;
    s->step++;
    gn_event e = fake_event(s);
    e.has_token = true;
    e.token = (gn_token_prob){over ? FAKE_EOS : (unsigned char)s->reply[at], -0.25f};
    e.n_top = r->logprobs > 0 ? r->logprobs : 0;
    for (int32_t i = 0; i < e.n_top; i++) top[i] = (gn_token_prob){'a' + i, -1.0f - (float)i};
    e.top = top;
    if (!over) fake_text(s, at, &e);
    if (s->step == fake_fail_at) {
        e = fake_event(s);
        e.error = &broken;
        e.finish = GN_FINISH_ERROR;
    } else if (over) {
        r->on_event(r->user, &e);
        e = fake_event(s);
        e.finish = GN_FINISH_STOP;
    } else if (s->step == r->max_tokens || s->step + s->n_prompt >= FAKE_CONTEXT) {
        e.finish = GN_FINISH_LENGTH;
    }
    r->on_event(r->user, &e);
    return e.finish;
}

/* Puts the sequence that had its turn at the end, or ends it. */
static void fake_put_back(gn_engine *e, fake_sequence *s, bool ended) {
    pthread_mutex_lock(&e->lock);
    fake_sequence **end = &e->first;
    while (*end) end = &(*end)->next;
    if (!ended) *end = s;
    e->current = NULL;
    pthread_mutex_unlock(&e->lock);
    if (ended) fake_end(s);
}

static fake_sequence *fake_next(gn_engine *e) {
    pthread_mutex_lock(&e->lock);
    while (!e->first && !e->stopping) pthread_cond_wait(&e->wake, &e->lock);
    fake_sequence *s = e->current = e->first;
    if (s) e->first = s->next;
    if (s) s->next = NULL;
    if (s && e->stopping) s->canceled = true;
    pthread_mutex_unlock(&e->lock);
    return s;
}

static void *fake_run(void *argument) {
    gn_engine *e = argument;
    for (fake_sequence *s = fake_next(e); s; s = fake_next(e)) {
        if (fake_delay_us) usleep((useconds_t)fake_delay_us);
        fake_put_back(e, s, fake_step(s) != GN_FINISH_NONE);
    }
    return NULL;
}

gn_status gn_engine_open(gn_engine **out, gn_model *model, const gn_engine_options *options,
                         gn_error *err) {
    (void)model;
    (void)options;
    (void)err;
    gn_engine *e = calloc(1, sizeof *e);
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->wake, NULL);
    e->stats.context = FAKE_CONTEXT;
    e->stats.max_seqs = 64;
    pthread_create(&e->thread, NULL, fake_run, e);
    *out = e;
    return GN_OK;
}

void gn_engine_close(gn_engine *e) {
    if (!e) return;
    pthread_mutex_lock(&e->lock);
    e->stopping = true;
    pthread_cond_signal(&e->wake);
    pthread_mutex_unlock(&e->lock);
    pthread_join(e->thread, NULL);
    pthread_mutex_destroy(&e->lock);
    pthread_cond_destroy(&e->wake);
    free(e);
}

gn_status gn_engine_submit(gn_engine *e, const gn_request *request, uint64_t *id, gn_error *err) {
    if (request->n_prompt + (request->max_tokens > 0 ? request->max_tokens : 0) > FAKE_CONTEXT)
        return gn_fail(err, GN_ETOOBIG, "%d tokens do not fit the context of %d", request->n_prompt,
                       FAKE_CONTEXT);
    if (fake_live >= fake_max_queue) return gn_fail(err, GN_EBUSY, "the queue is full");
    fake_sequence *s = calloc(1, sizeof *s);
    s->request = *request;
    for (int32_t i = 0; i < request->n_adapters; i++) gn_adapter_ref(request->adapters[i].adapter);
    fake_make_reply(s, request);
    s->n_prompt = request->n_prompt;
    s->prompt = malloc((size_t)s->n_prompt * sizeof *s->prompt);
    memcpy(s->prompt, request->prompt, (size_t)s->n_prompt * sizeof *s->prompt);
    fake_live++;
    pthread_mutex_lock(&e->lock);
    *id = s->id = ++e->last_id;
    s->next = e->first;
    e->first = s;
    e->stats.requests++;
    pthread_cond_signal(&e->wake);
    pthread_mutex_unlock(&e->lock);
    return GN_OK;
}

void gn_engine_cancel(gn_engine *e, uint64_t id) {
    pthread_mutex_lock(&e->lock);
    if (e->current && e->current->id == id) e->current->canceled = true;
    for (fake_sequence *s = e->first; s; s = s->next) {
        if (s->id == id) s->canceled = true;
    }
    pthread_mutex_unlock(&e->lock);
}

gn_engine_stats gn_engine_read_stats(gn_engine *e) {
    pthread_mutex_lock(&e->lock);
    gn_engine_stats stats = e->stats;
    stats.running = fake_live;
    pthread_mutex_unlock(&e->lock);
    return stats;
}

gn_memory_plan gn_engine_memory(const gn_engine *engine) {
    (void)engine;
    return (gn_memory_plan){.kv = 4096, .scratch = 100, .kv_tokens = 32};
}
