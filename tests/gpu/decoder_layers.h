/* decoder_layers.h - what tests of gn_decoder share: layers whose products neither grow nor shrink
 * what goes through them, the ops that a decoder stands for, and how far two results are apart. */
#ifndef GN_TEST_DECODER_LAYERS_H
#define GN_TEST_DECODER_LAYERS_H

#include "kernels/decoder.h"

#include "device.h"

enum { MAX_LAYERS = 3, PROJ = 7, CACHE_TOKENS = 16 };

/* Rounding to bfloat16 between products, here and there, may take two results so far apart. */
static const double DECODER_BOUND = 1.5e-2;

/* Layers on one device, and what their ops work with: rows of activations, one each sequence. */
typedef struct {
    gn_ctx *ctx;
    int n, heads, kv_heads, D;
    gn_matrix w[MAX_LAYERS][PROJ];
    gn_tensor norms[MAX_LAYERS][2];
    gn_kv kv[MAX_LAYERS];
    const gn_lora *terms;
    int n_terms;
    gn_tensor q, k, v, a, h, cos, sin;
    gn_seqs seqs;
} decoder_layers;

static inline random_matrix steady_matrix(rng *r, gn_qtype qtype, bool double_quant, int64_t rows,
                                          int64_t cols) {
    random_matrix w = make_matrix(r, qtype, double_quant, GN_BF16, rows, cols);
    const gn_quant_sizes sizes = gn_quant_sizes_of(qtype, double_quant, rows, cols);
    const float scale = 2.0f / sqrtf((float)cols);
    float *absmax = w.owned[double_quant ? 3 : 1];
    const size_t bytes = double_quant ? sizes.nested_absmax : sizes.absmax;
    for (size_t i = 0; i < bytes / sizeof *absmax; i++) absmax[i] *= scale;
    w.m.offset *= scale;
    return w;
}

/* offset + scale * random. */
static inline gn_tensor scaled_rows(device_memory *memory, rng *r, gn_dtype dtype, int64_t rows,
                                    int64_t cols, float scale, float offset) {
    float *v = random_floats(r, (size_t)(rows * cols));
    for (int64_t i = 0; i < rows * cols; i++) v[i] = offset + scale * v[i];
    const gn_tensor t = device_rows(memory, v, dtype, rows, cols, 0, 0);
    free(v);
    return t;
}

static inline gn_tensor scaled_vector(device_memory *memory, rng *r, int64_t n, float scale,
                                      float offset) {
    return gn_tensor_1d(scaled_rows(memory, r, GN_F32, 1, n, scale, offset).data, GN_F32, n);
}

static inline gn_tensor cache_rows(device_memory *memory, const float *past, gn_dtype dtype,
                                   int64_t blocks, int kv_heads, int D) {
    gn_tensor t =
        device_rows(memory, past, dtype, blocks, (int64_t)kv_heads * CACHE_TOKENS * D, 0, 0);
    t.ndim = 4;
    t.shape[1] = kv_heads, t.shape[2] = CACHE_TOKENS, t.shape[3] = D;
    return t;
}

/* An adapter on `layers` layers; every fifth projection has none. */
static inline void open_pairs(gn_lora_pair *pairs, device_memory *memory, rng *r, int layers,
                              int term, int rank, const int rows[PROJ], const int cols[PROJ]) {
    for (int i = 0; i < layers * PROJ; i++) {
        const int p = i % PROJ;
        if ((i + term) % 5 == 4) continue;
        pairs[i].rank = rank;
        pairs[i].scale = 0.5f;
        pairs[i].a = scaled_rows(memory, r, GN_BF16, rank, cols[p], 1 / sqrtf((float)cols[p]), 0);
        pairs[i].b = scaled_rows(memory, r, GN_BF16, rows[p], rank, 1 / sqrtf((float)rank), 0);
    }
}

static inline gn_decoder *open_decoder(const decoder_layers *l) {
    gn_decoder_layer layers[MAX_LAYERS];
    for (int i = 0; i < l->n; i++) {
        const gn_matrix *w = l->w[i];
        layers[i] = (gn_decoder_layer){&l->norms[i][0], &l->norms[i][1], &w[0], &w[1], &w[2],
                                       &w[3],           &w[4],           &w[5], &w[6], &l->kv[i]};
    }
    const gn_decoder_options options = {layers, l->n, l->heads, l->kv_heads, l->D, 1e-5f};
    gn_decoder *d = NULL;
    cr_assert_eq(gn_decoder_open(&d, l->ctx, &options), GN_OK);
    return d;
}

