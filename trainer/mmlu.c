/* mmlu.c - questions from a file, and what a model made of them. */
#include "trainer/mmlu.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/config.h"
#include "engine/sample.h"
#include "engine/tokenizer.h"
#include "trainer/rows.h"

/* A line of metrics.jsonl holds all subjects. */
enum { MAX_SUBJECTS = 256, MAX_SUBJECT_NAME = 96 };

/* Sums: the loss, the tokens it is of, and two for each subject. */
enum { LOSS, TOKENS, SUBJECTS, RIGHT = 0, ASKED, PER_SUBJECT };

typedef struct question {
    int64_t first; /* of its tokens */
    int32_t n, source;
    int answer, subject;
} question;

struct gn_mmlu {
    const char *split;
    gn_tokenizer *tokenizer; /* while questions are read */
    int vocab;
    int32_t letters[GN_MMLU_CHOICES], longest;
    question *questions;
    int64_t n, n_ids, room; /* of ids */
    int32_t *ids;
    char *subjects[MAX_SUBJECTS];
    int n_subjects;
    double sums[SUBJECTS + PER_SUBJECT * MAX_SUBJECTS];
};

static gn_status no_memory(gn_error *err) {
    return gn_fail(err, GN_ENOMEM, "out of memory for questions");
}

/* ---- reading ---- */

static gn_status find_letters(gn_mmlu *m, const char *dir, gn_error *err) {
    for (int i = 0; i < GN_MMLU_CHOICES; i++) {
        const char letter = (char)('A' + i);
        int32_t *ids, n;
        const gn_status status = gn_tokenizer_encode(m->tokenizer, &letter, 1, &ids, &n, err);
        if (status) return status;
        if (n == 1) m->letters[i] = ids[0];
        free(ids);
        if (n != 1)
            return gn_fail(err, GN_EUNSUPPORTED,
                           "%s: its tokenizer makes %d tokens of '%c'; a choice must be one", dir,
                           n, letter);
    }
    return GN_OK;
}

static bool add_id(gn_mmlu *m, int32_t id) {
    if (m->n_ids == m->room) {
        const int64_t room = 2 * m->room + 4096;
        int32_t *grown = realloc(m->ids, (size_t)room * sizeof *grown);
        if (!grown) return false;
        m->ids = grown;
        m->room = room;
    }
    m->ids[m->n_ids++] = id;
    return true;
}

static gn_status find_subject(gn_mmlu *m, const char *name, int *subject, gn_error *err) {
    for (*subject = 0; *subject < m->n_subjects; ++*subject)
        if (!strcmp(m->subjects[*subject], name)) return GN_OK;
    if (!*name || strlen(name) > MAX_SUBJECT_NAME)
        return gn_fail(err, GN_EFORMAT, "\"subject\" has %zu bytes; 1 to %d are allowed",
                       strlen(name), MAX_SUBJECT_NAME);
    if (m->n_subjects == MAX_SUBJECTS)
        return gn_fail(err, GN_EFORMAT, "over %d subjects", MAX_SUBJECTS);
    m->subjects[m->n_subjects] = strdup(name);
    if (!m->subjects[m->n_subjects]) return no_memory(err);
    m->n_subjects++;
    return GN_OK;
}

/* BOS and the end of the prompt that fits in `most` tokens with it. */
static gn_status add_prompt(gn_mmlu *m, question *q, const char *text, int32_t most,
                            gn_error *err) {
    const int32_t bos = gn_tokenizer_bos(m->tokenizer);
    int32_t *ids, n;
    const gn_status status = gn_tokenizer_encode(m->tokenizer, text, strlen(text), &ids, &n, err);
    if (status) return status;
    bool ok = bos < 0 || add_id(m, bos);
    const int32_t room = most - (bos >= 0);
    for (int32_t i = n > room ? n - room : 0; i < n && ok; i++) ok = add_id(m, ids[i]);
    free(ids);
    q->source = (int32_t)(m->n_ids - q->first);
    return ok ? GN_OK : no_memory(err);
}

static const char *text_of(const cJSON *row, const char *name, gn_error *err) {
    const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(row, name));
    if (!text) (void)gn_fail(err, GN_EFORMAT, "\"%s\" is missing or not a string", name);
    return text;
}

