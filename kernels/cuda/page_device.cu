/* page_device.cu - pages in pinned host memory, copied on two streams of their own, one a
 * direction, so that what leaves and what comes share the bus.
 *
 * Events order them: a slot's `copied` is behind its last copy and `used` behind the last ops on
 * it; every copy of the slot waits for both. An upload also waits for the last download of the same
 * host memory, from whichever slot. That slot may have downloaded another page since, and forgotten
 * the first; but that page came by an upload that waited for the first download, and uploads run
 * in order. */
#include "../page_device.h"

#include <stdlib.h>

#include "cuda.h"

struct slot {
    cudaEvent_t copied, used;
    const void *downloaded; /* to this host memory, last; or NULL */
};

struct cuda_pages {
    gn_page_device device;
    gn_ctx *ctx;
    cudaStream_t up, down;
    struct slot *slots;
    int n;
};

static struct cuda_pages *pages_of(void *user) {
    return (struct cuda_pages *)user;
}

/* ---- memory ---- */

static gn_status wait(void *user) {
    struct cuda_pages *p = pages_of(user);
    const gn_status status = gn_cuda_status(cudaStreamSynchronize(p->up));
    const gn_status other = gn_cuda_status(cudaStreamSynchronize(p->down));
    return status ? status : other;
}

static void *alloc_host(void *user, size_t bytes) {
    (void)user;
    void *memory = NULL;
    if (cudaHostAlloc(&memory, bytes, cudaHostAllocDefault) == cudaSuccess) return memory;
    (void)cudaGetLastError();
    return NULL;
}

static void free_host(void *user, void *memory) {
    (void)wait(user);
    (void)cudaFreeHost(memory);
}

static void *alloc(void *user, size_t bytes) {
    return gn_ctx_alloc(pages_of(user)->ctx, bytes);
}

static void free_device(void *user, void *memory) {
    (void)wait(user);
    gn_ctx_free(pages_of(user)->ctx, memory);
}

/* ---- copies ---- */

static gn_status make_slot(struct slot *slot) {
    *slot = {};
    cudaError_t error = cudaEventCreateWithFlags(&slot->copied, cudaEventDisableTiming);
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(&slot->used, cudaEventDisableTiming);
    return gn_cuda_status(error);
}

static gn_status make_slots(struct cuda_pages *p, int n) {
    if (n <= p->n) return GN_OK;
    struct slot *grown = (struct slot *)realloc(p->slots, (size_t)n * sizeof *grown);
    if (!grown) return GN_ENOMEM;
    p->slots = grown;
    while (p->n < n) {
        const gn_status status = make_slot(&p->slots[p->n++]);
        if (status) return status;
    }
    return GN_OK;
}

/* The stream's next copy is of this slot. An event that was never recorded is no wait. */
static gn_status follow(const struct slot *slot, cudaStream_t stream) {
    const cudaError_t error = cudaStreamWaitEvent(stream, slot->used, 0);
    return gn_cuda_status(error ? error : cudaStreamWaitEvent(stream, slot->copied, 0));
}

static gn_status copy(struct slot *slot, cudaStream_t stream, void *to, const void *from,
                      size_t bytes, cudaMemcpyKind kind) {
    const gn_status status = follow(slot, stream);
    if (status) return status;
    const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, stream);
    return gn_cuda_status(error ? error : cudaEventRecord(slot->copied, stream));
}

static gn_status upload(void *user, int slot, void *device, const void *host, size_t bytes) {
    struct cuda_pages *p = pages_of(user);
    gn_status status = make_slots(p, slot + 1);
    for (int i = 0; i < p->n && !status; i++) {
        if (p->slots[i].downloaded != host) continue;
        status = gn_cuda_status(cudaStreamWaitEvent(p->up, p->slots[i].copied, 0));
        p->slots[i].downloaded = NULL;
    }
    return status ? status
                  : copy(&p->slots[slot], p->up, device, host, bytes, cudaMemcpyHostToDevice);
}

static gn_status download(void *user, int slot, void *host, const void *device, size_t bytes) {
    struct cuda_pages *p = pages_of(user);
    gn_status status = make_slots(p, slot + 1);
    if (!status)
        status = copy(&p->slots[slot], p->down, host, device, bytes, cudaMemcpyDeviceToHost);
    if (!status) p->slots[slot].downloaded = host;
    return status;
}

static gn_status begin_use(void *user, int slot) {
    struct cuda_pages *p = pages_of(user);
    const gn_status status = make_slots(p, slot + 1);
    return status ? status
                  : gn_cuda_status(
                        cudaStreamWaitEvent(gn_cuda_stream(p->ctx), p->slots[slot].copied, 0));
}

static gn_status end_use(void *user, int slot) {
    struct cuda_pages *p = pages_of(user);
    const gn_status status = make_slots(p, slot + 1);
    return status ? status
                  : gn_cuda_status(cudaEventRecord(p->slots[slot].used, gn_cuda_stream(p->ctx)));
}

/* ---- open and close ---- */

static void close_pages(gn_page_device *device) {
    struct cuda_pages *p = pages_of(device->user);
    for (int i = 0; i < p->n; i++) {
        if (p->slots[i].copied) (void)cudaEventDestroy(p->slots[i].copied);
        if (p->slots[i].used) (void)cudaEventDestroy(p->slots[i].used);
    }
    if (p->up) (void)cudaStreamDestroy(p->up);
    if (p->down) (void)cudaStreamDestroy(p->down);
    free(p->slots);
    free(p);
}

gn_status gn_cuda_page_device_open(gn_page_device **out, gn_ctx *ctx) {
    struct cuda_pages *p = (struct cuda_pages *)calloc(1, sizeof *p);
    if (!p) return GN_ENOMEM;
    p->ctx = ctx;
    p->device = {p,        alloc_host, free_host, alloc, free_device, upload,
                 download, begin_use,  end_use,   wait,  close_pages};
    cudaError_t error = cudaSetDevice(ctx->cuda->device);
    if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&p->up, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&p->down, cudaStreamNonBlocking);
    if (error != cudaSuccess) {
        close_pages(&p->device);
        return gn_cuda_status(error);
    }
    *out = &p->device;
    return GN_OK;
}
