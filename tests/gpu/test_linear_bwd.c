/* gn_linear in training on the GPU against the CPU: forward under dropout and with rows to spare,
 * and gradients of x, of LoRA's A and B and of plain weights, for weights of every type. Every
 * backward runs twice and must give the same bits. */
#include "linear_cases.h"

static const gn_dtype computes[] = {GN_BF16, GN_F32};

/* ---- forward ---- */

static const struct {
    weight_shape s;
    int T;
    layout lora;
    bool norm;
    gn_epilogue epilogue;
    float dropout;
    int spare;
} forward_cases[] = {
    {{64, {24}, 1}, 1, ONE_ADAPTER, false, GN_STORE, 0.5f, 0},
    {{128, {96, 33, 64}, 3}, 19, WIDE_ADAPTER, true, GN_STORE, 0.1f, 0},
    {{65, {40, 24}, 2}, 7, ONE_ADAPTER, true, GN_STORE, 0.3f, 0},
    {{192, {136}, 1}, 300, WIDE_ADAPTER, false, GN_ADD, 0.1f, 0},
    {{128, {72, 40}, 2}, 270, ONE_ADAPTER, true, GN_STORE, 0.25f, 0},
    {{256, {48}, 1}, 64, NO_LORA, false, GN_ADD, 0.1f, 0},
    {{192, {136}, 1}, 300, WIDE_ADAPTER, false, GN_ADD, 0, 64},
    {{128, {72, 40, 40}, 3}, 270, ONE_ADAPTER, false, GN_STORE, 0, 64},
    {{128, {72, 40, 40}, 3}, 270, WIDE_ADAPTER, true, GN_STORE, 0, 0},
    {{192, {136}, 1}, 300, WIDE_ADAPTER, false, GN_ADD, 0.2f, 64},
    {{192, {136}, 1}, 300, WIDE_ADAPTER, false, GN_ADD, 0, 16},
};

Test(gpu_train, linear, .timeout = 300) {
    tally tally = {0};
    for (int i = 0; i < COUNT(forward_cases) * COUNT(types) * COUNT(computes); i++) {
        const int c = i / COUNT(types) / COUNT(computes), type = i / COUNT(computes) % COUNT(types);
        if (is_brief() && (type + c) % 6 != 0) continue;
        sides s = open_sides(computes[i % COUNT(computes)]);
        weights w = make_weights(&s, forward_cases[c].s, types[type], (uint64_t)i);
        problem p = make_problem(&s, &w,
                                 (call){.T = forward_cases[c].T,
                                        .norm = forward_cases[c].norm,
                                        .act_x = c % 2,
                                        .epilogue = forward_cases[c].epilogue,
                                        .lora = forward_cases[c].lora,
                                        .lora_dtype = i % 3 ? GN_F32 : GN_BF16,
                                        .pad = c % 2 ? 8 : 0,
                                        .dropout = {forward_cases[c].dropout, 3, 77},
                                        .spare = forward_cases[c].spare},
                                 (uint64_t)(i + 1));
        check_problem(&tally, &p);
        free_problem(&p);
        free_weights(&w);
        close_sides(&s);
    }
    conclude(&tally, "gn_linear in training");
}

/* ---- backward: a call ---- */

typedef struct {
    int T, K, N[GN_MAX_PARTS], n_parts;
    int rank[GN_MAX_PARTS], row0, rows; /* of the LoRA term */
    float dropout;
    bool norm, act_x; /* act_x: x is an activation, though there is a norm */
    bool no_dx, no_params;
    bool f32_dy, f32_dx; /* else they have the activations' dtype */
    bool in_place;       /* dx is x */
    gn_dtype lora_dtype;
    int pad, shift;
    int spare; /* of dy */
} bwd_shape;

/* A gradient, dense: what it was, what the CPU makes of it, how far off it may be, and what the GPU
 * gave twice. */
typedef struct {
    char name[8];
    int rows, cols;
    float *old, *expected, *error, *got[2];
} gradient;

enum { DX, DA, DB = DA + GN_MAX_PARTS, DW = DB + GN_MAX_PARTS, GRADIENTS = DW + GN_MAX_PARTS };

