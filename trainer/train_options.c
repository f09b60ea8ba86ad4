/* train_options.c - one table of options for `guanaco-trainer train`.
 *
 * An option of qlora.py that ours covers is ours under its name, or translated. One that has no
 * place here stands in a list with the only value that changes nothing, and why another is refused:
 * so every option either does what it says or ends the program. A preset is a command line that
 * stands before the user's. */
#include "trainer/train_options.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Options of qlora.py with one value that means something here: kind, name, value, reason. */
#define FIXED_OPTIONS(X)                                                                           \
    X(BOOL, do_train, "true", "this command trains; evaluate with ./guanaco eval")                 \
    X(BOOL, do_predict, "false", "nothing is generated here: chat with the saved adapter")         \
    X(BOOL, predict_with_generate, "false", "nothing is generated here: chat with the adapter")    \
    X(BOOL, fp16, "false", "float16 is not computed in; bfloat16 is (--bf16)")                     \
    X(BOOL, tf32, "false", "TF32 is not computed in; bfloat16 is (--bf16)")                        \
    X(BOOL, gradient_checkpointing, "true",                                                        \
      "what memory has no room for is computed again; what fits is kept")                          \
    X(BOOL, trust_remote_code, "false", "nothing in a model folder is ever run")                   \
    X(BOOL, use_auth, "false", "nothing is downloaded")                                            \
    X(BOOL, push_to_hub, "false", "nothing is uploaded")                                           \
    X(BOOL, remove_unused_columns, "false", "--dataset-format says which columns are used")        \
    X(BOOL, overwrite_output_dir, "false", "a run is never written over: remove its folder")       \
    X(STRING, report_to, "none", "metrics.jsonl is what other programs can read")                  \
    X(STRING, logging_strategy, "steps", "every --logging-steps is logged")                        \
    X(STRING, metric_for_best_model, "loss", "the best is that of the lowest loss")                \
    X(BOOL, greater_is_better, "false", "the best is that of the lowest loss")                     \
    X(STRING, deepspeed, NULL, "one process trains")                                               \
    X(STRING, local_rank, "-1", "one process trains")                                              \
    X(BOOL, do_sample, "false", "nothing is generated here")                                       \
    X(BOOL, use_cache, "true", "nothing is generated here")                                        \
    X(STRING, min_new_tokens, NULL, "nothing is generated here")                                   \
    X(STRING, num_beams, "1", "nothing is generated here")                                         \
    X(STRING, num_beam_groups, "1", "nothing is generated here")                                   \
    X(STRING, penalty_alpha, NULL, "nothing is generated here")                                    \
    X(STRING, temperature, "1.0", "nothing is generated here")                                     \
    X(STRING, top_k, "50", "nothing is generated here")                                            \
    X(STRING, top_p, "1.0", "nothing is generated here")                                           \
    X(STRING, typical_p, "1.0", "nothing is generated here")                                       \
    X(STRING, diversity_penalty, "0.0", "nothing is generated here")                               \
    X(STRING, repetition_penalty, "1.0", "nothing is generated here")                              \
    X(STRING, length_penalty, "1.0", "nothing is generated here")                                  \
    X(STRING, no_repeat_ngram_size, "0", "nothing is generated here")

enum {
#define X(kind, name, value, why) FIXED_##name,
    FIXED_OPTIONS(X)
#undef X
        FIXED_COUNT
};

/* What the table fills in: options, and what is translated into them afterwards. */
typedef struct parsed {
    gn_train_options o; /* first: rows that other commands have, too, are of its fields */
    int preset, save_dtype, average, eval_when;
    int bits; /* 0: not given */
    bool full_finetune, bf16, adam8bit, do_eval;
    int64_t max_memory_mb;
    const char *resume_from, *max_new_tokens, *loader_workers;
    union {
        bool flag;
        const char *text;
    } fixed[FIXED_COUNT];
} parsed;

