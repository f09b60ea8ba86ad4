/* schedule.c - admission, chunked prefill, preemption. */
#include "engine/schedule.h"

#include <stdlib.h>
#include <string.h>

gn_status gn_schedule_open(gn_schedule *s, gn_kv_pool *pool, int32_t max_seqs, int32_t max_rows,
                           int32_t prefill_chunk) {
    *s = (gn_schedule){
        .max_seqs = max_seqs, .max_rows = max_rows, .prefill_chunk = prefill_chunk, .pool = pool};
    s->running = calloc((size_t)max_seqs, sizeof(gn_sequence *));
    s->planned = calloc((size_t)max_seqs, sizeof(gn_sequence *));
    if (s->running && s->planned) return GN_OK;
    gn_schedule_close(s);
    return GN_ENOMEM;
}

void gn_schedule_close(gn_schedule *s) {
    free(s->running);
    free(s->planned);
    s->running = s->planned = NULL;
}

static void give_blocks_back(gn_schedule *s, gn_sequence *q) {
    while (q->n_blocks > 0) gn_kv_pool_drop(s->pool, q->blocks[--q->n_blocks]);
    q->computed = q->published = q->rows = 0;
}

void gn_schedule_add(gn_schedule *s, gn_sequence *q) {
    q->next = NULL;
    if (s->waiting_last)
        s->waiting_last->next = q;
    else
        s->waiting = q;
    s->waiting_last = q;
}

static void remove_waiting(gn_schedule *s, gn_sequence *q) {
    gn_sequence *previous = NULL, *at = s->waiting;
    while (at && at != q) previous = at, at = at->next;
    if (!at) return;
    if (previous)
        previous->next = q->next;
    else
        s->waiting = q->next;
    if (s->waiting_last == q) s->waiting_last = previous;
}

static bool remove_running(gn_schedule *s, gn_sequence *q) {
    for (int32_t i = 0; i < s->n_running; i++) {
        if (s->running[i] != q) continue;
        s->n_running--;
        memmove(s->running + i, s->running + i + 1,
                (size_t)(s->n_running - i) * sizeof *s->running);
        return true;
    }
    return false;
}

void gn_schedule_remove(gn_schedule *s, gn_sequence *q) {
    if (!remove_running(s, q)) remove_waiting(s, q);
    give_blocks_back(s, q);
}

static void preempt(gn_schedule *s, gn_sequence *q) {
    remove_running(s, q);
    give_blocks_back(s, q);
    q->next = s->waiting;
    s->waiting = s->next_waiting = q;
    if (!s->waiting_last) s->waiting_last = q;
}

/* The youngest running sequence, younger than q, that has blocks but no rows in this step. */
static gn_sequence *victim(gn_schedule *s, const gn_sequence *q) {
    for (int32_t i = s->n_running - 1; i >= 0 && s->running[i] != q; i--) {
        if (s->running[i]->rows == 0 && s->running[i]->n_blocks > 0) return s->running[i];
    }
    return NULL;
}

static int32_t blocks_for(int32_t tokens) {
    return (tokens + GN_KV_BLOCK_TOKENS - 1) / GN_KV_BLOCK_TOKENS;
}

/* Gives q as many of `rows` more rows as blocks can be had for; returns how many. */
static int32_t reserve(gn_schedule *s, gn_sequence *q, int32_t rows) {
    while (q->n_blocks < blocks_for(q->computed + rows)) {
        const int32_t block = gn_kv_pool_take(s->pool);
        if (block >= 0) {
            q->blocks[q->n_blocks++] = block;
            continue;
        }
        gn_sequence *v = victim(s, q);
        s->must_preempt |= v && !s->may_preempt;
        if (!v || !s->may_preempt) break;
        preempt(s, v);
    }
    const int32_t room = q->n_blocks * GN_KV_BLOCK_TOKENS - q->computed;
    return rows < room ? rows : room;
}

static int32_t plan_rows(gn_schedule *s, gn_sequence *q, int32_t budget) {
    const int32_t pending = gn_sequence_pending(q);
    q->rows = reserve(s, q, pending < budget ? pending : budget);
    if (q->rows > 0) s->planned[s->n_planned++] = q;
    return q->rows;
}

/* Takes what the prefix cache knows of the sequence. The last token is always computed, since
 * its hidden state is what the next token is drawn from. */
