/* gn_linear against a naive product in double precision, on every instruction set: weight
 * types x shapes x compute dtypes, then norms, LoRA terms, several parts and epilogues, then
 * that a row's bits depend on nothing but the row. */
#include "cases.h"

#include "kernels/backend.h"

static const struct type {
    gn_qtype qtype;
    bool double_quant;
    gn_dtype dtype;
} types[] = {
    {GN_Q_NF4, true, GN_BF16},  {GN_Q_NF4, false, GN_F32},      {GN_Q_NF4, true, GN_F16},
    {GN_Q_FP4, false, GN_BF16}, {GN_Q_FP4_E2M1, false, GN_F32}, {GN_Q_INT4, true, GN_BF16},
    {GN_Q_INT8, false, GN_F32}, {GN_Q_INT8, false, GN_BF16},    {GN_Q_INT8, false, GN_F16},
    {GN_Q_NONE, false, GN_F32}, {GN_Q_NONE, false, GN_BF16},    {GN_Q_NONE, false, GN_F16},
};

static const gn_dtype computes[] = {GN_F32, GN_BF16};
static const char *const isa_names[] = {"reference", "avx2", "avx512", "avx512bf16"};

/* ---- one call, and what it should give ---- */

enum { MAX_TERMS = 6, PAD = 3 /* floats between rows of y, which nothing may touch */ };

typedef struct {
    int T, K, N[GN_MAX_PARTS], n_parts;
    struct type type;
    bool norm;
    gn_epilogue epilogue;
    int n_terms; /* which rows and ranks: make_terms */
    gn_dtype lora_dtype;
} shape;

typedef struct {
    shape s;
    float *x, *w, *old_y[GN_MAX_PARTS];
    random_matrix m[GN_MAX_PARTS];
    gn_lora lora[MAX_TERMS];
    gn_lora_pair pairs[MAX_TERMS][GN_MAX_PARTS];
    gn_tensor norm;
} problem;

/* Overlapping, out of order, empty, one row, all rows; ranks around the vectors' sizes. */
static void make_terms(problem *p, int part, rng *r) {
    const int T = p->s.T;
    const int rows[MAX_TERMS][2] = {{0, T}, {T / 2, T - T / 2}, {T - 1, 1}, {T / 3, 0},
                                    {0, 1}, {T / 4, T / 2}};
    const int ranks[MAX_TERMS] = {16, 8, 1, 4, 17, 64};
    for (int i = 0; i < p->s.n_terms; i++) {
        const int rank = ranks[(i + part) % MAX_TERMS], N = p->s.N[part];
        p->lora[i] = (gn_lora){.row0 = rows[i][0], .rows = rows[i][1], .scale = 0.5f};
        p->pairs[i][part] = (gn_lora_pair){
            .rank = (i + part) % 5 == 4 ? 0 : rank, /* some parts have none */
            .scale = 1.0f + 2.0f * (float)i,
            .a = gn_tensor_2d(random_values(r, p->s.lora_dtype, (size_t)(rank * p->s.K)),
                              p->s.lora_dtype, rank, p->s.K),
            .b = gn_tensor_2d(random_values(r, p->s.lora_dtype, (size_t)(N * rank)),
                              p->s.lora_dtype, N, rank)};
    }
}

static problem make_problem(shape s, uint64_t seed) {
    rng r = {seed};
    problem p = {.s = s, .x = random_floats(&r, (size_t)(s.T * s.K))};
    if (s.norm) p.norm = gn_tensor_1d(random_floats(&r, (size_t)s.K), GN_F32, s.K);
    for (int i = 0; i < s.n_parts; i++) {
        p.m[i] = make_matrix(&r, s.type.qtype, s.type.double_quant, s.type.dtype, s.N[i], s.K);
        p.old_y[i] = random_floats(&r, (size_t)(s.T * s.N[i]));
        make_terms(&p, i, &r);
    }
    return p;
}

static void free_problem(problem *p) {
    free(p->x);
    free(p->norm.data);
    for (int i = 0; i < p->s.n_parts; i++) {
        free_matrix(&p->m[i]);
        free(p->old_y[i]);
        for (int j = 0; j < p->s.n_terms; j++) {
            free(p->pairs[j][i].a.data);
            free(p->pairs[j][i].b.data);
        }
    }
}

static int n_outputs(const shape *s) {
    return s->epilogue == GN_SWIGLU ? 1 : s->n_parts;
}