typedef struct {
    const sides *sides;
    const weights *w;
    bwd_shape s;
    float *x, *norm, *dy[GN_MAX_PARTS], *a[GN_MAX_PARTS], *b[GN_MAX_PARTS];
    gradient g[GRADIENTS]; /* rows 0: nobody wants it */
    char name[256];
} bwd;

static const float LORA_SCALE = 0.5f, PAIR_SCALE = 1.5f;
static const gn_dropout MASK = {.step = 9, .seed = 1234};

static gn_dropout mask_of(const bwd *p) {
    gn_dropout d = MASK;
    d.p = p->s.dropout;
    return d;
}

static void add_gradient(bwd *p, rng *r, int which, const char *name, int part, int rows,
                         int cols) {
    gradient *g = &p->g[which];
    const size_t n = (size_t)rows * (size_t)cols;
    snprintf(g->name, sizeof g->name, "%s%d", name, part);
    g->rows = rows;
    g->cols = cols;
    g->old = random_floats(r, n);
    g->expected = memcpy(malloc(n * sizeof(float)), g->old, n * sizeof(float));
    g->error = calloc(n, sizeof(float));
    for (int i = 0; i < 2; i++) g->got[i] = malloc(n * sizeof(float));
}

static bwd make_bwd(const sides *sides, const weights *w, const bwd_shape *s, uint64_t seed) {
    rng r = {seed};
    bwd p = {.sides = sides, .w = w, .s = *s};
    const gn_dtype act = gn_ctx_activation(sides->gpu);
    p.x = random_floats(&r, (size_t)s->T * (size_t)s->K);
    if (!s->norm || s->act_x) round_floats(p.x, act, (int64_t)s->T * s->K);
    if (s->norm) p.norm = random_floats(&r, (size_t)s->K);
    if (!s->no_dx) add_gradient(&p, &r, DX, "dx", 0, s->T, s->K);
    for (int i = 0; i < s->n_parts; i++) {
        const int N = s->N[i], rank = s->rank[i];
        p.dy[i] = random_floats(&r, (size_t)s->T * (size_t)N);
        if (!s->f32_dy) round_floats(p.dy[i], act, (int64_t)s->T * N);
        p.a[i] = random_floats(&r, (size_t)rank * (size_t)s->K);
        p.b[i] = random_floats(&r, (size_t)rank * (size_t)N);
        round_floats(p.a[i], s->lora_dtype, (int64_t)rank * s->K);
        round_floats(p.b[i], s->lora_dtype, (int64_t)rank * N);
        if (s->no_params) continue;
        if (rank > 0) add_gradient(&p, &r, DA + i, "da", i, rank, s->K);
        if (rank > 0) add_gradient(&p, &r, DB + i, "db", i, N, rank);
        if (w->type.qtype == GN_Q_NONE) add_gradient(&p, &r, DW + i, "dw", i, N, s->K);
    }
    snprintf(p.name, sizeof p.name,
             "%s %s%s/%s T=%d K=%d N=%d,%d,%d r=%d,%d,%d%s rows %d+%d dropout %g%s%s%s%s%s pad %d "
             "shift %d spare %d",
             gn_dtype_name(sides->compute), gn_qtype_name(w->type.qtype),
             w->type.double_quant ? "+dq" : "", gn_dtype_name(w->type.dtype), s->T, s->K, s->N[0],
             s->N[1], s->N[2], s->rank[0], s->rank[1], s->rank[2], gn_dtype_name(s->lora_dtype),
             s->row0, s->rows, (double)s->dropout, s->norm ? " norm" : "",
             s->act_x ? " of activations" : "", s->f32_dy ? " f32 dy" : "",
             s->f32_dx ? " f32 dx" : "", s->in_place ? " in place" : "", s->pad, s->shift,
             s->spare);
    return p;
}

static void free_bwd(bwd *p) {
    free(p->x);
    free(p->norm);
    for (int i = 0; i < p->s.n_parts; i++) {
        free(p->dy[i]);
        free(p->a[i]);
        free(p->b[i]);
    }
    for (int i = 0; i < GRADIENTS; i++) {
        free(p->g[i].old);
        free(p->g[i].expected);
        free(p->g[i].error);
        free(p->g[i].got[0]);
        free(p->g[i].got[1]);
    }
}

