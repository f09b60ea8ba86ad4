/* What a server under test says: streams cut anywhere, errors, counters, its first line. */
#include "trainer/bench_reply.h"

#include <criterion/criterion.h>
#include <string.h>

enum { MAX_TIMES = 4 };

static const char stream[] =
    ": a comment\n"
    "data: {\"choices\":[{\"text\":\" 17\",\"finish_reason\":null}],\"usage\":null}\n\n"
    "data: {\"choices\":[{\"text\":\" \\u00e9\\n\",\"finish_reason\":null}],\"usage\":null}\r\n\r\n"
    "data: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"length\"}],\"usage\":null}\n\n"
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":2}}\n\n"
    "data: [DONE]\n\n";

static void open_reply(gn_reply *r) {
    *r = (gn_reply){.times = gn_token_times_open(1, MAX_TIMES), .max_times = MAX_TIMES};
    cr_assert(r->times);
}

static void close_reply(gn_reply *r) {
    gn_token_times_close(r->times);
}

Test(bench_reply, a_stream_cut_anywhere) {
    for (size_t step = 1; step <= sizeof stream; step++) {
        gn_reply r;
        open_reply(&r);
        for (size_t at = 0; at < sizeof stream - 1; at += step) {
            const size_t left = sizeof stream - 1 - at;
            cr_assert(gn_reply_feed(&r, stream + at, left < step ? left : step, 1 + (double)at));
        }
        cr_assert(r.done && r.tokens == 2 && r.times->n == 2, "step %zu: %d tokens", step,
                  r.times->n);
        cr_assert(r.times->at[0] >= 1 && r.times->at[1] >= r.times->at[0]);
        close_reply(&r);
    }
}

static void refused(const char *text, const char *why) {
    gn_reply r;
    open_reply(&r);
    cr_assert_not(gn_reply_feed(&r, text, strlen(text), 1), "%s", text);
    cr_assert(strstr(r.problem, why), "%s: %s", text, r.problem);
    cr_assert_not(gn_reply_feed(&r, "\n", 1, 1)); /* and it stays so */
    close_reply(&r);
}

Test(bench_reply, what_is_wrong) {
    static char endless[GN_REPLY_LINE + 2];
    memset(endless, 'x', sizeof endless - 1);
    refused("data: {\"error\":{\"message\":\"The queue is full.\"}}\n", "The queue is full.");
    refused("data: {\"error\":7}\n", "an error");
    refused("data: {\"choices\":[\n", "no JSON");
    refused(endless, "too long");
    gn_reply r;
    open_reply(&r);
    for (int i = 0; i <= MAX_TIMES; i++) {
        static const char token[] = "data: {\"choices\":[{\"text\":\"a\"}]}\n";
        cr_assert_eq(gn_reply_feed(&r, token, sizeof token - 1, i), i < MAX_TIMES);
    }
    cr_assert(strstr(r.problem, "more text"));
    close_reply(&r);
}

/* JSON of another kind says nothing. */
Test(bench_reply, events_of_another_form) {
    static const char *const others[] = {"data: []\n",
                                         "data: 1\n",
                                         "data: {\"choices\":{}}\n",
                                         "data: {\"choices\":[{\"text\":3}]}\n",
                                         "data: null\n",
                                         "data: {\"usage\":{\"completion_tokens\":\"2\"}}\n"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        gn_reply r;
        open_reply(&r);
        cr_assert(gn_reply_feed(&r, others[i], strlen(others[i]), 1), "%s", others[i]);
        cr_assert(r.times->n == 0 && r.tokens == 0 && !r.done);
        close_reply(&r);
    }
}

Test(bench_reply, metrics) {
    static const char text[] = "# HELP busy Seconds.\n# TYPE busy counter\nbusy_more 3\nbusy 1.5\n"
                               "labelled{a=\"b\"} 2\n\nlast 7";
    double value = 0;
    cr_assert(gn_read_metric(text, "busy", &value) && value == 1.5);
    cr_assert(gn_read_metric(text, "busy_more", &value) && value == 3);
    cr_assert(gn_read_metric(text, "last", &value) && value == 7);
    cr_assert_not(gn_read_metric(text, "labelled", &value));
    cr_assert_not(gn_read_metric(text, "absent", &value));
    cr_assert_not(gn_read_metric("", "busy", &value));
    cr_assert_not(gn_read_metric("busy \n", "busy", &value));
}

Test(bench_reply, the_line_that_says_ready) {
    cr_assert_eq(gn_read_ready_port("{\"event\":\"ready\",\"url\":\"u\",\"port\":8080}"), 8080);
    static const char *const others[] = {"",
                                         "ready",
                                         "{\"event\":\"start\",\"port\":80}",
                                         "{\"event\":\"ready\"}",
                                         "{\"event\":\"ready\",\"port\":0}",
                                         "{\"event\":\"ready\",\"port\":1e9}",
                                         "{\"event\":\"ready\",\"port\":\"80\"}"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        cr_assert_eq(gn_read_ready_port(others[i]), 0, "%s", others[i]);
}
