/* state.h - the server's insides, for the files of this folder only. */
#ifndef GN_STATE_H
#define GN_STATE_H

#include <uv.h>

#include "server/connection.h"
#include "server/mailbox.h"
#include "server/registry.h"
#include "server/server.h"

enum {
    GN_READ_BYTES = 64 << 10,
    GN_MAX_HEAD = 64 << 10,
    GN_INLINE_BYTES = 16 << 10, /* a longer text is tokenized on a worker thread */
    GN_STATUS_CLASSES = 6
};

typedef struct gn_counters {
    int64_t connections, requests[GN_STATUS_CLASSES]; /* by first digit of the status */
    int64_t bytes_received, bytes_sent;
    int64_t canceled; /* the client left before the answer */
} gn_counters;

struct gn_server {
    gn_server_options options; /* with defaults filled in */
    uv_loop_t loop;
    int listen_fd;
    uv_poll_t listener;
    uv_async_t stop;
    uv_timer_t drain, retry;
    uv_signal_t signals[2];
    int port, stops; /* stops: how often it was asked to */

    gn_model *model;
    gn_engine *engine;
    gn_mailbox mailbox;
    gn_registry registry;
    char *model_name;
    char fingerprint[48];
    int64_t created; /* seconds since 1970 */

    gn_connection *connections; /* all of them */
    gn_connection *unflushed;   /* those that were written to */
    int n_connections;
    size_t body_bytes; /* held by requests being read or answered */
    uint64_t starved;  /* when the log last told that connections cannot be accepted; 0: never */
    gn_counters counters;
    char read_buffer[GN_READ_BYTES]; /* every read lands here first */
};

void gn_server_connection_closed(gn_server *server);
/* The line of the access log. */
void gn_log_exchange(const gn_exchange *x);
/* What whoever runs the server should know, also when requests are not logged. */
void gn_log_warning(const gn_server *server, const char *fmt, ...) GN_PRINTF(2, 3);

#endif
