/* request.h - what an engine is asked, and what it answers: a part of guanaco.h. */
#ifndef GN_REQUEST_H
#define GN_REQUEST_H

#include "kernels/base.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct gn_adapter gn_adapter;

typedef struct gn_adapter_use {
    gn_adapter *adapter;
    float scale; /* multiplies the adapter's own alpha/r; 1 is as trained */
} gn_adapter_use;

typedef struct gn_token_prob {
    int32_t id;
    float logprob; /* natural logarithm, of the model's distribution before sampling options */
} gn_token_prob;

typedef struct gn_sampling {
    float temperature;                         /* 0: greedy */
    int32_t top_k;                             /* 0: off */
    float top_p, min_p;                        /* 1 and 0: off */
    float typical_p;                           /* 1: off */
    float repetition_penalty;                  /* 1: off; over prompt and reply */
    float presence_penalty, frequency_penalty; /* 0: off; over the reply */
    uint64_t seed;
    const gn_token_prob *bias; /* logprob is added to that id's logit */
    int32_t n_bias;
} gn_sampling;
#define GN_SAMPLING_DEFAULT                                                                        \
    { .temperature = 1, .top_p = 1, .typical_p = 1, .repetition_penalty = 1 }

enum { GN_MAX_ADAPTERS = 8, GN_MAX_TOP_LOGPROBS = 20 };

typedef enum gn_finish {
    GN_FINISH_NONE,
    GN_FINISH_STOP,
    GN_FINISH_LENGTH,
    GN_FINISH_CANCEL,
    GN_FINISH_ERROR
} gn_finish;

/* What happened to a request in one step. Everything in it is borrowed for the call. */
typedef struct gn_event {
    uint64_t id;
    /* Text that is certain: whole characters, no part of a stop string. May be empty. */
    const char *text;
    size_t text_len;
    /* The token sampled in this step, when has_token. `top` holds n_top most likely tokens when
     * logprobs were asked for. A stop token is reported too, with empty text. */
    bool has_token;
    gn_token_prob token;
    int32_t n_top;
    const gn_token_prob *top;
    /* Once, with prompt_logprobs: one entry a prompt token; the first has logprob NaN. prompt_top
     * holds n_top entries for each. */
    int32_t n_prompt;
    const gn_token_prob *prompt, *prompt_top;
    gn_finish finish;      /* the last event of a request has one that is not NONE */
    const gn_error *error; /* with GN_FINISH_ERROR */
    int32_t prompt_tokens, cached_tokens, completion_tokens; /* so far */
} gn_event;

typedef struct gn_request {
    const int32_t *prompt;
    int32_t n_prompt;                         /* at least 1 */
    gn_adapter_use adapters[GN_MAX_ADAPTERS]; /* the engine takes its own references */
    int32_t n_adapters;
    gn_sampling sampling;
    int32_t max_tokens;   /* 0: only evaluate the prompt; -1: as far as the context goes */
    int32_t min_tokens;   /* EOS and stop ids are not sampled before */
    int32_t logprobs;     /* -1: none; else how many alternatives, at most GN_MAX_TOP_LOGPROBS */
    bool prompt_logprobs; /* report the prompt's, with `logprobs` alternatives */
    bool ignore_eos;
    bool strip_space;        /* drop the reply's leading space, as a chat reply wants */
    const char *const *stop; /* not part of the reply */
    int32_t n_stop;
    const int32_t *stop_ids;
    int32_t n_stop_ids;
    /* Called on the engine's thread; must not block or call gn_engine_close. */
    void (*on_event)(void *user, const gn_event *event);
    void *user;
} gn_request;

#ifdef __cplusplus
}
#endif
#endif
