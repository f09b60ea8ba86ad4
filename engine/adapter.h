/* adapter.h - LoRA weights: for each projection of each layer, y += s * B (A x). */
#ifndef GN_ADAPTER_H
#define GN_ADAPTER_H

#include "engine/adapter_host.h"
#include "engine/config.h"
#include "engine/guanaco.h"
#include "kernels/ctx.h"
#include "kernels/ops.h"

typedef enum gn_copy_state {
    GN_COPY_THERE,
    GN_COPY_ON_DISK,
    GN_COPY_WANTED,
    GN_COPY_COMING, /* being read */
    GN_COPY_LOST    /* it cannot be read: `error` */
} gn_copy_state;

/* What adapter_host.c knows of the weights in the host's memory. */
typedef struct gn_host_copy {
    gn_adapter *next;
    gn_copy_state state;
    int32_t holders;
    uint64_t held; /* when, last */
    gn_error error;
} gn_host_copy;

struct gn_adapter {
    _Atomic int refs;
    int layers;
    gn_lora_pair (*pairs)[7]; /* [layers][GN_PROJ_COUNT], on the host, pointing into memory */
    uint64_t hash[2];         /* of every pair's place, shape, scale and values */
    uint64_t ranks_hash;      /* of the ranks alone */
    int max_rank;
    char *dir;
    size_t bytes;
    void *memory;          /* `bytes`, one pair's a and b after another; NULL: on disk only */
    gn_adapter_host *host; /* which may take it; NULL: it is malloc's, and stays */
    gn_host_copy copy;
};

/* As gn_adapter_open, for the CPU, and a base known only by its config. `where` names the base in
 * messages. */
GN_CHECKED gn_status gn_adapter_load(gn_adapter **out, const gn_config *config, const char *where,
                                     const char *dir, gn_error *err);
/* An adapter of the model's from its folder once more. When the folder holds something else than it
 * did, GN_EMISMATCH names the file. */
GN_CHECKED gn_status gn_adapter_read_again(gn_adapter **out, const gn_adapter *adapter,
                                           const gn_model *model, gn_error *err);

#endif
