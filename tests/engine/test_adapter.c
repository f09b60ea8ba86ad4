/* test_adapter.c - adapters: golden folders value by value, equal contents under equal hashes,
 * and every folder that does not fit its base refused with the key's name. */
#include <criterion/criterion.h>

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/adapter.h"
#include "engine/tensor_file.h"
#include "tests/support/golden_models.h"

#define GOLDEN GN_SOURCE_DIR "/tests/golden/data/"
#define SMOLLM GN_SOURCE_DIR "/../shared/data/adapters/smollm135m-medical-500"

/* A base so small that its adapters can be written and damaged quickly. */
static const gn_config mini = {.layers = 2,
                               .hidden = 8,
                               .intermediate = 12,
                               .heads = 4,
                               .kv_heads = 2,
                               .head_dim = 2,
                               .vocab = 16};

/* ---- writing folders ---- */

static char dir[64];

static const char *in_dir(const char *name) {
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return path;
}

static void make_folder(void) {
    snprintf(dir, sizeof dir, "%s/guanaco-XXXXXX", P_tmpdir);
    cr_assert(mkdtemp(dir));
}

static void remove_folder(void) {
    static const char *const names[] = {"adapter_config.json", "adapter_model.safetensors",
                                        "adapter_model.bin"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) unlink(in_dir(names[i]));
    rmdir(dir);
}

TestSuite(adapter, .init = make_folder, .fini = remove_folder);

static void write_bytes(const char *name, const void *data, size_t n) {
    FILE *f = fopen(in_dir(name), "wb");
    cr_assert(f);
    cr_assert_eq(fwrite(data, 1, n, f), n);
    cr_assert_eq(fclose(f), 0);
}

static size_t read_bytes(const char *path, unsigned char *data, size_t capacity) {
    FILE *f = fopen(path, "rb");
    cr_assert(f, "%s", path);
    const size_t n = fread(data, 1, capacity, f);
    cr_assert(n < capacity, "%s", path);
    fclose(f);
    return n;
}

static void write_config(int rank, const char *options) {
    char text[1024];
    const int n =
        snprintf(text, sizeof text, "{\"peft_type\": \"LORA\", \"r\": %d, \"lora_alpha\": 4%s%s}",
                 rank, *options ? ", " : "", options);
    write_bytes("adapter_config.json", text, (size_t)n);
}

typedef struct {
    const char *key; /* after "base_model.model." */
    gn_dtype dtype;
    int64_t rows, cols;
    float value; /* of the last element; the others count up in quarters, exact in 16 bits */
} weight;

static size_t weight_numel(const weight *w) {
    return (size_t)(w->rows * (w->cols ? w->cols : 1));
}

/* cols 0 makes a tensor of one dimension. */
static void write_weights(const weight *weights, size_t n) {
    static char header[8192], data[65536];
    size_t at = 0, used = 1;
    header[0] = '{';
    for (size_t i = 0; i < n; i++) {
        const weight *w = &weights[i];
        const size_t numel = weight_numel(w), size = gn_dtype_size(w->dtype);
        char shape[64];
        snprintf(shape, sizeof shape, w->cols ? "%lld, %lld" : "%lld", (long long)w->rows,
                 (long long)w->cols);
        used += (size_t)sprintf(header + used,
                                "%s\"base_model.model.%s\": {\"dtype\": \"%s\", \"shape\": [%s], "
                                "\"data_offsets\": [%zu, %zu]}",
                                i ? ", " : "", w->key, gn_dtype_name(w->dtype), shape, at,
                                at + numel * size);
        for (size_t k = 0; k < numel; k++) {
            const float value = k + 1 == numel ? w->value : (float)(k % 64) / 4 - 8;
            if (gn_dtype_is_float(w->dtype)) gn_narrow(data + at + k * size, w->dtype, &value, 1);
        }
        at += numel * size;
    }
    header[used++] = '}';
    unsigned char file[sizeof header + sizeof data] = {(unsigned char)used,
                                                       (unsigned char)(used >> 8)};
    memcpy(file + 8, header, used);
    memcpy(file + 8 + used, data, at);
    write_bytes("adapter_model.safetensors", file, 8 + used + at);
}

#define WRITE(...)                                                                                 \
    write_weights((const weight[]){__VA_ARGS__},                                                   \
                  sizeof((const weight[]){__VA_ARGS__}) / sizeof(weight))
