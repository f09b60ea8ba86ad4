/* chat.h - chat templates as data: how a conversation becomes a prompt.
 *
 * A template is a JSON object of strings in which {content} stands for a message's text:
 *
 *   "user"              a user message; required, with {content}
 *   "assistant"         an assistant message; required, with {content}
 *   "generation"        what the assistant's reply follows; required
 *   "system"            with {content}: a system message, written where it stands. Without: a text
 *                       that opens a conversation which has no system message
 *   "user_with_system"  where "system" has no {content}: a user message that carries the system
 *                       text {system} before it (LLaMA-2)
 *   "default_system"    the system message of a conversation that has none
 *   "stop"              an array of strings that end the assistant's turn
 *
 * A system message for which the template has no place is put before the text of the next user
 * message, with an empty line between, as in the layout of Mistral; where none follows it becomes
 * a user message. An empty system message only suppresses the default. Any order of roles is
 * written as it comes; the generation prompt always follows.
 *
 * Control pieces of the tokenizer ("</s>", "<|im_end|>", "[INST]": <...> or [...]) are recognised
 * in the template's own text only, never in a message, so that a user cannot forge them. Text
 * between control pieces is tokenized whole, as in training. A control piece that the tokenizer
 * does not have is text. The one that follows {content} in "assistant" is a stop string too,
 * unless it is </s>, which is EOS. */
#ifndef GN_CHAT_H
#define GN_CHAT_H

#include "engine/guanaco.h"
#include "engine/hash.h"
#include "engine/tokenizer.h"

typedef struct gn_chat_template gn_chat_template;

/* `source`: a built-in name (guanaco, vicuna, alpaca, llama-2, llama-3, chatml, mistral), or a
 * file's path; NULL: DIR/chat_template.json when there is one, else guanaco. A file with an
 * unknown key, a value of the wrong type or a missing {content} is GN_EFORMAT, naming the key. */
GN_CHECKED gn_status gn_chat_template_open(gn_chat_template **out, const char *source,
                                           const char *dir, gn_error *err);
void gn_chat_template_close(gn_chat_template *c);
/* Borrowed from the template. */
const char *const *gn_chat_template_stops(const gn_chat_template *c, int *n);
/* BOS, then the conversation, then the generation prompt. *ids is malloc'ed. Roles: system
 * (also "developer"), user, assistant; another role, or no message at all, is GN_EINVAL. */
GN_CHECKED gn_status gn_chat_template_encode(const gn_chat_template *c, const gn_tokenizer *t,
                                             const gn_message *messages, int n_messages,
                                             int32_t **ids, int32_t *n, gn_error *err);
/* For training: BOS, then the conversation, without a generation prompt. (*learned)[i] says whether
 * token i is what the assistant must write: in each assistant message what follows the generation
 * prompt, up to the control piece that ends the turn. Where the template has none, the turn ends
 * with a stop string that opens the next user message, or, after the last message, with EOS.
 * `learn` (n_messages, or NULL: all) leaves assistant messages out. *ids and *learned are
 * malloc'ed. */
GN_CHECKED gn_status gn_chat_template_encode_learned(const gn_chat_template *c,
                                                     const gn_tokenizer *t,
                                                     const gn_message *messages, const bool *learn,
                                                     int n_messages, int32_t **ids, bool **learned,
                                                     int32_t *n, gn_error *err);
/* Templates with equal hashes encode alike. */
void gn_chat_template_add_to_hash(const gn_chat_template *c, gn_hash *hash);

#endif
