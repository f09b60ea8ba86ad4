/* ops.h - the operations every backend provides.
 *
 * The context decides where an op runs. Shapes are checked once, in ops.c, so that every
 * backend refuses exactly the same calls (GN_EINVAL); ids and gn_seqs are read on the host and
 * checked too. An op that finds too little working memory reserved says GN_ENOMEM. Tensors are
 * views: an op never allocates, frees or synchronises. A batch is flat: T rows, one a token, of
 * any mix of sequences.
 *
 * The residual stream and logits are float32; other activations (q, k, v, what attention and
 * SwiGLU give) have the dtype gn_ctx_activation(ctx): float32, but bfloat16 on a GPU that computes
 * in it. ctx's compute dtype says what products multiply. On the CPU, and in float32 anywhere, a
 * row's result depends neither on the other rows nor on the number of threads. */
#ifndef GN_OPS_H
#define GN_OPS_H

#include "blockquant.h"
#include "ctx.h"
#include "dropout.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y[t] = table[ids[t]]. y: (T, C) f32; table: (V, C), not quantized; ids: (T) in [0, V). An id of
 * -1 - i, with i in [0, n_drawn), stands for drawn[i]: a token in [0, V) that was drawn on the
 * device before the batch was staged, and that the host need not know. drawn may be NULL when
 * n_drawn is 0. */
GN_CHECKED gn_status gn_embed(gn_ctx *ctx, gn_tensor *y, const gn_matrix *table, const int32_t *ids,
                              const int32_t *drawn, int32_t n_drawn);

/* y = x / sqrt(mean(x^2) + eps) * w, row by row. x, y: (T, C) f32, may be the same; w: (C) f32. */
GN_CHECKED gn_status gn_rmsnorm(gn_ctx *ctx, gn_tensor *y, const gn_tensor *x, const gn_tensor *w,
                                float eps);

/* The two low-rank matrices of one projection (LoRA, section 4.1). */
typedef struct gn_lora_pair {
    int rank;    /* 0: this projection is not adapted */
    float scale; /* alpha/r, or alpha/sqrt(r) with rsLoRA */
    gn_tensor a; /* (rank, K) F32 or BF16 */
    gn_tensor b; /* (N, rank), the same dtype */
} gn_lora_pair;

/* An adapter on some rows of a batch: a product whose weight is projection i of the model gets
 * y[row0 .. row0+rows) += scale * pair.scale * B (A x), with pair = pairs[i]. Several may cover a
 * row (a blend); they are added in their order. */
typedef struct gn_lora {
    int32_t row0, rows;
    float scale;
    const gn_lora_pair *pairs;  /* on the host; what a and b point to is on the device */
    const gn_lora_pair *placed; /* the same where the device can read it */
} gn_lora;

typedef enum gn_epilogue {
    GN_STORE,  /* y_i = W_i x */
    GN_ADD,    /* y_i += W_i x: the residual stream */
    GN_SWIGLU, /* two parts, gate and up: y_0 = silu(W_0 x) * (W_1 x); y_1 is not used */
} gn_epilogue;

enum { GN_MAX_PARTS = 3 };

/* Moves a weight to the device, in the order its kernels like best; `memory` holds
 * gn_place_bytes and becomes what *out points into. On the CPU weights are used where they are:
 * no bytes, and *out = *host. */
size_t gn_place_bytes(const gn_ctx *ctx, const gn_matrix *host);
GN_CHECKED gn_status gn_place(gn_ctx *ctx, gn_matrix *out, const gn_matrix *host, void *memory);

/* Quantizes `src`, (rows, cols) of F32, F16 or BF16 on the host, straight to the device: `memory`
 * holds gn_quantize_place_bytes and becomes what *out points into. Codes and scales are those of
 * gn_quantize, to the bit; double_quant means nothing to INT8. src may be reused on return. A value
 * that is not finite gives GN_EINVAL and err names its row and column. */
size_t gn_quantize_place_bytes(const gn_ctx *ctx, gn_qtype type, bool double_quant, int64_t rows,
                               int64_t cols);
GN_CHECKED gn_status gn_quantize_place(gn_ctx *ctx, gn_matrix *out, gn_qtype type,
                                       bool double_quant, const void *src, gn_dtype dtype,
                                       int64_t rows, int64_t cols, void *memory, gn_error *err);

