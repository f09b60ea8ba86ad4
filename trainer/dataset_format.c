/* dataset_format.c - rows to examples, by format. */
#include "trainer/dataset_format.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const format_names[] = {
#define X(name, text) text,
    GN_FORMAT_MAP(X)
#undef X
};

const char *gn_format_name(gn_format format) {
    return format_names[format];
}

/* A row being made into examples. */
typedef struct mapper {
    gn_example_fn *take;
    void *user;
    gn_error *err;
    gn_message *messages;
    bool *learn;
    int n, room;
    char **owned; /* texts that are not the row's */
    int n_owned;
} mapper;

/* ---- fields ---- */

/* The last of the object's fields of that name, as other JSON readers have it; NULL for null. */
static const cJSON *field(const cJSON *object, const char *name) {
    const cJSON *found = NULL, *item;
    cJSON_ArrayForEach(item, object) {
        if (item->string && !strcmp(item->string, name)) found = item;
    }
    return cJSON_IsNull(found) ? NULL : found;
}

static const cJSON *either(const cJSON *object, const char *name, const char *other) {
    const cJSON *found = field(object, name);
    return found ? found : field(object, other);
}

static const char *text_of(const cJSON *object, const char *name) {
    return cJSON_GetStringValue(field(object, name));
}

static gn_status need_text(const mapper *m, const cJSON *object, const char *name,
                           const char **text) {
    const cJSON *item = field(object, name);
    *text = cJSON_GetStringValue(item);
    if (*text) return GN_OK;
    return gn_fail(m->err, GN_EFORMAT, "\"%s\" %s", name, item ? "is not a string" : "is missing");
}

/* A missing field is an empty text. */
static gn_status optional_text(const mapper *m, const cJSON *object, const char *name,
                               const char **text) {
    *text = "";
    return field(object, name) ? need_text(m, object, name, text) : GN_OK;
}

static gn_status no_memory(const mapper *m) {
    return gn_fail(m->err, GN_ENOMEM, "out of memory");
}

/* Keeps a malloc'ed text until the row is done; NULL means no memory. */
static gn_status own(mapper *m, char *text) {
    char **grown = text ? realloc(m->owned, ((size_t)m->n_owned + 1) * sizeof *grown) : NULL;
    if (!grown) {
        free(text);
        return no_memory(m);
    }
    m->owned = grown;
    m->owned[m->n_owned++] = text;
    return GN_OK;
}

/* ---- prompt and reply ---- */

static gn_status take_pair(mapper *m, const char *source, const char *target) {
    const gn_example example = {.source = source, .target = target};
    return m->take(m->user, &example, m->err);
}

/* source NULL: no prompt. */
static gn_status map_fields(mapper *m, const cJSON *row, const char *source, const char *target) {
    const char *from = "", *to;
    gn_status status = source ? optional_text(m, row, source, &from) : GN_OK;
    if (!status) status = need_text(m, row, target, &to);
    return status ? status : take_pair(m, from, to);
}

/* printf for one or two texts; the result is the mapper's. */
static gn_status fill_prompt(mapper *m, const char *format, const char *first, const char *second,
                             const char **prompt) {
    char *text = NULL;
    if (asprintf(&text, format, first, second) < 0) text = NULL;
    const gn_status status = own(m, text);
    *prompt = text;
    return status;
}

static gn_status map_alpaca(mapper *m, const cJSON *row) {
    static const char with_input[] =
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n%s\n\n### Input:\n%s\n\n### Response: ";
    static const char without_input[] =
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n%s\n\n### Response: ";
    const char *instruction, *input, *output, *prompt;
    gn_status status = need_text(m, row, "instruction", &instruction);
    if (!status) status = optional_text(m, row, "input", &input);
    if (!status) status = need_text(m, row, "output", &output);
    if (!status)
        status = fill_prompt(m, *input ? with_input : without_input, instruction, input, &prompt);
    return status ? status : take_pair(m, prompt, output);
}

