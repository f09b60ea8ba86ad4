/* pages.h - memory that lives on the host and visits the device.
 *
 * Optimizer state is read and written once a step, in order, and may be larger than what the
 * device has to spare. It is cut into pages of equal size in (pinned) host memory. A page is
 * acquired for the ops that use it and released after them; as many pages as a byte budget
 * allows stay on the device between uses. Prefetching brings pages ahead of their use, beside
 * whatever the device computes.
 *
 * Pages are used in order, over and over. So the page whose next use is farthest is evicted: the
 * one just used, not the least recently used one, which would be needed next. With room for K of
 * n pages, K - 1 of n - 1 uses find their page where a least-recently-used rule would find none. */
#ifndef GN_PAGES_H
#define GN_PAGES_H

#include "kernels/page_device.h"

typedef struct gn_pages gn_pages;

/* n pages of zeros. Without a device they are used where they are, and the budget means nothing;
 * the device is borrowed, and nobody else's: its slots are these pages'. */
GN_CHECKED gn_status gn_pages_open(gn_pages **out, const gn_page_device *device, int n,
                                   size_t page_bytes, size_t budget, gn_error *err);
void gn_pages_close(gn_pages *p);

/* Starts to bring a page, if there is room or a page that is needed later to take it from. A
 * hint: when there is neither, nothing happens. */
GN_CHECKED gn_status gn_pages_prefetch(gn_pages *p, int page);
/* A page's memory on the device, for the ops up to its release. GN_ENOMEM when no room can be
 * made. After a failure nothing is lost, and the call may be repeated. */
GN_CHECKED gn_status gn_pages_acquire(gn_pages *p, int page, void **memory);
/* `written`: the ops changed the page. */
GN_CHECKED gn_status gn_pages_release(gn_pages *p, int page, bool written);

/* What the page holds is not needed any more: it is not copied, and its next user finds in it
 * anything. The page is not in use. */
GN_CHECKED gn_status gn_pages_discard(gn_pages *p, int page);

/* A new budget: pages beyond it leave at once, acquired ones when they are released. */
GN_CHECKED gn_status gn_pages_set_budget(gn_pages *p, size_t budget);

/* Lends device memory to pages, for a while, beside the budget; it is free once the ops so far have
 * run. Pages needed next come into it at once. Recalling starts to copy back what it holds; after
 * the return of a stretch of it, ops may use that again. Pages that do not fit whole get none. */
GN_CHECKED gn_status gn_pages_lend(gn_pages *p, void *memory, size_t bytes);
GN_CHECKED gn_status gn_pages_recall(gn_pages *p);
GN_CHECKED gn_status gn_pages_return(gn_pages *p, const void *memory, size_t bytes);

/* Makes the host's copies current; pages stay where they are, and none is in use. */
GN_CHECKED gn_status gn_pages_flush(gn_pages *p);
/* The host's copy: to be read after a flush, and written before the page is first brought. */
void *gn_pages_host(gn_pages *p, int page);
size_t gn_pages_page_bytes(const gn_pages *p);

typedef struct gn_page_stats {
    int64_t uploaded, downloaded; /* bytes */
    int64_t evictions;
    int64_t misses;        /* acquired pages that were not there or on their way */
    size_t resident, peak; /* bytes on the device, lent ones aside */
} gn_page_stats;
gn_page_stats gn_pages_read_stats(const gn_pages *p);

#endif
