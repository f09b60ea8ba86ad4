/* batch.h - samples in the order they are trained on, as flat batches.
 *
 * An epoch has each sample of a file of weight w w times: the whole part of w always, the rest by a
 * draw that differs from epoch to epoch. Its order, and with packing its rows, follow from the seed
 * and the epoch's number alone, on any machine, so that a position is a few numbers.
 *
 * A row is one sample, or, packed, as many as fit in pack_len tokens, first come first fitted. A
 * micro-batch is batch_size rows, and the last of an epoch what is left. It is flat, without
 * padding: every sample in it is a sequence of its own from position 0, so that samples cannot see
 * each other. */
#ifndef GN_TRAIN_BATCH_H
#define GN_TRAIN_BATCH_H

#include "trainer/dataset.h"

typedef struct gn_batcher gn_batcher;

typedef struct gn_batcher_options {
    const int64_t *samples; /* (n_samples) indices, as in gn_split; copied */
    int64_t n_samples;
    int batch_size; /* rows of a micro-batch */
    int step_rows;  /* rows of an optimizer's step, a multiple of batch_size: with group_by_length
                     * its samples are of like length. 0: batch_size */
    bool shuffle;   /* else in the data set's order */
    bool group_by_length; /* transformers' LengthGroupedSampler: shuffled megabatches of 50 steps,
                           * sorted within; the longest sample comes first. Needs shuffle */
    int pack_len;         /* 0: no packing. At least the longest sample's tokens */
    bool ignore_weights;  /* each sample once an epoch, for evaluation */
    uint64_t seed;
} gn_batcher_options;

/* The data set is borrowed for the batcher's life. GN_EINVAL: what the options say is impossible.
 * All memory is allocated here. */
GN_CHECKED gn_status gn_batcher_open(gn_batcher **out, const gn_dataset *d,
                                     const gn_batcher_options *options, gn_error *err);
void gn_batcher_close(gn_batcher *b);

/* No micro-batch is larger. */
typedef struct gn_batch_limits {
    int32_t rows, seqs, seq_rows; /* tokens, samples, tokens of the longest sample */
} gn_batch_limits;
gn_batch_limits gn_batcher_limits(const gn_batcher *b);
/* Micro-batches of the epoch that the next one belongs to. */
int64_t gn_batcher_epoch_batches(const gn_batcher *b);

/* Borrowed until the next call. */
typedef struct gn_micro_batch {
    int32_t rows; /* tokens */
    int32_t n_seqs, n_learned;
    const int32_t *ids;    /* (rows) */
    const int32_t *labels; /* (rows) as in gn_sample; n_learned of them are learned, those of first
                            * tokens not counted, which nothing stands before */
    const int32_t *row0;   /* (n_seqs + 1) sequence i is rows [row0[i], row0[i+1]), as in gn_seqs */
    const int32_t *pos0;   /* (n_seqs) all 0, as in gn_seqs */
    const int64_t *samples; /* (n_seqs) of the data set */
    int64_t epoch;
    bool ends_epoch;
} gn_micro_batch;
/* The next micro-batch; after an epoch's last comes the next epoch's first. Allocates nothing. */
gn_micro_batch gn_batcher_next(gn_batcher *b);

/* Where a batcher stands, for a checkpoint. */
typedef struct gn_batch_position {
    uint64_t key; /* of the data set, the samples and the options, seed included */
    int64_t epoch, row;
} gn_batch_position;
gn_batch_position gn_batcher_position(const gn_batcher *b);
/* Goes on from a position of a batcher that was opened for the same data with the same options;
 * another's is GN_EMISMATCH. */
GN_CHECKED gn_status gn_batcher_seek(gn_batcher *b, const gn_batch_position *position,
                                     gn_error *err);

#endif
