/* chat_cli.c - a chat in the terminal: the same engine as the server's, without the server.
 *
 * Replies, and nothing else, go to stdout, so that `echo question | guanaco-server chat` can be
 * used in a pipe; what is said about the chat goes to stderr. */
#include "server/chat_cli.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "engine/options.h"
#include "server/chat_terminal.h"
#include "server/registry.h"

typedef struct settings {
    float temperature, top_p, min_p, typical_p;
    float repetition_penalty, presence_penalty, frequency_penalty;
    int top_k, max_tokens;
    int64_t seed;
} settings;

typedef struct chat_options {
    settings sampling;
    const char *model, *chat_template, *device, *system;
    gn_strings adapters;
    int quant, compute, kv_dtype, threads, context;
    int64_t memory_budget;
    bool double_quant;
} chat_options;

#define SETTING(kind, name, field, ...)                                                            \
    { kind, name, offsetof(chat_options, sampling.field), __VA_ARGS__ }

/* The same rows serve the command line and /set. */
#define SETTINGS                                                                                   \
    SETTING(GN_OPT_FLOAT, "temperature", temperature, .initial = "0.7", .min = 0, .max = 100,      \
            .help = "0 always takes the likeliest token"),                                         \
        SETTING(GN_OPT_FLOAT, "top-p", top_p, .initial = "0.9", .min = 1e-6, .max = 1,             \
                .help = "sample from the likeliest tokens that hold this probability"),            \
        SETTING(GN_OPT_INT, "top-k", top_k, .initial = "0", .min = 0, .max = 1 << 30,              \
                .help = "sample from that many tokens; 0: from all"),                              \
        SETTING(GN_OPT_FLOAT, "min-p", min_p, .initial = "0", .min = 0, .max = 1,                  \
                .help = "drop tokens less likely than this share of the likeliest"),               \
        SETTING(GN_OPT_FLOAT, "typical-p", typical_p, .initial = "1", .min = 1e-6, .max = 1,       \
                .help = "locally typical sampling; 1: off"),                                       \
        SETTING(GN_OPT_FLOAT, "repetition-penalty", repetition_penalty, .initial = "1",            \
                .min = 0.01, .max = 100, .help = "1: off"),                                        \
        SETTING(GN_OPT_FLOAT, "presence-penalty", presence_penalty, .initial = "0", .min = -2,     \
                .max = 2, .help = "0: off"),                                                       \
        SETTING(GN_OPT_FLOAT, "frequency-penalty", frequency_penalty, .initial = "0", .min = -2,   \
                .max = 2, .help = "0: off"),                                                       \
        SETTING(GN_OPT_INT, "max-tokens", max_tokens, .initial = "512", .min = 1, .max = 1 << 20,  \
                .help = "of one reply"),                                                           \
        SETTING(GN_OPT_INT64, "seed", seed, .initial = "-1",                                       \
                .help = "the same seed and chat give the same reply; -1: another every time")

static const gn_option setting_table[] = {SETTINGS, GN_OPTION_END};