/* The terms, cut to rows [t0, t0+rows); returns how many are left. */
static int cut_terms(gn_lora lora[MAX_TERMS], const problem *p, int t0, int rows) {
    int n = 0;
    for (int j = 0; j < p->s.n_terms; j++) {
        gn_lora term = p->lora[j];
        const int from = term.row0 > t0 ? term.row0 : t0;
        const int last = term.row0 + term.rows, to = last < t0 + rows ? last : t0 + rows;
        term.row0 = from - t0;
        term.rows = to - from;
        term.pairs = p->pairs[j];
        if (term.rows > 0 || (term.rows == 0 && term.row0 <= rows)) lora[n++] = term;
    }
    return n;
}

/* Runs rows [t0, t0+rows) of the problem into y[i] of (rows, N_i), dense. */
static void solve(gn_ctx *ctx, const problem *p, int t0, int rows, float *y[GN_MAX_PARTS]) {
    const shape *s = &p->s;
    gn_linear_args args = {.x = gn_tensor_2d(p->x + (size_t)t0 * s->K, GN_F32, rows, s->K),
                           .norm = s->norm ? &p->norm : NULL,
                           .eps = 1e-5f,
                           .epilogue = s->epilogue,
                           .n_parts = s->n_parts};
    gn_lora lora[MAX_TERMS];
    args.lora = lora;
    args.n_lora = cut_terms(lora, p, t0, rows);
    guarded out[GN_MAX_PARTS];
    for (int i = 0; i < s->n_parts; i++) {
        const int N = s->N[i], ld = N + PAD;
        out[i] = guarded_alloc((size_t)(rows * ld));
        for (int t = 0; t < rows && s->epilogue == GN_ADD; t++)
            memcpy(out[i].data + t * ld, p->old_y[i] + (t0 + t) * N, (size_t)N * sizeof(float));
        args.part[i].y = gn_tensor_2d(out[i].data, GN_F32, rows, N);
        args.part[i].y.ld = ld;
        args.part[i].w = &p->m[i].m;
    }
    const int64_t max_n = s->N[0] + s->N[1] + s->N[2];
    const size_t workspace = gn_linear_workspace(ctx, rows, s->K, max_n, 64, MAX_TERMS);
    cr_assert_eq(gn_ctx_reserve(ctx, workspace), GN_OK);
    memset(ctx->workspace, 0xff, ctx->workspace_bytes); /* NaN: nothing may rely on what is there */
    cr_assert_eq(gn_linear(ctx, &args), GN_OK);
    for (int i = 0; i < s->n_parts; i++) {
        const int N = s->N[i], ld = N + PAD;
        guarded_check(&out[i], "y");
        if (i >= n_outputs(s)) {
            cr_assert(is_guard(out[i].data, out[i].n * sizeof(float)), "y of up is written");
        } else {
            for (int t = 0; t < rows; t++) {
                cr_assert(is_guard(out[i].data + t * ld + N, PAD * sizeof(float)), "gap in y");
                memcpy(y[i] + t * N, out[i].data + t * ld, (size_t)N * sizeof(float));
            }
        }
        guarded_free(&out[i]);
    }
}

/* A number and how far off float32 sums may be. */
typedef struct {
    double value, error;
} bounded;

static const double EPS = 0x1p-23;

/* Float32 sums of n products: a random walk of n roundings of numbers up to |a| |b|. */
static bounded dot(const float *a, const double *b, int n) {
    double sum = 0, aa = 0, bb = 0;
    for (int i = 0; i < n; i++) {
        sum += a[i] * b[i];
        aa += (double)a[i] * a[i];
        bb += b[i] * b[i];
    }
    return (bounded){sum, EPS * sqrt(n) * sqrt(aa * bb) + 0x1p-120};
}

static void round_floats(float *v, gn_dtype compute, int64_t n) {
    for (int64_t i = 0; i < n && compute == GN_BF16; i++)
        v[i] = gn_bf16_to_f32(gn_f32_to_bf16(v[i]));
}

/* x as products see it: gn_rmsnorm has tests of its own. */
static float *operands_of(gn_ctx *ctx, const problem *p) {
    const shape *s = &p->s;
    float *x = malloc((size_t)(s->T * s->K) * sizeof *x);
    memcpy(x, p->x, (size_t)(s->T * s->K) * sizeof *x);
    gn_tensor t = gn_tensor_2d(x, GN_F32, s->T, s->K);
    if (s->norm) cr_assert_eq(gn_rmsnorm(ctx, &t, &t, &p->norm, 1e-5f), GN_OK);
    round_floats(x, gn_ctx_compute(ctx), s->T * s->K);
    return x;
}

