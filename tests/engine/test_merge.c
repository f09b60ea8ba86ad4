/* test_merge.c - a merged folder: the sums in it, what the model then says, whole or not at all. */
#include <criterion/criterion.h>

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/adapter.h"
#include "engine/json_file.h"
#include "engine/merge.h"
#include "engine/model.h"
#include "engine/quantize.h"
#include "engine/score.h"
#include "tests/support/folder.h"
#include "tests/support/golden_models.h"
#include "tests/support/memory.h"

#define GOLDEN    GN_SOURCE_DIR "/tests/golden/data/"
#define BOOTSTRAP GN_SOURCE_DIR "/models/bootstrap-13m-nf4"
#define ADAPTERS  GN_SOURCE_DIR "/models/adapters/"
#define SHARED    GN_SOURCE_DIR "/../shared/bootstrap-13m"
#define Q0        "model.layers.0.self_attn.q_proj.weight"
#define UP2       "model.layers.2.mlp.up_proj.weight"

TestSuite(merge, .init = test_folder_make, .fini = test_folder_remove);

static const char *joined(const char *folder, const char *name) {
    char *path = test_alloc(strlen(folder) + strlen(name) + 1);
    sprintf(path, "%s/%s", folder, name);
    return path;
}

/* The merged folder is called `out`. */
static gn_merge_options merge_of(const char *model, const char *adapter, const char *out) {
    return (gn_merge_options){.model = model, .adapter = adapter, .out = test_path(out)};
}

static gn_merge_result must_merge(const gn_merge_options *o) {
    gn_merge_result result = {0};
    gn_error err = {0};
    cr_assert_eq(gn_merge_folder(o, &result, &err), GN_OK, "%s", err.message);
    return result;
}

static void expect_error(const gn_merge_options *o, gn_status status, const char *part) {
    gn_merge_result result;
    gn_error err = {0};
    cr_assert_eq(gn_merge_folder(o, &result, &err), status, "%s: %s", part, err.message);
    cr_assert(strstr(err.message, part), "\"%s\" lacks \"%s\"", err.message, part);
    cr_assert_neq(access(joined(o->out, "config.json"), F_OK), 0);
    cr_assert_not(test_exists("out.partial"));
}

static gn_tensor_file *open_dir(const char *dir) {
    gn_tensor_file *file = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_open_dir(&file, dir, &err), GN_OK, "%s", err.message);
    return file;
}

static const gn_file_tensor *find(const gn_tensor_file *file, const char *name) {
    const gn_file_tensor *t = gn_tensor_file_find(file, name);
    cr_assert(t, "%s", name);
    return t;
}

/* Equal tensors, wherever they stand. */
static void expect_equal_weights(const char *a_dir, const char *b_dir) {
    gn_tensor_file *a = open_dir(a_dir), *b = open_dir(b_dir);
    cr_assert_eq(gn_tensor_file_count(a), gn_tensor_file_count(b));
    for (size_t i = 0; i < gn_tensor_file_count(a); i++) {
        const gn_file_tensor *x = gn_tensor_file_at(a, i), *y = find(b, x->name);
        cr_assert(x->dtype == y->dtype && x->bytes == y->bytes, "%s", x->name);
        cr_assert_eq(memcmp(x->data, y->data, x->bytes), 0, "%s", x->name);
    }
    gn_tensor_file_close(a);
    gn_tensor_file_close(b);
}

/* ---- what a model says ---- */

typedef struct logits {
    float *values; /* (n, vocab) */
    int n, vocab;
} logits;

static void keep_row(void *user, int32_t position, const float *row) {
    logits *l = user;
    memcpy(l->values + (size_t)position * (size_t)l->vocab, row, (size_t)l->vocab * sizeof *row);
}

