/* gn_attention and gn_rope_store over a paged cache, against plain loops in double precision:
 * GQA, odd block sizes, blocks in shuffled order, F32, BF16 and F8 caches, several sequences in one
 * batch; and that a row's bits depend on nothing but its own sequence. */
#include "cases.h"

typedef struct {
    int heads, kv_heads, D, block_tokens;
    gn_dtype kv_dtype;
    int n_seqs;
    int length[4]; /* tokens of each sequence when all of it is in the cache */
} shape;

static const shape shapes[] = {
    {1, 1, 2, 1, GN_F32, 1, {5}},
    {4, 2, 8, 3, GN_F32, 2, {9, 1}},
    {4, 4, 34, 5, GN_BF16, 3, {17, 16, 3}},
    {8, 1, 64, 16, GN_BF16, 2, {50, 33}},
    {32, 4, 64, 16, GN_F32, 2, {40, 7}},
    {36, 2, 16, 7, GN_F32, 1, {21}},
    {40, 1, 16, 4, GN_BF16, 1, {19}}, /* a group of 40: two items a row */
    {3, 3, 128, 32, GN_F32, 4, {1, 2, 31, 66}},
    {2, 1, 256, 16, GN_BF16, 1, {35}},
    {4, 2, 64, 16, GN_F8, 2, {37, 5}},
    {6, 3, 34, 5, GN_F8, 3, {17, 16, 3}},
    {2, 2, 256, 16, GN_F8, 1, {20}},
};

enum { MAX_BLOCKS = 80, SPARE = 3 };

/* A whole problem: every token's q, k, v, and where its blocks lie. */
typedef struct {
    shape s;
    int total; /* tokens */
    float *q, *k, *v, *inv_freq;
    int32_t blocks[4 * MAX_BLOCKS], n_blocks; /* n_blocks of the cache */
} problem;

static int first_token(const shape *s, int seq) {
    int first = 0;
    for (int i = 0; i < seq; i++) first += s->length[i];
    return first;
}

static problem make_problem(shape s, uint64_t seed) {
    rng r = {seed};
    problem p = {.s = s, .total = first_token(&s, s.n_seqs)};
    p.q = random_floats(&r, (size_t)(p.total * s.heads * s.D));
    p.k = random_floats(&r, (size_t)(p.total * s.kv_heads * s.D));
    p.v = random_floats(&r, (size_t)(p.total * s.kv_heads * s.D));
    p.inv_freq = random_floats(&r, (size_t)(s.D / 2));
    int32_t order[4 * MAX_BLOCKS], used = 0;
    for (int i = 0; i < s.n_seqs; i++) used += (s.length[i] - 1) / s.block_tokens + 1;
    p.n_blocks = used + SPARE;
    for (int32_t i = 0; i < p.n_blocks; i++) order[i] = i;
    for (int32_t i = p.n_blocks - 1; i > 0; i--) { /* shuffle */
        const int j = rng_below(&r, i + 1);
        const int32_t swap = order[i];
        order[i] = order[j];
        order[j] = swap;
    }
    for (int i = 0, next = 0; i < s.n_seqs; i++)
        for (int b = 0; b < MAX_BLOCKS; b++)
            p.blocks[i * MAX_BLOCKS + b] =
                b <= (s.length[i] - 1) / s.block_tokens ? order[next++] : -1;
    return p;
}

static void free_problem(problem *p) {
    free(p->q);
    free(p->k);
    free(p->v);
    free(p->inv_freq);
}

/* The cache begins as NaN: what a row may not see must not matter. */
static gn_tensor make_cache(const problem *p) {
    const shape *s = &p->s;
    const int64_t block = (int64_t)s->kv_heads * s->block_tokens * s->D;
    gn_tensor t = {.dtype = s->kv_dtype,
                   .ndim = 4,
                   .shape = {p->n_blocks, s->kv_heads, s->block_tokens, s->D},
                   .ld = block};
    const size_t bytes = (size_t)(p->n_blocks * block) * gn_dtype_size(s->kv_dtype);
    t.data = malloc(bytes);
    memset(t.data, 0xff, bytes);
    return t;
}

