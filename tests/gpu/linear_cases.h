/* linear_cases.h - calls of gn_linear on a GPU and on the CPU: random weights, adapters and rows,
 * and how far apart the two results may be. */
#ifndef GN_TEST_LINEAR_CASES_H
#define GN_TEST_LINEAR_CASES_H

#include "device.h"

typedef struct {
    gn_qtype qtype;
    bool double_quant;
    gn_dtype dtype;
} weight_type;

static const weight_type types[] = {
    {GN_Q_NF4, true, GN_BF16},      {GN_Q_NF4, false, GN_BF16},      {GN_Q_NF4, true, GN_F16},
    {GN_Q_NF4, false, GN_F32},      {GN_Q_FP4, true, GN_BF16},       {GN_Q_FP4, false, GN_F16},
    {GN_Q_FP4_E2M1, true, GN_F32},  {GN_Q_FP4_E2M1, false, GN_BF16}, {GN_Q_FP4_E3M0, true, GN_BF16},
    {GN_Q_FP4_E3M0, false, GN_F32}, {GN_Q_INT4, true, GN_F16},       {GN_Q_INT4, false, GN_BF16},
    {GN_Q_INT8, false, GN_BF16},    {GN_Q_INT8, false, GN_F32},      {GN_Q_INT8, false, GN_F16},
    {GN_Q_NONE, false, GN_BF16},    {GN_Q_NONE, false, GN_F32},      {GN_Q_NONE, false, GN_F16},
};

/* ---- weights, and what bounds need to know of them ---- */

typedef struct {
    int K, N[GN_MAX_PARTS], n_parts;
} weight_shape;

typedef struct {
    weight_shape s;
    weight_type type;
    random_matrix host[GN_MAX_PARTS];
    gn_matrix placed[GN_MAX_PARTS];
    norms *rows[GN_MAX_PARTS];
    device_memory memory;
} weights;

struct row_norms {
    const gn_matrix *m;
    norms *out;
};

static void weight_row_norms(void *arg, int64_t row) {
    const struct row_norms *job = arg;
    float *w = malloc((size_t)job->m->cols * sizeof *w);
    gn_dequantize(w, job->m, row * job->m->cols, job->m->cols);
    job->out[row] = norms_of(w, job->m->cols);
    free(w);
}

static weights make_weights(const sides *s, weight_shape shape, weight_type type, uint64_t seed) {
    rng r = {seed};
    weights w = {.s = shape, .type = type, .memory = {.ctx = s->gpu}};
    for (int i = 0; i < shape.n_parts; i++) {
        w.host[i] = make_matrix(&r, type.qtype, type.double_quant, type.dtype, shape.N[i], shape.K);
        w.placed[i] = device_matrix(&w.memory, &w.host[i].m);
        w.rows[i] = malloc((size_t)shape.N[i] * sizeof *w.rows[i]);
        gn_ctx_for(s->cpu, shape.N[i], weight_row_norms,
                   &(struct row_norms){&w.host[i].m, w.rows[i]});
    }
    return w;
}

static void free_weights(weights *w) {
    for (int i = 0; i < w->s.n_parts; i++) {
        free_matrix(&w->host[i]);
        free(w->rows[i]);
    }
    device_free(&w->memory);
}

/* ---- adapters ---- */

/* Which rows a batch's terms cover, and their ranks. */
typedef enum {
    NO_LORA,
    ONE_ADAPTER,
    WIDE_ADAPTER,
    ODD_RANKS,  /* 100, 17, 3 and 33; some on the same rows */
    SPLIT_ROWS, /* ranks 1 to 64 side by side, out of order; the last rows have none */
    BLEND,      /* several on a row, one on no row at all */
    SIXTEEN,    /* adapters, side by side */
    MANY,       /* up to 64, of which every fourth run of rows has none; ranks 1 to 128 */
    PILE,       /* up to 4 on a row, ranks odd and even, runs of rows that overlap */
    LAYOUTS,
} layout;

static const char *const layout_names[] = {"no LoRA", "r16",         "r64",  "odd ranks", "split",
                                           "blend",   "16 adapters", "many", "pile"};

enum { MAX_TERMS = 64, FIRST_PAIR = 2 /* pairs before it belong to other products */ };

