/* quantize_command.c - `guanaco-trainer quantize`: a 4-bit copy of a model folder. */
#include <stdio.h>

#include "engine/quantize.h"
#include "trainer/trainer.h"

typedef struct quantize_options {
    const char *model, *out;
    int type, threads;
    bool double_quant, json;
} quantize_options;

static const char usage[] =
    "usage: guanaco-trainer quantize --model DIR --out DIR [options]\n"
    "\nThe copy is in bitsandbytes' serialized form, which transformers reads, too.\n\n";

static const gn_option table[] = {
    {GN_OPT_STRING, "model", offsetof(quantize_options, model), .value = "DIR",
     .help = "a 16- or 32-bit model folder"},
    {GN_OPT_STRING, "out", offsetof(quantize_options, out), .value = "DIR",
     .help = "folder to make; it must not exist"},
    {GN_OPT_CHOICE, "quant-type", offsetof(quantize_options, type), .initial = "nf4",
     .choices = "nf4|fp4", .help = "data type of the projections"},
    {GN_OPT_BOOL, "double-quant", offsetof(quantize_options, double_quant), .initial = "true",
     .help = "quantize the scales, too: 4.13 bits a weight, not 4.5"},
    {GN_OPT_INT, "threads", offsetof(quantize_options, threads), .initial = "0", .min = 0,
     .max = 4096, .help = "0: as many as there are cores"},
    {GN_OPT_FLAG, "json", offsetof(quantize_options, json), .help = "one JSON object a line"},
    GN_OPTION_END};

/* The bar is drawn at most ten times a second. */
typedef struct progress {
    double begin, drawn;
} progress;

static void draw(void *user, int64_t done, int64_t total) {
    enum { WIDTH = 30 };
    static const char full[] = "##############################";
    progress *p = user;
    const double now = gn_seconds();
    if (done < total && now - p->drawn < 0.1) return;
    p->drawn = now;
    const double share = total > 0 ? (double)done / (double)total : 1;
    const double rate = (double)done / (now - p->begin + 1e-9);
    const int left = rate > 0 ? (int)((double)(total - done) / rate + 0.5) : 0;
    gn_progress("[%-*.*s] %.2f of %.2f GB, %.0f MB/s, %d:%02d left", WIDTH, (int)(WIDTH * share),
                full, 1e-9 * (double)done, 1e-9 * (double)total, 1e-6 * rate, left / 60, left % 60);
}

static gn_status report(const quantize_options *o, const gn_quantize_result *result, double seconds,
                        gn_error *err) {
    static const char *const names[] = {"nf4", "fp4"};
    gn_progress("%s", "");
    if (!o->json) {
        printf("%s: %.1f MB of weights became %.1f MB (%s%s) in %.1f s\n", o->out,
               1e-6 * (double)result->bytes_in, 1e-6 * (double)result->bytes_out, names[o->type],
               o->double_quant ? ", double quantization" : "", seconds);
        return GN_OK;
    }
    cJSON *line = cJSON_CreateObject();
    cJSON_AddStringToObject(line, "out", o->out);
    cJSON_AddStringToObject(line, "quant_type", names[o->type]);
    cJSON_AddBoolToObject(line, "double_quant", o->double_quant);
    cJSON_AddNumberToObject(line, "bytes_in", (double)result->bytes_in);
    cJSON_AddNumberToObject(line, "bytes_out", (double)result->bytes_out);
    cJSON_AddNumberToObject(line, "seconds", seconds);
    return gn_print_json_take(line, err);
}

static gn_status run(const quantize_options *o, gn_error *err) {
    if (!o->model) return gn_fail(err, GN_EINVAL, "--model DIR is missing");
    if (!o->out) return gn_fail(err, GN_EINVAL, "--out DIR is missing");
    progress p = {.begin = gn_seconds()};
    const gn_quantize_options options = {.in = o->model,
                                         .out = o->out,
                                         .type = o->type == 0 ? GN_Q_NF4 : GN_Q_FP4,
                                         .double_quant = o->double_quant,
                                         .threads = o->threads,
                                         .progress = draw,
                                         .user = &p};
    gn_quantize_result result;
    const gn_status status = gn_quantize_folder(&options, &result, err);
    return status ? status : report(o, &result, gn_seconds() - p.begin, err);
}

int gn_quantize_command(int n, char *const *args) {
    quantize_options o;
    int exit_status;
    gn_error err = {0};
    if (!gn_command_options(table, &o, usage, n, args, &exit_status)) return exit_status;
    return run(&o, &err) ? gn_command_failed(&err) : 0;
}