/* With F8 a scale a row, NaN likewise; elsewhere nothing. */
static gn_tensor make_scales(const problem *p) {
    const shape *s = &p->s;
    gn_tensor t = {.dtype = GN_F32,
                   .ndim = 3,
                   .shape = {p->n_blocks, s->kv_heads, s->block_tokens, 1},
                   .ld = s->kv_heads * s->block_tokens};
    if (s->kv_dtype != GN_F8) return (gn_tensor){0};
    const size_t bytes = (size_t)gn_tensor_numel(&t) * sizeof(float);
    t.data = malloc(bytes);
    memset(t.data, 0xff, bytes);
    return t;
}

static gn_kv make_kv(const problem *p) {
    return (gn_kv){make_cache(p), make_cache(p), make_scales(p), make_scales(p)};
}

static gn_tensor heads_of(float *data, int rows, int heads, int D) {
    const gn_tensor t = {data, GN_F32, 3, {rows, heads, D, 1}, heads * D};
    return t;
}

/* What a run leaves behind: rotated q and y, (total, heads, D) by token, and the cache. */
typedef struct {
    float *q, *y;
    gn_kv kv;
} result;

static void free_result(result *r) {
    free(r->q);
    free(r->y);
    free(r->kv.k.data);
    free(r->kv.v.data);
    free(r->kv.k_scales.data);
    free(r->kv.v_scales.data);
}

/* One batch: positions [from[i], to[i]) of every sequence. */
static void run_batch(gn_ctx *ctx, const problem *p, result *r, const int *from, const int *to) {
    const shape *s = &p->s;
    const int q_row = s->heads * s->D, kv_row = s->kv_heads * s->D;
    int32_t row0[5] = {0}, pos0[4];
    for (int i = 0; i < s->n_seqs; i++) {
        row0[i + 1] = row0[i] + to[i] - from[i];
        pos0[i] = from[i];
    }
    const int T = row0[s->n_seqs];
    const gn_seqs seqs = {s->n_seqs, MAX_BLOCKS, row0, pos0, p->blocks};
    float *k = malloc((size_t)(T * kv_row + 1) * sizeof *k);
    float *v = malloc((size_t)(T * kv_row + 1) * sizeof *v);
    guarded q = guarded_alloc((size_t)(T * q_row)), out = guarded_alloc((size_t)(T * q_row));
    guarded cos = guarded_alloc((size_t)(T * s->D / 2)), sin = guarded_alloc(cos.n);
    for (int i = 0; i < s->n_seqs; i++) {
        const size_t at = (size_t)(first_token(s, i) + from[i]), n = (size_t)(to[i] - from[i]);
        memcpy(q.data + row0[i] * q_row, p->q + at * (size_t)q_row, n * (size_t)q_row * 4);
        memcpy(k + row0[i] * kv_row, p->k + at * (size_t)kv_row, n * (size_t)kv_row * 4);
        memcpy(v + row0[i] * kv_row, p->v + at * (size_t)kv_row, n * (size_t)kv_row * 4);
    }
    gn_tensor tq = heads_of(q.data, T, s->heads, s->D), ty = heads_of(out.data, T, s->heads, s->D);
    const gn_tensor tk = heads_of(k, T, s->kv_heads, s->D), tv = heads_of(v, T, s->kv_heads, s->D);
    gn_tensor tc = gn_tensor_2d(cos.data, GN_F32, T, s->D / 2);
    gn_tensor ts = gn_tensor_2d(sin.data, GN_F32, T, s->D / 2);
    const gn_tensor freq = gn_tensor_1d(p->inv_freq, GN_F32, s->D / 2);

    cr_assert_eq(gn_rope_table(ctx, &tc, &ts, &freq, &seqs), GN_OK);
    cr_assert_eq(gn_rope_store(ctx, &tq, &tk, &tv, &tc, &ts, &seqs, &r->kv), GN_OK);
    cr_assert_eq(gn_ctx_reserve(ctx, gn_attention_workspace(ctx, 200)), GN_OK);
    cr_assert_eq(gn_attention(ctx, &ty, &tq, &r->kv, &seqs), GN_OK);
    guarded_check(&q, "q");
    guarded_check(&out, "y");
    guarded_check(&cos, "cos");
    guarded_check(&sin, "sin");
    for (int i = 0; i < s->n_seqs; i++) {
        const size_t at = (size_t)(first_token(s, i) + from[i]), n = (size_t)(to[i] - from[i]);
        memcpy(r->q + at * (size_t)q_row, q.data + row0[i] * q_row, n * (size_t)q_row * 4);
        memcpy(r->y + at * (size_t)q_row, out.data + row0[i] * q_row, n * (size_t)q_row * 4);
    }
    guarded_free(&q);
    guarded_free(&out);
    guarded_free(&cos);
    guarded_free(&sin);
    free(k);
    free(v);
}

