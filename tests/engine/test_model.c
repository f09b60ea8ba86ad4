/* test_model.c - base models from folders: in every form the same weights, every wrong tensor
 * refused with its name; and models of random weights. */
#include <criterion/criterion.h>

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/model_internal.h"
#include "kernels/backend.h"
#include "tests/support/folder.h"

#define GOLDEN GN_SOURCE_DIR "/tests/golden/data/"
#define Q0     "model.layers.0.self_attn.q_proj.weight"

enum { LAYERS = 3, HIDDEN = 128, VOCAB = 512 };

/* What these tests look at lies in the CPU's memory. */
static gn_model_options on_cpu(const gn_model_options *options) {
    gn_model_options o = options ? *options : (gn_model_options){0};
    o.device = "cpu";
    return o;
}

static gn_model *must_open(const char *dir, const gn_model_options *options) {
    const gn_model_options o = on_cpu(options);
    gn_model *model = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_model_open(&model, dir, &o, &err), GN_OK, "%s", err.message);
    return model;
}

static void expect_error(const char *dir, const gn_model_options *options, gn_status status,
                         const char *part) {
    const gn_model_options o = on_cpu(options);
    gn_model *model = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_model_open(&model, dir, &o, &err), status, "%s: %s", part, err.message);
    cr_assert_null(model);
    cr_assert_eq(err.status, status);
    cr_assert(strstr(err.message, part), "\"%s\" lacks \"%s\"", err.message, part);
}

/* The test's folder becomes a copy of a golden one whose weights are then in `set`. */
static void copy_golden(const char *name, test_tensors *set) {
    static const char *const files[] = {"config.json", "tokenizer.model"};
    char path[512];
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, GOLDEN "%s/%s", name, files[i]);
        test_copy(path, files[i]);
    }
    snprintf(path, sizeof path, GOLDEN "%s/model.safetensors", name);
    test_tensors_read(set, path);
}

static void write_config(const char *more) {
    char text[1024];
    snprintf(text, sizeof text,
             "{\"model_type\":\"llama\",\"hidden_size\":128,\"intermediate_size\":352,"
             "\"num_hidden_layers\":3,\"num_attention_heads\":4,\"vocab_size\":512,"
             "\"rms_norm_eps\":1e-6%s}",
             more);
    test_write_text("config.json", text);
}

TestSuite(model, .init = test_folder_make, .fini = test_folder_remove);

/* ---- what a folder becomes ---- */

Test(model, a_16_bit_folder_becomes_nf4_as_bitsandbytes_makes_it) {
    gn_model *ours = must_open(GOLDEN "tiny-bf16", NULL),
             *theirs = must_open(GOLDEN "tiny-bnb-nf4", NULL);
    int64_t bytes = 0, codes_off = 0, scales = 0, scales_off = 0, nested_off = 0, offsets_off = 0;
    for (int i = 0; i < LAYERS * GN_PROJ_COUNT; i++) {
        const gn_matrix *a = &ours->layers[i / GN_PROJ_COUNT].proj[i % GN_PROJ_COUNT],
                        *b = &theirs->layers[i / GN_PROJ_COUNT].proj[i % GN_PROJ_COUNT];
        const int64_t n = a->rows * a->cols, blocks = n / GN_BLOCK;
        cr_assert(a->qtype == GN_Q_NF4 && b->qtype == GN_Q_NF4 && a->dtype == GN_BF16 &&
                  b->dtype == GN_BF16 && a->rows == b->rows && a->cols == b->cols);
        cr_assert_eq(memcmp(a->code, b->code, 16 * sizeof *a->code), 0);
        cr_assert_eq(memcmp(a->nested_code, b->nested_code, 256 * sizeof *a->code), 0);
        for (int64_t k = 0; k < n / 2; k++)
            codes_off += ((const uint8_t *)a->data)[k] != ((const uint8_t *)b->data)[k];
        for (int64_t k = 0; k < blocks; k++) scales_off += a->absmax_u8[k] != b->absmax_u8[k];
        for (int64_t k = 0; k < blocks; k++) {
            const float x = gn_matrix_scale(a, k), y = gn_matrix_scale(b, k);
            /* offset and nested absmax may each be off in the last place, and each step rounds */
            cr_assert(fabsf(x - y) <= 4 * FLT_EPSILON / 2 * fmaxf(b->offset, y),
                      "projection %d: scale %lld is %a, theirs %a", i, (long long)k, (double)x,
                      (double)y);
            nested_off += x != y;
        }
        cr_assert(fabsf(a->offset - b->offset) <= FLT_EPSILON * b->offset);
        offsets_off += a->offset != b->offset;
        bytes += n / 2, scales += blocks;
    }
    fprintf(stderr,
            "%lld bytes of codes, %lld differ; %lld scales, %lld differ in their code, %lld in "
            "the last place; %lld of %d offsets differ in the last place\n",
            (long long)bytes, (long long)codes_off, (long long)scales, (long long)scales_off,
            (long long)nested_off, (long long)offsets_off, LAYERS * GN_PROJ_COUNT);
    cr_assert_eq(scales_off, 0);
    cr_assert_leq(codes_off, 2); /* golden/test_blockquant tells which may */
    gn_model_close(ours);
    gn_model_close(theirs);
}

