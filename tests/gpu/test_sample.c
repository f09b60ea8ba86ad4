/* Sampling on the device against the host's sampler: same logits, same options, same tokens. Needs
 * a GPU. */
#include "engine/sample.h"
#include "kernels/sample.h"
#include "tests/kernels/cases.h"

#include <float.h>

static gn_ctx *open_device(const char *device) {
    gn_ctx *ctx = NULL;
    gn_error err = {0};
    const gn_ctx_options options = {.device = device, .auto_compute = true};
    cr_assert_eq(gn_ctx_open(&ctx, &options, &err), GN_OK, "%s", err.message);
    return ctx;
}

static gn_device_sampler *open_sampler(gn_ctx *ctx, int rows, int vocab) {
    gn_device_sampler *s;
    cr_assert_eq(gn_device_sampler_open(&s, ctx, rows, vocab), GN_OK);
    return s;
}

/* Rows of logits, on the host and on the device, `ld` apart. */
typedef struct {
    gn_ctx *ctx;
    int n, vocab;
    size_t ld;
    float *host;
    gn_tensor device;
} rows_of_logits;

enum { GAP = 5 };

static rows_of_logits make_logits(gn_ctx *ctx, int n, int vocab) {
    const size_t ld = (size_t)vocab + GAP;
    rows_of_logits l = {ctx, n, vocab, ld, malloc((size_t)n * ld * sizeof(float)), {0}};
    void *memory = gn_ctx_alloc(ctx, (size_t)n * ld * sizeof(float));
    cr_assert(l.host && memory);
    l.device = (gn_tensor){memory, GN_F32, 2, {n, vocab, 1, 1}, (int64_t)ld};
    return l;
}

static void upload(const rows_of_logits *l) {
    cr_assert_eq(
        gn_ctx_write(l->ctx, l->device.data, l->host, (size_t)l->n * l->ld * sizeof(float)), GN_OK);
}

static void free_logits(rows_of_logits *l) {
    gn_ctx_free(l->ctx, l->device.data);
    free(l->host);
}

/* Like a model's: a bell, sometimes with ties, holes or a few that stand out. */
static void random_row(rng *r, float *x, int vocab) {
    const int kind = rng_below(r, 6);
    const float spread = kind == 0 ? 0 : 0.5f + 4 * fabsf(rng_float(r));
    for (int i = 0; i < vocab; i++) {
        float sum = 0;
        for (int k = 0; k < 6; k++) sum += rng_float(r);
        x[i] = sum * spread;
        if (kind == 1) x[i] = rintf(x[i]);
        if (kind == 2 && rng_below(r, 4) == 0) x[i] = rng_below(r, 2) ? NAN : -INFINITY;
        if (kind == 3 && rng_below(r, 1000) == 0) x[i] += 6 * spread;
        if (kind == 4 && rng_below(r, 5000) == 0) x[i] = INFINITY;
    }
}

static const gn_sampling plain = GN_SAMPLING_DEFAULT;

enum { MAX_EDITS = 40 };

/* A request as both samplers take it. */
typedef struct {
    gn_sampler *host;
    gn_sampling options;
    gn_sample_row row;
    gn_token_prob bias[MAX_EDITS];
    gn_sample_pair pairs[MAX_EDITS];
    int32_t banned[MAX_EDITS];
} request;

static float unit(rng *r) {
    return (float)(rng_bits(r) >> 8) * 0x1p-24f;
}

static gn_sampling random_options(rng *r, int vocab) {
    gn_sampling o = plain;
    o.seed = rng_bits(r);
    o.temperature = rng_below(r, 5) == 0 ? 0 : rng_below(r, 10) == 0 ? FLT_MIN : 0.3f + 2 * unit(r);
    if (rng_below(r, 3) == 0) o.top_k = 1 + rng_below(r, rng_below(r, 2) ? 60 : vocab + 3);
    if (rng_below(r, 3) == 0) o.top_p = 0.05f + 0.95f * unit(r);
    if (rng_below(r, 4) == 0) o.typical_p = 0.05f + 0.95f * unit(r);
    if (rng_below(r, 4) == 0) o.min_p = 0.3f * unit(r);
    if (rng_below(r, 3) == 0) {
        o.repetition_penalty = 0.5f + unit(r);
        o.presence_penalty = rng_float(r);
        o.frequency_penalty = rng_float(r) / 2;
    }
    return o;
}

static bool is_penalized(const gn_sampling *o) {
    return o->repetition_penalty != 1 || o->presence_penalty != 0 || o->frequency_penalty != 0;
}