/* All of every sequence, `chunk` tokens of each at a time (0: at once). */
static result run_all(gn_ctx *ctx, const problem *p, int chunk) {
    const shape *s = &p->s;
    const size_t bytes = (size_t)(p->total * s->heads * s->D) * sizeof(float);
    result r = {malloc(bytes), malloc(bytes), make_kv(p)};
    int from[4] = {0}, to[4], left = 1;
    while (left) {
        left = 0;
        for (int i = 0; i < s->n_seqs; i++) {
            to[i] = chunk && from[i] + chunk < s->length[i] ? from[i] + chunk : s->length[i];
            left |= to[i] < s->length[i];
        }
        run_batch(ctx, p, &r, from, to);
        memcpy(from, to, sizeof from);
    }
    return r;
}

/* ---- the same in double precision ---- */

static const double EPS = 0x1p-23;

/* D elements of one head at one position, as the cache holds them; returns their scale. */
static float cached(float *out, const problem *p, const gn_tensor *cache, const gn_tensor *scales,
                    int seq, int position, int head) {
    const int tokens = p->s.block_tokens;
    const int64_t block = p->blocks[seq * MAX_BLOCKS + position / tokens];
    const int64_t row = (block * p->s.kv_heads + head) * tokens + position % tokens;
    gn_widen(out, (char *)cache->data + (size_t)(row * p->s.D) * gn_dtype_size(cache->dtype),
             cache->dtype, p->s.D);
    if (cache->dtype != GN_F8) return 1;
    const float scale = ((const float *)scales->data)[row];
    for (int d = 0; d < p->s.D; d++) out[d] *= scale;
    return scale;
}

/* x rotated to a position, in `dtype`. The angle is float32's, as the operation's is; the rest
 * may be off by a few roundings, and by half a unit of the dtype: in F8, 1/16 of the value, or of
 * the least that has all bits, which is 2^-6 of the scale. */
static void check_rotated(const float *got, const float *x, const problem *p, int position,
                          gn_dtype dtype, float scale) {
    const int half = p->s.D / 2;
    const double unit = dtype == GN_BF16 ? 0x1.01p-8 : dtype == GN_F8 ? 0x1.0001p-4 : 0;
    const double least = dtype == GN_F8 ? 0x1p-6 * scale : 0;
    for (int j = 0; j < half; j++) {
        const double angle = (double)((float)position * p->inv_freq[j]);
        const double a = x[j], b = x[j + half], c = cos(angle), s = sin(angle);
        const double first = a * c - b * s, second = b * c + a * s;
        const double error = 4 * EPS * (fabs(a) + fabs(b));
        cr_assert(fabs(got[j] - first) <= error + unit * fmax(fabs(first), least));
        cr_assert(fabs(got[j + half] - second) <= error + unit * fmax(fabs(second), least));
    }
}

/* As a cache of `dtype` holds it: in F8 so that the largest magnitude is 448. */
static void round_row(float *out, const float *x, int D, gn_dtype dtype) {
    uint32_t narrow[256];
    float top = 0, scaled[256];
    for (int d = 0; d < D; d++) top = fmaxf(top, fabsf(x[d]));
    for (int d = 0; d < D; d++) scaled[d] = dtype == GN_F8 ? x[d] * (448 / top) : x[d];
    gn_narrow(narrow, dtype, scaled, D);
    gn_widen(out, narrow, dtype, D);
    for (int d = 0; d < D; d++) out[d] *= dtype == GN_F8 ? top / 448 : 1;
}

