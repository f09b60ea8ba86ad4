/* test_quantize.c - a folder's 4-bit copy: what bitsandbytes would have written, whole or not at
 * all. */
#include <criterion/criterion.h>

#include <float.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/json_file.h"
#include "engine/model.h"
#include "engine/quantize.h"
#include "tests/support/folder.h"
#include "tests/support/memory.h"

#define GOLDEN GN_SOURCE_DIR "/tests/golden/data/"
#define Q0     "model.layers.0.self_attn.q_proj.weight"

TestSuite(quantize, .init = test_folder_make, .fini = test_folder_remove);

/* What the test changes is in/, what is made out/. */
static void make_in(test_tensors *set) {
    cr_assert_eq(mkdir(test_path("in"), 0777), 0);
    test_copy(GOLDEN "tiny-bf16/config.json", "in/config.json");
    test_copy(GOLDEN "tiny-bf16/tokenizer.model", "in/tokenizer.model");
    test_tensors_read(set, GOLDEN "tiny-bf16/model.safetensors");
    test_tensors_write(set, "in/model.safetensors", 0);
}

static gn_quantize_options from_golden(void) {
    return (gn_quantize_options){
        .in = GOLDEN "tiny-bf16", .out = test_path("out"), .type = GN_Q_NF4, .double_quant = true};
}

static void must_quantize(const gn_quantize_options *o) {
    gn_quantize_result result;
    gn_error err = {0};
    cr_assert_eq(gn_quantize_folder(o, &result, &err), GN_OK, "%s", err.message);
    cr_assert_eq(result.bytes_in, 1468160);
    cr_assert_lt(result.bytes_out, result.bytes_in);
    cr_assert_not(test_exists("out.partial"));
}

static void expect_error(const gn_quantize_options *o, gn_status status, const char *part) {
    gn_quantize_result result;
    gn_error err = {0};
    cr_assert_eq(gn_quantize_folder(o, &result, &err), status, "%s: %s", part, err.message);
    cr_assert(strstr(err.message, part), "\"%s\" lacks \"%s\"", err.message, part);
    cr_assert_not(test_exists("out/config.json"));
    cr_assert_not(test_exists("out.partial"));
}

static gn_tensor_file *open_dir(const char *dir) {
    gn_tensor_file *file = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_open_dir(&file, dir, &err), GN_OK, "%s", err.message);
    return file;
}

static gn_model *open_model(const char *dir) {
    const gn_model_options options = {.device = "cpu"};
    gn_model *model = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_model_open(&model, dir, &options, &err), GN_OK, "%s", err.message);
    return model;
}

static bool ends_with(const char *s, const char *end) {
    const size_t n = strlen(s), k = strlen(end);
    return n >= k && !strcmp(s + n - k, end);
}

/* ---- against bitsandbytes ---- */

/* Equal JSON but for the offset's last place; ours is padded. */
static void check_state(const gn_file_tensor *ours, const gn_file_tensor *theirs) {
    cJSON *a = cJSON_ParseWithLength(ours->data, ours->bytes),
          *b = cJSON_ParseWithLength(theirs->data, theirs->bytes);
    cr_assert(a && b, "%s", ours->name);
    cJSON *x = cJSON_GetObjectItem(a, "nested_offset"),
          *y = cJSON_GetObjectItem(b, "nested_offset");
    cr_assert_float_eq(x->valuedouble, y->valuedouble, FLT_EPSILON * y->valuedouble);
    cJSON_SetNumberValue(x, y->valuedouble);
    cr_assert(cJSON_Compare(a, b, true), "%s", ours->name);
    cJSON_Delete(a);
    cJSON_Delete(b);
}

/* Counts the bytes that differ. Nested absmax is what is left of a scale (below 0.25) less the
 * offset, so it may be off by their last place, not only by its own. */
static int64_t compare(const gn_file_tensor *ours, const gn_file_tensor *theirs) {
    int64_t different = 0;
    if (strstr(ours->name, ".quant_state.")) {
        check_state(ours, theirs);
        return 0;
    }
    cr_assert_eq(ours->dtype, theirs->dtype, "%s", ours->name);
    cr_assert_eq(ours->ndim, theirs->ndim, "%s", ours->name);
    cr_assert_arr_eq(ours->shape, theirs->shape, (size_t)ours->ndim * sizeof *ours->shape);
    cr_assert_eq(ours->bytes, theirs->bytes, "%s", ours->name);
    const unsigned char *a = ours->data, *b = theirs->data;
    if (ends_with(ours->name, ".nested_absmax")) {
        for (size_t i = 0; i < ours->bytes / sizeof(float); i++) {
            float x, y;
            memcpy(&x, a + i * sizeof x, sizeof x);
            memcpy(&y, b + i * sizeof y, sizeof y);
            cr_assert(fabsf(x - y) <= FLT_EPSILON / 4, "%s: %a, theirs %a", ours->name, (double)x,
                      (double)y);
            different += x != y;
        }
        return different;
    }
    for (size_t i = 0; i < ours->bytes; i++) different += a[i] != b[i];
    cr_assert(different == 0 || ends_with(ours->name, "_proj.weight"), "%s", ours->name);
    return different;
}

