/* pages.c - residency: which pages have a place on the device, and which one to take away. */
#include "trainer/pages.h"

#include <stdlib.h>
#include <string.h>

typedef struct page {
    int slot;    /* -1: only on the host */
    bool dirty;  /* the device's copy is newer */
    bool empty;  /* holds nothing that is needed */
    bool in_use; /* between acquire and release */
} page;

/* A place on the device. */
typedef struct slot {
    char *memory; /* NULL: there is none */
    bool lent;    /* memory of somebody else */
    bool taken;   /* by a page */
    bool recalled;
} slot;

struct gn_pages {
    const gn_page_device *device; /* NULL: pages are used where they are */
    int n;
    size_t page_bytes, budget;
    char *host;
    page *pages;
    slot *slots; /* (n) */
    int last;    /* acquired last */
    gn_page_stats stats;
};

static bool is_page(const gn_pages *p, int i) {
    return i >= 0 && i < p->n;
}

void *gn_pages_host(gn_pages *p, int i) {
    return p->host + (size_t)i * p->page_bytes;
}

size_t gn_pages_page_bytes(const gn_pages *p) {
    return p->page_bytes;
}

gn_page_stats gn_pages_read_stats(const gn_pages *p) {
    return p->stats;
}

gn_status gn_pages_open(gn_pages **out, const gn_page_device *device, int n, size_t page_bytes,
                        size_t budget, gn_error *err) {
    *out = NULL;
    size_t bytes;
    if (n < 1 || page_bytes < 1 || page_bytes % 64 != 0 ||
        __builtin_mul_overflow((size_t)n, page_bytes, &bytes) || bytes > PTRDIFF_MAX)
        return gn_fail(err, GN_EINVAL, "%d pages of %zu bytes", n, page_bytes);
    gn_pages *p = calloc(1, sizeof *p);
    if (p) {
        *p = (gn_pages){.device = device, .n = n, .page_bytes = page_bytes, .budget = budget};
        p->last = n - 1;
        p->pages = calloc((size_t)n, sizeof *p->pages);
        p->slots = calloc((size_t)n, sizeof *p->slots);
        p->host = device ? device->alloc_host(device->user, bytes) : aligned_alloc(64, bytes);
    }
    if (!p || !p->pages || !p->slots || !p->host) {
        gn_pages_close(p);
        return gn_fail(err, GN_ENOMEM, "no memory for %zu bytes of pages", bytes);
    }
    for (int i = 0; i < n; i++) p->pages[i].slot = -1;
    memset(p->host, 0, bytes);
    *out = p;
    return GN_OK;
}

void gn_pages_close(gn_pages *p) {
    if (!p) return;
    for (int s = 0; p->slots && s < p->n; s++)
        if (p->slots[s].memory && !p->slots[s].lent)
            p->device->free(p->device->user, p->slots[s].memory);
    if (p->device && p->host)
        p->device->free_host(p->device->user, p->host);
    else
        free(p->host);
    free(p->slots);
    free(p->pages);
    free(p);
}

/* ---- leaving the device ---- */

static gn_status write_back(gn_pages *p, int i) {
    page *page = &p->pages[i];
    if (!page->dirty) return GN_OK;
    const gn_status status = p->device->download(p->device->user, page->slot, gn_pages_host(p, i),
                                                 p->slots[page->slot].memory, p->page_bytes);
    if (status) return status;
    page->dirty = false;
    p->stats.downloaded += (int64_t)p->page_bytes;
    return GN_OK;
}

/* How many pages are used before page i is again. */
static int distance(const gn_pages *p, int i) {
    return (i - p->last - 1 + p->n) % p->n;
}

static bool is_lent(const gn_pages *p, int page) {
    return p->pages[page].slot >= 0 && p->slots[p->pages[page].slot].lent;
}

/* The resident page that is needed last, less those in use; -1: there is none. */
static int farthest(const gn_pages *p, bool or_lent) {
    int found = -1;
    for (int i = 0; i < p->n; i++) {
        if (p->pages[i].slot < 0 || p->pages[i].in_use || (!or_lent && is_lent(p, i))) continue;
        if (found < 0 || distance(p, i) > distance(p, found)) found = i;
    }
    return found;
}

