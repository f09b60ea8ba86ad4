/* synthetic.c - models of random weights in LLaMA shapes, for benchmarks and tests.
 *
 * Codes are random bits and scales random bytes: made in a second, and as slow to read as real
 * ones. Values come out with a standard deviation of about 0.02. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/model_internal.h"
#include "kernels/ops.h"

static const struct {
    const char *name;
    int hidden, intermediate, layers, heads, kv_heads, vocab;
} shapes[] = {
    {"llama-tiny", 128, 352, 3, 4, 4, 512},        {"llama-1.1b", 2048, 5632, 22, 32, 4, 32000},
    {"llama-7b", 4096, 11008, 32, 32, 32, 32000},  {"llama-13b", 5120, 13824, 40, 40, 40, 32000},
    {"llama-33b", 6656, 17920, 60, 52, 52, 32000}, {"llama-65b", 8192, 22016, 80, 64, 64, 32000},
};

static gn_status config_of(gn_config *c, const char *shape, gn_error *err) {
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        if (strcmp(shape, shapes[i].name)) continue;
        *c = (gn_config){.model_type = "llama",
                         .layers = shapes[i].layers,
                         .hidden = shapes[i].hidden,
                         .intermediate = shapes[i].intermediate,
                         .heads = shapes[i].heads,
                         .kv_heads = shapes[i].kv_heads,
                         .head_dim = shapes[i].hidden / shapes[i].heads,
                         .vocab = shapes[i].vocab,
                         .max_positions = 2048,
                         .rms_eps = 1e-5f,
                         .rope_theta = 10000,
                         .bos = 1,
                         .eos = {2},
                         .n_eos = 1};
        return GN_OK;
    }
    return gn_fail(err, GN_EINVAL,
                   "no shape is called %s; there are llama-tiny, llama-1.1b, llama-7b, llama-13b, "
                   "llama-33b and llama-65b",
                   shape);
}

/* Counter-based, so that any thread can make any part (splitmix64). */
static uint64_t random_bits(uint64_t counter) {
    uint64_t z = counter * 0x9e3779b97f4a7c15u + 0x632be59bd9b4e019u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static void fill_random(const gn_model *m, void *memory, size_t bytes, uint64_t seed) {
    unsigned char *p = memory;
    const int64_t words = (int64_t)(bytes / 8);
    (void)m; /* nobody asks for it without OpenMP */
#pragma omp parallel for schedule(static) num_threads(gn_ctx_threads(m->ctx))
    for (int64_t i = 0; i < words; i++) {
        const uint64_t r = random_bits(seed + (uint64_t)i);
        memcpy(p + 8 * i, &r, sizeof r);
    }
    const uint64_t last = random_bits(seed + (uint64_t)words);
    memcpy(p + 8 * words, &last, bytes % 8);
}

/* Uniform in +-0.035, a standard deviation of 0.02. */
static gn_status random_plain(gn_model *m, gn_matrix *w, int64_t rows, int64_t cols, uint64_t seed,
                              gn_error *err) {
    uint16_t *values = gn_model_own_host(m, (size_t)(rows * cols) * sizeof *values);
    if (!values) return gn_fail(err, GN_ENOMEM, "out of memory");
#pragma omp parallel for schedule(static) num_threads(gn_ctx_threads(m->ctx))
    for (int64_t i = 0; i < rows * cols; i++)
        values[i] = gn_f32_to_bf16(
            ((float)(random_bits(seed + (uint64_t)i) >> 40) * 0x1p-24f - 0.5f) * 0.07f);
    *w = (gn_matrix){.qtype = GN_Q_NONE, .dtype = GN_BF16, .rows = rows, .cols = cols};
    w->data = values;
    return gn_model_place(m, w, err);
}

/* Scales of 0.03 to 0.05; uniform NF4 codes have a deviation near half of one. */
static gn_status random_scales(gn_model *m, gn_matrix *w, uint64_t seed, bool nest, gn_error *err) {
    const gn_quant_sizes size = gn_quant_sizes_of(GN_Q_NF4, nest, w->rows, w->cols);
    if (!nest) {
        float *absmax = gn_model_own_host(m, size.absmax);
        if (!absmax) return gn_fail(err, GN_ENOMEM, "out of memory");
        for (size_t i = 0; i < size.absmax / sizeof *absmax; i++)
            absmax[i] = 0.03f + 0.02f * (float)(random_bits(seed + i) >> 40) * 0x1p-24f;
        w->absmax = absmax;
        return GN_OK;
    }
    void *scales = gn_model_own_host(m, size.absmax_u8);
    float *nested = gn_model_own_host(m, size.nested_absmax);
    if (!scales || !nested) return gn_fail(err, GN_ENOMEM, "out of memory");
    fill_random(m, scales, size.absmax_u8, seed);
    for (size_t i = 0; i < size.nested_absmax / sizeof *nested; i++) nested[i] = 0.01f;
    w->absmax_u8 = scales;
    w->nested_code = gn_dynamic_map();
    w->nested_absmax = nested;
    w->offset = 0.04f;
    return GN_OK;
}

static gn_status random_nf4(gn_model *m, gn_matrix *w, int64_t rows, int64_t cols, uint64_t seed,
                            bool nest, gn_error *err) {
    const size_t bytes = gn_quant_sizes_of(GN_Q_NF4, nest, rows, cols).data;
    void *codes = gn_model_own_host(m, bytes);
    if (!codes) return gn_fail(err, GN_ENOMEM, "out of memory");
    fill_random(m, codes, bytes, seed);
    *w = (gn_matrix){.qtype = GN_Q_NF4, .dtype = GN_BF16, .rows = rows, .cols = cols};
    w->data = codes;
    w->code = gn_code_values(GN_Q_NF4);
    const gn_status status = random_scales(m, w, seed ^ 1ULL << 60, nest, err);
    return status ? status : gn_model_place(m, w, err);
}

static gn_status ones(gn_model *m, gn_tensor *norm, gn_error *err) {
    float *w = malloc((size_t)m->config.hidden * sizeof *w);
    if (!w) return gn_fail(err, GN_ENOMEM, "out of memory");
    for (int i = 0; i < m->config.hidden; i++) w[i] = 1.0f;
    const gn_status status = gn_model_place_vector(m, norm, w, m->config.hidden, err);
    free(w);
    return status;
}

static size_t plain_size(const gn_model *m, int64_t rows, int64_t cols) {
    const gn_matrix plain = {.qtype = GN_Q_NONE, .dtype = GN_BF16, .rows = rows, .cols = cols};
    return gn_model_owned_size(gn_place_bytes(m->ctx, &plain));
}

static gn_status reserve(gn_model *m, bool plain, bool nest, gn_error *err) {
    const gn_config *c = &m->config;
    size_t sum = gn_model_vectors_size(m) + 2 * plain_size(m, c->vocab, c->hidden);
    for (int p = 0; p < GN_PROJ_COUNT; p++) {
        const int64_t rows = gn_proj_rows(c, (gn_proj)p), cols = gn_proj_cols(c, (gn_proj)p);
        const size_t nf4 = gn_quantize_place_bytes(m->ctx, GN_Q_NF4, nest, rows, cols);
        sum += (size_t)c->layers * (plain ? plain_size(m, rows, cols) : gn_model_owned_size(nf4));
    }
    return gn_model_reserve(m, sum, err);
}

static gn_status fill(gn_model *m, const gn_model_options *options, gn_error *err) {
    const bool plain = options->as_stored, nest = !options->no_double_quant;
    const gn_config *c = &m->config;
    uint64_t seed = 1;
    gn_status status = reserve(m, plain, nest, err);
    if (!status) status = random_plain(m, &m->embed, c->vocab, c->hidden, seed++ << 40, err);
    if (!status) status = random_plain(m, &m->lm_head, c->vocab, c->hidden, seed++ << 40, err);
    if (!status) status = ones(m, &m->norm, err);
    for (int i = 0; !status && i < c->layers; i++) {
        gn_layer *layer = &m->layers[i];
        status = ones(m, &layer->attn_norm, err);
        if (!status) status = ones(m, &layer->mlp_norm, err);
        for (int p = 0; !status && p < GN_PROJ_COUNT; p++) {
            const int64_t rows = gn_proj_rows(c, (gn_proj)p), cols = gn_proj_cols(c, (gn_proj)p);
            status = plain ? random_plain(m, &layer->proj[p], rows, cols, seed++ << 40, err)
                           : random_nf4(m, &layer->proj[p], rows, cols, seed++ << 40, nest, err);
        }
    }
    m->quant = plain ? GN_Q_NONE : GN_Q_NF4;
    if (!status) status = gn_model_finish(m, err);
    return status ? status
                  : gn_adapter_host_open(&m->adapters, m, options->adapter_host_bytes, err);
}

gn_status gn_model_synthetic(gn_model **out, const char *shape, const gn_model_options *options,
                             gn_error *err) {
    const gn_model_options defaults = {0};
    if (!options) options = &defaults;
    if (!options->as_stored && options->quant != GN_Q_NONE && options->quant != GN_Q_NF4)
        return gn_fail(err, GN_EUNSUPPORTED, "random weights come as nf4 or none, not %s",
                       gn_qtype_name(options->quant));
    gn_config config;
    gn_model *m;
    gn_status status = config_of(&config, shape, err);
    if (!status) status = gn_model_new(&m, shape, &config, options, err);
    if (status) return status;
    status = fill(m, options, err);
    if (status)
        gn_model_close(m);
    else
        *out = m;
    return status;
}
