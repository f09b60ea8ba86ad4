/* dataset.c - opens data sets: rows are tokenized by several threads in blocks, whose samples are
 * joined in the order of the file, so that threads make no difference. */
#include "trainer/dataset.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "trainer/dataset_encode.h"
#include "trainer/shuffle.h"
#include "trainer/trainer.h"

enum { BLOCK_ROWS = 128, MAX_THREADS = 256, MAX_FILES = 1024, MAX_WEIGHT = 1000 };
enum {
    ENCODING_VERSION = 1
}; /* part of cache keys: changes when the same rows give other samples */

struct gn_dataset {
    gn_dataset_file *files;
    int n_files;
    gn_samples samples;
    gn_hash hash;
};

typedef struct opening {
    const gn_dataset_options *options;
    gn_dataset *d;
    gn_tokenizer *tokenizer;
    gn_chat_template *chat;
    gn_encoding encoding;
    gn_hash hash; /* of the encoding */
    gn_error *err;
} opening;

static gn_status no_memory(gn_error *err) {
    return gn_fail(err, GN_ENOMEM, "out of memory");
}

static void note(const opening *o, const char *fmt, ...) GN_PRINTF(2, 3);
static void note(const opening *o, const char *fmt, ...) {
    char text[1024];
    if (!o->options->note) return;
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    o->options->note(o->options->user, text);
}

/* ---- tokenizing ---- */

typedef struct block {
    gn_samples samples;
    gn_error error;   /* that ends it all */
    gn_error skipped; /* the first bad row, when those are skipped */
    int64_t line;     /* of either */
} block;

typedef struct job {
    const gn_rows *rows;
    const gn_encoding *encoding;
    gn_format format;
    bool skip_bad_rows;
    block *blocks;
    int64_t n_blocks;
    _Atomic int64_t next;
    atomic_bool failed;
} job;

typedef struct row_sink {
    const gn_encoding *encoding;
    gn_samples *out;
    int64_t line;
    bool any;
} row_sink;

static gn_status take_example(void *user, const gn_example *example, gn_error *err) {
    row_sink *sink = user;
    sink->any = true;
    return gn_example_encode(sink->encoding, example, sink->line, sink->out, err);
}

/* Adds the row's samples, or none if any of its examples is bad. */
static gn_status encode_row(const job *j, int64_t i, gn_samples *out, gn_error *err) {
    row_sink sink = {j->encoding, out, gn_rows_line(j->rows, i), false};
    const gn_samples before = *out;
    cJSON *row;
    gn_status status = gn_rows_parse(j->rows, i, &row, err);
    if (status) return status;
    status = gn_format_row(j->format, row, take_example, &sink, err);
    cJSON_Delete(row);
    if (status) {
        out->n = before.n;
        out->n_tokens = before.n_tokens;
        out->counts = before.counts;
    } else if (!sink.any) {
        out->counts.left_out++;
    }
    return status;
}

static void encode_block(job *j, int64_t index) {
    block *b = &j->blocks[index];
    const int64_t begin = index * BLOCK_ROWS, rows = gn_rows_count(j->rows);
    const int64_t end = begin + BLOCK_ROWS < rows ? begin + BLOCK_ROWS : rows;
    for (int64_t i = begin; i < end; i++) {
        gn_error err = {0};
        const gn_status status = encode_row(j, i, &b->samples, &err);
        b->samples.counts.rows++;
        if (!status) continue;
        if (j->skip_bad_rows && status == GN_EFORMAT) {
            if (b->samples.counts.bad_rows++ > 0) continue;
            b->skipped = err;
            b->line = gn_rows_line(j->rows, i);
        } else {
            b->error = err;
            b->line = gn_rows_line(j->rows, i);
            atomic_store(&j->failed, true);
            return;
        }
    }
}

/* Blocks are begun in order, so those before one that failed are done in the end. */
static bool encode_next(job *j) {
    if (atomic_load(&j->failed)) return false;
    const int64_t index = atomic_fetch_add(&j->next, 1);
    if (index >= j->n_blocks) return false;
    encode_block(j, index);
    return true;
}

static void *encode_blocks(void *arg) {
    while (encode_next(arg)) {
    }
    return NULL;
}

