/* ctx.c - opening a device: which backend, which instructions, how many threads.
 *
 * The choice is made once, here; ops look at the context and never at the machine. */
#include "backend.h"

#include "cpu/parallel.h"

#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_THREADS = 1024 };

static gn_isa isa_of_machine(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("f16c"))
        return GN_ISA_REFERENCE;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vbmi"))
        return GN_ISA_AVX2;
    if (!__builtin_cpu_supports("avx512bf16")) return GN_ISA_AVX512;
    return GN_ISA_AVX512BF16;
#else
    return GN_ISA_REFERENCE;
#endif
}

static const char *isa_name(gn_isa isa) {
    switch (isa) {
    case GN_ISA_AVX512BF16: return "avx512-bf16";
    case GN_ISA_AVX512: return "avx512";
    case GN_ISA_AVX2: return "avx2";
    case GN_ISA_REFERENCE: break;
    }
    return "plain C";
}

/* CPUs' worth of time that the container may use, rounded up; INT_MAX: no limit. */
static int cgroup_cpus(void) {
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "re");
    if (!f) return INT_MAX;
    long long quota = 0, period = 0;
    const int found = fscanf(f, "%lld %lld", &quota, &period); /* "max 100000": no quota */
    fclose(f);
    if (found != 2 || quota < 1 || period < 1) return INT_MAX;
    const long long cpus = quota / period + (quota % period != 0);
    return cpus < INT_MAX ? (int)cpus : INT_MAX;
}

static int threads_of_machine(void) {
    cpu_set_t set;
    long n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)
                                                         : sysconf(_SC_NPROCESSORS_ONLN);
    const int limit = cgroup_cpus();
    if (n > limit) n = limit;
    if (n > MAX_THREADS) n = MAX_THREADS;
    return n < 1 ? 1 : (int)n;
}

static gn_status check_device(const char *device, gn_error *err) {
    if (!device || strcmp(device, "auto") == 0 || strcmp(device, "cpu") == 0) return GN_OK;
    if (strcmp(device, "cuda") == 0 || strncmp(device, "cuda:", 5) == 0)
        return gn_fail(err, GN_EDEVICE,
                       "device \"%s\": this build has no CUDA support; use \"cpu\" or \"auto\", or "
                       "build where nvcc is found",
                       device);
    return gn_fail(err, GN_EINVAL, "unknown device \"%s\"; expected \"auto\" or \"cpu\"", device);
}

gn_status gn_ctx_open(gn_ctx **out, const gn_ctx_options *options, gn_error *err) {
    if (!out) return gn_fail(err, GN_EINVAL, "gn_ctx_open: out is NULL");
    *out = NULL;
    if (!options) return gn_fail(err, GN_EINVAL, "gn_ctx_open: options is NULL");
    const gn_status status = check_device(options->device, err);
    if (status) return status;
    if (!options->auto_compute && options->compute != GN_F32 && options->compute != GN_BF16)
        return gn_fail(err, GN_EINVAL, "compute dtype %s: expected F32 or BF16",
                       gn_dtype_name(options->compute));
    if (options->threads < 0 || options->threads > MAX_THREADS)
        return gn_fail(err, GN_EINVAL, "threads is %d: expected 0 (all cores) to %d",
                       options->threads, MAX_THREADS);

    gn_ctx *ctx = calloc(1, sizeof *ctx);
    if (!ctx) return gn_fail(err, GN_ENOMEM, "out of memory opening a context");
    ctx->backend = &gn_cpu_backend;
    ctx->isa = isa_of_machine();
    if (options->limit_isa && ctx->isa > options->max_isa) ctx->isa = options->max_isa;
    ctx->compute = options->compute;
    if (options->auto_compute) ctx->compute = ctx->isa == GN_ISA_AVX512BF16 ? GN_BF16 : GN_F32;
    ctx->threads = options->threads ? options->threads : threads_of_machine();
    ctx->pool = gn_cpu_pool_open(ctx->threads);
    if (!ctx->pool) {
        gn_fail(err, GN_ENOMEM, "cannot start %d threads", ctx->threads);
        free(ctx);
        return GN_ENOMEM;
    }
    snprintf(ctx->device, sizeof ctx->device, "cpu (%s, %d thread%s)", isa_name(ctx->isa),
             ctx->threads, ctx->threads == 1 ? "" : "s");
    *out = ctx;
    return GN_OK;
}

void gn_ctx_close(gn_ctx *ctx) {
    if (!ctx) return;
    gn_cpu_pool_close(ctx->pool);
    gn_ctx_free(ctx, ctx->workspace);
    free(ctx);
}

const char *gn_ctx_device(const gn_ctx *ctx) {
    return ctx->device;
}

gn_dtype gn_ctx_compute(const gn_ctx *ctx) {
    return ctx->compute;
}

int gn_ctx_threads(const gn_ctx *ctx) {
    return ctx->threads;
}

gn_isa gn_ctx_isa(const gn_ctx *ctx) {
    return ctx->isa;
}

void gn_ctx_for(gn_ctx *ctx, int64_t n, gn_ctx_fn *fn, void *arg) {
    gn_cpu_for(ctx->pool, n, fn, arg);
}

gn_status gn_ctx_reserve(gn_ctx *ctx, size_t bytes) {
    if (!ctx) return GN_EINVAL;
    if (bytes <= ctx->workspace_bytes) return GN_OK;
    void *memory = gn_ctx_alloc(ctx, bytes); /* first, so that a failure changes nothing */
    if (!memory) return GN_ENOMEM;
    gn_ctx_free(ctx, ctx->workspace);
    ctx->workspace = memory;
    ctx->workspace_bytes = bytes;
    return GN_OK;
}

void *gn_ctx_alloc(gn_ctx *ctx, size_t bytes) {
    return ctx ? ctx->backend->alloc(ctx, bytes) : NULL;
}

void gn_ctx_free(gn_ctx *ctx, void *memory) {
    if (ctx && memory) ctx->backend->free(ctx, memory);
}
