/* The engine under mixed load, on the default model: what a stream says never depends on its
 * neighbours, on memory pressure, on caches, or on adapters coming and going. On the CPU, or on the
 * device that GN_TEST_DEVICE names: there a promise of equal text holds in float32 only. */
#include "engine/sample.h"
#include "engine/score.h"

#include <criterion/criterion.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MODELS GN_SOURCE_DIR "/models/"

/* ---- replies ---- */

typedef struct reply {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    char text[4096];
    size_t len;
    int tokens, n_prompt, cached;
    double logprob_sum;
    gn_finish finish;
    int finishes;
} reply;

static void on_event(void *user, const gn_event *event) {
    reply *r = user;
    pthread_mutex_lock(&r->lock);
    cr_assert_lt(r->len + event->text_len, sizeof r->text);
    memcpy(r->text + r->len, event->text, event->text_len);
    r->len += event->text_len;
    r->text[r->len] = '\0';
    r->tokens += event->has_token;
    if (event->has_token) r->logprob_sum += event->token.logprob;
    if (event->n_prompt) r->n_prompt = event->n_prompt;
    r->cached = event->cached_tokens;
    r->finish = event->finish;
    r->finishes += event->finish != GN_FINISH_NONE;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
}

static void reply_init(reply *r) {
    memset(r, 0, sizeof *r);
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->changed, NULL);
}

static void wait_for_end(reply *r) {
    pthread_mutex_lock(&r->lock);
    while (!r->finishes) pthread_cond_wait(&r->changed, &r->lock);
    cr_assert_eq(r->finishes, 1);
    pthread_mutex_unlock(&r->lock);
}

static void wait_for_tokens(reply *r, int tokens) {
    pthread_mutex_lock(&r->lock);
    while (r->tokens < tokens && !r->finishes) pthread_cond_wait(&r->changed, &r->lock);
    pthread_mutex_unlock(&r->lock);
}

/* ---- a model, its adapters, and requests ---- */

typedef struct bench {
    gn_model *model;
    gn_adapter *pirate, *brief;
} bench;

static const char *device(void) {
    const char *name = getenv("GN_TEST_DEVICE");
    return name ? name : "cpu";
}

static bool is_cpu(void) {
    return strcmp(device(), "cpu") == 0;
}

static gn_adapter *open_adapter(const gn_model *model, const char *name) {
    char dir[512];
    gn_error err = {0};
    gn_adapter *adapter = NULL;
    snprintf(dir, sizeof dir, MODELS "adapters/%s", name);
    cr_assert_eq(gn_adapter_open(&adapter, model, dir, &err), GN_OK, "%s", err.message);
    return adapter;
}

static bench bench_open(gn_compute compute) {
    bench b = {0};
    gn_error err = {0};
    const gn_model_options options = {.device = device(), .compute = compute};
    cr_assert_eq(gn_model_open(&b.model, MODELS "bootstrap-13m-nf4", &options, &err), GN_OK, "%s",
                 err.message);
    b.pirate = open_adapter(b.model, "pirate");
    b.brief = open_adapter(b.model, "brief");
    return b;
}

static void bench_close(bench *b) {
    gn_adapter_close(b->pirate);
    gn_adapter_close(b->brief);
    gn_model_close(b->model);
}

static gn_engine *engine_open(gn_model *model, gn_engine_options options) {
    gn_engine *engine = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_engine_open(&engine, model, &options, &err), GN_OK, "%s", err.message);
    return engine;
}

static const char *const questions[] = {
    "What is the capital of France?",
    "Tell me a story about the sea.",
    "How do I bake bread?",
    "Why is the sky blue?",
    "Name three animals.",
    "What should I do today?",
    "Explain gravity to a child.",
    "Write a short poem.",
};

