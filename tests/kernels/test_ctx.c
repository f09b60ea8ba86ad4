/* Contexts: what may be asked for, what one gets, working memory. */
#include "kernels/ctx.h"

#include <criterion/criterion.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

static gn_ctx *open_ok(gn_ctx_options options) {
    gn_ctx *ctx = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_ctx_open(&ctx, &options, &err), GN_OK, "%s", err.message);
    cr_assert_not_null(ctx);
    return ctx;
}

Test(ctx, devices_open_or_say_why_not) {
    const struct {
        const char *device;
        gn_status status;
        const char *says;
    } cases[] = {
        {NULL, GN_OK, NULL},
        {"auto", GN_OK, NULL},
        {"cpu", GN_OK, NULL},
        {"cuda:99", GN_EDEVICE, "cuda:99: "}, /* whatever is missing: support, a driver, 99 GPUs */
        {"cudax", GN_EINVAL, "cudax"},
        {"", GN_EINVAL, "unknown device"},
        {"CPU", GN_EINVAL, "CPU"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gn_ctx *ctx = (gn_ctx *)&cases;
        gn_error err = {0};
        const gn_ctx_options options = {.device = cases[i].device};
        const gn_status status = gn_ctx_open(&ctx, &options, &err);
        cr_assert_eq(status, cases[i].status, "%s", cases[i].device);
        cr_assert_eq(ctx != NULL, status == GN_OK);
        if (cases[i].says) {
            cr_assert_eq(err.status, status);
            cr_assert(strstr(err.message, cases[i].says), "%s", err.message);
        }
        gn_ctx_close(ctx);
    }
}

Test(ctx, bad_options_are_refused) {
    const gn_ctx_options cases[] = {
        {.compute = GN_F16}, {.compute = GN_I8}, {.threads = -1}, {.threads = 1000000}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gn_ctx *ctx = NULL;
        gn_error err = {0};
        cr_assert_eq(gn_ctx_open(&ctx, &cases[i], &err), GN_EINVAL);
        cr_assert_null(ctx);
        cr_assert(err.message[0]);
        cr_assert_eq(gn_ctx_open(&ctx, &cases[i], NULL), GN_EINVAL);
    }
    gn_ctx *ctx;
    const gn_ctx_options options = {0};
    cr_assert_eq(gn_ctx_open(NULL, &options, NULL), GN_EINVAL);
    cr_assert_eq(gn_ctx_open(&ctx, NULL, NULL), GN_EINVAL);
}

Test(ctx, says_what_it_is) {
    gn_ctx *ctx = open_ok((gn_ctx_options){.threads = 3, .compute = GN_BF16});
    cr_assert_eq(gn_ctx_threads(ctx), 3);
    cr_assert_eq(gn_ctx_compute(ctx), GN_BF16);
    cr_assert(strstr(gn_ctx_device(ctx), "cpu (") && strstr(gn_ctx_device(ctx), "3 threads"));
    gn_ctx_close(ctx);

    ctx = open_ok((gn_ctx_options){0});
    cr_assert_geq(gn_ctx_threads(ctx), 1);
    cr_assert_eq(gn_ctx_compute(ctx), GN_F32);
    gn_ctx_close(ctx);
    gn_ctx_close(NULL);
}

Test(ctx, the_instruction_set_can_be_limited_and_decides_the_compute_dtype) {
    gn_ctx *best = open_ok((gn_ctx_options){.auto_compute = true});
    const gn_isa isa = gn_ctx_isa(best);
    cr_assert_eq(gn_ctx_compute(best), isa == GN_ISA_AVX512BF16 ? GN_BF16 : GN_F32);
    gn_ctx_close(best);
    for (gn_isa limit = GN_ISA_REFERENCE; limit <= GN_ISA_AVX512BF16; limit++) {
        gn_ctx *ctx = open_ok((gn_ctx_options){
            .auto_compute = true, .compute = GN_I8, .limit_isa = true, .max_isa = limit});
        cr_assert_eq(gn_ctx_isa(ctx), limit < isa ? limit : isa);
        cr_assert_eq(gn_ctx_compute(ctx), gn_ctx_isa(ctx) == GN_ISA_AVX512BF16 ? GN_BF16 : GN_F32);
        gn_ctx_close(ctx);
    }
}

static void count_item(void *arg, int64_t i) {
    atomic_fetch_add(&((atomic_int *)arg)[i], 1);
}

/* Many short jobs and a few pauses, so that threads are met awake and asleep. */
Test(ctx, every_item_is_done_once) {
    enum { MOST = 50 };
    for (int threads = 1; threads <= 4; threads++) {
        gn_ctx *ctx = open_ok((gn_ctx_options){.threads = threads});
        for (int round = 0; round < 2000; round++) {
            const int n = round % MOST;
            atomic_int done[MOST] = {0};
            if (round % 500 == 0) usleep(2000);
            gn_ctx_for(ctx, n, count_item, done);
            for (int i = 0; i < MOST; i++) cr_assert_eq(done[i], i < n);
        }
        gn_ctx_close(ctx);
    }
}

Test(ctx, memory_is_aligned_and_working_memory_grows) {
    gn_ctx *ctx = open_ok((gn_ctx_options){0});
    const size_t sizes[] = {0, 1, 63, 64, 1000, 5 << 20};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        char *p = gn_ctx_alloc(ctx, sizes[i]);
        cr_assert_not_null(p);
        cr_assert_eq((uintptr_t)p % 64, 0);
        memset(p, 1, sizes[i]);
        gn_ctx_free(ctx, p);
        cr_assert_eq(gn_ctx_reserve(ctx, sizes[i]), GN_OK);
        cr_assert_eq(gn_ctx_reserve(ctx, sizes[i] / 2), GN_OK);
    }
    gn_ctx_free(ctx, NULL);
    cr_assert_eq(gn_ctx_reserve(ctx, (size_t)1 << 63), GN_ENOMEM);
    cr_assert_null(gn_ctx_alloc(ctx, (size_t)1 << 63));
    cr_assert_eq(gn_ctx_reserve(ctx, 100), GN_OK);
    gn_ctx_close(ctx);
}

