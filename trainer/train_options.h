/* train_options.h - what `guanaco-trainer train` is told: its own options, and qlora.py's. */
#ifndef GN_TRAIN_OPTIONS_H
#define GN_TRAIN_OPTIONS_H

#include "trainer/data_choice.h"
#include "trainer/mmlu.h"
#include "trainer/schedule.h"
#include "trainer/trainer.h"

typedef enum gn_train_mode {
    GN_TRAIN_AUTO,
    GN_TRAIN_QLORA,
    GN_TRAIN_LORA,
    GN_TRAIN_FULL
} gn_train_mode;
typedef enum gn_train_when { GN_WHEN_NEVER, GN_WHEN_STEPS, GN_WHEN_EPOCH } gn_train_when;
typedef enum gn_train_optim { /* as in the option's choices */
                              GN_PAGED_ADAMW_32BIT,
                              GN_PAGED_ADAMW_8BIT,
                              GN_ADAMW_32BIT,
                              GN_ADAMW_8BIT
} gn_train_optim;

typedef struct gn_train_options {
    gn_model_choice model; /* quant: NONE is chosen by mode and folder */
    int mode;              /* gn_train_mode; not AUTO once parsed */
    bool random_init;      /* full: start from random weights */
    /* LoRA */
    int rank;
    float alpha, dropout;
    const char *modules; /* "all", or names with commas between */
    bool rslora;
    const char *init_adapter;
    int save_dtype; /* gn_dtype; not given: BF16 */
    /* Data */
    gn_data_choice data;
    gn_strings eval_files;
    int64_t eval_size; /* samples held out */
    int64_t max_train, max_eval;
    bool shuffle, group_by_length;
    int pack_len;
    int64_t seed, data_seed;
    /* Steps */
    int batch_size, accumulation;
    int64_t max_steps; /* at most 0: by epochs */
    float epochs;
    float learning_rate, warmup_ratio, weight_decay, beta1, beta2, epsilon, max_grad_norm;
    int64_t warmup_steps;
    int scheduler; /* gn_lr_kind */
    int optim;     /* gn_train_optim */
    bool average_micro_batches;
    /* Evaluation and output */
    bool evaluates, does_mmlu; /* the former is decided once parsed */
    gn_mmlu_choice mmlu;
    int eval_when;
    int64_t eval_steps;
    int eval_batch_size;
    int patience; /* evaluations; 0: train to the end */
    bool keep_best;
    const char *output;
    int save_when;
    int64_t save_steps;
    int save_limit;
    int64_t logging_steps;
    bool resume, json;
} gn_train_options;

/* Parses a command line, and deals with --help and mistakes; false: end with *exit_status. Whatever
 * comes back, gn_train_options_free may follow. */
GN_CHECKED bool gn_train_options_parse(gn_train_options *o, int n, char *const *args,
                                       int *exit_status);
void gn_train_options_free(gn_train_options *o);

static inline bool gn_train_is_paged(const gn_train_options *o) {
    return o->optim == GN_PAGED_ADAMW_32BIT || o->optim == GN_PAGED_ADAMW_8BIT;
}
static inline bool gn_train_is_8bit(const gn_train_options *o) {
    return o->optim == GN_PAGED_ADAMW_8BIT || o->optim == GN_ADAMW_8BIT;
}

/* An option's number as it was written: 2e-4 and not 0.000199999995. */
double gn_train_decimal(float x);

/* For tests: the same without printing. *help: --help was asked for. */
GN_CHECKED gn_status gn_train_options_read(gn_train_options *o, int n, char *const *args,
                                           bool *help, gn_error *err);

#endif
