/* ops_train.h - the operations that training adds to those of ops.h: backward of each, and forward
 * where a backward pass needs what inference does not keep.
 *
 * Gradients of activations (dx, dq, ...) are overwritten; gradients of parameters (dw, da, db,
 * dtable) are added to, so that micro-batches sum, and a tensor with data NULL is a gradient that
 * nobody wants. A gradient has its activation's dtype, or float32; those of parameters are float32.
 * Sums are float32 or better; the CPU multiplies float32 here whatever the compute dtype.
 *
 * As in ops.h, ids, labels and gn_seqs are on the host. Of gn_seqs these ops read n, row0 and pos0:
 * a sample is a sequence of its own, and samples packed into one batch do not see each other. */
#ifndef GN_OPS_TRAIN_H
#define GN_OPS_TRAIN_H

#include "ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y = x, in y's dtype. x, y: (T, C), each F32 or BF16; they do not overlap. */
GN_CHECKED gn_status gn_convert(gn_ctx *ctx, gn_tensor *y, const gn_tensor *x);

/* dtable[ids[t]] += dy[t]. dtable: (V, C) f32; dy: (T, C) f32. */
GN_CHECKED gn_status gn_embed_bwd(gn_ctx *ctx, gn_tensor *dtable, const gn_tensor *dy,
                                  const int32_t *ids);

/* dx = skip + the gradient through y = rmsnorm(x). dx, dy, skip, x: (T, C), x f32 or an activation;
 * dw: (C). skip is the gradient that reaches x on another way, the residual stream's; NULL: none;
 * it may be dx. rounded = dx in a dtype of its own; NULL: nobody wants it; it may be dy. */
GN_CHECKED gn_status gn_rmsnorm_bwd(gn_ctx *ctx, gn_tensor *dx, gn_tensor *rounded, gn_tensor *dw,
                                    const gn_tensor *dy, const gn_tensor *skip, const gn_tensor *x,
                                    const gn_tensor *w, float eps);

/* Gradients of one gn_linear, called with the same arguments. */
typedef struct gn_linear_grads {
    gn_tensor dx; /* (T, K), of what the products multiply: norm(x) where there is a norm */
    struct gn_linear_part_grads {
        gn_tensor dy;     /* (T, N_i) */
        int64_t dy_spare; /* columns past N_i of dy's rows that belong to nobody, as x_spare */
        gn_tensor da, db; /* of the LoRA term's pair */
        gn_tensor dw;     /* (N_i, K), of a weight that is not quantized */
    } part[GN_MAX_PARTS];
} gn_linear_grads;

/* The epilogue is GN_STORE or GN_ADD, and there is at most one LoRA term. dx passes through
 * weights of any type, and through the term: dx = sum over parts of W^T dy + s * A^T B^T dy. Of a
 * single part dx may be x; where neither da, db nor dw is wanted of any part, x is not read. */
GN_CHECKED gn_status gn_linear_bwd(gn_ctx *ctx, const gn_linear_args *args,
                                   const gn_linear_grads *grads);
/* Working memory that gn_linear with dropout, gn_linear_bwd and gn_rmsnorm_bwd need; sizes as in
 * gn_linear_workspace. */
size_t gn_linear_bwd_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                               int64_t max_rank);

/* y = silu(gate) * up; all (T, C) activations. dgate and dup may be gate and up. */
GN_CHECKED gn_status gn_swiglu(gn_ctx *ctx, gn_tensor *y, const gn_tensor *gate,
                               const gn_tensor *up);
GN_CHECKED gn_status gn_swiglu_bwd(gn_ctx *ctx, gn_tensor *dgate, gn_tensor *dup,
                                   const gn_tensor *dy, const gn_tensor *gate, const gn_tensor *up);

/* Rotates x (T, heads, head_dim) in place, as gn_rope_store does; and its gradient, back. */
GN_CHECKED gn_status gn_rope(gn_ctx *ctx, gn_tensor *x, const gn_tensor *cos, const gn_tensor *sin);
GN_CHECKED gn_status gn_rope_bwd(gn_ctx *ctx, gn_tensor *dx, const gn_tensor *cos,
                                 const gn_tensor *sin);

/* Causal attention within each sequence of a batch, without a cache. */
typedef struct gn_attention_rows {
    gn_tensor q, y; /* (T, heads, head_dim) activations; heads is a multiple of kv_heads */
    gn_tensor k, v; /* (T, kv_heads, head_dim) */
    gn_tensor lse;  /* (T, heads) f32: log of the sum of the scores' exponentials */
    const gn_seqs *seqs;
} gn_attention_rows;

/* Gives y and lse. */
GN_CHECKED gn_status gn_attention_train(gn_ctx *ctx, const gn_attention_rows *rows);
/* dq, dk, dv from dy and all that gn_attention_train had and gave. */
GN_CHECKED gn_status gn_attention_bwd(gn_ctx *ctx, gn_tensor *dq, gn_tensor *dk, gn_tensor *dv,
                                      const gn_tensor *dy, const gn_attention_rows *rows);
/* Working memory for `rows` rows of sequences of up to `context` tokens. */
size_t gn_attention_train_workspace(const gn_ctx *ctx, int64_t rows, int64_t heads,
                                    int64_t head_dim, int64_t context);

enum { GN_IGNORED_LABEL = -100 };

typedef struct gn_cross_entropy_args {
    gn_tensor x;              /* (T, C) f32 */
    const gn_matrix *lm_head; /* (V, C), not quantized; logits = W x */
    const int32_t *labels;    /* (T) in [0, V), or GN_IGNORED_LABEL */
    float scale;              /* of the gradients: 1 / labels of the whole batch, for their mean */
    gn_tensor loss;           /* (T) f32: -log p(label), not scaled; 0 where ignored */
    gn_tensor dx;             /* (T, C) f32, may be x; data NULL: only the losses are wanted */
    gn_tensor dw;             /* (V, C) */
} gn_cross_entropy_args;

/* A few rows at a time: all logits at once never exist. */
GN_CHECKED gn_status gn_cross_entropy(gn_ctx *ctx, const gn_cross_entropy_args *args);
size_t gn_cross_entropy_workspace(const gn_ctx *ctx, int64_t max_c, int64_t vocab);

#ifdef __cplusplus
}
#endif
#endif
