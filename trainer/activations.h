/* activations.h - the memory of a training step: what each tensor is, where it lies, how large it
 * is. The step computes in it, and the planner (train_memory.h) predicts it from the same table.
 *
 * A layer's tensors are either kept from the forward pass or computed again, in scratch memory that
 * all layers share. Each layer's input is always kept, in the compute dtype; the residual stream
 * itself is float32. Rows of what LoRA may make wider (gn_linear_args) stand apart. Tensors that
 * are never alive together share memory: the input of a layer and what attention makes of it, the
 * stream; SwiGLU's output and its gradient; the MLP's tensors and the gradients of attention's. */
#ifndef GN_ACTIVATIONS_H
#define GN_ACTIVATIONS_H

#include "trainer/step.h"

/* Of a layer, what its backward pass reads. */
typedef enum gn_activation {
    GN_ACT_X, /* the layer's input */
    GN_ACT_Q, /* rotated, as is K */
    GN_ACT_K,
    GN_ACT_V,
    GN_ACT_A, /* attention's output, and its LSE */
    GN_ACT_LSE,
    GN_ACT_M, /* f32: the residual stream after attention; has no scratch, it is the stream */
    GN_ACT_GATE,
    GN_ACT_UP,
    GN_ACT_H, /* SwiGLU's output, then its gradient */
    GN_ACT_COUNT
} gn_activation;

typedef struct gn_activations {
    gn_ctx *ctx;
    gn_tensor at[GN_ACT_COUNT];   /* (max_rows, ...), in scratch memory */
    char *kept[GN_ACT_COUNT];     /* of the first layers, one after the other */
    int32_t n_kept[GN_ACT_COUNT]; /* such layers */
    gn_tensor stream, dstream;    /* (max_rows, hidden) f32 */
    gn_tensor dnorm;          /* (max_rows, hidden): gradient of a norm's output, then dstream */
    gn_tensor da, dq, dk, dv; /* like A, Q, K, V */
    gn_tensor loss, cos, sin; /* (max_rows, ...) f32 */
    void *kept_memory, *scratch_memory;
} gn_activations;

GN_CHECKED gn_status gn_activations_open(gn_activations *a, const gn_model *model,
                                         const gn_train_limits *limits);
void gn_activations_close(gn_activations *a);

/* A tensor of a layer, all max_rows of it: kept or in scratch memory. */
gn_tensor gn_activations_at(const gn_activations *a, int layer, gn_activation which);
/* Bytes from one layer's to the next one's, where it is kept. */
size_t gn_activations_stride(const gn_activations *a, gn_activation which);
bool gn_activations_keeps(const gn_activations *a, int layer, gn_activation which);

#endif
