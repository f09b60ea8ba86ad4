/* The schedule alone: sequences without a model, "computed" by pretending. */
#include "engine/schedule.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

/* With a pool of its own. */
static void open_schedule(gn_schedule *s, int32_t blocks, bool prefix_cache, int32_t max_seqs,
                          int32_t max_rows, int32_t prefill_chunk) {
    gn_kv_pool *pool;
    cr_assert_eq(gn_kv_pool_open(&pool, blocks, prefix_cache), GN_OK);
    cr_assert_eq(gn_schedule_open(s, pool, max_seqs, max_rows, prefill_chunk), GN_OK);
}

static void close_schedule(gn_schedule *s) {
    gn_kv_pool *pool = s->pool;
    gn_schedule_close(s);
    gn_kv_pool_close(pool);
}

static gn_sequence *sequence(uint64_t id, int32_t n_prompt, int32_t max_tokens, int32_t first) {
    gn_sequence *s = calloc(1, sizeof *s);
    const size_t capacity = (size_t)(n_prompt + max_tokens);
    s->id = id;
    s->n_prompt = s->n_tokens = n_prompt;
    s->max_tokens = max_tokens;
    s->tokens = malloc(capacity * sizeof *s->tokens);
    s->blocks = malloc((capacity / GN_KV_BLOCK_TOKENS + 1) * sizeof *s->blocks);
    for (int32_t i = 0; i < n_prompt; i++) s->tokens[i] = first + i;
    return s;
}

static void discard(gn_sequence *s) {
    free(s->tokens);
    free(s->blocks);
    free(s);
}

/* Plans and "runs" one step; ends what is complete. Returns the rows computed. */
static int32_t run_step(gn_schedule *s, int32_t *n_done) {
    gn_schedule_plan(s, true);
    int32_t rows = 0;
    for (int32_t i = 0; i < s->n_planned; i++) {
        gn_sequence *q = s->planned[i];
        cr_assert_gt(q->rows, 0);
        cr_assert_leq(q->computed + q->rows, q->n_blocks * GN_KV_BLOCK_TOKENS);
        rows += q->rows;
        const bool complete = q->rows == gn_sequence_pending(q);
        gn_schedule_advance(s, q);
        if (!complete) continue;
        q->tokens[q->n_tokens++] = 5;
        if (q->n_tokens - q->n_prompt < q->max_tokens) continue;
        gn_schedule_remove(s, q);
        discard(q);
        ++*n_done;
    }
    cr_assert_leq(rows, s->max_rows);
    return rows;
}

Test(schedule, prefills_in_chunks_and_leaves_room_for_replies) {
    gn_schedule s;
    int32_t done = 0;
    open_schedule(&s, 100, true, 4, 128, 16);
    gn_schedule_add(&s, sequence(1, 10, 100, 0));
    cr_assert_eq(run_step(&s, &done), 10);
    gn_schedule_add(&s, sequence(2, 300, 2, 1000));
    gn_schedule_plan(&s, true);
    cr_assert_eq(s.n_planned, 2);
    for (int i = 0; i < 2; i++) cr_assert_eq(s.planned[i]->rows, s.planned[i]->id == 1 ? 1 : 16);
    while (run_step(&s, &done) > 0) {
    }
    cr_assert_eq(done, 2);
    close_schedule(&s);
}

/* Prompts that come together take whole steps as long as no reply is under way, then a chunk of
 * each step, whoever it is of. */
Test(schedule, prompts_take_all_rows_until_somebody_generates) {
    gn_schedule s;
    int32_t done = 0;
    open_schedule(&s, 100, false, 8, 128, 64);
    for (int i = 0; i < 6; i++) gn_schedule_add(&s, sequence((uint64_t)i + 1, 50, 20, 1000 * i));
    cr_assert_eq(run_step(&s, &done), 128, "two prompts, and 28 tokens of the third");
    cr_assert_eq(run_step(&s, &done), 2 + 64, "the rest of it, and 42 tokens of the fourth");
    cr_assert_eq(run_step(&s, &done), 3 + 64);
    cr_assert_eq(run_step(&s, &done), 5 + 44, "what is left");
    cr_assert_eq(run_step(&s, &done), 6);
    while (run_step(&s, &done) > 0) {
    }
    cr_assert_eq(done, 6);
    close_schedule(&s);
}

