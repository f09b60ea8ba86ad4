/* train_mmlu.c - MMLU between steps: as many questions in a batch as training's batches have room
 * for, so that it takes no memory of its own unless a single question does. */
#include <math.h>
#include <stdlib.h>

#include "trainer/train_run.h"

/* Questions that are scored together. */
typedef struct batch {
    int64_t first;
    int32_t n, rows;
    int32_t *ids, *labels; /* (rows) */
    int32_t *row0, *pos0;
    float *nll; /* (n, GN_MMLU_CHOICES) */
} batch;

static bool open_batch(batch *b, const gn_batch_limits *limits) {
    const size_t rows = (size_t)limits->rows, seqs = (size_t)limits->seqs;
    *b = (batch){.ids = malloc(rows * sizeof *b->ids),
                 .labels = malloc(rows * sizeof *b->labels),
                 .row0 = calloc(seqs + 1, sizeof *b->row0),
                 .pos0 = calloc(seqs, sizeof *b->pos0),
                 .nll = malloc(seqs * GN_MMLU_CHOICES * sizeof *b->nll)};
    return b->ids && b->labels && b->row0 && b->pos0 && b->nll;
}

static void close_batch(batch *b) {
    free(b->ids);
    free(b->labels);
    free(b->row0);
    free(b->pos0);
    free(b->nll);
}

/* The questions from b->first on that fit. */
static void fill_batch(batch *b, const gn_mmlu *mmlu, const gn_batch_limits *limits) {
    b->n = b->rows = 0;
    while (b->n < limits->seqs && b->first + b->n < gn_mmlu_count(mmlu)) {
        const gn_mmlu_question q = gn_mmlu_at(mmlu, b->first + b->n);
        if (q.n > limits->rows - b->rows) return;
        for (int32_t t = 0; t < q.n; t++, b->rows++) {
            b->ids[b->rows] = q.ids[t];
            b->labels[b->rows] = t < q.source ? GN_IGNORED_LABEL : q.ids[t];
        }
        b->row0[++b->n] = b->rows;
    }
}

static gn_status score(const gn_train_run *run, const batch *b) {
    gn_mmlu *mmlu = run->data.mmlu;
    const gn_train_batch batch = {.rows = b->rows,
                                  .ids = b->ids,
                                  .labels = b->labels,
                                  .seqs = {.n = b->n, .row0 = b->row0, .pos0 = b->pos0}};
    double loss;
    const gn_status status =
        gn_train_step_choose(run->step, &batch, gn_trainable_views(run->trainable),
                             gn_mmlu_letters(mmlu), GN_MMLU_CHOICES, &loss, b->nll);
    if (status) return status;
    for (int32_t i = 0; i < b->n; i++)
        gn_mmlu_add(mmlu, b->first + i, b->nll + (int64_t)i * GN_MMLU_CHOICES);
    gn_mmlu_add_loss(mmlu, loss);
    return GN_OK;
}

/* Each process takes its share of the batches. */
static gn_status score_all(gn_train_run *run, batch *b) {
    gn_mmlu *mmlu = run->data.mmlu;
    gn_status status = GN_OK;
    gn_mmlu_clear(mmlu);
    for (int64_t k = 0; !status && b->first < gn_mmlu_count(mmlu); k++, b->first += b->n) {
        fill_batch(b, mmlu, &run->data.limits);
        if (k % run->c->size == run->c->rank) status = score(run, b);
        if (run->metrics)
            gn_progress("MMLU: %lld of %lld questions", (long long)(b->first + b->n),
                        (long long)gn_mmlu_count(mmlu));
    }
    if (status || run->c->size == 1) return status;
    int n;
    double *sums = gn_mmlu_sums(mmlu, &n);
    return run->c->sum_numbers(run->c, sums, n);
}

gn_status gn_train_mmlu(gn_train_run *run) {
    batch b;
    gn_status status = open_batch(&b, &run->data.limits) ? score_all(run, &b) : GN_ENOMEM;
    close_batch(&b);
    if (status)
        return gn_fail(run->err, status, "step %lld: MMLU: %s", (long long)run->state.step,
                       gn_status_text(status));
    const double loss = gn_mmlu_read(run->data.mmlu).loss;
    if (!isfinite(loss))
        return gn_fail(run->err, GN_EINVAL,
                       "step %lld: the loss of MMLU's answers is %g: training has diverged, or the "
                       "base model is broken",
                       (long long)run->state.step, loss);
    return gn_train_report_mmlu(run);
}
