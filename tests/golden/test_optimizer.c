/* AdamW against bitsandbytes (golden/optimizer.safetensors): four steps with 32-bit and with 8-bit
 * moments, lr 1e-3, decay 0.01. Parameters are held after every step, states after the last.
 *
 * bitsandbytes multiplies and adds in one rounding and divides approximately, so a moment may be an
 * ulp or two off, and its 8-bit code another where it lies that close to the midpoint of two. */
#include "engine/tensor_file.h"
#include "kernels/adamw.h"
#include "kernels/quant_tables.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { STEPS = 4 };

typedef struct golden {
    gn_tensor_file *file;
    const char *optimizer;
    int64_t n;
} golden;

static const gn_file_tensor *get(const golden *g, const char *name) {
    char full[64];
    snprintf(full, sizeof full, "%s.%s", g->optimizer, name);
    const gn_file_tensor *t = gn_tensor_file_find(g->file, full);
    cr_assert(t, "%s is missing", full);
    return t;
}

static const gn_file_tensor *get_step(const golden *g, char what, int step) {
    const char name[] = {what, (char)('0' + step), 0};
    return get(g, name);
}

/* A 1-D tensor over an aligned copy, which the caller frees. */
static gn_tensor vector_of(const gn_file_tensor *t) {
    void *data = malloc(t->bytes + 1);
    memcpy(data, t->data, t->bytes);
    return gn_tensor_1d(data, t->dtype, (int64_t)(t->bytes / gn_dtype_size(t->dtype)));
}

static gn_moment moment_open(gn_dtype dtype, int64_t n) {
    const size_t blocks = (size_t)(n + GN_MOMENT_BLOCK - 1) / GN_MOMENT_BLOCK;
    return (gn_moment){gn_tensor_1d(calloc((size_t)n, gn_dtype_size(dtype)), dtype, n),
                       calloc(blocks, sizeof(float))};
}

static void moment_close(gn_moment *m) {
    free(m->values.data);
    free(m->absmax);
}

static void moment_copy(gn_moment *to, const gn_moment *from) {
    const int64_t n = from->values.shape[0];
    *to = moment_open(from->values.dtype, n);
    memcpy(to->values.data, from->values.data, (size_t)n * gn_dtype_size(from->values.dtype));
    memcpy(to->absmax, from->absmax, (size_t)(n / GN_MOMENT_BLOCK) * sizeof(float));
}

/* The largest difference relative to the larger of 1 and the expected value. */
static double worst_difference(const float *got, const gn_file_tensor *expected, int64_t n) {
    gn_tensor e = vector_of(expected);
    double worst = 0;
    for (int64_t i = 0; i < n; i++) {
        const double want = ((float *)e.data)[i];
        const double off = fabs(got[i] - want) / fmax(1, fabs(want));
        worst = off <= worst ? worst : off;
    }
    free(e.data);
    return worst;
}

/* Four updates from p0; the moments are those after the last, `before` those before it. */
static void run(const golden *g, gn_ctx *ctx, gn_moment *m, gn_moment *v, gn_moment before[2]) {
    gn_tensor p = vector_of(get(g, "p0"));
    double worst = 0;
    for (int step = 1; step <= STEPS; step++) {
        gn_tensor grad = vector_of(get_step(g, 'g', step - 1));
        const gn_adamw_args args = {.lr = 1e-3f,
                                    .beta1 = 0.9f,
                                    .beta2 = 0.999f,
                                    .eps = 1e-8f,
                                    .weight_decay = 0.01f,
                                    .grad_scale = 1,
                                    .step = step,
                                    .master = p,
                                    .grad = grad,
                                    .m = *m,
                                    .v = *v};
        if (step == STEPS) {
            moment_copy(&before[0], m);
            moment_copy(&before[1], v);
        }
        cr_assert_eq(gn_adamw(ctx, &args), GN_OK);
        free(grad.data);
        const double off = worst_difference(p.data, get_step(g, 'p', step), g->n);
        cr_assert(off <= 1e-6, "%s: step %d: a parameter is %g off", g->optimizer, step, off);
        worst = fmax(worst, off);
    }
    fprintf(stderr, "%s: parameters within %.2g\n", g->optimizer, worst);
    free(p.data);
}

static void open_golden(golden *g, const char *optimizer) {
    gn_error err = {0};
    g->optimizer = optimizer;
    cr_assert_eq(gn_safetensors_open(
                     &g->file, GN_SOURCE_DIR "/tests/golden/data/optimizer.safetensors", &err),
                 GN_OK, "%s", err.message);
    g->n = (int64_t)(get(g, "p0")->bytes / sizeof(float));
}