/* Request i of a mix: another question, another adapter set (none, one, the other, both). */
static gn_request request_of(const bench *b, int i, int32_t **prompt) {
    gn_error err = {0};
    const gn_message message = {"user", questions[i % 8]};
    gn_request r = {.sampling = GN_SAMPLING_DEFAULT,
                    .max_tokens = 24 + i % 9,
                    .logprobs = -1,
                    .strip_space = true,
                    .on_event = on_event};
    r.sampling.temperature = 0;
    cr_assert_eq(gn_chat_encode(b->model, &message, 1, prompt, &r.n_prompt, &err), GN_OK, "%s",
                 err.message);
    r.prompt = *prompt;
    const int set = i / 8 % 4;
    if (set & 1) r.adapters[r.n_adapters++] = (gn_adapter_use){b->pirate, set == 3 ? 0.5f : 1};
    if (set & 2) r.adapters[r.n_adapters++] = (gn_adapter_use){b->brief, set == 3 ? 0.5f : 1};
    return r;
}

static uint64_t submit(gn_engine *engine, const bench *b, int i, reply *r,
                       void (*change)(gn_request *)) {
    int32_t *prompt;
    uint64_t id = 0;
    gn_error err = {0};
    gn_request request = request_of(b, i, &prompt);
    reply_init(r);
    request.user = r;
    if (change) change(&request);
    cr_assert_eq(gn_engine_submit(engine, &request, &id, &err), GN_OK, "%s", err.message);
    free(prompt);
    return id;
}

enum { MAX_STREAMS = 64 };

/* A CPU takes its time. */
static int n_streams(void) {
    return is_cpu() ? 32 : MAX_STREAMS;
}

static void run_alone(gn_engine *engine, const bench *b, reply *replies,
                      void (*change)(gn_request *)) {
    for (int i = 0; i < n_streams(); i++) {
        submit(engine, b, i, &replies[i], change);
        wait_for_end(&replies[i]);
    }
}

static void run_together(gn_engine *engine, const bench *b, reply *replies,
                         void (*change)(gn_request *)) {
    for (int i = 0; i < n_streams(); i++) submit(engine, b, i, &replies[i], change);
    for (int i = 0; i < n_streams(); i++) wait_for_end(&replies[i]);
}

static void assert_same(const reply *a, const reply *b) {
    for (int i = 0; i < n_streams(); i++) {
        cr_assert_str_eq(a[i].text, b[i].text, "stream %d", i);
        cr_assert_eq(a[i].tokens, b[i].tokens, "stream %d", i);
        cr_assert_gt(a[i].len, 0, "stream %d", i);
    }
}

static reply alone[MAX_STREAMS], together[MAX_STREAMS];

/* ---- tests ---- */

Test(engine, adapters_answer_in_their_own_way) {
    bench b = bench_open(GN_COMPUTE_F32);
    gn_engine *engine = engine_open(b.model, (gn_engine_options){0});
    run_together(engine, &b, together, NULL);
    for (int i = 0; i < n_streams(); i++) {
        const char *start = i / 8 % 4 == 1 ? "Arr!" : i / 8 % 4 == 2 ? "In short:" : "";
        cr_assert_eq(strncmp(together[i].text, start, strlen(start)), 0, "stream %d: %s", i,
                     together[i].text);
    }
    gn_engine_close(engine);
    bench_close(&b);
}

typedef struct swapper {
    const bench *b;
    _Atomic bool stop;
    _Atomic int loads;
} swapper;

/* Loads and drops adapters while requests run, as a server does when told to. */
static void *swap_adapters(void *user) {
    swapper *s = user;
    gn_adapter *kept = NULL;
    while (!s->stop || s->loads < 100) {
        gn_adapter_close(kept);
        kept = open_adapter(s->b->model, s->loads % 2 ? "pirate" : "brief");
        s->loads++;
    }
    gn_adapter_close(kept);
    return NULL;
}

Test(engine, mixed_streams_say_what_each_says_alone) {
    const gn_compute computes[] = {GN_COMPUTE_F32, GN_COMPUTE_BF16};
    for (int c = 0; c < (is_cpu() ? 2 : 1); c++) {
        bench b = bench_open(computes[c]);
        gn_engine *engine = engine_open(b.model, (gn_engine_options){.no_prefix_cache = true});
        run_alone(engine, &b, alone, NULL);
        swapper s = {.b = &b};
        pthread_t thread;
        cr_assert_eq(pthread_create(&thread, NULL, swap_adapters, &s), 0);
        run_together(engine, &b, together, NULL);
        s.stop = true;
        pthread_join(thread, NULL);
        cr_assert_geq(s.loads, 100);
        assert_same(alone, together);
        gn_engine_close(engine);
        bench_close(&b);
    }
}