Test(attention, rope_rotates_q_and_fills_the_cache) {
    for (int i = 0; i < COUNT(shapes); i++) {
        problem p = make_problem(shapes[i], (uint64_t)(200 + i));
        const shape *s = &p.s;
        gn_ctx *ctx = open_ctx(best_isa(), GN_F32, 2);
        result r = run_all(ctx, &p, 5);
        for (int seq = 0; seq < s->n_seqs; seq++)
            for (int pos = 0; pos < s->length[seq]; pos++) {
                const int t = first_token(s, seq) + pos;
                for (int h = 0; h < s->heads; h++)
                    check_rotated(r.q + (t * s->heads + h) * s->D, p.q + (t * s->heads + h) * s->D,
                                  &p, pos, GN_F32, 1);
                for (int h = 0; h < s->kv_heads; h++) {
                    const int at = (t * s->kv_heads + h) * s->D;
                    float k[256], v[256], rounded[256];
                    const float scale = cached(k, &p, &r.kv.k, &r.kv.k_scales, seq, pos, h);
                    check_rotated(k, p.k + at, &p, pos, s->kv_dtype, scale);
                    cached(v, &p, &r.kv.v, &r.kv.v_scales, seq, pos, h);
                    round_row(rounded, p.v + at, s->D, s->kv_dtype);
                    cr_assert(memcmp(v, rounded, (size_t)s->D * sizeof *v) == 0);
                }
            }
        free_result(&r);
        gn_ctx_close(ctx);
        free_problem(&p);
    }
}

static double length_of(const float *x, int D) {
    double sum = 0;
    for (int j = 0; j < D; j++) sum += (double)x[j] * x[j];
    return sqrt(sum);
}

/* Output of one head at one position from what the cache holds; returns by how much float32
 * may be off. */
static double expect(const problem *p, const result *r, int seq, int position, int head,
                     double *y) {
    const shape *s = &p->s;
    const int D = s->D, kv_head = head / (s->heads / s->kv_heads);
    const float *q = r->q + ((first_token(s, seq) + position) * s->heads + head) * D;
    double *score = calloc((size_t)(position + 1), sizeof *score);
    double top = -INFINITY, longest = 0, sum = 0, largest = 0;
    float row[256];
    for (int j = 0; j <= position; j++) {
        cached(row, p, &r->kv.k, &r->kv.k_scales, seq, j, kv_head);
        for (int d = 0; d < D; d++) score[j] += (double)q[d] * row[d];
        score[j] /= sqrt(D);
        top = fmax(top, score[j]);
        longest = fmax(longest, length_of(row, D));
    }
    for (int j = 0; j <= position; j++) sum += score[j] = exp(score[j] - top);
    for (int d = 0; d < D; d++) y[d] = 0;
    for (int j = 0; j <= position; j++) {
        cached(row, p, &r->kv.v, &r->kv.v_scales, seq, j, kv_head);
        for (int d = 0; d < D; d++) {
            y[d] += score[j] / sum * row[d];
            largest = fmax(largest, fabs(row[d]));
        }
    }
    free(score);
    /* A score is off by its own sum; a weight by two scores and exp; an output, a mean of
     * values, by the weights and the sums over positions. */
    const double score_error = EPS * (sqrt(D) + 2) * length_of(q, D) * longest / sqrt(D);
    return largest * (2 * score_error + EPS * (sqrt(position + 1) + 4));
}

Test(attention, matches_plain_loops) {
    const gn_isa best = best_isa();
    for (gn_isa isa = GN_ISA_REFERENCE; isa <= best; isa++) {
        gn_ctx *ctx = open_ctx(isa, GN_F32, 2);
        for (int i = 0; i < COUNT(shapes); i++) {
            problem p = make_problem(shapes[i], (uint64_t)(i + 1));
            const shape *s = &p.s;
            result r = run_all(ctx, &p, i % 2 ? 7 : 0);
            for (int seq = 0; seq < s->n_seqs; seq++)
                for (int pos = 0; pos < s->length[seq]; pos++)
                    for (int head = 0; head < s->heads; head++) {
                        double expected[256];
                        const double error = expect(&p, &r, seq, pos, head, expected);
                        const float *got =
                            r.y + ((first_token(s, seq) + pos) * s->heads + head) * s->D;
                        for (int d = 0; d < s->D; d++)
                            cr_assert(fabs(got[d] - expected[d]) <= error,
                                      "isa %d, shape %d, sequence %d position %d head %d [%d]: "
                                      "%.9g, expected %.9g +- %.3g",
                                      isa, i, seq, pos, head, d, got[d], expected[d], error);
                    }
            free_result(&r);
            free_problem(&p);
        }
        gn_ctx_close(ctx);
    }
}

