/* sample.c - checks what is asked of the device's sampler, and hands out tables of counts.
 *
 * Tables are allocated one by one, as sequences with penalties come, and kept for the next ones:
 * memory follows the most that ever ran at once, and is none while nobody uses penalties. */
#include "sample.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"

enum {
    MAX_VOCAB = 1 << 18, /* more weights could overflow the kernel's sums */
    MAX_ROWS = 1 << 12
};

struct gn_device_sampler {
    gn_ctx *ctx;
    gn_cuda_sampler *cuda;
    int32_t max_rows, vocab, n_tables;
    uint16_t **tables; /* (n_tables), on the device: (vocab) each */
    bool *used;        /* (n_tables) */
    uint16_t *staged;  /* (vocab), from the first table on */
};

gn_status gn_device_sampler_open(gn_device_sampler **out, gn_ctx *ctx, int32_t max_rows,
                                 int32_t vocab) {
    if (!out) return GN_EINVAL;
    *out = NULL;
    if (!ctx || max_rows < 1 || vocab < 1) return GN_EINVAL;
    if (!ctx->cuda) return GN_EUNSUPPORTED;
    if (max_rows > MAX_ROWS || vocab > MAX_VOCAB) return GN_ETOOBIG;
    gn_device_sampler *s = calloc(1, sizeof *s);
    if (!s) return GN_ENOMEM;
    s->ctx = ctx;
    s->max_rows = max_rows;
    s->vocab = vocab;
    const gn_status status = gn_cuda_sampler_open(&s->cuda, ctx, max_rows, vocab);
    if (status)
        gn_device_sampler_close(s);
    else
        *out = s;
    return status;
}

void gn_device_sampler_close(gn_device_sampler *s) {
    if (!s) return;
    gn_cuda_sampler_close(s->cuda);
    for (int32_t i = 0; i < s->n_tables; i++) gn_ctx_free(s->ctx, s->tables[i]);
    free(s->tables);
    free(s->used);
    free(s->staged);
    free(s);
}

/* ---- counts ---- */

static gn_status add_table(gn_device_sampler *s) {
    const size_t n = (size_t)s->n_tables + 1;
    uint16_t **tables = realloc(s->tables, n * sizeof *tables);
    if (tables) s->tables = tables;
    bool *used = realloc(s->used, n * sizeof *used);
    if (used) s->used = used;
    if (!s->staged) s->staged = malloc((size_t)s->vocab * sizeof *s->staged);
    if (!tables || !used || !s->staged) return GN_ENOMEM;
    s->tables[s->n_tables] = gn_ctx_alloc(s->ctx, (size_t)s->vocab * sizeof **s->tables);
    if (!s->tables[s->n_tables]) return GN_ENOMEM;
    s->used[s->n_tables++] = false;
    return GN_OK;
}

gn_status gn_device_sampler_count(gn_device_sampler *s, int32_t *counts, const int32_t *ids,
                                  int32_t n_prompt, int32_t n) {
    if (!s || !counts || n_prompt < 0 || n < n_prompt || (n > 0 && !ids)) return GN_EINVAL;
    *counts = GN_SAMPLE_NO_COUNTS;
    for (int32_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= s->vocab) return GN_EINVAL;
    int32_t free_table = 0;
    while (free_table < s->n_tables && s->used[free_table]) free_table++;
    gn_status status = free_table < s->n_tables ? GN_OK : add_table(s);
    if (status) return status;
    const size_t bytes = (size_t)s->vocab * sizeof *s->staged;
    memset(s->staged, 0, bytes);
    for (int32_t i = 0; i < n; i++) {
        uint16_t *count = &s->staged[ids[i]];
        *count |= GN_SEEN;
        if (i >= n_prompt && (*count & GN_MAX_COUNT) < GN_MAX_COUNT) (*count)++;
    }
    status = gn_ctx_write(s->ctx, s->tables[free_table], s->staged, bytes);
    if (status) return status;
    s->used[free_table] = true;
    *counts = free_table;
    return GN_OK;
}

void gn_device_sampler_forget(gn_device_sampler *s, int32_t counts) {
    if (s && counts >= 0 && counts < s->n_tables) s->used[counts] = false;
}

/* ---- sampling ---- */

static bool is_row(const gn_device_sampler *s, const gn_sample_row *r) {
    const bool penalizes =
        r->repetition_penalty != 1 || r->presence_penalty != 0 || r->frequency_penalty != 0;
    if (!(r->temperature >= 0 && isfinite(r->temperature)) || r->top_k < 0 ||
        !(r->top_p > 0 && r->top_p <= 1) || !(r->min_p >= 0 && r->min_p <= 1) ||
        !(r->typical_p > 0 && r->typical_p <= 1) ||
        !(r->repetition_penalty > 0 && isfinite(r->repetition_penalty)) ||
        !isfinite(r->presence_penalty) || !isfinite(r->frequency_penalty))
        return false;
    if (r->n_top < 0 || r->n_top > GN_SAMPLE_MAX_TOP || r->given < -1 || r->given >= s->vocab)
        return false;
    if (r->n_bias < 0 || r->n_banned < 0 || (r->n_bias > 0 && !r->bias) ||
        (r->n_banned > 0 && !r->banned) || r->n_bias > GN_SAMPLE_MAX_EDITS ||
        r->n_banned > GN_SAMPLE_MAX_EDITS - r->n_bias)
        return false;
    for (int32_t i = 0; i < r->n_bias; i++)
        if (r->bias[i].id < 0 || r->bias[i].id >= s->vocab || !isfinite(r->bias[i].value))
            return false;
    if (r->counts == GN_SAMPLE_NO_COUNTS) return !penalizes || r->given >= 0;
    return r->counts >= 0 && r->counts < s->n_tables && s->used[r->counts];
}

gn_status gn_device_sample(gn_device_sampler *s, const gn_tensor *logits, const gn_sample_row *rows,
                           int32_t n) {
    if (!s || !logits || !logits->data || !rows || n < 1 || n > s->max_rows) return GN_EINVAL;
    if (logits->dtype != GN_F32 || logits->ndim != 2 || logits->shape[0] != n ||
        logits->shape[1] != s->vocab || logits->ld < s->vocab)
        return GN_EINVAL;
    for (int32_t i = 0; i < n; i++)
        if (!is_row(s, &rows[i])) return GN_EINVAL;
    return gn_cuda_sampler_run(s->cuda, logits, rows, n, s->tables);
}

gn_status gn_device_sample_wait(gn_device_sampler *s, const gn_sampled **results) {
    if (!s || !results) return GN_EINVAL;
    return gn_cuda_sampler_wait(s->cuda, results);
}

const int32_t *gn_device_sampler_ids(const gn_device_sampler *s) {
    return gn_cuda_sampler_ids(s->cuda);
}
