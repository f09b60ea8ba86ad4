/* peft.h - adapter_config.json of a PEFT LoRA folder. */
#ifndef GN_PEFT_H
#define GN_PEFT_H

#include "kernels/base.h"

typedef struct gn_peft gn_peft;

/* Reads DIR/adapter_config.json. Whatever would make PEFT compute something else than
 * W x + scale * B (A x) with the base's own W is GN_EUNSUPPORTED, naming option and value: DoRA,
 * biases, modules_to_save, an initialization that changed the base, and options unknown here
 * unless they are null, false, zero or empty. */
GN_CHECKED gn_status gn_peft_open(gn_peft **out, const char *dir, gn_error *err);
void gn_peft_close(gn_peft *peft);
const char *gn_peft_path(const gn_peft *peft);

/* For a module by its name in the base, such as "model.layers.0.self_attn.q_proj": its rank (of
 * rank_pattern, else r), and alpha/rank, or alpha/sqrt(rank) with rsLoRA. */
int gn_peft_rank(const gn_peft *peft, const char *module);
double gn_peft_alpha(const gn_peft *peft, const char *module);
bool gn_peft_is_rslora(const gn_peft *peft);
float gn_peft_scale(const gn_peft *peft, const char *module);
/* False when target_modules is a list of names and none of them means this module. */
bool gn_peft_targets(const gn_peft *peft, const char *module);

#endif
