/* test_http.c - HTTP over real sockets: framing, keep-alive, refusals, access. */
#include "tests/server/harness.c"

#include "server/assets.h"

typedef struct exchange {
    const char *request;
    int status;
    const char *contains; /* of the answer; NULL: anything */
} exchange;

static void check_all(const harness *h, const exchange *cases, size_t n) {
    for (size_t i = 0; i < n; i++) {
        char *answer = ask(h, cases[i].request);
        cr_assert_eq(status_of(answer), cases[i].status, "%s\nwas answered with\n%s",
                     cases[i].request, answer);
        if (cases[i].contains)
            cr_assert(strstr(answer, cases[i].contains), "%s\nlacks %s in\n%s", cases[i].request,
                      cases[i].contains, answer);
        free(answer);
    }
}
#define CHECK_ALL(h, cases) check_all(h, cases, sizeof(cases) / sizeof *(cases))
#define END                 "Connection: close\r\n\r\n"

Test(http, protocol) {
    static const exchange cases[] = {
        {"GET /health HTTP/1.1\r\nHost: a\r\n" END, 200, "\"status\":\"ok\""},
        {"GET /health HTTP/1.0\r\n\r\n", 200, "Connection: close"},
        {"GET http://any/health?x=%41 HTTP/1.1\r\n" END, 200, NULL},
        {"GET /he%61lth HTTP/1.1\r\n" END, 200, NULL},
        {"GET /health HTTP/1.1\r\nX:\r\nY: \r\n" END, 200, NULL},
        {"\r\nGET /health HTTP/1.1\r\n" END, 200, NULL},
        {"HEAD /health HTTP/1.1\r\n" END, 200, "Content-Length: "},
        {"GET /health HTTP/1.1\r\nUpgrade: h2c\r\nConnection: close, Upgrade\r\n\r\n", 200, NULL},
        {"GET /nowhere HTTP/1.1\r\n" END, 404, "not_found_error"},
        {"GET /%00 HTTP/1.1\r\n" END, 400, NULL},
        {"GET /%zz HTTP/1.1\r\n" END, 400, NULL},
        {"DELETE /health HTTP/1.1\r\n" END, 405, "Allow: GET, HEAD\r\n"},
        {"GET /v1/chat/completions HTTP/1.1\r\n" END, 405, "Allow: POST\r\n"},
        {"GET /health HTTP/3.7\r\n\r\n", 505, NULL},
        {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, NULL},
        {"nonsense\r\n\r\n", 400, "not valid HTTP"},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400, NULL},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400, NULL},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n", 400,
         NULL},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400, NULL},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" END
         "d;x=y\r\n{\"prompt\":\"ab\r\n2\r\n\"}\r\n0\r\nTrailer: 1\r\n\r\n",
         200, "\"tokens\":[256,97,98]"},
        {"POST /tokenize HTTP/1.1\r\nExpect: 200-ok\r\nContent-Length: 9\r\n\r\n", 417, NULL},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", 413, "body_too_large"},
        {"POST /tokenize HTTP/1.1\r\n" END, 400, "needs a body"},
    };
    harness h;
    start_server(&h, NULL);
    CHECK_ALL(&h, cases);
    stop_server(&h);
}

