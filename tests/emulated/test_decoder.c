/* The kernels of gn_decoder, emulated, against the CPU's ops in float32: the residual stream after
 * the layers, and what the cache has gained. */
#include "kernels/cuda/cuda.h"

#include "tests/gpu/decoder_layers.h"

enum { TERMS = 4, SEQ_BLOCKS = 48, MAX_SEQ_BLOCKS = 528, ROWS = GN_DECODER_MAX_ROWS };

typedef struct {
    int sms, hidden, intermediate, heads, kv_heads, D, layers, T, past[5]; /* by row, again */
    bool double_quant;
    int n_terms;
    struct {
        int row0, rows, rank;
    } terms[TERMS];
} shape;

/* Every kernel: of one row and of up to 8, with and without double quantization and LoRA. */
static const shape shapes[] = {
    {3, 256, 704, 4, 4, 64, 2, 1, {37}, true, 0, {{0}}},
    {8, 64, 128, 1, 1, 128, 1, 1, {700}, true, 0, {{0}}}, /* splits of a context */
    {3, 64, 128, 1, 1, 64, 1, 1, {8300}, true, 0, {{0}}}, /* a long context */
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

    {3, 320, 832, 4, 4, 80, 1, 5, {5, 77, 0, 16, 15}, true, 0, {{0}}},
    {4, 512, 1152, 4, 1, 128, 1, 8, {1, 2, 700, 63, 64}, true, 2, {{0, 5, 20}, {6, 2, 16}}},
    {4, 256, 704, 2, 2, 128, 2, 8, {1, 2, 70, 63, 64}, false, 0, {{0}}},
    {2, 128, 2048, 2, 1, 64, 1, 6, {9, 17, 40, 3, 31}, true, 0, {{0}}}, /* several batches */
    {2, 128, 192, 2, 1, 64, 1, 6, {9, 17, 40, 3, 31}, false, 1, {{2, 3, 40}}},
};

/* A model on both sides: weights and caches as each takes them. */
typedef struct {
    shape s;
    device_memory host, placed;
    random_matrix w[MAX_LAYERS][PROJ];
    decoder_layers decoder, ops; /* in bfloat16, emulated; in float32 on the CPU */
    gn_lora_pair pairs[TERMS][MAX_LAYERS * PROJ];
    gn_lora terms[TERMS];
    int seq_blocks;
    int32_t row0[ROWS + 1], pos0[ROWS], blocks[ROWS * MAX_SEQ_BLOCKS];
} model;

/* Keys or values of the past, the same on both sides. */
static void open_cache(model *m, rng *r, gn_tensor *device, gn_tensor *host) {
    const int64_t n = m->s.T * m->seq_blocks, row = (int64_t)m->s.kv_heads * CACHE_TOKENS * m->s.D;
    float *past = random_floats(r, (size_t)(n * row));
    round_floats(past, GN_BF16, n * row);
    *device = cache_rows(&m->placed, past, GN_BF16, n, m->s.kv_heads, m->s.D);
    *host = cache_rows(&m->host, past, GN_F32, n, m->s.kv_heads, m->s.D);
    free(past);
}

static void open_layers(model *m, rng *r, const int rows[PROJ], const int cols[PROJ]) {
    decoder_layers *d = &m->decoder, *o = &m->ops;
    for (int i = 0; i < m->s.layers; i++) {
        for (int p = 0; p < PROJ; p++) {
            m->w[i][p] = steady_matrix(r, GN_Q_NF4, m->s.double_quant, rows[p], cols[p]);
            o->w[i][p] = m->w[i][p].m;
            d->w[i][p] = device_matrix(&m->placed, &m->w[i][p].m);
        }
        for (int j = 0; j < 2; j++)
            d->norms[i][j] = o->norms[i][j] = scaled_vector(&m->host, r, m->s.hidden, 0.25f, 1);
        open_cache(m, r, &d->kv[i].k, &o->kv[i].k);
        open_cache(m, r, &d->kv[i].v, &o->kv[i].v);
    }
}

static void open_batch(model *m, rng *r) {
    const int T = m->s.T;
    decoder_layers *o = &m->ops;
    for (int i = 0; i <= T; i++) m->row0[i] = i;
    for (int i = 0; i < T; i++) m->pos0[i] = m->s.past[i % COUNT(m->s.past)];
    for (int i = 0; i < T * m->seq_blocks; i++) m->blocks[i] = (i * 7 + 3) % (T * m->seq_blocks);
    o->seqs = (gn_seqs){T, m->seq_blocks, m->row0, m->pos0, m->blocks};
    o->cos = device_rows(&m->host, NULL, GN_F32, T, m->s.D / 2, 0, 0);
    o->sin = device_rows(&m->host, NULL, GN_F32, T, m->s.D / 2, 0, 0);
    const gn_tensor inv_freq = scaled_vector(&m->host, r, m->s.D / 2, 0.5f, 0.5f);
    cr_assert_eq(gn_rope_table(o->ctx, &o->cos, &o->sin, &inv_freq, &o->seqs), GN_OK);
    gn_tensor *const activations[] = {&o->q, &o->k, &o->v, &o->a, &o->h};
    const int dim = m->s.heads * m->s.D, kv = m->s.kv_heads * m->s.D;
    const int cols[] = {dim, kv, kv, dim, m->s.intermediate};
    for (int i = 0; i < COUNT(cols); i++)
        *activations[i] = device_rows(&m->host, NULL, GN_F32, T, cols[i], 0, 0);
    m->decoder.seqs = o->seqs;
}

