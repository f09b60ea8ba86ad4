/* adapter_memory.c - which adapters are on the device, and who has to leave.
 *
 * An entry's memory holds the adapter's pairs and then a copy of its weights, which on the host are
 * one block already. The weights are uploaded beside the ops. The pairs, some KiB whose pointers
 * are known only here, are written in order with the ops; they are there before any op needs them.
 * An adapter used in place has an entry while it is used, which holds the host's copy. */
#include "engine/adapter_memory.h"

#include <stdlib.h>
#include <string.h>

#include "engine/memory_plan.h"

enum { ALIGNMENT = 256 };

typedef struct entry entry;
struct entry {
    entry *next;         /* in the order of `memory`, in the block */
    gn_adapter *adapter; /* a reference, so that its address stays its own */
    gn_lora_pair *pairs; /* (layers * GN_PROJ_COUNT), pointing into memory; NULL: used in place */
    char *memory;        /* on the device */
    int64_t bytes;
    bool waits;        /* for the host's copy */
    gn_upload *upload; /* NULL: it is there, or waits */
    int32_t users;
    uint64_t used; /* when it was last acquired */
};

struct gn_adapter_memory {
    gn_ctx *ctx;
    int64_t budget;
    char *block; /* (budget) */
    uint64_t clock;
    entry *entries;
};

gn_status gn_adapter_memory_open(gn_adapter_memory **out, gn_ctx *ctx, int64_t budget) {
    gn_adapter_memory *m = calloc(1, sizeof *m);
    if (!m) return GN_ENOMEM;
    m->ctx = ctx;
    m->budget = budget;
    m->block = budget > 0 ? gn_ctx_alloc(ctx, (size_t)budget) : NULL;
    if (budget > 0 && !m->block) {
        free(m);
        return GN_ENOMEM;
    }
    *out = m;
    return GN_OK;
}

static void drop(gn_adapter_memory *m, entry **link) {
    entry *e = *link;
    *link = e->next;
    const bool holds = e->waits || e->upload || !e->pairs;
    gn_upload_close(e->upload);
    if (holds) gn_adapter_release(e->adapter);
    if (!m->block) gn_ctx_free(m->ctx, e->memory);
    gn_adapter_close(e->adapter);
    free(e->pairs);
    free(e);
}

void gn_adapter_memory_close(gn_adapter_memory *m) {
    if (!m) return;
    while (m->entries) drop(m, &m->entries);
    gn_ctx_free(m->ctx, m->block);
    free(m);
}

static bool in_place(const gn_adapter_memory *m) {
    return m->budget == 0 && gn_ctx_is_host(m->ctx);
}

static entry *find(const gn_adapter_memory *m, const gn_adapter *adapter) {
    entry *e = m->entries;
    while (e && e->adapter != adapter) e = e->next;
    return e;
}