static bounded lora_product(const problem *p, int part, int t, int n, const double *x) {
    bounded sum = {0};
    for (int i = 0; i < p->s.n_terms; i++) {
        const gn_lora *term = &p->lora[i];
        const gn_lora_pair *pair = &p->pairs[i][part];
        if (t < term->row0 || t >= term->row0 + term->rows) continue;
        const int rank = pair->rank, K = p->s.K;
        const double scale = (double)term->scale * pair->scale;
        const size_t size = gn_dtype_size(pair->a.dtype);
        float *a = malloc((size_t)K * sizeof *a), b[64];
        double u[64];
        gn_widen(b, (const char *)pair->b.data + (size_t)(n * rank) * size, pair->b.dtype, rank);
        for (int j = 0; j < rank; j++) {
            gn_widen(a, (const char *)pair->a.data + (size_t)(j * K) * size, pair->a.dtype, K);
            const bounded d = dot(a, x, K);
            u[j] = d.value;
            sum.error += scale * fabs(b[j]) * d.error;
        }
        const bounded d = dot(b, u, rank);
        sum.value += scale * d.value;
        sum.error += scale * d.error;
        free(a);
    }
    return sum;
}

static bounded product(const problem *p, int part, int t, int n, const float *w, const double *x) {
    const bounded base = dot(w, x, p->s.K), lora = lora_product(p, part, t, n, x);
    const double value = base.value + lora.value;
    return (bounded){value, base.error + lora.error +
                                EPS * (fabs(base.value) + fabs(lora.value) + fabs(value))};
}

static bounded swiglu(bounded gate, bounded up) {
    const double s = gate.value / (1 + exp(-gate.value)), value = s * up.value;
    const double s_error = 1.1 * gate.error + 4 * EPS * fabs(s); /* |silu'| < 1.1; gn_silu */
    return (bounded){value, s_error * (fabs(up.value) + up.error) + fabs(s) * up.error +
                                EPS * fabs(value)};
}

/* By part: (T, N). */
static void expect(gn_ctx *ctx, const problem *p, bounded *y[GN_MAX_PARTS]) {
    const shape *s = &p->s;
    float *xf = operands_of(ctx, p), *w = malloc((size_t)s->K * sizeof *w);
    double *x = malloc((size_t)(s->T * s->K) * sizeof *x);
    for (int i = 0; i < s->T * s->K; i++) x[i] = xf[i];
    for (int part = 0; part < s->n_parts; part++)
        for (int n = 0; n < s->N[part]; n++) {
            gn_dequantize(w, &p->m[part].m, (int64_t)n * s->K, s->K);
            round_floats(w, gn_ctx_compute(ctx), s->K);
            for (int t = 0; t < s->T; t++) {
                bounded *out = &y[s->epilogue == GN_SWIGLU ? 0 : part][t * s->N[part] + n];
                const bounded d = product(p, part, t, n, w, x + t * s->K);
                if (s->epilogue == GN_ADD) {
                    const double old = p->old_y[part][t * s->N[part] + n];
                    *out = (bounded){old + d.value, d.error + EPS * fabs(old + d.value)};
                } else {
                    *out = s->epilogue == GN_SWIGLU && part == 1 ? swiglu(*out, d) : d;
                }
            }
        }
    free(xf);
    free(x);
    free(w);
}

static void check_problem(gn_ctx *ctx, const problem *p) {
    const shape *s = &p->s;
    float *y[GN_MAX_PARTS] = {0};
    bounded *expected[GN_MAX_PARTS] = {0};
    for (int i = 0; i < s->n_parts; i++) {
        y[i] = malloc((size_t)(s->T * s->N[i]) * sizeof(float));
        expected[i] = malloc((size_t)(s->T * s->N[i]) * sizeof(bounded));
    }
    solve(ctx, p, 0, s->T, y);
    expect(ctx, p, expected);
    for (int i = 0; i < n_outputs(s); i++)
        for (int j = 0; j < s->T * s->N[i]; j++) {
            const double off = fabs(y[i][j] - expected[i][j].value);
            cr_assert(off <= expected[i][j].error,
                      "%s, compute %s: %s%s as %s, T=%d K=%d N=%d, part %d row %d column %d: "
                      "%.9g, expected %.9g +- %.3g",
                      isa_names[gn_ctx_isa(ctx)], gn_dtype_name(gn_ctx_compute(ctx)),
                      gn_qtype_name(s->type.qtype), s->type.double_quant ? "+dq" : "",
                      gn_dtype_name(s->type.dtype), s->T, s->K, s->N[i], i, j / s->N[i],
                      j % s->N[i], y[i][j], expected[i][j].value, expected[i][j].error);
        }
    for (int i = 0; i < s->n_parts; i++) {
        free(y[i]);
        free(expected[i]);
    }
}

