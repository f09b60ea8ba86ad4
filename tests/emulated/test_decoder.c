/* The kernels of gn_decoder, emulated, against the CPU's ops in float32: the residual stream after
 * the layers, and what the cache has gained. */
#include "kernels/cuda/cuda.h"
#include "kernels/decoder.h"

#include "tests/gpu/device.h"

enum { LAYERS = 2, PROJ = 7, TERMS = 4, TOKENS = 16, SEQ_BLOCKS = 48, ROWS = 16 };

typedef struct {
    int sms, hidden, intermediate, heads, kv_heads, D, layers, T, past[5]; /* by row, again */
    bool double_quant;
    int n_terms;
    struct {
        int row0, rows, rank;
    } terms[TERMS];
} shape;

/* Every kernel: of up to 1, 8 and 16 rows, with and without double quantization and LoRA. */
static const shape shapes[] = {
    {3, 256, 704, 4, 4, 64, 2, 1, {37}, true, 0, {{0}}},
    {8, 64, 128, 1, 1, 128, 1, 1, {700}, true, 0, {{0}}}, /* splits of a context */
    {5, 640, 1728, 8, 8, 80, 1, 1, {5}, true, 1, {{0, 1, 8}}},
    {2, 64, 64, 1, 1, 64, 2, 1, {0}, true, 2, {{0, 1, 3}, {0, 1, 33}}},
    {4, 512, 1408, 8, 2, 64, 1, 1, {600}, false, 0, {{0}}},
    {3, 192, 576, 2, 1, 96, 1, 1, {16}, false, 1, {{0, 1, 64}}},

    {4, 384, 1024, 4, 1, 96, 1, 8, {31, 32, 31, 32, 31}, true, 0, {{0}}},
    {3, 256, 704, 12, 1, 64, 2, 3, {0, 16, 100}, true, 2, {{1, 2, 24}, {0, 3, 9}}},
    {4, 512, 1408, 8, 2, 64, 1, 2, {15, 300}, false, 0, {{0}}},
    {4,
     512,
     1408,
     8,
     2,
     64,
     1,
     5,
     {15, 300, 15, 300, 15},
     false,
     4,
     {{0, 1, 16}, {1, 2, 64}, {1, 2, 7}, {4, 1, 16}}},

    {3, 320, 832, 4, 4, 80, 1, 9, {5, 77, 0, 16, 15}, true, 0, {{0}}},
    {4, 512, 1152, 4, 1, 128, 1, 16, {1, 2, 700, 63, 64}, true, 2, {{0, 9, 20}, {11, 5, 16}}},
    {4, 256, 704, 2, 2, 128, 2, 16, {1, 2, 70, 63, 64}, false, 0, {{0}}},
    {2, 128, 192, 2, 1, 64, 1, 12, {9, 17, 40, 3, 31}, false, 1, {{2, 9, 40}}},
};

/* A model on both sides: weights and caches as each takes them. */
typedef struct {
    shape s;
    gn_ctx *cpu, *device;
    device_memory host, placed;
    random_matrix w[LAYERS][PROJ];
    gn_matrix tiles[LAYERS][PROJ];
    gn_tensor norms[LAYERS][2];
    gn_kv kv[2][LAYERS]; /* in bfloat16 on the device, in float32 */
    gn_tensor cos, sin;
    gn_lora_pair pairs[TERMS][LAYERS * PROJ];
    gn_lora terms[TERMS];
    int32_t row0[ROWS + 1], pos0[ROWS], blocks[ROWS * SEQ_BLOCKS];
    gn_seqs seqs;
} model;

/* Products neither grow nor shrink what goes through them. */
static random_matrix weight(model *m, rng *r, int64_t rows, int64_t cols) {
    random_matrix w = make_matrix(r, GN_Q_NF4, m->s.double_quant, GN_BF16, rows, cols);
    const gn_quant_sizes sizes = gn_quant_sizes_of(GN_Q_NF4, m->s.double_quant, rows, cols);
    const float scale = 2.0f / sqrtf((float)cols);
    float *absmax = w.owned[m->s.double_quant ? 3 : 1];
    const size_t bytes = m->s.double_quant ? sizes.nested_absmax : sizes.absmax;
    for (size_t i = 0; i < bytes / sizeof *absmax; i++) absmax[i] *= scale;
    w.m.offset *= scale;
    return w;
}