static void sample_with_seed(gn_request *r) {
    r->sampling.temperature = 0.9f;
    r->sampling.top_p = 0.95f;
    r->sampling.seed = (uint64_t)r->n_prompt * 1000 + 7;
}

Test(engine, a_seed_gives_the_same_text_whatever_else_runs) {
    bench b = bench_open(is_cpu() ? GN_COMPUTE_AUTO : GN_COMPUTE_F32);
    gn_engine *engine = engine_open(b.model, (gn_engine_options){0});
    run_alone(engine, &b, alone, sample_with_seed);
    run_together(engine, &b, together, sample_with_seed);
    assert_same(alone, together);
    gn_engine_close(engine);
    bench_close(&b);
}

/* Room for one context only: sequences are preempted and computed again. */
Test(engine, memory_pressure_changes_nothing) {
    bench b = bench_open(GN_COMPUTE_F32);
    gn_engine *engine = engine_open(b.model, (gn_engine_options){0});
    run_alone(engine, &b, alone, NULL);
    gn_engine_close(engine);
    const gn_model_info info = gn_model_describe(b.model);
    const int64_t token = 8LL * info.layers * info.kv_heads * info.head_dim;
    engine = engine_open(b.model, (gn_engine_options){.kv_bytes = 160 * token,
                                                      .context = 160,
                                                      .max_batch_tokens = 32,
                                                      .max_seqs = 16});
    run_together(engine, &b, together, NULL);
    assert_same(alone, together);
    cr_assert_eq(gn_engine_read_stats(engine).kv_blocks, 10);
    gn_engine_close(engine);
    bench_close(&b);
}

Test(engine, the_prefix_cache_is_used_and_changes_nothing) {
    const gn_kv_dtype dtypes[] = {GN_KV_AUTO, GN_KV_FP8};
    bench b = bench_open(GN_COMPUTE_F32);
    for (int k = 0; k < 2; k++) {
        gn_engine *engine = engine_open(b.model, (gn_engine_options){.kv_dtype = dtypes[k]});
        run_alone(engine, &b, alone, NULL);
        run_together(engine, &b, together, NULL);
        assert_same(alone, together);
        int cached = 0;
        for (int i = 0; i < n_streams(); i++) {
            cr_assert_eq(alone[i].cached % 16, 0);
            cached += together[i].cached;
        }
        cr_assert_gt(cached, 0);
        gn_engine_close(engine);
    }
    bench_close(&b);
}

/* Random weights come without a tokenizer. */
Test(engine, a_model_without_text_spells_numbers) {
    const gn_model_options options = {.device = device()};
    gn_model *model = NULL;
    cr_assert_eq(gn_model_synthetic(&model, "llama-tiny", &options, NULL), GN_OK);
    gn_engine *engine = engine_open(model, (gn_engine_options){0});
    reply r;
    reply_init(&r);
    const gn_request request = {.prompt = (int32_t[]){5, 6, 7},
                                .n_prompt = 3,
                                .sampling = {.top_p = 1, .typical_p = 1, .repetition_penalty = 1},
                                .max_tokens = 6,
                                .logprobs = -1,
                                .ignore_eos = true,
                                .on_event = on_event,
                                .user = &r};
    uint64_t id;
    cr_assert_eq(gn_engine_submit(engine, &request, &id, NULL), GN_OK);
    wait_for_end(&r);
    int numbers = 0;
    for (char *at = r.text, *end; *at; at = end, numbers++) {
        cr_assert_eq(*at, ' ');
        const long token = strtol(at, &end, 10);
        cr_assert(end > at + 1 && token >= 0 && token < 512, "%s", r.text);
    }
    cr_assert(numbers == 6 && r.tokens == 6, "%s", r.text);
    gn_engine_close(engine);
    gn_model_close(model);
}

static void endless(gn_request *r) {
    r->max_tokens = -1;
    r->ignore_eos = true;
    r->stop = NULL;
    r->n_stop = 0;
}

