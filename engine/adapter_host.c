/* adapter_host.c - which adapters' weights are in memory, and a thread that reads the others.
 *
 * The lock is held for a look at the list and never while a file is read or memory is allocated or
 * freed, which for a GPU's uploads takes long: adapters of one size hand their memory on. */
#include "engine/adapter_host.h"

#include <pthread.h>
#include <stdlib.h>

#include "engine/adapter.h"
#include "engine/model.h"

struct gn_adapter_host {
    const gn_model *model;
    int64_t budget;
    pthread_t reader;
    pthread_mutex_t lock; /* of all below, and of the adapters' copies */
    pthread_cond_t wake;
    bool stopping;
    gn_adapter *adapters;
    int64_t bytes; /* taken */
    int64_t reads;
    uint64_t clock;
};

/* ---- room ---- */

/* Takes the memory of the least recently held adapter that nobody holds; NULL: there is none. With
 * the lock. */
static void *drop_oldest(gn_adapter_host *h, size_t *bytes) {
    gn_adapter *oldest = NULL;
    for (gn_adapter *a = h->adapters; a; a = a->copy.next)
        if (a->copy.state == GN_COPY_THERE && a->copy.holders == 0 &&
            (!oldest || a->copy.held < oldest->copy.held))
            oldest = a;
    if (!oldest) return NULL;
    void *memory = oldest->memory;
    *bytes = oldest->bytes;
    oldest->memory = NULL;
    oldest->copy.state = GN_COPY_ON_DISK;
    h->bytes -= (int64_t)oldest->bytes;
    return memory;
}

void *gn_adapter_host_take(gn_adapter_host *h, size_t bytes) {
    void *memory = NULL, *dropped;
    size_t n;
    pthread_mutex_lock(&h->lock);
    h->bytes += (int64_t)bytes;
    while (h->bytes > h->budget && (dropped = drop_oldest(h, &n))) {
        pthread_mutex_unlock(&h->lock);
        if (n == bytes && !memory)
            memory = dropped;
        else
            gn_ctx_free_host(h->model->ctx, dropped);
        pthread_mutex_lock(&h->lock);
    }
    pthread_mutex_unlock(&h->lock);
    if (!memory) memory = gn_ctx_alloc_host(h->model->ctx, bytes);
    if (!memory) gn_adapter_host_give(h, NULL, bytes);
    return memory;
}

void gn_adapter_host_give(gn_adapter_host *h, void *memory, size_t bytes) {
    pthread_mutex_lock(&h->lock);
    h->bytes -= (int64_t)bytes;
    pthread_mutex_unlock(&h->lock);
    gn_ctx_free_host(h->model->ctx, memory);
}

/* Frees what is too much since those who held it are done. With the lock. */
static bool trim(gn_adapter_host *h) {
    size_t bytes;
    void *dropped = h->bytes > h->budget ? drop_oldest(h, &bytes) : NULL;
    if (!dropped) return false;
    pthread_mutex_unlock(&h->lock);
    gn_ctx_free_host(h->model->ctx, dropped);
    pthread_mutex_lock(&h->lock);
    return true;
}

/* ---- reading ---- */

static gn_adapter *first_wanted(gn_adapter_host *h) {
    gn_adapter *first = NULL;
    for (gn_adapter *a = h->adapters; a; a = a->copy.next)
        if (a->copy.state == GN_COPY_WANTED && (!first || a->copy.held < first->copy.held))
            first = a;
    return first;
}

/* With the lock. Somebody holds the adapter, and so has a reference. */
static void read_back(gn_adapter_host *h, gn_adapter *adapter) {
    gn_host_copy *copy = &adapter->copy;
    gn_adapter *fresh = NULL;
    gn_error error = {0};
    gn_adapter_ref(adapter);
    copy->state = GN_COPY_COMING;
    h->reads++;
    pthread_mutex_unlock(&h->lock);
    const gn_status status = gn_adapter_read_again(&fresh, adapter, h->model, &error);
    pthread_mutex_lock(&h->lock);
    if (status) {
        copy->error = error;
        copy->state = copy->holders > 0 ? GN_COPY_LOST : GN_COPY_ON_DISK;
    } else {
        gn_lora_pair(*pairs)[GN_PROJ_COUNT] = adapter->pairs;
        adapter->pairs = fresh->pairs;
        fresh->pairs = pairs;
        adapter->memory = fresh->memory;
        fresh->memory = NULL;
        copy->state = GN_COPY_THERE;
    }
    pthread_mutex_unlock(&h->lock);
    gn_adapter_close(fresh);
    gn_adapter_close(adapter);
    pthread_mutex_lock(&h->lock);
}

