/* bench_reply.h - what a server under test says: streamed replies, counters, its first line. */
#ifndef GN_BENCH_REPLY_H
#define GN_BENCH_REPLY_H

#include "kernels/base.h"
#include "trainer/bench_times.h"

enum { GN_REPLY_LINE = 16 << 10 };

/* A streamed completion, as server-sent events. */
typedef struct gn_reply {
    gn_token_times *times; /* of pieces of text: a token each, unless it is part of a character */
    int max_times;
    int tokens;        /* by the server's count, once it came */
    bool done;         /* the last event came */
    char problem[256]; /* what was wrong, or empty */
    char line[GN_REPLY_LINE];
    size_t used;
} gn_reply;

/* Takes some bytes that came at `now`; false once something was wrong. */
bool gn_reply_feed(gn_reply *r, const char *data, size_t size, double now);

/* The value of a metric without labels in Prometheus' text; false where it is not. */
bool gn_read_metric(const char *text, const char *name, double *value);
/* The port in the line that guanaco-server --json prints when it is ready; 0: it is another. */
int gn_read_ready_port(const char *line);

#endif
