/* test_batch.c - the order of samples, packing, flat batches, and going on from a position. */
#include "trainer/batch.h"

#include <criterion/criterion.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/folder.h"
#include "trainer/shuffle.h"

#define TINY GN_SOURCE_DIR "/tests/golden/data/tiny-bf16"

enum { VOCAB = 512, MAX_LEN = 40 };

TestSuite(batch, .init = test_folder_make, .fini = test_folder_remove);

/* Sample i of file `tag` has 2 to MAX_LEN tokens: `tag`, then 10 + i %% 400 again and again; every
 * third token is not learned. */
static void write_samples(const char *name, int tag, int n) {
    FILE *f = fopen(test_path(name), "wb");
    cr_assert(f);
    for (int i = 0; i < n; i++) {
        const int len = 2 + (i * 7919 + tag) % (MAX_LEN - 1);
        fprintf(f, "{\"input_ids\":[%d", tag);
        for (int k = 1; k < len; k++) fprintf(f, ",%d", 10 + i % 400);
        fprintf(f, "],\"labels\":[%d", tag);
        for (int k = 1; k < len; k++) fprintf(f, ",%d", k % 3 ? 10 + i % 400 : -100);
        fprintf(f, "]}\n");
    }
    cr_assert_eq(fclose(f), 0);
}

/* Files named by number, with these weights and as many samples. */
static gn_dataset *open_data(int n_files, const char *const *weights, const int *n) {
    const char *files[4];
    gn_dataset *d;
    gn_error err = {0};
    for (int i = 0; i < n_files; i++) {
        char name[16];
        snprintf(name, sizeof name, "%d.jsonl", i);
        write_samples(name, 3 + i, n[i]);
        char *file = test_alloc(512);
        snprintf(file, 512, "%s%s", test_path(name), weights[i]);
        files[i] = file;
    }
    const gn_dataset_options o = {.files = files,
                                  .n_files = n_files,
                                  .model_dir = TINY,
                                  .vocab = VOCAB,
                                  .source_max_len = 16,
                                  .target_max_len = 16,
                                  .max_len = MAX_LEN,
                                  .threads = 1};
    cr_assert_eq(gn_dataset_open(&d, &o, &err), GN_OK, "%s", err.message);
    return d;
}

static gn_dataset *open_one(int n) {
    return open_data(1, (const char *[]){""}, &n);
}

/* Of all samples. */
static gn_batcher *open_batcher(const gn_dataset *d, gn_batcher_options o) {
    const int64_t n = gn_dataset_size(d);
    int64_t *all = test_alloc((size_t)n * sizeof *all);
    for (int64_t i = 0; i < n; i++) all[i] = i;
    gn_batcher *b;
    gn_error err = {0};
    if (!o.samples) {
        o.samples = all;
        o.n_samples = n;
    }
    cr_assert_eq(gn_batcher_open(&b, d, &o, &err), GN_OK, "%s", err.message);
    return b;
}

/* Every sequence is its sample, and the batch keeps its limits. */
static void check_batch(const gn_batcher *b, const gn_dataset *d, const gn_micro_batch *batch) {
    const gn_batch_limits limits = gn_batcher_limits(b);
    int32_t learned = 0;
    cr_assert(batch->n_seqs > 0 && batch->n_seqs <= limits.seqs && batch->rows <= limits.rows);
    cr_assert(batch->row0[0] == 0 && batch->row0[batch->n_seqs] == batch->rows);
    for (int32_t i = 0; i < batch->n_seqs; i++) {
        const gn_sample s = gn_dataset_sample(d, batch->samples[i]);
        const int32_t at = batch->row0[i];
        cr_assert(batch->row0[i + 1] - at == s.n && s.n <= limits.seq_rows && batch->pos0[i] == 0);
        cr_assert(!memcmp(batch->ids + at, s.ids, (size_t)s.n * sizeof *s.ids));
        cr_assert(!memcmp(batch->labels + at, s.labels, (size_t)s.n * sizeof *s.labels));
        for (int32_t k = 1; k < s.n; k++) learned += s.labels[k] != GN_NOT_LEARNED;
    }
    cr_assert_eq(batch->n_learned, learned);
}

