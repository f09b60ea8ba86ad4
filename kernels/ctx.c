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

enum { DEVICE_AUTO = -2, DEVICE_CPU = -1 }; /* else the number of a GPU */

static gn_status parse_device(const char *name, int *device, gn_error *err) {
    char *end;
    *device = DEVICE_AUTO;
    if (!name || strcmp(name, "auto") == 0) return GN_OK;
    *device = DEVICE_CPU;
    if (strcmp(name, "cpu") == 0) return GN_OK;
    *device = 0;
    if (strcmp(name, "cuda") == 0) return GN_OK;
    if (strncmp(name, "cuda:", 5) == 0 && name[5] >= '0' && name[5] <= '9') {
        const long n = strtol(name + 5, &end, 10);
        *device = (int)n;
        if (*end == 0 && n <= 1023) return GN_OK;
    }
    return gn_fail(err, GN_EINVAL,
                   "unknown device \"%s\"; expected \"auto\", \"cpu\", \"cuda\" or \"cuda:N\"",
                   name);
}

static void open_cpu(gn_ctx *ctx, const gn_ctx_options *options) {
    ctx->backend = &gn_cpu_backend;
    if (options->auto_compute) ctx->compute = ctx->isa == GN_ISA_AVX512BF16 ? GN_BF16 : GN_F32;
    snprintf(ctx->device, sizeof ctx->device, "cpu (%s, %d thread%s)", isa_name(ctx->isa),
             ctx->threads, ctx->threads == 1 ? "" : "s");
}

gn_status gn_ctx_open(gn_ctx **out, const gn_ctx_options *options, gn_error *err) {
    if (!out) return gn_fail(err, GN_EINVAL, "gn_ctx_open: out is NULL");
    *out = NULL;
    if (!options) return gn_fail(err, GN_EINVAL, "gn_ctx_open: options is NULL");
    int device;
    gn_status status = parse_device(options->device, &device, err);
    if (status) return status;
    if (!options->auto_compute && options->compute != GN_F32 && options->compute != GN_BF16)
        return gn_fail(err, GN_EINVAL, "compute dtype %s: expected F32 or BF16",
                       gn_dtype_name(options->compute));
    if (options->threads < 0 || options->threads > MAX_THREADS)
        return gn_fail(err, GN_EINVAL, "threads is %d: expected 0 (all cores) to %d",
                       options->threads, MAX_THREADS);

    gn_ctx *ctx = calloc(1, sizeof *ctx);
    if (!ctx) return gn_fail(err, GN_ENOMEM, "out of memory opening a context");
    ctx->isa = isa_of_machine();
    if (options->limit_isa && ctx->isa > options->max_isa) ctx->isa = options->max_isa;
    ctx->compute = options->compute;
    ctx->threads = options->threads ? options->threads : threads_of_machine();
    ctx->pool = gn_cpu_pool_open(ctx->threads);
    if (!ctx->pool) {
        gn_fail(err, GN_ENOMEM, "cannot start %d threads", ctx->threads);
        free(ctx);
        return GN_ENOMEM;
    }
    if (device != DEVICE_CPU)
        status = gn_cuda_open(ctx, device == DEVICE_AUTO ? 0 : device, options->auto_compute,
                              device == DEVICE_AUTO ? NULL : err);
    if (device == DEVICE_CPU || (device == DEVICE_AUTO && status == GN_EDEVICE)) {
        status = GN_OK;
        open_cpu(ctx, options);
    }
    if (status)
        gn_ctx_close(ctx);
    else
        *out = ctx;
    return status;
}

void gn_ctx_close(gn_ctx *ctx) {
    if (!ctx) return;
    if (ctx->backend) {
        gn_ctx_free(ctx, ctx->workspace);
        ctx->backend->close(ctx);
    }
    gn_cpu_pool_close(ctx->pool);
    free(ctx);
}

const char *gn_ctx_device(const gn_ctx *ctx) {
    return ctx->device;
}

gn_dtype gn_ctx_compute(const gn_ctx *ctx) {
    return ctx->compute;
}

gn_dtype gn_ctx_activation(const gn_ctx *ctx) {
    return ctx->cuda ? ctx->compute : GN_F32;
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

void gn_ctx_trim(gn_ctx *ctx) {
    ctx->backend->trim(ctx);
}

gn_status gn_ctx_read_memory(gn_ctx *ctx, gn_ctx_memory *memory) {
    return ctx->backend->read_memory(ctx, memory);
}

gn_status gn_ctx_read_host_memory(gn_ctx_memory *memory) {
    return gn_cpu_backend.read_memory(NULL, memory);
}

bool gn_ctx_is_host(const gn_ctx *ctx) {
    return !ctx->cuda;
}

gn_status gn_ctx_write(gn_ctx *ctx, void *dst, const void *src, size_t bytes) {
    return bytes == 0 ? GN_OK : ctx->backend->write(ctx, dst, src, bytes);
}

gn_status gn_ctx_read(gn_ctx *ctx, void *dst, const void *src, size_t bytes) {
    return bytes == 0 ? GN_OK : ctx->backend->read(ctx, dst, src, bytes);
}

gn_status gn_ctx_copy(gn_ctx *ctx, void *dst, const void *src, size_t bytes) {
    return bytes == 0 ? GN_OK : ctx->backend->copy(ctx, dst, src, bytes);
}

gn_status gn_ctx_zero(gn_ctx *ctx, void *dst, size_t bytes) {
    return bytes == 0 ? GN_OK : ctx->backend->zero(ctx, dst, bytes);
}

/* ---- uploads ---- */

struct gn_upload {
    gn_ctx *ctx;
    void *event;
};

void *gn_ctx_alloc_host(gn_ctx *ctx, size_t bytes) {
    return ctx->backend->alloc_host(ctx, bytes);
}

void gn_ctx_free_host(gn_ctx *ctx, void *memory) {
    if (memory) ctx->backend->free_host(ctx, memory);
}

gn_status gn_upload_begin(gn_upload **out, gn_ctx *ctx, void *dst, const void *src, size_t bytes) {
    gn_upload *upload = calloc(1, sizeof *upload);
    if (!upload) return GN_ENOMEM;
    upload->ctx = ctx;
    const gn_status status = ctx->backend->upload_begin(ctx, &upload->event, dst, src, bytes);
    if (status)
        free(upload);
    else
        *out = upload;
    return status;
}

gn_status gn_upload_poll(gn_upload *upload, bool *ready) {
    return upload->ctx->backend->upload_poll(upload->ctx, upload->event, ready);
}

void gn_upload_close(gn_upload *upload) {
    if (!upload) return;
    upload->ctx->backend->upload_end(upload->ctx, upload->event);
    free(upload);
}

/* ---- order ---- */

gn_status gn_ctx_wait(gn_ctx *ctx) {
    return ctx->backend->wait(ctx);
}

gn_status gn_ctx_replay(gn_ctx *ctx, uint64_t key, gn_ctx_ops *fn, void *arg) {
    return ctx->backend->replay(ctx, key, fn, arg);
}
