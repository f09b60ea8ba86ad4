/* chat.c - the built-in templates, template files, and conversations to token ids.
 *
 * A prompt grows as a run of text; a control piece of the template ends the run, which is then
 * tokenized in one piece. Messages only ever become text, so nothing in them is special. */
#include "engine/chat.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/json_file.h"

/* key in a file, is it required, must it have {content} */
#define TEXT_MAP(X)                                                                                \
    X(USER, "user", true, true)                                                                    \
    X(ASSISTANT, "assistant", true, true)                                                          \
    X(GENERATION, "generation", true, false)                                                       \
    X(SYSTEM, "system", false, false)                                                              \
    X(USER_WITH_SYSTEM, "user_with_system", false, true)                                           \
    X(DEFAULT_SYSTEM, "default_system", false, false)

typedef enum text_key {
#define X(name, key, required, content) name,
    TEXT_MAP(X)
#undef X
        TEXT_COUNT
} text_key;

static const struct {
    const char *name;
    bool required, content;
} text_keys[TEXT_COUNT] = {
#define X(name, key, required, content) {key, required, content},
    TEXT_MAP(X)
#undef X
};

struct gn_chat_template {
    char *text[TEXT_COUNT]; /* NULL: absent */
    char **stops;
    int n_stops;
};

/* Spacing as in training: guanaco after the QLoRA paper's prompt, vicuna after FastChat (v1.1),
 * alpaca after Stanford's prompt with LLaMA-Factory's form of several turns, llama-2, llama-3 and
 * mistral (v0.1, v0.2) after their publishers' chat templates, chatml after OpenAI's. */
static const struct {
    const char *name, *text[TEXT_COUNT], *stop;
} builtins[] = {
    {"guanaco",
     {[SYSTEM] = "{content}\n",
      [DEFAULT_SYSTEM] = "A chat between a curious human and an artificial intelligence assistant. "
                         "The assistant gives helpful, detailed, and polite answers to the user's "
                         "questions.",
      [USER] = "### Human: {content}\n",
      [ASSISTANT] = "### Assistant: {content}\n",
      [GENERATION] = "### Assistant:"},
     "### Human:"},
    {"vicuna",
     {[SYSTEM] = "{content} ",
      [DEFAULT_SYSTEM] = "A chat between a curious user and an artificial intelligence assistant. "
                         "The assistant gives helpful, detailed, and polite answers to the user's "
                         "questions.",
      [USER] = "USER: {content} ",
      [ASSISTANT] = "ASSISTANT: {content}</s>",
      [GENERATION] = "ASSISTANT:"},
     NULL},
    {"alpaca",
     {[SYSTEM] = "{content}\n\n",
      [DEFAULT_SYSTEM] = "Below is an instruction that describes a task. Write a response that "
                         "appropriately completes the request.",
      [USER] = "### Instruction:\n{content}\n\n",
      [ASSISTANT] = "### Response:\n{content}</s>\n\n",
      [GENERATION] = "### Response:\n"},
     "### Instruction:"},
    {"llama-2",
     {[USER] = "[INST] {content} [/INST]",
      [USER_WITH_SYSTEM] = "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{content} [/INST]",
      [ASSISTANT] = " {content} </s><s>",
      [GENERATION] = ""},
     NULL},
    {"llama-3",
     {[SYSTEM] = "<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
      [USER] = "<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
      [ASSISTANT] = "<|start_header_id|>assistant<|end_header_id|>\n\n{content}<|eot_id|>",
      [GENERATION] = "<|start_header_id|>assistant<|end_header_id|>\n\n"},
     NULL},
    {"chatml",
     {[SYSTEM] = "<|im_start|>system\n{content}<|im_end|>\n",
      [USER] = "<|im_start|>user\n{content}<|im_end|>\n",
      [ASSISTANT] = "<|im_start|>assistant\n{content}<|im_end|>\n",
      [GENERATION] = "<|im_start|>assistant\n"},
     NULL},
    {"mistral",
     {[USER] = "[INST] {content} [/INST]", [ASSISTANT] = " {content}</s>", [GENERATION] = ""},
     NULL},
};
enum { N_BUILTINS = sizeof builtins / sizeof *builtins };

