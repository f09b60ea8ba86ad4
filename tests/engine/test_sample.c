/* test_sample.c - sampling against a naive reference that sorts, and against known numbers. */
#include "engine/sample.h"

#include <criterion/criterion.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_VOCAB = 600 };

static uint64_t state = 7;
static double random_unit(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(state >> 11) * 0x1p-53;
}

static unsigned below(unsigned n) {
    return (unsigned)(random_unit() * n);
}

static gn_sampler *sampler(const gn_sampling *o, int vocab) {
    gn_sampler *s;
    gn_error err = {0};
    cr_assert_eq(gn_sampler_open(&s, o, vocab, &err), GN_OK, "%s", err.message);
    return s;
}

/* ---- reference: which tokens survive, and with what probability ---- */

typedef struct entry {
    int id;
    double key, p; /* p is 0 for a token that cannot be drawn */
} entry;

static int by_key(const void *a, const void *b) {
    const entry *x = a, *y = b;
    if (x->key != y->key) return x->key < y->key ? 1 : -1;
    return x->id - y->id;
}

static void normalize(entry *e, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += e[i].p;
    for (int i = 0; i < n; i++) e[i].p /= sum;
}

static int cut_at_mass(entry *e, int n, double mass) {
    double sum = 0;
    int k = 0;
    while (k < n && sum < mass) sum += e[k++].p;
    normalize(e, k);
    return k;
}

static int keep_typical(entry *e, int n, double mass) {
    double entropy = 0, logit[MAX_VOCAB];
    for (int i = 0; i < n; i++) {
        entropy -= e[i].p * log(e[i].p);
        logit[e[i].id] = e[i].key;
    }
    for (int i = 0; i < n; i++) e[i].key = -fabs(-log(e[i].p) - entropy);
    qsort(e, (size_t)n, sizeof *e, by_key);
    n = cut_at_mass(e, n, mass);
    for (int i = 0; i < n; i++) e[i].key = logit[e[i].id];
    qsort(e, (size_t)n, sizeof *e, by_key);
    return n;
}

static int keep_min_p(entry *e, int n, double min_p) {
    int k = 0;
    while (k < n && e[k].p >= min_p * e[0].p) k++;
    normalize(e, k);
    return k;
}

/* Fills e with the surviving tokens, most likely first; returns how many. */
static int reference(entry *e, const float *logits, int vocab, const gn_sampling *o) {
    for (int i = 0; i < vocab; i++) e[i] = (entry){i, (double)logits[i], 0};
    qsort(e, (size_t)vocab, sizeof *e, by_key);
    int n = vocab;
    if (o->top_k > 0 && o->top_k < n) n = o->top_k;
    for (int i = 0; i < n; i++) e[i].p = exp((e[i].key - e[0].key) / (double)o->temperature);
    normalize(e, n);
    if (o->typical_p < 1) n = keep_typical(e, n, (double)o->typical_p);
    if (o->top_p < 1) n = cut_at_mass(e, n, (double)o->top_p);
    if (o->min_p > 0) n = keep_min_p(e, n, (double)o->min_p);
    return n;
}

/* Draws many times; every draw must be a survivor, and the frequencies must fit (Pearson's
 * chi-square at most five standard deviations above its mean, over cells that expect enough). */
static void check_distribution(const float *logits, int vocab, const gn_sampling *o, int draws) {
    entry e[MAX_VOCAB];
    int count[MAX_VOCAB] = {0}, cells = 0, rest = draws;
    const int n = reference(e, logits, vocab, o);
    gn_sampler *s = sampler(o, vocab);
    for (int step = 0; step < draws; step++) count[gn_sampler_draw(s, logits, step, NULL, 0)]++;
    gn_sampler_close(s);
    double chi2 = 0;
    for (int i = 0; i < n; i++) {
        const double expected = e[i].p * draws, d = count[e[i].id] - expected;
        rest -= count[e[i].id];
        if (expected < 8) continue;
        chi2 += d * d / expected;
        cells++;
    }
    cr_expect_eq(rest, 0, "%d draws of tokens that should have been cut", rest);
    cr_expect_leq(chi2, cells + 5 * sqrt(2.0 * cells) + 1, "chi2 %g over %d cells of %d tokens",
                  chi2, cells, n);
}

