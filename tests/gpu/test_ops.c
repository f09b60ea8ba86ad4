/* The small ops on the GPU against the CPU: embedding, RMSNorm, rotary positions and the cache; and
 * gn_ctx_replay: what was recorded once is right for the next batch too. */
#include "device.h"

static const gn_dtype computes[] = {GN_BF16, GN_F32};

/* ---- embedding and norm ---- */

static const struct {
    int T, C, pad;
} rows_cases[] = {{1, 1, 0},   {3, 63, 0},    {5, 64, 3},   {1, 4096, 0},  {17, 288, 8},
                  {64, 65, 0}, {2, 11008, 5}, {1, 3001, 0}, {513, 129, 0}, {9, 257, 1}};

Test(gpu_ops, embed_copies_rows) {
    enum { V = 37, DRAWN = 9 };
    const gn_dtype dtypes[] = {GN_F32, GN_F16, GN_BF16};
    static const int32_t block;
    sides s = open_sides(GN_BF16);
    tally tally = {0};
    for (int i = 0; i < COUNT(rows_cases) * COUNT(dtypes); i++) {
        const int T = rows_cases[i / 3].T, C = rows_cases[i / 3].C;
        rng r = {(uint64_t)(10 + i)};
        random_matrix table = make_matrix(&r, GN_Q_NONE, false, dtypes[i % 3], V, C);
        int32_t *ids = malloc((size_t)T * sizeof *ids), *known = malloc((size_t)T * sizeof *known);
        int32_t drawn[DRAWN];
        for (int j = 0; j < DRAWN; j++) drawn[j] = rng_below(&r, V);
        for (int t = 0; t < T; t++) {
            ids[t] = rng_below(&r, V + DRAWN) - DRAWN;
            known[t] = ids[t] < 0 ? drawn[-1 - ids[t]] : ids[t];
        }
        const int32_t row0[] = {0, T}, pos0[] = {0};
        const gn_seqs seqs = {1, 1, row0, pos0, &block};
        device_memory m = {.ctx = s.gpu};
        const gn_matrix placed = device_matrix(&m, &table.m);
        const int32_t *drawn_there = device_alloc(&m, drawn, sizeof drawn, 0);
        gn_tensor y = device_rows(&m, NULL, GN_F32, T, C, rows_cases[i / 3].pad, 0);
        float *got = malloc((size_t)(T * C) * sizeof *got);
        float *expected = malloc((size_t)(T * C) * sizeof *expected);
        gn_tensor e = gn_tensor_2d(expected, GN_F32, T, C);
        verdict v = {0};
        snprintf(v.name, sizeof v.name, "embed %s T=%d C=%d", gn_dtype_name(dtypes[i % 3]), T, C);
        cr_assert_eq(gn_embed(s.cpu, &e, &table.m, known, NULL, 0), GN_OK);
        cr_assert_eq(gn_stage(s.gpu, ids, &seqs, NULL, 0), GN_OK);
        const char *why = ran(s.gpu, gn_embed(s.gpu, &y, &placed, ids, drawn_there, DRAWN), v.name);
        if (!why && !read_rows(s.gpu, got, &y)) why = "a gap between rows of y is written";
        if (!why && !guards_stand(&m)) why = "a guard is written";
        for (int j = 0; j < T * C && !why; j++) judge(&v, j / C, j % C, got[j], expected[j], 0);
        settle(&tally, &v, why);
        device_free(&m);
        free_matrix(&table);
        free(ids);
        free(known);
        free(got);
        free(expected);
    }
    close_sides(&s);
    conclude(&tally, "embedding");
}