typedef struct {
    int row0, rows, rank;
} term_shape;

static int many_terms(term_shape out[MAX_TERMS], int T) {
    static const int ranks[] = {16, 1, 64, 8, 128};
    const int runs = T < MAX_TERMS ? T : MAX_TERMS;
    int n = 0;
    for (int i = 0; i < runs; i++) {
        const int from = i * T / runs;
        if (i % 4 < 3) out[n] = (term_shape){from, (i + 1) * T / runs - from, ranks[n % 5]}, n++;
    }
    return n;
}

static int pile_of_terms(term_shape out[MAX_TERMS], int T) {
    static const int ranks[] = {33, 16, 128, 1, 8, 64, 3, 100};
    int n = 0;
    for (int i = 0; i < 8; i++) {
        const int from = i * T / 8, rows = T / 4 + 1;
        if (i == 5) out[n++] = (term_shape){0, T, 16};
        out[n++] = (term_shape){from, from + rows < T ? rows : T - from, ranks[i]};
    }
    return n;
}

static int terms_of(term_shape out[MAX_TERMS], layout l, int T) {
    const term_shape one = {0, T, 16}, wide = {0, T, 64};
    const term_shape odd[] = {{0, T, 100}, {T / 4, T / 2, 17}, {T - 1, 1, 3}, {0, (T + 1) / 2, 33}};
    const term_shape blend[] = {
        {0, T, 16}, {T / 2, T - T / 2, 8}, {T - 1, 1, 64}, {T / 3, 0, 8}, {0, 1, 4}};
    const int ranks[] = {64, 1, 16, 4, 8};
    switch (l) {
    case ONE_ADAPTER: out[0] = one; return 1;
    case WIDE_ADAPTER: out[0] = wide; return 1;
    case ODD_RANKS: memcpy(out, odd, sizeof odd); return COUNT(odd);
    case BLEND: memcpy(out, blend, sizeof blend); return COUNT(blend);
    case SPLIT_ROWS:
        for (int i = 0, from = 5; i < 5; i++, from--)
            out[i] = (term_shape){from * T / 6, (from + 1) * T / 6 - from * T / 6, ranks[i]};
        return 5;
    case SIXTEEN:
        for (int i = 0; i < 16; i++)
            out[i] = (term_shape){i * T / 16, (i + 1) * T / 16 - i * T / 16, ranks[i % 4]};
        return 16;
    case MANY: return many_terms(out, T);
    case PILE: return pile_of_terms(out, T);
    default: return 0;
    }
}

typedef struct {
    int n;
    char *values; /* of every A and B */
    size_t bytes;
    gn_lora_pair pairs[MAX_TERMS][FIRST_PAIR + GN_MAX_PARTS];
    gn_lora terms[MAX_TERMS];
} adapters;

static size_t add_values(adapters *a, rng *r, gn_dtype dtype, size_t n, gn_tensor *out,
                         int64_t rows, int64_t cols) {
    const size_t size = gn_dtype_size(dtype), at = (a->bytes + 15) / 16 * 16;
    if (a->values) {
        void *v = random_values(r, dtype, n);
        memcpy(a->values + at, v, n * size);
        free(v);
    }
    *out = gn_tensor_2d(a->values + at, dtype, rows, cols);
    a->bytes = at + n * size;
    return at;
}

/* Once to count, once to fill. */
static void lay_out_adapters(adapters *a, const weight_shape *s, layout l, int T, gn_dtype dtype,
                             uint64_t seed) {
    rng r = {seed};
    term_shape shapes[MAX_TERMS];
    a->n = terms_of(shapes, l, T);
    a->bytes = 0;
    for (int i = 0; i < a->n; i++) {
        a->terms[i] = (gn_lora){.row0 = shapes[i].row0,
                                .rows = shapes[i].rows,
                                .scale = i % 3 == 1 ? -0.5f : 0.25f,
                                .pairs = a->pairs[i]};
        for (int part = 0; part < s->n_parts; part++) {
            gn_lora_pair *pair = &a->pairs[i][FIRST_PAIR + part];
            const int rank = shapes[i].rank;
            if ((i + part) % 5 == 4) continue; /* this projection is not adapted */
            pair->rank = rank;
            pair->scale = 0.5f + 0.25f * (float)(i % 16);
            add_values(a, &r, dtype, (size_t)(rank * s->K), &pair->a, rank, s->K);
            add_values(a, &r, dtype, (size_t)(s->N[part] * rank), &pair->b, s->N[part], rank);
        }
    }
}

