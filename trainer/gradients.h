/* gradients.h - where the gradients of parameters are: one array on the device, or pages (pages.h)
 * that visit it.
 *
 * Gradients of a large base's LoRA weights take gigabytes, which a layer's backward pass touches
 * for a moment. In pages, a group of parameters (what one layer's backward pass adds to) is
 * acquired for that, and again for the norm and the update, and may be on the host in between. The
 * pages' order is a backward pass's: from the last group to the first.
 *
 * Without pages all parameters are one group, and to acquire it does nothing: callers need not
 * know. */
#ifndef GN_GRADIENTS_H
#define GN_GRADIENTS_H

#include "trainer/parameters.h"

size_t gn_grads_groups(const gn_parameters *p);
/* The first element of a group; of the group after the last: their total. */
int64_t gn_grads_first(const gn_parameters *p, size_t group);
/* The group of an element. */
size_t gn_grads_group(const gn_parameters *p, int64_t element);

/* All gradients become zero; no group is acquired. */
GN_CHECKED gn_status gn_grads_clear(gn_parameters *p);
/* Starts to bring a group to the device: a hint. */
GN_CHECKED gn_status gn_grads_prefetch(gn_parameters *p, size_t group);
GN_CHECKED gn_status gn_grads_acquire(gn_parameters *p, size_t group);
GN_CHECKED gn_status gn_grads_release(gn_parameters *p, size_t group, bool written);
/* n gradients from element `first` on, of one acquired group. */
gn_tensor gn_grads_piece(const gn_parameters *p, int64_t first, int64_t n);

/* Traffic and residency; NULL: there are no pages. */
gn_pages *gn_grads_pages(const gn_parameters *p);
/* Bytes of a page for such parameters. */
size_t gn_grad_page_bytes(const gn_parameter *items, size_t n, gn_dtype dtype, const size_t *groups,
                          size_t n_groups);

/* ---- for parameters.c ---- */
GN_CHECKED gn_status gn_grad_pages_open(gn_grad_pages **out, const gn_parameters *p,
                                        const gn_grad_options *options, gn_error *err);
void gn_grad_pages_close(gn_grad_pages *g);

#endif