Test(gpu_ops, rmsnorm) {
    sides s = open_sides(GN_BF16);
    tally tally = {0};
    for (int i = 0; i < COUNT(rows_cases) * 2; i++) {
        const int T = rows_cases[i / 2].T, C = rows_cases[i / 2].C, pad = rows_cases[i / 2].pad;
        const bool in_place = i % 2;
        rng r = {(uint64_t)(50 + i)};
        float *x = random_floats(&r, (size_t)(T * C)), *w = random_floats(&r, (size_t)C);
        float *got = malloc((size_t)(T * C) * sizeof *got);
        for (int c = 0; c < C; c++) x[(T - 1) * C + c] *= 1e-4f; /* a row where eps counts */
        device_memory m = {.ctx = s.gpu};
        gn_tensor tx = device_rows(&m, x, GN_F32, T, C, pad, 0);
        gn_tensor ty = in_place ? tx : device_rows(&m, NULL, GN_F32, T, C, pad, 0);
        const gn_tensor tw = gn_tensor_1d(device_alloc(&m, w, (size_t)C * sizeof *w, 0), GN_F32, C);
        verdict v = {0};
        snprintf(v.name, sizeof v.name, "rmsnorm T=%d C=%d%s", T, C, in_place ? " in place" : "");
        const char *why = ran(s.gpu, gn_rmsnorm(s.gpu, &ty, &tx, &tw, 1e-5f), v.name);
        if (!why && !read_rows(s.gpu, got, &ty)) why = "a gap between rows of y is written";
        if (!why && !guards_stand(&m)) why = "a guard is written";
        gn_tensor e = gn_tensor_2d(x, GN_F32, T, C);
        const gn_tensor ew = gn_tensor_1d(w, GN_F32, C);
        cr_assert_eq(gn_rmsnorm(s.cpu, &e, &e, &ew, 1e-5f), GN_OK);
        for (int j = 0; j < T * C && !why; j++)
            judge(&v, j / C, j % C, got[j], x[j], (sqrt(C) + 8) * U32 * fabs((double)x[j]));
        settle(&tally, &v, why);
        device_free(&m);
        free(x);
        free(w);
        free(got);
    }
    close_sides(&s);
    conclude(&tally, "rmsnorm");
}

/* ---- rotary positions and the cache ---- */

typedef struct {
    int heads, kv_heads, D, tokens;
    gn_dtype kv_dtype;
    int pad;
} rope_shape;

static const rope_shape rope_shapes[] = {
    {8, 8, 128, 16, GN_BF16, 0}, {8, 2, 64, 16, GN_BF16, 0}, {4, 1, 96, 16, GN_BF16, 8},
    {3, 3, 34, 16, GN_BF16, 0},  {6, 2, 80, 16, GN_F32, 0},  {1, 1, 2, 3, GN_F32, 1},
    {5, 1, 256, 7, GN_BF16, 3},  {8, 8, 128, 16, GN_F8, 0},  {8, 2, 64, 16, GN_F8, 0},
    {6, 2, 80, 16, GN_F8, 8},    {3, 3, 34, 7, GN_F8, 0},    {5, 1, 256, 16, GN_F8, 3},
};

enum { ROPE_SEQS = 5, MAX_BLOCKS = 300 };

/* Both sides of rope_table and rope_store for the same batch. */
typedef struct {
    const sides *sides;
    rope_shape s;
    int T, n_blocks;
    int32_t row0[ROPE_SEQS + 1], pos0[ROPE_SEQS], blocks[ROPE_SEQS * MAX_BLOCKS];
    gn_seqs seqs;
    float *q, *k, *v, *inv_freq, *cos, *sin;
    gn_kv cpu_cache;
    char name[256];
} rope;

static gn_tensor cache_of(const rope *p, void *data) {
    const rope_shape *s = &p->s;
    const gn_tensor t = {data,
                         s->kv_dtype,
                         4,
                         {p->n_blocks, s->kv_heads, s->tokens, s->D},
                         (int64_t)s->kv_heads * s->tokens * s->D};
    return t;
}

static size_t cache_bytes(const rope *p) {
    return (size_t)(p->n_blocks * p->s.kv_heads * p->s.tokens * p->s.D) *
           gn_dtype_size(p->s.kv_dtype);
}

static size_t scale_bytes(const rope *p) {
    const size_t rows = (size_t)(p->n_blocks * p->s.kv_heads * p->s.tokens);
    return p->s.kv_dtype == GN_F8 ? rows * sizeof(float) : 0;
}

static gn_tensor scales_of(const rope *p, void *data) {
    const rope_shape *s = &p->s;
    const int64_t ld = (int64_t)s->kv_heads * s->tokens;
    return (gn_tensor){data, GN_F32, 3, {p->n_blocks, s->kv_heads, s->tokens, 1}, ld};
}

static void *poisoned(size_t bytes) {
    return memset(malloc(bytes + 1), 0xff, bytes);
}

