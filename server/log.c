/* log.c - the access log: one line a request, for people or as JSON. */
#include <llhttp.h>
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

static void plain_line(gn_buffer *b, const gn_exchange *x, const char *method, const char *path,
                       int64_t ms) {
    char clock[32];
    struct tm tm;
    const time_t now = time(NULL);
    localtime_r(&now, &tm);
    strftime(clock, sizeof clock, "%H:%M:%S", &tm);
    gn_buffer_format(b, "%s %d %s ", clock, x->status, method);
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

void gn_log_exchange(const gn_exchange *x) {
    const gn_server *s = x->server;
    if (!s->options.log) return;
    const char *method = x->path ? llhttp_method_name((llhttp_method_t)x->method) : "-";
    const char *path = x->path ? x->path : "-";
    const int64_t ms = (int64_t)(uv_now(&s->loop) - x->started);
    gn_buffer line = {0};
    if (s->options.json_log)
        json_line(&line, x, method, path, ms);
    else
        plain_line(&line, x, method, path, ms);
    if (!line.failed) fwrite(line.data, 1, line.size, s->options.log);
    fflush(s->options.log);
    gn_buffer_free(&line);
}
