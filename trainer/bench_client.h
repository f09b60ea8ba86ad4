/* bench_client.h - HTTP requests to a server on this machine, sent and awaited together. */
#ifndef GN_BENCH_CLIENT_H
#define GN_BENCH_CLIENT_H

#include <llhttp.h>
#include <uv.h>

#include "kernels/base.h"

/* A request over a connection of its own. Zeroed, but for what the caller sets. */
typedef struct gn_call {
    const char *request; /* whole, to be closed after: borrowed */
    size_t request_size;
    /* Each piece of the response's body as it comes; false: what it says is wrong, enough. */
    bool (*on_body)(void *user, const char *data, size_t size);
    void *user;

    int status;  /* HTTP's; 0: none came */
    bool ended;  /* the whole response came */
    int failure; /* libuv's error, or 0 */
    uv_tcp_t socket;
    uv_connect_t connect;
    uv_write_t write;
    llhttp_t parser;
    char buffer[16 << 10];
} gn_call;

/* Makes n calls to 127.0.0.1 at once and returns when all have ended. GN_EIO when one did not get
 * a whole response with status 200. */
GN_CHECKED gn_status gn_calls_run(gn_call *calls, int n, int port, gn_error *err);

#endif
