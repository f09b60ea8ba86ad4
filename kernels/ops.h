/* ops.h - the operations every backend provides.
 *
 * The context decides where an op runs. Shapes are checked once, in ops.c, so that every
 * backend refuses exactly the same calls (GN_EINVAL); ids and gn_seqs are read on the host and
 * checked too. An op that finds too little working memory reserved says GN_ENOMEM. Tensors are
 * views: an op never allocates, frees or synchronises. A batch is flat: T rows, one a token, of
 * any mix of sequences.
 *
 * On the CPU a row's result depends neither on the other rows nor on the number of threads.
 * Activations are float32 there; ctx's compute dtype says what products multiply. */
#ifndef GN_OPS_H
#define GN_OPS_H

#include "blockquant.h"
#include "ctx.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y[t] = table[ids[t]]. y: (T, C) f32; table: (V, C), not quantized; ids: (T) in [0, V). */
GN_CHECKED gn_status gn_embed(gn_ctx *ctx, gn_tensor *y, const gn_matrix *table,
                              const int32_t *ids);

/* y = x / sqrt(mean(x^2) + eps) * w, row by row. x, y: (T, C) f32, may be the same; w: (C) f32. */
GN_CHECKED gn_status gn_rmsnorm(gn_ctx *ctx, gn_tensor *y, const gn_tensor *x, const gn_tensor *w,
                                float eps);

/* A LoRA term on some rows of a product: y[row0 .. row0+rows) += scale * B (A x). Several terms
 * may cover a row (a blend); they are added in their order. */
typedef struct gn_lora {
    int32_t row0, rows;
    float scale;
    gn_tensor a; /* (r, K) F32 or BF16 */
    gn_tensor b; /* (N, r), the same dtype */
} gn_lora;

typedef enum gn_epilogue {
    GN_STORE,  /* y_i = W_i x */
    GN_ADD,    /* y_i += W_i x: the residual stream */
    GN_SWIGLU, /* two parts, gate and up: y_0 = silu(W_0 x) * (W_1 x); y_1 is not used */
} gn_epilogue;

enum { GN_MAX_PARTS = 3 };

/* Up to three products of one x: q, k and v, or gate and up. */
typedef struct gn_linear_args {
    gn_tensor x;           /* (T, K) f32 */
    const gn_tensor *norm; /* (K) f32: x is RMS-normalised by it first; NULL: it is not */
    float eps;
    gn_epilogue epilogue;
    int n_parts;
    struct gn_linear_part {
        gn_tensor y;         /* (T, N_i) f32; with GN_SWIGLU only part 0's */
        const gn_matrix *w;  /* (N_i, K), any type */
        const gn_lora *lora; /* n_lora terms, or NULL */
        int n_lora;
    } part[GN_MAX_PARTS];
} gn_linear_args;

/* Weights count as dequantized and rounded to w->dtype, then to the compute dtype; sums are
 * float32. The LoRA term is added to the product before the epilogue. */
GN_CHECKED gn_status gn_linear(gn_ctx *ctx, const gn_linear_args *args);
/* Working memory that gn_linear needs (gn_ctx_reserve) for `rows` rows of up to `max_k` columns,
 * products of up to `max_n` rows in all parts together, and LoRA terms of up to `max_rank`, of
 * which up to `max_terms` cover one row. */
size_t gn_linear_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                           int64_t max_rank, int max_terms);

/* The rows of a flat batch, grouped by sequence: rows [row0[i], row0[i+1]) stand at positions
 * pos0[i], pos0[i]+1, ... of sequence i, whose KV cache is blocks[i*max_blocks + p/block_tokens]
 * for position p. */
typedef struct gn_seqs {
    int32_t n, max_blocks;
    const int32_t *row0;   /* (n + 1) */
    const int32_t *pos0;   /* (n) */
    const int32_t *blocks; /* (n, max_blocks) */
} gn_seqs;

enum { GN_MAX_HEAD_DIM = 256 };

/* One layer of the paged KV cache. k, v: (blocks, kv_heads, block_tokens, head_dim), F32 or BF16;
 * head_dim is even and at most GN_MAX_HEAD_DIM. */
typedef struct gn_kv {
    gn_tensor k, v;
} gn_kv;

/* Cosines and sines of the batch's positions: (T, head_dim/2) f32 each, from inv_freq
 * (head_dim/2) f32, computed as transformers does (float32 angle). */
GN_CHECKED gn_status gn_rope_table(gn_ctx *ctx, gn_tensor *cos, gn_tensor *sin,
                                   const gn_tensor *inv_freq, const gn_seqs *seqs);

/* Rotates q (T, heads, head_dim) in place and k (T, kv_heads, head_dim) on its way into the
 * cache, with halves paired (x_i, x_{i+D/2}); stores v (T, kv_heads, head_dim) beside it. f32. */
GN_CHECKED gn_status gn_rope_store(gn_ctx *ctx, gn_tensor *q, const gn_tensor *k,
                                   const gn_tensor *v, const gn_tensor *cos, const gn_tensor *sin,
                                   const gn_seqs *seqs, gn_kv *kv);

/* Causal attention of each row over its sequence's cache, up to and including its own
 * position. q, y: (T, heads, head_dim) f32; heads is a multiple of kv_heads (GQA). Scores are
 * scaled by 1/sqrt(head_dim). */
GN_CHECKED gn_status gn_attention(gn_ctx *ctx, gn_tensor *y, const gn_tensor *q, const gn_kv *kv,
                                  const gn_seqs *seqs);
/* Working memory for sequences of up to `context` tokens. */
size_t gn_attention_workspace(const gn_ctx *ctx, int64_t context);

#ifdef __cplusplus
}
#endif
#endif
