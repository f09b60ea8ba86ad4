/* bench_engine.c - decoding and prefill as a server does them, through the engine. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "engine/forward.h"
#include "trainer/bench.h"

enum { ROUNDS = 5, CPU_WARM_UP = 8 };

/* Requests that are sent together and awaited together. */
typedef struct load {
    pthread_mutex_t lock;
    pthread_cond_t ended;
    int running;
    gn_error error; /* of the last request that failed */
    double begin;   /* before the first was submitted */
    gn_token_times *times;
    struct stream {
        struct load *load;
        gn_token_times *times; /* its own; written on the engine's thread */
    } * streams;
} load;

static void on_event(void *user, const gn_event *event) {
    struct stream *s = user;
    load *l = s->load;
    if (event->has_token) s->times->at[s->times->n++] = gn_seconds();
    if (event->finish == GN_FINISH_NONE) return;
    pthread_mutex_lock(&l->lock);
    if (event->finish == GN_FINISH_ERROR && event->error) l->error = *event->error;
    l->running--;
    pthread_cond_signal(&l->ended);
    pthread_mutex_unlock(&l->lock);
}

static gn_status submit(gn_engine *engine, const gn_bench *b, struct stream *s,
                        const int32_t *prompt, int tokens) {
    const gn_request request = {.prompt = prompt,
                                .n_prompt = b->prompt,
                                .adapters = {{b->adapter, 1}},
                                .n_adapters = b->adapter ? 1 : 0,
                                .sampling = {.top_p = 1, .typical_p = 1, .repetition_penalty = 1},
                                .max_tokens = tokens,
                                .logprobs = -1,
                                .ignore_eos = true,
                                .on_event = on_event,
                                .user = s};
    uint64_t id;
    pthread_mutex_lock(&s->load->lock);
    s->load->running++;
    pthread_mutex_unlock(&s->load->lock);
    const gn_status status = gn_engine_submit(engine, &request, &id, b->err);
    if (!status) return GN_OK;
    pthread_mutex_lock(&s->load->lock);
    s->load->running--;
    pthread_mutex_unlock(&s->load->lock);
    return status;
}

/* Runs every stream to its end. seed makes the prompts of this load its own. */
static gn_status run_load(gn_engine *engine, const gn_bench *b, load *l, int tokens,
                          uint32_t seed) {
    const int vocab = gn_model_describe(b->model).vocab;
    int32_t *prompts = malloc((size_t)b->streams * (size_t)b->prompt * sizeof *prompts);
    if (!prompts) return gn_fail(b->err, GN_ENOMEM, "out of memory");
    for (int i = 0; i < b->streams; i++)
        gn_bench_prompt(prompts + (size_t)i * (size_t)b->prompt, b->prompt, vocab,
                        seed + (uint32_t)i);
    gn_status status = GN_OK;
    l->begin = gn_seconds();
    for (int i = 0; !status && i < b->streams; i++) {
        l->times[i].n = 0;
        status = submit(engine, b, &l->streams[i], prompts + (size_t)i * (size_t)b->prompt, tokens);
    }
    pthread_mutex_lock(&l->lock);
    while (l->running > 0) pthread_cond_wait(&l->ended, &l->lock);
    pthread_mutex_unlock(&l->lock);
    free(prompts);
    if (!status && l->error.status)
        status = gn_fail(b->err, l->error.status, "%s", l->error.message);
    return status;
}

static bool open_load(load *l, int n, int tokens) {
    *l = (load){.lock = PTHREAD_MUTEX_INITIALIZER, .ended = PTHREAD_COND_INITIALIZER};
    l->times = gn_token_times_open(n, tokens);
    l->streams = calloc((size_t)n, sizeof *l->streams);
    if (!l->times || !l->streams) return false;
    for (int i = 0; i < n; i++) l->streams[i] = (struct stream){l, &l->times[i]};
    return true;
}

static void close_load(load *l) {
    gn_token_times_close(l->times);
    free(l->streams);
}

/* ---- measuring ---- */

/* Medians of the rounds, tokens a second. */
typedef struct speeds {
    double overall, decoding; /* of new tokens; decoding is 0 when not all streams ever decode */
    double prefill;           /* of prompt tokens, until every stream has its first new one */
} speeds;

