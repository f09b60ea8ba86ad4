/* test_rows.c - files cut into rows: where each begins, what is in it, what is refused. */
#include "trainer/rows.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static gn_status open_text(gn_rows **rows, const char *name, const char *text, size_t n,
                           gn_error *err) {
    char *copy = malloc(n + 1);
    memcpy(copy, text, n);
    copy[n] = 0;
    return gn_rows_open_take(rows, name, copy, n, err);
}

/* All rows as "LINE:JSON;" or "LINE:!message;", or "!message" when the file is refused. */
static const char *read_all(const char *name, const char *text, size_t n) {
    static char all[4096];
    gn_rows *rows;
    gn_error err = {0};
    all[0] = 0;
    if (open_text(&rows, name, text, n, &err)) {
        snprintf(all, sizeof all, "!%s", err.message);
        return all;
    }
    for (int64_t i = 0; i < gn_rows_count(rows); i++) {
        cJSON *row;
        gn_error why = {0};
        const gn_status status = gn_rows_parse(rows, i, &row, &why);
        char *json = status ? NULL : cJSON_PrintUnformatted(row);
        const size_t used = strlen(all);
        cr_assert(status == why.status && (status == GN_OK) == (row != NULL));
        snprintf(all + used, sizeof all - used, "%lld:%s%s;", (long long)gn_rows_line(rows, i),
                 status ? "!" : "", status ? why.message : json);
        free(json);
        cJSON_Delete(row);
    }
    gn_rows_close(rows);
    return all;
}

#define BAD(at) "not valid JSON at the row's byte " at
#define ZERO    "the row holds a zero character"
#define CUT(at) "!x.json:" at ": the array is cut short: its closing bracket is missing, after "

/* `n` 0: text ends at its first zero byte. */
static const struct {
    const char *name, *text, *want;
    size_t n;
} cases[] = {
    {"x.jsonl", "{\"a\":1}\n\n  {\"b\":[2,3]} \r\n{\"c\":\"\\n\"}",
     "1:{\"a\":1};3:{\"b\":[2,3]};4:{\"c\":\"\\n\"};", 0},
    {"x.JSONL", "\xef\xbb\xbf{\"a\":1}\n", "1:{\"a\":1};", 0},
    {"x.jsonl", "{\"a\":1}\n{\"a\":\n{\"a\":2} x\n[1]\n7\n{}",
     "1:{\"a\":1};2:!" BAD("5") ";3:!" BAD(
         "8") ";4:!a row must be a JSON object;5:!a row must be a JSON object;6:{};",
     0},
    {"x.jsonl", "{\"a\":\"\\u0000\"}\n{\"a\":\"\\\\u0000\"}",
     "1:!" ZERO ";2:{\"a\":\"\\\\u0000\"};", 0},
    {"x.jsonl", "{\"a\":\"\0\"}\n{}", "1:!" ZERO ";2:{};", 12},
    {"x.jsonl", "{\"a\":\"\xff\"}\n{\"a\":\"\xed\xa0\x80\"}\n{\"a\":\"\xc3\"}",
     "1:!not UTF-8 at the row's byte 7;2:!not UTF-8 at the row's byte 7;3:!not UTF-8 at the row's "
     "byte 7;",
     0},
    {"x.jsonl", "{\"a\":\"\\ud800\"}", "1:!" BAD("7") ";", 0},
    {"x.jsonl", "", "!x.jsonl: has no rows", 0},
    {"x.jsonl", " \n\r\n\t", "!x.jsonl: has no rows", 0},
    {"x.json", "[\n{\"a\":\"],[\\\"\"},\n {\"b\":{\"c\":[1]}}]\n",
     "2:{\"a\":\"],[\\\"\"};3:{\"b\":{\"c\":[1]}};", 0},
    {"x.json", "{\"a\":1}\n{\"a\":2}", "1:{\"a\":1};2:{\"a\":2};", 0},
    {"x.json", "[{\"a\" 1},{\"b\":2},x]", "1:!" BAD("6") ";1:{\"b\":2};1:!" BAD("1") ";", 0},
    {"x.json", "[]", "!x.json: has no rows", 0},
    {"x.json", "[{\"a\":1},\n{\"a\":2},\n{\"a\":", CUT("3") "2 whole rows", 0},
    {"x.json", "[{\"a\":\"1", CUT("1") "0 whole rows", 0},
    {"x.json", "[{\"a\":\"1\\", CUT("1") "0 whole rows", 0},
    {"x.json", "[", CUT("1") "0 whole rows", 0},
    {"x.json", "[{}]\n[{}]", "!x.json:1: something follows the end of the array", 0},
    {"x.csv", "a,b\r\n1,2\r\n\r\n,\r\n", "2:{\"a\":\"1\",\"b\":\"2\"};4:{\"a\":\"\",\"b\":\"\"};",
     0},
    {"x.csv", "a,\"b\nc\"\n\"1 \"\"x\"\"\",\"2\n3\"\n4,\"\"\n",
     "3:{\"a\":\"1 \\\"x\\\"\",\"b\\nc\":\"2\\n3\"};5:{\"a\":\"4\",\"b\\nc\":\"\"};", 0},
    {"x.csv", "a\n5\" pipe\n6\"\" x\n7",
     "2:{\"a\":\"5\\\" pipe\"};3:{\"a\":\"6\\\"\\\" x\"};4:{\"a\":\"7\"};", 0},
    {"x.csv", "a,b\n1\n1,2,3\n\"1\"x,2\n4,5",
     "2:!1 fields; there are 2 columns;3:!3 fields; there are 2 columns;4:!a quoted field goes on "
     "after its closing quote;5:{\"a\":\"4\",\"b\":\"5\"};",
     0},
    {"x.csv", "a,b\n1,2\n\"3,4\n5,6",
     "2:{\"a\":\"1\",\"b\":\"2\"};3:!a quoted field has no closing quote;", 0},
    {"x.csv", "a\n\xff\nb", "2:!not UTF-8 at the row's byte 1;3:{\"a\":\"b\"};", 0},
    {"x.csv", "a,b\n", "!x.csv: has no rows", 0},
    {"x.csv", "\n\"a\nb", "!x.csv:2: the names of the columns: a quoted field has no closing quote",
     0},
    {"x.csv", "a\0b\n1\n", "!x.csv:1: the names of the columns: the row holds a zero character", 6},
    {"x.tsv", "a\tb\n\"1\t2\"\t3,4\n\t\n",
     "2:{\"a\":\"1\\t2\",\"b\":\"3,4\"};3:{\"a\":\"\",\"b\":\"\"};", 0},
    {"x.txt", "{}", "!x.txt: a data set's name must end in .json, .jsonl, .csv or .tsv", 0},
    {"x", "{}", "!x: a data set's name must end in .json, .jsonl, .csv or .tsv", 0},
};

