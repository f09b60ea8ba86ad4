/* reader.h - bytes of a connection become requests. llhttp does the parsing; here are the limits
 * and the copies. No socket is involved, so tests feed it byte by byte. */
#ifndef GN_READER_H
#define GN_READER_H

#include <llhttp.h>

#include "server/http.h"

typedef struct gn_reader {
    llhttp_t parser;
    gn_exchange *exchange; /* the one being read, for llhttp's callbacks */
    size_t max_head, max_body;
} gn_reader;

typedef enum gn_read {
    GN_READ_MORE,    /* the request is not complete */
    GN_READ_REQUEST, /* it is; bytes behind it were left */
    GN_READ_ERROR    /* exchange->refusal says why; nothing more can be read here */
} gn_read;

/* max_head: bytes of target and headers; max_body: bytes of the decoded body. */
void gn_reader_open(gn_reader *r, size_t max_head, size_t max_body);
/* Reads into x, from where the last call with the same x ended. *used tells how many of the bytes
 * were taken. When the headers are complete the request is routed (gn_route); a request
 * that is refused then and has a body is GN_READ_ERROR, and its body is not read. */
gn_read gn_reader_feed(gn_reader *r, gn_exchange *x, const char *data, size_t size, size_t *used);

#endif