static void random_logits(float *x, int vocab, double spread, bool ties) {
    for (int i = 0; i < vocab; i++) {
        double sum = -6;
        for (int k = 0; k < 12; k++) sum += random_unit();
        x[i] = (float)(ties ? round(sum * spread) : sum * spread);
    }
}

Test(sample, distributions) {
    static const gn_sampling options[] = {
        {.temperature = 1, .top_p = 1, .typical_p = 1, .repetition_penalty = 1, .seed = 1},
        {.temperature = 0.7f, .top_p = 1, .typical_p = 1, .repetition_penalty = 1, .seed = 2},
        {.temperature = 2, .top_p = 0.9f, .typical_p = 1, .repetition_penalty = 1, .seed = 3},
        {.temperature = 1, .top_k = 7, .top_p = 1, .typical_p = 1, .repetition_penalty = 1},
        {.temperature = 1, .min_p = 0.1f, .top_p = 1, .typical_p = 1, .repetition_penalty = 1},
        {.temperature = 1, .top_p = 1, .typical_p = 0.8f, .repetition_penalty = 1},
        {.temperature = 1.3f,
         .top_k = 30,
         .top_p = 0.95f,
         .min_p = 0.05f,
         .typical_p = 0.9f,
         .repetition_penalty = 1},
    };
    float x[MAX_VOCAB];
    for (size_t i = 0; i < sizeof options / sizeof *options; i++) {
        for (int round = 0; round < 4; round++) {
            const int vocab = round == 0 ? 2 : 50 * round;
            random_logits(x, vocab, 0.5 + round, round == 2);
            check_distribution(x, vocab, &options[i], 20000);
        }
    }
}

/* Would a slightly different mass keep another number of tokens? Then float and double may too. */
static bool at_threshold(int n, const float *logits, int vocab, gn_sampling o) {
    entry other[MAX_VOCAB];
    const float shift = 1e-4f;
    for (int sign = -1; sign <= 1; sign += 2) {
        gn_sampling near = o;
        if (o.top_p < 1) near.top_p += (float)sign * shift;
        if (o.typical_p < 1) near.typical_p += (float)sign * shift;
        if (o.min_p > 0) near.min_p *= 1 + (float)sign * shift;
        if (reference(other, logits, vocab, &near) != n) return true;
    }
    return false;
}

/* Every survivor is drawn sooner or later, and nothing else is. */
Test(sample, truncation_is_exact) {
    float x[MAX_VOCAB];
    entry e[MAX_VOCAB];
    int checked = 0;
    for (int round = 0; round < 400; round++) {
        const int vocab = 1 + (int)below(60);
        const gn_sampling o = {.temperature = 0.3f + (float)random_unit(),
                               .top_k = (int32_t)below(vocab + 3u),
                               .top_p = below(2) ? 1 : 0.05f + 0.9f * (float)random_unit(),
                               .typical_p = below(2) ? 1 : 0.05f + 0.9f * (float)random_unit(),
                               .min_p = below(2) ? 0 : 0.3f * (float)random_unit(),
                               .repetition_penalty = 1,
                               .seed = (uint64_t)round};
        random_logits(x, vocab, 1, round % 3 == 0);
        const int n = reference(e, x, vocab, &o);
        if (at_threshold(n, x, vocab, o)) continue;
        bool want[MAX_VOCAB] = {false}, got[MAX_VOCAB] = {false};
        double least = 1;
        for (int i = 0; i < n; i++) {
            want[e[i].id] = true;
            if (e[i].p < least) least = e[i].p;
        }
        if (least < 0.002) continue; /* would take too many draws to be sure to see it */
        gn_sampler *s = sampler(&o, vocab);
        for (int step = 0; step < 12000; step++) got[gn_sampler_draw(s, x, step, NULL, 0)] = true;
        gn_sampler_close(s);
        cr_assert(memcmp(want, got, sizeof want) == 0, "round %d: %d of %d tokens survive", round,
                  n, vocab);
        checked++;
    }
    cr_expect_gt(checked, 200);
}