Test(attention, chunks_and_threads_give_the_same_bits) {
    const gn_isa best = best_isa();
    for (int i = 0; i < COUNT(shapes) * (int)(best + 1); i++) {
        const gn_isa isa = (gn_isa)(i / COUNT(shapes));
        problem p = make_problem(shapes[i % COUNT(shapes)], (uint64_t)(100 + i));
        const size_t bytes = (size_t)(p.total * p.s.heads * p.s.D) * sizeof(float);
        gn_ctx *one = open_ctx(isa, GN_F32, 1);
        result whole = run_all(one, &p, 0);
        gn_ctx_close(one);
        for (int threads = 1; threads <= 3; threads++) {
            gn_ctx *ctx = open_ctx(isa, GN_F32, threads);
            const int chunks[] = {0, 1, 4, 13};
            for (int c = 0; c < COUNT(chunks); c++) {
                result r = run_all(ctx, &p, chunks[c]);
                cr_assert(memcmp(r.y, whole.y, bytes) == 0, "isa %d, %d threads, chunks of %d", isa,
                          threads, chunks[c]);
                free_result(&r);
            }
            gn_ctx_close(ctx);
        }
        free_result(&whole);
        free_problem(&p);
    }
}

Test(attention, large_scores_do_not_overflow) {
    problem p = make_problem((shape){2, 1, 16, 4, GN_F32, 1, {9}}, 5);
    for (int i = 0; i < p.total * 2 * 16; i++) p.q[i] *= 1e4f;
    gn_ctx *ctx = open_ctx(best_isa(), GN_F32, 1);
    result r = run_all(ctx, &p, 0);
    for (int i = 0; i < p.total * 2 * 16; i++) cr_assert(fabsf(r.y[i]) <= 1.0f);
    free_result(&r);
    gn_ctx_close(ctx);
    free_problem(&p);
}

/* Rows of zeros, and of next to nothing, in F8; the others are not disturbed. */
Test(attention, f8_takes_rows_of_nothing) {
    problem p = make_problem((shape){2, 1, 16, 4, GN_F8, 1, {3}}, 6);
    for (int d = 0; d < 16; d++) {
        p.k[d] = p.v[d] = 0;
        p.v[16 + d] *= 1e-38f;
    }
    gn_ctx *ctx = open_ctx(best_isa(), GN_F32, 1);
    result r = run_all(ctx, &p, 0);
    float row[16];
    for (int pos = 0; pos < 3; pos++) {
        const float scale = cached(row, &p, &r.kv.v, &r.kv.v_scales, 0, pos, 0);
        cr_assert_eq(scale > 0, pos == 2);
        for (int d = 0; d < 16; d++) cr_assert(pos == 2 || row[d] == 0);
    }
    for (int i = 0; i < p.total * 2 * 16; i++) cr_assert(isfinite(r.y[i]));
    for (int i = 0; i < 2 * 2 * 16; i++) cr_assert_eq(r.y[i], 0);
    free_result(&r);
    gn_ctx_close(ctx);
    free_problem(&p);
}

Test(attention, too_little_working_memory_is_refused) {
    float q[4] = {0}, y[4], cache[4] = {0};
    const int32_t row0[] = {0, 1}, pos0[] = {0}, blocks[] = {0};
    const gn_seqs seqs = {1, 1, row0, pos0, blocks};
    const gn_tensor c = {cache, GN_F32, 4, {1, 1, 1, 4}, 4};
    const gn_kv kv = {.k = c, .v = c};
    const gn_tensor tq = heads_of(q, 1, 1, 4);
    gn_tensor ty = heads_of(y, 1, 1, 4);
    gn_ctx *ctx = open_ctx(best_isa(), GN_F32, 1);
    cr_assert_eq(gn_attention(ctx, &ty, &tq, &kv, &seqs), GN_ENOMEM);
    cr_assert_eq(gn_ctx_reserve(ctx, gn_attention_workspace(ctx, 1)), GN_OK);
    cr_assert_eq(gn_attention(ctx, &ty, &tq, &kv, &seqs), GN_OK);
    gn_ctx_close(ctx);
}
