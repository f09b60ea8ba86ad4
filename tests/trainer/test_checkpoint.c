/* Checkpoints: a run goes on bit for bit; damage of any file is noticed and the one before taken;
 * full disks and kills at any moment harm nothing that was saved. */
#include "trainer/checkpoint.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "engine/json_file.h"
#include "engine/save_folder.h"
#include "engine/tensor_file.h"
#include "tests/support/folder.h"

TestSuite(checkpoint, .init = test_folder_make, .fini = test_folder_remove);

/* ---- a run ---- */

static const gn_parameter shapes[] = {
    {.name = "model.layers.0.self_attn.q_proj.lora_A.weight", .ndim = 2, .shape = {4, 300}},
    {.name = "model.layers.0.self_attn.q_proj.lora_B.weight", .ndim = 2, .shape = {77, 4}},
};
enum { N = sizeof shapes / sizeof *shapes };

static const gn_adapter_config adapter = {"base", 4, 16, 0.1, false, GN_F32};

typedef struct run {
    gn_ctx *ctx;
    gn_parameters *p;
    gn_optimizer *o;
} run;

static run open_shapes(const gn_parameter *items, gn_dtype weights, bool eight_bit, size_t page) {
    run r;
    gn_error err = {0};
    const gn_optimizer_options options = {.eight_bit = eight_bit,
                                          .beta1 = 0.9f,
                                          .beta2 = 0.999f,
                                          .eps = 1e-8f,
                                          .budget = SIZE_MAX,
                                          .page_bytes = page};
    cr_assert_eq(gn_ctx_open(&r.ctx, &(gn_ctx_options){.device = "cpu", .threads = 1}, &err),
                 GN_OK);
    cr_assert_eq(gn_parameters_open(&r.p, r.ctx, items, N, weights, GN_F32, &err), GN_OK);
    cr_assert_eq(gn_optimizer_open(&r.o, r.p, &options, NULL, &err), GN_OK);
    return r;
}

static run open_run(gn_dtype weights, bool eight_bit, size_t page) {
    return open_shapes(shapes, weights, eight_bit, page);
}

static void close_run(run *r) {
    gn_optimizer_close(r->o);
    gn_parameters_close(r->p);
    gn_ctx_close(r->ctx);
}

static void steps(const run *r, int n) {
    for (int k = 0; k < n; k++) {
        for (size_t i = 0; i < N; i++) {
            const gn_tensor g = gn_parameter_grad(r->p, i);
            for (int64_t j = 0; j < r->p->items[i].numel; j++)
                ((float *)g.data)[j] =
                    cosf((float)j * 0.7f + (float)gn_optimizer_steps(r->o) + (float)i);
        }
        cr_assert_eq(gn_optimizer_step(r->o, 1e-2, 1), GN_OK);
    }
}

static void *masters(const run *r, size_t i) {
    void *data = test_alloc((size_t)r->p->items[i].numel * sizeof(float));
    cr_assert_eq(gn_optimizer_get(r->o, GN_STATE_MASTER, i, data), GN_OK);
    return data;
}

static gn_checkpoint_options options_of(int limit) {
    return (gn_checkpoint_options){test_path("out"), &adapter, limit};
}

/* Every number is the step's. */
static void mark(const run *r, int64_t step) {
    for (size_t i = 0; i < N; i++) {
        const int64_t n = r->p->items[i].numel;
        float *values = malloc((size_t)n * sizeof *values);
        for (int64_t j = 0; j < n; j++) values[j] = (float)(step + j);
        cr_assert_eq(gn_optimizer_set(r->o, GN_STATE_MASTER, i, values), GN_OK);
        free(values);
    }
}

static gn_status save_marked(const run *r, int64_t step, int limit, gn_error *err) {
    const gn_checkpoint_options options = options_of(limit);
    const gn_train_state state = {.step = step, .position = 3 * step, .best_loss = INFINITY};
    mark(r, step);
    return gn_checkpoint_save(&options, &state, r->o, err);
}

static void save(const run *r, int64_t step, int limit) {
    gn_error err = {0};
    cr_assert_eq(save_marked(r, step, limit, &err), GN_OK, "%s", err.message);
}

static char warnings[4096];

static void warn(void *user, const char *message) {
    (void)user;
    const size_t used = strlen(warnings);
    snprintf(warnings + used, sizeof warnings - used, "%s\n", message);
}

