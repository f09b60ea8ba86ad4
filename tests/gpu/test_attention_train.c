/* gn_attention_train and gn_attention_bwd on the GPU: packed sequences of any lengths against plain
 * loops in double precision, which say how far off each value may be too
 * (tests/kernels/test_backward.c holds the CPU to finite differences); and that a sequence's bits
 * depend on nothing but itself. */
#include "device.h"

#include "kernels/cuda/cuda.h"

typedef struct {
    int heads, kv_heads, D;
    float scale; /* of q: how sharp the softmax is */
    int pad;     /* elements between rows */
    bool wide;   /* gradients are float32 whatever the activations are */
} head_shape;

enum { MAX_SEQS = 40 };

/* Rows of each sequence. */
typedef struct {
    int n, rows[MAX_SEQS];
} batch_shape;

static const head_shape shapes[] = {
    {4, 4, 64, 1, 0, false},  {4, 1, 128, 1, 8, false},  {8, 1, 128, 8, 0, false},
    {2, 2, 80, 1, 0, false},  {4, 2, 96, 1, 16, false},  {3, 3, 34, 1, 0, false},
    {2, 1, 256, 4, 0, false}, {4, 2, 128, 1, 3, false},  {6, 6, 128, 4, 0, false},
    {8, 2, 64, 30, 0, false}, {4, 2, 128, 30, 0, false}, {4, 4, 64, 1, 0, true},
    {10, 2, 80, 4, 8, false}, {3, 1, 96, 1, 0, false},
};

static const batch_shape batches[] = {
    {1, {1}},
    {1, {64}},
    {5, {2, 1, 15, 16, 17}},
    {4, {63, 65, 1, 33}},
    {3, {129, 0, 130}},
    {1, {257}},
    {4, {127, 1, 128, 1}},
    {34, {1, 2, 3, 1, 1, 1, 9, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
          1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 70}},
    {6, {777, 5, 256, 1, 0, 511}},
    {8, {512, 384, 200, 191, 193, 320, 100, 448}},
};

enum { ACTIVATIONS = 5, GRADIENTS = 3 };

/* ---- a problem ---- */

typedef struct {
    double value, error;
} bounded;

enum { Q, K, V, DY, Y }; /* activations */
enum { DQ, DK, DV };     /* gradients */

typedef struct {
    const sides *sides;
    head_shape h;
    int n, T;
    int32_t row0[MAX_SEQS + 1], pos0[MAX_SEQS];
    float *x[ACTIVATIONS], *lse; /* y and lse: what backward is given, near what forward gives */
    bounded *y, *forward_lse, *grad[GRADIENTS];
    char name[256];
} problem;

static int heads_of(const problem *p, bool is_kv) {
    return is_kv ? p->h.kv_heads : p->h.heads;
}

static bool is_kv_input(int i) {
    return i == K || i == V;
}

static bool is_kv_gradient(int i) {
    return i != DQ;
}

/* Values in a row. */
static int width(const problem *p, bool is_kv) {
    return heads_of(p, is_kv) * p->h.D;
}

static const float *input(const problem *p, int i, int row, int head) {
    return p->x[i] + (size_t)row * (size_t)width(p, is_kv_input(i)) + head * p->h.D;
}

static double dot(const float *a, const float *b, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)a[i] * b[i];
    return sum;
}

/* ---- the same in double precision ---- */

/* A sum of products a x, where a may be off; what dot_error wants to know of it. */
typedef struct {
    double sum, two, four, off;
} products;

static void add_row(products *to, double a, double off, const float *x, int n) {
    for (int i = 0; i < n; i++) {
        const double term = a * x[i];
        to[i].sum += term;
        to[i].two += fabs(term);
        to[i].four += term * term;
        to[i].off += off * fabs((double)x[i]);
    }
}

/* Times `scale`, of n products whose a may be rounded to bfloat16 before. */
static void conclude_row(const problem *p, bounded *to, const products *from, double scale, int n,
                         gn_dtype dtype) {
    const double unit = dtype == GN_BF16 ? U16 : U32;
    for (int i = 0; i < p->h.D; i++) {
        const products *x = &from[i];
        const int roundings = p->sides->compute == GN_BF16;
        const double error = scale * (x->off + dot_error(n, x->two, sqrt(x->four), roundings));
        const double value = scale * x->sum;
        to[i] = (bounded){value, error + unit * (fabs(value) + error)};
    }
}

