/* test_hash.c - content hashes: the same bytes agree, anything else differs. */
#include <criterion/criterion.h>

#include <stdlib.h>
#include <string.h>

#include "engine/hash.h"

static gn_hash hash_of(const void *data, size_t bytes) {
    gn_hash hash = GN_HASH_INIT;
    gn_hash_add(&hash, data, bytes);
    return hash;
}

static bool equal(gn_hash a, gn_hash b) {
    return memcmp(&a, &b, sizeof a) == 0;
}

Test(hash, depends_on_bytes_only) {
    unsigned char data[67], moved[80];
    for (size_t i = 0; i < sizeof data; i++) data[i] = (unsigned char)(i * 37);
    memcpy(moved + 3, data, sizeof data);
    for (size_t n = 0; n <= sizeof data; n++)
        cr_assert(equal(hash_of(data, n), hash_of(moved + 3, n)), "%zu bytes", n);
}

Test(hash, every_bit_counts) {
    unsigned char data[67] = {0};
    for (size_t n = 1; n <= sizeof data; n++) {
        const gn_hash before = hash_of(data, n);
        for (size_t bit = 0; bit < 8 * n; bit++) {
            data[bit / 8] ^= (unsigned char)(1 << bit % 8);
            const gn_hash after = hash_of(data, n);
            data[bit / 8] ^= (unsigned char)(1 << bit % 8);
            cr_assert_neq(before.h[0], after.h[0], "bit %zu of %zu bytes", bit, n);
            cr_assert_neq(before.h[1], after.h[1], "bit %zu of %zu bytes", bit, n);
        }
    }
}

Test(hash, lengths_and_cuts_count) {
    const unsigned char zeros[64] = {0};
    gn_hash whole[65];
    for (size_t n = 0; n <= 64; n++) {
        whole[n] = hash_of(zeros, n);
        for (size_t i = 0; i < n; i++) cr_assert(!equal(whole[i], whole[n]), "%zu and %zu", i, n);
    }
    for (size_t cut = 0; cut <= 64; cut++) {
        gn_hash two = hash_of(zeros, cut);
        gn_hash_add(&two, zeros, 64 - cut);
        cr_assert(!equal(two, whole[64]), "cut at %zu", cut);
    }
}

Test(hash, order_counts) {
    gn_hash ab = GN_HASH_INIT, ba = GN_HASH_INIT;
    gn_hash_add(&ab, "first part", 10);
    gn_hash_add(&ab, "another one", 11);
    gn_hash_add(&ba, "another one", 11);
    gn_hash_add(&ba, "first part", 10);
    cr_assert(!equal(ab, ba));
}

static int by_value(const void *a, const void *b) {
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* 200,000 counters: in 64 good bits the chance of one collision is 1e-9, in each lane alone. */
Test(hash, lanes_do_not_collide) {
    enum { N = 200000 };
    uint64_t *lanes[2] = {malloc(N * sizeof(uint64_t)), malloc(N * sizeof(uint64_t))};
    cr_assert(lanes[0] && lanes[1]);
    for (uint64_t i = 0; i < N; i++) {
        const gn_hash hash = hash_of(&i, sizeof i);
        lanes[0][i] = hash.h[0];
        lanes[1][i] = hash.h[1];
    }
    for (int lane = 0; lane < 2; lane++) {
        qsort(lanes[lane], N, sizeof(uint64_t), by_value);
        for (int i = 1; i < N; i++)
            cr_assert_neq(lanes[lane][i - 1], lanes[lane][i], "lane %d", lane);
        free(lanes[lane]);
    }
}
