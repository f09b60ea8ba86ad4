/* batch.c - plans an epoch as rows of samples, and lays out micro-batches.
 *
 * The plan is two arrays: the epoch's samples in order, and where in it each row begins. */
#include "trainer/batch.h"

#include <stdlib.h>
#include <string.h>

#include "trainer/shuffle.h"

enum { MAX_SAMPLES = 1 << 30, OPEN_ROWS = 64, MEGABATCH_STEPS = 50 };
enum { SHUFFLE, DRAW_FRACTION }; /* purposes of random numbers, of an epoch */

/* A row that packing may still add to. */
typedef struct open_row {
    int32_t index, left;
} open_row;

struct gn_batcher {
    const gn_dataset *d;
    gn_batcher_options options;
    int64_t *chosen; /* (options.n_samples) */
    gn_batch_limits limits;
    uint64_t key;
    int64_t epoch, next; /* the row that comes next */
    /* The plan. */
    int64_t capacity;
    int64_t *order;  /* (n) samples */
    int64_t *row_at; /* (n_rows + 1) row i is order[row_at[i]] up to order[row_at[i+1]] */
    int64_t n, n_rows;
    int64_t *scratch; /* (capacity) */
    int32_t *row_of;  /* (capacity) with packing: the row of each sample of the order */
    /* The micro-batch. */
    int32_t *ids, *labels, *row0, *pos0;
    int64_t *samples;
};

/* ---- an epoch's samples ---- */

static gn_random epoch_random(const gn_batcher *b, int purpose) {
    return gn_random_open(b->options.seed, 2 * (uint64_t)b->epoch + (uint64_t)purpose);
}

/* The chosen samples [begin, end) of a file of weight w, in order. */
static void add_weighted(gn_batcher *b, gn_random *random, int64_t begin, int64_t end, double w) {
    const int64_t whole = (int64_t)w, n = end - begin;
    gn_draw_some draw = {*random, (int64_t)((w - (double)whole) * (double)n + 0.5), n};
    for (int64_t i = begin; i < end; i++) {
        const int64_t copies = whole + gn_draw_next(&draw);
        for (int64_t k = 0; k < copies; k++) b->order[b->n++] = b->chosen[i];
    }
    *random = draw.random;
}

static double weight_of(const gn_batcher *b, int file) {
    return b->options.ignore_weights ? 1 : gn_dataset_file_at(b->d, file).weight;
}

/* Where the chosen samples of a file end, which begin at `begin`. */
static int64_t file_end(const gn_batcher *b, int file, int64_t begin) {
    const gn_dataset_file f = gn_dataset_file_at(b->d, file);
    while (begin < b->options.n_samples && b->chosen[begin] < f.first + f.n) begin++;
    return begin;
}

static void list_samples(gn_batcher *b) {
    gn_random random = epoch_random(b, DRAW_FRACTION);
    b->n = 0;
    int64_t begin = 0;
    for (int file = 0; file < gn_dataset_files(b->d); file++) {
        const int64_t end = file_end(b, file, begin);
        add_weighted(b, &random, begin, end, weight_of(b, file));
        begin = end;
    }
}

/* ---- their order ---- */

static int64_t length_at(const gn_batcher *b, int64_t i) {
    return gn_dataset_sample(b->d, b->order[i]).n;
}