/* By how much a float32 dot product of D terms may be off. */
static double dot_off(const float *a, const float *b, int D) {
    return 2 * U32 * (sqrt(D) + 2) * sqrt(dot(a, a, D) * dot(b, b, D));
}

/* Scores of a row, and by how much each may be off what it is compared with: another score, or
 * lse. In the end they are arguments of exponentials, of base 2 perhaps. */
static void score_row(const problem *p, double *score, double *off, int first, int row, int head,
                      int kv_head) {
    const int D = p->h.D;
    const float *q = input(p, Q, row, head);
    for (int j = 0; j <= row - first; j++) {
        const float *k = input(p, K, first + j, kv_head);
        score[j] = dot(q, k, D) / sqrt(D);
        off[j] = dot_off(q, k, D) / sqrt(D) + U32 * (8 * fabs(score[j]) + 8);
    }
}

static double largest(const double *v, int n) {
    double most = v[0];
    for (int i = 1; i < n; i++) most = fmax(most, v[i]);
    return most;
}

struct workspace {
    double *score, *off;
    products *out, *dq, *dk, *dv; /* dk, dv: of every row */
};

static void forward_row(const problem *p, const struct workspace *w, int first, int row, int head,
                        int kv_head) {
    const int D = p->h.D, n = row - first + 1;
    const size_t at = (size_t)row * (size_t)p->h.heads + (size_t)head;
    score_row(p, w->score, w->off, first, row, head, kv_head);
    const double top = largest(w->score, n), off = 2 * largest(w->off, n);
    double total = 0;
    for (int j = 0; j < n; j++) total += exp(w->score[j] - top);
    memset(w->out, 0, (size_t)D * sizeof *w->out);
    for (int j = 0; j < n; j++) {
        const double weight = exp(w->score[j] - top) / total;
        add_row(w->out, weight, weight * off, input(p, V, first + j, kv_head), D);
    }
    const double lse = top + log(total);
    conclude_row(p, p->y + at * (size_t)D, w->out, 1, n, gn_ctx_activation(p->sides->gpu));
    p->forward_lse[at] =
        (bounded){lse, off + U32 * (4 * sqrt(n) + 4 + 4 * fabs(top) + 4 * fabs(lse))};
    p->lse[at] = (float)lse;
    for (int d = 0; d < D; d++)
        p->x[Y][at * (size_t)D + (size_t)d] = (float)p->y[at * (size_t)D + (size_t)d].value;
    round_floats(p->x[Y] + at * (size_t)D, gn_ctx_activation(p->sides->gpu), D);
}

static gn_dtype gradient_dtype(const problem *p) {
    return p->h.wide ? GN_F32 : gn_ctx_activation(p->sides->gpu);
}

static void backward_row(const problem *p, const struct workspace *w, int first, int row, int head,
                         int kv_head) {
    const int D = p->h.D, n = row - first + 1;
    const size_t at = (size_t)row * (size_t)p->h.heads + (size_t)head;
    const float *q = input(p, Q, row, head), *dy = input(p, DY, row, head);
    const float *y = input(p, Y, row, head);
    const double lse = p->lse[at], delta = dot(dy, y, D), delta_off = dot_off(dy, y, D);
    score_row(p, w->score, w->off, first, row, head, kv_head);
    memset(w->dq, 0, (size_t)D * sizeof *w->dq);
    for (int j = 0; j < n; j++) {
        const float *k = input(p, K, first + j, kv_head), *v = input(p, V, first + j, kv_head);
        const double weight = exp(w->score[j] - lse), off = w->off[j] + 8 * U32 * fabs(lse);
        const double slope = weight * (dot(dy, v, D) - delta);
        const double slope_off =
            fabs(slope) * (off + 2 * U32) + weight * (1 + off) * (dot_off(dy, v, D) + delta_off);
        add_row(w->dv + j * D, weight, weight * off, dy, D);
        add_row(w->dk + j * D, slope, slope_off, q, D);
        add_row(w->dq, slope, slope_off, k, D);
    }
    conclude_row(p, p->grad[DQ] + at * (size_t)D, w->dq, 1 / sqrt(D), n, gradient_dtype(p));
}