/* ---- tests ---- */

Test(linear, every_type_and_shape_matches_a_naive_product) {
    const int Ks[] = {1, 63, 64, 65, 352, 2048}, Ns[] = {1, 3, 17}, Ts[] = {1, 2, 5, 7, 33};
    const gn_isa best = best_isa();
    for (gn_isa isa = GN_ISA_REFERENCE; isa <= best; isa++)
        for (int c = 0; c < COUNT(computes); c++) {
            gn_ctx *ctx = open_ctx(isa, computes[c], 1);
            for (int type = 0; type < COUNT(types); type++)
                for (int i = 0; i < COUNT(Ks) * COUNT(Ns) * COUNT(Ts); i++) {
                    const shape s = {.T = Ts[i % COUNT(Ts)],
                                     .K = Ks[i / COUNT(Ts) % COUNT(Ks)],
                                     .N = {Ns[i / COUNT(Ts) / COUNT(Ks)]},
                                     .n_parts = 1,
                                     .type = types[type]};
                    problem p = make_problem(s, (uint64_t)(1 + i));
                    check_problem(ctx, &p);
                    free_problem(&p);
                }
            gn_ctx_close(ctx);
        }
}

static const shape compositions[] = {
    {.T = 1, .K = 128, .N = {40, 8, 8}, .n_parts = 3, .norm = true},
    {.T = 9, .K = 128, .N = {40, 8, 9}, .n_parts = 3, .norm = true, .n_terms = MAX_TERMS},
    {.T = 9, .K = 100, .N = {33, 5, 70}, .n_parts = 3, .norm = true, .n_terms = MAX_TERMS},
    {.T = 1, .K = 192, .N = {50, 50}, .n_parts = 2, .norm = true, .epilogue = GN_SWIGLU},
    {.T = 4, .K = 192, .N = {50, 50}, .n_parts = 2, .epilogue = GN_SWIGLU, .n_terms = 2},
    {.T = 13, .K = 192, .N = {50, 50}, .n_parts = 2, .epilogue = GN_SWIGLU, .n_terms = 4},
    {.T = 1, .K = 320, .N = {37}, .n_parts = 1, .epilogue = GN_ADD},
    {.T = 3, .K = 320, .N = {37}, .n_parts = 1, .epilogue = GN_ADD, .n_terms = 3},
    {.T = 33, .K = 320, .N = {37}, .n_parts = 1, .epilogue = GN_ADD, .n_terms = MAX_TERMS},
};

Test(linear, norms_parts_lora_and_epilogues_match_a_naive_product) {
    const gn_isa best = best_isa();
    for (gn_isa isa = GN_ISA_REFERENCE; isa <= best; isa++)
        for (int c = 0; c < COUNT(computes); c++) {
            gn_ctx *ctx = open_ctx(isa, computes[c], 2);
            for (int i = 0; i < COUNT(compositions) * COUNT(types); i++) {
                shape s = compositions[i % COUNT(compositions)];
                s.type = types[i / COUNT(compositions)];
                s.lora_dtype = i % 2 ? GN_BF16 : GN_F32;
                problem p = make_problem(s, (uint64_t)(1000 + i));
                check_problem(ctx, &p);
                free_problem(&p);
            }
            gn_ctx_close(ctx);
        }
}

static void check_same_bits(const problem *p, const float *a, const float *b, int rows, int part,
                            gn_ctx *ctx, const char *what) {
    const size_t n = (size_t)(rows * p->s.N[part]);
    cr_assert(memcmp(a, b, n * sizeof *a) == 0, "%s, compute %s, %s, T=%d K=%d, part %d: %s",
              isa_names[gn_ctx_isa(ctx)], gn_dtype_name(gn_ctx_compute(ctx)),
              gn_qtype_name(p->s.type.qtype), p->s.T, p->s.K, part, what);
}

