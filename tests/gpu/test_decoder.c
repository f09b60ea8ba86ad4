/* gn_decoder against the ops that it stands for, both on the GPU: the residual stream after the
 * layers and what the cache has gained. */
#include "decoder_layers.h"

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
static const int row_counts[] = {1, 2, 3, 4, 5, 7, 8};

enum { TERMS = 3, SEQ_BLOCKS = 64, SEQS = GN_DECODER_MAX_ROWS };

/* The same layers twice, but for the cache: as the decoder's and as the ops'. */
typedef struct {
    shape s;
    gn_ctx *gpu;
    device_memory weights, adapters, rest;
    decoder_layers decoder, ops;
    gn_tensor x[2], inv_freq;
    gn_lora_pair pairs[TERMS][MAX_LAYERS * PROJ];
    gn_lora terms[TERMS];
    int32_t row0[SEQS + 1], pos0[SEQS], blocks[SEQS * SEQ_BLOCKS];
    float *start; /* (SEQS, hidden): x before */
} model;

static void open_layers(model *m, rng *r, const int rows[PROJ], const int cols[PROJ]) {
    decoder_layers *l = &m->decoder;
    *l = (decoder_layers){.ctx = m->gpu,
                          .n = m->s.layers,
                          .heads = m->s.heads,
                          .kv_heads = m->s.kv_heads,
                          .D = m->s.D};
    for (int i = 0; i < m->s.layers; i++) {
        for (int p = 0; p < PROJ; p++) {
            random_matrix host = steady_matrix(r, m->s.qtype, m->s.double_quant, rows[p], cols[p]);
            l->w[i][p] = device_matrix(&m->weights, &host.m);
            free_matrix(&host);
        }
        for (int j = 0; j < 2; j++)
            l->norms[i][j] = scaled_vector(&m->rest, r, m->s.hidden, 0.25f, 1);
    }
    l->q = device_rows(&m->rest, NULL, GN_BF16, SEQS, rows[0], 0, 0);
    l->k = device_rows(&m->rest, NULL, GN_BF16, SEQS, rows[1], 0, 0);
    l->v = device_rows(&m->rest, NULL, GN_BF16, SEQS, rows[2], 0, 0);
    l->a = device_rows(&m->rest, NULL, GN_BF16, SEQS, rows[0], 0, 0);
    l->h = device_rows(&m->rest, NULL, GN_BF16, SEQS, m->s.intermediate, 0, 0);
    l->cos = device_rows(&m->rest, NULL, GN_F32, SEQS, m->s.D / 2, 0, 0);
    l->sin = device_rows(&m->rest, NULL, GN_F32, SEQS, m->s.D / 2, 0, 0);
    l->terms = m->terms;
    m->ops = *l;
    const int64_t blocks = SEQS * SEQ_BLOCKS;
    for (int i = 0; i < 2 * m->s.layers; i++) {
        float *past = random_floats(r, (size_t)(blocks * CACHE_TOKENS * rows[1]));
        for (int which = 0; which < 2; which++) {
            gn_kv *kv = &(which ? &m->ops : &m->decoder)->kv[i / 2];
            *(i % 2 ? &kv->v : &kv->k) =
                cache_rows(&m->rest, past, GN_BF16, blocks, m->s.kv_heads, m->s.D);
        }
        free(past);
    }
}

static void open_model(model *m, gn_ctx *gpu, shape s) {
    static const int ranks[TERMS] = {16, 7, 64};
    rng r = {(uint64_t)(s.hidden + s.heads)};
    *m = (model){.s = s, .gpu = gpu};
    m->weights.ctx = m->adapters.ctx = m->rest.ctx = gpu;
    const int dim = s.heads * s.D, kv = s.kv_heads * s.D;
    const int rows[PROJ] = {dim, kv, kv, s.hidden, s.intermediate, s.intermediate, s.hidden};
    const int cols[PROJ] = {s.hidden, s.hidden, s.hidden, dim, s.hidden, s.hidden, s.intermediate};
    open_layers(m, &r, rows, cols);
    for (int i = 0; i < TERMS; i++) {
        open_pairs(m->pairs[i], &m->adapters, &r, s.layers, i, ranks[i], rows, cols);
        m->terms[i] =
            (gn_lora){.scale = i % 2 ? -0.7f : 1.1f,
                      .pairs = m->pairs[i],
                      .placed = device_alloc(&m->adapters, m->pairs[i], sizeof m->pairs[i], 0)};
    }
    m->start = random_floats(&r, (size_t)(SEQS * s.hidden));
    for (int i = 0; i < 2; i++)
        m->x[i] = device_rows(&m->rest, m->start, GN_F32, SEQS, s.hidden, 0, 0);
    m->inv_freq = scaled_vector(&m->rest, &r, s.D / 2, 0.25f, 1);
    for (int i = 0; i < SEQS * SEQ_BLOCKS; i++)
        m->blocks[i] = (int32_t)((i * 7LL + 3) % (SEQS * SEQ_BLOCKS));
}

static void close_model(model *m) {
    device_free(&m->weights);
    device_free(&m->adapters);
    device_free(&m->rest);
    free(m->start);
}

/* A batch of T rows. With LoRA: two adapters on a row, one of them on others, one on the next, and
 * rows with none. */