/* Sequence i / kv_heads under one kv head. */
static void solve_item(void *arg, int64_t i) {
    const problem *p = arg;
    const int D = p->h.D, kv_heads = p->h.kv_heads, group = p->h.heads / kv_heads;
    const int seq = (int)(i / kv_heads), kv_head = (int)(i % kv_heads);
    const int first = p->row0[seq], n = p->row0[seq + 1] - first;
    const size_t all = (size_t)n * (size_t)D + 1;
    const struct workspace w = {
        .score = malloc((size_t)(n + 1) * sizeof *w.score),
        .off = malloc((size_t)(n + 1) * sizeof *w.off),
        .out = malloc((size_t)D * sizeof *w.out),
        .dq = malloc((size_t)D * sizeof *w.dq),
        .dk = calloc(all, sizeof *w.dk),
        .dv = calloc(all, sizeof *w.dv),
    };
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int row = first; row < first + n; row++) {
            forward_row(p, &w, first, row, head, kv_head);
            backward_row(p, &w, first, row, head, kv_head);
        }
    for (int j = 0; j < n; j++) {
        const size_t at = (size_t)((first + j) * kv_heads + kv_head) * (size_t)D;
        const int terms = (n - j) * group;
        conclude_row(p, p->grad[DK] + at, w.dk + j * D, 1 / sqrt(D), terms, gradient_dtype(p));
        conclude_row(p, p->grad[DV] + at, w.dv + j * D, 1, terms, gradient_dtype(p));
    }
    free(w.score);
    free(w.off);
    free(w.out);
    free(w.dq);
    free(w.dk);
    free(w.dv);
}

static problem make_problem(const sides *s, head_shape h, batch_shape b, uint64_t seed) {
    rng r = {seed};
    problem p = {.sides = s, .h = h, .n = b.n};
    for (int i = 0; i < b.n; i++) p.row0[i + 1] = p.row0[i] + b.rows[i];
    p.T = p.row0[b.n];
    for (int i = 0; i < ACTIVATIONS; i++) {
        const size_t n = (size_t)p.T * (size_t)width(&p, is_kv_input(i));
        p.x[i] = random_floats(&r, n);
        for (size_t j = 0; j < n && i == Q; j++) p.x[i][j] *= h.scale;
        round_floats(p.x[i], gn_ctx_activation(s->gpu), (int64_t)n);
    }
    const size_t queries = (size_t)p.T * (size_t)h.heads;
    p.lse = malloc(queries * sizeof *p.lse);
    p.forward_lse = malloc(queries * sizeof *p.forward_lse);
    p.y = malloc(queries * (size_t)h.D * sizeof *p.y);
    for (int i = 0; i < GRADIENTS; i++)
        p.grad[i] = malloc((size_t)(p.T * width(&p, is_kv_gradient(i))) * sizeof *p.grad[i]);
    snprintf(p.name, sizeof p.name, "%s attention heads %d/%d D=%d, q x %g, pad %d%s, rows",
             gn_dtype_name(s->compute), h.heads, h.kv_heads, h.D, (double)h.scale, h.pad,
             h.wide ? ", wide gradients" : "");
    for (int i = 0; i < b.n && i < 8; i++) {
        const size_t used = strlen(p.name);
        snprintf(p.name + used, sizeof p.name - used, " %d", b.rows[i]);
    }
    return p;
}

static void free_problem(problem *p) {
    for (int i = 0; i < ACTIVATIONS; i++) free(p->x[i]);
    for (int i = 0; i < GRADIENTS; i++) free(p->grad[i]);
    free(p->lse);
    free(p->forward_lse);
    free(p->y);
}

/* ---- on the GPU ---- */

/* What it gives for some consecutive sequences. */
typedef struct {
    float *y, *lse, *grad[GRADIENTS];
} results;

static results alloc_results(const problem *p) {
    results r = {malloc((size_t)(p->T * width(p, false)) * sizeof(float)),
                 malloc((size_t)(p->T * p->h.heads) * sizeof(float)),
                 {0}};
    for (int i = 0; i < GRADIENTS; i++)
        r.grad[i] = malloc((size_t)(p->T * width(p, is_kv_gradient(i))) * sizeof(float));
    return r;
}

