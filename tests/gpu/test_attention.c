/* gn_attention on the GPU: batches of decoding and prefilling sequences over a paged cache with its
 * blocks in any order, against plain loops in double precision, which say how far off each value
 * may be too (tests/kernels/test_attention.c holds the CPU to the same); and that in float32 a
 * row's bits depend on nothing but its own sequence. */
#include "device.h"

typedef struct {
    int heads, kv_heads, D, tokens; /* of a cache block */
    gn_dtype kv_dtype;
    float scale; /* of q: how sharp the softmax is */
    int pad;     /* elements between rows of q and y */
} head_shape;

enum { MAX_SEQS = 20, SPARE = 3 };

/* Rows of each sequence in the batch, and its tokens before them. */
typedef struct {
    int n;
    struct {
        int pos0, rows;
    } seq[MAX_SEQS];
} batch_shape;

static const batch_shape batches[] = {
    {1, {{0, 1}}},
    {1, {{2999, 1}}},
    {16,
     {{5, 1},
      {16, 1},
      {15, 1},
      {777, 1},
      {31, 1},
      {32, 1},
      {255, 1},
      {256, 1},
      {100, 1},
      {257, 1},
      {511, 1},
      {64, 1},
      {63, 1},
      {0, 1},
      {999, 1},
      {47, 1}}},
    {1, {{0, 300}}},
    {1, {{1000, 130}}},
    {8, {{5, 1}, {777, 1}, {100, 15}, {64, 16}, {0, 17}, {40, 0}, {1900, 128}, {2500, 1}}},
    {4, {{0, 2}, {14, 5}, {1, 64}, {63, 65}}},
    {3, {{0, 127}, {130, 0}, {17, 33}}},
};

static const head_shape shapes[] = {
    {4, 4, 64, 16, GN_BF16, 1, 0},    {8, 2, 128, 16, GN_BF16, 1, 0},
    {6, 2, 80, 16, GN_BF16, 1, 0},    {4, 1, 96, 16, GN_BF16, 1, 8},
    {3, 3, 34, 16, GN_BF16, 1, 0},    {8, 1, 128, 16, GN_BF16, 8, 16},
    {32, 4, 64, 16, GN_BF16, 4, 0},   {40, 1, 64, 16, GN_BF16, 1, 0},
    {4, 2, 64, 7, GN_BF16, 1, 0},     {5, 1, 128, 32, GN_BF16, 1, 3},
    {2, 1, 256, 16, GN_BF16, 1, 0},   {3, 1, 2, 1, GN_F32, 1, 0},
    {4, 2, 64, 16, GN_F32, 1, 0},     {4, 1, 128, 16, GN_F32, 30, 5},
    {12, 12, 128, 16, GN_BF16, 1, 0}, {4, 2, 48, 16, GN_BF16, 30, 0},
    {8, 2, 128, 16, GN_F8, 1, 0},     {4, 4, 64, 16, GN_F8, 4, 8},
    {6, 2, 80, 16, GN_F8, 1, 0},      {4, 1, 96, 16, GN_F8, 8, 0},
    {32, 4, 128, 16, GN_F8, 1, 0},    {3, 3, 34, 7, GN_F8, 1, 0},
};

/* ---- a problem ---- */

typedef struct {
    const sides *sides;
    head_shape h;
    batch_shape b;
    int T, max_blocks, n_blocks;
    int32_t row0[MAX_SEQS + 1], pos0[MAX_SEQS], *blocks;
    float *q;     /* (T, heads, D) */
    float *k, *v; /* the cache: (n_blocks, kv_heads, tokens, D); NaN where there is no token */
    float *k_scales, *v_scales; /* of its rows, likewise; used with F8 */
    char name[256];
} problem;

static int blocks_of(const problem *p, int seq) {
    return (p->b.seq[seq].pos0 + p->b.seq[seq].rows + p->h.tokens - 1) / p->h.tokens;
}

static void shuffle(int32_t *order, int n, rng *r) {
    for (int i = 0; i < n; i++) order[i] = i;
    for (int i = n - 1; i > 0; i--) {
        const int j = rng_below(r, i + 1);
        const int32_t swap = order[i];
        order[i] = order[j];
        order[j] = swap;
    }
}

