/* schedule.h - which rows the next step computes.
 *
 * Continuous batching: every step, each running sequence that generates gets its one row, then
 * prompts are prefilled in order of arrival with the rows that are left: with no more than
 * prefill_chunk of them when somebody generates, so that no prompt stalls the replies of others for
 * longer than that takes. Sequences are admitted first come, first
 * served, as slots and KV blocks allow, except that those whose adapters are not on the device let
 * others pass. Adapters of as many as can run at once are fetched while there is no slot yet. While
 * adapters are on their way that is all. When there is no room for them, because
 * those of running sequences fill it, only sequences that need no more room may pass, and no more
 * of those with adapters than max_seqs: then the room empties, and nobody waits forever. When
 * blocks run out, the youngest sequence gives its own back and waits at the front of the queue to
 * be computed again; its reply does not change.
 *
 * A plan may be made while a step's tokens are not known yet (see sequence.h: drawn), as long as
 * nobody has to be preempted, for what is computed again must be known. */
#ifndef GN_SCHEDULE_H
#define GN_SCHEDULE_H

#include "engine/sequence.h"

typedef enum gn_fetch {
    GN_FETCH_READY,
    GN_FETCH_COMING, /* the sequence has the room that its adapters need, but they are not there */
    GN_FETCH_FULL,   /* there is no room */
    GN_FETCH_FAILED, /* the sequence can never run */
} gn_fetch;

/* Gets a sequence's adapters to the device, over several calls. may_take: it may take room. */
typedef gn_fetch gn_fetch_fn(void *user, gn_sequence *sequence, bool may_take);

typedef struct gn_schedule {
    int32_t max_seqs, max_rows, prefill_chunk;
    gn_fetch_fn *fetch; /* for sequences with adapters; NULL: they need nothing */
    void *user;
    gn_kv_pool *pool;
    gn_sequence *waiting, *waiting_last;
    gn_sequence **running; /* (max_seqs), oldest request first */
    int32_t n_running;
    gn_sequence **planned; /* (max_seqs): this step's, those with the same adapters together */
    int32_t n_planned;
    /* Of the plan being made: */
    bool may_preempt, must_preempt;
    gn_sequence *next_waiting; /* to be admitted */
    gn_sequence *kept_out;     /* the first whose adapters there is no room for */
} gn_schedule;

/* The pool is borrowed. */
GN_CHECKED gn_status gn_schedule_open(gn_schedule *s, gn_kv_pool *pool, int32_t max_seqs,
                                      int32_t max_rows, int32_t prefill_chunk);
void gn_schedule_close(gn_schedule *s); /* must be empty */

void gn_schedule_add(gn_schedule *s, gn_sequence *sequence);
/* Fills planned, and each planned sequence's rows (at least 1). Empty when there is no work, and
 * when somebody would have to be preempted but may not. */
void gn_schedule_plan(gn_schedule *s, bool may_preempt);
/* When the step is launched: the planned rows are computed; full blocks are published. */
void gn_schedule_advance(gn_schedule *s, gn_sequence *sequence);
/* Publishes what became full since, as far as its tokens are known. */
void gn_schedule_publish(gn_schedule *s, gn_sequence *sequence);
/* Takes a running or waiting sequence out and gives its blocks back. */
void gn_schedule_remove(gn_schedule *s, gn_sequence *sequence);

#endif
