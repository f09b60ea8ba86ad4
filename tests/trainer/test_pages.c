/* Pages on a device that keeps its copies in a queue and runs them as late as it may: so a page
 * that is used before its copy was waited for, or a copy that overtakes an op, shows in what the
 * pages hold. */
#include "trainer/pages.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PAGE = 64, MAX_PAGES = 16, MAX_COPIES = 4096 };

typedef struct copy {
    void *to;
    const void *from;
    int slot;
} copy;

typedef struct fake {
    gn_page_device device;
    copy queue[MAX_COPIES];
    int first, n; /* copies not yet run */
    bool in_use[MAX_PAGES];
    size_t allocated, most;
    char *host;
    char log[8192];     /* a word for each call */
    int calls, failing; /* the call that fails, from 1; 0: none */
    bool no_memory;
} fake;

static void note(fake *f, const char *what, int slot) {
    const size_t used = strlen(f->log);
    snprintf(f->log + used, sizeof f->log - used, "%s%d ", what, slot);
}

static bool fails(fake *f) {
    return ++f->calls == f->failing;
}

static void run_until(fake *f, int end) {
    for (; f->first < end; f->first++) memcpy(f->queue[f->first].to, f->queue[f->first].from, PAGE);
}

static void *fake_alloc_host(void *user, size_t bytes) {
    return ((fake *)user)->host = malloc(bytes);
}

static void fake_free_host(void *user, void *memory) {
    run_until(user, ((fake *)user)->n);
    free(memory);
}

static void *fake_alloc(void *user, size_t bytes) {
    fake *f = user;
    if (f->no_memory || fails(f)) return NULL;
    f->allocated += bytes;
    if (f->allocated > f->most) f->most = f->allocated;
    return memset(malloc(bytes), 0x5a, bytes);
}

static void fake_free(void *user, void *memory) {
    fake *f = user;
    run_until(f, f->n);
    f->allocated -= PAGE;
    free(memory);
}

static gn_status queue_copy(fake *f, int slot, void *to, const void *from) {
    cr_assert(!f->in_use[slot], "a copy of slot %d while ops use it", slot);
    cr_assert(f->n < MAX_COPIES);
    f->queue[f->n++] = (copy){to, from, slot};
    return GN_OK;
}

static gn_status fake_upload(void *user, int slot, void *device, const void *host, size_t bytes) {
    fake *f = user;
    cr_assert_eq(bytes, PAGE);
    if (fails(f)) return GN_EDEVICE;
    note(f, "up", (int)(((const char *)host - f->host) / PAGE));
    return queue_copy(f, slot, device, host);
}

static gn_status fake_download(void *user, int slot, void *host, const void *device, size_t bytes) {
    fake *f = user;
    cr_assert_eq(bytes, PAGE);
    if (fails(f)) return GN_EDEVICE;
    note(f, "down", (int)(((char *)host - f->host) / PAGE));
    return queue_copy(f, slot, host, device);
}

static gn_status fake_begin_use(void *user, int slot) {
    fake *f = user;
    if (fails(f)) return GN_EDEVICE;
    int last = f->first;
    for (int i = f->first; i < f->n; i++)
        if (f->queue[i].slot == slot) last = i + 1;
    run_until(f, last);
    f->in_use[slot] = true;
    return GN_OK;
}

static gn_status fake_end_use(void *user, int slot) {
    fake *f = user;
    f->in_use[slot] = false;
    return fails(f) ? GN_EDEVICE : GN_OK;
}

static gn_status fake_wait(void *user) {
    fake *f = user;
    if (fails(f)) return GN_EDEVICE;
    run_until(f, f->n);
    return GN_OK;
}

static void fake_open(fake *f) {
    memset(f, 0, sizeof *f);
    f->device = (gn_page_device){.user = f,
                                 .alloc_host = fake_alloc_host,
                                 .free_host = fake_free_host,
                                 .alloc = fake_alloc,
                                 .free = fake_free,
                                 .upload = fake_upload,
                                 .download = fake_download,
                                 .begin_use = fake_begin_use,
                                 .end_use = fake_end_use,
                                 .wait = fake_wait};
}

