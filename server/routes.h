/* routes.h - which handler answers which method and path, and who may ask. */
#ifndef GN_ROUTES_H
#define GN_ROUTES_H

#include "server/http.h"

/* Sets x->handler, or x->refusal: 404, 405 with Allow, 401 without the key, 403 for a page of
 * another site. Needs the target and the headers only. */
void gn_route(gn_exchange *x);

/* The response headers that let a page of an allowed origin read it; "" for others.
 * `line` is filled and returned. */
const char *gn_cors_headers(const gn_exchange *x, char *line, size_t size);

/* The handlers, by file. */
void gn_get_page(gn_exchange *x);              /* pages.c */
void gn_post_chat_completions(gn_exchange *x); /* chat.c */
void gn_post_completions(gn_exchange *x);      /* text_completions.c */
void gn_get_models(gn_exchange *x);            /* models.c */
void gn_get_model(gn_exchange *x);
void gn_post_load_adapter(gn_exchange *x); /* adapters.c */
void gn_post_unload_adapter(gn_exchange *x);
void gn_post_tokenize(gn_exchange *x); /* tokenize.c */
void gn_post_detokenize(gn_exchange *x);
void gn_get_health(gn_exchange *x); /* metrics.c */
void gn_get_metrics(gn_exchange *x);

#endif