/* Where a token of a sequence lies in the cache, for one head; in floats. */
static size_t place_of(const problem *p, int seq, int position, int kv_head) {
    const int tokens = p->h.tokens;
    const int64_t block = p->blocks[seq * p->max_blocks + position / tokens];
    return (size_t)((block * p->h.kv_heads + kv_head) * tokens + position % tokens) *
           (size_t)p->h.D;
}

static size_t cache_floats(const problem *p) {
    return (size_t)p->n_blocks * (size_t)(p->h.kv_heads * p->h.tokens * p->h.D);
}

static size_t cache_rows(const problem *p) {
    return (size_t)(p->n_blocks * p->h.kv_heads * p->h.tokens);
}

/* A row that the cache can hold. Any scale will do, also one with which some codes are at the end
 * of their range. */
static void fill_row(const problem *p, float *row, float *scale, rng *r) {
    uint8_t codes[GN_MAX_HEAD_DIM];
    for (int d = 0; d < p->h.D; d++) row[d] = rng_float(r);
    round_floats(row, p->h.kv_dtype, p->h.D);
    *scale = (0.5f + fabsf(rng_float(r))) / GN_F8_MAX;
    if (p->h.kv_dtype != GN_F8) return;
    for (int d = 0; d < p->h.D; d++) row[d] /= *scale;
    gn_narrow(codes, GN_F8, row, p->h.D);
    gn_widen(row, codes, GN_F8, p->h.D);
    for (int d = 0; d < p->h.D; d++) row[d] *= *scale;
}

static void fill_token(const problem *p, int seq, int position, rng *r) {
    for (int head = 0; head < p->h.kv_heads; head++) {
        const size_t at = place_of(p, seq, position, head), row = at / (size_t)p->h.D;
        fill_row(p, p->k + at, p->k_scales + row, r);
        fill_row(p, p->v + at, p->v_scales + row, r);
    }
}

static problem make_problem(const sides *s, head_shape h, batch_shape b, uint64_t seed) {
    rng r = {seed};
    problem p = {.sides = s, .h = h, .b = b, .n_blocks = SPARE};
    for (int i = 0; i < b.n; i++) {
        p.pos0[i] = b.seq[i].pos0;
        p.row0[i + 1] = p.row0[i] + b.seq[i].rows;
        p.n_blocks += blocks_of(&p, i);
        if (blocks_of(&p, i) > p.max_blocks) p.max_blocks = blocks_of(&p, i);
    }
    p.T = p.row0[b.n];
    p.blocks = malloc((size_t)(b.n * p.max_blocks) * sizeof *p.blocks);
    int32_t *order = malloc((size_t)p.n_blocks * sizeof *order);
    shuffle(order, p.n_blocks, &r);
    /* What is not used may hold anything. A block of NaN is seen; no block at all ends the test. */
    const int32_t unused = is_brief() ? INT32_MAX : order[p.n_blocks - 1];
    for (int i = 0, next = 0; i < b.n; i++)
        for (int j = 0; j < p.max_blocks; j++)
            p.blocks[i * p.max_blocks + j] = j < blocks_of(&p, i) ? order[next++] : unused;
    free(order);
    p.k = malloc(cache_floats(&p) * sizeof *p.k);
    p.v = malloc(cache_floats(&p) * sizeof *p.v);
    memset(p.k, 0xff, cache_floats(&p) * sizeof *p.k);
    memset(p.v, 0xff, cache_floats(&p) * sizeof *p.v);
    p.k_scales = malloc(cache_rows(&p) * sizeof *p.k_scales);
    p.v_scales = malloc(cache_rows(&p) * sizeof *p.v_scales);
    memset(p.k_scales, 0xff, cache_rows(&p) * sizeof *p.k_scales);
    memset(p.v_scales, 0xff, cache_rows(&p) * sizeof *p.v_scales);
    for (int i = 0; i < b.n; i++)
        for (int j = 0; j < b.seq[i].pos0 + b.seq[i].rows; j++) fill_token(&p, i, j, &r);
    const size_t n = (size_t)(p.T * h.heads * h.D);
    p.q = random_floats(&r, n);
    for (size_t i = 0; i < n; i++) p.q[i] *= h.scale;
    round_floats(p.q, gn_ctx_activation(s->gpu), (int64_t)n);
    snprintf(p.name, sizeof p.name,
             "%s attention heads %d/%d D=%d, blocks of %d %s, q x %g, pad %d",
             gn_dtype_name(s->compute), h.heads, h.kv_heads, h.D, h.tokens,
             gn_dtype_name(h.kv_dtype), (double)h.scale, h.pad);
    for (int i = 0; i < b.n && i < 8; i++) {
        const size_t used = strlen(p.name);
        snprintf(p.name + used, sizeof p.name - used, " %d+%d", b.seq[i].pos0, b.seq[i].rows);
    }
    return p;
}

