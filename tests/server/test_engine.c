/* test_engine.c - the real engine behind HTTP: golden logits as an evaluation harness reads them,
 * and many streams over changing adapters that say what each says alone. */
#include "tests/server/client.c"

#include <math.h>

#include "engine/tensor_file.h"

#define DATA GN_SOURCE_DIR "/tests/golden/data/"

enum { VOCAB = 512, TOKENS = 48 };

static gn_model *open_model(void) {
    const gn_model_options options = {
        .device = "cpu", .compute = GN_COMPUTE_F32, .as_stored = true};
    gn_error err = {0};
    gn_model *model = NULL;
    cr_assert_eq(gn_model_open(&model, DATA "tiny-bnb-nf4", &options, &err), GN_OK, "%s",
                 err.message);
    return model;
}

static gn_model *start(harness *h) {
    static const gn_server_options options = {
        .model_name = "tiny", .allow_adapter_loading = true, .adapter_dir = DATA};
    gn_engine *engine = NULL;
    gn_error err = {0};
    gn_model *model = open_model();
    open_server(h, &options);
    cr_assert_eq(gn_engine_open(&engine, model, NULL, &err), GN_OK, "%s", err.message);
    cr_assert_eq(gn_server_serve(h->server, model, engine, &err), GN_OK, "%s", err.message);
    add_adapter(h, model, "all", DATA "adapter-all-r8");
    add_adapter(h, model, "attn", DATA "adapter-attn-r4");
    run_in_thread(h);
    return model;
}

static void stop(harness *h, gn_model *model) {
    close_server(h);
    gn_model_close(model);
}

static const void *tensor(const gn_tensor_file *file, const char *name, size_t bytes) {
    const gn_file_tensor *t = gn_tensor_file_find(file, name);
    cr_assert(t && t->bytes == bytes, "%s", name);
    return t->data;
}

/* "[1,2,3]" */
static char *write_ids(const int32_t *ids, int n) {
    char *text = malloc((size_t)n * 12 + 3);
    int at = sprintf(text, "[");
    for (int i = 0; i < n; i++) at += sprintf(text + at, "%s%d", i ? "," : "", ids[i]);
    strcpy(text + at, "]");
    return text;
}

static double log_softmax(const float *logits, int32_t id) {
    double largest = logits[0], sum = 0;
    for (int i = 1; i < VOCAB; i++) largest = fmax(largest, logits[i]);
    for (int i = 0; i < VOCAB; i++) sum += exp(logits[i] - largest);
    return logits[id] - largest - log(sum);
}

Test(engine, golden_logprobs_over_http) {
    static const struct {
        const char *model, *tensor;
    } cases[] = {{"tiny", "logits.nf4_dq"},
                 {"all", "logits.nf4_dq+adapter-all-r8"},
                 {"attn", "logits.nf4_dq+adapter-attn-r4"}};
    static float logits[TOKENS * VOCAB];
    int32_t ids[TOKENS];
    gn_tensor_file *file = NULL;
    harness h;
    gn_model *model = start(&h);
    cr_assert_eq(gn_safetensors_open(&file, DATA "logits.safetensors", NULL), GN_OK);
    memcpy(ids, tensor(file, "input_ids", sizeof ids), sizeof ids);
    char *prompt = write_ids(ids, TOKENS), body[1024];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        memcpy(logits, tensor(file, cases[i].tensor, sizeof logits), sizeof logits);
        snprintf(body, sizeof body,
                 "{\"model\":\"%s\",\"prompt\":%s,\"echo\":true,\"logprobs\":1,\"max_tokens\":0}",
                 cases[i].model, prompt);
        char *answer = post(&h, "/v1/completions", body);
        cr_assert_eq(status_of(answer), 200, "%s", answer);
        cJSON *json = json_of(answer);
        const cJSON *list = at(json, "choices.0.logprobs.token_logprobs");
        cr_assert_eq(cJSON_GetArraySize(list), TOKENS);
        double difference = 0, norm = 0;
        for (int t = 1; t < TOKENS; t++) {
            const double expected = log_softmax(logits + (size_t)(t - 1) * VOCAB, ids[t]);
            const double got = cJSON_GetArrayItem(list, t)->valuedouble;
            difference += (got - expected) * (got - expected);
            norm += expected * expected;
        }
        const double error = sqrt(difference / norm);
        cr_assert(error < 1e-4, "%s: relative L2 %g", cases[i].tensor, error);
        cJSON_Delete(json);
        free(answer);
    }
    free(prompt);
    gn_tensor_file_close(file);
    stop(&h, model);
}