static void run_threads(job *j, const gn_dataset_options *o) {
    pthread_t others[MAX_THREADS];
    const int64_t rows = gn_rows_count(j->rows);
    int threads = o->threads > 0 ? o->threads : (int)sysconf(_SC_NPROCESSORS_ONLN), n = 0;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    while (n < threads - 1 && n < j->n_blocks - 1 &&
           pthread_create(&others[n], NULL, encode_blocks, j) == 0)
        n++;
    while (encode_next(j)) {
        const int64_t begun = atomic_load(&j->next) * BLOCK_ROWS;
        if (o->progress) o->progress(o->user, begun < rows ? begun : rows, rows);
    }
    while (n > 0) pthread_join(others[--n], NULL);
}

/* Joins the blocks' samples, or says which row was the first bad one. */
static gn_status join_blocks(const opening *o, job *j, gn_samples *out) {
    const char *path = gn_rows_path(j->rows);
    const block *skipped = NULL;
    for (int64_t i = 0; i < j->n_blocks; i++) {
        block *b = &j->blocks[i];
        if (b->error.status)
            return gn_fail(o->err, b->error.status, "%.200s:%lld: %.250s", path, (long long)b->line,
                           b->error.message);
        if (b->skipped.status && !skipped) skipped = b;
        if (gn_samples_append(out, &b->samples)) return no_memory(o->err);
        gn_samples_free(&b->samples);
    }
    if (skipped) note(o, "%s:%lld: %s", path, (long long)skipped->line, skipped->skipped.message);
    return GN_OK;
}

static gn_status encode_rows(const opening *o, const gn_rows *rows, gn_format format,
                             gn_samples *out) {
    job j = {.rows = rows,
             .encoding = &o->encoding,
             .format = format,
             .skip_bad_rows = o->options->skip_bad_rows,
             .n_blocks = (gn_rows_count(rows) + BLOCK_ROWS - 1) / BLOCK_ROWS};
    j.blocks = calloc((size_t)j.n_blocks, sizeof *j.blocks);
    if (!j.blocks) return no_memory(o->err);
    run_threads(&j, o->options);
    const gn_status status = join_blocks(o, &j, out);
    for (int64_t i = 0; i < j.n_blocks; i++) gn_samples_free(&j.blocks[i].samples);
    free(j.blocks);
    return status;
}

/* ---- files ---- */

/* FILE or FILE:WEIGHT; a file whose name ends like a weight is taken by its whole name. */
static gn_status read_name(const char *text, char **path, double *weight, gn_error *err) {
    const char *colon = strrchr(text, ':');
    char *end;
    *weight = 1;
    *path = strdup(text);
    if (!*path) return no_memory(err);
    if (!colon || access(text, F_OK) == 0) return GN_OK;
    const double value = strtod(colon + 1, &end);
    if (end == colon + 1 || *end) return GN_OK;
    (*path)[colon - text] = 0;
    *weight = value;
    if (value > 0 && value <= MAX_WEIGHT) return GN_OK;
    return gn_fail(err, GN_EINVAL, "%s: a weight must be over 0 and at most %d", text, MAX_WEIGHT);
}

static gn_status choose_format(const opening *o, const gn_rows *rows, gn_format *format) {
    *format = o->options->format;
    for (int64_t i = 0; *format == GN_FORMAT_AUTO && i < gn_rows_count(rows); i++) {
        gn_error why = {0};
        cJSON *row;
        gn_status status = gn_rows_parse(rows, i, &row, &why);
        if (!status) {
            status = gn_format_detect(row, format, &why);
            cJSON_Delete(row);
        } else if (o->options->skip_bad_rows && status == GN_EFORMAT) {
            continue;
        }
        if (status)
            return gn_fail(o->err, status, "%.200s:%lld: %.250s", gn_rows_path(rows),
                           (long long)gn_rows_line(rows, i), why.message);
        note(o, "%s: format %s, by the fields of line %lld (--dataset-format chooses another)",
             gn_rows_path(rows), gn_format_name(*format), (long long)gn_rows_line(rows, i));
    }
    return GN_OK;
}

static gn_hash file_key(const opening *o, const gn_rows *rows, gn_format format) {
    gn_hash key = o->hash;
    gn_hash_add(&key, &format, sizeof format);
    gn_rows_add_to_hash(rows, &key);
    return key;
}

static void write_cache(const opening *o, const gn_samples *samples, const gn_hash *key) {
    gn_error why = {0};
    if (o->options->cache_dir && samples->n > 0 &&
        gn_samples_write(samples, o->options->cache_dir, key, &why))
        note(o, "the tokenized data set is not kept: %s", why.message);
}

