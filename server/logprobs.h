/* logprobs.h - tokens and their probabilities, in the forms of both completion families. */
#ifndef GN_LOGPROBS_H
#define GN_LOGPROBS_H

#include "server/generation.h"

/* Chat: {"token","logprob","bytes","top_logprobs"} is added to c->tokens. */
void gn_logprobs_add_chat(gn_choice *c, gn_token_prob token, const gn_token_prob *top,
                          int32_t n_top);
/* {"content":[...],"refusal":null} or null. */
void gn_logprobs_write_chat(gn_buffer *b, const gn_choice *c);

/* Legacy: one entry in each of c->tokens, probs, tops and offsets. A probability that is NaN (the
 * first token of a prompt) and its alternatives are null. */
void gn_logprobs_add_legacy(gn_choice *c, gn_token_prob token, const gn_token_prob *top,
                            int32_t n_top);
/* {"text_offset","token_logprobs","tokens","top_logprobs"} or null. */
void gn_logprobs_write_legacy(gn_buffer *b, const gn_choice *c);

#endif
