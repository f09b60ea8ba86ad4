/* messages.c - a conversation, as OpenAI's clients send it. */
#include "server/messages.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What is wrong is told with the place: messages[2].content. */
static bool refuse(const gn_json *j, int at, const char *field, const char *text) {
    char param[64];
    snprintf(param, sizeof param, "messages[%d]%s%s", at, *field ? "." : "", field);
    return gn_http_fail(j->error, 400, NULL, param, "%s %s", param, text);
}

static const char *role_of(const char *role) {
    static const char *const roles[] = {"system", "user", "assistant"};
    if (strcmp(role, "developer") == 0) return "system";
    for (int i = 0; i < 3; i++) {
        if (strcmp(role, roles[i]) == 0) return roles[i];
    }
    return NULL;
}

/* Appends the parts' texts and a zero byte. */
static bool join_parts(const gn_json *j, int at, const cJSON *parts, gn_buffer *joined) {
    const cJSON *part;
    bool first = true;
    cJSON_ArrayForEach(part, parts) {
        const cJSON *type = cJSON_GetObjectItemCaseSensitive(part, "type");
        const cJSON *text = cJSON_GetObjectItemCaseSensitive(part, "text");
        if (!cJSON_IsString(type) || strcmp(type->valuestring, "text") != 0 ||
            !cJSON_IsString(text))
            return refuse(j, at, "content",
                          "may only hold parts like {\"type\": \"text\", \"text\": \"...\"}; this "
                          "server reads text only.");
        if (!first) gn_buffer_text(joined, "\n");
        first = false;
        gn_buffer_text(joined, text->valuestring);
    }
    gn_buffer_append(joined, "", 1);
    return true;
}

/* Content made of parts is left NULL here: its place in `joined` may still move. */
static bool read_message(const gn_json *j, int at, const cJSON *entry, gn_message *m,
                         gn_buffer *joined) {
    if (!cJSON_IsObject(entry)) return refuse(j, at, "", "must be an object.");
    const cJSON *role = cJSON_GetObjectItemCaseSensitive(entry, "role");
    const cJSON *content = cJSON_GetObjectItemCaseSensitive(entry, "content");
    const cJSON *calls = cJSON_GetObjectItemCaseSensitive(entry, "tool_calls");
    if (!cJSON_IsString(role) || !role_of(role->valuestring))
        return refuse(j, at, "role", "must be system, developer, user or assistant.");
    if (calls && !cJSON_IsNull(calls) && cJSON_GetArraySize(calls) > 0)
        return refuse(j, at, "tool_calls", "is not supported: this server calls no tools.");
    m->role = role_of(role->valuestring);
    if (cJSON_IsString(content))
        m->content = content->valuestring;
    else if (cJSON_IsArray(content))
        return join_parts(j, at, content, joined);
    else
        return refuse(j, at, "content", "must be a string or an array of text parts.");
    return true;
}

bool gn_messages_read(const gn_json *j, gn_message **out, int *n, gn_buffer *joined) {
    const cJSON *list = gn_json_get(j, "messages"), *entry;
    if (j->error->status) return false;
    const int count = cJSON_IsArray(list) ? cJSON_GetArraySize(list) : 0;
    if (count == 0)
        return gn_http_fail(j->error, 400, NULL, "messages",
                            "messages must be an array of at least one message.");
    gn_message *messages = calloc((size_t)count, sizeof *messages);
    *out = messages;
    *n = count;
    if (!messages) return gn_http_no_memory(j->error);
    int at = 0;
    cJSON_ArrayForEach(entry, list) {
        if (!read_message(j, at, entry, &messages[at], joined)) return false;
        at++;
    }
    if (joined->failed) return gn_http_no_memory(j->error);
    const char *text = joined->data;
    for (int i = 0; i < count; i++) {
        if (messages[i].content) continue;
        messages[i].content = text;
        text += strlen(text) + 1;
    }
    return true;
}