/* The page's slot keeps its memory, for the page that comes next. */
static gn_status evict(gn_pages *p, int i, int *slot) {
    const gn_status status = write_back(p, i);
    if (status) return status;
    *slot = p->pages[i].slot;
    p->pages[i].slot = -1;
    p->stats.evictions++;
    return GN_OK;
}

static void free_slot(gn_pages *p, int i) {
    slot *slot = &p->slots[i];
    slot->taken = false;
    if (slot->lent) return;
    p->device->free(p->device->user, slot->memory);
    slot->memory = NULL;
    p->stats.resident -= p->page_bytes;
}

static gn_status shrink(gn_pages *p) {
    while (p->stats.resident > p->budget) {
        int slot;
        const int victim = farthest(p, false);
        if (victim < 0) return GN_OK;
        const gn_status status = evict(p, victim, &slot);
        if (status) return status;
        free_slot(p, slot);
    }
    return GN_OK;
}

/* ---- coming to the device ---- */

static int free_place(const gn_pages *p) {
    int i = 0;
    while (i < p->n && p->slots[i].memory) i++;
    return i < p->n ? i : -1;
}

/* A lent place that no page has; -1: there is none. */
static int lent_slot(const gn_pages *p) {
    for (int i = 0; i < p->n; i++) {
        const slot *slot = &p->slots[i];
        if (slot->lent && !slot->taken && !slot->recalled) return i;
    }
    return -1;
}

/* A new place within the budget; -1: there is none. */
static int own_slot(gn_pages *p) {
    if (p->stats.resident > p->budget || p->page_bytes > p->budget - p->stats.resident) return -1;
    const int i = free_place(p);
    if (i < 0) return -1;
    p->slots[i].memory = p->device->alloc(p->device->user, p->page_bytes);
    if (!p->slots[i].memory) return -1;
    p->stats.resident += p->page_bytes;
    if (p->stats.resident > p->stats.peak) p->stats.peak = p->stats.resident;
    return i;
}

static int new_slot(gn_pages *p) {
    int i = own_slot(p);
    if (i < 0) i = lent_slot(p);
    if (i >= 0) p->slots[i].taken = true;
    return i;
}

/* A place for page i, made by an eviction if need be; for a hint only of a page needed later. */
static gn_status find_slot(gn_pages *p, int i, bool hint, int *slot) {
    *slot = new_slot(p);
    if (*slot >= 0) return GN_OK;
    const int victim = farthest(p, true);
    if (victim < 0 || (p->page_bytes > p->budget && !is_lent(p, victim))) return GN_ENOMEM;
    if (hint && distance(p, victim) <= distance(p, i)) return GN_ENOMEM;
    return evict(p, victim, slot);
}

static gn_status bring(gn_pages *p, int i, bool hint) {
    int slot;
    gn_status status = find_slot(p, i, hint, &slot);
    if (status) return hint && status == GN_ENOMEM ? GN_OK : status;
    if (!p->pages[i].empty) {
        status = p->device->upload(p->device->user, slot, p->slots[slot].memory,
                                   gn_pages_host(p, i), p->page_bytes);
        if (status) {
            free_slot(p, slot);
            return status;
        }
        p->stats.uploaded += (int64_t)p->page_bytes;
    }
    p->pages[i].slot = slot;
    return GN_OK;
}

gn_status gn_pages_prefetch(gn_pages *p, int i) {
    if (!is_page(p, i)) return GN_EINVAL;
    return p->device && p->pages[i].slot < 0 ? bring(p, i, true) : GN_OK;
}

gn_status gn_pages_acquire(gn_pages *p, int i, void **memory) {
    if (!is_page(p, i) || p->pages[i].in_use) return GN_EINVAL;
    page *page = &p->pages[i];
    *memory = gn_pages_host(p, i);
    if (p->device) {
        gn_status status = GN_OK;
        if (page->slot < 0) {
            status = bring(p, i, false);
            p->stats.misses++;
        }
        if (!status) status = p->device->begin_use(p->device->user, page->slot);
        if (status) return status;
        *memory = p->slots[page->slot].memory;
    }
    page->in_use = true;
    page->empty = false;
    p->last = i;
    return GN_OK;
}

