/* bench_serve.c - the real server as its clients see it.
 *
 * guanaco-server runs as a process of its own, as it would in use; the requests are token ids, so
 * that prompts are as long as they are said to be. What the engine says it spent in the model,
 * against the time that passed, is what HTTP, JSON and scheduling cost. */
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "trainer/bench.h"
#include "trainer/bench_client.h"
#include "trainer/bench_reply.h"

enum { ROUNDS = 3, MAX_ARGS = 40, MAX_PAGE = 64 << 10, FIRST_ID = 3, N_IDS = 256 };

typedef struct serve_bench {
    const char *synthetic, *model, *quant, *compute, *device, *memory, *kv_dtype;
    gn_strings adapters; /* NAME=DIR */
    int threads, max_batch_tokens;
    int streams, prompt, tokens;
    bool json;
} serve_bench;

/* ---- the server ---- */

typedef struct server {
    uv_loop_t loop;
    uv_process_t process;
    uv_pipe_t out;
    int port;
    bool runs;
    char line[4096]; /* of its output */
    size_t used;
} server;

static void on_exit_of(uv_process_t *process, int64_t code, int signal) {
    server *s = process->data;
    (void)code, (void)signal;
    s->runs = false;
    uv_close((uv_handle_t *)process, NULL);
}

static void give_buffer(uv_handle_t *handle, size_t suggested, uv_buf_t *buffer) {
    server *s = handle->data;
    (void)suggested;
    *buffer = uv_buf_init(s->line + s->used, (unsigned)(sizeof s->line - 1 - s->used));
}

/* Looks for the line that says where it listens. */
static void on_output(uv_stream_t *stream, ssize_t n, const uv_buf_t *buffer) {
    server *s = stream->data;
    (void)buffer;
    if (n < 0) {
        uv_read_stop(stream);
        return;
    }
    s->used += (size_t)n;
    s->line[s->used] = '\0';
    for (char *end; !s->port && (end = strchr(s->line, '\n'));) {
        *end = '\0';
        s->port = gn_read_ready_port(s->line);
        s->used -= (size_t)(end + 1 - s->line);
        memmove(s->line, end + 1, s->used + 1);
    }
    if (s->used == sizeof s->line - 1) s->used = 0; /* a line that long is another */
}

/* The program beside this one. */
static bool find_server(char *path, size_t size) {
    static const char name[] = "guanaco-server";
    const ssize_t n = readlink("/proc/self/exe", path, size - sizeof name);
    if (n <= 0) return false;
    path[n] = '\0';
    char *slash = strrchr(path, '/');
    if (!slash) return false;
    strcpy(slash + 1, name);
    return true;
}

static void add_option(const char **args, int *n, const char *name, const char *value) {
    if (!value) return;
    args[(*n)++] = name;
    args[(*n)++] = value;
}

/* The engine takes no more memory for keys and values than so many contexts need, nor, with a
 * budget, than remains. */
static const char **write_args(const serve_bench *o, const char *path, char numbers[4][16]) {
    const char **args = calloc(MAX_ARGS + 2 * (size_t)o->adapters.n, sizeof *args);
    int n = 0;
    if (!args) return NULL;
    const int values[] = {o->streams, o->prompt + o->tokens, o->threads, o->max_batch_tokens};
    for (int i = 0; i < 4; i++) snprintf(numbers[i], 16, "%d", values[i]);
    args[n++] = path;
    args[n++] = "serve";
    args[n++] = "--json";
    args[n++] = "--quiet";
    args[n++] = "--no-prefix-cache";
    add_option(args, &n, "--port", "0");
    add_option(args, &n, "--model-name", "base");
    add_option(args, &n, o->model ? "--model" : "--synthetic", o->model ? o->model : o->synthetic);
    add_option(args, &n, "--quant-type", o->quant);
    add_option(args, &n, "--compute-dtype", o->compute);
    add_option(args, &n, "--device", o->device);
    add_option(args, &n, "--memory-budget", o->memory);
    add_option(args, &n, "--kv-dtype", o->kv_dtype);
    add_option(args, &n, "--kv-memory", o->memory ? NULL : "1024GiB");
    add_option(args, &n, "--max-seqs", numbers[0]);
    add_option(args, &n, "--context", numbers[1]);
    add_option(args, &n, "--threads", numbers[2]);
    add_option(args, &n, "--max-batch-tokens", o->max_batch_tokens ? numbers[3] : NULL);
    for (int i = 0; i < o->adapters.n; i++) add_option(args, &n, "--adapter", o->adapters.items[i]);
    return args;
}