static gn_tensor scaled_rows(device_memory *memory, rng *r, gn_dtype dtype, int64_t rows,
                             int64_t cols, float scale, float offset) {
    float *v = random_floats(r, (size_t)(rows * cols));
    for (int64_t i = 0; i < rows * cols; i++) v[i] = offset + scale * v[i];
    const gn_tensor t = device_rows(memory, v, dtype, rows, cols, 0, 0);
    free(v);
    return t;
}

/* Keys or values of the past, the same on both sides. */
static void open_cache(model *m, rng *r, gn_tensor *device, gn_tensor *host) {
    const int64_t n = m->s.T * SEQ_BLOCKS, row = (int64_t)m->s.kv_heads * TOKENS * m->s.D;
    float *past = random_floats(r, (size_t)(n * row));
    round_floats(past, GN_BF16, n * row);
    *device = device_rows(&m->placed, past, GN_BF16, n, row, 0, 0);
    *host = device_rows(&m->host, past, GN_F32, n, row, 0, 0);
    free(past);
    for (int i = 0; i < 2; i++) {
        gn_tensor *t = i ? host : device;
        t->ndim = 4;
        t->shape[1] = m->s.kv_heads, t->shape[2] = TOKENS, t->shape[3] = m->s.D;
    }
}

/* Every fifth projection has none. */
static void open_term(model *m, rng *r, int term, const int rows[], const int cols[]) {
    const int rank = m->s.terms[term].rank;
    for (int i = 0; i < m->s.layers * PROJ; i++) {
        const int p = i % PROJ;
        if ((i + term) % 5 == 4) continue;
        gn_lora_pair *pair = &m->pairs[term][i];
        pair->rank = rank;
        pair->scale = 0.5f;
        pair->a = scaled_rows(&m->placed, r, GN_BF16, rank, cols[p], 1 / sqrtf((float)cols[p]), 0);
        pair->b = scaled_rows(&m->placed, r, GN_BF16, rows[p], rank, 1 / sqrtf((float)rank), 0);
    }
    m->terms[term] = (gn_lora){.row0 = m->s.terms[term].row0,
                               .rows = m->s.terms[term].rows,
                               .scale = term % 2 ? -0.7f : 1.1f,
                               .pairs = m->pairs[term],
                               .placed = m->pairs[term]};
}

static void open_model(model *m, shape s) {
    rng r = {(uint64_t)(s.hidden + s.T + s.D)};
    *m = (model){.s = s, .cpu = open_on("cpu", GN_F32), .device = open_on("cuda", GN_BF16)};
    m->device->cuda->sms = s.sms;
    m->host.ctx = m->cpu;
    m->placed.ctx = m->device;
    const int dim = s.heads * s.D, kv = s.kv_heads * s.D;
    const int rows[PROJ] = {dim, kv, kv, s.hidden, s.intermediate, s.intermediate, s.hidden};
    const int cols[PROJ] = {s.hidden, s.hidden, s.hidden, dim, s.hidden, s.hidden, s.intermediate};
    for (int i = 0; i < s.layers; i++) {
        for (int p = 0; p < PROJ; p++) {
            m->w[i][p] = weight(m, &r, rows[p], cols[p]);
            m->tiles[i][p] = device_matrix(&m->placed, &m->w[i][p].m);
        }
        for (int j = 0; j < 2; j++) {
            m->norms[i][j] = scaled_rows(&m->host, &r, GN_F32, 1, s.hidden, 0.25f, 1);
            m->norms[i][j] = gn_tensor_1d(m->norms[i][j].data, GN_F32, s.hidden);
        }
        open_cache(m, &r, &m->kv[0][i].k, &m->kv[1][i].k);
        open_cache(m, &r, &m->kv[0][i].v, &m->kv[1][i].v);
    }
    for (int i = 0; i < s.n_terms; i++) open_term(m, &r, i, rows, cols);
    for (int i = 0; i <= s.T; i++) m->row0[i] = i;
    for (int i = 0; i < s.T; i++) m->pos0[i] = s.past[i % COUNT(s.past)];
    for (int i = 0; i < s.T * SEQ_BLOCKS; i++) m->blocks[i] = (i * 7 + 3) % (s.T * SEQ_BLOCKS);
    m->seqs = (gn_seqs){s.T, SEQ_BLOCKS, m->row0, m->pos0, m->blocks};
    const gn_tensor frequencies = scaled_rows(&m->host, &r, GN_F32, 1, s.D / 2, 0.5f, 0.5f);
    const gn_tensor inv_freq = gn_tensor_1d(frequencies.data, GN_F32, s.D / 2);
    m->cos = device_rows(&m->host, NULL, GN_F32, s.T, s.D / 2, 0, 0);
    m->sin = device_rows(&m->host, NULL, GN_F32, s.T, s.D / 2, 0, 0);
    cr_assert_eq(gn_rope_table(m->cpu, &m->cos, &m->sin, &inv_freq, &m->seqs), GN_OK);
}

