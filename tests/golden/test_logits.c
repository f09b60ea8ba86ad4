/* Logits of the golden model in every form, and greedy continuations, against transformers, PEFT
 * and bitsandbytes at float32 (golden/logits.safetensors). On the CPU, or on the device that
 * GN_TEST_DEVICE names. */
#include "engine/score.h"

#include <criterion/criterion.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DATA GN_SOURCE_DIR "/tests/golden/data/"

enum { VOCAB = 512, TOKENS = 48 };

static const struct {
    const char *base, *adapter, *tensor;
} cases[] = {
    {"tiny-bf16", NULL, "logits.bf16"},
    {"tiny-bnb-nf4", NULL, "logits.nf4_dq"},
    {"tiny-bnb-nf4", "adapter-all-r8", "logits.nf4_dq+adapter-all-r8"},
    {"tiny-bnb-nf4", "adapter-attn-r4", "logits.nf4_dq+adapter-attn-r4"},
    {"tiny-bnb-nf4", "adapter-rslora-r16", "logits.nf4_dq+adapter-rslora-r16"},
    {"tiny-bnb-nf4", "adapter-all-r16-bin", "logits.nf4_dq+adapter-all-r16-bin"},
};

static gn_tensor_file *golden(void) {
    gn_tensor_file *file = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_open(&file, DATA "logits.safetensors", &err), GN_OK, "%s",
                 err.message);
    return file;
}

static const void *tensor(const gn_tensor_file *file, const char *name, size_t bytes) {
    const gn_file_tensor *t = gn_tensor_file_find(file, name);
    cr_assert(t && t->bytes == bytes, "%s", name);
    return t->data;
}

static gn_model *open_model(const char *name, gn_compute compute) {
    char dir[512];
    gn_error err = {0};
    gn_model *model = NULL;
    const char *device = getenv("GN_TEST_DEVICE");
    const gn_model_options options = {
        .device = device ? device : "cpu", .compute = compute, .as_stored = true};
    snprintf(dir, sizeof dir, DATA "%s", name);
    cr_assert_eq(gn_model_open(&model, dir, &options, &err), GN_OK, "%s", err.message);
    return model;
}

static gn_adapter *open_adapter(const gn_model *model, const char *name) {
    char dir[512];
    gn_error err = {0};
    gn_adapter *adapter = NULL;
    if (!name) return NULL;
    snprintf(dir, sizeof dir, DATA "%s", name);
    cr_assert_eq(gn_adapter_open(&adapter, model, dir, &err), GN_OK, "%s", err.message);
    return adapter;
}

static void keep_row(void *user, int32_t position, const float *logits) {
    memcpy((float *)user + (size_t)position * VOCAB, logits, VOCAB * sizeof *logits);
}

static double relative_l2(const float *x, const float *reference, size_t n) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)x[i] - reference[i]) * ((double)x[i] - reference[i]);
        norm += (double)reference[i] * reference[i];
    }
    return sqrt(difference / norm);
}

static void check_forms(gn_compute compute, gn_kv_dtype kv, double least, double tolerance) {
    gn_tensor_file *file = golden();
    int32_t ids[TOKENS];
    float reference[TOKENS * VOCAB], logits[TOKENS * VOCAB];
    memcpy(ids, tensor(file, "input_ids", sizeof ids), sizeof ids);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gn_model *model = open_model(cases[i].base, compute);
        gn_adapter *adapter = open_adapter(model, cases[i].adapter);
        const gn_adapter_use use = {adapter, 1};
        gn_scorer *scorer = NULL;
        cr_assert_eq(gn_scorer_open(&scorer, model, TOKENS, kv, NULL), GN_OK);
        memset(logits, 0xff, sizeof logits);
        cr_assert_eq(gn_scorer_run(scorer, ids, TOKENS, 0, &use, adapter != NULL, keep_row, logits),
                     GN_OK);
        memcpy(reference, tensor(file, cases[i].tensor, sizeof reference), sizeof reference);
        const double error = relative_l2(logits, reference, TOKENS * VOCAB);
        fprintf(stderr, "%s: %-36s relative L2 %.2e\n", gn_model_describe(model).device,
                cases[i].tensor, error);
        cr_assert(error >= least && error < tolerance, "%s: relative L2 %g", cases[i].tensor,
                  error);
        gn_scorer_close(scorer);
        gn_adapter_close(adapter);
        gn_model_close(model);
    }
    gn_tensor_file_close(file);
}

