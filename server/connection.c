/* connection.c - one client's socket.
 *
 * Reading: bytes go from the server's one read buffer into the reader; what arrives while a
 * request is being answered waits in `pending`, and reading stops when that holds too much.
 * Writing: handlers append to `out`; a flush tries to send at once and leaves the rest to
 * libuv, one write at a time, while `out` fills again. Nothing here closes a connection while a
 * handler may be running: `doomed` asks the next flush to do it. */
#include "server/connection.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "server/reader.h"
#include "server/state.h"

enum {
    KEEP_BUFFER = 4096,         /* bytes of a write buffer worth keeping between writes */
    MAX_PENDING = 64 << 10,     /* bytes read ahead of the request being answered */
    MAX_LINGER_BYTES = 4 << 20, /* read and thrown away so that a refusal can be read */
    LINGER_MS = 2000,
    MAX_BODIES = 64, /* requests of max_body bytes in memory at once */
    MAX_TOLD = 64,   /* connections beyond the limit that are told so */
    STALL_CHECKS = 4 /* per stall_ms */
};

typedef enum phase {
    IDLE,      /* between requests */
    READING,   /* some bytes of a request have come */
    ANSWERING, /* a handler has it */
    LINGERING, /* all was said; waiting for the client to close */
    CLOSED
} phase;

struct gn_connection {
    uv_tcp_t tcp;
    uv_timer_t timer;
    uv_write_t write;
    uv_shutdown_t shutdown;
    gn_server *server;
    gn_connection *previous, *next, *next_unflushed;
    gn_reader reader;
    gn_exchange *exchange; /* being read or answered */
    gn_buffer pending, out, sending;
    phase phase;
    bool unflushed, feeding, writing, paused, doomed;
    bool last; /* no request will be read any more */
    bool gone; /* the client has closed its side */
    int open_handles;
    uint64_t since;    /* when the phase began, loop's ms */
    uint64_t progress; /* when the client last took bytes */
    size_t unsent;     /* bytes libuv held then */
    size_t lingered;
};

static void feed(gn_connection *c, const char *data, size_t size);

/* ---- closing ---- */

static void on_closed(uv_handle_t *handle) {
    gn_connection *c = handle->data;
    if (--c->open_handles > 0) return;
    gn_buffer_free(&c->pending);
    gn_buffer_free(&c->out);
    gn_buffer_free(&c->sending);
    gn_server *s = c->server;
    free(c);
    gn_server_connection_closed(s);
}

static void free_exchange(gn_connection *c) {
    gn_exchange *x = c->exchange;
    c->exchange = NULL;
    if (!x) return;
    c->server->body_bytes -= x->body_counted;
    gn_buffer_free(&x->head);
    gn_buffer_free(&x->body);
    free(x);
}

static void unlink_connection(gn_connection *c) {
    gn_server *s = c->server;
    if (c->previous)
        c->previous->next = c->next;
    else
        s->connections = c->next;
    if (c->next) c->next->previous = c->previous;
    s->n_connections--;
    for (gn_connection **at = &s->unflushed; c->unflushed && *at; at = &(*at)->next_unflushed) {
        if (*at != c) continue;
        *at = c->next_unflushed;
        break;
    }
}

static void close_connection(gn_connection *c) {
    if (c->phase == CLOSED) return;
    c->phase = CLOSED;
    unlink_connection(c);
    gn_exchange *x = c->exchange;
    if (x && x->on_abort) {
        c->server->counters.canceled++;
        x->status = 499; /* nginx's word for a client that left */
        gn_log_exchange(x);
        x->on_abort(x->user);
    }
    free_exchange(c);
    uv_close((uv_handle_t *)&c->tcp, on_closed);
    uv_close((uv_handle_t *)&c->timer, on_closed);
}

/* ---- time-outs ---- */

static void set_timer(gn_connection *c);

static bool has_unsent(const gn_connection *c) {
    return c->writing || c->out.size > 0;
}

static void refuse_slow(gn_connection *c) {
    gn_exchange *x = c->exchange;
    c->phase = ANSWERING;
    x->keep_alive = false;
    gn_http_fail(&x->refusal, 408, "request_timeout", "",
                 "The request did not arrive within %d seconds.",
                 (x->path ? c->server->options.request_ms : c->server->options.header_ms) / 1000);
    gn_respond_error(x, &x->refusal);
    gn_connections_flush(c->server);
}