/* In float32, of weights as stored or quantized to `quant`; adapter: a folder, or NULL. */
static logits run_model(const char *dir, gn_qtype quant, const char *adapter_dir,
                        const int32_t *ids, int n) {
    const gn_model_options options = {.device = "cpu",
                                      .compute = GN_COMPUTE_F32,
                                      .as_stored = quant == GN_Q_NONE,
                                      .quant = quant};
    gn_model *model = NULL;
    gn_adapter *adapter = NULL;
    gn_scorer *scorer = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_model_open(&model, dir, &options, &err), GN_OK, "%s", err.message);
    if (adapter_dir)
        cr_assert_eq(gn_adapter_open(&adapter, model, adapter_dir, &err), GN_OK, "%s", err.message);
    logits l = {.n = n, .vocab = gn_model_describe(model).vocab};
    l.values = test_alloc((size_t)n * (size_t)l.vocab * sizeof(float));
    const gn_adapter_use use = {adapter, 1};
    cr_assert_eq(gn_scorer_open(&scorer, model, n, GN_KV_AUTO, &err), GN_OK, "%s", err.message);
    cr_assert_eq(gn_scorer_run(scorer, ids, n, 0, &use, adapter != NULL, keep_row, &l), GN_OK);
    gn_scorer_close(scorer);
    gn_adapter_close(adapter);
    gn_model_close(model);
    return l;
}

static double relative_l2(const float *x, const float *reference, size_t n) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)x[i] - reference[i]) * ((double)x[i] - reference[i]);
        norm += (double)reference[i] * reference[i];
    }
    return sqrt(difference / norm);
}

/* Of 48 tokens in any vocabulary. */
static const int32_t *some_ids(void) {
    gn_tensor_file *file = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_open(&file, GOLDEN "logits.safetensors", &err), GN_OK);
    int32_t *ids = test_alloc(48 * sizeof *ids);
    memcpy(ids, find(file, "input_ids")->data, 48 * sizeof *ids);
    gn_tensor_file_close(file);
    return ids;
}

/* Weights that are rounded to bf16 once, and an arithmetic in float32 of another order. */
enum { IN_BF16, IN_F32 };
static const double tolerance[] = {2e-2, 1e-5};

/* Merged, the model says what base and adapter say together. */
static void expect_same_model(const char *base, gn_qtype quant, const char *adapter) {
    const int32_t *ids = some_ids();
    const logits expected = run_model(base, quant, adapter, ids, 48);
    for (int form = IN_BF16; form <= IN_F32; form++) {
        gn_merge_options o = merge_of(base, adapter, form == IN_F32 ? "f32" : "bf16");
        o.quant = quant;
        o.double_quant = true;
        o.set_dtype = form == IN_F32;
        o.dtype = GN_F32;
        const gn_merge_result r = must_merge(&o);
        cr_assert_eq(r.dtype, form == IN_F32 ? GN_F32 : GN_BF16);
        const logits got = run_model(o.out, GN_Q_NONE, NULL, ids, 48);
        const double error =
            relative_l2(got.values, expected.values, (size_t)got.n * (size_t)got.vocab);
        fprintf(stderr, "%s, %s: relative L2 %.1e\n", strrchr(adapter, '/') + 1,
                form == IN_F32 ? "float32" : "bfloat16", error);
        cr_assert(error < tolerance[form], "%s: %g", adapter, error);
    }
    test_remove("f32");
    test_remove("bf16");
}

static const char *const golden_adapters[] = {"adapter-all-r8", "adapter-attn-r4",
                                              "adapter-rslora-r16", "adapter-all-r16-bin"};
enum { N_GOLDEN = sizeof golden_adapters / sizeof *golden_adapters };

Test(merge, a_4_bit_base_with_an_adapter_is_the_golden_model) {
    gn_tensor_file *file = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_open(&file, GOLDEN "logits.safetensors", &err), GN_OK);
    for (int i = 0; i < N_GOLDEN; i++) {
        char tensor[64];
        gn_merge_options o =
            merge_of(GOLDEN "tiny-bnb-nf4", joined(GOLDEN, golden_adapters[i]), golden_adapters[i]);
        o.set_dtype = true;
        o.dtype = GN_F32;
        const gn_merge_result r = must_merge(&o);
        cr_assert(r.over == GN_Q_NF4 && r.double_quant && r.dtype == GN_F32);
        cr_assert_eq(r.projections, i == 1 ? 6 : 21);
        const logits got = run_model(o.out, GN_Q_NONE, NULL, some_ids(), 48);
        snprintf(tensor, sizeof tensor, "logits.nf4_dq+%s", golden_adapters[i]);
        const gn_file_tensor *t = find(file, tensor);
        float *expected = memcpy(test_alloc(t->bytes), t->data, t->bytes);
        cr_assert_lt(relative_l2(got.values, expected, 48 * 512), 1e-4, "%s", tensor);
    }
    gn_tensor_file_close(file);
}