static gn_pages *open_pages(fake *f, int n, int budget) {
    gn_pages *p = NULL;
    gn_error err = {0};
    if (f) fake_open(f);
    cr_assert_eq(gn_pages_open(&p, f ? &f->device : NULL, n, PAGE, (size_t)budget * PAGE, &err),
                 GN_OK, "%s", err.message);
    return p;
}

/* An op on a page: counts its uses in it. */
static gn_status use(gn_pages *p, int page, int prefetch) {
    void *memory;
    gn_status status = gn_pages_acquire(p, page, &memory);
    if (status) return status;
    const int n = (int)prefetch;
    for (int i = 1; i <= n && !status; i++) status = gn_pages_prefetch(p, page + i);
    ++*(int *)memory;
    ((char *)memory)[PAGE - 1] = (char)page;
    const gn_status released = gn_pages_release(p, page, true);
    return status ? status : released;
}

static void sweep(gn_pages *p, int n, int ahead) {
    for (int i = 0; i < n; i++)
        cr_assert_eq(use(p, i, i + ahead < n ? ahead : n - 1 - i), GN_OK, "page %d", i);
}

static void expect_uses(gn_pages *p, int n, int uses) {
    cr_assert_eq(gn_pages_flush(p), GN_OK);
    for (int i = 0; i < n; i++) {
        const char *host = gn_pages_host(p, i);
        cr_assert_eq(*(const int *)host, uses, "page %d was used %d times, not %d", i,
                     *(const int *)host, uses);
        cr_assert_eq(host[PAGE - 1], i);
    }
}

Test(pages, keep_within_the_budget_and_lose_nothing) {
    static fake f;
    enum { N = 8, SWEEPS = 5 };
    for (int budget = 1; budget <= N + 1; budget++) {
        for (int ahead = 0; ahead <= 3; ahead++) {
            gn_pages *p = open_pages(&f, N, budget);
            for (int i = 0; i < SWEEPS; i++) sweep(p, N, ahead);
            const gn_page_stats before = gn_pages_read_stats(p);
            expect_uses(p, N, SWEEPS);
            cr_assert_leq(f.most, (size_t)budget * PAGE);
            cr_assert_eq(before.peak, f.most);
            cr_assert_eq(before.resident, f.allocated);
            if (budget >= N) {
                cr_assert_eq(before.uploaded, N * PAGE, "each page once");
                cr_assert_eq(before.downloaded, 0);
                cr_assert_eq(before.evictions, 0);
            }
            gn_pages_close(p);
            cr_assert_eq(f.allocated, 0);
        }
    }
}

Test(pages, are_where_they_are_without_a_device) {
    enum { N = 5 };
    gn_pages *p = open_pages(NULL, N, 0);
    void *memory;
    cr_assert_eq(gn_pages_acquire(p, 2, &memory), GN_OK);
    cr_assert_eq(memory, gn_pages_host(p, 2));
    cr_assert_eq(gn_pages_release(p, 2, false), GN_OK);
    sweep(p, N, 2);
    expect_uses(p, N, 1);
    const gn_page_stats s = gn_pages_read_stats(p);
    cr_assert(s.uploaded == 0 && s.downloaded == 0 && s.misses == 0 && s.resident == 0);
    cr_assert_eq(gn_pages_set_budget(p, PAGE), GN_OK);
    gn_pages_close(p);
    gn_pages_close(NULL);
}

/* With room for 4 of 8, 3 of 7 uses find their page. */
Test(pages, the_farthest_is_evicted) {
    static fake f;
    enum { N = 8, ROOM = 4, SWEEPS = 7 };
    gn_pages *p = open_pages(&f, N, ROOM);
    sweep(p, N, 0);
    cr_assert_str_eq(f.log, "up0 up1 up2 up3 down3 up4 down4 up5 down5 up6 down6 up7 ");
    const int64_t first = gn_pages_read_stats(p).misses;
    cr_assert_eq(first, N);
    for (int i = 0; i < SWEEPS; i++) sweep(p, N, 0);
    cr_assert_eq(gn_pages_read_stats(p).misses - first, SWEEPS * N * (N - ROOM) / (N - 1));
    expect_uses(p, N, 1 + SWEEPS);
    gn_pages_close(p);
}