/* The samples of a file, from the cache if they are there and whole. */
static gn_status read_samples(const opening *o, const gn_rows *rows, gn_format format,
                              const gn_hash *key, gn_samples *samples) {
    gn_error why = {0};
    gn_status status = GN_ENOENT;
    if (o->options->cache_dir)
        status = gn_samples_read(samples, o->options->cache_dir, key, o->encoding.vocab, &why);
    if (!status) {
        note(o, "%s: tokenized before, taken from %s", gn_rows_path(rows), o->options->cache_dir);
        if (o->options->skip_bad_rows || samples->counts.bad_rows == 0) return GN_OK;
        gn_samples_free(samples);
    } else if (status != GN_ENOENT) {
        note(o, "tokenizing anew: %s", why.message);
    }
    status = encode_rows(o, rows, format, samples);
    if (!status) write_cache(o, samples, key);
    return status;
}

static gn_status add_file(opening *o, const gn_rows *rows, gn_dataset_file *file) {
    gn_samples samples = {0};
    gn_status status = choose_format(o, rows, &file->format);
    if (status) return status;
    const gn_hash key = file_key(o, rows, file->format);
    status = read_samples(o, rows, file->format, &key, &samples);
    file->first = o->d->samples.n;
    file->n = samples.n;
    file->n_tokens = samples.n_tokens;
    file->counts = samples.counts;
    if (!status && samples.n == 0)
        status = gn_fail(o->err, GN_EFORMAT,
                         "%s: nothing to learn from: of %lld rows %lld are bad, %lld have no reply",
                         file->path, (long long)file->counts.rows, (long long)file->counts.bad_rows,
                         (long long)file->counts.left_out);
    if (!status && gn_samples_append(&o->d->samples, &samples)) status = no_memory(o->err);
    gn_samples_free(&samples);
    gn_hash_add(&o->d->hash, &key, sizeof key);
    gn_hash_add(&o->d->hash, &file->weight, sizeof file->weight);
    if (!status && file->counts.bad_rows > 0)
        note(o, "%s: %lld of %lld rows are bad and were skipped", file->path,
             (long long)file->counts.bad_rows, (long long)file->counts.rows);
    return status;
}

static gn_status open_file(opening *o, int i) {
    gn_dataset_file *file = &o->d->files[i];
    gn_rows *rows = NULL;
    char *path;
    gn_status status = read_name(o->options->files[i], &path, &file->weight, o->err);
    file->path = path;
    o->d->n_files = i + 1;
    if (!status) status = gn_rows_open(&rows, file->path, o->err);
    if (!status) status = add_file(o, rows, file);
    gn_rows_close(rows);
    return status;
}

/* ---- opening ---- */

/* Everything but the rows that decides how they are tokenized. */
static gn_status hash_encoding(opening *o) {
    const gn_encoding *e = &o->encoding;
    const int32_t numbers[] = {ENCODING_VERSION,   e->source_max_len, e->target_max_len,
                               e->train_on_source, e->max_len,        e->vocab};
    char *path, *model;
    size_t size;
    if (asprintf(&path, "%s/tokenizer.model", o->options->model_dir) < 0) return no_memory(o->err);
    const gn_status status = gn_read_text(path, &model, &size, o->err);
    free(path);
    if (status) return status;
    o->hash = (gn_hash)GN_HASH_INIT;
    gn_hash_add(&o->hash, numbers, sizeof numbers);
    gn_hash_add(&o->hash, model, size);
    gn_chat_template_add_to_hash(o->chat, &o->hash);
    free(model);
    return GN_OK;
}

static gn_status check_options(const gn_dataset_options *o, gn_error *err) {
    if (o->n_files < 1) return gn_fail(err, GN_EINVAL, "--dataset FILE is missing");
    if (o->n_files > MAX_FILES) return gn_fail(err, GN_EINVAL, "over %d data sets", MAX_FILES);
    if (o->source_max_len < 1 || o->target_max_len < 2 || o->max_len < 2)
        return gn_fail(err, GN_EINVAL,
                       "source lengths must be at least 1, target lengths at least 2");
    return GN_OK;
}