static gn_status spawn(server *s, const serve_bench *o, gn_error *err) {
    char path[4096], numbers[4][16];
    if (!find_server(path, sizeof path)) return gn_fail(err, GN_EIO, "cannot find guanaco-server");
    const char **args = write_args(o, path, numbers);
    if (!args) return gn_fail(err, GN_ENOMEM, "out of memory");
    uv_stdio_container_t stdio[] = {
        {.flags = UV_IGNORE},
        {.flags = UV_CREATE_PIPE | UV_WRITABLE_PIPE, .data.stream = (uv_stream_t *)&s->out},
        {.flags = UV_INHERIT_FD, .data.fd = STDERR_FILENO}};
    const uv_process_options_t options = {.exit_cb = on_exit_of,
                                          .file = path,
                                          .args = (char **)args,
                                          .stdio_count = 3,
                                          .stdio = stdio};
    const int failure = uv_spawn(&s->loop, &s->process, &options);
    free(args);
    s->runs = !failure;
    if (!failure) return GN_OK;
    uv_close((uv_handle_t *)&s->process, NULL);
    return gn_fail(err, GN_EIO, "cannot start %s: %s", path, uv_strerror(failure));
}

static void stop_server(server *s) {
    if (s->runs) uv_process_kill(&s->process, SIGTERM);
    uv_close((uv_handle_t *)&s->out, NULL);
    uv_run(&s->loop, UV_RUN_DEFAULT);
    uv_loop_close(&s->loop);
}

/* Returns when it is ready. Whatever comes back, stop_server follows. */
static gn_status start_server(server *s, const serve_bench *o, gn_error *err) {
    uv_pipe_init(&s->loop, &s->out, 0);
    s->out.data = s->process.data = s;
    const gn_status status = spawn(s, o, err);
    if (status) return status;
    uv_read_start((uv_stream_t *)&s->out, give_buffer, on_output);
    while (!s->port && s->runs) uv_run(&s->loop, UV_RUN_ONCE);
    return s->port ? GN_OK : gn_fail(err, GN_EIO, "guanaco-server ended before it was ready");
}

/* ---- single pages ---- */

typedef struct page {
    char text[MAX_PAGE];
    size_t used;
} page;

static bool add_to_page(void *user, const char *data, size_t size) {
    page *p = user;
    if (size > sizeof p->text - 1 - p->used) return false;
    memcpy(p->text + p->used, data, size);
    p->used += size;
    p->text[p->used] = '\0';
    return true;
}

static gn_status fetch(page *p, int port, const char *path, gn_error *err) {
    char request[256];
    const int size =
        snprintf(request, sizeof request,
                 "GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", path);
    p->used = 0;
    p->text[0] = '\0';
    gn_call call = {
        .request = request, .request_size = (size_t)size, .on_body = add_to_page, .user = p};
    return gn_calls_run(&call, 1, port, err);
}

static gn_status read_busy(page *p, int port, double *seconds, gn_error *err) {
    static const char name[] = "guanaco_engine_busy_seconds_total";
    const gn_status status = fetch(p, port, "/metrics", err);
    if (status || gn_read_metric(p->text, name, seconds)) return status;
    return gn_fail(err, GN_EFORMAT, "/metrics lacks %s", name);
}

/* ---- a load ---- */

typedef struct load {
    gn_call *calls;
    gn_reply *replies;
    char **requests;
    gn_token_times *times;
    int n;
} load;

static bool on_text(void *user, const char *data, size_t size) {
    return gn_reply_feed(user, data, size, gn_seconds());
}

