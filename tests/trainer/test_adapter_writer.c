/* Adapters as PEFT writes them: golden adapters, read and written again, are the same files. */
#include <cjson/cJSON.h>
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "engine/adapter.h"
#include "engine/json_file.h"
#include "engine/tensor_file.h"
#include "tests/support/folder.h"
#include "trainer/adapter_writer.h"

#define GOLDEN GN_SOURCE_DIR "/tests/golden/data/"

TestSuite(adapter_writer, .init = test_folder_make, .fini = test_folder_remove);

typedef struct run {
    gn_ctx *ctx;
    gn_parameters *p;
    gn_optimizer *o;
} run;

/* Parameters with the names, shapes and values of an adapter's file, in reverse order. */
static run open_run(const char *golden) {
    run r;
    gn_error err = {0};
    gn_tensor_file *file;
    char path[512];
    snprintf(path, sizeof path, GOLDEN "%s/adapter_model.safetensors", golden);
    cr_assert_eq(gn_safetensors_open(&file, path, &err), GN_OK, "%s", err.message);
    const size_t n = gn_tensor_file_count(file);
    gn_parameter *items = calloc(n, sizeof *items);
    for (size_t i = 0; i < n; i++) {
        const gn_file_tensor *t = gn_tensor_file_at(file, n - 1 - i);
        items[i] = (gn_parameter){.name = t->name + strlen("base_model.model."), .ndim = t->ndim};
        memcpy(items[i].shape, t->shape, sizeof items[i].shape);
    }
    const gn_optimizer_options options = {.budget = SIZE_MAX};
    cr_assert_eq(gn_ctx_open(&r.ctx, &(gn_ctx_options){.device = "cpu", .threads = 1}, &err),
                 GN_OK);
    cr_assert_eq(gn_parameters_open(&r.p, r.ctx, items, n, GN_BF16, GN_F32, &err), GN_OK);
    cr_assert_eq(gn_optimizer_open(&r.o, r.p, &options, NULL, &err), GN_OK);
    for (size_t i = 0; i < n; i++) {
        const gn_file_tensor *t = gn_tensor_file_at(file, n - 1 - i);
        cr_assert_eq(t->dtype, GN_F32);
        cr_assert_eq(gn_optimizer_set(r.o, GN_STATE_MASTER, i, t->data), GN_OK);
    }
    gn_tensor_file_close(file);
    free(items);
    return r;
}

static void close_run(run *r) {
    gn_optimizer_close(r->o);
    gn_parameters_close(r->p);
    gn_ctx_close(r->ctx);
}

static char *read_file(const char *path, size_t *length) {
    char *text;
    gn_error err = {0};
    cr_assert_eq(gn_text_read(&text, length, path, &err), GN_OK, "%s", err.message);
    return text;
}

/* Equal but for the order of target_modules, which is that of a Python set. */
static void expect_equal_config(const char *got, const char *expected) {
    cJSON *a = cJSON_Parse(got), *b = cJSON_Parse(expected), *x = a->child, *y = b->child;
    for (; x && y; x = x->next, y = y->next) {
        cr_assert_str_eq(x->string, y->string);
        if (strcmp(x->string, "target_modules") != 0) {
            cr_assert(cJSON_Compare(x, y, true), "%s", x->string);
            continue;
        }
        cr_assert_eq(cJSON_GetArraySize(x), cJSON_GetArraySize(y));
        const cJSON *module, *other;
        cJSON_ArrayForEach(module, x) {
            bool found = false;
            cJSON_ArrayForEach(other, y) found |= cJSON_Compare(module, other, true);
            cr_assert(found, "%s", module->valuestring);
        }
    }
    cr_assert(!x && !y, "a key is missing");
    /* The text up to the modules, and after them, to the byte. */
    const char *from = strstr(expected, "  ],"), *mine = strstr(got, "  ],");
    cr_assert(from && mine);
    cr_assert_str_eq(mine, from);
    cr_assert(strncmp(got, expected, (size_t)(strstr(got, "target_modules") - got)) == 0);
    cJSON_Delete(a);
    cJSON_Delete(b);
}

static void expect_same_file(const char *name, const char *golden) {
    char path[512];
    size_t n, m;
    snprintf(path, sizeof path, GOLDEN "%s/%s", golden, name);
    char *expected = read_file(path, &n);
    snprintf(path, sizeof path, "adapter/%s", name);
    char *got = read_file(test_path(path), &m);
    if (strstr(name, ".json")) {
        expect_equal_config(got, expected);
    } else {
        cr_assert_eq(n, m);
        cr_assert(memcmp(got, expected, n) == 0, "%s of %s", name, golden);
    }
    free(expected);
    free(got);
}

