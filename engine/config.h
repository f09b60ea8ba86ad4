/* config.h - config.json of a LLaMA-family Hugging Face folder. */
#ifndef GN_CONFIG_H
#define GN_CONFIG_H

#include "kernels/base.h"

typedef enum gn_rope_type { GN_ROPE_DEFAULT, GN_ROPE_LINEAR, GN_ROPE_LLAMA3 } gn_rope_type;

enum { GN_MAX_EOS = 8 };

typedef struct gn_config {
    char model_type[32];
    int layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, max_positions;
    float rms_eps;
    double rope_theta;
    gn_rope_type rope_type;
    double rope_factor, rope_low_freq_factor, rope_high_freq_factor, rope_original_positions;
    bool tied_embeddings;
    int32_t bos, eos[GN_MAX_EOS]; /* bos -1: none */
    int n_eos;
    bool bnb_4bit; /* quantization_config: bitsandbytes, 4 bits */
} gn_config;

/* Reads DIR/config.json. What this engine cannot compute (another architecture, biases, a
 * sliding window, other activations or rope types) is GN_EUNSUPPORTED, naming key and value;
 * sizes are bounded (each in [1, 2^20], products fit) so that later arithmetic cannot overflow. */
GN_CHECKED gn_status gn_config_read(gn_config *config, const char *dir, gn_error *err);

/* inv_freq: (head_dim / 2) floats, scaled as rope_type says (transformers' modeling_rope_utils). */
void gn_config_inv_freq(const gn_config *config, float *inv_freq);

/* The shape of a projection as stored: y = W x with W (rows, cols). */
typedef enum gn_proj { GN_Q, GN_K, GN_V, GN_O, GN_GATE, GN_UP, GN_DOWN, GN_PROJ_COUNT } gn_proj;
extern const char *const gn_proj_names[GN_PROJ_COUNT]; /* "self_attn.q_proj" ... "mlp.down_proj" */
int64_t gn_proj_rows(const gn_config *config, gn_proj proj);
int64_t gn_proj_cols(const gn_config *config, gn_proj proj);

#endif
