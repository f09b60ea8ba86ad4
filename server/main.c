/* main.c - guanaco-server: `serve` (also without a word) and `chat`.
 *
 * The port is taken before the model is loaded, so that a mistake shows at once; clients are
 * listened to afterwards, so that whoever gets through gets an answer. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "server/buffer.h"
#include "server/chat_cli.h"
#include "server/serve_options.h"

static const char usage[] =
    "usage: guanaco-server [serve] [options]\n"
    "       guanaco-server chat [options]\n"
    "\n"
    "Serves one base model and any number of LoRA adapters over HTTP: a web page at /,\n"
    "and OpenAI's API below /v1.\n";

enum { WRONG_USE = 2 };

static int fail(const gn_error *err) {
    fprintf(stderr, "guanaco-server: %s\n", err->message);
    return EXIT_FAILURE;
}

/* ---- the default model ---- */

/* models/ lies in the folder we were called in, or above the build folder that holds us. */
static const char *find_default_model(char *path, size_t size, gn_error *err) {
    static const char name[] = "models/bootstrap-13m-nf4";
    char self[2048];
    if (access(name, R_OK) == 0) return name;
    const ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n > 0) {
        self[n] = 0;
        for (char *slash = strrchr(self, '/'); slash; slash = strrchr(self, '/')) {
            *slash = 0;
            snprintf(path, size, "%s/%s", self, name);
            if (access(path, R_OK) == 0) return path;
        }
    }
    (void)gn_fail(err, GN_ENOENT, "which model? Give its folder with --model DIR");
    return NULL;
}

/* ---- loading ---- */

/* A bar, redrawn when another percent is done. */
static void show_progress(void *user, int64_t done, int64_t total) {
    int *shown = user;
    const int percent = total > 0 ? (int)(done * 100 / total) : 100;
    if (percent == *shown) return;
    *shown = percent;
    fprintf(stderr, "\rloading [%-40.*s] %3d %%", percent * 40 / 100,
            "########################################", percent);
    if (percent == 100) fprintf(stderr, "\r\033[K");
    fflush(stderr);
}

static gn_status load_model(gn_model **model, const gn_serve_options *o, gn_error *err) {
    char path[4096];
    int shown = -1;
    gn_model_options options = gn_serve_model_options(o);
    if (o->model && o->synthetic)
        return gn_fail(err, GN_EINVAL, "--model and --synthetic do not go together");
    const char *dir =
        o->model || o->synthetic ? o->model : find_default_model(path, sizeof path, err);
    if (!dir && !o->synthetic) return GN_ENOENT;
    if (isatty(STDERR_FILENO) && !o->json) {
        options.progress = show_progress;
        options.user = &shown;
    }
    const gn_status status = dir ? gn_model_open(model, dir, &options, err)
                                 : gn_model_synthetic(model, o->synthetic, &options, err);
    if (status && shown >= 0) fprintf(stderr, "\r\033[K");
    return status;
}

/* The folder of NAME=DIR. */
static gn_status find_dir(const char *argument, const char **dir, gn_error *err) {
    const char *equals = strchr(argument, '=');
    if (!equals || equals == argument || !equals[1])
        return gn_fail(err, GN_EINVAL, "--adapter %s: write it as NAME=DIR", argument);
    *dir = equals + 1;
    return GN_OK;
}

static gn_status load_adapters(gn_adapter **adapters, const gn_model *model,
                               const gn_serve_options *o, gn_error *err) {
    gn_status status = GN_OK;
    for (int i = 0; i < o->adapters.n && !status; i++) {
        const char *dir = NULL;
        status = find_dir(o->adapters.items[i], &dir, err);
        if (!status) status = gn_adapter_open(&adapters[i], model, dir, err);
    }
    return status;
}

/* Takes over all of them, also when it fails. */
static gn_status name_adapters(gn_server *server, gn_adapter **adapters, const gn_serve_options *o,
                               gn_error *err) {
    gn_status status = GN_OK;
    for (int i = 0; i < o->adapters.n && !status; i++) {
        const char *argument = o->adapters.items[i], *dir = NULL;
        status = find_dir(argument, &dir, err);
        char *name = status ? NULL : strndup(argument, (size_t)(dir - 1 - argument));
        if (!status && !name) status = gn_fail(err, GN_ENOMEM, "out of memory");
        if (!status) status = gn_server_add_adapter(server, name, dir, adapters[i], err);
        if (name) adapters[i] = NULL;
        free(name);
    }
    return status;
}

