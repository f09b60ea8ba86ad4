/* http.h - one exchange: a request that has been read, and the response being written.
 *
 * A handler gets the exchange when the request is complete. It responds at once with one of the
 * gn_respond functions, or sets on_abort, returns, and responds later from the loop's thread.
 * The exchange lives until the response is complete, or until on_abort was called because the
 * client went away; nobody may touch it after either. */
#ifndef GN_HTTP_H
#define GN_HTTP_H

#include "server/buffer.h"

typedef struct gn_server gn_server;
typedef struct gn_connection gn_connection;
typedef struct gn_exchange gn_exchange;

/* An answer that is an error. `param` names the request's field at fault, or is empty; `code` is
 * OpenAI's machine-readable word, or NULL. The error's type follows from the status. */
typedef struct gn_http_error {
    int status; /* 0: no error */
    const char *code;
    char param[96], message[640];
    char headers[96]; /* extra lines of the response, each ended by CRLF */
} gn_http_error;

/* Fills the error, unless it holds one already; always returns false. */
bool gn_http_fail(gn_http_error *e, int status, const char *code, const char *param,
                  const char *fmt, ...) GN_PRINTF(5, 6);
bool gn_http_no_memory(gn_http_error *e);
/* The same from a status of the engine or a loader: the HTTP status follows from it. */
bool gn_http_fail_with(gn_http_error *e, const char *param, const gn_error *error);
/* {"error":{"message","type","param","code"}} */
void gn_http_error_json(gn_buffer *b, const gn_http_error *e);

typedef void (*gn_handler)(gn_exchange *x);

struct gn_exchange {
    gn_server *server;
    gn_connection *connection;

    /* The request. `head` holds the target, then names and values of the headers from
     * `fields` on, each ended by a zero byte. */
    int method; /* llhttp's */
    bool http10, keep_alive, expects_continue;
    gn_buffer head, body;
    size_t fields;
    size_t body_counted; /* of the server's budget for bodies */
    const char *path;    /* decoded, without the query; set when the headers are complete */
    const char *rest;    /* what followed a route's prefix, as a model's name */
    gn_handler handler;
    gn_http_error refusal; /* why no handler will see it; status 0: none */

    /* The response. */
    int status;          /* 0 until one was begun */
    bool chunked, ended; /* a body of unknown length; all was written */
    void (*on_abort)(void *user);
    void *user;

    /* For the access log. */
    uint64_t started; /* loop's clock, ms */
    int64_t prompt_tokens, completion_tokens;
    char model_name[64];
};

/* A header's value by its lower-case name; NULL when it is absent. */
const char *gn_http_header(const gn_exchange *x, const char *name);

/* A whole response. `headers` are extra lines, each ended by CRLF, or NULL. */
void gn_respond(gn_exchange *x, int status, const char *type, const char *headers, const void *body,
                size_t size);
void gn_respond_json(gn_exchange *x, int status, const gn_buffer *body);
void gn_respond_error(gn_exchange *x, const gn_http_error *error);

/* A response in pieces, of a length not yet known. */
void gn_respond_begin(gn_exchange *x, int status, const char *type);
void gn_respond_part(gn_exchange *x, const void *data, size_t size);
void gn_respond_end(gn_exchange *x);

#endif
