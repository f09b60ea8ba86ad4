/* http.c - errors, header look-up, and responses as bytes. */
#include "server/http.h"

#include <llhttp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "server/routes.h"
#include "server/state.h"

/* ---- errors ---- */

bool gn_http_fail(gn_http_error *e, int status, const char *code, const char *param,
                  const char *fmt, ...) {
    if (e->status) return false;
    e->status = status;
    e->code = code;
    snprintf(e->param, sizeof e->param, "%s", param);
    va_list args;
    va_start(args, fmt);
    vsnprintf(e->message, sizeof e->message, fmt, args);
    va_end(args);
    return false;
}

bool gn_http_no_memory(gn_http_error *e) {
    return gn_http_fail(e, 503, "out_of_memory", "", "The server is out of memory.");
}

bool gn_http_fail_with(gn_http_error *e, const char *param, const gn_error *error) {
    switch (error->status) {
    case GN_EBUSY:
        if (e->status) return false;
        snprintf(e->headers, sizeof e->headers, "Retry-After: 1\r\n");
        return gn_http_fail(e, 429, "queue_full", param, "%s", error->message);
    case GN_ETOOBIG:
        return gn_http_fail(e, 400, "context_length_exceeded", param, "%s", error->message);
    case GN_ENOENT: return gn_http_fail(e, 404, "not_found", param, "%s", error->message);
    case GN_ENOMEM: return gn_http_fail(e, 503, "out_of_memory", param, "%s", error->message);
    case GN_ECANCELED: return gn_http_fail(e, 503, "shutting_down", param, "%s", error->message);
    case GN_EDEVICE: return gn_http_fail(e, 500, NULL, param, "%s", error->message);
    default: return gn_http_fail(e, 400, NULL, param, "%s", error->message);
    }
}

static const char *type_of(int status) {
    switch (status) {
    case 401: return "authentication_error";
    case 403: return "permission_error";
    case 404: return "not_found_error";
    case 408: return "timeout_error";
    case 429: return "rate_limit_error";
    default: return status >= 500 ? "server_error" : "invalid_request_error";
    }
}

void gn_http_error_json(gn_buffer *b, const gn_http_error *e) {
    gn_buffer_text(b, "{\"error\":{\"message\":");
    gn_buffer_json_text(b, e->message);
    gn_buffer_format(b, ",\"type\":\"%s\",\"param\":", type_of(e->status));
    gn_buffer_json_text(b, e->param[0] ? e->param : NULL);
    gn_buffer_text(b, ",\"code\":");
    gn_buffer_json_text(b, e->code);
    gn_buffer_text(b, "}}");
}

/* ---- requests ---- */

const char *gn_http_header(const gn_exchange *x, const char *name) {
    if (!x->path) return NULL; /* the headers are not complete */
    const char *at = x->head.data + x->fields, *end = x->head.data + x->head.size;
    while (at < end) {
        const char *value = at + strlen(at) + 1;
        if (value >= end) break;
        if (strcmp(at, name) == 0) return value;
        at = value + strlen(value) + 1;
    }
    return NULL;
}

/* ---- responses ---- */

static const char *reason_of(int status) {
    switch (status) {
    case 200: return "OK";
    case 204: return "No Content";
    case 304: return "Not Modified";
    case 400: return "Bad Request";
    case 401: return "Unauthorized";
    case 403: return "Forbidden";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    case 408: return "Request Timeout";
    case 409: return "Conflict";
    case 413: return "Payload Too Large";
    case 417: return "Expectation Failed";
    case 429: return "Too Many Requests";
    case 431: return "Request Header Fields Too Large";
    case 500: return "Internal Server Error";
    case 503: return "Service Unavailable";
    case 505: return "HTTP Version Not Supported";
    default: return "Status";
    }
}

static void send_head(gn_exchange *x, int status, const char *type, const char *headers,
                      const char *length) {
    char cors[512], line[160];
    x->status = status;
    if (x->server->stops) x->keep_alive = false;
    int n = snprintf(line, sizeof line, "HTTP/1.1 %d %s\r\n", status, reason_of(status));
    gn_connection_send(x->connection, line, (size_t)n);
    if (type) {
        n = snprintf(line, sizeof line, "Content-Type: %s\r\n", type);
        gn_connection_send(x->connection, line, (size_t)n);
    }
    gn_cors_headers(x, cors, sizeof cors);
    gn_connection_send(x->connection, cors, strlen(cors));
    if (headers) gn_connection_send(x->connection, headers, strlen(headers));
    gn_connection_send(x->connection, length, strlen(length));
    const char *keep = !x->keep_alive ? "Connection: close\r\n\r\n"
                       : x->http10    ? "Connection: keep-alive\r\n\r\n"
                                      : "\r\n";
    gn_connection_send(x->connection, keep, strlen(keep));
}

static void end(gn_exchange *x) {
    x->ended = true;
    x->on_abort = NULL;
    gn_connection_response_ended(x->connection);
}

void gn_respond(gn_exchange *x, int status, const char *type, const char *headers, const void *body,
                size_t size) {
    char length[64] = "";
    if (status != 204 && status != 304)
        snprintf(length, sizeof length, "Content-Length: %zu\r\n", size);
    send_head(x, status, type, headers, length);
    if (x->method != HTTP_HEAD) gn_connection_send(x->connection, body, size);
    end(x);
}

void gn_respond_json(gn_exchange *x, int status, const gn_buffer *body) {
    if (body->failed) {
        const gn_http_error error = {.status = 503,
                                     .code = "out_of_memory",
                                     .message = "The server is out of memory for the response."};
        gn_respond_error(x, &error);
        return;
    }
    gn_respond(x, status, "application/json", NULL, body->data, body->size);
}

void gn_respond_error(gn_exchange *x, const gn_http_error *error) {
    gn_buffer body = {0};
    gn_http_error_json(&body, error);
    gn_respond(x, error->status, "application/json", error->headers, body.data, body.size);
    gn_buffer_free(&body);
}

void gn_respond_begin(gn_exchange *x, int status, const char *type) {
    x->chunked = !x->http10;
    if (x->http10) x->keep_alive = false;
    send_head(x, status, type, "Cache-Control: no-cache\r\n",
              x->chunked ? "Transfer-Encoding: chunked\r\n" : "");
}

void gn_respond_part(gn_exchange *x, const void *data, size_t size) {
    if (size == 0) return;
    char length[24];
    const int n = snprintf(length, sizeof length, "%zx\r\n", size);
    if (x->chunked) gn_connection_send(x->connection, length, (size_t)n);
    gn_connection_send(x->connection, data, size);
    if (x->chunked) gn_connection_send(x->connection, "\r\n", 2);
}

void gn_respond_end(gn_exchange *x) {
    if (x->chunked) gn_connection_send(x->connection, "0\r\n\r\n", 5);
    end(x);
}
