/* sample.c - from a row of logits to a token.
 *
 * Every truncation and the draw itself ask the same question: of candidates in a defined order,
 * which is the shortest leading part whose weights reach some mass? `leading` answers it by
 * quickselect, in linear time and without sorting: top_k with weights of one, top_p and typical_p
 * with probabilities, and the draw with a random mass (the inverse of the cumulative distribution).
 * The random number is a function of seed and step alone, so what else runs does not matter. */
#include "engine/sample.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* `rank` orders candidates: a larger one comes first. Its upper half is a float key, made
 * monotonic; its lower half is the id's complement, so that ties go toward the lower id and no two
 * candidates are equal. */
typedef struct candidate {
    uint64_t rank;
    float weight;
} candidate;

struct gn_sampler {
    gn_sampling options;
    double inverse_temperature;
    int vocab;
    gn_sample_pair *bias;
    float *logits;         /* of this draw: biased, penalized */
    candidate *candidates; /* of this draw */
    bool *seen;            /* in prompt or reply */
    int32_t *replied;      /* how often in the reply */
};

/* ---- opening ---- */

/* name, condition to hold for value v, what it must be */
#define OPTION_MAP(X)                                                                              \
    X(temperature, v >= 0 && isfinite(v), "finite and not negative")                               \
    X(top_k, v >= 0, "0 (off) or more")                                                            \
    X(top_p, v > 0 && v <= 1, "above 0 and at most 1")                                             \
    X(min_p, v >= 0 && v <= 1, "between 0 and 1")                                                  \
    X(typical_p, v > 0 && v <= 1, "above 0 and at most 1")                                         \
    X(repetition_penalty, v > 0 && isfinite(v), "finite and above 0")                              \
    X(presence_penalty, isfinite(v), "finite")                                                     \
    X(frequency_penalty, isfinite(v), "finite")