static adapters *make_adapters(const weight_shape *s, layout l, int T, gn_dtype dtype,
                               uint64_t seed) {
    adapters *a = calloc(1, sizeof *a);
    lay_out_adapters(a, s, l, T, dtype, seed);
    a->values = malloc(a->bytes + 1);
    lay_out_adapters(a, s, l, T, dtype, seed);
    return a;
}

/* The same where the GPU can read it; free() what it returns. */
static adapters *place_adapters(device_memory *m, const adapters *host) {
    adapters *a = malloc(sizeof *a);
    *a = *host;
    char *values = device_alloc(m, host->values, host->bytes, 0);
    for (int i = 0; i < a->n; i++)
        for (int j = 0; j < FIRST_PAIR + GN_MAX_PARTS; j++) {
            gn_lora_pair *pair = &a->pairs[i][j];
            if (pair->rank == 0) continue;
            pair->a.data = values + ((char *)pair->a.data - host->values);
            pair->b.data = values + ((char *)pair->b.data - host->values);
        }
    gn_lora_pair *placed = device_alloc(m, a->pairs, sizeof a->pairs, 0);
    for (int i = 0; i < a->n; i++) {
        a->terms[i].pairs = a->pairs[i];
        a->terms[i].placed = placed + i * COUNT(a->pairs[0]);
    }
    return a;
}

static void free_adapters(adapters *a) {
    free(a->values);
    free(a);
}

/* ---- a call ---- */

typedef struct {
    int T;
    bool norm, act_x; /* act_x: x is an activation, though there is a norm */
    bool f32_out;     /* like logits, with GN_STORE */
    gn_epilogue epilogue;
    layout lora;
    gn_dtype lora_dtype;
    int pad, shift; /* elements between rows of x and y, and by which they are out of line */
    gn_dropout dropout;
    int spare; /* columns of x's rows past K, in bfloat16 */
} call;

typedef struct {
    const sides *sides;
    const weights *w;
    call c;
    float *x, *norm, *old_y[GN_MAX_PARTS];
    adapters *adapters;
    char name[256];
} problem;

static const float EPS_NORM = 1e-5f;

static gn_dtype output_dtype(const problem *p) {
    const bool f32 = p->c.f32_out || p->c.epilogue == GN_ADD;
    return f32 ? GN_F32 : gn_ctx_activation(p->sides->gpu);
}

static int n_outputs(const problem *p) {
    return p->c.epilogue == GN_SWIGLU ? 1 : p->w->s.n_parts;
}

static void name_problem(problem *p) {
    static const char *const epilogues[] = {"store", "add", "swiglu"};
    const weight_shape *s = &p->w->s;
    snprintf(p->name, sizeof p->name,
             "%s %s%s/%s K=%d N=%d,%d,%d T=%d%s%s %s%s, %s %s, pad %d shift %d, dropout %g, "
             "spare %d",
             gn_dtype_name(p->sides->compute), gn_qtype_name(p->w->type.qtype),
             p->w->type.double_quant ? "+dq" : "", gn_dtype_name(p->w->type.dtype), s->K, s->N[0],
             s->N[1], s->N[2], p->c.T, p->c.norm ? " norm" : "",
             p->c.act_x ? " of activations" : "", epilogues[p->c.epilogue],
             p->c.f32_out ? " f32" : "", layout_names[p->c.lora], gn_dtype_name(p->c.lora_dtype),
             p->c.pad, p->c.shift, (double)p->c.dropout.p, p->c.spare);
}

static gn_dtype x_dtype(const problem *p) {
    return p->c.norm && !p->c.act_x ? GN_F32 : gn_ctx_activation(p->sides->gpu);
}