Test(quantize, a_folder_becomes_what_bitsandbytes_writes) {
    const gn_quantize_options o = from_golden();
    must_quantize(&o);
    gn_tensor_file *ours = open_dir(o.out), *theirs = open_dir(GOLDEN "tiny-bnb-nf4");
    const size_t n = gn_tensor_file_count(ours);
    int64_t bytes = 0, codes = 0, scales = 0;
    cr_assert_eq(n, gn_tensor_file_count(theirs));
    for (size_t i = 0; i < n; i++) {
        const gn_file_tensor *a = gn_tensor_file_at(ours, i), *b = gn_tensor_file_at(theirs, i);
        cr_assert_str_eq(a->name, b->name);
        const int64_t different = compare(a, b);
        *(ends_with(a->name, ".nested_absmax") ? &scales : &codes) += different;
        bytes += (int64_t)a->bytes;
    }
    fprintf(stderr,
            "%zu tensors, %lld bytes; %lld bytes of codes differ, %lld nested scales in the "
            "last place\n",
            n, (long long)bytes, (long long)codes, (long long)scales);
    cr_assert_leq(codes, 2); /* golden/test_blockquant tells which may */
    gn_tensor_file_close(ours);
    gn_tensor_file_close(theirs);
}

/* ---- what a folder holds ---- */

Test(quantize, the_copy_is_the_model_quantized_while_loading) {
    for (int form = 0; form < 4; form++) {
        gn_quantize_options o = from_golden();
        gn_model *loaded = NULL;
        gn_error err = {0};
        o.type = form & 1 ? GN_Q_FP4 : GN_Q_NF4;
        o.double_quant = form & 2;
        o.out = test_path(form & 1 ? form & 2 ? "a" : "b" : form & 2 ? "c" : "d");
        must_quantize(&o);
        const gn_model_options m = {
            .device = "cpu", .quant = o.type, .no_double_quant = !o.double_quant};
        cr_assert_eq(gn_model_open(&loaded, o.in, &m, &err), GN_OK, "%s", err.message);
        gn_model *copy = open_model(o.out);
        cr_assert_eq(gn_model_describe(copy).quant, o.type);
        for (int p = 0; p < GN_PROJ_COUNT; p++) {
            const gn_matrix *a = &loaded->layers[2].proj[p], *b = &copy->layers[2].proj[p];
            const int64_t n = a->rows * a->cols;
            float *x = test_alloc((size_t)n * sizeof *x), *y = test_alloc((size_t)n * sizeof *y);
            gn_dequantize(x, a, 0, n);
            gn_dequantize(y, b, 0, n);
            cr_assert_eq(memcmp(x, y, (size_t)n * sizeof *x), 0);
        }
        gn_model_close(loaded);
        gn_model_close(copy);
    }
}

Test(quantize, the_other_files_come_along) {
    test_tensors set;
    make_in(&set);
    test_write_text("in/chat_template.json", "{\"user\": \"{content}\"}");
    test_write_text("in/generation_config.json", "{}");
    test_write_text("in/README.md", "# A model\n");
    test_write_text("in/LICENSE", "Free.\n");
    test_write_text("in/pytorch_model.bin", "not needed");
    gn_quantize_options o = from_golden();
    o.in = test_path("in");
    must_quantize(&o);
    cr_assert(test_exists("out/chat_template.json") && test_exists("out/generation_config.json") &&
              test_exists("out/README.md") && test_exists("out/LICENSE") &&
              test_exists("out/tokenizer.model"));
    cr_assert_not(test_exists("out/pytorch_model.bin"));
    cr_assert_not(test_exists("out/tokenizer_config.json"));
}

Test(quantize, the_config_keeps_its_text) {
    static const char config[] =
        "{\"model_type\": \"llama\", \"quantization_config\": null, \"hidden_size\": 128,\n"
        "\"intermediate_size\":352, \"num_hidden_layers\":3, \"num_attention_heads\":4,\n"
        "\"vocab_size\": 512, \"rope_theta\": 10000.0, \"rms_norm_eps\": 1e-06,\n"
        "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2.0}\n } \n\n";
    test_tensors set;
    make_in(&set);
    test_write_text("in/config.json", config);
    gn_quantize_options o = from_golden();
    o.in = test_path("in");
    o.double_quant = false;
    must_quantize(&o);
    char *text;
    size_t length;
    gn_error err = {0};
    cr_assert_eq(gn_text_read(&text, &length, test_path("out/config.json"), &err), GN_OK);
    cr_assert_eq(strncmp(text, config, strlen(config) - 6), 0);
    cr_assert(strstr(text, "\"bnb_4bit_use_double_quant\": false"));
    free(text);
    gn_config c;
    cr_assert_eq(gn_config_read(&c, o.out, &err), GN_OK, "%s", err.message);
    cr_assert(c.bnb_4bit && c.rope_type == GN_ROPE_LINEAR && c.rope_factor == 2);
}