/* Fills q, which must not move: its row points into it. */
static void open_request(request *q, rng *r, gn_device_sampler *s, int vocab) {
    *q = (request){.options = random_options(r, vocab), .row = GN_SAMPLE_ROW_DEFAULT};
    gn_sampling *o = &q->options;
    gn_sample_row *row = &q->row;
    if (rng_below(r, 4) == 0)
        for (int i = 0; i < MAX_EDITS && i < vocab; i++) {
            const int32_t id = (int32_t)((int64_t)i * vocab / MAX_EDITS); /* once each */
            if (i > 0 && id == q->pairs[row->n_bias - 1].id) continue;
            q->bias[row->n_bias] = (gn_token_prob){id, 3 * rng_float(r)};
            q->pairs[row->n_bias] = (gn_sample_pair){id, q->bias[row->n_bias].logprob};
            row->n_bias++;
        }
    if (rng_below(r, 4) == 0)
        for (int i = rng_below(r, MAX_EDITS); i >= 0; i--)
            q->banned[row->n_banned++] = rng_below(r, vocab + 4) - 2;
    o->bias = q->bias;
    o->n_bias = row->n_bias;
    row->bias = q->pairs;
    row->banned = q->banned;
    row->temperature = o->temperature;
    row->top_k = o->top_k;
    row->top_p = o->top_p;
    row->min_p = o->min_p;
    row->typical_p = o->typical_p;
    row->repetition_penalty = o->repetition_penalty;
    row->presence_penalty = o->presence_penalty;
    row->frequency_penalty = o->frequency_penalty;
    row->seed = o->seed;
    row->n_top = rng_below(r, 3) == 0 ? rng_below(r, GN_SAMPLE_MAX_TOP + 1) : 0;
    row->logprob = rng_below(r, 2);
    gn_error err = {0};
    cr_assert_eq(gn_sampler_open(&q->host, o, vocab, &err), GN_OK, "%s", err.message);
    if (!is_penalized(o) && rng_below(r, 4)) return;
    int32_t ids[30];
    for (int i = 0; i < COUNT(ids); i++) {
        ids[i] = rng_below(r, vocab);
        gn_sampler_accept(q->host, ids[i], i >= 20);
    }
    cr_assert_eq(gn_device_sampler_count(s, &row->counts, ids, 20, COUNT(ids)), GN_OK);
}

static bool close_to(float got, float want) {
    return got == want || fabsf(got - want) <= 4e-6f * (1 + fabsf(want));
}

static void check_probabilities(const gn_sampled *got, const gn_sample_row *row, const float *x,
                                int vocab) {
    if (row->logprob)
        cr_assert(close_to(got->logprob, gn_logprob(x, vocab, got->id)), "logprob %g, not %g",
                  (double)got->logprob, (double)gn_logprob(x, vocab, got->id));
    else
        cr_assert_eq(got->logprob, 0);
    gn_token_prob top[GN_SAMPLE_MAX_TOP];
    gn_top_logprobs(x, vocab, row->n_top, top);
    for (int i = 0; i < row->n_top; i++) {
        cr_assert_eq(got->top[i].id, top[i].id, "alternative %d is %d, not %d", i, got->top[i].id,
                     top[i].id);
        cr_assert(close_to(got->top[i].value, top[i].logprob), "alternative %d: %g, not %g", i,
                  (double)got->top[i].value, (double)top[i].logprob);
    }
}

/* How many tokens stand between two in order of likelihood. */
static int between(const float *x, int vocab, int a, int b) {
    int n = 0;
    for (int i = 0; i < vocab; i++) {
        const bool after_a = x[i] < x[a] || (x[i] == x[a] && i > a);
        const bool after_b = x[i] < x[b] || (x[i] == x[b] && i > b);
        n += i != a && i != b && after_a != after_b;
    }
    return n;
}

static const gn_sampled *sample(gn_device_sampler *s, const gn_tensor *logits,
                                const gn_sample_row *rows, int n) {
    const gn_sampled *results;
    cr_assert_eq(gn_device_sample(s, logits, rows, n), GN_OK);
    cr_assert_eq(gn_device_sample_wait(s, &results), GN_OK);
    return results;
}

/* Where a cumulated probability meets its bound to 1e-6, host and device may choose neighbors. That
 * is rare. */