/* Step by step equal to the inverse of the cumulative distribution in order of likelihood. */
Test(sample, draw_is_monotone_in_the_random_number) {
    enum { VOCAB = 500, DRAWS = 300 };
    float x[VOCAB], flat[VOCAB] = {0};
    random_logits(x, VOCAB, 2, true);
    const gn_sampling o = GN_SAMPLING_DEFAULT;
    gn_sampler *s = sampler(&o, VOCAB);
    entry e[MAX_VOCAB];
    reference(e, x, VOCAB, &o);
    int rank_of[VOCAB];
    for (int i = 0; i < VOCAB; i++) rank_of[e[i].id] = i;
    for (int step = 0; step < DRAWS; step++) {
        /* On flat logits the id drawn tells the random number: u in (id, id + 1] / VOCAB. */
        const int slot = gn_sampler_draw(s, flat, step, NULL, 0);
        const int at = rank_of[gn_sampler_draw(s, x, step, NULL, 0)];
        double before = 0;
        for (int i = 0; i < at; i++) before += e[i].p;
        cr_expect_leq(before, (slot + 1.0) / VOCAB + 1e-6);
        cr_expect_geq(before + e[at].p, (double)slot / VOCAB - 1e-6);
    }
    gn_sampler_close(s);
}

Test(sample, depends_on_seed_and_step_only) {
    enum { VOCAB = 300, STEPS = 200 };
    float x[VOCAB];
    random_logits(x, VOCAB, 1, false);
    gn_sampling o = GN_SAMPLING_DEFAULT;
    o.seed = 42;
    gn_sampler *a = sampler(&o, VOCAB), *b = sampler(&o, VOCAB);
    o.seed = 43;
    gn_sampler *other = sampler(&o, VOCAB);
    int32_t forward[STEPS];
    int same = 0, repeats = 0;
    for (int i = 0; i < STEPS; i++) forward[i] = gn_sampler_draw(a, x, i, NULL, 0);
    for (int i = STEPS - 1; i >= 0; i--)
        cr_expect_eq(gn_sampler_draw(b, x, i, NULL, 0), forward[i]);
    for (int i = 0; i < STEPS; i++) same += gn_sampler_draw(other, x, i, NULL, 0) == forward[i];
    for (int i = 1; i < STEPS; i++) repeats += forward[i] == forward[i - 1];
    cr_expect(same < STEPS / 10 && repeats < STEPS / 10, "%d same, %d repeats", same, repeats);
    gn_sampler_close(a);
    gn_sampler_close(b);
    gn_sampler_close(other);
    gn_sampler_close(NULL);
}

Test(sample, greedy_takes_the_largest_and_the_lower_id) {
    const float x[] = {1, 3, -2, 3, 2.5f, 3};
    gn_sampling o = GN_SAMPLING_DEFAULT;
    o.temperature = 0;
    gn_sampler *s = sampler(&o, 6);
    cr_expect_eq(gn_sampler_draw(s, x, 0, NULL, 0), 1);
    const int32_t banned[] = {1, 3, -5, 99};
    cr_expect_eq(gn_sampler_draw(s, x, 0, banned, 1), 3);
    cr_expect_eq(gn_sampler_draw(s, x, 0, banned, 4), 5);
    cr_expect_eq(gn_sampler_draw(s, x, 0, NULL, 0), 1, "a ban lasts one draw");
    const float zeros[] = {-1, -0.0f, 0.0f, -0.0f, -1, -1};
    cr_expect_eq(gn_sampler_draw(s, zeros, 0, NULL, 0), 1, "zeros of either sign tie");
    gn_sampler_close(s);
}

/* Greedy choices tell on which side of a rival a penalized logit lands. */
static int32_t greedy_of_two(const gn_sampling *o, float value, float rival, int in_prompt,
                             int in_reply) {
    const float x[] = {value, rival};
    gn_sampler *s = sampler(o, 2);
    for (int i = 0; i < in_prompt; i++) gn_sampler_accept(s, 0, false);
    for (int i = 0; i < in_reply; i++) gn_sampler_accept(s, 0, true);
    const int32_t id = gn_sampler_draw(s, x, 0, NULL, 0);
    gn_sampler_close(s);
    return id;
}