/* Up to three products of one x: q, k and v, or gate and up. */
typedef struct gn_linear_args {
    gn_tensor x;           /* (T, K): an activation, or f32 with a norm */
    int64_t x_spare;       /* columns past K of x's rows that belong to nobody: LoRA may use them */
    const gn_tensor *norm; /* (K) f32: x is RMS-normalised by it first; NULL: it is not */
    float eps;
    gn_epilogue epilogue;
    const gn_lora *lora; /* the batch's terms, as staged; or NULL */
    int n_lora;
    int pair;           /* the terms' pair for part 0; part i uses pair + i */
    gn_dropout dropout; /* in training: of what LoRA's A multiplies, pair + i being the module */
    int n_parts;
    struct gn_linear_part {
        gn_tensor y;        /* (T, N_i) an activation, or f32 with GN_ADD and for logits; with
                             * GN_SWIGLU only part 0's */
        const gn_matrix *w; /* (N_i, K), any type */
    } part[GN_MAX_PARTS];
} gn_linear_args;

/* Spare columns that suffice for one adapter. */
static inline int64_t gn_linear_spare(int64_t rank) {
    return (rank + 63) / 64 * 64;
}

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

/* Hands a batch to the device: the ops up to the next gn_stage read ids, sequences and LoRA terms
 * from this copy, and take their host arguments for the shapes only. On the CPU there is nothing
 * to do. gn_stage_reserve says how large a batch may be. seqs without a cache have max_blocks 0. */
typedef struct gn_stage_limits {
    int32_t rows, seqs, max_blocks, terms;
} gn_stage_limits;
GN_CHECKED gn_status gn_stage_reserve(gn_ctx *ctx, const gn_stage_limits *limits);
GN_CHECKED gn_status gn_stage(gn_ctx *ctx, const int32_t *ids, const gn_seqs *seqs,
                              const gn_lora *terms, int32_t n_terms);

enum { GN_MAX_HEAD_DIM = 256 };

/* One layer of the paged KV cache. k, v: (blocks, kv_heads, block_tokens, head_dim), F32, BF16 or
 * F8; head_dim is even and at most GN_MAX_HEAD_DIM. With F8 each row has a scale, by which its
 * codes are to be multiplied, and with which the largest of them is 448. A row of nothing but
 * magnitudes below 2^-100 counts as zeros. */
typedef struct gn_kv {
    gn_tensor k, v;
    gn_tensor k_scales, v_scales; /* with F8: (blocks, kv_heads, block_tokens) F32, contiguous */
} gn_kv;
#define GN_KV_LEAST 0x1p-100f

/* Cosines and sines of the batch's positions: (T, head_dim/2) f32 each, from inv_freq
 * (head_dim/2) f32, computed as transformers does (float32 angle). */
GN_CHECKED gn_status gn_rope_table(gn_ctx *ctx, gn_tensor *cos, gn_tensor *sin,
                                   const gn_tensor *inv_freq, const gn_seqs *seqs);

/* Rotates q (T, heads, head_dim) in place and k (T, kv_heads, head_dim) on its way into the
 * cache, with halves paired (x_i, x_{i+D/2}); stores v (T, kv_heads, head_dim) beside it. All
 * activations. */
GN_CHECKED gn_status gn_rope_store(gn_ctx *ctx, gn_tensor *q, const gn_tensor *k,
                                   const gn_tensor *v, const gn_tensor *cos, const gn_tensor *sin,
                                   const gn_seqs *seqs, gn_kv *kv);

/* Causal attention of each row over its sequence's cache, up to and including its own
 * position. q, y: (T, heads, head_dim) activations; heads is a multiple of kv_heads (GQA). Scores
 * are scaled by 1/sqrt(head_dim). */
GN_CHECKED gn_status gn_attention(gn_ctx *ctx, gn_tensor *y, const gn_tensor *q, const gn_kv *kv,
                                  const gn_seqs *seqs);
/* Working memory for sequences of up to `context` tokens. */
size_t gn_attention_workspace(const gn_ctx *ctx, int64_t context);

#ifdef __cplusplus
}
#endif
#endif
