/* adapter_memory.h - adapters where the device can read them.
 *
 * On a device with memory of its own an adapter is copied there when a sequence is about to use
 * it, beside what the device computes meanwhile, and stays until room is needed: the least recently
 * used one that no sequence uses goes first. Until it is copied its weights are held in the host's
 * memory, where they first come from disk if they have to (adapter_host.h). With a budget all are
 * in one block of that size, so that coming and going allocates nothing. On the CPU, without a
 * budget, adapters are used in place: their weights are held while they are used, and the room for
 * them is the host's. Belongs to one thread, the engine's. */
#ifndef GN_ADAPTER_MEMORY_H
#define GN_ADAPTER_MEMORY_H

#include "engine/adapter.h"
#include "kernels/ctx.h"

typedef struct gn_adapter_memory gn_adapter_memory;

/* `budget`: bytes of device memory; 0: no limit; less: none, adapters cannot be used. */
GN_CHECKED gn_status gn_adapter_memory_open(gn_adapter_memory **out, gn_ctx *ctx, int64_t budget);
void gn_adapter_memory_close(gn_adapter_memory *m);

/* Of the device's memory, for one adapter. */
int64_t gn_adapter_memory_bytes(const gn_adapter *adapter);

/* GN_ETOOBIG, with both sizes, when it does not fit into `budget` bytes of the device's memory. */
GN_CHECKED gn_status gn_adapter_memory_check(int64_t budget, const gn_adapter *adapter,
                                             gn_error *err);

/* Gives all n adapters their room until they are released, and starts to copy those that are not
 * there; takes its own references. GN_EBUSY: others in use fill the budget, try again when some
 * were released. GN_ETOOBIG: they do not fit even alone. */
GN_CHECKED gn_status gn_adapter_memory_acquire(gn_adapter_memory *m, const gn_adapter_use *uses,
                                               int32_t n, gn_error *err);
void gn_adapter_memory_release(gn_adapter_memory *m, const gn_adapter_use *uses, int32_t n);
/* Whether they have their room already. */
bool gn_adapter_memory_holds(const gn_adapter_memory *m, const gn_adapter_use *uses, int32_t n);
/* Whether acquired adapters are there, for ops to use. One that cannot come is an error, until all
 * who acquired it have released it. */
GN_CHECKED gn_status gn_adapter_memory_poll(gn_adapter_memory *m, const gn_adapter_use *uses,
                                            int32_t n, bool *ready, gn_error *err);

/* Of an adapter that is there: its pairs, as a gn_lora wants them. */
void gn_adapter_memory_find(const gn_adapter_memory *m, const gn_adapter *adapter,
                            const gn_lora_pair **pairs, const gn_lora_pair **placed);

#endif