static size_t bwd_workspace(gn_ctx *ctx, const bwd *p) {
    const bwd_shape *s = &p->s;
    int rank = 0;
    for (int i = 0; i < s->n_parts; i++) rank = s->rank[i] > rank ? s->rank[i] : rank;
    return gn_linear_bwd_workspace(ctx, s->T, s->K, s->N[0] + s->N[1] + s->N[2], rank);
}

/* The arguments but for x, y and weights, which are the sides' own. */
static gn_linear_args args_of(const bwd *p, const gn_tensor *norm, const gn_lora *lora) {
    return (gn_linear_args){.norm = p->s.norm ? norm : NULL,
                            .eps = EPS_NORM,
                            .lora = lora,
                            .n_lora = 1,
                            .pair = FIRST_PAIR,
                            .dropout = mask_of(p),
                            .n_parts = p->s.n_parts};
}

static gn_lora term_of(const bwd *p, const gn_lora_pair *pairs, const gn_lora_pair *placed) {
    return (gn_lora){.row0 = p->s.row0,
                     .rows = p->s.rows,
                     .scale = LORA_SCALE,
                     .pairs = pairs,
                     .placed = placed};
}

/* ---- on the CPU ---- */

static gn_tensor dense(float *data, int64_t rows, int64_t cols) {
    return gn_tensor_2d(data, GN_F32, rows, cols);
}

static gn_tensor expected_of(const bwd *p, int which) {
    const gradient *g = &p->g[which];
    return dense(g->expected, g->rows, g->cols);
}

static void solve_on_cpu(const bwd *p) {
    const bwd_shape *s = &p->s;
    gn_ctx *cpu = p->sides->cpu;
    const gn_tensor norm = gn_tensor_1d(p->norm, GN_F32, s->K);
    gn_lora_pair pairs[FIRST_PAIR + GN_MAX_PARTS] = {0};
    const gn_lora term = term_of(p, pairs, NULL);
    gn_linear_args args = args_of(p, &norm, &term);
    gn_linear_grads grads = {.dx = expected_of(p, DX)};
    args.x = dense(p->x, s->T, s->K);
    for (int i = 0; i < s->n_parts; i++) {
        pairs[FIRST_PAIR + i] =
            (gn_lora_pair){s->rank[i], PAIR_SCALE, dense(p->a[i], s->rank[i], s->K),
                           dense(p->b[i], s->N[i], s->rank[i])};
        args.part[i] = (struct gn_linear_part){dense(p->dy[i], s->T, s->N[i]), &p->w->host[i].m};
        grads.part[i] =
            (struct gn_linear_part_grads){dense(p->dy[i], s->T, s->N[i]), 0, expected_of(p, DA + i),
                                          expected_of(p, DB + i), expected_of(p, DW + i)};
    }
    cr_assert_eq(gn_ctx_reserve(cpu, bwd_workspace(cpu, p)), GN_OK);
    cr_assert_eq(gn_linear_bwd(cpu, &args, &grads), GN_OK, "%s", p->name);
}

/* ---- on the GPU ---- */

static gn_tensor device_gradient(const bwd *p, device_memory *m, int which, gn_dtype dtype) {
    const gradient *g = &p->g[which];
    if (g->rows == 0) return (gn_tensor){0};
    return device_rows(m, which == DX ? NULL : g->old, dtype, g->rows, g->cols, p->s.pad, 0);
}

