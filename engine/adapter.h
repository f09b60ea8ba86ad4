/* adapter.h - LoRA weights in memory: for each projection of each layer, y += s * B (A x). */
#ifndef GN_ADAPTER_H
#define GN_ADAPTER_H

#include "engine/config.h"
#include "engine/guanaco.h"
#include "kernels/ctx.h"
#include "kernels/ops.h"

struct gn_adapter {
    _Atomic int refs;
    int layers;
    gn_lora_pair (*pairs)[7]; /* [layers][GN_PROJ_COUNT], on the host */
    uint64_t hash[2];         /* of every pair's place, shape, scale and values */
    uint64_t ranks_hash;      /* of the ranks alone */
    int max_rank;
    size_t bytes;
    gn_ctx *ctx;  /* whose host memory that is; NULL: malloc's */
    void *memory; /* what the tensors point into: `bytes`, one pair's a and b after another */
};

/* As gn_adapter_open, for the CPU, and a base known only by its config. `where` names the base in
 * messages. */
GN_CHECKED gn_status gn_adapter_load(gn_adapter **out, const gn_config *config, const char *where,
                                     const char *dir, gn_error *err);

#endif
