/* The ops of training but for products and attention, on the GPU against the CPU. Every one runs
 * twice and must give the same bits. */
#include "device.h"

static const gn_dtype computes[] = {GN_BF16, GN_F32};

static const struct {
    int T, C, pad, shift;
} rows_cases[] = {{1, 1, 0, 0},    {3, 63, 0, 0},   {5, 64, 3, 0},   {1, 4096, 0, 0},
                  {17, 288, 8, 0}, {64, 65, 0, 1},  {2, 2752, 5, 0}, {40, 320, 16, 1},
                  {129, 24, 0, 0}, {300, 96, 0, 0}, {9, 257, 1, 0},  {2, 8200, 0, 0}};

/* ---- what a case is made of ---- */

enum { MAX_TENSORS = 8 };

/* Tensors of a call: dense floats on the host, which are rounded to their dtype, and their place on
 * the GPU. Outputs are judged. */
typedef struct {
    const sides *sides;
    int n;
    struct operand {
        float *host;                      /* what goes in, or NULL */
        float *expected, *error, *got[2]; /* of an output */
        int rows, cols;
        gn_dtype dtype;
        gn_tensor gpu;
    } at[MAX_TENSORS];
    device_memory memory;
    char name[256];
} op_case;

static float *floats(int rows, int cols) {
    return calloc((size_t)rows * (size_t)cols, sizeof(float));
}

/* The index of a new tensor, random unless `is_empty`. */
static int add_tensor(op_case *c, rng *r, gn_dtype dtype, int rows, int cols, bool is_empty,
                      bool is_output) {
    struct operand *o = &c->at[c->n];
    *o = (struct operand){.rows = rows, .cols = cols, .dtype = dtype};
    if (!is_empty) {
        o->host = random_floats(r, (size_t)rows * (size_t)cols);
        round_floats(o->host, dtype, (int64_t)rows * cols);
    }
    if (is_output) {
        o->expected = floats(rows, cols);
        o->error = floats(rows, cols);
        for (int i = 0; i < 2; i++) o->got[i] = floats(rows, cols);
        if (o->host) memcpy(o->expected, o->host, (size_t)rows * (size_t)cols * sizeof(float));
    }
    return c->n++;
}

static void place_tensors(op_case *c, int pad, int shift) {
    c->memory = (device_memory){.ctx = c->sides->gpu};
    for (int i = 0; i < c->n; i++) {
        struct operand *o = &c->at[i];
        o->gpu = device_rows(&c->memory, o->host, o->dtype, o->rows, o->cols, pad, shift);
    }
}

/* Reads run `run`'s outputs and takes the tensors from the GPU; NULL, or what went wrong. */
static const char *take_outputs(op_case *c, int run) {
    const char *why = NULL;
    for (int i = 0; i < c->n && !why; i++)
        if (c->at[i].got[run] && !read_rows(c->sides->gpu, c->at[i].got[run], &c->at[i].gpu))
            why = "a gap between rows is written";
    if (!why && !guards_stand(&c->memory)) why = "a guard is written";
    device_free(&c->memory);
    return why;
}

/* A dense float32 view for the CPU: what is expected of an output, else what goes in. */
static gn_tensor on_cpu(const op_case *c, int i) {
    const struct operand *o = &c->at[i];
    return gn_tensor_2d(o->expected ? o->expected : o->host, GN_F32, o->rows, o->cols);
}

static void settle_case(tally *tally, op_case *c, const char *why) {
    verdict v = {0};
    snprintf(v.name, sizeof v.name, "%s", c->name);
    for (int i = 0; i < c->n; i++) {
        struct operand *o = &c->at[i];
        const double unit = (o->dtype == GN_BF16 ? U16 : U32) + U32; /* the GPU's and the CPU's */
        for (int j = 0; o->expected && !why && j < o->rows * o->cols; j++)
            judge(&v, j / o->cols, j % o->cols, o->got[0][j], o->expected[j],
                  o->error[j] + unit * (fabs((double)o->expected[j]) + o->error[j]));
        if (o->expected && !why &&
            memcmp(o->got[0], o->got[1], (size_t)(o->rows * o->cols) * sizeof(float)))
            why = "the second run gave other bits";
    }
    settle(tally, &v, why);
    for (int i = 0; i < c->n; i++) {
        free(c->at[i].host);
        free(c->at[i].expected);
        free(c->at[i].error);
        free(c->at[i].got[0]);
        free(c->at[i].got[1]);
    }
}