static problem make_problem(const sides *sides, const weights *w, call c, uint64_t seed) {
    rng r = {seed};
    problem p = {.sides = sides, .w = w, .c = c};
    p.x = random_floats(&r, (size_t)c.T * (size_t)w->s.K);
    if (c.norm) p.norm = random_floats(&r, (size_t)w->s.K);
    round_floats(p.x, x_dtype(&p), (int64_t)c.T * w->s.K);
    for (int i = 0; i < w->s.n_parts && c.epilogue == GN_ADD; i++)
        p.old_y[i] = random_floats(&r, (size_t)c.T * (size_t)w->s.N[i]);
    p.adapters = make_adapters(&w->s, c.lora, c.T, c.lora_dtype, seed + 1);
    name_problem(&p);
    return p;
}

static void free_problem(problem *p) {
    free(p->x);
    free(p->norm);
    for (int i = 0; i < GN_MAX_PARTS; i++) free(p->old_y[i]);
    free_adapters(p->adapters);
}

static int max_rank(const adapters *a) {
    int most = 1;
    for (int i = 0; i < a->n; i++)
        for (int j = 0; j < COUNT(a->pairs[0]); j++)
            if (a->pairs[i][j].rank > most) most = a->pairs[i][j].rank;
    return most;
}

/* On one row, at most. */
static int max_terms(const adapters *a, int T) {
    int most = 1;
    for (int t = 0; t < T; t++) {
        int n = 0;
        for (int i = 0; i < a->n; i++)
            n += t >= a->terms[i].row0 && t < a->terms[i].row0 + a->terms[i].rows;
        if (n > most) most = n;
    }
    return most;
}

static size_t workspace_of(gn_ctx *ctx, const problem *p, int rows) {
    const weight_shape *s = &p->w->s;
    const int N = s->N[0] + s->N[1] + s->N[2], rank = max_rank(p->adapters);
    if (p->c.dropout.p > 0) return gn_linear_bwd_workspace(ctx, rows, s->K, N, rank);
    return gn_linear_workspace(ctx, rows, s->K, N, rank, max_terms(p->adapters, p->c.T));
}

/* The terms, cut to rows [t0, t0+rows). */
static int cut_terms(gn_lora out[MAX_TERMS], const adapters *a, int t0, int rows) {
    for (int i = 0; i < a->n; i++) {
        out[i] = a->terms[i];
        const int end = out[i].row0 + out[i].rows;
        const int from = out[i].row0 > t0 ? out[i].row0 : t0;
        const int to = end < t0 + rows ? end : t0 + rows;
        out[i].row0 = from < to ? from - t0 : 0;
        out[i].rows = from < to ? to - from : 0;
    }
    return a->n;
}

/* A call of rows [t0, t0+rows) with everything on the GPU. */
typedef struct {
    device_memory memory;
    adapters *adapters;
    gn_lora terms[MAX_TERMS];
    gn_tensor norm;
    gn_linear_args args;
} placed_call;

static placed_call *place_call(const problem *p, int t0, int rows) {
    const weight_shape *s = &p->w->s;
    const call *c = &p->c;
    gn_ctx *gpu = p->sides->gpu;
    placed_call *call = calloc(1, sizeof *call);
    device_memory *m = &call->memory;
    m->ctx = gpu;
    call->adapters = place_adapters(m, p->adapters);
    const int n_terms = cut_terms(call->terms, call->adapters, t0, rows);
    call->args = (gn_linear_args){.x = device_rows(m, p->x + (size_t)t0 * (size_t)s->K, x_dtype(p),
                                                   rows, s->K, c->pad + c->spare, c->shift),
                                  .x_spare = c->spare,
                                  .eps = EPS_NORM,
                                  .epilogue = c->epilogue,
                                  .lora = n_terms ? call->terms : NULL,
                                  .n_lora = n_terms,
                                  .pair = FIRST_PAIR,
                                  .dropout = c->dropout,
                                  .n_parts = s->n_parts};
    if (c->norm) {
        call->norm =
            gn_tensor_1d(device_alloc(m, p->norm, (size_t)s->K * sizeof(float), 0), GN_F32, s->K);
        call->args.norm = &call->norm;
    }
    for (int i = 0; i < s->n_parts; i++) {
        const float *old = p->old_y[i] ? p->old_y[i] + (size_t)t0 * (size_t)s->N[i] : NULL;
        call->args.part[i].w = &p->w->placed[i];
        if (i < n_outputs(p))
            call->args.part[i].y =
                device_rows(m, old, output_dtype(p), rows, s->N[i], c->pad, c->shift);
    }
    return call;
}