static gn_status measure_rounds(gn_bench *b, gn_engine *engine, load *l, speeds *s) {
    double overall[ROUNDS], decoding[ROUNDS], prefill[ROUNDS], reads[ROUNDS];
    const bool is_host = gn_ctx_is_host(b->model->ctx);
    for (int round = -1; round < ROUNDS; round++) { /* -1 warms up: a GPU records its steps */
        const bool is_short = round < 0 && is_host && b->tokens > CPU_WARM_UP;
        gn_progress("%s: round %d of %d", b->kind, round + 1, ROUNDS);
        gn_status status = gn_round_begin(b);
        if (!status)
            status = run_load(engine, b, l, is_short ? CPU_WARM_UP : b->tokens,
                              7919u * (uint32_t)(round + 2));
        gn_round_end(b);
        if (status) return status;
        if (round < 0) continue;
        overall[round] = gn_rate_overall(l->times, b->streams, l->begin);
        decoding[round] = gn_rate_decoding(l->times, b->streams);
        prefill[round] =
            (double)b->streams * b->prompt / (gn_last_first_token(l->times, b->streams) - l->begin);
        reads[round] = b->rates.read_bytes;
    }
    *s = (speeds){gn_median(overall, ROUNDS), gn_median(decoding, ROUNDS),
                  gn_median(prefill, ROUNDS)};
    b->rates.read_bytes = gn_median(reads, ROUNDS);
    return GN_OK;
}

/* An engine as a server opens it, with as much memory for keys and values as the load needs. */
static gn_status measure(gn_bench *b, speeds *s) {
    const int context = b->prompt + b->tokens;
    const int64_t blocks = (context + GN_KV_BLOCK_TOKENS - 1) / GN_KV_BLOCK_TOKENS;
    const int64_t block = (int64_t)gn_forward_kv_block_bytes(b->model, b->kv_dtype);
    const gn_engine_options options = {.max_seqs = b->streams,
                                       .max_batch_tokens = b->max_batch_tokens,
                                       .kv_bytes = b->streams * blocks * block,
                                       .kv_dtype = b->kv_dtype,
                                       .context = context,
                                       .memory_bytes = b->memory,
                                       .adapter_bytes = b->adapter ? 0 : -1,
                                       .adapters = &b->adapter,
                                       .n_adapters = b->adapter ? 1 : 0,
                                       .no_prefix_cache = true};
    gn_config *config = &b->model->config;
    if (!b->model->tokenizer && config->max_positions < context)
        config->max_positions = context; /* random weights know no longest context */
    gn_engine *engine;
    gn_status status = gn_engine_open(&engine, b->model, &options, b->err);
    if (status) return status;
    const gn_memory_plan plan = gn_engine_memory(engine);
    if (b->memory > 0) gn_show_memory(&plan);
    load l;
    if (open_load(&l, b->streams, b->tokens))
        status = measure_rounds(b, engine, &l, s);
    else
        status = gn_fail(b->err, GN_ENOMEM, "out of memory");
    gn_progress("%s", "");
    gn_engine_close(engine);
    close_load(&l);
    return status;
}

/* ---- floors ---- */

typedef struct cost {
    double weight_bytes; /* read by any pass, however many tokens it takes */
    double kv_bytes;     /* of one token */
    double token_flop;   /* products of one token, without lm_head */
    double head_flop;
} cost;

static cost cost_of(const gn_bench *b) {
    const gn_model *m = b->model;
    cost c = {.kv_bytes = (double)gn_forward_kv_block_bytes(m, b->kv_dtype) / GN_KV_BLOCK_TOKENS};
    for (int layer = 0; layer < m->config.layers; layer++) {
        for (int p = 0; p < GN_PROJ_COUNT; p++) {
            const gn_matrix *w = &m->layers[layer].proj[p];
            c.weight_bytes += (double)gn_matrix_bytes(w);
            c.token_flop += 2.0 * (double)w->rows * (double)w->cols;
        }
    }
    c.head_flop = 2.0 * (double)m->lm_head.rows * (double)m->lm_head.cols;
    c.weight_bytes += (double)gn_matrix_bytes(&m->lm_head);
    if (b->adapter) c.weight_bytes += (double)gn_adapter_bytes(b->adapter);
    return c;
}

