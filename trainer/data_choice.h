/* data_choice.h - the options by which commands take data sets. */
#ifndef GN_DATA_CHOICE_H
#define GN_DATA_CHOICE_H

#include "engine/options.h"
#include "trainer/dataset.h"

typedef struct gn_data_choice {
    gn_strings files;
    int format; /* gn_format */
    int source_max_len, target_max_len;
    bool train_on_source, skip_bad_rows;
    const char *chat_template, *cache_dir;
} gn_data_choice;

/* Rows of a table whose fields struct has a gn_data_choice called `data`. */
#define GN_DATA_OPTIONS(type)                                                                      \
    {GN_OPT_LIST, "dataset", offsetof(type, data.files), .value = "FILE[:WEIGHT]",                 \
     .help = "a .json, .jsonl, .csv or .tsv file; may be repeated. An epoch has each of its "      \
             "samples WEIGHT times"},                                                              \
        {GN_OPT_CHOICE,                                                                            \
         "dataset-format",                                                                         \
         offsetof(type, data.format),                                                              \
         .initial = "auto",                                                                        \
         .choices = GN_FORMAT_CHOICES,                                                             \
         .value = "FORMAT",                                                                        \
         .help = "what the rows mean: input-output, alpaca, self-instruct, chip2, hh-rlhf, "       \
                 "longform, oasst1, sharegpt, messages, tokenized; auto goes by their fields"},    \
        {GN_OPT_INT,                                                                               \
         "source-max-len",                                                                         \
         offsetof(type, data.source_max_len),                                                      \
         .initial = "1024",                                                                        \
         .min = 1,                                                                                 \
         .max = 1 << 20,                                                                           \
         .help = "tokens of a prompt, BOS among them; what is longer is cut"},                     \
        {GN_OPT_INT,                                                                               \
         "target-max-len",                                                                         \
         offsetof(type, data.target_max_len),                                                      \
         .initial = "256",                                                                         \
         .min = 2,                                                                                 \
         .max = 1 << 20,                                                                           \
         .help = "tokens of a reply, EOS among them; what is longer is cut before EOS. A "         \
                 "conversation may have as many as both together"},                                \
        {GN_OPT_BOOL, "train-on-source", offsetof(type, data.train_on_source),                     \
         .help = "learn prompts, too"},                                                            \
        {GN_OPT_STRING, "chat-template", offsetof(type, data.chat_template), .value = "NAME|FILE", \
         .help = "how conversations are written (default: the model's)"},                          \
        {GN_OPT_BOOL, "skip-bad-rows", offsetof(type, data.skip_bad_rows),                         \
         .help = "count rows that cannot be read; else the first ends the program"},               \
    {                                                                                              \
        GN_OPT_STRING, "cache-dir", offsetof(type, data.cache_dir),                                \
            .value = "DIR",                                                                        \
            .help =                                                                                \
                "where tokenized data sets are kept (default: ~/.cache/guanaco); none: nowhere"    \
    }

/* Opens the data sets for the model in model_dir. Notes and progress go to stderr. */
GN_CHECKED gn_status gn_data_choice_open(const gn_data_choice *choice, const char *model_dir,
                                         int threads, gn_dataset **out, gn_error *err);

#endif
