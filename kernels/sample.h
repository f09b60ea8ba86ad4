/* sample.h - sampling on the device, so that logits need not travel to the host.
 *
 * One call draws a token for each row of logits, each with its own options, and reports its log
 * probability and the likeliest alternatives. Options mean what engine/sample.h says, in the same
 * order: bias, repetition, presence and frequency penalty, temperature, top_k, typical_p, top_p,
 * min_p. Equal logits give the token that the host's sampler draws, ties toward the lower id,
 * except where a cumulated probability meets its bound to about 1e-6; tokens less likely than
 * 2^-45 of the likeliest are not drawn. NaN counts as -infinity. A row's result depends on that
 * row alone.
 *
 * How often tokens were seen, which the penalties ask for, stays on the device too: a table of
 * counts for each sequence that has a penalty, filled when it starts and kept up by the draws.
 * Rows without penalties have none, and cost nothing. */
#ifndef GN_DEVICE_SAMPLE_H
#define GN_DEVICE_SAMPLE_H

#include "ctx.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct gn_device_sampler gn_device_sampler;

enum { GN_SAMPLE_MAX_TOP = 20, GN_SAMPLE_MAX_EDITS = 1024, GN_SAMPLE_NO_COUNTS = -1 };

typedef struct gn_sample_pair {
    int32_t id;
    float value; /* a bias, or a log probability */
} gn_sample_pair;

/* What one row of logits is asked for; the arrays are borrowed for the call. */
typedef struct gn_sample_row {
    float temperature;                         /* 0: greedy */
    int32_t top_k;                             /* 0: off */
    float top_p, min_p, typical_p;             /* 1, 0 and 1: off */
    float repetition_penalty;                  /* 1: off; over prompt and reply */
    float presence_penalty, frequency_penalty; /* 0: off; over the reply */
    uint64_t seed;
    int64_t step; /* tokens drawn before: with the seed, it says which random number is used */
    const gn_sample_pair *bias;
    const int32_t *banned;    /* not drawn; ids outside the vocabulary are passed over */
    int32_t n_bias, n_banned; /* together at most GN_SAMPLE_MAX_EDITS */
    int32_t counts;           /* from gn_device_sampler_count, for this row alone; a row with
                               * penalties needs one */
    int32_t given;            /* an id: nothing is drawn, this token is judged. -1: draw */
    int32_t n_top;            /* alternatives to report, at most GN_SAMPLE_MAX_TOP */
    bool logprob;             /* of the token; else it is reported as 0 */
} gn_sample_row;
#define GN_SAMPLE_ROW_DEFAULT                                                                      \
    {                                                                                              \
        .temperature = 1, .top_p = 1, .typical_p = 1, .repetition_penalty = 1,                     \
        .counts = GN_SAMPLE_NO_COUNTS, .given = -1                                                 \
    }

/* Log probabilities are of the logits as they came in. */
typedef struct gn_sampled {
    int32_t id;
    float logprob;
    gn_sample_pair top[GN_SAMPLE_MAX_TOP]; /* (n_top), descending; past the vocabulary's end -1 */
} gn_sampled;

/* For calls of up to max_rows rows of `vocab` logits. GN_EUNSUPPORTED where logits are in the
 * host's memory anyway. Close it before its context. */
GN_CHECKED gn_status gn_device_sampler_open(gn_device_sampler **out, gn_ctx *ctx, int32_t max_rows,
                                            int32_t vocab);
void gn_device_sampler_close(gn_device_sampler *s);

/* Gives a sequence a table of counts, of the first n_prompt ids in the prompt and of the n -
 * n_prompt after them in the reply; draws add to it. Allocates when more tables are in use than
 * ever before (2 bytes an entry of the vocabulary). GN_EINVAL: an id is outside the vocabulary. A
 * token counts up to 32767 times. */
GN_CHECKED gn_status gn_device_sampler_count(gn_device_sampler *s, int32_t *counts,
                                             const int32_t *ids, int32_t n_prompt, int32_t n);
/* Gives the table back; GN_SAMPLE_NO_COUNTS is accepted. */
void gn_device_sampler_forget(gn_device_sampler *s, int32_t counts);

/* Starts to sample: row i of logits (n, vocab) f32 as rows[i] says. logits are as before when it
 * is done. Runs in order with the ops, outside gn_ctx_replay; one call at a time, so wait before
 * the next. */
GN_CHECKED gn_status gn_device_sample(gn_device_sampler *s, const gn_tensor *logits,
                                      const gn_sample_row *rows, int32_t n);
/* Waits for it, but not for ops after it. *results: (n), borrowed until the next call. */
GN_CHECKED gn_status gn_device_sample_wait(gn_device_sampler *s, const gn_sampled **results);
/* The tokens of the last call, on the device: (max_rows), at an address that never changes. Ops
 * in order after gn_device_sample find them there. */
const int32_t *gn_device_sampler_ids(const gn_device_sampler *s);

/* ---- for kernels/ only: the device's part (cuda/sample.cu, no_cuda.c) ---- */

typedef struct gn_cuda_sampler gn_cuda_sampler;

/* A table of counts holds for each id how often the reply has it, and whether anything has. */
enum { GN_SEEN = 0x8000, GN_MAX_COUNT = 0x7fff };

gn_status gn_cuda_sampler_open(gn_cuda_sampler **out, gn_ctx *ctx, int32_t max_rows, int32_t vocab);
void gn_cuda_sampler_close(gn_cuda_sampler *s);
/* counts: table i of rows[r].counts == i. */
gn_status gn_cuda_sampler_run(gn_cuda_sampler *s, const gn_tensor *logits,
                              const gn_sample_row *rows, int32_t n, uint16_t *const *counts);
gn_status gn_cuda_sampler_wait(gn_cuda_sampler *s, const gn_sampled **results);
const int32_t *gn_cuda_sampler_ids(const gn_cuda_sampler *s);

#ifdef __cplusplus
}
#endif
#endif