Test(model, is_described) {
    gn_model *m = must_open(GOLDEN "tiny-bf16", NULL);
    const gn_model_info i = gn_model_describe(m);
    const int64_t projections = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * 352),
                  plain = 2 * VOCAB * HIDDEN, norms = (2 * LAYERS + 1) * HIDDEN;
    cr_assert_str_eq(i.dir, GOLDEN "tiny-bf16");
    cr_assert_eq(i.quant, GN_Q_NF4);
    cr_assert_eq(i.parameters, projections + plain + norms);
    int64_t bytes = projections / 2 + projections / GN_BLOCK + 2 * plain + 4 * norms;
    for (int p = 0; p < GN_PROJ_COUNT; p++)
        bytes += (int64_t)sizeof(float) * LAYERS *
                 ((m->layers[0].proj[p].rows * m->layers[0].proj[p].cols / GN_BLOCK + 255) / 256);
    cr_assert(llabs(i.weight_bytes - bytes) <= 64 * LAYERS * GN_PROJ_COUNT, "%lld, expected %lld",
              (long long)i.weight_bytes, (long long)bytes);
    cr_assert(i.layers == LAYERS && i.hidden == HIDDEN && i.intermediate == 352 && i.heads == 4 &&
              i.kv_heads == 4 && i.head_dim == 32 && i.vocab == VOCAB && i.context == 512);
    cr_assert(i.device && i.compute != GN_COMPUTE_AUTO);
    gn_model_close(m);
    gn_model_close(NULL);
}

/* Half the widest gap between neighbouring code values, as a share of the block's scale. */
static float half_gap(const gn_matrix *w) {
    float widest = 2.0f / 127; /* int8 */
    for (int i = 0; w->code && i < 16; i++) {
        float above = INFINITY;
        for (int k = 0; k < 16; k++)
            if (w->code[k] > w->code[i]) above = fminf(above, w->code[k]);
        if (isfinite(above)) widest = fmaxf(widest, above - w->code[i]);
    }
    return widest / 2;
}

static float largest(const float *values, int64_t n) {
    float max = 0;
    for (int64_t i = 0; i < n; i++) max = fmaxf(max, fabsf(values[i]));
    return max;
}

/* Each value is off by half a gap at most, by what its scale is off, and by one bf16 rounding. */
static void check_near(const gn_matrix *w, const gn_matrix *stored) {
    const int64_t n = w->rows * w->cols, block = w->qtype == GN_Q_INT8 ? w->cols : GN_BLOCK;
    float *x = malloc((size_t)n * sizeof *x), *y = malloc((size_t)n * sizeof *y);
    bool same = true;
    gn_dequantize(x, w, 0, n);
    gn_widen(y, stored->data, stored->dtype, n);
    for (int64_t b = 0; b < n / block; b++) {
        const float absmax = largest(y + b * block, block);
        const float scale = w->qtype == GN_Q_INT8 ? absmax : gn_matrix_scale(w, b);
        const float bound = half_gap(w) * absmax + fabsf(scale - absmax) + absmax / 256;
        for (int64_t i = b * block; i < (b + 1) * block; i++) {
            cr_assert(fabsf(x[i] - y[i]) <= bound, "%s: element %lld is %g, stored %g",
                      gn_qtype_name(w->qtype), (long long)i, (double)x[i], (double)y[i]);
            same = same && x[i] == y[i];
        }
    }
    cr_assert_not(same);
    free(x);
    free(y);
}