static char *write_request(const serve_bench *o, int32_t *ids, int stream, uint32_t seed,
                           size_t *size) {
    char *body = NULL, *request = NULL;
    size_t body_size = 0;
    const char *name = o->adapters.n ? o->adapters.items[stream % o->adapters.n] : "base";
    FILE *f = open_memstream(&body, &body_size);
    if (!f) return NULL;
    gn_bench_prompt(ids, o->prompt, N_IDS, seed);
    fprintf(f, "{\"model\":\"%.*s\",\"prompt\":[", (int)strcspn(name, "="), name);
    for (int i = 0; i < o->prompt; i++) fprintf(f, "%s%d", i ? "," : "", FIRST_ID + ids[i]);
    fprintf(f,
            "],\"max_tokens\":%d,\"temperature\":0,\"ignore_eos\":true,\"stream\":true,"
            "\"stream_options\":{\"include_usage\":true}}",
            o->tokens);
    const bool wrote_body = fclose(f) == 0;
    f = wrote_body ? open_memstream(&request, size) : NULL;
    if (f) {
        fprintf(f,
                "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                body_size, body);
        if (fclose(f) != 0) {
            free(request);
            request = NULL;
        }
    }
    free(body);
    return request;
}

static void free_requests(load *l) {
    for (int i = 0; l->requests && i < l->n; i++) {
        free(l->requests[i]);
        l->requests[i] = NULL;
    }
}

static void close_load(load *l) {
    free_requests(l);
    gn_token_times_close(l->times);
    free(l->requests);
    free(l->replies);
    free(l->calls);
}

static bool open_load(load *l, const serve_bench *o) {
    *l = (load){.n = o->streams};
    l->calls = calloc((size_t)l->n, sizeof *l->calls);
    l->replies = calloc((size_t)l->n, sizeof *l->replies);
    l->requests = calloc((size_t)l->n, sizeof *l->requests);
    l->times = gn_token_times_open(l->n, o->tokens);
    return l->calls && l->replies && l->requests && l->times;
}

static bool write_requests(load *l, const serve_bench *o, uint32_t seed) {
    int32_t *ids = malloc((size_t)o->prompt * sizeof *ids);
    bool complete = ids != NULL;
    free_requests(l);
    for (int i = 0; complete && i < l->n; i++) {
        size_t size = 0;
        l->times[i].n = 0;
        l->replies[i] = (gn_reply){.times = &l->times[i], .max_times = o->tokens};
        l->requests[i] = write_request(o, ids, i, seed + (uint32_t)i, &size);
        l->calls[i] = (gn_call){.request = l->requests[i],
                                .request_size = size,
                                .on_body = on_text,
                                .user = &l->replies[i]};
        complete = l->requests[i] != NULL;
    }
    free(ids);
    return complete;
}

/* What a reply says is wrong tells more than that its connection ended. */
static gn_status judge(const load *l, const serve_bench *o, gn_status status, gn_error *err) {
    for (int i = 0; i < l->n; i++) {
        const gn_reply *r = &l->replies[i];
        const int http = l->calls[i].status;
        if (r->problem[0]) return gn_fail(err, GN_EIO, "%s", r->problem);
        if (http && http != 200)
            return gn_fail(err, GN_EIO, "the server answered %d: %.*s", http,
                           (int)(r->used < 300 ? r->used : 300), r->line);
        if (!status && (!r->done || r->tokens != o->tokens || l->times[i].n == 0))
            return gn_fail(err, GN_EIO, "a reply has %d tokens, %d pieces of text and %s end",
                           r->tokens, l->times[i].n, r->done ? "an" : "no");
    }
    return status;
}

/* ---- measuring ---- */

typedef struct figures {
    double tok_s[ROUNDS], busy[ROUNDS]; /* busy: share of the time that the model took */
    double *first, *gaps;               /* seconds, of all rounds */
    size_t n_first, n_gaps;
} figures;

static void collect(figures *f, const load *l, int round, double begin, double busy_seconds) {
    double end = begin, tokens = 0;
    for (int i = 0; i < l->n; i++) {
        end = fmax(end, l->times[i].at[l->times[i].n - 1]);
        tokens += l->replies[i].tokens;
        f->first[f->n_first++] = l->times[i].at[0] - begin;
    }
    f->n_gaps += gn_token_gaps(f->gaps + f->n_gaps, l->times, l->n);
    f->tok_s[round] = tokens / (end - begin);
    f->busy[round] = busy_seconds / (end - begin);
}

static gn_status run_round(figures *f, load *l, const serve_bench *o, int port, int round,
                           gn_error *err) {
    double before, after;
    page p;
    if (!write_requests(l, o, 7919u * (uint32_t)(round + 2)))
        return gn_fail(err, GN_ENOMEM, "out of memory");
    gn_status status = read_busy(&p, port, &before, err);
    const double begin = gn_seconds();
    if (!status) {
        status = gn_calls_run(l->calls, l->n, port, err);
        status = judge(l, o, status, err);
    }
    if (!status) status = read_busy(&p, port, &after, err);
    if (!status && round >= 0) collect(f, l, round, begin, after - before);
    return status;
}

static gn_status measure(figures *f, const serve_bench *o, int port, gn_error *err) {
    load l;
    gn_status status = GN_OK;
    const size_t streams = (size_t)o->streams * ROUNDS;
    f->first = malloc(streams * sizeof *f->first);
    f->gaps = malloc(streams * (size_t)o->tokens * sizeof *f->gaps);
    if (!open_load(&l, o) || !f->first || !f->gaps)
        status = gn_fail(err, GN_ENOMEM, "out of memory");
    for (int round = -1; !status && round < ROUNDS; round++) { /* -1 warms up */
        gn_progress("serve: round %d of %d", round + 1, ROUNDS);
        status = run_round(f, &l, o, port, round, err);
    }
    gn_progress("%s", "");
    close_load(&l);
    return status;
}

/* ---- the report ---- */

typedef struct spread {
    double p50, p99;
} spread;

static spread spread_of(double *values, size_t n) {
    if (n == 0) return (spread){0, 0};
    return (spread){1e3 * gn_percentile(values, n, 0.5), 1e3 * gn_percentile(values, n, 0.99)};
}

static void add_spread(cJSON *line, const char *name, spread s) {
    cJSON *object = cJSON_AddObjectToObject(line, name);
    cJSON_AddNumberToObject(object, "p50", s.p50);
    cJSON_AddNumberToObject(object, "p99", s.p99);
}

/* A copy of a string of /health, or "". */
static void copy_field(char to[64], const cJSON *health, const char *name) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(health, name);
    snprintf(to, 64, "%s", cJSON_IsString(item) ? item->valuestring : "");
}