/* When the connection's time is up; UINT64_MAX: never. */
static uint64_t deadline(const gn_connection *c) {
    const gn_server_options *o = &c->server->options;
    switch (c->phase) {
    case IDLE: return has_unsent(c) ? UINT64_MAX : c->since + (uint64_t)o->idle_ms;
    case READING:
        if (c->exchange->path) return c->since + (uint64_t)o->request_ms;
        return c->since + (uint64_t)(o->header_ms < o->request_ms ? o->header_ms : o->request_ms);
    case LINGERING: return c->since + LINGER_MS;
    default: return UINT64_MAX;
    }
}

static void on_timer(uv_timer_t *timer) {
    gn_connection *c = timer->data;
    const uint64_t now = uv_now(&c->server->loop);
    if (c->writing) {
        if (c->tcp.write_queue_size < c->unsent) c->progress = now;
        c->unsent = c->tcp.write_queue_size;
        if (now >= c->progress + (uint64_t)c->server->options.stall_ms) {
            close_connection(c);
            return;
        }
    }
    if (now < deadline(c))
        set_timer(c);
    else if (c->phase == READING)
        refuse_slow(c);
    else
        close_connection(c);
}

static void set_timer(gn_connection *c) {
    if (c->phase == CLOSED) return;
    const uint64_t now = uv_now(&c->server->loop);
    const uint64_t check = (uint64_t)c->server->options.stall_ms / STALL_CHECKS;
    uint64_t wait = deadline(c);
    if (wait != UINT64_MAX) wait = wait > now ? wait - now : 1;
    if (c->writing && wait > check) wait = check + 1;
    if (wait == UINT64_MAX)
        uv_timer_stop(&c->timer);
    else
        uv_timer_start(&c->timer, on_timer, wait, 0);
}

static void enter(gn_connection *c, phase phase) {
    c->phase = phase;
    c->since = uv_now(&c->server->loop);
    set_timer(c);
}

/* ---- writing ---- */

static void mark_unflushed(gn_connection *c) {
    if (c->unflushed || c->phase == CLOSED) return;
    c->unflushed = true;
    c->next_unflushed = c->server->unflushed;
    c->server->unflushed = c;
}

static void on_shutdown(uv_shutdown_t *request, int status) {
    (void)request;
    (void)status;
}

static void all_sent(gn_connection *c) {
    if (c->gone) {
        close_connection(c);
    } else if (c->last && c->phase != LINGERING) {
        enter(c, LINGERING);
        if (uv_shutdown(&c->shutdown, (uv_stream_t *)&c->tcp, on_shutdown)) close_connection(c);
    } else if (c->phase == IDLE) {
        gn_buffer_free(&c->out);
        gn_buffer_free(&c->sending);
        enter(c, IDLE);
    }
}

static void on_written(uv_write_t *request, int status) {
    gn_connection *c = request->data;
    if (c->phase == CLOSED) return;
    gn_server *s = c->server;
    c->writing = false;
    if (status == 0) s->counters.bytes_sent += (int64_t)c->sending.size;
    gn_buffer_clear(&c->sending, KEEP_BUFFER);
    if (status < 0) {
        close_connection(c);
        return;
    }
    mark_unflushed(c);
    gn_connections_flush(s);
}

static void start_write(gn_connection *c) {
    const gn_buffer full = c->out;
    c->out = c->sending;
    c->sending = full;
    const uv_buf_t piece = uv_buf_init(full.data, (unsigned)full.size);
    c->write.data = c;
    if (uv_write(&c->write, (uv_stream_t *)&c->tcp, &piece, 1, on_written)) {
        c->doomed = true;
        return;
    }
    c->writing = true;
    c->unsent = c->tcp.write_queue_size;
    c->progress = uv_now(&c->server->loop);
    set_timer(c);
}

/* Sends what the socket takes now and leaves the rest to libuv. */
static void push(gn_connection *c) {
    if (c->writing || c->doomed || c->out.size == 0) return;
    const uv_buf_t piece = uv_buf_init(c->out.data, (unsigned)c->out.size);
    const int n = uv_try_write((uv_stream_t *)&c->tcp, &piece, 1);
    if (n < 0 && n != UV_EAGAIN) {
        c->doomed = true;
        return;
    }
    if (n > 0) {
        gn_buffer_consume(&c->out, (size_t)n);
        c->server->counters.bytes_sent += n;
    }
    if (c->out.size) start_write(c);
}