Test(model, every_quantization_is_near_what_is_stored) {
    gn_model *stored =
        must_open(GOLDEN "tiny-bf16", &(gn_model_options){.as_stored = true, .quant = GN_Q_INT8});
    cr_assert_eq(gn_model_describe(stored).quant, GN_Q_NONE);
    for (int type = GN_Q_NF4; type < GN_QTYPE_COUNT; type++) {
        for (int single = 0; single < 2; single++) {
            const gn_model_options options = {.quant = (gn_qtype)type, .no_double_quant = single};
            const bool nested = !single && type != GN_Q_INT8;
            gn_model *m = must_open(GOLDEN "tiny-bf16", &options);
            cr_assert_eq(gn_model_describe(m).quant, (gn_qtype)type);
            for (int p = 0; p < GN_PROJ_COUNT; p++) {
                const gn_matrix *w = &m->layers[1].proj[p];
                cr_assert_eq(w->absmax_u8 != NULL, nested);
                cr_assert_eq(w->absmax == NULL, nested);
                check_near(w, &stored->layers[1].proj[p]);
            }
            gn_model_close(m);
        }
    }
    gn_model_close(stored);
}

static const void *in_file(const gn_model *m, const char *name) {
    return gn_tensor_file_find(m->file, name)->data;
}

Test(model, what_can_stay_in_the_file_does) {
    gn_model *m = must_open(GOLDEN "tiny-bnb-nf4", NULL);
    cr_assert_eq(m->layers[0].proj[GN_Q].data, in_file(m, Q0));
    cr_assert_eq(m->layers[0].proj[GN_Q].absmax_u8, in_file(m, Q0 ".absmax"));
    gn_model_close(m);
    m = must_open(GOLDEN "tiny-bf16", &(gn_model_options){.as_stored = true});
    cr_assert_eq(m->layers[0].proj[GN_Q].data, in_file(m, Q0));
    cr_assert_eq(m->layers[0].proj[GN_Q].dtype, GN_BF16);
    cr_assert_eq(m->embed.data, in_file(m, "model.embed_tokens.weight"));
    gn_model_close(m);
}

/* At any place in the file: what is not aligned is copied. */
Test(model, weights_may_stand_anywhere) {
    test_tensors set;
    float row[HIDDEN], expected[HIDDEN];
    copy_golden("tiny-bnb-nf4", &set);
    gn_model *golden = must_open(GOLDEN "tiny-bnb-nf4", NULL);
    for (size_t padding = 0; padding < 8; padding++) {
        test_tensors_write(&set, "model.safetensors", padding);
        gn_model *m = must_open(test_path(""), NULL);
        for (int p = 0; p < GN_PROJ_COUNT; p++) {
            gn_dequantize(row, &m->layers[2].proj[p], 0, HIDDEN);
            gn_dequantize(expected, &golden->layers[2].proj[p], 0, HIDDEN);
            cr_assert_eq(memcmp(row, expected, sizeof row), 0);
        }
        gn_widen(row, m->embed.data, m->embed.dtype, HIDDEN);
        gn_widen(expected, golden->embed.data, golden->embed.dtype, HIDDEN);
        cr_assert_eq(memcmp(row, expected, sizeof row), 0);
        cr_assert_eq((uintptr_t)m->embed.data % 2, 0);
        cr_assert_eq((uintptr_t)m->layers[2].proj[GN_UP].nested_absmax % 4, 0);
        gn_model_close(m);
    }
    gn_model_close(golden);
}

static void convert(gn_file_tensor *t, gn_dtype dtype) {
    const int64_t n = (int64_t)(t->bytes / gn_dtype_size(t->dtype));
    float *wide = test_alloc((size_t)n * sizeof *wide);
    void *data = test_alloc((size_t)n * sizeof *wide);
    gn_widen(wide, t->data, t->dtype, n);
    gn_narrow(data, dtype, wide, n);
    t->data = data;
    t->dtype = dtype;
    t->bytes = (size_t)n * gn_dtype_size(dtype);
}

