/* The kernels of gn_cuda_lora and of its wider operands, emulated, against sums in double. */
#include "kernels/cuda/linear.h"

#include "tests/gpu/device.h"

enum { TERMS = 48, PARTS = 3 };

typedef struct {
    int row0, rows, rank;
} term_shape;

typedef struct {
    const char *name;
    int sms, T, K, N[PARTS], n_parts;
    gn_dtype dtype; /* of A and B, */
    int shift, pad; /* as device_rows has them */
    int n_terms;
    term_shape terms[TERMS];
} shape;

/* A call, with everything on the device. */
typedef struct {
    shape s;
    gn_ctx *ctx;
    device_memory memory;
    float *x;                                 /* (T, K) */
    float *a[TERMS][PARTS], *b[TERMS][PARTS]; /* as kernels see them: in bfloat16 */
    gn_matrix w[PARTS];
    gn_lora_pair pairs[TERMS][PARTS];
    gn_lora terms[TERMS];
    gn_tensor x_rows;
    gn_linear_args args;
} call;

static float *open_rows(call *c, rng *r, gn_tensor *t, int64_t rows, int64_t cols, float scale) {
    float *v = random_floats(r, (size_t)(rows * cols));
    for (int64_t i = 0; i < rows * cols; i++) v[i] *= scale;
    *t = device_rows(&c->memory, v, c->s.dtype, rows, cols, c->s.pad, c->s.shift);
    round_floats(v, GN_BF16, rows * cols);
    return v;
}

static void open_call(call *c, const shape *s) {
    rng r = {(uint64_t)(s->T + s->K)};
    *c = (call){.s = *s, .ctx = open_on("cuda", GN_BF16)};
    c->ctx->cuda->sms = s->sms;
    c->memory.ctx = c->ctx;
    c->args = (gn_linear_args){.n_parts = s->n_parts, .lora = c->terms, .n_lora = s->n_terms};
    for (int p = 0; p < s->n_parts; p++) {
        c->w[p] = (gn_matrix){.rows = s->N[p], .cols = s->K};
        c->args.part[p].w = &c->w[p];
    }
    for (int i = 0; i < s->n_terms; i++) {
        const term_shape *t = &s->terms[i];
        c->terms[i] = (gn_lora){.row0 = t->row0,
                                .rows = t->rows,
                                .scale = i % 2 ? -0.5f : 0.7f,
                                .pairs = c->pairs[i],
                                .placed = c->pairs[i]};
        for (int p = 0; p < s->n_parts; p++) {
            gn_lora_pair *pair = &c->pairs[i][p];
            if ((i + p) % 5 == 4) continue; /* a part that the term has nothing for */
            *pair = (gn_lora_pair){.rank = t->rank, .scale = 0.5f + 0.1f * (float)i / TERMS};
            c->a[i][p] = open_rows(c, &r, &pair->a, t->rank, s->K, 1 / sqrtf((float)s->K));
            c->b[i][p] = open_rows(c, &r, &pair->b, s->N[p], t->rank, 1 / sqrtf((float)t->rank));
        }
    }
    c->x = random_floats(&r, (size_t)(s->T * s->K));
    round_floats(c->x, GN_BF16, (int64_t)s->T * s->K);
}

static void close_call(call *c) {
    device_free(&c->memory);
    for (int i = 0; i < TERMS; i++)
        for (int p = 0; p < PARTS; p++) {
            free(c->a[i][p]);
            free(c->b[i][p]);
        }
    free(c->x);
    gn_ctx_close(c->ctx);
}

/* Hands x over, rows `ld` apart, and the terms. */
static void stage_call(call *c, int64_t ld) {
    c->x_rows = device_rows(&c->memory, c->x, GN_BF16, c->s.T, c->s.K, ld - c->s.K, 0);
    c->args.x = c->x_rows;
    cr_assert_eq(stage_rows(c->ctx, c->s.T, c->terms, c->s.n_terms), GN_OK);
}

static int most_rank(const call *c) {
    int most = 0;
    for (int i = 0; i < c->s.n_terms; i++)
        most = c->s.terms[i].rank > most ? c->s.terms[i].rank : most;
    return most;
}

static void *scratch_of(call *c) {
    const int terms = gn_cuda_lora_terms_a_row(&c->args);
    const size_t bytes = gn_cuda_lora_bytes(c->ctx, c->s.T, most_rank(c), terms);
    return device_alloc(&c->memory, NULL, bytes, 0);
}

/* ---- the reference ---- */

typedef struct {
    double value, bound;
} sum;

