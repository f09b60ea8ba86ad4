/* Room for adapters on the device: who comes, who leaves, who has to wait. Played on the CPU, with
 * uploads that take as many polls as the test says. */
#include "engine/adapter_memory.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#include "tests/support/golden_models.h"
#include "tests/support/uploads.h"

#define GOLDEN GN_SOURCE_DIR "/tests/golden/data/"

enum { ADAPTERS = 5 };

typedef struct room {
    gn_ctx *ctx;
    gn_adapter_memory *memory;
    gn_adapter_use small[ADAPTERS]; /* of one size */
    gn_adapter_use large;           /* of more than two small ones */
    int64_t size;                   /* of a small one */
} room;

static gn_adapter_use load(const char *dir) {
    gn_adapter_use use = {.scale = 1};
    gn_error err = {0};
    cr_assert_eq(gn_adapter_load(&use.adapter, &golden_tiny, "tiny", dir, &err), GN_OK, "%s",
                 err.message);
    return use;
}

/* Room for `smalls` small adapters. */
static room room_open(int smalls, int polls) {
    room r = {.large = load(GOLDEN "adapter-all-r16-bin")};
    const gn_ctx_options options = {.device = "cpu", .threads = 1};
    cr_assert_eq(gn_ctx_open(&r.ctx, &options, NULL), GN_OK);
    test_delay_uploads(r.ctx, polls);
    for (int i = 0; i < ADAPTERS; i++) r.small[i] = load(GOLDEN "adapter-attn-r4");
    r.size = gn_adapter_memory_bytes(r.small[0].adapter);
    cr_assert_gt(gn_adapter_memory_bytes(r.large.adapter), 2 * r.size);
    cr_assert_eq(gn_adapter_memory_open(&r.memory, r.ctx, smalls * r.size), GN_OK);
    return r;
}

static void room_close(room *r) {
    gn_adapter_memory_close(r->memory);
    cr_assert_eq(test_uploads_open(), 0);
    for (int i = 0; i < ADAPTERS; i++) gn_adapter_close(r->small[i].adapter);
    gn_adapter_close(r->large.adapter);
    gn_ctx_close(r->ctx);
}

static gn_status acquire(room *r, int i) {
    return gn_adapter_memory_acquire(r->memory, &r->small[i], 1, NULL);
}

static void release(room *r, int i) {
    gn_adapter_memory_release(r->memory, &r->small[i], 1);
}

static bool holds(const room *r, int i) {
    return gn_adapter_memory_holds(r->memory, &r->small[i], 1);
}

static bool is_ready(room *r, const gn_adapter_use *uses, int32_t n) {
    bool ready = false;
    cr_assert_eq(gn_adapter_memory_poll(r->memory, uses, n, &ready, NULL), GN_OK);
    return ready;
}

/* Every pair's matrices, where ops would find them. */
static void assert_there(const room *r, const gn_adapter *adapter) {
    const gn_lora_pair *pairs, *placed;
    gn_adapter_memory_find(r->memory, adapter, &pairs, &placed);
    for (int i = 0; i < adapter->layers * GN_PROJ_COUNT; i++) {
        const gn_lora_pair *own = &adapter->pairs[i / GN_PROJ_COUNT][i % GN_PROJ_COUNT];
        cr_assert_eq(memcmp(&pairs[i], &placed[i], sizeof *pairs), 0);
        cr_assert_eq(pairs[i].rank, own->rank);
        if (own->rank == 0) continue;
        const gn_tensor *from[] = {&own->a, &own->b}, *to[] = {&pairs[i].a, &pairs[i].b};
        for (int t = 0; t < 2; t++) {
            cr_assert_neq(to[t]->data, from[t]->data);
            cr_assert_eq(to[t]->dtype, from[t]->dtype);
            cr_assert_eq(memcmp(to[t]->data, from[t]->data,
                                (size_t)gn_tensor_numel(to[t]) * gn_dtype_size(to[t]->dtype)),
                         0);
        }
    }
}

