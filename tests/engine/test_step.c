/* Steps launched ahead of the tokens they go on from: whatever a load does, every sequence gets the
 * events that it gets when each step waits for the one before, and nothing stays behind. On the
 * CPU, or on the device that GN_TEST_DEVICE names. */
#include "engine/step.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "engine/adapter_memory.h"
#include "engine/model.h"
#include "tests/support/uploads.h"

enum { STREAMS = 40, MAX_SEQS = 12, MAX_TOKENS = 64, CONTEXT = 256, COPIES = 3 };

/* What a sequence was told. */
typedef struct reply {
    gn_sequence *s;
    int cancel_at; /* tokens; 0: not canceled */
    int tokens, ids[MAX_TOKENS];
    float logprobs[MAX_TOKENS];
    char text[2048];
    size_t len;
    gn_finish finish;
    int finishes, completion_tokens, prompt_events;
    double prompt_sum;
} reply;

static void on_event(void *user, const gn_event *event) {
    reply *r = user;
    cr_assert_eq(r->finishes, 0, "an event after the last");
    cr_assert_lt(r->len + event->text_len, sizeof r->text);
    memcpy(r->text + r->len, event->text, event->text_len);
    r->len += event->text_len;
    if (event->has_token) {
        cr_assert_lt(r->tokens, MAX_TOKENS);
        r->logprobs[r->tokens] = event->token.logprob;
        r->ids[r->tokens++] = event->token.id;
    }
    for (int i = 0; i < event->n_top; i++)
        if (event->has_token) r->logprobs[r->tokens - 1] += event->top[i].logprob;
    r->prompt_events += event->n_prompt > 0;
    for (int i = 1; i < event->n_prompt; i++) r->prompt_sum += (double)event->prompt[i].logprob;
    r->completion_tokens = event->completion_tokens;
    cr_assert_eq(event->completion_tokens, r->tokens);
    r->finishes += event->finish != GN_FINISH_NONE;
    r->finish = event->finish;
    if (r->cancel_at > 0 && r->tokens == r->cancel_at) atomic_store(&r->s->canceled, true);
}

static void on_end(void *user, gn_sequence *s) {
    int *ended = user;
    ++*ended;
    cr_assert_eq(s->n_blocks, 0);
    gn_sequence_close(s);
}

typedef struct bench {
    gn_model *model;
    gn_adapter *adapters[2][COPIES]; /* equal ones, which the device does not know to be equal */
} bench;

/* host_bytes: see gn_model_options. */
static bench bench_open(int64_t host_bytes) {
    const char *device = getenv("GN_TEST_DEVICE");
    bench b;
    gn_error err = {0};
    const gn_model_options options = {.device = device ? device : "cpu",
                                      .compute = GN_COMPUTE_F32,
                                      .adapter_host_bytes = host_bytes};
    cr_assert_eq(gn_model_open(&b.model, GN_SOURCE_DIR "/models/bootstrap-13m-nf4", &options, &err),
                 GN_OK, "%s", err.message);
    const char *const dirs[] = {GN_SOURCE_DIR "/models/adapters/pirate",
                                GN_SOURCE_DIR "/models/adapters/brief"};
    for (int i = 0; i < 2 * COPIES; i++)
        cr_assert_eq(gn_adapter_open(&b.adapters[i % 2][i / 2], b.model, dirs[i % 2], &err), GN_OK,
                     "%s", err.message);
    return b;
}

static void bench_close(bench *b) {
    for (int i = 0; i < 2 * COPIES; i++) gn_adapter_close(b->adapters[i % 2][i / 2]);
    gn_model_close(b->model);
}

/* Request i of a mix: greedy and sampled, with penalties, stop strings, limits, bans, scores,
 * cancellations, one or two or no adapters; prompts that share beginnings. */
