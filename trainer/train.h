/* train.h - a training run, from its options to what it leaves in its output folder. */
#ifndef GN_TRAIN_H
#define GN_TRAIN_H

#include "trainer/communicator.h"
#include "trainer/train_options.h"

/* Trains. The output folder then holds checkpoints (checkpoint.h), metrics.jsonl and the result:
 * adapter/, or model/ where all weights were trained. Progress goes to stderr, with o->json the
 * lines of metrics.jsonl to stdout. An error harms nothing that was saved before it. */
GN_CHECKED gn_status gn_train(const gn_train_options *o, gn_communicator *c, gn_error *err);

#endif
