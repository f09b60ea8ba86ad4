/* fuzz_dataset.c - a first byte for the kind of file, then the file: any is refused with a reason,
 * or its rows become samples with ids of the vocabulary, or are refused with a reason each. */
#include <stdlib.h>
#include <string.h>

#include "trainer/dataset_encode.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define TINY GN_SOURCE_DIR "/tests/golden/data/tiny-bf16"
enum { VOCAB = 512, MAX_LEN = 24 };

static gn_tokenizer *tokenizer;
static gn_chat_template *chat;

static void clean_up(void) {
    gn_tokenizer_close(tokenizer);
    gn_chat_template_close(chat);
}

static void set_up(void) {
    if (tokenizer) return;
    if (gn_tokenizer_open(&tokenizer, TINY, VOCAB, NULL)) abort();
    if (gn_chat_template_open(&chat, "chatml", TINY, NULL) || atexit(clean_up)) abort();
}

typedef struct sink {
    gn_encoding encoding;
    gn_samples samples;
} sink;

static gn_status take(void *user, const gn_example *example, gn_error *err) {
    sink *s = user;
    return gn_example_encode(&s->encoding, example, 1, &s->samples, err);
}

static void check_samples(const gn_samples *s) {
    for (int64_t i = 0; i < s->n; i++) {
        const int64_t n = s->starts[i + 1] - s->starts[i];
        if (n < 2 || n > MAX_LEN) abort();
    }
    for (int64_t i = 0; i < s->n_tokens; i++) {
        if (s->ids[i] < 0 || s->ids[i] >= VOCAB) abort();
        if (s->labels[i] != GN_NOT_LEARNED && (s->labels[i] < 0 || s->labels[i] >= VOCAB)) abort();
    }
}

/* A row as every format, and as the detected one. */
static void map_row(const cJSON *row, sink *s) {
    gn_format detected;
    gn_error err = {0};
    if (gn_format_detect(row, &detected, &err) != err.status) abort();
    for (int format = GN_FORMAT_AUTO + 1; format < GN_FORMAT_COUNT; format++) {
        gn_error why = {0};
        const gn_status status = gn_format_row((gn_format)format, row, take, s, &why);
        if (status != why.status || (status && (status != GN_EFORMAT || !*why.message))) abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const names[] = {"x.jsonl", "x.json", "x.csv", "x.tsv"};
    if (size == 0) return 0;
    set_up();
    char *text = malloc(size);
    if (!text) abort();
    memcpy(text, data + 1, size - 1);
    text[size - 1] = 0;
    gn_rows *rows;
    gn_error err = {0};
    const gn_status status = gn_rows_open_take(&rows, names[data[0] % 4], text, size - 1, &err);
    if (status != err.status || (status == GN_OK) != (rows != NULL)) abort();
    sink s = {.encoding = {.tokenizer = tokenizer,
                           .chat = chat,
                           .source_max_len = MAX_LEN / 2,
                           .target_max_len = MAX_LEN / 2,
                           .max_len = MAX_LEN,
                           .vocab = VOCAB,
                           .train_on_source = data[0] & 4}};
    for (int64_t i = 0; rows && i < gn_rows_count(rows); i++) {
        cJSON *row;
        gn_error why = {0};
        if (gn_rows_parse(rows, i, &row, &why) != why.status) abort();
        if (row) map_row(row, &s);
        cJSON_Delete(row);
    }
    check_samples(&s.samples);
    gn_samples_free(&s.samples);
    gn_rows_close(rows);
    return 0;
}
