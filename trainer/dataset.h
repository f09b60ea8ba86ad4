/* dataset.h - files of examples as samples of tokens and labels.
 *
 *   gn_dataset   all samples of one or several files, tokenized. Immutable.
 *   gn_split     which of them are trained on, and which are held out (batch.h draws from these)
 *
 * The library never prints: what a person may want to know (a detected format, skipped rows, how
 * the cache was used) goes to `note`. */
#ifndef GN_DATASET_H
#define GN_DATASET_H

#include "trainer/dataset_format.h"
#include "trainer/samples.h"

typedef struct gn_dataset gn_dataset;

typedef struct gn_dataset_options {
    const char *const *files; /* (n_files) FILE or FILE:WEIGHT */
    int n_files;
    gn_format format;          /* AUTO: by each file's first good row */
    const char *model_dir;     /* for its tokenizer and chat template */
    const char *chat_template; /* a file or a name; NULL: the folder's */
    int vocab;                 /* of the model */
    int source_max_len, target_max_len;
    int max_len; /* of tokenized rows, which are not cut */
    bool train_on_source;
    bool skip_bad_rows;    /* count them; else the first is an error */
    int threads;           /* 0: as many as there are cores */
    const char *cache_dir; /* NULL: no cache */
    /* On the calling thread; may be NULL. progress: rows of a file being tokenized. */
    void (*note)(void *user, const char *text);
    void (*progress)(void *user, int64_t done, int64_t total);
    void *user;
} gn_dataset_options;

/* Reads, tokenizes (or takes from the cache) and checks all files. Strings and arrays of the
 * options are borrowed for the call. A bad row is GN_EFORMAT, "FILE:LINE: what"; so is a file none
 * of whose rows can be learned from. The samples are the same for any number of threads. */
GN_CHECKED gn_status gn_dataset_open(gn_dataset **out, const gn_dataset_options *options,
                                     gn_error *err);
void gn_dataset_close(gn_dataset *d);

/* Borrowed from the data set. ids, labels: (n); n is at least 2. A label says what the token at its
 * own place is to be, so labels[i] is learned from what stands before i. */
typedef struct gn_sample {
    const int32_t *ids, *labels;
    int32_t n;
    int file;
    int64_t line; /* in that file */
} gn_sample;
int64_t gn_dataset_size(const gn_dataset *d); /* samples, files in order, rows in order */
gn_sample gn_dataset_sample(const gn_dataset *d, int64_t i);

typedef struct gn_dataset_file {
    const char *path;
    double weight; /* how often an epoch has each sample */
    gn_format format;
    int64_t first, n, n_tokens; /* its samples */
    gn_sample_counts counts;
} gn_dataset_file;
int gn_dataset_files(const gn_dataset *d);
gn_dataset_file gn_dataset_file_at(const gn_dataset *d, int file);

/* Of everything that decides what the samples are, weights included. */
gn_hash gn_dataset_hash(const gn_dataset *d);

/* Indices of samples in ascending order; what is held out is not trained on. */
typedef struct gn_split {
    int64_t *train, *eval;
    int64_t n_train, n_eval;
} gn_split;

/* Holds eval_size samples out, drawn by the seed, then keeps at most max_train and max_eval of the
 * two parts (0: all), drawn by the seed, or, with first, those that come first in the files.
 * GN_EINVAL: nothing is left to train on. */
typedef struct gn_split_options {
    int64_t eval_size, max_train, max_eval;
    bool first;
    uint64_t seed;
} gn_split_options;
GN_CHECKED gn_status gn_split_open(gn_split *split, const gn_dataset *d,
                                   const gn_split_options *options, gn_error *err);
void gn_split_close(gn_split *split);

#endif
