/* gn_decoder against the ops that it stands for, both on the GPU: the residual stream after the
 * layers and what the cache has gained. */
#include "kernels/decoder.h"

#include "device.h"

typedef struct {
    int hidden, intermediate, heads, kv_heads, D, layers;
    gn_qtype qtype;
    bool double_quant;
} shape;

static const shape shapes[] = {
    {256, 704, 4, 4, 64, 2, GN_Q_NF4, true},       {64, 64, 1, 1, 64, 3, GN_Q_NF4, true},
    {512, 1408, 8, 2, 64, 2, GN_Q_NF4, false},     {1280, 3456, 16, 16, 80, 2, GN_Q_FP4, true},
    {768, 2048, 8, 1, 96, 2, GN_Q_NF4, true},      {2048, 5504, 32, 4, 64, 1, GN_Q_NF4, true},
    {2048, 5568, 16, 2, 128, 2, GN_Q_NF4, false},  {1536, 4096, 24, 2, 64, 1, GN_Q_NF4, true},
    {4096, 11008, 32, 32, 128, 1, GN_Q_NF4, true},
};
static const int row_counts[] = {1, 2, 3, 4, 7, 8, 9, 16};

enum { LAYERS = 3, PROJ = 7, TERMS = 3, TOKENS = 16, SEQ_BLOCKS = 64, SEQS = GN_DECODER_MAX_ROWS };

/* A model of a few layers on the GPU, its activations, and two caches with the same past. */
typedef struct {
    const sides *sides;
    shape s;
    device_memory weights, adapters, rest;
    gn_matrix w[LAYERS][PROJ];
    gn_tensor norms[LAYERS][2];
    gn_kv kv[2][LAYERS]; /* of the decoder, of the ops */
    gn_tensor x[2], q, k, v, a, h, cos, sin, inv_freq;
    gn_lora_pair pairs[TERMS][LAYERS * PROJ];
    gn_lora terms[TERMS]; /* their rows are a case's own */
    int n_terms;
    int32_t blocks[SEQS * SEQ_BLOCKS];
    float *start; /* (SEQS, hidden): x before */
} model;

/* Products neither grow nor shrink what goes through them, so that nothing saturates. */
static gn_matrix weight(model *m, rng *r, int64_t rows, int64_t cols) {
    random_matrix host = make_matrix(r, m->s.qtype, m->s.double_quant, GN_BF16, rows, cols);
    const gn_quant_sizes sizes = gn_quant_sizes_of(m->s.qtype, m->s.double_quant, rows, cols);
    const float scale = 2.0f / sqrtf((float)cols);
    float *absmax = host.owned[m->s.double_quant ? 3 : 1];
    const size_t n = (m->s.double_quant ? sizes.nested_absmax : sizes.absmax) / sizeof *absmax;
    for (size_t i = 0; i < n; i++) absmax[i] *= scale;
    host.m.offset *= scale;
    const gn_matrix out = device_matrix(&m->weights, &host.m);
    free_matrix(&host);
    return out;
}

static gn_tensor vector(model *m, rng *r, int64_t n) {
    float *v = random_floats(r, (size_t)n);
    for (int64_t i = 0; i < n; i++) v[i] = 1.0f + 0.25f * v[i];
    const gn_tensor t =
        gn_tensor_1d(device_alloc(&m->rest, v, (size_t)n * sizeof *v, 0), GN_F32, n);
    free(v);
    return t;
}

static gn_tensor cache(model *m, const float *past) {
    const int64_t row = (int64_t)m->s.kv_heads * TOKENS * m->s.D;
    gn_tensor t = device_rows(&m->rest, past, GN_BF16, SEQS * SEQ_BLOCKS, row, 0, 0);
    t.ndim = 4;
    t.shape[1] = m->s.kv_heads, t.shape[2] = TOKENS, t.shape[3] = m->s.D;
    return t;
}

/* One adapter on all layers, but for a projection here and there. */
static void open_term(model *m, rng *r, int term, int rank, const int rows[], const int cols[]) {
    gn_lora_pair *pairs = m->pairs[term];
    for (int i = 0; i < m->s.layers * PROJ; i++) {
        const int p = i % PROJ;
        if ((i + term) % 5 == 4) continue;
        float *a = random_floats(r, (size_t)(rank * cols[p]));
        float *b = random_floats(r, (size_t)(rows[p] * rank));
        for (int j = 0; j < rank * cols[p]; j++) a[j] /= sqrtf((float)cols[p]);
        for (int j = 0; j < rows[p] * rank; j++) b[j] /= sqrtf((float)rank);
        pairs[i] =
            (gn_lora_pair){rank, 0.5f, device_rows(&m->adapters, a, GN_BF16, rank, cols[p], 0, 0),
                           device_rows(&m->adapters, b, GN_BF16, rows[p], rank, 0, 0)};
        free(a);
        free(b);
    }
    m->terms[term] =
        (gn_lora){.scale = term % 2 ? -0.7f : 1.1f,
                  .pairs = pairs,
                  .placed = device_alloc(&m->adapters, pairs, sizeof m->pairs[term], 0)};
}