static void set_batch(model *m, int T, bool lora) {
    static const int32_t pasts[] = {0,  5, 15,  16, 100, 255, 700, 31,
                                    32, 1, 400, 63, 64,  17,  900, 2};
    const int half = (T + 1) / 2;
    for (int i = 0; i < TERMS; i++) {
        m->terms[i].row0 = i < 2 ? 0 : half;
        m->terms[i].rows = i < 2 ? (i == 0 ? half : 1) : T - half - T / 4;
    }
    for (int i = 0; i <= T; i++) m->row0[i] = i;
    for (int i = 0; i < T; i++) m->pos0[i] = pasts[(i + T) % SEQS];
    m->decoder.n_terms = m->ops.n_terms = lora ? TERMS : 0;
    m->decoder.seqs = m->ops.seqs = (gn_seqs){T, SEQ_BLOCKS, m->row0, m->pos0, m->blocks};
}

/* Stages the batch, and x as it begins. */
static const char *prepare(model *m, int T, const char *name) {
    const int32_t ids[SEQS] = {0};
    const decoder_layers *l = &m->decoder;
    gn_tensor cos = first_rows(&l->cos, T), sin = first_rows(&l->sin, T);
    for (int i = 0; i < 2; i++)
        cr_assert_eq(gn_ctx_write(m->gpu, m->x[i].data, m->start,
                                  (size_t)(SEQS * m->s.hidden) * sizeof *m->start),
                     GN_OK);
    cr_assert_eq(gn_stage(m->gpu, ids, &l->seqs, m->terms, l->n_terms), GN_OK);
    return ran(m->gpu, gn_rope_table(m->gpu, &cos, &sin, &m->inv_freq, &l->seqs), name);
}

static gn_status run_decoder(model *m, gn_decoder *d, int T) {
    const decoder_layers *l = &m->decoder;
    gn_tensor x = first_rows(&m->x[0], T);
    const gn_tensor cos = first_rows(&l->cos, T), sin = first_rows(&l->sin, T);
    return gn_decoder_run(d, &x, &cos, &sin, &l->seqs, m->terms, l->n_terms);
}

static void compare(model *m, verdict *v, int T) {
    const size_t bytes = (size_t)(T * m->s.hidden) * sizeof(float);
    float *got = malloc(bytes), *expected = malloc(bytes);
    cr_assert_eq(gn_ctx_read(m->gpu, got, m->x[0].data, bytes), GN_OK);
    cr_assert_eq(gn_ctx_read(m->gpu, expected, m->x[1].data, bytes), GN_OK);
    judge_rows(v, got, expected, m->start, T, m->s.hidden);
    judge_caches(v, &m->decoder, &m->ops);
    free(got);
    free(expected);
}

static void test_case(tally *tally, model *m, gn_decoder *d, int T, bool lora) {
    verdict v = {0};
    set_batch(m, T, lora);
    snprintf(v.name, sizeof v.name, "%d/%d heads %d/%d D=%d T=%d%s", m->s.hidden, m->s.intermediate,
             m->s.heads, m->s.kv_heads, m->s.D, T, lora ? " LoRA" : "");
    const char *why = prepare(m, T, v.name);
    if (!why) why = ran(m->gpu, run_decoder(m, d, T), v.name);
    if (!why) why = ran(m->gpu, run_ops(&m->ops, first_rows(&m->x[1], T)), v.name);
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
        open_model(&m, s.gpu, shapes[i]);
        gn_decoder *d = open_decoder(&m.decoder);
        for (int j = 0; j < 2 * COUNT(row_counts); j++)
            test_case(&tally, &m, d, row_counts[j / 2], j % 2);
        gn_decoder_close(d);
        close_model(&m);
    }
    close_sides(&s);
    conclude(&tally, "decoder");
}

Test(gpu_decoder, repeats_itself_to_the_bit) {
    enum { T = 5, TIMES = 20 };
    sides s = open_sides(GN_BF16);
    model m;
    open_model(&m, s.gpu, shapes[2]);
    gn_decoder *d = open_decoder(&m.decoder);
    reserve(s.gpu, gn_linear_workspace(s.gpu, SEQS, 1408, 2 * 1408, 64, 2));
    const size_t bytes = (size_t)(T * m.s.hidden) * sizeof(float);
    float *first = malloc(bytes), *now = malloc(bytes);
    set_batch(&m, T, true);
    for (int i = 0; i < TIMES; i++) {
        cr_assert_null(prepare(&m, T, "repetition"));
        cr_assert_eq(run_decoder(&m, d, T), GN_OK);
        cr_assert_eq(gn_ctx_read(s.gpu, i ? now : first, m.x[0].data, bytes), GN_OK);
        if (i) cr_assert_arr_eq(now, first, bytes);
    }
    free(first);
    free(now);
    gn_decoder_close(d);
    close_model(&m);
    close_sides(&s);
}

/* NaN goes through, and nothing waits for it. */
Test(gpu_decoder, ends_where_values_are_no_numbers) {
    enum { T = 3 };
    sides s = open_sides(GN_BF16);
    model m;
    open_model(&m, s.gpu, shapes[2]);
    gn_decoder *d = open_decoder(&m.decoder);
    reserve(s.gpu, gn_linear_workspace(s.gpu, SEQS, 1408, 2 * 1408, 64, 2));
    const int n = T * m.s.hidden;
    float *x = malloc((size_t)n * sizeof *x);
    for (int i = 0; i < n; i += 3) m.start[i] = NAN;
    for (int lora = 0; lora < 2; lora++) {
        set_batch(&m, T, lora);
        cr_assert_null(prepare(&m, T, "no numbers"));
        cr_assert_eq(run_decoder(&m, d, T), GN_OK);
        cr_assert_eq(gn_ctx_read(s.gpu, x, m.x[0].data, (size_t)n * sizeof *x), GN_OK);
        for (int i = 0; i < n; i++) cr_assert(isnan(x[i]));
    }
    free(x);
    gn_decoder_close(d);
    close_model(&m);
    close_sides(&s);
}
