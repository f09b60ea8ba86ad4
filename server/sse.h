/* sse.h - server-sent events, as OpenAI's clients read them: "data: JSON", an empty line, and
 * "data: [DONE]" at the end. */
#ifndef GN_SSE_H
#define GN_SSE_H

#include "server/http.h"

void gn_sse_begin(gn_exchange *x);
/* An event is written into `b` between the two calls; the second sends it and empties b. */
void gn_sse_open(gn_buffer *b);
void gn_sse_send(gn_exchange *x, gn_buffer *b);
/* {"error": ...} in place of what should have come; then the response ends. */
void gn_sse_fail(gn_exchange *x, const gn_http_error *error);
/* [DONE]; the response ends. */
void gn_sse_done(gn_exchange *x);

#endif