Test(merge, it_is_base_and_adapter_together) {
    for (int i = 0; i < N_GOLDEN; i++) {
        const char *adapter = joined(GOLDEN, golden_adapters[i]);
        expect_same_model(GOLDEN "tiny-bf16", GN_Q_NONE, adapter);
        expect_same_model(GOLDEN "tiny-bnb-nf4", GN_Q_NONE, adapter);
    }
    static const gn_qtype types[] = {GN_Q_NF4, GN_Q_FP4_E3M0, GN_Q_INT8};
    for (int i = 0; i < 3; i++)
        expect_same_model(GOLDEN "tiny-bf16", types[i], GOLDEN "adapter-all-r8");
}

Test(merge, the_default_models_adapters) {
    expect_same_model(BOOTSTRAP, GN_Q_NONE, ADAPTERS "pirate");
    expect_same_model(BOOTSTRAP, GN_Q_NONE, ADAPTERS "brief");
    if (access(SHARED "/config.json", F_OK) != 0) return;
    expect_same_model(SHARED, GN_Q_NONE, SHARED "/adapters/pirate"); /* two shards */
    expect_same_model(SHARED, GN_Q_NF4, SHARED "/adapters/brief");
}

/* ---- the sums ---- */

/* What a value of W + scale * B A is before it is rounded, and how far float32 may be from it. */
static double exact_sum(const gn_file_tensor *w, const gn_lora_pair *pair, int64_t row, int64_t col,
                        double *slack) {
    const int64_t cols = pair->a.shape[1];
    const float *a = pair->a.data, *b = pair->b.data;
    float value;
    gn_widen(&value, (const char *)w->data + 2 * (row * cols + col), w->dtype, 1);
    double sum = value, size = fabs(sum);
    for (int i = 0; i < pair->rank; i++) {
        const double product = (double)pair->scale * a[i * cols + col] * b[row * pair->rank + i];
        sum += product;
        size += fabs(product);
    }
    *slack = (pair->rank + 2) * ldexp(size, -24);
    return sum;
}

Test(merge, sums_are_rounded_once) {
    const gn_merge_options o = merge_of(GOLDEN "tiny-bf16", GOLDEN "adapter-all-r8", "out");
    const gn_merge_result r = must_merge(&o);
    cr_assert(r.over == GN_Q_NONE && r.dtype == GN_BF16 && r.projections == 21 && r.rank == 8);
    cr_assert(r.bytes_in == 1468160 && r.bytes_out == r.bytes_in);
    gn_tensor_file *base = open_dir(o.model), *merged = open_dir(o.out);
    gn_adapter *adapter = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_adapter_load(&adapter, &golden_tiny, "tiny", o.adapter, &err), GN_OK);
    for (int i = 0; i < 3 * GN_PROJ_COUNT; i++) {
        char name[128];
        snprintf(name, sizeof name, "model.layers.%d.%s.weight", i / GN_PROJ_COUNT,
                 gn_proj_names[i % GN_PROJ_COUNT]);
        const gn_file_tensor *w = find(base, name), *m = find(merged, name);
        const gn_lora_pair *pair = &adapter->pairs[i / GN_PROJ_COUNT][i % GN_PROJ_COUNT];
        cr_assert_eq(pair->a.dtype, GN_F32);
        for (int64_t k = 0; k < w->shape[0] * w->shape[1]; k++) {
            double slack;
            float got;
            const double exact = exact_sum(w, pair, k / w->shape[1], k % w->shape[1], &slack);
            gn_widen(&got, (const char *)m->data + 2 * k, m->dtype, 1);
            int exponent; /* half a unit in the last of bf16's 8 places */
            frexp(exact, &exponent);
            cr_assert_leq(fabs(got - exact), ldexp(1, exponent - 9) + slack, "%s, %lld: %a %a",
                          name, (long long)k, (double)got, exact);
        }
    }
    gn_adapter_close(adapter);
    gn_tensor_file_close(base);
    gn_tensor_file_close(merged);
}