static gn_status add_question(gn_mmlu *m, const cJSON *row, int32_t most, gn_error *err) {
    const char *input = text_of(row, "input", err);
    const char *output = input ? text_of(row, "output", err) : NULL;
    const char *subject = output ? text_of(row, "subject", err) : NULL;
    question *q = &m->questions[m->n];
    if (!subject) return GN_EFORMAT;
    if (strlen(output) != 1 || *output < 'A' || *output >= 'A' + GN_MMLU_CHOICES)
        return gn_fail(err, GN_EFORMAT, "\"output\" is '%.20s'; it must be A, B, C or D", output);
    *q = (question){.first = m->n_ids, .answer = *output - 'A'};
    gn_status status = find_subject(m, subject, &q->subject, err);
    if (!status) status = add_prompt(m, q, input, most, err);
    if (status) return status;
    if (q->source == 0) return gn_fail(err, GN_EFORMAT, "\"input\" has no tokens");
    const int32_t eos = gn_tokenizer_eos(m->tokenizer);
    if (!add_id(m, m->letters[q->answer]) || (eos >= 0 && !add_id(m, eos))) return no_memory(err);
    q->n = (int32_t)(m->n_ids - q->first);
    if (q->n > m->longest) m->longest = q->n;
    m->n++;
    return GN_OK;
}

static gn_status read_rows(gn_mmlu *m, const gn_rows *rows, int64_t n, int32_t most,
                           gn_error *err) {
    m->questions = calloc((size_t)n, sizeof *m->questions);
    if (!m->questions) return no_memory(err);
    for (int64_t i = 0; i < n; i++) {
        cJSON *row;
        gn_error why = {0};
        gn_status status = gn_rows_parse(rows, i, &row, &why);
        if (!status) status = add_question(m, row, most, &why);
        cJSON_Delete(row);
        if (status)
            return gn_fail(err, status, "%s:%lld: %s", gn_rows_path(rows),
                           (long long)gn_rows_line(rows, i), why.message);
    }
    return GN_OK;
}

/* ---- opening ---- */

/* The file that a name of qlora.py's means; else the name. */
static void find_file(char *path, size_t size, const gn_mmlu_choice *choice) {
    const char *name = choice->dataset;
    const char *shots = !strcmp(name, "mmlu-zs")                            ? "zero"
                        : !strcmp(name, "mmlu-fs") || !strcmp(name, "mmlu") ? "five"
                                                                            : NULL;
    if (shots)
        snprintf(path, size, "data/mmlu/%s_shot_mmlu_%s.json", shots,
                 choice->split ? "test" : "val");
    else
        snprintf(path, size, "%s", name);
}

static gn_status read_file(gn_mmlu *m, const gn_mmlu_choice *choice, int32_t max_len,
                           gn_error *err) {
    enum { ANSWER = 2 }; /* with EOS */
    char path[4096];
    gn_rows *rows;
    find_file(path, sizeof path, choice);
    const gn_status status = gn_rows_open(&rows, path, err);
    if (status) return status;
    const int64_t all = gn_rows_count(rows), most = choice->max_samples;
    int64_t source = choice->source_max_len;
    if (max_len > 0) source = gn_min(source, gn_max(max_len - ANSWER, 1));
    const gn_status read =
        read_rows(m, rows, most > 0 ? gn_min(most, all) : all, (int32_t)source, err);
    gn_rows_close(rows);
    return read;
}

gn_status gn_mmlu_open(gn_mmlu **out, const gn_mmlu_choice *choice, const char *model_dir,
                       int32_t max_len, gn_error *err) {
    gn_config config;
    gn_mmlu *m = calloc(1, sizeof *m);
    *out = NULL;
    if (!m) return no_memory(err);
    m->split = choice->split ? "test" : "eval";
    gn_status status = gn_config_read(&config, model_dir, err);
    if (!status) status = gn_tokenizer_open(&m->tokenizer, model_dir, config.vocab, err);
    m->vocab = config.vocab;
    if (!status) status = find_letters(m, model_dir, err);
    if (!status) status = read_file(m, choice, max_len, err);
    gn_tokenizer_close(m->tokenizer);
    m->tokenizer = NULL;
    if (status)
        gn_mmlu_close(m);
    else
        *out = m;
    return status;
}