static const gn_option table[] = {
    GN_OPTION_GROUP("Model"),
    {GN_OPT_STRING, "model", offsetof(chat_options, model), .value = "DIR", .help = "model folder"},
    {GN_OPT_LIST, "adapter", offsetof(chat_options, adapters), .value = "NAME=DIR",
     .help = "an adapter to choose with /adapter; a single one is used from the start"},
    {GN_OPT_CHOICE, "quant-type", offsetof(chat_options, quant), .initial = "nf4",
     .choices = "none|nf4|fp4|fp4-e2m1|fp4-e3m0|int4|int8", .value = "TYPE",
     .help = "how 16- and 32-bit weights are quantized while loading; none: not at all"},
    {GN_OPT_BOOL, "double-quant", offsetof(chat_options, double_quant), .initial = "true",
     .help = "quantize the scales of 4-bit types, too"},
    {GN_OPT_CHOICE, "compute-dtype", offsetof(chat_options, compute), .initial = "auto",
     .choices = "auto|float32|bfloat16", .value = "TYPE",
     .help = "what products multiply: float32, bfloat16, or auto for the faster one"},
    {GN_OPT_STRING, "device", offsetof(chat_options, device), .initial = "auto", .value = "DEVICE",
     .help = "where to compute: auto (a GPU if there is one), cpu, cuda or cuda:N"},
    {GN_OPT_INT, "threads", offsetof(chat_options, threads), .initial = "0", .min = 0, .max = 4096,
     .help = "0: as many as there are cores"},
    {GN_OPT_INT, "context", offsetof(chat_options, context), .initial = "0", .min = 0,
     .max = 1 << 24, .help = "tokens of a conversation; 0: what the model can take"},
    {GN_OPT_SIZE, "memory-budget", offsetof(chat_options, memory_budget), .value = "SIZE",
     .help = "of the GPU's memory, for everything together; on a CPU for keys and values, adapters "
             "and activations, not for weights. Prints how it is divided"},
    {GN_OPT_CHOICE, "kv-dtype", offsetof(chat_options, kv_dtype), .initial = "auto",
     .choices = GN_KV_CHOICES, .value = "TYPE", .help = GN_KV_HELP},
    {GN_OPT_STRING, "chat-template", offsetof(chat_options, chat_template), .value = "NAME|FILE",
     .help = "guanaco, vicuna, alpaca, llama-2, llama-3, chatml, mistral, or a JSON file; default: "
             "the model's own"},
    GN_OPTION_GROUP("Chat"),
    {GN_OPT_STRING, "system", offsetof(chat_options, system), .value = "TEXT",
     .help = "system message"},
    SETTINGS,
    GN_OPTION_END};

static const char usage[] = "usage: guanaco-server chat --model DIR [--adapter NAME=DIR]... "
                            "[options]\n";

static const char command_help[] = "  /adapter NAME|none   answer with this adapter, or with none\n"
                                   "  /adapters            the adapters there are\n"
                                   "  /system TEXT         the system message; without TEXT: none\n"
                                   "  /reset               forget the conversation\n"
                                   "  /set NAME VALUE      change a setting; alone: show all\n"
                                   "  /help                this\n"
                                   "  /quit                leave\n"
                                   "  Ctrl-C stops a reply; pressed twice it leaves\n";

typedef struct chat {
    chat_options options;
    gn_terminal terminal;
    gn_model *model;
    gn_engine *engine;
    gn_registry adapters;
    char *adapter;     /* the name of the one in use; NULL: none */
    char *system;      /* or NULL */
    gn_message *turns; /* user and assistant in turn; contents are owned */
    int n_turns;
    uint64_t replies; /* given so far: makes seeds differ */
    uint64_t start;   /* the seed of this run */
    int percent;      /* of loading, as last shown */
    gn_error *err;
} chat;

static void print_error(const gn_error *err) {
    fprintf(stderr, "chat: %s\n", err->message);
}

/* ---- the conversation ---- */

static void drop_turns(chat *c, int first, int n) {
    if (n == 0) return;
    for (int i = first; i < first + n; i++) free((char *)c->turns[i].content);
    memmove(c->turns + first, c->turns + first + n,
            (size_t)(c->n_turns - first - n) * sizeof *c->turns);
    c->n_turns -= n;
}

/* content is taken over, also when memory is short. */
static gn_status add_turn_take(chat *c, const char *role, char *content) {
    gn_message *turns = realloc(c->turns, ((size_t)c->n_turns + 1) * sizeof *turns);
    if (turns) c->turns = turns;
    if (!turns || !content) {
        free(content);
        return gn_fail(c->err, GN_ENOMEM, "out of memory");
    }
    c->turns[c->n_turns++] = (gn_message){role, content};
    return GN_OK;
}

