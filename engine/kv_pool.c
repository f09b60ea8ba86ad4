/* kv_pool.c - block ownership and the prefix cache.
 *
 * Blocks that nobody uses form one list in order of last use: take pops its head, drop appends to
 * its tail, and a match pulls a block out of its middle. Blocks that hold nothing known go to the
 * head, so cached content is forgotten last. Published blocks hang in a chained hash table whose
 * links, like the list's, are block numbers inside the same array: nothing is allocated later. */
#include "engine/kv_pool.h"

#include <stdlib.h>
#include <string.h>

enum { NONE = -1 };

typedef struct block {
    int32_t uses;
    int32_t previous, next; /* in the list of unused blocks */
    int32_t chain;          /* next in its hash bucket */
    bool published;
    uint64_t parent, serial;
    int32_t tokens[GN_KV_BLOCK_TOKENS];
} block;

struct gn_kv_pool {
    bool cache;
    int32_t size, free, cached;
    int32_t head, tail; /* unused blocks, next to be taken first */
    uint64_t last_serial;
    uint32_t bucket_mask;
    int32_t *buckets;
    block *blocks;
};

static void list_remove(gn_kv_pool *p, int32_t i) {
    block *b = &p->blocks[i];
    *(b->previous == NONE ? &p->head : &p->blocks[b->previous].next) = b->next;
    *(b->next == NONE ? &p->tail : &p->blocks[b->next].previous) = b->previous;
    p->free--;
    if (b->published) p->cached--;
}

static void list_insert(gn_kv_pool *p, int32_t i) {
    block *b = &p->blocks[i];
    const bool at_tail = b->published;
    b->previous = at_tail ? p->tail : NONE;
    b->next = at_tail ? NONE : p->head;
    *(b->previous == NONE ? &p->head : &p->blocks[b->previous].next) = i;
    *(b->next == NONE ? &p->tail : &p->blocks[b->next].previous) = i;
    p->free++;
    if (b->published) p->cached++;
}

static int32_t *bucket_of(gn_kv_pool *p, uint64_t parent, const int32_t *tokens) {
    gn_hash hash = GN_HASH_INIT;
    gn_hash_add(&hash, &parent, sizeof parent);
    gn_hash_add(&hash, tokens, GN_KV_BLOCK_TOKENS * sizeof *tokens);
    return &p->buckets[hash.h[0] & p->bucket_mask];
}

static int32_t find(gn_kv_pool *p, uint64_t parent, const int32_t *tokens) {
    for (int32_t i = *bucket_of(p, parent, tokens); i != NONE; i = p->blocks[i].chain) {
        const block *b = &p->blocks[i];
        if (b->parent == parent && memcmp(b->tokens, tokens, sizeof b->tokens) == 0) return i;
    }
    return NONE;
}

static void forget(gn_kv_pool *p, int32_t i) {
    block *b = &p->blocks[i];
    int32_t *link = bucket_of(p, b->parent, b->tokens);
    while (*link != i) link = &p->blocks[*link].chain;
    *link = b->chain;
    b->published = false;
}

gn_status gn_kv_pool_open(gn_kv_pool **out, int32_t blocks, bool cache) {
    gn_kv_pool *p = calloc(1, sizeof *p);
    if (!p) return GN_ENOMEM;
    uint32_t buckets = 16;
    while (buckets < 2 * (uint32_t)blocks) buckets *= 2;
    p->cache = cache;
    p->size = blocks;
    p->head = p->tail = NONE;
    p->bucket_mask = buckets - 1;
    p->buckets = malloc(buckets * sizeof *p->buckets);
    p->blocks = calloc((size_t)blocks, sizeof *p->blocks);
    if (!p->buckets || !p->blocks) {
        gn_kv_pool_close(p);
        return GN_ENOMEM;
    }
    for (uint32_t i = 0; i < buckets; i++) p->buckets[i] = NONE;
    for (int32_t i = blocks - 1; i >= 0; i--) list_insert(p, i);
    *out = p;
    return GN_OK;
}

void gn_kv_pool_close(gn_kv_pool *p) {
    if (!p) return;
    free(p->buckets);
    free(p->blocks);
    free(p);
}

int32_t gn_kv_pool_take(gn_kv_pool *p) {
    const int32_t i = p->head;
    if (i == NONE) return -1;
    list_remove(p, i);
    if (p->blocks[i].published) forget(p, i);
    p->blocks[i].uses = 1;
    return i;
}

void gn_kv_pool_drop(gn_kv_pool *p, int32_t i) {
    if (--p->blocks[i].uses == 0) list_insert(p, i);
}

uint64_t gn_kv_pool_root(const gn_hash *adapters) {
    /* The top bit keeps roots apart from the serials of blocks, which count from one. */
    return (adapters->h[0] ^ adapters->h[1]) | (uint64_t)1 << 63;
}

int32_t gn_kv_pool_match(gn_kv_pool *p, uint64_t parent, const int32_t *tokens, uint64_t *serial) {
    const int32_t i = find(p, parent, tokens);
    if (i == NONE) return -1;
    if (p->blocks[i].uses++ == 0) list_remove(p, i);
    *serial = p->blocks[i].serial;
    return i;
}

uint64_t gn_kv_pool_publish(gn_kv_pool *p, int32_t i, uint64_t parent, const int32_t *tokens) {
    if (!p->cache) return 0;
    const int32_t equal = find(p, parent, tokens);
    if (equal != NONE) return p->blocks[equal].serial;
    block *b = &p->blocks[i];
    int32_t *bucket = bucket_of(p, parent, tokens);
    memcpy(b->tokens, tokens, sizeof b->tokens);
    b->parent = parent;
    b->serial = ++p->last_serial;
    b->published = true;
    b->chain = *bucket;
    *bucket = i;
    return b->serial;
}

int32_t gn_kv_pool_free(const gn_kv_pool *p) {
    return p->free;
}
int32_t gn_kv_pool_cached(const gn_kv_pool *p) {
    return p->cached;
}
int32_t gn_kv_pool_size(const gn_kv_pool *p) {
    return p->size;
}
