/* device.h - for tests that need a GPU: a GPU beside the CPU that it is held to, device memory
 * between guards, batches handed over, and outputs judged by bounds.
 *
 * A test goes through all its cases and then fails once, so that one run on a GPU tells as much as
 * it can. Only a device error ends it at once: nothing works after it. With GN_TEST_BRIEF set,
 * tests pick a few small cases for compute-sanitizer, and leave working memory as it came, so that
 * reads of what nobody wrote are seen. */
#ifndef GN_TEST_DEVICE_H
#define GN_TEST_DEVICE_H

#include "kernels/backend.h"
#include "tests/kernels/cases.h"

#include <stdio.h>

static inline bool is_brief(void) {
    return getenv("GN_TEST_BRIEF") != NULL;
}

/* ---- contexts ---- */

/* A GPU, and the CPU with the same compute dtype. */
typedef struct {
    gn_ctx *gpu, *cpu;
    gn_dtype compute;
} sides;

enum { STAGE_ROWS = 4096, STAGE_SEQS = 64, STAGE_BLOCKS = 4096, STAGE_TERMS = 64 };

static inline gn_ctx *open_on(const char *device, gn_dtype compute) {
    gn_ctx *ctx = NULL;
    gn_error err = {0};
    const gn_ctx_options options = {.device = device, .compute = compute};
    cr_assert_eq(gn_ctx_open(&ctx, &options, &err), GN_OK, "%s", err.message);
    return ctx;
}

static inline sides open_sides(gn_dtype compute) {
    const gn_stage_limits limits = {STAGE_ROWS, STAGE_SEQS, STAGE_BLOCKS, STAGE_TERMS};
    const sides s = {open_on("cuda", compute), open_on("cpu", compute), compute};
    cr_assert_eq(gn_stage_reserve(s.gpu, &limits), GN_OK);
    return s;
}

static inline void close_sides(sides *s) {
    gn_ctx_close(s->gpu);
    gn_ctx_close(s->cpu);
}

/* Working memory, full of NaN: nothing may rely on what is there. */
static inline void reserve(gn_ctx *ctx, size_t bytes) {
    cr_assert_eq(gn_ctx_reserve(ctx, bytes), GN_OK);
    if (is_brief() || bytes == 0) return;
    void *poison = malloc(bytes);
    memset(poison, 0xff, bytes);
    cr_assert_eq(gn_ctx_write(ctx, ctx->workspace, poison, bytes), GN_OK);
    free(poison);
}

/* ---- device memory ---- */

/* Allocations that are checked and freed together. */
typedef struct {
    gn_ctx *ctx;
    int n;
    struct device_block {
        char *memory, *data; /* from gn_ctx_alloc; between the guards */
        size_t bytes;
    } blocks[160];
} device_memory;

/* `shift` bytes past a multiple of 256: `bytes` from `host`, or NaN where that is NULL. */
static inline void *device_alloc(device_memory *m, const void *host, size_t bytes, size_t shift) {
    const size_t all = bytes + shift + 2 * GUARD_BYTES;
    char *memory = gn_ctx_alloc(m->ctx, all), *image = malloc(all);
    cr_assert(memory && image && m->n < COUNT(m->blocks));
    char *begin = image + GUARD_BYTES + shift;
    memset(image, GUARD, all);
    if (host)
        memcpy(begin, host, bytes);
    else
        memset(begin, 0xff, bytes);
    cr_assert_eq(gn_ctx_write(m->ctx, memory, image, all), GN_OK);
    free(image);
    char *data = memory + GUARD_BYTES + shift;
    m->blocks[m->n++] = (struct device_block){memory, data, bytes};
    return data;
}

/* Whether all guards are as they were. */
static inline bool guards_stand(const device_memory *m) {
    for (int i = 0; i < m->n; i++) {
        const struct device_block *b = &m->blocks[i];
        char guard[GUARD_BYTES];
        for (int side = 0; side < 2; side++) {
            const char *at = side ? b->data + b->bytes : b->data - GUARD_BYTES;
            cr_assert_eq(gn_ctx_read(m->ctx, guard, at, sizeof guard), GN_OK);
            if (!is_guard(guard, sizeof guard)) return false;
        }
    }
    return true;
}

static inline void device_free(device_memory *m) {
    for (int i = 0; i < m->n; i++) gn_ctx_free(m->ctx, m->blocks[i].memory);
    m->n = 0;
}

/* (rows, cols) on the device from dense floats (NULL: NaN), `pad` elements between rows, the first
 * `shift` elements past a multiple of 256 bytes. */
static inline gn_tensor device_rows(device_memory *m, const float *v, gn_dtype dtype, int64_t rows,
                                    int64_t cols, int64_t pad, int64_t shift) {
    const size_t size = gn_dtype_size(dtype), row_bytes = (size_t)(cols + pad) * size;
    char *image = malloc((size_t)rows * row_bytes + 1);
    memset(image, 0xff, (size_t)rows * row_bytes);
    for (int64_t i = 0; i < rows && v; i++)
        gn_narrow(image + (size_t)i * row_bytes, dtype, v + i * cols, cols);
    gn_tensor t = gn_tensor_2d(
        device_alloc(m, image, (size_t)rows * row_bytes, (size_t)shift * size), dtype, rows, cols);
    t.ld = cols + pad;
    free(image);
    return t;
}