static void make_rope(rope *p, const sides *sides, rope_shape s, uint64_t seed) {
    static const int rows[ROPE_SEQS] = {1, 20, 0, 3, 1};
    static const int from[ROPE_SEQS] = {0, 5, 40, 2047, 600};
    rng r = {seed};
    *p = (rope){.sides = sides, .s = s, .n_blocks = ROPE_SEQS * MAX_BLOCKS};
    const int per_seq = 2050 / s.tokens + 1; /* of a whole context, more than MAX_BLOCKS or not */
    const int max_blocks = per_seq < MAX_BLOCKS ? per_seq : MAX_BLOCKS;
    for (int i = 0; i < ROPE_SEQS; i++) {
        p->row0[i + 1] = p->row0[i] + rows[i];
        p->pos0[i] = from[i] + rows[i] <= max_blocks * s.tokens ? from[i] : 7;
    }
    p->n_blocks = ROPE_SEQS * max_blocks;
    for (int i = 0; i < p->n_blocks; i++) /* a permutation: 7 divides no number of blocks here */
        p->blocks[i] = (int32_t)((i * 7LL + 3) % p->n_blocks);
    p->seqs = (gn_seqs){ROPE_SEQS, max_blocks, p->row0, p->pos0, p->blocks};
    p->T = p->row0[ROPE_SEQS];
    const gn_dtype act = gn_ctx_activation(sides->gpu);
    p->q = random_floats(&r, (size_t)(p->T * s.heads * s.D));
    p->k = random_floats(&r, (size_t)(p->T * s.kv_heads * s.D));
    p->v = random_floats(&r, (size_t)(p->T * s.kv_heads * s.D));
    round_floats(p->q, act, p->T * s.heads * s.D);
    round_floats(p->k, act, p->T * s.kv_heads * s.D);
    round_floats(p->v, act, p->T * s.kv_heads * s.D);
    p->inv_freq = random_floats(&r, (size_t)(s.D / 2));
    p->cos = malloc((size_t)(p->T * s.D / 2) * sizeof *p->cos);
    p->sin = malloc((size_t)(p->T * s.D / 2) * sizeof *p->sin);
    p->cpu_cache =
        (gn_kv){cache_of(p, poisoned(cache_bytes(p))), cache_of(p, poisoned(cache_bytes(p))),
                scales_of(p, poisoned(scale_bytes(p))), scales_of(p, poisoned(scale_bytes(p)))};
    snprintf(p->name, sizeof p->name, "%s rope heads %d/%d D=%d, blocks of %d %s, pad %d",
             gn_dtype_name(sides->compute), s.heads, s.kv_heads, s.D, s.tokens,
             gn_dtype_name(s.kv_dtype), s.pad);
}

static void free_rope(rope *p) {
    free(p->q);
    free(p->k);
    free(p->v);
    free(p->inv_freq);
    free(p->cos);
    free(p->sin);
    free(p->cpu_cache.k.data);
    free(p->cpu_cache.v.data);
    free(p->cpu_cache.k_scales.data);
    free(p->cpu_cache.v_scales.data);
}

static gn_tensor with_heads(gn_tensor t, int heads, int D) {
    t.ndim = 3;
    t.shape[1] = heads;
    t.shape[2] = D;
    return t;
}

/* Angles differ in nothing, and so their cosines by units of float32 alone. */
static const char *check_table(verdict *v, const rope *p, const gn_tensor *cos,
                               const gn_tensor *sin) {
    const int n = p->T * p->s.D / 2;
    float *c = malloc((size_t)n * sizeof *c), *s = malloc((size_t)n * sizeof *s);
    const bool intact = read_rows(p->sides->gpu, c, cos) && read_rows(p->sides->gpu, s, sin);
    for (int i = 0; i < n; i++) {
        judge(v, i / (p->s.D / 2), i % (p->s.D / 2), c[i], p->cos[i], 4 * U32);
        judge(v, i / (p->s.D / 2), i % (p->s.D / 2), s[i], p->sin[i], 4 * U32);
    }
    free(c);
    free(s);
    return intact ? NULL : "a gap between rows of the table is written";
}

/* Rotated values, rounded to `dtype` on the GPU and to `cpu_dtype` on the CPU: off by a few
 * roundings of the two products, each at most sqrt(2) long, and by those to the dtypes. */