static inline gn_status project(const decoder_layers *l, int layer, int first, int n, gn_tensor x,
                                const gn_tensor *norm, gn_epilogue epilogue, const gn_tensor *y) {
    gn_linear_args args = {.x = x,
                           .norm = norm,
                           .eps = 1e-5f,
                           .epilogue = epilogue,
                           .lora = l->n_terms ? l->terms : NULL,
                           .n_lora = l->n_terms,
                           .pair = layer * PROJ + first,
                           .n_parts = n};
    for (int i = 0; i < n; i++) {
        args.part[i].w = &l->w[layer][first + i];
        args.part[i].y = y[i];
    }
    return gn_linear(l->ctx, &args);
}

static inline gn_tensor first_rows(const gn_tensor *t, int64_t rows) {
    return gn_tensor_2d(t->data, t->dtype, rows, t->shape[1]);
}

static inline gn_tensor heads_of(const gn_tensor *t, int64_t rows, int heads) {
    const int64_t dim = t->shape[1];
    const gn_tensor view = {t->data, t->dtype, 3, {rows, heads, dim / heads, 1}, dim};
    return view;
}

/* x (T, hidden) through all layers, by ops. */
static inline gn_status run_ops(decoder_layers *l, gn_tensor x) {
    const int64_t T = x.shape[0];
    const gn_tensor a = first_rows(&l->a, T), h = first_rows(&l->h, T);
    const gn_tensor qkv[] = {first_rows(&l->q, T), first_rows(&l->k, T), first_rows(&l->v, T)};
    const gn_tensor gate_up[] = {h, h}, cos = first_rows(&l->cos, T), sin = first_rows(&l->sin, T);
    gn_tensor q = heads_of(&l->q, T, l->heads), y = heads_of(&l->a, T, l->heads);
    const gn_tensor k = heads_of(&l->k, T, l->kv_heads), v = heads_of(&l->v, T, l->kv_heads);
    gn_status status = GN_OK;
    for (int i = 0; i < l->n && !status; i++) {
        status = project(l, i, 0, 3, x, &l->norms[i][0], GN_STORE, qkv);
        if (!status) status = gn_rope_store(l->ctx, &q, &k, &v, &cos, &sin, &l->seqs, &l->kv[i]);
        if (!status) status = gn_attention(l->ctx, &y, &q, &l->kv[i], &l->seqs);
        if (!status) status = project(l, i, 3, 1, a, NULL, GN_ADD, &x);
        if (!status) status = project(l, i, 4, 2, x, &l->norms[i][1], GN_SWIGLU, gate_up);
        if (!status) status = project(l, i, 6, 1, h, NULL, GN_ADD, &x);
    }
    return status;
}

/* |a - b| / |b - from|; from may be NULL. */
static inline double distance(const float *a, const float *b, const float *from, int64_t n) {
    double off = 0, all = 0;
    for (int64_t i = 0; i < n; i++) {
        off += pow((double)a[i] - b[i], 2);
        all += pow((double)b[i] - (from ? from[i] : 0), 2);
    }
    return sqrt(off / all);
}

/* Row by row, by how far a is from b where both began at `from`. */
static inline void judge_rows(verdict *v, const float *a, const float *b, const float *from,
                              int rows, int64_t hidden) {
    for (int64_t t = 0; t < rows; t++) {
        const int64_t at = t * hidden;
        judge(v, t, -1, distance(a + at, b + at, from + at, hidden), 0, DECODER_BOUND);
    }
}

/* Position by position and head by head: two caches that had the same past. */
static inline void judge_caches(verdict *v, const decoder_layers *got,
                                const decoder_layers *expected) {
    for (int i = 0; i < 2 * got->n; i++) {
        const gn_tensor *a = i % 2 ? &got->kv[i / 2].v : &got->kv[i / 2].k;
        const gn_tensor *b = i % 2 ? &expected->kv[i / 2].v : &expected->kv[i / 2].k;
        const int64_t n = gn_tensor_numel(a);
        float *x = malloc((size_t)n * sizeof *x), *y = malloc((size_t)n * sizeof *y);
        cr_assert(read_rows(got->ctx, x, a) && read_rows(expected->ctx, y, b));
        for (int64_t j = 0; j < n; j += got->D)
            judge(v, i, j, distance(x + j, y + j, NULL, got->D), 0, 2 * DECODER_BOUND);
        free(x);
        free(y);
    }
}

#endif
