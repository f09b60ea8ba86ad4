/* checkpoint.h - all that a run needs to go on as if it had not stopped.
 *
 * OUTPUT/checkpoint-STEP is a folder of
 *   adapter_config.json, adapter_model.safetensors   the adapter, ready for use (not for full)
 *   optimizer.safetensors                            masters and moments
 *   state.json                                       counters, seed, schedule, options
 *   manifest.json                                    length and hash of each file; written last
 * It is written beside its final name and moved there, so a name holds a whole checkpoint; the
 * manifest shows damage that came later. */
#ifndef GN_CHECKPOINT_H
#define GN_CHECKPOINT_H

#include <cjson/cJSON.h>

#include "trainer/adapter_writer.h"
#include "trainer/schedule.h"

/* Counters of a run, each from 0. */
#define GN_TRAIN_COUNTERS(X)                                                                       \
    X(step)             /* updates done; names the folder */                                       \
    X(epoch)            /* passes over the data completed */                                       \
    X(position)         /* rows taken of this pass's order, which seed and epoch decide */         \
    X(micro_batches)    /* forward passes: with the seed, the dropout's random numbers */          \
    X(tokens)           /* trained on */                                                           \
    X(metrics_bytes)    /* of metrics.jsonl that are about these steps */                          \
    X(evaluations_lost) /* evaluations in a row without a better loss: early stopping */

typedef struct gn_train_state {
#define X(name) int64_t name;
    GN_TRAIN_COUNTERS(X)
#undef X
    uint64_t seed;
    double best_loss; /* INFINITY before the first evaluation */
    gn_lr_schedule schedule;
    cJSON *options; /* an object of what must be the same when the run goes on; NULL: empty */
} gn_train_state;

void gn_train_state_close(gn_train_state *state); /* frees what gn_checkpoint_load put there */

/* GN_EMISMATCH, naming the first, when an option is another than when the checkpoint was saved. */
GN_CHECKED gn_status gn_train_options_check(const cJSON *saved, const cJSON *now, gn_error *err);

typedef struct gn_checkpoint_options {
    const char *output;               /* the run's folder; made if need be */
    const gn_adapter_config *adapter; /* NULL: no adapter is written */
    int limit;                        /* --save-total-limit: older checkpoints to keep, this one
                                       * included; 0: all */
} gn_checkpoint_options;

/* Saves checkpoint-STEP, then removes those over the limit, oldest first, and what killed saves
 * left. A checkpoint of this step is replaced; one of a later step is not touched. On failure all
 * that was saved before is as it was. */
GN_CHECKED gn_status gn_checkpoint_save(const gn_checkpoint_options *options,
                                        const gn_train_state *state, gn_optimizer *o,
                                        gn_error *err);

/* The newest checkpoint whose files are what its manifest says; *path is malloc'ed. `warn` hears
 * of each that is passed over. GN_ENOENT: there is no checkpoint; GN_EFORMAT: all are broken. */
typedef void gn_checkpoint_warning(void *user, const char *message);
GN_CHECKED gn_status gn_checkpoint_find(char **path, const char *output,
                                        gn_checkpoint_warning *warn, void *user, gn_error *err);

/* Fills state and the optimizer, which has not been used yet. GN_EMISMATCH when its parameters,
 * or the kind of their state, are others than those saved, naming the first. */
GN_CHECKED gn_status gn_checkpoint_load(const char *path, gn_train_state *state, gn_optimizer *o,
                                        gn_error *err);

#endif