static gn_sequence *sequence_of(const bench *b, int i, reply *r) {
    static const char *const questions[] = {
        "What is the capital of France?", "How do I bake bread?", "Tell me a story about the sea.",
        "Name three animals.", "Explain gravity to a child."};
    static const char *const stop[] = {",", "the"};
    static const gn_token_prob bias[] = {{7, 2}, {300, -50}};
    const gn_message message = {"user", questions[i % 5]};
    int32_t *prompt;
    gn_error err = {0};
    gn_request q = {.sampling = GN_SAMPLING_DEFAULT,
                    .max_tokens = 1 + i * 7 % 40,
                    .logprobs = i % 4 - 1,
                    .strip_space = true,
                    .on_event = on_event,
                    .user = r};
    cr_assert_eq(gn_chat_encode(b->model, &message, 1, &prompt, &q.n_prompt, &err), GN_OK, "%s",
                 err.message);
    q.prompt = prompt;
    q.sampling.temperature = i % 2 ? 0.9f : 0;
    q.sampling.seed = (uint64_t)i;
    if (i % 3 == 0) {
        q.sampling.repetition_penalty = 1.2f;
        q.sampling.frequency_penalty = 0.3f;
    }
    if (i % 6 == 1) q.sampling.bias = bias, q.sampling.n_bias = 2;
    if (i % 4 == 2) q.stop = stop, q.n_stop = 2;
    if (i % 8 == 5) q.min_tokens = 9;
    if (i % 7 == 3) q.ignore_eos = true;
    if (i % 9 == 4) q.prompt_logprobs = true;
    if (i % 13 == 12) q.max_tokens = 0, q.prompt_logprobs = true;
    if (i & 8) q.adapters[q.n_adapters++] = (gn_adapter_use){b->adapters[0][i % COPIES], 1};
    if (i & 16) q.adapters[q.n_adapters++] = (gn_adapter_use){b->adapters[1][i % COPIES], 0.5f};
    memset(r, 0, sizeof *r);
    if (i % 5 == 3) r->cancel_at = 1 + i % 6;
    cr_assert_eq(gn_sequence_open(&r->s, &q, b->model, CONTEXT, &err), GN_OK, "%s", err.message);
    r->s->id = (uint64_t)i + 1;
    free(prompt);
    return r->s;
}

typedef struct load {
    bool ahead;
    int32_t max_rows, kv_blocks;
    int stride; /* a sequence is added every so many steps; 0: all at once */
    int64_t adapter_bytes;
} load;

/* Runs a load to its end. */
static gn_engine_stats run_load(const bench *b, const load *l, reply *replies, int64_t *ahead) {
    int ended = 0, added = 0, steps = 0;
    gn_error err = {0};
    gn_stepper *e;
    const gn_stepper_options options = {.max_seqs = MAX_SEQS,
                                        .max_rows = l->max_rows,
                                        .prefill_chunk = 16,
                                        .kv_blocks = l->kv_blocks,
                                        .context = CONTEXT,
                                        .prefix_cache = true,
                                        .ahead = l->ahead,
                                        .adapter_bytes = l->adapter_bytes,
                                        .on_end = on_end,
                                        .user = &ended};
    cr_assert_eq(gn_stepper_open(&e, b->model, &options, &err), GN_OK, "%s", err.message);
    for (bool busy = true; busy || added < STREAMS;) {
        while (added < STREAMS && (l->stride == 0 || added * l->stride <= steps)) {
            gn_stepper_add(e, sequence_of(b, added, &replies[added]));
            added++;
        }
        gn_stepper_cancel(e, false);
        busy = gn_stepper_run(e);
        gn_stepper_report(e);
        cr_assert_lt(++steps, 200000);
    }
    cr_assert_eq(ended, STREAMS);
    gn_engine_stats stats = {0};
    gn_stepper_read_stats(e, &stats);
    cr_assert_eq(stats.running, 0);
    cr_assert_eq(stats.kv_blocks_used, 0);
    *ahead = gn_stepper_launched_ahead(e);
    gn_stepper_close(e);
    return stats;
}

static void assert_same(const reply *a, const reply *b, int i) {
    cr_assert_eq(a->finishes, 1, "stream %d", i);
    cr_assert_eq(b->finishes, 1, "stream %d", i);
    cr_assert_eq(a->finish, b->finish, "stream %d ends by %d and %d", i, a->finish, b->finish);
    cr_assert_eq(a->tokens, b->tokens, "stream %d: %d and %d tokens", i, a->tokens, b->tokens);
    cr_assert_eq(a->len, b->len, "stream %d", i);
    cr_assert_eq(memcmp(a->text, b->text, a->len), 0, "stream %d", i);
    cr_assert_eq(a->completion_tokens, b->completion_tokens, "stream %d", i);
    cr_assert_eq(a->prompt_events, b->prompt_events, "stream %d", i);
    cr_assert_float_eq(a->prompt_sum, b->prompt_sum, 1e-3, "stream %d", i);
    for (int t = 0; t < a->tokens; t++) {
        cr_assert_eq(a->ids[t], b->ids[t], "stream %d token %d", i, t);
        cr_assert_float_eq(a->logprobs[t], b->logprobs[t], 1e-3, "stream %d token %d", i, t);
    }
}