/* The step of the checkpoint that is found, checked to be what save_marked saved; -1: none. */
static int64_t found(const run *r) {
    char *path;
    gn_error err = {0};
    gn_train_state state;
    *warnings = 0;
    if (gn_checkpoint_find(&path, test_path("out"), warn, NULL, &err) != GN_OK) return -1;
    cr_assert_eq(gn_checkpoint_load(path, &state, r->o, &err), GN_OK, "%s", err.message);
    for (size_t i = 0; i < N; i++) {
        const float *values = masters(r, i);
        for (int64_t j = 0; j < r->p->items[i].numel; j++)
            cr_assert_eq(values[j], (float)(state.step + j));
    }
    cr_assert_eq(state.position, 3 * state.step);
    gn_train_state_close(&state);
    free(path);
    return state.step;
}

/* Names in the output folder, in no order, with no others beside `n`. */
static void expect_folders(int n, const char *const *names) {
    int count = 0;
    DIR *d = opendir(test_path("out"));
    for (struct dirent *entry; (entry = readdir(d));) count += entry->d_name[0] != '.';
    closedir(d);
    cr_assert_eq(count, n, "%d folders, expected %d", count, n);
    for (int i = 0; i < n; i++) {
        char name[64];
        snprintf(name, sizeof name, "out/%s", names[i]);
        cr_assert(test_exists(name), "%s", name);
    }
}

/* ---- tests ---- */

static void expect_equal(const run *a, const run *b) {
    for (size_t i = 0; i < N; i++) {
        for (int s = 0; s < GN_STATE_COUNT; s++) {
            const size_t bytes = (size_t)gn_optimizer_state_count(a->o, s, i) *
                                 gn_dtype_size(gn_optimizer_state_dtype(a->o, s));
            char *x = test_alloc(bytes), *y = test_alloc(bytes);
            cr_assert_eq(gn_optimizer_get(a->o, s, i, x), GN_OK);
            cr_assert_eq(gn_optimizer_get(b->o, s, i, y), GN_OK);
            cr_assert(memcmp(x, y, bytes) == 0, "%s of %zu", gn_state_name(s), i);
        }
        const gn_tensor v = gn_parameter_weight(a->p, i), w = gn_parameter_weight(b->p, i);
        const size_t bytes = (size_t)gn_tensor_numel(&v) * gn_dtype_size(v.dtype);
        cr_assert(memcmp(v.data, w.data, bytes) == 0, "weights of %zu", i);
    }
}

Test(checkpoint, a_run_goes_on_bit_for_bit) {
    for (int k = 0; k < 4; k++) {
        const gn_dtype weights = k & 2 ? GN_BF16 : GN_F32;
        run a = open_run(weights, k & 1, 0), b = open_run(weights, k & 1, 1);
        gn_error err = {0};
        char *path;
        const gn_checkpoint_options options = options_of(1);
        gn_train_state state = {.step = 3,
                                .epoch = 1,
                                .position = 77,
                                .micro_batches = 12,
                                .tokens = 1234567890123,
                                .metrics_bytes = 5000,
                                .evaluations_lost = 2,
                                .seed = UINT64_MAX,
                                .best_loss = 1.2345678901234567,
                                .schedule = {GN_LR_COSINE, 2e-4, 5, 100},
                                .options = cJSON_Parse("{\"lora_r\": 64, \"model\": \"m\"}")};
        steps(&a, 3);
        cr_assert_eq(gn_checkpoint_save(&options, &state, a.o, &err), GN_OK, "%s", err.message);
        cr_assert_eq(gn_checkpoint_find(&path, test_path("out"), NULL, NULL, &err), GN_OK, "%s",
                     err.message);
        cr_assert_str_eq(path, test_path("out/checkpoint-3"));
        gn_train_state got;
        cr_assert_eq(gn_checkpoint_load(path, &got, b.o, &err), GN_OK, "%s", err.message);
        cr_assert_eq(gn_optimizer_steps(b.o), 3);
#define X(name) cr_assert_eq(got.name, state.name, #name);
        GN_TRAIN_COUNTERS(X)
#undef X
        cr_assert_eq(got.seed, state.seed);
        cr_assert_eq(got.best_loss, state.best_loss);
        cr_assert_eq(got.schedule.kind, GN_LR_COSINE);
        cr_assert_eq(got.schedule.peak, 2e-4);
        cr_assert_eq(got.schedule.warmup, 5);
        cr_assert_eq(got.schedule.total, 100);
        cr_assert(cJSON_Compare(got.options, state.options, true));
        expect_equal(&a, &b);
        steps(&a, 2);
        steps(&b, 2);
        expect_equal(&a, &b);
        gn_train_state_close(&got);
        gn_train_state_close(&state);
        free(path);
        close_run(&a);
        close_run(&b);
    }
}