/* ---- opening ---- */

static bool has_content(const char *text) {
    return text && strstr(text, "{content}");
}

static gn_status add_stop(gn_chat_template *c, const char *text, size_t len) {
    for (int i = 0; i < c->n_stops; i++)
        if (strlen(c->stops[i]) == len && !memcmp(c->stops[i], text, len)) return GN_OK;
    char **stops = realloc(c->stops, ((size_t)c->n_stops + 1) * sizeof *stops);
    if (!stops) return GN_ENOMEM;
    c->stops = stops;
    char *copy = strndup(text, len);
    if (!copy) return GN_ENOMEM;
    stops[c->n_stops++] = copy;
    return GN_OK;
}

/* The marker that ends the assistant's turn: a model whose tokenizer lacks it writes it as text. */
static gn_status add_marker(gn_chat_template *c) {
    const char *at = strstr(c->text[ASSISTANT], "{content}") + strlen("{content}");
    at += strspn(at, " ");
    const size_t len = strcspn(at, "> \n");
    if (*at != '<' || at[len] != '>' || !strncmp(at, "</s>", 4)) return GN_OK;
    return add_stop(c, at, len + 1);
}

static gn_status set_text(gn_chat_template *c, int key, const char *text) {
    free(c->text[key]);
    c->text[key] = strdup(text);
    return c->text[key] ? GN_OK : GN_ENOMEM;
}

static gn_status use_builtin(gn_chat_template *c, int which) {
    gn_status status = GN_OK;
    for (int k = 0; k < TEXT_COUNT && !status; k++)
        if (builtins[which].text[k]) status = set_text(c, k, builtins[which].text[k]);
    if (!status && builtins[which].stop)
        status = add_stop(c, builtins[which].stop, strlen(builtins[which].stop));
    return status;
}

static gn_status read_stops(gn_chat_template *c, const cJSON *array, const char *path,
                            gn_error *err) {
    const cJSON *item = NULL;
    if (!cJSON_IsArray(array))
        return gn_fail(err, GN_EFORMAT, "%s: \"stop\" must be an array of strings", path);
    cJSON_ArrayForEach(item, array) {
        const char *text = cJSON_GetStringValue(item);
        if (!text || !*text)
            return gn_fail(err, GN_EFORMAT, "%s: \"stop\" must hold strings that are not empty",
                           path);
        if (add_stop(c, text, strlen(text))) return gn_fail(err, GN_ENOMEM, "out of memory");
    }
    return GN_OK;
}

static gn_status read_entry(gn_chat_template *c, const cJSON *entry, const char *path,
                            gn_error *err) {
    if (!strcmp(entry->string, "stop")) return read_stops(c, entry, path, err);
    for (int k = 0; k < TEXT_COUNT; k++) {
        if (strcmp(entry->string, text_keys[k].name)) continue;
        if (!cJSON_IsString(entry))
            return gn_fail(err, GN_EFORMAT, "%s: \"%s\" must be a string", path, entry->string);
        return set_text(c, k, entry->valuestring) ? gn_fail(err, GN_ENOMEM, "out of memory")
                                                  : GN_OK;
    }
    return gn_fail(err, GN_EFORMAT,
                   "%s: unknown key \"%.64s\"; a chat template has system, default_system, user, "
                   "user_with_system, assistant, generation, stop",
                   path, entry->string);
}

