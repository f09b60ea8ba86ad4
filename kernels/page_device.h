/* page_device.h - a place for pages of host memory: copies to a device and back, beside its ops.
 *
 * `slot` numbers the places that pages have on the device, from 0; each has its own memory. Copies
 * of one slot run in the order they were queued, and so do copies of one page of the host. */
#ifndef GN_PAGE_DEVICE_H
#define GN_PAGE_DEVICE_H

#include "ctx.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct gn_page_device {
    void *user;
    void *(*alloc_host)(void *user, size_t bytes); /* memory that copies run fast from and to */
    void (*free_host)(void *user, void *memory);   /* waits for its copies, as does free */
    void *(*alloc)(void *user, size_t bytes);
    void (*free)(void *user, void *memory);
    gn_status (*upload)(void *user, int slot, void *device, const void *host, size_t bytes);
    gn_status (*download)(void *user, int slot, void *host, const void *device, size_t bytes);
    /* Ops queued from now on run after the slot's copies. */
    gn_status (*begin_use)(void *user, int slot);
    /* Copies of the slot queued from now on run after the ops so far. */
    gn_status (*end_use)(void *user, int slot);
    gn_status (*wait)(void *user); /* until all copies have run */
    void (*close)(struct gn_page_device *device);
} gn_page_device;

/* *out is NULL where the context's memory is the host's: pages are used where they are. */
GN_CHECKED gn_status gn_page_device_open(gn_page_device **out, gn_ctx *ctx);
void gn_page_device_close(gn_page_device *device); /* before its context; accepts NULL */

/* ---- for kernels/ only: cuda/page_device.cu, no_cuda.c ---- */
gn_status gn_cuda_page_device_open(gn_page_device **out, gn_ctx *ctx);

#ifdef __cplusplus
}
#endif
#endif
