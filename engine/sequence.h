/* sequence.h - a request while the engine has it: tokens, KV blocks, sampling state, reply. */
#ifndef GN_SEQUENCE_H
#define GN_SEQUENCE_H

#include "engine/kv_pool.h"
#include "engine/sample.h"

typedef struct gn_sequence gn_sequence;

struct gn_sequence {
    uint64_t id;
    gn_sequence *next;          /* in the schedule's queues */
    gn_sequence *newer, *older; /* in the engine's list of all */
    _Atomic bool canceled;

    int32_t *tokens; /* prompt, then reply */
    int32_t n_prompt, n_tokens;
    int32_t max_tokens; /* of the reply; fits the context */
    int32_t min_tokens;

    int32_t drawn; /* 1: one more token is drawn, not known here yet, and goes on; else 0 */
    int32_t draw;  /* which one of the last draw that is */

    int32_t computed; /* tokens, a drawn one included, whose keys and values a step has stored */
    int32_t *blocks;
    int32_t n_blocks;
    int32_t published;     /* tokens in published blocks */
    uint64_t serial;       /* of the last published block, or of the adapter set */
    int32_t cached_tokens; /* found in the prefix cache when first admitted */
    int32_t rows;          /* in the step being planned */

    gn_adapter_use uses[GN_MAX_ADAPTERS];
    int32_t n_uses;
    bool acquired;    /* its adapters have their room on the device */
    int32_t passed;   /* sequences with adapters that went ahead while it had none */
    gn_error failure; /* why its adapters cannot be had */
    gn_hash adapters; /* content of uses */

    gn_sampler *sampler;
    int32_t counts;              /* of the device's sampler, or GN_SAMPLE_NO_COUNTS */
    gn_detokenizer *detokenizer; /* NULL without a tokenizer */
    char id_text[16];            /* without one: the last token's number, which is its text */
    int32_t logprobs;            /* alternatives reported, or -1 */
    gn_token_prob *prompt_probs; /* (n_prompt), with prompt_logprobs until they are reported */
    gn_token_prob *prompt_top;   /* (n_prompt, logprobs) */
    int32_t *stop_ids;           /* EOS first, then the request's */
    int32_t n_stop_ids;
    bool ignore_eos;
    int32_t n_eos;

    void (*on_event)(void *user, const gn_event *event);
    void *user;
};

/* Copies a request that fits a context of `context` tokens, or says why it cannot run. */
GN_CHECKED gn_status gn_sequence_open(gn_sequence **out, const gn_request *request,
                                      const gn_model *model, int32_t context, gn_error *err);
void gn_sequence_close(gn_sequence *s); /* its blocks must have been given back */

/* Tokens not computed yet: the whole prompt at first, one while generating. */
static inline int32_t gn_sequence_pending(const gn_sequence *s) {
    return s->n_tokens + s->drawn - s->computed;
}

static inline int32_t gn_sequence_reply(const gn_sequence *s) {
    return s->n_tokens - s->n_prompt;
}

/* Samples the next token from logits (vocab) and returns it; calls nobody. Safe to run for
 * different sequences at once. top: (logprobs) entries, filled when logprobs > 0. */
gn_token_prob gn_sequence_sample(gn_sequence *s, const float *logits, int vocab,
                                 gn_token_prob *top);
/* The same request to a device's sampler. */
gn_sample_row gn_sequence_row(const gn_sequence *s);
/* Appends the token, reports it, and returns the reason when it was the last. */
gn_finish gn_sequence_accept(gn_sequence *s, gn_token_prob token, const gn_token_prob *top);
/* Records what row `position` of the prompt says about the prompt's next token. */
void gn_sequence_score_prompt(gn_sequence *s, int32_t position, const float *logits, int vocab);
/* Reports the prompt's probabilities; with max_tokens 0 that ends the request. */
gn_finish gn_sequence_report_prompt(gn_sequence *s);
/* Reports an end that no token brought: cancellation or an error. */
void gn_sequence_abort(gn_sequence *s, gn_finish finish, const gn_error *error);

#endif