static gn_status check_file(const gn_chat_template *c, const char *path, gn_error *err) {
    for (int k = 0; k < TEXT_COUNT; k++) {
        const char *name = text_keys[k].name;
        if (!c->text[k] && text_keys[k].required)
            return gn_fail(err, GN_EFORMAT, "%s: \"%s\" is missing", path, name);
        if (c->text[k] && text_keys[k].content && !has_content(c->text[k]))
            return gn_fail(err, GN_EFORMAT, "%s: \"%s\" must contain {content}", path, name);
    }
    const char *system = c->text[SYSTEM], *with_system = c->text[USER_WITH_SYSTEM];
    if (with_system && !strstr(with_system, "{system}"))
        return gn_fail(err, GN_EFORMAT, "%s: \"user_with_system\" must contain {system}", path);
    if (with_system && has_content(system))
        return gn_fail(err, GN_EFORMAT,
                       "%s: \"user_with_system\" has no use beside a \"system\" with {content}",
                       path);
    if (c->text[DEFAULT_SYSTEM] && system && *system && !has_content(system))
        return gn_fail(err, GN_EFORMAT,
                       "%s: \"system\" without {content} is a default text already; leave out "
                       "\"default_system\", or put {content} into \"system\"",
                       path);
    return GN_OK;
}

static gn_status use_file(gn_chat_template *c, const char *path, gn_error *err) {
    cJSON *json;
    gn_status status = gn_json_read(&json, path, err);
    if (status) return status;
    for (const cJSON *entry = json->child; entry && !status; entry = entry->next)
        status = read_entry(c, entry, path, err);
    cJSON_Delete(json);
    return status ? status : check_file(c, path, err);
}

static int find_builtin(const char *name) {
    for (int i = 0; i < N_BUILTINS; i++)
        if (!strcmp(builtins[i].name, name)) return i;
    return -1;
}

static gn_status use_source(gn_chat_template *c, const char *source, gn_error *err) {
    const int which = find_builtin(source);
    if (which >= 0) return use_builtin(c, which) ? gn_fail(err, GN_ENOMEM, "out of memory") : GN_OK;
    if (access(source, F_OK))
        return gn_fail(err, GN_ENOENT,
                       "chat template '%s' is neither a file nor one of guanaco, vicuna, alpaca, "
                       "llama-2, llama-3, chatml, mistral",
                       source);
    return use_file(c, source, err);
}

static gn_status use_folder(gn_chat_template *c, const char *dir, gn_error *err) {
    char *path;
    if (asprintf(&path, "%s/chat_template.json", dir) < 0)
        return gn_fail(err, GN_ENOMEM, "out of memory");
    const gn_status status = use_source(c, access(path, F_OK) ? "guanaco" : path, err);
    free(path);
    return status;
}

gn_status gn_chat_template_open(gn_chat_template **out, const char *source, const char *dir,
                                gn_error *err) {
    *out = NULL;
    gn_chat_template *c = calloc(1, sizeof *c);
    if (!c) return gn_fail(err, GN_ENOMEM, "out of memory");
    gn_status status = source ? use_source(c, source, err) : use_folder(c, dir, err);
    if (!status && add_marker(c)) status = gn_fail(err, GN_ENOMEM, "out of memory");
    if (status) {
        gn_chat_template_close(c);
        return status;
    }
    *out = c;
    return GN_OK;
}

void gn_chat_template_close(gn_chat_template *c) {
    if (!c) return;
    for (int k = 0; k < TEXT_COUNT; k++) free(c->text[k]);
    for (int i = 0; i < c->n_stops; i++) free(c->stops[i]);
    free(c->stops);
    free(c);
}

const char *const *gn_chat_template_stops(const gn_chat_template *c, int *n) {
    *n = c->n_stops;
    return (const char *const *)c->stops;
}

/* ---- encoding ---- */

typedef struct slice {
    const char *data;
    size_t len;
} slice;

typedef struct buffer {
    char *data;
    size_t len, room;
} buffer;

/* A prompt in the making. After the first failure the functions below do nothing. */
typedef struct prompt {
    const gn_chat_template *c;
    const gn_tokenizer *t;
    buffer run;     /* text since the last control piece */
    buffer pending; /* system text that waits for a user message */
    bool training;
    bool learning; /* what is written now is learned */
    buffer marks;  /* (run.len) with training: which bytes of the run are learned */
    int32_t *ids;
    bool *learned; /* (n) with training */
    size_t n, room;
    gn_status status;
    gn_error *err;
} prompt;

