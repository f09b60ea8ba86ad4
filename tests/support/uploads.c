#include "tests/support/uploads.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/backend.h"

typedef struct copy {
    void *dst;
    const void *src;
    size_t bytes;
    int polls; /* left */
} copy;

static gn_backend delayed;
static int delay, begun, open_now;

static gn_status begin(gn_ctx *ctx, void **event, void *dst, const void *src, size_t bytes) {
    (void)ctx;
    copy *c = malloc(sizeof *c);
    if (!c) return GN_ENOMEM;
    *c = (copy){dst, src, bytes, delay};
    *event = c;
    begun++;
    open_now++;
    memset(dst, 0xff, bytes); /* not a number, whatever the dtype */
    return GN_OK;
}

static void finish(copy *c) {
    if (c->bytes) memcpy(c->dst, c->src, c->bytes);
    c->bytes = 0;
}

static gn_status poll_copy(gn_ctx *ctx, void *event, bool *ready) {
    (void)ctx;
    copy *c = event;
    *ready = --c->polls <= 0;
    if (*ready) finish(c);
    return GN_OK;
}

static void end(gn_ctx *ctx, void *event) {
    (void)ctx;
    finish(event);
    free(event);
    open_now--;
}

void test_delay_uploads(gn_ctx *ctx, int polls) {
    delay = polls;
    begun = open_now = 0;
    if (ctx->backend == &delayed) return;
    delayed = *ctx->backend;
    delayed.upload_begin = begin;
    delayed.upload_poll = poll_copy;
    delayed.upload_end = end;
    ctx->backend = &delayed;
}

int test_uploads_begun(void) {
    return begun;
}

int test_uploads_open(void) {
    return open_now;
}