Test(model, dequantized_values_have_the_stored_type) {
    static const gn_dtype dtypes[] = {GN_F32, GN_F16, GN_BF16};
    for (int d = 0; d < 3; d++) {
        test_tensors set;
        copy_golden("tiny-bf16", &set);
        for (size_t i = 0; i < set.n; i++) convert(&set.tensors[i], dtypes[d]);
        test_tensors_write(&set, "model.safetensors", 1);
        for (int as_stored = 0; as_stored < 2; as_stored++) {
            gn_model *m = must_open(test_path(""), &(gn_model_options){.as_stored = as_stored});
            cr_assert_eq(m->layers[0].proj[GN_DOWN].dtype, dtypes[d]);
            cr_assert_eq(m->embed.dtype, dtypes[d]);
            cr_assert_eq(m->norm.dtype, GN_F32);
            gn_model_close(m);
        }
    }
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

Test(model, progress_ends_with_all_bytes) {
    static const char *const names[] = {"tiny-bf16", "tiny-bnb-nf4"};
    for (int i = 0; i < 2; i++) {
        char dir[512];
        steps s = {0};
        snprintf(dir, sizeof dir, GOLDEN "%s", names[i]);
        gn_model_close(must_open(dir, &(gn_model_options){.progress = note, .user = &s}));
        cr_assert_gt(s.n, 20);
        cr_assert_eq(s.done, s.total);
    }
}

Test(model, tied_embeddings_share_their_memory) {
    test_tensors set;
    copy_golden("tiny-bf16", &set);
    write_config(",\"tie_word_embeddings\":true");
    for (int removed = 0; removed < 2; removed++) {
        if (removed) test_tensor_remove(&set, "lm_head.weight");
        test_tensors_write(&set, "model.safetensors", 0);
        gn_model *m = must_open(test_path(""), NULL);
        cr_assert_eq(m->lm_head.data, m->embed.data);
        gn_model_close(m);
    }
    write_config("");
    expect_error(test_path(""), NULL, GN_EFORMAT, "tensor lm_head.weight is missing");
}

Test(model, computed_frequencies_in_the_file_are_tolerated) {
    test_tensors set;
    copy_golden("tiny-bf16", &set);
    test_tensor_add(&set, "model.layers.0.self_attn.rotary_emb.inv_freq", GN_F32, 16);
    test_tensors_write(&set, "model.safetensors", 0);
    gn_model_close(must_open(test_path(""), NULL));
}

Test(model, shards_make_the_same_model) {
    test_tensors all, part;
    static char index[1 << 16];
    size_t used = (size_t)sprintf(index, "{\"weight_map\":{");
    copy_golden("tiny-bf16", &all);
    for (size_t shard = 0; shard < 2; shard++) {
        char name[32];
        sprintf(name, "%zu.safetensors", shard);
        part.n = 0;
        for (size_t i = shard; i < all.n; i += 2) {
            part.tensors[part.n++] = all.tensors[i];
            used += (size_t)sprintf(index + used, "%s\"%s\":\"%s\"", i ? "," : "",
                                    all.tensors[i].name, name);
        }
        test_tensors_write(&part, name, shard);
    }
    strcpy(index + used, "}}");
    test_write_text("model.safetensors.index.json", index);
    gn_model *m = must_open(test_path(""), NULL), *golden = must_open(GOLDEN "tiny-bf16", NULL);
    for (int i = 0; i < LAYERS * GN_PROJ_COUNT; i++) {
        const gn_matrix *a = &m->layers[i / GN_PROJ_COUNT].proj[i % GN_PROJ_COUNT],
                        *b = &golden->layers[i / GN_PROJ_COUNT].proj[i % GN_PROJ_COUNT];
        cr_assert_eq(memcmp(a->data, b->data, (size_t)(a->rows * a->cols / 2)), 0);
    }
    gn_model_close(m);
    gn_model_close(golden);
}

/* ---- what is refused ---- */

Test(model, missing_files_are_named) {
    test_tensors set;
    expect_error(test_path("nowhere"), NULL, GN_ENOENT, "nowhere/config.json: no such file");
    expect_error(test_path("nowhere"), NULL, GN_ENOENT, "Hugging Face folder");
    expect_error(GOLDEN "tiny-bf16/model.safetensors", NULL, GN_ENOENT, "not a folder");
    write_config("");
    expect_error(test_path(""), NULL, GN_ENOENT, "tokenizer.model");
    copy_golden("tiny-bf16", &set);
    expect_error(test_path(""), NULL, GN_ENOENT, "model.safetensors");
    test_write_text("model.safetensors", "<html>not found</html>");
    expect_error(test_path(""), NULL, GN_EFORMAT, "model.safetensors");
}

static void rename_tensor(test_tensors *set, const char *name) {
    test_tensor(set, Q0)->name = name;
}

static void poison(test_tensors *set, const char *name, uint16_t bits) {
    gn_file_tensor *t = test_tensor(set, name);
    uint16_t *values = (uint16_t *)t->data;
    values[HIDDEN + 3] = bits;
}

static void reshape(test_tensors *set, const char *name, int ndim, int64_t rows, int64_t cols) {
    gn_file_tensor *t = test_tensor(set, name);
    t->ndim = ndim;
    t->shape[0] = rows;
    t->shape[1] = cols;
}

Test(model, wrong_16_bit_weights_are_named) {
    for (int test_case = 0; test_case < 11; test_case++) {
        test_tensors set;
        gn_status status = GN_EFORMAT;
        const char *part = "";
        copy_golden("tiny-bf16", &set);
        switch (test_case) {
        case 0:
            test_tensor_remove(&set, "model.layers.2.mlp.up_proj.weight");
            part = "tensor model.layers.2.mlp.up_proj.weight is missing";
            break;
        case 1:
            test_tensor_remove(&set, "model.norm.weight");
            part = "tensor model.norm.weight is missing";
            break;
        case 2: rename_tensor(&set, "q_proj.weight"), part = "tensor " Q0 " is missing"; break;
        case 3:
            test_tensor_add(&set, "model.layers.3.input_layernorm.weight", GN_BF16, HIDDEN);
            part = "tensor model.layers.3.input_layernorm.weight has no place";
            break;
        case 4:
            test_tensor_add(&set, "model.layers.0.self_attn.q_proj.bias", GN_BF16, HIDDEN);
            part = "tensor model.layers.0.self_attn.q_proj.bias has no place";
            break;
        case 5:
            test_tensor_add(&set, Q0 ".absmax", GN_F32, 256);
            part = "tensor " Q0 ".absmax has no place";
            break;
        case 6:
            reshape(&set, "model.layers.1.mlp.down_proj.weight", 2, 352, 128);
            status = GN_EMISMATCH;
            part = "tensor model.layers.1.mlp.down_proj.weight has shape (352, 128), but "
                   "config.json makes it (128, 352)";
            break;
        case 7:
            reshape(&set, "model.norm.weight", 2, 128, 1);
            status = GN_EMISMATCH;
            part = "tensor model.norm.weight has shape (128, 1), but config.json makes it (128)";
            break;
        case 8:
            test_tensor(&set, Q0)->dtype = GN_I8;
            reshape(&set, Q0, 2, 128, 256);
            part = "tensor " Q0 " is I8; expected F32, F16 or BF16";
            break;
        case 9:
            poison(&set, Q0, 0x7f80);
            status = GN_EINVAL;
            part = "tensor " Q0 ": ";
            break;
        default:
            poison(&set, "model.layers.2.mlp.gate_proj.weight", 0xffc1);
            status = GN_EINVAL;
            part = "tensor model.layers.2.mlp.gate_proj.weight: ";
        }
        test_tensors_write(&set, "model.safetensors", 0);
        expect_error(test_path(""), NULL, status, part);
    }
}

Test(model, a_config_for_another_model_is_noticed) {
    static const struct {
        const char *more, *part;
    } cases[] = {
        {",\"hidden_size\":64", "model.embed_tokens.weight"},
        {",\"vocab_size\":513", "model.embed_tokens.weight"},
        {",\"vocab_size\":500", "tokenizer"},
        {",\"intermediate_size\":353", "mlp.gate_proj.weight"},
        {",\"num_key_value_heads\":2", "self_attn.k_proj.weight"},
        {",\"num_hidden_layers\":2", "model.layers.2"},
        {",\"num_hidden_layers\":4", "model.layers.3"},
        {",\"head_dim\":64", Q0},
    };
    test_tensors set;
    copy_golden("tiny-bf16", &set);
    test_tensors_write(&set, "model.safetensors", 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const gn_model_options o = on_cpu(NULL);
        gn_model *m = NULL;
        gn_error err = {0};
        write_config(cases[i].more);
        cr_assert_neq(gn_model_open(&m, test_path(""), &o, &err), GN_OK, "%s", cases[i].more);
        cr_assert(strstr(err.message, cases[i].part), "%s: %s", cases[i].more, err.message);
    }
}

static void set_state(test_tensors *set, const char *from, const char *to) {
    gn_file_tensor *t = test_tensor(set, Q0 ".quant_state.bitsandbytes__nf4");
    char *text = test_alloc(t->bytes + strlen(to)), *at = strstr(t->data, from);
    cr_assert(at, "%s", from);
    sprintf(text, "%.*s%s%s", (int)(at - (const char *)t->data), (const char *)t->data, to,
            at + strlen(from));
    t->data = text;
    t->bytes = strlen(text);
    t->shape[0] = (int64_t)t->bytes;
}

Test(model, wrong_quant_states_are_named) {
    static const struct {
        const char *from, *to;
        gn_status status;
        const char *part;
    } cases[] = {
        {"{", "[", GN_EFORMAT, "not a JSON object"},
        {"nf4", "fp4", GN_EFORMAT, "quant_type"},
        {"\"blocksize\": 64", "\"blocksize\": 128", GN_EUNSUPPORTED, "blocksize is not 64"},
        {"[128, 128]", "[128, 64]", GN_EMISMATCH, "(128, 128)"},
        {"[128, 128]", "[128]", GN_EMISMATCH, "(128, 128)"},
        {"[128, 128]", "[\"128\", 128]", GN_EMISMATCH, "(128, 128)"},
        {"bfloat16", "float64", GN_EUNSUPPORTED, "dtype"},
        {"\"nested_blocksize\": 256", "\"nested_blocksize\": 64", GN_EUNSUPPORTED,
         "nested_blocksize is not 256"},
        {"\"nested_offset\": 0", "\"nested_offset\": 1e300, \"x\": 0", GN_EFORMAT, "nested_offset"},
        {"\"nested_offset\": 0", "\"nested_offset\": \"\", \"x\": 0", GN_EFORMAT, "nested_offset"},
        {"\"nested_offset\"", "\"other\"", GN_EFORMAT, Q0 ".absmax is U8"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        test_tensors set;
        copy_golden("tiny-bnb-nf4", &set);
        set_state(&set, cases[i].from, cases[i].to);
        test_tensors_write(&set, "model.safetensors", 0);
        expect_error(test_path(""), NULL, cases[i].status, cases[i].part);
        expect_error(test_path(""), NULL, cases[i].status, Q0);
    }
}

Test(model, wrong_4_bit_weights_are_named) {
    static const char *const parts[] = {"",
                                        ".absmax",
                                        ".quant_map",
                                        ".nested_absmax",
                                        ".nested_quant_map",
                                        ".quant_state.bitsandbytes__nf4"};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        test_tensors set;
        char name[128];
        snprintf(name, sizeof name, Q0 "%s", parts[i]);
        copy_golden("tiny-bnb-nf4", &set);
        gn_file_tensor *t = test_tensor(&set, name);
        if (i < 5) { /* of a wrong length */
            *t = (gn_file_tensor){.name = name,
                                  .dtype = t->dtype,
                                  .ndim = 1,
                                  .shape = {3},
                                  .data = test_alloc(3 * sizeof(float)),
                                  .bytes = 3 * gn_dtype_size(t->dtype)};
            test_tensors_write(&set, "model.safetensors", 0);
            expect_error(test_path(""), NULL, GN_EMISMATCH, name);
        }
        test_tensor_remove(&set, name);
        test_tensors_write(&set, "model.safetensors", 0);
        expect_error(test_path(""), NULL, GN_EFORMAT, Q0);
        expect_error(test_path(""), NULL, GN_EFORMAT, "missing");
    }
    static const char *const scales[] = {".quant_map", ".nested_absmax", ".nested_quant_map"};
    for (size_t i = 0; i < 3; i++) {
        test_tensors set;
        char name[128];
        const float infinite = INFINITY;
        snprintf(name, sizeof name, Q0 "%s", scales[i]);
        copy_golden("tiny-bnb-nf4", &set);
        memcpy((void *)test_tensor(&set, name)->data, &infinite, sizeof infinite);
        test_tensors_write(&set, "model.safetensors", 0);
        expect_error(test_path(""), NULL, GN_EFORMAT, name);
        expect_error(test_path(""), NULL, GN_EFORMAT, "not finite at 0");
    }
    test_tensors set;
    copy_golden("tiny-bnb-nf4", &set);
    test_tensor_add(&set, Q0 ".quant_state.bitsandbytes__fp4", GN_U8, 8);
    test_tensors_write(&set, "model.safetensors", 0);
    expect_error(test_path(""), NULL, GN_EFORMAT, "bitsandbytes__fp4 has no place");
}

Test(model, four_bits_cannot_become_others) {
    static const gn_qtype others[] = {GN_Q_FP4, GN_Q_INT8};
    for (int i = 0; i < 2; i++)
        expect_error(GOLDEN "tiny-bnb-nf4", &(gn_model_options){.quant = others[i]}, GN_EINVAL,
                     "nf4 already");
    gn_model_close(must_open(GOLDEN "tiny-bnb-nf4", &(gn_model_options){.quant = GN_Q_NF4}));
    const gn_model_options as_stored = {.as_stored = true, .quant = GN_Q_INT8};
    gn_model_close(must_open(GOLDEN "tiny-bnb-nf4", &as_stored));
}

/* ---- random weights ---- */

Test(model, random_weights_look_like_real_ones) {
    for (int form = 0; form < 3; form++) {
        const gn_model_options options = {
            .device = "cpu", .as_stored = form == 1, .no_double_quant = form == 2};
        gn_model *m = NULL, *again = NULL;
        cr_assert_eq(gn_model_synthetic(&m, "llama-tiny", &options, NULL), GN_OK);
        cr_assert_eq(gn_model_synthetic(&again, "llama-tiny", &options, NULL), GN_OK);
        const gn_model_info info = gn_model_describe(m);
        cr_assert_eq(info.quant, form == 1 ? GN_Q_NONE : GN_Q_NF4);
        cr_assert(info.layers == 3 && info.vocab == 512 && info.context == 2048);
        for (int p = 0; p < GN_PROJ_COUNT; p++) {
            const gn_matrix *w = &m->layers[1].proj[p];
            const int64_t n = w->rows * w->cols;
            float *values = malloc((size_t)n * sizeof *values),
                  *same = malloc((size_t)n * sizeof *same);
            double sum = 0, squares = 0;
            gn_dequantize(values, w, 0, n);
            gn_dequantize(same, &again->layers[1].proj[p], 0, n);
            cr_assert_eq(memcmp(values, same, (size_t)n * sizeof *values), 0);
            for (int64_t i = 0; i < n; i++) sum += values[i], squares += values[i] * values[i];
            const double deviation = sqrt(squares / (double)n);
            cr_assert(deviation > 0.015 && deviation < 0.03, "%g", deviation);
            cr_assert(fabs(sum / (double)n) < 0.003, "%g", sum / (double)n);
            free(values);
            free(same);
        }
        gn_model_close(m);
        gn_model_close(again);
    }
}

Test(model, random_weights_come_in_known_shapes) {
    gn_model *m = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_model_synthetic(&m, "llama-8b", NULL, &err), GN_EINVAL);
    cr_assert(strstr(err.message, "llama-8b") && strstr(err.message, "llama-1.1b"), "%s",
              err.message);
    const gn_model_options options = {.device = "cpu", .quant = GN_Q_INT4};
    cr_assert_eq(gn_model_synthetic(&m, "llama-tiny", &options, &err), GN_EUNSUPPORTED);
    cr_assert(strstr(err.message, "int4"), "%s", err.message);
    cr_assert_null(m);
}