static slice slice_of(const char *text) {
    return (slice){text, strlen(text)};
}

static void fail(prompt *p, gn_status status, const char *what) {
    if (!p->status) p->status = gn_fail(p->err, status, "chat prompt: %s", what);
}

static void append(prompt *p, buffer *b, const char *data, size_t len) {
    if (p->status) return;
    if (len > SIZE_MAX / 4 - b->len) return fail(p, GN_ETOOBIG, "too long");
    if (b->len + len >= b->room) {
        const size_t room = 2 * (b->len + len) + 64;
        char *grown = realloc(b->data, room);
        if (!grown) return fail(p, GN_ENOMEM, "out of memory");
        b->data = grown;
        b->room = room;
    }
    memcpy(b->data + b->len, data, len);
    b->len += len;
}

static void grow_ids(prompt *p, size_t n) {
    if (p->status || p->n + n <= p->room) return;
    const size_t room = 2 * (p->n + n) + 64;
    int32_t *ids = realloc(p->ids, room * sizeof *ids);
    if (!ids) return fail(p, GN_ENOMEM, "out of memory");
    p->ids = ids;
    if (p->training) {
        bool *learned = realloc(p->learned, room * sizeof *learned);
        if (!learned) return fail(p, GN_ENOMEM, "out of memory");
        p->learned = learned;
    }
    p->room = room;
}

/* begins (n): where in the run each token begins; NULL: the tokens are control pieces. */
static void push_ids(prompt *p, const int32_t *ids, const int32_t *begins, size_t n) {
    if (p->status || n == 0) return;
    if (n > (size_t)INT32_MAX - p->n) return fail(p, GN_ETOOBIG, "too many tokens");
    grow_ids(p, n);
    if (p->status) return;
    memcpy(p->ids + p->n, ids, n * sizeof *ids);
    for (size_t i = 0; p->training && i < n; i++)
        p->learned[p->n + i] = begins ? p->marks.data[begins[i]] : p->learning;
    p->n += n;
}

static void add_run(prompt *p, const char *text, size_t len) {
    append(p, &p->run, text, len);
    if (!p->training || p->status) return;
    append(p, &p->marks, text, len);
    if (!p->status) memset(p->marks.data + p->marks.len - len, p->learning, len);
}

static void end_run(prompt *p) {
    if (p->status || p->run.len == 0) return;
    int32_t *ids, *begins = NULL, n;
    p->status = p->training ? gn_tokenizer_encode_places(p->t, p->run.data, p->run.len, &ids,
                                                         &begins, &n, p->err)
                            : gn_tokenizer_encode(p->t, p->run.data, p->run.len, &ids, &n, p->err);
    if (p->status) return;
    push_ids(p, ids, begins, (size_t)n);
    free(ids);
    free(begins);
    p->run.len = p->marks.len = 0;
}

/* The length of the control piece that text begins with, or 0. */
static size_t control_piece(const gn_tokenizer *t, const char *text, size_t len, int32_t *id) {
    enum { LONGEST = 64 };
    if (*text != '<' && *text != '[') return 0;
    const char close = *text == '<' ? '>' : ']';
    for (size_t i = 1; i < len && i < LONGEST; i++) {
        if (text[i] != close) continue;
        *id = gn_tokenizer_special(t, text, i + 1);
        if (*id >= 0) return i + 1;
    }
    return 0;
}

static void add_literal(prompt *p, const char *text, size_t len) {
    size_t start = 0;
    int32_t id;
    for (size_t i = 0; i < len;) {
        const size_t piece = control_piece(p->t, text + i, len - i, &id);
        if (piece == 0) {
            i++;
            continue;
        }
        add_run(p, text + start, i - start);
        end_run(p);
        push_ids(p, &id, NULL, 1);
        start = i += piece;
    }
    add_run(p, text + start, len - start);
}

/* After an assistant's turn that no control piece ended, what the model has to write last is the
 * stop string that opens the next text. Writes it, and returns its length. */