/* Gradients have the activations' dtype or float32. */
static gn_dtype gradient_dtype(const sides *s, int which) {
    return which % 2 ? GN_F32 : gn_ctx_activation(s->gpu);
}

/* ---- RMSNorm ---- */

enum { NORM_DX, NORM_DW, NORM_DY, NORM_SKIP, NORM_X, NORM_W, NORM_ROUNDED };

static const float EPS_NORM = 1e-5f;

static void norm_errors(op_case *c, bool has_skip) {
    struct operand *dx = &c->at[NORM_DX], *dw = &c->at[NORM_DW], *rounded = &c->at[NORM_ROUNDED];
    const float *x = c->at[NORM_X].host, *dy = c->at[NORM_DY].host, *w = c->at[NORM_W].host;
    const float *skip = c->at[NORM_SKIP].host;
    const int C = dx->cols;
    for (int t = 0; t < dx->rows; t++) {
        double squares = 0, along = 0;
        for (int i = 0; i < C; i++) {
            const double value = x[t * C + i];
            squares += value * value;
            along += fabs(w[i] * (double)dy[t * C + i] * value);
        }
        const double r = 1 / sqrt(squares / C + EPS_NORM);
        for (int i = 0; i < C; i++) {
            const int at = t * C + i;
            const double size = (has_skip ? fabs((double)skip[at]) : 0) + r * fabs(w[i] * dy[at]) +
                                r * r * r * along / C * fabs((double)x[at]);
            dx->error[at] = (float)((sqrt(C) + 8) * U32 * size);
            if (rounded->error) rounded->error[at] = dx->error[at];
            dw->error[i] +=
                (float)((sqrt(C) + sqrt(dx->rows) + 8) * U32 * r * fabs((double)x[at] * dy[at]));
        }
    }
}

static void check_rmsnorm_bwd(tally *tally, const sides *s, int i, int variant) {
    const int T = rows_cases[i].T, C = rows_cases[i].C;
    const bool has_skip = variant % 2, in_place = variant % 4 == 3, has_dw = variant < 4;
    const bool rounds = variant % 3 == i % 3, over_dy = rounds && variant % 4 > 1;
    const gn_dtype act = gn_ctx_activation(s->gpu);
    rng r = {(uint64_t)(i * 8 + variant)};
    op_case c = {.sides = s};
    const gn_dtype dtype = gradient_dtype(s, variant / 2);
    snprintf(c.name, sizeof c.name, "%s rmsnorm_bwd T=%d C=%d %s%s%s%s%s",
             gn_dtype_name(s->compute), T, C, gn_dtype_name(dtype),
             over_dy  ? " over dy"
             : rounds ? " rounded"
                      : "",
             has_skip ? " skip" : "", in_place ? " in place" : "", has_dw ? " dw" : "");
    add_tensor(&c, &r, dtype, T, C, true, true);
    add_tensor(&c, &r, GN_F32, 1, C, false, true);
    add_tensor(&c, &r, over_dy ? act : gradient_dtype(s, variant), T, C, false, false);
    add_tensor(&c, &r, in_place ? dtype : gradient_dtype(s, variant + 1), T, C, false, false);
    add_tensor(&c, &r, variant % 3 ? GN_F32 : act, T, C, false, false);
    add_tensor(&c, &r, GN_F32, 1, C, false, false);
    if (rounds) add_tensor(&c, &r, act, T, C, true, true);
    const char *why = NULL;
    for (int run = 0; run < 2 && !why; run++) {
        place_tensors(&c, rows_cases[i].pad, rows_cases[i].shift);
        if (over_dy) c.at[NORM_ROUNDED].gpu = c.at[NORM_DY].gpu;
        if (in_place) c.at[NORM_DX].gpu = c.at[NORM_SKIP].gpu;
        gn_tensor dw = gn_tensor_1d(c.at[NORM_DW].gpu.data, GN_F32, C);
        const gn_tensor w = gn_tensor_1d(c.at[NORM_W].gpu.data, GN_F32, C);
        if (!has_dw) dw.data = NULL;
        reserve(s->gpu, gn_linear_bwd_workspace(s->gpu, T, C, 1, 1));
        why =
            ran(s->gpu,
                gn_rmsnorm_bwd(s->gpu, &c.at[NORM_DX].gpu, rounds ? &c.at[NORM_ROUNDED].gpu : NULL,
                               &dw, &c.at[NORM_DY].gpu, has_skip ? &c.at[NORM_SKIP].gpu : NULL,
                               &c.at[NORM_X].gpu, &w, EPS_NORM),
                c.name);
        const char *taken = take_outputs(&c, run);
        if (!why) why = taken;
    }
    gn_tensor dx = on_cpu(&c, NORM_DX);
    gn_tensor dw = gn_tensor_1d(has_dw ? c.at[NORM_DW].expected : NULL, GN_F32, C);
    gn_tensor rounded = on_cpu(&c, NORM_ROUNDED);
    const gn_tensor dy = on_cpu(&c, NORM_DY), skip = on_cpu(&c, NORM_SKIP);
    const gn_tensor x = on_cpu(&c, NORM_X), w = gn_tensor_1d(c.at[NORM_W].host, GN_F32, C);
    cr_assert_eq(gn_ctx_reserve(s->cpu, gn_linear_bwd_workspace(s->cpu, T, C, 1, 1)), GN_OK);
    cr_assert_eq(gn_rmsnorm_bwd(s->cpu, &dx, rounds ? &rounded : NULL, &dw, &dy,
                                has_skip ? &skip : NULL, &x, &w, EPS_NORM),
                 GN_OK);
    norm_errors(&c, has_skip);
    settle_case(tally, &c, why);
}

