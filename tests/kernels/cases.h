/* cases.h - random operands for the kernel tests: seeded numbers, buffers with guards around
 * them, weights of every type, contexts of every instruction set that the machine has. */
#ifndef GN_TEST_KERNEL_CASES_H
#define GN_TEST_KERNEL_CASES_H

#include "kernels/ops.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

typedef struct {
    uint64_t state;
} rng;

static inline uint32_t rng_bits(rng *r) {
    r->state = r->state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(r->state >> 32);
}

static inline float rng_float(rng *r) { /* in [-1, 1) */
    return (float)(int32_t)rng_bits(r) * 0x1p-31f;
}

static inline int rng_below(rng *r, int n) {
    return (int)(rng_bits(r) % (uint32_t)n);
}

/* n floats between two stretches of a pattern that nothing may touch. */
typedef struct {
    float *data;
    size_t n;
    unsigned char *memory;
} guarded;

enum { GUARD_BYTES = 256, GUARD = 0xa5 };

static inline guarded guarded_alloc(size_t n) {
    guarded g = {.n = n, .memory = malloc(n * sizeof(float) + 2 * GUARD_BYTES)};
    cr_assert_not_null(g.memory);
    memset(g.memory, GUARD, n * sizeof(float) + 2 * GUARD_BYTES);
    g.data = (float *)(g.memory + GUARD_BYTES);
    return g;
}

static inline bool is_guard(const void *p, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (((const unsigned char *)p)[i] != GUARD) return false;
    return true;
}

static inline void guarded_check(const guarded *g, const char *what) {
    cr_assert(is_guard(g->memory, GUARD_BYTES), "%s: written before its start", what);
    cr_assert(is_guard(g->data + g->n, GUARD_BYTES), "%s: written past its end", what);
}

static inline void guarded_free(guarded *g) {
    free(g->memory);
}

static inline float *random_floats(rng *r, size_t n) {
    float *p = malloc((n ? n : 1) * sizeof *p);
    cr_assert_not_null(p);
    for (size_t i = 0; i < n; i++) p[i] = rng_float(r);
    return p;
}

/* Random values of a dtype, at an address that is a multiple of the dtype's size only. */
static inline void *random_values(rng *r, gn_dtype dtype, size_t n) {
    float *wide = random_floats(r, n);
    void *p = malloc((n ? n : 1) * gn_dtype_size(dtype));
    cr_assert_not_null(p);
    gn_narrow(p, dtype, wide, (int64_t)n);
    free(wide);
    return p;
}

/* The arrays a random matrix points into. */
typedef struct {
    gn_matrix m;
    void *owned[4];
} random_matrix;

static inline random_matrix make_matrix(rng *r, gn_qtype qtype, bool double_quant, gn_dtype dtype,
                                        int64_t rows, int64_t cols) {
    random_matrix out = {.m = {.qtype = qtype, .dtype = dtype, .rows = rows, .cols = cols}};
    if (qtype == GN_Q_NONE) {
        out.m.data = out.owned[0] = random_values(r, dtype, (size_t)(rows * cols));
        return out;
    }
    const gn_quant_sizes sizes = gn_quant_sizes_of(qtype, double_quant, rows, cols);
    uint8_t *data = malloc(sizes.data);
    for (size_t i = 0; i < sizes.data; i++) data[i] = (uint8_t)rng_bits(r);
    out.m.data = out.owned[0] = data;
    if (gn_qtype_is_4bit(qtype)) out.m.code = gn_code_values(qtype);
    float *absmax = random_floats(r, sizes.absmax / sizeof(float));
    for (size_t i = 0; i < sizes.absmax / sizeof(float); i++) absmax[i] = fabsf(absmax[i]);
    out.m.absmax = out.owned[1] = absmax;
    if (!double_quant) return out;
    out.m.absmax = NULL;
    uint8_t *codes = malloc(sizes.absmax_u8);
    for (size_t i = 0; i < sizes.absmax_u8; i++) codes[i] = (uint8_t)rng_bits(r);
    out.m.absmax_u8 = out.owned[2] = codes;
    out.m.nested_absmax = out.owned[3] = random_floats(r, sizes.nested_absmax / sizeof(float));
    out.m.nested_code = gn_dynamic_map();
    out.m.offset = 0.75f;
    return out;
}

static inline void free_matrix(random_matrix *m) {
    for (int i = 0; i < 4; i++) free(m->owned[i]);
}

/* Every instruction set, as far as the machine has it. */
static inline gn_ctx *open_ctx(gn_isa isa, gn_dtype compute, int threads) {
    gn_ctx *ctx = NULL;
    gn_error err = {0};
    const gn_ctx_options options = {
        .device = "cpu", .compute = compute, .threads = threads, .limit_isa = true, .max_isa = isa};
    cr_assert_eq(gn_ctx_open(&ctx, &options, &err), GN_OK, "%s", err.message);
    return ctx;
}

static inline gn_isa best_isa(void) {
    gn_ctx *ctx = open_ctx(GN_ISA_AVX512BF16, GN_F32, 1);
    const gn_isa isa = gn_ctx_isa(ctx);
    gn_ctx_close(ctx);
    return isa;
}

/* Dense float32 of two and of three dimensions. */
static inline gn_tensor rows2(float *data, int64_t rows, int64_t cols) {
    return gn_tensor_2d(data, GN_F32, rows, cols);
}

static inline gn_tensor rows3(float *data, int64_t rows, int64_t heads, int64_t dim) {
    return (gn_tensor){data, GN_F32, 3, {rows, heads, dim, 1}, heads * dim};
}

#endif
