/* Every backward against finite differences of its forward: for random dy and directions v, the
 * gradients' <dx, v> is compared with the derivative of L(x) = <y(x), dy> along v, over shapes and
 * instruction sets. Gradients of parameters must be added to, those of activations overwritten, and
 * nothing else be touched. Then: results do not depend on the threads, and packed samples do not
 * see each other. */
#include "cases.h"

#include <stdio.h>

#include "kernels/backend.h"

static const gn_isa isas[] = {GN_ISA_REFERENCE, GN_ISA_AVX2, GN_ISA_AVX512};

/* ---- the check ---- */

enum { MAX_INPUTS = 12, MAX_OUTPUTS = 3 };

typedef struct {
    float *x, *grad; /* grad NULL: held fixed */
    int64_t n;
    bool is_sum; /* grad is added to */
    guarded memory;
} input;

typedef struct {
    float *y, *dy;
    int64_t n;
} output;

typedef struct problem problem;
struct problem {
    gn_ctx *ctx;
    rng r;
    input in[MAX_INPUTS];
    output out[MAX_OUTPUTS];
    int n_in, n_out, terms; /* the longest sum in a forward pass */
    void *shape;            /* of the op */
    gn_status (*forward)(problem *), (*backward)(problem *);
};

static const float OLD_SUM = 0.5f; /* what a sum holds before */

static void add_input(problem *p, int64_t n, bool is_sum) {
    input *in = &p->in[p->n_in++];
    in->n = n;
    in->is_sum = is_sum;
    in->x = random_floats(&p->r, (size_t)n);
    in->memory = guarded_alloc((size_t)n);
    in->grad = in->memory.data;
    for (int64_t i = 0; i < n; i++) in->grad[i] = is_sum ? OLD_SUM : NAN;
}

static void add_output(problem *p, int64_t n) {
    output *out = &p->out[p->n_out++];
    *out = (output){random_floats(&p->r, (size_t)n), random_floats(&p->r, (size_t)n), n};
}

static void free_problem(problem *p) {
    for (int i = 0; i < p->n_in; i++) {
        free(p->in[i].x);
        guarded_free(&p->in[i].memory);
    }
    for (int i = 0; i < p->n_out; i++) {
        free(p->out[i].y);
        free(p->out[i].dy);
    }
}

static void spoil_workspace(problem *p) { /* NaN: nothing may rely on what is there */
    if (p->ctx->workspace_bytes) memset(p->ctx->workspace, 0xff, p->ctx->workspace_bytes);
}

/* <y, dy>, and the sum of the magnitudes. */
static double objective(problem *p, double *magnitude) {
    double sum = 0;
    *magnitude = 0;
    spoil_workspace(p);
    cr_assert_eq(p->forward(p), GN_OK);
    for (int i = 0; i < p->n_out; i++)
        for (int64_t j = 0; j < p->out[i].n; j++) {
            const double term = (double)p->out[i].y[j] * p->out[i].dy[j];
            sum += term;
            *magnitude += fabs(term);
        }
    return sum;
}

static void move(problem *p, float *const from[], float *const v[], float by) {
    for (int i = 0; i < p->n_in; i++)
        for (int64_t j = 0; j < p->in[i].n; j++) p->in[i].x[j] = from[i][j] + by * v[i][j];
}

/* Central differences over h and 2h, extrapolated. What the extrapolation changed bounds the error
 * that is left; to it comes float32's rounding in each L. */
static void check_differences(problem *p, const char *what) {
    const float h = 0x1p-6f;
    float *x[MAX_INPUTS], *v[MAX_INPUTS];
    double L[4], magnitude, found = 0, size = 0;
    for (int i = 0; i < p->n_in; i++) {
        const size_t bytes = (size_t)p->in[i].n * sizeof(float);
        x[i] = memcpy(malloc(bytes ? bytes : 1), p->in[i].x, bytes);
        v[i] = random_floats(&p->r, (size_t)p->in[i].n);
        if (!p->in[i].grad) memset(v[i], 0, bytes);
    }
    for (int i = 0; i < 4; i++) {
        const float steps[4] = {-2, -1, 1, 2};
        move(p, x, v, steps[i] * h);
        L[i] = objective(p, &magnitude);
    }
    move(p, x, v, 0);
    objective(p, &magnitude);
    spoil_workspace(p);
    cr_assert_eq(p->backward(p), GN_OK, "%s", what);
    for (int i = 0; i < p->n_in; i++) {
        const input *in = &p->in[i];
        guarded_check(&in->memory, what);
        for (int64_t j = 0; in->grad && j < in->n; j++) {
            const double term = ((double)in->grad[j] - (in->is_sum ? OLD_SUM : 0)) * v[i][j];
            found += term;
            size += fabs(term);
        }
        free(x[i]);
        free(v[i]);
    }
    const double near = (L[2] - L[1]) / (2 * h), far = (L[3] - L[0]) / (4 * h);
    const double expected = near + (near - far) / 3;
    const double rounding = sqrt((double)p->terms) * 0x1p-23 * (magnitude / h + size);
    const double tolerance = fabs(expected - near) + rounding;
    cr_assert(fabs(found - expected) <= tolerance, "%s: <dx, v> %.9g, by differences %.9g +- %.2g",
              what, found, expected, tolerance);
    cr_assert(tolerance <= 0.01 * size, "%s: a tolerance of %g says nothing on %g", what, tolerance,
              size);
}

