/* communicator.h - processes that train one model together, each on its share of every step.
 *
 * Each runs micro-batches rank, rank + size, ... of a step; then gradients and the numbers that go
 * with them are added up, and every process makes the same update. Alone there is nothing to add.
 */
#ifndef GN_COMMUNICATOR_H
#define GN_COMMUNICATOR_H

#include "trainer/parameters.h"

typedef struct gn_communicator gn_communicator;

struct gn_communicator {
    int rank, size;
    /* Each process's array becomes the sum over all of them, to the bit the same everywhere. The
     * tensor is on ctx's device, the numbers are on the host. NULL where size is 1. */
    gn_status (*sum)(gn_communicator *c, gn_ctx *ctx, const gn_tensor *array);
    gn_status (*sum_numbers)(gn_communicator *c, double *numbers, int n);
};

/* A process of its own. */
static inline gn_communicator gn_communicator_alone(void) {
    return (gn_communicator){.rank = 0, .size = 1};
}

/* Adds up a step's gradients, and n numbers. */
GN_CHECKED gn_status gn_exchange_gradients(gn_communicator *c, gn_parameters *p, double *numbers,
                                           int n);

#endif
