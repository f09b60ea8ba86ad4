/* bench_step.c - whether the GPU idles between steps of decoding; run by hand, not a test.
 *
 * usage: bench_step [SHAPE] (llama-7b). Microseconds a step for some numbers of streams: of the
 * device alone, when the forward pass and the draw are queued without looking at a token; of the
 * engine's steps launched ahead; and of steps that wait for the tokens of the one before. What
 * `ahead` takes beyond `device` the GPU idles, or the host holds it up. */
#include "engine/draw.h"
#include "engine/model.h"
#include "engine/step.h"

#include <stdio.h>
#include <stdlib.h>

#include "tests/gpu/bench.h"

enum { PROMPT = 16, TOKENS = 320, WARM = 16, STEPS = 256, MAX_STREAMS = 128 };
enum {
    CONTEXT = PROMPT + TOKENS,
    BLOCKS = (CONTEXT + GN_KV_BLOCK_TOKENS - 1) / GN_KV_BLOCK_TOKENS
};

static const gn_sampling sampling = {
    .temperature = 0.8f, .top_p = 0.95f, .typical_p = 1, .repetition_penalty = 1};

/* ---- the engine's steps ---- */

static void on_event(void *user, const gn_event *event) {
    *(int64_t *)user += event->has_token;
}

static void on_end(void *user, gn_sequence *s) {
    (void)user;
    gn_sequence_close(s);
}

static void step(gn_stepper *e) {
    gn_stepper_run(e);
    gn_stepper_report(e);
}

static void add(gn_stepper *e, const gn_model *model, int i, int64_t *tokens) {
    gn_error err = {0};
    gn_sequence *s;
    int32_t prompt[PROMPT];
    for (int j = 0; j < PROMPT; j++) prompt[j] = (i * 7919 + j * 104729 + 3) % model->config.vocab;
    gn_request r = {.prompt = prompt,
                    .n_prompt = PROMPT,
                    .sampling = sampling,
                    .max_tokens = TOKENS,
                    .logprobs = -1,
                    .ignore_eos = true,
                    .on_event = on_event,
                    .user = tokens};
    r.sampling.seed = (uint64_t)i;
    check(gn_sequence_open(&s, &r, model, CONTEXT, &err), &err);
    s->id = (uint64_t)i + 1;
    gn_stepper_add(e, s);
}

static double time_engine(gn_model *model, int streams, bool ahead) {
    gn_error err = {0};
    gn_stepper *e;
    int64_t tokens = 0;
    const gn_stepper_options options = {.max_seqs = streams,
                                        .max_rows = streams * PROMPT,
                                        .prefill_chunk = streams * PROMPT,
                                        .kv_blocks = streams * BLOCKS,
                                        .context = CONTEXT,
                                        .ahead = ahead,
                                        .on_end = on_end};
    check(gn_stepper_open(&e, model, &options, &err), &err);
    for (int i = 0; i < streams; i++) add(e, model, i, &tokens);
    while (tokens < (int64_t)WARM * streams) step(e);
    const int64_t before = tokens;
    const double start = seconds();
    for (int i = 0; i < STEPS; i++) step(e);
    const double taken = seconds() - start;
    if (tokens - before != (int64_t)STEPS * streams) {
        fprintf(stderr, "bench_step: %lld tokens in %d steps of %d\n", (long long)(tokens - before),
                STEPS, streams);
        exit(1);
    }
    gn_stepper_cancel(e, true);
    gn_stepper_close(e);
    return taken / STEPS;
}

/* ---- the device alone ---- */

static double time_device(gn_model *model, int streams) {
    static int32_t ids[MAX_STREAMS], row0[MAX_STREAMS + 1], pos0[MAX_STREAMS], rows[MAX_STREAMS];
    static int32_t blocks[MAX_STREAMS * BLOCKS];
    static gn_sample_row asked[MAX_STREAMS];
    gn_error err = {0};
    gn_forward *f;
    gn_device_sampler *sampler;
    const gn_forward_options limits = {.max_rows = streams,
                                       .max_seqs = streams,
                                       .max_logits = streams,
                                       .kv_blocks = streams * BLOCKS,
                                       .context = CONTEXT};
    check(gn_forward_open(&f, model, &limits, &err), &err);
    check(gn_device_sampler_open(&sampler, model->ctx, streams, model->config.vocab), &err);
    for (int i = 0; i < streams; i++) {
        rows[i] = row0[i] = i;
        ids[i] = -1 - i;
        pos0[i] = PROMPT + WARM + STEPS / 2; /* on average, as above */
        for (int j = 0; j < BLOCKS; j++) blocks[i * BLOCKS + j] = i * BLOCKS + j;
        asked[i] = (gn_sample_row)GN_SAMPLE_ROW_DEFAULT;
        asked[i].temperature = sampling.temperature;
        asked[i].top_p = sampling.top_p;
        asked[i].seed = (uint64_t)i;
    }
    row0[streams] = streams;
    gn_batch batch = {.rows = streams,
                      .ids = rows, /* at first */
                      .drawn = gn_device_sampler_ids(sampler),
                      .n_drawn = streams,
                      .seqs = {streams, BLOCKS, row0, pos0, blocks}};
    double start = 0;
    for (int i = -WARM; i < STEPS; i++) {
        gn_tensor logits;
        if (i == 0) {
            check(gn_ctx_wait(model->ctx), &err);
            start = seconds();
        }
        check(gn_forward_run(f, &batch), &err);
        check(gn_forward_device_logits(f, rows, streams, &logits), &err);
        check(gn_device_sample(sampler, &logits, asked, streams), &err);
        batch.ids = ids;
    }
    check(gn_ctx_wait(model->ctx), &err);
    const double taken = seconds() - start;
    gn_device_sampler_close(sampler);
    gn_forward_close(f);
    return taken / STEPS;
}

int main(int argc, char **argv) {
    const int streams[] = {1, 4, 16, 64, MAX_STREAMS};
    gn_error err = {0};
    gn_model *model;
    const gn_model_options options = {.device = "cuda"};
    const char *shape = argc > 1 ? argv[1] : "llama-7b";
    check(gn_model_synthetic(&model, shape, &options, &err), &err);
    printf("%s on %s, us a step\n%7s %9s %9s %9s %12s\n", shape, gn_model_describe(model).device,
           "streams", "device", "ahead", "waiting", "ahead tok/s");
    for (size_t i = 0; i < sizeof streams / sizeof *streams; i++) {
        const int n = streams[i];
        const double device = time_device(model, n), waiting = time_engine(model, n, false);
        const double ahead = time_engine(model, n, true);
        printf("%7d %9.1f %9.1f %9.1f %12.0f\n", n, 1e6 * device, 1e6 * ahead, 1e6 * waiting,
               n / ahead);
        fflush(stdout);
    }
    gn_model_close(model);
    return 0;
}