static void open_model(model *m, const sides *sides, shape s) {
    rng r = {(uint64_t)(s.hidden + s.heads)};
    *m = (model){.sides = sides,
                 .s = s,
                 .weights = {.ctx = sides->gpu},
                 .adapters = {.ctx = sides->gpu},
                 .rest = {.ctx = sides->gpu}};
    const int dim = s.heads * s.D, kv = s.kv_heads * s.D;
    const int rows[PROJ] = {dim, kv, kv, s.hidden, s.intermediate, s.intermediate, s.hidden};
    const int cols[PROJ] = {s.hidden, s.hidden, s.hidden, dim, s.hidden, s.hidden, s.intermediate};
    for (int i = 0; i < s.layers; i++) {
        for (int p = 0; p < PROJ; p++) m->w[i][p] = weight(m, &r, rows[p], cols[p]);
        for (int j = 0; j < 2; j++) m->norms[i][j] = vector(m, &r, s.hidden);
        const size_t n = (size_t)SEQS * SEQ_BLOCKS * TOKENS * (size_t)kv;
        for (int j = 0; j < 2; j++) {
            float *past = random_floats(&r, n);
            for (int which = 0; which < 2; which++)
                *(j ? &m->kv[which][i].v : &m->kv[which][i].k) = cache(m, past);
            free(past);
        }
    }
    static const int ranks[TERMS] = {16, 7, 64};
    for (int i = 0; i < TERMS; i++) open_term(m, &r, i, ranks[i], rows, cols);
    m->start = random_floats(&r, (size_t)(SEQS * s.hidden));
    for (int i = 0; i < 2; i++)
        m->x[i] = device_rows(&m->rest, m->start, GN_F32, SEQS, s.hidden, 0, 0);
    m->q = device_rows(&m->rest, NULL, GN_BF16, SEQS, dim, 0, 0);
    m->k = device_rows(&m->rest, NULL, GN_BF16, SEQS, kv, 0, 0);
    m->v = device_rows(&m->rest, NULL, GN_BF16, SEQS, kv, 0, 0);
    m->a = device_rows(&m->rest, NULL, GN_BF16, SEQS, dim, 0, 0);
    m->h = device_rows(&m->rest, NULL, GN_BF16, SEQS, s.intermediate, 0, 0);
    m->cos = device_rows(&m->rest, NULL, GN_F32, SEQS, s.D / 2, 0, 0);
    m->sin = device_rows(&m->rest, NULL, GN_F32, SEQS, s.D / 2, 0, 0);
    m->inv_freq = vector(m, &r, s.D / 2);
    for (int i = 0; i < SEQS * SEQ_BLOCKS; i++)
        m->blocks[i] = (int32_t)((i * 7LL + 3) % (SEQS * SEQ_BLOCKS));
}

static void close_model(model *m) {
    device_free(&m->weights);
    device_free(&m->adapters);
    device_free(&m->rest);
    free(m->start);
}

static gn_tensor first_rows(const gn_tensor *t, int rows) {
    return gn_tensor_2d(t->data, t->dtype, rows, t->shape[1]);
}

static gn_tensor heads_of(const gn_tensor *t, int rows, int heads) {
    const int64_t dim = t->shape[1];
    const gn_tensor view = {t->data, t->dtype, 3, {rows, heads, dim / heads, 1}, dim};
    return view;
}

static gn_status project(model *m, int layer, int first, int n, gn_tensor x, const gn_tensor *norm,
                         gn_epilogue epilogue, const gn_tensor *y) {
    gn_linear_args args = {.x = x, .norm = norm, .eps = 1e-5f, .epilogue = epilogue, .n_parts = n};
    for (int i = 0; i < n; i++) {
        args.part[i].w = &m->w[layer][first + i];
        args.part[i].y = y[i];
    }
    return gn_linear(m->sides->gpu, &args);
}