void gn_connection_send(gn_connection *c, const void *data, size_t size) {
    const size_t most = (size_t)c->server->options.max_unsent;
    if (c->out.size > most) push(c);
    /* The engine does not wait for a client that reads slower than its tokens come. */
    if (c->out.size > most) c->doomed = true;
    if (!c->doomed) gn_buffer_append(&c->out, data, size);
    if (c->out.failed) c->doomed = true;
    mark_unflushed(c);
}

static void flush(gn_connection *c) {
    push(c);
    if (c->doomed) {
        close_connection(c);
    } else if (!has_unsent(c)) {
        all_sent(c);
        feed(c, "", 0); /* requests that waited for the client to take the answers */
    }
}

void gn_connections_flush(gn_server *s) {
    while (s->unflushed) {
        gn_connection *c = s->unflushed;
        s->unflushed = c->next_unflushed;
        c->unflushed = false;
        flush(c);
    }
}

/* ---- answering ---- */

static void begin_exchange(gn_connection *c) {
    c->exchange = calloc(1, sizeof *c->exchange);
    if (!c->exchange) {
        c->doomed = true;
        mark_unflushed(c);
        return;
    }
    c->exchange->server = c->server;
    c->exchange->connection = c;
    c->exchange->started = uv_now(&c->server->loop);
    enter(c, READING);
}

void gn_connection_response_ended(gn_connection *c) {
    gn_exchange *x = c->exchange;
    c->server->counters.requests[x->status / 100 % GN_STATUS_CLASSES]++;
    gn_log_exchange(x);
    if (!x->keep_alive || c->server->stops) c->last = true;
    mark_unflushed(c);
    if (!c->feeding) feed(c, "", 0);
}

static void answer(gn_connection *c, bool refused) {
    gn_exchange *x = c->exchange;
    enter(c, ANSWERING);
    if (refused) x->keep_alive = false;
    if (x->refusal.status)
        gn_respond_error(x, &x->refusal);
    else
        x->handler(x);
}

/* ---- reading ---- */

static void invite_body(gn_connection *c) {
    static const char line[] = "HTTP/1.1 100 Continue\r\n\r\n";
    c->exchange->expects_continue = false;
    gn_connection_send(c, line, sizeof line - 1);
}

/* May the next request be read? Not while one is being answered, nor while the client leaves
 * answers lying. */
static bool may_read(const gn_connection *c) {
    if (c->last || c->doomed || c->phase == CLOSED) return false;
    if (c->exchange && c->exchange->ended) return true;
    return c->phase != ANSWERING &&
           c->out.size + c->tcp.write_queue_size < (size_t)c->server->options.max_unsent;
}

/* Bodies that are being read share a budget, however many connections send them. */
static void count_body(gn_connection *c) {
    gn_exchange *x = c->exchange;
    gn_server *s = c->server;
    s->body_bytes += x->body.capacity - x->body_counted;
    x->body_counted = x->body.capacity;
    if (s->body_bytes > MAX_BODIES * (size_t)s->options.max_body)
        gn_http_fail(&x->refusal, 503, "overloaded", "",
                     "The server is reading too many large requests; try again later.");
}

/* Takes what it can of the bytes; returns how many. */
static size_t consume(gn_connection *c, const char *data, size_t size) {
    size_t at = 0;
    while (may_read(c)) {
        if (c->exchange && c->exchange->ended) {
            free_exchange(c);
            enter(c, IDLE);
            continue;
        }
        if (at == size) break;
        if (!c->exchange) begin_exchange(c);
        if (!c->exchange) break;
        size_t used = 0;
        const gn_read result = gn_reader_feed(&c->reader, c->exchange, data + at, size - at, &used);
        at += used;
        count_body(c);
        if (result != GN_READ_MORE || c->exchange->refusal.status)
            answer(c, result != GN_READ_REQUEST);
        else if (c->exchange->expects_continue)
            invite_body(c);
        else
            set_timer(c);
    }
    return at;
}

static void stop_reading(gn_connection *c) {
    if (c->paused) return;
    c->paused = true;
    uv_read_stop((uv_stream_t *)&c->tcp);
}

