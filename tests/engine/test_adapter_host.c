/* Adapters' weights in the host's memory: who leaves, what comes back from disk, and what happens
 * when the files there are not what they were. Reads are counted. */
#include "engine/adapter_host.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "engine/adapter.h"
#include "engine/model.h"
#include "tests/support/folder.h"

#define GOLDEN GN_SOURCE_DIR "/tests/golden/data/"

enum { ADAPTERS = 4 };

TestSuite(adapter_host, .init = test_folder_make, .fini = test_folder_remove);

/* One kind of shape, and two of content. */
static const char *const sources[] = {GOLDEN "adapter-all-r8", GOLDEN "adapter-init-r8"};
static const char *const names[ADAPTERS] = {"a", "b", "c", "d"};

static void copy_file(const char *dir, const char *name, const char *file) {
    char from[512], to[64];
    snprintf(from, sizeof from, "%s/%s", dir, file);
    snprintf(to, sizeof to, "%s/%s", name, file);
    test_copy(from, to);
}

static void copy_adapter(const char *dir, const char *name) {
    mkdir(test_path(name), 0700);
    copy_file(dir, name, "adapter_config.json");
    copy_file(dir, name, "adapter_model.safetensors");
}

typedef struct shelf {
    gn_model *model;
    gn_adapter *adapters[ADAPTERS]; /* in folders of their own; opened in this order */
    int64_t size;                   /* of each */
} shelf;

static gn_model *open_model(int64_t budget) {
    gn_model *model;
    gn_error err = {0};
    const gn_model_options options = {
        .device = "cpu", .compute = GN_COMPUTE_F32, .threads = 1, .adapter_host_bytes = budget};
    cr_assert_eq(gn_model_open(&model, GOLDEN "tiny-bf16", &options, &err), GN_OK, "%s",
                 err.message);
    return model;
}

static gn_adapter *open_adapter(const gn_model *model, const char *dir) {
    gn_adapter *adapter;
    gn_error err = {0};
    cr_assert_eq(gn_adapter_open(&adapter, model, dir, &err), GN_OK, "%s", err.message);
    return adapter;
}

static int64_t size_of_one(void) {
    gn_model *model = open_model(0);
    gn_adapter *adapter = open_adapter(model, sources[0]);
    const int64_t size = (int64_t)gn_adapter_bytes(adapter);
    gn_adapter_close(adapter);
    gn_model_close(model);
    return size;
}

/* Memory for `n` of them. */
static shelf shelf_open(int n) {
    shelf s = {.size = size_of_one()};
    s.model = open_model(n * s.size);
    for (int i = 0; i < ADAPTERS; i++) {
        copy_adapter(sources[i % 2], names[i]);
        s.adapters[i] = open_adapter(s.model, test_path(names[i]));
        cr_assert_eq((int64_t)gn_adapter_bytes(s.adapters[i]), s.size);
    }
    return s;
}

static gn_adapter_host_stats stats_of(const shelf *s) {
    return gn_adapter_host_read_stats(s->model->adapters);
}

static void pause_briefly(void) {
    nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
}

static void wait_for_bytes(const shelf *s, int64_t bytes) {
    for (int i = 0; i < 100000 && stats_of(s).bytes > bytes; i++) pause_briefly();
    cr_assert_eq(stats_of(s).bytes, bytes);
}

static void shelf_close(shelf *s) {
    for (int i = 0; i < ADAPTERS; i++) gn_adapter_close(s->adapters[i]);
    wait_for_bytes(s, 0); /* the reader may have a reference still */
    gn_model_close(s->model);
}

/* Until the weights are there, or cannot be. */
static gn_status wait_for(gn_adapter *adapter, gn_error *err) {
    gn_status status = GN_OK;
    bool ready = false;
    for (int i = 0; i < 100000 && !ready && !status; i++) {
        status = gn_adapter_poll(adapter, &ready, err);
        if (!ready) pause_briefly();
    }
    cr_assert(ready || status);
    return status;
}

static bool is_there(gn_adapter *adapter) {
    bool ready;
    gn_adapter_hold(adapter);
    cr_assert_eq(gn_adapter_poll(adapter, &ready, NULL), GN_OK);
    gn_adapter_release(adapter);
    return ready;
}

static void assert_weights(const gn_adapter *adapter, const gn_adapter *expected) {
    cr_assert_eq(adapter->bytes, expected->bytes);
    for (int i = 0; i < adapter->layers * GN_PROJ_COUNT; i++) {
        const gn_lora_pair *p = &adapter->pairs[i / GN_PROJ_COUNT][i % GN_PROJ_COUNT];
        const gn_lora_pair *q = &expected->pairs[i / GN_PROJ_COUNT][i % GN_PROJ_COUNT];
        const gn_tensor *both[][2] = {{&p->a, &q->a}, {&p->b, &q->b}};
        cr_assert_eq(p->rank, q->rank);
        cr_assert_eq(p->scale, q->scale);
        for (int t = 0; t < 2; t++)
            cr_assert_eq(
                memcmp(both[t][0]->data, both[t][1]->data,
                       (size_t)gn_tensor_numel(both[t][0]) * gn_dtype_size(both[t][0]->dtype)),
                0);
    }
}