Test(schedule, shares_a_known_prefix_but_computes_the_last_token) {
    gn_schedule s;
    int32_t done = 0;
    open_schedule(&s, 100, true, 4, 256, 16);
    gn_schedule_add(&s, sequence(1, 64, 1, 0));
    cr_assert_eq(run_step(&s, &done), 64);
    gn_schedule_add(&s, sequence(2, 64, 1, 0));
    cr_assert_eq(run_step(&s, &done), 16, "three blocks of four are known, the last is computed");
    gn_sequence *other = sequence(3, 64, 1, 0);
    other->adapters.h[0] = 1;
    gn_schedule_add(&s, other);
    cr_assert_eq(run_step(&s, &done), 64, "another adapter shares nothing");
    cr_assert_eq(done, 3);
    close_schedule(&s);
}

Test(schedule, admits_first_come_first_served) {
    gn_schedule s;
    int32_t done = 0;
    open_schedule(&s, 8, true, 4, 256, 16);
    gn_schedule_add(&s, sequence(1, 60, 20, 0));
    gn_schedule_add(&s, sequence(2, 100, 4, 500)); /* does not fit beside the first */
    gn_schedule_add(&s, sequence(3, 4, 4, 900));   /* would, but came later */
    run_step(&s, &done);
    cr_assert_eq(s.n_running, 1);
    cr_assert_eq(s.waiting->id, 2);
    while (run_step(&s, &done) > 0) {
    }
    cr_assert_eq(done, 3);
    close_schedule(&s);
}

/* Many sequences in far too few blocks: all end, and nothing is left in use. */
Test(schedule, preempts_and_still_finishes_everything) {
    enum { SEQUENCES = 300, BLOCKS = 24 };
    srand(3);
    for (int cache = 0; cache < 2; cache++) {
        gn_schedule s;
        int32_t done = 0, added = 0, steps = 0;
        open_schedule(&s, BLOCKS, cache, 16, 64, 16);
        while (done < SEQUENCES) {
            while (added < SEQUENCES && rand() % 2) {
                const int32_t prompt = 1 + rand() % 200, reply = 1 + rand() % 150;
                gn_sequence *q = sequence((uint64_t)++added, prompt, reply, rand() % 3);
                q->adapters.h[0] = (uint64_t)(rand() % 3);
                gn_schedule_add(&s, q);
            }
            const int32_t rows = run_step(&s, &done);
            cr_assert(rows > 0 || (s.n_running == 0 && !s.waiting), "work stands still");
            cr_assert_lt(++steps, 200000);
            if (rand() % 50 == 0 && s.n_running > 0) { /* a client goes away */
                gn_sequence *q = s.running[rand() % s.n_running];
                gn_schedule_remove(&s, q);
                discard(q);
                done++;
            }
        }
        cr_assert_eq(gn_kv_pool_free(s.pool), BLOCKS);
        close_schedule(&s);
    }
}

/* While tokens are on their way nobody can be computed again: such a plan comes out empty, and the
 * next one, with the tokens there, finds everything as it was. */
Test(schedule, plans_ahead_of_tokens_unless_it_must_preempt) {
    gn_schedule s;
    int32_t done = 0;
    open_schedule(&s, 4, false, 4, 128, 16);
    gn_schedule_add(&s, sequence(1, 31, 20, 0));
    gn_schedule_add(&s, sequence(2, 30, 10, 500));
    gn_schedule_plan(&s, true);
    cr_assert_eq(s.n_planned, 2);
    for (int i = 0; i < 2; i++) {
        gn_schedule_advance(&s, s.planned[i]);
        s.planned[i]->drawn = 1;
        cr_assert_eq(gn_sequence_pending(s.planned[i]), 1);
    }
    gn_schedule_plan(&s, false);
    cr_assert_eq(s.n_planned, 2, "both have room in their last blocks");
    for (int i = 0; i < 2; i++) {
        gn_schedule_advance(&s, s.running[i]);
        s.running[i]->tokens[s.running[i]->n_tokens++] = 5;
    }
    gn_schedule_plan(&s, false);
    cr_assert_eq(s.n_planned, 0, "the first needs a block of the second's");
    cr_assert_eq(s.n_running, 2);
    for (int i = 0; i < 2; i++) {
        s.running[i]->tokens[s.running[i]->n_tokens++] = 5;
        s.running[i]->drawn = 0;
    }
    cr_assert_gt(run_step(&s, &done), 0);
    cr_assert_eq(s.n_running, 1);
    cr_assert_eq(s.waiting->id, 2);
    while (run_step(&s, &done) > 0) {
    }
    cr_assert_eq(done, 2);
    cr_assert_eq(gn_kv_pool_free(s.pool), 4);
    close_schedule(&s);
}

