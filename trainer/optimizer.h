/* optimizer.h - AdamW over flat parameters, its state in pages.
 *
 * A page holds the state of a stretch of the parameters: their masters (where the trained weights
 * are BF16) and both moments. An update goes through the pages in order and fetches the next ones
 * meanwhile; the budget decides how many may stay on the device in between. */
#ifndef GN_OPTIMIZER_H
#define GN_OPTIMIZER_H

#include "trainer/pages.h"
#include "trainer/parameters.h"

typedef struct gn_optimizer gn_optimizer;

typedef struct gn_optimizer_options {
    bool eight_bit; /* moments in 8 bits */
    float beta1, beta2, eps, weight_decay;
    size_t budget;     /* bytes of state on the device between uses; SIZE_MAX: no limit */
    size_t page_bytes; /* about; 0: 16 MiB */
} gn_optimizer_options;

/* Moments start at zero; masters at the weights, if those were set. `device` NULL: state is used
 * where it is. Parameters and device are borrowed. */
GN_CHECKED gn_status gn_optimizer_open(gn_optimizer **out, gn_parameters *parameters,
                                       const gn_optimizer_options *options,
                                       const gn_page_device *device, gn_error *err);
void gn_optimizer_close(gn_optimizer *o);

/* The pages of an optimizer over `total` elements (gn_parameters_total) of a dtype. */
typedef struct gn_optimizer_size {
    int64_t pages;
    size_t page_bytes;
} gn_optimizer_size;
gn_optimizer_size gn_optimizer_measure(const gn_optimizer_options *options, int64_t total,
                                       gn_dtype weights);

/* The norm of all gradients; waits for them. */
GN_CHECKED gn_status gn_optimizer_grad_norm(gn_optimizer *o, double *norm);
/* Starts to fetch the first pages: to be called while the backward pass runs. */
GN_CHECKED gn_status gn_optimizer_prefetch(gn_optimizer *o);
/* One update from the gradients, times grad_scale (gn_clip_scale). After a failure parameters
 * are updated in part: go back to a checkpoint. */
GN_CHECKED gn_status gn_optimizer_step(gn_optimizer *o, double lr, float grad_scale);

/* Updates so far; set when training resumes. */
int64_t gn_optimizer_steps(const gn_optimizer *o);
void gn_optimizer_set_steps(gn_optimizer *o, int64_t steps);

const gn_parameters *gn_optimizer_parameters(const gn_optimizer *o);

/* Residency: a spike in activations lowers the budget. */
gn_pages *gn_optimizer_pages(gn_optimizer *o);

/* ---- state, parameter by parameter ---- */

#define GN_STATE_MAP(X)                                                                            \
    X(MASTER, "master") /* F32: the parameter itself */                                            \
    X(M, "m")                                                                                      \
    X(V, "v") /* F32, or U8 codes */                                                               \
    X(M_ABSMAX, "m_absmax")                                                                        \
    X(V_ABSMAX, "v_absmax") /* F32, one a block of 256; only with 8-bit moments */

typedef enum gn_state {
#define X(name, text) GN_STATE_##name,
    GN_STATE_MAP(X)
#undef X
        GN_STATE_COUNT
} gn_state;

const char *gn_state_name(gn_state state);
gn_dtype gn_optimizer_state_dtype(const gn_optimizer *o, gn_state state);
/* Elements that a parameter has of it; 0: none. */
int64_t gn_optimizer_state_count(const gn_optimizer *o, gn_state state, size_t parameter);
/* get follows gn_pages_flush; set comes before the first prefetch or update. Setting masters sets
 * the weights, too. */
GN_CHECKED gn_status gn_optimizer_get(gn_optimizer *o, gn_state state, size_t parameter, void *dst);
GN_CHECKED gn_status gn_optimizer_set(gn_optimizer *o, gn_state state, size_t parameter,
                                      const void *src);

#endif
