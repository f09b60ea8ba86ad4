/* parameters.h - what is trained: named tensors, cut out of flat arrays.
 *
 * All trained weights stand one after the other in one array on the device, and their gradients
 * in a second, or in pages: so clearing, the global norm, the exchange between processes and the
 * update are each one pass over an array, whatever the number of tensors. A tensor starts at a
 * multiple of GN_PARAMETER_ALIGN elements, so that 8-bit moments' blocks are its own; what lies
 * between is zero and stays zero. */
#ifndef GN_PARAMETERS_H
#define GN_PARAMETERS_H

#include "kernels/adamw.h"
#include "trainer/pages.h"

enum { GN_PARAMETER_ALIGN = GN_MOMENT_BLOCK };

typedef struct gn_parameter {
    const char *name; /* "model.layers.0.self_attn.q_proj.lora_A.weight" */
    int ndim;
    int64_t shape[GN_MAX_DIMS];
    int64_t first, numel; /* elements of the flat arrays; set by gn_parameters_open */
} gn_parameter;

typedef struct gn_grad_pages gn_grad_pages; /* gradients.h */

typedef struct gn_parameters {
    gn_ctx *ctx;
    gn_parameter *items; /* in the order they were given; names are owned */
    size_t n;
    gn_tensor weights; /* (total) F32, or BF16: then the optimizer keeps F32 masters */
    gn_tensor grads;   /* (total) F32 or BF16: backward passes add to them; data NULL: in pages */
    gn_grad_pages *grad_pages; /* NULL: the gradients stand in `grads` */
} gn_parameters;

/* n elements of a flat array, from `first` on. */
static inline gn_tensor gn_tensor_piece(const gn_tensor *array, int64_t first, int64_t n) {
    return gn_tensor_1d((char *)array->data + (size_t)first * gn_dtype_size(array->dtype),
                        array->dtype, n);
}

/* Allocates both arrays, zeroed, for n tensors of the given names and shapes. */
GN_CHECKED gn_status gn_parameters_open(gn_parameters **out, gn_ctx *ctx, const gn_parameter *items,
                                        size_t n, gn_dtype weights, gn_dtype grads, gn_error *err);
void gn_parameters_close(gn_parameters *p);
/* Elements of each array, padding included; -1 for a shape that makes no sense. */
int64_t gn_parameters_total(const gn_parameter *items, size_t n);

/* Gradients in pages, a page for each group of parameters: gradients.h. */
typedef struct gn_grad_options {
    const size_t *groups; /* (n_groups) the first parameter of each, ascending from 0 */
    size_t n_groups;
    size_t budget;                /* bytes on the device between uses */
    const gn_page_device *device; /* borrowed; NULL: pages are used where they are */
} gn_grad_options;
GN_CHECKED gn_status gn_parameters_open_paged(gn_parameters **out, gn_ctx *ctx,
                                              const gn_parameter *items, size_t n, gn_dtype weights,
                                              gn_dtype grads, const gn_grad_options *options,
                                              gn_error *err);

/* One tensor in its own shape; a gradient in a page: while its group is acquired. */
gn_tensor gn_parameter_weight(const gn_parameters *p, size_t i);
gn_tensor gn_parameter_grad(const gn_parameters *p, size_t i);

#endif