Test(gpu_train, rmsnorm_bwd) {
    tally tally = {0};
    for (int i = 0; i < COUNT(computes); i++) {
        sides s = open_sides(computes[i]);
        for (int j = 0; j < COUNT(rows_cases) * 8; j++)
            if (!is_brief() || j % 3 == 0) check_rmsnorm_bwd(&tally, &s, j / 8, j % 8);
        close_sides(&s);
    }
    conclude(&tally, "rmsnorm_bwd");
}

/* ---- SwiGLU ---- */

enum { GLU_A, GLU_B, GLU_GATE, GLU_UP, GLU_DY };

/* Of a sigmoid: exp2 of a rounded product. */
static double sigmoid_error(double gate) {
    return (24 + 4 * fabs(gate)) * U32;
}

static void glu_errors(op_case *c, bool backward) {
    for (int i = 0; i < c->at[GLU_A].rows * c->at[GLU_A].cols; i++) {
        const double g = c->at[GLU_GATE].host[i], u = c->at[GLU_UP].host[i];
        const double dy = c->at[GLU_DY].host[i], e = sigmoid_error(g), s = 1 / (1 + exp(-g));
        c->at[GLU_A].error[i] =
            (float)(e * (backward ? fabs(dy * u) * s * (1 + fabs(g)) : fabs(g * s * u)));
        c->at[GLU_B].error[i] = (float)(backward ? e * fabs(dy * g) * s : 0);
    }
}

