/* trainable.h - a model with what of it is trained: LoRA pairs beside frozen weights, or all
 * weights.
 *
 * Either way the trained values stand in flat arrays (parameters.h), of which the model and the
 * training step get views. gn_trainable_allocate makes them, as zeros; gn_trainable_start gives
 * them their values once there is an optimizer, which holds their masters, unless a checkpoint
 * does. */
#ifndef GN_TRAINABLE_H
#define GN_TRAINABLE_H

#include "trainer/adapter_writer.h"
#include "trainer/step.h"
#include "trainer/train_memory.h"
#include "trainer/trainer.h"

typedef struct gn_trainable gn_trainable;

typedef struct gn_lora_options {
    int rank;
    double alpha, dropout;
    bool rslora;
    const char *modules;      /* "all", or module names with commas between */
    const char *init_adapter; /* folder or NULL; decides rank, scale and modules */
    uint64_t seed;            /* of A, and of dropout */
} gn_lora_options;

/* Opens the model, whose weights are quantized (choice->quant, or as the folder holds them) or 16-
 * or 32-bit. A weight that is not finite is GN_EFORMAT, naming it. */
GN_CHECKED gn_status gn_trainable_open_lora(gn_trainable **out, const gn_model_choice *choice,
                                            const gn_lora_options *options, gn_error *err);
/* The same over a model that is open already, and stays the caller's. */
GN_CHECKED gn_status gn_trainable_open_over(gn_trainable **out, gn_model *model,
                                            const gn_lora_options *options, gn_error *err);
/* All weights of a 16- or 32-bit folder; with `random` only its shape, and weights drawn by the
 * seed as LLaMA's are. */
GN_CHECKED gn_status gn_trainable_open_full(gn_trainable **out, const gn_model_choice *choice,
                                            bool random, uint64_t seed, gn_error *err);
void gn_trainable_close(gn_trainable *t);

gn_model *gn_trainable_model(const gn_trainable *t);
/* The parameters to be, layer by layer. */
const gn_parameter *gn_trainable_items(const gn_trainable *t, size_t *n);
/* The first of each layer; n is 0 where gradients cannot be in pages: all weights are trained, or
 * a layer has nothing. */
const size_t *gn_trainable_groups(const gn_trainable *t, size_t *n);
/* As the plan says: gradients in one array, or in pages by the groups above. */
GN_CHECKED gn_status gn_trainable_allocate(gn_trainable *t, const gn_train_memory *plan,
                                           gn_error *err);
/* The optimizer's pages may use the step's memory while it does not (step.h). */
void gn_trainable_lodge(gn_trainable *t, gn_pages *pages);

/* Once allocated. */
gn_parameters *gn_trainable_parameters(const gn_trainable *t);
const gn_trained *gn_trainable_views(const gn_trainable *t);
/* What an adapter's config says; NULL when all weights are trained. */
const gn_adapter_config *gn_trainable_adapter(const gn_trainable *t);
int gn_trainable_max_rank(const gn_trainable *t); /* 0: no LoRA */

/* Sets the parameters, by the optimizer's masters, to what a run starts from. */
GN_CHECKED gn_status gn_trainable_start(gn_trainable *t, gn_optimizer *o, gn_error *err);
/* To be called after the parameters have changed. */
GN_CHECKED gn_status gn_trainable_refresh(gn_trainable *t);

#endif