static gn_status encode_all(const chat *c, int32_t **ids, int32_t *n) {
    const int first = c->system ? 1 : 0;
    gn_message *messages = malloc(((size_t)c->n_turns + 1) * sizeof *messages);
    if (!messages) return gn_fail(c->err, GN_ENOMEM, "out of memory");
    if (c->system) messages[0] = (gn_message){"system", c->system};
    memcpy(messages + first, c->turns, (size_t)c->n_turns * sizeof *messages);
    const gn_status status = gn_chat_encode(c->model, messages, c->n_turns + first, ids, n, c->err);
    free(messages);
    return status;
}

/* The prompt of the conversation; old turns are forgotten until a reply has a quarter of the
 * context, or what it may need. */
static gn_status encode_prompt(chat *c, int32_t **ids, int32_t *n) {
    const int context = gn_engine_read_stats(c->engine).context;
    const int wanted = c->options.sampling.max_tokens;
    const int room = wanted < context / 4 ? wanted : context / 4;
    bool forgot = false;
    for (;;) {
        const gn_status status = encode_all(c, ids, n);
        if (status) return status;
        if (*n + room <= context || c->n_turns < 3) break;
        free(*ids);
        drop_turns(c, 0, 2);
        forgot = true;
    }
    if (forgot) fprintf(stderr, "(the beginning of the conversation no longer fits; forgotten)\n");
    return GN_OK;
}

/* ---- a reply ---- */

static gn_status submit(chat *c, uint64_t *id) {
    const settings *s = &c->options.sampling;
    const gn_registered *adapter = c->adapter ? gn_registry_find(&c->adapters, c->adapter) : NULL;
    int32_t *prompt, n_prompt;
    gn_status status = encode_prompt(c, &prompt, &n_prompt);
    if (status) return status;
    gn_request request = {
        .prompt = prompt,
        .n_prompt = n_prompt,
        .n_adapters = adapter ? 1 : 0,
        .sampling = {.temperature = s->temperature,
                     .top_k = s->top_k,
                     .top_p = s->top_p,
                     .min_p = s->min_p,
                     .typical_p = s->typical_p,
                     .repetition_penalty = s->repetition_penalty,
                     .presence_penalty = s->presence_penalty,
                     .frequency_penalty = s->frequency_penalty,
                     .seed = s->seed < 0 ? c->start + c->replies : (uint64_t)s->seed},
        .max_tokens = s->max_tokens,
        .logprobs = -1,
        .strip_space = true,
        .on_event = gn_terminal_on_event,
        .user = &c->terminal};
    if (adapter) request.adapters[0] = (gn_adapter_use){adapter->adapter, 1};
    request.stop = gn_chat_stops(c->model, &request.n_stop);
    gn_terminal_expect(&c->terminal);
    status = gn_engine_submit(c->engine, &request, id, c->err);
    free(prompt);
    return status;
}

/* Prints the reply as it comes and keeps it. *interrupts counts how often Ctrl-C was pressed. */
static gn_status receive(chat *c, uint64_t id, int *interrupts) {
    char *reply = NULL, *text;
    size_t length = 0;
    FILE *kept = open_memstream(&reply, &length);
    if (!kept) gn_engine_cancel(c->engine, id);
    bool interrupted, more = true;
    while (more) {
        more = gn_terminal_next_text(&c->terminal, &text, &interrupted);
        if (text) {
            fputs(text, stdout);
            fflush(stdout);
            if (kept) fputs(text, kept);
            free(text);
        }
        if (interrupted && ++*interrupts == 1) gn_engine_cancel(c->engine, id);
    }
    putchar('\n');
    fflush(stdout);
    if (kept) fclose(kept);
    const gn_status status = add_turn_take(c, "assistant", reply);
    if (status || c->terminal.finish != GN_FINISH_ERROR) return status;
    drop_turns(c, c->n_turns - 1, 1);
    return gn_fail(c->err, GN_EDEVICE, "%s", c->terminal.error.message);
}