Test(checkpoint, holds_an_adapter_ready_for_use) {
    run r = open_run(GN_F32, false, 0);
    save(&r, 7, 0);
    gn_tensor_file *file;
    gn_error err = {0};
    cr_assert_eq(
        gn_safetensors_open(&file, test_path("out/checkpoint-7/adapter_model.safetensors"), &err),
        GN_OK, "%s", err.message);
    cr_assert_eq(gn_tensor_file_count(file), N);
    const gn_file_tensor *t = gn_tensor_file_at(file, 1);
    cr_assert_str_eq(t->name, "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight");
    cr_assert(memcmp(t->data, masters(&r, 1), t->bytes) == 0);
    gn_tensor_file_close(file);
    cr_assert(test_exists("out/checkpoint-7/adapter_config.json"));
    const gn_checkpoint_options full = {test_path("full"), NULL, 0};
    const gn_train_state state = {.best_loss = INFINITY};
    cr_assert_eq(gn_checkpoint_save(&full, &state, r.o, &err), GN_OK, "%s", err.message);
    cr_assert_not(test_exists("full/checkpoint-0/adapter_config.json"));
    close_run(&r);
}

Test(checkpoint, the_limit_removes_the_oldest) {
    static const char *const names[] = {"checkpoint-9", "checkpoint-10", "checkpoint-100"};
    run r = open_run(GN_F32, false, 0);
    const int64_t at[] = {1, 2, 9, 10};
    for (int i = 0; i < 4; i++) save(&r, at[i], 0);
    mkdir(test_path("out/checkpoint-10x"), 0777);
    mkdir(test_path("out/checkpoint-007"), 0777);
    save(&r, 100, 3);
    cr_assert(test_exists("out/checkpoint-10x") && test_exists("out/checkpoint-007"));
    rmdir(test_path("out/checkpoint-10x"));
    rmdir(test_path("out/checkpoint-007"));
    expect_folders(3, names);
    cr_assert_eq(found(&r), 100);
    close_run(&r);
}

Test(checkpoint, a_step_saved_again_is_replaced) {
    static const char *const names[] = {"checkpoint-5"};
    run r = open_run(GN_F32, false, 0);
    save(&r, 5, 1);
    test_write_text("out/checkpoint-5/state.json", "{}");
    cr_assert_eq(found(&r), -1);
    save(&r, 5, 1);
    cr_assert_eq(found(&r), 5);
    expect_folders(1, names);
    close_run(&r);
}

static void damage(const char *path, long at) {
    FILE *f = fopen(path, "r+b");
    cr_assert(f, "%s", path);
    fseek(f, at, at < 0 ? SEEK_END : SEEK_SET);
    const int c = fgetc(f);
    fseek(f, -1, SEEK_CUR);
    fputc(c ^ 4, f);
    fclose(f);
}

static const char *const files[] = {"optimizer.safetensors", "state.json", "manifest.json",
                                    "adapter_model.safetensors", "adapter_config.json"};

Test(checkpoint, broken_ones_are_passed_over_with_a_warning) {
    run r = open_run(GN_F32, true, 0);
    save(&r, 10, 0);
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char name[128], copy[128];
        snprintf(name, sizeof name, "out/checkpoint-20/%s", files[i]);
        snprintf(copy, sizeof copy, "%s.copy", files[i]);
        for (int kind = 0; kind < 5; kind++) {
            struct stat st;
            save(&r, 20, 0);
            cr_assert_eq(found(&r), 20);
            cr_assert_eq(*warnings, 0);
            cr_assert_eq(stat(test_path(name), &st), 0);
            if (kind == 0) cr_assert_eq(unlink(test_path(name)), 0);
            if (kind == 1) cr_assert_eq(truncate(test_path(name), st.st_size - 3), 0);
            if (kind == 2) cr_assert_eq(truncate(test_path(name), 0), 0);
            if (kind == 3) damage(test_path(name), st.st_size / 2);
            if (kind == 4) damage(test_path(name), 10);
            cr_assert_eq(found(&r), 10, "%s, damage %d", files[i], kind);
            cr_assert(strstr(warnings, "checkpoint-20/"), "%s", warnings);
        }
    }
    /* A broken later one does not count when old ones are removed, and is not touched. */
    save(&r, 15, 1);
    cr_assert_eq(found(&r), 15);
    cr_assert_not(test_exists("out/checkpoint-10"));
    cr_assert(test_exists("out/checkpoint-20"));
    close_run(&r);
}