static gn_adapter *load(const char *dir) {
    gn_config config;
    gn_adapter *adapter;
    gn_error err = {0};
    cr_assert_eq(gn_config_read(&config, GOLDEN "tiny-bf16", &err), GN_OK, "%s", err.message);
    cr_assert_eq(gn_adapter_load(&adapter, &config, "tiny-bf16", dir, &err), GN_OK, "%s",
                 err.message);
    return adapter;
}

static const struct {
    const char *golden;
    gn_adapter_config config;
} cases[] = {
    {"adapter-all-r8", {"tiny-bf16", 8, 16, 0, false, GN_F32}},
    {"adapter-attn-r4", {"tiny-bf16", 4, 4, 0, false, GN_F32}},
    {"adapter-rslora-r16", {"tiny-bf16", 16, 16, 0, true, GN_F32}},
    {"adapter-init-r8", {"tiny-bf16", 8, 16, 0, false, GN_F32}},
};

Test(adapter_writer, golden_adapters_come_out_as_they_went_in) {
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gn_error err = {0};
        char path[512];
        run r = open_run(cases[i].golden);
        cr_assert_eq(gn_adapter_save(test_path("adapter"), &cases[i].config, r.o, &err), GN_OK,
                     "%s", err.message);
        expect_same_file("adapter_config.json", cases[i].golden);
        expect_same_file("adapter_model.safetensors", cases[i].golden);
        cr_assert_not(test_exists("adapter.partial"));
        snprintf(path, sizeof path, GOLDEN "%s", cases[i].golden);
        gn_adapter *mine = load(test_path("adapter")), *theirs = load(path);
        cr_assert_arr_eq(mine->hash, theirs->hash, sizeof mine->hash);
        gn_adapter_close(mine);
        gn_adapter_close(theirs);
        close_run(&r);
    }
}

Test(adapter_writer, sixteen_bits_and_odd_numbers) {
    gn_error err = {0};
    run r = open_run("adapter-all-r8");
    const gn_adapter_config config = {"a \"quoted\" \\ path", 8, 2.5, 0.05, false, GN_BF16};
    cr_assert_eq(gn_adapter_save(test_path("adapter"), &config, r.o, &err), GN_OK, "%s",
                 err.message);
    gn_tensor_file *file;
    cr_assert_eq(gn_safetensors_open(&file, test_path("adapter/adapter_model.safetensors"), &err),
                 GN_OK, "%s", err.message);
    cr_assert_eq(gn_tensor_file_count(file), r.p->n);
    for (size_t i = 0; i < r.p->n; i++) {
        const gn_file_tensor *t = gn_tensor_file_at(file, r.p->n - 1 - i);
        const gn_tensor w = gn_parameter_weight(r.p, i);
        cr_assert_eq(t->dtype, GN_BF16);
        cr_assert(memcmp(t->data, w.data, t->bytes) == 0, "%s", t->name);
    }
    gn_tensor_file_close(file);
    cJSON *json;
    cr_assert_eq(gn_json_read(&json, test_path("adapter/adapter_config.json"), &err), GN_OK, "%s",
                 err.message);
    cr_assert_str_eq(cJSON_GetObjectItem(json, "base_model_name_or_path")->valuestring,
                     config.base);
    cr_assert_eq(cJSON_GetObjectItem(json, "lora_alpha")->valuedouble, 2.5);
    cr_assert_eq(cJSON_GetObjectItem(json, "lora_dropout")->valuedouble, 0.05);
    cJSON_Delete(json);
    gn_adapter_close(load(test_path("adapter")));
    close_run(&r);
}

Test(adapter_writer, replaces_adapters_and_nothing_else) {
    gn_error err = {0};
    run r = open_run("adapter-attn-r4"), other = open_run("adapter-all-r8");
    cr_assert_eq(gn_adapter_save(test_path("adapter/"), &cases[0].config, other.o, &err), GN_OK);
    cr_assert_eq(gn_adapter_save(test_path("adapter"), &cases[1].config, r.o, &err), GN_OK, "%s",
                 err.message);
    expect_same_file("adapter_model.safetensors", "adapter-attn-r4");
    cr_assert_not(test_exists("adapter.partial"));

    mkdir(test_path("full"), 0777);
    test_write_text("full/letter", "dear");
    cr_assert_eq(gn_adapter_save(test_path("full"), &cases[1].config, r.o, &err), GN_EEXIST);
    cr_assert(test_exists("full/letter"));
    mkdir(test_path("empty"), 0777);
    cr_assert_eq(gn_adapter_save(test_path("empty"), &cases[1].config, r.o, &err), GN_OK);
    cr_assert_eq(gn_adapter_save(test_path("no/such/place"), &cases[1].config, r.o, &err), GN_EIO);
    close_run(&r);
    close_run(&other);
}