static gn_status check_options(const gn_sampling *o, int vocab, gn_error *err) {
    double v;
#define X(name, condition, must)                                                                   \
    v = (double)o->name;                                                                           \
    if (!(condition)) return gn_fail(err, GN_EINVAL, #name " is %g; it must be " must, v);
    OPTION_MAP(X)
#undef X
    if (vocab < 1) return gn_fail(err, GN_EINVAL, "vocabulary of %d tokens", vocab);
    if (o->n_bias < 0 || (o->n_bias > 0 && !o->bias))
        return gn_fail(err, GN_EINVAL, "bias: %d entries expected", (int)o->n_bias);
    for (int32_t i = 0; i < o->n_bias; i++) {
        if (o->bias[i].id < 0 || o->bias[i].id >= vocab)
            return gn_fail(err, GN_EINVAL, "bias: token %d is outside the vocabulary of %d",
                           (int)o->bias[i].id, vocab);
        if (!isfinite(o->bias[i].logprob))
            return gn_fail(err, GN_EINVAL, "bias: of token %d is not finite", (int)o->bias[i].id);
    }
    return GN_OK;
}

static bool allocate(gn_sampler *s, const gn_sampling *o) {
    const size_t vocab = (size_t)s->vocab, n_bias = (size_t)o->n_bias;
    s->logits = malloc(vocab * sizeof *s->logits);
    s->candidates = malloc(vocab * sizeof *s->candidates);
    s->seen = calloc(vocab, sizeof *s->seen);
    s->replied = calloc(vocab, sizeof *s->replied);
    s->bias = malloc((n_bias + 1) * sizeof *s->bias);
    if (!s->logits || !s->candidates || !s->seen || !s->replied || !s->bias) return false;
    for (size_t i = 0; i < n_bias; i++)
        s->bias[i] = (gn_sample_pair){o->bias[i].id, o->bias[i].logprob};
    s->options.bias = NULL; /* the caller's */
    return true;
}

gn_status gn_sampler_open(gn_sampler **out, const gn_sampling *options, int vocab, gn_error *err) {
    *out = NULL;
    const gn_status status = check_options(options, vocab, err);
    if (status) return status;
    gn_sampler *s = calloc(1, sizeof *s);
    if (!s) return gn_fail(err, GN_ENOMEM, "out of memory");
    s->options = *options;
    s->inverse_temperature = options->temperature > 0 ? 1 / (double)options->temperature : 0;
    s->vocab = vocab;
    if (!allocate(s, options)) {
        gn_sampler_close(s);
        return gn_fail(err, GN_ENOMEM, "out of memory");
    }
    *out = s;
    return GN_OK;
}

void gn_sampler_close(gn_sampler *s) {
    if (!s) return;
    free(s->bias);
    free(s->logits);
    free(s->candidates);
    free(s->seen);
    free(s->replied);
    free(s);
}

void gn_sampler_accept(gn_sampler *s, int32_t id, bool in_reply) {
    if (id < 0 || id >= s->vocab) return;
    s->seen[id] = true;
    if (in_reply && s->replied[id] < INT32_MAX) s->replied[id]++;
}

/* ---- for the device ---- */

gn_sample_row gn_sampler_row(const gn_sampler *s) {
    const gn_sampling *o = &s->options;
    gn_sample_row row = GN_SAMPLE_ROW_DEFAULT;
    row.temperature = o->temperature;
    row.top_k = o->top_k;
    row.top_p = o->top_p;
    row.min_p = o->min_p;
    row.typical_p = o->typical_p;
    row.repetition_penalty = o->repetition_penalty;
    row.presence_penalty = o->presence_penalty;
    row.frequency_penalty = o->frequency_penalty;
    row.seed = o->seed;
    row.bias = s->bias;
    row.n_bias = o->n_bias;
    return row;
}

bool gn_sampler_penalizes(const gn_sampler *s) {
    const gn_sampling *o = &s->options;
    return o->repetition_penalty != 1 || o->presence_penalty != 0 || o->frequency_penalty != 0;
}

/* ---- logits ---- */

/* NaN cannot be drawn; infinity would make every other weight NaN. */
static float finite_above(float x) {
    return isnan(x) ? -INFINITY : x > FLT_MAX ? FLT_MAX : x;
}

static void adjust_logits(gn_sampler *s, const float *logits, const int32_t *banned, int n_banned) {
    const gn_sampling *o = &s->options;
    float *x = s->logits;
    for (int i = 0; i < s->vocab; i++) x[i] = finite_above(logits[i]);
    for (int32_t i = 0; i < o->n_bias; i++) x[s->bias[i].id] += s->bias[i].value;
    if (o->repetition_penalty != 1)
        for (int i = 0; i < s->vocab; i++)
            if (s->seen[i])
                x[i] = x[i] > 0 ? x[i] / o->repetition_penalty : x[i] * o->repetition_penalty;
    if (o->presence_penalty != 0 || o->frequency_penalty != 0)
        for (int i = 0; i < s->vocab; i++)
            if (s->replied[i] > 0)
                x[i] -= o->presence_penalty + o->frequency_penalty * (float)s->replied[i];
    for (int i = 0; i < n_banned; i++)
        if (banned[i] >= 0 && banned[i] < s->vocab) x[banned[i]] = -INFINITY;
    for (int i = 0; i < s->vocab; i++) x[i] = finite_above(x[i]);
}

static uint64_t rank_of(float key, int32_t id) {
    const float positive_zero = key + 0.0f;
    uint32_t bits;
    memcpy(&bits, &positive_zero, sizeof bits);
    bits ^= (0 - (bits >> 31)) | 0x80000000u; /* negative: all bits, else the sign */
    return (uint64_t)bits << 32 | ~(uint32_t)id;
}

static int32_t id_of(candidate c) {
    return (int32_t) ~(uint32_t)c.rank;
}

/* The candidates left in a draw: the first n of c, in no order. */
typedef struct pool {
    candidate *c;
    int n;
    double weight; /* of all */
    float largest; /* logit */
} pool;

/* Lists the ids that can be drawn, each with a weight of one. */
static pool list_candidates(gn_sampler *s) {
    candidate *c = s->candidates;
    float largest = -FLT_MAX;
    int n = 0;
    for (int i = 0; i < s->vocab; i++) {
        const float x = s->logits[i];
        c[n].rank = rank_of(x, i);
        c[n].weight = 1;
        n += x >= -FLT_MAX;
        largest = x > largest ? x : largest;
    }
    return (pool){c, n, n, largest};
}

static bool contains(const int32_t *ids, int n, int32_t id) {
    for (int i = 0; i < n; i++)
        if (ids[i] == id) return true;
    return false;
}

/* When nothing can be drawn: the lowest id that is not banned, or 0. */
static int32_t fallback(const gn_sampler *s, const int32_t *banned, int n_banned) {
    for (int32_t id = 0; id < s->vocab; id++)
        if (!contains(banned, n_banned, id)) return id;
    return 0;
}

/* ---- selection ---- */

static uint64_t median(uint64_t a, uint64_t b, uint64_t c) {
    const uint64_t low = a < b ? a : b, high = a < b ? b : a;
    return c < low ? low : c < high ? c : high;
}

/* Moves the candidates that rank at least as high as `pivot` to the front; returns how many, and
 * their weight. Every element is swapped, field by field, because a branch here would be
 * unpredictable. */
static int partition(candidate *c, int n, uint64_t pivot, double *weight) {
    double sum = 0;
    int k = 0;
    for (int i = 0; i < n; i++) {
        const uint64_t rank = c[i].rank;
        const float in_or_out[2] = {0, c[i].weight};
        const bool front = rank >= pivot;
        c[i].rank = c[k].rank;
        c[i].weight = c[k].weight;
        c[k].rank = rank;
        c[k].weight = in_or_out[1];
        sum += (double)in_or_out[front];
        k += front;
    }
    *weight = sum;
    return k;
}

/* Keeps the shortest leading part of the order whose weight is at least `mass`: at least one, and
 * all when together they weigh less (rounding). */
static void keep_leading(pool *p, double mass) {
    int done = 0; /* these are kept */
    double kept = 0;
    while (p->n - done > 1) {
        candidate *rest = p->c + done;
        const int n = p->n - done;
        double weight;
        /* Never the last in order, so that each round shrinks. */
        const uint64_t last = n > 2 ? rest[n - 1].rank : UINT64_MAX;
        const uint64_t pivot = median(rest[0].rank, rest[n / 2].rank, last);
        const int k = partition(rest, n, pivot, &weight);
        if (kept + weight >= mass) {
            p->n = done + k;
        } else {
            done += k;
            kept += weight;
        }
    }
    p->weight = kept + (double)p->c[done].weight;
}

/* log(weight): (logit - largest logit) / temperature. */
static double log_weight(const gn_sampler *s, const pool *p, candidate x) {
    return ((double)s->logits[id_of(x)] - (double)p->largest) * s->inverse_temperature;
}

/* Sets the weights; candidates whose weight vanishes are dropped. */
static void softmax(const gn_sampler *s, pool *p) {
    candidate *c = p->c;
    double sum = 0;
    int n = 0;
    for (int i = 0; i < p->n; i++) {
        const uint64_t rank = c[i].rank;
        const float weight = expf((float)log_weight(s, p, c[i]));
        c[n].rank = rank;
        c[n].weight = weight;
        sum += (double)weight;
        n += weight > 0;
    }
    p->n = n;
    p->weight = sum;
}

/* Locally typical sampling (Meister et al. 2022): keeps those whose surprise is closest to the
 * entropy, up to mass `typical_p`. Surprise is log(p->weight) - log_weight. */
static void keep_typical(const gn_sampler *s, pool *p, double typical_p) {
    double mean = 0;
    for (int i = 0; i < p->n; i++)
        mean += (double)p->c[i].weight / p->weight * log_weight(s, p, p->c[i]);
    for (int i = 0; i < p->n; i++) {
        const double distance = fabs(log_weight(s, p, p->c[i]) - mean);
        p->c[i].rank = rank_of((float)-distance, id_of(p->c[i]));
    }
    keep_leading(p, typical_p * p->weight);
    for (int i = 0; i < p->n; i++) {
        const int32_t id = id_of(p->c[i]);
        p->c[i].rank = rank_of(s->logits[id], id);
    }
}

static candidate first(const pool *p) {
    candidate best = p->c[0];
    for (int i = 1; i < p->n; i++)
        if (p->c[i].rank > best.rank) best = p->c[i];
    return best;
}

static candidate last(const pool *p) {
    candidate worst = p->c[0];
    for (int i = 1; i < p->n; i++)
        if (p->c[i].rank < worst.rank) worst = p->c[i];
    return worst;
}

static void keep_min_p(pool *p, float min_p) {
    const float least = min_p * first(p).weight;
    int n = 0;
    p->weight = 0;
    for (int i = 0; i < p->n; i++) {
        if (p->c[i].weight < least) continue;
        p->weight += (double)p->c[i].weight;
        p->c[n++] = p->c[i];
    }
    p->n = n;
}

/* ---- drawing ---- */

/* The finalizer of splitmix64 (Steele et al. 2014). */
static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Uniform in (0, 1], 53 bits. Mixing the seed first keeps the sequences of neighboring seeds from
 * being shifts of each other. */
static double uniform(uint64_t seed, int64_t step) {
    const uint64_t golden = 0x9e3779b97f4a7c15u;
    const uint64_t bits = mix(mix(seed + golden) + golden * ((uint64_t)step + 1));
    return (double)((bits >> 11) + 1) * 0x1p-53;
}

int32_t gn_sampler_draw(gn_sampler *s, const float *logits, int64_t step, const int32_t *banned,
                        int n_banned) {
    const gn_sampling *o = &s->options;
    adjust_logits(s, logits, banned, n_banned);
    pool p = list_candidates(s);
    if (p.n == 0) return fallback(s, banned, n_banned);
    if (o->temperature == 0) return id_of(first(&p));
    if (o->top_k > 0 && o->top_k < p.n) keep_leading(&p, o->top_k);
    softmax(s, &p);
    if (o->typical_p < 1) keep_typical(s, &p, (double)o->typical_p);
    if (o->top_p < 1) keep_leading(&p, (double)o->top_p * p.weight);
    if (o->min_p > 0) keep_min_p(&p, o->min_p);
    keep_leading(&p, uniform(o->seed, step) * p.weight);
    return id_of(last(&p));
}

/* ---- log probabilities ---- */

/* log(sum(exp(x))), NaN as -infinity. */
static double log_sum_exp(const float *x, int n) {
    double top = -INFINITY, sum = 0;
    for (int i = 0; i < n; i++)
        if ((double)x[i] > top) top = (double)x[i];
    if (!isfinite(top)) return top;
    for (int i = 0; i < n; i++)
        if (!isnan(x[i])) sum += exp((double)x[i] - top);
    return top + log(sum);
}

static float logprob_of(float x, double log_sum) {
    if (isnan(x) || x == -INFINITY) return -INFINITY;
    return x == INFINITY ? 0 : (float)((double)x - log_sum);
}

float gn_logprob(const float *logits, int vocab, int32_t id) {
    return logprob_of(logits[id], log_sum_exp(logits, vocab));
}

void gn_top_logprobs(const float *logits, int vocab, int n_top, gn_token_prob *top) {
    int n = 0;
    for (int i = 0; i < vocab && n_top > 0; i++) {
        const float x = isnan(logits[i]) ? -INFINITY : logits[i];
        if (n == n_top && x <= top[n - 1].logprob) continue;
        int at = n < n_top ? n++ : n_top - 1;
        for (; at > 0 && top[at - 1].logprob < x; at--) top[at] = top[at - 1];
        top[at] = (gn_token_prob){i, x};
    }
    const double log_sum = log_sum_exp(logits, vocab);
    for (int i = 0; i < n; i++) top[i].logprob = logprob_of(top[i].logprob, log_sum);
    for (int i = n; i < n_top; i++) top[i] = (gn_token_prob){-1, -INFINITY};
}
