/* score.c - one sequence at a time through the forward pass, in chunks. */
#include "engine/score.h"

#include <stdlib.h>

#include "engine/adapter_memory.h"
#include "engine/memory_plan.h"
#include "engine/sample.h"

enum { CHUNK_ROWS = 256, LOGITS_ROWS = 32 };

struct gn_scorer {
    gn_model *model;
    gn_forward *forward;
    int32_t context, max_blocks;
    int32_t *blocks; /* the identity: one sequence has the cache to itself */
};

static gn_forward_options limits_for(int32_t context, gn_kv_dtype kv) {
    return (gn_forward_options){.max_rows = CHUNK_ROWS,
                                .max_seqs = 1,
                                .max_logits = LOGITS_ROWS,
                                .kv_blocks =
                                    (context + GN_KV_BLOCK_TOKENS - 1) / GN_KV_BLOCK_TOKENS,
                                .context = context,
                                .kv_dtype = kv};
}

gn_status gn_scorer_open(gn_scorer **out, gn_model *model, int32_t context, gn_kv_dtype kv,
                         gn_error *err) {
    gn_scorer *s = calloc(1, sizeof *s);
    if (!s) return gn_fail(err, GN_ENOMEM, "out of memory");
    s->model = model;
    s->context = context;
    const gn_forward_options limits = limits_for(context, kv);
    s->max_blocks = limits.kv_blocks;
    s->blocks = malloc((size_t)s->max_blocks * sizeof *s->blocks);
    const gn_status status = s->blocks ? gn_forward_open(&s->forward, model, &limits, err)
                                       : gn_fail(err, GN_ENOMEM, "out of memory");
    if (status) {
        gn_scorer_close(s);
        return status;
    }
    for (int32_t i = 0; i < s->max_blocks; i++) s->blocks[i] = i;
    *out = s;
    return GN_OK;
}

void gn_scorer_close(gn_scorer *s) {
    if (!s) return;
    gn_forward_close(s->forward);
    free(s->blocks);
    free(s);
}

gn_status gn_scorer_plan(gn_memory_plan *plan, gn_model *model, int32_t context, gn_kv_dtype kv,
                         int64_t budget, gn_adapter *const *adapters, int32_t n_adapters,
                         gn_error *err) {
    const gn_forward_options limits = limits_for(context, kv);
    gn_engine_options options = {
        .memory_bytes = budget, .adapters = adapters, .n_adapters = n_adapters};
    for (int32_t i = 0; i < n_adapters; i++)
        options.adapter_bytes += gn_adapter_memory_bytes(adapters[i]);
    if (n_adapters == 0) options.adapter_bytes = -1;
    return gn_memory_plan_model(plan, model, &limits, &options, err);
}

/* Rows [at, rows) of a chunk whose first is at `position`. */
static gn_status visit_rows(gn_scorer *s, int32_t at, int32_t rows, int32_t position,
                            void (*on_row)(void *, int32_t, const float *), void *user) {
    const size_t vocab = (size_t)s->model->config.vocab;
    for (int32_t n; at < rows; at += n) {
        int32_t which[LOGITS_ROWS];
        const float *logits;
        n = rows - at < LOGITS_ROWS ? rows - at : LOGITS_ROWS;
        for (int32_t i = 0; i < n; i++) which[i] = at + i;
        const gn_status status = gn_forward_logits(s->forward, which, n, &logits);
        if (status) return status;
        for (int32_t i = 0; i < n; i++) on_row(user, position + at + i, logits + (size_t)i * vocab);
    }
    return GN_OK;
}

static gn_status run_chunks(gn_scorer *s, const int32_t *ids, int32_t n, int32_t first,
                            const gn_adapter_use *uses, int32_t n_uses,
                            void (*on_row)(void *, int32_t, const float *), void *user) {
    gn_status status = GN_OK;
    for (int32_t at = 0, rows; !status && at < n; at += rows) {
        rows = n - at < CHUNK_ROWS ? n - at : CHUNK_ROWS;
        const int32_t row0[] = {0, rows}, pos0[] = {at}, use0[] = {0, n_uses};
        const gn_batch batch = {.rows = rows,
                                .ids = ids + at,
                                .seqs = {1, s->max_blocks, row0, pos0, s->blocks},
                                .uses = uses,
                                .use0 = use0};
        status = gn_forward_run(s->forward, &batch);
        if (!status) status = visit_rows(s, first > at ? first - at : 0, rows, at, on_row, user);
    }
    return status;
}

gn_status gn_scorer_run(gn_scorer *s, const int32_t *ids, int32_t n, int32_t first,
                        const gn_adapter_use *uses, int32_t n_uses,
                        void (*on_row)(void *, int32_t, const float *), void *user) {
    if (n < 1 || n > s->context || first < 0 || n_uses < 0 || n_uses > GN_MAX_ADAPTERS)
        return GN_EINVAL;
    for (int32_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= s->model->config.vocab) return GN_EINVAL;
    gn_status status = gn_forward_acquire(s->forward, uses, n_uses, NULL);
    if (status) return status;
    for (bool ready = false; !status && !ready;)
        status = gn_forward_poll(s->forward, uses, n_uses, &ready, NULL);
    if (!status) status = run_chunks(s, ids, n, first, uses, n_uses, on_row, user);
    gn_forward_release(s->forward, uses, n_uses);
    return status;
}

typedef struct nll_sum {
    const int32_t *ids;
    int32_t n;
    int vocab;
    double nll;
} nll_sum;

static void add_nll(void *user, int32_t position, const float *logits) {
    nll_sum *sum = user;
    if (position + 1 < sum->n) sum->nll -= gn_logprob(logits, sum->vocab, sum->ids[position + 1]);
}

gn_status gn_scorer_nll(gn_scorer *s, const int32_t *ids, int32_t n, const gn_adapter_use *uses,
                        int32_t n_uses, double *nll) {
    nll_sum sum = {ids, n, s->model->config.vocab, 0};
    const gn_status status = gn_scorer_run(s, ids, n, 0, uses, n_uses, add_nll, &sum);
    *nll = sum.nll;
    return status;
}