static const char *solve_on_gpu(const bwd *p, int run) {
    const bwd_shape *s = &p->s;
    gn_ctx *gpu = p->sides->gpu;
    device_memory m = {.ctx = gpu};
    const gn_dtype act = gn_ctx_activation(gpu);
    gn_tensor norm = {0};
    if (s->norm)
        norm =
            gn_tensor_1d(device_alloc(&m, p->norm, (size_t)s->K * sizeof(float), 0), GN_F32, s->K);
    gn_lora_pair pairs[FIRST_PAIR + GN_MAX_PARTS] = {0};
    gn_lora term = term_of(p, pairs, NULL);
    gn_linear_args args = args_of(p, &norm, &term);
    gn_linear_grads grads = {.dx = device_gradient(p, &m, DX, s->f32_dx ? GN_F32 : act)};
    gn_tensor tensors[GRADIENTS] = {[DX] = grads.dx};
    args.x =
        device_rows(&m, p->x, s->norm && !s->act_x ? GN_F32 : act, s->T, s->K, s->pad, s->shift);
    if (s->in_place) grads.dx = tensors[DX] = args.x;
    for (int i = 0; i < s->n_parts; i++) {
        const int N = s->N[i], rank = s->rank[i];
        gn_lora_pair *pair = &pairs[FIRST_PAIR + i];
        *pair = (gn_lora_pair){.rank = rank, .scale = PAIR_SCALE};
        if (rank > 0) {
            pair->a = device_rows(&m, p->a[i], s->lora_dtype, rank, s->K, 0, s->shift);
            pair->b = device_rows(&m, p->b[i], s->lora_dtype, N, rank, 0, 0);
        }
        for (int which = DA + i; which < GRADIENTS; which += GN_MAX_PARTS)
            tensors[which] = device_gradient(p, &m, which, GN_F32);
        args.part[i] =
            (struct gn_linear_part){device_rows(&m, NULL, act, s->T, N, 0, 0), &p->w->placed[i]};
        grads.part[i] = (struct gn_linear_part_grads){
            device_rows(&m, p->dy[i], s->f32_dy ? GN_F32 : act, s->T, N, s->pad + s->spare,
                        s->shift),
            s->spare, tensors[DA + i], tensors[DB + i], tensors[DW + i]};
    }
    term.placed = device_alloc(&m, pairs, sizeof pairs, 0);
    cr_assert_eq(stage_rows(gpu, s->T, &term, 1), GN_OK, "%s", p->name);
    reserve(gpu, bwd_workspace(gpu, p));
    const char *why = ran(gpu, gn_linear_bwd(gpu, &args, &grads), p->name);
    for (int i = 0; i < GRADIENTS && !why; i++)
        if (p->g[i].rows > 0 && !read_rows(gpu, p->g[i].got[run], &tensors[i]))
            why = "a gap between rows is written";
    if (!why && !guards_stand(&m)) why = "a guard is written";
    device_free(&m);
    return why;
}

/* ---- how far off it may be ---- */

/* Of every column of a (rows, cols) matrix. */
static norms *column_norms(const float *v, int64_t rows, int64_t cols) {
    norms *out = malloc((size_t)cols * sizeof *out);
    float *column = malloc((size_t)rows * sizeof *column);
    for (int64_t c = 0; c < cols; c++) {
        for (int64_t i = 0; i < rows; i++) column[i] = v[i * cols + c];
        out[c] = norms_of(column, rows);
    }
    free(column);
    return out;
}

static norms *each_row_norms(const float *v, int64_t rows, int64_t cols) {
    norms *out = malloc((size_t)rows * sizeof *out);
    for (int64_t i = 0; i < rows; i++) out[i] = norms_of(v + i * cols, cols);
    return out;
}

/* A sum of products of a and b: n of them, whose factors may be rounded `roundings` times, and of
 * which one may be off by a share of itself. */
static double product_error(int64_t n, norms a, norms b, int roundings, double share) {
    const double two = (double)a.two * b.two;
    return dot_error((double)n, two, (double)a.four * b.four, roundings) + share * two;
}

/* out (rows, cols) = scale a b, or with `turned` b its transpose; and how far each may be off. */
static void multiply_with_error(float *out, float *error, const float *a, const float *b,
                                int64_t rows, int64_t cols, int64_t n, bool turned, double scale,
                                int roundings, double share) {
    norms *an = each_row_norms(a, rows, n);
    norms *bn = turned ? each_row_norms(b, cols, n) : column_norms(b, n, cols);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) {
            double sum = 0;
            for (int64_t k = 0; k < n; k++)
                sum += (double)a[i * n + k] * (turned ? b[j * n + k] : b[k * cols + j]);
            out[i * cols + j] = (float)(scale * sum);
            error[i * cols + j] = (float)(scale * product_error(n, an[i], bn[j], roundings, share));
        }
    free(an);
    free(bn);
}

/* What all bounds of a case are made of. Roundings are those in bfloat16 that the CPU does not do,
 * or does elsewhere: of dy when it is float32, of A and B likewise, of x after its norm, and of
 * what a mask leaves of it, of u, of v. */
typedef struct {
    bool bf16;
    int dy, lora, x, dropped, sums; /* sums: of u, v, and of v A under a mask */
    double share;                   /* by which a norm's float32 may be off */
    double keep;                    /* 1 / (1 - p) */
    float *x_seen;                  /* (T, K): what products see, under the part's mask */
} bounds;

