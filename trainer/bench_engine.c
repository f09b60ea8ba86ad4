/* bench_engine.c - decoding and prefill as a server does them, through the engine. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "engine/forward.h"
#include "trainer/bench.h"

enum { ROUNDS = 5, DECODE_PROMPT = 16 };

/* Requests that are sent together and awaited together. */
typedef struct batch {
    pthread_mutex_t lock;
    pthread_cond_t ended;
    int running;
    gn_error error; /* of the last request that failed */
    double begin, end;
} batch;

/* One request; written on the engine's thread. */
typedef struct stream {
    batch *batch;
    double *times; /* when each token came */
    int n;
} stream;

static void on_event(void *user, const gn_event *event) {
    stream *s = user;
    batch *b = s->batch;
    if (event->has_token) s->times[s->n++] = gn_seconds();
    if (event->finish == GN_FINISH_NONE) return;
    pthread_mutex_lock(&b->lock);
    if (event->finish == GN_FINISH_ERROR && event->error) b->error = *event->error;
    b->end = gn_seconds();
    b->running--;
    pthread_cond_signal(&b->ended);
    pthread_mutex_unlock(&b->lock);
}

/* Any ids will do, as long as no two prompts begin alike. */
static void fill_prompt(int32_t *ids, int n, int vocab, uint32_t seed) {
    for (int i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        ids[i] = (int32_t)((seed >> 8) % (uint32_t)vocab);
    }
}

static gn_status submit(gn_engine *engine, const gn_bench *b, stream *s, int32_t *prompt,
                        int n_prompt, int tokens) {
    const gn_request request = {.prompt = prompt,
                                .n_prompt = n_prompt,
                                .adapters = {{b->adapter, 1}},
                                .n_adapters = b->adapter ? 1 : 0,
                                .sampling = {.top_p = 1, .typical_p = 1, .repetition_penalty = 1},
                                .max_tokens = tokens,
                                .logprobs = -1,
                                .ignore_eos = true,
                                .on_event = on_event,
                                .user = s};
    uint64_t id;
    pthread_mutex_lock(&s->batch->lock);
    s->batch->running++;
    pthread_mutex_unlock(&s->batch->lock);
    const gn_status status = gn_engine_submit(engine, &request, &id, b->err);
    if (!status) return GN_OK;
    pthread_mutex_lock(&s->batch->lock);
    s->batch->running--;
    pthread_mutex_unlock(&s->batch->lock);
    return status;
}

/* Runs every stream to its end. seed makes the prompts of this batch its own. */
static gn_status run_batch(gn_engine *engine, const gn_bench *b, stream *streams, int n_prompt,
                           int tokens, uint32_t seed) {
    batch together = {.lock = PTHREAD_MUTEX_INITIALIZER, .ended = PTHREAD_COND_INITIALIZER};
    const int vocab = gn_model_describe(b->model).vocab;
    int32_t *prompt = malloc((size_t)n_prompt * sizeof *prompt);
    if (!prompt) return gn_fail(b->err, GN_ENOMEM, "out of memory");
    gn_status status = GN_OK;
    together.begin = gn_seconds();
    for (int i = 0; !status && i < b->streams; i++) {
        streams[i].batch = &together;
        streams[i].n = 0;
        fill_prompt(prompt, n_prompt, vocab, seed + (uint32_t)i);
        status = submit(engine, b, &streams[i], prompt, n_prompt, tokens);
    }
    pthread_mutex_lock(&together.lock);
    while (together.running > 0) pthread_cond_wait(&together.ended, &together.lock);
    pthread_mutex_unlock(&together.lock);
    for (int i = 0; i < b->streams; i++) streams[i].batch = NULL;
    if (!status && together.error.status)
        status = gn_fail(b->err, together.error.status, "%s", together.error.message);
    streams[0].times[tokens] = together.end - together.begin; /* prefill has only this */
    free(prompt);
    return status;
}

static void close_streams(stream *streams, int n) {
    for (int i = 0; streams && i < n; i++) free(streams[i].times);
    free(streams);
}