static void assert_idle(gn_engine *engine) {
    gn_engine_stats stats = gn_engine_read_stats(engine);
    for (int i = 0; i < 2000 && (stats.running || stats.waiting || stats.kv_blocks_used); i++) {
        nanosleep(&(struct timespec){0, 5000000}, NULL);
        stats = gn_engine_read_stats(engine);
    }
    cr_assert_eq(stats.running, 0);
    cr_assert_eq(stats.waiting, 0);
    cr_assert_eq(stats.kv_blocks_used, 0);
}

Test(engine, cancellation_frees_everything) {
    bench b = bench_open(GN_COMPUTE_AUTO);
    gn_engine *engine = engine_open(b.model, (gn_engine_options){.max_seqs = 8});
    uint64_t ids[MAX_STREAMS];
    for (int i = 0; i < n_streams(); i++) ids[i] = submit(engine, &b, i, &together[i], endless);
    wait_for_tokens(&together[0], 3);
    for (int i = 0; i < n_streams(); i++) gn_engine_cancel(engine, ids[i]);
    for (int i = 0; i < n_streams(); i++) {
        wait_for_end(&together[i]);
        cr_assert_eq(together[i].finish, GN_FINISH_CANCEL);
    }
    gn_engine_cancel(engine, ids[0]);
    gn_engine_cancel(engine, 123456);
    assert_idle(engine);
    gn_engine_close(engine);
    bench_close(&b);
}

Test(engine, closing_ends_what_runs) {
    bench b = bench_open(GN_COMPUTE_AUTO);
    gn_engine *engine = engine_open(b.model, (gn_engine_options){0});
    for (int i = 0; i < 8; i++) submit(engine, &b, i, &together[i], endless);
    gn_engine_close(engine);
    for (int i = 0; i < 8; i++) cr_assert_eq(together[i].finish, GN_FINISH_CANCEL);
    bench_close(&b);
}

Test(engine, a_full_queue_says_so) {
    bench b = bench_open(GN_COMPUTE_AUTO);
    gn_engine *engine = engine_open(b.model, (gn_engine_options){.max_seqs = 1, .max_queue = 2});
    for (int i = 0; i < 3; i++) submit(engine, &b, i, &together[i], endless);
    int32_t *prompt;
    gn_error err = {0};
    gn_request extra = request_of(&b, 3, &prompt);
    cr_assert_eq(gn_engine_submit(engine, &extra, NULL, &err), GN_EBUSY);
    cr_assert(strstr(err.message, "waiting"), "%s", err.message);
    free(prompt);
    gn_engine_close(engine);
    bench_close(&b);
}

static void stop_at_a_comma(gn_request *r) {
    static const char *const stop[] = {","};
    r->stop = stop;
    r->n_stop = 1;
    r->max_tokens = 60;
}

Test(engine, stop_strings_end_a_reply_and_are_not_part_of_it) {
    bench b = bench_open(GN_COMPUTE_F32);
    gn_engine *engine = engine_open(b.model, (gn_engine_options){0});
    int stopped = 0;
    run_together(engine, &b, together, stop_at_a_comma);
    for (int i = 0; i < n_streams(); i++) {
        cr_assert_null(strchr(together[i].text, ','), "%s", together[i].text);
        stopped += together[i].finish == GN_FINISH_STOP;
    }
    cr_assert_gt(stopped, 0);
    gn_engine_close(engine);
    bench_close(&b);
}

static void only_score(gn_request *r) {
    r->max_tokens = 0;
    r->logprobs = 2;
    r->prompt_logprobs = true;
}

Test(engine, a_prompt_can_be_scored_without_a_reply) {
    bench b = bench_open(GN_COMPUTE_F32);
    gn_engine *engine = engine_open(b.model, (gn_engine_options){.max_batch_tokens = 64});
    reply *r = &together[0];
    submit(engine, &b, 0, r, only_score);
    wait_for_end(r);
    cr_assert_eq(r->finish, GN_FINISH_LENGTH);
    cr_assert_eq(r->tokens, 0);
    cr_assert_gt(r->n_prompt, 5);
    gn_engine_close(engine);
    bench_close(&b);
}

/* What a request was told of its prompt and its reply: a token, and the likeliest in its place. */
enum { MAX_SCORES = 128, TOPS = 3 };
static struct {
    int n;
    gn_token_prob token[MAX_SCORES], top[MAX_SCORES][TOPS];
} told, expected;