static gn_status report(figures *f, const serve_bench *o, const server *s, gn_error *err) {
    page p;
    char device[64], quant[64];
    gn_status status = fetch(&p, s->port, "/health", err);
    if (status) return status;
    cJSON *health = cJSON_Parse(p.text);
    copy_field(device, health, "device");
    copy_field(quant, health, "quant_type");
    cJSON_Delete(health);
    const char *model = o->model ? o->model : o->synthetic;
    const double tok_s = gn_median(f->tok_s, ROUNDS), busy = gn_median(f->busy, ROUNDS);
    const spread first = spread_of(f->first, f->n_first), gap = spread_of(f->gaps, f->n_gaps);
    if (!o->json) {
        printf("serve: %s on %s\n", model, device);
        printf("  %d stream%s over HTTP of %d prompt tokens and %d new ones, %d adapter%s\n",
               o->streams, o->streams == 1 ? "" : "s", o->prompt, o->tokens, o->adapters.n,
               o->adapters.n == 1 ? "" : "s");
        printf(
            "  %.1f tok/s; the engine alone would give %.1f (%.1f %% of the time is spent outside "
            "the model)\n",
            tok_s, tok_s / busy, 100 * (1 - busy));
        printf("  first token after %.1f ms (p50), %.1f ms (p99); gaps of %.2f ms (p50), %.2f ms "
               "(p99)\n",
               first.p50, first.p99, gap.p50, gap.p99);
        return GN_OK;
    }
    cJSON *line = cJSON_CreateObject();
    cJSON_AddStringToObject(line, "bench", "serve");
    cJSON_AddStringToObject(line, "model", model);
    cJSON_AddStringToObject(line, "quant_type", quant);
    cJSON_AddStringToObject(line, "device", device);
    cJSON_AddNumberToObject(line, "streams", o->streams);
    cJSON_AddNumberToObject(line, "adapters", o->adapters.n);
    cJSON_AddNumberToObject(line, "prompt", o->prompt);
    cJSON_AddNumberToObject(line, "tokens", o->tokens);
    cJSON_AddNumberToObject(line, "tok_s", tok_s);
    cJSON_AddNumberToObject(line, "floor", tok_s / busy);
    cJSON_AddNumberToObject(line, "ratio", busy);
    cJSON_AddNumberToObject(line, "outside_share", 1 - busy);
    add_spread(line, "first_token_ms", first);
    add_spread(line, "gap_ms", gap);
    cJSON_AddNumberToObject(line, "peak_bytes", gn_resident_peak(s->process.pid));
    return gn_print_json_take(line, err);
}

