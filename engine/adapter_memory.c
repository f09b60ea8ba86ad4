/* adapter_memory.c - which adapters are on the device, and who has to leave. */
#include "engine/adapter_memory.h"

#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 256 };

typedef struct entry {
    struct entry *next;
    gn_adapter *adapter; /* a reference, so that its address stays its own */
    gn_lora_pair *pairs; /* (layers * GN_PROJ_COUNT), pointing into memory */
    char *memory;        /* on the device: the pairs, then the matrices */
    int64_t bytes;
    int32_t users;
    uint64_t used; /* when it was last acquired */
} entry;

struct gn_adapter_memory {
    gn_ctx *ctx;
    int64_t budget, bytes;
    uint64_t clock;
    entry *entries;
};

gn_status gn_adapter_memory_open(gn_adapter_memory **out, gn_ctx *ctx, int64_t budget) {
    gn_adapter_memory *m = calloc(1, sizeof *m);
    if (!m) return GN_ENOMEM;
    m->ctx = ctx;
    m->budget = budget;
    *out = m;
    return GN_OK;
}

static void drop(gn_adapter_memory *m, entry **link) {
    entry *e = *link;
    *link = e->next;
    m->bytes -= e->bytes;
    gn_ctx_free(m->ctx, e->memory);
    gn_adapter_close(e->adapter);
    free(e->pairs);
    free(e);
}

void gn_adapter_memory_close(gn_adapter_memory *m) {
    if (!m) return;
    while (m->entries) drop(m, &m->entries);
    free(m);
}

static entry *find(gn_adapter_memory *m, const gn_adapter *adapter) {
    entry *e = m->entries;
    while (e && e->adapter != adapter) e = e->next;
    return e;
}

/* ---- copying ---- */

static int64_t aligned(int64_t bytes) {
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static int n_pairs(const gn_adapter *adapter) {
    return adapter->layers * GN_PROJ_COUNT;
}

/* LoRA multiplies in the compute dtype on a device, so its matrices are kept in it. */
static int64_t matrix_bytes(const gn_adapter_memory *m, const gn_tensor *t) {
    return aligned(gn_tensor_numel(t) * (int64_t)gn_dtype_size(gn_ctx_compute(m->ctx)));
}

static int64_t bytes_of(const gn_adapter_memory *m, const gn_adapter *adapter) {
    int64_t bytes = aligned(n_pairs(adapter) * (int64_t)sizeof(gn_lora_pair));
    for (int i = 0; i < n_pairs(adapter); i++) {
        const gn_lora_pair *pair = &adapter->pairs[0][i];
        if (pair->rank) bytes += matrix_bytes(m, &pair->a) + matrix_bytes(m, &pair->b);
    }
    return bytes;
}

/* *t becomes its copy at `at`, which moves past it. scratch: two floats for each of its values. */
static gn_status copy_matrix(gn_adapter_memory *m, gn_tensor *t, char **at, float *scratch) {
    const gn_dtype dtype = gn_ctx_compute(m->ctx);
    const int64_t n = gn_tensor_numel(t);
    const void *values = t->data;
    if (t->dtype != dtype) {
        gn_widen(scratch, t->data, t->dtype, n);
        gn_narrow(scratch + n, dtype, scratch, n);
        values = scratch + n;
    }
    const gn_status status = gn_ctx_write(m->ctx, *at, values, (size_t)n * gn_dtype_size(dtype));
    t->data = *at;
    t->dtype = dtype;
    *at += aligned(n * (int64_t)gn_dtype_size(dtype));
    return status;
}

static int64_t largest_matrix(const gn_adapter *adapter) {
    int64_t largest = 0;
    for (int i = 0; i < n_pairs(adapter); i++) {
        const gn_lora_pair *pair = &adapter->pairs[0][i];
        if (pair->rank && gn_tensor_numel(&pair->a) > largest) largest = gn_tensor_numel(&pair->a);
        if (pair->rank && gn_tensor_numel(&pair->b) > largest) largest = gn_tensor_numel(&pair->b);
    }
    return largest;
}

static gn_status copy_adapter(gn_adapter_memory *m, entry *e) {
    const int n = n_pairs(e->adapter);
    float *scratch = malloc(2 * (size_t)largest_matrix(e->adapter) * sizeof *scratch);
    if (!scratch) return GN_ENOMEM;
    memcpy(e->pairs, e->adapter->pairs, (size_t)n * sizeof *e->pairs);
    char *at = e->memory + aligned(n * (int64_t)sizeof *e->pairs);
    gn_status status = GN_OK;
    for (int i = 0; i < n && !status; i++) {
        if (e->pairs[i].rank == 0) continue;
        status = copy_matrix(m, &e->pairs[i].a, &at, scratch);
        if (!status) status = copy_matrix(m, &e->pairs[i].b, &at, scratch);
    }
    free(scratch);
    return status ? status
                  : gn_ctx_write(m->ctx, e->memory, e->pairs, (size_t)n * sizeof *e->pairs);
}

/* ---- room ---- */

static bool drop_oldest(gn_adapter_memory *m) {
    entry **oldest = NULL;
    for (entry **link = &m->entries; *link; link = &(*link)->next)
        if ((*link)->users == 0 && (!oldest || (*link)->used < (*oldest)->used)) oldest = link;
    if (oldest) drop(m, oldest);
    return oldest != NULL;
}

/* A budget smaller than one adapter still lets one in, alone. */
static gn_status make_room(gn_adapter_memory *m, int64_t bytes) {
    while (m->budget > 0 && m->entries && m->bytes + bytes > m->budget)
        if (!drop_oldest(m)) return GN_EBUSY;
    return GN_OK;
}

/* Others leave when the device itself is full. */
static char *allocate(gn_adapter_memory *m, int64_t bytes) {
    for (;;) {
        char *memory = gn_ctx_alloc(m->ctx, (size_t)bytes);
        if (memory || !drop_oldest(m)) return memory;
    }
}

static gn_status add(gn_adapter_memory *m, gn_adapter *adapter) {
    const int64_t bytes = bytes_of(m, adapter);
    gn_status status = make_room(m, bytes);
    if (status) return status;
    entry *e = calloc(1, sizeof *e);
    if (!e) return GN_ENOMEM;
    *e = (entry){.adapter = gn_adapter_ref(adapter), .bytes = bytes};
    e->memory = allocate(m, bytes);
    e->pairs = malloc((size_t)n_pairs(adapter) * sizeof *e->pairs);
    status = e->memory && e->pairs ? copy_adapter(m, e) : GN_ENOMEM;
    e->next = m->entries;
    m->entries = e;
    m->bytes += bytes;
    if (status) drop(m, &m->entries);
    return status;
}

gn_status gn_adapter_memory_acquire(gn_adapter_memory *m, gn_adapter *adapter) {
    if (gn_ctx_is_host(m->ctx)) return GN_OK;
    if (!find(m, adapter)) {
        const gn_status status = add(m, adapter);
        if (status) return status;
    }
    entry *e = find(m, adapter);
    e->users++;
    e->used = ++m->clock;
    return GN_OK;
}

void gn_adapter_memory_release(gn_adapter_memory *m, const gn_adapter *adapter) {
    entry *e = find(m, adapter);
    if (e) e->users--;
}

void gn_adapter_memory_find(gn_adapter_memory *m, const gn_adapter *adapter,
                            const gn_lora_pair **pairs, const gn_lora_pair **placed) {
    const entry *e = find(m, adapter);
    *pairs = e ? e->pairs : adapter->pairs[0];
    *placed = e ? (const gn_lora_pair *)e->memory : adapter->pairs[0];
}