/* y[i], dense floats. NULL, or what went wrong. */
static const char *read_call(const problem *p, const placed_call *call, float *y[GN_MAX_PARTS]) {
    for (int i = 0; i < n_outputs(p); i++)
        if (!read_rows(p->sides->gpu, y[i], &call->args.part[i].y))
            return "a gap between rows of y is written";
    return guards_stand(&call->memory) ? NULL : "a guard is written";
}

static void free_call(placed_call *call) {
    device_free(&call->memory);
    free(call->adapters);
    free(call);
}

/* Rows [t0, t0+rows) on the GPU into y[i], dense floats. NULL, or what went wrong. */
static const char *solve(const problem *p, int t0, int rows, float *y[GN_MAX_PARTS]) {
    gn_ctx *gpu = p->sides->gpu;
    placed_call *call = place_call(p, t0, rows);
    cr_assert_eq(stage_rows(gpu, rows, call->terms, call->args.n_lora), GN_OK, "%s", p->name);
    reserve(gpu, workspace_of(gpu, p, rows));
    const char *why = ran(gpu, gn_linear(gpu, &call->args), p->name);
    if (!why) why = read_call(p, call, y);
    free_call(call);
    return why;
}

/* ---- what it should give, and how far off it may be ---- */

/* x as products see it. */
static float *operands_of(const problem *p) {
    const int64_t T = p->c.T, K = p->w->s.K;
    float *x = malloc((size_t)(T * K) * sizeof *x);
    memcpy(x, p->x, (size_t)(T * K) * sizeof *x);
    gn_tensor t = gn_tensor_2d(x, GN_F32, T, K);
    const gn_tensor norm = gn_tensor_1d(p->norm, GN_F32, K);
    if (p->norm) cr_assert_eq(gn_rmsnorm(p->sides->cpu, &t, &t, &norm, EPS_NORM), GN_OK);
    round_floats(x, p->sides->compute, T * K);
    return x;
}

/* Every part's product with its LoRA terms, (T, N_i), as the CPU computes it. */
static void products_of(const problem *p, float *y[GN_MAX_PARTS]) {
    const weight_shape *s = &p->w->s;
    const int T = p->c.T;
    gn_ctx *cpu = p->sides->cpu;
    const gn_tensor norm = gn_tensor_1d(p->norm, GN_F32, s->K);
    gn_linear_args args = {.x = gn_tensor_2d(p->x, GN_F32, T, s->K),
                           .norm = p->norm ? &norm : NULL,
                           .eps = EPS_NORM,
                           .lora = p->adapters->terms,
                           .n_lora = p->adapters->n,
                           .pair = FIRST_PAIR,
                           .dropout = p->c.dropout,
                           .n_parts = s->n_parts};
    for (int i = 0; i < s->n_parts; i++)
        args.part[i] =
            (struct gn_linear_part){gn_tensor_2d(y[i], GN_F32, T, s->N[i]), &p->w->host[i].m};
    cr_assert_eq(gn_ctx_reserve(cpu, workspace_of(cpu, p, T)), GN_OK);
    cr_assert_eq(gn_linear(cpu, &args), GN_OK);
}

/* v (T, K) = what a mask leaves of x. */
static void drop_rows(float *v, const float *x, const gn_dropout *dropout, int module, int T,
                      int K) {
    for (int t = 0; t < T; t++)
        for (int k = 0; k < K; k++) {
            float factor[4];
            gn_dropout_quad(factor, dropout, (uint32_t)module, (uint32_t)t, (uint32_t)(k / 4));
            v[t * K + k] = x[t * K + k] * factor[k % 4];
        }
}