static int count_differing(gn_ctx *ctx, rng *r, int n, int vocab, int steps) {
    gn_device_sampler *s = open_sampler(ctx, n, vocab);
    rows_of_logits l = make_logits(ctx, n, vocab);
    request *q = calloc((size_t)n, sizeof *q);
    gn_sample_row *rows = calloc((size_t)n, sizeof *rows);
    int32_t *ids = calloc((size_t)n, sizeof *ids);
    float *after = malloc((size_t)n * l.ld * sizeof *after);
    int differing = 0;
    for (int i = 0; i < n; i++) open_request(&q[i], r, s, vocab);
    for (int step = 0; step < steps; step++) {
        memset(l.host, GUARD, (size_t)n * l.ld * sizeof(float));
        for (int i = 0; i < n; i++) random_row(r, l.host + (size_t)i * l.ld, vocab);
        upload(&l);
        for (int i = 0; i < n; i++) {
            rows[i] = q[i].row;
            rows[i].step = step;
            rows[i].given = rng_below(r, 8) == 0 ? rng_below(r, vocab) : -1;
        }
        const gn_sampled *got = sample(s, &l.device, rows, n);
        cr_assert_eq(gn_ctx_read(ctx, after, l.device.data, (size_t)n * l.ld * sizeof *after),
                     GN_OK);
        cr_assert_eq(memcmp(after, l.host, (size_t)n * l.ld * sizeof *after), 0,
                     "logits were changed");
        cr_assert_eq(gn_ctx_read(ctx, ids, gn_device_sampler_ids(s), (size_t)n * sizeof *ids),
                     GN_OK);
        for (int i = 0; i < n; i++) {
            const float *x = l.host + (size_t)i * l.ld;
            const int32_t id = got[i].id;
            cr_assert(id >= 0 && id < vocab, "row %d of %d, vocabulary %d: %d", i, n, vocab, id);
            cr_assert_eq(ids[i], id);
            check_probabilities(&got[i], &rows[i], x, vocab);
            if (rows[i].given >= 0) {
                cr_assert_eq(id, rows[i].given);
                continue;
            }
            const int32_t want =
                gn_sampler_draw(q[i].host, x, step, q[i].banned, q[i].row.n_banned);
            gn_sampler_accept(q[i].host, id, true);
            if (id == want) continue;
            differing++;
            const gn_sampling *o = &q[i].options;
            cr_assert_neq(o->temperature, 0, "greedy: %d, not %d", id, want);
            const bool in_order =
                !is_penalized(o) && o->n_bias == 0 && rows[i].n_banned == 0 && o->typical_p == 1;
            cr_assert(!in_order || between(x, vocab, id, want) <= 1,
                      "%d of %d rows, vocabulary %d, temperature %g, top_k %d, top_p %g, min_p "
                      "%g: %d, not %d",
                      i, n, vocab, (double)o->temperature, o->top_k, (double)o->top_p,
                      (double)o->min_p, id, want);
        }
    }
    for (int i = 0; i < n; i++) {
        gn_sampler_close(q[i].host);
        gn_device_sampler_forget(s, q[i].row.counts);
    }
    free(after);
    free(ids);
    free(rows);
    free(q);
    free_logits(&l);
    gn_device_sampler_close(s);
    return differing;
}

/* Rows alone and many, so that blocks share a row or have one each; vocabularies down to one. */
Test(sample, draws_what_the_host_draws, .timeout = 300) {
    static const struct {
        int n, vocab, steps;
    } cases[] = {{1, 1, 4},      {3, 2, 8},       {40, 7, 8},      {200, 33, 6},   {16, 1000, 40},
                 {1, 32000, 60}, {5, 32001, 20},  {17, 32000, 8},  {33, 32003, 5}, {64, 32000, 4},
                 {150, 9000, 4}, {1, 128256, 10}, {20, 128256, 2}, {3, 262144, 4}, {70, 152064, 1}};
    gn_ctx *ctx = open_device("cuda");
    rng r = {11};
    int draws = 0, differing = 0;
    for (int i = 0; i < COUNT(cases); i++) {
        differing += count_differing(ctx, &r, cases[i].n, cases[i].vocab, cases[i].steps);
        draws += cases[i].n * cases[i].steps;
    }
    cr_assert_leq(differing, draws / 200, "%d of %d draws differ", differing, draws);
    gn_ctx_close(ctx);
}

