/* step.h - one training step: loss and gradients of a batch of tokens.
 *
 * A gn_train_step owns the activations for batches up to a given size, all allocated at open;
 * running allocates nothing. Which weights are trained is the caller's business: it gives views of
 * them and of their gradients, which the step adds to, so that micro-batches sum until the caller
 * clears them.
 *
 * What a layer's backward pass reads is either kept from the forward pass or computed again from
 * the layer's input; results are the same bits whatever is kept. Layer inputs are kept in the
 * compute dtype, and so the residual stream is rounded to it between layers. */
#ifndef GN_TRAIN_STEP_H
#define GN_TRAIN_STEP_H

#include "engine/model.h"
#include "kernels/ops_train.h"
#include "trainer/pages.h"

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
    /* Where gradients travel (gradients.h): begin_layer is called before a layer's backward pass,
     * and then grads and layers say where that layer's are until end_layer. NULL: they stay. */
    gn_status (*begin_layer)(void *user, int layer);
    gn_status (*end_layer)(void *user, int layer);
    void *user;
    /* Pages, the optimizer's, that are lent the memory of layers' inputs from the backward pass of
     * an update's last batch to the next forward pass: so they travel beside the one and come back
     * beside the other. Closed after the step; NULL: nobody. */
    gn_pages *lodger;
} gn_trained;

typedef struct gn_train_batch {
    int32_t rows;
    const int32_t *ids;    /* (rows) */
    const int32_t *labels; /* (rows): the token itself where it is to be learned, from those before
                            * it in its sequence; else GN_IGNORED_LABEL */
    gn_seqs seqs;          /* a sample each; blocks is not used */
    float scale;           /* of the gradients: 1 / all labels that are averaged over */
    uint32_t number;       /* of its own for every batch of a run: dropout's step */
    bool is_last;          /* of an update */
} gn_train_batch;

/* Labels that are learned: all but those of a sequence's first token. */
int64_t gn_train_count(const gn_train_batch *batch);

/* What a layer may keep. */
typedef enum gn_keep {
    GN_KEEP_QKV,       /* q, k and v, rotated */
    GN_KEEP_ATTENTION, /* attention's output and the log-sums of its scores */
    GN_KEEP_RESIDUAL,  /* the residual stream after attention, float32 */
    GN_KEEP_GATE_UP,
    GN_KEEP_SWIGLU, /* silu(gate) * up */
    GN_KEEP_COUNT
} gn_keep;

typedef struct gn_train_limits {
    int32_t max_rows, max_seqs; /* of one batch */
    int32_t context;            /* tokens of the longest sequence */
    int max_rank;
    /* How many layers keep each, from the first on; less than all. The last layer's are still there
     * when its backward pass begins, but for the residual stream. */
    int32_t keep[GN_KEEP_COUNT];
} gn_train_limits;

/* Bytes of the device's memory that a step takes. */
typedef struct gn_train_step_bytes {
    int64_t inputs;    /* of layers */
    int64_t kept;      /* as limits->keep says */
    int64_t scratch;   /* what is not kept, gradients on their way */
    int64_t workspace; /* of the ops */
} gn_train_step_bytes;
gn_train_step_bytes gn_train_step_measure(const gn_model *model, const gn_train_limits *limits);
/* Bytes that one layer takes to keep it. */
int64_t gn_train_keep_bytes(const gn_model *model, const gn_train_limits *limits, gn_keep what);

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
/* The same; and of each sequence, in place of its first learned label, the losses of n tokens: nll
 * (sequences, n). */
GN_CHECKED gn_status gn_train_step_choose(gn_train_step *s, const gn_train_batch *batch,
                                          const gn_trained *trained, const int32_t *choices, int n,
                                          double *loss, float *nll);

#endif