/* Runs one epoch; counts[i] is how often sample i came. Returns how many samples did. */
static int64_t run_epoch(gn_batcher *b, const gn_dataset *d, int *counts, int64_t *order) {
    const int64_t batches = gn_batcher_epoch_batches(b);
    int64_t n = 0;
    memset(counts, 0, (size_t)gn_dataset_size(d) * sizeof *counts);
    for (int64_t k = 0; k < batches; k++) {
        const gn_micro_batch batch = gn_batcher_next(b);
        check_batch(b, d, &batch);
        cr_assert_eq(batch.ends_epoch, k == batches - 1);
        for (int32_t i = 0; i < batch.n_seqs; i++, n++) {
            counts[batch.samples[i]]++;
            if (order) order[n] = batch.samples[i];
        }
    }
    return n;
}

Test(batch, files_order) {
    gn_dataset *d = open_one(11);
    gn_batcher *b = open_batcher(d, (gn_batcher_options){.batch_size = 4});
    int64_t order[11];
    int counts[11];
    cr_assert_eq(gn_batcher_epoch_batches(b), 3);
    for (int epoch = 0; epoch < 2; epoch++) {
        cr_assert_eq(run_epoch(b, d, counts, order), 11);
        for (int i = 0; i < 11; i++) cr_expect_eq(order[i], i);
    }
    gn_batcher_close(b);
    gn_batcher_close(NULL);
    gn_dataset_close(d);
}

