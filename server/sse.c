/* sse.c - server-sent events. */
#include "server/sse.h"

void gn_sse_begin(gn_exchange *x) {
    gn_respond_begin(x, 200, "text/event-stream; charset=utf-8");
}

void gn_sse_open(gn_buffer *b) {
    gn_buffer_append(b, "data: ", 6);
}

void gn_sse_send(gn_exchange *x, gn_buffer *b) {
    gn_buffer_append(b, "\n\n", 2);
    gn_respond_part(x, b->data, b->size);
    b->size = 0;
}

void gn_sse_fail(gn_exchange *x, const gn_http_error *error) {
    gn_buffer b = {0};
    gn_sse_open(&b);
    gn_http_error_json(&b, error);
    gn_sse_send(x, &b);
    gn_buffer_free(&b);
    x->keep_alive = false;
    gn_respond_end(x);
}

void gn_sse_done(gn_exchange *x) {
    static const char done[] = "data: [DONE]\n\n";
    gn_respond_part(x, done, sizeof done - 1);
    gn_respond_end(x);
}