#define A(module) "model.layers." module ".lora_A.weight"
#define B(module) "model.layers." module ".lora_B.weight"
#define Q0        "0.self_attn.q_proj"
#define K1        "1.self_attn.k_proj"
#define DOWN1     "1.mlp.down_proj"

/* A complete adapter of rank 2 for `mini`, on one module. */
#define GOOD                                                                                       \
    {A(Q0), GN_F32, 2, 8, 1}, {                                                                    \
        B(Q0), GN_F32, 8, 2, 1                                                                     \
    }

static gn_adapter *load(const gn_config *config) {
    gn_adapter *adapter = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_adapter_load(&adapter, config, "the base", dir, &err), GN_OK, "%s",
                 err.message);
    return adapter;
}

static void expect_refused(const char *what, const gn_config *config, gn_status status,
                           const char *says) {
    gn_adapter *adapter = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_adapter_load(&adapter, config, "the base", dir, &err), status, "%s: %s", what,
                 err.message);
    cr_assert_null(adapter);
    cr_assert(strstr(err.message, says), "%s: \"%s\" should say \"%s\"", what, err.message, says);
    cr_assert(strstr(err.message, dir), "%s: \"%s\" names no file", what, err.message);
}

static bool same_hash(const gn_adapter *a, const gn_adapter *b) {
    return memcmp(a->hash, b->hash, sizeof a->hash) == 0;
}

/* ---- golden adapters ---- */

static const gn_file_tensor *half(const gn_tensor_file *file, int layer, int proj, char which) {
    char key[128];
    snprintf(key, sizeof key, "base_model.model.model.layers.%d.%s.lora_%c.weight", layer,
             gn_proj_names[proj], which);
    return gn_tensor_file_find(file, key);
}

static void expect_copy(const gn_tensor *got, const gn_file_tensor *want) {
    cr_assert_eq((uintptr_t)got->data % 64, 0);
    cr_assert_eq(got->dtype, want->dtype);
    cr_assert(got->ndim == 2 && got->ld == got->shape[1]);
    cr_assert(got->shape[0] == want->shape[0] && got->shape[1] == want->shape[1]);
    cr_assert_eq(memcmp(got->data, want->data, want->bytes), 0, "%s", want->name);
}

Test(adapter, golden) {
    static const struct {
        const char *name, *file;
        int rank, pairs;
        float scale;
    } cases[] = {
        {"adapter-all-r8", "adapter_model.safetensors", 8, 21, 2},
        {"adapter-attn-r4", "adapter_model.safetensors", 4, 6, 1},
        {"adapter-rslora-r16", "adapter_model.safetensors", 16, 21, 4},
        {"adapter-all-r16-bin", "adapter_model.bin", 16, 21, 1},
    };
    gn_adapter *adapters[4];
    for (size_t c = 0; c < 4; c++) {
        char folder[256], path[512];
        gn_error err = {0};
        gn_tensor_file *file = NULL;
        snprintf(folder, sizeof folder, GOLDEN "%s", cases[c].name);
        snprintf(path, sizeof path, "%s/%s", folder, cases[c].file);
        cr_assert_eq(gn_adapter_load(&adapters[c], &golden_tiny, "tiny", folder, &err), GN_OK, "%s",
                     err.message);
        cr_assert_eq(c == 3 ? gn_torch_open(&file, path, &err)
                            : gn_safetensors_open(&file, path, &err),
                     GN_OK, "%s", err.message);
        const gn_adapter *adapter = adapters[c];
        int pairs = 0;
        size_t bytes = 0;
        for (int i = 0; i < 3 * GN_PROJ_COUNT; i++) {
            const gn_lora_pair *pair = &adapter->pairs[i / GN_PROJ_COUNT][i % GN_PROJ_COUNT];
            const gn_file_tensor *a = half(file, i / GN_PROJ_COUNT, i % GN_PROJ_COUNT, 'A');
            const gn_file_tensor *b = half(file, i / GN_PROJ_COUNT, i % GN_PROJ_COUNT, 'B');
            cr_assert_eq(pair->rank, a ? cases[c].rank : 0);
            if (!a) continue;
            cr_assert_eq(pair->scale, cases[c].scale, "%s", cases[c].name);
            expect_copy(&pair->a, a);
            expect_copy(&pair->b, b);
            bytes += a->bytes + b->bytes;
            pairs++;
        }
        cr_assert_eq(pairs, cases[c].pairs);
        cr_assert_eq((size_t)pairs * 2, gn_tensor_file_count(file));
        cr_assert_eq(gn_adapter_max_rank(adapter), cases[c].rank);
        cr_assert(gn_adapter_bytes(adapter) >= bytes);
        cr_assert(gn_adapter_bytes(adapter) < bytes + 42 * 64);
        gn_tensor_file_close(file);
        for (size_t before = 0; before < c; before++)
            cr_assert(!same_hash(adapter, adapters[before]), "%s", cases[c].name);
    }
    for (size_t c = 0; c < 4; c++) gn_adapter_close(adapters[c]);
}

