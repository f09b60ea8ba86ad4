/* test_report.c - a run's page: what it says of metrics.jsonl, how large it gets, and that a
 * failure harms nothing. */
#include <cjson/cJSON.h>
#include <criterion/criterion.h>

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "engine/json_file.h"
#include "tests/support/folder.h"
#include "trainer/report.h"

static void make_run(void) {
    test_folder_make();
    cr_assert_eq(mkdir(test_path("my run"), 0777), 0);
}

TestSuite(report, .init = make_run, .fini = test_folder_remove);

static void write_metrics(const char *text) {
    test_write_text("my run/metrics.jsonl", text);
}

static char *read_page(size_t *size) {
    char *page;
    gn_error err = {0};
    cr_assert_eq(gn_text_read(&page, size, test_path("my run/report.html"), &err), GN_OK, "%s",
                 err.message);
    return page;
}

/* What the page's script gets. */
static cJSON *must_write(void) {
    static const char before[] = "<script type=\"application/json\" id=\"run\">";
    gn_error err = {0};
    size_t size;
    cr_assert_eq(gn_report_write(test_path("my run"), &err), GN_OK, "%s", err.message);
    cr_assert_not(test_exists("my run/report.html.partial"));
    char *page = read_page(&size);
    char *data = strstr(page, before);
    cr_assert(data);
    data += strlen(before);
    *strstr(data, "</script>") = '\0';
    cJSON *run = cJSON_Parse(data);
    cr_assert(run, "%.200s", data);
    free(page);
    return run;
}

static void expect_error(gn_status status, const char *part) {
    gn_error err = {0};
    cr_assert_eq(gn_report_write(test_path("my run"), &err), status, "%s: %s", part, err.message);
    cr_assert(strstr(err.message, part), "\"%s\" lacks \"%s\"", err.message, part);
    cr_assert_not(test_exists("my run/report.html"));
    cr_assert_not(test_exists("my run/report.html.partial"));
}

static const cJSON *at(const cJSON *run, const char *group, const char *name) {
    const cJSON *item =
        cJSON_GetObjectItemCaseSensitive(cJSON_GetObjectItemCaseSensitive(run, group), name);
    cr_assert(item, "%s.%s", group, name);
    return item;
}

static double number(const cJSON *run, const char *name) {
    const cJSON *item = at(run, "summary", name);
    return cJSON_IsNull(item) ? NAN : item->valuedouble;
}

/* Of a curve: its points' number, and a point's step and value. */
static int length(const cJSON *run, const char *group, const char *name) {
    return cJSON_GetArraySize(at(run, group, name));
}

static void expect_point(const cJSON *run, const char *name, int i, double step, double value) {
    const cJSON *point = cJSON_GetArrayItem(at(run, "series", name), i);
    cr_assert(point, "%s has no point %d", name, i);
    cr_assert_eq(cJSON_GetArrayItem(point, 0)->valuedouble, step, "%s[%d]", name, i);
    cr_assert_float_eq(cJSON_GetArrayItem(point, 1)->valuedouble, value, 1e-6 * fabs(value),
                       "%s[%d]", name, i);
}

static const char three_steps[] =
    "{\"step\": 1, \"loss\": 2.5, \"grad_norm\": 0.5, \"learning_rate\": 0.0002, \"tok_s\": 1000, "
    "\"device_bytes\": 1000000000, \"time\": 1790000002.0}\n"
    "{\"step\": 2, \"loss\": 1.25, \"grad_norm\": 0.25, \"learning_rate\": 0.0001, \"tok_s\": "
    "3000, "
    "\"device_bytes\": 3000000000, \"time\": 1790000003.5, \"a_key_from_later\": \"x\"}\n"
    "{\"step\": 2, \"eval_loss\": 1.5, \"eval_ppl\": 4.25}\n"
    "{\"step\": 3, \"loss\": 1.75, \"grad_norm\": null, \"time\": 1790000005}\n"
    "{\"step\": 3, \"eval_loss\": 1.625}\n";