/* u = A x of a term's rows: (rows, rank). */
static float *low_rank_of(const problem *p, const float *x, const gn_lora *term,
                          const gn_lora_pair *pair) {
    float *u = malloc((size_t)term->rows * (size_t)pair->rank * sizeof *u);
    gn_ctx *cpu = p->sides->cpu;
    const int64_t K = p->w->s.K;
    const gn_matrix a = {
        .dtype = pair->a.dtype, .rows = pair->rank, .cols = K, .data = pair->a.data};
    const gn_linear_args args = {
        .x = gn_tensor_2d((float *)x + term->row0 * K, GN_F32, term->rows, K),
        .n_parts = 1,
        .part[0] = {gn_tensor_2d(u, GN_F32, term->rows, pair->rank), &a}};
    cr_assert_eq(gn_linear(cpu, &args), GN_OK);
    return u;
}

static norms *row_norms_of(const gn_tensor *t) {
    norms *out = malloc((size_t)t->shape[0] * sizeof *out);
    const size_t row_bytes = (size_t)t->shape[1] * gn_dtype_size(t->dtype);
    float *row = malloc((size_t)t->shape[1] * sizeof *row);
    for (int64_t i = 0; i < t->shape[0]; i++) {
        gn_widen(row, (const char *)t->data + (size_t)i * row_bytes, t->dtype, t->shape[1]);
        out[i] = norms_of(row, t->shape[1]);
    }
    free(row);
    return out;
}

/* Whether so many rows may go to kernels/cuda/linear_mma.cu, which rounds scales to bfloat16. */
static bool rounds_scales(const weights *w, int rows) {
    return rows >= 9 && w->s.K % 256 == 0 && gn_qtype_is_4bit(w->type.qtype);
}

/* Where bfloat16 is computed in: roundings of the factors of x W, A x and B u that may differ. x is
 * rounded after its norm, or its scale is applied to the sums; so it is with a block's codes, or
 * its scale is rounded, too, and their product; u may be rounded or not, A and B too when they are
 * float32, and what a mask leaves of x. */
static int roundings_of_x(const problem *p) {
    return p->sides->compute == GN_BF16 && p->c.norm ? 2 : 0;
}
static int roundings_of_w(const problem *p) {
    if (p->sides->compute == GN_F32 || p->w->type.qtype == GN_Q_NONE) return 0;
    return rounds_scales(p->w, p->c.T) ? 3 : 2;
}
static int roundings_of_lora(const problem *p) {
    return p->sides->compute == GN_BF16 && p->c.lora_dtype == GN_F32;
}
static int roundings_of_mask(const problem *p) {
    return p->sides->compute == GN_BF16 && p->c.dropout.p > 0;
}

/* error[t, n] += what a term's B u may be off by. */
static void add_term_errors(const problem *p, int part, const gn_lora *term, const float *x,
                            const norms *x_norms, float *error) {
    const gn_lora_pair *pair = &term->pairs[FIRST_PAIR + part];
    const int rank = pair->rank, N = p->w->s.N[part], K = p->w->s.K;
    if (rank == 0 || term->rows == 0) return;
    const double scale = fabs((double)term->scale * pair->scale);
    const int u_rounding = p->sides->compute == GN_BF16;
    float *u = low_rank_of(p, x, term, pair), *u_error = malloc((size_t)rank * sizeof *u_error);
    norms *a = row_norms_of(&pair->a), *b = row_norms_of(&pair->b);
    for (int t = 0; t < term->rows; t++) {
        const norms xn = x_norms[term->row0 + t], un = norms_of(u + t * rank, rank);
        for (int j = 0; j < rank; j++)
            u_error[j] =
                (float)dot_error(K, (double)a[j].two * xn.two, (double)a[j].four * xn.four,
                                 roundings_of_x(p) + roundings_of_lora(p) + roundings_of_mask(p));
        const norms en = norms_of(u_error, rank);
        for (int n = 0; n < N; n++)
            error[(size_t)(term->row0 + t) * (size_t)N + (size_t)n] +=
                (float)(scale *
                        (dot_error(rank, (double)b[n].two * un.two, (double)b[n].four * un.four,
                                   u_rounding + roundings_of_lora(p)) +
                         (double)b[n].four * en.four));
    }
    free(u);
    free(u_error);
    free(a);
    free(b);
}