static double rotated_error(double value, gn_dtype dtype, gn_dtype cpu_dtype) {
    const double units = (dtype == GN_BF16 ? U16 : U32) + (cpu_dtype == GN_BF16 ? U16 : U32);
    return 12 * U32 + units * (fabs(value) + 12 * U32);
}

/* Codes may fall to either side of a tie, but hardly any do, and scales are off as the largest
 * value is. Values that are not rotated are stored alike. */
static void check_codes(verdict *v, const rope *p, const gn_tensor *cache, const gn_tensor *scales,
                        bool is_rotated) {
    const gn_tensor *expected = is_rotated ? &p->cpu_cache.k : &p->cpu_cache.v;
    const gn_tensor *expected_scales = is_rotated ? &p->cpu_cache.k_scales : &p->cpu_cache.v_scales;
    const int64_t rows = (int64_t)(scale_bytes(p) / sizeof(float)), D = p->s.D;
    uint8_t *codes = malloc(cache_bytes(p)), *want = expected->data;
    float *got = malloc(scale_bytes(p)), *scale = expected_scales->data;
    int64_t others = 0, stored = 0;
    cr_assert_eq(gn_ctx_read(p->sides->gpu, codes, cache->data, cache_bytes(p)), GN_OK);
    cr_assert_eq(gn_ctx_read(p->sides->gpu, got, scales->data, scale_bytes(p)), GN_OK);
    for (int64_t i = 0; i < rows; i++) {
        const bool is_stored = !isnan(scale[i]);
        const double off = is_rotated ? 24 * U32 / GN_F8_MAX + 4 * U32 * scale[i] : 0;
        if (is_stored)
            judge(v, i, -1, got[i], scale[i], off);
        else
            judge(v, i, -1, isnan(got[i]) ? 0 : 1, 0, 0);
        stored += is_stored ? D : 0;
        for (int64_t j = i * D; j < (i + 1) * D; j++) {
            const bool may_differ = is_stored && is_rotated;
            others += codes[j] != want[j];
            judge(v, i, j % D, codes[j], want[j], may_differ ? 1 : 0);
        }
    }
    judge(v, -1, -1, (double)others, 0, 1e-3 * (double)stored);
    free(codes);
    free(got);
}

static void check_cache(verdict *v, const rope *p, const gn_tensor *gpu, int which) {
    const size_t n = cache_bytes(p) / gn_dtype_size(p->s.kv_dtype);
    const void *cpu = which ? p->cpu_cache.v.data : p->cpu_cache.k.data;
    void *image = malloc(cache_bytes(p));
    float *got = malloc(n * sizeof *got), *expected = malloc(n * sizeof *expected);
    cr_assert_eq(gn_ctx_read(p->sides->gpu, image, gpu->data, cache_bytes(p)), GN_OK);
    gn_widen(got, image, p->s.kv_dtype, (int64_t)n);
    gn_widen(expected, cpu, p->s.kv_dtype, (int64_t)n);
    for (size_t i = 0; i < n; i++) {
        const int64_t row = (int64_t)(i / (size_t)p->s.D), col = (int64_t)(i % (size_t)p->s.D);
        if (isnan(expected[i])) /* nothing is stored there: the poison must still be there */
            judge(v, row, col, isnan(got[i]) ? 0 : 1, 0, 0);
        else
            judge(v, row, col, got[i], expected[i],
                  which == 1 ? 0 : rotated_error(expected[i], p->s.kv_dtype, p->s.kv_dtype));
    }
    free(image);
    free(got);
    free(expected);
}