static gn_status run_ops(model *m, int T, const gn_seqs *seqs) {
    gn_ctx *gpu = m->sides->gpu;
    const gn_tensor x = first_rows(&m->x[1], T), a = first_rows(&m->a, T), h = first_rows(&m->h, T);
    const gn_tensor qkv[] = {first_rows(&m->q, T), first_rows(&m->k, T), first_rows(&m->v, T)};
    const gn_tensor gate_up[] = {h, h}, cos = first_rows(&m->cos, T), sin = first_rows(&m->sin, T);
    gn_tensor q = heads_of(&m->q, T, m->s.heads), y = heads_of(&m->a, T, m->s.heads);
    const gn_tensor k = heads_of(&m->k, T, m->s.kv_heads), v = heads_of(&m->v, T, m->s.kv_heads);
    gn_status status = GN_OK;
    for (int i = 0; i < m->s.layers && !status; i++) {
        status = project(m, i, 0, 3, x, &m->norms[i][0], GN_STORE, qkv);
        if (!status) status = gn_rope_store(gpu, &q, &k, &v, &cos, &sin, seqs, &m->kv[1][i]);
        if (!status) status = gn_attention(gpu, &y, &q, &m->kv[1][i], seqs);
        if (!status) status = project(m, i, 3, 1, a, NULL, GN_ADD, &x);
        if (!status) status = project(m, i, 4, 2, x, &m->norms[i][1], GN_SWIGLU, gate_up);
        if (!status) status = project(m, i, 6, 1, h, NULL, GN_ADD, &x);
    }
    return status;
}

static gn_decoder *open_decoder(model *m) {
    gn_decoder_layer layers[LAYERS];
    for (int i = 0; i < m->s.layers; i++) {
        const gn_matrix *w = m->w[i];
        layers[i] =
            (gn_decoder_layer){&m->norms[i][0], &m->norms[i][1], &w[0], &w[1], &w[2],
                               &w[3],           &w[4],           &w[5], &w[6], &m->kv[0][i]};
    }
    const gn_decoder_options options = {layers,        m->s.layers, m->s.heads,
                                        m->s.kv_heads, m->s.D,      1e-5f};
    gn_decoder *d = NULL;
    cr_assert_eq(gn_decoder_open(&d, m->sides->gpu, &options), GN_OK);
    return d;
}

/* |a - b| / |b - from|; from may be NULL. */
static double distance(const float *a, const float *b, const float *from, int64_t n) {
    double off = 0, all = 0;
    for (int64_t i = 0; i < n; i++) {
        off += pow((double)a[i] - b[i], 2);
        all += pow((double)b[i] - (from ? from[i] : 0), 2);
    }
    return sqrt(off / all);
}

/* Both round to bfloat16 between products, at different places. */
static const double BOUND = 1.5e-2;

static void compare(model *m, verdict *v, int T) {
    const int64_t hidden = m->s.hidden;
    float *got = malloc((size_t)(T * hidden) * sizeof *got),
          *expected = malloc((size_t)(T * hidden) * sizeof *got);
    const gn_tensor x0 = first_rows(&m->x[0], T), x1 = first_rows(&m->x[1], T);
    cr_assert(read_rows(m->sides->gpu, got, &x0) && read_rows(m->sides->gpu, expected, &x1));
    for (int t = 0; t < T; t++)
        judge(v, t, -1,
              distance(got + t * hidden, expected + t * hidden, m->start + t * hidden, hidden), 0,
              BOUND);
    free(got);
    free(expected);
    for (int i = 0; i < m->s.layers; i++)
        for (int j = 0; j < 2; j++) {
            const gn_tensor *a = j ? &m->kv[0][i].v : &m->kv[0][i].k;
            const gn_tensor *b = j ? &m->kv[1][i].v : &m->kv[1][i].k;
            const int64_t n = gn_tensor_numel(a);
            got = malloc((size_t)n * sizeof *got), expected = malloc((size_t)n * sizeof *got);
            cr_assert(read_rows(m->sides->gpu, got, a) && read_rows(m->sides->gpu, expected, b));
            for (int64_t k = 0; k < n; k += m->s.D) /* a position's head */
                judge(v, i, k, distance(got + k, expected + k, NULL, m->s.D), 0, 2 * BOUND);
            free(got);
            free(expected);
        }
}

/* A row's two adapters, then others' one, and rows with none. */
static void cover_rows(model *m, int T, bool lora) {
    const int half = (T + 1) / 2;
    m->n_terms = lora ? TERMS : 0;
    for (int i = 0; i < TERMS; i++) {
        m->terms[i].row0 = i < 2 ? 0 : half;
        m->terms[i].rows = i < 2 ? (i == 0 ? half : 1) : T - half - T / 4;
    }
}