/* h of a rank of a term for row t: rounded to bfloat16 once, after a float32 sum. */
static sum shrunk(const call *c, int term, int part, int t, int rank) {
    sum h = {0};
    double absolute = 0;
    const int K = c->s.K;
    for (int k = 0; k < K; k++) {
        const double product = (double)c->a[term][part][rank * K + k] * c->x[t * K + k];
        h.value += product;
        absolute += fabs(product);
    }
    h.bound = U16 * fabs(h.value) + (4 * sqrt(K) + 4) * U32 * absolute;
    return h;
}

/* expected (T, N of the part) += all terms; sums in float32 of as many products as ranks. */
static void add_terms(const call *c, int part, sum *expected) {
    const int N = c->s.N[part];
    for (int i = 0; i < c->s.n_terms; i++) {
        const int rank = c->pairs[i][part].rank;
        const double scale = c->terms[i].scale * (double)c->pairs[i][part].scale;
        for (int t = c->terms[i].row0; t < c->terms[i].row0 + c->terms[i].rows; t++)
            for (int r = 0; r < rank; r++) {
                const sum h = shrunk(c, i, part, t, r);
                for (int n = 0; n < N; n++) {
                    const double b = scale * c->b[i][part][n * rank + r];
                    sum *to = &expected[t * N + n];
                    to->value += b * h.value;
                    to->bound += fabs(b) * (h.bound + (4 * sqrt(rank) + 4) * U32 * fabs(h.value));
                }
            }
    }
}

static void judge_part(const call *c, verdict *v, int part, const float *got, int64_t ld) {
    const int N = c->s.N[part], T = c->s.T;
    sum *expected = calloc((size_t)(T * N), sizeof *expected);
    add_terms(c, part, expected);
    for (int t = 0; t < T; t++)
        for (int n = 0; n < N; n++)
            judge(v, t, n, got[t * ld + n], expected[t * N + n].value, expected[t * N + n].bound);
    free(expected);
}

/* ---- both ways ---- */

static const shape beside[] = {
    {"a row each",
     2,
     20,
     256,
     {136, 40},
     2,
     GN_BF16,
     0,
     0,
     16,
     {{1, 1, 8},
      {2, 1, 16},
      {3, 1, 64},
      {4, 1, 40},
      {6, 1, 8},
      {7, 1, 16},
      {8, 1, 64},
      {9, 1, 40},
      {11, 1, 8},
      {12, 1, 16},
      {13, 1, 64},
      {14, 1, 40},
      {16, 1, 8},
      {17, 1, 16},
      {18, 1, 64},
      {19, 1, 40}}},
    {"pieces of K",
     60,
     9,
     512,
     {136, 40, 24},
     3,
     GN_BF16,
     0,
     0,
     3,
     {{0, 4, 16}, {2, 6, 33}, {8, 1, 8}}},
    {"rows apart", 20, 20, 256, {136}, 1, GN_BF16, 0, 8, 2, {{0, 17, 16}, {18, 2, 64}}},
    {"not aligned", 20, 20, 256, {136}, 1, GN_BF16, 1, 0, 2, {{0, 17, 16}, {18, 2, 64}}},
    {"float32, a blend",
     20,
     19,
     256,
     {70, 70},
     2,
     GN_F32,
     0,
     0,
     5,
     {{0, 19, 33}, {3, 9, 100}, {18, 1, 3}, {4, 1, 8}, {0, 10, 17}}},
    {"odd sizes",
     20,
     37,
     100,
     {33, 5, 70},
     3,
     GN_BF16,
     0,
     0,
     4,
     {{0, 37, 100}, {9, 18, 17}, {36, 1, 3}, {0, 19, 33}}},
    {"32 rows a block",
     1,
     64,
     64,
     {140, 20},
     2,
     GN_BF16,
     0,
     0,
     3,
     {{0, 40, 100}, {30, 30, 16}, {63, 1, 16}}},
};

/* More steps than are listed at once, and, in blocks of 32 rows, than h has room for. */
static shape many_steps(bool tall) {
    shape s = {"many steps", 9, 20, 64, {24}, 1, GN_BF16, 0, 0, 41, {{0}}};
    for (int i = 0; i < 40; i++) s.terms[i] = (term_shape){0, 9, 120};
    s.terms[40] = (term_shape){3, 17, 5};
    if (!tall) return s;
    s.name = "many steps, 32 rows a block";
    s.sms = 1, s.T = 64, s.N[0] = 140, s.n_terms = 21;
    for (int i = 0; i < 20; i++) s.terms[i] = (term_shape){i, 40, 100};
    s.terms[20] = (term_shape){60, 4, 7};
    return s;
}