Test(adapter_room, the_least_recently_used_leaves) {
    room r = room_open(3, 1);
    for (int i = 0; i < 3; i++) {
        cr_assert_eq(acquire(&r, i), GN_OK);
        cr_assert(is_ready(&r, &r.small[i], 1));
        assert_there(&r, r.small[i].adapter);
        release(&r, i);
    }
    cr_assert_eq(acquire(&r, 0), GN_OK);
    release(&r, 0); /* 1 is the oldest now */
    cr_assert_eq(test_uploads_begun(), 3);
    cr_assert_eq(acquire(&r, 3), GN_OK);
    cr_assert(holds(&r, 0) && !holds(&r, 1) && holds(&r, 2) && holds(&r, 3));
    cr_assert(is_ready(&r, &r.small[3], 1));
    for (int i = 0; i < 4; i++)
        if (i != 1) assert_there(&r, r.small[i].adapter);
    cr_assert_eq(test_uploads_begun(), 4);
    room_close(&r);
}

Test(adapter_room, those_in_use_stay) {
    room r = room_open(2, 1);
    cr_assert_eq(acquire(&r, 0), GN_OK);
    cr_assert_eq(acquire(&r, 0), GN_OK);
    cr_assert_eq(acquire(&r, 1), GN_OK);
    cr_assert_eq(acquire(&r, 2), GN_EBUSY);
    cr_assert_eq(acquire(&r, 1), GN_OK, "what is there may be used by more");
    release(&r, 0);
    cr_assert_eq(acquire(&r, 2), GN_EBUSY, "one of two users is left");
    release(&r, 0);
    cr_assert(is_ready(&r, &r.small[0], 1));
    cr_assert_eq(acquire(&r, 2), GN_OK);
    cr_assert(!holds(&r, 0) && holds(&r, 1) && holds(&r, 2));
    room_close(&r);
}

Test(adapter_room, all_of_a_request_or_none) {
    room r = room_open(3, 1);
    const gn_adapter_use blend[] = {r.small[1], r.small[2], r.small[1], r.small[3]};
    cr_assert_eq(acquire(&r, 0), GN_OK);
    cr_assert_eq(gn_adapter_memory_acquire(r.memory, blend, 4, NULL), GN_EBUSY);
    cr_assert_eq(test_uploads_begun(), 1, "nothing is copied in vain");
    release(&r, 0);
    cr_assert(is_ready(&r, &r.small[0], 1));
    cr_assert_eq(gn_adapter_memory_acquire(r.memory, blend, 4, NULL), GN_OK,
                 "one of them counts once");
    cr_assert_eq(test_uploads_begun(), 4);
    cr_assert_eq(acquire(&r, 0), GN_EBUSY);
    gn_adapter_memory_release(r.memory, blend, 4);
    cr_assert(is_ready(&r, blend, 4));
    cr_assert_eq(acquire(&r, 0), GN_OK);
    const gn_adapter_use many[] = {r.small[0], r.small[1], r.small[2], r.small[3]};
    cr_assert_eq(gn_adapter_memory_acquire(r.memory, many, 4, NULL), GN_ETOOBIG);
    cr_assert_eq(gn_adapter_memory_acquire(r.memory, NULL, 0, NULL), GN_OK);
    room_close(&r);
}