void gn_mmlu_close(gn_mmlu *m) {
    if (!m) return;
    for (int i = 0; i < m->n_subjects; i++) free(m->subjects[i]);
    free(m->questions);
    free(m->ids);
    free(m);
}

/* ---- questions ---- */

int64_t gn_mmlu_count(const gn_mmlu *m) {
    return m->n;
}

gn_mmlu_question gn_mmlu_at(const gn_mmlu *m, int64_t i) {
    const question *q = &m->questions[i];
    return (gn_mmlu_question){m->ids + q->first, q->n, q->source};
}

int32_t gn_mmlu_longest(const gn_mmlu *m) {
    return m->longest;
}

const int32_t *gn_mmlu_letters(const gn_mmlu *m) {
    return m->letters;
}

/* ---- results ---- */

void gn_mmlu_clear(gn_mmlu *m) {
    memset(m->sums, 0, sizeof m->sums);
}

void gn_mmlu_add(gn_mmlu *m, int64_t i, const float nll[GN_MMLU_CHOICES]) {
    const question *q = &m->questions[i];
    double *sums = &m->sums[SUBJECTS + PER_SUBJECT * q->subject];
    int best = 0;
    for (int k = 1; k < GN_MMLU_CHOICES; k++)
        if (nll[k] < nll[best]) best = k;
    m->sums[TOKENS] += q->n - q->source;
    sums[RIGHT] += best == q->answer;
    sums[ASKED]++;
}

void gn_mmlu_add_loss(gn_mmlu *m, double loss) {
    m->sums[LOSS] += loss;
}

typedef struct asked {
    const gn_mmlu *m;
    gn_mmlu_question question;
    float nll[GN_MMLU_CHOICES];
    double loss;
} asked;

/* Behind the prompt the letters are compared; there and from then on losses add up. */
static void take_row(void *user, int32_t position, const float *logits) {
    asked *a = user;
    const gn_mmlu_question *q = &a->question;
    const int vocab = a->m->vocab;
    if (position + 1 == q->source)
        for (int i = 0; i < GN_MMLU_CHOICES; i++)
            a->nll[i] = -gn_logprob(logits, vocab, a->m->letters[i]);
    if (position + 1 < q->n) a->loss -= (double)gn_logprob(logits, vocab, q->ids[position + 1]);
}

gn_status gn_mmlu_ask(gn_mmlu *m, int64_t i, gn_scorer *scorer, const gn_adapter_use *uses,
                      int32_t n_uses) {
    asked a = {.m = m, .question = gn_mmlu_at(m, i)};
    const gn_mmlu_question *q = &a.question;
    const gn_status status =
        gn_scorer_run(scorer, q->ids, q->n, q->source - 1, uses, n_uses, take_row, &a);
    if (status) return status;
    gn_mmlu_add(m, i, a.nll);
    gn_mmlu_add_loss(m, a.loss);
    return GN_OK;
}

double *gn_mmlu_sums(gn_mmlu *m, int *n) {
    *n = SUBJECTS + PER_SUBJECT * m->n_subjects;
    return m->sums;
}

static double accuracy_of(const gn_mmlu *m, int subject) {
    const double *sums = &m->sums[SUBJECTS + PER_SUBJECT * subject];
    return sums[RIGHT] / fmax(sums[ASKED], 1);
}

gn_mmlu_result gn_mmlu_read(const gn_mmlu *m) {
    gn_mmlu_result r = {.split = m->split, .questions = m->n};
    for (int i = 0; i < m->n_subjects; i++) r.accuracy += accuracy_of(m, i) / m->n_subjects;
    r.loss = m->sums[LOSS] / fmax(m->sums[TOKENS], 1);
    return r;
}

void gn_mmlu_write(const gn_mmlu *m, cJSON *line) {
    const gn_mmlu_result r = gn_mmlu_read(m);
    char name[MAX_SUBJECT_NAME + 32];
    cJSON_AddNumberToObject(line, "mmlu_loss", r.loss);
    snprintf(name, sizeof name, "mmlu_%s_accuracy", m->split);
    cJSON_AddNumberToObject(line, name, r.accuracy);
    for (int i = 0; i < m->n_subjects; i++) {
        snprintf(name, sizeof name, "mmlu_%s_accuracy_%s", m->split, m->subjects[i]);
        cJSON_AddNumberToObject(line, name, accuracy_of(m, i));
    }
}