static int descending(const void *a, const void *b) {
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

/* Sorts [begin, end) of the order by length, the longest first; equal ones keep their order. */
static void sort_by_length(gn_batcher *b, int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    int64_t *keys = b->scratch;
    for (int64_t i = 0; i < n; i++)
        keys[i] = length_at(b, begin + i) << 31 | (n - 1 - i); /* n <= MAX_SAMPLES */
    qsort(keys, (size_t)n, sizeof *keys, descending);
    for (int64_t i = 0; i < n; i++)
        keys[i] = b->order[begin + n - 1 - (keys[i] & (((int64_t)1 << 31) - 1))];
    memcpy(b->order + begin, keys, (size_t)n * sizeof *keys);
}

static void swap(int64_t *a, int64_t *b) {
    const int64_t item = *a;
    *a = *b;
    *b = item;
}

static void group_by_length(gn_batcher *b) {
    const int64_t step = b->options.step_rows;
    int64_t steps = b->n / (step * 4); /* at least four megabatches */
    if (steps > MEGABATCH_STEPS) steps = MEGABATCH_STEPS;
    if (steps == 0) steps = 1;
    int64_t longest = 0;
    for (int64_t begin = 0; begin < b->n; begin += steps * step) {
        const int64_t end = begin + steps * step < b->n ? begin + steps * step : b->n;
        sort_by_length(b, begin, end);
        if (length_at(b, begin) > length_at(b, longest)) longest = begin;
    }
    swap(&b->order[0], &b->order[longest]); /* too little memory shows at once */
}

/* ---- rows ---- */

/* The first open row that has room for n tokens, or a new one; the fullest is closed for it where
 * too many are open. */
static open_row *find_row(const gn_batcher *b, open_row *open, int *n_open, int32_t *n_rows,
                          int32_t n) {
    int fullest = 0;
    for (int i = 0; i < *n_open; i++) {
        if (open[i].left >= n) return &open[i];
        if (open[i].left < open[fullest].left) fullest = i;
    }
    open_row *row = &open[*n_open < OPEN_ROWS ? (*n_open)++ : fullest];
    *row = (open_row){(*n_rows)++, b->options.pack_len};
    return row;
}

static void pack(gn_batcher *b) {
    open_row open[OPEN_ROWS];
    int n_open = 0;
    int32_t n_rows = 0;
    for (int64_t i = 0; i < b->n; i++) {
        const int32_t n = (int32_t)length_at(b, i);
        open_row *row = find_row(b, open, &n_open, &n_rows, n);
        row->left -= n;
        b->row_of[i] = row->index;
    }
    b->n_rows = n_rows;
    memset(b->row_at, 0, ((size_t)n_rows + 1) * sizeof *b->row_at);
    for (int64_t i = 0; i < b->n; i++) b->row_at[b->row_of[i] + 1]++;
    for (int32_t row = 0; row < n_rows; row++) b->row_at[row + 1] += b->row_at[row];
    for (int64_t i = 0; i < b->n; i++) b->scratch[b->row_at[b->row_of[i]]++] = b->order[i];
    for (int32_t row = n_rows; row > 0; row--) b->row_at[row] = b->row_at[row - 1];
    b->row_at[0] = 0;
    memcpy(b->order, b->scratch, (size_t)b->n * sizeof *b->order);
}

static void plan(gn_batcher *b) {
    gn_random random = epoch_random(b, SHUFFLE);
    list_samples(b);
    if (b->options.shuffle) gn_shuffle(&random, b->order, b->n);
    if (b->options.group_by_length) group_by_length(b);
    if (b->options.pack_len > 0) return pack(b);
    b->n_rows = b->n;
    for (int64_t i = 0; i <= b->n; i++) b->row_at[i] = i;
}

/* ---- opening ---- */

static int32_t longest_sample(const gn_batcher *b) {
    int32_t longest = 0;
    for (int64_t i = 0; i < b->options.n_samples; i++) {
        const int32_t n = gn_dataset_sample(b->d, b->chosen[i]).n;
        if (n > longest) longest = n;
    }
    return longest;
}

static gn_status check_samples(const gn_batcher_options *o, const gn_dataset *d, gn_error *err) {
    if (o->n_samples < 1) return gn_fail(err, GN_EINVAL, "there is no sample to make batches of");
    for (int64_t i = 0; i < o->n_samples; i++)
        if (o->samples[i] < (i ? o->samples[i - 1] + 1 : 0) || o->samples[i] >= gn_dataset_size(d))
            return gn_fail(err, GN_EINVAL, "samples must be in order, and the data set's");
    return GN_OK;
}

static gn_status check_options(const gn_batcher_options *o, gn_error *err) {
    if (o->batch_size < 1) return gn_fail(err, GN_EINVAL, "a batch must have at least one row");
    if (o->step_rows < 0 || o->step_rows % o->batch_size)
        return gn_fail(err, GN_EINVAL, "a step of %d rows is not so many batches of %d",
                       o->step_rows, o->batch_size);
    if (o->group_by_length && !o->shuffle)
        return gn_fail(err, GN_EINVAL, "grouping by length does not keep the files' order");
    if (o->group_by_length && o->pack_len)
        return gn_fail(err, GN_EINVAL, "packed rows are of one length: grouping has no use there");
    if (o->pack_len < 0) return gn_fail(err, GN_EINVAL, "rows of %d tokens", o->pack_len);
    return GN_OK;
}

/* The most samples that an epoch may have. */
static gn_status count_capacity(gn_batcher *b, gn_error *err) {
    double capacity = 0;
    int64_t begin = 0;
    for (int file = 0; file < gn_dataset_files(b->d); file++) {
        const int64_t end = file_end(b, file, begin);
        capacity += (weight_of(b, file) + 1) * (double)(end - begin);
        begin = end;
    }
    if (capacity >= MAX_SAMPLES)
        return gn_fail(err, GN_ETOOBIG, "an epoch of %.0f samples; at most %d are possible",
                       capacity, MAX_SAMPLES);
    b->capacity = (int64_t)capacity + 1;
    return GN_OK;
}

static gn_status set_limits(gn_batcher *b, gn_error *err) {
    const int32_t longest = longest_sample(b), pack_len = b->options.pack_len;
    if (pack_len && pack_len < longest)
        return gn_fail(err, GN_EINVAL, "rows of %d tokens cannot hold a sample of %d", pack_len,
                       longest);
    const int64_t rows = (int64_t)b->options.batch_size * (pack_len ? pack_len : longest);
    if (rows > INT32_MAX / 2)
        return gn_fail(err, GN_ETOOBIG, "batches of up to %lld tokens", (long long)rows);
    /* A sample has at least two tokens. */
    b->limits = (gn_batch_limits){(int32_t)rows,
                                  pack_len ? (int32_t)(rows / 2) : b->options.batch_size, longest};
    return GN_OK;
}

static gn_status allocate(gn_batcher *b, gn_error *err) {
    const size_t n = (size_t)b->capacity, rows = (size_t)b->limits.rows,
                 seqs = (size_t)b->limits.seqs;
    b->order = malloc(n * sizeof *b->order);
    b->scratch = malloc(n * sizeof *b->scratch);
    b->row_at = malloc((n + 1) * sizeof *b->row_at);
    b->row_of = malloc(n * sizeof *b->row_of);
    b->ids = malloc(rows * sizeof *b->ids);
    b->labels = malloc(rows * sizeof *b->labels);
    b->row0 = malloc((seqs + 1) * sizeof *b->row0);
    b->pos0 = calloc(seqs, sizeof *b->pos0);
    b->samples = malloc(seqs * sizeof *b->samples);
    if (b->order && b->scratch && b->row_at && b->row_of && b->ids && b->labels && b->row0 &&
        b->pos0 && b->samples)
        return GN_OK;
    return gn_fail(err, GN_ENOMEM, "out of memory");
}

static uint64_t key_of(const gn_batcher *b) {
    const gn_batcher_options *o = &b->options;
    const uint64_t numbers[] = {
        (uint64_t)o->batch_size, (uint64_t)o->step_rows, o->shuffle, o->group_by_length,
        (uint64_t)o->pack_len,   o->ignore_weights,      o->seed};
    gn_hash hash = gn_dataset_hash(b->d);
    gn_hash_add(&hash, numbers, sizeof numbers);
    gn_hash_add(&hash, b->chosen, (size_t)o->n_samples * sizeof *b->chosen);
    return hash.h[0];
}

static gn_status prepare(gn_batcher *b, const int64_t *samples, gn_error *err) {
    const size_t bytes = (size_t)b->options.n_samples * sizeof *b->chosen;
    b->chosen = malloc(bytes);
    if (!b->chosen) return gn_fail(err, GN_ENOMEM, "out of memory");
    memcpy(b->chosen, samples, bytes);
    if (b->options.step_rows == 0) b->options.step_rows = b->options.batch_size;
    b->key = key_of(b);
    gn_status status = count_capacity(b, err);
    if (!status) status = set_limits(b, err);
    if (!status) status = allocate(b, err);
    if (status) return status;
    plan(b);
    if (b->n == 0)
        status = gn_fail(err, GN_EINVAL, "the weights are so small that an epoch has no sample");
    return status;
}

gn_status gn_batcher_open(gn_batcher **out, const gn_dataset *d, const gn_batcher_options *options,
                          gn_error *err) {
    *out = NULL;
    gn_status status = check_options(options, err);
    if (!status) status = check_samples(options, d, err);
    if (status) return status;
    gn_batcher *b = calloc(1, sizeof *b);
    if (!b) return gn_fail(err, GN_ENOMEM, "out of memory");
    b->d = d;
    b->options = *options;
    b->options.samples = NULL;
    status = prepare(b, options->samples, err);
    if (status)
        gn_batcher_close(b);
    else
        *out = b;
    return status;
}

void gn_batcher_close(gn_batcher *b) {
    if (!b) return;
    free(b->chosen);
    free(b->order);
    free(b->scratch);
    free(b->row_at);
    free(b->row_of);
    free(b->ids);
    free(b->labels);
    free(b->row0);
    free(b->pos0);
    free(b->samples);
    free(b);
}

gn_batch_limits gn_batcher_limits(const gn_batcher *b) {
    return b->limits;
}

int64_t gn_batcher_epoch_batches(const gn_batcher *b) {
    return (b->n_rows + b->options.batch_size - 1) / b->options.batch_size;
}

/* ---- micro-batches ---- */

static void add_sample(gn_batcher *b, gn_micro_batch *batch, int64_t index) {
    const gn_sample s = gn_dataset_sample(b->d, index);
    memcpy(b->ids + batch->rows, s.ids, (size_t)s.n * sizeof *s.ids);
    memcpy(b->labels + batch->rows, s.labels, (size_t)s.n * sizeof *s.labels);
    for (int32_t i = 1; i < s.n; i++) batch->n_learned += s.labels[i] != GN_NOT_LEARNED;
    b->samples[batch->n_seqs++] = index;
    batch->rows += s.n;
    b->row0[batch->n_seqs] = batch->rows;
}

gn_micro_batch gn_batcher_next(gn_batcher *b) {
    gn_micro_batch batch = {.ids = b->ids,
                            .labels = b->labels,
                            .row0 = b->row0,
                            .pos0 = b->pos0,
                            .samples = b->samples,
                            .epoch = b->epoch};
    const int64_t left = b->n_rows - b->next;
    const int64_t end = b->next + (left < b->options.batch_size ? left : b->options.batch_size);
    b->row0[0] = 0;
    for (int64_t i = b->row_at[b->next]; i < b->row_at[end]; i++)
        add_sample(b, &batch, b->order[i]);
    b->next = end;
    if (end == b->n_rows) {
        batch.ends_epoch = true;
        b->epoch++;
        b->next = 0;
        plan(b);
    }
    return batch;
}

/* ---- positions ---- */

gn_batch_position gn_batcher_position(const gn_batcher *b) {
    return (gn_batch_position){b->key, b->epoch, b->next};
}

gn_status gn_batcher_seek(gn_batcher *b, const gn_batch_position *position, gn_error *err) {
    if (position->key != b->key)
        return gn_fail(err, GN_EMISMATCH,
                       "the position belongs to other data: the data set, its tokenizer, lengths, "
                       "seed or batches have changed");
    if (position->epoch < 0)
        return gn_fail(err, GN_EFORMAT, "a position in epoch %lld", (long long)position->epoch);
    if (position->epoch != b->epoch) {
        b->epoch = position->epoch;
        b->next = 0;
        plan(b);
    }
    if (position->row < 0 || position->row >= b->n_rows || position->row % b->options.batch_size)
        return gn_fail(err, GN_EFORMAT, "a position at row %lld of %lld", (long long)position->row,
                       (long long)b->n_rows);
    b->next = position->row;
    return GN_OK;
}