Test(sample, penalties_and_bias) {
    static const struct {
        float repetition, presence, frequency, bias;
        int in_prompt, in_reply;
        float value, becomes;
    } cases[] = {
        {2, 0, 0, 0, 1, 0, 3, 1.5f},       /* positive: divided */
        {2, 0, 0, 0, 3, 2, -3, -6},        /* negative: multiplied, once */
        {2, 0, 0, 0, 0, 0, 3, 3},          /* not seen */
        {1, 0.5f, 0, 0, 1, 0, 3, 3},       /* presence: the reply only */
        {1, 0.5f, 0, 0, 0, 2, 3, 2.5f},    /* once */
        {1, 0, 0.25f, 0, 1, 3, 3, 2.25f},  /* frequency: as often as in the reply */
        {1, 0.5f, 0.25f, 0, 0, 2, 3, 2},   /* both */
        {1, -0.5f, -0.25f, 0, 0, 2, 3, 4}, /* negative penalties encourage */
        {2, 0.5f, 0.25f, 1, 0, 2, 3, 1},   /* ((3 + 1) / 2) - 0.5 - 0.5 */
        {2, 0.5f, 0, -4, 0, 1, 3, -2.5f},  /* ((3 - 4) * 2) - 0.5 */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const gn_token_prob bias = {0, cases[i].bias};
        gn_sampling o = GN_SAMPLING_DEFAULT;
        o.temperature = 0;
        o.repetition_penalty = cases[i].repetition;
        o.presence_penalty = cases[i].presence;
        o.frequency_penalty = cases[i].frequency;
        o.bias = &bias;
        o.n_bias = cases[i].bias != 0;
        const float above = nextafterf(cases[i].becomes, INFINITY);
        cr_expect_eq(greedy_of_two(&o, cases[i].value, cases[i].becomes, cases[i].in_prompt,
                                   cases[i].in_reply),
                     0, "case %zu: too low", i);
        cr_expect_eq(
            greedy_of_two(&o, cases[i].value, above, cases[i].in_prompt, cases[i].in_reply), 1,
            "case %zu: too high", i);
    }
    const gn_sampling o = GN_SAMPLING_DEFAULT;
    gn_sampler *s = sampler(&o, 2);
    gn_sampler_accept(s, -1, true); /* ignored */
    gn_sampler_accept(s, 2, false);
    gn_sampler_close(s);
}

Test(sample, hostile_logits_give_a_valid_id) {
    static const float rows[][4] = {
        {NAN, NAN, NAN, NAN},
        {-INFINITY, -INFINITY, -INFINITY, -INFINITY},
        {NAN, -INFINITY, 1, NAN},
        {INFINITY, 0, INFINITY, -INFINITY},
        {FLT_MAX, -FLT_MAX, FLT_MAX, 0},
        {-FLT_MAX, -FLT_MAX, -FLT_MAX, -FLT_MAX},
    };
    static const int32_t lowest[] = {0, 0, 2, 0, 0, 0};
    const int32_t all[] = {0, 1, 2, 3}, some[] = {2, 0, 3};
    for (int greedy = 0; greedy < 2; greedy++) {
        for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
            gn_sampling o = GN_SAMPLING_DEFAULT;
            if (greedy) o.temperature = 0;
            if (i & 1) o.top_p = 0.5f, o.typical_p = 0.5f, o.min_p = 0.5f, o.top_k = 3;
            gn_sampler *s = sampler(&o, 4);
            for (int step = 0; step < 20; step++) {
                const int32_t id = gn_sampler_draw(s, rows[i], step, NULL, 0);
                cr_expect(id >= 0 && id < 4);
                if (i == 2) cr_expect_eq(id, 2);
                if (i == 3) cr_expect(id == 0 || id == 2);
                if (greedy) cr_expect_eq(id, lowest[i]);
                cr_expect_eq(gn_sampler_draw(s, rows[i], step, some, 3), 1);
                cr_expect_eq(gn_sampler_draw(s, rows[i], step, all, 4), 0);
            }
            gn_sampler_close(s);
        }
    }
}

