/* adamw.c - AdamW, a block of 256 parameters at a time: whatever the moments' type, the block's
 * values are float32 in cache while it is updated. */
#include "kernels/adamw.h"

#include <math.h>
#include <string.h>

#include "cpu.h"
#include "kernels/quant_tables.h"

enum { BLOCK = GN_MOMENT_BLOCK, MAX_CHUNKS = GN_SUM_WORKSPACE / sizeof(double) };

static void *at(const gn_tensor *t, int64_t i) {
    return (char *)t->data + (size_t)i * gn_dtype_size(t->dtype);
}

/* ---- moments ---- */

static void moment_read(float *values, const gn_moment *m, const float *map, int64_t first, int n) {
    if (m->values.dtype == GN_F32) {
        memcpy(values, at(&m->values, first), (size_t)n * sizeof *values);
        return;
    }
    const uint8_t *codes = at(&m->values, first);
    const float absmax = m->absmax[first / BLOCK];
    for (int i = 0; i < n; i++) values[i] = map[codes[i]] * absmax;
}

/* As bitsandbytes does, a negative value never gets the code of zero: a moment keeps its sign. */
static uint8_t encode(const float *map, float x) {
    const uint8_t code = gn_nearest_of_256(map, x);
    return (uint8_t)(code - (x < 0 && map[code] == 0));
}

static void moment_write(const gn_moment *m, const float *values, const float *map, int64_t first,
                         int n) {
    if (m->values.dtype == GN_F32) {
        memcpy(at(&m->values, first), values, (size_t)n * sizeof *values);
        return;
    }
    uint8_t *codes = at(&m->values, first);
    float absmax = 0;
    for (int i = 0; i < n; i++) absmax = fmaxf(absmax, fabsf(values[i]));
    m->absmax[first / BLOCK] = absmax;
    const float divisor = absmax > 0 ? absmax : 1;
    for (int i = 0; i < n; i++) codes[i] = encode(map, values[i] / divisor);
}

/* ---- the update ---- */

struct update {
    const gn_adamw_args *args;
    gn_adamw_factors factors;
};

static void update_block(const struct update *op, int64_t first, int n) {
    const gn_adamw_args *args = op->args;
    const gn_adamw_factors f = op->factors;
    const float *signed_map = gn_dynamic_map(), *unsigned_map = gn_dynamic_map_unsigned();
    float g[BLOCK], m[BLOCK], v[BLOCK], *p = at(&args->master, first);
    gn_widen(g, at(&args->grad, first), args->grad.dtype, n);
    moment_read(m, &args->m, signed_map, first, n);
    moment_read(v, &args->v, unsigned_map, first, n);
    for (int i = 0; i < n; i++) {
        g[i] *= args->grad_scale;
        m[i] = m[i] * args->beta1 + (1 - args->beta1) * g[i];
        v[i] = v[i] * args->beta2 + (1 - args->beta2) * g[i] * g[i];
        p[i] = (p[i] + f.step_size * (m[i] / (sqrtf(v[i]) + f.eps))) * f.keep;
    }
    moment_write(&args->m, m, signed_map, first, n);
    moment_write(&args->v, v, unsigned_map, first, n);
    if (args->weight.data) gn_narrow(at(&args->weight, first), args->weight.dtype, p, n);
}

static void update_share(void *arg, const gn_cpu_team *team) {
    const struct update *op = arg;
    const int64_t n = op->args->master.shape[0], blocks = (n + BLOCK - 1) / BLOCK;
    const int64_t last = gn_cpu_share(blocks, team->thread + 1, team->n_threads);
    for (int64_t b = gn_cpu_share(blocks, team->thread, team->n_threads); b < last; b++) {
        const int64_t left = n - b * BLOCK;
        update_block(op, b * BLOCK, left < BLOCK ? (int)left : BLOCK);
    }
}

gn_status gn_cpu_adamw(gn_ctx *ctx, const gn_adamw_args *args) {
    struct update op = {args, gn_adamw_factors_of(args)};
    gn_cpu_parallel(ctx->pool, args->master.shape[0] < GN_CPU_SERIAL, update_share, &op);
    return GN_OK;
}

/* ---- the gradient's norm ---- */

struct sum {
    const gn_tensor *x;
    int64_t chunk; /* elements, a multiple of BLOCK */
    double *part;  /* (MAX_CHUNKS), the working memory */
};

static void sum_chunk(void *arg, int64_t c) {
    struct sum *op = arg;
    const int64_t first = c * op->chunk, n = op->x->shape[0];
    const int64_t last = first + op->chunk < n ? first + op->chunk : n;
    double sum = 0;
    for (int64_t i = first; i < last; i += BLOCK) {
        float x[BLOCK];
        const int64_t length = last - i < BLOCK ? last - i : BLOCK;
        gn_widen(x, at(op->x, i), op->x->dtype, length);
        for (int64_t j = 0; j < length; j++) sum += (double)x[j] * x[j];
    }
    op->part[c] = sum;
}

gn_status gn_cpu_sum_squares(gn_ctx *ctx, double *sum, const gn_tensor *x) {
    const int64_t n = x->shape[0];
    const int64_t shared = (n + MAX_CHUNKS - 1) / MAX_CHUNKS;
    struct sum op = {x, gn_cpu_round_up(shared < GN_CPU_SERIAL ? GN_CPU_SERIAL : shared, BLOCK),
                     ctx->workspace};
    const int64_t chunks = (n + op.chunk - 1) / op.chunk;
    gn_cpu_for(ctx->pool, chunks, sum_chunk, &op);
    for (int64_t c = 0; c < chunks; c++) *sum += op.part[c];
    return GN_OK;
}
