/* bench_command.c - `guanaco-trainer bench`: how fast, and how far from what could be. */

#include "trainer/bench.h"

typedef struct bench_options {
    gn_model_choice model;
    int prompt, tokens, streams, max_batch_tokens, rank;
    float dropout;
    bool json;
} bench_options;

#define FIELD(name) offsetof(bench_options, name)

#define USAGE(command, what)                                                                       \
    "usage: guanaco-trainer bench " command                                                        \
    " [--synthetic SHAPE | --model DIR] [options]\n\n" what                                        \
    "\nEvery result stands beside its floor: the time that this device's memory and arithmetic\n"  \
    "units, measured in the same run, need at least. Results are medians.\n\n"

#define MODEL_OPTIONS                                                                              \
    {GN_OPT_STRING,                                                                                \
     "synthetic",                                                                                  \
     FIELD(model.synthetic),                                                                       \
     .initial = "llama-1.1b",                                                                      \
     .value = "SHAPE",                                                                             \
     .help = "random weights in this shape: llama-1.1b, -7b, -13b, -33b or -65b"},                 \
        GN_MODEL_OPTIONS(bench_options, "auto"), {                                                 \
        GN_OPT_FLAG, "json", FIELD(json), .help = "one JSON object a line"                         \
    }
#define ENGINE_OPTIONS                                                                             \
    GN_ADAPTER_OPTION(bench_options), GN_MEMORY_OPTION(bench_options),                             \
        GN_KV_OPTION(bench_options),                                                               \
        {GN_OPT_INT,                                                                               \
         "streams",                                                                                \
         FIELD(streams),                                                                           \
         .initial = "1",                                                                           \
         .min = 1,                                                                                 \
         .max = 1024,                                                                              \
         .help = "requests at a time"},                                                            \
    {                                                                                              \
        GN_OPT_INT, "max-batch-tokens", FIELD(max_batch_tokens),                                   \
            .min = 0, .max = 1 << 16,                                                              \
            .help = "tokens of one forward pass; 0: as the server does by default"                 \
    }
enum { MAX_TOKENS = 65536 };

static int run(const gn_option *table, const char *usage, const char *kind,
               gn_status (*bench)(gn_bench *), int n, char *const *args) {
    bench_options o = {0};
    int exit_status;
    gn_error err = {0};
    if (!gn_command_options(table, &o, usage, n, args, &exit_status)) return exit_status;
    /* The original model is 16-bit, but what there is to measure is 4-bit. */
    if (!o.model.dir && o.model.quant == GN_Q_NONE) o.model.quant = GN_Q_NF4;
    gn_bench b = {.kind = kind,
                  .name = o.model.dir ? o.model.dir : o.model.synthetic,
                  .prompt = o.prompt,
                  .tokens = o.tokens,
                  .streams = o.streams,
                  .max_batch_tokens = o.max_batch_tokens,
                  .rank = o.rank,
                  .dropout = o.dropout,
                  .memory = o.model.memory,
                  .kv_dtype = (gn_kv_dtype)o.model.kv_dtype,
                  .json = o.json,
                  .err = &err};
    gn_status status = gn_model_choice_open(&o.model, &b.model, &b.adapter, &err);
    if (!status) status = bench(&b);
    gn_adapter_close(b.adapter);
    gn_model_close(b.model);
    return status ? gn_command_failed(&err) : 0;
}

static int decode(int n, char *const *args) {
    static const char usage[] = USAGE(
        "decode",
        "Requests that are sent together: tok_s is all new tokens over the whole time, prompts\n"
        "included, and decode_tok_s the rate while every stream decodes.\n");
    static const gn_option table[] = {
        MODEL_OPTIONS,
        ENGINE_OPTIONS,
        {GN_OPT_INT, "prompt", FIELD(prompt), .initial = "128", .min = 1, .max = MAX_TOKENS,
         .help = "tokens of each prompt"},
        {GN_OPT_INT, "tokens", FIELD(tokens), .initial = "128", .min = 2, .max = MAX_TOKENS,
         .help = "new tokens of each stream"},
        GN_OPTION_END};
    return run(table, usage, "decode", gn_bench_decode, n, args);
}

static int prefill(int n, char *const *args) {
    static const char usage[] =
        USAGE("prefill", "From sending a prompt to the first new token, which is when its logits "
                         "are there.\n");
    static const gn_option table[] = {MODEL_OPTIONS,
                                      ENGINE_OPTIONS,
                                      {GN_OPT_INT, "tokens", FIELD(prompt), .initial = "128",
                                       .min = 1, .max = MAX_TOKENS,
                                       .help = "tokens of each prompt"},
                                      GN_OPTION_END};
    return run(table, usage, "prefill", gn_bench_prefill, n, args);
}

static int operations(int n, char *const *args) {
    static const char usage[] =
        USAGE("ops", "The products of a layer one by one, for several numbers of rows, and "
                     "quantizing.\n");
    static const gn_option table[] = {MODEL_OPTIONS, GN_OPTION_END};
    return run(table, usage, "ops", gn_bench_ops, n, args);
}

static int train(int n, char *const *args) {
    static const char usage[] =
        USAGE("train", "Updates of LoRA on all projections: forward, backward and paged AdamW.\n");
    static const gn_option table[] = {MODEL_OPTIONS,
                                      GN_MEMORY_OPTION(bench_options),
                                      {GN_OPT_INT, "batch", FIELD(streams), .initial = "16",
                                       .min = 1, .max = 1024, .help = "sequences of an update"},
                                      {GN_OPT_INT, "length", FIELD(prompt), .initial = "512",
                                       .min = 2, .max = MAX_TOKENS,
                                       .help = "tokens of each sequence"},
                                      {GN_OPT_INT, "lora-r", FIELD(rank), .initial = "64", .min = 1,
                                       .max = 1024, .help = "rank of LoRA"},
                                      {GN_OPT_FLOAT, "lora-dropout", FIELD(dropout), .initial = "0",
                                       .max = 0.9, .help = "dropout of LoRA"},
                                      GN_OPTION_END};
    return run(table, usage, "train", gn_bench_train, n, args);
}

int gn_bench_command(int n, char *const *args) {
    static const gn_command commands[] = {
        {"decode", decode, "tokens a second of one or several streams"},
        {"prefill", prefill, "tokens a second of a prompt"},
        {"serve", gn_bench_serve_command, "the server under load, over HTTP"},
        {"ops", operations, "the products of a layer, one by one"},
        {"train", train, "tokens a second of QLoRA updates"},
        {0}};
    return gn_command_run(commands, "guanaco-trainer bench", n, args);
}