static void free_results(results *r) {
    free(r->y);
    free(r->lse);
    for (int i = 0; i < GRADIENTS; i++) free(r->grad[i]);
}

/* `rows` rows of dense floats (NULL: NaN) as (rows, heads, D). */
static gn_tensor device_heads(device_memory *m, const problem *p, const float *v, int rows,
                              gn_dtype dtype, bool is_kv) {
    gn_tensor t = device_rows(m, v, dtype, rows, width(p, is_kv), p->h.pad, 0);
    t.ndim = 3;
    t.shape[1] = heads_of(p, is_kv);
    t.shape[2] = p->h.D;
    return t;
}

/* Forward and backward of sequences [begin, end). Backward is given the reference's y and lse. */
static const char *solve(const problem *p, int begin, int end, results *r) {
    gn_ctx *gpu = p->sides->gpu;
    const gn_dtype act = gn_ctx_activation(gpu);
    const int first = p->row0[begin], T = p->row0[end] - first, heads = p->h.heads;
    int32_t row0[MAX_SEQS + 1];
    int64_t context = 0;
    for (int i = begin; i <= end; i++) row0[i - begin] = p->row0[i] - first;
    for (int i = begin; i < end; i++)
        if (p->row0[i + 1] - p->row0[i] > context) context = p->row0[i + 1] - p->row0[i];
    const gn_seqs seqs = {.n = end - begin, .row0 = row0, .pos0 = p->pos0};
    int32_t *ids = calloc((size_t)T, sizeof *ids);
    device_memory m = {.ctx = gpu};
    gn_tensor x[ACTIVATIONS], grad[GRADIENTS];
    for (int i = 0; i < ACTIVATIONS; i++)
        x[i] = device_heads(&m, p, p->x[i] + (size_t)first * (size_t)width(p, is_kv_input(i)), T,
                            i == DY ? gradient_dtype(p) : act, is_kv_input(i));
    for (int i = 0; i < GRADIENTS; i++)
        grad[i] = device_heads(&m, p, NULL, T, gradient_dtype(p), is_kv_gradient(i));
    const float *lse = p->lse + (size_t)first * (size_t)heads;
    const gn_attention_rows given = {
        x[Q], x[Y], x[K], x[V], device_rows(&m, lse, GN_F32, T, heads, p->h.pad, 1), &seqs};
    gn_attention_rows made = given;
    made.y = device_heads(&m, p, NULL, T, act, false);
    made.lse = device_rows(&m, NULL, GN_F32, T, heads, p->h.pad, 1);
    cr_assert_eq(gn_stage(gpu, ids, &seqs, NULL, 0), GN_OK, "%s", p->name);
    reserve(gpu, gn_attention_train_workspace(gpu, T, heads, p->h.D, context));
    const char *why = ran(gpu, gn_attention_train(gpu, &made), p->name);
    if (!why)
        why = ran(gpu, gn_attention_bwd(gpu, &grad[DQ], &grad[DK], &grad[DV], &x[DY], &given),
                  p->name);
    bool intact = true;
    if (!why) {
        intact &= read_rows(gpu, r->y + (size_t)first * (size_t)width(p, false), &made.y);
        intact &= read_rows(gpu, r->lse + (size_t)first * (size_t)heads, &made.lse);
        for (int i = 0; i < GRADIENTS; i++)
            intact &= read_rows(
                gpu, r->grad[i] + (size_t)first * (size_t)width(p, is_kv_gradient(i)), &grad[i]);
    }
    if (!intact) why = "a gap between rows is written";
    if (!why && !guards_stand(&m)) why = "a guard is written";
    device_free(&m);
    free(ids);
    return why;
}

/* ---- tests ---- */

static void judge_all(verdict *v, const float *got, const bounded *expected, int rows, int cols) {
    for (int64_t i = 0; i < (int64_t)rows * cols; i++)
        judge(v, i / cols, i % cols, got[i], expected[i].value, expected[i].error);
}

static void judge_same(verdict *v, const float *got, const float *expected, int rows, int cols) {
    for (int64_t i = 0; i < (int64_t)rows * cols; i++)
        judge(v, i / cols, i % cols, got[i], expected[i], 0);
}

