/* reader.c - bytes of a connection become requests. */
#include "server/reader.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "server/routes.h"

static gn_reader *reader_of(llhttp_t *parser) {
    return parser->data;
}

/* ---- target and headers ---- */

static int add_head(llhttp_t *parser, const char *at, size_t size) {
    gn_reader *r = reader_of(parser);
    gn_exchange *x = r->exchange;
    if (x->path) return 0; /* trailers, behind a chunked body: nobody asks for them */
    if (x->head.size + size > r->max_head) {
        gn_http_fail(&x->refusal, 431, "headers_too_large", "",
                     "The request's target and headers are larger than %zu bytes.", r->max_head);
        return HPE_USER;
    }
    gn_buffer_append(&x->head, at, size);
    if (!x->head.failed) return 0;
    gn_http_no_memory(&x->refusal);
    return HPE_USER;
}

static int end_head_string(llhttp_t *parser) {
    return add_head(parser, "", 1);
}

static int end_target(llhttp_t *parser) {
    const int failed = end_head_string(parser);
    reader_of(parser)->exchange->fields = reader_of(parser)->exchange->head.size;
    return failed;
}

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

/* Decodes %XX in place; false when it is malformed or stands for a zero byte. */
static bool decode_path(char *text) {
    char *out = text;
    for (const char *in = text; *in; in++) {
        if (*in != '%') {
            *out++ = *in;
            continue;
        }
        const int high = hex_digit(in[1]), low = high < 0 ? -1 : hex_digit(in[2]);
        if (low < 0 || high + low == 0) return false;
        *out++ = (char)(high * 16 + low);
        in += 2;
    }
    *out = 0;
    return true;
}

/* The path of a target: "/a%20b?c" and "http://host/a%20b?c" are "/a b". NULL: malformed. */
static const char *path_of(char *target) {
    char *path = target, *scheme = strstr(target, "://");
    if (*target != '/' && scheme) {
        path = strchr(scheme + 3, '/');
        if (!path) return "/";
    }
    path[strcspn(path, "?#")] = 0;
    return decode_path(path) ? path : NULL;
}

static void lower_names(gn_exchange *x) {
    bool name = true;
    for (size_t i = x->fields; i < x->head.size; i++) {
        char *c = x->head.data + i;
        if (*c == 0)
            name = !name;
        else if (name && *c >= 'A' && *c <= 'Z')
            *c = (char)(*c - 'A' + 'a');
    }
}

/* ---- the request as a whole ---- */

static bool expects_continue(gn_exchange *x) {
    const char *expect = gn_http_header(x, "expect");
    if (!expect) return false;
    if (strcasecmp(expect, "100-continue") == 0) return !x->http10;
    return gn_http_fail(&x->refusal, 417, NULL, "", "Only \"Expect: 100-continue\" is known.");
}

static int end_headers(llhttp_t *parser) {
    gn_reader *r = reader_of(parser);
    gn_exchange *x = r->exchange;
    x->method = parser->method;
    x->http10 = parser->http_major == 1 && parser->http_minor == 0;
    x->keep_alive = llhttp_should_keep_alive(parser);
    parser->upgrade = 0; /* an offer to speak another protocol may be ignored */
    lower_names(x);
    x->path = path_of(x->head.data);
    if (!x->path) {
        x->path = "";
        gn_http_fail(&x->refusal, 400, NULL, "", "The request's target is malformed.");
    }
    const bool has_body = (parser->flags & F_CHUNKED) || parser->content_length > 0;
    if (!x->refusal.status) gn_route(x);
    if (!x->refusal.status && parser->content_length > r->max_body)
        gn_http_fail(&x->refusal, 413, "body_too_large", "",
                     "The request's body has %llu bytes; the limit is %zu.",
                     (unsigned long long)parser->content_length, r->max_body);
    x->expects_continue = has_body && expects_continue(x);
    return x->refusal.status && has_body ? -1 : 0;
}

static int add_body(llhttp_t *parser, const char *at, size_t size) {
    gn_reader *r = reader_of(parser);
    gn_exchange *x = r->exchange;
    if (size > r->max_body - x->body.size) {
        gn_http_fail(&x->refusal, 413, "body_too_large", "",
                     "The request's body is larger than %zu bytes.", r->max_body);
        return HPE_USER;
    }
    gn_buffer_append(&x->body, at, size);
    if (!x->body.failed) return 0;
    gn_http_no_memory(&x->refusal);
    return HPE_USER;
}

static int end_request(llhttp_t *parser) {
    (void)parser;
    return HPE_PAUSED;
}

static const llhttp_settings_t settings = {
    .on_url = add_head,
    .on_url_complete = end_target,
    .on_header_field = add_head,
    .on_header_field_complete = end_head_string,
    .on_header_value = add_head,
    .on_header_value_complete = end_head_string,
    .on_headers_complete = end_headers,
    .on_body = add_body,
    .on_message_complete = end_request,
};

void gn_reader_open(gn_reader *r, size_t max_head, size_t max_body) {
    *r = (gn_reader){.max_head = max_head, .max_body = max_body};
    llhttp_init(&r->parser, HTTP_REQUEST, &settings);
    r->parser.data = r;
}

static void name_error(gn_exchange *x, llhttp_errno_t code, const char *reason) {
    if (code == HPE_INVALID_VERSION || code == HPE_PAUSED_H2_UPGRADE)
        gn_http_fail(&x->refusal, 505, NULL, "", "Only HTTP/1.0 and HTTP/1.1 are spoken here.");
    else
        gn_http_fail(&x->refusal, 400, NULL, "", "The request is not valid HTTP: %s.",
                     reason && *reason ? reason : llhttp_errno_name(code));
}

gn_read gn_reader_feed(gn_reader *r, gn_exchange *x, const char *data, size_t size, size_t *used) {
    r->exchange = x;
    const llhttp_errno_t code = llhttp_execute(&r->parser, data, size);
    *used = size;
    if (code == HPE_OK) return GN_READ_MORE;
    if (code == HPE_PAUSED) {
        *used = (size_t)(llhttp_get_error_pos(&r->parser) - data);
        llhttp_resume(&r->parser);
        return GN_READ_REQUEST;
    }
    name_error(x, code, llhttp_get_error_reason(&r->parser));
    return GN_READ_ERROR;
}