/* Backward, or forward into A; in place: gradients where gate and up were. */
static void check_swiglu(tally *tally, const sides *s, int i, bool backward, int variant) {
    const int T = rows_cases[i].T, C = rows_cases[i].C;
    const gn_dtype act = gn_ctx_activation(s->gpu);
    const bool in_place = backward && variant == 2;
    rng r = {(uint64_t)(100 + i * 8 + variant)};
    op_case c = {.sides = s};
    snprintf(c.name, sizeof c.name, "%s swiglu%s T=%d C=%d variant %d", gn_dtype_name(s->compute),
             backward ? "_bwd" : "", T, C, variant);
    add_tensor(&c, &r, backward ? gradient_dtype(s, variant) : act, T, C, true, true);
    add_tensor(&c, &r, gradient_dtype(s, variant / 2), T, C, backward, true);
    add_tensor(&c, &r, act, T, C, false, false);
    add_tensor(&c, &r, act, T, C, false, false);
    add_tensor(&c, &r, gradient_dtype(s, variant + 1), T, C, false, false);
    for (int j = 0; j < T * C; j++) c.at[GLU_GATE].host[j] *= 8; /* both ends of the sigmoid */
    const char *why = NULL;
    for (int run = 0; run < 2 && !why; run++) {
        place_tensors(&c, rows_cases[i].pad, rows_cases[i].shift);
        if (in_place) c.at[GLU_A].gpu = c.at[GLU_GATE].gpu, c.at[GLU_B].gpu = c.at[GLU_UP].gpu;
        why = ran(s->gpu,
                  backward
                      ? gn_swiglu_bwd(s->gpu, &c.at[GLU_A].gpu, &c.at[GLU_B].gpu, &c.at[GLU_DY].gpu,
                                      &c.at[GLU_GATE].gpu, &c.at[GLU_UP].gpu)
                      : gn_swiglu(s->gpu, &c.at[GLU_A].gpu, &c.at[GLU_GATE].gpu, &c.at[GLU_UP].gpu),
                  c.name);
        const char *taken = take_outputs(&c, run);
        if (!why) why = taken;
    }
    if (in_place) c.at[GLU_A].dtype = c.at[GLU_B].dtype = act;
    gn_tensor a = on_cpu(&c, GLU_A), b = on_cpu(&c, GLU_B);
    const gn_tensor gate = on_cpu(&c, GLU_GATE), up = on_cpu(&c, GLU_UP), dy = on_cpu(&c, GLU_DY);
    cr_assert_eq(backward ? gn_swiglu_bwd(s->cpu, &a, &b, &dy, &gate, &up)
                          : gn_swiglu(s->cpu, &a, &gate, &up),
                 GN_OK);
    glu_errors(&c, backward);
    settle_case(tally, &c, why);
}

Test(gpu_train, swiglu) {
    tally tally = {0};
    for (int i = 0; i < COUNT(computes); i++) {
        sides s = open_sides(computes[i]);
        for (int j = 0; j < COUNT(rows_cases) * 4; j++) {
            if (is_brief() && j % 3 != 0) continue;
            check_swiglu(&tally, &s, j / 4, j % 4 < 3, j % 4);
        }
        close_sides(&s);
    }
    conclude(&tally, "swiglu");
}

/* ---- rotary positions ---- */

static const struct {
    int T, heads, D, pad;
} rope_cases[] = {{1, 1, 2, 0},   {7, 4, 64, 0},    {33, 3, 34, 0},
                  {64, 2, 80, 8}, {200, 8, 128, 0}, {5, 1, 256, 3}};

static gn_tensor with_heads(gn_tensor t, int heads) {
    t.ndim = 3;
    t.shape[2] = t.shape[1] / heads;
    t.shape[1] = heads;
    return t;
}

static gn_status rotate(gn_ctx *ctx, gn_tensor *x, const gn_tensor *cos, const gn_tensor *sin,
                        bool back) {
    return back ? gn_rope_bwd(ctx, x, cos, sin) : gn_rope(ctx, x, cos, sin);
}

static void check_rope(tally *tally, const sides *s, int i, int variant) {
    const int T = rope_cases[i].T, heads = rope_cases[i].heads, D = rope_cases[i].D;
    const bool back = variant > 0;
    rng r = {(uint64_t)(i * 4 + variant)};
    op_case c = {.sides = s};
    snprintf(c.name, sizeof c.name, "%s rope%s T=%d heads %d of %d, variant %d",
             gn_dtype_name(s->compute), back ? "_bwd" : "", T, heads, D, variant);
    add_tensor(&c, &r, gradient_dtype(s, variant == 2), T, heads * D, false, true);
    add_tensor(&c, &r, GN_F32, T, D / 2, false, false);
    add_tensor(&c, &r, GN_F32, T, D / 2, false, false);
    const char *why = NULL;
    for (int run = 0; run < 2 && !why; run++) {
        place_tensors(&c, rope_cases[i].pad, 0);
        gn_tensor x = with_heads(c.at[0].gpu, heads);
        why = ran(s->gpu, rotate(s->gpu, &x, &c.at[1].gpu, &c.at[2].gpu, back), c.name);
        const char *taken = take_outputs(&c, run);
        if (!why) why = taken;
    }
    gn_tensor x = with_heads(on_cpu(&c, 0), heads);
    const gn_tensor cos = on_cpu(&c, 1), sin = on_cpu(&c, 2);
    cr_assert_eq(rotate(s->cpu, &x, &cos, &sin, back), GN_OK);
    for (int j = 0; j < T * heads * D; j++) c.at[0].error[j] = (float)(8 * U32); /* of |x| <= 1 */
    settle_case(tally, &c, why);
}