Test(merge, what_has_no_adapter_stays_to_the_bit) {
    const gn_merge_options o = merge_of(GOLDEN "tiny-bf16", GOLDEN "adapter-attn-r4", "out");
    must_merge(&o);
    gn_tensor_file *base = open_dir(o.model), *merged = open_dir(o.out);
    int changed = 0;
    for (size_t i = 0; i < gn_tensor_file_count(base); i++) {
        const gn_file_tensor *t = gn_tensor_file_at(base, i), *m = find(merged, t->name);
        const bool adapted = strstr(t->name, "q_proj") || strstr(t->name, "v_proj");
        cr_assert(m->dtype == t->dtype && m->bytes == t->bytes);
        cr_assert_eq(memcmp(m->data, t->data, t->bytes) != 0, adapted, "%s", t->name);
        changed += adapted;
    }
    cr_assert_eq(changed, 6);
    gn_tensor_file_close(base);
    gn_tensor_file_close(merged);
}

/* Quantized on the way or before, in one file or in shards: the same weights come out. */
Test(merge, the_way_does_not_matter) {
    for (int form = 0; form < 4; form++) {
        static const char *const names[] = {"a", "b", "c", "d"};
        const gn_quantize_options q = {.in = GOLDEN "tiny-bf16",
                                       .out = test_path(names[form]),
                                       .type = form & 1 ? GN_Q_FP4 : GN_Q_NF4,
                                       .double_quant = form & 2,
                                       .max_shard_bytes = 150000};
        gn_quantize_result result;
        gn_error err = {0};
        cr_assert_eq(gn_quantize_folder(&q, &result, &err), GN_OK, "%s", err.message);
        gn_merge_options before = merge_of(q.out, GOLDEN "adapter-all-r8", "before");
        gn_merge_options way = merge_of(q.in, GOLDEN "adapter-all-r8", "way");
        before.max_shard_bytes = 500000;
        way.quant = q.type;
        way.double_quant = q.double_quant;
        way.threads = 1;
        const gn_merge_result r = must_merge(&before);
        cr_assert(r.over == q.type && r.double_quant == q.double_quant && r.dtype == GN_BF16);
        must_merge(&way);
        cr_assert(test_exists("before/model-00002-of-00004.safetensors"));
        cr_assert(test_exists("way/model.safetensors"));
        expect_equal_weights(before.out, way.out);
        test_remove("before");
        test_remove("way");
    }
}

/* ---- the folder ---- */

static cJSON *read_json(const char *name) {
    cJSON *root = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_json_read(&root, test_path(name), &err), GN_OK, "%s", err.message);
    return root;
}

static const char *text_at(const cJSON *root, const char *key) {
    const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(root, key));
    return text ? text : "";
}

Test(merge, a_folder_says_what_it_holds) {
    const gn_merge_options stored = merge_of(GOLDEN "tiny-bf16", GOLDEN "adapter-all-r8", "stored");
    must_merge(&stored);
    cJSON *said = read_json("stored/merge.json");
    cr_assert_str_eq(text_at(said, "base"), stored.model);
    cr_assert_str_eq(text_at(said, "adapter"), stored.adapter);
    cr_assert_str_eq(text_at(said, "added_to"), "stored");
    cr_assert_str_eq(text_at(said, "dtype"), "bfloat16");
    cr_assert_eq(strlen(text_at(said, "adapter_hash")), 32);
    cr_assert_not(cJSON_HasObjectItem(said, "quant_type"));
    cJSON_Delete(said);
    char *text[2];
    size_t length[2];
    gn_error err = {0};
    cr_assert_eq(gn_text_read(&text[0], &length[0], GOLDEN "tiny-bf16/config.json", &err), GN_OK);
    cr_assert_eq(gn_text_read(&text[1], &length[1], test_path("stored/config.json"), &err), GN_OK);
    cr_assert_str_eq(text[0], text[1]);
    free(text[0]);
    free(text[1]);

    gn_merge_options o = merge_of(GOLDEN "tiny-bnb-nf4", GOLDEN "adapter-all-r8", "dequantized");
    o.set_dtype = true;
    o.dtype = GN_F16;
    must_merge(&o);
    said = read_json("dequantized/merge.json");
    cr_assert_str_eq(text_at(said, "added_to"), "dequantized");
    cr_assert_str_eq(text_at(said, "quant_type"), "nf4");
    cr_assert(cJSON_IsTrue(cJSON_GetObjectItem(said, "double_quant")));
    cr_assert_str_eq(text_at(said, "dtype"), "float16");
    cJSON_Delete(said);
    cJSON *config = read_json("dequantized/config.json");
    cr_assert_str_eq(text_at(config, "torch_dtype"), "float16");
    cr_assert_not(cJSON_HasObjectItem(config, "quantization_config"));
    cr_assert_eq(cJSON_GetObjectItem(config, "rms_norm_eps")->valuedouble, 1e-6);
    cJSON_Delete(config);
    cr_assert(test_exists("dequantized/tokenizer.model"));
}