static reply waiting[STREAMS], going_ahead[STREAMS];

Test(step, going_ahead_changes_nothing) {
    const load loads[] = {
        {.max_rows = 64, .kv_blocks = 400, .stride = 0},  /* all at once, chunked */
        {.max_rows = 512, .kv_blocks = 400, .stride = 3}, /* they come one by one */
        {.max_rows = 32, .kv_blocks = 24, .stride = 0},   /* and preempt each other */
    };
    bench b = bench_open(0);
    for (size_t l = 0; l < sizeof loads / sizeof *loads; l++) {
        load load = loads[l];
        int64_t ahead = 0;
        int finishes[GN_FINISH_ERROR + 1] = {0};
        const gn_engine_stats plain = run_load(&b, &load, waiting, &ahead);
        cr_assert_eq(ahead, 0);
        load.ahead = true;
        const gn_engine_stats stats = run_load(&b, &load, going_ahead, &ahead);
        cr_assert_gt(ahead, stats.steps / 4, "load %zu: %d of %d steps", l, (int)ahead,
                     (int)stats.steps);
        for (int i = 0; i < STREAMS; i++) {
            assert_same(&waiting[i], &going_ahead[i], i);
            finishes[waiting[i].finish]++;
            if (waiting[i].cancel_at && waiting[i].finish == GN_FINISH_CANCEL)
                cr_assert_eq(waiting[i].tokens, waiting[i].cancel_at);
        }
        cr_assert(finishes[GN_FINISH_STOP] && finishes[GN_FINISH_LENGTH] &&
                  finishes[GN_FINISH_CANCEL]);
        cr_assert_eq(finishes[GN_FINISH_ERROR], 0);
        cr_assert_eq(stats.completion_tokens, plain.completion_tokens);
        if (load.kv_blocks < 400) continue;
        /* What ended is in the prefix cache as far as it was known, and no further. */
        cr_assert_eq(stats.kv_blocks_cached, plain.kv_blocks_cached, "%d and %d",
                     stats.kv_blocks_cached, plain.kv_blocks_cached);
    }
    bench_close(&b);
}

/* A reply that ends where a block does: the token too many would have begun a new one. */
Test(step, a_token_too_many_is_nowhere_to_be_seen) {
    bench b = bench_open(0);
    for (int length = 1; length <= GN_KV_BLOCK_TOKENS; length++) {
        int cached[2];
        for (int ahead = 0; ahead < 2; ahead++) {
            int ended = 0;
            reply r;
            gn_error err = {0};
            gn_stepper *e;
            gn_engine_stats stats = {0};
            const gn_stepper_options options = {.max_seqs = 1,
                                                .max_rows = 64,
                                                .prefill_chunk = 16,
                                                .kv_blocks = 16,
                                                .context = CONTEXT,
                                                .prefix_cache = true,
                                                .ahead = ahead,
                                                .on_end = on_end,
                                                .user = &ended};
            cr_assert_eq(gn_stepper_open(&e, b.model, &options, &err), GN_OK, "%s", err.message);
            gn_sequence *s = sequence_of(&b, 16, &r); /* greedy */
            cr_assert_gt(s->max_tokens, length);
            s->ignore_eos = true;
            r.cancel_at = length;
            gn_stepper_add(e, s);
            do {
                gn_stepper_cancel(e, false);
            } while (gn_stepper_run(e) && (gn_stepper_report(e), true));
            gn_stepper_read_stats(e, &stats);
            cr_assert_eq(ended, 1);
            cr_assert_eq(r.tokens, length);
            cr_assert_eq(stats.completion_tokens, length);
            cr_assert_eq(stats.kv_blocks_used, 0);
            cr_assert_eq(gn_stepper_launched_ahead(e), ahead ? length : 0);
            cached[ahead] = stats.kv_blocks_cached;
            gn_stepper_close(e);
        }
        cr_assert_eq(cached[0], cached[1], "%d tokens: %d and %d blocks", length, cached[0],
                     cached[1]);
    }
    bench_close(&b);
}