static void open_model(model *m, shape s) {
    rng r = {(uint64_t)(s.hidden + s.T + s.D)};
    *m = (model){.s = s};
    m->seq_blocks = s.past[0] / CACHE_TOKENS < SEQ_BLOCKS ? SEQ_BLOCKS : MAX_SEQ_BLOCKS;
    decoder_layers *const both[] = {&m->decoder, &m->ops};
    for (int i = 0; i < 2; i++)
        *both[i] = (decoder_layers){.ctx = i ? open_on("cpu", GN_F32) : open_on("cuda", GN_BF16),
                                    .n = s.layers,
                                    .heads = s.heads,
                                    .kv_heads = s.kv_heads,
                                    .D = s.D,
                                    .terms = m->terms,
                                    .n_terms = s.n_terms};
    m->decoder.ctx->cuda->sms = s.sms;
    m->placed.ctx = m->decoder.ctx;
    m->host.ctx = m->ops.ctx;
    const int dim = s.heads * s.D, kv = s.kv_heads * s.D;
    const int rows[PROJ] = {dim, kv, kv, s.hidden, s.intermediate, s.intermediate, s.hidden};
    const int cols[PROJ] = {s.hidden, s.hidden, s.hidden, dim, s.hidden, s.hidden, s.intermediate};
    open_layers(m, &r, rows, cols);
    for (int i = 0; i < s.n_terms; i++) {
        open_pairs(m->pairs[i], &m->placed, &r, s.layers, i, s.terms[i].rank, rows, cols);
        m->terms[i] = (gn_lora){.row0 = s.terms[i].row0,
                                .rows = s.terms[i].rows,
                                .scale = i % 2 ? -0.7f : 1.1f,
                                .pairs = m->pairs[i],
                                .placed = m->pairs[i]};
    }
    open_batch(m, &r);
}

static void close_model(model *m) {
    device_free(&m->host);
    device_free(&m->placed);
    for (int i = 0; i < m->s.layers; i++)
        for (int p = 0; p < PROJ; p++) free_matrix(&m->w[i][p]);
    gn_ctx_close(m->decoder.ctx);
    gn_ctx_close(m->ops.ctx);
}

/* Twice, with the same result: so all counters are as they were. */
static void run_decoder(model *m, gn_tensor x, const float *start) {
    const int32_t ids[ROWS] = {0};
    const decoder_layers *l = &m->decoder;
    const size_t bytes = (size_t)(m->s.T * m->s.hidden) * sizeof(float);
    float *first = malloc(bytes);
    gn_decoder *d = open_decoder(l);
    reserve(l->ctx, gn_linear_workspace(l->ctx, ROWS, 2048, 4096, 64, TERMS));
    cr_assert_eq(gn_stage(l->ctx, ids, &l->seqs, m->terms, l->n_terms), GN_OK);
    for (int i = 0; i < 2; i++) {
        memcpy(x.data, start, bytes);
        cr_assert_eq(
            gn_decoder_run(d, &x, &m->ops.cos, &m->ops.sin, &l->seqs, m->terms, l->n_terms), GN_OK);
        if (i == 0) memcpy(first, x.data, bytes);
    }
    cr_assert_arr_eq(x.data, first, bytes, "not the same again");
    gn_decoder_close(d);
    free(first);
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
    reserve(m.ops.ctx, gn_linear_workspace(m.ops.ctx, ROWS, 2048, 4096, 64, TERMS) +
                           gn_attention_workspace(m.ops.ctx, MAX_SEQ_BLOCKS * CACHE_TOKENS));
    cr_assert_eq(run_ops(&m.ops, expected), GN_OK);
    run_decoder(&m, got, start);
    judge_rows(&v, got.data, expected.data, start, s.T, s.hidden);
    judge_caches(&v, &m.decoder, &m.ops);
    settle(tally, &v, guards_stand(&m.placed) ? NULL : "a guard is written");
    free(start);
    close_model(&m);
}

Test(emulated_decoder, does_what_the_ops_do, .timeout = 300) {
    tally tally = {0};
    for (int i = 0; i < COUNT(shapes); i++) test_shape(&tally, shapes[i]);
    conclude(&tally, "decoder");
}

/* NaN goes through, and nothing waits for it. */
Test(emulated_decoder, ends_where_values_are_no_numbers, .timeout = 60) {
    for (int i = 0; i < COUNT(shapes); i += 6) {
        model m;
        open_model(&m, shapes[i]);
        const int64_t n = (int64_t)m.s.T * m.s.hidden;
        float *start = calloc((size_t)n, sizeof *start);
        for (int64_t j = 0; j < n; j += 3) start[j] = NAN;
        const gn_tensor x = device_rows(&m.placed, start, GN_F32, m.s.T, m.s.hidden, 0, 0);
        run_decoder(&m, x, start);
        for (int64_t j = 0; j < n; j++) cr_assert(isnan(((const float *)x.data)[j]));
        free(start);
        close_model(&m);
    }
}