Test(checkpoint, none_or_only_broken_ones) {
    run r = open_run(GN_F32, false, 0);
    gn_error err = {0};
    char *path;
    cr_assert_eq(gn_checkpoint_find(&path, test_path("out"), NULL, NULL, &err), GN_ENOENT);
    mkdir(test_path("out"), 0777);
    cr_assert_eq(gn_checkpoint_find(&path, test_path("out"), NULL, NULL, &err), GN_ENOENT);
    mkdir(test_path("out/checkpoint-3"), 0777);
    cr_assert_eq(gn_checkpoint_find(&path, test_path("out"), NULL, NULL, &err), GN_EFORMAT);
    cr_assert_null(path);
    close_run(&r);
}

/* Manifests that name what they should not. */
Test(checkpoint, hostile_manifests) {
    static const char *const texts[] = {
        "[]",
        "{}",
        "{\"format\":\"guanaco-checkpoint-2\",\"files\":{}}",
        "{\"format\":\"guanaco-checkpoint-1\",\"files\":{}}",
        "{\"format\":\"guanaco-checkpoint-1\",\"files\":[]}",
        "{\"format\":\"guanaco-checkpoint-1\",\"files\":{\"state.json\":1,"
        "\"optimizer.safetensors\":2}}",
        "{\"format\":\"guanaco-checkpoint-1\",\"files\":{\"state.json\":{},"
        "\"optimizer.safetensors\":{},\"../x\":{\"bytes\":1,\"hash\":\"\"}}}",
    };
    run r = open_run(GN_F32, false, 0);
    save(&r, 1, 0);
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        test_write_text("out/checkpoint-1/manifest.json", texts[i]);
        cr_assert_eq(found(&r), -1, "%s", texts[i]);
        cr_assert(strstr(warnings, "manifest.json"), "%s", warnings);
    }
    close_run(&r);
}

Test(checkpoint, states_that_make_no_sense) {
    static const char *const changes[][2] = {
        {"\"step\":\t7", "\"step\":\t-7"},
        {"\"step\":\t7", "\"step\":\t1e300"},
        {"\"step\":\t7", "\"step\":\t7.5"},
        {"\"step\":\t7", "\"stop\":\t7"},
        {"\"position\":\t21", "\"position\":\t\"21\""},
        {"\"seed\":\t\"0\"", "\"seed\":\t\"99999999999999999999\""},
        {"\"seed\":\t\"0\"", "\"seed\":\t\"x\""},
        {"\"kind\":\t\"constant\"", "\"kind\":\t\"random\""},
        {"\"schedule\"", "\"schedules\""},
        {"\"options\"", "\"option\""},
    };
    run r = open_run(GN_F32, false, 0);
    save(&r, 7, 0);
    char *text;
    size_t length;
    gn_error err = {0};
    cr_assert_eq(gn_text_read(&text, &length, test_path("out/checkpoint-7/state.json"), &err),
                 GN_OK);
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        gn_train_state state;
        char *changed;
        const char *at = strstr(text, changes[i][0]);
        cr_assert(at, "%s in %s", changes[i][0], text);
        cr_assert(asprintf(&changed, "%.*s%s%s", (int)(at - text), text, changes[i][1],
                           at + strlen(changes[i][0])) > 0);
        test_write_text("out/checkpoint-7/state.json", changed);
        cr_assert_eq(gn_checkpoint_load(test_path("out/checkpoint-7"), &state, r.o, &err),
                     GN_EFORMAT, "%s", changes[i][1]);
        free(changed);
    }
    free(text);
    close_run(&r);
}

Test(checkpoint, other_runs_are_refused_by_name) {
    gn_parameter other[N] = {shapes[0], shapes[1]};
    run saved = open_run(GN_F32, false, 0);
    save(&saved, 1, 0);
    for (int k = 0; k < 3; k++) {
        gn_error err = {0};
        gn_train_state state;
        other[1] = shapes[1];
        if (k == 0) other[1].shape[0]++;
        if (k == 1) other[1].name = "model.layers.0.self_attn.v_proj.lora_B.weight";
        run r = open_shapes(other, GN_F32, k == 2, 0);
        cr_assert_eq(gn_checkpoint_load(test_path("out/checkpoint-1"), &state, r.o, &err),
                     GN_EMISMATCH);
        cr_assert(strstr(err.message, k == 2 ? "lora_A.weight.m" : other[1].name), "%s",
                  err.message);
        close_run(&r);
    }
    close_run(&saved);
}

