/* bench_adapters.c - what a cold adapter costs itself and others; run by hand, not a test.
 *
 * usage: bench_adapters [SHAPE [RANK [HOST_MIB]]] (llama-7b 64). Some streams of the base reply
 * without end. Beside them requests come one by one with an adapter that is on the device, and then
 * with four that are not, of which two fit there: milliseconds to their first token, and between
 * the tokens of the streams meanwhile. They come from the host's memory, or, when HOST_MIB do not
 * hold two, from disk. An adapter of random weights is written to $TMPDIR (/tmp), and removed. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/adapter_memory.h"
#include "engine/model.h"
#include "engine/tensor_file.h"
#include "tests/gpu/bench.h"

enum { STREAMS = 8, ADAPTERS = 4, ROUNDS = 40, PROMPT = 128, TOKENS = 1 << 14, MAX_NAME = 128 };

/* ---- adapters ---- */

static int64_t fill_entries(gn_file_tensor *entries, char (*names)[MAX_NAME], const gn_config *c,
                            int rank) {
    int n = 0;
    int64_t largest = 0;
    for (int layer = 0; layer < c->layers; layer++)
        for (int p = 0; p < GN_PROJ_COUNT; p++)
            for (int half = 0; half < 2; half++, n++) {
                const int64_t rows = half ? gn_proj_rows(c, (gn_proj)p) : rank;
                const int64_t cols = half ? rank : gn_proj_cols(c, (gn_proj)p);
                snprintf(names[n], MAX_NAME, "base_model.model.model.layers.%d.%s.lora_%c.weight",
                         layer, gn_proj_names[p], half ? 'B' : 'A');
                entries[n] = (gn_file_tensor){.name = names[n],
                                              .dtype = GN_BF16,
                                              .ndim = 2,
                                              .shape = {rows, cols},
                                              .bytes = (size_t)(rows * cols) * 2};
                if (rows * cols > largest) largest = rows * cols;
            }
    return largest;
}

static void write_adapter(const char *dir, const gn_config *c, int rank) {
    const size_t n = (size_t)c->layers * GN_PROJ_COUNT * 2;
    gn_file_tensor *entries = calloc(n, sizeof *entries);
    char(*names)[MAX_NAME] = calloc(n, sizeof *names), path[4200];
    gn_error err = {0};
    gn_safetensors_writer *writer;
    const int64_t largest = fill_entries(entries, names, c, rank);
    uint16_t *values = malloc((size_t)largest * sizeof *values);
    for (int64_t i = 0; i < largest; i++)
        values[i] = gn_f32_to_bf16(((float)rand() / (float)RAND_MAX - 0.5f) * 0.01f);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", dir);
    check(gn_safetensors_create(&writer, path, entries, n, NULL, &err), &err);
    for (size_t i = 0; i < n; i++)
        check(gn_safetensors_write(writer, values, entries[i].bytes, &err), &err);
    check(gn_safetensors_commit(writer, &err), &err);
    snprintf(path, sizeof path, "%s/adapter_config.json", dir);
    FILE *f = fopen(path, "w");
    if (!f) check(GN_EIO, &err);
    fprintf(f,
            "{\"peft_type\": \"LORA\", \"r\": %d, \"lora_alpha\": %d, \"target_modules\": "
            "[\"q_proj\", \"k_proj\", \"v_proj\", \"o_proj\", \"gate_proj\", \"up_proj\", "
            "\"down_proj\"]}",
            rank, rank);
    fclose(f);
    free(values);
    free(names);
    free(entries);
}

static void open_adapters(gn_adapter **adapters, const gn_model *model, int rank, char *dir,
                          size_t size) {
    gn_error err = {0};
    const char *tmp = getenv("TMPDIR");
    snprintf(dir, size, "%s/bench_adapters.XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(dir)) check(GN_EIO, &err);
    write_adapter(dir, &model->config, rank);
    for (int i = 0; i < ADAPTERS; i++) check(gn_adapter_open(&adapters[i], model, dir, &err), &err);
}

static void remove_folder(const char *dir) {
    char path[4200];
    static const char *const files[] = {"adapter_model.safetensors", "adapter_config.json"};
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, files[i]);
        unlink(path);
    }
    rmdir(dir);
}

/* ---- requests ---- */

typedef struct request {
    uint64_t id;
    double begin, first, last, worst_gap; /* seconds */
    double gaps;
    int tokens;
    bool ended;
} request;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

static void on_event(void *user, const gn_event *event) {
    request *r = user;
    const double now = seconds();
    pthread_mutex_lock(&lock);
    if (event->has_token) {
        if (r->tokens++ == 0) {
            r->first = now;
        } else {
            r->gaps += now - r->last;
            if (now - r->last > r->worst_gap) r->worst_gap = now - r->last;
        }
        r->last = now;
    }
    r->ended |= event->finish != GN_FINISH_NONE;
    if (event->finish == GN_FINISH_ERROR)
        fprintf(stderr, "bench_adapters: %s\n", event->error->message);
    pthread_cond_signal(&changed);
    pthread_mutex_unlock(&lock);
}

