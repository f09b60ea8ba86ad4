/* step.h - one training step: loss and gradients of a batch of tokens.
 *
 * A gn_train_step owns the activations for batches up to a given size, all allocated at open;
 * running allocates nothing. Which weights are trained is the caller's business: it gives views of
 * them and of their gradients, which the step adds to, so that micro-batches sum until the caller
 * clears them.
 *
 * What a layer's backward pass reads is either kept from the forward pass or computed again. Now
 * only each layer's input is kept. */
#ifndef GN_TRAIN_STEP_H
#define GN_TRAIN_STEP_H

#include "engine/model.h"
#include "kernels/ops_train.h"

/* Gradients of a layer's own weights, float32; data NULL: frozen. */
typedef struct gn_layer_grads {
    gn_tensor attn_norm, mlp_norm; /* (hidden) */
    gn_tensor proj[GN_PROJ_COUNT];
} gn_layer_grads;

/* What is trained. */
typedef struct gn_trained {
    /* LoRA, projection p of layer i at i * GN_PROJ_COUNT + p, rank 0 where it has none; NULL: no
     * LoRA. placed: the same where the device can read it. grads: a and b are their gradients,
     * float32. */
    const gn_lora_pair *pairs, *placed, *grads;
    float dropout; /* of what A multiplies */
    uint64_t seed; /* of dropout */
    /* The model's own weights, which are then not quantized; layers NULL: all frozen. embed and
     * lm_head may be the same when tied. */
    gn_tensor embed, lm_head, norm;
    const gn_layer_grads *layers;
} gn_trained;

typedef struct gn_train_batch {
    int32_t rows;
    const int32_t *ids;    /* (rows) */
    const int32_t *labels; /* (rows): the token itself where it is to be learned, from those before
                            * it in its sequence; else GN_IGNORED_LABEL */
    gn_seqs seqs;          /* a sample each; blocks is not used */
    float scale;           /* of the gradients: 1 / all labels that are averaged over */
    uint32_t number;       /* of its own for every batch of a run: dropout's step */
} gn_train_batch;

/* Labels that are learned: all but those of a sequence's first token. */
int64_t gn_train_count(const gn_train_batch *batch);

typedef struct gn_train_limits {
    int32_t max_rows, max_seqs; /* of one batch */
    int32_t context;            /* tokens of the longest sequence */
    int max_rank;
} gn_train_limits;

typedef struct gn_train_step gn_train_step;

GN_CHECKED gn_status gn_train_step_open(gn_train_step **out, gn_model *model,
                                        const gn_train_limits *limits, gn_error *err);
void gn_train_step_close(gn_train_step *s);

/* *loss: the sum over the learned labels, in nats; gradients are those of *loss * batch->scale. */
GN_CHECKED gn_status gn_train_step_run(gn_train_step *s, const gn_train_batch *batch,
                                       const gn_trained *trained, double *loss);
/* The loss alone, without dropout: for evaluation. */
GN_CHECKED gn_status gn_train_step_loss(gn_train_step *s, const gn_train_batch *batch,
                                        const gn_trained *trained, double *loss);

#endif