Test(adapter_host, the_least_recently_held_leaves_and_comes_back) {
    shelf s = shelf_open(2);
    gn_model *plain = open_model(0);
    gn_adapter *expected = open_adapter(plain, sources[0]);
    cr_assert_eq(stats_of(&s).bytes, 2 * s.size, "of four two are in memory");
    cr_assert_eq(stats_of(&s).reads, 0);
    for (int i = 0; i < 2; i++) cr_assert_null(s.adapters[i]->memory);

    gn_adapter_hold(s.adapters[0]);
    gn_adapter_hold(s.adapters[0]);
    cr_assert_eq(wait_for(s.adapters[0], NULL), GN_OK);
    assert_weights(s.adapters[0], expected);
    cr_assert_eq(stats_of(&s).reads, 1, "once for both who hold it");
    cr_assert_eq(stats_of(&s).bytes, 2 * s.size);
    cr_assert_null(s.adapters[2]->memory, "it came before the fourth");
    cr_assert(is_there(s.adapters[3]));

    gn_adapter_hold(s.adapters[3]);
    gn_adapter_hold(s.adapters[1]);
    cr_assert_eq(wait_for(s.adapters[1], NULL), GN_OK);
    cr_assert_eq(stats_of(&s).bytes, 3 * s.size, "what is held stays");
    cr_assert_eq(stats_of(&s).reads, 2);
    gn_adapter_release(s.adapters[3]);
    wait_for_bytes(&s, 2 * s.size);
    cr_assert_null(s.adapters[3]->memory);
    cr_assert(is_there(s.adapters[1]) && is_there(s.adapters[0]));

    gn_adapter_release(s.adapters[0]);
    gn_adapter_release(s.adapters[0]);
    gn_adapter_release(s.adapters[1]);
    cr_assert_eq(stats_of(&s).reads, 2);
    gn_adapter_close(expected);
    gn_model_close(plain);
    shelf_close(&s);
}

static void assert_lost(gn_adapter *adapter, gn_status status, const char *file) {
    gn_error err = {0};
    cr_assert_eq(wait_for(adapter, &err), status, "%s", err.message);
    cr_assert(strstr(err.message, test_path(file)), "%s", err.message);
}

Test(adapter_host, other_files_are_an_error_that_names_them) {
    static const char weights[] = "a/adapter_model.safetensors", config[] = "a/adapter_config.json";
    shelf s = shelf_open(1);
    gn_adapter *a = s.adapters[0];

    copy_file(sources[1], "a", "adapter_model.safetensors");
    gn_adapter_hold(a);
    assert_lost(a, GN_EMISMATCH, weights);
    gn_adapter_hold(a);
    assert_lost(a, GN_EMISMATCH, weights);
    cr_assert_eq(stats_of(&s).reads, 1, "it stays lost for those who hold it");
    gn_adapter_release(a);
    gn_adapter_release(a);

    cr_assert_eq(unlink(test_path(weights)), 0);
    gn_adapter_hold(a);
    assert_lost(a, GN_ENOENT, "a");
    gn_adapter_release(a);

    copy_file(sources[0], "a", "adapter_model.safetensors");
    test_write_text(config, "{\"peft_type\": \"LORA\", \"r\": 8, \"lora_alpha\": 1}");
    gn_adapter_hold(a);
    assert_lost(a, GN_EMISMATCH, config);
    gn_adapter_release(a);

    copy_file(sources[0], "a", "adapter_config.json");
    gn_adapter_hold(a);
    cr_assert_eq(wait_for(a, NULL), GN_OK);
    gn_adapter_release(a);
    cr_assert_eq(stats_of(&s).reads, 4);
    shelf_close(&s);
}

Test(adapter_host, one_that_is_too_large_is_refused) {
    const int64_t size = size_of_one();
    gn_model *model = open_model(size - 1);
    gn_adapter *adapter;
    gn_error err = {0};
    char sizes[64];
    cr_assert_eq(gn_adapter_open(&adapter, model, sources[0], &err), GN_ETOOBIG);
    snprintf(sizes, sizeof sizes, "takes %.1f MiB", (double)size / 0x1p20);
    cr_assert(strstr(err.message, sizes) && strstr(err.message, sources[0]), "%s", err.message);
    gn_model_close(model);
}

/* ---- from several threads ---- */