/* Rows by themselves, in small batches and in one, on 1, 2 and 3 threads. */
static void check_independence(gn_isa isa, gn_dtype compute, const problem *p) {
    const shape *s = &p->s;
    float *whole[GN_MAX_PARTS] = {0}, *other[GN_MAX_PARTS] = {0};
    for (int i = 0; i < s->n_parts; i++) {
        whole[i] = malloc((size_t)(s->T * s->N[i]) * sizeof(float));
        other[i] = malloc((size_t)(s->T * s->N[i]) * sizeof(float));
    }
    for (int threads = 1; threads <= 3; threads++) {
        gn_ctx *ctx = open_ctx(isa, compute, threads);
        solve(ctx, p, 0, s->T, threads == 1 ? whole : other);
        for (int i = 0; i < n_outputs(s) && threads > 1; i++)
            check_same_bits(p, whole[i], other[i], s->T, i, ctx, "threads change the result");
        const int rows = threads == 1 ? 1 : threads == 2 ? 4 : 5;
        for (int t = 0; t < s->T; t += rows) {
            const int n = s->T - t < rows ? s->T - t : rows;
            solve(ctx, p, t, n, other);
            for (int i = 0; i < n_outputs(s); i++)
                check_same_bits(p, whole[i] + t * s->N[i], other[i], n, i, ctx,
                                "the batch changes a row's result");
        }
        gn_ctx_close(ctx);
    }
    for (int i = 0; i < s->n_parts; i++) {
        free(whole[i]);
        free(other[i]);
    }
}

Test(linear, a_row_depends_neither_on_the_batch_nor_on_threads) {
    const shape shapes[] = {
        {.T = 33, .K = 2048, .N = {70}, .n_parts = 1, .n_terms = MAX_TERMS},
        {.T = 14, .K = 704, .N = {129, 40, 41}, .n_parts = 3, .norm = true, .n_terms = 4},
        {.T = 11, .K = 353, .N = {300, 300}, .n_parts = 2, .epilogue = GN_SWIGLU, .n_terms = 2},
    };
    const gn_isa best = best_isa();
    for (gn_isa isa = GN_ISA_REFERENCE; isa <= best; isa++)
        for (int c = 0; c < COUNT(computes); c++)
            for (int i = 0; i < COUNT(shapes) * COUNT(types); i++) {
                shape s = shapes[i % COUNT(shapes)];
                s.type = types[i / COUNT(shapes)];
                s.lora_dtype = i % 2 ? GN_F32 : GN_BF16;
                problem p = make_problem(s, (uint64_t)(2000 + i));
                check_independence(isa, computes[c], &p);
                free_problem(&p);
            }
}

/* The most that gn_linear_workspace is told of, in a fresh context: many wide terms on all rows. */
Test(linear, the_workspace_asked_for_is_enough) {
    shape s = {.T = 40,
               .K = 64,
               .N = {5, 6, 7},
               .n_parts = 3,
               .norm = true,
               .n_terms = MAX_TERMS,
               .lora_dtype = GN_BF16};
    for (gn_isa isa = GN_ISA_REFERENCE; isa <= best_isa(); isa++)
        for (int c = 0; c < COUNT(computes); c++)
            for (int type = 0; type < COUNT(types); type++) {
                gn_ctx *ctx = open_ctx(isa, computes[c], 1);
                s.type = types[type];
                problem p = make_problem(s, 77);
                for (int i = 0; i < MAX_TERMS; i++) {
                    p.lora[i].row0 = 0;
                    p.lora[i].rows = s.T;
                }
                check_problem(ctx, &p);
                free_problem(&p);
                gn_ctx_close(ctx);
            }
}

Test(linear, too_little_working_memory_is_refused) {
    const shape s = {.T = 2, .K = 64, .N = {3}, .n_parts = 1, .type = types[0]};
    problem p = make_problem(s, 1);
    for (gn_isa isa = GN_ISA_REFERENCE; isa <= best_isa(); isa++) {
        gn_ctx *ctx = open_ctx(isa, GN_F32, 1);
        float y[6];
        const gn_linear_args args = {.x = gn_tensor_2d(p.x, GN_F32, 2, 64),
                                     .n_parts = 1,
                                     .part[0] = {gn_tensor_2d(y, GN_F32, 2, 3), &p.m[0].m}};
        cr_assert_eq(gn_linear(ctx, &args), GN_ENOMEM);
        gn_ctx_close(ctx);
    }
    free_problem(&p);
}
