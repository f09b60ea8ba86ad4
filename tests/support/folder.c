/* folder.c - temporary folders and weights for tests. */
#include "tests/support/folder.h"

#include <criterion/criterion.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/config.h"

static char folder[128];
static void **allocated;
static size_t n_allocated;

void *test_alloc(size_t bytes) {
    allocated = realloc(allocated, (n_allocated + 1) * sizeof *allocated);
    cr_assert(allocated);
    void *memory = calloc(1, bytes + 1);
    cr_assert(memory);
    return allocated[n_allocated++] = memory;
}

void test_folder_make(void) {
    snprintf(folder, sizeof folder, "%s/guanaco-test-XXXXXX", P_tmpdir);
    cr_assert(mkdtemp(folder));
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw) {
    (void)st, (void)type, (void)ftw;
    return remove(path);
}

static void remove_tree(const char *path) {
    nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

void test_folder_remove(void) {
    remove_tree(folder);
    while (n_allocated > 0) free(allocated[--n_allocated]);
    free(allocated);
}

const char *test_path(const char *name) {
    char *path = test_alloc(strlen(folder) + strlen(name) + 1);
    sprintf(path, *name ? "%s/%s" : "%s%s", folder, name);
    return path;
}

static void put(FILE *f, const void *data, size_t n) {
    cr_assert(n == 0 || fwrite(data, 1, n, f) == n);
}

static FILE *create(const char *name) {
    FILE *f = fopen(test_path(name), "wb");
    cr_assert(f, "%s", test_path(name));
    return f;
}

void test_write(const char *name, const void *data, size_t n) {
    FILE *f = create(name);
    put(f, data, n);
    cr_assert_eq(fclose(f), 0);
}

void test_write_text(const char *name, const char *text) {
    test_write(name, text, strlen(text));
}

void test_copy(const char *from, const char *name) {
    char buffer[4096];
    FILE *in = fopen(from, "rb"), *out = create(name);
    cr_assert(in, "%s", from);
    for (size_t n; (n = fread(buffer, 1, sizeof buffer, in)) > 0;) put(out, buffer, n);
    fclose(in);
    cr_assert_eq(fclose(out), 0);
}

bool test_exists(const char *name) {
    return access(test_path(name), F_OK) == 0;
}

static void put_length(FILE *f, uint64_t length) {
    for (int i = 0; i < 8; i++) fputc((int)(length >> (8 * i) & 255), f);
}

void test_remove(const char *name) {
    remove_tree(test_path(name));
}

void test_write_safetensors(const char *name, const char *header, size_t n) {
    FILE *f = create(name);
    put_length(f, strlen(header));
    put(f, header, strlen(header));
    for (size_t i = 0; i < n; i++) fputc((int)(i & 255), f);
    cr_assert_eq(fclose(f), 0);
}

/* ---- weights ---- */

void test_tensors_read(test_tensors *set, const char *path) {
    gn_tensor_file *file = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_open(&file, path, &err), GN_OK, "%s", err.message);
    set->n = gn_tensor_file_count(file);
    cr_assert(set->n <= sizeof set->tensors / sizeof *set->tensors);
    for (size_t i = 0; i < set->n; i++) {
        gn_file_tensor *t = &set->tensors[i];
        *t = *gn_tensor_file_at(file, i);
        t->data = memcpy(test_alloc(t->bytes), t->data, t->bytes);
        t->name = memcpy(test_alloc(strlen(t->name)), t->name, strlen(t->name));
    }
    gn_tensor_file_close(file);
}

