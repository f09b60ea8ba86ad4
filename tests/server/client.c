/* client.c - a server in a thread, and a client with plain sockets. Included by tests. */
#include <arpa/inet.h>
#include <cjson/cJSON.h>
#include <criterion/criterion.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "server/server.h"

enum { PATIENCE_MS = 20000 };

typedef struct harness {
    gn_server *server;
    pthread_t thread;
    int port;
} harness;

static void *run_server(void *argument) {
    gn_server_run(argument);
    return NULL;
}

/* Opens the server; `options` may be NULL. */
static void open_server(harness *h, const gn_server_options *options) {
    const gn_server_options none = {0};
    gn_error err = {0};
    signal(SIGPIPE, SIG_IGN);
    cr_assert_eq(gn_server_open(&h->server, options ? options : &none, &err), GN_OK, "%s",
                 err.message);
}

static void add_adapter(harness *h, const gn_model *model, const char *name, const char *dir) {
    gn_error err = {0};
    gn_adapter *adapter = NULL;
    cr_assert_eq(gn_adapter_open(&adapter, model, dir, &err), GN_OK, "%s", err.message);
    cr_assert_eq(gn_server_add_adapter(h->server, name, dir, adapter, &err), GN_OK, "%s",
                 err.message);
}

static void run_in_thread(harness *h) {
    gn_error err = {0};
    cr_assert_eq(gn_server_listen(h->server, &err), GN_OK, "%s", err.message);
    h->port = gn_server_port(h->server);
    cr_assert_eq(pthread_create(&h->thread, NULL, run_server, h->server), 0);
}

static void close_server(harness *h) {
    gn_server_stop(h->server);
    pthread_join(h->thread, NULL);
    gn_server_close(h->server);
}

/* ---- client ---- */

static inline int dial(const harness *h) {
    const struct sockaddr_in address = {.sin_family = AF_INET,
                                        .sin_port = htons((uint16_t)h->port),
                                        .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    cr_assert(fd >= 0, "socket: %s", strerror(errno));
    cr_assert_eq(connect(fd, (const struct sockaddr *)&address, sizeof address), 0, "connect: %s",
                 strerror(errno));
    return fd;
}

static inline void say_bytes(int fd, const char *data, size_t size) {
    while (size > 0) {
        const ssize_t n = send(fd, data, size, MSG_NOSIGNAL);
        if (n < 0) return; /* the server has closed; what it said can still be read */
        data += n;
        size -= (size_t)n;
    }
}

static inline void say(int fd, const char *text) {
    say_bytes(fd, text, strlen(text));
}

static inline bool readable(int fd, int ms) {
    struct pollfd p = {.fd = fd, .events = POLLIN};
    return poll(&p, 1, ms) == 1;
}

/* Reads until the peer closes or `until` occurs; the result is the caller's. */
static inline char *hear(int fd, const char *until) {
    size_t size = 0, capacity = 1 << 16;
    char *text = malloc(capacity);
    for (;;) {
        text[size] = 0;
        if (until && strstr(text, until)) return text;
        cr_assert(readable(fd, PATIENCE_MS), "nothing came for %d ms, after: %s", PATIENCE_MS,
                  text);
        if (capacity - size < 1 << 15) text = realloc(text, capacity *= 2);
        const ssize_t n = recv(fd, text + size, capacity - size - 1, 0);
        if (n <= 0) return text;
        size += (size_t)n;
    }
}

/* One request on a connection of its own: everything the server said. */
static inline char *ask(const harness *h, const char *request) {
    const int fd = dial(h);
    say(fd, request);
    char *answer = hear(fd, NULL);
    close(fd);
    return answer;
}

/* `headers` are extra lines, each ended by CRLF. */
static inline void say_post(int fd, const char *path, const char *headers, const char *body) {
    char head[512];
    snprintf(head, sizeof head,
             "POST %s HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: %zu\r\n\r\n", path, headers,
             strlen(body));
    say(fd, head);
    say(fd, body);
}

static inline char *post_with(const harness *h, const char *path, const char *headers,
                              const char *body) {
    const int fd = dial(h);
    char all[256];
    snprintf(all, sizeof all, "Connection: close\r\n%s", headers);
    say_post(fd, path, all, body);
    char *answer = hear(fd, NULL);
    close(fd);
    return answer;
}

static inline char *post(const harness *h, const char *path, const char *body) {
    return post_with(h, path, "", body);
}

static inline char *get(const harness *h, const char *path) {
    char request[512];
    snprintf(request, sizeof request,
             "GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", path);
    return ask(h, request);
}

static inline int status_of(const char *answer) {
    int status = 0;
    return sscanf(answer, "HTTP/1.1 %d", &status) == 1 ? status : 0;
}

static inline const char *body_of(const char *answer) {
    const char *end = strstr(answer, "\r\n\r\n");
    return end ? end + 4 : "";
}

/* The JSON body of an answer. */
static inline cJSON *json_of(const char *answer) {
    cJSON *json = cJSON_Parse(body_of(answer));
    cr_assert(json, "no JSON in: %s", answer);
    return json;
}

/* A value by its path: "error.param", "choices.0.text". */
static inline const cJSON *at(const cJSON *json, const char *path) {
    char copy[256], *rest = copy;
    snprintf(copy, sizeof copy, "%s", path);
    for (char *word = strtok_r(copy, ".", &rest); word && json; word = strtok_r(NULL, ".", &rest))
        json = *word >= '0' && *word <= '9' ? cJSON_GetArrayItem(json, atoi(word))
                                            : cJSON_GetObjectItemCaseSensitive(json, word);
    return json;
}

static inline const char *text_at(const cJSON *json, const char *path) {
    const cJSON *value = at(json, path);
    return cJSON_IsString(value) ? value->valuestring : "(none)";
}

static inline double number_at(const cJSON *json, const char *path) {
    const cJSON *value = at(json, path);
    return cJSON_IsNumber(value) ? value->valuedouble : -12345;
}

/* Removes the framing of a chunked body, in place. */
static inline char *unchunk(char *answer) {
    char *in = (char *)body_of(answer), *out = in;
    for (;;) {
        char *end = NULL;
        const unsigned long size = strtoul(in, &end, 16);
        if (end == in || size == 0) break;
        in = end + 2;
        memmove(out, in, size);
        out += size;
        in += size + 2;
    }
    *out = 0;
    return answer;
}