gn_status gn_pages_release(gn_pages *p, int i, bool written) {
    if (!is_page(p, i) || !p->pages[i].in_use) return GN_EINVAL;
    page *page = &p->pages[i];
    page->in_use = false;
    if (!p->device) return GN_OK;
    page->dirty |= written;
    const gn_status status = p->device->end_use(p->device->user, page->slot);
    return status ? status : shrink(p);
}

gn_status gn_pages_discard(gn_pages *p, int i) {
    if (!is_page(p, i) || p->pages[i].in_use) return GN_EINVAL;
    p->pages[i].empty = true;
    p->pages[i].dirty = false;
    return GN_OK;
}

gn_status gn_pages_set_budget(gn_pages *p, size_t budget) {
    p->budget = budget;
    return p->device ? shrink(p) : GN_OK;
}

/* ---- lent memory ---- */

/* Whether a page would have no place if the budget were used up. */
static bool needs_lent(const gn_pages *p) {
    size_t places = p->budget / p->page_bytes;
    for (int i = 0; i < p->n; i++) places += p->slots[i].lent;
    return places < (size_t)p->n;
}

gn_status gn_pages_lend(gn_pages *p, void *memory, size_t bytes) {
    if (!p->device) return GN_OK;
    for (size_t at = 0; bytes - at >= p->page_bytes && needs_lent(p); at += p->page_bytes) {
        const int i = free_place(p);
        if (i < 0) break;
        const gn_status status = p->device->end_use(p->device->user, i);
        if (status) return status;
        p->slots[i] = (slot){.memory = (char *)memory + at, .lent = true};
    }
    for (int i = 1; i <= p->n; i++) {
        const int next = (p->last + i) % p->n;
        const gn_status status = gn_pages_prefetch(p, next);
        if (status || p->pages[next].slot < 0) return status; /* it is full */
    }
    return GN_OK;
}

/* The page in a place; -1: none. */
static int page_in(const gn_pages *p, int slot) {
    int i = 0;
    while (i < p->n && p->pages[i].slot != slot) i++;
    return i < p->n ? i : -1;
}

/* The lent place, not yet recalled, of the lowest address; -1: none. */
static int lowest_lent(const gn_pages *p) {
    int found = -1;
    for (int i = 0; i < p->n; i++) {
        const slot *slot = &p->slots[i];
        if (slot->lent && !slot->recalled && (found < 0 || slot->memory < p->slots[found].memory))
            found = i;
    }
    return found;
}

/* In the order of addresses, in which they are returned, too. */
gn_status gn_pages_recall(gn_pages *p) {
    for (int i; (i = lowest_lent(p)) >= 0;) {
        const int page = page_in(p, i);
        int slot;
        if (page >= 0 && p->pages[page].in_use) return GN_EINVAL;
        const gn_status status = page >= 0 ? evict(p, page, &slot) : GN_OK;
        if (status) return status;
        p->slots[i].taken = false;
        p->slots[i].recalled = true;
    }
    return GN_OK;
}

gn_status gn_pages_return(gn_pages *p, const void *memory, size_t bytes) {
    const char *first = memory;
    for (int i = 0; i < p->n; i++) {
        slot *slot = &p->slots[i];
        if (!slot->recalled || slot->memory >= first + bytes ||
            slot->memory + p->page_bytes <= first)
            continue;
        const gn_status status = p->device->begin_use(p->device->user, i);
        if (status) return status;
        *slot = (struct slot){0};
    }
    return GN_OK;
}

gn_status gn_pages_flush(gn_pages *p) {
    if (!p->device) return GN_OK;
    for (int i = 0; i < p->n; i++) {
        const gn_status status = p->pages[i].in_use ? GN_EINVAL : write_back(p, i);
        if (status) return status;
    }
    return p->device->wait(p->device->user);
}
