/* backend.c - the CPU's table of ops, and its memory. */
#include "cpu.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static void *cpu_alloc(gn_ctx *ctx, size_t bytes) {
    (void)ctx;
    if (bytes > PTRDIFF_MAX) return NULL;
    const size_t huge_page = (size_t)2 << 20;
    const size_t align = bytes >= 2 * huge_page ? huge_page : 64;
    void *memory = NULL;
    if (posix_memalign(&memory, align, bytes ? bytes : 1) != 0) return NULL;
#ifdef MADV_HUGEPAGE
    /* Weights are read end to end, a few times a second: large pages save a tenth of the time. */
    if (align == huge_page) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return memory;
}

static void cpu_free(gn_ctx *ctx, void *memory) {
    (void)ctx;
    free(memory);
}

static gn_status cpu_copy(gn_ctx *ctx, void *dst, const void *src, size_t bytes) {
    (void)ctx;
    memcpy(dst, src, bytes);
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

static size_t cpu_used_bytes(gn_ctx *ctx) {
    (void)ctx;
    return 0;
}

static void cpu_close(gn_ctx *ctx) {
    (void)ctx;
}

const gn_backend gn_cpu_backend = {
#define X(name, parameters) .name = gn_cpu_##name,
    GN_BACKEND_OPS(X)
#undef X
        .linear_workspace = gn_cpu_linear_workspace,
    .attention_workspace = gn_cpu_attention_workspace,
    .linear_bwd_workspace = gn_cpu_linear_bwd_workspace,
    .attention_train_workspace = gn_cpu_attention_train_workspace,
    .cross_entropy_workspace = gn_cpu_cross_entropy_workspace,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .write = cpu_copy,
    .read = cpu_copy,
    .copy = cpu_copy,
    .wait = cpu_wait,
    .replay = cpu_replay,
    .stage_reserve = cpu_stage_reserve,
    .stage = cpu_stage,
    .place_bytes = gn_cpu_place_bytes,
    .place = gn_cpu_place,
    .quantize_place_bytes = gn_cpu_quantize_place_bytes,
    .quantize_place = gn_cpu_quantize_place,
    .measure_rates = gn_cpu_measure_rates,
    .measure_quantize = gn_cpu_measure_quantize,
    .used_bytes = cpu_used_bytes,
    .close = cpu_close,
};