/* A request cut in two at every place means the same. */
Test(http, split_everywhere) {
    static const char request[] =
        "POST /tokenize?a=b HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        "Connection: close\r\n\r\n10\r\n{\"prompt\":\"abc\"}\r\n0\r\n\r\n";
    harness h;
    start_server(&h, NULL);
    for (size_t cut = 1; cut < sizeof request - 1; cut++) {
        const int fd = dial(&h);
        say_bytes(fd, request, cut);
        if (cut % 8 == 0) usleep(1000); /* some arrive apart for sure */
        say(fd, request + cut);
        char *answer = hear(fd, NULL);
        cr_assert(strstr(answer, "\"tokens\":[256,97,98,99]"), "cut at %zu: %s", cut, answer);
        free(answer);
        close(fd);
    }
    stop_server(&h);
}

Test(http, pipelining_keeps_order) {
    harness h;
    start_server(&h, NULL);
    const int fd = dial(&h);
    char request[8192];
    size_t size = 0;
    for (int i = 0; i < 40; i++) {
        char body[64];
        const int n = snprintf(body, sizeof body, "{\"prompt\":\"<%02d>\",\"max_tokens\":4}", i);
        size += (size_t)snprintf(request + size, sizeof request - size,
                                 "POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s", n,
                                 body);
    }
    size += (size_t)snprintf(request + size, sizeof request - size, "GET /health HTTP/1.1\r\n" END);
    say_bytes(fd, request, size);
    char *answer = hear(fd, NULL), *place = answer;
    for (int i = 0; i < 40; i++) {
        char text[32];
        snprintf(text, sizeof text, "\"text\":\"<%02d>\"", i);
        place = strstr(place, text);
        cr_assert(place, "%s is missing or out of order", text);
    }
    cr_assert(strstr(place, "\"status\":\"ok\""));
    free(answer);
    close(fd);
    stop_server(&h);
}

Test(http, continue_is_invited) {
    harness h;
    start_server(&h, NULL);
    const int fd = dial(&h);
    say(fd, "POST /tokenize HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 16\r\n" END);
    char *invitation = hear(fd, "\r\n\r\n");
    cr_assert_str_eq(invitation, "HTTP/1.1 100 Continue\r\n\r\n");
    say(fd, "{\"prompt\":\"abc\"}");
    char *answer = hear(fd, NULL);
    cr_assert_eq(status_of(answer), 200);
    free(invitation);
    free(answer);
    close(fd);
    stop_server(&h);
}

Test(http, limits_of_size) {
    static const gn_server_options options = {.max_body = 4096};
    harness h;
    start_server(&h, &options);

    char *long_head = malloc(80 << 10);
    int n = snprintf(long_head, 80 << 10, "GET /health HTTP/1.1\r\nX: ");
    memset(long_head + n, 'x', 70 << 10);
    strcpy(long_head + n + (70 << 10), "\r\n\r\n");
    char *answer = ask(&h, long_head);
    cr_assert_eq(status_of(answer), 431, "%s", answer);
    free(answer);
    free(long_head);

    /* A chunked body tells its size only as it comes. */
    const int fd = dial(&h);
    say(fd, "POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n");
    for (int i = 0; i < 600; i++) say(fd, "8\r\nxxxxxxxx\r\n");
    answer = hear(fd, NULL);
    cr_assert_eq(status_of(answer), 413, "%s", answer);
    free(answer);
    close(fd);
    stop_server(&h);
}

Test(http, keys) {
    static const gn_server_options options = {.api_key = "secret"};
    static const exchange cases[] = {
        {"GET /health HTTP/1.1\r\n" END, 200, NULL},
        {"GET / HTTP/1.1\r\n" END, 200, "<html"},
        {"GET /v1/models HTTP/1.1\r\n" END, 401, "\"code\":\"invalid_api_key\""},
        {"GET /v1/models HTTP/1.1\r\nAuthorization: Bearer wrong\r\n" END, 401, "WWW-Authenticate"},
        {"GET /v1/models HTTP/1.1\r\nAuthorization: Bearer secre\r\n" END, 401, NULL},
        {"GET /v1/models HTTP/1.1\r\nAuthorization: Bearer secretsecret\r\n" END, 401, NULL},
        {"GET /v1/models HTTP/1.1\r\nAuthorization: Bearer \r\n" END, 401, NULL},
        {"GET /v1/models HTTP/1.1\r\nAuthorization: secret\r\n" END, 401, NULL},
        {"GET /v1/models HTTP/1.1\r\nAuthorization: bearer secret\r\n" END, 200, "\"pirate\""},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 401, "authentication_error"},
        {"GET /metrics HTTP/1.1\r\n" END, 401, NULL},
    };
    harness h;
    start_server(&h, &options);
    CHECK_ALL(&h, cases);
    stop_server(&h);
}

