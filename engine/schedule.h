/* schedule.h - which rows the next step computes.
 *
 * Continuous batching: every step, each running sequence that generates gets its one row, then
 * prompts are prefilled in order of arrival with the rows that are left, in chunks, so that a
 * long prompt never stalls the replies of others. Sequences are admitted first come, first
 * served, as slots and KV blocks allow. When blocks run out, the youngest sequence gives its own
 * back and waits at the front of the queue to be computed again; its reply does not change.
 *
 * A plan may be made while a step's tokens are not known yet (see sequence.h: drawn), as long as
 * nobody has to be preempted, for what is computed again must be known. */
#ifndef GN_SCHEDULE_H
#define GN_SCHEDULE_H

#include "engine/sequence.h"

typedef struct gn_schedule {
    int32_t max_seqs, max_rows;
    gn_kv_pool *pool;
    gn_sequence *waiting, *waiting_last;
    gn_sequence **running; /* (max_seqs), oldest request first */
    int32_t n_running;
    gn_sequence **planned; /* (max_seqs): this step's, those with the same adapters together */
    int32_t n_planned;
    bool may_preempt, must_preempt; /* of the plan being made */
} gn_schedule;

/* The pool is borrowed. */
GN_CHECKED gn_status gn_schedule_open(gn_schedule *s, gn_kv_pool *pool, int32_t max_seqs,
                                      int32_t max_rows);
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
