/* adapter_host.h - adapters' weights in the host's memory, as many as a budget holds.
 *
 * The others are on disk only, in the folders they came from. Whoever is about to use an adapter's
 * weights holds it; a thread of this module's reads them back if it has to, and until the adapter
 * is released they stay. The least recently held ones leave when others need the room. What is held
 * stays beyond the budget too. Files that are not what they were, or not there, are an error for
 * those who hold the adapter then; later ones try again. For any thread. */
#ifndef GN_ADAPTER_HOST_H
#define GN_ADAPTER_HOST_H

#include "engine/guanaco.h"

typedef struct gn_adapter_host gn_adapter_host;

/* For the adapters of a model that is about to be complete. `budget`: bytes; 0: half of what is
 * free. */
GN_CHECKED gn_status gn_adapter_host_open(gn_adapter_host **out, const gn_model *model,
                                          int64_t budget, gn_error *err);
void gn_adapter_host_close(gn_adapter_host *host); /* after its adapters; accepts NULL */
int64_t gn_adapter_host_budget(const gn_adapter_host *host);

typedef struct gn_adapter_host_stats {
    int64_t bytes; /* in memory */
    int64_t reads; /* of folders, again */
} gn_adapter_host_stats;
gn_adapter_host_stats gn_adapter_host_read_stats(gn_adapter_host *host);

/* Of an adapter that has no host (adapter.h) the weights are always there. */
void gn_adapter_hold(gn_adapter *adapter);
void gn_adapter_release(gn_adapter *adapter);
/* Whether the weights of one that is held are in memory, or why they cannot be. */
GN_CHECKED gn_status gn_adapter_poll(gn_adapter *adapter, bool *ready, gn_error *err);

/* For adapter.c: memory for weights, for which others leave; NULL when there is none left. */
void *gn_adapter_host_take(gn_adapter_host *host, size_t bytes);
void gn_adapter_host_give(gn_adapter_host *host, void *memory, size_t bytes);
/* From here on the adapter's weights may leave, until it is removed. */
void gn_adapter_host_add(gn_adapter_host *host, gn_adapter *adapter);
void gn_adapter_host_remove(gn_adapter_host *host, gn_adapter *adapter);

#endif