/* ---- adapters of other kinds ---- */

/* An adapter's folder in the test's own, with one option of its config set. */
static void copy_adapter(const char *golden, const char *option, cJSON *value) {
    gn_error err = {0};
    cJSON *config = NULL;
    const char *weights = joined(joined(GOLDEN, golden), "adapter_model.safetensors");
    mkdir(test_path("adapter"), 0777);
    test_copy(weights, "adapter/adapter_model.safetensors");
    const char *path = joined(joined(GOLDEN, golden), "adapter_config.json");
    cr_assert_eq(gn_json_read(&config, path, &err), GN_OK, "%s", err.message);
    cJSON_DeleteItemFromObject(config, option);
    cJSON_AddItemToObject(config, option, value);
    char *text = cJSON_Print(config);
    test_write_text("adapter/adapter_config.json", text);
    free(text);
    cJSON_Delete(config);
}

/* q_proj of r=16 among others of r=8. */
Test(merge, ranks_and_alphas_may_differ) {
    test_tensors set, other;
    copy_adapter("adapter-all-r8", "rank_pattern", cJSON_Parse("{\"q_proj\": 16}"));
    test_tensors_read(&set, test_path("adapter/adapter_model.safetensors"));
    test_tensors_read(&other, GOLDEN "adapter-rslora-r16/adapter_model.safetensors");
    for (size_t i = 0; i < set.n; i++) {
        if (strstr(set.tensors[i].name, "q_proj"))
            set.tensors[i] = *test_tensor(&other, set.tensors[i].name);
    }
    test_tensors_write(&set, "adapter/adapter_model.safetensors", 0);
    expect_same_model(GOLDEN "tiny-bf16", GN_Q_NONE, test_path("adapter"));
    copy_adapter("adapter-all-r8", "alpha_pattern", cJSON_Parse("{\"layers.1.mlp.up_proj\": 64}"));
    expect_same_model(GOLDEN "tiny-bnb-nf4", GN_Q_NONE, test_path("adapter"));
}

Test(merge, what_is_no_plain_lora_is_refused) {
    static const struct {
        const char *option, *value;
    } cases[] = {{"fan_in_fan_out", "true"},
                 {"use_dora", "true"},
                 {"bias", "\"all\""},
                 {"modules_to_save", "[\"lm_head\"]"}};
    const gn_merge_options o = merge_of(GOLDEN "tiny-bf16", test_path("adapter"), "out");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        copy_adapter("adapter-all-r8", cases[i].option, cJSON_Parse(cases[i].value));
        expect_error(&o, GN_EUNSUPPORTED, cases[i].option);
    }
}

Test(merge, adapters_of_other_bases_are_refused) {
    gn_merge_options o = merge_of(GOLDEN "tiny-bf16", ADAPTERS "pirate", "out");
    expect_error(&o, GN_EMISMATCH, "another base");
    o.adapter = test_path("nowhere");
    expect_error(&o, GN_ENOENT, "nowhere/adapter_config.json");
    copy_adapter("adapter-all-r8", "r", cJSON_CreateNumber(4));
    o.adapter = test_path("adapter");
    expect_error(&o, GN_EFORMAT, "the rank is not the one in");
}

