/* The optimizer: its pages change nothing, whatever their size, their budget and the device;
 * padding stays zero; state is read and set parameter by parameter. GN_TEST_DEVICE=cuda holds a GPU
 * to the CPU, to the bit. */
#include "trainer/optimizer.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/late_pages.h"

enum { STEPS = 3 };

/* Several fit in a page, one fills more than a page, one ends in the middle of a block. */
static const gn_parameter shapes[] = {
    {.name = "a", .ndim = 2, .shape = {8, 100}},
    {.name = "b", .ndim = 1, .shape = {3}},
    {.name = "c", .ndim = 2, .shape = {90, 111}},
    {.name = "d", .ndim = 2, .shape = {128, 2}},
};
enum { N = sizeof shapes / sizeof *shapes };

typedef struct run {
    gn_ctx *ctx;
    gn_page_device *pages; /* NULL: state is used where it is */
    gn_parameters *p;
    gn_optimizer *o;
} run;

static float value(size_t i, int64_t j, int salt) {
    return sinf((float)(i * 1000 + (size_t)j) * 0.37f + (float)salt);
}

static gn_ctx *open_ctx(const char *device) {
    gn_ctx *ctx;
    gn_error err = {0};
    cr_assert_eq(gn_ctx_open(&ctx, &(gn_ctx_options){.device = device, .threads = 2}, &err), GN_OK,
                 "%s", err.message);
    return ctx;
}

static void finish_run(run *r, gn_dtype weights, const gn_optimizer_options *options) {
    gn_error err = {0};
    cr_assert_eq(gn_parameters_open(&r->p, r->ctx, shapes, N, weights, GN_F32, &err), GN_OK, "%s",
                 err.message);
    cr_assert_eq(gn_optimizer_open(&r->o, r->p, options, r->pages, &err), GN_OK, "%s", err.message);
    for (size_t i = 0; i < N; i++) {
        const int64_t n = r->p->items[i].numel;
        float *values = malloc((size_t)n * sizeof *values);
        for (int64_t j = 0; j < n; j++) values[j] = value(i, j, 0);
        cr_assert_eq(gn_optimizer_set(r->o, GN_STATE_MASTER, i, values), GN_OK);
        free(values);
    }
}

/* On the CPU, with state where it is. */
static run open_run(gn_dtype weights, const gn_optimizer_options *options) {
    run r = {.ctx = open_ctx("cpu")};
    finish_run(&r, weights, options);
    return r;
}

/* On the device that is tested, with pages that travel. */
static run open_paged(gn_dtype weights, const gn_optimizer_options *options) {
    const char *device = getenv("GN_TEST_DEVICE");
    run r = {.ctx = open_ctx(device ? device : "cpu")};
    cr_assert_eq(gn_page_device_open(&r.pages, r.ctx), GN_OK);
    cr_assert_eq(r.pages == NULL, gn_ctx_is_host(r.ctx));
    if (!r.pages) r.pages = test_late_pages(r.ctx);
    finish_run(&r, weights, options);
    return r;
}

static void close_run(run *r) {
    gn_optimizer_close(r->o);
    gn_parameters_close(r->p);
    gn_page_device_close(r->pages);
    gn_ctx_close(r->ctx);
}

static void set_grads(const run *r, int64_t step) {
    for (size_t i = 0; i < N; i++) {
        const int64_t n = r->p->items[i].numel;
        float *values = malloc((size_t)n * sizeof *values);
        for (int64_t j = 0; j < n; j++) values[j] = value(i, j, (int)step + 1);
        cr_assert_eq(gn_ctx_write(r->ctx, gn_parameter_grad(r->p, i).data, values,
                                  (size_t)n * sizeof *values),
                     GN_OK);
        free(values);
    }
}

static void steps(const run *r, int n) {
    for (int k = 0; k < n; k++) {
        set_grads(r, gn_optimizer_steps(r->o));
        cr_assert_eq(gn_optimizer_prefetch(r->o), GN_OK);
        cr_assert_eq(gn_optimizer_step(r->o, 1e-2, 0.5f), GN_OK);
    }
}