static void check_rope(tally *tally, rope *p) {
    const rope_shape *s = &p->s;
    const gn_dtype act = gn_ctx_activation(p->sides->gpu);
    gn_ctx *gpu = p->sides->gpu, *cpu = p->sides->cpu;
    const int T = p->T, half = s->D / 2;
    device_memory m = {.ctx = gpu};
    gn_tensor cos = device_rows(&m, NULL, GN_F32, T, half, s->pad, 0);
    gn_tensor sin = device_rows(&m, NULL, GN_F32, T, half, s->pad, 0);
    const gn_tensor freq =
        gn_tensor_1d(device_alloc(&m, p->inv_freq, (size_t)half * sizeof(float), 0), GN_F32, half);
    gn_tensor q =
        with_heads(device_rows(&m, p->q, act, T, s->heads * s->D, s->pad, 0), s->heads, s->D);
    const gn_tensor k =
        with_heads(device_rows(&m, p->k, act, T, s->kv_heads * s->D, s->pad, 0), s->kv_heads, s->D);
    const gn_tensor v =
        with_heads(device_rows(&m, p->v, act, T, s->kv_heads * s->D, s->pad, 0), s->kv_heads, s->D);
    gn_kv kv = {cache_of(p, device_alloc(&m, NULL, cache_bytes(p), 0)),
                cache_of(p, device_alloc(&m, NULL, cache_bytes(p), 0)),
                scales_of(p, device_alloc(&m, NULL, scale_bytes(p), 0)),
                scales_of(p, device_alloc(&m, NULL, scale_bytes(p), 0))};
    int32_t *ids = calloc((size_t)T, sizeof *ids);
    cr_assert_eq(gn_stage(gpu, ids, &p->seqs, NULL, 0), GN_OK);
    const char *why = ran(gpu, gn_rope_table(gpu, &cos, &sin, &freq, &p->seqs), p->name);
    if (!why) why = ran(gpu, gn_rope_store(gpu, &q, &k, &v, &cos, &sin, &p->seqs, &kv), p->name);

    gn_tensor ec = gn_tensor_2d(p->cos, GN_F32, T, half);
    gn_tensor es = gn_tensor_2d(p->sin, GN_F32, T, half);
    const gn_tensor ef = gn_tensor_1d(p->inv_freq, GN_F32, half);
    gn_tensor eq = with_heads(gn_tensor_2d(p->q, GN_F32, T, s->heads * s->D), s->heads, s->D);
    const gn_tensor ek =
        with_heads(gn_tensor_2d(p->k, GN_F32, T, s->kv_heads * s->D), s->kv_heads, s->D);
    const gn_tensor ev =
        with_heads(gn_tensor_2d(p->v, GN_F32, T, s->kv_heads * s->D), s->kv_heads, s->D);
    cr_assert_eq(gn_rope_table(cpu, &ec, &es, &ef, &p->seqs), GN_OK);
    cr_assert_eq(gn_rope_store(cpu, &eq, &ek, &ev, &ec, &es, &p->seqs, &p->cpu_cache), GN_OK);

    verdict verdict = {0};
    snprintf(verdict.name, sizeof verdict.name, "%s", p->name);
    const int row = s->heads * s->D;
    float *got = malloc((size_t)(T * row) * sizeof *got);
    if (!why) why = check_table(&verdict, p, &cos, &sin);
    if (!why && !read_rows(gpu, got, &q)) why = "a gap between rows of q is written";
    for (int i = 0; i < T * row && !why; i++)
        judge(&verdict, i / row, i % row, got[i], p->q[i], rotated_error(p->q[i], act, GN_F32));
    if (!why && s->kv_dtype == GN_F8) {
        check_codes(&verdict, p, &kv.k, &kv.k_scales, true);
        check_codes(&verdict, p, &kv.v, &kv.v_scales, false);
    } else if (!why) {
        check_cache(&verdict, p, &kv.k, 0);
        check_cache(&verdict, p, &kv.v, 1);
    }
    if (!why && !guards_stand(&m)) why = "a guard is written";
    settle(tally, &verdict, why);
    device_free(&m);
    free(ids);
    free(got);
}

Test(gpu_ops, rope_rotates_q_and_fills_the_cache) {
    tally tally = {0};
    rope *p = malloc(sizeof *p);
    for (int c = 0; c < COUNT(computes); c++) {
        sides s = open_sides(computes[c]);
        for (int i = 0; i < COUNT(rope_shapes); i++) {
            make_rope(p, &s, rope_shapes[i], (uint64_t)(80 + i));
            check_rope(&tally, p);
            free_rope(p);
        }
        close_sides(&s);
    }
    free(p);
    conclude(&tally, "rope");
}

/* ---- replay ---- */