static size_t add_learned_stop(prompt *p, const char *text) {
    const size_t literal = strcspn(text, "{");
    size_t longest = 0;
    for (int i = 0; i < p->c->n_stops; i++) {
        const size_t len = strlen(p->c->stops[i]);
        if (len <= literal && len > longest && !memcmp(text, p->c->stops[i], len)) longest = len;
    }
    if (p->learning)
        add_literal(p, text, longest);
    else
        longest = 0;
    p->learning = false;
    return longest;
}

static void add_text(prompt *p, text_key key, slice system, slice content) {
    static const char content_mark[] = "{content}", system_mark[] = "{system}";
    const char *start = p->c->text[key];
    start += add_learned_stop(p, start);
    const char *at = start;
    while ((at = strchr(at, '{')) != NULL) {
        const bool is_content = !strncmp(at, content_mark, sizeof content_mark - 1);
        const bool is_system =
            key == USER_WITH_SYSTEM && !strncmp(at, system_mark, sizeof system_mark - 1);
        if (!is_content && !is_system) {
            at++;
            continue;
        }
        const slice value = is_content ? content : system;
        add_literal(p, start, (size_t)(at - start));
        add_run(p, value.data, value.len);
        at += is_content ? sizeof content_mark - 1 : sizeof system_mark - 1;
        start = at;
    }
    add_literal(p, start, strlen(start));
}

/* The length of text up to the end of the first control piece in it, or 0. */
static size_t turn_end(const gn_tokenizer *t, const char *text) {
    const size_t len = strlen(text);
    int32_t id;
    for (size_t i = 0; i < len; i++) {
        const size_t piece = control_piece(t, text + i, len - i, &id);
        if (piece > 0) return i + piece;
    }
    return 0;
}

/* `last`: of a conversation to learn from, which ends where the assistant's turn does. */
static void add_assistant(prompt *p, const char *content, bool learn, bool last) {
    const char *text = p->c->text[ASSISTANT], *generation = p->c->text[GENERATION];
    const char *value = strstr(text, "{content}"), *rest = value + strlen("{content}");
    const size_t before = (size_t)(value - text), prompted = strlen(generation);
    const bool is_prefix = prompted <= before && !memcmp(text, generation, prompted);
    const size_t given = is_prefix ? prompted : before, end = turn_end(p->t, rest);
    p->learning = false;
    add_literal(p, text, given);
    p->learning = learn;
    add_literal(p, text + given, before - given);
    add_run(p, content, strlen(content));
    if (end > 0) {
        add_literal(p, rest, end);
        p->learning = false;
        if (!last) add_literal(p, rest + end, strlen(rest + end));
        return;
    }
    size_t len = strlen(rest);
    while (last && len > 0 && strchr(" \t\r\n", rest[len - 1])) len--;
    add_literal(p, rest, len);
    if (!last) return;
    end_run(p);
    const int32_t eos = gn_tokenizer_eos(p->t);
    if (eos >= 0) push_ids(p, &eos, NULL, 1);
}

static void add_system(prompt *p, const char *text) {
    const slice none = {"", 0}, content = slice_of(text);
    if (content.len == 0) return;
    if (has_content(p->c->text[SYSTEM])) return add_text(p, SYSTEM, none, content);
    if (p->pending.len > 0) append(p, &p->pending, "\n\n", 2);
    append(p, &p->pending, content.data, content.len);
}

static void add_user(prompt *p, const char *text) {
    const slice none = {"", 0};
    slice content = slice_of(text);
    if (p->pending.len == 0) return add_text(p, USER, none, content);
    if (p->c->text[USER_WITH_SYSTEM]) {
        add_text(p, USER_WITH_SYSTEM, (slice){p->pending.data, p->pending.len}, content);
    } else {
        if (content.len > 0) append(p, &p->pending, "\n\n", 2);
        append(p, &p->pending, content.data, content.len);
        add_text(p, USER, none, (slice){p->pending.data, p->pending.len});
    }
    p->pending.len = 0;
}

