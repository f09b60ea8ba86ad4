/* model.h - a base model in memory. */
#ifndef GN_MODEL_H
#define GN_MODEL_H

#include "engine/adapter_host.h"
#include "engine/chat.h"
#include "engine/config.h"
#include "engine/guanaco.h"
#include "engine/tensor_file.h"
#include "engine/tokenizer.h"
#include "kernels/ctx.h"

typedef struct gn_layer {
    gn_tensor attn_norm, mlp_norm; /* (hidden) f32 */
    gn_matrix proj[GN_PROJ_COUNT];
} gn_layer;

struct gn_model {
    char *dir; /* the shape's name for a synthetic model */
    gn_config config;
    gn_ctx *ctx; /* where weights live; used by one thread at a time (the engine's) */
    gn_qtype quant;
    gn_matrix embed;    /* (vocab, hidden), never quantized: a row is a token */
    gn_matrix lm_head;  /* (vocab, hidden); the same arrays as embed when tied */
    gn_tensor norm;     /* (hidden) f32 */
    gn_tensor inv_freq; /* (head_dim/2) f32 */
    gn_layer *layers;
    gn_tokenizer *tokenizer; /* NULL for a synthetic model */
    gn_chat_template *chat;  /* likewise */
    gn_adapter_host *adapters;
    gn_tensor_file *file; /* keeps mapped weights alive */
    void **owned;         /* allocations that weights point into */
    size_t n_owned;
    int64_t owned_bytes;
    char *reserved; /* the part that is left of one of them, for weights to come */
    size_t reserved_bytes;
    void **staging; /* host memory on its way to the device */
    size_t n_staging;
    int64_t weight_bytes, parameters;
};

#endif
