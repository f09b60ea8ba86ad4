/* communicator.c - the exchange of gradients. */
#include "trainer/communicator.h"

#include "trainer/gradients.h"

static gn_status sum_group(gn_communicator *c, gn_parameters *p, size_t group) {
    const int64_t first = gn_grads_first(p, group), end = gn_grads_first(p, group + 1);
    gn_status status = gn_grads_acquire(p, group);
    if (status) return status;
    const gn_tensor grads = gn_grads_piece(p, first, end - first);
    status = c->sum(c, p->ctx, &grads);
    const gn_status released = gn_grads_release(p, group, true);
    return status ? status : released;
}

gn_status gn_exchange_gradients(gn_communicator *c, gn_parameters *p, double *numbers, int n) {
    gn_status status = GN_OK;
    if (c->size == 1) return GN_OK;
    for (size_t i = gn_grads_groups(p); !status && i > 0; i--) status = sum_group(c, p, i - 1);
    return status ? status : c->sum_numbers(c, numbers, n);
}
