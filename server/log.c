/* log.c - the log: a line a request, and warnings, for people or as JSON. */
#include <llhttp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "server/state.h"

static void json_line(gn_buffer *b, const gn_exchange *x, const char *method, const char *path,
                      int64_t ms) {
    gn_buffer_format(b, "{\"event\":\"request\",\"time\":%lld,\"method\":\"%s\",\"path\":",
                     (long long)time(NULL), method);
    gn_buffer_json_text(b, path);
    gn_buffer_format(b, ",\"status\":%d,\"ms\":%lld", x->status, (long long)ms);
    if (x->model_name[0]) {
        gn_buffer_text(b, ",\"model\":");
        gn_buffer_json_text(b, x->model_name);
        gn_buffer_format(b, ",\"prompt_tokens\":%lld,\"completion_tokens\":%lld",
                         (long long)x->prompt_tokens, (long long)x->completion_tokens);
    }
    gn_buffer_text(b, "}\n");
}

static void write_clock(gn_buffer *b) {
    char clock[32];
    struct tm tm;
    const time_t now = time(NULL);
    localtime_r(&now, &tm);
    strftime(clock, sizeof clock, "%H:%M:%S", &tm);
    gn_buffer_text(b, clock);
}

static void plain_line(gn_buffer *b, const gn_exchange *x, const char *method, const char *path,
                       int64_t ms) {
    write_clock(b);
    gn_buffer_format(b, " %d %s ", x->status, method);
    for (const char *c = path; *c; c++) {
        const char shown = *c > ' ' && *c < 0x7f ? *c : '?'; /* no control characters in a log */
        gn_buffer_append(b, &shown, 1);
    }
    gn_buffer_format(b, " %lld ms", (long long)ms);
    if (x->model_name[0])
        gn_buffer_format(b, ", %s, %lld + %lld tokens", x->model_name, (long long)x->prompt_tokens,
                         (long long)x->completion_tokens);
    gn_buffer_text(b, "\n");
}

/* Frees the line. */
static void write_line(FILE *log, gn_buffer *line) {
    if (!line->failed) fwrite(line->data, 1, line->size, log);
    fflush(log);
    gn_buffer_free(line);
}

void gn_log_exchange(const gn_exchange *x) {
    const gn_server *s = x->server;
    if (!s->options.log || s->options.quiet) return;
    const char *method = x->path ? llhttp_method_name((llhttp_method_t)x->method) : "-";
    const char *path = x->path ? x->path : "-";
    const int64_t ms = (int64_t)(uv_now(&s->loop) - x->started);
    gn_buffer line = {0};
    if (s->options.json_log)
        json_line(&line, x, method, path, ms);
    else
        plain_line(&line, x, method, path, ms);
    write_line(s->options.log, &line);
}

void gn_log_warning(const gn_server *s, const char *fmt, ...) {
    char text[512];
    gn_buffer line = {0};
    va_list args;
    if (!s->options.log) return;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    if (s->options.json_log) {
        gn_buffer_format(
            &line, "{\"event\":\"warning\",\"time\":%lld,\"message\":", (long long)time(NULL));
        gn_buffer_json_text(&line, text);
        gn_buffer_text(&line, "}\n");
    } else {
        write_clock(&line);
        gn_buffer_format(&line, " warning: %s\n", text);
    }
    write_line(s->options.log, &line);
}