/* A value each, as Python's struct reads it from the file. */
Test(adapter, golden_values) {
    static const struct {
        const char *name;
        float first;
    } cases[] = {{"adapter-all-r8", 0x1.12p-5f},
                 {"adapter-attn-r4", 0x1.e2p-6f},
                 {"adapter-rslora-r16", 0x1.5cp-7f}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        char folder[256];
        gn_adapter *adapter = NULL;
        gn_error err = {0};
        snprintf(folder, sizeof folder, GOLDEN "%s", cases[c].name);
        cr_assert_eq(gn_adapter_load(&adapter, &golden_tiny, "tiny", folder, &err), GN_OK);
        cr_assert_eq(((const float *)adapter->pairs[1][GN_Q].a.data)[0], cases[c].first);
        gn_adapter_close(adapter);
    }
}

static const gn_config smollm = {.layers = 30,
                                 .hidden = 576,
                                 .intermediate = 1536,
                                 .heads = 9,
                                 .kv_heads = 3,
                                 .head_dim = 64,
                                 .vocab = 49152};

/* An adapter from the wild; the file is not part of the repository. */
Test(adapter, smollm) {
    if (access(SMOLLM, F_OK) != 0) {
        cr_log_info("no adapter from the wild beside the repository; the others remain\n");
        return;
    }
    gn_adapter *adapter = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_adapter_load(&adapter, &smollm, "smollm", SMOLLM, &err), GN_OK, "%s",
                 err.message);
    for (int layer = 0; layer < 30; layer++) {
        for (int proj = 0; proj < GN_PROJ_COUNT; proj++) {
            const gn_lora_pair *pair = &adapter->pairs[layer][proj];
            cr_assert_eq(pair->rank, proj == GN_Q || proj == GN_V ? 16 : 0);
            if (pair->rank) cr_assert_eq(pair->scale, 2.0f);
        }
    }
    cr_assert_eq(adapter->pairs[29][GN_V].b.shape[0], 192);
    gn_adapter_close(adapter);

    adapter = NULL;
    cr_assert_eq(gn_adapter_load(&adapter, &golden_tiny, "tiny", SMOLLM, &err), GN_EMISMATCH);
    cr_assert_null(adapter);
    static const char *const says[] = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "(16, 576)",
        "expected (16, 128)", "trained for another base than tiny"};
    for (size_t i = 0; i < sizeof says / sizeof *says; i++)
        cr_assert(strstr(err.message, says[i]), "%s", err.message);
}

/* ---- what is read ---- */

Test(adapter, ranks_per_module) {
    write_config(2, "\"rank_pattern\": {\"k_proj\": 1, \"layers.1.mlp.down_proj\": 5}, "
                    "\"alpha_pattern\": {\"down_proj\": 2.5}");
    WRITE(GOOD, {A(K1), GN_BF16, 1, 8, 3}, {B(K1), GN_BF16, 4, 1, 3}, {A(DOWN1), GN_F32, 5, 12, 1},
          {B(DOWN1), GN_F32, 8, 5, 1});
    gn_adapter *adapter = load(&mini);
    const gn_lora_pair *q = &adapter->pairs[0][GN_Q], *k = &adapter->pairs[1][GN_K],
                       *down = &adapter->pairs[1][GN_DOWN];
    cr_assert(q->rank == 2 && q->scale == 2 && q->a.dtype == GN_F32);
    cr_assert(k->rank == 1 && k->scale == 4 && k->a.dtype == GN_BF16 && k->b.dtype == GN_BF16);
    cr_assert(down->rank == 5 && down->scale == 0.5f && down->a.shape[1] == 12);
    cr_assert_eq(adapter->pairs[0][GN_K].rank, 0);
    cr_assert_eq(gn_adapter_max_rank(adapter), 5);
    cr_assert_eq(((const uint16_t *)k->b.data)[3], gn_f32_to_bf16(3));
    gn_adapter_close(adapter);
}

