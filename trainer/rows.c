/* rows.c - cuts a file into rows, and parses one at a time.
 *
 * Cutting only looks for where rows end: at line ends, at commas outside strings and brackets, at
 * line ends outside quotes. Parsing is then strict. */
#include "trainer/rows.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "engine/utf8.h"
#include "trainer/trainer.h"

enum { MAX_ROW = 64 << 20, MAX_COLUMNS = 4096 };

typedef enum row_kind { JSON_LINES, JSON_ARRAY, SEPARATED } row_kind;

typedef struct row_span {
    size_t at, len;
    int64_t line;
} row_span;

struct gn_rows {
    char *path, *text;
    size_t size;
    row_kind kind;
    char separator; /* of SEPARATED */
    row_span *spans;
    int64_t n, room;
    char **columns; /* of SEPARATED */
    int n_columns;
};

static gn_status no_memory(const gn_rows *r, gn_error *err) {
    return gn_fail(err, GN_ENOMEM, "%s: out of memory", r->path);
}

/* ---- cutting ---- */

static bool is_space(char c) {
    return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

static int64_t count_lines(const char *text, size_t len) {
    int64_t lines = 0;
    const char *end = text + len;
    for (const char *at = text; (at = memchr(at, '\n', (size_t)(end - at))); at++) lines++;
    return lines;
}

static gn_status push_span(gn_rows *r, size_t at, size_t end, int64_t line, gn_error *err) {
    if (r->n == r->room) {
        const int64_t room = 2 * r->room + 64;
        row_span *grown = realloc(r->spans, (size_t)room * sizeof *grown);
        if (!grown) return no_memory(r, err);
        r->spans = grown;
        r->room = room;
    }
    r->spans[r->n++] = (row_span){at, end - at, line};
    return GN_OK;
}

/* Adds the JSON text [at, end), which begins on `line`, without space around it; a blank one is no
 * row. */
static gn_status add_trimmed(gn_rows *r, size_t at, size_t end, int64_t line, gn_error *err) {
    for (; at < end && is_space(r->text[at]); at++) line += r->text[at] == '\n';
    while (end > at && is_space(r->text[end - 1])) end--;
    return at < end ? push_span(r, at, end, line, err) : GN_OK;
}

static gn_status cut_lines(gn_rows *r, size_t at, gn_error *err) {
    gn_status status = GN_OK;
    for (int64_t line = 1; at < r->size && !status; line++) {
        const char *end = memchr(r->text + at, '\n', r->size - at);
        const size_t stop = end ? (size_t)(end - r->text) : r->size;
        status = add_trimmed(r, at, stop, line, err);
        at = stop + 1;
    }
    return status;
}

/* The end of the string that begins at `at`, behind its closing quote; the file's end if there is
 * none. */
static size_t skip_string(const gn_rows *r, size_t at) {
    for (at++; at < r->size && r->text[at] != '"'; at++)
        if (r->text[at] == '\\') at++;
    return at < r->size ? at + 1 : r->size;
}

/* The comma or bracket that ends the array's element at `at`; the file's end if there is none. */
static size_t skip_element(const gn_rows *r, size_t at) {
    int64_t depth = 0;
    while (at < r->size) {
        const char c = r->text[at];
        if (c == '"') {
            at = skip_string(r, at);
            continue;
        }
        if (depth == 0 && (c == ',' || c == ']')) return at;
        depth += c == '[' || c == '{';
        depth -= c == ']' || c == '}';
        at++;
    }
    return r->size;
}

/* `at`: behind the opening bracket. */
static gn_status cut_array(gn_rows *r, size_t at, gn_error *err) {
    int64_t line = 1 + count_lines(r->text, at);
    while (at < r->size) {
        const size_t end = skip_element(r, at);
        const gn_status status = end < r->size ? add_trimmed(r, at, end, line, err) : GN_OK;
        if (status) return status;
        if (end == r->size) break;
        line += count_lines(r->text + at, end - at);
        at = end + 1;
        if (r->text[end] == ',') continue;
        while (at < r->size && is_space(r->text[at])) at++;
        if (at == r->size) return GN_OK;
        return gn_fail(err, GN_EFORMAT, "%s:%lld: something follows the end of the array", r->path,
                       (long long)line);
    }
    return gn_fail(err, GN_EFORMAT,
                   "%s:%lld: the array is cut short: its closing bracket is missing, after %lld "
                   "whole rows",
                   r->path, 1 + (long long)count_lines(r->text, r->size), (long long)r->n);
}

/* The line end behind the record at `at`: quotes hold line ends when they open a field. */
static size_t skip_record(const gn_rows *r, size_t at) {
    bool quoted = false, begins = true;
    for (; at < r->size && (quoted || r->text[at] != '\n'); at++) {
        const char c = r->text[at];
        const bool closes = quoted && c == '"';
        quoted = quoted ? !closes : begins && c == '"';
        begins = c == r->separator || closes; /* of two quotes the second opens the field again */
    }
    return at;
}

static gn_status cut_records(gn_rows *r, size_t at, gn_error *err) {
    gn_status status = GN_OK;
    for (int64_t line = 1; at < r->size && !status;) {
        const size_t end = skip_record(r, at);
        const size_t stop = end > at && r->text[end - 1] == '\r' ? end - 1 : end;
        if (stop > at) status = push_span(r, at, stop, line, err);
        line += count_lines(r->text + at, end - at) + 1;
        at = end + 1;
    }
    return status;
}

/* ---- what a row may hold ---- */

/* Whether \u0000 is among the escapes of a JSON text; cJSON would end the string there. */
static bool escapes_zero(const char *text, size_t len) {
    const char *end = text + len;
    for (const char *at = text; (at = memchr(at, '\\', (size_t)(end - at))); at += 2) {
        if (end - at < 2) return false;
        if (end - at >= 6 && !memcmp(at, "\\u0000", 6)) return true;
    }
    return false;
}

static gn_status check_text(const gn_rows *r, const row_span *span, gn_error *err) {
    const char *text = r->text + span->at;
    if (span->len > MAX_ROW)
        return gn_fail(err, GN_EFORMAT, "a row of %zu bytes; at most %d are allowed", span->len,
                       MAX_ROW);
    if (memchr(text, 0, span->len) || (r->kind != SEPARATED && escapes_zero(text, span->len)))
        return gn_fail(err, GN_EFORMAT, "the row holds a zero character");
    const size_t valid = gn_utf8_check(text, span->len);
    if (valid != span->len)
        return gn_fail(err, GN_EFORMAT, "not UTF-8 at the row's byte %zu", valid + 1);
    return GN_OK;
}

/* ---- records ---- */

/* Reads one field from *at on; the text is malloc'ed and *at stands at the separator or the end. */
static gn_status read_field(const gn_rows *r, const row_span *span, size_t *at, char **field,
                            gn_error *err) {
    const char *text = r->text + span->at;
    const bool quoted = *at < span->len && text[*at] == '"';
    size_t n = 0, i = *at + quoted;
    bool closed = !quoted;
    char *out = malloc(span->len - *at + 1);
    *field = NULL;
    if (!out) return no_memory(r, err);
    for (; i < span->len; i++) {
        if (quoted && text[i] == '"') {
            if (i + 1 < span->len && text[i + 1] == '"') {
                i++;
            } else {
                closed = true;
                i++;
                break;
            }
        } else if (!quoted && text[i] == r->separator) {
            break;
        }
        out[n++] = text[i];
    }
    out[n] = 0;
    *at = i;
    *field = out;
    if (closed && (i == span->len || text[i] == r->separator)) return GN_OK;
    free(out);
    *field = NULL;
    return gn_fail(err, GN_EFORMAT, "%s",
                   closed ? "a quoted field goes on after its closing quote"
                          : "a quoted field has no closing quote");
}

static gn_status read_columns(gn_rows *r, gn_error *err) {
    const row_span *span = &r->spans[0];
    size_t at = 0;
    gn_status status = check_text(r, span, err);
    if (status) return status;
    r->columns = calloc(MAX_COLUMNS, sizeof *r->columns);
    if (!r->columns) return no_memory(r, err);
    for (;; at++) {
        if (r->n_columns == MAX_COLUMNS)
            return gn_fail(err, GN_EFORMAT, "over %d columns", MAX_COLUMNS);
        status = read_field(r, span, &at, &r->columns[r->n_columns], err);
        if (status) return status;
        r->n_columns++;
        if (at == span->len) return GN_OK;
    }
}

/* The first record names the columns, and is no row. */
static gn_status take_columns(gn_rows *r, gn_error *err) {
    gn_error why = {0};
    if (r->n == 0) return GN_OK;
    const gn_status status = read_columns(r, &why);
    if (status)
        return gn_fail(err, status, "%s:%lld: the names of the columns: %s", r->path,
                       (long long)r->spans[0].line, why.message);
    r->n--;
    memmove(r->spans, r->spans + 1, (size_t)r->n * sizeof *r->spans);
    return GN_OK;
}

static gn_status parse_record(const gn_rows *r, const row_span *span, cJSON **row, gn_error *err) {
    int n = 0;
    *row = cJSON_CreateObject();
    if (!*row) return no_memory(r, err);
    for (size_t at = 0;; at++) {
        char *field;
        const gn_status status = read_field(r, span, &at, &field, err);
        if (status) return status;
        const bool ok =
            n >= r->n_columns || cJSON_AddStringToObject(*row, r->columns[n], field) != NULL;
        free(field);
        if (!ok) return no_memory(r, err);
        n++;
        if (at == span->len) break;
    }
    if (n != r->n_columns)
        return gn_fail(err, GN_EFORMAT, "%d fields; there are %d columns", n, r->n_columns);
    return GN_OK;
}

/* ---- opening ---- */

static gn_status cut(gn_rows *r, gn_error *err) {
    const char *suffix = strrchr(r->path, '.');
    if (!suffix) suffix = "";
    size_t at = r->size >= 3 && !memcmp(r->text, "\xef\xbb\xbf", 3) ? 3 : 0;
    const bool is_json = !strcasecmp(suffix, ".json");
    if (!strcasecmp(suffix, ".csv") || !strcasecmp(suffix, ".tsv")) {
        r->kind = SEPARATED;
        r->separator = !strcasecmp(suffix, ".csv") ? ',' : '\t';
        const gn_status status = cut_records(r, at, err);
        return status ? status : take_columns(r, err);
    }
    if (!is_json && strcasecmp(suffix, ".jsonl"))
        return gn_fail(err, GN_EUNSUPPORTED,
                       "%s: a data set's name must end in .json, .jsonl, .csv or .tsv", r->path);
    size_t first = at;
    while (first < r->size && is_space(r->text[first])) first++;
    r->kind = is_json && first < r->size && r->text[first] == '[' ? JSON_ARRAY : JSON_LINES;
    return r->kind == JSON_ARRAY ? cut_array(r, first + 1, err) : cut_lines(r, at, err);
}

gn_status gn_rows_open_take(gn_rows **out, const char *path, char *text, size_t size,
                            gn_error *err) {
    *out = NULL;
    gn_rows *r = calloc(1, sizeof *r);
    if (r) r->path = strdup(path);
    if (!r || !r->path) {
        free(text);
        free(r);
        return gn_fail(err, GN_ENOMEM, "%s: out of memory", path);
    }
    r->text = text;
    r->size = size;
    gn_status status = cut(r, err);
    if (!status && r->n == 0) status = gn_fail(err, GN_EFORMAT, "%s: has no rows", path);
    if (status) {
        gn_rows_close(r);
        return status;
    }
    *out = r;
    return GN_OK;
}

gn_status gn_rows_open(gn_rows **out, const char *path, gn_error *err) {
    char *text;
    size_t size;
    *out = NULL;
    const gn_status status = gn_read_text(path, &text, &size, err);
    return status ? status : gn_rows_open_take(out, path, text, size, err);
}

void gn_rows_close(gn_rows *r) {
    if (!r) return;
    for (int i = 0; i < r->n_columns; i++) free(r->columns[i]);
    free(r->columns);
    free(r->spans);
    free(r->text);
    free(r->path);
    free(r);
}

int64_t gn_rows_count(const gn_rows *r) {
    return r->n;
}

const char *gn_rows_path(const gn_rows *r) {
    return r->path;
}

int64_t gn_rows_line(const gn_rows *r, int64_t i) {
    return r->spans[i].line;
}

void gn_rows_add_to_hash(const gn_rows *r, gn_hash *hash) {
    const char kind[] = {(char)r->kind, r->separator};
    gn_hash_add(hash, kind, sizeof kind);
    gn_hash_add(hash, r->text, r->size);
}

/* ---- parsing ---- */

static gn_status parse_json(const gn_rows *r, const row_span *span, cJSON **row, gn_error *err) {
    const char *text = r->text + span->at, *end = text;
    *row = cJSON_ParseWithLengthOpts(text, span->len, &end, false);
    if (!*row || end != text + span->len)
        return gn_fail(err, GN_EFORMAT, "not valid JSON at the row's byte %td", end - text + 1);
    if (!cJSON_IsObject(*row)) return gn_fail(err, GN_EFORMAT, "a row must be a JSON object");
    return GN_OK;
}

gn_status gn_rows_parse(const gn_rows *r, int64_t i, cJSON **row, gn_error *err) {
    const row_span *span = &r->spans[i];
    *row = NULL;
    gn_status status = check_text(r, span, err);
    if (!status)
        status =
            r->kind == SEPARATED ? parse_record(r, span, row, err) : parse_json(r, span, row, err);
    if (status) {
        cJSON_Delete(*row);
        *row = NULL;
    }
    return status;
}
