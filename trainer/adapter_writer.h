/* adapter_writer.h - trained LoRA weights as a PEFT folder. */
#ifndef GN_ADAPTER_WRITER_H
#define GN_ADAPTER_WRITER_H

#include "trainer/optimizer.h"

typedef struct gn_adapter_config {
    const char *base; /* base_model_name_or_path */
    int rank;
    double alpha, dropout;
    bool rslora;
    gn_dtype dtype; /* of the weights: F32 or BF16 */
} gn_adapter_config;

/* Writes adapter_config.json and adapter_model.safetensors into a folder that exists, from the
 * masters of parameters called "model.layers.N.MODULE.lora_A.weight" and "... lora_B.weight"; the
 * target modules are those that have them. Files are synced. */
GN_CHECKED gn_status gn_adapter_write(const char *dir, const gn_adapter_config *config,
                                      gn_optimizer *o, gn_error *err);

/* The same as a folder of its own, atomically. A folder that stands there must be an adapter's:
 * it is replaced. */
GN_CHECKED gn_status gn_adapter_save(const char *dir, const gn_adapter_config *config,
                                     gn_optimizer *o, gn_error *err);

#endif
