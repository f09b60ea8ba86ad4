/* backend.h - what is behind a gn_ctx; for kernels/ only.
 *
 * A backend is one table of functions, an op each. ops.c checks a call and then calls
 * through the table, so that a backend sees only calls that make sense: shapes agree,
 * pointers are set, ids and blocks are in range, T is at least 1. What it may still
 * refuse is a lack of working memory (GN_ENOMEM). */
#ifndef GN_BACKEND_H
#define GN_BACKEND_H

#include "adamw.h"
#include "measure.h"
#include "ops.h"
#include "ops_train.h"

#ifdef __cplusplus
extern "C" {
#endif

/* member, parameters: the ops, each with the meaning that ops.h (adamw.h) gives it */
#define GN_BACKEND_OPS(X)                                                                          \
    X(embed, (gn_ctx *, gn_tensor *, const gn_matrix *, const int32_t *ids, const int32_t *drawn)) \
    X(rmsnorm, (gn_ctx *, gn_tensor *, const gn_tensor *, const gn_tensor *, float))               \
    X(linear, (gn_ctx *, const gn_linear_args *))                                                  \
    X(rope_table, (gn_ctx *, gn_tensor *, gn_tensor *, const gn_tensor *, const gn_seqs *))        \
    X(rope_store, (gn_ctx *, gn_tensor *, const gn_tensor *, const gn_tensor *, const gn_tensor *, \
                   const gn_tensor *, const gn_seqs *, gn_kv *))                                   \
    X(attention, (gn_ctx *, gn_tensor *, const gn_tensor *, const gn_kv *, const gn_seqs *))       \
    X(adamw, (gn_ctx *, const gn_adamw_args *))                                                    \
    X(sum_squares, (gn_ctx *, double *sum, const gn_tensor *))                                     \
    X(convert, (gn_ctx *, gn_tensor *, const gn_tensor *))                                         \
    X(embed_bwd, (gn_ctx *, gn_tensor *, const gn_tensor *, const int32_t *ids))                   \
    X(rmsnorm_bwd, (gn_ctx *, gn_tensor *, gn_tensor *, gn_tensor *, const gn_tensor *,            \
                    const gn_tensor *, const gn_tensor *, const gn_tensor *, float))               \
    X(linear_bwd, (gn_ctx *, const gn_linear_args *, const gn_linear_grads *))                     \
    X(swiglu, (gn_ctx *, gn_tensor *, const gn_tensor *, const gn_tensor *))                       \
    X(swiglu_bwd, (gn_ctx *, gn_tensor *, gn_tensor *, const gn_tensor *, const gn_tensor *,       \
                   const gn_tensor *))                                                             \
    X(rope, (gn_ctx *, gn_tensor *, const gn_tensor *, const gn_tensor *))                         \
    X(rope_bwd, (gn_ctx *, gn_tensor *, const gn_tensor *, const gn_tensor *))                     \
    X(attention_train, (gn_ctx *, const gn_attention_rows *))                                      \
    X(attention_bwd, (gn_ctx *, gn_tensor *, gn_tensor *, gn_tensor *, const gn_tensor *,          \
                      const gn_attention_rows *))                                                  \
    X(cross_entropy, (gn_ctx *, const gn_cross_entropy_args *))

typedef struct gn_backend {
#define X(name, parameters) gn_status(*name) parameters;
    GN_BACKEND_OPS(X)
#undef X
    size_t (*linear_workspace)(const gn_ctx *, int64_t rows, int64_t max_k, int64_t max_n,
                               int64_t max_rank, int max_terms);
    size_t (*attention_workspace)(const gn_ctx *, int64_t context);
    size_t (*linear_bwd_workspace)(const gn_ctx *, int64_t rows, int64_t max_k, int64_t max_n,
                                   int64_t max_rank);
    size_t (*attention_train_workspace)(const gn_ctx *, int64_t rows, int64_t heads,
                                        int64_t head_dim, int64_t context);
    size_t (*cross_entropy_workspace)(const gn_ctx *, int64_t max_c, int64_t vocab);
    void *(*alloc)(gn_ctx *, size_t bytes); /* 64-byte aligned */
    void (*free)(gn_ctx *, void *memory);
    gn_status (*write)(gn_ctx *, void *dst, const void *src, size_t bytes);
    gn_status (*read)(gn_ctx *, void *dst, const void *src, size_t bytes);
    gn_status (*copy)(gn_ctx *, void *dst, const void *src, size_t bytes);
    gn_status (*zero)(gn_ctx *, void *dst, size_t bytes);
    gn_status (*wait)(gn_ctx *);
    void *(*alloc_host)(gn_ctx *, size_t bytes);
    void (*free_host)(gn_ctx *, void *memory);
    /* *event: whatever says when the copy is done, for the two below; destroyed by the last. */
    gn_status (*upload_begin)(gn_ctx *, void **event, void *dst, const void *src, size_t bytes);
    gn_status (*upload_poll)(gn_ctx *, void *event, bool *ready);
    void (*upload_end)(gn_ctx *, void *event);
    void (*trim)(gn_ctx *);
    gn_status (*replay)(gn_ctx *, uint64_t key, gn_ctx_ops *fn, void *arg);
    gn_status (*stage_reserve)(gn_ctx *, const gn_stage_limits *);
    gn_status (*stage)(gn_ctx *, const int32_t *ids, const gn_seqs *, const gn_lora *, int32_t n);
    size_t (*place_bytes)(const gn_ctx *, const gn_matrix *host);
    gn_status (*place)(gn_ctx *, gn_matrix *out, const gn_matrix *host, void *memory);
    size_t (*quantize_place_bytes)(const gn_ctx *, gn_qtype, bool double_quant, int64_t rows,
                                   int64_t cols);
    gn_status (*quantize_place)(gn_ctx *, gn_matrix *out, gn_qtype, bool double_quant,
                                const void *src, gn_dtype, int64_t rows, int64_t cols, void *memory,
                                gn_error *);
    gn_status (*measure_rates)(gn_ctx *, gn_rates *);
    gn_status (*measure_quantize)(gn_ctx *, gn_qtype, bool double_quant, int64_t rows, int64_t cols,
                                  double *quantize, double *dequantize);
    gn_status (*read_memory)(gn_ctx *, gn_ctx_memory *);
    void (*close)(gn_ctx *);
} gn_backend;

struct gn_ctx {
    const gn_backend *backend;
    gn_dtype compute;
    gn_isa isa;
    int threads;
    struct gn_cpu_pool *pool; /* the CPU's threads */
    struct gn_cuda *cuda;     /* NULL on the CPU */
    void *workspace;          /* from backend->alloc */
    size_t workspace_bytes;
    char device[64];
};

extern const gn_backend gn_cpu_backend;

/* Opens GPU `index` for ctx: sets backend, cuda, compute (with auto_compute) and device. In a build
 * without CUDA, or where that GPU is not there, GN_EDEVICE. */
gn_status gn_cuda_open(gn_ctx *ctx, int index, bool auto_compute, gn_error *err);

#ifdef __cplusplus
}
#endif
#endif