/* A sequence whose last token is on its way is not planned. */
Test(schedule, what_is_complete_but_for_its_token_waits) {
    gn_schedule s;
    int32_t done = 0;
    open_schedule(&s, 4, true, 4, 128, 16);
    gn_schedule_add(&s, sequence(1, 20, 1, 0));
    gn_schedule_plan(&s, true);
    gn_sequence *q = s.planned[0];
    gn_schedule_advance(&s, q);
    cr_assert_eq(gn_sequence_pending(q), 0);
    gn_schedule_plan(&s, false);
    cr_assert_eq(s.n_planned, 0);
    cr_assert_eq(run_step(&s, &done), 0);
    gn_schedule_remove(&s, q);
    discard(q);
    cr_assert_eq(gn_kv_pool_free(s.pool), 4);
    close_schedule(&s);
}

/* ---- adapters ---- */

/* Room for `capacity` adapters of one size; a sequence uses adapters.h[0], and an adapter takes
 * `polls` calls to come. */
enum { ADAPTERS = 8 };
typedef struct fake_room {
    int capacity, polls;
    int users[ADAPTERS], wait[ADAPTERS];
    bool here[ADAPTERS];
} fake_room;

static int taken(fake_room *r) {
    int n = 0;
    for (int i = 0; i < ADAPTERS; i++) n += r->here[i];
    return n;
}

static void make_room(fake_room *r) {
    for (int i = 0; i < ADAPTERS && taken(r) >= r->capacity; i++)
        if (r->users[i] == 0) r->here[i] = false;
}

static gn_fetch fake_fetch(void *user, gn_sequence *q, bool may_take) {
    fake_room *r = user;
    const int a = (int)q->adapters.h[0];
    if (!q->acquired) {
        if (!r->here[a]) {
            if (!may_take) return GN_FETCH_FULL;
            make_room(r);
            if (taken(r) >= r->capacity) return GN_FETCH_FULL;
            r->here[a] = true;
            r->wait[a] = r->polls;
        }
        r->users[a]++;
        q->acquired = true;
    }
    return r->wait[a]-- > 0 ? GN_FETCH_COMING : GN_FETCH_READY;
}

static gn_sequence *with_adapter(uint64_t id, int32_t n_prompt, int32_t max_tokens, int adapter) {
    gn_sequence *q = sequence(id, n_prompt, max_tokens, (int32_t)(id % 400));
    q->n_uses = 1;
    q->adapters.h[0] = (uint64_t)adapter;
    return q;
}

/* A step in which everything planned computes all its rows and draws a token; notes who began. */
static void run_fetching(gn_schedule *s, fake_room *r, int32_t *n_done, uint64_t *began) {
    gn_schedule_plan(s, true);
    for (int32_t i = 0; i < s->n_planned; i++) {
        gn_sequence *q = s->planned[i];
        cr_assert(q->n_uses == 0 || q->acquired);
        if (q->computed == 0) began[q->id] = 1;
        gn_schedule_advance(s, q);
        if (gn_sequence_pending(q) > 0) continue;
        q->tokens[q->n_tokens++] = 5;
        if (q->n_tokens - q->n_prompt < q->max_tokens) continue;
        gn_schedule_remove(s, q);
        if (q->acquired) r->users[q->adapters.h[0]]--;
        discard(q);
        ++*n_done;
    }
}

Test(schedule, an_adapter_on_its_way_holds_nobody_up) {
    gn_schedule s;
    fake_room room = {.capacity = 1, .polls = 3};
    uint64_t began[8] = {0};
    int32_t done = 0;
    open_schedule(&s, 100, true, 4, 128, 16);
    s.fetch = fake_fetch;
    s.user = &room;
    gn_schedule_add(&s, with_adapter(1, 10, 2, 0));
    gn_schedule_add(&s, sequence(2, 10, 20, 1000));
    gn_schedule_add(&s, with_adapter(3, 10, 2, 1)); /* no room while the first has it */
    gn_schedule_add(&s, sequence(4, 10, 20, 2000));
    run_fetching(&s, &room, &done, began);
    cr_assert(!began[1] && began[2] && !began[3] && began[4], "those without adapters begin");
    run_fetching(&s, &room, &done, began);
    run_fetching(&s, &room, &done, began);
    cr_assert(!began[1]);
    run_fetching(&s, &room, &done, began);
    cr_assert(began[1] && !began[3], "it is there at the fourth call");
    run_fetching(&s, &room, &done, began);
    cr_assert_eq(done, 1);
    for (int i = 0; i < 4; i++) run_fetching(&s, &room, &done, began);
    cr_assert(began[3]);
    while (s.n_running > 0) run_fetching(&s, &room, &done, began);
    cr_assert_eq(done, 4);
    cr_assert_null(s.waiting);
    close_schedule(&s);
}

