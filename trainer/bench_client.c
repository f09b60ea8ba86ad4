/* bench_client.c - HTTP requests, all on one libuv loop that ends when their connections do. */
#include "trainer/bench_client.h"

static gn_call *call_of(llhttp_t *parser) {
    return parser->data;
}

static int on_body(llhttp_t *parser, const char *data, size_t size) {
    gn_call *c = call_of(parser);
    return c->on_body(c->user, data, size) ? 0 : HPE_USER;
}

static int on_complete(llhttp_t *parser) {
    call_of(parser)->ended = true;
    return 0;
}

static const llhttp_settings_t settings = {.on_body = on_body, .on_message_complete = on_complete};

static void end(gn_call *c, int failure) {
    if (!c->failure) c->failure = failure;
    c->status = llhttp_get_status_code(&c->parser);
    if (!uv_is_closing((uv_handle_t *)&c->socket)) uv_close((uv_handle_t *)&c->socket, NULL);
}

static void give_buffer(uv_handle_t *handle, size_t suggested, uv_buf_t *buffer) {
    gn_call *c = handle->data;
    (void)suggested;
    *buffer = uv_buf_init(c->buffer, sizeof c->buffer);
}

static void on_read(uv_stream_t *stream, ssize_t n, const uv_buf_t *buffer) {
    gn_call *c = stream->data;
    if (n == 0) return;
    const llhttp_errno_t parsed =
        n < 0 ? llhttp_finish(&c->parser) : llhttp_execute(&c->parser, buffer->base, (size_t)n);
    if (c->ended || n < 0 || parsed != HPE_OK) end(c, c->ended ? 0 : n < 0 ? (int)n : UV_EPROTO);
}

static void on_written(uv_write_t *request, int failure) {
    if (failure) end(request->data, failure);
}

static void on_connected(uv_connect_t *request, int failure) {
    gn_call *c = request->data;
    uv_buf_t bytes = uv_buf_init((char *)c->request, (unsigned)c->request_size);
    uv_stream_t *stream = (uv_stream_t *)&c->socket;
    if (!failure) failure = uv_read_start(stream, give_buffer, on_read);
    if (!failure) failure = uv_write(&c->write, stream, &bytes, 1, on_written);
    if (failure) end(c, failure);
}

static void start(gn_call *c, uv_loop_t *loop, const struct sockaddr_in *address) {
    llhttp_init(&c->parser, HTTP_RESPONSE, &settings);
    c->parser.data = c->socket.data = c->connect.data = c->write.data = c;
    c->failure = uv_tcp_init(loop, &c->socket);
    if (c->failure) return; /* there is nothing to close */
    uv_tcp_nodelay(&c->socket, 1);
    const int failure =
        uv_tcp_connect(&c->connect, &c->socket, (const struct sockaddr *)address, on_connected);
    if (failure) end(c, failure);
}

static gn_status judge(const gn_call *calls, int n, gn_error *err) {
    for (int i = 0; i < n; i++) {
        const gn_call *c = &calls[i];
        if (c->status != 0 && c->status != 200)
            return gn_fail(err, GN_EIO, "the server answered %d", c->status);
        if (!c->ended || c->failure)
            return gn_fail(err, GN_EIO, "the connection to the server: %s",
                           c->failure ? uv_strerror(c->failure) : "ended early");
    }
    return GN_OK;
}

gn_status gn_calls_run(gn_call *calls, int n, int port, gn_error *err) {
    uv_loop_t loop;
    struct sockaddr_in address;
    if (uv_ip4_addr("127.0.0.1", port, &address) || uv_loop_init(&loop))
        return gn_fail(err, GN_EIO, "cannot set up connections");
    for (int i = 0; i < n; i++) start(&calls[i], &loop, &address);
    uv_run(&loop, UV_RUN_DEFAULT);
    uv_loop_close(&loop);
    return judge(calls, n, err);
}
