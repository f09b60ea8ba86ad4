/* Block ownership, exact prefix matches, and the order in which cached blocks are forgotten. */
#include "engine/kv_pool.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

enum { B = GN_KV_BLOCK_TOKENS };

static void fill(int32_t *tokens, int32_t first) {
    for (int i = 0; i < B; i++) tokens[i] = first + i;
}

static uint64_t root_of(const char *adapters) {
    gn_hash hash = GN_HASH_INIT;
    gn_hash_add(&hash, adapters, strlen(adapters));
    return gn_kv_pool_root(&hash);
}

Test(kv_pool, takes_every_block_once) {
    gn_kv_pool *p;
    cr_assert_eq(gn_kv_pool_open(&p, 5, true), GN_OK);
    bool seen[5] = {false};
    for (int i = 0; i < 5; i++) {
        const int32_t b = gn_kv_pool_take(p);
        cr_assert(b >= 0 && b < 5 && !seen[b]);
        seen[b] = true;
    }
    cr_assert_eq(gn_kv_pool_take(p), -1);
    cr_assert_eq(gn_kv_pool_free(p), 0);
    gn_kv_pool_drop(p, 3);
    cr_assert_eq(gn_kv_pool_take(p), 3);
    gn_kv_pool_close(p);
}

Test(kv_pool, matches_only_the_same_tokens_after_the_same_parent) {
    gn_kv_pool *p;
    int32_t one[B], two[B];
    uint64_t serial = 0;
    fill(one, 100);
    fill(two, 200);
    cr_assert_eq(gn_kv_pool_open(&p, 8, true), GN_OK);
    const uint64_t base = root_of(""), pirate = root_of("pirate");
    const int32_t a = gn_kv_pool_take(p), b = gn_kv_pool_take(p);
    const uint64_t after_a = gn_kv_pool_publish(p, a, base, one);
    const uint64_t after_b = gn_kv_pool_publish(p, b, after_a, two);

    cr_assert_eq(gn_kv_pool_match(p, base, one, &serial), a);
    cr_assert_eq(serial, after_a);
    cr_assert_eq(gn_kv_pool_match(p, after_a, two, &serial), b);
    cr_assert_eq(serial, after_b);
    cr_assert_eq(gn_kv_pool_match(p, base, two, &serial), -1, "another place in the sequence");
    cr_assert_eq(gn_kv_pool_match(p, pirate, one, &serial), -1, "other adapters");
    two[B - 1]++;
    cr_assert_eq(gn_kv_pool_match(p, after_a, two, &serial), -1, "another token");

    const int32_t copy = gn_kv_pool_take(p);
    cr_assert_eq(gn_kv_pool_publish(p, copy, base, one), after_a,
                 "an equal block is known already");
    gn_kv_pool_close(p);
}

Test(kv_pool, forgets_least_recently_used_ends_first) {
    gn_kv_pool *p;
    int32_t tokens[3][B];
    uint64_t parent = root_of(""), serial;
    int32_t blocks[3];
    cr_assert_eq(gn_kv_pool_open(&p, 3, true), GN_OK);
    for (int i = 0; i < 3; i++) {
        fill(tokens[i], 1000 * i);
        blocks[i] = gn_kv_pool_take(p);
        parent = gn_kv_pool_publish(p, blocks[i], parent, tokens[i]);
    }
    for (int i = 2; i >= 0; i--) gn_kv_pool_drop(p, blocks[i]);
    cr_assert_eq(gn_kv_pool_free(p), 3);
    cr_assert_eq(gn_kv_pool_cached(p), 3);

    cr_assert_eq(gn_kv_pool_take(p), blocks[2], "the end of the sequence goes first");
    cr_assert_eq(gn_kv_pool_match(p, root_of(""), tokens[0], &serial), blocks[0]);
    cr_assert_eq(gn_kv_pool_match(p, serial, tokens[1], &serial), blocks[1]);
    cr_assert_eq(gn_kv_pool_match(p, serial, tokens[2], &serial), -1);
    cr_assert_eq(gn_kv_pool_cached(p), 0);
    cr_assert_eq(gn_kv_pool_take(p), -1, "blocks in use are never taken");
    gn_kv_pool_close(p);
}

Test(kv_pool, publishes_nothing_when_switched_off) {
    gn_kv_pool *p;
    int32_t tokens[B];
    uint64_t serial;
    fill(tokens, 7);
    cr_assert_eq(gn_kv_pool_open(&p, 2, false), GN_OK);
    gn_kv_pool_publish(p, gn_kv_pool_take(p), root_of(""), tokens);
    cr_assert_eq(gn_kv_pool_match(p, root_of(""), tokens, &serial), -1);
    gn_kv_pool_close(p);
}

/* Random use against a simple model of it: the pool never hands out a block in use, counts add
 * up, and a match is always a block whose recorded content is what was asked for. */
Test(kv_pool, random_use_keeps_its_promises) {
    enum { N = 40 };
    gn_kv_pool *p;
    int uses[N] = {0};
    int32_t content[N];
    uint64_t serials[N] = {0};
    cr_assert_eq(gn_kv_pool_open(&p, N, true), GN_OK);
    srand(7);
    for (int i = 0; i < N; i++) content[i] = -1;
    for (int round = 0; round < 200000; round++) {
        const int32_t what = rand() % 3, which = rand() % N;
        int32_t tokens[B];
        if (what == 0) {
            const int32_t b = gn_kv_pool_take(p);
            int unused = 0;
            for (int i = 0; i < N; i++) unused += uses[i] == 0;
            cr_assert_eq(b < 0, unused == 0);
            if (b < 0) continue;
            cr_assert_eq(uses[b], 0);
            uses[b] = 1;
            content[b] = rand() % 20;
            fill(tokens, content[b]);
            serials[b] = gn_kv_pool_publish(p, b, root_of(""), tokens);
        } else if (what == 1 && uses[which] > 0) {
            uses[which]--;
            gn_kv_pool_drop(p, which);
        } else if (what == 2) {
            uint64_t serial = 0;
            fill(tokens, which % 20);
            const int32_t b = gn_kv_pool_match(p, root_of(""), tokens, &serial);
            if (b < 0) continue;
            cr_assert_eq(content[b], which % 20);
            cr_assert_eq(serial, serials[b]);
            uses[b]++;
        }
        int free_blocks = 0;
        for (int i = 0; i < N; i++) free_blocks += uses[i] == 0;
        cr_assert_eq(gn_kv_pool_free(p), free_blocks);
    }
    gn_kv_pool_close(p);
}