/* Orders are the same on every machine: this one was computed by another program. */
Test(batch, shuffles_are_fixed) {
    gn_random r = gn_random_open(1, 2);
    int64_t items[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    gn_shuffle(&r, items, 8);
    char text[64] = "";
    for (int i = 0; i < 8; i++) sprintf(text + strlen(text), "%d ", (int)items[i]);
    cr_expect_str_eq(text, "1 3 0 5 4 2 7 6 ", "%s", text);
    for (uint64_t bound = 1; bound < 50; bound++)
        for (int i = 0; i < 200; i++) cr_assert_lt(gn_random_below(&r, bound), bound);
    cr_assert_lt(gn_random_below(&r, UINT64_MAX), UINT64_MAX);
}

/* Chi squared over which sample comes first: 63 degrees of freedom, p = 1e-6 at 129. */
Test(batch, shuffles_are_fair) {
    enum { N = 64, DRAWS = 6400 };
    int first[N] = {0};
    double chi = 0;
    for (int seed = 0; seed < DRAWS; seed++) {
        gn_random r = gn_random_open((uint64_t)seed, 0);
        int64_t items[N];
        for (int i = 0; i < N; i++) items[i] = i;
        gn_shuffle(&r, items, N);
        first[items[0]]++;
    }
    for (int i = 0; i < N; i++) chi += (first[i] - 100.0) * (first[i] - 100.0) / 100.0;
    cr_expect_lt(chi, 129);
}

Test(batch, epochs_differ_and_repeat) {
    enum { N = 200 };
    gn_dataset *d = open_one(N);
    const gn_batcher_options o = {.batch_size = 3, .shuffle = true, .seed = 5};
    gn_batcher *a = open_batcher(d, o), *b = open_batcher(d, o);
    int64_t first[N], second[N], again[N];
    int counts[N];
    run_epoch(a, d, counts, first);
    for (int i = 0; i < N; i++) cr_expect_eq(counts[i], 1);
    run_epoch(a, d, counts, second);
    for (int i = 0; i < N; i++) cr_expect_eq(counts[i], 1);
    cr_expect(memcmp(first, second, sizeof first));
    run_epoch(b, d, counts, again);
    cr_expect(!memcmp(first, again, sizeof first));
    gn_batcher_close(a);
    gn_batcher_close(b);
    gn_dataset_close(d);
}

Test(batch, weights) {
    const int n[] = {100, 40, 30};
    gn_dataset *d = open_data(3, (const char *[]){"", ":2.25", ":0.1"}, n);
    gn_batcher *b = open_batcher(d, (gn_batcher_options){.batch_size = 8, .shuffle = true});
    int counts[170], total[170] = {0};
    for (int epoch = 0; epoch < 40; epoch++) {
        cr_assert_eq(run_epoch(b, d, counts, NULL), 100 + 90 + 3);
        int extra = 0, some = 0;
        for (int i = 0; i < 170; i++) {
            total[i] += counts[i];
            if (i < 100) cr_assert_eq(counts[i], 1);
            if (i >= 100 && i < 140) {
                cr_assert(counts[i] == 2 || counts[i] == 3);
                extra += counts[i] - 2;
            }
            if (i >= 140) some += counts[i];
        }
        cr_assert(extra == 10 && some == 3);
    }
    for (int i = 100; i < 140; i++) cr_expect(total[i] > 80 && total[i] < 120, "%d", total[i]);
    for (int i = 140; i < 170; i++) cr_expect(total[i] < 15, "%d", total[i]);
    gn_batcher_close(b);
    b = open_batcher(d, (gn_batcher_options){.batch_size = 8, .ignore_weights = true});
    cr_expect_eq(run_epoch(b, d, counts, NULL), 170);
    gn_batcher_close(b);
    gn_dataset_close(d);
}

/* Within a step lengths are close, the first sample is the longest, and epochs differ. */
Test(batch, group_by_length) {
    enum { N = 1000, STEP = 8 };
    gn_dataset *d = open_one(N);
    gn_batcher *b = open_batcher(d, (gn_batcher_options){.batch_size = 4,
                                                         .step_rows = STEP,
                                                         .shuffle = true,
                                                         .group_by_length = true,
                                                         .seed = 1});
    int64_t order[N], second[N];
    int counts[N], spread = 0;
    cr_assert_eq(run_epoch(b, d, counts, order), N);
    for (int i = 0; i < N; i++) cr_assert_eq(counts[i], 1);
    cr_expect_eq(gn_dataset_sample(d, order[0]).n, gn_batcher_limits(b).seq_rows);
    for (int i = STEP; i + STEP <= N; i += STEP) {
        int low = MAX_LEN, high = 0;
        for (int k = i; k < i + STEP; k++) {
            const int len = gn_dataset_sample(d, order[k]).n;
            low = len < low ? len : low;
            high = len > high ? len : high;
        }
        spread += high - low;
    }
    cr_expect_lt(spread, 5 * N / STEP, "%d", spread); /* of at most 38 each; 30 or so at random */
    run_epoch(b, d, counts, second);
    cr_expect(memcmp(order, second, sizeof order));
    gn_batcher_close(b);
    gn_dataset_close(d);
}

Test(batch, packing) {
    enum { N = 1000, PACK = 64 };
    gn_dataset *d = open_one(N);
    gn_batcher *b = open_batcher(
        d, (gn_batcher_options){.batch_size = 1, .shuffle = true, .pack_len = PACK, .seed = 3});
    int counts[N];
    int64_t tokens = 0;
    for (int64_t i = 0; i < N; i++) tokens += gn_dataset_sample(d, i).n;
    for (int epoch = 0; epoch < 3; epoch++) {
        const int64_t rows = gn_batcher_epoch_batches(b);
        cr_expect(rows * PACK < tokens * 21 / 20, "%d rows for %d tokens", (int)rows, (int)tokens);
        cr_assert_eq(run_epoch(b, d, counts, NULL), N);
        for (int i = 0; i < N; i++) cr_assert_eq(counts[i], 1);
    }
    gn_batcher_close(b);
    b = open_batcher(d, (gn_batcher_options){.batch_size = 5, .pack_len = MAX_LEN});
    cr_assert_eq(run_epoch(b, d, counts, NULL), N);
    gn_batcher_close(b);
    gn_dataset_close(d);
}

/* From any position, what follows is what would have followed. */
Test(batch, positions) {
    enum { N = 50 };
    gn_dataset *d = open_one(N);
    for (int packed = 0; packed < 2; packed++) {
        const gn_batcher_options o = {
            .batch_size = 3, .shuffle = true, .seed = 9, .pack_len = packed ? 100 : 0};
        gn_batcher *a = open_batcher(d, o), *b = open_batcher(d, o);
        gn_error err = {0};
        for (int k = 0; k < 60; k++) {
            const gn_batch_position at = gn_batcher_position(a);
            const gn_micro_batch x = gn_batcher_next(a);
            cr_assert_eq(gn_batcher_seek(b, &at, &err), GN_OK, "%s", err.message);
            const gn_micro_batch y = gn_batcher_next(b);
            cr_assert(x.rows == y.rows && x.n_seqs == y.n_seqs && x.epoch == y.epoch);
            cr_assert(!memcmp(x.samples, y.samples, (size_t)x.n_seqs * sizeof *x.samples));
            cr_assert(!memcmp(x.labels, y.labels, (size_t)x.rows * sizeof *x.labels));
        }
        cr_assert(gn_batcher_position(a).epoch > 1);

        gn_batcher_options other = o;
        other.seed++;
        gn_batcher *c = open_batcher(d, other);
        const gn_batch_position at = gn_batcher_position(a);
        cr_expect_eq(gn_batcher_seek(c, &at, &err), GN_EMISMATCH);
        const gn_batch_position wrong[] = {
            {at.key, -1, 0}, {at.key, 0, -3}, {at.key, 0, 3000}, {at.key, 0, 1}};
        for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
            cr_expect_eq(gn_batcher_seek(a, &wrong[i], &err), GN_EFORMAT);
        gn_batcher_close(a);
        gn_batcher_close(b);
        gn_batcher_close(c);
    }
    gn_dataset_close(d);
}

Test(batch, a_part_of_the_samples) {
    gn_dataset *d = open_one(20);
    const int64_t some[] = {2, 3, 7, 19};
    gn_batcher *b = open_batcher(
        d, (gn_batcher_options){.samples = some, .n_samples = 4, .batch_size = 3, .shuffle = true});
    int counts[20];
    cr_assert_eq(run_epoch(b, d, counts, NULL), 4);
    for (int i = 0; i < 4; i++) cr_expect_eq(counts[some[i]], 1);
    gn_batcher_close(b);
    gn_dataset_close(d);
}

Test(batch, refusals) {
    gn_dataset *d = open_one(20);
    static const int64_t all[] = {0, 1, 2, 3}, twice[] = {0, 0}, outside[] = {0, 20}, low[] = {-1};
    const struct {
        gn_batcher_options o;
        const char *why;
    } cases[] = {
        {{.samples = all, .n_samples = 4}, "at least one row"},
        {{.samples = all, .batch_size = 1}, "no sample"},
        {{.samples = twice, .n_samples = 2, .batch_size = 1}, "must be in order"},
        {{.samples = outside, .n_samples = 2, .batch_size = 1}, "the data set's"},
        {{.samples = low, .n_samples = 1, .batch_size = 1}, "the data set's"},
        {{.samples = all, .n_samples = 4, .batch_size = 2, .step_rows = 3}, "batches of 2"},
        {{.samples = all, .n_samples = 4, .batch_size = 1, .group_by_length = true}, "order"},
        {{.samples = all,
          .n_samples = 4,
          .batch_size = 1,
          .shuffle = true,
          .group_by_length = true,
          .pack_len = 64},
         "no use"},
        {{.samples = all, .n_samples = 4, .batch_size = 1, .pack_len = 8}, "cannot hold"},
        {{.samples = all, .n_samples = 4, .batch_size = 1, .pack_len = -8}, "-8 tokens"},
        {{.samples = all, .n_samples = 4, .batch_size = 1 << 30, .step_rows = 1 << 30}, "batches"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gn_batcher *b;
        gn_error err = {0};
        cr_expect(gn_batcher_open(&b, d, &cases[i].o, &err) && !b, "case %zu", i);
        cr_expect(strstr(err.message, cases[i].why), "case %zu: %s", i, err.message);
    }
    gn_dataset_close(d);
}

/* Batches, and the passage from one epoch to the next, take no memory. */
Test(batch, allocates_nothing) {
    gn_dataset *d = open_one(300);
    gn_batcher *b = open_batcher(d, (gn_batcher_options){.batch_size = 8, .shuffle = true});
    gn_batcher *packed =
        open_batcher(d, (gn_batcher_options){.batch_size = 2, .shuffle = true, .pack_len = 64});
    const size_t before = mallinfo2().uordblks;
    for (int i = 0; i < 500; i++) {
        (void)gn_batcher_next(b);
        (void)gn_batcher_next(packed);
        cr_assert_eq(mallinfo2().uordblks, before);
    }
    gn_batcher_close(b);
    gn_batcher_close(packed);
    gn_dataset_close(d);
}
