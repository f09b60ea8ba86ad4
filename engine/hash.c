/* hash.c - multiply-and-fold mixing (as in wyhash) over two lanes with different constants. */
#include "engine/hash.h"

#include <string.h>

static uint64_t fold(uint64_t a, uint64_t b) {
    const unsigned __int128 p = (unsigned __int128)a * b;
    return (uint64_t)p ^ (uint64_t)(p >> 64);
}

static void mix(gn_hash *hash, uint64_t a, uint64_t b) {
    hash->h[0] = fold(hash->h[0] ^ a ^ 0xa0761d6478bd642fu, b ^ 0xe7037ed1a0b428dbu);
    hash->h[1] = fold(hash->h[1] ^ b ^ 0x8ebc6af09c88c6e3u, a ^ 0x589965cc75374cc3u);
}

void gn_hash_add(gn_hash *hash, const void *data, size_t bytes) {
    const unsigned char *p = data;
    const size_t total = bytes;
    uint64_t word[2];
    for (; bytes >= sizeof word; p += sizeof word, bytes -= sizeof word) {
        memcpy(word, p, sizeof word);
        mix(hash, word[0], word[1]);
    }
    word[0] = word[1] = 0;
    if (bytes) memcpy(word, p, bytes);
    mix(hash, word[0], word[1]);
    mix(hash, total, ~(uint64_t)total);
}
