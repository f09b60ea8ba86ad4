/* test_parts.c - the server's parts without sockets: JSON text, the registry, the mailbox, options.
 */
#include <cjson/cJSON.h>
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/utf8.h"
#include "server/mailbox.h"
#include "server/registry.h"
#include "server/serve_options.h"

/* ---- buffers ---- */

static void check_json(const char *text, size_t size, const char *expected) {
    gn_buffer b = {0};
    gn_buffer_json(&b, text, size);
    gn_buffer_append(&b, "", 1);
    cr_assert_str_eq(b.data, expected);
    gn_buffer_free(&b);
}

Test(parts, json_strings) {
    check_json("", 0, "\"\"");
    check_json("a\"b\\c", 5, "\"a\\\"b\\\\c\"");
    check_json("\n\r\t\b\x1f\x7f", 6, "\"\\n\\r\\t\\u0008\\u001f\\u007f\"");
    check_json("\0x", 2, "\"\\u0000x\"");
    check_json("\xc3\xa4\xe2\x82\xac\xf0\x9f\xa6\x99", 9,
               "\"\xc3\xa4\xe2\x82\xac\xf0\x9f\xa6\x99\"");
    check_json("a\xff\xc3", 3, "\"a\xef\xbf\xbd\xef\xbf\xbd\"");
    check_json("</script>", 9, "\"</script>\"");
}