Test(sample, a_tiny_temperature_is_greedy) {
    float x[MAX_VOCAB];
    gn_sampling o = GN_SAMPLING_DEFAULT;
    o.temperature = FLT_MIN;
    random_logits(x, MAX_VOCAB, 1, false);
    entry e[MAX_VOCAB];
    reference(e, x, MAX_VOCAB, &(gn_sampling){.temperature = 1, .top_p = 1, .typical_p = 1});
    gn_sampler *s = sampler(&o, MAX_VOCAB);
    for (int step = 0; step < 50; step++)
        cr_expect_eq(gn_sampler_draw(s, x, step, NULL, 0), e[0].id);
    gn_sampler_close(s);
}

Test(sample, refused_options_are_named) {
    static const gn_token_prob outside = {10, 0}, negative = {-1, 0}, infinite = {1, INFINITY};
    struct {
        gn_sampling o;
        const char *says;
    } bad[24];
    int n = 0;
#define BAD(field, value, name)                                                                    \
    bad[n].o = (gn_sampling)GN_SAMPLING_DEFAULT;                                                   \
    bad[n].o.field = value;                                                                        \
    bad[n++].says = name
    BAD(temperature, -0.1f, "temperature");
    BAD(temperature, NAN, "temperature");
    BAD(temperature, INFINITY, "temperature");
    BAD(top_k, -1, "top_k");
    BAD(top_p, 0, "top_p");
    BAD(top_p, 1.01f, "top_p");
    BAD(top_p, NAN, "top_p");
    BAD(min_p, -0.01f, "min_p");
    BAD(min_p, 1.01f, "min_p");
    BAD(typical_p, 0, "typical_p");
    BAD(typical_p, 2, "typical_p");
    BAD(repetition_penalty, 0, "repetition_penalty");
    BAD(repetition_penalty, INFINITY, "repetition_penalty");
    BAD(presence_penalty, NAN, "presence_penalty");
    BAD(frequency_penalty, -INFINITY, "frequency_penalty");
    BAD(n_bias, 1, "bias");
    BAD(n_bias, -1, "bias");
    BAD(bias, &outside, "bias");
    bad[n - 1].o.n_bias = 1;
    BAD(bias, &negative, "bias");
    bad[n - 1].o.n_bias = 1;
    BAD(bias, &infinite, "bias");
    bad[n - 1].o.n_bias = 1;
    for (int i = 0; i < n; i++) {
        gn_sampler *s;
        gn_error err = {0};
        cr_expect_eq(gn_sampler_open(&s, &bad[i].o, 10, &err), GN_EINVAL, "case %d", i);
        cr_expect_null(s);
        cr_expect(strstr(err.message, bad[i].says) == err.message, "case %d: %s", i, err.message);
    }
}

Test(sample, log_probabilities) {
    enum { VOCAB = 500 };
    float x[VOCAB];
    entry e[MAX_VOCAB];
    random_logits(x, VOCAB, 3, true);
    x[17] = -INFINITY;
    x[18] = NAN;
    double sum = 0;
    for (int i = 0; i < VOCAB; i++)
        if (i != 18) sum += exp((double)x[i]);
    for (int i = 0; i < VOCAB; i++) {
        const float got = gn_logprob(x, VOCAB, i);
        if (i == 17 || i == 18)
            cr_expect(got == -INFINITY);
        else
            cr_expect_float_eq((double)got, (double)x[i] - log(sum), 1e-6 * (1 + fabs(log(sum))));
    }
    x[18] = -INFINITY;
    reference(e, x, VOCAB, &(gn_sampling){.temperature = 1, .top_p = 1, .typical_p = 1});
    gn_token_prob top[VOCAB + 2];
    for (int n = 0; n <= GN_MAX_TOP_LOGPROBS; n++) {
        gn_top_logprobs(x, VOCAB, n, top);
        for (int i = 0; i < n; i++) {
            cr_expect_eq(top[i].id, e[i].id);
            cr_expect_eq(top[i].logprob, gn_logprob(x, VOCAB, e[i].id));
        }
    }
    gn_top_logprobs(x, 3, 5, top);
    cr_expect_eq(top[3].id, -1);
    cr_expect_eq(top[4].logprob, -INFINITY);
    const float dead[] = {NAN, -INFINITY}, alive[] = {0, INFINITY};
    cr_expect_eq(gn_logprob(dead, 2, 0), -INFINITY);
    cr_expect_eq(gn_logprob(alive, 2, 1), 0.0f);
    cr_expect_eq(gn_logprob(alive, 2, 0), -INFINITY);
}