Test(pages, prefetched_pages_come_while_another_is_used) {
    static fake f;
    enum { N = 6 };
    gn_pages *p = open_pages(&f, N, 2);
    void *memory;
    cr_assert_eq(gn_pages_prefetch(p, 0), GN_OK);
    for (int i = 0; i < N; i++) {
        cr_assert_eq(gn_pages_acquire(p, i, &memory), GN_OK);
        const int queued = f.n;
        cr_assert_eq(gn_pages_prefetch(p, (i + 1) % N), GN_OK);
        cr_assert_eq(f.n - queued, i == 0 ? 1 : 2, "page %d: the next one does not come", i);
        cr_assert_eq(f.first, queued, "nobody waits for the next page");
        ++*(int *)memory;
        ((char *)memory)[PAGE - 1] = (char)i;
        cr_assert_eq(gn_pages_release(p, i, true), GN_OK);
    }
    cr_assert_eq(gn_pages_read_stats(p).misses, 0);
    cr_assert_str_eq(f.log, "up0 up1 down0 up2 down1 up3 down2 up4 down3 up5 down4 up0 ");
    expect_uses(p, N, 1);
    gn_pages_close(p);
}

/* A hint takes no place from a page that is needed sooner. */
Test(pages, prefetching_too_far_does_nothing) {
    static fake f;
    gn_pages *p = open_pages(&f, 6, 2);
    for (int i = 0; i < 5; i++) cr_assert_eq(gn_pages_prefetch(p, i), GN_OK);
    cr_assert_str_eq(f.log, "up0 up1 ");
    cr_assert_eq(use(p, 0, 0), GN_OK);
    cr_assert_eq(gn_pages_prefetch(p, 3), GN_OK);
    cr_assert_str_eq(f.log, "up0 up1 down0 up3 ");
    cr_assert_eq(gn_pages_read_stats(p).evictions, 1);
    gn_pages_close(p);
}

Test(pages, a_spike_takes_their_room) {
    static fake f;
    enum { N = 8 };
    gn_pages *p = open_pages(&f, N, N);
    void *memory;
    sweep(p, N, 1);
    cr_assert_eq(f.allocated, N * PAGE);
    cr_assert_eq(gn_pages_set_budget(p, 3 * PAGE), GN_OK);
    cr_assert_eq(f.allocated, 3 * PAGE);
    cr_assert_eq(gn_pages_set_budget(p, 0), GN_OK);
    cr_assert_eq(f.allocated, 0);
    cr_assert_eq(gn_pages_acquire(p, 0, &memory), GN_ENOMEM);
    cr_assert_eq(gn_pages_prefetch(p, 0), GN_OK);
    cr_assert_eq(f.allocated, 0);
    cr_assert_eq(gn_pages_set_budget(p, 2 * PAGE), GN_OK);
    for (int i = 0; i < N; i++) {
        cr_assert_eq(use(p, i, 0), GN_OK);
        if (i == 3)
            cr_assert_eq(gn_pages_set_budget(p, PAGE), GN_OK); /* in the middle of a sweep */
        if (i >= 3) cr_assert_leq(f.allocated, PAGE);
    }
    expect_uses(p, N, 2);
    gn_pages_close(p);
}

Test(pages, a_page_in_use_leaves_when_it_is_released) {
    static fake f;
    gn_pages *p = open_pages(&f, 4, 4);
    void *a, *b;
    cr_assert_eq(gn_pages_acquire(p, 0, &a), GN_OK);
    cr_assert_eq(gn_pages_acquire(p, 1, &b), GN_OK);
    cr_assert_eq(gn_pages_set_budget(p, PAGE), GN_OK);
    cr_assert_eq(f.allocated, 2 * PAGE);
    cr_assert_eq(gn_pages_flush(p), GN_EINVAL);
    *(int *)a = 7;
    cr_assert_eq(gn_pages_release(p, 0, true), GN_OK);
    cr_assert_eq(f.allocated, PAGE);
    cr_assert_eq(gn_pages_release(p, 1, false), GN_OK);
    cr_assert_eq(gn_pages_flush(p), GN_OK);
    cr_assert_eq(*(int *)gn_pages_host(p, 0), 7);
    gn_pages_close(p);
}