static void match_prefix(gn_schedule *s, gn_sequence *q) {
    q->serial = gn_kv_pool_root(&q->adapters);
    if (q->prompt_probs) return;
    for (int32_t n = GN_KV_BLOCK_TOKENS; n < q->n_tokens; n += GN_KV_BLOCK_TOKENS) {
        const int32_t block =
            gn_kv_pool_match(s->pool, q->serial, q->tokens + q->computed, &q->serial);
        if (block < 0) break;
        q->blocks[q->n_blocks++] = block;
        q->computed = q->published = n;
    }
    if (q->n_tokens == q->n_prompt) q->cached_tokens = q->computed;
}

static bool may_pass(const gn_schedule *s, const gn_sequence *q) {
    return !s->kept_out || q->acquired || s->kept_out->passed < s->max_seqs;
}

/* Whether q's adapters are on the device, or on their way there from now on. */
static bool fetch(gn_schedule *s, gn_sequence *q) {
    if (q->n_uses == 0 || !s->fetch) return true;
    if (!may_pass(s, q)) return false;
    const bool acquired = q->acquired;
    const gn_fetch fetched = s->fetch(s->user, q, !s->kept_out);
    if (s->kept_out && !acquired && q->acquired) s->kept_out->passed++;
    if (fetched == GN_FETCH_FULL && !s->kept_out) s->kept_out = q;
    return fetched == GN_FETCH_READY;
}

/* Lets the next waiting sequence whose adapters are there run, when there is a slot, and blocks for
 * all its tokens. */
static gn_sequence *admit(gn_schedule *s) {
    if (s->n_running == s->max_seqs) return NULL;
    gn_sequence *q = s->next_waiting;
    while (q && !fetch(s, q)) q = q->next;
    s->next_waiting = q ? q->next : NULL;
    if (!q) return NULL;
    match_prefix(s, q);
    if (gn_kv_pool_free(s->pool) < blocks_for(q->n_tokens) - q->n_blocks) {
        give_blocks_back(s, q);
        return NULL;
    }
    remove_waiting(s, q);
    int32_t i = s->n_running++;
    for (; i > 0 && s->running[i - 1]->id > q->id; i--) s->running[i] = s->running[i - 1];
    s->running[i] = q;
    return q;
}

static int by_adapters(const void *a, const void *b) {
    const gn_sequence *p = *(gn_sequence *const *)a, *q = *(gn_sequence *const *)b;
    const int order = memcmp(&p->adapters, &q->adapters, sizeof p->adapters);
    return order ? order : (p->id > q->id) - (p->id < q->id);
}

/* Adapters of those that may be admitted next come while others still run. */
static void prefetch(gn_schedule *s) {
    gn_sequence *q = s->next_waiting;
    for (int32_t i = 0; q && i < s->max_seqs; i++, q = q->next) fetch(s, q);
}

void gn_schedule_plan(gn_schedule *s, bool may_preempt) {
    int32_t budget = s->max_rows;
    s->may_preempt = may_preempt;
    s->must_preempt = false;
    s->n_planned = 0;
    for (int32_t i = 0; i < s->n_running; i++) s->running[i]->rows = 0;

    /* Planning one may preempt younger ones, which stand behind it. */
    for (int32_t i = 0; i < s->n_running && budget > 0; i++) {
        gn_sequence *q = s->running[i];
        if (gn_sequence_pending(q) == 1) budget -= plan_rows(s, q, 1);
    }
    if (s->n_planned > 0 && budget > s->prefill_chunk) budget = s->prefill_chunk;
    for (int32_t i = 0; i < s->n_running && budget > 0; i++) {
        gn_sequence *q = s->running[i];
        if (q->rows == 0) budget -= plan_rows(s, q, budget);
    }
    s->next_waiting = s->waiting;
    s->kept_out = NULL;
    while (budget > 0) {
        gn_sequence *q = admit(s);
        if (!q) break;
        budget -= plan_rows(s, q, budget);
    }
    prefetch(s);
    if (s->must_preempt) s->n_planned = 0;
    qsort(s->planned, (size_t)s->n_planned, sizeof *s->planned, by_adapters);
}

void gn_schedule_advance(gn_schedule *s, gn_sequence *q) {
    q->computed += q->rows;
    gn_schedule_publish(s, q);
}

void gn_schedule_publish(gn_schedule *s, gn_sequence *q) {
    const int32_t known = q->computed < q->n_tokens ? q->computed : q->n_tokens;
    while (known - q->published >= GN_KV_BLOCK_TOKENS) {
        const int32_t block = q->blocks[q->published / GN_KV_BLOCK_TOKENS];
        q->serial = gn_kv_pool_publish(s->pool, block, q->serial, q->tokens + q->published);
        q->published += GN_KV_BLOCK_TOKENS;
    }
}