/* A (rows, cols) tensor as dense floats; false where a gap between rows was written. */
static inline bool read_rows(gn_ctx *ctx, float *out, const gn_tensor *t) {
    const int64_t rows = t->shape[0], cols = gn_tensor_numel(t) / rows;
    const size_t size = gn_dtype_size(t->dtype), row_bytes = (size_t)t->ld * size;
    const size_t bytes = (size_t)(rows - 1) * row_bytes + (size_t)cols * size;
    unsigned char *image = malloc(bytes);
    bool intact = true;
    cr_assert_eq(gn_ctx_read(ctx, image, t->data, bytes), GN_OK);
    for (int64_t i = 0; i < rows; i++) {
        const unsigned char *row = image + (size_t)i * row_bytes;
        gn_widen(out + i * cols, row, t->dtype, cols);
        for (size_t j = (size_t)cols * size; j < row_bytes && i + 1 < rows; j++)
            intact &= row[j] == 0xff;
    }
    free(image);
    return intact;
}

/* A weight on the device. */
static inline gn_matrix device_matrix(device_memory *m, const gn_matrix *host) {
    gn_matrix out;
    void *memory = device_alloc(m, NULL, gn_place_bytes(m->ctx, host), 0);
    cr_assert_eq(gn_place(m->ctx, &out, host, memory), GN_OK);
    return out;
}

static inline void round_floats(float *v, gn_dtype dtype, int64_t n) {
    for (int64_t i = 0; i < n && dtype == GN_BF16; i++) v[i] = gn_bf16_to_f32(gn_f32_to_bf16(v[i]));
}

/* Hands over a batch of `rows` rows whose sequences do not matter. */
static inline gn_status stage_rows(gn_ctx *ctx, int rows, const gn_lora *terms, int n_terms) {
    static const int32_t block;
    const int32_t row0[] = {0, rows}, pos0[] = {0};
    const gn_seqs seqs = {1, 1, row0, pos0, &block};
    int32_t *ids = calloc((size_t)rows, sizeof *ids);
    const gn_status status = gn_stage(ctx, ids, &seqs, terms, n_terms);
    free(ids);
    return status;
}

/* ---- bounds and verdicts ---- */

static const double U32 = 0x1p-24, U16 = 0x1p-8; /* unit roundoffs of float32 and bfloat16 */

/* How far a float32 sum of n products of a and x may be off, on both sides together: Higham and
 * Mary's 2 sqrt(n) u sum |a x|, twice. In bfloat16 `roundings` independent roundings of each factor
 * may differ besides: at most as many units of every product; and, as they do not agree on their
 * signs, hardly ever more than six standard deviations. two = |a|_2 |x|_2 is at least the sum of
 * |a x|, four = |a|_4 |x|_4 at least the root of that of (a x)^2. */
static inline double dot_error(double n, double two, double four, int roundings) {
    const double sums = (4 * sqrt(n) + 4) * U32 * two;
    return sums + fmin(roundings * U16 * two, 6 * sqrt(roundings / 3.0) * U16 * four);
}

/* The 2-norm and the 4-norm. */
typedef struct {
    float two, four;
} norms;

static inline norms norms_of(const float *v, int64_t n) {
    double squares = 0, fourths = 0;
    for (int64_t i = 0; i < n; i++) {
        const double square = (double)v[i] * v[i];
        squares += square;
        fourths += square * square;
    }
    return (norms){(float)sqrt(squares), (float)sqrt(sqrt(fourths))};
}

/* What a test has seen so far. */
typedef struct {
    int cases, failed;
    double worst; /* largest error, as a share of its bound, in a case that passed */
} tally;

/* What one case has given so far. */
typedef struct {
    char name[320];
    int64_t checked, wrong, row, col; /* of the first that is wrong */
    double got, expected, bound, worst;
} verdict;

static inline void judge(verdict *v, int64_t row, int64_t col, double got, double expected,
                         double bound) {
    const double off = fabs(got - expected);
    v->checked++;
    if (off <= bound && isfinite(expected) && isfinite(bound)) { /* NaN never is */
        if (bound > 0) v->worst = fmax(v->worst, off / bound);
        return;
    }
    if (v->wrong++ > 0) return;
    v->row = row, v->col = col;
    v->got = got, v->expected = expected, v->bound = bound;
}

enum { SHOWN = 20 };

static inline void case_failed(tally *t, const char *name, const char *why) {
    if (t->failed++ < SHOWN) fprintf(stderr, "FAIL %s: %s\n", name, why);
}

/* Counts a case; `why` names what else went wrong, or is NULL. */
static inline void settle(tally *t, const verdict *v, const char *why) {
    char text[256];
    t->cases++;
    if (why) {
        case_failed(t, v->name, why);
    } else if (v->wrong > 0) {
        snprintf(text, sizeof text,
                 "%lld of %lld values are off; first row %lld column %lld: %.9g, expected %.9g "
                 "+- %.3g",
                 (long long)v->wrong, (long long)v->checked, (long long)v->row, (long long)v->col,
                 v->got, v->expected, v->bound);
        case_failed(t, v->name, text);
    } else {
        t->worst = fmax(t->worst, v->worst);
    }
}

/* Ends a test. */
static inline void conclude(const tally *t, const char *what) {
    fprintf(stderr, "%s: %d cases, %d failed, errors up to %.2f of their bounds\n", what, t->cases,
            t->failed, t->worst);
    cr_assert_gt(t->cases, 0);
    cr_assert_eq(t->failed, 0, "%d of %d cases failed", t->failed, t->cases);
}

/* What an op gave: NULL when it ran, else why not. A device error ends the test. */
static inline const char *ran(gn_ctx *ctx, gn_status status, const char *name) {
    if (!status || status == GN_EDEVICE) {
        const gn_status after = gn_ctx_wait(ctx);
        cr_assert(!status && !after, "%s: %s", name, gn_status_text(after ? after : status));
    }
    return status ? gn_status_name(status) : NULL;
}

#endif