static stream *open_streams(int n, int tokens) {
    stream *streams = calloc((size_t)n, sizeof *streams);
    bool complete = streams != NULL;
    for (int i = 0; complete && i < n; i++) {
        streams[i].times = calloc((size_t)tokens + 1, sizeof *streams[i].times);
        complete = streams[i].times != NULL;
    }
    if (complete) return streams;
    close_streams(streams, n);
    return NULL;
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
    cost c = {.kv_bytes = (double)gn_forward_kv_block_bytes(m) / GN_KV_BLOCK_TOKENS};
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

/* ---- reports ---- */

static gn_status report(const gn_bench *b, double tok_s, double floor) {
    if (!b->json) {
        gn_bench_heading(b);
        printf("  %d tokens, %d stream%s: %.1f tok/s; the floor is %.1f (%.0f %% of it reached)\n",
               b->tokens, b->streams, b->streams == 1 ? "" : "s", tok_s, floor,
               100 * tok_s / floor);
        printf("  peak memory %.2f GiB\n", b->peak_bytes / 0x1p30);
        return GN_OK;
    }
    cJSON *line = gn_bench_line(b);
    cJSON_AddNumberToObject(line, "streams", b->streams);
    cJSON_AddNumberToObject(line, "tokens", b->tokens);
    cJSON_AddNumberToObject(line, "tok_s", tok_s);
    cJSON_AddNumberToObject(line, "floor", floor);
    cJSON_AddNumberToObject(line, "ratio", tok_s / floor);
    cJSON_AddNumberToObject(line, "peak_bytes", b->peak_bytes);
    return gn_print_json_take(line, b->err);
}

/* Opens an engine just large enough, runs a warm-up and the rounds, and hands each to `rate`.
 * Leaves the median of the memory's speed in b. */
static gn_status measure(gn_bench *b, int n_prompt, int tokens,
                         double (*rate)(const gn_bench *b, const stream *streams), double *tok_s) {
    const gn_engine_options options = {.max_seqs = b->streams,
                                       .max_batch_tokens =
                                           n_prompt > b->streams ? n_prompt : b->streams,
                                       .context = n_prompt + tokens,
                                       .no_prefix_cache = true};
    gn_engine *engine;
    gn_status status = gn_engine_open(&engine, b->model, &options, b->err);
    if (status) return status;
    stream *streams = open_streams(b->streams, tokens);
    if (!streams) status = gn_fail(b->err, GN_ENOMEM, "out of memory");
    double rates[ROUNDS], reads[ROUNDS];
    for (int round = -1; !status && round < ROUNDS; round++) { /* -1 warms up */
        const int length = round < 0 && tokens > 8 ? 8 : tokens;
        gn_progress("%s: round %d of %d", b->kind, round + 1, ROUNDS);
        status = gn_round_begin(b);
        if (!status)
            status = run_batch(engine, b, streams, n_prompt, length, 7919u * (uint32_t)(round + 2));
        gn_round_end(b);
        if (status || round < 0) continue;
        rates[round] = rate(b, streams);
        reads[round] = b->rates.read_bytes;
    }
    gn_progress("%s", "");
    if (!status) {
        *tok_s = gn_median(rates, ROUNDS);
        b->rates.read_bytes = gn_median(reads, ROUNDS);
    }
    close_streams(streams, b->streams);
    gn_engine_close(engine);
    return status;
}

/* Tokens a second while all streams decode: from the last one's first token to the first one's
 * last. */
static double decode_rate(const gn_bench *b, const stream *streams) {
    double begin = 0, end = INFINITY;
    int64_t tokens = 0;
    for (int i = 0; i < b->streams; i++) {
        begin = fmax(begin, streams[i].times[0]);
        end = fmin(end, streams[i].times[b->tokens - 1]);
    }
    for (int i = 0; i < b->streams; i++)
        for (int j = 0; j < b->tokens; j++)
            tokens += streams[i].times[j] > begin && streams[i].times[j] <= end;
    return (double)tokens / (end - begin);
}

gn_status gn_bench_decode(gn_bench *b) {
    double tok_s = 0;
    if (b->tokens < 2) return gn_fail(b->err, GN_EINVAL, "decode needs --tokens of at least 2");
    const gn_status status = measure(b, DECODE_PROMPT, b->tokens, decode_rate, &tok_s);
    if (status) return status;
    const cost c = cost_of(b);
    const double context = DECODE_PROMPT + 0.5 * b->tokens; /* on average */
    const double step = gn_bench_floor(b, c.weight_bytes + b->streams * context * c.kv_bytes,
                                       b->streams * (c.token_flop + c.head_flop));
    return report(b, tok_s, b->streams / step);
}

static double prefill_rate(const gn_bench *b, const stream *streams) {
    return (double)b->tokens * b->streams / streams[0].times[0];
}

gn_status gn_bench_prefill(gn_bench *b) {
    double tok_s = 0;
    const gn_status status = measure(b, b->tokens, 0, prefill_rate, &tok_s);
    if (status) return status;
    const cost c = cost_of(b);
    const gn_config *config = &b->model->config;
    /* Scores and sums over half a square, two products each. */
    const double attention =
        2.0 * config->layers * config->heads * config->head_dim * (double)b->tokens * b->tokens;
    const double pass = gn_bench_floor(
        b, c.weight_bytes, b->streams * (b->tokens * c.token_flop + attention + c.head_flop));
    return report(b, tok_s, (double)b->tokens * b->streams / pass);
}