/* Seconds of a pass over every stream's prompt. */
static double prefill_floor(const gn_bench *b, const cost *c) {
    const gn_config *config = &b->model->config;
    /* Scores and sums over half a square, two products each. */
    const double attention =
        2.0 * config->layers * config->heads * config->head_dim * (double)b->prompt * b->prompt;
    return gn_bench_floor(b, c->weight_bytes,
                          b->streams * (b->prompt * c->token_flop + attention + c->head_flop));
}

/* Seconds of a step of all streams, on average over the reply. */
static double step_floor(const gn_bench *b, const cost *c) {
    const double context = b->prompt + 0.5 * b->tokens;
    return gn_bench_floor(b, c->weight_bytes + b->streams * context * c->kv_bytes,
                          b->streams * (c->token_flop + c->head_flop));
}

/* ---- reports ---- */

static void print_rate(const char *what, double tok_s, double floor) {
    printf("  %s: %.1f tok/s; the floor is %.1f (%.0f %% of it reached)\n", what, tok_s, floor,
           100 * tok_s / floor);
}

static void add_rate(cJSON *line, double tok_s, double floor) {
    cJSON_AddNumberToObject(line, "tok_s", tok_s);
    cJSON_AddNumberToObject(line, "floor", floor);
    cJSON_AddNumberToObject(line, "ratio", tok_s / floor);
}

static cJSON *begin_line(const gn_bench *b) {
    cJSON *line = gn_bench_line(b);
    cJSON_AddNumberToObject(line, "streams", b->streams);
    cJSON_AddNumberToObject(line, "prompt", b->prompt);
    return line;
}

static gn_status end_line_take(const gn_bench *b, cJSON *line) {
    cJSON_AddNumberToObject(line, "peak_bytes", b->peak_bytes);
    return gn_print_json_take(line, b->err);
}

static void print_load(const gn_bench *b) {
    gn_bench_heading(b);
    printf("  %d stream%s of %d prompt tokens and %d new one%s; peak memory %.2f GiB\n", b->streams,
           b->streams == 1 ? "" : "s", b->prompt, b->tokens, b->tokens == 1 ? "" : "s",
           b->peak_bytes / 0x1p30);
}

gn_status gn_bench_decode(gn_bench *b) {
    speeds s;
    const gn_status status = measure(b, &s);
    if (status) return status;
    const cost c = cost_of(b);
    const double step = step_floor(b, &c), steady = b->streams / step;
    const double floor =
        b->streams * (double)b->tokens / (prefill_floor(b, &c) + (b->tokens - 1) * step);
    if (!b->json) {
        print_load(b);
        print_rate("new tokens over the whole time", s.overall, floor);
        if (s.decoding > 0)
            print_rate("while all streams decode", s.decoding, steady);
        else
            printf("  the first stream ended before the last had begun to decode\n");
        return GN_OK;
    }
    cJSON *line = begin_line(b);
    cJSON_AddNumberToObject(line, "tokens", b->tokens);
    add_rate(line, s.overall, floor);
    if (s.decoding > 0) {
        cJSON_AddNumberToObject(line, "decode_tok_s", s.decoding);
        cJSON_AddNumberToObject(line, "decode_floor", steady);
        cJSON_AddNumberToObject(line, "decode_ratio", s.decoding / steady);
    }
    return end_line_take(b, line);
}

gn_status gn_bench_prefill(gn_bench *b) {
    speeds s;
    b->tokens = 1; /* when it is there, so are the logits it came from */
    const gn_status status = measure(b, &s);
    if (status) return status;
    const cost c = cost_of(b);
    const double floor = b->streams * (double)b->prompt / prefill_floor(b, &c);
    if (!b->json) {
        print_load(b);
        print_rate("prompt tokens until the first new one", s.prefill, floor);
        return GN_OK;
    }
    cJSON *line = begin_line(b);
    add_rate(line, s.prefill, floor);
    return end_line_take(b, line);
}