static void *run(void *argument) {
    gn_adapter_host *h = argument;
    pthread_mutex_lock(&h->lock);
    while (!h->stopping) {
        gn_adapter *adapter = first_wanted(h);
        if (adapter)
            read_back(h, adapter);
        else if (!trim(h))
            pthread_cond_wait(&h->wake, &h->lock);
    }
    pthread_mutex_unlock(&h->lock);
    return NULL;
}

/* ---- open and close ---- */

static int64_t default_budget(void) {
    gn_ctx_memory memory;
    return gn_ctx_read_host_memory(&memory) ? INT64_MAX : memory.free / 2;
}

gn_status gn_adapter_host_open(gn_adapter_host **out, const gn_model *model, int64_t budget,
                               gn_error *err) {
    gn_adapter_host *h = calloc(1, sizeof *h);
    if (!h) return gn_fail(err, GN_ENOMEM, "out of memory");
    h->model = model;
    h->budget = budget > 0 ? budget : default_budget();
    pthread_mutex_init(&h->lock, NULL);
    pthread_cond_init(&h->wake, NULL);
    if (pthread_create(&h->reader, NULL, run, h) != 0) {
        free(h);
        return gn_fail(err, GN_ENOMEM, "cannot start a thread that reads adapters");
    }
    *out = h;
    return GN_OK;
}

void gn_adapter_host_close(gn_adapter_host *h) {
    if (!h) return;
    pthread_mutex_lock(&h->lock);
    h->stopping = true;
    pthread_cond_signal(&h->wake);
    pthread_mutex_unlock(&h->lock);
    pthread_join(h->reader, NULL);
    pthread_cond_destroy(&h->wake);
    pthread_mutex_destroy(&h->lock);
    free(h);
}

int64_t gn_adapter_host_budget(const gn_adapter_host *h) {
    return h->budget;
}

gn_adapter_host_stats gn_adapter_host_read_stats(gn_adapter_host *h) {
    pthread_mutex_lock(&h->lock);
    const gn_adapter_host_stats stats = {h->bytes, h->reads};
    pthread_mutex_unlock(&h->lock);
    return stats;
}

/* ---- adapters ---- */

void gn_adapter_host_add(gn_adapter_host *h, gn_adapter *adapter) {
    pthread_mutex_lock(&h->lock);
    adapter->copy = (gn_host_copy){.next = h->adapters, .held = ++h->clock};
    h->adapters = adapter;
    if (h->bytes > h->budget) pthread_cond_signal(&h->wake);
    pthread_mutex_unlock(&h->lock);
}

void gn_adapter_host_remove(gn_adapter_host *h, gn_adapter *adapter) {
    pthread_mutex_lock(&h->lock);
    gn_adapter **link = &h->adapters;
    while (*link && *link != adapter) link = &(*link)->copy.next;
    if (*link) *link = adapter->copy.next;
    pthread_mutex_unlock(&h->lock);
}

void gn_adapter_hold(gn_adapter *adapter) {
    gn_adapter_host *h = adapter->host;
    gn_host_copy *copy = &adapter->copy;
    if (!h) return;
    pthread_mutex_lock(&h->lock);
    copy->holders++;
    copy->held = ++h->clock;
    if (copy->state == GN_COPY_ON_DISK) {
        copy->state = GN_COPY_WANTED;
        pthread_cond_signal(&h->wake);
    }
    pthread_mutex_unlock(&h->lock);
}

void gn_adapter_release(gn_adapter *adapter) {
    gn_adapter_host *h = adapter->host;
    gn_host_copy *copy = &adapter->copy;
    if (!h) return;
    pthread_mutex_lock(&h->lock);
    if (--copy->holders == 0) {
        if (copy->state == GN_COPY_WANTED || copy->state == GN_COPY_LOST)
            copy->state = GN_COPY_ON_DISK;
        if (h->bytes > h->budget) pthread_cond_signal(&h->wake);
    }
    pthread_mutex_unlock(&h->lock);
}

gn_status gn_adapter_poll(gn_adapter *adapter, bool *ready, gn_error *err) {
    gn_adapter_host *h = adapter->host;
    const gn_host_copy *copy = &adapter->copy;
    gn_status status = GN_OK;
    *ready = true;
    if (!h) return GN_OK;
    pthread_mutex_lock(&h->lock);
    *ready = copy->state == GN_COPY_THERE;
    if (copy->state == GN_COPY_LOST)
        status = gn_fail(err, copy->error.status, "%s", copy->error.message);
    pthread_mutex_unlock(&h->lock);
    return status;
}