Test(quantize, large_models_come_in_shards) {
    gn_quantize_options o = from_golden();
    struct stat st;
    o.max_shard_bytes = 150000;
    must_quantize(&o);
    cr_assert(test_exists("out/model.safetensors.index.json"));
    cr_assert_not(test_exists("out/model.safetensors"));
    cr_assert_eq(stat(test_path("out/model-00002-of-00005.safetensors"), &st), 0);
    cr_assert(st.st_size > 75000 && st.st_size < 170000, "%lld", (long long)st.st_size);
    cJSON *index;
    gn_error err = {0};
    const char *path = test_path("out/model.safetensors.index.json");
    cr_assert_eq(gn_json_read(&index, path, &err), GN_OK, "%s", err.message);
    gn_tensor_file *file = open_dir(o.out), *whole = open_dir(GOLDEN "tiny-bnb-nf4");
    const cJSON *map = cJSON_GetObjectItem(index, "weight_map");
    cr_assert_eq((size_t)cJSON_GetArraySize(map), gn_tensor_file_count(file));
    cr_assert_eq(gn_tensor_file_count(file), gn_tensor_file_count(whole));
    int64_t bytes = 0;
    for (size_t i = 0; i < gn_tensor_file_count(file); i++) {
        bytes += (int64_t)gn_tensor_file_at(file, i)->bytes;
        compare(gn_tensor_file_at(file, i), gn_tensor_file_at(whole, i));
    }
    const cJSON *metadata = cJSON_GetObjectItem(index, "metadata");
    cr_assert_eq((int64_t)cJSON_GetObjectItem(metadata, "total_size")->valuedouble, bytes);
    cJSON_Delete(index);
    gn_tensor_file_close(file);
    gn_tensor_file_close(whole);
    gn_model_close(open_model(o.out));
}

Test(quantize, wide_types_are_taken_as_they_are) {
    test_tensors set;
    make_in(&set);
    for (size_t i = 0; i < set.n; i++) {
        gn_file_tensor *t = &set.tensors[i];
        const int64_t n = (int64_t)t->bytes / 2;
        float *wide = test_alloc((size_t)n * sizeof *wide);
        gn_widen(wide, t->data, GN_BF16, n);
        *t = (gn_file_tensor){.name = t->name,
                              .dtype = GN_F32,
                              .ndim = t->ndim,
                              .shape = {t->shape[0], t->shape[1]},
                              .data = wide,
                              .bytes = (size_t)n * sizeof *wide};
    }
    test_tensors_write(&set, "in/model.safetensors", 3);
    gn_quantize_options o = from_golden();
    gn_quantize_result result;
    gn_error err = {0};
    o.in = test_path("in");
    cr_assert_eq(gn_quantize_folder(&o, &result, &err), GN_OK, "%s", err.message);
    gn_model *m = open_model(o.out);
    cr_assert_eq(m->layers[0].proj[GN_Q].dtype, GN_F32);
    cr_assert_eq(m->embed.dtype, GN_F32);
    gn_model_close(m);
}

typedef struct steps {
    int n;
    int64_t done, total;
} steps;

static void note(void *user, int64_t done, int64_t total) {
    steps *s = user;
    cr_assert(done > s->done && done <= total && (!s->n || total == s->total));
    *s = (steps){s->n + 1, done, total};
}

Test(quantize, progress_ends_with_all_bytes) {
    steps s = {0};
    gn_quantize_options o = from_golden();
    o.progress = note;
    o.user = &s;
    must_quantize(&o);
    cr_assert(s.n == 30 && s.done == s.total && s.total == 1468160, "%d, %lld of %lld", s.n,
              (long long)s.done, (long long)s.total);
}

/* ---- memory ---- */
#ifndef __SANITIZE_THREAD__ /* which keeps several bytes for each that was read */
#ifdef __SANITIZE_ADDRESS__ /* which keeps what was freed */
enum { OVERHEAD = 72 << 20 };
#else
enum { OVERHEAD = 32 << 20 };
#endif