Test(report, a_page_says_what_was_logged) {
    write_metrics(three_steps);
    cJSON *run = must_write();
    cr_assert_str_eq(cJSON_GetObjectItem(run, "name")->valuestring, "my run");
    cr_assert(number(run, "steps") == 3 && number(run, "loss") == 1.75);
    cr_assert(number(run, "seconds") == 3 && number(run, "tok_s") == 2000);
    cr_assert(number(run, "device_bytes") == 3e9);
    cr_assert(number(run, "eval_loss") == 1.5 && number(run, "eval_step") == 2);
    cr_assert_eq(number(run, "eval_ppl"), 4.25);
    cr_assert(isnan(number(run, "smoothed")));
    cr_assert_eq(length(run, "series", "loss"), 3);
    expect_point(run, "loss", 0, 1, 2.5);
    expect_point(run, "loss", 2, 3, 1.75);
    cr_assert_eq(length(run, "series", "grad_norm"), 2); /* null is a gap */
    expect_point(run, "learning_rate", 1, 2, 0.0001);
    expect_point(run, "device_bytes", 1, 2, 3e9);
    expect_point(run, "eval_loss", 1, 3, 1.625);
    cr_assert_eq(cJSON_GetArraySize(cJSON_GetObjectItem(run, "settings")), 0);
    cJSON_Delete(run);
}

Test(report, without_a_perplexity_it_is_that_of_the_loss) {
    write_metrics("{\"step\": 4, \"eval_loss\": 2}\n");
    cJSON *run = must_write();
    cr_assert_float_eq(number(run, "eval_ppl"), exp(2), 1e-6);
    cr_assert(isnan(number(run, "loss")) && isnan(number(run, "seconds")));
    cr_assert(isnan(number(run, "tok_s")) && isnan(number(run, "device_bytes")));
    cJSON_Delete(run);
}

/* A run that goes on writes while it is looked at, and a killed one leaves half a line. */
Test(report, the_last_line_may_be_broken) {
    static const char *const ends[] = {"{\"step\": 4, \"lo",
                                       "{\"step\": 4, \"loss\": 1}",
                                       "{\"step\": 4, \"lo\n",
                                       "\n",
                                       "\x01",
                                       "{\"step\": 4, \"loss\": \"x\"}\n"};
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        char text[2048];
        snprintf(text, sizeof text, "%s%s", three_steps, ends[i]);
        write_metrics(text);
        cJSON *run = must_write();
        cr_assert_eq(number(run, "steps"), i == 1 ? 4 : 3, "%s", ends[i]);
        cJSON_Delete(run);
    }
}

