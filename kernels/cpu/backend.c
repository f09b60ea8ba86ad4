/* backend.c - the CPU's table of ops, and its memory. */
#include "cpu.h"

#include <stdlib.h>
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

const gn_backend gn_cpu_backend = {
#define X(name, parameters) .name = gn_cpu_##name,
    GN_BACKEND_OPS(X)
#undef X
        .linear_workspace = gn_cpu_linear_workspace,
    .attention_workspace = gn_cpu_attention_workspace,
    .alloc = cpu_alloc,
    .free = cpu_free,
};