/* A model of one layer, without its MLP: enough that every kind of op is recorded. */
enum {
    VOCAB = 50,
    HIDDEN = 256,
    HEADS = 4,
    KV_HEADS = 2,
    HEAD_DIM = 64,
    Q_COLS = HEADS * HEAD_DIM,
    KV_COLS = KV_HEADS * HEAD_DIM,
    KV_TOKENS = 16,
    KV_BLOCKS = 40,
    BLOCKS = 8, /* of a sequence: 128 tokens */
    RANK = 8,
    MAX_T = 24,
};

typedef struct {
    gn_ctx *ctx;
    device_memory m;
    random_matrix host[6];
    gn_matrix table, w[4], head; /* q, k, v, o */
    gn_tensor norm, inv_freq, x, q, k, v, y, cos, sin, logits;
    gn_kv kv;
    gn_lora_pair pairs[2][4]; /* of two adapters */
    gn_lora_pair *placed;
    const struct batch *batch; /* whose shapes the ops are called with */
} model;

/* What changes from step to step: rows stay as many, and sequences, and terms. */
typedef struct batch {
    int T, n_seqs;
    int32_t ids[MAX_T], row0[5], pos0[4], blocks[4 * BLOCKS];
    gn_seqs seqs;
    gn_lora terms[2];
} batch;

static gn_matrix place_random(model *m, int i, rng *r, gn_qtype qtype, int64_t rows, int64_t cols) {
    m->host[i] = make_matrix(r, qtype, qtype == GN_Q_NF4, GN_BF16, rows, cols);
    return device_matrix(&m->m, &m->host[i].m);
}

static gn_tensor device_random(model *m, rng *r, gn_dtype dtype, int64_t rows, int64_t cols) {
    float *v = random_floats(r, (size_t)(rows * cols));
    const gn_tensor t = device_rows(&m->m, v, dtype, rows, cols, 0, 0);
    free(v);
    return t;
}

/* The same values every time: what a step does not overwrite, it reads. */
static void fill_cache(model *m) {
    rng r = {9};
    const int64_t n = KV_BLOCKS * KV_COLS * KV_TOKENS;
    for (int i = 0; i < 2; i++) {
        void *v = random_values(&r, GN_BF16, (size_t)n);
        cr_assert_eq(gn_ctx_write(m->ctx, i ? m->kv.v.data : m->kv.k.data, v, (size_t)n * 2),
                     GN_OK);
        free(v);
    }
}

static gn_tensor new_cache(model *m) {
    gn_tensor t = device_rows(&m->m, NULL, GN_BF16, KV_BLOCKS, KV_COLS * KV_TOKENS, 0, 0);
    t.ndim = 4;
    t.shape[1] = KV_HEADS;
    t.shape[2] = KV_TOKENS;
    t.shape[3] = HEAD_DIM;
    return t;
}

static void make_model(model *m, gn_ctx *ctx) {
    const int N[4] = {Q_COLS, KV_COLS, KV_COLS, HIDDEN};
    const gn_dtype act = gn_ctx_activation(ctx);
    rng r = {5};
    *m = (model){.ctx = ctx, .m = {.ctx = ctx}};
    m->table = place_random(m, 0, &r, GN_Q_NONE, VOCAB, HIDDEN);
    for (int i = 0; i < 4; i++) m->w[i] = place_random(m, 1 + i, &r, GN_Q_NF4, N[i], HIDDEN);
    m->head = place_random(m, 5, &r, GN_Q_NONE, VOCAB, HIDDEN);
    m->norm = device_random(m, &r, GN_F32, 1, HIDDEN);
    m->norm = gn_tensor_1d(m->norm.data, GN_F32, HIDDEN);
    m->inv_freq = device_random(m, &r, GN_F32, 1, HEAD_DIM / 2);
    m->inv_freq = gn_tensor_1d(m->inv_freq.data, GN_F32, HEAD_DIM / 2);
    m->x = device_rows(&m->m, NULL, GN_F32, MAX_T, HIDDEN, 0, 0);
    m->logits = device_rows(&m->m, NULL, GN_F32, MAX_T, VOCAB, 0, 0);
    m->q = device_rows(&m->m, NULL, act, MAX_T, Q_COLS, 0, 0);
    m->y = device_rows(&m->m, NULL, act, MAX_T, Q_COLS, 0, 0);
    m->k = device_rows(&m->m, NULL, act, MAX_T, KV_COLS, 0, 0);
    m->v = device_rows(&m->m, NULL, act, MAX_T, KV_COLS, 0, 0);
    m->cos = device_rows(&m->m, NULL, GN_F32, MAX_T, HEAD_DIM / 2, 0, 0);
    m->sin = device_rows(&m->m, NULL, GN_F32, MAX_T, HEAD_DIM / 2, 0, 0);
    m->kv.k = new_cache(m);
    m->kv.v = new_cache(m);
    gn_tensor a = device_random(m, &r, GN_BF16, 8 * RANK, HIDDEN); /* of all pairs */
    gn_tensor b = device_random(m, &r, GN_BF16, 8 * HIDDEN, RANK);
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) {
            const int at = 4 * i + j;
            m->pairs[i][j] = (gn_lora_pair){
                RANK, 0.5f,
                gn_tensor_2d((char *)a.data + at * RANK * HIDDEN * 2, GN_BF16, RANK, HIDDEN),
                gn_tensor_2d((char *)b.data + at * RANK * HIDDEN * 2, GN_BF16, N[j], RANK)};
        }
    m->placed = device_alloc(&m->m, m->pairs, sizeof m->pairs, 0);
}