Test(adapter, rslora) {
    write_config(2, "\"use_rslora\": true");
    WRITE(GOOD);
    gn_adapter *adapter = load(&mini);
    cr_assert_eq(adapter->pairs[0][GN_Q].scale, (float)(4 / sqrt(2)));
    gn_adapter_close(adapter);
}

Test(adapter, dtypes) {
    static const struct {
        gn_dtype a, b, pair;
    } cases[] = {
        {GN_F32, GN_F32, GN_F32},  {GN_BF16, GN_BF16, GN_BF16}, {GN_F16, GN_F16, GN_F32},
        {GN_F32, GN_BF16, GN_F32}, {GN_BF16, GN_F32, GN_F32},   {GN_F16, GN_BF16, GN_F32},
    };
    gn_adapter *first = NULL;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_config(2, "");
        WRITE({A(Q0), cases[i].a, 2, 8, -0.5f}, {B(Q0), cases[i].b, 8, 2, 0.25f});
        gn_adapter *adapter = load(&mini);
        const gn_lora_pair *pair = &adapter->pairs[0][GN_Q];
        cr_assert(pair->a.dtype == cases[i].pair && pair->b.dtype == cases[i].pair, "%zu", i);
        float a[16], b[16];
        gn_widen(a, pair->a.data, pair->a.dtype, 16);
        gn_widen(b, pair->b.data, pair->b.dtype, 16);
        for (int k = 0; k < 15; k++)
            cr_assert(a[k] == (float)k / 4 - 8 && b[k] == (float)k / 4 - 8, "%zu", i);
        cr_assert(a[15] == -0.5f && b[15] == 0.25f, "%zu", i);
        if (!first)
            first = gn_adapter_ref(adapter);
        else
            cr_assert_eq(same_hash(first, adapter), cases[i].pair == GN_F32, "%zu", i);
        gn_adapter_close(adapter);
    }
    gn_adapter_close(first);
}

Test(adapter, names_with_an_infix) {
    write_config(2, "");
    WRITE(GOOD);
    gn_adapter *plain = load(&mini);
    WRITE({"model.layers." Q0 ".lora_A.default.weight", GN_F32, 2, 8, 1},
          {"model.layers." Q0 ".lora_B.default.weight", GN_F32, 8, 2, 1});
    gn_adapter *infix = load(&mini);
    cr_assert(same_hash(plain, infix));
    gn_adapter_close(plain);
    gn_adapter_close(infix);
}

/* ---- hashes ---- */

/* The legacy adapter written again as safetensors: another file form, the same contents. */
Test(adapter, hash_is_of_contents) {
    gn_tensor_file *file = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_torch_open(&file, GOLDEN "adapter-all-r16-bin/adapter_model.bin", &err), GN_OK);
    const size_t n = gn_tensor_file_count(file);
    gn_safetensors_writer *writer = NULL;
    cr_assert_eq(gn_safetensors_create(&writer, in_dir("adapter_model.safetensors"),
                                       gn_tensor_file_at(file, 0), n, NULL, &err),
                 GN_OK, "%s", err.message);
    for (size_t i = 0; i < n; i++) {
        const gn_file_tensor *t = gn_tensor_file_at(file, i);
        cr_assert_eq(gn_safetensors_write(writer, t->data, t->bytes, &err), GN_OK);
    }
    cr_assert_eq(gn_safetensors_commit(writer, &err), GN_OK, "%s", err.message);
    gn_tensor_file_close(file);
    static unsigned char config[4096];
    write_bytes(
        "adapter_config.json", config,
        read_bytes(GOLDEN "adapter-all-r16-bin/adapter_config.json", config, sizeof config));
    gn_adapter *legacy = NULL, *modern = load(&golden_tiny);
    cr_assert_eq(gn_adapter_load(&legacy, &golden_tiny, "tiny", GOLDEN "adapter-all-r16-bin", &err),
                 GN_OK);
    cr_assert(same_hash(legacy, modern));
    gn_adapter_close(legacy);
    gn_adapter_close(modern);
}

