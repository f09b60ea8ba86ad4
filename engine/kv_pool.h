/* kv_pool.h - who owns which block of the paged KV cache, and which blocks can be reused.
 *
 * A block holds the keys and values of GN_KV_BLOCK_TOKENS consecutive tokens, in every layer. A
 * full block whose content is known by (everything before it, its tokens) may be published;
 * later sequences with the same beginning share it. "Everything before it" is a serial number:
 * of the previous published block, or of the adapter set a sequence starts with. Tokens are
 * compared, not just hashed, so that a hit is exact; adapter sets are known by a hash of their
 * contents and scales, never by name. A block nobody uses stays cached until it is
 * needed, least recently used first. */
#ifndef GN_KV_POOL_H
#define GN_KV_POOL_H

#include "engine/forward.h"
#include "engine/hash.h"

typedef struct gn_kv_pool gn_kv_pool;

/* With `cache` false nothing is ever published. */
GN_CHECKED gn_status gn_kv_pool_open(gn_kv_pool **out, int32_t blocks, bool cache);
void gn_kv_pool_close(gn_kv_pool *p);

/* A block for the caller alone, or -1 when all are in use. */
int32_t gn_kv_pool_take(gn_kv_pool *p);
/* Gives one use of a block back. Give a sequence's blocks back last to first, so that ends of
 * sequences are forgotten before their beginnings. */
void gn_kv_pool_drop(gn_kv_pool *p, int32_t block);

/* The serial that a sequence with these adapters starts from. */
uint64_t gn_kv_pool_root(const gn_hash *adapters);

/* The published block that follows `parent` with these GN_KV_BLOCK_TOKENS tokens, with one more
 * use for the caller, or -1. *serial is that block's. */
int32_t gn_kv_pool_match(gn_kv_pool *p, uint64_t parent, const int32_t *tokens, uint64_t *serial);

/* Makes a full block, in use by the caller, known. Returns the serial its successors follow:
 * its own, or that of an equal block published before. */
uint64_t gn_kv_pool_publish(gn_kv_pool *p, int32_t block, uint64_t parent, const int32_t *tokens);

int32_t gn_kv_pool_free(const gn_kv_pool *p); /* blocks that take can give, cached ones included */
int32_t gn_kv_pool_cached(const gn_kv_pool *p); /* unused blocks with known content */
int32_t gn_kv_pool_size(const gn_kv_pool *p);

#endif
