/* adapter_memory.h - adapters where the device can read them.
 *
 * On a device with memory of its own an adapter is copied there when a sequence is about to use
 * it, and stays until room is needed: the least recently used one that no sequence uses goes
 * first. Its host copy remains, so that it can come back. On the CPU adapters are used in place
 * and nothing is copied. Belongs to one thread, the engine's. */
#ifndef GN_ADAPTER_MEMORY_H
#define GN_ADAPTER_MEMORY_H

#include "engine/adapter.h"
#include "kernels/ctx.h"

typedef struct gn_adapter_memory gn_adapter_memory;

/* `budget`: bytes of device memory; 0: no limit. */
GN_CHECKED gn_status gn_adapter_memory_open(gn_adapter_memory **out, gn_ctx *ctx, int64_t budget);
void gn_adapter_memory_close(gn_adapter_memory *m);

/* Makes the adapter resident and keeps it so until as many releases; takes its own reference.
 * GN_EBUSY: others in use fill the budget, try again when one was released. */
GN_CHECKED gn_status gn_adapter_memory_acquire(gn_adapter_memory *m, gn_adapter *adapter);
void gn_adapter_memory_release(gn_adapter_memory *m, const gn_adapter *adapter);

/* Of an acquired adapter: its pairs, as a gn_lora wants them. */
void gn_adapter_memory_find(gn_adapter_memory *m, const gn_adapter *adapter,
                            const gn_lora_pair **pairs, const gn_lora_pair **placed);

#endif