/* Weights are in memory one tensor at a time, however many there are. */
Test(quantize, memory_follows_the_largest_tensor) {
    enum { HIDDEN = 1024, INTERMEDIATE = 8192, LAYERS = 2 };
    const int64_t largest = (int64_t)HIDDEN * INTERMEDIATE * (int64_t)sizeof(float);
    const int64_t all = test_zeros_model("in", HIDDEN, INTERMEDIATE, LAYERS);
    gn_quantize_options o = from_golden();
    gn_quantize_result result;
    gn_error err = {0};
    o.in = test_path("in");
    cr_assert_gt(all, 2 * (largest + OVERHEAD));
    const int64_t before = test_peak_memory();
    cr_assert_eq(gn_quantize_folder(&o, &result, &err), GN_OK, "%s", err.message);
    const int64_t growth = (test_peak_memory() - before) * 1024;
    cr_assert_eq(result.bytes_in, all);
    cr_assert_lt(growth, largest + OVERHEAD, "%lld bytes", (long long)growth);
}

#endif

/* ---- what is refused, and what is left then ---- */

Test(quantize, what_is_there_stays) {
    gn_quantize_options o = from_golden();
    test_write_text("out", "a file");
    expect_error(&o, GN_EEXIST, test_path("out"));
    cr_assert_eq(remove(test_path("out")), 0);
    must_quantize(&o);
    gn_quantize_result result;
    gn_error err = {0};
    cr_assert_eq(gn_quantize_folder(&o, &result, &err), GN_EEXIST);
    char slash[256];
    snprintf(slash, sizeof slash, "%s/", test_path("out"));
    o.out = slash;
    cr_assert_eq(gn_quantize_folder(&o, &result, &err), GN_EEXIST, "%s", err.message);
    gn_model_close(open_model(slash));
    snprintf(slash, sizeof slash, "%s//", test_path("new"));
    must_quantize(&o);
    gn_model_close(open_model(test_path("new")));
    cr_assert_eq(mkdir(test_path("other.partial"), 0777), 0);
    o.out = test_path("other");
    cr_assert_eq(gn_quantize_folder(&o, &result, &err), GN_EEXIST);
    cr_assert(strstr(err.message, "other.partial") && strstr(err.message, "remove it"), "%s",
              err.message);
}

Test(quantize, wrong_requests_are_refused) {
    gn_quantize_options o = from_golden();
    o.type = GN_Q_INT8;
    expect_error(&o, GN_EINVAL, "int8");
    o = from_golden();
    o.in = GOLDEN "tiny-bnb-nf4";
    expect_error(&o, GN_EINVAL, "4-bit already");
    o.in = test_path("nowhere");
    expect_error(&o, GN_ENOENT, "nowhere/config.json");
    o = from_golden();
    o.out = test_path("no/folder");
    expect_error(&o, GN_EIO, "no/folder");
}

Test(quantize, wrong_weights_are_named_and_nothing_is_left) {
    test_tensors set;
    gn_quantize_options o = from_golden();
    make_in(&set);
    o.in = test_path("in");
    const gn_file_tensor saved = *test_tensor(&set, Q0);
    uint16_t *values = (uint16_t *)test_tensor(&set, "model.layers.2.mlp.up_proj.weight")->data;
    values[130] = 0x7f80;
    test_tensors_write(&set, "in/model.safetensors", 0);
    expect_error(&o, GN_EINVAL, "tensor model.layers.2.mlp.up_proj.weight: ");
    values[130] = 0;
    test_tensor(&set, Q0)->shape[0] = 64;
    test_tensor(&set, Q0)->shape[1] = 256;
    test_tensors_write(&set, "in/model.safetensors", 0);
    expect_error(&o, GN_EMISMATCH, "tensor " Q0 " has shape (64, 256)");
    *test_tensor(&set, Q0) = saved;
    test_tensor(&set, Q0)->dtype = GN_I8;
    test_tensor(&set, Q0)->shape[1] = 256;
    test_tensors_write(&set, "in/model.safetensors", 0);
    expect_error(&o, GN_EFORMAT, "tensor " Q0 " is I8");
    test_tensor_remove(&set, Q0);
    test_tensors_write(&set, "in/model.safetensors", 0);
    expect_error(&o, GN_EFORMAT, "tensor " Q0 " is missing");
}

/* A limit on file sizes fails like a full disk, at every stage of the writing. */
Test(quantize, a_full_disk_leaves_nothing) {
    static const rlim_t limits[] = {0, 100, 20000, 300000, 600000};
    gn_quantize_options o = from_golden();
    signal(SIGXFSZ, SIG_IGN);
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        struct rlimit limit;
        cr_assert_eq(getrlimit(RLIMIT_FSIZE, &limit), 0);
        limit.rlim_cur = limits[i];
        cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
        expect_error(&o, GN_EIO, test_path("out"));
    }
}