static gn_status map_seed_task(mapper *m, const cJSON *row) {
    const cJSON *instances = field(row, "instances"), *instance;
    const char *instruction, *input, *output, *prompt;
    gn_status status = need_text(m, row, "instruction", &instruction);
    if (!status && !cJSON_IsArray(instances))
        return gn_fail(m->err, GN_EFORMAT, "\"instances\" is not an array");
    cJSON_ArrayForEach(instance, instances) {
        if (!status) status = optional_text(m, instance, "input", &input);
        if (!status) status = need_text(m, instance, "output", &output);
        if (!status)
            status =
                fill_prompt(m, *input ? "%s\n\nInput: %s\n\nOutput:" : "%s\n\nOutput:", instruction,
                            input, &prompt);
        if (!status) status = take_pair(m, prompt, output);
    }
    return status;
}

/* As the original: what stands before the first "\n<bot>: ", without "<human>: ", and what stands
 * between it and the next. */
static gn_status map_chip2(mapper *m, const cJSON *row) {
    static const char human[] = "<human>: ", bot[] = "\n<bot>: ";
    const char *text;
    gn_status status = need_text(m, row, "text", &text);
    if (status) return status;
    char *source = strdup(text);
    status = own(m, source);
    if (status) return status;
    char *target = strstr(source, bot);
    if (!target) return gn_fail(m->err, GN_EFORMAT, "\"text\" has no line that begins \"<bot>: \"");
    *target = 0;
    target += sizeof bot - 1;
    char *next = strstr(target, bot), *at = source;
    if (next) *next = 0;
    while ((at = strstr(at, human)) != NULL)
        memmove(at, at + sizeof human - 1, strlen(at + sizeof human - 1) + 1);
    return take_pair(m, source, target);
}

/* ---- conversations ---- */

static gn_status add_message(mapper *m, const char *role, const char *content, bool learn) {
    if (m->n == m->room) {
        const int room = 2 * m->room + 16;
        gn_message *messages = realloc(m->messages, (size_t)room * sizeof *messages);
        if (messages) m->messages = messages;
        bool *flags = messages ? realloc(m->learn, (size_t)room * sizeof *flags) : NULL;
        if (!flags) return no_memory(m);
        m->learn = flags;
        m->room = room;
    }
    m->messages[m->n] = (gn_message){role, content};
    m->learn[m->n++] = learn;
    return GN_OK;
}

static gn_status take_chat(mapper *m) {
    const gn_example example = {.messages = m->messages, .learn = m->learn, .n_messages = m->n};
    return m->take(m->user, &example, m->err);
}

static const char *role_of(const char *name) {
    static const char *const roles[][2] = {
        {"human", "user"},       {"user", "user"},           {"prompter", "user"},
        {"observation", "user"}, {"tool", "user"},           {"function", "user"},
        {"gpt", "assistant"},    {"assistant", "assistant"}, {"chatgpt", "assistant"},
        {"bard", "assistant"},   {"bing", "assistant"},      {"model", "assistant"},
        {"system", "system"},    {"developer", "system"},    {"function_call", "assistant"},
    };
    for (size_t i = 0; name && i < sizeof roles / sizeof *roles; i++)
        if (!strcmp(name, roles[i][0])) return roles[i][1];
    return NULL;
}

/* The texts of an array of {"type": "text", "text": ...}, joined. */
static gn_status join_parts(mapper *m, const cJSON *parts, const char **content) {
    const cJSON *part;
    size_t len = 0;
    cJSON_ArrayForEach(part, parts) {
        const char *text = text_of(part, "text");
        if (!text) return gn_fail(m->err, GN_EFORMAT, "a part of \"content\" is not text");
        len += strlen(text);
    }
    char *joined = malloc(len + 1), *at = joined;
    const gn_status status = own(m, joined);
    if (status) return status;
    *at = 0;
    cJSON_ArrayForEach(part, parts) at = stpcpy(at, text_of(part, "text"));
    *content = joined;
    return GN_OK;
}