static int64_t aligned(int64_t bytes) {
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static size_t pairs_bytes(const gn_adapter *adapter) {
    return (size_t)adapter->layers * GN_PROJ_COUNT * sizeof(gn_lora_pair);
}

int64_t gn_adapter_memory_bytes(const gn_adapter *adapter) {
    return aligned((int64_t)pairs_bytes(adapter)) + aligned((int64_t)adapter->bytes);
}

/* 0: no limit. */
static int64_t limit(const gn_adapter_memory *m, const gn_adapter *adapter) {
    if (!in_place(m)) return m->budget;
    return adapter->host ? gn_adapter_host_budget(adapter->host) : 0;
}

static int64_t bytes_of(const gn_adapter_memory *m, const gn_adapter *adapter) {
    return in_place(m) ? (int64_t)adapter->bytes : gn_adapter_memory_bytes(adapter);
}

/* ---- room ---- */

/* Of those that nobody uses and that are not on their way. */
static bool drop_oldest(gn_adapter_memory *m) {
    entry **oldest = NULL;
    for (entry **link = &m->entries; *link; link = &(*link)->next)
        if ((*link)->users == 0 && !(*link)->upload && (!oldest || (*link)->used < (*oldest)->used))
            oldest = link;
    if (oldest) drop(m, oldest);
    return oldest != NULL;
}

/* The first hole of the block that is large enough; NULL: there is none. *link: what comes after.
 */
static char *find_hole(gn_adapter_memory *m, int64_t bytes, entry ***link) {
    char *at = m->block;
    for (*link = &m->entries; **link; *link = &(**link)->next) {
        if ((**link)->memory - at >= bytes) return at;
        at = (**link)->memory + (**link)->bytes;
    }
    return m->block + m->budget - at >= bytes ? at : NULL;
}

static gn_status allocate(gn_adapter_memory *m, int64_t bytes, char **memory, entry ***link) {
    for (;;) {
        *link = &m->entries;
        *memory = m->block ? find_hole(m, bytes, link) : gn_ctx_alloc(m->ctx, (size_t)bytes);
        if (*memory) return GN_OK;
        if (!drop_oldest(m)) return m->block ? GN_EBUSY : GN_ENOMEM;
    }
}

gn_status gn_adapter_memory_check(int64_t budget, const gn_adapter *adapter, gn_error *err) {
    const int64_t wanted = gn_adapter_memory_bytes(adapter);
    if (wanted <= budget) return GN_OK;
    return gn_fail(err, GN_ETOOBIG,
                   "%s: the adapter takes %.1f MiB, and the device's memory for adapters is %.1f "
                   "MiB",
                   adapter->dir, gn_mib(wanted), gn_mib(gn_max(budget, 0)));
}

/* Whether the n adapters fit beside what others use, so that nobody leaves in vain. */
static gn_status check_room(const gn_adapter_memory *m, const gn_adapter_use *uses, int32_t n,
                            gn_error *err) {
    const int64_t most = limit(m, uses[0].adapter);
    int64_t wanted = 0, taken = 0;
    if (most == 0) return GN_OK;
    for (int32_t i = 0; i < n; i++) {
        int32_t first = 0;
        while (uses[first].adapter != uses[i].adapter) first++;
        if (first == i) wanted += bytes_of(m, uses[i].adapter);
    }
    for (const entry *e = m->entries; e; e = e->next) {
        bool is_wanted = false;
        for (int32_t i = 0; i < n; i++) is_wanted |= uses[i].adapter == e->adapter;
        if (!is_wanted && (e->users > 0 || e->upload)) taken += e->bytes;
    }
    if (wanted > most)
        return gn_fail(err, GN_ETOOBIG,
                       "the request's adapters take %.1f MiB, and the memory for adapters is %.1f "
                       "MiB",
                       gn_mib(wanted), gn_mib(gn_max(most, 0)));
    return wanted + taken > most ? GN_EBUSY : GN_OK;
}

/* ---- copying ---- */

static void relocate(gn_tensor *t, const gn_adapter *from, char *to) {
    t->data = to + ((char *)t->data - (char *)from->memory);
}

static gn_status copy_adapter(gn_adapter_memory *m, entry *e) {
    const gn_adapter *adapter = e->adapter;
    const size_t bytes = pairs_bytes(adapter);
    char *weights = e->memory + aligned((int64_t)bytes);
    memcpy(e->pairs, adapter->pairs, bytes);
    for (int i = 0; i < adapter->layers * GN_PROJ_COUNT; i++) {
        if (e->pairs[i].rank == 0) continue;
        relocate(&e->pairs[i].a, adapter, weights);
        relocate(&e->pairs[i].b, adapter, weights);
    }
    const gn_status status = gn_ctx_write(m->ctx, e->memory, e->pairs, bytes);
    return status ? status
                  : gn_upload_begin(&e->upload, m->ctx, weights, adapter->memory, adapter->bytes);
}

/* Goes on as soon as the host has its weights. */
static gn_status poll_host(gn_adapter_memory *m, entry *e, gn_error *err) {
    bool there;
    gn_status status = gn_adapter_poll(e->adapter, &there, err);
    if (status || !there) return status;
    if (e->pairs) status = copy_adapter(m, e);
    if (status)
        return gn_fail(err, status, "cannot copy the adapter to the device: %s",
                       gn_status_text(status));
    e->waits = false;
    return GN_OK;
}

static gn_status allocate_entry(gn_adapter_memory *m, entry *e, entry ***link) {
    *link = &m->entries;
    if (in_place(m)) return GN_OK;
    e->pairs = malloc(pairs_bytes(e->adapter));
    const gn_status status = e->pairs ? allocate(m, e->bytes, &e->memory, link) : GN_ENOMEM;
    if (status) free(e->pairs);
    return status;
}

static gn_status add(gn_adapter_memory *m, gn_adapter *adapter, gn_error *err) {
    entry *e = calloc(1, sizeof *e), **link;
    if (!e) return gn_fail(err, GN_ENOMEM, "out of memory");
    *e = (entry){.adapter = adapter, .bytes = bytes_of(m, adapter), .waits = true};
    gn_status status = allocate_entry(m, e, &link);
    if (status) {
        free(e);
        return gn_fail(err, status, "no room for the adapter: %s", gn_status_text(status));
    }
    e->next = *link;
    *link = e;
    gn_adapter_ref(adapter);
    gn_adapter_hold(adapter);
    status = poll_host(m, e, err);
    if (status) drop(m, link);
    return status;
}

/* ---- use ---- */

/* Whether its upload is done, which then is forgotten. */
static gn_status poll_upload(entry *e, bool *ready) {
    const gn_status status = gn_upload_poll(e->upload, ready);
    if (status || !*ready) return status;
    gn_upload_close(e->upload);
    e->upload = NULL;
    gn_adapter_release(e->adapter);
    return GN_OK;
}

static gn_status poll_entry(gn_adapter_memory *m, entry *e, bool *ready, gn_error *err) {
    gn_status status = e->waits ? poll_host(m, e, err) : GN_OK;
    *ready = !e->waits && !e->upload;
    if (status || !e->upload) return status;
    status = poll_upload(e, ready);
    return status ? gn_fail(err, status, "the adapter did not reach the device: %s",
                            gn_status_text(status))
                  : GN_OK;
}

/* Uploads that nobody waits for any more: their adapters may leave when they are done. */
static gn_status poll_unused(gn_adapter_memory *m) {
    gn_status status = GN_OK;
    bool ready;
    for (entry *e = m->entries; e && !status; e = e->next)
        if (e->users == 0 && e->upload) status = poll_upload(e, &ready);
    return status;
}

static gn_status acquire(gn_adapter_memory *m, gn_adapter *adapter, gn_error *err) {
    const gn_status status = find(m, adapter) ? GN_OK : add(m, adapter, err);
    if (status) return status;
    entry *e = find(m, adapter);
    e->users++;
    e->used = ++m->clock;
    return GN_OK;
}

gn_status gn_adapter_memory_acquire(gn_adapter_memory *m, const gn_adapter_use *uses, int32_t n,
                                    gn_error *err) {
    if (n == 0) return GN_OK;
    gn_status status = poll_unused(m);
    if (status) return gn_fail(err, status, "an upload failed: %s", gn_status_text(status));
    status = check_room(m, uses, n, err);
    for (int32_t i = 0; i < n && !status; i++) {
        status = acquire(m, uses[i].adapter, err);
        if (status) gn_adapter_memory_release(m, uses, i);
    }
    return status;
}

/* What nobody waits for or uses in place any more is not kept. */
static void release(gn_adapter_memory *m, const gn_adapter *adapter) {
    entry **link = &m->entries;
    while (*link && (*link)->adapter != adapter) link = &(*link)->next;
    entry *e = *link;
    if (e && --e->users == 0 && (e->waits || !e->pairs)) drop(m, link);
}

void gn_adapter_memory_release(gn_adapter_memory *m, const gn_adapter_use *uses, int32_t n) {
    for (int32_t i = 0; i < n; i++) release(m, uses[i].adapter);
}

bool gn_adapter_memory_holds(const gn_adapter_memory *m, const gn_adapter_use *uses, int32_t n) {
    bool holds = true;
    for (int32_t i = 0; i < n; i++) holds &= find(m, uses[i].adapter) != NULL;
    return holds;
}

gn_status gn_adapter_memory_poll(gn_adapter_memory *m, const gn_adapter_use *uses, int32_t n,
                                 bool *ready, gn_error *err) {
    *ready = true;
    for (int32_t i = 0; i < n && *ready; i++) {
        const gn_status status = poll_entry(m, find(m, uses[i].adapter), ready, err);
        if (status) return status;
    }
    return GN_OK;
}

void gn_adapter_memory_find(const gn_adapter_memory *m, const gn_adapter *adapter,
                            const gn_lora_pair **pairs, const gn_lora_pair **placed) {
    const entry *e = find(m, adapter);
    *pairs = e && e->pairs ? e->pairs : adapter->pairs[0];
    *placed = e && e->pairs ? (const gn_lora_pair *)e->memory : adapter->pairs[0];
}
