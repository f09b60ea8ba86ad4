/* late_pages.c - copies in a queue. */
#include "tests/support/late_pages.h"

#include <stdlib.h>
#include <string.h>

typedef struct copy {
    void *to;
    const void *from;
    size_t bytes;
    int slot;
} copy;

typedef struct late {
    gn_page_device device;
    gn_ctx *ctx;
    copy *queue;
    int n, room;
} late;

/* Runs the first n copies. */
static void run(late *l, int n) {
    if (n == 0) return;
    for (int i = 0; i < n; i++) memcpy(l->queue[i].to, l->queue[i].from, l->queue[i].bytes);
    l->n -= n;
    memmove(l->queue, l->queue + n, (size_t)l->n * sizeof *l->queue);
}

static void *alloc_host(void *user, size_t bytes) {
    (void)user;
    return malloc(bytes);
}

static void free_host(void *user, void *memory) {
    late *l = user;
    run(l, l->n);
    free(memory);
}

static void *alloc_device(void *user, size_t bytes) {
    return gn_ctx_alloc(((late *)user)->ctx, bytes);
}

static void free_device(void *user, void *memory) {
    late *l = user;
    run(l, l->n);
    gn_ctx_free(l->ctx, memory);
}

static gn_status queue(late *l, copy c) {
    if (l->n == l->room) {
        const int room = l->room ? 2 * l->room : 64;
        copy *grown = realloc(l->queue, (size_t)room * sizeof *grown);
        if (!grown) return GN_ENOMEM;
        l->queue = grown;
        l->room = room;
    }
    l->queue[l->n++] = c;
    return GN_OK;
}

static gn_status upload(void *user, int slot, void *device, const void *host, size_t bytes) {
    return queue(user, (copy){device, host, bytes, slot});
}

static gn_status download(void *user, int slot, void *host, const void *device, size_t bytes) {
    return queue(user, (copy){host, device, bytes, slot});
}

static gn_status begin_use(void *user, int slot) {
    late *l = user;
    int n = l->n;
    while (n > 0 && l->queue[n - 1].slot != slot) n--;
    run(l, n);
    return GN_OK;
}

/* Ops run at once. */
static gn_status end_use(void *user, int slot) {
    (void)user, (void)slot;
    return GN_OK;
}

static gn_status wait_all(void *user) {
    late *l = user;
    run(l, l->n);
    return GN_OK;
}

static void close_late(gn_page_device *device) {
    late *l = device->user;
    free(l->queue);
    free(l);
}

gn_page_device *test_late_pages(gn_ctx *ctx) {
    late *l = calloc(1, sizeof *l);
    if (!l) abort();
    l->ctx = ctx;
    l->device = (gn_page_device){l,        alloc_host, free_host, alloc_device, free_device, upload,
                                 download, begin_use,  end_use,   wait_all,     close_late};
    return &l->device;
}
