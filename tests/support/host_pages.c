/* host_pages.c - pages that travel nowhere. */
#include "tests/support/host_pages.h"

#include <stdlib.h>
#include <string.h>

static void *host_alloc(void *user, size_t bytes) {
    (void)user;
    return malloc(bytes);
}

static void host_free(void *user, void *memory) {
    (void)user;
    free(memory);
}

static gn_status host_copy(void *user, int slot, void *to, const void *from, size_t bytes) {
    (void)user, (void)slot;
    memcpy(to, from, bytes);
    return GN_OK;
}

static gn_status host_fence(void *user, int slot) {
    (void)user, (void)slot;
    return GN_OK;
}

static gn_status host_wait(void *user) {
    (void)user;
    return GN_OK;
}

static void host_close(gn_page_device *closed) {
    (void)closed;
}

static gn_page_device device = {NULL,      host_alloc, host_free,  host_alloc, host_free, host_copy,
                                host_copy, host_fence, host_fence, host_wait,  host_close};

gn_page_device *test_host_pages(void) {
    return &device;
}
