/* connection.h - one client's socket: reading, writing, time-outs, back-pressure.
 *
 * Requests on a connection are answered one after another, in order. An idle connection holds no
 * buffers. What handlers write is collected and sent by gn_connections_flush, which every
 * callback of the loop ends with: many tokens, one system call. */
#ifndef GN_CONNECTION_H
#define GN_CONNECTION_H

#include <uv.h>

#include "server/http.h"

/* Serves the client of an accepted socket, which is taken over. */
void gn_connection_open(gn_server *server, int fd);
/* Bytes of the response; they may be sent later. */
void gn_connection_send(gn_connection *c, const void *data, size_t size);
/* The response was written to its end (x->ended). */
void gn_connection_response_ended(gn_connection *c);

void gn_connections_flush(gn_server *server);
/* Idle ones are closed, the others when their response is complete. */
void gn_connections_finish(gn_server *server);
void gn_connections_close(gn_server *server); /* all, at once */

#endif
