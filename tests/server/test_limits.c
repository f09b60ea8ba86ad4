/* test_limits.c - slow, silent, vanishing and too many clients; failures and shutdown. */
#include "tests/server/harness.c"

#include <sys/resource.h>
#include <time.h>

#include "tests/support/memory.h"

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static bool closed_within(int fd, int ms) {
    char byte;
    return readable(fd, ms) && recv(fd, &byte, 1, 0) <= 0;
}

/* Waits until a counter of the fake engine has a value. */
static bool becomes(atomic_int *counter, int value, int ms) {
    for (int i = 0; i < ms && *counter != value; i++) usleep(1000);
    return *counter == value;
}

/* A request whose body is `size` bytes of prompt, streamed without an end. */
static void ask_endless(int fd, int size) {
    char *body = malloc((size_t)size + 256);
    const int n = sprintf(body, "{\"stream\":true,\"ignore_eos\":true,\"max_tokens\":8000,"
                                "\"messages\":[{\"role\":\"user\",\"content\":\"");
    memset(body + n, 'x', (size_t)size);
    strcpy(body + n + size, "\"}]}");
    say_post(fd, "/v1/chat/completions", "", body);
    free(body);
}

Test(limits, slow_requests_end) {
    static const gn_server_options options = {.header_ms = 150, .request_ms = 400, .idle_ms = 300};
    static const struct {
        const char *start, *drip;
        double at_least, at_most;
        const char *answer;
    } cases[] = {
        {"", NULL, 0.25, 3, ""},                          /* idle */
        {"GET / HTTP/1.1\r\nX: ", "x", 0.1, 0.38, "408"}, /* a byte now and then */
        {"GET / HT", NULL, 0.1, 3, "408"},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: 9\r\n\r\n", NULL, 0.35, 3, "408"},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: 999\r\n\r\n", "x", 0.35, 3, "408"},
        {"GET /health HTTP/1.1\r\n\r\n", NULL, 0.25, 3, "200"}, /* then idle */
    };
    harness h;
    start_server(&h, &options);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const double start = now();
        const int fd = dial(&h);
        say(fd, cases[i].start);
        while (cases[i].drip && !readable(fd, 10) && now() - start < 5) say(fd, cases[i].drip);
        char *answer = hear(fd, NULL);
        const double took = now() - start;
        cr_assert(strstr(answer, cases[i].answer), "case %zu: %s", i, answer);
        cr_assert(took >= cases[i].at_least && took <= cases[i].at_most, "case %zu took %g s", i,
                  took);
        free(answer);
        close(fd);
    }
    stop_server(&h);
}

Test(limits, a_client_that_leaves_cancels) {
    harness h;
    fake_delay_us = 1000;
    start_server(&h, NULL);
    for (int i = 0; i < 20; i++) {
        const int fd = dial(&h);
        ask_endless(fd, 10);
        char *some = hear(fd, "data: ");
        cr_assert_eq(status_of(some), 200);
        free(some);
        if (i % 2) { /* reset instead of an orderly end */
            const struct linger now_please = {1, 0};
            setsockopt(fd, SOL_SOCKET, SO_LINGER, &now_please, sizeof now_please);
        }
        close(fd);
    }
    cr_assert(becomes(&fake_canceled, 20, 5000), "%d", (int)fake_canceled);
    cr_assert(becomes(&fake_live, 0, 5000));
    char *answer = get(&h, "/metrics");
    cr_assert(strstr(answer, "guanaco_http_canceled_total 20\n"), "%s", answer);
    cr_assert(strstr(answer, "\nguanaco_memory_bytes{use=\"kv\"} 4096\n"), "%s", answer);
    free(answer);
    stop_server(&h);
}

