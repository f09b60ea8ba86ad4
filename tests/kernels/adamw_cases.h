/* adamw_cases.h - updates of random parameters, for the tests of every backend. */
#ifndef GN_TEST_ADAMW_CASES_H
#define GN_TEST_ADAMW_CASES_H

#include "cases.h"
#include "kernels/adamw.h"

typedef struct {
    int64_t n;
    gn_dtype moments, grad, weight; /* weight I32: none */
} adamw_case;

static const adamw_case adamw_cases[] = {
    {1, GN_F32, GN_F32, GN_I32},      {1, GN_U8, GN_F32, GN_F32},
    {255, GN_U8, GN_BF16, GN_BF16},   {256, GN_U8, GN_F32, GN_BF16},
    {257, GN_F32, GN_BF16, GN_BF16},  {4099, GN_U8, GN_F32, GN_I32},
    {70001, GN_F32, GN_F32, GN_BF16}, {70001, GN_U8, GN_BF16, GN_F32},
};

/* The arrays of an update on the host, each in a buffer of its own. */
typedef struct {
    adamw_case c;
    float *master, *m_absmax, *v_absmax;
    void *weight, *grad, *m, *v;
} adamw_arrays;

static inline size_t adamw_blocks(int64_t n) {
    return (size_t)((n + GN_MOMENT_BLOCK - 1) / GN_MOMENT_BLOCK);
}

static inline adamw_arrays adamw_arrays_open(const adamw_case *c, uint64_t seed) {
    rng r = {seed};
    const size_t n = (size_t)c->n, blocks = adamw_blocks(c->n);
    return (adamw_arrays){*c,
                          random_floats(&r, n),
                          calloc(blocks, sizeof(float)),
                          calloc(blocks, sizeof(float)),
                          calloc(n, sizeof(float)),
                          random_values(&r, c->grad, n),
                          calloc(n, gn_dtype_size(c->moments)),
                          calloc(n, gn_dtype_size(c->moments))};
}

static inline void adamw_arrays_close(adamw_arrays *a) {
    void *all[] = {a->master, a->m_absmax, a->v_absmax, a->weight, a->grad, a->m, a->v};
    for (int i = 0; i < COUNT(all); i++) free(all[i]);
}

static inline gn_adamw_args adamw_args_of(const adamw_arrays *a, int64_t step) {
    const int64_t n = a->c.n;
    gn_adamw_args args = {.lr = 3e-3f,
                          .beta1 = 0.9f,
                          .beta2 = 0.95f,
                          .eps = 1e-6f,
                          .weight_decay = 0.1f,
                          .grad_scale = 0.37f,
                          .step = step,
                          .master = gn_tensor_1d(a->master, GN_F32, n),
                          .grad = gn_tensor_1d(a->grad, a->c.grad, n),
                          .m = {gn_tensor_1d(a->m, a->c.moments, n), a->m_absmax},
                          .v = {gn_tensor_1d(a->v, a->c.moments, n), a->v_absmax}};
    if (a->c.weight != GN_I32) args.weight = gn_tensor_1d(a->weight, a->c.weight, n);
    return args;
}

#endif