static void free_problem(problem *p) {
    free(p->blocks);
    free(p->q);
    free(p->k);
    free(p->v);
    free(p->k_scales);
    free(p->v_scales);
}

/* (n_blocks, kv_heads, tokens, cols) */
static gn_tensor device_blocks(device_memory *m, const problem *p, const float *values,
                               gn_dtype dtype, int ndim, int64_t cols) {
    gn_tensor t = device_rows(m, values, dtype, 1, (int64_t)cache_rows(p) * cols, 0, 0);
    t.ndim = ndim;
    t.ld = (int64_t)p->h.kv_heads * p->h.tokens * cols;
    const int64_t shape[] = {p->n_blocks, p->h.kv_heads, p->h.tokens, cols};
    memcpy(t.shape, shape, sizeof shape);
    return t;
}

static void place_cache(device_memory *m, const problem *p, const float *values,
                        const float *scales, gn_tensor *cache, gn_tensor *cache_scales) {
    const size_t n = cache_floats(p);
    if (p->h.kv_dtype != GN_F8) {
        *cache = device_blocks(m, p, values, p->h.kv_dtype, 4, p->h.D);
        return;
    }
    float *codes = malloc(n * sizeof *codes); /* rounding makes them whole again */
    for (size_t i = 0; i < n; i++) codes[i] = values[i] / scales[i / (size_t)p->h.D];
    *cache = device_blocks(m, p, codes, GN_F8, 4, p->h.D);
    *cache_scales = device_blocks(m, p, scales, GN_F32, 3, 1);
    free(codes);
}

static gn_kv device_kv(device_memory *m, const problem *p) {
    gn_kv kv = {0};
    place_cache(m, p, p->k, p->k_scales, &kv.k, &kv.k_scales);
    place_cache(m, p, p->v, p->v_scales, &kv.v, &kv.v_scales);
    return kv;
}

/* Rows as (rows, heads, D). */
static gn_tensor with_heads(gn_tensor t, const problem *p) {
    t.ndim = 3;
    t.shape[1] = p->h.heads;
    t.shape[2] = p->h.D;
    return t;
}

/* Of each sequence, its rows from[i] ... to[i] - 1, into y: (their number, heads, D). */
static const char *solve(const problem *p, const gn_kv *kv, const int *from, const int *to,
                         float *y) {
    gn_ctx *gpu = p->sides->gpu;
    const int row = p->h.heads * p->h.D;
    int32_t row0[MAX_SEQS + 1] = {0}, pos0[MAX_SEQS];
    int64_t longest = 0;
    float *q = malloc((size_t)(p->T * row) * sizeof *q);
    int32_t *ids = calloc((size_t)p->T, sizeof *ids);
    for (int i = 0; i < p->b.n; i++) {
        row0[i + 1] = row0[i] + to[i] - from[i];
        pos0[i] = p->pos0[i] + from[i];
        if (p->pos0[i] + to[i] > longest) longest = p->pos0[i] + to[i];
        memcpy(q + row0[i] * row, p->q + (p->row0[i] + from[i]) * row,
               (size_t)((to[i] - from[i]) * row) * sizeof *q);
    }
    const int T = row0[p->b.n];
    const gn_seqs seqs = {p->b.n, p->max_blocks, row0, pos0, p->blocks};
    const gn_dtype act = gn_ctx_activation(gpu);
    device_memory m = {.ctx = gpu};
    const gn_tensor tq = with_heads(device_rows(&m, q, act, T, row, p->h.pad, 0), p);
    gn_tensor ty = with_heads(device_rows(&m, NULL, act, T, row, p->h.pad, 0), p);
    cr_assert_eq(gn_stage(gpu, ids, &seqs, NULL, 0), GN_OK, "%s", p->name);
    reserve(gpu, gn_attention_workspace(gpu, longest));
    const char *why = ran(gpu, gn_attention(gpu, &ty, &tq, kv, &seqs), p->name);
    if (!why && !read_rows(gpu, y, &ty)) why = "a gap between rows of y is written";
    if (!why && !guards_stand(&m)) why = "a guard is written";
    device_free(&m);
    free(q);
    free(ids);
    return why;
}

