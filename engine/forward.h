/* forward.h - one pass of the model over a flat batch.
 *
 * A gn_forward owns the activations and the paged KV cache for batches up to a given size, all
 * allocated at open; running allocates nothing. Which blocks belong to which sequence is the
 * caller's business (kv_pool.h), so the same pass serves the scheduler and the evaluation tools. */
#ifndef GN_FORWARD_H
#define GN_FORWARD_H

#include "engine/model.h"
#include "kernels/ops.h"

enum { GN_KV_BLOCK_TOKENS = 16 };

typedef struct gn_forward gn_forward;

typedef struct gn_forward_options {
    int32_t max_rows;   /* tokens of one batch */
    int32_t max_seqs;   /* sequences of one batch */
    int32_t max_logits; /* rows whose logits are asked for at once */
    int32_t kv_blocks;  /* of GN_KV_BLOCK_TOKENS tokens each */
    int32_t context;    /* tokens of the longest sequence */
    gn_kv_dtype kv_dtype;
    /* Device memory for adapters, taken at once; 0: as they need; less: none, they cannot be used.
     */
    int64_t adapter_bytes;
} gn_forward_options;

GN_CHECKED gn_status gn_forward_open(gn_forward **out, gn_model *model,
                                     const gn_forward_options *options, gn_error *err);
void gn_forward_close(gn_forward *f);

/* Bytes of KV cache a block takes, over all layers. */
size_t gn_forward_kv_block_bytes(const gn_model *model, gn_kv_dtype dtype);

/* Bytes of device memory for activations and the ops' working memory; what else a gn_forward takes
 * beside its cache and adapters is some MiB. */
size_t gn_forward_scratch_bytes(const gn_model *model, const gn_forward_options *options);

/* Adapters for batches: acquired, all n or none, and used when they are ready, until released. See
 * adapter_memory.h. */
GN_CHECKED gn_status gn_forward_acquire(gn_forward *f, const gn_adapter_use *uses, int32_t n,
                                        gn_error *err);
void gn_forward_release(gn_forward *f, const gn_adapter_use *uses, int32_t n);
bool gn_forward_holds(const gn_forward *f, const gn_adapter_use *uses, int32_t n);
GN_CHECKED gn_status gn_forward_poll(gn_forward *f, const gn_adapter_use *uses, int32_t n,
                                     bool *ready, gn_error *err);

typedef struct gn_batch {
    int32_t rows;
    /* (rows). -1 - i stands for drawn[i], which is on the device (see gn_embed); drawn is the same
     * for all batches of one gn_forward. */
    const int32_t *ids;
    const int32_t *drawn; /* (n_drawn), or NULL */
    int32_t n_drawn;
    gn_seqs seqs; /* seqs.row0[seqs.n] == rows */
    /* Adapters of sequence i, ready: uses[use0[i]] up to uses[use0[i+1]]. Neighbours with the same
     * adapters and scales share one LoRA term. */
    const gn_adapter_use *uses;
    const int32_t *use0; /* (seqs.n + 1), or NULL: no adapters at all */
} gn_batch;

/* Extends the KV cache by the batch and leaves each row's last hidden state for its logits. On a
 * device of its own this starts the work and does not wait for it; the batch may be reused. */
GN_CHECKED gn_status gn_forward_run(gn_forward *f, const gn_batch *batch);

/* *logits: (n, vocab) float32 on the device, for the given rows of the last batch; valid until the
 * next call. n is at most max_logits. */
GN_CHECKED gn_status gn_forward_device_logits(gn_forward *f, const int32_t *rows, int32_t n,
                                              gn_tensor *logits);
/* The same on the host, which waits for them. */
GN_CHECKED gn_status gn_forward_logits(gn_forward *f, const int32_t *rows, int32_t n,
                                       const float **logits);

#endif