/* The same of all terms, whose A may see x under a mask. */
static void add_lora_errors(const problem *p, int part, const float *x, float *error) {
    const int T = p->c.T, K = p->w->s.K;
    float *seen = malloc((size_t)T * (size_t)K * sizeof *seen);
    drop_rows(seen, x, &p->c.dropout, FIRST_PAIR + part, T, K);
    const gn_tensor t = gn_tensor_2d(seen, GN_F32, T, K);
    norms *seen_norms = row_norms_of(&t);
    for (int j = 0; j < p->adapters->n; j++)
        add_term_errors(p, part, &p->adapters->terms[j], seen, seen_norms, error);
    free(seen_norms);
    free(seen);
}

/* By how much each part's product may be off, (T, N_i). */
static void errors_of(const problem *p, float *error[GN_MAX_PARTS]) {
    const weight_shape *s = &p->w->s;
    const int T = p->c.T;
    float *x = operands_of(p);
    const gn_tensor xt = gn_tensor_2d(x, GN_F32, T, s->K);
    norms *x_norms = row_norms_of(&xt);
    for (int i = 0; i < s->n_parts; i++) {
        const int N = s->N[i];
        for (int t = 0; t < T; t++)
            for (int n = 0; n < N; n++) {
                const norms *w = &p->w->rows[i][n];
                const double two = (double)w->two * x_norms[t].two;
                const double four = (double)w->four * x_norms[t].four;
                const double norm = p->c.norm ? (sqrt(s->K) + 8) * U32 * two : 0;
                error[i][(size_t)t * (size_t)N + (size_t)n] =
                    (float)(norm +
                            dot_error(s->K, two, four, roundings_of_x(p) + roundings_of_w(p)));
            }
        add_lora_errors(p, i, x, error[i]);
    }
    free(x);
    free(x_norms);
}

typedef struct {
    double value, error;
} bounded;

static bounded swiglu(bounded gate, bounded up) {
    const double s = gate.value / (1 + exp(-gate.value)), value = s * up.value;
    const double exp_error = (16 + 4 * fabs(gate.value)) * U32;    /* exp2 of a rounded product */
    const double s_error = 1.1 * gate.error + exp_error * fabs(s); /* |silu'| < 1.1 */
    return (bounded){value, s_error * (fabs(up.value) + up.error) + fabs(s) * up.error};
}

static void judge_output(verdict *v, const problem *p, int part, const float *got,
                         float *const product[], float *const error[]) {
    const int N = p->w->s.N[part];
    const double unit = output_dtype(p) == GN_BF16 ? U16 : 4 * U32;
    for (int t = 0; t < p->c.T; t++)
        for (int n = 0; n < N; n++) {
            const size_t i = (size_t)t * (size_t)N + (size_t)n;
            bounded y = {product[part][i], error[part][i]};
            if (p->c.epilogue == GN_SWIGLU) y = swiglu(y, (bounded){product[1][i], error[1][i]});
            if (p->c.epilogue == GN_ADD) y.value += p->old_y[part][i];
            y.error += unit * (fabs(y.value) + y.error) + 0x1p-120;
            judge(v, t, n, got[i], y.value, y.error);
        }
}

typedef struct {
    float *y[GN_MAX_PARTS]; /* (T, N_i) */
} outputs;

static outputs make_outputs(const problem *p) {
    outputs o = {0};
    for (int i = 0; i < p->w->s.n_parts; i++)
        o.y[i] = malloc((size_t)p->c.T * (size_t)p->w->s.N[i] * sizeof(float));
    return o;
}

static void free_outputs(outputs *o) {
    for (int i = 0; i < GN_MAX_PARTS; i++) free(o->y[i]);
}

static void check_problem(tally *tally, const problem *p) {
    outputs got = make_outputs(p), product = make_outputs(p), error = make_outputs(p);
    verdict v = {0};
    snprintf(v.name, sizeof v.name, "%s", p->name);
    const char *why = solve(p, 0, p->c.T, got.y);
    if (!why) {
        products_of(p, product.y);
        errors_of(p, error.y);
        for (int i = 0; i < n_outputs(p); i++) judge_output(&v, p, i, got.y[i], product.y, error.y);
    }
    settle(tally, &v, why);
    free_outputs(&got);
    free_outputs(&product);
    free_outputs(&error);
}

#endif