Test(model, random_weights_have_no_text) {
    gn_model *m = NULL;
    gn_error err = {0};
    int32_t *ids, n;
    char *text;
    size_t len;
    const gn_model_options options = on_cpu(NULL);
    cr_assert_eq(gn_model_synthetic(&m, "llama-tiny", &options, NULL), GN_OK);
    cr_assert_eq(gn_tokenize(m, "x", 1, true, &ids, &n, &err), GN_EUNSUPPORTED);
    cr_assert_eq(gn_detokenize(m, &(int32_t){1}, 1, &text, &len, &err), GN_EUNSUPPORTED);
    cr_assert_eq(gn_chat_encode(m, NULL, 0, &ids, &n, &err), GN_EUNSUPPORTED);
    gn_chat_stops(m, &n);
    cr_assert_eq(n, 0);
    gn_token_bytes(m, 5, &len);
    cr_assert_eq(len, 0);
    gn_model_close(m);
}

/* ---- text ---- */

Test(model, text_comes_back) {
    static const char text[] = "the quick brown fox\njumps";
    gn_model *m = must_open(GOLDEN "tiny-bf16", NULL);
    int32_t *ids, n, n_plain;
    char *back;
    size_t len;
    gn_error err = {0};
    cr_assert_eq(gn_tokenize(m, text, sizeof text - 1, false, &ids, &n_plain, &err), GN_OK);
    free(ids);
    cr_assert_eq(gn_tokenize(m, text, sizeof text - 1, true, &ids, &n, &err), GN_OK);
    cr_assert_eq(n, n_plain + 1);
    cr_assert_eq(ids[0], 1);
    cr_assert_eq(gn_detokenize(m, ids, n, &back, &len, &err), GN_OK);
    cr_assert_str_eq(back, text);
    cr_assert_eq(len, sizeof text - 1);
    free(back);
    ids[1] = VOCAB;
    cr_assert_eq(gn_detokenize(m, ids, n, &back, &len, &err), GN_EINVAL);
    cr_assert(strstr(err.message, "token 512 at index 1"), "%s", err.message);
    free(ids);
    const gn_message message = {"user", "hello"};
    cr_assert_eq(gn_chat_encode(m, &message, 1, &ids, &n, &err), GN_OK, "%s", err.message);
    cr_assert(n > 3 && ids[0] == 1);
    free(ids);
    const char *const *stops = gn_chat_stops(m, &n);
    cr_assert(n >= 1 && stops);
    gn_model_close(m);
}

