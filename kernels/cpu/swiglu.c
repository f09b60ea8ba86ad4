/* swiglu.c - SwiGLU by itself, for training: inference has it in gn_linear's epilogue. */
#include "cpu.h"
#include "exp.h"

struct swiglu {
    const gn_tensor *y, *gate, *up;
};

static void swiglu_rows(void *arg, const gn_cpu_team *team) {
    const struct swiglu *op = arg;
    const int64_t T = op->y->shape[0], C = op->y->shape[1];
    const int64_t last = gn_cpu_share(T, team->thread + 1, team->n_threads);
    for (int64_t t = gn_cpu_share(T, team->thread, team->n_threads); t < last; t++) {
        float *y = gn_cpu_row(op->y, t);
        const float *gate = gn_cpu_row(op->gate, t), *up = gn_cpu_row(op->up, t);
        for (int64_t c = 0; c < C; c++) y[c] = gn_silu(gate[c]) * up[c];
    }
}

gn_status gn_cpu_swiglu(gn_ctx *ctx, gn_tensor *y, const gn_tensor *gate, const gn_tensor *up) {
    struct swiglu op = {y, gate, up};
    gn_cpu_parallel(ctx->pool, gn_tensor_numel(y) < GN_CPU_SERIAL, swiglu_rows, &op);
    return GN_OK;
}

struct swiglu_bwd {
    const gn_tensor *dgate, *dup, *dy, *gate, *up;
};

/* silu(g) = g s with s = 1/(1 + e^-g), so silu'(g) = s (1 + g (1 - s)). */
static void swiglu_bwd_rows(void *arg, const gn_cpu_team *team) {
    const struct swiglu_bwd *op = arg;
    const int64_t T = op->dy->shape[0], C = op->dy->shape[1];
    const int64_t last = gn_cpu_share(T, team->thread + 1, team->n_threads);
    for (int64_t t = gn_cpu_share(T, team->thread, team->n_threads); t < last; t++) {
        float *dgate = gn_cpu_row(op->dgate, t), *dup = gn_cpu_row(op->dup, t);
        const float *dy = gn_cpu_row(op->dy, t);
        const float *gate = gn_cpu_row(op->gate, t), *up = gn_cpu_row(op->up, t);
        for (int64_t c = 0; c < C; c++) {
            const float g = gate[c], u = up[c], s = 1.0f / (1.0f + gn_exp(-g));
            dgate[c] = dy[c] * u * (s * (1.0f + g * (1.0f - s)));
            dup[c] = dy[c] * (g * s);
        }
    }
}

gn_status gn_cpu_swiglu_bwd(gn_ctx *ctx, gn_tensor *dgate, gn_tensor *dup, const gn_tensor *dy,
                            const gn_tensor *gate, const gn_tensor *up) {
    struct swiglu_bwd op = {dgate, dup, dy, gate, up};
    gn_cpu_parallel(ctx->pool, gn_tensor_numel(dy) < GN_CPU_SERIAL, swiglu_bwd_rows, &op);
    return GN_OK;
}
