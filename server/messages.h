/* messages.h - a conversation, as OpenAI's clients send it. */
#ifndef GN_MESSAGES_H
#define GN_MESSAGES_H

#include "engine/guanaco.h"
#include "server/json.h"

/* The field "messages": roles system, developer (the same), user and assistant; content a string or
 * an array of text parts, which are joined by newlines. *out is malloc'ed; its strings belong to
 * the JSON tree and to `joined`. False with the error filled. */
bool gn_messages_read(const gn_json *j, gn_message **out, int *n, gn_buffer *joined);

#endif
