/* merge_command.c - `guanaco-trainer merge`: an adapter added into its base's weights. */
#include <stdio.h>

#include "engine/bnb.h"
#include "engine/merge.h"
#include "trainer/trainer.h"

typedef struct merge_options {
    const char *model, *adapter, *out;
    int quant, dtype, threads;
    bool double_quant, json;
} merge_options;

static const char usage[] =
    "usage: guanaco-trainer merge --model DIR --adapter DIR --out DIR [options]\n"
    "\nAn adapter made by QLoRA belongs on the 4-bit weights that it was trained over:\n"
    "merged into those of a 4-bit folder, or of a 16-bit one with --quant-type nf4, it\n"
    "gives the model that was trained. Merged into 16-bit weights as they are stored it\n"
    "gives a model close by. merge.json in the folder says which it holds.\n\n";

static const gn_option table[] = {
    {GN_OPT_STRING, "model", offsetof(merge_options, model), .value = "DIR",
     .help = "model folder, in 16, 32 or 4 bits"},
    {GN_OPT_STRING, "adapter", offsetof(merge_options, adapter), .value = "DIR",
     .help = "adapter folder made for it"},
    {GN_OPT_STRING, "out", offsetof(merge_options, out), .value = "DIR",
     .help = "folder to make; it must not exist"},
    {GN_OPT_CHOICE, "quant-type", offsetof(merge_options, quant), .initial = "none",
     .choices = "none|nf4|fp4|fp4-e2m1|fp4-e3m0|int4|int8", .value = "TYPE",
     .help = "round the projections to a type first: nf4, fp4, fp4-e2m1, fp4-e3m0, int4 or int8; "
             "none merges into the weights as stored"},
    {GN_OPT_BOOL, "double-quant", offsetof(merge_options, double_quant), .initial = "true",
     .help = "with the scales of a 4-bit --quant-type quantized, too"},
    {GN_OPT_CHOICE, "dtype", offsetof(merge_options, dtype), .initial = "auto",
     .choices = "auto|float32|float16|bfloat16", .value = "TYPE",
     .help = "of the merged projections: float32, float16 or bfloat16; auto keeps the stored one, "
             "and is bfloat16 where weights were rounded to a type"},
    {GN_OPT_INT, "threads", offsetof(merge_options, threads), .initial = "0", .min = 0, .max = 4096,
     .help = "0: as many as there are cores"},
    {GN_OPT_FLAG, "json", offsetof(merge_options, json), .help = "one JSON object a line"},
    GN_OPTION_END};

static gn_status report(const merge_options *o, const gn_merge_result *r, double seconds,
                        gn_error *err) {
    const bool stored = r->over == GN_Q_NONE;
    gn_progress("%s", "");
    if (!o->json) {
        printf("%s: the adapter's %d products (rank %d) were added to the weights %s%s%s,\n"
               "written as %s: %.1f MB became %.1f MB in %.1f s\n",
               o->out, r->projections, r->rank, stored ? "as stored" : "dequantized from ",
               stored ? "" : gn_qtype_name(r->over),
               r->double_quant ? " (double quantization)" : "", gn_torch_dtype_name(r->dtype),
               1e-6 * (double)r->bytes_in, 1e-6 * (double)r->bytes_out, seconds);
        return GN_OK;
    }
    cJSON *line = cJSON_CreateObject();
    cJSON_AddStringToObject(line, "out", o->out);
    cJSON_AddStringToObject(line, "added_to", stored ? "stored" : "dequantized");
    cJSON_AddStringToObject(line, "quant_type", gn_qtype_name(r->over));
    cJSON_AddBoolToObject(line, "double_quant", r->double_quant);
    cJSON_AddStringToObject(line, "dtype", gn_torch_dtype_name(r->dtype));
    cJSON_AddNumberToObject(line, "projections", r->projections);
    cJSON_AddNumberToObject(line, "rank", r->rank);
    cJSON_AddNumberToObject(line, "bytes_in", (double)r->bytes_in);
    cJSON_AddNumberToObject(line, "bytes_out", (double)r->bytes_out);
    cJSON_AddNumberToObject(line, "seconds", seconds);
    return gn_print_json_take(line, err);
}

static gn_status run(const merge_options *o, gn_error *err) {
    static const gn_dtype dtypes[] = {GN_F32, GN_F32, GN_F16, GN_BF16}; /* as in the table */
    if (!o->model) return gn_fail(err, GN_EINVAL, "--model DIR is missing");
    if (!o->adapter) return gn_fail(err, GN_EINVAL, "--adapter DIR is missing");
    if (!o->out) return gn_fail(err, GN_EINVAL, "--out DIR is missing");
    gn_bytes_bar bar = {.begin = gn_seconds()};
    const gn_merge_options options = {.model = o->model,
                                      .adapter = o->adapter,
                                      .out = o->out,
                                      .quant = (gn_qtype)o->quant,
                                      .double_quant = o->double_quant,
                                      .set_dtype = o->dtype > 0,
                                      .dtype = dtypes[o->dtype],
                                      .threads = o->threads,
                                      .progress = gn_draw_bytes,
                                      .user = &bar};
    gn_merge_result result;
    const gn_status status = gn_merge_folder(&options, &result, err);
    return status ? status : report(o, &result, gn_seconds() - bar.begin, err);
}

int gn_merge_command(int n, char *const *args) {
    merge_options o;
    int exit_status;
    gn_error err = {0};
    if (!gn_command_options(table, &o, usage, n, args, &exit_status)) return exit_status;
    return run(&o, &err) ? gn_command_failed(&err) : 0;
}