static void add_gradient_errors(gradient *g, const norms *rows, const norms *cols, int64_t n,
                                double scale, int roundings, double share,
                                const norms *error_of_rows, const norms *error_of_cols) {
    for (int i = 0; i < g->rows; i++)
        for (int j = 0; j < g->cols; j++) {
            double e = product_error(n, rows[i], cols[j], roundings, share);
            if (error_of_rows) e += (double)error_of_rows[i].four * cols[j].four;
            if (error_of_cols) e += (double)rows[i].four * error_of_cols[j].four;
            g->error[i * g->cols + j] += (float)(scale * e);
        }
}

/* dx through a weight: n products of dy and a column of W; and what adding it to the parts before
 * costs in dx's dtype. */
static void add_weight_errors(bwd *p, int part, const bounds *b) {
    const bwd_shape *s = &p->s;
    gradient *dx = &p->g[DX];
    const int N = s->N[part];
    const double unit = s->f32_dx || !b->bf16 ? U32 : U16;
    float *w = malloc((size_t)N * (size_t)s->K * sizeof *w);
    gn_dequantize(w, &p->w->host[part].m, 0, (int64_t)N * s->K);
    norms *columns = column_norms(w, N, s->K), *rows = each_row_norms(p->dy[part], s->T, N);
    for (int t = 0; t < s->T; t++)
        for (int k = 0; k < s->K; k++)
            dx->error[t * s->K + k] +=
                (float)(product_error(N, rows[t], columns[k], b->dy, 0) +
                        (s->n_parts + 3) * unit * 6 * (double)rows[t].four * columns[k].four);
    free(w);
    free(columns);
    free(rows);
}

static void add_lora_bounds(bwd *p, int part, const bounds *b) {
    const bwd_shape *s = &p->s;
    const int N = s->N[part], K = s->K, r = s->rank[part], R = s->rows;
    const double scale = (double)LORA_SCALE * PAIR_SCALE;
    const double unit = b->bf16 ? U16 : U32, dx_unit = s->f32_dx ? U32 : unit;
    const float *dy = p->dy[part] + (size_t)s->row0 * (size_t)N;
    const float *x = b->x_seen + (size_t)s->row0 * (size_t)K;
    const size_t n = (size_t)R * (size_t)r;
    float *u = malloc(n * sizeof *u), *ue = malloc(n * sizeof *ue);
    float *v = malloc(n * sizeof *v), *ve = malloc(n * sizeof *ve);
    multiply_with_error(v, ve, dy, p->b[part], R, r, N, false, scale, b->dy + b->lora, 0);
    multiply_with_error(u, ue, x, p->a[part], R, r, K, true, 1, b->x + b->dropped + b->lora,
                        b->share);
    norms *u_cols = column_norms(u, R, r), *ue_cols = column_norms(ue, R, r);
    norms *v_cols = column_norms(v, R, r), *ve_cols = column_norms(ve, R, r);
    norms *v_rows = each_row_norms(v, R, r), *ve_rows = each_row_norms(ve, R, r);
    norms *dy_cols = column_norms(dy, R, N), *x_cols = column_norms(x, R, K);
    norms *a_cols = column_norms(p->a[part], r, K);
    if (p->g[DB + part].rows)
        add_gradient_errors(&p->g[DB + part], dy_cols, u_cols, R, scale, b->dy + b->sums, 0, NULL,
                            ue_cols);
    if (p->g[DA + part].rows)
        add_gradient_errors(&p->g[DA + part], v_cols, x_cols, R, 1, b->x + b->dropped + b->sums,
                            b->share, ve_cols, NULL);
    gradient *dx = &p->g[DX];
    for (int t = 0; t < R && dx->rows; t++)
        for (int k = 0; k < K; k++)
            dx->error[(s->row0 + t) * K + k] +=
                (float)(b->keep * (product_error(r, v_rows[t], a_cols[k], b->sums + b->lora, 0) +
                                   (double)ve_rows[t].four * a_cols[k].four +
                                   ((s->n_parts + 2) * dx_unit + b->sums * unit) * 6 *
                                       (double)v_rows[t].four * a_cols[k].four));
    float *floats[] = {u, ue, v, ve};
    norms *all[] = {u_cols, ue_cols, v_cols, ve_cols, v_rows, ve_rows, dy_cols, x_cols, a_cols};
    for (int i = 0; i < COUNT(floats); i++) free(floats[i]);
    for (int i = 0; i < COUNT(all); i++) free(all[i]);
}