/* Answers what the user said; a question without an answer is forgotten. */
static gn_status answer(chat *c, const char *line, int *interrupts) {
    uint64_t id = 0;
    gn_status status = add_turn_take(c, "user", strdup(line));
    if (status) return status;
    status = submit(c, &id);
    if (!status) status = receive(c, id, interrupts);
    if (status && c->n_turns % 2) drop_turns(c, c->n_turns - 1, 1);
    c->replies++;
    if (!status && c->terminal.interactive && c->terminal.finish == GN_FINISH_LENGTH)
        fprintf(stderr, "(cut: the reply reached its limit; /set max-tokens N)\n");
    return status;
}

/* ---- commands ---- */

static gn_status replace_string(char **field, const char *text, gn_error *err) {
    char *copy = text ? strdup(text) : NULL;
    if (text && !copy) return gn_fail(err, GN_ENOMEM, "out of memory");
    free(*field);
    *field = copy;
    return GN_OK;
}

static gn_status choose_adapter(chat *c, const char *name) {
    if (!*name) {
        fprintf(stderr, "%s\n", c->adapter ? c->adapter : "none");
        return GN_OK;
    }
    if (strcmp(name, "none") == 0) return replace_string(&c->adapter, NULL, c->err);
    if (!gn_registry_find(&c->adapters, name))
        return gn_fail(c->err, GN_ENOENT, "no adapter named '%.100s' (/adapters lists them)", name);
    return replace_string(&c->adapter, name, c->err);
}

static void list_adapters(const chat *c) {
    if (c->adapters.n == 0) fprintf(stderr, "none (start with --adapter NAME=DIR)\n");
    for (int i = 0; i < c->adapters.n; i++) {
        const gn_registered *a = &c->adapters.items[i];
        const bool used = c->adapter && strcmp(c->adapter, a->name) == 0;
        fprintf(stderr, "%s %s  %s\n", used ? "*" : " ", a->name, a->dir);
    }
}

static void show_settings(const settings *s) {
    fprintf(stderr,
            "temperature %g, top-p %g, top-k %d, min-p %g, typical-p %g,\n"
            "repetition-penalty %g, presence-penalty %g, frequency-penalty %g,\n"
            "max-tokens %d, seed %lld\n",
            s->temperature, s->top_p, s->top_k, s->min_p, s->typical_p, s->repetition_penalty,
            s->presence_penalty, s->frequency_penalty, s->max_tokens, (long long)s->seed);
}

static gn_status change_setting(chat *c, char *rest) {
    char *value = rest + strcspn(rest, " =");
    if (!*rest) {
        show_settings(&c->options.sampling);
        return GN_OK;
    }
    if (*value) *value++ = '\0';
    value += strspn(value, " =");
    return gn_options_set(setting_table, &c->options, rest, value, c->err);
}

/* A line that begins with a slash. *quit is set by /quit. */
static gn_status run_command(chat *c, char *line, bool *quit) {
    char *rest = line + strcspn(line, " ");
    if (*rest) *rest++ = '\0';
    rest += strspn(rest, " ");
    if (strcmp(line, "/adapter") == 0) return choose_adapter(c, rest);
    if (strcmp(line, "/system") == 0)
        return replace_string(&c->system, *rest ? rest : NULL, c->err);
    if (strcmp(line, "/set") == 0) return change_setting(c, rest);
    if (strcmp(line, "/adapters") == 0)
        list_adapters(c);
    else if (strcmp(line, "/reset") == 0)
        drop_turns(c, 0, c->n_turns);
    else if (strcmp(line, "/help") == 0)
        fputs(command_help, stderr);
    else if (strcmp(line, "/quit") == 0 || strcmp(line, "/exit") == 0)
        *quit = true;
    else
        return gn_fail(c->err, GN_EINVAL, "unknown command %.50s (/help lists them)", line);
    return GN_OK;
}