/* Step `step` of sequences that have rows[i] rows in the batch. */
static void make_batch(batch *b, const model *m, int step, int n_seqs, const int *rows) {
    rng r = {(uint64_t)(400 + step)};
    *b = (batch){.n_seqs = n_seqs};
    for (int i = 0; i < n_seqs; i++) {
        b->pos0[i] = rng_below(&r, 100);
        b->row0[i + 1] = b->row0[i] + rows[i];
        for (int j = 0; j < BLOCKS; j++) /* another order every step; no block twice */
            b->blocks[i * BLOCKS + j] = (i * BLOCKS + j + 5 * step) * 7 % KV_BLOCKS;
    }
    b->T = b->row0[n_seqs];
    for (int t = 0; t < b->T; t++) b->ids[t] = rng_below(&r, VOCAB);
    b->seqs = (gn_seqs){n_seqs, BLOCKS, b->row0, b->pos0, b->blocks};
    for (int i = 0; i < 2; i++) { /* the adapters change places, and their rows */
        const int adapter = (i + step) % 2, cut = 1 + step % (b->T > 1 ? b->T - 1 : 1);
        b->terms[i] = (gn_lora){.row0 = i == 0       ? 0
                                        : cut < b->T ? cut
                                                     : 0,
                                .rows = i == 0 ? cut : b->T - cut,
                                .scale = 0.25f + 0.25f * (float)step,
                                .pairs = m->pairs[adapter],
                                .placed = m->placed + 4 * adapter};
    }
}

static gn_tensor first_rows(gn_tensor t, int rows) {
    t.shape[0] = rows;
    return t;
}

/* One step over m->batch: what gn_ctx_replay records. */
static gn_status step(void *arg) {
    model *m = arg;
    const batch *b = m->batch;
    const int T = b->T;
    gn_tensor x = first_rows(m->x, T), logits = first_rows(m->logits, T);
    gn_tensor q = first_rows(m->q, T), k = first_rows(m->k, T), v = first_rows(m->v, T);
    gn_tensor y = first_rows(m->y, T), cos = first_rows(m->cos, T), sin = first_rows(m->sin, T);
    const gn_linear_args qkv = {.x = x,
                                .norm = &m->norm,
                                .eps = 1e-5f,
                                .lora = b->terms,
                                .n_lora = 2,
                                .n_parts = 3,
                                .part = {{q, &m->w[0]}, {k, &m->w[1]}, {v, &m->w[2]}}};
    const gn_linear_args o = {.x = y,
                              .epilogue = GN_ADD,
                              .lora = b->terms,
                              .n_lora = 2,
                              .pair = 3,
                              .n_parts = 1,
                              .part = {{x, &m->w[3]}}};
    const gn_linear_args head = {
        .x = x, .norm = &m->norm, .eps = 1e-5f, .n_parts = 1, .part = {{logits, &m->head}}};
    gn_tensor q3 = with_heads(q, HEADS, HEAD_DIM), y3 = with_heads(y, HEADS, HEAD_DIM);
    const gn_tensor k3 = with_heads(k, KV_HEADS, HEAD_DIM), v3 = with_heads(v, KV_HEADS, HEAD_DIM);
    gn_status status = gn_embed(m->ctx, &x, &m->table, b->ids, NULL, 0);
    if (!status) status = gn_rope_table(m->ctx, &cos, &sin, &m->inv_freq, &b->seqs);
    if (!status) status = gn_linear(m->ctx, &qkv);
    if (!status) status = gn_rope_store(m->ctx, &q3, &k3, &v3, &cos, &sin, &b->seqs, &m->kv);
    if (!status) status = gn_attention(m->ctx, &y3, &q3, &m->kv, &b->seqs);
    if (!status) status = gn_linear(m->ctx, &o);
    if (!status) status = gn_linear(m->ctx, &head);
    return status;
}