static void test_beside(tally *tally, const shape *s) {
    call c;
    verdict v = {0};
    snprintf(v.name, sizeof v.name, "%s", s->name);
    open_call(&c, s);
    stage_call(&c, s->K);
    int64_t columns = 0;
    for (int p = 0; p < s->n_parts; p++) columns += s->N[p];
    const gn_tensor out = device_rows(&c.memory, NULL, GN_F32, s->T, columns, 0, 0);
    void *scratch = scratch_of(&c);
    const char *why =
        ran(c.ctx, gn_cuda_lora(c.ctx, &c.args, c.x_rows.data, s->K, scratch, out.data), v.name);
    const float *at = out.data;
    for (int p = 0; p < s->n_parts; at += s->N[p++]) judge_part(&c, &v, p, at, columns);
    settle(tally, &v, guards_stand(&c.memory) ? why : "a guard is written");
    close_call(&c);
}

static const shape wider[] = {
    {"pieces", 132, 260, 1024, {24}, 1, GN_BF16, 0, 0, 2, {{3, 250, 70}, {100, 160, 64}}},
    {"more rows than a chunk",
     8,
     300,
     256,
     {40, 24},
     2,
     GN_BF16,
     0,
     0,
     3,
     {{0, 280, 64}, {281, 1, 16}, {283, 10, 7}}},
    {"odd, float32", 30, 270, 104, {40, 33}, 2, GN_F32, 0, 0, 2, {{0, 200, 65}, {150, 120, 16}}},
    {"not aligned", 30, 270, 200, {40}, 1, GN_BF16, 1, 0, 2, {{0, 200, 65}, {150, 120, 16}}},
    {"one term", 30, 270, 200, {40, 24, 33}, 3, GN_BF16, 0, 0, 1, {{7, 250, 64}}},
    {"one term, float32", 30, 270, 104, {40}, 1, GN_F32, 0, 0, 1, {{0, 270, 16}}},
    {"one term of few ranks", 30, 270, 104, {40, 24}, 2, GN_BF16, 0, 0, 1, {{0, 270, 8}}},
};

/* The product of what extend wrote: of columns from K on. */
static void multiply_extension(const call *c, int part, float *out, const gn_tensor *x,
                               const gn_tensor *w) {
    const int64_t N = c->s.N[part], K = c->s.K, ld = x->ld;
    float *xs = malloc((size_t)ld * sizeof *xs), *ws = malloc((size_t)(N * ld) * sizeof *ws);
    gn_widen(ws, w->data, GN_BF16, N * ld);
    for (int64_t t = 0; t < c->s.T; t++) {
        gn_widen(xs, (const uint16_t *)x->data + t * ld, GN_BF16, ld);
        for (int64_t n = 0; n < N; n++) {
            double total = 0;
            for (int64_t k = K; k < ld; k++) total += (double)xs[k] * ws[n * ld + k];
            out[t * N + n] = (float)total;
        }
    }
    free(xs);
    free(ws);
}

static void test_wider(tally *tally, const shape *s) {
    call c;
    verdict v = {0};
    snprintf(v.name, sizeof v.name, "wider: %s", s->name);
    open_call(&c, s);
    c.args.x = gn_tensor_2d(NULL, GN_BF16, s->T, s->K);
    const int64_t ld = gn_cuda_lora_extended(&c.args);
    stage_call(&c, ld);
    void *scratch = scratch_of(&c);
    const char *why =
        ran(c.ctx, gn_cuda_lora_shrink(c.ctx, &c.args, 0, s->n_parts, c.x_rows.data, ld, scratch),
            v.name);
    for (int p = 0; p < s->n_parts && !why; p++) {
        const gn_tensor w = device_rows(&c.memory, NULL, GN_BF16, s->N[p], ld, 0, 0);
        float *got = malloc((size_t)(s->T * s->N[p]) * sizeof *got);
        why = ran(c.ctx,
                  gn_cuda_lora_extend(c.ctx, &c.args, p, scratch, c.x_rows.data, ld, w.data, 0,
                                      s->N[p], ld),
                  v.name);
        multiply_extension(&c, p, got, &c.x_rows, &w);
        judge_part(&c, &v, p, got, s->N[p]);
        free(got);
    }
    settle(tally, &v, guards_stand(&c.memory) ? why : "a guard is written");
    close_call(&c);
}

Test(emulated_lora, adds_up_beside_the_product, .timeout = 300) {
    tally tally = {0};
    for (int i = 0; i < COUNT(beside); i++) test_beside(&tally, &beside[i]);
    for (int tall = 0; tall < 2; tall++) {
        const shape s = many_steps(tall);
        test_beside(&tally, &s);
    }
    conclude(&tally, "LoRA beside the product");
}

Test(emulated_lora, makes_operands_wider, .timeout = 300) {
    tally tally = {0};
    for (int i = 0; i < COUNT(wider); i++) test_wider(&tally, &wider[i]);
    conclude(&tally, "LoRA within the product");
}