/* ---- the same in double precision ---- */

typedef struct {
    double value, error;
} bounded;

struct reference {
    const problem *p;
    bounded *y; /* (T, heads, D) */
};

static double length_of(const float *x, int D) {
    double sum = 0;
    for (int j = 0; j < D; j++) sum += (double)x[j] * x[j];
    return sqrt(sum);
}

/* With F8: rounding what a code stands for, here, and a product by the scale, there. */
static int roundings_of_scales(const problem *p) {
    return p->h.kv_dtype == GN_F8 ? 2 : 0;
}

/* Scores of one query and, as the result, by how much a score may be off: its sum, and what scales
 * it before an exponential of base 2. */
static double scores_of(double *score, const problem *p, const float *q, int seq, int n,
                        int kv_head) {
    const int D = p->h.D;
    double longest = 0, largest = 0;
    for (int j = 0; j < n; j++) {
        const float *k = p->k + place_of(p, seq, j, kv_head);
        double sum = 0;
        for (int d = 0; d < D; d++) sum += (double)q[d] * k[d];
        score[j] = sum / sqrt(D);
        longest = fmax(longest, length_of(k, D));
        largest = fmax(largest, fabs(score[j]));
    }
    const double sums = sqrt(D) + 2 + roundings_of_scales(p);
    return 2 * U32 * (sums * length_of(q, D) * longest / sqrt(D) + 3 * largest + 4);
}

/* Query i: row i / heads. A weight is off by two scores; the sums over positions by their own
 * roundings, and in bfloat16 weights may be rounded before they meet the values. */
static void attend(void *arg, int64_t i) {
    const struct reference *ref = arg;
    const problem *p = ref->p;
    const int D = p->h.D, row = (int)(i / p->h.heads), head = (int)(i % p->h.heads);
    const int kv_head = head / (p->h.heads / p->h.kv_heads);
    int seq = 0;
    while (p->row0[seq + 1] <= row) seq++;
    const int n = p->pos0[seq] + row - p->row0[seq] + 1;
    double *score = malloc((size_t)n * sizeof *score);
    double *sums = calloc((size_t)(3 * D), sizeof *sums), top = -INFINITY, total = 0;
    const double off = scores_of(score, p, p->q + i * D, seq, n, kv_head);
    for (int j = 0; j < n; j++) top = fmax(top, score[j]);
    for (int j = 0; j < n; j++) total += score[j] = exp(score[j] - top);
    for (int j = 0; j < n; j++) {
        const float *v = p->v + place_of(p, seq, j, kv_head);
        for (int d = 0; d < D; d++) {
            const double term = score[j] / total * v[d];
            sums[d] += term;
            sums[D + d] += fabs(term);
            sums[2 * D + d] += term * term;
        }
    }
    for (int d = 0; d < D; d++) {
        const double two = sums[D + d], four = sqrt(sums[2 * D + d]);
        const int roundings = p->sides->compute == GN_BF16;
        const double scales = roundings_of_scales(p) * U32 * two;
        ref->y[i * D + d] =
            (bounded){sums[d], 2 * off * two + scales + dot_error(n, two, four, roundings)};
    }
    free(score);
    free(sums);
}