/* All weights, in the host's memory. */
static void *weights_of(const run *r, size_t *bytes) {
    *bytes = (size_t)r->p->weights.shape[0] * gn_dtype_size(r->p->weights.dtype);
    void *data = malloc(*bytes);
    cr_assert_eq(gn_ctx_read(r->ctx, data, r->p->weights.data, *bytes), GN_OK);
    return data;
}

static void *get(const run *r, gn_state s, size_t i, size_t *bytes) {
    *bytes = (size_t)gn_optimizer_state_count(r->o, s, i) *
             gn_dtype_size(gn_optimizer_state_dtype(r->o, s));
    void *data = malloc(*bytes + 1);
    cr_assert_eq(gn_pages_flush(gn_optimizer_pages(r->o)), GN_OK);
    cr_assert_eq(gn_optimizer_get(r->o, s, i, data), GN_OK);
    return data;
}

static void expect_equal(const run *a, const run *b) {
    for (size_t i = 0; i < N; i++) {
        for (int s = 0; s < GN_STATE_COUNT; s++) {
            size_t na, nb;
            void *da = get(a, s, i, &na), *db = get(b, s, i, &nb);
            cr_assert_eq(na, nb);
            cr_assert(memcmp(da, db, na) == 0, "%s of %s differs", gn_state_name(s),
                      shapes[i].name);
            free(da);
            free(db);
        }
    }
    size_t na, nb;
    void *wa = weights_of(a, &na), *wb = weights_of(b, &nb);
    cr_assert_eq(na, nb);
    cr_assert(memcmp(wa, wb, na) == 0, "weights differ");
    free(wa);
    free(wb);
}

static gn_optimizer_options options_of(bool eight_bit, size_t page_bytes, size_t budget) {
    return (gn_optimizer_options){.eight_bit = eight_bit,
                                  .beta1 = 0.9f,
                                  .beta2 = 0.999f,
                                  .eps = 1e-8f,
                                  .weight_decay = 0.01f,
                                  .budget = budget,
                                  .page_bytes = page_bytes};
}

Test(optimizer, pages_change_nothing) {
    for (int k = 0; k < 4; k++) {
        const bool eight_bit = k & 1;
        const gn_dtype weights = k & 2 ? GN_BF16 : GN_F32;
        const gn_optimizer_options whole = options_of(eight_bit, 0, SIZE_MAX);
        const gn_optimizer_options paged = options_of(eight_bit, 1, 70 << 10);
        run a = open_run(weights, &whole), b = open_paged(weights, &paged);
        steps(&a, STEPS);
        steps(&b, STEPS);
        expect_equal(&a, &b);
        const gn_page_stats s = gn_pages_read_stats(gn_optimizer_pages(b.o));
        cr_assert_gt(s.uploaded, 0);
        cr_assert_leq(s.peak, paged.budget);
        if (!eight_bit) cr_assert_gt(s.evictions, 0);
        close_run(&a);
        close_run(&b);
    }
}

Test(optimizer, follows_adamw_and_keeps_padding_zero) {
    const gn_optimizer_options options = options_of(false, 1, SIZE_MAX);
    run r = open_run(GN_F32, &options);
    steps(&r, 1);
    const float *w = r.p->weights.data;
    int64_t end = 0;
    for (size_t i = 0; i < N; i++) {
        const gn_parameter *item = &r.p->items[i];
        cr_assert_eq(item->first % GN_PARAMETER_ALIGN, 0);
        for (; end < item->first; end++) cr_assert_eq(w[end], 0);
        for (int64_t j = 0; j < item->numel; j++) {
            const double g = 0.5 * value(i, j, 1);
            const double p = (value(i, j, 0) - 1e-2 * g / (fabs(g) + 1e-8)) * (1 - 1e-4);
            cr_assert(fabs(w[item->first + j] - p) < 1e-6, "%s %lld", item->name, (long long)j);
        }
        end = item->first + item->numel;
    }
    for (; end < r.p->weights.shape[0]; end++) cr_assert_eq(w[end], 0);
    close_run(&r);
}