static void close_model(model *m) {
    device_free(&m->host);
    device_free(&m->placed);
    for (int i = 0; i < m->s.layers; i++)
        for (int p = 0; p < PROJ; p++) free_matrix(&m->w[i][p]);
    gn_ctx_close(m->device);
    gn_ctx_close(m->cpu);
}

/* ---- the reference ---- */

static gn_status project(model *m, int layer, int first, int n, gn_tensor x, const gn_tensor *norm,
                         gn_epilogue epilogue, const gn_tensor *y) {
    gn_linear_args args = {.x = x, .norm = norm, .eps = 1e-5f, .epilogue = epilogue, .n_parts = n};
    args.lora = m->s.n_terms ? m->terms : NULL;
    args.n_lora = m->s.n_terms;
    args.pair = layer * PROJ + first;
    for (int i = 0; i < n; i++) {
        args.part[i].w = &m->w[layer][first + i].m;
        args.part[i].y = y[i];
    }
    return gn_linear(m->cpu, &args);
}

static gn_tensor heads_of(const gn_tensor *t, int heads) {
    const int64_t dim = t->shape[1];
    const gn_tensor view = {t->data, t->dtype, 3, {t->shape[0], heads, dim / heads, 1}, dim};
    return view;
}

static gn_tensor activations(model *m, int cols) {
    return device_rows(&m->host, NULL, GN_F32, m->s.T, cols, 0, 0);
}

static void run_ops(model *m, gn_tensor x) {
    const shape *s = &m->s;
    const gn_tensor a = activations(m, s->heads * s->D), h = activations(m, s->intermediate);
    const gn_tensor qkv[] = {activations(m, s->heads * s->D), activations(m, s->kv_heads * s->D),
                             activations(m, s->kv_heads * s->D)};
    const gn_tensor gate_up[] = {h, h};
    gn_tensor q = heads_of(&qkv[0], s->heads), y = heads_of(&a, s->heads);
    const gn_tensor k = heads_of(&qkv[1], s->kv_heads), v = heads_of(&qkv[2], s->kv_heads);
    reserve(m->cpu, gn_linear_workspace(m->cpu, ROWS, 2048, 4096, 64, TERMS) +
                        gn_attention_workspace(m->cpu, 1024));
    gn_status status = GN_OK;
    for (int i = 0; i < s->layers && !status; i++) {
        gn_kv *kv = &m->kv[1][i];
        status = project(m, i, 0, 3, x, &m->norms[i][0], GN_STORE, qkv);
        if (!status) status = gn_rope_store(m->cpu, &q, &k, &v, &m->cos, &m->sin, &m->seqs, kv);
        if (!status) status = gn_attention(m->cpu, &y, &q, kv, &m->seqs);
        if (!status) status = project(m, i, 3, 1, a, NULL, GN_ADD, &x);
        if (!status) status = project(m, i, 4, 2, x, &m->norms[i][1], GN_SWIGLU, gate_up);
        if (!status) status = project(m, i, 6, 1, h, NULL, GN_ADD, &x);
    }
    cr_assert_eq(status, GN_OK, "%s", gn_status_text(status));
}

/* ---- the kernels ---- */