/* The same gradients, to the bit, with other numbers of threads. */
static void check_threads(problem *p, const char *what) {
    gn_ctx *usual = p->ctx;
    float *kept[MAX_INPUTS] = {0};
    for (int i = 0; i < p->n_in; i++) {
        const size_t bytes = (size_t)p->in[i].n * sizeof(float);
        if (p->in[i].grad) kept[i] = memcpy(malloc(bytes), p->in[i].grad, bytes);
    }
    for (int threads = 1; threads <= 3; threads += 2) {
        p->ctx = open_ctx(gn_ctx_isa(usual), GN_F32, threads);
        cr_assert_eq(gn_ctx_reserve(p->ctx, 2 * usual->workspace_bytes), GN_OK);
        for (int i = 0; i < p->n_in; i++)
            for (int64_t j = 0; kept[i] && j < p->in[i].n; j++)
                p->in[i].grad[j] = p->in[i].is_sum ? OLD_SUM : NAN;
        cr_assert_eq(p->forward(p), GN_OK);
        cr_assert_eq(p->backward(p), GN_OK);
        for (int i = 0; i < p->n_in; i++)
            cr_assert(!kept[i] ||
                          !memcmp(kept[i], p->in[i].grad, (size_t)p->in[i].n * sizeof(float)),
                      "%s: input %d, %d threads", what, i, threads);
        gn_ctx_close(p->ctx);
    }
    for (int i = 0; i < p->n_in; i++) free(kept[i]);
    p->ctx = usual;
}

/* ---- the ops ---- */

typedef struct {
    int T, C, V;
    bool skip;
    const int32_t *ids;
} plain_shape;

static gn_status rmsnorm_forward(problem *p) {
    const plain_shape *s = p->shape;
    gn_tensor y = rows2(p->out[0].y, s->T, s->C);
    const gn_tensor x = rows2(p->in[0].x, s->T, s->C), w = gn_tensor_1d(p->in[1].x, GN_F32, s->C);
    const gn_status status = gn_rmsnorm(p->ctx, &y, &x, &w, 1e-5f);
    for (int i = 0; s->skip && i < s->T * s->C; i++) p->out[0].y[i] += p->in[0].x[i];
    return status;
}

static gn_status rmsnorm_backward(problem *p) {
    const plain_shape *s = p->shape;
    gn_tensor dx = rows2(p->in[0].grad, s->T, s->C), dw = gn_tensor_1d(p->in[1].grad, GN_F32, s->C);
    const gn_tensor dy = rows2(p->out[0].dy, s->T, s->C), x = rows2(p->in[0].x, s->T, s->C);
    const gn_tensor w = gn_tensor_1d(p->in[1].x, GN_F32, s->C);
    if (!s->skip) return gn_rmsnorm_bwd(p->ctx, &dx, NULL, &dw, &dy, NULL, &x, &w, 1e-5f);
    memcpy(dx.data, dy.data, (size_t)(s->T * s->C) * sizeof(float)); /* skip may be dx */
    return gn_rmsnorm_bwd(p->ctx, &dx, NULL, &dw, &dy, &dx, &x, &w, 1e-5f);
}

static void make_rmsnorm(problem *p, plain_shape *s) {
    p->terms = s->C;
    p->forward = rmsnorm_forward;
    p->backward = rmsnorm_backward;
    add_input(p, s->T * s->C, false);
    add_input(p, s->C, true);
    add_output(p, s->T * s->C);
    cr_assert_eq(gn_ctx_reserve(p->ctx, gn_linear_bwd_workspace(p->ctx, s->T, s->C, 1, 1)), GN_OK);
}