static gn_status open_all(opening *o) {
    const gn_dataset_options *options = o->options;
    gn_status status = gn_tokenizer_open(&o->tokenizer, options->model_dir, options->vocab, o->err);
    if (!status)
        status =
            gn_chat_template_open(&o->chat, options->chat_template, options->model_dir, o->err);
    o->encoding = (gn_encoding){.tokenizer = o->tokenizer,
                                .chat = o->chat,
                                .source_max_len = options->source_max_len,
                                .target_max_len = options->target_max_len,
                                .max_len = options->max_len,
                                .vocab = options->vocab,
                                .train_on_source = options->train_on_source};
    if (!status) status = hash_encoding(o);
    for (int i = 0; i < options->n_files && !status; i++) status = open_file(o, i);
    return status;
}

gn_status gn_dataset_open(gn_dataset **out, const gn_dataset_options *options, gn_error *err) {
    *out = NULL;
    gn_status status = check_options(options, err);
    if (status) return status;
    opening o = {.options = options, .err = err, .d = calloc(1, sizeof *o.d)};
    if (o.d) o.d->files = calloc((size_t)options->n_files, sizeof *o.d->files);
    if (o.d) o.d->hash = (gn_hash)GN_HASH_INIT;
    status = o.d && o.d->files ? open_all(&o) : no_memory(err);
    gn_tokenizer_close(o.tokenizer);
    gn_chat_template_close(o.chat);
    if (status)
        gn_dataset_close(o.d);
    else
        *out = o.d;
    return status;
}

void gn_dataset_close(gn_dataset *d) {
    if (!d) return;
    for (int i = 0; i < d->n_files; i++) free((char *)d->files[i].path);
    free(d->files);
    gn_samples_free(&d->samples);
    free(d);
}

/* ---- reading ---- */

int64_t gn_dataset_size(const gn_dataset *d) {
    return d->samples.n;
}

static int file_of(const gn_dataset *d, int64_t sample) {
    int low = 0, high = d->n_files - 1; /* files are not empty */
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (d->files[middle].first <= sample)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

gn_sample gn_dataset_sample(const gn_dataset *d, int64_t i) {
    const gn_samples *s = &d->samples;
    return (gn_sample){.ids = s->ids + s->starts[i],
                       .labels = s->labels + s->starts[i],
                       .n = (int32_t)(s->starts[i + 1] - s->starts[i]),
                       .file = file_of(d, i),
                       .line = s->lines[i]};
}

int gn_dataset_files(const gn_dataset *d) {
    return d->n_files;
}

gn_dataset_file gn_dataset_file_at(const gn_dataset *d, int file) {
    return d->files[file];
}

gn_hash gn_dataset_hash(const gn_dataset *d) {
    return d->hash;
}

/* ---- splitting ---- */

/* Purposes of random numbers, which epochs (batch.c) do not reach. */
static const uint64_t draw_eval = UINT64_MAX, draw_max_train = UINT64_MAX - 1,
                      draw_max_eval = UINT64_MAX - 2;

/* Keeps at most max of n items, in order. */
static int64_t keep(int64_t *items, int64_t n, int64_t max, const gn_split_options *o,
                    uint64_t purpose) {
    if (max <= 0 || max >= n) return n;
    if (o->first) return max;
    gn_draw_some draw = {gn_random_open(o->seed, purpose), max, n};
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++)
        if (gn_draw_next(&draw)) items[kept++] = items[i];
    return kept;
}

gn_status gn_split_open(gn_split *split, const gn_dataset *d, const gn_split_options *o,
                        gn_error *err) {
    const int64_t n = gn_dataset_size(d);
    *split = (gn_split){0};
    if (o->eval_size < 0 || o->eval_size >= n)
        return gn_fail(err, GN_EINVAL,
                       "%lld samples cannot be held out: the data set has %lld, and some must be "
                       "trained on",
                       (long long)o->eval_size, (long long)n);
    split->train = malloc((size_t)n * sizeof *split->train);
    split->eval = malloc(((size_t)o->eval_size + 1) * sizeof *split->eval);
    if (!split->train || !split->eval) {
        gn_split_close(split);
        return no_memory(err);
    }
    gn_draw_some draw = {gn_random_open(o->seed, draw_eval), o->eval_size, n};
    for (int64_t i = 0; i < n; i++) {
        if (gn_draw_next(&draw))
            split->eval[split->n_eval++] = i;
        else
            split->train[split->n_train++] = i;
    }
    split->n_train = keep(split->train, split->n_train, o->max_train, o, draw_max_train);
    split->n_eval = keep(split->eval, split->n_eval, o->max_eval, o, draw_max_eval);
    return GN_OK;
}

void gn_split_close(gn_split *split) {
    free(split->train);
    free(split->eval);
    *split = (gn_split){0};
}