/* Enough room in all, but in two holes, is not enough. */
Test(adapter_room, holes_are_filled_and_outlived) {
    room r = room_open(0, 1);
    const int64_t large = gn_adapter_memory_bytes(r.large.adapter);
    gn_adapter_memory_close(r.memory);
    cr_assert_eq(gn_adapter_memory_open(&r.memory, r.ctx, large + r.size), GN_OK);
    cr_assert_eq(acquire(&r, 0), GN_OK);
    cr_assert_eq(acquire(&r, 1), GN_OK);
    cr_assert(is_ready(&r, r.small, 2));
    release(&r, 0);
    cr_assert_eq(gn_adapter_memory_acquire(r.memory, &r.large, 1, NULL), GN_EBUSY,
                 "the second stands in the way of so large a hole");
    release(&r, 1);
    cr_assert_eq(gn_adapter_memory_acquire(r.memory, &r.large, 1, NULL), GN_OK);
    cr_assert(is_ready(&r, &r.large, 1));
    assert_there(&r, r.large.adapter);
    cr_assert_eq(acquire(&r, 2), GN_OK);
    cr_assert(is_ready(&r, &r.small[2], 1));
    assert_there(&r, r.small[2].adapter);
    assert_there(&r, r.large.adapter);
    room_close(&r);
}

Test(adapter_room, an_upload_takes_its_time) {
    room r = room_open(2, 3);
    cr_assert_eq(acquire(&r, 0), GN_OK);
    cr_assert(!is_ready(&r, &r.small[0], 1));
    cr_assert_eq(acquire(&r, 0), GN_OK, "a second user waits for the same upload");
    cr_assert(!is_ready(&r, &r.small[0], 1));
    cr_assert(is_ready(&r, &r.small[0], 1));
    cr_assert(is_ready(&r, &r.small[0], 1));
    cr_assert_eq(test_uploads_begun(), 1);
    assert_there(&r, r.small[0].adapter);
    /* Its only user is gone before it is there: it cannot leave yet, but is found done later. */
    cr_assert_eq(acquire(&r, 1), GN_OK);
    release(&r, 1);
    const gn_adapter_use two[] = {r.small[2], r.small[3]};
    release(&r, 0), release(&r, 0);
    cr_assert_eq(gn_adapter_memory_acquire(r.memory, two, 2, NULL), GN_EBUSY);
    cr_assert_eq(gn_adapter_memory_acquire(r.memory, two, 2, NULL), GN_EBUSY);
    cr_assert_eq(gn_adapter_memory_acquire(r.memory, two, 2, NULL), GN_OK);
    room_close(&r);
}

Test(adapter_room, one_that_is_too_large_is_known_before) {
    room r = room_open(1, 1);
    char sizes[128];
    gn_error err = {0};
    const int64_t large = gn_adapter_memory_bytes(r.large.adapter);
    cr_assert_eq(gn_adapter_memory_check(r.size, r.small[0].adapter, &err), GN_OK);
    cr_assert_eq(gn_adapter_memory_check(r.size, r.large.adapter, &err), GN_ETOOBIG);
    snprintf(sizes, sizeof sizes,
             "takes %.1f MiB, and the device's memory for adapters is %.1f MiB",
             (double)large / 0x1p20, (double)r.size / 0x1p20);
    cr_assert(strstr(err.message, sizes), "%s", err.message);
    cr_assert_eq(gn_adapter_memory_acquire(r.memory, &r.large, 1, &err), GN_ETOOBIG);
    room_close(&r);
}

Test(adapter_room, without_a_budget) {
    room r = room_open(0, 2);
    cr_assert_eq(acquire(&r, 0), GN_OK);
    cr_assert(is_ready(&r, &r.small[0], 1));
    cr_assert_eq(test_uploads_begun(), 0, "on the CPU they are used in place");
    const gn_lora_pair *pairs, *placed;
    gn_adapter_memory_find(r.memory, r.small[0].adapter, &pairs, &placed);
    cr_assert_eq(pairs, r.small[0].adapter->pairs[0]);
    cr_assert_eq(placed, pairs);
    gn_adapter_memory_close(r.memory);
    cr_assert_eq(gn_adapter_memory_open(&r.memory, r.ctx, -1), GN_OK);
    cr_assert_eq(acquire(&r, 0), GN_ETOOBIG);
    cr_assert_eq(gn_adapter_memory_acquire(r.memory, NULL, 0, NULL), GN_OK);
    room_close(&r);
}
