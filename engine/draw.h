/* draw.h - draws tokens from a batch's logits, where those are: on a device with a sampler, so that
 * only tokens travel, else on the host.
 *
 * One draw at a time: it is started, and waited for before the next. Belongs to the engine's
 * thread. */
#ifndef GN_DRAW_H
#define GN_DRAW_H

#include "engine/sequence.h"

typedef struct gn_draw gn_draw;

/* For up to max_rows rows at once, no more than the forward pass gives logits of. Close it before
 * the forward pass. */
GN_CHECKED gn_status gn_draw_open(gn_draw **out, gn_model *model, gn_forward *forward,
                                  int32_t max_rows);
void gn_draw_close(gn_draw *d);

/* Makes ready what the sequence's draws need, all of whose tokens are known at its first. */
GN_CHECKED gn_status gn_draw_prepare(gn_draw *d, gn_sequence *s);
void gn_draw_forget(gn_draw *d, gn_sequence *s); /* when it ends */

/* Starts to draw a token for each of n sequences, for sequences[i] from row rows[i] of the last
 * batch. The next batch may be run before the tokens are here. */
GN_CHECKED gn_status gn_draw_start(gn_draw *d, gn_sequence *const *sequences, const int32_t *rows,
                                   int32_t n);
/* Waits for them, but not for a later batch. tokens: (n); tops: (n, GN_MAX_TOP_LOGPROBS), filled
 * for sequences with logprobs; both until the next start. */
GN_CHECKED gn_status gn_draw_wait(gn_draw *d, const gn_token_prob **tokens,
                                  const gn_token_prob **tops);
/* Where a batch finds the tokens of the last draw (gn_batch.drawn); NULL: nowhere. */
const int32_t *gn_draw_ids(const gn_draw *d);

/* Records what n rows of the last batch, from `row` on, say about the prompt's tokens after
 * position, position + 1, ... Waits. */
GN_CHECKED gn_status gn_draw_score(gn_draw *d, gn_sequence *s, int32_t position, int32_t row,
                                   int32_t n);

#endif