static void add_weight_bounds(bwd *p, int part, const bounds *b, const float *x) {
    const bwd_shape *s = &p->s;
    norms *dy = column_norms(p->dy[part], s->T, s->N[part]), *xn = column_norms(x, s->T, s->K);
    add_gradient_errors(&p->g[DW + part], dy, xn, s->T, 1, b->dy + b->x, b->share, NULL, NULL);
    free(dy);
    free(xn);
}

static void find_errors(bwd *p) {
    const bwd_shape *s = &p->s;
    const int64_t n = (int64_t)s->T * s->K;
    const bool bf16 = p->sides->compute == GN_BF16;
    float *x = memcpy(malloc((size_t)n * sizeof *x), p->x, (size_t)n * sizeof *x);
    gn_tensor t = dense(x, s->T, s->K);
    const gn_tensor norm = gn_tensor_1d(p->norm, GN_F32, s->K);
    if (s->norm) cr_assert_eq(gn_rmsnorm(p->sides->cpu, &t, &t, &norm, EPS_NORM), GN_OK);
    round_floats(x, p->sides->compute, n);
    bounds b = {.bf16 = bf16,
                .dy = bf16 && s->f32_dy,
                .lora = bf16 && s->lora_dtype == GN_F32,
                .x = bf16 && s->norm ? 2 : 0,
                .dropped = bf16 && s->dropout > 0,
                .sums = bf16,
                .share = s->norm ? (sqrt(s->K) + 8) * U32 : 0,
                .keep = 1 / (1 - (double)s->dropout),
                .x_seen = malloc((size_t)n * sizeof *x)};
    const gn_dropout dropout = mask_of(p);
    for (int i = 0; i < s->n_parts; i++) {
        drop_rows(b.x_seen, x, &dropout, FIRST_PAIR + i, s->T, s->K);
        if (p->g[DX].rows) add_weight_errors(p, i, &b);
        if (p->g[DW + i].rows) add_weight_bounds(p, i, &b, x);
        if (s->rank[i] > 0 && s->rows > 0) add_lora_bounds(p, i, &b);
    }
    free(b.x_seen);
    free(x);
}

static void judge_gradient(verdict *v, const bwd *p, int which) {
    const gradient *g = &p->g[which];
    const bool bf16 = p->sides->compute == GN_BF16;
    const double unit = which == DX && bf16 && !p->s.f32_dx ? U16 : 4 * U32;
    for (int i = 0; i < g->rows; i++)
        for (int j = 0; j < g->cols; j++) {
            const size_t at = (size_t)i * (size_t)g->cols + (size_t)j;
            const double e = g->error[at];
            judge(v, i, j, g->got[0][at], g->expected[at],
                  e + unit * (fabs((double)g->expected[at]) + fabs((double)g->old[at]) + e) +
                      0x1p-120);
        }
}

static void check_bwd(tally *tally, bwd *p) {
    const char *why = solve_on_gpu(p, 0);
    if (!why) why = solve_on_gpu(p, 1);
    solve_on_cpu(p);
    find_errors(p);
    for (int i = 0; i < GRADIENTS; i++) {
        const gradient *g = &p->g[i];
        const size_t bytes = (size_t)g->rows * (size_t)g->cols * sizeof(float);
        verdict v = {0};
        if (g->rows == 0) continue;
        snprintf(v.name, sizeof v.name, "%s of %s", g->name, p->name);
        if (!why && memcmp(g->got[0], g->got[1], bytes)) why = "the second run gave other bits";
        if (!why) judge_gradient(&v, p, i);
        settle(tally, &v, why);
    }
}

/* ---- cases ---- */

