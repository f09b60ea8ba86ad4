/* train_memory.h - how training divides the device's memory, decided before it takes any.
 *
 * Weights are there already, and what must be there is known: trained weights, layer inputs,
 * scratch memory. What a budget leaves goes where a byte saves most time: to gradients and
 * optimizer state, which otherwise travel between the host and the device (pages.h), and to
 * activations, which otherwise are computed again. More memory never means more to compute again.
 */
#ifndef GN_TRAIN_MEMORY_H
#define GN_TRAIN_MEMORY_H

#include "trainer/gradients.h"
#include "trainer/optimizer.h"
#include "trainer/step.h"

/* What is to be trained, and how. */
typedef struct gn_train_wanted {
    gn_train_limits limits; /* keep is chosen */
    const gn_parameter *items;
    size_t n_items;
    const size_t *groups; /* the first item of each layer, ascending from 0; gradients are never in
                           * pages where there are none */
    size_t n_groups;
    gn_dtype weights, grads;
    gn_optimizer_options optimizer; /* budget is chosen */
    bool paged;                     /* its state may be on the host */
    int32_t accumulation;           /* micro-batches of an update */
} gn_train_wanted;

/* Bytes, but for the last part. */
typedef struct gn_train_memory {
    int64_t budget;              /* the sum's bound */
    int64_t available;           /* what there was for all of it */
    int64_t weights, embeddings; /* frozen; 0 on a CPU, where they are mapped files for most */
    int64_t adapters;            /* trained weights */
    int64_t gradients, optimizer;
    int64_t inputs, kept; /* activations: of layers' inputs, and of others */
    int64_t scratch;      /* one layer's activations and gradients */
    int64_t workspace;    /* the ops' working memory */
    int64_t context;      /* the driver's and the backend's, as found */
    int64_t reserve;      /* kernels that are loaded later, recorded graphs */

    int32_t keep[GN_KEEP_COUNT]; /* for gn_train_limits */
    bool grads_travel;           /* for gn_parameters_open_paged; else gn_parameters_open */
    size_t grad_budget;          /* for gn_grad_options */
    size_t optimizer_budget;     /* for gn_optimizer_options */
    double recomputed;           /* the share of layers' forward passes that is computed again */
} gn_train_memory;

int64_t gn_train_memory_sum(const gn_train_memory *m);

/* budget 0: on a GPU what is free, less a margin; on a CPU three quarters of what is free.
 * GN_ENOMEM says how much is missing, and what would fit. */
GN_CHECKED gn_status gn_train_memory_plan(gn_train_memory *out, gn_model *model,
                                          const gn_train_wanted *wanted, int64_t budget,
                                          gn_error *err);

/* What was found once training ran; bytes, negative where nobody knows. */
typedef struct gn_train_measured {
    int64_t gradients, optimizer; /* the most that was on the device, in pages */
    int64_t sum;                  /* all that this process has there */
} gn_train_measured;
GN_CHECKED gn_status gn_train_memory_measure(gn_train_measured *out, const gn_train_memory *plan,
                                             gn_model *model, const gn_parameters *parameters,
                                             gn_optimizer *optimizer);

/* The plan as a table to be read, beside what was measured (or NULL); malloc'ed, NULL when memory
 * is short. */
char *gn_train_memory_text(const gn_train_memory *plan, const gn_train_measured *measured);

#endif