Test(checkpoint, options_that_changed_are_named) {
    gn_error err = {0};
    cJSON *a = cJSON_Parse("{\"r\":64,\"model\":\"m\"}"),
          *same = cJSON_Parse("{\"model\":\"m\",\"r\":64}");
    cJSON *other = cJSON_Parse("{\"r\":32,\"model\":\"m\"}"),
          *more = cJSON_Parse("{\"r\":64,\"model\":\"m\",\"x\":1}");
    cr_assert_eq(gn_train_options_check(a, same, &err), GN_OK);
    cr_assert_eq(gn_train_options_check(a, other, &err), GN_EMISMATCH);
    cr_assert_str_eq(err.message, "r is 32, but was 64 when the checkpoint was saved");
    cr_assert_eq(gn_train_options_check(a, more, &err), GN_EMISMATCH);
    cr_assert_str_eq(err.message, "x is 1, but was not set when the checkpoint was saved");
    cr_assert_eq(gn_train_options_check(more, a, &err), GN_EMISMATCH);
    cJSON *all[] = {a, same, other, more};
    for (int i = 0; i < 4; i++) cJSON_Delete(all[i]);
}

/* ---- disks and kills ---- */

/* In a child whose files may not grow over `limit` bytes; its exit status. */
static int save_limited(const run *r, int64_t step, rlim_t limit) {
    const pid_t child = fork();
    if (child == 0) {
        gn_error err = {0};
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &(struct rlimit){limit, limit});
        const gn_status status = save_marked(r, step, 1, &err);
        _exit(status == GN_OK ? 0 : status == GN_EIO && strstr(err.message, ".partial") ? 1 : 2);
    }
    int how;
    cr_assert_eq(waitpid(child, &how, 0), child);
    cr_assert(WIFEXITED(how));
    return WEXITSTATUS(how);
}

Test(checkpoint, a_full_disk_harms_nothing_saved_before) {
    static const char *const names[] = {"checkpoint-1"};
    run r = open_run(GN_F32, false, 0);
    save(&r, 1, 1);
    for (rlim_t limit = 0; limit < 16000; limit += limit < 2000 ? 100 : 1000) {
        cr_assert_eq(save_limited(&r, 2, limit), 1, "limit %d", (int)limit);
        cr_assert_eq(found(&r), 1);
        expect_folders(1, names);
    }
    cr_assert_eq(save_limited(&r, 2, 1 << 20), 0);
    cr_assert_eq(found(&r), 2);
    close_run(&r);
}

Test(checkpoint, an_output_that_cannot_be_written) {
    run r = open_run(GN_F32, false, 0);
    gn_error err = {0};
    test_write_text("out", "a file");
    cr_assert_eq(save_marked(&r, 1, 1, &err), GN_EIO);
    cr_assert(strstr(err.message, "out"), "%s", err.message);
    close_run(&r);
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* A child saves as fast as it can and is killed; what it left is resumed, and the next goes on. */
Test(checkpoint, kills_at_any_moment, .timeout = 300) {
    enum { KILLS = 25 };
    run r = open_run(GN_BF16, true, 0);
    uint64_t random = 12345;
    int64_t step = 0;
    int went_on = 0;
    for (int k = 0; k < KILLS; k++) {
        const double begin = seconds();
        save(&r, step, 2);
        const double one_save = seconds() - begin;
        const pid_t child = fork();
        if (child == 0) {
            gn_error err = {0};
            for (int64_t s = step + 1;; s++)
                if (save_marked(&r, s, 2, &err) != GN_OK) _exit(1);
        }
        random = random * 6364136223846793005u + 1442695040888963407u;
        usleep((useconds_t)(3e6 * one_save * (double)(random >> 40) * 0x1p-24));
        cr_assert_eq(kill(child, SIGKILL), 0);
        int how;
        cr_assert_eq(waitpid(child, &how, 0), child);
        cr_assert(WIFSIGNALED(how), "a save failed");
        const int64_t at = found(&r);
        cr_assert_geq(at, step);
        cr_assert_eq(*warnings, 0, "%s", warnings);
        went_on += at > step;
        step = at;
    }
    cr_assert_gt(went_on, 0);
    save(&r, step + 1, 2);
    char names[2][64];
    snprintf(names[0], sizeof *names, "checkpoint-%lld", (long long)step + 1);
    snprintf(names[1], sizeof *names, "checkpoint-%lld", (long long)step);
    expect_folders(2, (const char *const[]){names[0], names[1]});
    close_run(&r);
}
