/* decoder.h - all layers of a LLaMA model at once, for steps of decoding.
 *
 * What gn_linear, gn_rope_store and gn_attention do one after another for a few rows, without the
 * pauses between them. A device that has no such thing says GN_EUNSUPPORTED, and the ops remain. */
#ifndef GN_DECODER_H
#define GN_DECODER_H

#include "ops.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct gn_decoder gn_decoder;

enum { GN_DECODER_MAX_ROWS = 8 };

/* One layer, on the device: the arguments of its ops. */
typedef struct gn_decoder_layer {
    const gn_tensor *attn_norm, *mlp_norm; /* (hidden) f32 */
    const gn_matrix *q, *k, *v, *o, *gate, *up, *down;
    const gn_kv *kv;
} gn_decoder_layer;

typedef struct gn_decoder_options {
    const gn_decoder_layer *layers; /* read by gn_decoder_open only; what they point to stays */
    int n_layers, heads, kv_heads, head_dim;
    float eps;
} gn_decoder_options;

/* GN_EUNSUPPORTED: this device, or not with these types and shapes. Close it before its context. */
GN_CHECKED gn_status gn_decoder_open(gn_decoder **out, gn_ctx *ctx,
                                     const gn_decoder_options *options);
void gn_decoder_close(gn_decoder *d);

/* The staged batch, one row of each sequence and at most GN_DECODER_MAX_ROWS, through all layers:
 * x (T, hidden) f32 holds the embeddings and becomes the last hidden states, the cache grows by T
 * positions. cos, sin: of gn_rope_table. lora: the batch's terms, as staged; GN_EUNSUPPORTED where
 * they are not bfloat16. Working memory: that of gn_linear. May be recorded (gn_ctx_replay). */
GN_CHECKED gn_status gn_decoder_run(gn_decoder *d, gn_tensor *x, const gn_tensor *cos,
                                    const gn_tensor *sin, const gn_seqs *seqs, const gn_lora *lora,
                                    int n_lora);

/* ---- for kernels/ only: the device's part (cuda/decoder.cu, no_cuda.c) ---- */

gn_status gn_cuda_decoder_open(gn_decoder **out, gn_ctx *ctx, const gn_decoder_options *options);
void gn_cuda_decoder_close(gn_decoder *d);
gn_status gn_cuda_decoder_run(gn_decoder *d, gn_tensor *x, const gn_tensor *cos,
                              const gn_tensor *sin, const gn_seqs *seqs, const gn_lora *lora,
                              int n_lora);

#ifdef __cplusplus
}
#endif
#endif