#define TOKENIZE   "POST /tokenize HTTP/1.1\r\nContent-Length: 14\r\n"
#define ABC_PROMPT "{\"prompt\":\"a\"}"

Test(http, other_sites_pages_are_refused) {
    static const exchange cases[] = {
        {TOKENIZE "Host: localhost:1\r\n" END ABC_PROMPT, 200, NULL},
        {TOKENIZE "Host: localhost:1\r\nOrigin: http://localhost:1\r\n" END ABC_PROMPT, 200, NULL},
        {TOKENIZE "Host: [::1]:1\r\nOrigin: http://[::1]:1\r\n" END ABC_PROMPT, 200, NULL},
        {TOKENIZE "Host: localhost:1\r\nOrigin: http://evil.example\r\n" END ABC_PROMPT, 403,
         "--cors"},
        {TOKENIZE "Host: localhost:1\r\nOrigin: null\r\n" END ABC_PROMPT, 403, NULL},
        {TOKENIZE "Origin: http://localhost:1\r\n" END ABC_PROMPT, 403, NULL},
        /* A name that an attacker's DNS server made mean 127.0.0.1. */
        {TOKENIZE "Host: evil.example\r\nOrigin: http://evil.example\r\n" END ABC_PROMPT, 403,
         NULL},
        {"OPTIONS /tokenize HTTP/1.1\r\nOrigin: http://evil.example\r\n" END, 405, NULL},
        {"GET /health HTTP/1.1\r\nOrigin: http://evil.example\r\n" END, 200, NULL},
    };
    harness h;
    start_server(&h, NULL);
    CHECK_ALL(&h, cases);
    stop_server(&h);
}

Test(http, cors) {
    static const gn_server_options options = {.cors = "http://app.example"};
    static const exchange cases[] = {
        {TOKENIZE "Host: x\r\nOrigin: http://app.example\r\n" END ABC_PROMPT, 200,
         "Access-Control-Allow-Origin: http://app.example\r\nVary: Origin\r\n"},
        {TOKENIZE "Host: x\r\nOrigin: http://evil.example\r\n" END ABC_PROMPT, 403, NULL},
        {"OPTIONS /v1/chat/completions HTTP/1.1\r\nOrigin: http://app.example\r\n"
         "Access-Control-Request-Headers: authorization, x-stainless-os\r\n" END,
         204, "Access-Control-Allow-Headers: authorization, x-stainless-os\r\n"},
        {"GET /nowhere HTTP/1.1\r\nOrigin: http://app.example\r\n" END, 404,
         "Access-Control-Allow-Origin"},
    };
    harness h;
    start_server(&h, &options);
    CHECK_ALL(&h, cases);
    stop_server(&h);
}

Test(http, pages) {
    harness h;
    start_server(&h, NULL);
    for (size_t i = 0; i < gn_assets_count; i++) {
        char request[512];
        char *answer = get(&h, gn_assets[i].path);
        cr_assert_eq(status_of(answer), 200, "%s", gn_assets[i].path);
        cr_assert(strstr(answer, gn_assets[i].type));
        cr_assert(
            strstr(answer, "\r\nContent-Security-Policy: default-src 'none'; script-src 'self'"));
        cr_assert(strstr(answer, "\r\nX-Content-Type-Options: nosniff\r\n"));
        free(answer);
        snprintf(request, sizeof request,
                 "GET %s HTTP/1.1\r\nIf-None-Match: \"x\", %s\r\nConnection: close\r\n\r\n",
                 gn_assets[i].path, gn_assets[i].etag);
        answer = ask(&h, request);
        cr_assert_eq(status_of(answer), 304);
        cr_assert_str_eq(body_of(answer), "");
        free(answer);
    }
    stop_server(&h);
}