static gn_status swiglu_forward(problem *p) {
    const plain_shape *s = p->shape;
    gn_tensor y = rows2(p->out[0].y, s->T, s->C);
    const gn_tensor gate = rows2(p->in[0].x, s->T, s->C), up = rows2(p->in[1].x, s->T, s->C);
    return gn_swiglu(p->ctx, &y, &gate, &up);
}

static gn_status swiglu_backward(problem *p) {
    const plain_shape *s = p->shape;
    gn_tensor dgate = rows2(p->in[0].grad, s->T, s->C), dup = rows2(p->in[1].grad, s->T, s->C);
    const gn_tensor gate = rows2(p->in[0].x, s->T, s->C), up = rows2(p->in[1].x, s->T, s->C);
    const gn_tensor dy = rows2(p->out[0].dy, s->T, s->C);
    const gn_status status = gn_swiglu_bwd(p->ctx, &dgate, &dup, &dy, &gate, &up);
    const size_t bytes = (size_t)(s->T * s->C) * sizeof(float);
    float *both = malloc(2 * bytes); /* in place */
    gn_tensor g = rows2(both, s->T, s->C), u = rows2(both + s->T * s->C, s->T, s->C);
    memcpy(g.data, gate.data, bytes);
    memcpy(u.data, up.data, bytes);
    cr_assert_eq(gn_swiglu_bwd(p->ctx, &g, &u, &dy, &g, &u), GN_OK);
    cr_assert(!memcmp(g.data, dgate.data, bytes) && !memcmp(u.data, dup.data, bytes));
    free(both);
    return status;
}

static void make_swiglu(problem *p, plain_shape *s) {
    p->terms = 1;
    p->forward = swiglu_forward;
    p->backward = swiglu_backward;
    add_input(p, s->T * s->C, false);
    add_input(p, s->T * s->C, false);
    add_output(p, s->T * s->C);
}

static gn_status embed_forward(problem *p) {
    const plain_shape *s = p->shape;
    gn_tensor y = rows2(p->out[0].y, s->T, s->C);
    const gn_matrix table = {.dtype = GN_F32, .rows = s->V, .cols = s->C, .data = p->in[0].x};
    return gn_embed(p->ctx, &y, &table, s->ids, NULL, 0);
}

static gn_status embed_backward(problem *p) {
    const plain_shape *s = p->shape;
    gn_tensor dtable = rows2(p->in[0].grad, s->V, s->C);
    const gn_tensor dy = rows2(p->out[0].dy, s->T, s->C);
    return gn_embed_bwd(p->ctx, &dtable, &dy, s->ids);
}

static void make_embed(problem *p, plain_shape *s) {
    static int32_t ids[64];
    for (int i = 0; i < s->T; i++) ids[i] = i * i % s->V; /* some twice */
    s->ids = ids;
    p->terms = 1;
    p->forward = embed_forward;
    p->backward = embed_backward;
    add_input(p, s->V * s->C, true);
    add_output(p, s->T * s->C);
}

/* Labels: about one of three is ignored. The scale is every loss's dy. */
static gn_cross_entropy_args loss_args(problem *p, gn_matrix *w, bool wants_grads) {
    const plain_shape *s = p->shape;
    *w = (gn_matrix){.dtype = GN_F32, .rows = s->V, .cols = s->C, .data = p->in[1].x};
    gn_cross_entropy_args args = {.x = rows2(p->in[0].x, s->T, s->C),
                                  .lm_head = w,
                                  .labels = s->ids,
                                  .scale = 0.25f,
                                  .loss = gn_tensor_1d(p->out[0].y, GN_F32, s->T)};
    if (wants_grads) {
        args.dx = rows2(p->in[0].grad, s->T, s->C);
        args.dw = rows2(p->in[1].grad, s->V, s->C);
    }
    return args;
}

static gn_status loss_forward(problem *p) {
    gn_matrix w;
    const gn_cross_entropy_args args = loss_args(p, &w, false);
    return gn_cross_entropy(p->ctx, &args);
}

static gn_status loss_backward(problem *p) {
    gn_matrix w;
    gn_cross_entropy_args args = loss_args(p, &w, true);
    const plain_shape *s = p->shape;
    const gn_status status = gn_cross_entropy(p->ctx, &args);
    const size_t bytes = (size_t)(s->T * s->C) * sizeof(float);
    args.x.data = args.dx.data = memcpy(malloc(bytes), p->in[0].x, bytes); /* in place */
    args.dw.data = NULL;
    cr_assert_eq(gn_cross_entropy(p->ctx, &args), GN_OK);
    cr_assert(!memcmp(args.dx.data, p->in[0].grad, bytes));
    free(args.dx.data);
    for (int t = 0; t < s->T; t++)
        if (s->ids[t] == GN_IGNORED_LABEL) cr_assert_eq(p->out[0].y[t], 0.0f);
    return status;
}