Test(gpu_train, rope) {
    tally tally = {0};
    for (int i = 0; i < COUNT(computes); i++) {
        sides s = open_sides(computes[i]);
        for (int j = 0; j < COUNT(rope_cases) * 3; j++) check_rope(&tally, &s, j / 3, j % 3);
        close_sides(&s);
    }
    conclude(&tally, "rope");
}

/* ---- embedding ---- */

/* The same sums in the same order: the same bits. */
static void check_embed_bwd(tally *tally, const sides *s, int T, int C, int V, int pad) {
    rng r = {(uint64_t)(T + C)};
    op_case c = {.sides = s};
    snprintf(c.name, sizeof c.name, "embed_bwd T=%d C=%d V=%d pad %d", T, C, V, pad);
    add_tensor(&c, &r, GN_F32, V, C, false, true);
    add_tensor(&c, &r, GN_F32, T, C, false, false);
    int32_t *ids = malloc((size_t)T * sizeof *ids);
    for (int t = 0; t < T; t++) ids[t] = t % 3 ? rng_below(&r, V) : V / 2;
    const int32_t row0[] = {0, T}, pos0[] = {0};
    const gn_seqs seqs = {.n = 1, .row0 = row0, .pos0 = pos0};
    cr_assert_eq(gn_stage(s->gpu, ids, &seqs, NULL, 0), GN_OK);
    const char *why = NULL;
    for (int run = 0; run < 2 && !why; run++) {
        place_tensors(&c, pad, 0);
        why = ran(s->gpu, gn_embed_bwd(s->gpu, &c.at[0].gpu, &c.at[1].gpu, ids), c.name);
        const char *taken = take_outputs(&c, run);
        if (!why) why = taken;
    }
    gn_tensor dtable = on_cpu(&c, 0);
    const gn_tensor dy = on_cpu(&c, 1);
    cr_assert_eq(gn_embed_bwd(s->cpu, &dtable, &dy, ids), GN_OK);
    if (!why && memcmp(c.at[0].got[0], c.at[0].expected, (size_t)(V * C) * sizeof(float)))
        why = "not the CPU's bits";
    settle_case(tally, &c, why);
    free(ids);
}

Test(gpu_train, embed_bwd) {
    tally tally = {0};
    sides s = open_sides(GN_BF16);
    check_embed_bwd(&tally, &s, 1, 1, 1, 0);
    check_embed_bwd(&tally, &s, 17, 65, 7, 0);
    check_embed_bwd(&tally, &s, 300, 320, 50, 3);
    check_embed_bwd(&tally, &s, 700, 24, 1000, 0);
    close_sides(&s);
    conclude(&tally, "embed_bwd");
}

/* ---- cross-entropy ---- */

enum { CE_LOSS, CE_DX, CE_DW, CE_X };

typedef struct {
    int T, C, V, every; /* one row of so many has a label */
    bool in_place, no_dx, no_dw;
} loss_shape;

static const loss_shape loss_shapes[] = {
    {1, 1, 2, 1, false, false, false},       {3, 7, 5, 1, true, false, false},
    {17, 33, 100, 3, false, false, false},   {600, 64, 264, 1, true, false, true},
    {4500, 8, 40, 10, false, false, false},  {9, 64, 32000, 2, false, false, true},
    {40, 128, 1001, 2, false, true, true},   {5000, 4, 8, 6000, false, false, false},
    {130, 320, 512, 1, false, false, false},
};

/* The errors of a row's loss and of its logits' gradients dl, from those of the logits. */
static double softmax_errors(float *dl, float *error, const float *logits, const float *logit_error,
                             int V, int label, double scale, double unit) {
    double most = logits[0], sum = 0, mean = 0;
    for (int v = 1; v < V; v++) most = fmax(most, logits[v]);
    for (int v = 0; v < V; v++) sum += exp(logits[v] - most);
    for (int v = 0; v < V; v++) mean += exp(logits[v] - most) / sum * logit_error[v];
    for (int v = 0; v < V; v++) {
        const double p = exp(logits[v] - most) / sum;
        const double exp_error = (32 + 4 * (most - logits[v])) * U32 + sqrt(V) * U32;
        dl[v] = (float)(scale * (p - (v == label)));
        error[v] = (float)(scale * p * (logit_error[v] + mean + exp_error) +
                           (unit + 2 * U32) * fabs((double)dl[v]));
    }
    return mean + logit_error[label] + (8 + sqrt(V)) * U32 + 4 * U32 * (fabs(most) + log(sum));
}

