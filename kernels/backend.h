/* backend.h - what is behind a gn_ctx; for kernels/ only.
 *
 * A backend is one table of functions, an op each. ops.c checks a call and then calls
 * through the table, so that a backend sees only calls that make sense: shapes agree,
 * pointers are set, ids and blocks are in range, T is at least 1. What it may still
 * refuse is a lack of working memory (GN_ENOMEM). */
#ifndef GN_BACKEND_H
#define GN_BACKEND_H

#include "ops.h"

/* member, parameters: the ops, each with the meaning that ops.h gives it */
#define GN_BACKEND_OPS(X)                                                                          \
    X(embed, (gn_ctx *, gn_tensor *, const gn_matrix *, const int32_t *))                          \
    X(rmsnorm, (gn_ctx *, gn_tensor *, const gn_tensor *, const gn_tensor *, float))               \
    X(linear, (gn_ctx *, const gn_linear_args *))                                                  \
    X(rope_table, (gn_ctx *, gn_tensor *, gn_tensor *, const gn_tensor *, const gn_seqs *))        \
    X(rope_store, (gn_ctx *, gn_tensor *, const gn_tensor *, const gn_tensor *, const gn_tensor *, \
                   const gn_tensor *, const gn_seqs *, gn_kv *))                                   \
    X(attention, (gn_ctx *, gn_tensor *, const gn_tensor *, const gn_kv *, const gn_seqs *))

typedef struct gn_backend {
#define X(name, parameters) gn_status(*name) parameters;
    GN_BACKEND_OPS(X)
#undef X
    size_t (*linear_workspace)(const gn_ctx *, int64_t rows, int64_t max_k, int64_t max_n,
                               int64_t max_rank, int max_terms);
    size_t (*attention_workspace)(const gn_ctx *, int64_t context);
    void *(*alloc)(gn_ctx *, size_t bytes); /* 64-byte aligned */
    void (*free)(gn_ctx *, void *memory);
} gn_backend;

struct gn_ctx {
    const gn_backend *backend;
    gn_dtype compute;
    gn_isa isa;
    int threads;
    struct gn_cpu_pool *pool; /* the CPU's threads */
    void *workspace;          /* from backend->alloc */
    size_t workspace_bytes;
    char device[64];
};

extern const gn_backend gn_cpu_backend;

#endif