static void make_loss(problem *p, plain_shape *s) {
    static int32_t labels[512];
    for (int i = 0; i < s->T; i++) labels[i] = i % 3 == 1 ? GN_IGNORED_LABEL : i * 5 % s->V;
    s->ids = labels;
    p->terms = s->C + s->V;
    p->forward = loss_forward;
    p->backward = loss_backward;
    add_input(p, s->T * s->C, false);
    add_input(p, s->V * s->C, true);
    add_output(p, s->T);
    for (int i = 0; i < s->T; i++) p->out[0].dy[i] = 0.25f;
    cr_assert_eq(gn_ctx_reserve(p->ctx, gn_cross_entropy_workspace(p->ctx, s->C, s->V)), GN_OK);
}

typedef struct {
    int heads, kv_heads, D, n;
    int32_t row0[6], pos0[6];
    float *lse, *cos, *sin;
    gn_seqs seqs;
} head_shape;

static int rows_of(const head_shape *s) {
    return s->row0[s->n];
}

static gn_status rope_forward(problem *p) {
    const head_shape *s = p->shape;
    const int T = rows_of(s);
    gn_tensor x = rows3(p->out[0].y, T, s->heads, s->D);
    const gn_tensor cos = rows2(s->cos, T, s->D / 2), sin = rows2(s->sin, T, s->D / 2);
    memcpy(x.data, p->in[0].x, (size_t)p->in[0].n * sizeof(float));
    return gn_rope(p->ctx, &x, &cos, &sin);
}

static gn_status rope_backward(problem *p) {
    const head_shape *s = p->shape;
    const int T = rows_of(s);
    gn_tensor dx = rows3(p->in[0].grad, T, s->heads, s->D);
    const gn_tensor cos = rows2(s->cos, T, s->D / 2), sin = rows2(s->sin, T, s->D / 2);
    memcpy(dx.data, p->out[0].dy, (size_t)p->out[0].n * sizeof(float));
    return gn_rope_bwd(p->ctx, &dx, &cos, &sin);
}

static void make_rope(problem *p, head_shape *s) {
    static float freq[64], cos[64 * 256], sin[64 * 256];
    const int T = rows_of(s);
    for (int i = 0; i < s->D / 2; i++) freq[i] = 1.0f / (1.0f + (float)i);
    s->cos = cos;
    s->sin = sin;
    gn_tensor tc = rows2(cos, T, s->D / 2), ts = rows2(sin, T, s->D / 2);
    const gn_tensor tf = gn_tensor_1d(freq, GN_F32, s->D / 2);
    cr_assert_eq(gn_rope_table(p->ctx, &tc, &ts, &tf, &s->seqs), GN_OK);
    p->terms = 2;
    p->forward = rope_forward;
    p->backward = rope_backward;
    add_input(p, T * s->heads * s->D, false);
    add_output(p, T * s->heads * s->D);
}

static gn_attention_rows attention_of(problem *p) {
    const head_shape *s = p->shape;
    const int T = rows_of(s);
    return (gn_attention_rows){.q = rows3(p->in[0].x, T, s->heads, s->D),
                               .k = rows3(p->in[1].x, T, s->kv_heads, s->D),
                               .v = rows3(p->in[2].x, T, s->kv_heads, s->D),
                               .y = rows3(p->out[0].y, T, s->heads, s->D),
                               .lse = rows2(s->lse, T, s->heads),
                               .seqs = &s->seqs};
}

static gn_status attention_forward(problem *p) {
    const gn_attention_rows rows = attention_of(p);
    return gn_attention_train(p->ctx, &rows);
}

static gn_status attention_backward(problem *p) {
    const head_shape *s = p->shape;
    const int T = rows_of(s);
    const gn_attention_rows rows = attention_of(p);
    gn_tensor dq = rows3(p->in[0].grad, T, s->heads, s->D);
    gn_tensor dk = rows3(p->in[1].grad, T, s->kv_heads, s->D);
    gn_tensor dv = rows3(p->in[2].grad, T, s->kv_heads, s->D);
    const gn_tensor dy = rows3(p->out[0].dy, T, s->heads, s->D);
    return gn_attention_bwd(p->ctx, &dq, &dk, &dv, &dy, &rows);
}