/* ---- the loop ---- */

static void prompt_user(const chat *c) {
    if (!c->terminal.interactive) return;
    const char *name = c->adapter ? c->adapter : "";
    if (c->terminal.colour)
        fprintf(stderr, "\033[1;32m%s>\033[0m ", name);
    else
        fprintf(stderr, "%s> ", name);
    fflush(stderr);
}

/* Whether the chat goes on after this line. In a pipe, the first failure ends it. */
static bool handle_line(chat *c, char *line, int *interrupts, gn_status *status) {
    bool quit = false;
    const size_t length = strcspn(line, "\r");
    line[length] = '\0';
    if (line[strspn(line, " \t")] == '\0') return true;
    *interrupts = 0;
    *status = line[0] == '/' ? run_command(c, line, &quit) : answer(c, line, interrupts);
    if (*status) print_error(c->err);
    return !quit && *interrupts < 2 && (c->terminal.interactive || !*status);
}

static gn_status converse(chat *c) {
    gn_status status = GN_OK;
    int interrupts = 0;
    for (bool more = true; more;) {
        char *line = NULL;
        prompt_user(c);
        switch (gn_terminal_read_line(&c->terminal, &line)) {
        case GN_WAKE_LINE: more = handle_line(c, line, &interrupts, &status); break;
        case GN_WAKE_END: more = false; break;
        case GN_WAKE_INTERRUPT:
            more = c->terminal.interactive && ++interrupts < 2;
            if (more) fprintf(stderr, "\n(Ctrl-C again, or /quit, leaves)\n");
            break;
        }
        free(line);
    }
    if (c->terminal.interactive) fputc('\n', stderr);
    return c->terminal.interactive ? GN_OK : status;
}

/* ---- start and end ---- */

/* Ctrl-C ends the program while it loads: there is nothing to clean up that the system does not. */
static void show_loading(void *user, int64_t done, int64_t total) {
    chat *c = user;
    const int percent = total > 0 ? (int)(100 * (done / 4096) / (total / 4096 + 1)) : 100;
    if (gn_terminal_interrupted(&c->terminal)) _exit(130);
    if (percent == c->percent || !isatty(STDERR_FILENO)) return;
    c->percent = percent;
    fprintf(stderr, "\r\033[Kloading: %d %%", percent);
    fflush(stderr);
}

static gn_status add_adapter(chat *c, const char *spec) {
    char name[129];
    const char *equals = strchr(spec, '=');
    const size_t length = equals ? (size_t)(equals - spec) : 0;
    if (length == 0 || length >= sizeof name || !equals[1])
        return gn_fail(c->err, GN_EINVAL, "--adapter: expected NAME=DIR, found '%.100s'", spec);
    memcpy(name, spec, length);
    name[length] = '\0';
    if (!gn_registry_name_ok(name) || strcmp(name, "none") == 0)
        return gn_fail(c->err, GN_EINVAL, "--adapter: '%s' cannot be an adapter's name", name);
    if (gn_registry_find(&c->adapters, name))
        return gn_fail(c->err, GN_EEXIST, "--adapter: '%s' is given twice", name);
    gn_adapter *adapter;
    gn_status status = gn_adapter_open(&adapter, c->model, equals + 1, c->err);
    if (status) return status;
    status = gn_registry_put(&c->adapters, name, equals + 1, adapter, time(NULL));
    return status ? gn_fail(c->err, status, "out of memory") : GN_OK;
}