/* When every slot is taken, adapters of those who are next come meanwhile: of no more than can run
 * at once, and none that there is no room for. */
Test(schedule, adapters_of_the_next_come_while_slots_are_full) {
    gn_schedule s;
    fake_room room = {.capacity = 4, .polls = 3};
    uint64_t began[8] = {0};
    int32_t done = 0;
    open_schedule(&s, 100, true, 2, 128, 16);
    s.fetch = fake_fetch;
    s.user = &room;
    for (int i = 0; i < 2; i++) gn_schedule_add(&s, sequence((uint64_t)i + 1, 10, 6, 1000 * i));
    for (int i = 0; i < 4; i++) gn_schedule_add(&s, with_adapter((uint64_t)i + 3, 10, 2, i));
    for (int i = 0; i < 6; i++) {
        run_fetching(&s, &room, &done, began);
        cr_assert(room.here[0] && room.here[1] && !room.here[2] && !room.here[3]);
    }
    cr_assert_eq(done, 2);
    cr_assert(!began[3] && !began[4]);
    run_fetching(&s, &room, &done, began);
    cr_assert(began[3] && began[4], "without a step of waiting");
    cr_assert(room.here[2] && room.here[3]);
    while (s.n_running > 0 || s.waiting) run_fetching(&s, &room, &done, began);
    cr_assert_eq(done, 6);
    close_schedule(&s);
}

/* Requests for one adapter come without end and keep it in use; one for another gets its turn, and
 * some of them pass it meanwhile. */
Test(schedule, nobody_waits_forever_for_room) {
    enum { MAX_SEQS = 4, STEPS = 200 };
    gn_schedule s;
    fake_room room = {.capacity = 1};
    uint64_t began[STEPS + 10] = {0}, id = 0;
    int32_t done = 0;
    open_schedule(&s, 100, true, MAX_SEQS, 128, 16);
    s.fetch = fake_fetch;
    s.user = &room;
    for (int i = 0; i < 2; i++) gn_schedule_add(&s, with_adapter(++id, 5, 6, 0));
    run_fetching(&s, &room, &done, began);
    gn_schedule_add(&s, with_adapter(++id, 5, 3, 1));
    const uint64_t other = id;
    int step = 0, passed = 0;
    for (; step < STEPS && !began[other]; step++) {
        gn_schedule_add(&s, with_adapter(++id, 5, 6, 0));
        run_fetching(&s, &room, &done, began);
    }
    for (uint64_t i = other + 1; i <= id; i++) passed += began[i] != 0;
    cr_assert(began[other], "it waits after %d steps", step);
    cr_assert(passed >= 1 && passed <= MAX_SEQS, "%d passed it", passed);
    while (s.n_running > 0 || s.waiting) run_fetching(&s, &room, &done, began);
    cr_assert_eq((uint64_t)done, id);
    close_schedule(&s);
}

/* Everything ends, whatever the order: adapters, room, preemption, cancellation. */
Test(schedule, adapters_come_and_go_until_all_is_done) {
    enum { SEQUENCES = 300, BLOCKS = 24 };
    srand(5);
    for (int capacity = 1; capacity <= 3; capacity++) {
        gn_schedule s;
        fake_room room = {.capacity = capacity, .polls = 2};
        uint64_t began[SEQUENCES + 1] = {0};
        int32_t done = 0, added = 0, steps = 0;
        open_schedule(&s, BLOCKS, true, 8, 64, 16);
        s.fetch = fake_fetch;
        s.user = &room;
        while (done < SEQUENCES) {
            while (added < SEQUENCES && rand() % 2) {
                const int32_t prompt = 1 + rand() % 200, reply = 1 + rand() % 150;
                const int adapter = rand() % (ADAPTERS + 1);
                gn_schedule_add(&s, adapter == ADAPTERS
                                        ? sequence((uint64_t)++added, prompt, reply, rand() % 3)
                                        : with_adapter((uint64_t)++added, prompt, reply, adapter));
            }
            run_fetching(&s, &room, &done, began);
            cr_assert_lt(++steps, 200000);
            gn_sequence *q = rand() % 2 && s.n_running > 0 ? s.running[0] : s.waiting;
            if (rand() % 50 != 0 || !q) continue; /* a client goes away */
            gn_schedule_remove(&s, q);
            if (q->acquired) room.users[q->adapters.h[0]]--;
            discard(q);
            done++;
        }
        for (int i = 0; i < ADAPTERS; i++) cr_assert_eq(room.users[i], 0);
        cr_assert_eq(gn_kv_pool_free(s.pool), BLOCKS);
        close_schedule(&s);
    }
}