Test(optimizer, norm_of_all_gradients) {
    const gn_optimizer_options options = options_of(true, 0, SIZE_MAX);
    run r = open_paged(GN_BF16, &options);
    double norm, expected = 0;
    set_grads(&r, 0);
    for (size_t i = 0; i < N; i++)
        for (int64_t j = 0; j < r.p->items[i].numel; j++)
            expected += (double)value(i, j, 1) * value(i, j, 1);
    for (int k = 0; k < 2; k++) {
        cr_assert_eq(gn_optimizer_grad_norm(r.o, &norm), GN_OK);
        cr_assert(fabs(norm - sqrt(expected)) < 1e-9);
    }
    close_run(&r);
}

/* What get gave, set into a new optimizer with other pages, goes on as if nothing had been. */
Test(optimizer, state_moves_to_another) {
    for (int k = 0; k < 4; k++) {
        const gn_dtype weights = k & 2 ? GN_BF16 : GN_F32;
        const gn_optimizer_options one = options_of(k & 1, 0, SIZE_MAX);
        const gn_optimizer_options other = options_of(k & 1, 1, 70 << 10);
        run a = open_run(weights, &one), b = open_paged(weights, &other);
        steps(&a, 2);
        for (size_t i = 0; i < N; i++) {
            for (int s = 0; s < GN_STATE_COUNT; s++) {
                size_t bytes;
                void *data = get(&a, s, i, &bytes);
                cr_assert_eq(gn_optimizer_set(b.o, s, i, data), GN_OK);
                free(data);
            }
        }
        gn_optimizer_set_steps(b.o, gn_optimizer_steps(a.o));
        steps(&a, 2);
        steps(&b, 2);
        cr_assert_eq(gn_optimizer_steps(b.o), 4);
        expect_equal(&a, &b);
        close_run(&a);
        close_run(&b);
    }
}

Test(optimizer, masters_start_at_the_weights) {
    const gn_optimizer_options options = options_of(false, 1, SIZE_MAX);
    run r = open_run(GN_BF16, &options);
    gn_optimizer *second;
    gn_error err = {0};
    cr_assert_eq(gn_optimizer_open(&second, r.p, &options, NULL, &err), GN_OK);
    gn_optimizer *first = r.o;
    for (size_t i = 0; i < N; i++) {
        size_t bytes;
        r.o = first;
        float *a = get(&r, GN_STATE_MASTER, i, &bytes);
        r.o = second;
        float *b = get(&r, GN_STATE_MASTER, i, &bytes);
        for (int64_t j = 0; j < r.p->items[i].numel; j++)
            cr_assert_eq(b[j], gn_bf16_to_f32(gn_f32_to_bf16(a[j])));
        free(a);
        free(b);
    }
    gn_optimizer_close(first);
    close_run(&r);
}

Test(optimizer, parameters_refuse_shapes_that_make_no_sense) {
    gn_ctx *ctx;
    gn_parameters *p;
    gn_error err = {0};
    cr_assert_eq(gn_ctx_open(&ctx, &(gn_ctx_options){.device = "cpu", .threads = 1}, &err), GN_OK);
    const gn_parameter bad[] = {
        {.name = "x", .ndim = 0},
        {.name = "x", .ndim = 5, .shape = {1, 1, 1, 1}},
        {.name = "x", .ndim = 2, .shape = {3, 0}},
        {.name = "x", .ndim = 2, .shape = {INT64_MAX, 3}},
        {.name = "x", .ndim = 1, .shape = {INT64_MAX}},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        cr_assert_eq(gn_parameters_open(&p, ctx, &bad[i], 1, GN_F32, GN_F32, &err), GN_EINVAL);
    gn_optimizer *o;
    const gn_optimizer_options options = options_of(false, 0, SIZE_MAX);
    cr_assert_eq(gn_parameters_open(&p, ctx, NULL, 0, GN_F32, GN_F32, &err), GN_OK);
    cr_assert_eq(gn_optimizer_open(&o, p, &options, NULL, &err), GN_EINVAL);
    gn_parameters_close(p);
    gn_ctx_close(ctx);
    gn_parameters_close(NULL);
    gn_optimizer_close(NULL);
}