static void check_problem(tally *t, const problem *p) {
    gn_ctx *gpu = p->sides->gpu;
    const int64_t n = (int64_t)p->T * p->h.heads * p->h.D;
    float *y = malloc((size_t)n * sizeof *y);
    bounded *expected = malloc((size_t)n * sizeof *expected);
    device_memory m = {.ctx = gpu};
    const gn_kv kv = device_kv(&m, p);
    int from[MAX_SEQS] = {0}, to[MAX_SEQS];
    for (int i = 0; i < p->b.n; i++) to[i] = p->b.seq[i].rows;
    verdict v = {0};
    snprintf(v.name, sizeof v.name, "%s", p->name);
    const char *why = solve(p, &kv, from, to, y);
    if (!why && !guards_stand(&m)) why = "a guard of the cache is written";
    if (!why) {
        const double unit = gn_ctx_activation(gpu) == GN_BF16 ? U16 : U32;
        gn_ctx_for(p->sides->cpu, (int64_t)p->T * p->h.heads, attend,
                   &(struct reference){p, expected});
        for (int64_t i = 0; i < n; i++) {
            const bounded *e = &expected[i];
            judge(&v, i / (p->h.heads * p->h.D), i % (p->h.heads * p->h.D), y[i], e->value,
                  e->error + unit * (fabs(e->value) + e->error));
        }
    }
    settle(t, &v, why);
    device_free(&m);
    free(y);
    free(expected);
}

/* ---- tests ---- */

static void check_all(gn_dtype compute, const char *what) {
    tally t = {0};
    sides s = open_sides(compute);
    for (int i = 0; i < COUNT(shapes) * COUNT(batches); i++) {
        if (is_brief() && i % 9 != 0) continue;
        problem p = make_problem(&s, shapes[i % COUNT(shapes)], batches[i / COUNT(shapes)],
                                 (uint64_t)(1 + i));
        check_problem(&t, &p);
        free_problem(&p);
    }
    close_sides(&s);
    conclude(&t, what);
}

Test(gpu_attention, in_bfloat16) {
    check_all(GN_BF16, "attention, bfloat16");
}

Test(gpu_attention, in_float32) {
    check_all(GN_F32, "attention, float32");
}

/* Sequences one at a time, `size` rows at a time. */
static const char *solve_alone(const problem *p, const gn_kv *kv, int size, float *y) {
    const int row = p->h.heads * p->h.D;
    const char *why = NULL;
    for (int i = 0; i < p->b.n; i++)
        for (int at = 0; at < p->b.seq[i].rows && !why; at += size) {
            int from[MAX_SEQS] = {0}, to[MAX_SEQS] = {0};
            from[i] = at;
            to[i] = at + size < p->b.seq[i].rows ? at + size : p->b.seq[i].rows;
            why = solve(p, kv, from, to, y + (p->row0[i] + at) * row);
        }
    return why;
}

Test(gpu_attention, in_float32_a_row_does_not_depend_on_the_batch) {
    const int used[] = {0, 1, 4, 8, 12, 16}, sizes[] = {1, 7, 1000};
    const batch_shape batch = {6, {{5, 1}, {700, 1}, {100, 15}, {0, 40}, {40, 0}, {300, 33}}};
    sides s = open_sides(GN_F32);
    tally t = {0};
    for (int i = 0; i < COUNT(used); i += is_brief() ? 2 : 1) {
        problem p = make_problem(&s, shapes[used[i]], batch, (uint64_t)(300 + i));
        device_memory m = {.ctx = s.gpu};
        const gn_kv kv = device_kv(&m, &p);
        const int row = p.h.heads * p.h.D;
        float *whole = malloc((size_t)(p.T * row) * sizeof *whole);
        float *alone = malloc((size_t)(p.T * row) * sizeof *alone);
        int from[MAX_SEQS] = {0}, to[MAX_SEQS];
        for (int j = 0; j < batch.n; j++) to[j] = batch.seq[j].rows;
        const char *why = solve(&p, &kv, from, to, whole);
        for (int j = 0; j < COUNT(sizes); j++) {
            verdict v = {0};
            snprintf(v.name, sizeof v.name, "%d rows alone: %s", sizes[j], p.name);
            if (!why) why = solve_alone(&p, &kv, sizes[j], alone);
            for (int k = 0; k < p.T * row && !why; k++)
                judge(&v, k / row, k % row, alone[k], whole[k], 0);
            settle(&t, &v, why);
        }
        device_free(&m);
        free(whole);
        free(alone);
        free_problem(&p);
    }
    close_sides(&s);
    conclude(&t, "attention, rows alone");
}
