/* hash.h - 128-bit content hashes, for cache keys. Not for use against adversaries. */
#ifndef GN_HASH_H
#define GN_HASH_H

#include <stddef.h>
#include <stdint.h>

typedef struct gn_hash {
    uint64_t h[2];
} gn_hash;

#define GN_HASH_INIT                                                                               \
    {                                                                                              \
        { 0x243f6a8885a308d3u, 0x13198a2e03707344u }                                               \
    } /* digits of pi */

/* Mixes bytes into the hash; the same bytes cut differently give different hashes. */
void gn_hash_add(gn_hash *hash, const void *data, size_t bytes);

#endif