/* Adapters come before the engine, which plans memory for them. */
static gn_status load_all(gn_server *server, gn_model **model, const gn_serve_options *o,
                          gn_memory_plan *memory, gn_error *err) {
    gn_engine_options options = gn_serve_engine_options(o);
    gn_engine *engine = NULL;
    gn_adapter **adapters = calloc((size_t)o->adapters.n + 1, sizeof *adapters);
    gn_status status = adapters ? GN_OK : gn_fail(err, GN_ENOMEM, "out of memory");
    if (!status) status = load_model(model, o, err);
    if (!status) status = load_adapters(adapters, *model, o, err);
    options.adapters = adapters;
    options.n_adapters = o->adapters.n;
    if (!status) status = gn_engine_open(&engine, *model, &options, err);
    if (!status) *memory = gn_engine_memory(engine);
    if (!status) status = gn_server_serve(server, *model, engine, err);
    if (!status) status = name_adapters(server, adapters, o, err);
    for (int i = 0; adapters && i < o->adapters.n; i++) gn_adapter_close(adapters[i]);
    free(adapters);
    return status;
}

/* ---- start-up ---- */

/* Where a browser finds the server: a wildcard address is reached as localhost. */
static void write_url(char *url, size_t size, const char *host, int port) {
    const bool any = strcmp(host, "0.0.0.0") == 0 || strcmp(host, "::") == 0;
    const char *shown = any ? "localhost" : host;
    snprintf(url, size, strchr(shown, ':') ? "http://[%s]:%d" : "http://%s:%d", shown, port);
}

static void announce(const gn_serve_options *o, const gn_server *server, const gn_model *model,
                     const gn_memory_plan *memory) {
    char url[320];
    gn_buffer line = {0};
    const gn_model_info info = gn_model_describe(model);
    write_url(url, sizeof url, o->host, gn_server_port(server));
    if (!o->json) {
        printf("Guanaco is ready: open %s\n  %.1f M parameters, %s, on %s\n", url,
               (double)info.parameters / 1e6, gn_qtype_name(info.quant), info.device);
        char *table = gn_memory_plan_text(memory);
        if (table) fputs(table, stdout);
        free(table);
    } else {
        gn_buffer_text(&line, "{\"event\":\"ready\",\"url\":");
        gn_buffer_json_text(&line, url);
        gn_buffer_format(&line, ",\"port\":%d,\"model\":", gn_server_port(server));
        gn_buffer_json_text(&line, info.dir);
        gn_buffer_text(&line, "}\n");
        fwrite(line.data, 1, line.size, stdout);
        gn_buffer_free(&line);
    }
    fflush(stdout);
}

static int serve(const gn_serve_options *o) {
    const gn_server_options options = gn_serve_server_options(o);
    gn_server *server = NULL;
    gn_model *model = NULL;
    gn_memory_plan memory;
    gn_error err = {0};
    signal(SIGPIPE, SIG_IGN); /* a client that left is an error code, not a signal */
    if (o->allow_adapter_loading && !o->adapter_dir) {
        (void)gn_fail(&err, GN_EINVAL, "--allow-adapter-loading needs --adapter-dir DIR");
        return fail(&err);
    }
    gn_status status = gn_server_open(&server, &options, &err);
    if (!status) status = load_all(server, &model, o, &memory, &err);
    if (!status) status = gn_server_listen(server, &err);
    if (!status) {
        announce(o, server, model, &memory);
        gn_server_run(server);
    }
    gn_server_close(server);
    gn_model_close(model);
    return status ? fail(&err) : EXIT_SUCCESS;
}

static int print_help(void) {
    char *text = gn_options_help(gn_serve_option_table, usage);
    if (!text) return EXIT_FAILURE;
    fputs(text, stdout);
    free(text);
    return EXIT_SUCCESS;
}

static int serve_main(int argc, char **argv) {
    gn_serve_options options;
    gn_error err = {0};
    bool help = false;
    int code;
    const gn_status status =
        gn_options_parse(gn_serve_option_table, &options, argc, argv, &help, &err);
    if (status) {
        fail(&err);
        code = WRONG_USE;
    } else if (help) {
        code = print_help();
    } else if (options.version) {
        puts("guanaco-server " GN_VERSION);
        code = EXIT_SUCCESS;
    } else {
        code = serve(&options);
    }
    gn_options_free(gn_serve_option_table, &options);
    return code;
}

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "chat") == 0) return gn_chat_cli_main(argc - 1, argv + 1);
    const int skip = argc > 1 && strcmp(argv[1], "serve") == 0 ? 2 : 1;
    return serve_main(argc - skip, argv + skip);
}