Test(pages, what_is_discarded_is_not_copied) {
    static fake f;
    gn_pages *p = open_pages(&f, 3, 1);
    void *memory;
    cr_assert_eq(use(p, 0, 0), GN_OK);
    cr_assert_eq(gn_pages_discard(p, 0), GN_OK);
    cr_assert_eq(use(p, 1, 0), GN_OK);
    cr_assert_eq(gn_pages_acquire(p, 0, &memory), GN_OK);
    cr_assert_eq(gn_pages_discard(p, 0), GN_EINVAL, "it is in use");
    *(int *)memory = 9;
    cr_assert_eq(gn_pages_release(p, 0, true), GN_OK);
    cr_assert_str_eq(f.log, "up0 up1 down1 ");
    cr_assert_eq(use(p, 1, 0), GN_OK);
    cr_assert_eq(use(p, 0, 0), GN_OK);
    cr_assert_str_eq(f.log, "up0 up1 down1 down0 up1 down1 up0 ");
    cr_assert_eq(gn_pages_flush(p), GN_OK);
    cr_assert_eq(*(int *)gn_pages_host(p, 0), 10);
    cr_assert_eq(*(int *)gn_pages_host(p, 1), 2);
    cr_assert_eq(gn_pages_discard(p, 3), GN_EINVAL);
    gn_pages_close(p);
}

/* Lent memory that holds other things before and after: pages come into it at once, work there, and
 * are back on the host before its owner writes to it again. */
Test(pages, lodge_in_memory_that_is_lent) {
    static fake f;
    enum { N = 7, SWEEPS = 3 };
    char lent[3 * PAGE + PAGE / 2];
    for (int budget = 0; budget <= N; budget += budget ? 3 : 1) {
        for (int places = 1; places <= 3; places++) {
            gn_pages *p = open_pages(&f, N, budget);
            for (int i = 0; i < SWEEPS; i++) {
                const size_t bytes = (size_t)places * PAGE + PAGE / 2;
                memset(lent, 0xee, sizeof lent);
                cr_assert_eq(gn_pages_lend(p, lent, bytes), GN_OK);
                sweep(p, N, places + budget > 1);
                cr_assert_eq(gn_pages_recall(p), GN_OK);
                for (int k = 0; k <= places; k++) { /* in stretches that are no pages */
                    char *from = lent + k * PAGE, *end = lent + bytes;
                    const size_t n = k < places ? PAGE + 1 : (size_t)(end - from);
                    cr_assert_eq(gn_pages_return(p, from, n), GN_OK);
                    memset(from, 0xee, n);
                }
                cr_assert_leq(f.most, (size_t)budget * PAGE);
            }
            expect_uses(p, N, SWEEPS);
            cr_assert_eq(gn_pages_read_stats(p).resident, f.allocated);
            for (size_t i = 0; i < sizeof lent; i++) cr_assert_eq((unsigned char)lent[i], 0xee);
            gn_pages_close(p);
            cr_assert_eq(f.allocated, 0);
        }
    }
}

Test(pages, lent_memory_is_filled_at_once_and_recalled_in_order) {
    static fake f;
    enum { N = 6 };
    char lent[2 * PAGE];
    void *memory;
    gn_pages *p = open_pages(&f, N, 2);
    sweep(p, N, 0);
    f.log[0] = 0;
    cr_assert_eq(gn_pages_lend(p, lent, sizeof lent), GN_OK);
    cr_assert_str_eq(f.log, "up1 up2 down5 up3 ", "0 and 5 are there, and 5 is needed last");
    f.log[0] = 0;
    cr_assert_eq(gn_pages_acquire(p, 2, &memory), GN_OK);
    cr_assert_eq(gn_pages_recall(p), GN_EINVAL, "a page in it is in use");
    cr_assert_eq(gn_pages_release(p, 2, true), GN_OK);
    cr_assert_eq(gn_pages_recall(p), GN_OK);
    cr_assert_str_eq(f.log, "down2 ", "1 has not changed");
    cr_assert_eq(gn_pages_return(p, lent, sizeof lent), GN_OK);
    cr_assert_eq(gn_pages_read_stats(p).resident, 2 * PAGE);
    gn_pages_close(p);
    p = open_pages(NULL, N, 0);
    cr_assert_eq(gn_pages_lend(p, lent, sizeof lent), GN_OK);
    cr_assert_eq(gn_pages_acquire(p, 0, &memory), GN_OK);
    cr_assert_eq(memory, gn_pages_host(p, 0), "without a device nothing is lent");
    cr_assert_eq(gn_pages_release(p, 0, false), GN_OK);
    cr_assert_eq(gn_pages_recall(p), GN_OK);
    cr_assert_eq(gn_pages_return(p, lent, sizeof lent), GN_OK);
    gn_pages_close(p);
}