/* Of one row: its logits, and all that comes of them. w (V, C), columns: norms of w's. */
static void loss_row_errors(op_case *c, int t, const float *w, const norms *rows,
                            const norms *columns, int label, double scale, float *dl_out,
                            float *dl_error) {
    const int C = c->at[CE_X].cols, V = c->at[CE_DW].rows;
    const bool bf16 = c->sides->compute == GN_BF16;
    const float *x = c->at[CE_X].host + (size_t)t * (size_t)C;
    const norms xn = norms_of(x, C);
    float *logits = floats(1, V), *logit_error = floats(1, V);
    for (int v = 0; v < V; v++) {
        double sum = 0;
        for (int i = 0; i < C; i++) sum += (double)w[(size_t)v * (size_t)C + (size_t)i] * x[i];
        logits[v] = (float)sum;
        logit_error[v] =
            (float)dot_error(C, (double)xn.two * rows[v].two, (double)xn.four * rows[v].four, bf16);
    }
    c->at[CE_LOSS].error[t] = (float)softmax_errors(dl_out, dl_error, logits, logit_error, V, label,
                                                    scale, bf16 ? U16 : U32);
    const norms dl = norms_of(dl_out, V), e = norms_of(dl_error, V);
    for (int i = 0; i < C; i++)
        c->at[CE_DX].error[t * C + i] = (float)(dot_error(V, (double)dl.two * columns[i].two,
                                                          (double)dl.four * columns[i].four, 0) +
                                                (double)e.four * columns[i].four);
    free(logits);
    free(logit_error);
}

/* dw[v, i] sums n products of dl and x; each of x may be rounded once. */
static void loss_weight_errors(op_case *c, const float *dl, const float *error) {
    const struct operand *x = &c->at[CE_X];
    struct operand *dw = &c->at[CE_DW];
    const int T = x->rows, C = x->cols, V = dw->rows;
    const bool bf16 = c->sides->compute == GN_BF16;
    float *column = floats(1, T);
    norms *xs = malloc((size_t)C * sizeof *xs);
    for (int i = 0; i < C; i++) {
        for (int t = 0; t < T; t++) column[t] = x->host[t * C + i];
        xs[i] = norms_of(column, T);
    }
    for (int v = 0; v < V; v++) {
        for (int t = 0; t < T; t++) column[t] = dl[(size_t)t * (size_t)V + (size_t)v];
        const norms d = norms_of(column, T);
        for (int t = 0; t < T; t++) column[t] = error[(size_t)t * (size_t)V + (size_t)v];
        const norms e = norms_of(column, T);
        for (int i = 0; i < C; i++)
            dw->error[v * C + i] =
                (float)(dot_error(T, (double)d.two * xs[i].two, (double)d.four * xs[i].four, bf16) +
                        (double)e.four * xs[i].four + 8 * U32);
    }
    free(column);
    free(xs);
}

static void loss_errors(op_case *c, const gn_matrix *m, const int32_t *labels, double scale) {
    const int T = c->at[CE_X].rows, C = c->at[CE_X].cols, V = c->at[CE_DW].rows;
    float *w = floats(V, C), *dl = floats(T, V), *error = floats(T, V), *column = floats(1, V);
    gn_dequantize(w, m, 0, (int64_t)V * C);
    round_floats(w, c->sides->compute, (int64_t)V * C);
    norms *rows = malloc((size_t)V * sizeof *rows), *columns = malloc((size_t)C * sizeof *columns);
    for (int v = 0; v < V; v++) rows[v] = norms_of(w + (size_t)v * (size_t)C, C);
    for (int i = 0; i < C; i++) {
        for (int v = 0; v < V; v++) column[v] = w[(size_t)v * (size_t)C + (size_t)i];
        columns[i] = norms_of(column, V);
    }
    for (int t = 0; t < T; t++)
        if (labels[t] != GN_IGNORED_LABEL)
            loss_row_errors(c, t, w, rows, columns, labels[t], scale, dl + (size_t)t * (size_t)V,
                            error + (size_t)t * (size_t)V);
    loss_weight_errors(c, dl, error);
    float *all[] = {w, dl, error, column};
    for (int i = 0; i < COUNT(all); i++) free(all[i]);
    free(rows);
    free(columns);
}