Test(golden_logits, every_form_is_within_1e_4) {
    check_forms(GN_COMPUTE_F32, GN_KV_AUTO, 0, 1e-4);
}

Test(golden_logits, in_bfloat16_every_form_is_within_2e_2) {
    check_forms(GN_COMPUTE_BF16, GN_KV_AUTO, 0, 2e-2);
}

/* No further off than a code may be from what it stands for, but off. */
Test(golden_logits, with_fp8_keys_and_values_every_form_is_within_2_to_the_minus_4) {
    check_forms(GN_COMPUTE_F32, GN_KV_FP8, 1e-4, 0x1p-4);
}

/* ---- greedy continuations, through the engine ---- */

typedef struct reply {
    pthread_mutex_t lock;
    pthread_cond_t done;
    int32_t ids[64];
    int n;
    gn_finish finish;
} reply;

static void on_event(void *user, const gn_event *event) {
    reply *r = user;
    pthread_mutex_lock(&r->lock);
    if (event->has_token && r->n < 64) r->ids[r->n++] = event->token.id;
    r->finish = event->finish;
    pthread_cond_signal(&r->done);
    pthread_mutex_unlock(&r->lock);
}

Test(golden_logits, greedy_text_is_equal_where_the_margin_is_clear) {
    enum { PROMPT = 8, NEW = 24 };
    static const struct {
        const char *adapter, *ids, *margin;
    } runs[] = {
        {NULL, "greedy.base", "greedy_margin.base"},
        {"adapter-all-r8", "greedy.adapter-all-r8", "greedy_margin.adapter-all-r8"},
        {"adapter-attn-r4", "greedy.adapter-attn-r4", "greedy_margin.adapter-attn-r4"},
    };
    gn_tensor_file *file = golden();
    gn_model *model = open_model("tiny-bnb-nf4", GN_COMPUTE_F32);
    gn_engine *engine = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_engine_open(&engine, model, NULL, &err), GN_OK, "%s", err.message);
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        int32_t expected[PROMPT + NEW];
        float margin[NEW];
        memcpy(expected, tensor(file, runs[i].ids, sizeof expected), sizeof expected);
        memcpy(margin, tensor(file, runs[i].margin, sizeof margin), sizeof margin);
        gn_adapter *adapter = open_adapter(model, runs[i].adapter);
        reply r = {.lock = PTHREAD_MUTEX_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};
        gn_request request = {.prompt = expected,
                              .n_prompt = PROMPT,
                              .adapters = {{adapter, 1}},
                              .n_adapters = adapter != NULL,
                              .sampling = GN_SAMPLING_DEFAULT,
                              .max_tokens = NEW,
                              .logprobs = -1,
                              .ignore_eos = true,
                              .on_event = on_event,
                              .user = &r};
        request.sampling.temperature = 0;
        cr_assert_eq(gn_engine_submit(engine, &request, NULL, &err), GN_OK, "%s", err.message);
        pthread_mutex_lock(&r.lock);
        while (r.finish == GN_FINISH_NONE) pthread_cond_wait(&r.done, &r.lock);
        pthread_mutex_unlock(&r.lock);
        cr_assert_eq(r.finish, GN_FINISH_LENGTH);
        cr_assert_eq(r.n, NEW);
        int compared = 0;
        for (; compared < NEW && margin[compared] > 1e-3f; compared++)
            cr_assert_eq(r.ids[compared], expected[PROMPT + compared], "%s, token %d", runs[i].ids,
                         compared);
        fprintf(stderr, "%-24s %d of %d tokens before the first unclear margin, all equal\n",
                runs[i].ids, compared, NEW);
        cr_assert_gt(compared, 0);
        gn_adapter_close(adapter);
    }
    gn_engine_close(engine);
    gn_model_close(model);
    gn_tensor_file_close(file);
}