static void test_case(tally *tally, model *m, gn_decoder *d, int T, bool lora) {
    static const int32_t pasts[] = {0,  5, 15,  16, 100, 255, 700, 31,
                                    32, 1, 400, 63, 64,  17,  900, 2};
    gn_ctx *gpu = m->sides->gpu;
    verdict v = {0};
    cover_rows(m, T, lora);
    snprintf(v.name, sizeof v.name, "%d/%d heads %d/%d D=%d T=%d%s", m->s.hidden, m->s.intermediate,
             m->s.heads, m->s.kv_heads, m->s.D, T, lora ? " LoRA" : "");
    int32_t row0[SEQS + 1], pos0[SEQS], ids[SEQS] = {0};
    for (int i = 0; i <= T; i++) row0[i] = i;
    for (int i = 0; i < T; i++) pos0[i] = pasts[(i + T) % SEQS];
    const gn_seqs seqs = {T, SEQ_BLOCKS, row0, pos0, m->blocks};
    gn_tensor x = first_rows(&m->x[0], T), cos = first_rows(&m->cos, T),
              sin = first_rows(&m->sin, T);
    for (int i = 0; i < 2; i++)
        cr_assert_eq(gn_ctx_write(gpu, m->x[i].data, m->start,
                                  (size_t)(SEQS * m->s.hidden) * sizeof *m->start),
                     GN_OK);
    cr_assert_eq(gn_stage(gpu, ids, &seqs, m->terms, m->n_terms), GN_OK);
    const char *why = ran(gpu, gn_rope_table(gpu, &cos, &sin, &m->inv_freq, &seqs), v.name);
    if (!why)
        why = ran(gpu, gn_decoder_run(d, &x, &cos, &sin, &seqs, m->terms, m->n_terms), v.name);
    if (!why) why = ran(gpu, run_ops(m, T, &seqs), v.name);
    if (!why) compare(m, &v, T);
    if (!guards_stand(&m->rest)) why = "a guard is written";
    settle(tally, &v, why);
}

Test(gpu_decoder, does_what_the_ops_do) {
    sides s = open_sides(GN_BF16);
    tally tally = {0};
    const size_t workspace = gn_linear_workspace(s.gpu, SEQS, 11008, 2 * 11008, 64, 2);
    reserve(s.gpu, workspace + gn_attention_workspace(s.gpu, 1024));
    for (int i = 0; i < (is_brief() ? 2 : COUNT(shapes)); i++) {
        model m;
        open_model(&m, &s, shapes[i]);
        gn_decoder *d = open_decoder(&m);
        for (int j = 0; j < 2 * COUNT(row_counts); j++)
            test_case(&tally, &m, d, row_counts[j / 2], j % 2);
        gn_decoder_close(d);
        close_model(&m);
    }
    close_sides(&s);
    conclude(&tally, "decoder");
}

Test(gpu_decoder, repeats_itself_to_the_bit) {
    sides s = open_sides(GN_BF16);
    model m;
    open_model(&m, &s, shapes[2]);
    gn_decoder *d = open_decoder(&m);
    float *first = NULL;
    reserve(s.gpu, gn_linear_workspace(s.gpu, SEQS, 1408, 2 * 1408, 64, 2));
    cover_rows(&m, 5, true);
    const int T = 5, n = T * m.s.hidden;
    const int32_t row0[] = {0, 1, 2, 3, 4, 5}, pos0[] = {3, 40, 300, 16, 0}, ids[5] = {0};
    const gn_seqs seqs = {T, SEQ_BLOCKS, row0, pos0, m.blocks};
    gn_tensor x = first_rows(&m.x[0], T), cos = first_rows(&m.cos, T), sin = first_rows(&m.sin, T);
    for (int i = 0; i < 20; i++) {
        float *now = malloc((size_t)n * sizeof *now);
        cr_assert_eq(gn_ctx_write(s.gpu, x.data, m.start, (size_t)n * sizeof *now), GN_OK);
        cr_assert_eq(gn_stage(s.gpu, ids, &seqs, m.terms, m.n_terms), GN_OK);
        cr_assert_eq(gn_rope_table(s.gpu, &cos, &sin, &m.inv_freq, &seqs), GN_OK);
        cr_assert_eq(gn_decoder_run(d, &x, &cos, &sin, &seqs, m.terms, m.n_terms), GN_OK);
        cr_assert_eq(gn_ctx_read(s.gpu, now, x.data, (size_t)n * sizeof *now), GN_OK);
        if (first) cr_assert_arr_eq(now, first, (size_t)n * sizeof *now);
        if (first)
            free(now);
        else
            first = now;
    }
    free(first);
    gn_decoder_close(d);
    close_model(&m);
    close_sides(&s);
}