/* A text, an array of texts, or, of an assistant that calls tools, the calls as JSON. */
static gn_status read_content(mapper *m, const cJSON *message, const char **content) {
    const cJSON *item = either(message, "content", "value");
    const cJSON *calls = either(message, "tool_calls", "function_call");
    *content = cJSON_GetStringValue(item);
    if (calls && (!item || (*content && !**content))) {
        char *text = cJSON_PrintUnformatted(calls);
        *content = text;
        return own(m, text);
    }
    if (calls) return gn_fail(m->err, GN_EFORMAT, "a message has both text and calls; make it two");
    if (*content) return GN_OK;
    if (cJSON_IsArray(item)) return join_parts(m, item, content);
    return gn_fail(m->err, GN_EFORMAT, "a message has no text");
}

static gn_status add_turn(mapper *m, const cJSON *message) {
    const char *name = cJSON_GetStringValue(either(message, "role", "from"));
    const char *role = role_of(name), *content;
    const cJSON *weight = field(message, "weight");
    if (!role) {
        if (!name) return gn_fail(m->err, GN_EFORMAT, "a message has no role");
        return gn_fail(m->err, GN_EFORMAT, "unknown role '%.64s'", name);
    }
    if (weight &&
        (!cJSON_IsNumber(weight) || (weight->valuedouble != 0 && weight->valuedouble != 1)))
        return gn_fail(m->err, GN_EFORMAT, "a message's weight must be 0 or 1");
    const gn_status status = read_content(m, message, &content);
    if (status) return status;
    return add_message(m, role, content, !weight || weight->valuedouble == 1);
}

static gn_status map_chat(mapper *m, const cJSON *row, const char *name) {
    const cJSON *messages = field(row, name), *message;
    const char *system, *tools;
    if (!cJSON_IsArray(messages))
        return gn_fail(m->err, GN_EFORMAT, "\"%s\" %s", name,
                       messages ? "is not an array" : "is missing");
    gn_status status = optional_text(m, row, "system", &system);
    if (!status && *system) status = add_message(m, "system", system, false);
    if (!status && cJSON_IsArray(field(row, "tools"))) {
        char *text = cJSON_PrintUnformatted(field(row, "tools"));
        tools = text;
        status = own(m, text);
    } else if (!status) {
        status = optional_text(m, row, "tools", &tools);
    }
    if (!status && *tools) status = add_message(m, "system", tools, false);
    cJSON_ArrayForEach(message, messages) {
        if (!status) status = add_turn(m, message);
    }
    if (!status && m->n == 0) status = gn_fail(m->err, GN_EFORMAT, "\"%s\" is empty", name);
    return status ? status : take_chat(m);
}

/* The reply of the lowest rank, one without a rank counting last; NULL: none. */
static const cJSON *best_reply(const cJSON *message) {
    const cJSON *replies = field(message, "replies"), *reply, *best = NULL;
    double best_rank = 0;
    cJSON_ArrayForEach(reply, replies) {
        const cJSON *number = field(reply, "rank");
        const double rank = cJSON_IsNumber(number) ? number->valuedouble : 1e9;
        if (cJSON_IsTrue(field(reply, "deleted")) || (best && rank >= best_rank)) continue;
        best = reply;
        best_rank = rank;
    }
    return best;
}

static gn_status map_tree(mapper *m, const cJSON *row) {
    const char *state = text_of(row, "tree_state");
    if (state && strcmp(state, "ready_for_export")) return GN_OK;
    gn_status status = GN_OK;
    for (const cJSON *at = field(row, "prompt"); at && !status; at = best_reply(at)) {
        const char *name = text_of(at, "role"), *role = role_of(name), *text;
        if (!role) return gn_fail(m->err, GN_EFORMAT, "a message has no known \"role\"");
        status = need_text(m, at, "text", &text);
        if (!status) status = add_message(m, role, text, true);
    }
    while (m->n > 0 && strcmp(m->messages[m->n - 1].role, "assistant")) m->n--;
    return status || m->n == 0 ? status : take_chat(m);
}