/* A verdict on one output, named before the problem. */
static verdict verdict_on(const problem *p, const char *what) {
    verdict v = {0};
    snprintf(v.name, sizeof v.name, "%s: %s", what, p->name);
    return v;
}

static const char *const gradient_names[GRADIENTS] = {"dq", "dk", "dv"};

static void check_problem(tally *t, problem *p) {
    results r = alloc_results(p);
    gn_ctx_for(p->sides->cpu, (int64_t)p->n * p->h.kv_heads, solve_item, p);
    const char *why = solve(p, 0, p->n, &r);
    verdict y = verdict_on(p, "y"), lse = verdict_on(p, "lse");
    if (!why) {
        judge_all(&y, r.y, p->y, p->T, width(p, false));
        judge_all(&lse, r.lse, p->forward_lse, p->T, p->h.heads);
    }
    settle(t, &y, why);
    settle(t, &lse, why);
    for (int i = 0; i < GRADIENTS; i++) {
        verdict v = verdict_on(p, gradient_names[i]);
        if (!why) judge_all(&v, r.grad[i], p->grad[i], p->T, width(p, is_kv_gradient(i)));
        settle(t, &v, why);
    }
    free_results(&r);
}

/* Every step-th problem, in brief fewer and of no more rows than `brief_rows`. */
static void check_all(sides s, int step, int brief_rows, const char *what) {
    tally t = {0};
    for (int i = 0; i < COUNT(shapes) * COUNT(batches); i += step) {
        problem p = make_problem(&s, shapes[i % COUNT(shapes)], batches[i / COUNT(shapes)],
                                 (uint64_t)(1 + i));
        if (!is_brief() || (p.T <= brief_rows && i % 8 == 0)) check_problem(&t, &p);
        free_problem(&p);
    }
    close_sides(&s);
    conclude(&t, what);
}

Test(gpu_attention_train, in_bfloat16) {
    check_all(open_sides(GN_BF16), 1, 300, "attention for training, bfloat16");
}

Test(gpu_attention_train, in_float32) {
    check_all(open_sides(GN_F32), 1, 80, "attention for training, float32");
}

Test(gpu_attention_train, with_little_shared_memory) {
    sides s = open_sides(GN_BF16);
    s.gpu->cuda->shared_limit = 99 << 10;
    check_all(s, 3, 300, "attention for training, little shared memory");
}

/* To the bit: run again, and every sequence alone. */
static void check_bits(gn_dtype compute, tally *t) {
    const int used[] = {1, 4, 0, 3, 5};
    const batch_shape whole = {7, {300, 1, 64, 700, 0, 129, 511}}, brief = {3, {70, 1, 140}};
    const batch_shape batch = is_brief() ? brief : whole;
    sides s = open_sides(compute);
    for (int i = 0; i < (is_brief() ? 2 : COUNT(used)); i++) {
        problem p = make_problem(&s, shapes[used[i]], batch, (uint64_t)(500 + i));
        gn_ctx_for(s.cpu, (int64_t)p.n * p.h.kv_heads, solve_item, &p);
        results first = alloc_results(&p), other = alloc_results(&p);
        const char *why = solve(&p, 0, p.n, &first);
        for (int alone = 0; alone < 2; alone++) {
            verdict v = verdict_on(&p, alone ? "alone" : "again");
            if (!why && !alone) why = solve(&p, 0, p.n, &other);
            for (int j = 0; j < p.n && alone && !why; j++)
                if (batch.rows[j] > 0) why = solve(&p, j, j + 1, &other);
            if (!why) {
                judge_same(&v, other.y, first.y, p.T, width(&p, false));
                judge_same(&v, other.lse, first.lse, p.T, p.h.heads);
                for (int j = 0; j < GRADIENTS; j++)
                    judge_same(&v, other.grad[j], first.grad[j], p.T, width(&p, is_kv_gradient(j)));
            }
            settle(t, &v, why);
        }
        free_results(&first);
        free_results(&other);
        free_problem(&p);
    }
    close_sides(&s);
}

Test(gpu_attention_train, a_sequence_does_not_depend_on_the_batch) {
    tally t = {0};
    check_bits(GN_BF16, &t);
    check_bits(GN_F32, &t);
    conclude(&t, "attention for training, sequences alone");
}
