/* train_data.h - a run's batches: to train on, and to evaluate on. Questions of MMLU come as many
 * at a time as the others leave room for. */
#ifndef GN_TRAIN_DATA_H
#define GN_TRAIN_DATA_H

#include "trainer/batch.h"
#include "trainer/train_options.h"

typedef struct gn_train_data {
    gn_dataset *samples, *eval_samples; /* the same where some are held out */
    gn_batcher *train, *eval;           /* eval NULL: nothing is evaluated */
    gn_mmlu *mmlu;                      /* NULL: likewise */
    gn_batch_limits limits;             /* of batches of all of them */
} gn_train_data;

/* Reads and tokenizes all files. `processes` share a step's rows. */
GN_CHECKED gn_status gn_train_data_open(gn_train_data *data, const gn_train_options *options,
                                        int processes, gn_error *err);
void gn_train_data_close(gn_train_data *data);

#endif