/* Room for one blend at a time, and adapters that take a while to come: sequences wait for them, in
 * and out of turn, and are told the same. */
Test(step, adapters_that_come_and_go_change_nothing) {
    bench b = bench_open(0);
    const int64_t both =
        gn_adapter_memory_bytes(b.adapters[0][0]) + gn_adapter_memory_bytes(b.adapters[1][0]);
    load loads[] = {
        {.max_rows = 64, .kv_blocks = 400},
        {.max_rows = 512, .kv_blocks = 400, .stride = 3, .ahead = true},
        {.max_rows = 32, .kv_blocks = 24, .ahead = true},
    };
    for (size_t l = 0; l < sizeof loads / sizeof *loads; l++) {
        int64_t ahead = 0;
        run_load(&b, &loads[l], waiting, &ahead);
        if (gn_ctx_is_host(b.model->ctx)) test_delay_uploads(b.model->ctx, 4);
        loads[l].adapter_bytes = both;
        const gn_engine_stats stats = run_load(&b, &loads[l], going_ahead, &ahead);
        for (int i = 0; i < STREAMS; i++) assert_same(&waiting[i], &going_ahead[i], i);
        cr_assert_eq(stats.kv_blocks_used, 0);
        if (!gn_ctx_is_host(b.model->ctx)) continue;
        cr_assert_gt(test_uploads_begun(), 2 * COPIES, "some come more than once");
        cr_assert_eq(test_uploads_open(), 0);
    }
    bench_close(&b);
}

/* Memory for one blend on the host, too: adapters come from disk, to where they are used in place
 * and on to a device with as little room. */
Test(step, adapters_that_come_from_disk_change_nothing) {
    bench b = bench_open(0);
    load l = {.max_rows = 64, .kv_blocks = 400};
    int64_t ahead = 0;
    const int64_t host = (int64_t)(gn_adapter_bytes(b.adapters[0][0]) +
                                   gn_adapter_bytes(b.adapters[1][0])),
                  both = gn_adapter_memory_bytes(b.adapters[0][0]) +
                         gn_adapter_memory_bytes(b.adapters[1][0]);
    run_load(&b, &l, waiting, &ahead);
    bench_close(&b);
    b = bench_open(host);
    for (int copies = gn_ctx_is_host(b.model->ctx) ? 0 : 1; copies < 2; copies++) {
        const int64_t reads = gn_adapter_host_read_stats(b.model->adapters).reads;
        l.adapter_bytes = copies ? both : 0;
        if (gn_ctx_is_host(b.model->ctx)) test_delay_uploads(b.model->ctx, 4);
        run_load(&b, &l, going_ahead, &ahead);
        for (int i = 0; i < STREAMS; i++) assert_same(&waiting[i], &going_ahead[i], i);
        const gn_adapter_host_stats stats = gn_adapter_host_read_stats(b.model->adapters);
        cr_assert_geq(stats.reads - reads, 2 * COPIES - 2);
        if (!copies) cr_assert_leq(stats.bytes, host);
    }
    bench_close(&b);
}

/* A request whose adapters can never be there fails, alone. */
Test(step, what_does_not_fit_fails_alone) {
    bench b = bench_open(0);
    load l = {.max_rows = 64,
              .kv_blocks = 400,
              .adapter_bytes = gn_adapter_memory_bytes(b.adapters[0][0]) +
                               gn_adapter_memory_bytes(b.adapters[1][0]) - 256};
    int64_t ahead = 0;
    int failed = 0;
    run_load(&b, &l, waiting, &ahead);
    for (int i = 0; i < STREAMS; i++) {
        const bool is_blend = (i & 8) && (i & 16);
        cr_assert_eq(waiting[i].finishes, 1);
        cr_assert_eq(waiting[i].finish == GN_FINISH_ERROR, is_blend, "stream %d", i);
        failed += is_blend;
    }
    cr_assert_gt(failed, 0);
    bench_close(&b);
}