static void submit(gn_engine *engine, const gn_model *model, request *r, gn_adapter *adapter,
                   int tokens) {
    static int32_t number;
    int32_t prompt[PROMPT];
    gn_error err = {0};
    number++;
    for (int i = 0; i < PROMPT; i++)
        prompt[i] = (int32_t)(((int64_t)number * 7919 + i * 104729 + 3) % model->config.vocab);
    const gn_request q = {.prompt = prompt,
                          .n_prompt = PROMPT,
                          .adapters = {{adapter, 1}},
                          .n_adapters = adapter ? 1 : 0,
                          .sampling = GN_SAMPLING_DEFAULT,
                          .max_tokens = tokens,
                          .logprobs = -1,
                          .ignore_eos = true,
                          .on_event = on_event,
                          .user = r};
    *r = (request){.begin = seconds()};
    check(gn_engine_submit(engine, &q, &r->id, &err), &err);
}

static void await_end(request *r) {
    pthread_mutex_lock(&lock);
    while (!r->ended) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* ---- measuring ---- */

static void forget_gaps(request *streams) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < STREAMS; i++) {
        streams[i].worst_gap = streams[i].gaps = 0;
        streams[i].tokens = streams[i].tokens > 0;
    }
    pthread_mutex_unlock(&lock);
}

/* Requests one by one, round i with adapters[i % n]. */
static void measure(const char *what, gn_engine *engine, const gn_model *model, request *streams,
                    gn_adapter **adapters, int n) {
    double first[ROUNDS], worst = 0, mean = 0;
    request r;
    forget_gaps(streams);
    for (int i = 0; i < ROUNDS; i++) {
        submit(engine, model, &r, n ? adapters[i % n] : NULL, 4);
        await_end(&r);
        first[i] = r.first - r.begin;
    }
    qsort(first, ROUNDS, sizeof *first, by_value);
    pthread_mutex_lock(&lock);
    for (int i = 0; i < STREAMS; i++) {
        if (streams[i].worst_gap > worst) worst = streams[i].worst_gap;
        if (streams[i].tokens > 1) mean += streams[i].gaps / (streams[i].tokens - 1) / STREAMS;
    }
    pthread_mutex_unlock(&lock);
    printf("%-22s first token %7.2f ms (median), %7.2f (worst); gaps of the streams %6.2f ms "
           "(mean), %6.2f (worst)\n",
           what, 1e3 * first[ROUNDS / 2], 1e3 * first[ROUNDS - 1], 1e3 * mean, 1e3 * worst);
}

int main(int argc, char **argv) {
    const int rank = argc > 2 ? atoi(argv[2]) : 64;
    const char *device = getenv("GN_TEST_DEVICE");
    const gn_model_options model_options = {.device = device ? device : "cuda",
                                            .adapter_host_bytes =
                                                argc > 3 ? (int64_t)atoi(argv[3]) << 20 : 0};
    char dir[4096];
    gn_adapter *adapters[ADAPTERS];
    gn_model *model;
    gn_engine *engine;
    request streams[STREAMS];
    gn_error err = {0};
    check(gn_model_synthetic(&model, argc > 1 ? argv[1] : "llama-7b", &model_options, &err), &err);
    if (model->config.max_positions < PROMPT + TOKENS)
        model->config.max_positions = PROMPT + TOKENS; /* random weights know no longest context */
    open_adapters(adapters, model, rank, dir, sizeof dir);
    const gn_engine_options options = {.max_seqs = STREAMS + 1,
                                       .context = PROMPT + TOKENS,
                                       .adapter_bytes = 2 * gn_adapter_memory_bytes(adapters[0]),
                                       .no_prefix_cache = true};
    check(gn_engine_open(&engine, model, &options, &err), &err);
    const gn_memory_plan plan = gn_engine_memory(engine);
    char *table = gn_memory_plan_text(&plan);
    printf("%s, adapters of rank %d and %.1f MiB\n%s", gn_ctx_device(model->ctx), rank,
           (double)gn_adapter_bytes(adapters[0]) / 0x1p20, table ? table : "");
    free(table);
    for (int i = 0; i < STREAMS; i++) submit(engine, model, &streams[i], NULL, TOKENS);
    measure("warming up", engine, model, streams, adapters, ADAPTERS);
    measure("no adapter", engine, model, streams, NULL, 0);
    measure("one that is there", engine, model, streams, adapters, 1);
    measure("cold ones", engine, model, streams, adapters, ADAPTERS);
    for (int i = 0; i < STREAMS; i++) {
        gn_engine_cancel(engine, streams[i].id);
        await_end(&streams[i]);
    }
    printf("%lld folders read again\n", (long long)gn_engine_read_stats(engine).adapter_reads);
    gn_engine_close(engine);
    remove_folder(dir);
    for (int i = 0; i < ADAPTERS; i++) gn_adapter_close(adapters[i]);
    gn_model_close(model);
    return 0;
}