typedef struct walker {
    const shelf *s;
    gn_adapter *const *expected; /* by content */
    unsigned seed;
    atomic_int *seen;
} walker;

static void *walk(void *argument) {
    walker *w = argument;
    for (int i = 0; i < 60; i++) {
        const int which = rand_r(&w->seed) % ADAPTERS;
        gn_adapter *adapter = w->s->adapters[which];
        gn_adapter_hold(adapter);
        if (rand_r(&w->seed) % 4) { /* else it is let go before it is there */
            cr_assert_eq(wait_for(adapter, NULL), GN_OK);
            assert_weights(adapter, w->expected[which % 2]);
            ++*w->seen;
        }
        gn_adapter_release(adapter);
    }
    return NULL;
}

Test(adapter_host, many_hold_and_release) {
    enum { THREADS = 3 };
    shelf s = shelf_open(2);
    gn_model *plain = open_model(0);
    gn_adapter *expected[] = {open_adapter(plain, sources[0]), open_adapter(plain, sources[1])};
    pthread_t threads[THREADS];
    walker walkers[THREADS];
    atomic_int seen = 0;
    for (int i = 0; i < THREADS; i++) {
        walkers[i] = (walker){&s, expected, (unsigned)i, &seen};
        cr_assert_eq(pthread_create(&threads[i], NULL, walk, &walkers[i]), 0);
    }
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    cr_assert_gt(seen, 0);
    cr_assert_gt(stats_of(&s).reads, 0);
    for (int i = 0; i < 2; i++) gn_adapter_close(expected[i]);
    gn_model_close(plain);
    shelf_close(&s);
}

/* ---- requests ---- */

typedef struct outcome {
    gn_finish finish;
    gn_error error;
    int tokens;
    atomic_bool ended;
} outcome;

static void on_event(void *user, const gn_event *event) {
    outcome *o = user;
    o->tokens += event->has_token;
    if (event->finish == GN_FINISH_NONE) return;
    o->finish = event->finish;
    if (event->error) o->error = *event->error;
    atomic_store(&o->ended, true);
}

static void submit(gn_engine *engine, gn_adapter *adapter, outcome *o) {
    static const int32_t prompt[] = {1, 2, 3};
    gn_error err = {0};
    gn_request r = {.prompt = prompt,
                    .n_prompt = 3,
                    .sampling = GN_SAMPLING_DEFAULT,
                    .max_tokens = 4,
                    .logprobs = -1,
                    .ignore_eos = true,
                    .on_event = on_event,
                    .user = o};
    if (adapter) r.adapters[r.n_adapters++] = (gn_adapter_use){adapter, 1};
    memset(o, 0, sizeof *o);
    cr_assert_eq(gn_engine_submit(engine, &r, NULL, &err), GN_OK, "%s", err.message);
}

static void wait_for_end(const outcome *o) {
    for (int i = 0; i < 100000 && !atomic_load(&o->ended); i++) pause_briefly();
    cr_assert(atomic_load(&o->ended));
}

Test(adapter_host, a_request_whose_adapter_is_gone_fails_alone) {
    shelf s = shelf_open(2);
    gn_engine *engine;
    gn_error err = {0};
    outcome outcomes[ADAPTERS + 1];
    const gn_engine_options options = {.max_seqs = 2, .kv_bytes = 64 << 20};
    cr_assert_eq(gn_engine_open(&engine, s.model, &options, &err), GN_OK, "%s", err.message);
    copy_file(sources[1], "a", "adapter_model.safetensors");
    for (int i = 0; i < ADAPTERS; i++) submit(engine, s.adapters[i], &outcomes[i]);
    submit(engine, NULL, &outcomes[ADAPTERS]);
    for (int i = 0; i <= ADAPTERS; i++) {
        wait_for_end(&outcomes[i]);
        if (i == 0) continue;
        cr_assert_eq(outcomes[i].finish, GN_FINISH_LENGTH, "%s", outcomes[i].error.message);
        cr_assert_eq(outcomes[i].tokens, 4);
    }
    cr_assert_eq(outcomes[0].finish, GN_FINISH_ERROR);
    cr_assert(strstr(outcomes[0].error.message, test_path("a/adapter_model.safetensors")), "%s",
              outcomes[0].error.message);
    copy_file(sources[0], "a", "adapter_model.safetensors");
    submit(engine, s.adapters[0], &outcomes[0]);
    wait_for_end(&outcomes[0]);
    cr_assert_eq(outcomes[0].finish, GN_FINISH_LENGTH, "it is there again");
    cr_assert_geq(gn_engine_read_stats(engine).adapter_reads, 3);
    cr_assert_leq(gn_engine_read_stats(engine).adapter_host_bytes, 2 * s.size);
    gn_engine_close(engine);
    shelf_close(&s);
}