/* The engine plans memory for the adapters that there are. */
static gn_status open_engine(chat *c) {
    gn_adapter **adapters = calloc((size_t)c->adapters.n + 1, sizeof *adapters);
    if (!adapters) return gn_fail(c->err, GN_ENOMEM, "out of memory");
    for (int i = 0; i < c->adapters.n; i++) adapters[i] = c->adapters.items[i].adapter;
    const gn_engine_options options = {.max_seqs = 1,
                                       .context = c->options.context,
                                       .memory_bytes = c->options.memory_budget,
                                       .kv_dtype = (gn_kv_dtype)c->options.kv_dtype,
                                       .adapter_bytes = c->adapters.n > 0 ? 0 : -1,
                                       .adapters = adapters,
                                       .n_adapters = c->adapters.n};
    const gn_status status = gn_engine_open(&c->engine, c->model, &options, c->err);
    free(adapters);
    if (status || c->options.memory_budget == 0) return status;
    const gn_memory_plan plan = gn_engine_memory(c->engine);
    char *table = gn_memory_plan_text(&plan);
    if (table) fputs(table, stderr);
    free(table);
    return GN_OK;
}

static gn_status open_all(chat *c) {
    const chat_options *o = &c->options;
    if (!o->model) return gn_fail(c->err, GN_EINVAL, "--model DIR is missing");
    const gn_model_options model = {.device = o->device,
                                    .compute = (gn_compute)o->compute,
                                    .as_stored = o->quant == GN_Q_NONE,
                                    .quant = (gn_qtype)o->quant,
                                    .no_double_quant = !o->double_quant,
                                    .threads = o->threads,
                                    .chat_template = o->chat_template,
                                    .progress = show_loading,
                                    .user = c};
    gn_status status = gn_model_open(&c->model, o->model, &model, c->err);
    if (c->percent) fputs("\r\033[K", stderr);
    for (int i = 0; !status && i < o->adapters.n; i++)
        status = add_adapter(c, o->adapters.items[i]);
    if (!status) status = open_engine(c);
    if (!status) status = replace_string(&c->system, o->system, c->err);
    if (!status && c->adapters.n == 1) status = choose_adapter(c, c->adapters.items[0].name);
    return status;
}

static void greet(const chat *c) {
    if (!c->terminal.interactive) return;
    const gn_model_info info = gn_model_describe(c->model);
    const char *slash = strrchr(info.dir, '/');
    fprintf(stderr, "%s, %.3g million parameters, %s, %s. /help lists the commands.\n",
            slash && slash[1] ? slash + 1 : info.dir, (double)info.parameters * 1e-6,
            gn_qtype_name(info.quant), info.device);
    if (c->adapters.n > 1) fprintf(stderr, "Adapters (/adapter NAME):");
    for (int i = 0; c->adapters.n > 1 && i < c->adapters.n; i++)
        fprintf(stderr, " %s%s", c->adapters.items[i].name, i + 1 < c->adapters.n ? "," : "\n");
}

static void close_all(chat *c) {
    gn_engine_close(c->engine);
    gn_registry_close(&c->adapters);
    gn_model_close(c->model);
    drop_turns(c, 0, c->n_turns);
    free(c->turns);
    free(c->adapter);
    free(c->system);
    gn_terminal_close(&c->terminal);
}

static int run(chat *c) {
    if (gn_terminal_open(&c->terminal, c->err)) {
        print_error(c->err);
        return 1;
    }
    c->start = (uint64_t)time(NULL) * 0x9e3779b97f4a7c15u;
    gn_status status = open_all(c);
    if (status) {
        print_error(c->err);
    } else {
        greet(c);
        status = converse(c);
    }
    close_all(c);
    return status ? 1 : 0;
}

int gn_chat_cli_main(int argc, char **argv) {
    gn_error err = {0};
    chat c = {.err = &err};
    bool help;
    int exit_status = 2;
    if (gn_options_parse(table, &c.options, argc - 1, argv + 1, &help, &err)) {
        print_error(&err);
    } else if (help) {
        char *text = gn_options_help(table, usage);
        if (text) printf("%s\nIn the chat:\n%s", text, command_help);
        exit_status = text ? 0 : 1;
        free(text);
    } else {
        exit_status = run(&c);
    }
    gn_options_free(table, &c.options);
    return exit_status;
}
