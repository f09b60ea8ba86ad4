/* trainable_internal.h - shared by trainable.c and trainable_full.c. */
#ifndef GN_TRAINABLE_INTERNAL_H
#define GN_TRAINABLE_INTERNAL_H

#include "engine/tensor_file.h"
#include "trainer/shuffle.h"
#include "trainer/trainable.h"

/* A weight of the model: one of these is set. */
typedef struct gn_weight_place {
    gn_matrix *matrix;
    gn_tensor *vector;
    gn_tensor *grad;
    int64_t rows, cols; /* vector: rows alone */
} gn_weight_place;

struct gn_trainable {
    gn_model *model;
    bool owns_model;
    gn_parameter *items; /* of the parameters; names are owned */
    size_t n_items;
    gn_parameters *parameters;
    gn_page_device *grad_device; /* of gradients in pages */
    gn_trained trained;
    uint64_t seed;
    /* LoRA */
    gn_adapter_config adapter;
    gn_lora_pair *pairs, *grads; /* NULL: all weights are trained */
    int *pair_of;                /* whose A and B parameters 2i and 2i + 1 are */
    size_t *groups;              /* (layers) the first item of each */
    bool has_groups;             /* each layer has some */
    gn_lora_pair *placed;        /* on a device with memory of its own */
    gn_adapter *init;            /* what to start from; NULL: random */
    /* All weights */
    gn_layer_grads *layers;
    gn_weight_place *places; /* of each parameter */
    bool random;
    float *norm; /* (2, hidden) on the host, where parameters are BF16: room for one norm */
};

/* Sets a parameter's master. */
GN_CHECKED gn_status gn_trainable_set(gn_optimizer *o, size_t parameter, const float *values,
                                      gn_error *err);
/* GN_EFORMAT: there is a value that is not finite. */
GN_CHECKED gn_status gn_trainable_check_finite(const gn_file_tensor *tensor, gn_error *err);
/* Uniform in [0, 1). */
double gn_trainable_uniform(gn_random *random);
/* Full training: points the model into the parameters; what parameter i starts from. */
GN_CHECKED gn_status gn_trainable_bind_full(gn_trainable *t, gn_error *err);
GN_CHECKED gn_status gn_trainable_fill_place(const gn_trainable *t, size_t i, float *values,
                                             gn_error *err);

#endif