/* Runs a batch, recorded under `key` or (0) called directly. */
static const char *run_batch(model *m, const batch *b, uint64_t key, float *logits) {
    fill_cache(m);
    m->batch = b;
    cr_assert_eq(gn_stage(m->ctx, b->ids, &b->seqs, b->terms, 2), GN_OK);
    const gn_status status = key ? gn_ctx_replay(m->ctx, key, step, m) : step(m);
    const char *why = ran(m->ctx, status, key ? "replay" : "a step");
    const gn_tensor t = first_rows(m->logits, b->T);
    if (!why) (void)read_rows(m->ctx, logits, &t);
    return why;
}

/* Directly called ops have tests of their own; replayed ones must give the same. In bfloat16 sums
 * may be taken in another order, and what is rounded then differs by a unit here and there. */
static void judge_logits(verdict *v, const float *got, const float *expected, int n,
                         gn_dtype compute) {
    double off = 0, size = 0;
    for (int i = 0; i < n; i++) {
        off += ((double)got[i] - expected[i]) * ((double)got[i] - expected[i]);
        size += (double)expected[i] * expected[i];
    }
    judge(v, 0, 0, sqrt(off), 0, compute == GN_F32 ? 0 : U16 * sqrt(size));
}

enum { STEPS = 4 };

static void check_replay(tally *tally, gn_ctx *ctx, int n_seqs, const int *rows) {
    model *m = malloc(sizeof *m);
    batch *b = malloc(STEPS * sizeof *b);
    static float expected[STEPS][MAX_T * VOCAB], got[MAX_T * VOCAB];
    make_model(m, ctx);
    verdict v = {0};
    snprintf(v.name, sizeof v.name, "%s replay, %d sequences, the first with %d rows",
             gn_dtype_name(gn_ctx_compute(ctx)), n_seqs, rows[0]);
    const char *why = NULL;
    for (int i = 0; i < STEPS; i++) make_batch(&b[i], m, i, n_seqs, rows);
    const size_t linear = gn_linear_workspace(ctx, MAX_T, HIDDEN, Q_COLS + 2 * KV_COLS, RANK, 2);
    const size_t attention = gn_attention_workspace(ctx, BLOCKS * KV_TOKENS);
    reserve(ctx, linear > attention ? linear : attention);
    for (int i = 0; i < STEPS && !why; i++) why = run_batch(m, &b[i], 0, expected[i]);
    /* Recorded with the first batch, replayed with each, the first again at the end. */
    for (int i = 0; i <= STEPS && !why; i++) {
        const batch *one = &b[i % STEPS];
        why = run_batch(m, one, (uint64_t)(100 + b->T), got);
        if (!why) judge_logits(&v, got, expected[i % STEPS], one->T * VOCAB, gn_ctx_compute(ctx));
    }
    if (!why && !guards_stand(&m->m)) why = "a guard is written";
    settle(tally, &v, why);
    for (int i = 0; i < COUNT(m->host); i++) free_matrix(&m->host[i]);
    device_free(&m->m);
    free(m);
    free(b);
}

Test(gpu_ops, a_replay_sees_the_batch_that_is_staged) {
    const int one[] = {1}, decode[] = {1, 1, 1, 1}, mixed[] = {1, 17, 3, 1};
    tally tally = {0};
    for (int c = 0; c < COUNT(computes); c++) {
        sides s = open_sides(computes[c]);
        check_replay(&tally, s.gpu, 1, one);
        check_replay(&tally, s.gpu, 4, decode);
        check_replay(&tally, s.gpu, 4, mixed);
        close_sides(&s);
    }
    conclude(&tally, "replay");
}
