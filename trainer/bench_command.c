/* bench_command.c - `guanaco-trainer bench`: how fast, and how far from what could be. */
#include <string.h>

#include "trainer/bench.h"

typedef struct bench_options {
    gn_model_choice model;
    int tokens, streams;
    bool json;
} bench_options;

static const char usage[] =
    "usage: guanaco-trainer bench decode|prefill|ops [--synthetic SHAPE | --model DIR] [options]\n"
    "\nEvery result stands beside its floor: the time that this machine's memory and arithmetic\n"
    "units, measured in the same run, need at least. Results are medians.\n\n";

static const gn_option table[] = {
    {GN_OPT_STRING, "synthetic", offsetof(bench_options, model.synthetic), .initial = "llama-1.1b",
     .value = "SHAPE", .help = "random weights in this shape: llama-1.1b, -7b, -13b, -33b or -65b"},
    GN_MODEL_OPTIONS(bench_options, "auto"),
    GN_ADAPTER_OPTION(bench_options),
    {GN_OPT_INT, "tokens", offsetof(bench_options, tokens), .initial = "128", .min = 1,
     .max = 65536, .help = "tokens to decode, or of the prompt to prefill"},
    {GN_OPT_INT, "streams", offsetof(bench_options, streams), .initial = "1", .min = 1, .max = 1024,
     .help = "requests at a time"},
    {GN_OPT_FLAG, "json", offsetof(bench_options, json), .help = "one JSON object a line"},
    GN_OPTION_END};

static int run(const char *kind, gn_status (*bench)(gn_bench *), int n, char *const *args) {
    bench_options o;
    int exit_status;
    gn_error err = {0};
    if (!gn_command_options(table, &o, usage, n, args, &exit_status)) return exit_status;
    /* The original model is 16-bit, but what there is to measure is 4-bit. */
    if (!o.model.dir && o.model.quant == GN_Q_NONE) o.model.quant = GN_Q_NF4;
    gn_bench b = {.kind = kind,
                  .name = o.model.dir ? o.model.dir : o.model.synthetic,
                  .tokens = o.tokens,
                  .streams = o.streams,
                  .json = o.json,
                  .err = &err};
    gn_status status = gn_model_choice_open(&o.model, &b.model, &b.adapter, &err);
    if (!status) status = bench(&b);
    gn_adapter_close(b.adapter);
    gn_model_close(b.model);
    return status ? gn_command_failed(&err) : 0;
}

static int decode(int n, char *const *args) {
    return run("decode", gn_bench_decode, n, args);
}
static int prefill(int n, char *const *args) {
    return run("prefill", gn_bench_prefill, n, args);
}
static int operations(int n, char *const *args) {
    return run("ops", gn_bench_ops, n, args);
}

int gn_bench_command(int n, char *const *args) {
    static const gn_command commands[] = {
        {"decode", decode, "tokens a second of one or several streams"},
        {"prefill", prefill, "tokens a second of a prompt"},
        {"ops", operations, "the products of a layer, one by one"},
        {0}};
    return gn_command_run(commands, "guanaco-trainer bench", n, args);
}