Test(adapter, hash_sees_every_change) {
    gn_adapter *variants[7];
    write_config(2, "");
    WRITE(GOOD);
    variants[0] = load(&mini);
    WRITE({A(Q0), GN_F32, 2, 8, 1.25f}, {B(Q0), GN_F32, 8, 2, 1}); /* a value of A */
    variants[1] = load(&mini);
    WRITE({A(Q0), GN_F32, 2, 8, 1}, {B(Q0), GN_F32, 8, 2, 1.25f}); /* of B */
    variants[2] = load(&mini);
    WRITE({A("1.self_attn.q_proj"), GN_F32, 2, 8, 1}, {B("1.self_attn.q_proj"), GN_F32, 8, 2, 1});
    variants[3] = load(&mini);
    WRITE({A("0.self_attn.o_proj"), GN_F32, 2, 8, 1}, {B("0.self_attn.o_proj"), GN_F32, 8, 2, 1});
    variants[4] = load(&mini);
    write_config(2, "\"use_rslora\": true");
    WRITE(GOOD);
    variants[5] = load(&mini);
    write_config(2, "\"alpha_pattern\": {\"q_proj\": 4.5}");
    variants[6] = load(&mini);
    for (int i = 0; i < 7; i++) {
        for (int k = 0; k < i; k++) cr_assert(!same_hash(variants[i], variants[k]), "%d %d", i, k);
    }
    write_config(2, "\"inference_mode\": true");
    gn_adapter *again = load(&mini);
    cr_assert(same_hash(variants[0], again));
    gn_adapter_close(again);
    for (int i = 0; i < 7; i++) gn_adapter_close(variants[i]);
}

/* ---- what is refused ---- */

Test(adapter, keys_that_fit_nowhere) {
    static const char *const keys[] = {
        "lm_head.lora_A.weight",
        "model.embed_tokens.lora_embedding_A",
        "model.layers.0.self_attn.q_proj.lora_embedding_A",
        "model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "model.layers.0.self_attn.q_proj.lora_B.bias",
        "model.layers.0.self_attn.q_proj.lora_C.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.lora_A",
        "model.layers.0.self_attn.q_proj.lora_A.weight.x",
        "model.layers.0.self_attn.q_proj.lora_A.a.b.weight",
        "model.layers.0.self_attn.q_proj.lora_Aweight",
        "model.layers.0.self_attn.query_proj.lora_A.weight",
        "model.layers.0.attention.wq.lora_A.weight",
        "model.layers.0.mlp.q_proj.lora_A.weight",
        "model.layers.00.self_attn.q_proj.lora_A.weight",
        "model.layers.-1.self_attn.q_proj.lora_A.weight",
        "model.layers..self_attn.q_proj.lora_A.weight",
        "model.layers.0x0.self_attn.q_proj.lora_A.weight",
        "model.layers.99999999999999999999.self_attn.q_proj.lora_A.weight",
        "model.layers.2.self_attn.q_proj.lora_A.weight",
        "layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.LORA_A.weight",
    };
    write_config(2, "");
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        WRITE(GOOD, {keys[i], GN_F32, 2, 8, 1});
        expect_refused(keys[i], &mini, GN_EMISMATCH, keys[i]);
    }
}

Test(adapter, weights_that_do_not_fit) {
    write_config(2, "");
    WRITE({A(Q0), GN_F32, 2, 8, 1});
    expect_refused("A without B", &mini, GN_EFORMAT, A(Q0) " is there without its lora_B");
    WRITE({B(Q0), GN_F32, 8, 2, 1});
    expect_refused("B without A", &mini, GN_EFORMAT, B(Q0) " is there without its lora_A");
    WRITE(GOOD, {A(K1), GN_F32, 2, 8, 1});
    expect_refused("one of two without B", &mini, GN_EFORMAT, A(K1));
    WRITE({A(Q0), GN_F32, 2, 9, 1}, {B(Q0), GN_F32, 8, 2, 1});
    expect_refused("columns of A", &mini, GN_EMISMATCH,
                   A(Q0) " is (2, 9), expected (2, 8): the adapter was trained for another base");
    WRITE({A(Q0), GN_F32, 2, 8, 1}, {B(Q0), GN_F32, 9, 2, 1});
    expect_refused("rows of B", &mini, GN_EMISMATCH, B(Q0) " is (9, 2), expected (8, 2)");
    WRITE({A(K1), GN_F32, 2, 8, 1}, {B(K1), GN_F32, 8, 2, 1});
    expect_refused("rows of K without grouping", &mini, GN_EMISMATCH, "expected (4, 2)");
    WRITE({A(Q0), GN_F32, 8, 2, 1}, {B(Q0), GN_F32, 2, 8, 1});
    expect_refused("transposed", &mini, GN_EMISMATCH, "expected (2, 8)");
    WRITE({A(Q0), GN_F32, 4, 8, 1}, {B(Q0), GN_F32, 8, 4, 1});
    expect_refused("another rank", &mini, GN_EFORMAT, "the rank is not the one in");
    WRITE({A(Q0), GN_F32, 16, 0, 1}, {B(Q0), GN_F32, 8, 2, 1});
    expect_refused("one dimension", &mini, GN_EMISMATCH, "1 dimensions");
    WRITE({A(Q0), GN_I32, 2, 8, 1}, {B(Q0), GN_F32, 8, 2, 1});
    expect_refused("integers", &mini, GN_EUNSUPPORTED, "I32");
    WRITE(GOOD, {"model.layers." Q0 ".lora_A.default.weight", GN_F32, 2, 8, 1});
    expect_refused("one weight under two names", &mini, GN_EFORMAT, "are the same weight");
    write_weights(NULL, 0);
    expect_refused("empty", &mini, GN_EFORMAT, "no weights");

    WRITE(GOOD);
    write_config(2, "\"rank_pattern\": {\"q_proj\": 4}");
    expect_refused("rank_pattern", &mini, GN_EFORMAT, "expected (4, 8)");
    write_config(2, "\"target_modules\": [\"v_proj\"]");
    expect_refused("target_modules", &mini, GN_EFORMAT, "target_modules");
    write_config(2, "\"use_dora\": true");
    expect_refused("an option", &mini, GN_EUNSUPPORTED, "use_dora");
    gn_adapter_close(NULL);
}