/* A row has its token whatever runs beside it, on however many blocks. */
Test(sample, rows_are_independent) {
    enum { N = 64, V = 32000 };
    gn_ctx *ctx = open_device("cuda");
    gn_device_sampler *s = open_sampler(ctx, N, V);
    rows_of_logits l = make_logits(ctx, N, V);
    rng r = {5};
    gn_sample_row rows[N];
    gn_sampled together[N];
    for (int i = 0; i < N; i++) {
        random_row(&r, l.host + (size_t)i * l.ld, V);
        rows[i] = (gn_sample_row)GN_SAMPLE_ROW_DEFAULT;
        rows[i].seed = (uint64_t)i;
        rows[i].logprob = true;
        rows[i].n_top = i % (GN_SAMPLE_MAX_TOP + 1);
        if (i % 2) rows[i].top_p = 0.9f;
        if (i % 4 == 0) rows[i].typical_p = 0.7f;
    }
    upload(&l);
    memcpy(together, sample(s, &l.device, rows, N), sizeof together);
    for (int i = 0; i < N; i++) {
        gn_tensor one = l.device;
        one.data = (float *)l.device.data + (size_t)i * l.ld;
        one.shape[0] = 1;
        const gn_sampled *alone = sample(s, &one, &rows[i], 1);
        cr_assert_eq(alone->id, together[i].id);
        cr_assert_eq(memcmp(&alone->logprob, &together[i].logprob, sizeof(float)), 0);
        cr_assert_eq(
            memcmp(alone->top, together[i].top, (size_t)rows[i].n_top * sizeof *alone->top), 0);
    }
    free_logits(&l);
    gn_device_sampler_close(s);
    gn_ctx_close(ctx);
}

Test(sample, tables_of_counts_are_used_again) {
    enum { V = 100 };
    gn_ctx *ctx = open_device("cuda");
    gn_device_sampler *s = open_sampler(ctx, 4, V);
    const int32_t ids[] = {1, 2, 2}, outside[] = {V}, negative[] = {-1};
    int32_t a, b, c;
    cr_assert_eq(gn_device_sampler_count(s, &a, ids, 1, 3), GN_OK);
    cr_assert_eq(gn_device_sampler_count(s, &b, NULL, 0, 0), GN_OK);
    cr_assert_neq(a, b);
    gn_device_sampler_forget(s, a);
    cr_assert_eq(gn_device_sampler_count(s, &c, ids, 3, 3), GN_OK);
    cr_assert_eq(c, a);
    cr_assert_eq(gn_device_sampler_count(s, &c, outside, 1, 1), GN_EINVAL);
    cr_assert_eq(c, GN_SAMPLE_NO_COUNTS);
    cr_assert_eq(gn_device_sampler_count(s, &c, negative, 0, 1), GN_EINVAL);
    cr_assert_eq(gn_device_sampler_count(s, &c, ids, 3, 2), GN_EINVAL);
    gn_device_sampler_forget(s, GN_SAMPLE_NO_COUNTS);
    gn_device_sampler_close(s);
    gn_device_sampler_close(NULL);
    gn_ctx_close(ctx);
}

Test(sample, bad_calls_are_refused) {
    enum { V = 100 };
    gn_ctx *ctx = open_device("cuda"), *cpu = open_device("cpu");
    gn_device_sampler *s;
    cr_assert_eq(gn_device_sampler_open(&s, cpu, 1, V), GN_EUNSUPPORTED);
    cr_assert_null(s);
    cr_assert_eq(gn_device_sampler_open(&s, ctx, 0, V), GN_EINVAL);
    cr_assert_eq(gn_device_sampler_open(&s, ctx, 1, 1 << 20), GN_ETOOBIG);
    s = open_sampler(ctx, 2, V);
    rows_of_logits l = make_logits(ctx, 1, V);
    gn_sample_row rows[20];
    int n = 0;
#define BAD(field, value)                                                                          \
    rows[n] = (gn_sample_row)GN_SAMPLE_ROW_DEFAULT;                                                \
    rows[n++].field = value
    BAD(temperature, NAN);
    BAD(temperature, -1);
    BAD(top_k, -1);
    BAD(top_p, 0);
    BAD(min_p, 2);
    BAD(typical_p, 1.5f);
    BAD(repetition_penalty, 0);
    BAD(repetition_penalty, 2); /* without counts */
    BAD(presence_penalty, INFINITY);
    BAD(counts, 0);
    BAD(given, V);
    BAD(n_top, GN_SAMPLE_MAX_TOP + 1);
    BAD(n_bias, 1);
    BAD(n_banned, GN_SAMPLE_MAX_EDITS + 1);
    for (int i = 0; i < n; i++)
        cr_assert_eq(gn_device_sample(s, &l.device, &rows[i], 1), GN_EINVAL, "case %d", i);
    const gn_sample_row good = GN_SAMPLE_ROW_DEFAULT;
    gn_tensor narrow = l.device;
    narrow.shape[1] = V - 1;
    cr_assert_eq(gn_device_sample(s, &narrow, &good, 1), GN_EINVAL);
    cr_assert_eq(gn_device_sample(s, &l.device, &good, 2), GN_EINVAL);
    cr_assert_eq(gn_device_sample(s, &l.device, &good, 0), GN_EINVAL);
    free_logits(&l);
    gn_device_sampler_close(s);
    gn_ctx_close(cpu);
    gn_ctx_close(ctx);
}
