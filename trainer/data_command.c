/* data_command.c - `guanaco-trainer data`: what training would make of data sets. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "engine/tokenizer.h"
#include "trainer/bench_times.h"
#include "trainer/data_choice.h"
#include "trainer/trainer.h"

typedef struct data_options {
    const char *model;
    gn_data_choice data;
    int show, threads;
    bool json;
} data_options;

static const char usage[] =
    "usage: guanaco-trainer data --model DIR --dataset FILE[:WEIGHT]... [options]\n"
    "\nReads and tokenizes data sets as training does, and says what is in them.\n\n";

static const gn_option table[] = {
    {GN_OPT_STRING, "model", offsetof(data_options, model), .value = "DIR",
     .help = "model folder; its weights are not read"},
    GN_DATA_OPTIONS(data_options),
    {GN_OPT_INT, "show", offsetof(data_options, show), .initial = "0", .min = 0, .max = 1 << 30,
     .value = "N", .help = "print the first N samples of each file, what is learned marked"},
    {GN_OPT_INT, "threads", offsetof(data_options, threads), .initial = "0", .min = 0, .max = 4096,
     .help = "0: as many as there are cores"},
    {GN_OPT_FLAG, "json", offsetof(data_options, json), .help = "one JSON object a line"},
    GN_OPTION_END};

typedef struct report {
    const data_options *options;
    const gn_dataset *d;
    gn_tokenizer *tokenizer;
    gn_error *err;
} report;

/* ---- files ---- */

static void add_lengths(cJSON *line, double *lengths, int n) {
    cJSON_AddNumberToObject(line, "shortest", gn_percentile(lengths, n, 0));
    cJSON_AddNumberToObject(line, "median", gn_percentile(lengths, n, 0.5));
    cJSON_AddNumberToObject(line, "p95", gn_percentile(lengths, n, 0.95));
    cJSON_AddNumberToObject(line, "longest", gn_percentile(lengths, n, 1));
}

static gn_status print_file_json(const gn_dataset_file *f, double *lengths, gn_error *err) {
    cJSON *line = cJSON_CreateObject();
    cJSON_AddStringToObject(line, "file", f->path);
    cJSON_AddStringToObject(line, "format", gn_format_name(f->format));
    cJSON_AddNumberToObject(line, "weight", f->weight);
    cJSON_AddNumberToObject(line, "rows", (double)f->counts.rows);
    cJSON_AddNumberToObject(line, "bad_rows", (double)f->counts.bad_rows);
    cJSON_AddNumberToObject(line, "left_out", (double)f->counts.left_out);
    cJSON_AddNumberToObject(line, "samples", (double)f->n);
    cJSON_AddNumberToObject(line, "truncated", (double)f->counts.truncated);
    cJSON_AddNumberToObject(line, "tokens", (double)f->n_tokens);
    cJSON_AddNumberToObject(line, "learned", (double)f->counts.learned);
    add_lengths(line, lengths, (int)f->n);
    return gn_print_json_take(line, err);
}

static void print_file_text(const gn_dataset_file *f, double *lengths) {
    const int n = (int)f->n;
    printf("%s: %s, weight %g\n", f->path, gn_format_name(f->format), f->weight);
    printf("  rows     %lld, of which %lld bad and %lld with nothing to learn\n",
           (long long)f->counts.rows, (long long)f->counts.bad_rows, (long long)f->counts.left_out);
    printf("  samples  %lld, of which %lld cut\n", (long long)f->n, (long long)f->counts.truncated);
    printf("  tokens   %lld, of which %lld learned (%.1f %%)\n", (long long)f->n_tokens,
           (long long)f->counts.learned, 100.0 * (double)f->counts.learned / (double)f->n_tokens);
    printf("  length   %.0f to %.0f, mean %.1f, median %.0f, 95 %% up to %.0f\n",
           gn_percentile(lengths, n, 0), gn_percentile(lengths, n, 1),
           (double)f->n_tokens / (double)n, gn_percentile(lengths, n, 0.5),
           gn_percentile(lengths, n, 0.95));
}

static gn_status print_file(const report *r, const gn_dataset_file *f) {
    double *lengths = f->n <= INT32_MAX ? malloc((size_t)f->n * sizeof *lengths) : NULL;
    if (!lengths) return gn_fail(r->err, GN_ENOMEM, "out of memory");
    for (int64_t i = 0; i < f->n; i++) lengths[i] = gn_dataset_sample(r->d, f->first + i).n;
    gn_status status = GN_OK;
    if (r->options->json)
        status = print_file_json(f, lengths, r->err);
    else
        print_file_text(f, lengths);
    free(lengths);
    return status;
}

/* ---- samples ---- */

/* Where the run of tokens that are learned like the one at `begin` ends. */
static int32_t run_end(const gn_sample *s, int32_t begin) {
    const bool learned = s->labels[begin] != GN_NOT_LEARNED;
    int32_t end = begin;
    while (end < s->n && (s->labels[end] != GN_NOT_LEARNED) == learned) end++;
    return end;
}