static gn_decoder *open_decoder(model *m) {
    gn_decoder_layer layers[LAYERS];
    for (int i = 0; i < m->s.layers; i++) {
        const gn_matrix *w = m->tiles[i];
        layers[i] =
            (gn_decoder_layer){&m->norms[i][0], &m->norms[i][1], &w[0], &w[1], &w[2],
                               &w[3],           &w[4],           &w[5], &w[6], &m->kv[0][i]};
    }
    const gn_decoder_options options = {layers,        m->s.layers, m->s.heads,
                                        m->s.kv_heads, m->s.D,      1e-5f};
    gn_decoder *d = NULL;
    cr_assert_eq(gn_decoder_open(&d, m->device, &options), GN_OK);
    return d;
}

/* Twice, with the same result: so all counters are as they were. */
static void run_decoder(model *m, gn_tensor x, const float *start) {
    const int32_t ids[ROWS] = {0};
    const size_t bytes = (size_t)(m->s.T * m->s.hidden) * sizeof(float);
    float *first = malloc(bytes);
    gn_decoder *d = open_decoder(m);
    reserve(m->device, gn_linear_workspace(m->device, ROWS, 2048, 4096, 64, TERMS));
    cr_assert_eq(gn_stage(m->device, ids, &m->seqs, m->terms, m->s.n_terms), GN_OK);
    for (int i = 0; i < 2; i++) {
        memcpy(x.data, start, bytes);
        cr_assert_eq(gn_decoder_run(d, &x, &m->cos, &m->sin, &m->seqs, m->terms, m->s.n_terms),
                     GN_OK);
        if (i == 0) memcpy(first, x.data, bytes);
    }
    cr_assert_arr_eq(x.data, first, bytes, "not the same again");
    gn_decoder_close(d);
    free(first);
}

/* ---- both ---- */

/* |a - b| / |b - from|; from may be NULL. */
static double distance(const float *a, const float *b, const float *from, int64_t n) {
    double off = 0, all = 0;
    for (int64_t i = 0; i < n; i++) {
        off += pow((double)a[i] - b[i], 2);
        all += pow((double)b[i] - (from ? from[i] : 0), 2);
    }
    return sqrt(off / all);
}

/* The decoder rounds to bfloat16 before every product. */
static const double BOUND = 1.5e-2;

static void compare_cache(model *m, verdict *v, int layer, const gn_tensor *got,
                          const gn_tensor *expected) {
    const int64_t n = gn_tensor_numel(got), D = m->s.D;
    float *wide = malloc((size_t)n * sizeof *wide);
    cr_assert(read_rows(m->device, wide, got));
    for (int64_t i = 0; i < n; i += D) /* a position's head */
        judge(v, layer, i, distance(wide + i, (const float *)expected->data + i, NULL, D), 0,
              2 * BOUND);
    free(wide);
}

static void test_shape(tally *tally, shape s) {
    model m;
    verdict v = {0};
    open_model(&m, s);
    snprintf(v.name, sizeof v.name, "%d/%d heads %d/%d D=%d T=%d LoRA %d on %d", s.hidden,
             s.intermediate, s.heads, s.kv_heads, s.D, s.T, s.n_terms, s.sms);
    rng r = {1};
    float *start = random_floats(&r, (size_t)(s.T * s.hidden));
    const gn_tensor expected = device_rows(&m.host, start, GN_F32, s.T, s.hidden, 0, 0);
    const gn_tensor got = device_rows(&m.placed, start, GN_F32, s.T, s.hidden, 0, 0);
    run_ops(&m, expected);
    run_decoder(&m, got, start);
    for (int64_t t = 0; t < s.T; t++) {
        const int64_t at = t * s.hidden;
        judge(&v, t, -1,
              distance((const float *)got.data + at, (const float *)expected.data + at, start + at,
                       s.hidden),
              0, BOUND);
    }
    for (int i = 0; i < s.layers; i++) {
        compare_cache(&m, &v, i, &m.kv[0][i].k, &m.kv[1][i].k);
        compare_cache(&m, &v, i, &m.kv[0][i].v, &m.kv[1][i].v);
    }
    settle(tally, &v, guards_stand(&m.placed) ? NULL : "a guard is written");
    free(start);
    close_model(&m);
}

Test(emulated_decoder, does_what_the_ops_do, .timeout = 300) {
    tally tally = {0};
    for (int i = 0; i < COUNT(shapes); i++) test_shape(&tally, shapes[i]);
    conclude(&tally, "decoder");
}
