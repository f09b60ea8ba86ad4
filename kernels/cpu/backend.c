/* backend.c - the CPU's table of ops. */
#include "cpu.h"

#include <string.h>

static gn_status cpu_zero(gn_ctx *ctx, void *dst, size_t bytes) {
    (void)ctx;
    memset(dst, 0, bytes);
    return GN_OK;
}

static gn_status cpu_wait(gn_ctx *ctx) {
    (void)ctx;
    return GN_OK;
}

static gn_status cpu_replay(gn_ctx *ctx, uint64_t key, gn_ctx_ops *fn, void *arg) {
    (void)ctx, (void)key;
    return fn(arg);
}

static gn_status cpu_stage_reserve(gn_ctx *ctx, const gn_stage_limits *limits) {
    (void)ctx, (void)limits;
    return GN_OK;
}

static gn_status cpu_stage(gn_ctx *ctx, const int32_t *ids, const gn_seqs *seqs,
                           const gn_lora *terms, int32_t n) {
    (void)ctx, (void)ids, (void)seqs, (void)terms, (void)n;
    return GN_OK;
}

static size_t cpu_linear_ahead_bytes(const gn_ctx *ctx, int64_t rows, int64_t values) {
    (void)ctx, (void)rows, (void)values;
    return 0;
}

static gn_status cpu_linear_reserve_ahead(gn_ctx *ctx, int64_t rows, int64_t values) {
    (void)ctx, (void)rows, (void)values;
    return GN_OK;
}

static void cpu_trim(gn_ctx *ctx) {
    (void)ctx;
}

static void cpu_close(gn_ctx *ctx) {
    (void)ctx;
}

const gn_backend gn_cpu_backend = {
#define X(name, parameters) .name = gn_cpu_##name,
    GN_BACKEND_OPS(X)
#undef X
        .linear_workspace = gn_cpu_linear_workspace,
    .linear_ahead_bytes = cpu_linear_ahead_bytes,
    .linear_reserve_ahead = cpu_linear_reserve_ahead,
    .attention_workspace = gn_cpu_attention_workspace,
    .linear_bwd_workspace = gn_cpu_linear_bwd_workspace,
    .attention_train_workspace = gn_cpu_attention_train_workspace,
    .cross_entropy_workspace = gn_cpu_cross_entropy_workspace,
    .alloc = gn_cpu_alloc,
    .free = gn_cpu_free,
    .write = gn_cpu_copy,
    .read = gn_cpu_copy,
    .copy = gn_cpu_copy,
    .zero = cpu_zero,
    .wait = cpu_wait,
    .alloc_host = gn_cpu_alloc,
    .free_host = gn_cpu_free,
    .upload_begin = gn_cpu_upload_begin,
    .upload_poll = gn_cpu_upload_poll,
    .upload_end = gn_cpu_upload_end,
    .trim = cpu_trim,
    .replay = cpu_replay,
    .stage_reserve = cpu_stage_reserve,
    .stage = cpu_stage,
    .place_bytes = gn_cpu_place_bytes,
    .place = gn_cpu_place,
    .quantize_place_bytes = gn_cpu_quantize_place_bytes,
    .quantize_place = gn_cpu_quantize_place,
    .measure_rates = gn_cpu_measure_rates,
    .measure_quantize = gn_cpu_measure_quantize,
    .read_memory = gn_cpu_read_memory,
    .close = cpu_close,
};
