/* server.h - the HTTP server: a libuv loop in front of one engine.
 *
 * The loop's thread owns every structure here. The engine's thread reaches it only through the
 * mailbox, worker threads (tokenizing long texts, reading adapters) only through the results of
 * their work. */
#ifndef GN_SERVER_H
#define GN_SERVER_H

#include <stdio.h>

#include "engine/guanaco.h"

#define GN_VERSION "0.1.0"

/* Zero or NULL means the default in brackets; times are milliseconds. */
typedef struct gn_server_options {
    const char *host;       /* [127.0.0.1] */
    int port;               /* 0: any free one */
    const char *model_name; /* [the folder's name] */
    const char *api_key;    /* [none: everybody may ask] */
    const char *cors;       /* an origin whose pages may ask, or "*" [none] */
    bool allow_adapter_loading;
    const char *adapter_dir;   /* what is loaded over HTTP lies below it */
    int64_t max_body;          /* bytes of a request [8 MiB] */
    int max_connections;       /* [16384]; fewer where the system allows fewer open files */
    int header_ms, request_ms; /* to send headers [10 s], the whole request [60 s] */
    int idle_ms;               /* between requests [75 s] */
    int stall_ms;              /* without taking any byte of the response [30 s] */
    int drain_ms;              /* for running requests at shutdown [5 s] */
    int64_t max_unsent;        /* bytes of a stream nobody reads [1 MiB] */
    FILE *log;                 /* warnings, and a line per request [none] */
    bool json_log, quiet;      /* log as JSON; log no requests */
} gn_server_options;

typedef struct gn_server gn_server;

/* Binds the address, so that a taken port is known before a model is loaded. Options are
 * borrowed for the server's life. */
GN_CHECKED gn_status gn_server_open(gn_server **out, const gn_server_options *options,
                                    gn_error *err);
int gn_server_port(const gn_server *server);
/* What it serves. The engine is the server's from now on, also when this fails; the model must
 * outlive the server. */
GN_CHECKED gn_status gn_server_serve(gn_server *server, gn_model *model, gn_engine *engine,
                                     gn_error *err);
/* Adds an adapter under a name, before the server runs. The reference is taken over, also when it
 * fails. */
GN_CHECKED gn_status gn_server_add_adapter(gn_server *server, const char *name, const char *dir,
                                           gn_adapter *adapter, gn_error *err);
/* From here on clients are heard, and SIGINT and SIGTERM stop the server (the second of them ends
 * the program). */
GN_CHECKED gn_status gn_server_listen(gn_server *server, gn_error *err);
/* Answers until gn_server_stop, and finishes what runs then. */
void gn_server_run(gn_server *server);
/* From any thread. The first call lets running requests finish for drain_ms, the second does not
 * wait. */
void gn_server_stop(gn_server *server);
/* Closes the connections, the engine and the adapters. */
void gn_server_close(gn_server *server);

#endif