static void make_attention(problem *p, head_shape *s) {
    static float lse[8 * 256];
    const int T = rows_of(s);
    s->lse = lse;
    p->terms = T + s->D;
    p->forward = attention_forward;
    p->backward = attention_backward;
    add_input(p, T * s->heads * s->D, false);
    add_input(p, T * s->kv_heads * s->D, false);
    add_input(p, T * s->kv_heads * s->D, false);
    add_output(p, T * s->heads * s->D);
    cr_assert_eq(gn_ctx_reserve(p->ctx, gn_attention_train_workspace(p->ctx, T, s->heads, s->D, T)),
                 GN_OK);
}

/* ---- products ---- */

typedef struct {
    int T, K, N[GN_MAX_PARTS], n_parts;
    gn_qtype qtype;
    gn_dtype dtype;
    int rank[GN_MAX_PARTS], row0, rows; /* of the LoRA term */
    float dropout;
    bool norm;
    /* made from these */
    random_matrix m[GN_MAX_PARTS];
    gn_lora_pair pairs[2 + GN_MAX_PARTS];
    gn_lora lora;
    gn_tensor weight;
} linear_shape;

enum { FIRST_PAIR = 2 };

/* Weights of plain float32 are trained too; the inputs are x, then w, A and B of each part. */
static bool trains_weight(const linear_shape *s) {
    return s->qtype == GN_Q_NONE && s->dtype == GN_F32;
}

static gn_linear_args linear_args(problem *p) {
    linear_shape *s = p->shape;
    gn_linear_args args = {.x = rows2(p->in[0].x, s->T, s->K),
                           .norm = s->norm ? &s->weight : NULL,
                           .eps = 1e-5f,
                           .lora = &s->lora,
                           .n_lora = 1,
                           .pair = FIRST_PAIR,
                           .dropout = {.p = s->dropout, .step = 7, .seed = 11},
                           .n_parts = s->n_parts};
    for (int i = 0; i < s->n_parts; i++)
        args.part[i] = (struct gn_linear_part){rows2(p->out[i].y, s->T, s->N[i]), &s->m[i].m};
    return args;
}

static gn_status linear_forward(problem *p) {
    const gn_linear_args args = linear_args(p);
    return gn_linear(p->ctx, &args);
}

static gn_status linear_backward(problem *p) {
    const linear_shape *s = p->shape;
    const gn_linear_args args = linear_args(p);
    gn_linear_grads grads = {0};
    if (p->in[0].grad) grads.dx = rows2(p->in[0].grad, s->T, s->K);
    for (int i = 0, at = 1; i < s->n_parts; i++) {
        struct gn_linear_part_grads *part = &grads.part[i];
        part->dy = rows2(p->out[i].dy, s->T, s->N[i]);
        if (trains_weight(s)) part->dw = rows2(p->in[at++].grad, s->N[i], s->K);
        if (s->rank[i] == 0) continue;
        part->da = rows2(p->in[at++].grad, s->rank[i], s->K);
        part->db = rows2(p->in[at++].grad, s->N[i], s->rank[i]);
    }
    return gn_linear_bwd(p->ctx, &args, &grads);
}

static void make_linear(problem *p, linear_shape *s) {
    p->shape = s;
    p->terms = s->K + s->rank[0];
    p->forward = linear_forward;
    p->backward = linear_backward;
    add_input(p, s->T * s->K, false);
    if (s->norm) p->in[0].grad = NULL; /* dx is norm(x)'s */
    s->weight = gn_tensor_1d(random_floats(&p->r, (size_t)s->K), GN_F32, s->K);
    for (int i = 0, at = 1; i < s->n_parts; i++) {
        const int N = s->N[i], rank = s->rank[i];
        s->m[i] = make_matrix(&p->r, s->qtype, s->qtype != GN_Q_INT8, s->dtype, N, s->K);
        add_output(p, s->T * N);
        if (trains_weight(s)) {
            add_input(p, N * s->K, true);
            s->m[i].m.data = p->in[at++].x;
        }
        gn_lora_pair *pair = &s->pairs[FIRST_PAIR + i];
        pair->rank = rank;
        if (rank == 0) continue;
        add_input(p, rank * s->K, true);
        add_input(p, N * rank, true);
        pair->scale = 1.5f;
        pair->a = rows2(p->in[at++].x, rank, s->K);
        pair->b = rows2(p->in[at++].x, N, rank);
    }
    s->lora = (gn_lora){.row0 = s->row0, .rows = s->rows, .scale = 0.5f, .pairs = s->pairs};
    const int max_n = s->N[0] + s->N[1] + s->N[2];
    const size_t bytes = gn_linear_bwd_workspace(p->ctx, s->T, s->K, max_n, 64);
    cr_assert_eq(gn_ctx_reserve(p->ctx, bytes), GN_OK);
}