static void check_loss(tally *tally, const sides *s, const loss_shape *shape, gn_dtype dtype) {
    const int T = shape->T, C = shape->C, V = shape->V;
    const float scale = 1.0f / (float)T;
    rng r = {(uint64_t)(T + V)};
    op_case c = {.sides = s};
    snprintf(c.name, sizeof c.name, "%s cross_entropy T=%d C=%d V=%d %s, a label in %d%s%s%s",
             gn_dtype_name(s->compute), T, C, V, gn_dtype_name(dtype), shape->every,
             shape->in_place ? ", in place" : "", shape->no_dx ? ", no dx" : "",
             shape->no_dw ? ", no dw" : "");
    random_matrix w = make_matrix(&r, GN_Q_NONE, false, dtype, V, C);
    int32_t *labels = malloc((size_t)T * sizeof *labels);
    for (int t = 0; t < T; t++)
        labels[t] = t % shape->every == shape->every / 2 ? rng_below(&r, V) : GN_IGNORED_LABEL;
    add_tensor(&c, &r, GN_F32, 1, T, true, true);
    add_tensor(&c, &r, GN_F32, T, C, shape->no_dx ? false : true, true);
    add_tensor(&c, &r, GN_F32, V, C, false, true);
    add_tensor(&c, &r, GN_F32, T, C, false, false);
    const char *why = NULL;
    for (int run = 0; run < 2 && !why; run++) {
        place_tensors(&c, shape->in_place ? 8 : 0, 0);
        const gn_matrix placed = device_matrix(&c.memory, &w.m);
        gn_cross_entropy_args args = {.x = c.at[CE_X].gpu,
                                      .lm_head = &placed,
                                      .labels = labels,
                                      .scale = scale,
                                      .loss = gn_tensor_1d(c.at[CE_LOSS].gpu.data, GN_F32, T)};
        if (shape->in_place) c.at[CE_DX].gpu = c.at[CE_X].gpu;
        if (!shape->no_dx) args.dx = c.at[CE_DX].gpu;
        if (!shape->no_dw) args.dw = c.at[CE_DW].gpu;
        reserve(s->gpu, gn_cross_entropy_workspace(s->gpu, C, V));
        why = ran(s->gpu, gn_cross_entropy(s->gpu, &args), c.name);
        const char *taken = take_outputs(&c, run);
        if (!why) why = taken;
    }
    gn_cross_entropy_args args = {.x = on_cpu(&c, CE_X),
                                  .lm_head = &w.m,
                                  .labels = labels,
                                  .scale = scale,
                                  .loss = gn_tensor_1d(c.at[CE_LOSS].expected, GN_F32, T)};
    if (!shape->no_dx) args.dx = on_cpu(&c, CE_DX);
    if (!shape->no_dw) args.dw = on_cpu(&c, CE_DW);
    cr_assert_eq(gn_ctx_reserve(s->cpu, gn_cross_entropy_workspace(s->cpu, C, V)), GN_OK);
    cr_assert_eq(gn_cross_entropy(s->cpu, &args), GN_OK);
    loss_errors(&c, &w.m, labels, scale);
    settle_case(tally, &c, why);
    free_matrix(&w);
    free(labels);
}

Test(gpu_train, cross_entropy, .timeout = 300) {
    const gn_dtype dtypes[] = {GN_BF16, GN_F32, GN_F16};
    tally tally = {0};
    for (int i = 0; i < COUNT(computes); i++) {
        sides s = open_sides(computes[i]);
        for (int j = 0; j < COUNT(loss_shapes) * COUNT(dtypes); j++) {
            if (is_brief() && (j + i) % 3 != 0) continue;
            check_loss(&tally, &s, &loss_shapes[j / 3], dtypes[j % 3]);
        }
        close_sides(&s);
    }
    conclude(&tally, "cross-entropy");
}