/* On a device what was reserved is cut up, and what goes beyond it stands alone. */
Test(model, reserved_memory_is_cut_up) {
    const gn_model_options options = on_cpu(NULL);
    const gn_config config = {.layers = 2, .hidden = HIDDEN, .head_dim = 32};
    gn_model *m;
    gn_error err = {0};
    cr_assert_eq(gn_model_new(&m, "m", &config, &options, &err), GN_OK, "%s", err.message);
    cr_assert_eq(gn_model_reserve(m, 1000, &err), GN_OK);
    cr_assert(m->n_owned == 0 && m->owned_bytes == 0, "nothing on a CPU");
    m->ctx->cuda = (struct gn_cuda *)1; /* no host */
    const size_t sum = gn_model_owned_size(1) + gn_model_owned_size(256) + gn_model_vectors_size(m);
    cr_assert_eq(sum, 256 + 256 + 5 * 512 + 256);
    cr_assert_eq(gn_model_reserve(m, sum, &err), GN_OK);
    char *first = gn_model_own(m, 1), *second = gn_model_own(m, 256), *at = second;
    cr_assert_eq(second - first, 256);
    for (int i = 0; i < 6; i++) {
        char *next = gn_model_own(m, (i < 5 ? HIDDEN : 16) * sizeof(float));
        cr_assert_eq(next - at, i == 0 ? 256 : 512);
        at = next;
    }
    cr_assert(m->n_owned == 1 && m->owned_bytes == (int64_t)sum && m->reserved_bytes == 0);
    cr_assert(gn_model_own(m, 5) && m->n_owned == 2 && m->owned_bytes == (int64_t)sum + 5);
    m->ctx->cuda = NULL;
    gn_model_close(m);
}