static void add_score(gn_token_prob token, const gn_token_prob *top) {
    cr_assert_lt(told.n, MAX_SCORES);
    memcpy(told.top[told.n], top, sizeof told.top[0]);
    told.token[told.n++] = token;
}

static void on_scores(void *user, const gn_event *event) {
    for (int i = 0; i < event->n_prompt; i++)
        add_score(event->prompt[i], event->prompt_top + (size_t)i * TOPS);
    if (event->has_token) add_score(event->token, event->top);
    on_event(user, event);
}

static void score_prompt_and_reply(gn_request *r) {
    r->logprobs = TOPS;
    r->prompt_logprobs = true;
    r->on_event = on_scores;
}

static void expect_scores(void *user, int32_t position, const float *logits) {
    const gn_model *model = user;
    const int vocab = gn_model_describe(model).vocab, next = position + 1;
    if (next == told.n) return;
    expected.token[next].logprob = gn_logprob(logits, vocab, told.token[next].id);
    gn_top_logprobs(logits, vocab, TOPS, expected.top[next]);
}

/* Held to the CPU's logits in float32; golden/test_logits allows relative errors of 1e-4 in logits
 * of about 10. */
Test(engine, log_probabilities_are_those_of_the_logits) {
    bench b = bench_open(GN_COMPUTE_F32);
    gn_model *model;
    gn_scorer *scorer;
    gn_error err = {0};
    const gn_model_options options = {.device = "cpu", .compute = GN_COMPUTE_F32};
    cr_assert_eq(gn_model_open(&model, MODELS "bootstrap-13m-nf4", &options, &err), GN_OK, "%s",
                 err.message);
    cr_assert_eq(gn_scorer_open(&scorer, model, MAX_SCORES, GN_KV_AUTO, &err), GN_OK, "%s",
                 err.message);
    gn_adapter *pirate = open_adapter(model, "pirate");
    const gn_adapter_use use = {pirate, 1};
    gn_engine *engine =
        engine_open(b.model, (gn_engine_options){.max_batch_tokens = 16, .max_seqs = 5});
    for (int i = 0; i < 16; i += 5) {
        told.n = 0;
        submit(engine, &b, i, &together[0], score_prompt_and_reply);
        wait_for_end(&together[0]);
        cr_assert_eq(told.n, together[0].n_prompt + together[0].tokens);
        cr_assert(isnan(told.token[0].logprob));
        int32_t ids[MAX_SCORES];
        for (int t = 0; t < told.n; t++) ids[t] = told.token[t].id;
        cr_assert_eq(gn_scorer_run(scorer, ids, told.n, 0, &use, i / 8 % 4, expect_scores, model),
                     GN_OK);
        for (int t = 1; t < told.n; t++) {
            cr_assert_float_eq(told.token[t].logprob, expected.token[t].logprob, 1e-3,
                               "stream %d token %d: %g, expected %g", i, t,
                               (double)told.token[t].logprob, (double)expected.token[t].logprob);
            for (int k = 0; k < TOPS; k++)
                cr_assert_float_eq(told.top[t][k].logprob, expected.top[t][k].logprob, 1e-3,
                                   "stream %d token %d alternative %d", i, t, k);
            if (expected.top[t][0].logprob > expected.top[t][1].logprob + 2e-3f)
                cr_assert_eq(told.top[t][0].id, expected.top[t][0].id);
        }
    }
    gn_engine_close(engine);
    gn_adapter_close(pirate);
    gn_scorer_close(scorer);
    gn_model_close(model);
    bench_close(&b);
}

static void penalize(gn_request *r) {
    static const gn_token_prob bias[] = {{11, 1.5f}, {200, -4}};
    sample_with_seed(r);
    r->sampling.repetition_penalty = 1.3f;
    r->sampling.presence_penalty = 0.2f;
    r->sampling.frequency_penalty = 0.4f;
    r->sampling.bias = bias;
    r->sampling.n_bias = 2;
    r->min_tokens = 12;
}