/* The device has less memory than the budget says. */
Test(pages, make_do_with_the_memory_there_is) {
    static fake f;
    enum { N = 6 };
    gn_pages *p = open_pages(&f, N, N);
    void *memory;
    f.no_memory = true;
    cr_assert_eq(gn_pages_acquire(p, 0, &memory), GN_ENOMEM);
    f.no_memory = false;
    cr_assert_eq(gn_pages_prefetch(p, 0), GN_OK);
    cr_assert_eq(gn_pages_prefetch(p, 1), GN_OK);
    f.no_memory = true;
    sweep(p, N, 1);
    cr_assert_eq(f.allocated, 2 * PAGE);
    expect_uses(p, N, 1);
    gn_pages_close(p);
}

/* Every call of the device fails once; what was asked for is asked for again. */
Test(pages, failures_are_reported_and_lose_nothing) {
    static fake f;
    enum { N = 5, SWEEPS = 2 };
    int failures = 0;
    for (int failing = 1;; failing++) {
        gn_pages *p = open_pages(&f, N, 2);
        f.failing = failing;
        int seen = 0;
        for (int i = 0; i < N * SWEEPS; i++) {
            void *memory;
            const int page = i % N;
            for (gn_status status; (status = gn_pages_acquire(p, page, &memory)) != GN_OK; seen++)
                cr_assert(status == GN_EDEVICE || status == GN_ENOMEM);
            ++*(int *)memory;
            ((char *)memory)[PAGE - 1] = (char)page;
            seen += gn_pages_prefetch(p, (page + 1) % N) != GN_OK;
            seen += gn_pages_release(p, page, true) != GN_OK;
        }
        seen += gn_pages_flush(p) != GN_OK;
        cr_assert_leq(seen, 1);
        const bool over = f.calls < failing;
        f.failing = 0;
        expect_uses(p, N, SWEEPS);
        cr_assert_leq(f.most, 2 * PAGE);
        gn_pages_close(p);
        if (over) break;
        failures += seen;
    }
    cr_assert_gt(failures, 30);
}

Test(pages, refusals) {
    static fake f;
    gn_pages *p;
    void *memory;
    gn_error err = {0};
    cr_assert_eq(gn_pages_open(&p, NULL, 0, PAGE, 0, &err), GN_EINVAL);
    cr_assert_eq(gn_pages_open(&p, NULL, 3, 63, 0, &err), GN_EINVAL);
    cr_assert_eq(gn_pages_open(&p, NULL, 1 << 30, (size_t)1 << 62, 0, &err), GN_EINVAL);
    p = open_pages(&f, 3, 3);
    cr_assert_eq(gn_pages_acquire(p, 3, &memory), GN_EINVAL);
    cr_assert_eq(gn_pages_acquire(p, -1, &memory), GN_EINVAL);
    cr_assert_eq(gn_pages_prefetch(p, 3), GN_EINVAL);
    cr_assert_eq(gn_pages_release(p, 1, true), GN_EINVAL);
    cr_assert_eq(gn_pages_acquire(p, 1, &memory), GN_OK);
    cr_assert_eq(gn_pages_acquire(p, 1, &memory), GN_EINVAL);
    cr_assert_eq(gn_pages_release(p, 1, false), GN_OK);
    gn_pages_close(p);
}