Test(adapter, values_that_are_not_finite) {
    static const gn_dtype dtypes[] = {GN_F32, GN_F16, GN_BF16};
    const float values[] = {NAN, INFINITY, -INFINITY};
    write_config(2, "");
    for (int d = 0; d < 3; d++) {
        for (int v = 0; v < 3; v++) {
            WRITE({A(Q0), dtypes[d], 2, 8, 1}, {B(Q0), dtypes[d], 8, 2, values[v]});
            expect_refused(gn_dtype_name(dtypes[d]), &mini, GN_EFORMAT,
                           B(Q0) " holds values that are not finite");
        }
        WRITE({A(Q0), dtypes[d], 2, 8, 65504}, {B(Q0), dtypes[d], 8, 2, -65280});
        gn_adapter_close(load(&mini));
    }
}

Test(adapter, which_file) {
    gn_error err = {0};
    gn_adapter *adapter = NULL;
    cr_assert_eq(gn_adapter_load(&adapter, &mini, "b", dir, &err), GN_ENOENT);
    cr_assert(strstr(err.message, "adapter_config.json"), "%s", err.message);
    write_config(2, "");
    cr_assert_eq(gn_adapter_load(&adapter, &mini, "b", dir, &err), GN_ENOENT);
    cr_assert(strstr(err.message, "adapter_model.safetensors"), "%s", err.message);
    cr_assert(strstr(err.message, "adapter_model.bin"), "%s", err.message);
    write_bytes("adapter_model.bin", "damaged", 7);
    expect_refused("only a damaged .bin", &mini, GN_EFORMAT, "adapter_model.bin");
    WRITE(GOOD);
    gn_adapter_close(load(&mini)); /* the .bin is not looked at */
}

/* ---- damage ---- */

Test(adapter, cut_at_every_length) {
    static unsigned char data[70000];
    write_config(2, "");
    WRITE(GOOD);
    const size_t n = read_bytes(in_dir("adapter_model.safetensors"), data, sizeof data);
    for (size_t cut = 0; cut < n; cut++) {
        write_bytes("adapter_model.safetensors", data, cut);
        expect_refused("cut", &mini, GN_EFORMAT, "adapter_model.safetensors");
    }
    write_bytes("adapter_model.safetensors", data, n);
    gn_adapter_close(load(&mini));
}

/* ---- references ---- */

static void *use(void *adapter) {
    bool intact = true;
    for (int i = 0; i < 20000; i++) {
        gn_adapter *mine = gn_adapter_ref(adapter);
        intact &= mine->max_rank == 2;
        gn_adapter_close(mine);
    }
    gn_adapter_close(adapter);
    return intact ? &dir : NULL;
}

/* Each thread drops one reference; the last of them frees (the sanitizers watch). */
Test(adapter, references) {
    enum { THREADS = 4 };
    write_config(2, "");
    WRITE(GOOD);
    gn_adapter *adapter = load(&mini);
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        cr_assert_eq(pthread_create(&threads[i], NULL, use, gn_adapter_ref(adapter)), 0);
    gn_adapter_close(adapter);
    for (int i = 0; i < THREADS; i++) {
        void *intact = NULL;
        cr_assert_eq(pthread_join(threads[i], &intact), 0);
        cr_assert(intact);
    }
}