static const bwd_shape bwd_shapes[] = {
    {.T = 1, .K = 64, .N = {8}, .n_parts = 1, .rank = {1}, .rows = 1},
    {.T = 7,
     .K = 65,
     .N = {33, 5, 12},
     .n_parts = 3,
     .rank = {3, 0, 17},
     .row0 = 2,
     .rows = 4,
     .f32_dy = true,
     .lora_dtype = GN_BF16,
     .pad = 3},
    {.T = 13,
     .K = 128,
     .N = {96, 31},
     .n_parts = 2,
     .rank = {8, 4},
     .rows = 13,
     .dropout = 0.3f,
     .f32_dx = true,
     .shift = 1},
    {.T = 110,
     .K = 320,
     .N = {300},
     .n_parts = 1,
     .rank = {64},
     .row0 = 9,
     .rows = 101,
     .dropout = 0.1f,
     .f32_dy = true,
     .pad = 8},
    {.T = 70,
     .K = 64,
     .N = {200, 200, 72},
     .n_parts = 3,
     .rank = {8, 8, 8},
     .rows = 70,
     .norm = true,
     .dropout = 0.5f,
     .f32_dy = true,
     .f32_dx = true},
    {.T = 40,
     .K = 192,
     .N = {128, 64, 64},
     .n_parts = 3,
     .rank = {16, 16, 16},
     .rows = 40,
     .norm = true,
     .act_x = true,
     .f32_dx = true,
     .lora_dtype = GN_BF16},
    {.T = 21, .K = 128, .N = {88}, .n_parts = 1, .rank = {8}, .rows = 21, .no_dx = true},
    {.T = 21, .K = 128, .N = {88}, .n_parts = 1, .rank = {8}, .rows = 21, .no_params = true},
    {.T = 33, .K = 100, .N = {40}, .n_parts = 1, .rows = 0},
    {.T = 21,
     .K = 128,
     .N = {88},
     .n_parts = 1,
     .rank = {8},
     .rows = 21,
     .lora_dtype = GN_BF16,
     .spare = 8},
    {.T = 40,
     .K = 192,
     .N = {128, 64},
     .n_parts = 2,
     .rank = {16, 7},
     .rows = 40,
     .f32_dx = true,
     .spare = 24},
    {.T = 50,
     .K = 192,
     .N = {72},
     .n_parts = 1,
     .rank = {16},
     .row0 = 3,
     .rows = 40,
     .dropout = 0.1f,
     .f32_dy = true,
     .in_place = true},
};

static void check_shape(tally *tally, const sides *s, const bwd_shape *shape, weight_type type,
                        uint64_t seed) {
    const weight_shape ws = {shape->K, {shape->N[0], shape->N[1], shape->N[2]}, shape->n_parts};
    weights w = make_weights(s, ws, type, seed);
    bwd p = make_bwd(s, &w, shape, seed + 1);
    check_bwd(tally, &p);
    free_bwd(&p);
    free_weights(&w);
}

Test(gpu_train, linear_bwd, .timeout = 300) {
    tally tally = {0};
    for (int i = 0; i < COUNT(bwd_shapes) * COUNT(types) * COUNT(computes); i++) {
        const int shape = i / COUNT(types) / COUNT(computes);
        const int type = i / COUNT(computes) % COUNT(types);
        if (is_brief() && (type + shape) % 4 != 0) continue;
        sides s = open_sides(computes[i % COUNT(computes)]);
        check_shape(&tally, &s, &bwd_shapes[shape], types[type], (uint64_t)i);
        close_sides(&s);
    }
    conclude(&tally, "gn_linear_bwd");
}

/* Weights of more values than are dequantized at once, and the sizes of a real model. */
Test(gpu_train, linear_bwd_of_large_weights, .timeout = 300) {
    static const bwd_shape large[] = {
        {.T = 3, .K = 12352, .N = {4096}, .n_parts = 1, .rank = {8}, .rows = 3},
        {.T = 65,
         .K = 2048,
         .N = {2048, 256, 256},
         .n_parts = 3,
         .rank = {64, 64, 64},
         .rows = 65,
         .norm = true,
         .dropout = 0.1f,
         .f32_dx = true},
    };
    tally tally = {0};
    for (int i = 0; i < COUNT(large) * COUNT(computes) && !is_brief(); i++) {
        sides s = open_sides(computes[i % COUNT(computes)]);
        check_shape(&tally, &s, &large[i / COUNT(computes)], types[i % 3 ? 0 : 12], (uint64_t)i);
        close_sides(&s);
    }
    if (!is_brief()) conclude(&tally, "gn_linear_bwd of large weights");
}
