/* step.h - the engine's step: plan, run the model, draw tokens, report.
 *
 * A step is launched and its draw is started; then, with `ahead`, the next step is launched as far
 * as it can be planned, before the tokens of this one are known: it finds them on the device. So
 * the device has work while tokens travel, are checked for stops, and are reported. A sequence
 * that turns out to have ended, or is canceled, has a row too many in the step that is on its way:
 * nothing is drawn from it, and what it stored lies in blocks that the sequence gave back. Texts,
 * counts and the prefix cache are the same with and without `ahead`. Belongs to one thread. */
#ifndef GN_STEP_H
#define GN_STEP_H

#include "engine/sequence.h"

typedef struct gn_stepper gn_stepper;

typedef struct gn_stepper_options {
    int32_t max_seqs, max_rows; /* of a step; max_rows is at least max_seqs */
    int32_t prefill_chunk;      /* see schedule.h */
    int32_t kv_blocks, context;
    gn_kv_dtype kv_dtype;
    int64_t adapter_bytes; /* see forward.h */
    bool prefix_cache;
    bool ahead;
    /* A sequence's last event is out, and it is no longer here: for its owner to close. */
    void (*on_end)(void *user, gn_sequence *s);
    void *user;
} gn_stepper_options;

GN_CHECKED gn_status gn_stepper_open(gn_stepper **out, gn_model *model,
                                     const gn_stepper_options *options, gn_error *err);
void gn_stepper_close(gn_stepper *e); /* has no sequences */

/* Takes a sequence, until on_end. */
void gn_stepper_add(gn_stepper *e, gn_sequence *s);
/* Ends the sequences that are canceled, or all. */
void gn_stepper_cancel(gn_stepper *e, bool all);

/* Computes a step, or waits a moment when all there is to do waits for adapters; false when there
 * is nothing to do. */
bool gn_stepper_run(gn_stepper *e);
/* Reports it to its sequences, and ends those that are complete. */
void gn_stepper_report(gn_stepper *e);

/* Fills in what steps know: not context, max_seqs, requests and waiting. */
void gn_stepper_read_stats(const gn_stepper *e, gn_engine_stats *stats);
/* Steps that were launched before the tokens of the one before were known. */
int64_t gn_stepper_launched_ahead(const gn_stepper *e);

#endif