Test(parts, utf8) {
    static const struct {
        const char *bytes;
        int length;
    } cases[] = {{"a", 1},
                 {"\xc2\x80", 2},
                 {"\xdf\xbf", 2},
                 {"\xe0\xa0\x80", 3},
                 {"\xed\x9f\xbf", 3},
                 {"\xee\x80\x80", 3},
                 {"\xf0\x90\x80\x80", 4},
                 {"\xf4\x8f\xbf\xbf", 4},
                 {"\x80", 0},
                 {"\xc0\x80", 0},
                 {"\xc1\xbf", 0},
                 {"\xe0\x9f\xbf", 0},
                 {"\xed\xa0\x80", 0},
                 {"\xf0\x8f\xbf\xbf", 0},
                 {"\xf4\x90\x80\x80", 0},
                 {"\xf5\x80\x80\x80", 0},
                 {"\xe2\x82", 0},
                 {"\xc3\x41", 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        cr_assert_eq(gn_utf8_length(cases[i].bytes, strlen(cases[i].bytes)), cases[i].length,
                     "case %zu", i);
    cr_assert_eq(gn_utf8_check("ab\xff", 3), 2);
    cr_assert_eq(gn_utf8_check("ab\xc3\xa4", 4), 4);
}

Test(parts, json_floats_read_back_equal) {
    static const float values[] = {0, -0.1f, 1e-30f, 3.14159274f, 16777217.0f, -123.456f};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        gn_buffer b = {0};
        gn_buffer_json_float(&b, values[i]);
        gn_buffer_append(&b, "", 1);
        cr_assert_eq((float)strtod(b.data, NULL), values[i], "%s", b.data);
        gn_buffer_free(&b);
    }
    gn_buffer b = {0};
    gn_buffer_json_float(&b, NAN);
    gn_buffer_json_float(&b, -INFINITY);
    gn_buffer_append(&b, "", 1);
    cr_assert_str_eq(b.data, "null-9999.0");
    gn_buffer_free(&b);
}

Test(parts, a_buffer_out_of_memory_stays_whole) {
    gn_buffer b = {0};
    gn_buffer_text(&b, "abc");
    cr_assert_null(gn_buffer_reserve(&b, SIZE_MAX / 2));
    cr_assert(b.failed);
    gn_buffer_text(&b, "def");
    cr_assert_eq(b.size, 3);
    gn_buffer_clear(&b, SIZE_MAX);
    gn_buffer_text(&b, "def");
    cr_assert_not(b.failed);
    cr_assert_eq(memcmp(b.data, "def", 3), 0);
    gn_buffer_free(&b);
}

/* ---- the registry ---- */

Test(parts, names) {
    static const char *const good[] = {"a", "pirate", "org/name:1.0", "A-b_c+d", "7b"};
    static const char *const bad[] = {"", "-a", ".a", "/a", "a b", "a\n", "a\"", "\xc3\xa4", "a%"};
    char longest[130];
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        cr_assert(gn_registry_name_ok(good[i]), "%s", good[i]);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        cr_assert_not(gn_registry_name_ok(bad[i]), "%s", bad[i]);
    memset(longest, 'x', sizeof longest);
    longest[128] = 0;
    cr_assert(gn_registry_name_ok(longest));
    longest[128] = 'x';
    longest[129] = 0;
    cr_assert_not(gn_registry_name_ok(longest));
}

Test(parts, paths_below) {
    char root[] = "/tmp/guanaco-test-XXXXXX", command[512], path[256], *real = NULL;
    cr_assert(mkdtemp(root));
    snprintf(
        command, sizeof command,
        "cd %s && mkdir -p in/deep in-side out && ln -s ../out in/leaves && ln -s deep in/stays",
        root);
    cr_assert_eq(system(command), 0);
    snprintf(path, sizeof path, "%s/in", root);
    static const struct {
        const char *path, *real; /* NULL: refused */
    } cases[] = {{"deep", "deep"},
                 {"deep/../deep/", "deep"},
                 {"stays", "deep"},
                 {".", ""},
                 {"", ""},
                 {"leaves", NULL},
                 {"..", NULL},
                 {"../out", NULL},
                 {"../in-side", NULL},
                 {"deep/../../out", NULL},
                 {"none", NULL},
                 {"/etc", NULL},
                 {"/none/such", NULL}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gn_error err = {0};
        const gn_status status = gn_path_below(&real, path, cases[i].path, &err);
        cr_assert_eq(status, cases[i].real ? GN_OK : GN_ENOENT, "%s", cases[i].path);
        if (status) continue;
        cr_assert(strstr(real, "/in") &&
                      strcmp(real + strlen(real) - strlen(cases[i].real), cases[i].real) == 0,
                  "%s is %s", cases[i].path, real);
        free(real);
    }
    snprintf(command, sizeof command, "rm -r %s", root);
    cr_assert_eq(system(command), 0);
}

/* ---- the mailbox ---- */

typedef struct heard {
    int events, ends;
    char text[64];
} heard;

static void on_delivery(void *user, const gn_event *e) {
    heard *h = user;
    h->events++;
    h->ends += e->finish != GN_FINISH_NONE;
    strncat(h->text, e->text, e->text_len);
    cr_assert_eq(e->n_top, 2);
    cr_assert_eq(e->top[1].id, 4);
    cr_assert_eq(e->n_prompt, 3);
    cr_assert(isnan(e->prompt[0].logprob));
    cr_assert_eq(e->prompt[2].id, 9);
    cr_assert_eq(e->prompt_top[5].id, 15);
    if (e->finish == GN_FINISH_ERROR) cr_assert_str_eq(e->error->message, "it broke");
}

/* What was pointed to when an event happened is gone when it is delivered. */
static void put_event(gn_ticket *ticket, const char *text, gn_finish finish) {
    gn_token_prob top[2] = {{3, -1}, {4, -2}}, prompt[3] = {{7, NAN}, {8, -1}, {9, -2}};
    gn_token_prob prompt_top[6];
    gn_error error = {GN_EDEVICE, "it broke"};
    char copy[32];
    snprintf(copy, sizeof copy, "%s", text);
    for (int i = 0; i < 6; i++) prompt_top[i] = (gn_token_prob){10 + i, -3};
    const gn_event event = {.text = copy,
                            .text_len = strlen(copy),
                            .has_token = true,
                            .n_top = 2,
                            .top = top,
                            .n_prompt = 3,
                            .prompt = prompt,
                            .prompt_top = prompt_top,
                            .finish = finish,
                            .error = finish == GN_FINISH_ERROR ? &error : NULL};
    gn_ticket_on_event(ticket, &event);
    memset(copy, 'x', sizeof copy);
    memset(top, 0, sizeof top);
    memset(prompt, 0, sizeof prompt);
    memset(prompt_top, 0, sizeof prompt_top);
    memset(&error, 0, sizeof error);
}

Test(parts, mailbox) {
    uv_loop_t loop;
    gn_mailbox m;
    heard a = {0}, b = {0};
    cr_assert_eq(uv_loop_init(&loop), 0);
    cr_assert_eq(gn_mailbox_open(&m, &loop, NULL, NULL), GN_OK);
    gn_ticket *first = gn_ticket_open(&m, on_delivery, &a);
    gn_ticket *second = gn_ticket_open(&m, on_delivery, &b);
    put_event(first, "one ", GN_FINISH_NONE);
    put_event(second, "2 ", GN_FINISH_NONE);
    put_event(first, "two", GN_FINISH_STOP);
    uv_run(&loop, UV_RUN_ONCE);
    cr_assert_str_eq(a.text, "one two");
    cr_assert_eq(a.ends, 1);
    cr_assert_str_eq(b.text, "2 ");
    cr_assert_eq(m.tickets, 1);
    gn_ticket_mute(second);
    put_event(second, "3", GN_FINISH_ERROR);
    gn_mailbox_close(&m); /* delivers what is left */
    cr_assert_eq(b.events, 1);
    cr_assert_eq(m.tickets, 0);
    uv_run(&loop, UV_RUN_DEFAULT);
    cr_assert_eq(uv_loop_close(&loop), 0);
}

/* ---- options ---- */

Test(parts, serve_options) {
    char *args[] = {"--quant-type",
                    "int8",
                    "--double-quant",
                    "false",
                    "--compute-dtype=float32",
                    "--adapter",
                    "a=b",
                    "--adapter",
                    "c=d",
                    "--port",
                    "0",
                    "--kv-memory",
                    "2GiB",
                    "--memory-budget",
                    "24GiB",
                    "--adapter-memory",
                    "512MiB",
                    "--adapter-host-memory",
                    "3GiB"};
    gn_serve_options o;
    gn_error err = {0};
    bool help = false;
    cr_assert_eq(
        gn_options_parse(gn_serve_option_table, &o, sizeof args / sizeof *args, args, &help, &err),
        GN_OK, "%s", err.message);
    gn_model_options model = gn_serve_model_options(&o);
    cr_assert_eq(model.quant, GN_Q_INT8);
    cr_assert_eq(model.compute, GN_COMPUTE_F32);
    cr_assert_eq(model.adapter_host_bytes, (int64_t)3 << 30);
    cr_assert(model.no_double_quant && !model.as_stored);
    cr_assert_eq(o.adapters.n, 2);
    const gn_engine_options engine = gn_serve_engine_options(&o);
    cr_assert_eq(engine.kv_bytes, (int64_t)2 << 30);
    cr_assert_eq(engine.memory_bytes, (int64_t)24 << 30);
    cr_assert_eq(engine.adapter_bytes, (int64_t)512 << 20);
    cr_assert_eq(gn_serve_server_options(&o).max_body, 8 << 20);
    cr_assert_null(o.synthetic);
    gn_options_free(gn_serve_option_table, &o);

    char *stored[] = {"--quant-type", "none"};
    cr_assert_eq(gn_options_parse(gn_serve_option_table, &o, 2, stored, &help, &err), GN_OK);
    cr_assert(gn_serve_model_options(&o).as_stored);
    cr_assert_eq(gn_serve_engine_options(&o).adapter_bytes, -1, "no adapters, now or later");
    gn_options_free(gn_serve_option_table, &o);

    setenv("GUANACO_API_KEY", "from-environment", 1);
    cr_assert_eq(gn_options_parse(gn_serve_option_table, &o, 0, NULL, &help, &err), GN_OK);
    cr_assert_str_eq(gn_serve_server_options(&o).api_key, "from-environment");
    cr_assert_eq(gn_serve_model_options(&o).quant, GN_Q_NONE);
    gn_options_free(gn_serve_option_table, &o);
}
