/* Uploads beside the ops: what arrives, in which order, and that nobody waits for them. */
#include "device.h"

#include <criterion/criterion.h>
#include <string.h>

enum { ROUNDS = 20, MIB = 1 << 20 };

static gn_ctx *open_gpu(void) {
    return open_on("cuda", GN_BF16);
}

static void await(gn_upload *upload) {
    bool ready = false;
    while (!ready) cr_assert_eq(gn_upload_poll(upload, &ready), GN_OK);
    gn_upload_close(upload);
}

/* Sizes round the pieces that an upload is cut into. */
Test(transfer, everything_arrives) {
    static const size_t sizes[] = {0, 1, 1000, MIB - 1, MIB, MIB + 1, 5 * MIB + 3};
    gn_ctx *ctx = open_gpu();
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const size_t n = sizes[i];
        uint8_t *from = gn_ctx_alloc_host(ctx, n), *back = malloc(n + 1);
        uint8_t *to = gn_ctx_alloc(ctx, n + 64);
        gn_upload *upload = NULL;
        cr_assert(from && back && to);
        for (size_t at = 0; at < n; at++) from[at] = (uint8_t)(at * 31 + (at >> 12) + i);
        const uint8_t guard = 0xa5;
        cr_assert_eq(gn_ctx_write(ctx, to + n, &guard, 1), GN_OK);
        cr_assert_eq(gn_upload_begin(&upload, ctx, to, from, n), GN_OK);
        await(upload);
        cr_assert_eq(gn_ctx_read(ctx, back, to, n + 1), GN_OK);
        cr_assert_eq(memcmp(back, from, n), 0, "%zu bytes", n);
        cr_assert_eq(back[n], guard);
        gn_ctx_free(ctx, to);
        gn_ctx_free_host(ctx, from);
        free(back);
    }
    gn_ctx_close(ctx);
}

/* Ops before an upload find what was there; uploads to one place come one after another; closing
 * waits. */
Test(transfer, order) {
    const size_t n = 16 * MIB;
    gn_ctx *ctx = open_gpu();
    uint8_t *from[2], *to = gn_ctx_alloc(ctx, n), *copy = gn_ctx_alloc(ctx, n), *back = malloc(n);
    for (int i = 0; i < 2; i++) {
        from[i] = gn_ctx_alloc_host(ctx, n);
        cr_assert(from[i]);
        memset(from[i], i + 1, n);
    }
    cr_assert(to && copy && back);
    for (int round = 0; round < ROUNDS; round++) {
        gn_upload *first = NULL, *second = NULL;
        memset(back, 9, n);
        cr_assert_eq(gn_ctx_write(ctx, to, back, n), GN_OK);
        cr_assert_eq(gn_ctx_copy(ctx, copy, to, n), GN_OK);
        cr_assert_eq(gn_upload_begin(&first, ctx, to, from[0], n), GN_OK);
        cr_assert_eq(gn_upload_begin(&second, ctx, to, from[1], n), GN_OK);
        gn_upload_close(first);
        gn_upload_close(second);
        cr_assert_eq(gn_ctx_read(ctx, back, copy, n), GN_OK);
        cr_assert(back[0] == 9 && back[n / 2] == 9 && back[n - 1] == 9, "round %d", round);
        cr_assert_eq(gn_ctx_read(ctx, back, to, n), GN_OK);
        cr_assert(back[0] == 2 && back[n / 2] == 2 && back[n - 1] == 2, "round %d", round);
    }
    gn_ctx_free(ctx, to);
    gn_ctx_free(ctx, copy);
    for (int i = 0; i < 2; i++) gn_ctx_free_host(ctx, from[i]);
    free(back);
    gn_ctx_close(ctx);
}

/* Ops that come after it run to their end while it is on its way. */
Test(transfer, ops_do_not_wait_for_an_upload) {
    const size_t n = (size_t)512 * MIB;
    if (is_brief()) return; /* the sanitizer makes uploads wait */
    gn_ctx *ctx = open_gpu();
    uint8_t *from = gn_ctx_alloc_host(ctx, n), *to = gn_ctx_alloc(ctx, n + 64);
    int passed = 0;
    cr_assert(from && to);
    memset(from, 3, n);
    for (int round = 0; round < ROUNDS; round++) {
        gn_upload *upload = NULL;
        bool ready = true;
        cr_assert_eq(gn_upload_begin(&upload, ctx, to, from, n), GN_OK);
        for (int i = 0; i < 8; i++)
            cr_assert_eq(gn_ctx_copy(ctx, to + n + 8 * i, to + n + 8 * ((i + 1) % 8), 8), GN_OK);
        cr_assert_eq(gn_ctx_wait(ctx), GN_OK);
        cr_assert_eq(gn_upload_poll(upload, &ready), GN_OK);
        passed += !ready;
        gn_upload_close(upload);
    }
    cr_assert_gt(passed, ROUNDS / 2, "ops passed %d of %d uploads", passed, ROUNDS);
    gn_ctx_free(ctx, to);
    gn_ctx_free_host(ctx, from);
    gn_ctx_close(ctx);
}

/* What is free goes down with what is taken, and trimming takes nothing from anybody. */
Test(transfer, memory_is_counted) {
    const int64_t bytes = (int64_t)256 * MIB;
    gn_ctx *ctx = open_gpu();
    gn_ctx_memory before, with;
    cr_assert_eq(gn_ctx_read_memory(ctx, &before), GN_OK);
    cr_assert(before.free > 0 && before.free < before.total);
    void *memory = gn_ctx_alloc(ctx, (size_t)bytes);
    cr_assert(memory);
    gn_ctx_trim(ctx);
    cr_assert_eq(gn_ctx_read_memory(ctx, &with), GN_OK);
    cr_assert_eq(with.total, before.total);
    cr_assert_geq(before.free - with.free, bytes);
    gn_ctx_free(ctx, memory);
    gn_ctx_close(ctx);
}