/* A client that does not read neither holds up others nor makes the server's memory grow. */
Test(limits, a_client_that_does_not_read) {
    static const gn_server_options options = {.stall_ms = 300, .max_unsent = 64 << 10};
    harness h;
    fake_delay_us = 1;
    start_server(&h, &options);
    const int fd = dial(&h), small = 4096;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    /* Alternatives make events large: megabytes of stream. */
    say_post(fd, "/v1/chat/completions", "",
             "{\"stream\":true,\"ignore_eos\":true,\"logprobs\":true,\"top_logprobs\":20,\"n\":8,"
             "\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}");
    char *answer =
        post(&h, "/v1/chat/completions", "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}");
    cr_assert_eq(status_of(answer), 200);
    free(answer);
    cr_assert(becomes(&fake_live, 0, 10000), "%d still run", (int)fake_live);
    cr_assert_gt(fake_canceled, 0);
    close(fd);

    /* One that stops for good without having much unsent is closed by the clock. */
    const int quiet = dial(&h);
    setsockopt(quiet, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    for (int i = 0; i < 4000; i++) {
        if (send(quiet, "GET /metrics HTTP/1.1\r\n\r\n", 25, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
            break;
    }
    usleep(1500 * 1000);
    answer = get(&h, "/metrics");
    cr_assert(strstr(answer, "guanaco_connections 1\n"), "%s", answer);
    free(answer);
    close(quiet);
    stop_server(&h);
}

/* A slow reader that does read gets everything. */
Test(limits, a_client_that_reads_slowly) {
    static const gn_server_options options = {.stall_ms = 400, .max_unsent = 4 << 20};
    harness h;
    start_server(&h, &options);
    const int fd = dial(&h), small = 32 << 10;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    ask_endless(fd, 100);
    char buffer[16384], tail[16] = "";
    size_t total = 0;
    for (;;) {
        const ssize_t n = recv(fd, buffer, sizeof buffer, 0);
        if (n <= 0) break;
        total += (size_t)n;
        const size_t keep = n < 15 ? (size_t)n : 15;
        memcpy(tail, buffer + n - keep, keep);
        usleep(20000);
        if (n >= 5 && memcmp(buffer + n - 5, "0\r\n\r\n", 5) == 0) break;
    }
    cr_assert_gt(total, (size_t)1 << 20);
    cr_assert(strstr(tail, "0\r\n\r\n"), "the stream was cut after %zu bytes", total);
    close(fd);
    stop_server(&h);
}

Test(limits, full_queue) {
    harness h;
    fake_delay_us = 1000;
    fake_max_queue = 1;
    start_server(&h, NULL);
    const int fd = dial(&h);
    ask_endless(fd, 10);
    free(hear(fd, "data: "));
    char *answer =
        post(&h, "/v1/chat/completions", "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}");
    cr_assert_eq(status_of(answer), 429);
    cr_assert(strstr(answer, "\r\nRetry-After: 1\r\n"));
    cr_assert(strstr(answer, "\"type\":\"rate_limit_error\""));
    free(answer);
    close(fd);
    cr_assert(becomes(&fake_live, 0, 5000));
    /* Of three choices one finds room; it is taken back with the others. */
    fake_max_queue = 2;
    answer = post(&h, "/v1/completions", "{\"prompt\":\"aaaaaaaaaaaa\",\"n\":3}");
    cr_assert_eq(status_of(answer), 429);
    free(answer);
    cr_assert(becomes(&fake_live, 0, 5000));
    stop_server(&h);
}

Test(limits, engine_failures) {
    harness h;
    fake_fail_at = 2;
    start_server(&h, NULL);
    char *answer = post(&h, "/v1/completions", "{\"prompt\":\"abc\",\"n\":2}");
    cr_assert_eq(status_of(answer), 500);
    cr_assert(strstr(answer, "\"message\":\"the device broke\",\"type\":\"server_error\""));
    free(answer);
    answer = post(&h, "/v1/completions", "{\"prompt\":\"abc\",\"stream\":true}");
    cr_assert_eq(status_of(answer), 200);
    cr_assert(strstr(answer, "data: {\"error\":{\"message\":\"the device broke\""), "%s", answer);
    cr_assert_null(strstr(answer, "[DONE]"));
    free(answer);
    cr_assert(becomes(&fake_live, 0, 5000));
    stop_server(&h);
}

Test(limits, connections) {
    static const gn_server_options options = {.max_connections = 8};
    harness h;
    int fds[8];
    start_server(&h, &options);
    for (int i = 0; i < 8; i++) {
        fds[i] = dial(&h);
        say(fds[i], "GET /health HTTP/1.1\r\n\r\n");
        free(hear(fds[i], "\"status\":\"ok\""));
    }
    const int extra = dial(&h);
    char *answer = hear(extra, NULL);
    cr_assert_eq(status_of(answer), 503);
    cr_assert(strstr(answer, "too_many_connections"));
    free(answer);
    close(extra);
    close(fds[0]);
    usleep(100 * 1000);
    answer = get(&h, "/health");
    cr_assert_eq(status_of(answer), 200);
    free(answer);
    for (int i = 1; i < 8; i++) close(fds[i]);
    stop_server(&h);
}

static double cpu_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void set_soft_limit(rlim_t files) {
    struct rlimit limit;
    cr_assert_eq(getrlimit(RLIMIT_NOFILE, &limit), 0);
    limit.rlim_cur = files;
    cr_assert_eq(setrlimit(RLIMIT_NOFILE, &limit), 0);
}

static int count_lines(const char *text, const char *with) {
    int n = 0;
    for (; (text = strstr(text, with)); text++) n++;
    return n;
}

/* Out of file descriptors, the server says so once, goes on for those it has without spinning, and
 * takes those that waited as soon as it can. */
Test(limits, file_descriptors) {
    static const char ping[] = "GET /health HTTP/1.1\r\n\r\n";
    harness h;
    char *log = NULL;
    size_t size = 0;
    const gn_server_options options = {.log = open_memstream(&log, &size), .quiet = true};
    start_server(&h, &options);
    const int first = dial(&h);
    say(first, ping);
    free(hear(first, "\"status\":\"ok\""));
    set_soft_limit(64);
    int fds[64], n = 0; /* client and server share this process's descriptors */
    for (;;) {
        const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0) break;
        const struct sockaddr_in address = {.sin_family = AF_INET,
                                            .sin_port = htons((uint16_t)h.port),
                                            .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        cr_assert_eq(connect(fd, (const struct sockaddr *)&address, sizeof address), 0);
        fds[n++] = fd;
        usleep(2000);
    }
    cr_assert_gt(n, 16);
    const int last = fds[n - 1];
    say(last, ping);
    const double before = cpu_seconds();
    cr_assert(!readable(last, 500), "it was answered without a descriptor");
    cr_assert_lt(cpu_seconds() - before, 0.2, "the server spins");
    say(first, ping);
    free(hear(first, "\"status\":\"ok\""));
    for (int i = 0; i < n - 1; i++) close(fds[i]);
    free(hear(last, "\"status\":\"ok\""));
    close(last);
    close(first);
    stop_server(&h);
    fclose(options.log);
    cr_assert_eq(count_lines(log, "warning: cannot accept more connections"), 1, "%s", log);
    cr_assert(strstr(log, "Too many open files"), "%s", log);
    free(log);
}

/* The soft limit is raised; what the hard one leaves no room for is not promised. */
Test(limits, file_limits_are_raised) {
    struct rlimit limit;
    harness h;
    char *log = NULL;
    size_t size = 0;
    const gn_server_options options = {.log = open_memstream(&log, &size), .json_log = true};
    set_soft_limit(64);
    start_server(&h, &options);
    cr_assert_eq(getrlimit(RLIMIT_NOFILE, &limit), 0);
    cr_assert_eq(limit.rlim_cur, limit.rlim_max);
    stop_server(&h);

    limit = (struct rlimit){264, 264}; /* all but 8 are kept for other things */
    cr_assert_eq(setrlimit(RLIMIT_NOFILE, &limit), 0);
    start_server(&h, &options);
    int fds[8];
    for (int i = 0; i < 8; i++) fds[i] = dial(&h);
    char *answer = get(&h, "/health");
    cr_assert_eq(status_of(answer), 503, "%s", answer);
    free(answer);
    for (int i = 0; i < 8; i++) close(fds[i]);
    stop_server(&h);
    fclose(options.log);
    cr_assert_eq(count_lines(log, "{\"event\":\"warning\""), 1, "%s", log);
    cr_assert(strstr(log, "264 open files, so there is room for 8 connections"), "%s", log);
    free(log);
}

/* tests/e2e/crowd.mjs does this with ten thousand and another process. */
Test(limits, idle_connections) {
    enum { N = 1000 };
    harness h;
    int fds[N];
    set_soft_limit(256);
    start_server(&h, NULL);
    for (int i = 0; i < N; i++) fds[i] = dial(&h);
    for (int i = 0; i < 100; i++) {
        char *answer = post(&h, "/v1/completions", "{\"prompt\":\"abc\"}");
        cr_assert_eq(status_of(answer), 200, "%s", answer);
        free(answer);
    }
    char *answer = get(&h, "/metrics");
    cr_assert(strstr(answer, "guanaco_connections 1001\n"), "%s", answer);
    free(answer);
    for (int i = 0; i < N; i++) {
        say(fds[i], "GET /health HTTP/1.1\r\nConnection: close\r\n\r\n");
        answer = hear(fds[i], NULL);
        cr_assert_eq(status_of(answer), 200, "connection %d: %s", i, answer);
        free(answer);
        close(fds[i]);
    }
    stop_server(&h);
}

/* ---- bodies without an end ---- */

/* Sends a body of up to 1 GiB: until there is an answer, or, when stubborn, until the server has
 * closed the connection. Returns how many bytes that took. */
static size_t send_body(int fd, bool chunked, bool stubborn) {
    static const char head[] = "10000\r\n"; /* 64 KiB in hexadecimal */
    static char piece[sizeof head - 1 + (64 << 10) + 2];
    const size_t framing = chunked ? sizeof head - 1 : 0;
    const size_t size = framing + (64 << 10) + (chunked ? 2 : 0);
    size_t sent = 0;
    memset(piece, 'x', sizeof piece);
    if (chunked) memcpy(piece, head, framing);
    if (chunked) memcpy(piece + size - 2, "\r\n", 2);
    while (sent < (size_t)1 << 30 && (stubborn || !readable(fd, 0))) {
        const ssize_t n = send(fd, piece + sent % size, size - sent % size, MSG_NOSIGNAL);
        if (n < 0) break;
        sent += (size_t)n;
    }
    return sent;
}

Test(limits, huge_bodies) {
    static const char *const framings[] = {"Content-Length: 1073741824\r\n",
                                           "Transfer-Encoding: chunked\r\n"};
    enum { BUFFERED = 16 << 20 }; /* what the two sockets may hold */
    harness h;
    start_server(&h, NULL);
    const long memory = test_peak_memory();
    for (int i = 0; i < 4; i++) {
        const bool chunked = i % 2, stubborn = i / 2;
        const double start = now();
        const int fd = dial(&h);
        say(fd, "POST /v1/chat/completions HTTP/1.1\r\n");
        say(fd, framings[chunked]);
        say(fd, "\r\n");
        const size_t sent = send_body(fd, chunked, stubborn);
        if (!stubborn) { /* one that goes on is cut off, which may take the answer with it */
            char *answer = hear(fd, "\r\n\r\n");
            cr_assert_eq(status_of(answer), 413, "%s", answer);
            free(answer);
        }
        cr_assert_lt(now() - start, 5);
        cr_assert_lt(sent, (size_t)BUFFERED + (chunked ? 8 << 20 : 0) + (stubborn ? 4 << 20 : 0),
                     "case %d: %zu bytes were taken", i, sent);
        close(fd);
    }
    const long growth = test_peak_memory() - memory;
    cr_assert_lt(growth, 64 << 10, "memory grew by %ld KiB", growth);
    stop_server(&h);
}

Test(limits, shutdown_lets_requests_finish) {
    static const gn_server_options options = {.drain_ms = 10000};
    harness h;
    fake_delay_us = 10000;
    start_server(&h, &options);
    const int idle = dial(&h), busy = dial(&h);
    say(idle, "GET /health HTTP/1.1\r\n\r\n");
    free(hear(idle, "\"status\":\"ok\""));
    say_post(busy, "/v1/completions", "", "{\"prompt\":\"0123456789\",\"stream\":true}");
    free(hear(busy, "data: "));
    gn_server_stop(h.server);
    cr_assert(closed_within(idle, 2000));
    char *answer = hear(busy, NULL);
    cr_assert(strstr(answer, "data: [DONE]"), "%s", answer);
    free(answer);
    stop_server(&h);
    close(idle);
    close(busy);
}

Test(limits, shutdown_does_not_wait_for_ever) {
    static const gn_server_options options = {.drain_ms = 200};
    harness h;
    fake_delay_us = 1000;
    start_server(&h, &options);
    const int fd = dial(&h);
    ask_endless(fd, 10);
    free(hear(fd, "data: "));
    const double start = now();
    stop_server(&h);
    cr_assert_lt(now() - start, 3);
    close(fd);
}

/* ---- adapters over HTTP ---- */

static int adapter_call(const harness *h, const char *path, const char *body, const char *says) {
    char *answer = post(h, path, body);
    const int status = status_of(answer);
    cr_assert(!says || strstr(answer, says), "%s\nlacks %s in\n%s", body, says, answer);
    free(answer);
    return status;
}

Test(limits, adapters_over_http) {
    char root[] = "/tmp/guanaco-test-XXXXXX", path[256], outside[] = "/tmp/guanaco-out-XXXXXX";
    cr_assert(mkdtemp(root) && mkdtemp(outside));
    static const char *const folders[] = {"good", "broken", "deep", "large"};
    for (int i = 0; i < 4; i++) {
        snprintf(path, sizeof path, "mkdir -p %s/%s", root, folders[i]);
        cr_assert_eq(system(path), 0);
    }
    snprintf(path, sizeof path, "mkdir %s/deep/er; ln -s %s %s/escape", root, outside, root);
    cr_assert_eq(system(path), 0);

    const gn_server_options options = {.allow_adapter_loading = true, .adapter_dir = root};
    static const char load[] = "/v1/load_lora_adapter", unload[] = "/v1/unload_lora_adapter";
    harness h;
    start_server(&h, &options);
    cr_assert_eq(adapter_call(&h, load, "{\"lora_name\":\"a\",\"lora_path\":\"good\"}",
                              "Success: LoRA adapter 'a' added successfully."),
                 200);
    cr_assert_eq(
        adapter_call(&h, load, "{\"lora_name\":\"a\",\"lora_path\":\"good\"}", "adapter_exists"),
        400);
    cr_assert_eq(
        adapter_call(&h, load,
                     "{\"lora_name\":\"a\",\"lora_path\":\"deep/er\",\"load_inplace\":true}", NULL),
        200);
    cr_assert_eq(
        adapter_call(&h, "/v1/chat/completions",
                     "{\"model\":\"a\",\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}",
                     "[er 1]hi"),
        200);
    static const struct {
        const char *body, *says;
        int status;
    } refusals[] = {
        {"{\"lora_path\":\"good\"}", "lora_name", 400},
        {"{\"lora_name\":\"b\"}", "lora_path", 400},
        {"{\"lora_name\":\"b/../\\n\",\"lora_path\":\"good\"}", "lora_name", 400},
        {"{\"lora_name\":\"fake\",\"lora_path\":\"good\"}", "base's name", 400},
        {"{\"lora_name\":\"b\",\"lora_path\":\"broken\"}", "bad_adapter", 400},
        {"{\"lora_name\":\"b\",\"lora_path\":\"large\"}", "takes 2.0 MiB, and there is 1.0", 400},
        {"{\"lora_name\":\"b\",\"lora_path\":\"none\"}", "no such folder", 404},
        {"{\"lora_name\":\"b\",\"lora_path\":\"escape\"}", "no such folder", 404},
        {"{\"lora_name\":\"b\",\"lora_path\":\"deep/../../\"}", "no such folder", 404},
        {"{\"lora_name\":\"b\",\"lora_path\":\"/etc\"}", "no such folder", 404},
        {"{\"lora_name\":\"b\",\"lora_path\":\"good\",\"x\":1}", "unknown_parameter", 400},
    };
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++)
        cr_assert_eq(adapter_call(&h, load, refusals[i].body, refusals[i].says), refusals[i].status,
                     "%s", refusals[i].body);
    cr_assert_eq(adapter_call(&h, unload, "{\"lora_name\":\"a\"}",
                              "Success: LoRA adapter 'a' removed successfully."),
                 200);
    cr_assert_eq(adapter_call(&h, unload, "{\"lora_name\":\"a\"}", NULL), 404);
    stop_server(&h);

    start_server(&h, NULL);
    cr_assert_eq(adapter_call(&h, load, "{\"lora_name\":\"a\",\"lora_path\":\"good\"}",
                              "--allow-adapter-loading"),
                 403);
    cr_assert_eq(adapter_call(&h, unload, "{\"lora_name\":\"pirate\"}", NULL), 403);
    stop_server(&h);
    snprintf(path, sizeof path, "rm -r %s %s", root, outside);
    cr_assert_eq(system(path), 0);
}

/* A request that runs keeps the adapter it began with. */
Test(limits, unloading_while_a_request_runs) {
    static const gn_server_options options = {.allow_adapter_loading = true, .adapter_dir = "/tmp"};
    harness h;
    fake_delay_us = 20000;
    start_server(&h, &options);
    const int fd = dial(&h);
    say_post(fd, "/v1/completions", "Connection: close\r\n",
             "{\"model\":\"pirate\",\"prompt\":\"abc\"}");
    while (fake_live == 0) usleep(1000);
    cr_assert_eq(adapter_call(&h, "/v1/unload_lora_adapter", "{\"lora_name\":\"pirate\"}", NULL),
                 200);
    cr_assert_eq(fake_adapters, 2);
    char *answer = hear(fd, NULL);
    cr_assert(strstr(answer, "[pirate 1]abc"), "%s", answer);
    free(answer);
    close(fd);
    stop_server(&h);
}
