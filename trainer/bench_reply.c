/* bench_reply.c - what a server under test says. */
#include "trainer/bench_reply.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool refuse(gn_reply *r, const char *why, const char *detail) {
    if (!r->problem[0]) snprintf(r->problem, sizeof r->problem, "%s: %.200s", why, detail);
    return false;
}

static bool take_event(gn_reply *r, const cJSON *event, double now) {
    const cJSON *error = cJSON_GetObjectItemCaseSensitive(event, "error");
    const cJSON *choices = cJSON_GetObjectItemCaseSensitive(event, "choices");
    const cJSON *usage = cJSON_GetObjectItemCaseSensitive(event, "usage");
    const cJSON *tokens = cJSON_GetObjectItemCaseSensitive(usage, "completion_tokens");
    const cJSON *text = cJSON_GetObjectItemCaseSensitive(cJSON_GetArrayItem(choices, 0), "text");
    if (error) {
        const cJSON *message = cJSON_GetObjectItemCaseSensitive(error, "message");
        return refuse(r, "the server", cJSON_IsString(message) ? message->valuestring : "an error");
    }
    if (cJSON_IsNumber(tokens)) r->tokens = tokens->valueint;
    if (!cJSON_IsString(text) || !*text->valuestring) return true;
    if (r->times->n == r->max_times) return refuse(r, "the server", "more text than was asked for");
    r->times->at[r->times->n++] = now;
    return true;
}

static bool take_line(gn_reply *r, double now) {
    static const char field[] = "data: ";
    r->line[r->used] = '\0';
    r->used = 0;
    if (strncmp(r->line, field, sizeof field - 1) != 0) return true; /* a separator or a comment */
    const char *data = r->line + sizeof field - 1;
    if (strcmp(data, "[DONE]") == 0) {
        r->done = true;
        return true;
    }
    cJSON *event = cJSON_Parse(data);
    const bool fine = event ? take_event(r, event, now) : refuse(r, "an event is no JSON", data);
    cJSON_Delete(event);
    return fine;
}

bool gn_reply_feed(gn_reply *r, const char *data, size_t size, double now) {
    if (r->problem[0]) return false;
    for (size_t i = 0; i < size; i++) {
        if (data[i] == '\n') {
            if (!take_line(r, now)) return false;
            continue;
        }
        if (data[i] == '\r') continue;
        if (r->used == sizeof r->line - 1) return refuse(r, "the server", "an event is too long");
        r->line[r->used++] = data[i];
    }
    return true;
}

bool gn_read_metric(const char *text, const char *name, double *value) {
    const size_t length = strlen(name);
    for (const char *line = text; line; line = strchr(line, '\n')) {
        if (*line == '\n') line++;
        if (strncmp(line, name, length) != 0 || line[length] != ' ') continue;
        char *end;
        *value = strtod(line + length + 1, &end);
        return end != line + length + 1;
    }
    return false;
}

int gn_read_ready_port(const char *line) {
    cJSON *json = cJSON_Parse(line);
    const cJSON *event = cJSON_GetObjectItemCaseSensitive(json, "event");
    const cJSON *port = cJSON_GetObjectItemCaseSensitive(json, "port");
    const bool is_ready = cJSON_IsString(event) && strcmp(event->valuestring, "ready") == 0 &&
                          cJSON_IsNumber(port) && port->valuedouble >= 1 &&
                          port->valuedouble <= 65535;
    const int found = is_ready ? port->valueint : 0;
    cJSON_Delete(json);
    return found;
}
