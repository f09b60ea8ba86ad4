/* mmlu.h - multiple-choice questions: which of A, B, C and D does a model hold for the answer?
 *
 * A question is a row {"input", "output", "subject"} of a .json or .jsonl file, as qlora.py has
 * them: input is the whole prompt, up to "Answer:", with worked examples before it or without;
 * output is the right letter. A model reads BOS, the prompt, the letter and EOS. What it answers is
 * the likeliest of the four letters behind the prompt; accuracy is the mean over subjects, and the
 * loss that of the right letter and of EOS. */
#ifndef GN_MMLU_H
#define GN_MMLU_H

#include <cjson/cJSON.h>

#include "engine/options.h"
#include "engine/score.h"

enum { GN_MMLU_CHOICES = 4 };

/* As options say. */
typedef struct gn_mmlu_choice {
    const char *dataset; /* a file; mmlu-zs, mmlu-fs or mmlu: one of qlora.py's */
    int split;           /* 0: eval, 1: test */
    int64_t max_samples; /* 0: all */
    int source_max_len;
} gn_mmlu_choice;

/* Rows of a table whose fields struct has a gn_mmlu_choice called `mmlu`. */
#define GN_MMLU_OPTIONS(type)                                                                      \
    {GN_OPT_STRING,                                                                                \
     "mmlu-dataset",                                                                               \
     offsetof(type, mmlu.dataset),                                                                 \
     .initial = "mmlu-fs",                                                                         \
     .value = "FILE",                                                                              \
     .help = "rows of input, output and subject; mmlu-fs and mmlu-zs are qlora.py's files "        \
             "data/mmlu/five_shot_mmlu_val.json, zero_shot_..., ..._test.json"},                   \
        {GN_OPT_CHOICE,                                                                            \
         "mmlu-split",                                                                             \
         offsetof(type, mmlu.split),                                                               \
         .initial = "eval",                                                                        \
         .choices = "eval|test",                                                                   \
         .value = "SPLIT",                                                                         \
         .help = "eval or test: which of these files, and what results are called"},               \
        {GN_OPT_INT64, "max-mmlu-samples", offsetof(type, mmlu.max_samples), .initial = "0",       \
         .min = 0,     .max = INFINITY,    .help = "the first N; 0: all"},                         \
    {                                                                                              \
        GN_OPT_INT, "mmlu-source-max-len", offsetof(type, mmlu.source_max_len),                    \
            .initial = "2048", .min = 1, .max = 1 << 20,                                           \
            .help = "tokens of a prompt, BOS among them; of a longer one the end is kept"          \
    }

typedef struct gn_mmlu gn_mmlu;

/* Reads and tokenizes the questions for the model in a folder; none has more than max_len tokens
 * (0: any number). A bad row is GN_EFORMAT, "FILE:LINE: what". */
GN_CHECKED gn_status gn_mmlu_open(gn_mmlu **out, const gn_mmlu_choice *choice,
                                  const char *model_dir, int32_t max_len, gn_error *err);
void gn_mmlu_close(gn_mmlu *m);

/* Borrowed. ids (n): BOS and the prompt, `source` of them, the right letter, and EOS if the
 * tokenizer has one. */
typedef struct gn_mmlu_question {
    const int32_t *ids;
    int32_t n, source;
} gn_mmlu_question;
int64_t gn_mmlu_count(const gn_mmlu *m);
gn_mmlu_question gn_mmlu_at(const gn_mmlu *m, int64_t i);
int32_t gn_mmlu_longest(const gn_mmlu *m);        /* n of the longest */
const int32_t *gn_mmlu_letters(const gn_mmlu *m); /* (GN_MMLU_CHOICES) tokens */

/* ---- results ---- */

void gn_mmlu_clear(gn_mmlu *m);
/* nll: of each letter behind question i's prompt. */
void gn_mmlu_add(gn_mmlu *m, int64_t i, const float nll[GN_MMLU_CHOICES]);
/* The sum over what follows the prompts of one or several questions. */
void gn_mmlu_add_loss(gn_mmlu *m, double loss);
/* Asks question i by a scorer of such a model, and adds what came of it. */
GN_CHECKED gn_status gn_mmlu_ask(gn_mmlu *m, int64_t i, gn_scorer *scorer,
                                 const gn_adapter_use *uses, int32_t n_uses);
/* What results are made of: to be added up over processes that each added their part. */
double *gn_mmlu_sums(gn_mmlu *m, int *n);

typedef struct gn_mmlu_result {
    const char *split; /* "eval", "test" */
    int64_t questions;
    double accuracy, loss;
} gn_mmlu_result;
gn_mmlu_result gn_mmlu_read(const gn_mmlu *m);
/* Adds mmlu_loss, mmlu_SPLIT_accuracy and mmlu_SPLIT_accuracy_SUBJECT to an object. */
void gn_mmlu_write(const gn_mmlu *m, cJSON *line);

#endif
