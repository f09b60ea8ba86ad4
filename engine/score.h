/* score.h - what a model says about given texts, without the scheduler: for evaluation. */
#ifndef GN_SCORE_H
#define GN_SCORE_H

#include "engine/forward.h"

typedef struct gn_scorer gn_scorer;

/* Scores sequences of up to `context` tokens. */
GN_CHECKED gn_status gn_scorer_open(gn_scorer **out, gn_model *model, int32_t context,
                                    gn_kv_dtype kv, gn_error *err);
void gn_scorer_close(gn_scorer *s);
/* What it takes, with these adapters, within `budget` bytes; 0: what there is. See memory_plan.h.
 */
GN_CHECKED gn_status gn_scorer_plan(gn_memory_plan *plan, gn_model *model, int32_t context,
                                    gn_kv_dtype kv, int64_t budget, gn_adapter *const *adapters,
                                    int32_t n_adapters, gn_error *err);

/* Runs ids (n) from position 0 and calls on_row once for each position from `first` on, in order,
 * with logits (vocab) that say what follows it. uses may be NULL when n_uses is 0. */
GN_CHECKED gn_status gn_scorer_run(
    gn_scorer *s, const int32_t *ids, int32_t n, int32_t first, const gn_adapter_use *uses,
    int32_t n_uses, void (*on_row)(void *user, int32_t position, const float *logits), void *user);

/* Negative log-likelihood, in nats, of ids[1..n) given what precedes each. */
GN_CHECKED gn_status gn_scorer_nll(gn_scorer *s, const int32_t *ids, int32_t n,
                                   const gn_adapter_use *uses, int32_t n_uses, double *nll);

#endif
