/* memory.c - the CPU's memory: allocating it, how much there is, and copies that are done at once.
 *
 * A container may have less than its machine. What it holds includes files that it has read, which
 * leave when memory is needed. */
#include "cpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

void *gn_cpu_alloc(gn_ctx *ctx, size_t bytes) {
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

void gn_cpu_free(gn_ctx *ctx, void *memory) {
    (void)ctx;
    free(memory);
}

gn_status gn_cpu_copy(gn_ctx *ctx, void *dst, const void *src, size_t bytes) {
    (void)ctx;
    memcpy(dst, src, bytes);
    return GN_OK;
}

/* ---- uploads ---- */

gn_status gn_cpu_upload_begin(gn_ctx *ctx, void **event, void *dst, const void *src, size_t bytes) {
    *event = NULL;
    return gn_cpu_copy(ctx, dst, src, bytes);
}

gn_status gn_cpu_upload_poll(gn_ctx *ctx, void *event, bool *ready) {
    (void)ctx, (void)event;
    *ready = true;
    return GN_OK;
}

void gn_cpu_upload_end(gn_ctx *ctx, void *event) {
    (void)ctx, (void)event;
}

/* ---- how much there is ---- */

/* The number after `key` at the start of a line, or -1. */
static int64_t read_number(const char *path, const char *key) {
    char line[256];
    long long value = -1;
    FILE *f = fopen(path, "re");
    if (!f) return -1;
    while (value < 0 && fgets(line, sizeof line, f))
        if (strncmp(line, key, strlen(key)) == 0 && sscanf(line + strlen(key), "%lld", &value) != 1)
            value = -1;
    fclose(f);
    return value;
}

static void limit_to_container(gn_ctx_memory *memory) {
    const int64_t limit = read_number("/sys/fs/cgroup/memory.max", ""); /* "max": none */
    const int64_t held = read_number("/sys/fs/cgroup/memory.current", "");
    const int64_t files = read_number("/sys/fs/cgroup/memory.stat", "inactive_file ");
    if (limit < 0 || held < 0) return;
    const int64_t left = limit - held + (files > 0 ? files : 0);
    memory->total = gn_min(memory->total, limit);
    memory->free = gn_min(memory->free, left > 0 ? left : 0);
}

gn_status gn_cpu_read_memory(gn_ctx *ctx, gn_ctx_memory *memory) {
    (void)ctx;
    const int64_t total = read_number("/proc/meminfo", "MemTotal:");
    const int64_t available = read_number("/proc/meminfo", "MemAvailable:");
    if (total < 0 || available < 0) return GN_EIO;
    *memory = (gn_ctx_memory){.free = available * 1024, .total = total * 1024};
    limit_to_container(memory);
    return GN_OK;
}
