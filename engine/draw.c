/* draw.c - tokens from logits, on the host or on the device. */
#include "engine/draw.h"

#include <stdlib.h>

struct gn_draw {
    gn_model *model;
    gn_forward *forward;
    gn_device_sampler *device;    /* NULL: drawn on the host */
    int32_t max_rows, n;          /* n: of the draw that was started */
    int32_t *rows;                /* (max_rows) of a score */
    gn_sample_row *asked;         /* (max_rows) */
    int32_t *ids;                 /* (max_rows) drawn on the host */
    gn_token_prob *tokens, *tops; /* (max_rows), (max_rows, GN_MAX_TOP_LOGPROBS) */
};

_Static_assert((int)GN_MAX_TOP_LOGPROBS <= (int)GN_SAMPLE_MAX_TOP, "samplers list as many");

static gn_status open_parts(gn_draw *d) {
    const size_t n = (size_t)d->max_rows;
    d->rows = malloc(n * sizeof *d->rows);
    d->asked = malloc(n * sizeof *d->asked);
    d->ids = malloc(n * sizeof *d->ids);
    d->tokens = malloc(n * sizeof *d->tokens);
    d->tops = malloc(n * GN_MAX_TOP_LOGPROBS * sizeof *d->tops);
    if (!d->rows || !d->asked || !d->ids || !d->tokens || !d->tops) return GN_ENOMEM;
    const gn_status status =
        gn_device_sampler_open(&d->device, d->model->ctx, d->max_rows, d->model->config.vocab);
    /* What is too large for a device's sampler is drawn here. */
    return status == GN_EUNSUPPORTED || status == GN_ETOOBIG ? GN_OK : status;
}

gn_status gn_draw_open(gn_draw **out, gn_model *model, gn_forward *forward, int32_t max_rows) {
    gn_draw *d = calloc(1, sizeof *d);
    if (!d) return GN_ENOMEM;
    d->model = model;
    d->forward = forward;
    d->max_rows = max_rows;
    const gn_status status = open_parts(d);
    if (status)
        gn_draw_close(d);
    else
        *out = d;
    return status;
}

void gn_draw_close(gn_draw *d) {
    if (!d) return;
    gn_device_sampler_close(d->device);
    free(d->rows);
    free(d->asked);
    free(d->ids);
    free(d->tokens);
    free(d->tops);
    free(d);
}

gn_status gn_draw_prepare(gn_draw *d, gn_sequence *s) {
    if (!d->device || s->counts != GN_SAMPLE_NO_COUNTS || !gn_sampler_penalizes(s->sampler))
        return GN_OK;
    return gn_device_sampler_count(d->device, &s->counts, s->tokens, s->n_prompt, s->n_tokens);
}

void gn_draw_forget(gn_draw *d, gn_sequence *s) {
    gn_device_sampler_forget(d->device, s->counts);
    s->counts = GN_SAMPLE_NO_COUNTS;
}

static void put(const gn_sampled *from, int32_t n_top, gn_token_prob *token, gn_token_prob *top) {
    *token = (gn_token_prob){from->id, from->logprob};
    for (int32_t i = 0; i < n_top; i++)
        top[i] = (gn_token_prob){from->top[i].id, from->top[i].value};
}

/* ---- drawing ---- */

static gn_token_prob *top_of(gn_draw *d, int32_t i) {
    return d->tops + (size_t)i * GN_MAX_TOP_LOGPROBS;
}

static gn_status draw_here(gn_draw *d, gn_sequence *const *sequences, const int32_t *rows,
                           int32_t n) {
    const int vocab = d->model->config.vocab;
    const float *logits;
    const gn_status status = gn_forward_logits(d->forward, rows, n, &logits);
    if (status) return status;
#pragma omp parallel for schedule(dynamic) num_threads(gn_ctx_threads(d->model->ctx))
    for (int32_t i = 0; i < n; i++) {
        d->tokens[i] = gn_sequence_sample(sequences[i], logits + (size_t)i * (size_t)vocab, vocab,
                                          top_of(d, i));
        d->ids[i] = d->tokens[i].id;
    }
    return GN_OK;
}

gn_status gn_draw_start(gn_draw *d, gn_sequence *const *sequences, const int32_t *rows, int32_t n) {
    d->n = n;
    if (!d->device) return draw_here(d, sequences, rows, n);
    gn_tensor logits;
    for (int32_t i = 0; i < n; i++) d->asked[i] = gn_sequence_row(sequences[i]);
    const gn_status status = gn_forward_device_logits(d->forward, rows, n, &logits);
    return status ? status : gn_device_sample(d->device, &logits, d->asked, n);
}

gn_status gn_draw_wait(gn_draw *d, const gn_token_prob **tokens, const gn_token_prob **tops) {
    *tokens = d->tokens;
    *tops = d->tops;
    if (!d->device) return GN_OK;
    const gn_sampled *results;
    const gn_status status = gn_device_sample_wait(d->device, &results);
    if (status) return status;
    for (int32_t i = 0; i < d->n; i++)
        put(&results[i], d->asked[i].n_top, &d->tokens[i], top_of(d, i));
    return GN_OK;
}

const int32_t *gn_draw_ids(const gn_draw *d) {
    if (d->device) return gn_device_sampler_ids(d->device);
    return gn_ctx_is_host(d->model->ctx) ? d->ids : NULL;
}

/* ---- scoring ---- */

static gn_status score_here(gn_draw *d, gn_sequence *s, int32_t position, int32_t n) {
    const int vocab = d->model->config.vocab;
    const float *logits;
    const gn_status status = gn_forward_logits(d->forward, d->rows, n, &logits);
    if (status) return status;
#pragma omp parallel for num_threads(gn_ctx_threads(d->model->ctx))
    for (int32_t i = 0; i < n; i++)
        gn_sequence_score_prompt(s, position + i, logits + (size_t)i * (size_t)vocab, vocab);
    return GN_OK;
}

static gn_status score_on_device(gn_draw *d, gn_sequence *s, int32_t position, int32_t n) {
    const int32_t n_top = s->logprobs > 0 ? s->logprobs : 0, first = position + 1;
    for (int32_t i = 0; i < n; i++) {
        d->asked[i] = (gn_sample_row)GN_SAMPLE_ROW_DEFAULT;
        d->asked[i].given = s->tokens[first + i];
        d->asked[i].logprob = true;
        d->asked[i].n_top = n_top;
    }
    gn_tensor logits;
    const gn_sampled *results;
    gn_status status = gn_forward_device_logits(d->forward, d->rows, n, &logits);
    if (!status) status = gn_device_sample(d->device, &logits, d->asked, n);
    if (!status) status = gn_device_sample_wait(d->device, &results);
    for (int32_t i = 0; i < n && !status; i++)
        put(&results[i], n_top, &s->prompt_probs[first + i],
            s->prompt_top + (size_t)(first + i) * (size_t)n_top);
    return status;
}

gn_status gn_draw_score(gn_draw *d, gn_sequence *s, int32_t position, int32_t row, int32_t n) {
    gn_status status = GN_OK;
    for (int32_t at = 0, part; at < n && !status; at += part) {
        part = n - at < d->max_rows ? n - at : d->max_rows;
        for (int32_t i = 0; i < part; i++) d->rows[i] = row + at + i;
        status = d->device ? score_on_device(d, s, position + at, part)
                           : score_here(d, s, position + at, part);
    }
    return status;
}