/* ---- many streams ---- */

static const char *const variants[] = {
    "\"model\":\"tiny\"", "\"model\":\"all\"", "\"model\":\"attn\"",
    "\"adapters\":[{\"name\":\"all\",\"scale\":0.5},{\"name\":\"attn\",\"scale\":0.75}]"};
enum { VARIANTS = 4, PROMPTS = 8, STREAMS = VARIANTS * PROMPTS, RELOADS = 100 };

static void ask_stream(int fd, int variant, int prompt) {
    char body[512];
    snprintf(body, sizeof body,
             "{%s,\"prompt\":[1,%d,%d,40],\"max_tokens\":48,\"temperature\":0,\"stream\":true,"
             "\"ignore_eos\":true}",
             variants[variant], 20 + prompt, 300 - 7 * prompt);
    say_post(fd, "/v1/completions", "Connection: close\r\n", body);
}

/* The text of a stream, put together. */
static char *text_of(char *answer) {
    cr_assert_eq(status_of(answer), 200, "%s", answer);
    char *text = calloc(strlen(answer) + 1, 1);
    for (char *event = strstr(unchunk(answer), "data: {"); event;
         event = strstr(event, "data: {")) {
        char *end = strchr(event, '\n');
        *end = 0;
        cJSON *json = cJSON_Parse(event + 6);
        cr_assert(json && !at(json, "error"), "%s", event);
        strcat(text, text_at(json, "choices.0.text"));
        cJSON_Delete(json);
        event = end + 1;
    }
    free(answer);
    return text;
}

static void call(const harness *h, const char *path, const char *body) {
    char *answer = post(h, path, body);
    cr_assert_eq(status_of(answer), 200, "%s\n%s", body, answer);
    free(answer);
}

Test(engine, streams_over_changing_adapters) {
    harness h;
    char *alone[STREAMS];
    int fds[STREAMS];
    gn_model *model = start(&h);
    for (int i = 0; i < STREAMS; i++) {
        const int fd = dial(&h);
        ask_stream(fd, i % VARIANTS, i / VARIANTS);
        alone[i] = text_of(hear(fd, NULL));
        close(fd);
    }
    cr_assert_str_neq(alone[0], alone[1]); /* the adapters do something */
    cr_assert_str_neq(alone[1], alone[3]);
    for (int i = 0; i < STREAMS; i++) {
        fds[i] = dial(&h);
        ask_stream(fds[i], i % VARIANTS, i / VARIANTS);
    }
    /* A response that has begun has its adapters. */
    for (int i = 0; i < STREAMS; i++) cr_assert(readable(fds[i], PATIENCE_MS));
    /* The names that run mean other weights for a while, then the first again. */
    for (int i = 0; i < RELOADS; i++) {
        call(&h, "/v1/load_lora_adapter",
             i % 2
                 ? "{\"lora_name\":\"all\",\"lora_path\":\"adapter-all-r8\",\"load_inplace\":true}"
                 : "{\"lora_name\":\"all\",\"lora_path\":\"adapter-rslora-r16\","
                   "\"load_inplace\":true}");
        call(&h, "/v1/load_lora_adapter",
             "{\"lora_name\":\"other\",\"lora_path\":\"adapter-attn-r4\"}");
        call(&h, "/v1/unload_lora_adapter", "{\"lora_name\":\"other\"}");
    }
    for (int i = 0; i < STREAMS; i++) {
        char *text = text_of(hear(fds[i], NULL));
        cr_assert_str_eq(text, alone[i], "stream %d", i);
        free(text);
        free(alone[i]);
        close(fds[i]);
    }
    stop(&h, model);
}
