/* train_lines.h - for tests: training runs as command lines, what they leave, and the golden run.
 */
#ifndef GN_TEST_TRAIN_LINES_H
#define GN_TEST_TRAIN_LINES_H

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/json_file.h"
#include "engine/tensor_file.h"
#include "tests/support/folder.h"
#include "trainer/train.h"

#define DATA GN_SOURCE_DIR "/tests/golden/data/"

#ifndef TRAIN_DEVICE
#define TRAIN_DEVICE "cpu"
#endif

enum { MAX_ARGUMENTS = 64, MAX_LINES = 256, STEPS = 20, SAMPLES = 4, TOKENS = 64 };

/* ---- runs ---- */

/* Trains as a command line says, whose @ stand for the test's folder. */
static inline gn_status run_with(gn_communicator *c, const char *line, gn_error *err) {
    char *args[MAX_ARGUMENTS], *rest = NULL, *words = test_alloc(strlen(line));
    int n = 0;
    bool help;
    gn_train_options o;
    strcpy(words, line);
    for (char *word = strtok_r(words, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
        cr_assert(n < MAX_ARGUMENTS);
        args[n++] = *word == '@' ? (char *)test_path(word + 1) : word;
    }
    *err = (gn_error){0};
    gn_status status = gn_train_options_read(&o, n, args, &help, err);
    if (!status) status = gn_train(&o, c, err);
    gn_train_options_free(&o);
    return status;
}

static inline gn_status try_run(const char *line, gn_error *err) {
    gn_communicator alone = gn_communicator_alone();
    return run_with(&alone, line, err);
}

static inline void run(const char *line) {
    gn_error err;
    cr_assert_eq(try_run(line, &err), GN_OK, "%s: %s", line, err.message);
}

static inline void refused(const char *line, gn_status status, const char *why) {
    gn_error err;
    cr_assert_eq(try_run(line, &err), status, "%s: %s", line, err.message);
    cr_assert(strstr(err.message, why), "%s: %s", line, err.message);
}

/* Of training an adapter for 6 steps of 4 small samples; the rest is added. */
#define SMALL                                                                                      \
    "--device " TRAIN_DEVICE " --compute-dtype float32 --cache-dir none --model " DATA             \
    "tiny-bnb-nf4 "                                                                                \
    "--dataset @data.jsonl --dataset-format tokenized --lora-r 4 --learning-rate 0.01 "            \
    "--per-device-train-batch-size 2 "                                                             \
    "--gradient-accumulation-steps 2 --max-steps 6 --save-dtype float32 "

/* n samples of 8 to 15 tokens that are easily learned: each goes up by one. */
static inline void write_data(const char *name, int n) {
    FILE *f = fopen(test_path(name), "wb");
    cr_assert(f);
    for (int i = 0; i < n; i++) {
        fprintf(f, "{\"input_ids\":[1");
        for (int k = 0; k < 7 + i % 8; k++) fprintf(f, ",%d", 20 + (i * 37 + k) % 400);
        fprintf(f, "]}\n");
    }
    cr_assert_eq(fclose(f), 0);
}

/* n questions of two subjects. */
static inline void write_questions(const char *name, int n) {
    FILE *f = fopen(test_path(name), "wb");
    cr_assert(f);
    for (int i = 0; i < n; i++)
        fprintf(f,
                "{\"input\":\"What is %d and %d?\\nA. %d\\nB. 7\\nC. 9\\nD. 0\\nAnswer:\", "
                "\"output\":\"%c\",\"subject\":\"%s\"}\n",
                i * 13 % 50, i, i, 'A' + i * 7 % 4, i % 3 ? "sums" : "more_sums");
    cr_assert_eq(fclose(f), 0);
}

/* ---- what they leave ---- */

static cJSON *lines[MAX_LINES];

/* Lines of OUTPUT/metrics.jsonl. */
static inline int read_metrics(const char *output) {
    char name[64], *text, *rest = NULL;
    size_t length;
    gn_error err = {0};
    int n = 0;
    snprintf(name, sizeof name, "%s/metrics.jsonl", output);
    cr_assert_eq(gn_text_read(&text, &length, test_path(name), &err), GN_OK, "%s", err.message);
    cr_assert(length == 0 || text[length - 1] == '\n');
    for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        cr_assert(n < MAX_LINES);
        cJSON_Delete(lines[n]);
        lines[n] = cJSON_Parse(line);
        cr_assert(lines[n], "%s", line);
        n++;
    }
    free(text);
    return n;
}