static void start_reading(gn_connection *c);

/* Reads requests from `pending` and then from data; keeps what must wait. */
static void feed(gn_connection *c, const char *data, size_t size) {
    if (c->phase == CLOSED || c->feeding) return;
    c->feeding = true;
    if (c->pending.size) {
        gn_buffer_append(&c->pending, data, size);
        gn_buffer_consume(&c->pending, consume(c, c->pending.data, c->pending.size));
    } else {
        const size_t used = consume(c, data, size);
        if (!c->last) gn_buffer_append(&c->pending, data + used, size - used);
    }
    if (c->pending.size == 0 || c->last) gn_buffer_free(&c->pending);
    if (c->pending.failed) {
        c->doomed = true;
        mark_unflushed(c);
    }
    c->feeding = false;
    if (c->pending.size > MAX_PENDING)
        stop_reading(c);
    else
        start_reading(c);
}

static void on_allocate(uv_handle_t *handle, size_t size, uv_buf_t *buffer) {
    (void)size;
    gn_connection *c = handle->data;
    *buffer = uv_buf_init(c->server->read_buffer, GN_READ_BYTES);
}

/* Answers that are complete are still sent to a client that only closed its writing side; one
 * that is being made is canceled. */
static void client_left(gn_connection *c, bool orderly) {
    const bool answering = c->exchange && !c->exchange->ended;
    if (!orderly || answering || !has_unsent(c)) {
        close_connection(c);
        return;
    }
    c->last = c->gone = true;
    stop_reading(c);
}

static void on_read(uv_stream_t *stream, ssize_t n, const uv_buf_t *buffer) {
    gn_connection *c = stream->data;
    gn_server *s = c->server;
    if (n == 0) return;
    if (n < 0) {
        client_left(c, n == UV_EOF);
        return;
    }
    s->counters.bytes_received += n;
    if (c->last) {
        c->lingered += (size_t)n;
        if (c->lingered > MAX_LINGER_BYTES) close_connection(c);
        return;
    }
    feed(c, buffer->base, (size_t)n);
    gn_connections_flush(s);
}

static void start_reading(gn_connection *c) {
    if (!c->paused) return;
    c->paused = false;
    if (uv_read_start((uv_stream_t *)&c->tcp, on_allocate, on_read)) {
        c->doomed = true;
        mark_unflushed(c);
    }
}

/* ---- opening ---- */

static void refuse_crowd(gn_connection *c) {
    begin_exchange(c);
    gn_exchange *x = c->exchange;
    if (!x) return;
    c->phase = ANSWERING;
    gn_http_fail(&x->refusal, 503, "too_many_connections", "",
                 "The server has %d connections, which is its limit; try again later.",
                 c->server->options.max_connections);
    gn_respond_error(x, &x->refusal);
}

void gn_connection_open(gn_server *s, int fd) {
    const int most = s->options.max_connections;
    gn_connection *c = s->n_connections < most + MAX_TOLD ? calloc(1, sizeof *c) : NULL;
    if (!c) {
        close(fd);
        return;
    }
    c->server = s;
    c->open_handles = 2;
    c->paused = true;
    uv_tcp_init(&s->loop, &c->tcp);
    uv_timer_init(&s->loop, &c->timer);
    c->tcp.data = c->timer.data = c;
    c->next = s->connections;
    if (c->next) c->next->previous = c;
    s->connections = c;
    s->n_connections++;
    gn_reader_open(&c->reader, GN_MAX_HEAD, (size_t)s->options.max_body);
    if (uv_tcp_open(&c->tcp, fd)) {
        close(fd);
        close_connection(c);
        return;
    }
    s->counters.connections++;
    uv_tcp_nodelay(&c->tcp, 1);
    enter(c, IDLE);
    start_reading(c);
    if (s->n_connections > most) refuse_crowd(c);
    gn_connections_flush(s);
}

/* ---- shutdown ---- */

void gn_connections_finish(gn_server *s) {
    for (gn_connection *c = s->connections, *next; c; c = next) {
        next = c->next;
        if (c->phase == IDLE && !has_unsent(c)) close_connection(c);
    }
}

void gn_connections_close(gn_server *s) {
    while (s->connections) close_connection(s->connections);
}