static void free_linear(problem *p) {
    linear_shape *s = p->shape;
    for (int i = 0; i < s->n_parts; i++) free_matrix(&s->m[i]);
    free(s->weight.data);
    free_problem(p);
}

static const struct {
    gn_qtype qtype;
    gn_dtype dtype;
} types[] = {{GN_Q_NF4, GN_BF16},     {GN_Q_FP4, GN_F16},   {GN_Q_FP4_E2M1, GN_F32},
             {GN_Q_FP4_E3M0, GN_F32}, {GN_Q_INT4, GN_BF16}, {GN_Q_INT8, GN_F16},
             {GN_Q_NONE, GN_F32},     {GN_Q_NONE, GN_BF16}, {GN_Q_NONE, GN_F16}};
static const linear_shape linear_shapes[] = {
    {.T = 1, .K = 2, .N = {3}, .n_parts = 1, .rank = {1}, .rows = 1},
    {.T = 7, .K = 65, .N = {33, 5, 12}, .n_parts = 3, .rank = {3, 0, 17}, .row0 = 2, .rows = 4},
    {.T = 13, .K = 128, .N = {96, 31}, .n_parts = 2, .rank = {8, 4}, .rows = 13, .dropout = 0.3f},
    {.T = 110,
     .K = 321,
     .N = {300},
     .n_parts = 1,
     .rank = {64},
     .row0 = 9,
     .rows = 101,
     .dropout = 0.1f},
    {.T = 9,
     .K = 64,
     .N = {70, 70, 35},
     .n_parts = 3,
     .rank = {8, 8, 8},
     .rows = 9,
     .norm = true,
     .dropout = 0.5f},
};

Test(backward, linear) {
    for (int i = 0; i < COUNT(linear_shapes) * COUNT(types) * COUNT(isas); i++) {
        char what[96];
        linear_shape s = linear_shapes[i / COUNT(types) / COUNT(isas)];
        const gn_isa isa = isas[i % COUNT(isas)];
        s.qtype = types[i / COUNT(isas) % COUNT(types)].qtype;
        s.dtype = types[i / COUNT(isas) % COUNT(types)].dtype;
        problem p = {.ctx = open_ctx(isa, GN_F32, 2), .r = {(uint64_t)i}};
        snprintf(what, sizeof what, "linear T %d K %d N %d %s isa %d", s.T, s.K, s.N[0],
                 gn_qtype_name(s.qtype), (int)isa);
        make_linear(&p, &s);
        check_differences(&p, what);
        check_threads(&p, what);
        free_linear(&p);
        gn_ctx_close(p.ctx);
    }
}

/* ---- dropout ---- */

