/* memory_plan.h - who gets how much of the device's memory, decided before any of it is taken.
 *
 * Weights are there already. What activations and working memory need is known, and a part is kept
 * for what cannot be: the driver's context, kernels it loads, recorded graphs. Adapters and then
 * the KV cache get what remains. On the CPU weights, mapped files for the most part, do not count.
 */
#ifndef GN_MEMORY_PLAN_H
#define GN_MEMORY_PLAN_H

#include "engine/forward.h"

/* What a CUDA context takes: what was in use once it was open. More than a context ever takes means
 * that other programs are on the device; then an estimate has to do. */
#define GN_CONTEXT_BYTES      ((int64_t)512 << 20)
#define GN_MOST_CONTEXT_BYTES ((int64_t)1 << 30)
static inline int64_t gn_context_bytes(const gn_ctx_memory *memory) {
    return memory->opened <= GN_MOST_CONTEXT_BYTES ? memory->opened : GN_CONTEXT_BYTES;
}

/* For messages. */
static inline double gn_mib(int64_t bytes) {
    return (double)bytes / 0x1p20;
}

/* Bytes, but for the last two lines. */
typedef struct gn_memory_needs {
    bool is_host;
    gn_ctx_memory memory; /* of the device, with the weights in place */
    int64_t weights, scratch;
    int64_t row;                  /* what a sequence more adds to scratch */
    int64_t block;                /* of the KV cache */
    int64_t present;              /* what the adapters that there are take */
    int64_t budget, kv, adapters; /* as in gn_engine_options: zero means choose */
    int32_t context, max_seqs;
} gn_memory_needs;

/* GN_ENOMEM or GN_EINVAL, with the shortfall and what would fit, when the budget does not hold one
 * context. Otherwise plan->kv is whole blocks. */
GN_CHECKED gn_status gn_memory_plan_make(gn_memory_plan *plan, const gn_memory_needs *needs,
                                         gn_error *err);
/* The same for a model and the forward passes that are wanted (their kv_blocks and adapter_bytes
 * are not looked at), with memory_bytes, kv_bytes, adapter_bytes and adapters of `options`. */
GN_CHECKED gn_status gn_memory_plan_model(gn_memory_plan *plan, gn_model *model,
                                          const gn_forward_options *limits,
                                          const gn_engine_options *options, gn_error *err);

#endif
