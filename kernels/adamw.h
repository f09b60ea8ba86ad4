/* adamw.h - the optimizer's update: AdamW with moments in 32 or in 8 bits.
 *
 * The 8-bit form is bitsandbytes' (Dettmers et al., 8-bit Optimizers via Block-wise
 * Quantization): blocks of 256 values, each value a code of a dynamic map times the block's
 * largest magnitude; the signed map for the first moment, the unsigned one for the second. A block
 * is read, updated in float32 and quantized again. Weight decay is decoupled from the gradient. */
#ifndef GN_ADAMW_H
#define GN_ADAMW_H

#include "ctx.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { GN_MOMENT_BLOCK = 256, GN_ZERO_CODE = 127 /* of zero in the signed map */ };

/* A running mean of gradients or of their squares; zero before the first update. In 8 bits that is
 * an absmax of zero, whatever the codes. */
typedef struct gn_moment {
    gn_tensor values; /* (n) F32, or U8 codes */
    float *absmax;    /* with U8: (ceil(n / GN_MOMENT_BLOCK)) */
} gn_moment;

typedef struct gn_adamw_args {
    float lr, beta1, beta2, eps, weight_decay;
    float grad_scale; /* multiplies the gradient first: clipping */
    int64_t step;     /* the number of this update, from 1 */
    gn_tensor master; /* (n) F32: the parameters */
    gn_tensor
        weight;     /* (n) F32 or BF16: gets the updated parameters, too; data NULL: nothing does */
    gn_tensor grad; /* (n) F32 or BF16 */
    gn_moment m, v; /* both in 32 bits, or both in 8 */
} gn_adamw_args;

/* g = grad_scale * grad; m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
 * p -= lr m' / (sqrt(v') + eps) with m' = m / (1 - beta1^step), v' = v / (1 - beta2^step);
 * p -= lr weight_decay p. Elements are independent (blocks are, in 8 bits), so long parameters
 * may be updated piece by piece. A gradient that is not finite spoils what it meets: look at the
 * norm first. */
GN_CHECKED gn_status gn_adamw(gn_ctx *ctx, const gn_adamw_args *args);

/* *sum += the sum of the squares of x, (n) F32 or BF16; sum is on the device. Added in an order
 * that only n decides. Needs GN_SUM_WORKSPACE bytes of working memory (gn_ctx_reserve). */
enum { GN_SUM_WORKSPACE = 4096 };
GN_CHECKED gn_status gn_sum_squares(gn_ctx *ctx, double *sum, const gn_tensor *x);

/* What torch.nn.utils.clip_grad_norm_ multiplies gradients of this norm by; max_norm 0: 1. */
float gn_clip_scale(double norm, double max_norm);

/* ---- for kernels/ only ---- */

/* What an update does with a step's numbers, the same on every backend. */
typedef struct gn_adamw_factors {
    float step_size; /* of m / (sqrt(v) + eps) */
    float eps;       /* for a v without bias correction */
    float keep;      /* of a parameter, after its decay */
} gn_adamw_factors;
gn_adamw_factors gn_adamw_factors_of(const gn_adamw_args *args);

#ifdef __cplusplus
}
#endif
#endif
