/* trainer.h - what guanaco-trainer's commands share.
 *
 * A command is a function of its own arguments (its name not among them) that returns the exit
 * status: 0 done, 1 failed, 2 a wrong command line. It prints results on stdout, everything
 * else on stderr. */
#ifndef GN_TRAINER_H
#define GN_TRAINER_H

#include <cjson/cJSON.h>

#include "engine/guanaco.h"
#include "engine/options.h"
#include "engine/score.h"

typedef struct gn_command {
    const char *name; /* NULL ends a table */
    int (*run)(int argc, char *const *argv);
    const char *help;
} gn_command;

/* Runs the command that args[0] names. `program` is what stands before it in messages. */
int gn_command_run(const gn_command *commands, const char *program, int n, char *const *args);

int gn_quantize_command(int n, char *const *args);
int gn_merge_command(int n, char *const *args);
int gn_report_command(int n, char *const *args);
int gn_eval_ppl_command(int n, char *const *args);
int gn_eval_logits_command(int n, char *const *args);
int gn_eval_mmlu_command(int n, char *const *args);
int gn_bench_command(int n, char *const *args);
int gn_data_command(int n, char *const *args);
int gn_train_command(int n, char *const *args);

/* Parses args and deals with --help and mistakes; false: end with *exit_status. */
GN_CHECKED bool gn_command_options(const gn_option *table, void *fields, const char *usage, int n,
                                   char *const *args, int *exit_status);
/* "guanaco-trainer: message" on stderr; returns exit status 1. */
int gn_command_failed(const gn_error *err);

/* How a command opens its model. */
typedef struct gn_model_choice {
    const char *dir, *synthetic; /* synthetic: a shape's name, used without dir */
    const char *adapter;         /* folder or NULL */
    int quant, compute;          /* gn_qtype (NONE: as stored), gn_compute */
    int kv_dtype;                /* gn_kv_dtype */
    bool double_quant;
    const char *device;
    int threads;
    int64_t memory; /* a budget; 0: none */
} gn_model_choice;

/* Rows of a table whose fields struct has a gn_model_choice called `model`. */
#define GN_MODEL_OPTIONS(type, compute_default)                                                    \
    {GN_OPT_STRING, "model", offsetof(type, model.dir), .value = "DIR", .help = "model folder"},   \
        {GN_OPT_CHOICE,                                                                            \
         "quant-type",                                                                             \
         offsetof(type, model.quant),                                                              \
         .initial = "none",                                                                        \
         .choices = "none|nf4|fp4|fp4-e2m1|fp4-e3m0|int4|int8",                                    \
         .value = "TYPE",                                                                          \
         .help = "quantize the projections while loading: nf4, fp4, fp4-e2m1, fp4-e3m0, int4 or "  \
                 "int8; none uses them as stored"},                                                \
        {GN_OPT_BOOL, "double-quant", offsetof(type, model.double_quant), .initial = "true",       \
         .help = "quantize the scales of 4-bit types, too"},                                       \
        GN_COMPUTE_OPTIONS(type, compute_default)

/* Those of them that say how to compute. */
#define GN_COMPUTE_OPTIONS(type, compute_default)                                                  \
    {GN_OPT_CHOICE,                                                                                \
     "compute-dtype",                                                                              \
     offsetof(type, model.compute),                                                                \
     .initial = compute_default,                                                                   \
     .choices = "auto|float32|bfloat16",                                                           \
     .value = "TYPE",                                                                              \
     .help = "what products multiply: float32, bfloat16, or auto for the faster one"},             \
        {GN_OPT_STRING,                                                                            \
         "device",                                                                                 \
         offsetof(type, model.device),                                                             \
         .initial = "auto",                                                                        \
         .value = "DEVICE",                                                                        \
         .help = "where to compute: auto (a GPU if there is one), cpu, cuda or cuda:N"},           \
    {                                                                                              \
        GN_OPT_INT, "threads", offsetof(type, model.threads),                                      \
            .initial = "0", .min = 0, .max = 4096, .help = "0: as many as there are cores"         \
    }
#define GN_MEMORY_OPTION(type)                                                                     \
    {                                                                                              \
        GN_OPT_SIZE, "memory-budget", offsetof(type, model.memory),                                \
            .value = "SIZE",                                                                       \
            .help = "of the GPU's memory, for everything together; on a CPU for keys and values, " \
                    "adapters and activations, not for weights. Prints how it is divided, or "     \
                    "says what is missing"                                                         \
    }
#define GN_KV_OPTION(type)                                                                         \
    {                                                                                              \
        GN_OPT_CHOICE, "kv-dtype", offsetof(type, model.kv_dtype),                                 \
            .initial = "auto", .choices = GN_KV_CHOICES, .value = "TYPE", .help = GN_KV_HELP       \
    }
#define GN_ADAPTER_OPTION(type)                                                                    \
    {                                                                                              \
        GN_OPT_STRING, "adapter", offsetof(type, model.adapter),                                   \
            .value = "DIR", .help = "adapter folder to use with the model"                         \
    }

GN_CHECKED gn_status gn_model_choice_open(const gn_model_choice *choice, gn_model **model,
                                          gn_adapter **adapter, gn_error *err);

/* Says on stderr how memory is divided. */
void gn_show_memory(const gn_memory_plan *plan);
/* A scorer within the choice's memory. */
GN_CHECKED gn_status gn_model_choice_score(const gn_model_choice *choice, gn_scorer **out,
                                           gn_model *model, gn_adapter *adapter, int32_t context,
                                           gn_error *err);

/* A line on stderr that is drawn again and again, when stderr is a terminal; "" clears it. */
void gn_progress(const char *fmt, ...) GN_PRINTF(1, 2);

/* The most memory that a process has held; 0 where that is not known. */
double gn_resident_peak(int pid);
/* A bar on that line, for the progress of work on files; `user` is a gn_bytes_bar that begins now.
 */
typedef struct gn_bytes_bar {
    double begin, drawn; /* gn_seconds() */
} gn_bytes_bar;
void gn_draw_bytes(void *user, int64_t done, int64_t total);

/* A whole file, malloc'ed, with a zero byte after it. */
GN_CHECKED gn_status gn_read_text(const char *path, char **text, size_t *size, gn_error *err);
/* Prints a JSON object (taken over; NULL means no memory) as one line. */
GN_CHECKED gn_status gn_print_json_take(cJSON *line, gn_error *err);

double gn_seconds(void); /* monotonic */

#endif