static inline double value(int line, const char *name) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(lines[line], name);
    cr_assert(cJSON_IsNumber(item), "line %d has no %s", line, name);
    return item->valuedouble;
}

static inline bool has(int line, const char *name) {
    return cJSON_GetObjectItemCaseSensitive(lines[line], name) != NULL;
}

static inline char *contents(const char *name, size_t *length) {
    char *text;
    gn_error err = {0};
    cr_assert_eq(gn_text_read(&text, length, test_path(name), &err), GN_OK, "%s", err.message);
    return text;
}

static inline bool same_files(const char *a, const char *b) {
    size_t n, m;
    char *x = contents(a, &n), *y = contents(b, &m);
    const bool same = n == m && memcmp(x, y, n) == 0;
    free(x);
    free(y);
    return same;
}

/* ---- against torch, PEFT and bitsandbytes ---- */

/* The golden run's batches as rows of a data set. */
static inline void write_golden(const gn_tensor_file *file) {
    const gn_file_tensor *ids = gn_tensor_file_find(file, "input_ids");
    const gn_file_tensor *labels = gn_tensor_file_find(file, "labels");
    FILE *f = fopen(test_path("golden.jsonl"), "wb");
    cr_assert(f && ids && labels);
    for (int row = 0; row < STEPS * SAMPLES; row++) {
        for (int part = 0; part < 2; part++) {
            fprintf(f, part ? "],\"labels\":[" : "{\"input_ids\":[");
            for (int i = 0; i < TOKENS; i++) {
                int32_t id;
                memcpy(&id,
                       (const char *)(part ? labels : ids)->data +
                           sizeof id * (size_t)(row * TOKENS + i),
                       sizeof id);
                fprintf(f, i ? ",%d" : "%d", id);
            }
        }
        fprintf(f, "]}\n");
    }
    cr_assert_eq(fclose(f), 0);
}

/* Losses differ by at most `loss_tolerance`, norms by that share of themselves. */
static inline void compare_golden(const gn_tensor_file *file, const char *prefix,
                                  const char *output, double loss_tolerance,
                                  double norm_tolerance) {
    char name[64];
    float loss[STEPS], norm[STEPS];
    double worst_loss = 0, worst_norm = 0;
    snprintf(name, sizeof name, "%sloss", prefix);
    memcpy(loss, gn_tensor_file_find(file, name)->data, sizeof loss);
    snprintf(name, sizeof name, "%sgrad_norm", prefix);
    memcpy(norm, gn_tensor_file_find(file, name)->data, sizeof norm);
    cr_assert_eq(read_metrics(output), STEPS);
    for (int i = 0; i < STEPS; i++) {
        cr_assert_eq(value(i, "step"), i + 1);
        worst_loss = fmax(worst_loss, fabs(value(i, "loss") - loss[i]));
        worst_norm = fmax(worst_norm, fabs(value(i, "grad_norm") - norm[i]) / norm[i]);
    }
    fprintf(stderr, "%slosses within %.1e, gradient norms within %.1e\n", prefix, worst_loss,
            worst_norm);
    cr_assert(worst_loss < loss_tolerance, "%g", worst_loss);
    cr_assert(worst_norm < norm_tolerance, "%g", worst_norm);
}

#define GOLDEN                                                                                     \
    "--device " TRAIN_DEVICE " --compute-dtype float32 --cache-dir none --dataset @golden.jsonl "  \
    "--dataset-format tokenized --shuffle false --per_device_train_batch_size 4 "                  \
    "--gradient_accumulation_steps 1 --max_steps 20 --max_grad_norm 0.3 --save-dtype float32 "

#endif