/* ---- memory ---- */
/* The sanitizers keep what was freed, or several bytes for each that was read. */
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
enum { OVERHEAD = 32 << 20 };

/* A rank-1 adapter of zeros on one projection. */
static void write_small_adapter(int64_t rows, int64_t cols) {
    static const char key[] = "base_model.model.model.layers.0.self_attn.q_proj.lora_";
    const int64_t a = 4 * cols, end = a + 4 * rows;
    char header[512];
    cr_assert_eq(mkdir(test_path("adapter"), 0777), 0);
    test_write_text("adapter/adapter_config.json",
                    "{\"peft_type\": \"LORA\", \"r\": 1, \"lora_alpha\": 1}");
    snprintf(header, sizeof header,
             "{\"%sA.weight\":{\"dtype\":\"F32\",\"shape\":[1,%lld],\"data_offsets\":[0,%lld]},"
             "\"%sB.weight\":{\"dtype\":\"F32\",\"shape\":[%lld,1],\"data_offsets\":[%lld,%lld]}}",
             key, (long long)cols, (long long)a, key, (long long)rows, (long long)a,
             (long long)end);
    test_write_safetensors("adapter/adapter_model.safetensors", header, 0);
    const char *path = test_path("adapter/adapter_model.safetensors");
    cr_assert_eq(truncate(path, 8 + (int64_t)strlen(header) + end), 0);
}

Test(merge, memory_follows_the_largest_tensor) {
    enum { HIDDEN = 1024, INTERMEDIATE = 8192, LAYERS = 2 };
    const int64_t largest = (int64_t)HIDDEN * INTERMEDIATE * (int64_t)sizeof(float);
    const int64_t all = test_zeros_model("in", HIDDEN, INTERMEDIATE, LAYERS);
    gn_merge_options o = merge_of(test_path("in"), test_path("adapter"), "out");
    o.quant = GN_Q_NF4;
    o.threads = 2;
    write_small_adapter(HIDDEN, HIDDEN);
    cr_assert_gt(all, 2 * (largest + OVERHEAD));
    const int64_t before = test_peak_memory();
    const gn_merge_result r = must_merge(&o);
    const int64_t growth = (test_peak_memory() - before) * 1024;
    fprintf(stderr, "%lld MiB more for %lld MiB of weights\n", (long long)growth >> 20,
            (long long)all >> 20);
    cr_assert_eq(r.bytes_in, all);
    cr_assert_lt(growth, largest + OVERHEAD, "%lld bytes", (long long)growth);
}

#endif

/* ---- what is refused, and what is left then ---- */

Test(merge, what_is_there_stays) {
    gn_merge_options o = merge_of(GOLDEN "tiny-bf16", GOLDEN "adapter-all-r8", "out");
    test_write_text("out", "a file");
    expect_error(&o, GN_EEXIST, "exists already");
    cr_assert_eq(remove(test_path("out")), 0);
    must_merge(&o);
    gn_merge_result result;
    gn_error err = {0};
    o.out = test_path("out/");
    cr_assert_eq(gn_merge_folder(&o, &result, &err), GN_EEXIST);
    cr_assert(test_exists("out/model.safetensors"));
    cr_assert_eq(mkdir(test_path("other.partial"), 0777), 0);
    o.out = test_path("other");
    cr_assert_eq(gn_merge_folder(&o, &result, &err), GN_EEXIST);
    cr_assert(strstr(err.message, "remove it"), "%s", err.message);
}

Test(merge, wrong_requests_are_refused) {
    gn_merge_options o = merge_of(GOLDEN "tiny-bnb-nf4", GOLDEN "adapter-all-r8", "out");
    o.quant = GN_Q_FP4;
    expect_error(&o, GN_EINVAL, "the weights are nf4 already and cannot become fp4");
    o = merge_of(test_path("nowhere"), GOLDEN "adapter-all-r8", "out");
    expect_error(&o, GN_ENOENT, "nowhere/config.json");
    o = merge_of(GOLDEN "tiny-bf16", GOLDEN "adapter-all-r8", "no/folder");
    expect_error(&o, GN_EIO, "no/folder");
}