static size_t put_entry(char *at, size_t size, const gn_file_tensor *t, size_t begin) {
    size_t n =
        (size_t)snprintf(at, size, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[",
                         begin || at[-1] != '{' ? "," : "", t->name, gn_dtype_name(t->dtype));
    for (int i = 0; i < t->ndim; i++)
        n += (size_t)snprintf(at + n, size - n, "%s%lld", i ? "," : "", (long long)t->shape[i]);
    return n + (size_t)snprintf(at + n, size - n, "],\"data_offsets\":[%zu,%zu]}", begin,
                                begin + t->bytes);
}

void test_tensors_write(const test_tensors *set, const char *name, size_t padding) {
    static char header[1 << 17];
    size_t used = 1, begin = 0;
    header[0] = '{';
    for (size_t i = 0; i < set->n; i++) {
        used += put_entry(header + used, sizeof header - used, &set->tensors[i], begin);
        begin += set->tensors[i].bytes;
    }
    header[used++] = '}';
    cr_assert(used + padding < sizeof header);
    memset(header + used, ' ', padding);
    FILE *f = create(name);
    put_length(f, used + padding);
    put(f, header, used + padding);
    for (size_t i = 0; i < set->n; i++) put(f, set->tensors[i].data, set->tensors[i].bytes);
    cr_assert_eq(fclose(f), 0);
}

gn_file_tensor *test_tensor(test_tensors *set, const char *name) {
    for (size_t i = 0; i < set->n; i++) {
        if (!strcmp(set->tensors[i].name, name)) return &set->tensors[i];
    }
    cr_assert_fail("no tensor %s", name);
    return NULL;
}

void test_tensor_remove(test_tensors *set, const char *name) {
    gn_file_tensor *t = test_tensor(set, name);
    *t = set->tensors[--set->n];
}

void test_tensor_add(test_tensors *set, const char *name, gn_dtype dtype, int64_t n) {
    const size_t bytes = (size_t)n * gn_dtype_size(dtype);
    set->tensors[set->n++] = (gn_file_tensor){.name = name,
                                              .dtype = dtype,
                                              .ndim = 1,
                                              .shape = {n, 1, 1, 1},
                                              .data = test_alloc(bytes),
                                              .bytes = bytes};
}

/* Adds a tensor of zeros to a header, a vector when cols is 1; returns where its data end. */
static int64_t add_zeros(char *header, const char *name, int64_t rows, int64_t cols, int64_t at) {
    const int64_t end = at + rows * cols * (int64_t)sizeof(float);
    char more[32] = "";
    if (cols > 1) snprintf(more, sizeof more, ",%lld", (long long)cols);
    sprintf(header + strlen(header),
            "%s\"%s\":{\"dtype\":\"F32\",\"shape\":[%lld%s],\"data_offsets\":[%lld,%lld]}",
            at ? "," : "{", name, (long long)rows, more, (long long)at, (long long)end);
    return end;
}

int64_t test_zeros_model(const char *folder_name, int hidden, int intermediate, int layers) {
    gn_config c = {.hidden = hidden, .intermediate = intermediate, .heads = 8, .kv_heads = 8};
    char header[16384] = "", name[128], text[512], path[128];
    c.head_dim = hidden / c.heads;
    snprintf(text, sizeof text,
             "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"vocab_size\":8,"
             "\"hidden_size\":%d,\"intermediate_size\":%d,\"num_hidden_layers\":%d,"
             "\"num_attention_heads\":8,\"hidden_act\":\"silu\",\"rms_norm_eps\":1e-6,"
             "\"max_position_embeddings\":64}",
             hidden, intermediate, layers);
    cr_assert_eq(mkdir(test_path(folder_name), 0777), 0);
    snprintf(path, sizeof path, "%s/config.json", folder_name);
    test_write_text(path, text);
    int64_t end = add_zeros(header, "model.embed_tokens.weight", 8, hidden, 0);
    end = add_zeros(header, "lm_head.weight", 8, hidden, end);
    end = add_zeros(header, "model.norm.weight", hidden, 1, end);
    for (int layer = 0; layer < layers; layer++) {
        for (int p = 0; p < GN_PROJ_COUNT; p++) {
            snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, gn_proj_names[p]);
            end = add_zeros(header, name, gn_proj_rows(&c, (gn_proj)p),
                            gn_proj_cols(&c, (gn_proj)p), end);
        }
        snprintf(name, sizeof name, "model.layers.%d.input_layernorm.weight", layer);
        end = add_zeros(header, name, hidden, 1, end);
        snprintf(name, sizeof name, "model.layers.%d.post_attention_layernorm.weight", layer);
        end = add_zeros(header, name, hidden, 1, end);
    }
    strcat(header, "}");
    snprintf(path, sizeof path, "%s/model.safetensors", folder_name);
    test_write_safetensors(path, header, 0);
    cr_assert_eq(truncate(test_path(path), 8 + (int64_t)strlen(header) + end), 0);
    return end;
}
