/* server.c - binding, the loop, shutdown. */
#include "server/server.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "server/state.h"

enum {
    BACKLOG = 4096,
    SPARE_FILES = 256,        /* for what is not a connection, and for those that are refused */
    ACCEPT_BATCH = 64,        /* connections taken before others are heard again */
    RETRY_MS = 100,           /* between attempts to accept without descriptors or memory */
    REPEAT_WARNING_MS = 60000 /* while that lasts */
};

/* ---- open ---- */

static void fill_defaults(gn_server_options *o) {
    if (!o->host) o->host = "127.0.0.1";
    if (o->max_body <= 0) o->max_body = 8 << 20;
    if (o->max_connections <= 0) o->max_connections = 16384;
    if (o->header_ms <= 0) o->header_ms = 10000;
    if (o->request_ms <= 0) o->request_ms = 60000;
    if (o->idle_ms <= 0) o->idle_ms = 75000;
    if (o->stall_ms <= 0) o->stall_ms = 30000;
    if (o->drain_ms <= 0) o->drain_ms = 5000;
    if (o->max_unsent <= 0) o->max_unsent = 1 << 20;
}

/* libuv reports a taken port only when listening; a socket of our own says so at once. */
static int bind_one(const struct addrinfo *address, int *error) {
    const int fd = socket(address->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int yes = 1;
    if (fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes) == 0 &&
        bind(fd, address->ai_addr, address->ai_addrlen) == 0)
        return fd;
    *error = errno;
    if (fd >= 0) close(fd);
    return -1;
}

static gn_status name_bind_error(const gn_server_options *o, int error, gn_error *err) {
    switch (error) {
    case EADDRINUSE:
        return gn_fail(err, GN_EBUSY, "port %d is in use; choose another with --port", o->port);
    case EACCES:
        return gn_fail(err, GN_EIO, "port %d needs more rights; choose one above 1023 with --port",
                       o->port);
    case EADDRNOTAVAIL:
        return gn_fail(err, GN_EINVAL, "%s is not an address of this machine; see --host", o->host);
    default:
        return gn_fail(err, GN_EIO, "cannot listen on %s port %d: %s", o->host, o->port,
                       strerror(error));
    }
}

static gn_status bind_listener(gn_server *s, gn_error *err) {
    const gn_server_options *o = &s->options;
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE};
    struct addrinfo *found = NULL;
    char port[16];
    int error = 0, fd = -1;
    snprintf(port, sizeof port, "%d", o->port);
    const int code = getaddrinfo(o->host, port, &hints, &found);
    if (code) return gn_fail(err, GN_EINVAL, "--host %s: %s", o->host, gai_strerror(code));
    for (const struct addrinfo *a = found; a && fd < 0; a = a->ai_next) fd = bind_one(a, &error);
    freeaddrinfo(found);
    if (fd < 0) return name_bind_error(o, error, err);
    struct sockaddr_storage bound;
    socklen_t size = sizeof bound;
    getsockname(fd, (struct sockaddr *)&bound, &size);
    s->port = ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&bound)->sin6_port
                                                : ((struct sockaddr_in *)&bound)->sin_port);
    s->listen_fd = fd;
    if (uv_poll_init(&s->loop, &s->listener, fd) == 0) return GN_OK;
    return gn_fail(err, GN_EIO, "cannot use the listening socket");
}

/* Connections need as many file descriptors: what the system allows is asked for, and what it does
 * not allow is not promised. */
static void fit_file_limit(gn_server *s) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit)) return;
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) && getrlimit(RLIMIT_NOFILE, &limit)) return;
    const rlim_t files = limit.rlim_cur, room = files > SPARE_FILES ? files - SPARE_FILES : 1;
    if (room >= (rlim_t)s->options.max_connections) return;
    gn_log_warning(s,
                   "the system allows %lld open files, so there is room for %lld connections, not "
                   "%d; see ulimit -Hn",
                   (long long)files, (long long)room, s->options.max_connections);
    s->options.max_connections = (int)room;
}

/* ---- shutdown ---- */

static void close_if_open(uv_handle_t *handle) {
    if (handle->type != UV_UNKNOWN_HANDLE && !uv_is_closing(handle)) uv_close(handle, NULL);
}