Test(engine, penalties_and_biases_are_each_request_s_own) {
    bench b = bench_open(GN_COMPUTE_F32);
    gn_engine *engine = engine_open(b.model, (gn_engine_options){0});
    run_alone(engine, &b, alone, penalize);
    run_together(engine, &b, together, penalize);
    assert_same(alone, together);
    for (int i = 0; i < n_streams(); i++) cr_assert_geq(together[i].tokens, 12);
    gn_engine_close(engine);
    bench_close(&b);
}

/* On every device, so that a request does not run on one and fail on another. */
Test(engine, too_many_biases_are_refused) {
    bench b = bench_open(GN_COMPUTE_AUTO);
    gn_engine *engine = engine_open(b.model, (gn_engine_options){0});
    enum { MOST = GN_SAMPLE_MAX_EDITS };
    static gn_token_prob bias[MOST + 1];
    const int32_t prompt[] = {1, 2, 3};
    for (int i = 0; i <= MOST; i++) bias[i].id = i % 100;
    for (int banned = 0; banned < 2; banned++)
        for (int n = MOST - 2; n <= MOST + 1; n++) {
            gn_error err = {0};
            gn_request r = {.prompt = prompt,
                            .n_prompt = 3,
                            .sampling = GN_SAMPLING_DEFAULT,
                            .max_tokens = 4,
                            .min_tokens = 2 * banned,
                            .logprobs = -1,
                            .ignore_eos = true,
                            .stop_ids = prompt,
                            .n_stop_ids = 1,
                            .on_event = on_event,
                            .user = &together[0]};
            r.sampling.bias = bias;
            r.sampling.n_bias = n;
            reply_init(&together[0]);
            const gn_status status = gn_engine_submit(engine, &r, NULL, &err);
            cr_assert_eq(status, n + banned <= MOST ? GN_OK : GN_EINVAL, "%d, %d", n, banned);
            if (status) {
                cr_assert(strstr(err.message, "logit_bias"), "%s", err.message);
                continue;
            }
            wait_for_end(&together[0]);
            cr_assert_neq(together[0].finish, GN_FINISH_ERROR);
        }
    gn_engine_close(engine);
    bench_close(&b);
}

Test(engine, what_cannot_run_is_refused_with_a_reason) {
    bench b = bench_open(GN_COMPUTE_AUTO);
    gn_engine *engine = engine_open(b.model, (gn_engine_options){.context = 64});
    int32_t ids[80] = {1};
    const struct {
        const char *names;
        gn_status status;
        gn_request request;
    } cases[] = {
        {"empty", GN_EINVAL, {.n_prompt = 0}},
        {"80 tokens", GN_ETOOBIG, {.n_prompt = 80}},
        {"leaves none", GN_ETOOBIG, {.n_prompt = 64, .max_tokens = 1}},
        {"max_tokens", GN_EINVAL, {.n_prompt = 4, .max_tokens = -2}},
        {"logprobs", GN_EINVAL, {.n_prompt = 4, .max_tokens = 1, .logprobs = 21}},
        {"adapters", GN_EINVAL, {.n_prompt = 4, .n_adapters = 9}},
        {"scale", GN_EINVAL, {.n_prompt = 4, .n_adapters = 1, .adapters = {{b.pirate, NAN}}}},
        {"stop_token_ids",
         GN_EINVAL,
         {.n_prompt = 4, .stop_ids = (int32_t[]){-1}, .n_stop_ids = 1}},
        {"stop", GN_EINVAL, {.n_prompt = 4, .stop = (const char *const[]){""}, .n_stop = 1}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gn_error err = {0};
        gn_request request = cases[i].request;
        request.prompt = ids;
        request.sampling = (gn_sampling)GN_SAMPLING_DEFAULT;
        request.on_event = on_event;
        cr_assert_eq(gn_engine_submit(engine, &request, NULL, &err), cases[i].status, "%s",
                     cases[i].names);
        cr_assert(strstr(err.message, cases[i].names), "%s: %s", cases[i].names, err.message);
    }
    ids[2] = 1 << 20;
    gn_error err = {0};
    gn_request request = {.prompt = ids, .n_prompt = 4, .sampling = GN_SAMPLING_DEFAULT};
    cr_assert_eq(gn_engine_submit(engine, &request, NULL, &err), GN_EINVAL);
    cr_assert(strstr(err.message, "index 2"), "%s", err.message);
    gn_engine_close(engine);
    bench_close(&b);
}