Test(report, any_other_broken_line_is_named) {
    static const struct {
        const char *line, *message;
    } cases[] = {
        {"{\"step\": 4, \"lo", "metrics.jsonl: line 6: not a JSON object"},
        {"", "line 6: not a JSON object"},
        {"[4]", "line 6: not a JSON object"},
        {"{\"step\": 4} {\"step\": 5}", "line 6: not a JSON object"},
        {"{\"loss\": 1}", "line 6: \"step\" is not a number of steps"},
        {"{\"step\": -1}", "line 6: \"step\" is not a number of steps"},
        {"{\"step\": 1e300}", "line 6: \"step\" is not a number of steps"},
        {"{\"step\": 2, \"loss\": 1}", "line 6: step 2 comes after step 3"},
        {"{\"step\": 4, \"tok_s\": \"fast\"}", "line 6: \"tok_s\" is not a number"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[2048];
        snprintf(text, sizeof text, "%s%s\n%s", three_steps, cases[i].line,
                 "{\"step\": 9, \"loss\": 1}\n");
        write_metrics(text);
        expect_error(GN_EFORMAT, cases[i].message);
    }
    char *text = test_alloc(200000);
    memset(text, ' ', 100000);
    strcpy(text + 100000, "{\"step\": 9, \"loss\": 1}\n");
    write_metrics(text);
    expect_error(GN_EFORMAT, "line 1: ");
}

Test(report, nothing_logged_is_an_error) {
    expect_error(GN_ENOENT, "my run/metrics.jsonl");
    write_metrics("");
    expect_error(GN_EFORMAT, "no step is logged");
    write_metrics("{\"step\": 1, \"loss\": null, \"time\": 1}\n");
    expect_error(GN_EFORMAT, "no step is logged");
    gn_error err = {0};
    cr_assert_eq(gn_report_write(test_path("nowhere"), &err), GN_ENOENT);
}

Test(report, settings_come_along_and_cannot_end_the_script) {
    write_metrics(three_steps);
    test_write_text("my run/train_config.json",
                    "{\"lora_r\": 64, \"note\": \"</script><script>alert(1)</script><!--\"}");
    cJSON *run = must_write();
    cr_assert_eq(at(run, "settings", "lora_r")->valuedouble, 64);
    cr_assert_str_eq(at(run, "settings", "note")->valuestring,
                     "</script><script>alert(1)</script><!--");
    cJSON_Delete(run);
    cr_assert_eq(remove(test_path("my run/report.html")), 0);
    test_write_text("my run/train_config.json", "{\"lora_r\": ");
    expect_error(GN_EFORMAT, "my run/train_config.json");
}

/* ---- long runs ---- */

/* 100,000 steps whose loss is 2 - step/100,000, and up or down by 0.5 in turn; one spike. */
static void write_long_run(int spike) {
    FILE *f = fopen(test_path("my run/metrics.jsonl"), "wb");
    cr_assert(f);
    for (int step = 1; step <= 100000; step++)
        fprintf(f,
                "{\"step\": %d, \"loss\": %.17g, \"grad_norm\": %.17g, \"learning_rate\": 2e-4, "
                "\"tok_s\": %.17g, \"device_bytes\": %lld, \"time\": %.17g}\n",
                step, step == spike ? 77.0 : 2 - step / 1e5 + (step % 2 ? 0.5 : -0.5),
                0.3 + step / 1.7e6, 16000 + step / 3.0, 8123456789LL + step, step * 0.51);
    cr_assert_eq(fclose(f), 0);
}

Test(report, a_long_run_is_a_small_page_that_keeps_spikes) {
    enum { SPIKE = 54321 };
    write_long_run(SPIKE);
    cJSON *run = must_write();
    size_t size;
    char *page = read_page(&size);
    free(page);
    fprintf(stderr, "100,000 steps: %zu bytes\n", size);
    cr_assert_lt(size, 2 << 20);
    int spikes = 0, n = 0;
    double previous = 0;
    const cJSON *point;
    cJSON_ArrayForEach(point, at(run, "series", "loss")) {
        const double step = point->child->valuedouble, value = point->child->next->valuedouble;
        cr_assert_gt(step, previous);
        previous = step;
        spikes += step == SPIKE && value == 77;
        n++;
    }
    cr_assert(spikes == 1 && n > 1000 && n < 1500, "%d spikes, %d points", spikes, n);
    expect_point(run, "loss", 0, 1, 2 - 1e-5 + 0.5);
    n = 0;
    cJSON_ArrayForEach(point, at(run, "smoothed", "loss")) {
        const double step = point->child->valuedouble, value = point->child->next->valuedouble;
        if (fabs(step - SPIKE) > 2000)
            cr_assert_float_eq(value, 2 - step / 1e5, 0.02, "at %g: %g", step, value);
        n++;
    }
    cr_assert(n > 300 && n <= 1200, "%d points", n);
    cr_assert_float_eq(number(run, "smoothed"), 1.0, 0.02);
    cr_assert_eq(number(run, "steps"), 100000);
    cJSON_Delete(run);
}

/* ---- the page itself ---- */

Test(report, a_page_needs_nothing_else) {
    static const char *const fetching[] = {"src=", "href=", "@import", "url(", "fetch(", "import "};
    write_metrics(three_steps);
    cJSON_Delete(must_write());
    size_t size;
    char *page = read_page(&size);
    cr_assert_not(strstr(page, "@RUN@</"));
    for (size_t i = 0; i < sizeof fetching / sizeof *fetching; i++)
        cr_assert_not(strstr(page, fetching[i]), "%s", fetching[i]);
    char *address = strstr(page, "://"); /* the name of SVG's elements, and no other */
    cr_assert(address && !strncmp(address, "://www.w3.org/2000/svg'", 23));
    cr_assert_not(strstr(address + 1, "://"));
    free(page);
}

Test(report, a_full_disk_harms_no_earlier_page) {
    write_metrics("{\"step\": 1, \"loss\": 2}\n");
    cJSON_Delete(must_write());
    size_t size[2];
    char *before = read_page(&size[0]);
    write_metrics(three_steps);
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit limit;
    cr_assert_eq(getrlimit(RLIMIT_FSIZE, &limit), 0);
    const rlim_t saved = limit.rlim_cur;
    limit.rlim_cur = 5000;
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    gn_error err = {0};
    cr_assert_eq(gn_report_write(test_path("my run"), &err), GN_EIO);
    cr_assert(strstr(err.message, "report.html"), "%s", err.message);
    limit.rlim_cur = saved;
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    char *after = read_page(&size[1]);
    cr_assert(size[0] == size[1] && !memcmp(before, after, size[0]));
    cr_assert_not(test_exists("my run/report.html.partial"));
    free(before);
    free(after);
    cJSON *run = must_write();
    cr_assert_eq(number(run, "steps"), 3);
    cJSON_Delete(run);
}