static void close_listener(gn_server *s) {
    close_if_open((uv_handle_t *)&s->listener);
    uv_timer_stop(&s->retry);
    if (s->listen_fd >= 0) close(s->listen_fd);
    s->listen_fd = -1;
}

/* The loop ends when the last connection is closed and the engine owes no event. */
static void end_when_quiet(gn_server *s) {
    if (s->stops == 0 || s->n_connections > 0 || s->mailbox.tickets > 0) return;
    uv_stop(&s->loop);
}

static void on_drained(uv_timer_t *timer) {
    gn_server *s = timer->data;
    gn_connections_close(s);
    end_when_quiet(s);
}

void gn_server_connection_closed(gn_server *s) {
    end_when_quiet(s);
}

static void stop_now(gn_server *s) {
    if (s->stops++ > 0) {
        gn_connections_close(s);
    } else {
        close_listener(s);
        for (int i = 0; i < 2; i++) close_if_open((uv_handle_t *)&s->signals[i]);
        gn_connections_finish(s);
        uv_timer_start(&s->drain, on_drained, (uint64_t)s->options.drain_ms, 0);
    }
    end_when_quiet(s);
}

static void on_stop(uv_async_t *stop) {
    stop_now(stop->data);
}

/* The second signal finds the default action again, and so ends the program at once. */
static void on_signal(uv_signal_t *signal, int number) {
    (void)number;
    stop_now(signal->data);
}

static void on_delivered(void *user) {
    gn_server *s = user;
    gn_connections_flush(s);
    end_when_quiet(s);
}

gn_status gn_server_open(gn_server **out, const gn_server_options *options, gn_error *err) {
    gn_server *s = calloc(1, sizeof *s);
    if (!s) return gn_fail(err, GN_ENOMEM, "out of memory");
    s->options = *options;
    fill_defaults(&s->options);
    if (uv_loop_init(&s->loop)) {
        free(s);
        return gn_fail(err, GN_ENOMEM, "cannot start the event loop");
    }
    uv_loop_configure(&s->loop, UV_METRICS_IDLE_TIME);
    s->listen_fd = -1;
    uv_timer_init(&s->loop, &s->drain);
    uv_timer_init(&s->loop, &s->retry);
    for (int i = 0; i < 2; i++) uv_signal_init(&s->loop, &s->signals[i]);
    s->listener.data = s->stop.data = s->drain.data = s->retry.data = s;
    s->signals[0].data = s->signals[1].data = s;
    s->created = (int64_t)time(NULL);
    gn_status status = GN_OK;
    if (uv_async_init(&s->loop, &s->stop, on_stop) ||
        gn_mailbox_open(&s->mailbox, &s->loop, on_delivered, s) != GN_OK)
        status = gn_fail(err, GN_ENOMEM, "cannot start the event loop");
    fit_file_limit(s);
    if (!status) status = bind_listener(s, err);
    if (status)
        gn_server_close(s);
    else
        *out = s;
    return status;
}

int gn_server_port(const gn_server *s) {
    return s->port;
}

/* ---- what is served ---- */

static char *folder_name(const char *dir) {
    size_t end = strlen(dir);
    while (end > 1 && dir[end - 1] == '/') end--;
    size_t start = end;
    while (start > 0 && dir[start - 1] != '/') start--;
    return end > start ? strndup(dir + start, end - start) : strdup("base");
}

gn_status gn_server_serve(gn_server *s, gn_model *model, gn_engine *engine, gn_error *err) {
    const gn_model_info info = gn_model_describe(model);
    const char *name = s->options.model_name;
    s->engine = engine;
    s->model = model;
    char *real = name || !info.dir ? NULL : realpath(info.dir, NULL);
    s->model_name = name ? strdup(name) : folder_name(real ? real : "");
    free(real);
    snprintf(s->fingerprint, sizeof s->fingerprint, "guanaco-" GN_VERSION "-%s",
             gn_qtype_name(info.quant));
    if (!s->model_name) return gn_fail(err, GN_ENOMEM, "out of memory");
    if (gn_registry_name_ok(s->model_name)) return GN_OK;
    return gn_fail(err, GN_EINVAL,
                   "\"%s\" cannot be a model's name: 1 to 128 letters, digits and . _ - : / + are "
                   "allowed; choose one with --model-name",
                   s->model_name);
}

