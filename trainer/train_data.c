/* train_data.c - opens data sets, holds samples out, and makes batchers of both parts. */
#include "trainer/train_data.h"

#include <stdlib.h>

static gn_status open_files(gn_dataset **out, const gn_train_options *o, const gn_strings *files,
                            gn_error *err) {
    gn_data_choice choice = o->data;
    choice.files = *files;
    return gn_data_choice_open(&choice, o->model.dir, o->model.threads, out, err);
}

static gn_status open_train(gn_train_data *data, const gn_train_options *o, const gn_split *split,
                            int processes, gn_error *err) {
    const int64_t rows = (int64_t)o->batch_size * o->accumulation * processes;
    if (rows > INT32_MAX) return gn_fail(err, GN_ETOOBIG, "a step of %lld rows", (long long)rows);
    const gn_batcher_options options = {.samples = split->train,
                                        .n_samples = split->n_train,
                                        .batch_size = o->batch_size,
                                        .step_rows = (int)rows,
                                        .shuffle = o->shuffle,
                                        .group_by_length = o->group_by_length,
                                        .pack_len = o->pack_len,
                                        .seed = (uint64_t)o->data_seed};
    return gn_batcher_open(&data->train, data->samples, &options, err);
}

static gn_status open_eval(gn_train_data *data, const gn_train_options *o, const int64_t *samples,
                           int64_t n, gn_error *err) {
    const gn_batcher_options options = {.samples = samples,
                                        .n_samples = n,
                                        .batch_size = o->eval_batch_size,
                                        .ignore_weights = true};
    return gn_batcher_open(&data->eval, data->eval_samples, &options, err);
}

/* All samples of files of their own, but for --max-eval-samples. */
static gn_status open_eval_files(gn_train_data *data, const gn_train_options *o, gn_error *err) {
    gn_split all;
    const gn_split_options options = {
        .max_train = o->max_eval, .first = !o->shuffle, .seed = (uint64_t)o->data_seed};
    gn_status status = open_files(&data->eval_samples, o, &o->eval_files, err);
    if (!status) status = gn_split_open(&all, data->eval_samples, &options, err);
    if (status) return status;
    status = open_eval(data, o, all.train, all.n_train, err);
    gn_split_close(&all);
    return status;
}

static gn_status open_all(gn_train_data *data, const gn_train_options *o, int processes,
                          gn_error *err) {
    gn_split split;
    const gn_split_options options = {.eval_size = o->eval_size,
                                      .max_train = o->max_train,
                                      .max_eval = o->max_eval,
                                      .first = !o->shuffle,
                                      .seed = (uint64_t)o->data_seed};
    gn_status status = open_files(&data->samples, o, &o->data.files, err);
    if (!status) status = gn_split_open(&split, data->samples, &options, err);
    if (status) return status;
    status = open_train(data, o, &split, processes, err);
    if (!status && split.n_eval > 0) {
        data->eval_samples = data->samples;
        status = open_eval(data, o, split.eval, split.n_eval, err);
    }
    gn_split_close(&split);
    if (!status && o->eval_files.n > 0) status = open_eval_files(data, o, err);
    return status;
}

static int32_t larger(int32_t a, int32_t b) {
    return a > b ? a : b;
}

/* A question that is longer than a batch makes batches longer. */
static gn_status open_mmlu(gn_train_data *data, const gn_train_options *o, gn_error *err) {
    gn_batch_limits *limits = &data->limits;
    const gn_status status = gn_mmlu_open(&data->mmlu, &o->mmlu, o->model.dir, 0, err);
    if (status) return status;
    limits->seq_rows = larger(limits->seq_rows, gn_mmlu_longest(data->mmlu));
    limits->rows = larger(limits->rows, limits->seq_rows);
    return GN_OK;
}

static void set_limits(gn_train_data *data) {
    data->limits = gn_batcher_limits(data->train);
    if (!data->eval) return;
    const gn_batch_limits eval = gn_batcher_limits(data->eval);
    data->limits.rows = larger(data->limits.rows, eval.rows);
    data->limits.seqs = larger(data->limits.seqs, eval.seqs);
    data->limits.seq_rows = larger(data->limits.seq_rows, eval.seq_rows);
}

gn_status gn_train_data_open(gn_train_data *data, const gn_train_options *options, int processes,
                             gn_error *err) {
    *data = (gn_train_data){0};
    gn_status status = open_all(data, options, processes, err);
    if (!status) set_limits(data);
    if (!status && options->does_mmlu) status = open_mmlu(data, options, err);
    if (status) gn_train_data_close(data);
    return status;
}

void gn_train_data_close(gn_train_data *data) {
    gn_batcher_close(data->train);
    gn_batcher_close(data->eval);
    gn_mmlu_close(data->mmlu);
    if (data->eval_samples != data->samples) gn_dataset_close(data->eval_samples);
    gn_dataset_close(data->samples);
    *data = (gn_train_data){0};
}