/* A copy of a golden model in in/, to be changed. */
static gn_merge_options make_in(test_tensors *set, const char *golden) {
    cr_assert_eq(mkdir(test_path("in"), 0777), 0);
    test_copy(joined(joined(GOLDEN, golden), "config.json"), "in/config.json");
    test_tensors_read(set, joined(joined(GOLDEN, golden), "model.safetensors"));
    test_tensors_write(set, "in/model.safetensors", 0);
    return merge_of(test_path("in"), GOLDEN "adapter-all-r8", "out");
}

Test(merge, wrong_weights_are_named_and_nothing_is_left) {
    test_tensors set;
    gn_merge_options o = make_in(&set, "tiny-bf16");
    uint16_t *values = (uint16_t *)test_tensor(&set, UP2)->data;
    values[130] = 0x7fc0; /* NaN */
    test_tensors_write(&set, "in/model.safetensors", 0);
    expect_error(&o, GN_EFORMAT, "tensor " UP2);
    o.quant = GN_Q_NF4;
    expect_error(&o, GN_EINVAL, "tensor " UP2 ": ");
    values[130] = 0x4788; /* 69632 */
    test_tensors_write(&set, "in/model.safetensors", 0);
    o.quant = GN_Q_NONE;
    o.set_dtype = true;
    o.dtype = GN_F16;
    expect_error(&o, GN_EFORMAT, "not finite in float16");
    values[130] = 0;
    test_tensor(&set, Q0)->shape[0] = 64;
    test_tensor(&set, Q0)->shape[1] = 256;
    test_tensors_write(&set, "in/model.safetensors", 0);
    expect_error(&o, GN_EMISMATCH, "tensor " Q0 " has shape (64, 256)");
    test_tensor_remove(&set, Q0);
    test_tensors_write(&set, "in/model.safetensors", 0);
    expect_error(&o, GN_EFORMAT, "tensor " Q0 " is missing");
}

Test(merge, wrong_4_bit_weights_are_named_and_nothing_is_left) {
    test_tensors set;
    const gn_merge_options o = make_in(&set, "tiny-bnb-nf4");
    gn_file_tensor *state = test_tensor(&set, Q0 ".quant_state.bitsandbytes__nf4");
    *strstr((char *)state->data, "128") = '9';
    test_tensors_write(&set, "in/model.safetensors", 0);
    expect_error(&o, GN_EMISMATCH, Q0);
    *strstr((char *)state->data, "928") = '1';
    /* Odd lengths before them: codes and scales stand unaligned. */
    test_tensors_write(&set, "in/model.safetensors", 3);
    const gn_merge_options whole = merge_of(GOLDEN "tiny-bnb-nf4", o.adapter, "whole");
    must_merge(&o);
    must_merge(&whole);
    expect_equal_weights(o.out, whole.out);
    test_remove("out");
    test_tensor_add(&set, "lm_head.weight.absmax", GN_U8, 64);
    test_tensors_write(&set, "in/model.safetensors", 0);
    expect_error(&o, GN_EFORMAT, "tensor lm_head.weight.absmax has no place");
    test_tensor_remove(&set, "lm_head.weight.absmax");
    test_tensor_remove(&set, UP2 ".nested_absmax");
    test_tensors_write(&set, "in/model.safetensors", 0);
    expect_error(&o, GN_EFORMAT, "tensor " UP2 ".nested_absmax is missing");
}

/* A limit on file sizes fails like a full disk, at every stage of the writing. */
Test(merge, a_full_disk_leaves_nothing) {
    static const rlim_t limits[] = {0, 100, 20000, 300000, 1400000};
    const gn_merge_options o = merge_of(GOLDEN "tiny-bnb-nf4", GOLDEN "adapter-all-r8", "out");
    signal(SIGXFSZ, SIG_IGN);
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        struct rlimit limit;
        cr_assert_eq(getrlimit(RLIMIT_FSIZE, &limit), 0);
        limit.rlim_cur = limits[i];
        cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
        expect_error(&o, GN_EIO, test_path("out"));
    }
}