Test(backward, philox_gives_the_published_numbers) {
    static const struct {
        uint32_t counter[4];
        uint64_t key;
        uint32_t expected[4];
    } cases[] = {
        {{0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{~0u, ~0u, ~0u, ~0u}, ~0ull, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         0x299f31d0a4093822,
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (int i = 0; i < COUNT(cases); i++) {
        uint32_t out[4];
        gn_philox(out, cases[i].counter, cases[i].key);
        for (int j = 0; j < 4; j++) cr_assert_eq(out[j], cases[i].expected[j]);
    }
}

/* The mask of one module, and how much of it is dropped. */
static double mask_of(float *mask, gn_dropout dropout, uint32_t module, int rows, int cols) {
    double dropped = 0;
    for (int i = 0; i < rows * cols / 4; i++)
        gn_dropout_quad(mask + 4 * i, &dropout, module, (uint32_t)(4 * i / cols),
                        (uint32_t)(4 * i % cols / 4));
    for (int i = 0; i < rows * cols; i++) {
        cr_assert(mask[i] == 0 || mask[i] == 1 / (1 - dropout.p));
        dropped += mask[i] == 0;
    }
    return dropped / (rows * cols);
}

Test(backward, dropout_masks_are_repeatable_and_independent) {
    enum { ROWS = 64, COLS = 256, N = ROWS * COLS };
    static float mask[N], other[N];
    const gn_dropout base = {.p = 0.1f, .step = 3, .seed = 5};
    gn_dropout step = base, seed = base;
    step.step++;
    seed.seed++;
    const double share = mask_of(mask, base, 4, ROWS, COLS);
    cr_assert(fabs(share - 0.1) < 4 * sqrt(0.1 * 0.9 / N), "%g", share);
    mask_of(other, base, 4, ROWS, COLS);
    cr_assert(memcmp(mask, other, sizeof mask) == 0);
    for (int i = 0; i < 3; i++) { /* two that are independent agree in .82 of the places */
        int same = 0;
        mask_of(other, i == 0 ? step : i == 1 ? seed : base, i == 2 ? 5 : 4, ROWS, COLS);
        for (int j = 0; j < N; j++) same += mask[j] == other[j];
        cr_assert(fabs((double)same / N - 0.82) < 4 * sqrt(0.82 * 0.18 / N), "%d: %d", i, same);
    }
    cr_assert_eq(mask_of(mask, (gn_dropout){.p = 0}, 4, ROWS, COLS), 0.0);
}

/* With W = 0, A = 1 and B = 1 a product shows how much of x its mask keeps: 1/(1-p) of each kept
 * one. All instruction sets must agree with the mask as it is defined. */
Test(backward, products_use_the_mask_of_their_module) {
    enum { T = 5, K = 70, MODULE = 9 };
    for (int i = 0; i < COUNT(isas) + 1; i++) {
        const bool bf16 = i == COUNT(isas); /* which holds these x exactly */
        gn_ctx *ctx = open_ctx(bf16 ? GN_ISA_AVX512BF16 : isas[i], bf16 ? GN_BF16 : GN_F32, 2);
        float x[T * K], w[2 * K] = {0}, a[K], b[2] = {1, 1}, y[2][T * 2];
        for (int j = 0; j < T * K; j++) x[j] = (float)(1 << j % 8);
        for (int j = 0; j < K; j++) a[j] = 1;
        const gn_matrix m = {.dtype = GN_F32, .rows = 2, .cols = K, .data = w};
        gn_lora_pair pairs[MODULE + 2] = {0};
        pairs[MODULE] = pairs[MODULE + 1] = (gn_lora_pair){1, 1, rows2(a, 1, K), rows2(b, 2, 1)};
        const gn_lora lora = {.rows = T, .scale = 1, .pairs = pairs};
        const gn_linear_args args = {.x = rows2(x, T, K),
                                     .lora = &lora,
                                     .n_lora = 1,
                                     .pair = MODULE,
                                     .dropout = {.p = 0.5f, .step = 1, .seed = 2},
                                     .n_parts = 2,
                                     .part = {{rows2(y[0], T, 2), &m}, {rows2(y[1], T, 2), &m}}};
        cr_assert_eq(gn_ctx_reserve(ctx, gn_linear_bwd_workspace(ctx, T, K, 4, 1)), GN_OK);
        cr_assert_eq(gn_linear(ctx, &args), GN_OK);
        for (int part = 0; part < 2; part++)
            for (int t = 0; t < T; t++) {
                float expected = 0; /* small integers: exact in any order */
                for (int k = 0; k < K; k++) {
                    float factor[4];
                    gn_dropout_quad(factor, &args.dropout, (uint32_t)(MODULE + part), (uint32_t)t,
                                    (uint32_t)(k / 4));
                    expected += x[t * K + k] * factor[k % 4];
                }
                cr_assert_eq(y[part][t * 2], expected);
                cr_assert_eq(y[part][t * 2 + 1], expected);
            }
        gn_ctx_close(ctx);
    }
}

/* ---- over shapes, instruction sets and threads ---- */

static const plain_shape plain_shapes[] = {
    {1, 1, 2, false, NULL},    {3, 7, 5, true, NULL},      {5, 64, 33, false, NULL},
    {17, 33, 100, true, NULL}, {40, 320, 257, true, NULL},
};
static const plain_shape loss_shapes[] = {
    {1, 1, 2, false, NULL},
    {3, 7, 5, false, NULL},
    {17, 33, 100, false, NULL},
    {400, 12, 1100, false, NULL}, /* rows and vocabulary in several turns */
};
static const head_shape head_shapes[] = {
    {.heads = 1, .kv_heads = 1, .D = 2, .n = 1, .row0 = {0, 1}},
    {.heads = 4, .kv_heads = 2, .D = 6, .n = 4, .row0 = {0, 3, 3, 4, 11}},
    {.heads = 6, .kv_heads = 2, .D = 64, .n = 2, .row0 = {0, 70, 75}},
    {.heads = 2, .kv_heads = 2, .D = 80, .n = 3, .row0 = {0, 130, 131, 200}, .pos0 = {0, 5, 9}},
};

typedef void make_plain(problem *, plain_shape *);
typedef void make_heads(problem *, head_shape *);

static void check_plain(make_plain *make, const plain_shape *shapes, int n, const char *name) {
    for (int i = 0; i < n * COUNT(isas); i++) {
        char what[96];
        plain_shape s = shapes[i / COUNT(isas)];
        problem p = {.ctx = open_ctx(isas[i % COUNT(isas)], GN_F32, 2), .r = {(uint64_t)i}};
        p.shape = &s;
        snprintf(what, sizeof what, "%s T %d C %d V %d isa %d", name, s.T, s.C, s.V,
                 (int)isas[i % COUNT(isas)]);
        make(&p, &s);
        check_differences(&p, what);
        check_threads(&p, what);
        free_problem(&p);
        gn_ctx_close(p.ctx);
    }
}

static void check_heads(make_heads *make, const char *name) {
    for (int i = 0; i < COUNT(head_shapes) * COUNT(isas); i++) {
        char what[96];
        head_shape s = head_shapes[i / COUNT(isas)];
        s.seqs = (gn_seqs){.n = s.n, .row0 = s.row0, .pos0 = s.pos0};
        problem p = {.ctx = open_ctx(isas[i % COUNT(isas)], GN_F32, 2), .r = {(uint64_t)i}};
        p.shape = &s;
        snprintf(what, sizeof what, "%s T %d heads %d/%d D %d isa %d", name, rows_of(&s), s.heads,
                 s.kv_heads, s.D, (int)isas[i % COUNT(isas)]);
        make(&p, &s);
        check_differences(&p, what);
        check_threads(&p, what);
        free_problem(&p);
        gn_ctx_close(p.ctx);
    }
}

Test(backward, rmsnorm) {
    check_plain(make_rmsnorm, plain_shapes + 1, COUNT(plain_shapes) - 1, "rmsnorm");
}

Test(backward, swiglu) {
    check_plain(make_swiglu, plain_shapes, COUNT(plain_shapes), "swiglu");
}

Test(backward, embed) {
    check_plain(make_embed, plain_shapes, COUNT(plain_shapes), "embed");
}

Test(backward, cross_entropy) {
    check_plain(make_loss, loss_shapes, COUNT(loss_shapes), "cross_entropy");
}

Test(backward, rope) {
    check_heads(make_rope, "rope");
}

Test(backward, attention) {
    check_heads(make_attention, "attention");
}

/* A sample's rows are the same bits alone and packed among others, forward and backward. */
Test(backward, packed_samples_do_not_see_each_other) {
    enum { HEADS = 4, KV = 2, D = 16, T = 103, FIRST = 30, LAST = 101 };
    head_shape packed = {
        .heads = HEADS, .kv_heads = KV, .D = D, .n = 3, .row0 = {0, FIRST, LAST, T}};
    head_shape alone = {.heads = HEADS, .kv_heads = KV, .D = D, .n = 1, .row0 = {0, LAST - FIRST}};
    packed.seqs = (gn_seqs){.n = 3, .row0 = packed.row0, .pos0 = packed.pos0};
    alone.seqs = (gn_seqs){.n = 1, .row0 = alone.row0, .pos0 = alone.pos0};
    for (int i = 0; i < COUNT(isas); i++) {
        gn_ctx *ctx = open_ctx(isas[i], GN_F32, 2);
        problem p = {.ctx = ctx, .r = {1}, .shape = &packed}, q = {.ctx = ctx, .shape = &alone};
        make_attention(&p, &packed);
        make_attention(&q, &alone);
        for (int j = 0; j < 3; j++) {
            const int width = (j ? KV : HEADS) * D;
            memcpy(q.in[j].x, p.in[j].x + FIRST * width, (size_t)q.in[j].n * sizeof(float));
        }
        memcpy(q.out[0].dy, p.out[0].dy + FIRST * HEADS * D, (size_t)q.out[0].n * sizeof(float));
        for (problem *each = &p; each; each = each == &p ? &q : NULL) {
            cr_assert_eq(each->forward(each), GN_OK);
            cr_assert_eq(each->backward(each), GN_OK);
        }
        cr_assert(!memcmp(q.out[0].y, p.out[0].y + FIRST * HEADS * D,
                          (size_t)q.out[0].n * sizeof(float)));
        for (int j = 0; j < 3; j++) {
            const int width = (j ? KV : HEADS) * D;
            cr_assert(!memcmp(q.in[j].grad, p.in[j].grad + FIRST * width,
                              (size_t)q.in[j].n * sizeof(float)),
                      "input %d", j);
        }
        free_problem(&p);
        free_problem(&q);
        gn_ctx_close(ctx);
    }
}
