/* common.c - what guanaco-trainer's commands share. */
#include "trainer/trainer.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static void print_commands(FILE *out, const gn_command *commands, const char *program) {
    fprintf(out, "usage: %s COMMAND [options]\n\n", program);
    for (const gn_command *c = commands; c->name; c++)
        fprintf(out, "  %-10s %s\n", c->name, c->help);
    fprintf(out, "\n%s COMMAND --help lists a command's options.\n", program);
}

int gn_command_run(const gn_command *commands, const char *program, int n, char *const *args) {
    if (n < 1) {
        print_commands(stderr, commands, program);
        return 2;
    }
    if (strcmp(args[0], "--help") == 0 || strcmp(args[0], "-h") == 0) {
        print_commands(stdout, commands, program);
        return 0;
    }
    const char *nearest = NULL;
    for (const gn_command *c = commands; c->name; c++) {
        if (strcmp(args[0], c->name) == 0) return c->run(n - 1, args + 1);
        const char *pair[] = {c->name, nearest};
        nearest = gn_nearest(args[0], pair, nearest ? 2 : 1);
    }
    fprintf(stderr, "%s: unknown command '%s'", program, args[0]);
    if (nearest) fprintf(stderr, " (did you mean %s?)", nearest);
    fprintf(stderr, "\n\n");
    print_commands(stderr, commands, program);
    return 2;
}

bool gn_command_options(const gn_option *table, void *fields, const char *usage, int n,
                        char *const *args, int *exit_status) {
    bool help;
    gn_error err = {0};
    if (gn_options_parse(table, fields, n, args, &help, &err)) {
        fprintf(stderr, "guanaco-trainer: %s\n", err.message);
        *exit_status = 2;
    } else if (help) {
        char *text = gn_options_help(table, usage);
        if (text) fputs(text, stdout);
        *exit_status = text ? 0 : 1;
        free(text);
    } else {
        return true;
    }
    gn_options_free(table, fields);
    return false;
}

int gn_command_failed(const gn_error *err) {
    gn_progress("%s", "");
    fprintf(stderr, "guanaco-trainer: %s\n", err->message);
    return 1;
}

static void show_loading(void *user, int64_t done, int64_t total) {
    (void)user;
    if (done < total)
        gn_progress("loading: %.0f%%", 100.0 * (double)done / (double)total);
    else
        gn_progress("%s", "");
}

gn_status gn_model_choice_open(const gn_model_choice *choice, gn_model **model,
                               gn_adapter **adapter, gn_error *err) {
    const gn_model_options options = {.device = choice->device,
                                      .compute = (gn_compute)choice->compute,
                                      .as_stored = choice->quant == GN_Q_NONE,
                                      .quant = (gn_qtype)choice->quant,
                                      .no_double_quant = !choice->double_quant,
                                      .threads = choice->threads,
                                      .progress = show_loading};
    gn_status status;
    *adapter = NULL;
    *model = NULL;
    if (choice->dir)
        status = gn_model_open(model, choice->dir, &options, err);
    else if (choice->synthetic)
        status = gn_model_synthetic(model, choice->synthetic, &options, err);
    else
        status = gn_fail(err, GN_EINVAL, "--model DIR is missing");
    if (!status && choice->adapter) status = gn_adapter_open(adapter, *model, choice->adapter, err);
    if (status) {
        gn_model_close(*model);
        *model = NULL;
    }
    return status;
}

void gn_show_memory(const gn_memory_plan *plan) {
    char *text = gn_memory_plan_text(plan);
    if (text) fputs(text, stderr);
    free(text);
}

gn_status gn_model_choice_score(const gn_model_choice *choice, gn_scorer **out, gn_model *model,
                                gn_adapter *adapter, int32_t context, gn_error *err) {
    const gn_kv_dtype kv = (gn_kv_dtype)choice->kv_dtype;
    if (choice->memory > 0) {
        gn_memory_plan plan;
        const gn_status status = gn_scorer_plan(&plan, model, context, kv, choice->memory, &adapter,
                                                adapter ? 1 : 0, err);
        if (status) return status;
        gn_show_memory(&plan);
    }
    return gn_scorer_open(out, model, context, kv, err);
}

void gn_progress(const char *fmt, ...) {
    if (!isatty(STDERR_FILENO)) return;
    fputs("\r\033[K", stderr);
    va_list args;
    va_start(args, fmt);
    vfprintf(stderr, fmt, args);
    va_end(args);
    fflush(stderr);
}

double gn_resident_peak(int pid) {
    char path[64], line[256];
    double kib = 0;
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    FILE *status = fopen(path, "r");
    while (status && fgets(line, sizeof line, status))
        if (strncmp(line, "VmHWM:", 6) == 0) kib = strtod(line + 6, NULL);
    if (status) fclose(status);
    return kib * 1024;
}

/* Drawn at most ten times a second. */
void gn_draw_bytes(void *user, int64_t done, int64_t total) {
    enum { WIDTH = 30 };
    static const char full[] = "##############################";
    gn_bytes_bar *bar = user;
    const double now = gn_seconds();
    if (done < total && now - bar->drawn < 0.1) return;
    bar->drawn = now;
    const double share = total > 0 ? (double)done / (double)total : 1;
    const double rate = (double)done / (now - bar->begin + 1e-9);
    const int left = rate > 0 ? (int)((double)(total - done) / rate + 0.5) : 0;
    gn_progress("[%-*.*s] %.2f of %.2f GB, %.0f MB/s, %d:%02d left", WIDTH, (int)(WIDTH * share),
                full, 1e-9 * (double)done, 1e-9 * (double)total, 1e-6 * rate, left / 60, left % 60);
}

gn_status gn_read_text(const char *path, char **text, size_t *size, gn_error *err) {
    struct stat info;
    FILE *file = fopen(path, "rb");
    if (!file) return gn_fail(err, GN_EIO, "%s: %s", path, strerror(errno));
    char *bytes = NULL;
    gn_status status = GN_OK;
    if (fstat(fileno(file), &info) != 0 || !S_ISREG(info.st_mode))
        status = gn_fail(err, GN_EIO, "%s: not a regular file", path);
    else if (!(bytes = malloc((size_t)info.st_size + 1)))
        status =
            gn_fail(err, GN_ENOMEM, "%s: no memory for %lld bytes", path, (long long)info.st_size);
    else if (fread(bytes, 1, (size_t)info.st_size, file) != (size_t)info.st_size)
        status = gn_fail(err, GN_EIO, "%s: cannot be read to its end", path);
    fclose(file);
    if (status) {
        free(bytes);
        return status;
    }
    bytes[info.st_size] = '\0';
    *text = bytes;
    *size = (size_t)info.st_size;
    return GN_OK;
}

gn_status gn_print_json_take(cJSON *line, gn_error *err) {
    char *text = line ? cJSON_PrintUnformatted(line) : NULL;
    cJSON_Delete(line);
    if (!text) return gn_fail(err, GN_ENOMEM, "out of memory");
    puts(text);
    fflush(stdout);
    cJSON_free(text);
    return GN_OK;
}

double gn_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
