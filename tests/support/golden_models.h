/* golden_models.h - shapes of the models in tests/golden/data. */
#ifndef GN_TEST_GOLDEN_MODELS_H
#define GN_TEST_GOLDEN_MODELS_H

#include "engine/config.h"

/* tiny-bf16, tiny-bnb-nf4. */
static const gn_config golden_tiny = {.layers = 3,
                                      .hidden = 128,
                                      .intermediate = 352,
                                      .heads = 4,
                                      .kv_heads = 4,
                                      .head_dim = 32,
                                      .vocab = 512};

#endif