static bool is_system(const gn_message *m) {
    return !strcmp(m->role, "system") || !strcmp(m->role, "developer");
}

static void add_default(prompt *p) {
    const char *system = p->c->text[SYSTEM];
    if (system && !has_content(system)) add_literal(p, system, strlen(system));
    if (p->c->text[DEFAULT_SYSTEM]) add_system(p, p->c->text[DEFAULT_SYSTEM]);
}

static void add_conversation(prompt *p, const gn_message *messages, const bool *learn, int n) {
    bool system = false;
    for (int i = 0; i < n; i++) system = system || is_system(&messages[i]);
    if (!system) add_default(p);
    for (int i = 0; i < n; i++) {
        const gn_message *m = &messages[i];
        if (is_system(m))
            add_system(p, m->content);
        else if (!strcmp(m->role, "user"))
            add_user(p, m->content);
        else
            add_assistant(p, m->content, !learn || learn[i], p->training && i == n - 1);
    }
    if (p->pending.len > 0) add_user(p, "");
    if (!p->training) add_literal(p, p->c->text[GENERATION], strlen(p->c->text[GENERATION]));
    end_run(p);
}

static gn_status check_messages(const gn_message *messages, int n, gn_error *err) {
    if (n < 1) return gn_fail(err, GN_EINVAL, "messages: a conversation needs at least one");
    for (int i = 0; i < n; i++) {
        const gn_message *m = &messages[i];
        if (!m->role) return gn_fail(err, GN_EINVAL, "messages[%d]: no role", i);
        if (!is_system(m) && strcmp(m->role, "user") && strcmp(m->role, "assistant"))
            return gn_fail(err, GN_EINVAL,
                           "messages[%d]: role '%.64s'; must be system, developer, user or "
                           "assistant",
                           i, m->role);
        if (!m->content) return gn_fail(err, GN_EINVAL, "messages[%d]: no content", i);
    }
    return GN_OK;
}

static gn_status encode(prompt *p, const gn_message *messages, const bool *learn, int n_messages) {
    gn_status status = check_messages(messages, n_messages, p->err);
    if (status) return status;
    const int32_t bos = gn_tokenizer_bos(p->t);
    if (bos >= 0) push_ids(p, &bos, NULL, 1);
    add_conversation(p, messages, learn, n_messages);
    free(p->run.data);
    free(p->pending.data);
    free(p->marks.data);
    if (p->status) {
        free(p->ids);
        free(p->learned);
    }
    return p->status;
}

gn_status gn_chat_template_encode(const gn_chat_template *c, const gn_tokenizer *t,
                                  const gn_message *messages, int n_messages, int32_t **ids,
                                  int32_t *n, gn_error *err) {
    *ids = NULL;
    *n = 0;
    prompt p = {.c = c, .t = t, .err = err};
    const gn_status status = encode(&p, messages, NULL, n_messages);
    if (status) return status;
    *ids = p.ids;
    *n = (int32_t)p.n;
    return GN_OK;
}

gn_status gn_chat_template_encode_learned(const gn_chat_template *c, const gn_tokenizer *t,
                                          const gn_message *messages, const bool *learn,
                                          int n_messages, int32_t **ids, bool **learned, int32_t *n,
                                          gn_error *err) {
    *ids = NULL;
    *learned = NULL;
    *n = 0;
    prompt p = {.c = c, .t = t, .training = true, .err = err};
    const gn_status status = encode(&p, messages, learn, n_messages);
    if (status) return status;
    *ids = p.ids;
    *learned = p.learned;
    *n = (int32_t)p.n;
    return GN_OK;
}

void gn_chat_template_add_to_hash(const gn_chat_template *c, gn_hash *hash) {
    for (int k = 0; k < TEXT_COUNT; k++) {
        const slice text = slice_of(c->text[k] ? c->text[k] : "");
        gn_hash_add(hash, text.data, text.len + (c->text[k] != NULL));
    }
    for (int i = 0; i < c->n_stops; i++) gn_hash_add(hash, c->stops[i], strlen(c->stops[i]));
}
