/* parameters.h - what is trained: named tensors, cut out of flat arrays.
 *
 * All trained weights stand one after the other in one array on the device, and their gradients
 * in a second: so clearing, the global norm, the exchange between processes and the update are
 * each one pass over an array, whatever the number of tensors. A tensor starts at a multiple of
 * GN_PARAMETER_ALIGN elements, so that 8-bit moments' blocks are its own; what lies between is zero
 * and stays zero. */
#ifndef GN_PARAMETERS_H
#define GN_PARAMETERS_H

#include "kernels/adamw.h"

enum { GN_PARAMETER_ALIGN = GN_MOMENT_BLOCK };

typedef struct gn_parameter {
    const char *name; /* "model.layers.0.self_attn.q_proj.lora_A.weight" */
    int ndim;
    int64_t shape[GN_MAX_DIMS];
    int64_t first, numel; /* elements of the flat arrays; set by gn_parameters_open */
} gn_parameter;

typedef struct gn_parameters {
    gn_ctx *ctx;
    gn_parameter *items; /* in the order they were given; names are owned */
    size_t n;
    gn_tensor weights; /* (total) F32, or BF16: then the optimizer keeps F32 masters */
    gn_tensor grads;   /* (total) F32 or BF16: backward passes add to them */
} gn_parameters;

/* Allocates both arrays, zeroed, for n tensors of the given names and shapes. */
GN_CHECKED gn_status gn_parameters_open(gn_parameters **out, gn_ctx *ctx, const gn_parameter *items,
                                        size_t n, gn_dtype weights, gn_dtype grads, gn_error *err);
void gn_parameters_close(gn_parameters *p);

/* One tensor in its own shape. */
gn_tensor gn_parameter_weight(const gn_parameters *p, size_t i);
gn_tensor gn_parameter_grad(const gn_parameters *p, size_t i);

#endif
