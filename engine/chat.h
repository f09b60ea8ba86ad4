/* chat.h - chat templates as data: how a conversation becomes a prompt.
 *
 * A template is {"system", "user", "assistant", "generation", "stop"}: strings in which {content}
 * stands for a message's text. Control pieces ("</s>", "<|im_end|>") are recognised in the
 * template's own text only, never in a message, so that a user cannot forge them. Runs of text
 * between control pieces are tokenized whole, as in training. */
#ifndef GN_CHAT_H
#define GN_CHAT_H

#include "engine/guanaco.h"
#include "engine/tokenizer.h"

typedef struct gn_chat_template gn_chat_template;

/* `source`: a built-in name (guanaco, vicuna, alpaca, llama-2, llama-3, chatml, mistral), or a
 * file's path; NULL: DIR/chat_template.json when there is one, else guanaco. */
GN_CHECKED gn_status gn_chat_template_open(gn_chat_template **out, const char *source,
                                           const char *dir, gn_error *err);
void gn_chat_template_close(gn_chat_template *c);
const char *const *gn_chat_template_stops(const gn_chat_template *c, int *n);
/* BOS, then the conversation, then the generation prompt. *ids is malloc'ed. Roles: system
 * (also "developer"), user, assistant; another role is GN_EINVAL. */
GN_CHECKED gn_status gn_chat_template_encode(const gn_chat_template *c, const gn_tokenizer *t,
                                             const gn_message *messages, int n_messages,
                                             int32_t **ids, int32_t *n, gn_error *err);

#endif