Test(rows, cases) {
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const size_t n = cases[i].n ? cases[i].n : strlen(cases[i].text);
        const char *got = read_all(cases[i].name, cases[i].text, n);
        cr_expect_str_eq(got, cases[i].want, "case %zu: %s", i, got);
    }
}

/* Cut anywhere, a file is refused or gives rows that are whole or refused. */
Test(rows, cut_anywhere) {
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const size_t n = cases[i].n ? cases[i].n : strlen(cases[i].text);
        for (size_t cut = 0; cut < n; cut++)
            cr_expect(*read_all(cases[i].name, cases[i].text, cut), "case %zu at %zu", i, cut);
    }
}

Test(rows, nesting_is_bounded) {
    enum { DEPTH = 200000 };
    char *text = malloc(DEPTH + 1);
    memset(text, '[', DEPTH);
    const char *lines = read_all("x.jsonl", text, DEPTH);
    cr_expect(!strncmp(lines, "1:!not valid JSON", 17), "%s", lines);
    memset(text + DEPTH / 2, ']', DEPTH / 2);
    const char *array = read_all("x.json", text, DEPTH);
    cr_expect(!strncmp(array, "1:!not valid JSON", 17), "%s", array);
    free(text);
}

Test(rows, a_row_too_large) {
    const size_t n = ((size_t)64 << 20) + 100;
    char *text = malloc(n + 1);
    memset(text, 'x', n);
    memcpy(text, "{\"a\":\"", 6);
    memcpy(text + n - 6, "\"}\n{}\n", 6);
    const char *got = read_all("x.jsonl", text, n);
    cr_expect_str_eq(got, "1:!a row of 67108960 bytes; at most 67108864 are allowed;2:{};", "%s",
                     got);
    free(text);
}

Test(rows, files) {
    gn_rows *rows;
    gn_error err = {0};
    cr_assert_eq(gn_rows_open(&rows, GN_SOURCE_DIR "/tests/trainer/data/none.json", &err), GN_EIO);
    cr_assert(strstr(err.message, "none.json: No such file"), "%s", err.message);
    cr_assert_eq(gn_rows_open(&rows, GN_SOURCE_DIR "/tests/trainer", &err), GN_EIO);
    cr_assert_eq(gn_rows_open(&rows, GN_SOURCE_DIR "/tests/trainer/data/alpaca.json", &err), GN_OK);
    cr_assert_eq(gn_rows_count(rows), 2);
    gn_rows_close(rows);
    gn_rows_close(NULL);
}