static gn_ctx *open_ctx(void) {
    gn_ctx *ctx;
    gn_error err = {0};
    cr_assert_eq(gn_ctx_open(&ctx, &(gn_ctx_options){.device = "cpu", .threads = 2}, &err), GN_OK,
                 "%s", err.message);
    return ctx;
}

Test(golden_optimizer, adamw_with_32_bit_moments) {
    golden g;
    open_golden(&g, "adamw32");
    gn_ctx *ctx = open_ctx();
    gn_moment m = moment_open(GN_F32, g.n), v = moment_open(GN_F32, g.n), before[2];
    run(&g, ctx, &m, &v, before);
    cr_assert(worst_difference(m.values.data, get(&g, "state.state1"), g.n) <= 1e-6);
    cr_assert(worst_difference(v.values.data, get(&g, "state.state2"), g.n) <= 1e-6);
    gn_moment *moments[] = {&m, &v, &before[0], &before[1]};
    for (int i = 0; i < 4; i++) moment_close(moments[i]);
    gn_ctx_close(ctx);
    gn_tensor_file_close(g.file);
}

/* A moment in 8 bits, what it was before the last step, and that step's gradient. */
typedef struct history {
    const gn_moment *before, *after;
    const float *grad, *map;
    bool squared;
} history;

/* Is what the last step quantized within four ulps of the midpoint of two neighbouring codes? */
static bool is_tie(const history *h, int64_t i, int code, int other) {
    const double beta = h->squared ? 0.999f : 0.9f, g = h->grad[i];
    const double was = (double)h->map[((uint8_t *)h->before->values.data)[i]] *
                       h->before->absmax[i / GN_MOMENT_BLOCK];
    const double x = (beta * was + (1 - beta) * (h->squared ? g * g : g)) /
                     h->after->absmax[i / GN_MOMENT_BLOCK];
    const double middle = ((double)h->map[code] + h->map[other]) / 2;
    return fabs(x - middle) <= 4 * 0x1p-23 * fabs(middle);
}

static void check_moment(const golden *g, const history *h, const char *codes, const char *absmax) {
    gn_tensor c = vector_of(get(g, codes)), a = vector_of(get(g, absmax));
    const uint8_t *mine = h->after->values.data, *theirs = c.data;
    const float *scales = h->after->absmax, *their_scales = a.data;
    int64_t ties = 0;
    for (int64_t i = 0; i < g->n; i++) {
        if (mine[i] == theirs[i]) continue;
        cr_assert(abs(mine[i] - theirs[i]) == 1 && is_tie(h, i, mine[i], theirs[i]),
                  "%s: element %lld has code %d, bitsandbytes %d", codes, (long long)i, mine[i],
                  theirs[i]);
        ties++;
    }
    for (int64_t b = 0; b < a.shape[0]; b++)
        cr_assert(fabsf(scales[b] - their_scales[b]) <= 2 * 0x1p-23f * their_scales[b],
                  "%s: block %lld has %a, bitsandbytes %a", absmax, (long long)b, (double)scales[b],
                  (double)their_scales[b]);
    fprintf(stderr, "%s: %lld codes, %lld ties\n", codes, (long long)g->n, (long long)ties);
    free(c.data);
    free(a.data);
}

Test(golden_optimizer, adamw_with_8_bit_moments) {
    golden g;
    open_golden(&g, "adamw8");
    gn_ctx *ctx = open_ctx();
    gn_moment m = moment_open(GN_U8, g.n), v = moment_open(GN_U8, g.n), before[2];
    cr_assert_arr_eq(get(&g, "state.qmap1")->data, gn_dynamic_map(), 256 * sizeof(float));
    cr_assert_arr_eq(get(&g, "state.qmap2")->data, gn_dynamic_map_unsigned(), 256 * sizeof(float));
    run(&g, ctx, &m, &v, before);
    gn_tensor grad = vector_of(get_step(&g, 'g', STEPS - 1));
    check_moment(&g, &(history){&before[0], &m, grad.data, gn_dynamic_map(), false}, "state.state1",
                 "state.absmax1");
    check_moment(&g, &(history){&before[1], &v, grad.data, gn_dynamic_map_unsigned(), true},
                 "state.state2", "state.absmax2");
    free(grad.data);
    gn_moment *moments[] = {&m, &v, &before[0], &before[1]};
    for (int i = 0; i < 4; i++) moment_close(moments[i]);
    gn_ctx_close(ctx);
    gn_tensor_file_close(g.file);
}
