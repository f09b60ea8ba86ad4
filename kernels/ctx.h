/* ctx.h - where operations run: a backend, its threads, its working memory.
 *
 * A context is used by one thread at a time. Working memory for the ops is reserved ahead
 * (gn_ctx_reserve) and only ever grows, so that steady state allocates nothing. */
#ifndef GN_CTX_H
#define GN_CTX_H

#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct gn_ctx gn_ctx;

/* How the CPU's products are computed, weakest first; each needs those before it. */
typedef enum gn_isa { GN_ISA_REFERENCE, GN_ISA_AVX2, GN_ISA_AVX512, GN_ISA_AVX512BF16 } gn_isa;

typedef struct gn_ctx_options {
    const char *device; /* "auto" (NULL: the first GPU, else the CPU), "cpu", "cuda", "cuda:N" */
    gn_dtype compute;   /* GN_F32 or GN_BF16: what products multiply; sums are always float32 */
    bool auto_compute;  /* ignore `compute`: BF16 where it is native, else F32 */
    int threads;        /* 0: all cores */
    bool limit_isa;     /* for tests: no more than max_isa */
    gn_isa max_isa;
} gn_ctx_options;

/* An unknown device is GN_EINVAL, one that this build or machine lacks GN_EDEVICE. */
GN_CHECKED gn_status gn_ctx_open(gn_ctx **out, const gn_ctx_options *options, gn_error *err);
void gn_ctx_close(gn_ctx *ctx);

const char *gn_ctx_device(const gn_ctx *ctx); /* "cpu (avx512-bf16, 2 threads)" */
gn_dtype gn_ctx_compute(const gn_ctx *ctx);
gn_dtype gn_ctx_activation(const gn_ctx *ctx); /* of activations, see ops.h */
int gn_ctx_threads(const gn_ctx *ctx);
gn_isa gn_ctx_isa(const gn_ctx *ctx);

/* Calls fn(arg, i) for every i in [0, n) on the context's threads, in any order, and returns
 * when all are done. For work beside the ops: threads of one's own would get in theirs' way. */
typedef void gn_ctx_fn(void *arg, int64_t i);
void gn_ctx_for(gn_ctx *ctx, int64_t n, gn_ctx_fn *fn, void *arg);

/* Makes sure that ops find `bytes` of working memory. */
GN_CHECKED gn_status gn_ctx_reserve(gn_ctx *ctx, size_t bytes);

/* Memory on the context's device, 64-byte aligned; NULL when there is none left. */
void *gn_ctx_alloc(gn_ctx *ctx, size_t bytes);
void gn_ctx_free(gn_ctx *ctx, void *memory);
/* Gives back what only loading weights needed. */
void gn_ctx_trim(gn_ctx *ctx);

/* Bytes of the device's memory, those of them that nobody uses, and those that were in use once the
 * context was open, before anything else was put there: the driver's, and other programs'. On the
 * CPU: of the machine, or of the container; what only caches files counts as free; opened is 0.
 * GN_EIO when that cannot be known. */
typedef struct gn_ctx_memory {
    int64_t free, total, opened;
} gn_ctx_memory;
GN_CHECKED gn_status gn_ctx_read_memory(gn_ctx *ctx, gn_ctx_memory *memory);
GN_CHECKED gn_status gn_ctx_read_host_memory(gn_ctx_memory *memory);

/* Whether that memory is the host's own, to be read and written directly. */
bool gn_ctx_is_host(const gn_ctx *ctx);
/* To and from the device's memory, in order with the ops. write returns when src may be used
 * again, read when dst is there. */
GN_CHECKED gn_status gn_ctx_write(gn_ctx *ctx, void *dst, const void *src, size_t bytes);
GN_CHECKED gn_status gn_ctx_read(gn_ctx *ctx, void *dst, const void *src, size_t bytes);
/* Within the device's memory, in order with the ops; dst and src do not overlap. */
GN_CHECKED gn_status gn_ctx_copy(gn_ctx *ctx, void *dst, const void *src, size_t bytes);
GN_CHECKED gn_status gn_ctx_zero(gn_ctx *ctx, void *dst, size_t bytes); /* likewise */
/* Memory of the host that uploads read, 64-byte aligned; NULL when there is none left. It takes
 * time, may be long, and is possible from any thread. */
void *gn_ctx_alloc_host(gn_ctx *ctx, size_t bytes);
void gn_ctx_free_host(gn_ctx *ctx, void *memory);

/* A copy to the device beside the ops: later ops neither wait for it nor it for them, so that they
 * must not use dst before it is ready. It does wait for the ops before it, which may still use what
 * was there, and for the uploads before it. src: from gn_ctx_alloc_host, as it is until then. */
typedef struct gn_upload gn_upload;
GN_CHECKED gn_status gn_upload_begin(gn_upload **out, gn_ctx *ctx, void *dst, const void *src,
                                     size_t bytes);
GN_CHECKED gn_status gn_upload_poll(gn_upload *upload, bool *ready);
void gn_upload_close(gn_upload *upload); /* waits for it; accepts NULL */

/* Waits until every op before has run; GN_EDEVICE when one failed. */
GN_CHECKED gn_status gn_ctx_wait(gn_ctx *ctx);

/* Runs fn(arg), which calls ops and nothing else. A device with recorded launches keeps what fn
 * did under `key` and repeats it for the same key without calling fn: the caller makes sure that
 * equal keys mean equal ops on equal memory. */
typedef gn_status gn_ctx_ops(void *arg);
GN_CHECKED gn_status gn_ctx_replay(gn_ctx *ctx, uint64_t key, gn_ctx_ops *fn, void *arg);

#ifdef __cplusplus
}
#endif
#endif
