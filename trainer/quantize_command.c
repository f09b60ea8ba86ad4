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
    gn_bytes_bar bar = {.begin = gn_seconds()};
    const gn_quantize_options options = {.in = o->model,
                                         .out = o->out,
                                         .type = o->type == 0 ? GN_Q_NF4 : GN_Q_FP4,
                                         .double_quant = o->double_quant,
                                         .threads = o->threads,
                                         .progress = gn_draw_bytes,
                                         .user = &bar};
    gn_quantize_result result;
    const gn_status status = gn_quantize_folder(&options, &result, err);
    return status ? status : report(o, &result, gn_seconds() - bar.begin, err);
}

int gn_quantize_command(int n, char *const *args) {
    quantize_options o;
    int exit_status;
    gn_error err = {0};
    if (!gn_command_options(table, &o, usage, n, args, &exit_status)) return exit_status;
    return run(&o, &err) ? gn_command_failed(&err) : 0;
}