/* ---- rows ---- */

static gn_status map_tokens(mapper *m, const cJSON *row) {
    const gn_example example = {.ids = field(row, "input_ids"), .labels = field(row, "labels")};
    if (!cJSON_IsArray(example.ids))
        return gn_fail(m->err, GN_EFORMAT, "\"input_ids\" is not an array");
    if (example.labels && !cJSON_IsArray(example.labels))
        return gn_fail(m->err, GN_EFORMAT, "\"labels\" is not an array");
    return m->take(m->user, &example, m->err);
}

static bool is_tree(const cJSON *row) {
    return cJSON_IsObject(field(row, "prompt"));
}

static gn_status map_row(mapper *m, gn_format format, const cJSON *row) {
    switch (format) {
    case GN_FORMAT_INPUT_OUTPUT:
    case GN_FORMAT_LONGFORM: return map_fields(m, row, "input", "output");
    case GN_FORMAT_ALPACA:
    case GN_FORMAT_ALPACA_CLEAN: return map_alpaca(m, row);
    case GN_FORMAT_SELF_INSTRUCT:
        return field(row, "instances") ? map_seed_task(m, row)
                                       : map_fields(m, row, "prompt", "completion");
    case GN_FORMAT_CHIP2: return map_chip2(m, row);
    case GN_FORMAT_HH_RLHF: return map_fields(m, row, NULL, "chosen");
    case GN_FORMAT_OASST1:
        return is_tree(row) ? map_tree(m, row) : map_fields(m, row, NULL, "text");
    case GN_FORMAT_SHAREGPT: return map_chat(m, row, "conversations");
    case GN_FORMAT_MESSAGES: return map_chat(m, row, "messages");
    case GN_FORMAT_TOKENIZED: return map_tokens(m, row);
    default: return gn_fail(m->err, GN_EINVAL, "no format");
    }
}

gn_status gn_format_row(gn_format format, const cJSON *row, gn_example_fn *take, void *user,
                        gn_error *err) {
    mapper m = {.take = take, .user = user, .err = err};
    const gn_status status = map_row(&m, format, row);
    for (int i = 0; i < m.n_owned; i++) free(m.owned[i]);
    free(m.owned);
    free(m.messages);
    free(m.learn);
    return status;
}

/* ---- detection ---- */

static gn_format detect(const cJSON *row) {
    const char *text = text_of(row, "text");
    if (field(row, "input_ids")) return GN_FORMAT_TOKENIZED;
    if (field(row, "messages")) return GN_FORMAT_MESSAGES;
    if (field(row, "conversations")) return GN_FORMAT_SHAREGPT;
    if (is_tree(row)) return GN_FORMAT_OASST1;
    if (field(row, "chosen")) return GN_FORMAT_HH_RLHF;
    if (field(row, "instruction"))
        return field(row, "instances") ? GN_FORMAT_SELF_INSTRUCT : GN_FORMAT_ALPACA;
    if (text_of(row, "prompt") && text_of(row, "completion")) return GN_FORMAT_SELF_INSTRUCT;
    if (field(row, "output")) return GN_FORMAT_INPUT_OUTPUT;
    if (text && strstr(text, "\n<bot>: ")) return GN_FORMAT_CHIP2;
    if (text && strstr(text, "### Human:")) return GN_FORMAT_OASST1;
    return GN_FORMAT_AUTO;
}

gn_status gn_format_detect(const cJSON *row, gn_format *format, gn_error *err) {
    char names[200] = "";
    const cJSON *item;
    *format = detect(row);
    if (*format != GN_FORMAT_AUTO) return GN_OK;
    cJSON_ArrayForEach(item, row) {
        const size_t used = strlen(names);
        snprintf(names + used, sizeof names - used, "%s%.40s", used ? ", " : "", item->string);
    }
    return gn_fail(err, GN_EFORMAT,
                   "these fields are no known format's: %s. --dataset-format chooses one", names);
}
