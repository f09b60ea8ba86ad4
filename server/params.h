/* params.h - what both completion families read from a request: adapters, sampling, limits. */
#ifndef GN_PARAMS_H
#define GN_PARAMS_H

#include "engine/guanaco.h"
#include "server/json.h"

typedef struct gn_params {
    /* Filled but for the prompt, the callback and what families read themselves. Its strings belong
     * to the JSON tree; the adapters are referenced here, until gn_params_close. */
    gn_request request;
    const char *model; /* as the response names it: the base's or the adapter's name */
    int64_t n;
    bool stream, include_usage;
    gn_token_prob *bias;
    const char **stops;
    int32_t *stop_ids;
} gn_params;

/* Fills p or the reader's error; close it either way. `chat` adds the template's stop strings. The
 * family reads max_tokens and logprobs, which it defines its own way. */
void gn_params_read(gn_params *p, const gn_server *server, const gn_json *j, bool chat);
void gn_params_close(gn_params *p);

/* Refuses the fields a family does not know: its own names, those read here, and OpenAI's fields
 * that change nothing here. */
void gn_params_check_names(const gn_json *j, const char *const *own, int n_own);

#endif