/* ---- the command ---- */

#define FIELD(name) offsetof(serve_bench, name)

static const char usage[] =
    "usage: guanaco-trainer bench serve [--synthetic SHAPE | --model DIR] [options]\n\n"
    "Starts guanaco-server and sends it requests over HTTP, all at once. tok_s is all new tokens\n"
    "over the whole time; what the engine would give if it never waited for HTTP, JSON and the\n"
    "clients, by its own count of busy seconds, stands beside it. Percentiles are over all "
    "streams\n"
    "of all rounds. Clients run on this machine, too, and take some of its time.\n\n";

static const gn_option table[] = {
    {GN_OPT_STRING, "synthetic", FIELD(synthetic), .initial = "llama-1.1b", .value = "SHAPE",
     .help = "random weights in this shape: llama-1.1b, -7b, -13b, -33b or -65b"},
    {GN_OPT_STRING, "model", FIELD(model), .value = "DIR", .help = "model folder"},
    {GN_OPT_LIST, "adapter", FIELD(adapters), .value = "NAME=DIR",
     .help = "an adapter; given several times, streams take them in turn"},
    {GN_OPT_STRING, "quant-type", FIELD(quant), .value = "TYPE", .help = "as the server takes it"},
    {GN_OPT_STRING, "compute-dtype", FIELD(compute), .value = "TYPE",
     .help = "as the server takes it"},
    {GN_OPT_STRING, "device", FIELD(device), .value = "NAME", .help = "as the server takes it"},
    {GN_OPT_STRING, "memory-budget", FIELD(memory), .value = "SIZE",
     .help = "as the server takes it"},
    {GN_OPT_STRING, "kv-dtype", FIELD(kv_dtype), .value = "TYPE", .help = "as the server takes it"},
    {GN_OPT_INT, "threads", FIELD(threads), .min = 0, .max = 1024, .help = "0: all cores"},
    {GN_OPT_INT, "max-batch-tokens", FIELD(max_batch_tokens), .min = 0, .max = 1 << 16,
     .help = "tokens of one forward pass; 0: the server's default"},
    {GN_OPT_INT, "streams", FIELD(streams), .initial = "16", .min = 1, .max = 1024,
     .help = "clients at a time"},
    {GN_OPT_INT, "prompt", FIELD(prompt), .initial = "128", .min = 1, .max = 65536,
     .help = "tokens of each prompt"},
    {GN_OPT_INT, "tokens", FIELD(tokens), .initial = "128", .min = 1, .max = 65536,
     .help = "new tokens of each stream"},
    {GN_OPT_FLAG, "json", FIELD(json), .help = "one JSON object a line"},
    GN_OPTION_END};

int gn_bench_serve_command(int n, char *const *args) {
    serve_bench o;
    server s = {0};
    figures f = {0};
    int exit_status;
    gn_error err = {0};
    if (!gn_command_options(table, &o, usage, n, args, &exit_status)) return exit_status;
    signal(SIGPIPE, SIG_IGN); /* a server that ended is an error code, not a signal */
    gn_status status = GN_OK;
    if (uv_loop_init(&s.loop)) {
        status = gn_fail(&err, GN_EIO, "cannot set up an event loop");
    } else {
        status = start_server(&s, &o, &err);
        if (!status) status = measure(&f, &o, s.port, &err);
        if (!status) status = report(&f, &o, &s, &err);
        stop_server(&s);
    }
    free(f.first);
    free(f.gaps);
    gn_options_free(table, &o);
    return status ? gn_command_failed(&err) : 0;
}