static const char usage[] =
    "usage: guanaco-trainer train --model DIR --dataset FILE --output-dir DIR [options]\n"
    "\nTrains a LoRA adapter over a 4-bit base (QLoRA), over 16-bit weights, or a whole model.\n"
    "Every option of the original qlora.py is known by its name, and either does what it says or "
    "is\n"
    "refused.\n";

#define AT(field) offsetof(parsed, field)

static const gn_option table[] = {
    {GN_OPT_CHOICE, "preset", AT(preset), .initial = "none",
     .choices = "none|guanaco-7b|guanaco-13b|guanaco-33b|guanaco-65b", .value = "NAME",
     .help = "the QLoRA paper's settings: guanaco-7b, -13b, -33b or -65b. Other options override "
             "it"},

    GN_OPTION_GROUP("Model"),
    {GN_OPT_STRING, "model", AT(o.model.dir), .value = "DIR",
     .help = "model folder, in 16 or 32 bits or 4-bit already"},
    {GN_OPT_CHOICE, "mode", AT(o.mode), .initial = "auto", .choices = "auto|qlora|lora|full",
     .value = "MODE",
     .help = "qlora: an adapter over quantized weights (auto); lora: over weights as stored; full: "
             "all weights"},
    {GN_OPT_CHOICE, "quant-type", AT(o.model.quant), .initial = "auto",
     .choices = "auto|nf4|fp4|fp4-e2m1|fp4-e3m0|int4|int8", .value = "TYPE",
     .help = "of qlora's base: nf4, fp4, fp4-e2m1, fp4-e3m0, int4 or int8; auto is nf4, or what "
             "the folder holds"},
    {GN_OPT_BOOL, "double-quant", AT(o.model.double_quant), .initial = "true",
     .help = "quantize the scales of 4-bit types, too"},
    {GN_OPT_BOOL, "random-init", AT(o.random_init),
     .help = "full: start from random weights in the shape of the folder's config.json"},
    GN_COMPUTE_OPTIONS(gn_train_options, "auto"),
    {GN_OPT_SIZE, "memory-budget", AT(o.model.memory), .value = "SIZE",
     .help =
         "for everything together; decides what is kept and what is computed again, and what of "
         "gradients and optimizer state travels (default: a GPU's free memory; on a CPU three "
         "quarters of it)"},

    GN_OPTION_GROUP("LoRA"),
    {GN_OPT_INT, "lora-r", AT(o.rank), .initial = "64", .min = 1, .max = 65536, .help = "rank"},
    {GN_OPT_FLOAT, "lora-alpha", AT(o.alpha), .initial = "16", .value = "X",
     .help = "scale is alpha / r"},
    {GN_OPT_FLOAT, "lora-dropout", AT(o.dropout), .initial = "0", .min = 0, .max = 0.99,
     .help = "share of a module's inputs that are dropped"},
    {GN_OPT_STRING, "lora-modules", AT(o.modules), .initial = "all", .value = "LIST",
     .help = "all, or some of q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"},
    {GN_OPT_BOOL, "rslora", AT(o.rslora), .help = "scale is alpha / sqrt(r)"},
    {GN_OPT_STRING, "init-adapter", AT(o.init_adapter), .value = "DIR",
     .help = "start from this adapter's weights; its rank, alpha and modules replace those given"},
    {GN_OPT_CHOICE, "save-dtype", AT(save_dtype), .initial = "bfloat16",
     .choices = "float32|bfloat16", .value = "TYPE", .help = "of saved adapters and models"},

    GN_OPTION_GROUP("Data"),
    GN_DATA_OPTIONS(gn_train_options),
    {GN_OPT_LIST, "eval-dataset", AT(o.eval_files), .value = "FILE",
     .help = "evaluate on this file; may be repeated"},
    {GN_OPT_INT64, "eval-dataset-size", AT(o.eval_size), .initial = "0", .min = 0, .max = INFINITY,
     .help = "without --eval-dataset: hold so many samples out, and evaluate on them"},
    {GN_OPT_INT64, "max-train-samples", AT(o.max_train), .initial = "0", .min = 0, .max = INFINITY,
     .help = "0: all"},
    {GN_OPT_INT64, "max-eval-samples", AT(o.max_eval), .initial = "0", .min = 0, .max = INFINITY,
     .help = "0: all"},
    {GN_OPT_BOOL, "shuffle", AT(o.shuffle), .initial = "true",
     .help = "a new order every epoch; false: the files'"},
    {GN_OPT_BOOL, "group-by-length", AT(o.group_by_length),
     .help = "samples of like length in a step"},
    {GN_OPT_INT, "pack-length", AT(o.pack_len), .initial = "0", .min = 0, .max = 1 << 24,
     .help = "put as many samples in a row as fit in N tokens; they do not see each other. 0: one "
             "a row"},
    {GN_OPT_INT64, "seed", AT(o.seed), .initial = "42", .min = 0, .max = INFINITY,
     .help = "of all that is random; a run with the same seed is the same to the bit"},
    {GN_OPT_INT64, "data-seed", AT(o.data_seed), .initial = "-1", .min = -1, .max = INFINITY,
     .help = "of the order of samples and of what is held out; -1: --seed"},

    GN_OPTION_GROUP("Steps"),
    {GN_OPT_INT, "per-device-train-batch-size", AT(o.batch_size), .initial = "1", .min = 1,
     .max = 1 << 20, .help = "rows of a micro-batch"},
    {GN_OPT_INT, "gradient-accumulation-steps", AT(o.accumulation), .initial = "16", .min = 1,
     .max = 1 << 20, .help = "micro-batches of a step"},
    {GN_OPT_CHOICE, "loss-average", AT(average), .initial = "token", .choices = "token|micro-batch",
     .value = "HOW",
     .help = "over a step: token, each token alike; or micro-batch, each micro-batch alike, as the "
             "original did"},
    {GN_OPT_INT64, "max-steps", AT(o.max_steps), .initial = "0", .min = -1, .max = 1e12,
     .help = "0: as --num-train-epochs says"},
    {GN_OPT_FLOAT, "num-train-epochs", AT(o.epochs), .initial = "3", .min = 0, .max = 1e6,
     .help = "where --max-steps does not say"},
    {GN_OPT_FLOAT, "learning-rate", AT(o.learning_rate), .initial = "0.0002", .min = 0, .max = 1e6},
    {GN_OPT_CHOICE, "lr-scheduler-type", AT(o.scheduler), .initial = "constant",
     .choices = "constant|constant_with_warmup|linear|cosine", .value = "TYPE",
     .help = "constant (without warm-up), constant_with_warmup, linear or cosine"},
    {GN_OPT_FLOAT, "warmup-ratio", AT(o.warmup_ratio), .initial = "0.03", .min = 0, .max = 1,
     .help = "share of the steps"},
    {GN_OPT_INT64, "warmup-steps", AT(o.warmup_steps), .initial = "0", .min = 0, .max = 1e12,
     .help = "over 0: instead of the ratio"},
    {GN_OPT_CHOICE, "optim", AT(o.optim), .initial = "paged_adamw_32bit",
     .choices = "paged_adamw_32bit|paged_adamw_8bit|adamw_32bit|adamw_8bit", .value = "NAME",
     .help = "AdamW with moments in 32 or 8 bits: paged_adamw_32bit, paged_adamw_8bit, "
             "adamw_32bit, adamw_8bit. Paged state lives in host memory and visits the GPU"},
    {GN_OPT_FLOAT, "adam-beta1", AT(o.beta1), .initial = "0.9", .min = 0, .max = 1},
    {GN_OPT_FLOAT, "adam-beta2", AT(o.beta2), .initial = "0.999", .min = 0, .max = 1},
    {GN_OPT_FLOAT, "adam-epsilon", AT(o.epsilon), .initial = "1e-8", .min = 0, .max = 1},
    {GN_OPT_FLOAT, "weight-decay", AT(o.weight_decay), .initial = "0", .min = 0, .max = 1e6},
    {GN_OPT_FLOAT, "max-grad-norm", AT(o.max_grad_norm), .initial = "0.3", .min = 0, .max = 1e30,
     .help = "of all gradients together; 0: no bound"},

    GN_OPTION_GROUP("Evaluation"),
    {GN_OPT_CHOICE, "evaluation-strategy", AT(eval_when), .initial = "auto",
     .choices = "auto|no|steps|epoch", .value = "WHEN",
     .help = "steps (auto), epoch, or no: only before the first step and after the last"},
    {GN_OPT_INT64, "eval-steps", AT(o.eval_steps), .initial = "100", .min = 1, .max = INFINITY,
     .help = "steps from one evaluation to the next"},
    {GN_OPT_INT, "per-device-eval-batch-size", AT(o.eval_batch_size), .initial = "8", .min = 1,
     .max = 1 << 20, .help = "rows of a batch"},
    {GN_OPT_BOOL, "do-mmlu-eval", AT(o.does_mmlu),
     .help = "evaluate on MMLU, too: which of A, B, C and D is likeliest"},
    GN_MMLU_OPTIONS(gn_train_options),
    {GN_OPT_INT, "early-stopping-patience", AT(o.patience), .initial = "0", .min = 0,
     .max = 1 << 30, .help = "end after so many evaluations without a better loss; 0: do not"},
    {GN_OPT_BOOL, "load-best-model-at-end", AT(o.keep_best),
     .help = "what the run leaves is of the best evaluation instead of the last step"},

    GN_OPTION_GROUP("Output"),
    {GN_OPT_STRING, "output-dir", AT(o.output), .initial = "./output", .value = "DIR",
     .help = "for checkpoints, metrics.jsonl and the result"},
    {GN_OPT_BOOL, "resume", AT(o.resume),
     .help = "go on from the newest whole checkpoint in --output-dir, or start if there is none"},
    {GN_OPT_CHOICE, "save-strategy", AT(o.save_when), .initial = "steps",
     .choices = "no|steps|epoch", .value = "WHEN",
     .help = "steps, epoch, or no: only after the last step"},
    {GN_OPT_INT64, "save-steps", AT(o.save_steps), .initial = "250", .min = 1, .max = INFINITY,
     .help = "steps from one checkpoint to the next"},
    {GN_OPT_INT, "save-total-limit", AT(o.save_limit), .initial = "40", .min = 0, .max = 1 << 30,
     .help = "checkpoints to keep; 0: all"},
    {GN_OPT_INT64, "logging-steps", AT(o.logging_steps), .initial = "1", .min = 1, .max = INFINITY,
     .help = "steps from one line of metrics.jsonl to the next"},
    {GN_OPT_FLAG, "json", AT(o.json), .help = "print these lines, too"},

    GN_OPTION_GROUP("Of qlora.py, understood as ours"),
    {GN_OPT_STRING, "model_name_or_path", AT(o.model.dir), .value = "DIR", .help = "--model"},
    {GN_OPT_INT, "bits", AT(bits), .min = 0, .max = 32,
     .help = "4: --mode qlora; 8: with --quant-type int8; 16 or 32: --mode lora"},
    {GN_OPT_BOOL, "full_finetune", AT(full_finetune), .help = "--mode full"},
    {GN_OPT_BOOL, "bf16", AT(bf16), .help = "--compute-dtype bfloat16"},
    {GN_OPT_BOOL, "adam8bit", AT(adam8bit), .help = "--optim paged_adamw_8bit"},
    {GN_OPT_INT64, "max_memory_MB", AT(max_memory_mb), .min = 0, .max = 1e9,
     .help = "--memory-budget"},
    {GN_OPT_BOOL, "do_eval", AT(do_eval), .help = "--eval-dataset-size 1024, unless that is given"},
    {GN_OPT_CHOICE, "eval_strategy", AT(eval_when), .choices = "auto|no|steps|epoch",
     .value = "WHEN", .help = "--evaluation-strategy"},
    {GN_OPT_STRING, "resume_from_checkpoint", AT(resume_from), .value = "true|false",
     .help = "--resume"},
    {GN_OPT_STRING, "max_new_tokens", AT(max_new_tokens), .value = "N",
     .help = "nothing to bound: training generates nothing"},
    {GN_OPT_STRING, "dataloader_num_workers", AT(loader_workers), .value = "N",
     .help = "nothing to do: all samples are in memory"},

    GN_OPTION_GROUP("Of qlora.py, with one value here"),
#define X(option_kind, name, value, why)                                                           \
    {GN_OPT_##option_kind, #name, AT(fixed[FIXED_##name]), .initial = value, .help = why},
    FIXED_OPTIONS(X)
#undef X
        GN_OPTION_END};

/* ---- presets ---- */

#define GUANACO                                                                                    \
    "--lora-r", "64", "--lora-alpha", "16", "--lora-modules", "all", "--optim",                    \
        "paged_adamw_32bit", "--per-device-train-batch-size", "4",                                 \
        "--gradient-accumulation-steps", "4", "--max-steps", "1875", "--lr-scheduler-type",        \
        "constant", "--adam-beta2", "0.999", "--max-grad-norm", "0.3", "--weight-decay", "0",      \
        "--group-by-length", "--source-max-len", "16", "--target-max-len", "512"

enum { PRESET_ARGUMENTS = 31 };
static const char *const presets[][PRESET_ARGUMENTS] = {
    {NULL}, /* none */
    {GUANACO, "--learning-rate", "0.0002", "--lora-dropout", "0.1"},
    {GUANACO, "--learning-rate", "0.0002", "--lora-dropout", "0.1"},
    {GUANACO, "--learning-rate", "0.0001", "--lora-dropout", "0.05"},
    {GUANACO, "--learning-rate", "0.0001", "--lora-dropout", "0.05"},
};

/* Parses the preset's arguments, then the others. */
static gn_status parse_preset(parsed *p, int n, char *const *args, gn_error *err) {
    const char *const *preset = presets[p->preset];
    char **all = malloc(((size_t)n + PRESET_ARGUMENTS) * sizeof *all);
    int used = 0;
    bool help;
    if (!all) return gn_fail(err, GN_ENOMEM, "out of memory");
    for (; used < PRESET_ARGUMENTS && preset[used]; used++) all[used] = (char *)preset[used];
    for (int i = 0; i < n; i++) all[used++] = args[i];
    gn_options_free(table, p);
    const gn_status status = gn_options_parse(table, p, used, all, &help, err);
    free(all);
    return status;
}

/* ---- what the options of qlora.py mean ---- */

/* Is it the same value, if need be as numbers? */
static bool is_same(const char *a, const char *b) {
    char *end_a, *end_b;
    if (!a || !b) return !a && !b;
    const double x = strtod(a, &end_a), y = strtod(b, &end_b);
    return *a && *b && !*end_a && !*end_b ? x == y : strcmp(a, b) == 0;
}

static gn_status check_fixed(const parsed *p, gn_error *err) {
    static const struct {
        gn_option_kind kind;
        const char *name, *value, *why;
    } fixed[] = {
#define X(kind, name, value, why) {GN_OPT_##kind, #name, value, why},
        FIXED_OPTIONS(X)
#undef X
    };
    for (int i = 0; i < FIXED_COUNT; i++) {
        const char *found = fixed[i].kind == GN_OPT_STRING ? p->fixed[i].text
                            : p->fixed[i].flag             ? "true"
                                                           : "false";
        if (!is_same(found, fixed[i].value))
            return gn_fail(err, GN_EUNSUPPORTED, "--%s %.100s: %s", fixed[i].name, found,
                           fixed[i].why);
    }
    return GN_OK;
}

static gn_status resolve_mode(parsed *p, gn_error *err) {
    gn_train_options *o = &p->o;
    if (p->bits != 0 && p->bits != 4 && p->bits != 8 && p->bits != 16 && p->bits != 32)
        return gn_fail(err, GN_EINVAL, "--bits: expected 4, 8, 16 or 32, found '%d'", p->bits);
    const gn_train_mode implied = p->full_finetune ? GN_TRAIN_FULL
                                  : p->bits > 8    ? GN_TRAIN_LORA
                                  : p->bits > 0    ? GN_TRAIN_QLORA
                                                   : GN_TRAIN_AUTO;
    if (p->full_finetune && p->bits > 0 && p->bits < 16)
        return gn_fail(err, GN_EINVAL, "--full_finetune trains 16-bit weights: --bits %d is none",
                       p->bits);
    if (o->mode != GN_TRAIN_AUTO && implied != GN_TRAIN_AUTO && o->mode != (int)implied &&
        !(o->mode == GN_TRAIN_FULL && implied == GN_TRAIN_LORA))
        return gn_fail(err, GN_EINVAL, "--mode says another thing than --bits or --full_finetune");
    if (o->mode == GN_TRAIN_AUTO) o->mode = implied ? implied : GN_TRAIN_QLORA;
    if (p->bits == 8) {
        if (o->model.quant != GN_Q_NONE && o->model.quant != GN_Q_INT8)
            return gn_fail(err, GN_EINVAL, "--quant-type %s has not --bits 8",
                           gn_qtype_name((gn_qtype)o->model.quant));
        o->model.quant = GN_Q_INT8;
    }
    if (o->mode != GN_TRAIN_QLORA && o->model.quant != GN_Q_NONE)
        return gn_fail(err, GN_EINVAL, "--quant-type is for --mode qlora alone");
    if (o->random_init && o->mode != GN_TRAIN_FULL)
        return gn_fail(err, GN_EINVAL, "--random-init is for --mode full alone");
    if (o->init_adapter && o->mode == GN_TRAIN_FULL)
        return gn_fail(err, GN_EINVAL, "--init-adapter is for --mode qlora and lora");
    return GN_OK;
}

static gn_status resolve_evaluation(parsed *p, gn_error *err) {
    gn_train_options *o = &p->o;
    if (p->do_eval && o->eval_files.n == 0 && o->eval_size == 0) o->eval_size = 1024;
    if (o->eval_files.n > 0 && o->eval_size > 0)
        return gn_fail(err, GN_EINVAL,
                       "--eval-dataset and --eval-dataset-size: only one of them can be");
    const gn_mmlu_choice *mmlu = &o->mmlu;
    if (!o->does_mmlu && (mmlu->split != 0 || mmlu->max_samples > 0 ||
                          mmlu->source_max_len != 2048 || strcmp(mmlu->dataset, "mmlu-fs") != 0))
        return gn_fail(err, GN_EINVAL, "options of MMLU say nothing without --do-mmlu-eval");
    const bool has_samples = o->eval_files.n > 0 || o->eval_size > 0;
    o->evaluates = has_samples || o->does_mmlu;
    o->eval_when = p->eval_when ? p->eval_when - 1 : GN_WHEN_STEPS;
    if ((!o->evaluates && p->eval_when > 1) || (!has_samples && (o->patience > 0 || o->keep_best)))
        return gn_fail(err, GN_EINVAL,
                       "evaluation needs data: --eval-dataset FILE or --eval-dataset-size N");
    return GN_OK;
}

static gn_status resolve_resuming(parsed *p, gn_error *err) {
    static const char *const words[] = {"false", "False", "true", "True"};
    if (!p->resume_from) return GN_OK;
    for (int i = 0; i < 4; i++) {
        if (strcmp(p->resume_from, words[i]) != 0) continue;
        p->o.resume |= i > 1;
        return GN_OK;
    }
    return gn_fail(
        err, GN_EUNSUPPORTED,
        "--resume_from_checkpoint %.200s: a run goes on from the newest whole checkpoint "
        "in its --output-dir (true)",
        p->resume_from);
}

/* A data set that qlora.py finds by a name. */
static gn_status check_files(const gn_strings *files, gn_error *err) {
    for (int i = 0; i < files->n; i++) {
        for (int f = GN_FORMAT_AUTO + 1; f < GN_FORMAT_COUNT; f++) {
            if (strcmp(files->items[i], gn_format_name((gn_format)f)) == 0)
                return gn_fail(err, GN_EUNSUPPORTED,
                               "--dataset %s: nothing is downloaded; give the data set's file, and "
                               "--dataset-format %s",
                               files->items[i], files->items[i]);
        }
    }
    return GN_OK;
}

/* Options that qlora.py's own scripts set though nothing follows from them. */
static void note_idle(const parsed *p) {
    if (p->max_new_tokens)
        fprintf(stderr, "--max_new_tokens bounds nothing: training generates nothing\n");
    if (p->loader_workers)
        fprintf(stderr, "--dataloader_num_workers: none are needed, all samples are in memory\n");
}

static gn_status resolve(parsed *p, gn_error *err) {
    gn_train_options *o = &p->o;
    gn_status status = check_fixed(p, err);
    if (!status) status = resolve_mode(p, err);
    if (!status) status = resolve_evaluation(p, err);
    if (!status) status = resolve_resuming(p, err);
    if (!status) status = check_files(&o->data.files, err);
    if (status) return status;
    if (!o->model.dir) return gn_fail(err, GN_EINVAL, "--model DIR is missing");
    if (o->data.files.n == 0) return gn_fail(err, GN_EINVAL, "--dataset FILE is missing");
    if (!o->shuffle && o->group_by_length)
        return gn_fail(err, GN_EINVAL, "--group-by-length does not keep the files' order");
    if (p->bf16 && o->model.compute == GN_COMPUTE_F32)
        return gn_fail(err, GN_EINVAL, "--bf16 and --compute-dtype float32: which of them?");
    if (p->bf16) o->model.compute = GN_COMPUTE_BF16;
    if (p->adam8bit) o->optim = gn_train_is_paged(o) ? GN_PAGED_ADAMW_8BIT : GN_ADAMW_8BIT;
    if (p->max_memory_mb > 0 && o->model.memory == 0) o->model.memory = p->max_memory_mb * 1000000;
    if (o->data_seed < 0) o->data_seed = o->seed;
    o->save_dtype = p->save_dtype == 0 ? GN_F32 : GN_BF16;
    o->average_micro_batches = p->average == 1;
    return GN_OK;
}

/* ---- parsing ---- */

static gn_status read_all(parsed *p, int n, char *const *args, bool *help, gn_error *err) {
    *p = (parsed){0};
    gn_status status = gn_options_parse(table, p, n, args, help, err);
    if (!status && !*help && p->preset) status = parse_preset(p, n, args, err);
    return status || *help ? status : resolve(p, err);
}

gn_status gn_train_options_read(gn_train_options *o, int n, char *const *args, bool *help,
                                gn_error *err) {
    parsed p;
    const gn_status status = read_all(&p, n, args, help, err);
    *o = p.o;
    return status;
}

double gn_train_decimal(float x) {
    char text[32];
    snprintf(text, sizeof text, "%.7g", (double)x);
    return strtod(text, NULL);
}

void gn_train_options_free(gn_train_options *o) {
    free(o->data.files.items);
    free(o->eval_files.items);
    o->data.files = o->eval_files = (gn_strings){0};
}

bool gn_train_options_parse(gn_train_options *o, int n, char *const *args, int *exit_status) {
    parsed p;
    bool help;
    gn_error err = {0};
    const gn_status status = read_all(&p, n, args, &help, &err);
    *o = p.o;
    if (status) {
        fprintf(stderr, "guanaco-trainer: %s\n", err.message);
        *exit_status = 2;
        return false;
    }
    if (!help) {
        note_idle(&p);
        return true;
    }
    char *text = gn_options_help(table, usage);
    if (text) fputs(text, stdout);
    *exit_status = text ? 0 : 1;
    free(text);
    return false;
}
