/* sample.h - from a row of logits to a token. */
#ifndef GN_SAMPLE_H
#define GN_SAMPLE_H

#include "engine/guanaco.h"
#include "kernels/sample.h"

/* A request's sampling state: its options and how often each token was seen. */
typedef struct gn_sampler gn_sampler;

/* Copies options and bias; scratch for `vocab` logits is allocated here, so that sampling
 * allocates nothing. Values out of range (top_p not in (0,1], temperature negative or not finite,
 * repetition_penalty not positive, an id outside the vocabulary ...) are GN_EINVAL, named. */
GN_CHECKED gn_status gn_sampler_open(gn_sampler **out, const gn_sampling *options, int vocab,
                                     gn_error *err);
void gn_sampler_close(gn_sampler *s);
/* Counts a prompt token (in_reply false) or a sampled one for the penalties. An id outside the
 * vocabulary is not counted. */
void gn_sampler_accept(gn_sampler *s, int32_t id, bool in_reply);

/* Draws the token of step `step` (tokens sampled so far) from logits (vocab). The draw depends
 * only on options, counts, logits, seed and step. Order as in llama.cpp and vLLM: bias, then
 * repetition penalty (Keskar et al. 2019: positive logits are divided by it, others multiplied),
 * presence and frequency penalty, temperature, top_k, typical_p, top_p, min_p; each keeps the
 * shortest part that reaches its mass, of what the one before left. `banned` ids are not drawn.
 * Ties are broken toward the lower id. logits are not changed; NaN counts as -infinity. When
 * nothing is left to draw, the lowest id that is not banned (0 when all are). */
int32_t gn_sampler_draw(gn_sampler *s, const float *logits, int64_t step, const int32_t *banned,
                        int n_banned);

/* The same request to a device's sampler, but for step, banned ids and counts; bias is borrowed
 * from s. */
gn_sample_row gn_sampler_row(const gn_sampler *s);
bool gn_sampler_penalizes(const gn_sampler *s); /* so that it needs counts */

/* log softmax of the raw logits: of `id`, and of the n_top most likely (descending, ties toward
 * the lower id; past the end of the vocabulary id -1). NaN counts as -infinity. */
float gn_logprob(const float *logits, int vocab, int32_t id);
void gn_top_logprobs(const float *logits, int vocab, int n_top, gn_token_prob *top);

#endif