/* A control piece as <s>, </s> or its number. */
static gn_status write_control(const report *r, FILE *out, int32_t id) {
    if (id == gn_tokenizer_bos(r->tokenizer)) return fputs("<s>", out) < 0 ? GN_EIO : GN_OK;
    if (id == gn_tokenizer_eos(r->tokenizer)) return fputs("</s>", out) < 0 ? GN_EIO : GN_OK;
    return fprintf(out, "<%d>", (int)id) < 0 ? GN_EIO : GN_OK;
}

static gn_status write_token(const report *r, FILE *out, gn_detokenizer *text, int32_t id) {
    const char *certain;
    size_t len;
    bool stopped;
    gn_tokenizer_bytes(r->tokenizer, id, &len);
    if (len == 0) return write_control(r, out, id);
    const gn_status status = gn_detokenizer_feed(text, id, &certain, &len, &stopped);
    if (!status) fwrite(certain, 1, len, out);
    return status;
}

/* The text of a run of tokens, malloc'ed. */
static gn_status run_text(const report *r, const int32_t *ids, int32_t n, char **text) {
    const char *rest;
    size_t len;
    gn_detokenizer *d = NULL;
    *text = NULL;
    FILE *out = open_memstream(text, &len);
    gn_status status = out ? gn_detokenizer_open(&d, r->tokenizer, NULL, 0, false) : GN_ENOMEM;
    for (int32_t i = 0; i < n && !status; i++) status = write_token(r, out, d, ids[i]);
    if (!status) status = gn_detokenizer_flush(d, &rest, &len);
    if (!status) fwrite(rest, 1, len, out);
    gn_detokenizer_close(d);
    if (out && fclose(out) != 0 && !status) status = GN_ENOMEM;
    return status ? gn_fail(r->err, status, "%s", gn_status_text(status)) : GN_OK;
}

static gn_status print_sample_text(const report *r, const gn_sample *s) {
    const bool color = isatty(STDOUT_FILENO);
    const char *open = color ? "\033[7m" : "[[", *close = color ? "\033[0m" : "]]";
    gn_status status = GN_OK;
    printf("\n-- %s:%lld, %d tokens --\n", gn_dataset_file_at(r->d, s->file).path,
           (long long)s->line, (int)s->n);
    for (int32_t begin = 0, end; begin < s->n && !status; begin = end) {
        const bool learned = s->labels[begin] != GN_NOT_LEARNED;
        char *text;
        end = run_end(s, begin);
        status = run_text(r, s->ids + begin, end - begin, &text);
        if (!status) printf("%s%s%s", learned ? open : "", text, learned ? close : "");
        free(text);
    }
    printf("\n");
    return status;
}

static gn_status print_sample_json(const report *r, const gn_sample *s) {
    cJSON *line = cJSON_CreateObject();
    cJSON_AddStringToObject(line, "file", gn_dataset_file_at(r->d, s->file).path);
    cJSON_AddNumberToObject(line, "line", (double)s->line);
    cJSON_AddNumberToObject(line, "tokens", s->n);
    cJSON *parts = cJSON_AddArrayToObject(line, "text");
    gn_status status = GN_OK;
    for (int32_t begin = 0, end; begin < s->n && !status; begin = end) {
        cJSON *part = cJSON_CreateObject();
        char *text;
        end = run_end(s, begin);
        status = run_text(r, s->ids + begin, end - begin, &text);
        if (!status) cJSON_AddStringToObject(part, "text", text);
        cJSON_AddBoolToObject(part, "learned", s->labels[begin] != GN_NOT_LEARNED);
        cJSON_AddItemToArray(parts, part);
        free(text);
    }
    if (!status) return gn_print_json_take(line, r->err);
    cJSON_Delete(line);
    return status;
}

static gn_status print_all(const report *r) {
    gn_status status = GN_OK;
    for (int i = 0; i < gn_dataset_files(r->d) && !status; i++) {
        const gn_dataset_file f = gn_dataset_file_at(r->d, i);
        status = print_file(r, &f);
        for (int64_t k = 0; k < f.n && k < r->options->show && !status; k++) {
            const gn_sample s = gn_dataset_sample(r->d, f.first + k);
            status = r->options->json ? print_sample_json(r, &s) : print_sample_text(r, &s);
        }
    }
    return status;
}

static gn_status run(const data_options *o, gn_error *err) {
    gn_dataset *d;
    if (!o->model) return gn_fail(err, GN_EINVAL, "--model DIR is missing");
    gn_status status = gn_data_choice_open(&o->data, o->model, o->threads, &d, err);
    if (status) return status;
    report r = {.options = o, .d = d, .err = err};
    status = gn_tokenizer_open(&r.tokenizer, o->model, INT32_MAX, err);
    if (!status) status = print_all(&r);
    gn_tokenizer_close(r.tokenizer);
    gn_dataset_close(d);
    return status;
}

int gn_data_command(int n, char *const *args) {
    data_options o;
    int exit_status;
    gn_error err = {0};
    if (!gn_command_options(table, &o, usage, n, args, &exit_status)) return exit_status;
    exit_status = run(&o, &err) ? gn_command_failed(&err) : 0;
    gn_options_free(table, &o);
    return exit_status;
}