Test(ctx, says_how_much_memory_there_is) {
    gn_ctx *ctx = open_ok((gn_ctx_options){.device = "cpu"});
    gn_ctx_memory memory = {0};
    cr_assert_eq(gn_ctx_read_memory(ctx, &memory), GN_OK);
    cr_assert(memory.free > 0 && memory.free <= memory.total);
    cr_assert_leq(memory.total, (int64_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE));
    gn_ctx_trim(ctx);
    gn_ctx_close(ctx);
}

Test(ctx, an_upload_arrives) {
    gn_ctx *ctx = open_ok((gn_ctx_options){.device = "cpu"});
    const size_t n = (5 << 20) + 3;
    char *from = gn_ctx_alloc_host(ctx, n), *to = gn_ctx_alloc(ctx, n);
    gn_upload *upload = NULL;
    bool ready = false;
    cr_assert(from && to);
    cr_assert_eq((uintptr_t)from % 64, 0);
    for (size_t i = 0; i < n; i++) from[i] = (char)(i * 7);
    cr_assert_eq(gn_upload_begin(&upload, ctx, to, from, n), GN_OK);
    cr_assert_eq(gn_upload_poll(upload, &ready), GN_OK);
    cr_assert(ready, "the CPU copies at once");
    cr_assert_eq(memcmp(from, to, n), 0);
    gn_upload_close(upload);
    gn_upload_close(NULL);
    gn_ctx_free(ctx, to);
    gn_ctx_free_host(ctx, from);
    gn_ctx_free_host(ctx, NULL);
    gn_ctx_close(ctx);
}