gn_status gn_server_add_adapter(gn_server *s, const char *name, const char *dir,
                                gn_adapter *adapter, gn_error *err) {
    gn_status status = GN_OK;
    if (!gn_registry_name_ok(name))
        status = gn_fail(err, GN_EINVAL,
                         "\"%s\" cannot be an adapter's name: 1 to 128 letters, digits and "
                         ". _ - : / + are allowed",
                         name);
    else if (strcmp(name, s->model_name) == 0 || gn_registry_find(&s->registry, name))
        status = gn_fail(err, GN_EEXIST, "the name \"%s\" is taken", name);
    if (status) {
        gn_adapter_close(adapter);
        return status;
    }
    status = gn_registry_put(&s->registry, name, dir, adapter, (int64_t)time(NULL));
    return status ? gn_fail(err, status, "out of memory") : GN_OK;
}

/* ---- run ---- */

static void listen_again(uv_timer_t *retry);

/* Without descriptors or memory the waiting clients stay in the system's queue. Asking again at
 * once would only burn time that running requests need. */
static void rest(gn_server *s, int error) {
    const uint64_t now = uv_now(&s->loop);
    uv_poll_stop(&s->listener);
    uv_timer_start(&s->retry, listen_again, RETRY_MS, 0);
    if (s->starved && now < s->starved + REPEAT_WARNING_MS) return;
    s->starved = now;
    gn_log_warning(s, "cannot accept more connections than these %d for now: %s", s->n_connections,
                   strerror(error));
}

static void on_connection(uv_poll_t *listener, int status, int events) {
    gn_server *s = listener->data;
    (void)status; /* accept tells */
    (void)events;
    for (int i = 0; i < ACCEPT_BATCH; i++) {
        const int fd = accept4(s->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        const int error = fd < 0 ? errno : 0;
        if (fd >= 0) gn_connection_open(s, fd);
        if (error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM)
            rest(s, error);
        if (error && error != EINTR && error != ECONNABORTED) return;
    }
}

static void listen_again(uv_timer_t *retry) {
    gn_server *s = retry->data;
    uv_poll_start(&s->listener, UV_READABLE, on_connection);
}

static gn_status catch_signals(gn_server *s, gn_error *err) {
    static const int numbers[] = {SIGINT, SIGTERM};
    for (int i = 0; i < 2; i++) {
        const int code = uv_signal_start(&s->signals[i], on_signal, numbers[i]);
        if (code) return gn_fail(err, GN_EIO, "cannot handle signals: %s", uv_strerror(code));
    }
    return GN_OK;
}

gn_status gn_server_listen(gn_server *s, gn_error *err) {
    if (listen(s->listen_fd, BACKLOG)) return name_bind_error(&s->options, errno, err);
    const int code = uv_poll_start(&s->listener, UV_READABLE, on_connection);
    if (code) return gn_fail(err, GN_EIO, "cannot listen: %s", uv_strerror(code));
    return catch_signals(s, err);
}

void gn_server_run(gn_server *s) {
    uv_run(&s->loop, UV_RUN_DEFAULT);
}

void gn_server_stop(gn_server *s) {
    uv_async_send(&s->stop);
}

void gn_server_close(gn_server *s) {
    if (!s) return;
    gn_connections_close(s);
    gn_engine_close(s->engine); /* its last events are in the mailbox after this */
    if (s->mailbox.wake.data) gn_mailbox_close(&s->mailbox);
    gn_registry_close(&s->registry);
    close_listener(s);
    uv_handle_t *handles[] = {(uv_handle_t *)&s->drain, (uv_handle_t *)&s->retry,
                              (uv_handle_t *)&s->signals[0], (uv_handle_t *)&s->signals[1],
                              (uv_handle_t *)&s->stop};
    for (size_t i = 0; i < sizeof handles / sizeof *handles; i++) close_if_open(handles[i]);
    while (uv_loop_close(&s->loop) == UV_EBUSY) uv_run(&s->loop, UV_RUN_DEFAULT);
    free(s->model_name);
    free(s);
}
