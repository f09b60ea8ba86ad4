/* test_dataset.c - from files to samples: what each format means, what is learned, truncation, the
 * cache, bad rows, splits. */
#include "trainer/dataset.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/tokenizer.h"
#include "tests/support/folder.h"

#define TINY   GN_SOURCE_DIR "/tests/golden/data/tiny-bf16"
#define DATA   GN_SOURCE_DIR "/tests/trainer/data/"
#define SHARED GN_SOURCE_DIR "/../shared/data/datasets/"

enum { BOS = 1, EOS = 2, VOCAB = 512 };

TestSuite(dataset, .init = test_folder_make, .fini = test_folder_remove);

static char notes[4096];

static void take_note(void *user, const char *text) {
    (void)user;
    const size_t used = strlen(notes);
    snprintf(notes + used, sizeof notes - used, "%s\n", text);
}

static gn_dataset_options options_of(const char *const *files, int n) {
    notes[0] = 0;
    return (gn_dataset_options){.files = files,
                                .n_files = n,
                                .model_dir = TINY,
                                .vocab = VOCAB,
                                .source_max_len = 1024,
                                .target_max_len = 256,
                                .max_len = 512,
                                .threads = 3,
                                .note = take_note};
}

static gn_dataset *open_with(const gn_dataset_options *o) {
    gn_dataset *d;
    gn_error err = {0};
    cr_assert_eq(gn_dataset_open(&d, o, &err), GN_OK, "%s: %s", o->files[0], err.message);
    return d;
}

static void refused(const gn_dataset_options *o, gn_status status, const char *why) {
    gn_dataset *d;
    gn_error err = {0};
    cr_assert_eq(gn_dataset_open(&d, o, &err), status, "%s: %s", o->files[0], err.message);
    cr_assert_eq(err.status, status);
    cr_expect(strstr(err.message, why), "%s", err.message);
    cr_expect_null(d);
}

/* A sample's text; what is learned stands in brackets, BOS and EOS are \1 and \2. */
static const char *text_of(const gn_dataset *d, int64_t index) {
    static char text[8192];
    static gn_tokenizer *t;
    const gn_sample s = gn_dataset_sample(d, index);
    bool inside = false;
    size_t used = 0;
    if (!t) cr_assert_eq(gn_tokenizer_open(&t, TINY, VOCAB, NULL), GN_OK);
    for (int32_t i = 0; i < s.n; i++) {
        size_t len;
        const char control = (char)s.ids[i], *bytes = gn_tokenizer_bytes(t, s.ids[i], &len);
        const bool learned = s.labels[i] != GN_NOT_LEARNED;
        cr_assert(used + len + 4 < sizeof text);
        if (learned) cr_assert_eq(s.labels[i], s.ids[i]);
        if (learned != inside) text[used++] = learned ? '[' : ']';
        inside = learned;
        if (control == BOS || control == EOS) {
            bytes = &control;
            len = 1;
        }
        memcpy(text + used, bytes, len);
        used += len;
    }
    if (inside) text[used++] = ']';
    text[used] = 0;
    return text;
}

/* ---- formats ---- */

#define SYSTEM                                                                                     \
    "\1 A chat between a curious human and an artificial intelligence assistant. The assistant "   \
    "gives helpful, detailed, and polite answers to the user's questions.\n"
#define ALPACA                                                                                     \
    "\1 Below is an instruction that describes a task. Write a response that appropriately "       \
    "completes the request.\n\n### Instruction:\n"

static const struct {
    const char *file;
    gn_format format;
    const char *samples[3];
    int64_t left_out;
} formats[] = {
    {"alpaca.json",
     GN_FORMAT_ALPACA,
     {"\1 Below is an instruction that describes a task, paired with an input that provides "
      "further context. Write a response that appropriately completes the request.\n\n"
      "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response: [ 3\2]",
      ALPACA "Greet \"us\", [please],\n\n### Response: [ Hi\nall\2]"},
     0},
    {"input_output.jsonl", GN_FORMAT_INPUT_OUTPUT, {"\1 Q: a[ b\2]", "\1[ no prompt\2]"}, 0},
    {"input_output.csv",
     GN_FORMAT_INPUT_OUTPUT,
     {"\1 a \"b\", c[ d\ne\2]", "\1[ plain \"quotes\" here\2]"},
     0},
    {"self_instruct.tsv", GN_FORMAT_SELF_INSTRUCT, {"\1 say a[ a\tb\2]", "\1 say c[ c\2]"}, 0},
    {"self_instruct.jsonl",
     GN_FORMAT_SELF_INSTRUCT,
     {"\1 Sort.\n\nInput: b a\n\nOutput:[ a b\2]", "\1 Sort.\n\nOutput:[ ?\2]"},
     0},
    {"chip2.jsonl", GN_FORMAT_CHIP2, {"\1 Is it so?[ Yes.\2]"}, 0},
    {"hh_rlhf.jsonl", GN_FORMAT_HH_RLHF, {"\1[ \n\nHuman: a\n\nAssistant: b\2]"}, 0},
    {"oasst1.jsonl", GN_FORMAT_OASST1, {"\1[ ### Human: a### Assistant: b\2]"}, 0},
    {"oasst1_tree.jsonl",
     GN_FORMAT_OASST1,
     {SYSTEM "### Human: a\n### Assistant:[ b\n### Human:] c\n### Assistant:[ d\2]"},
     2},
    {"sharegpt.json",
     GN_FORMAT_SHAREGPT,
     {"\1 S\n[T]\n### Human: a\n### Assistant:[ {\"f\": 1}\n### Human:] 2\n### Assistant:[ b\2]"},
     0},
    {"messages.jsonl",
     GN_FORMAT_MESSAGES,
     {"\1 S\n### Human: ab\n### Assistant: c\n### Human: d\n### Assistant:[ [{\"id\":1}]\2]",
      SYSTEM "### Human: a\n### Assistant:[ b\n### Human:]"},
     0},
};

static void check_samples(const gn_dataset *d, const char *const *want, const char *what) {
    const int n = want[0] ? 1 + (want[1] != NULL) + (want[1] && want[2]) : 0;
    cr_expect_eq(gn_dataset_size(d), n, "%s: %d samples", what, (int)gn_dataset_size(d));
    for (int k = 0; k < n && k < gn_dataset_size(d); k++) {
        const char *got = text_of(d, k);
        cr_expect_str_eq(got, want[k], "%s %d: %s", what, k, got);
    }
}

Test(dataset, formats) {
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
        char path[512];
        const char *files[] = {path};
        snprintf(path, sizeof path, DATA "%s", formats[i].file);
        for (int named = 0; named < 2; named++) {
            gn_dataset_options o = options_of(files, 1);
            if (named) o.format = formats[i].format;
            gn_dataset *d = open_with(&o);
            check_samples(d, formats[i].samples, formats[i].file);
            const gn_dataset_file f = gn_dataset_file_at(d, 0);
            cr_expect_eq(f.format, formats[i].format, "%s", formats[i].file);
            cr_expect_eq(f.counts.left_out, formats[i].left_out, "%s", formats[i].file);
            cr_expect_eq(strstr(notes, "--dataset-format") != NULL, !named);
            gn_dataset_close(d);
        }
    }
}

Test(dataset, names_of_the_original) {
    const char *files[] = {DATA "input_output.jsonl"};
    gn_dataset_options o = options_of(files, 1);
    o.format = GN_FORMAT_LONGFORM;
    gn_dataset *d = open_with(&o);
    check_samples(d, (const char *[]){"\1 Q: a[ b\2]", "\1[ no prompt\2]", NULL}, "longform");
    gn_dataset_close(d);
    files[0] = DATA "alpaca.json";
    o.format = GN_FORMAT_ALPACA_CLEAN;
    d = open_with(&o);
    cr_expect_eq(gn_dataset_size(d), 2);
    gn_dataset_close(d);
    /* An alpaca file by its columns alone, as the original reads it when told so. */
    o.format = GN_FORMAT_INPUT_OUTPUT;
    d = open_with(&o);
    check_samples(d, (const char *[]){"\1 1 2[ 3\2]", "\1[ Hi\nall\2]", NULL}, "input-output");
    gn_dataset_close(d);
}

Test(dataset, train_on_source) {
    const char *files[] = {DATA "input_output.jsonl", DATA "messages.jsonl"};
    gn_dataset_options o = options_of(files, 2);
    o.train_on_source = true;
    gn_dataset *d = open_with(&o);
    cr_expect_str_eq(text_of(d, 0), "[\1 Q: a b\2]");
    cr_expect_str_eq(text_of(d, 3), "[" SYSTEM "### Human: a\n### Assistant: b\n### Human: c\n]");
    gn_dataset_close(d);
}

Test(dataset, tokens_as_they_are) {
    const char *files[] = {DATA "tokenized.jsonl"};
    const gn_dataset_options o = options_of(files, 1);
    gn_dataset *d = open_with(&o);
    cr_assert_eq(gn_dataset_size(d), 2);
    const gn_sample a = gn_dataset_sample(d, 0), b = gn_dataset_sample(d, 1);
    cr_assert(a.n == 4 && b.n == 2 && a.line == 1 && b.line == 2);
    cr_expect_arr_eq(a.ids, ((int32_t[]){1, 300, 301, 2}), 16);
    cr_expect_arr_eq(a.labels, ((int32_t[]){-100, -100, 301, 2}), 16);
    cr_expect_arr_eq(b.labels, ((int32_t[]){1, 302}), 8);
    cr_expect_eq(gn_dataset_file_at(d, 0).counts.learned, 4);
    gn_dataset_close(d);
}

/* ---- truncation ---- */

static gn_dataset *open_text(const char *name, const char *text, int source, int target) {
    test_write_text(name, text);
    const char *files[] = {test_path(name)};
    gn_dataset_options o = options_of(files, 1);
    o.source_max_len = source;
    o.target_max_len = target;
    return open_with(&o);
}

Test(dataset, truncation_keeps_eos) {
    static const char row[] = "{\"input\":\"one two three\",\"output\":\"four five six\"}";
    gn_dataset *whole = open_text("a.jsonl", row, 1024, 256);
    const gn_sample w = gn_dataset_sample(whole, 0);
    int32_t prompt = 0;
    while (w.labels[prompt] == GN_NOT_LEARNED) prompt++;
    const int32_t reply = w.n - prompt;
    for (int32_t source = 1; source <= prompt + 1; source++)
        for (int32_t target = 2; target <= reply + 1; target++) {
            gn_dataset *d = open_text("a.jsonl", row, source, target);
            const gn_sample s = gn_dataset_sample(d, 0);
            const int32_t p = source < prompt ? source : prompt;
            const int32_t r = target < reply ? target : reply;
            cr_assert_eq(s.n, p + r);
            cr_expect(!memcmp(s.ids, w.ids, (size_t)p * sizeof *s.ids));
            cr_expect(!memcmp(s.ids + p, w.ids + prompt, (size_t)(r - 1) * sizeof *s.ids));
            cr_expect(s.ids[s.n - 1] == EOS && s.labels[s.n - 1] == EOS);
            for (int32_t i = 0; i < s.n; i++)
                cr_expect_eq(s.labels[i], i < p ? GN_NOT_LEARNED : s.ids[i]);
            cr_expect_eq(gn_dataset_file_at(d, 0).counts.truncated, p < prompt || r < reply);
            gn_dataset_close(d);
        }
    gn_dataset_close(whole);
}

/* Cut anywhere, a conversation ends with what the assistant said and a learned EOS, or is left out.
 */
Test(dataset, truncated_conversations) {
    static const char row[] =
        "{\"messages\":[{\"role\":\"system\",\"content\":\"S\"},{\"role\":\"user\",\"content\":"
        "\"one\"},{\"role\":\"assistant\",\"content\":\"two\"},{\"role\":\"user\",\"content\":"
        "\"three\"},{\"role\":\"assistant\",\"content\":\"four\"}]}\n"
        "{\"messages\":[{\"role\":\"assistant\",\"content\":\"x\"}]}";
    gn_dataset *whole = open_text("a.jsonl", row, 1024, 256);
    const gn_sample w = gn_dataset_sample(whole, 0);
    for (int32_t max = 30; max < w.n; max++) {
        gn_dataset *d = open_text("a.jsonl", row, max - 2, 2);
        const gn_sample s = gn_dataset_sample(d, 0);
        if (s.line == 1) {
            cr_assert(s.n <= max && s.ids[s.n - 1] == EOS && s.labels[s.n - 1] == EOS);
            cr_expect(!memcmp(s.ids, w.ids, (size_t)(s.n - 1) * sizeof *s.ids));
            cr_expect(!memcmp(s.labels, w.labels, (size_t)(s.n - 1) * sizeof *s.labels));
            cr_expect(s.labels[s.n - 2] != GN_NOT_LEARNED);
            cr_expect_eq(gn_dataset_file_at(d, 0).counts.truncated, 1);
        } else {
            cr_expect_eq(gn_dataset_file_at(d, 0).counts.left_out, 1);
        }
        gn_dataset_close(d);
    }
    gn_dataset_close(whole);
}

/* 100,000 tokens in a row. */
Test(dataset, long_rows) {
    enum { N = 100000 };
    char *text = malloc(8 * N);
    size_t used = (size_t)sprintf(text, "{\"output\":\"");
    for (int i = 0; i < N; i++) used += (size_t)sprintf(text + used, "%s", "a b ");
    sprintf(text + used, "\"}");
    gn_dataset *d = open_text("a.jsonl", text, 16, 512);
    cr_expect_eq(gn_dataset_sample(d, 0).n, 513);
    cr_expect_eq(gn_dataset_sample(d, 0).ids[512], EOS);
    gn_dataset_close(d);

    used = (size_t)sprintf(text, "{\"input_ids\":[1");
    for (int i = 1; i < N; i++) used += (size_t)sprintf(text + used, ",3");
    sprintf(text + used, "]}\n{\"input_ids\":[1,2]}");
    test_write_text("b.jsonl", text);
    const char *files[] = {test_path("b.jsonl")};
    gn_dataset_options o = options_of(files, 1);
    refused(&o, GN_EFORMAT, "b.jsonl:1: 100000 tokens; at most 512 are allowed");
    o.skip_bad_rows = true;
    d = open_with(&o);
    cr_expect_eq(gn_dataset_size(d), 1);
    cr_expect_eq(gn_dataset_file_at(d, 0).counts.bad_rows, 1);
    gn_dataset_close(d);
    free(text);
}

/* ---- bad rows ---- */

static const struct {
    const char *row, *why;
} bad_rows[] = {
    {"{\"output\":5}", "\"output\" is not a string"},
    {"{\"input\":[],\"output\":\"a\"}", "\"input\" is not a string"},
    {"{\"input\":\"a\"}", "these fields are no known format's: input."},
    {"{\"instruction\":\"a\",\"output\":null}", "\"output\" is missing"},
    {"{\"instruction\":\"a\",\"instances\":{}}", "\"instances\" is not an array"},
    {"{\"instruction\":\"a\",\"instances\":[7]}", "\"output\" is missing"},
    {"{\"text\":\"### Human: a\",\"text\":7}", "no known format's: text, text"},
    {"{\"messages\":[]}", "\"messages\" is empty"},
    {"{\"messages\":{}}", "\"messages\" is not an array"},
    {"{\"messages\":[7]}", "a message has no role"},
    {"{\"messages\":[{\"role\":\"cat\",\"content\":\"a\"}]}", "unknown role 'cat'"},
    {"{\"messages\":[{\"role\":\"user\"}]}", "a message has no text"},
    {"{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]}",
     "a part of \"content\" is not text"},
    {"{\"messages\":[{\"role\":\"assistant\",\"content\":\"a\",\"weight\":0.5}]}",
     "a message's weight must be 0 or 1"},
    {"{\"messages\":[{\"role\":\"assistant\",\"content\":\"a\",\"tool_calls\":[]}]}",
     "both text and calls"},
    {"{\"prompt\":{\"role\":\"prompter\"}}", "\"text\" is missing"},
    {"{\"prompt\":{\"text\":\"a\"}}", "no known \"role\""},
    {"{\"input_ids\":[]}", "\"input_ids\" is empty"},
    {"{\"input_ids\":7}", "\"input_ids\" is not an array"},
    {"{\"input_ids\":[1,512]}", "input_ids[1] is not an id below 512"},
    {"{\"input_ids\":[1,-1]}", "input_ids[1] is not an id below 512"},
    {"{\"input_ids\":[1,2.5]}", "input_ids[1] is not an id below 512"},
    {"{\"input_ids\":[1,1e300]}", "input_ids[1] is not an id below 512"},
    {"{\"input_ids\":[1,\"2\"]}", "input_ids[1] is not an id below 512"},
    {"{\"input_ids\":[1,2],\"labels\":[1]}", "2 input_ids but 1 labels"},
    {"{\"input_ids\":[1,2],\"labels\":[1,-99]}", "labels[1] is neither -100 nor an id"},
};

Test(dataset, bad_rows) {
    const char *files[] = {test_path("a.jsonl")};
    for (size_t i = 0; i < sizeof bad_rows / sizeof *bad_rows; i++) {
        char text[512];
        snprintf(text, sizeof text, "\n%s\n", bad_rows[i].row);
        test_write_text("a.jsonl", text);
        gn_dataset_options o = options_of(files, 1);
        refused(&o, GN_EFORMAT, bad_rows[i].why);
        refused(&o, GN_EFORMAT, "a.jsonl:2: ");
    }
}

/* The first bad row is reported, however many threads there are; or all are counted. */
Test(dataset, the_first_bad_row) {
    enum { ROWS = 3000 };
    char *text = malloc(64 * ROWS);
    size_t used = 0;
    for (int i = 1; i <= ROWS; i++)
        used += (size_t)sprintf(text + used,
                                i % 1000 == 700 ? "{\"output\":%d\n" : "{\"output\":\"%d\"}\n", i);
    test_write_text("a.jsonl", text);
    free(text);
    const char *files[] = {test_path("a.jsonl")};
    for (int threads = 0; threads < 6; threads++) {
        gn_dataset_options o = options_of(files, 1);
        o.threads = threads;
        refused(&o, GN_EFORMAT, "a.jsonl:700: not valid JSON");
        o.skip_bad_rows = true;
        gn_dataset *d = open_with(&o);
        cr_assert_eq(gn_dataset_size(d), ROWS - 3);
        cr_expect_eq(gn_dataset_file_at(d, 0).counts.bad_rows, 3);
        cr_expect_eq(gn_dataset_file_at(d, 0).counts.rows, ROWS);
        cr_expect_eq(gn_dataset_sample(d, 699).line, 701);
        cr_expect_str_eq(text_of(d, 2996), "\1[ 3000\2]");
        cr_expect(strstr(notes, "a.jsonl:700: not valid JSON") && strstr(notes, "3 of 3000 rows"),
                  "%s", notes);
        gn_dataset_close(d);
    }
}

/* A row of which one example is bad gives none. */
Test(dataset, a_bad_row_leaves_nothing) {
    test_write_text("a.jsonl",
                    "{\"instruction\":\"a\",\"instances\":[{\"output\":\"b\"},{\"output\":7}]}\n"
                    "{\"instruction\":\"c\",\"instances\":[{\"output\":\"d\"}]}\n");
    const char *files[] = {test_path("a.jsonl")};
    gn_dataset_options o = options_of(files, 1);
    o.skip_bad_rows = true;
    gn_dataset *d = open_with(&o);
    check_samples(d, (const char *[]){"\1 c\n\nOutput:[ d\2]", NULL}, "one row");
    const gn_sample sample = gn_dataset_sample(d, 0);
    int64_t learned = 0;
    for (int32_t i = 0; i < sample.n; i++) learned += sample.labels[i] != GN_NOT_LEARNED;
    cr_expect_eq(gn_dataset_file_at(d, 0).counts.learned, learned);
    gn_dataset_close(d);
}

Test(dataset, nothing_to_learn) {
    const char *files[] = {test_path("a.jsonl")};
    gn_dataset_options o = options_of(files, 1);
    test_write_text("a.jsonl", "");
    refused(&o, GN_EFORMAT, "a.jsonl: has no rows");
    test_write_text("a.jsonl", "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}");
    refused(&o, GN_EFORMAT, "of 1 rows 0 are bad, 1 have no reply");
    test_write_text("a.jsonl", "x\ny");
    o.skip_bad_rows = true;
    o.format = GN_FORMAT_ALPACA;
    refused(&o, GN_EFORMAT, "of 2 rows 2 are bad, 0 have no reply");
    o.n_files = 0;
    refused(&o, GN_EINVAL, "--dataset FILE is missing");
    o.n_files = 1;
    o.target_max_len = 1;
    refused(&o, GN_EINVAL, "target lengths at least 2");
}

/* ---- several files, the cache, splits ---- */

Test(dataset, weights) {
    test_copy(DATA "chip2.jsonl", "a:2.jsonl");
    char weighted[512];
    snprintf(weighted, sizeof weighted, "%s:0.5", test_path("a:2.jsonl"));
    const char *files[] = {DATA "input_output.jsonl:3", weighted, test_path("a:2.jsonl")};
    gn_dataset_options o = options_of(files, 3);
    gn_dataset *d = open_with(&o);
    cr_assert(gn_dataset_files(d) == 3 && gn_dataset_size(d) == 4);
    cr_expect_eq(gn_dataset_file_at(d, 0).weight, 3);
    cr_expect_eq(gn_dataset_file_at(d, 1).weight, 0.5);
    cr_expect_eq(gn_dataset_file_at(d, 2).weight, 1);
    cr_expect_eq(gn_dataset_file_at(d, 2).first, 3);
    for (int i = 0; i < 4; i++) cr_expect_eq(gn_dataset_sample(d, i).file, i < 2 ? 0 : i - 1);
    gn_dataset_close(d);
    static const char *const wrong[] = {":0", ":-1", ":1001", ":nan", ":inf"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        snprintf(weighted, sizeof weighted, DATA "chip2.jsonl%s", wrong[i]);
        files[0] = weighted;
        refused(&o, GN_EINVAL, "a weight must be over 0 and at most 1000");
    }
}

/* The path of the only file in a folder. */
static const char *only_file(const char *dir) {
    static char path[1024];
    DIR *folder = opendir(dir);
    int n = 0;
    for (struct dirent *e; folder && (e = readdir(folder));) {
        if (e->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        n++;
    }
    cr_assert(folder && n == 1, "%d files in %s", n, dir);
    closedir(folder);
    return path;
}

static void expect_same(const gn_dataset *a, const gn_dataset *b) {
    cr_assert_eq(gn_dataset_size(a), gn_dataset_size(b));
    for (int64_t i = 0; i < gn_dataset_size(a); i++) {
        const gn_sample x = gn_dataset_sample(a, i), y = gn_dataset_sample(b, i);
        const size_t bytes = (size_t)x.n * sizeof *x.ids;
        cr_assert(x.n == y.n && x.line == y.line);
        cr_assert(!memcmp(x.ids, y.ids, bytes) && !memcmp(x.labels, y.labels, bytes));
    }
    const gn_dataset_file x = gn_dataset_file_at(a, 0), y = gn_dataset_file_at(b, 0);
    cr_assert(!memcmp(&x.counts, &y.counts, sizeof x.counts));
}

static int n_cached(const char *dir) {
    DIR *folder = opendir(dir);
    int n = 0;
    for (struct dirent *e; folder && (e = readdir(folder));) n += e->d_name[0] != '.';
    if (folder) closedir(folder);
    return n;
}

Test(dataset, cache) {
    const char *cache = test_path("x/y/cache"), *files[] = {DATA "alpaca.json"};
    gn_dataset_options o = options_of(files, 1);
    gn_dataset *plain = open_with(&o);
    o.cache_dir = cache;
    gn_dataset_close(open_with(&o));
    cr_expect_null(strstr(notes, "tokenized before"));
    gn_dataset *cached = open_with(&o);
    cr_expect(strstr(notes, "tokenized before"), "%s", notes);
    expect_same(plain, cached);
    gn_dataset_close(cached);

    /* Any damage is noticed, and mended. */
    const char *path = only_file(cache);
    FILE *f = fopen(path, "rb");
    static uint8_t good[1 << 16], bad[1 << 16];
    const size_t size = fread(good, 1, sizeof good, f);
    fclose(f);
    cr_assert(size > 200 && size < sizeof good);
    for (size_t at = 0; at < size + 20; at += at < 120 ? 1 : 37) {
        memcpy(bad, good, size);
        size_t n = size;
        if (at < size)
            bad[at] ^= 0x40;
        else
            n = at == size + 1 ? 0 : size - (at - size); /* cut short */
        f = fopen(path, "wb");
        cr_assert(f && fwrite(bad, 1, n, f) == n && fclose(f) == 0);
        notes[0] = 0;
        cached = open_with(&o);
        cr_expect(n == size && at >= size ? true : strstr(notes, "tokenizing anew") != NULL,
                  "byte %zu: %s", at, notes);
        expect_same(plain, cached);
        gn_dataset_close(cached);
    }
    gn_dataset_close(plain);
}

/* Whatever changes the samples has a cache entry of its own. */
Test(dataset, cache_keys) {
    const char *cache = test_path("cache"), *files[] = {test_path("a.jsonl")};
    test_copy(DATA "messages.jsonl", "a.jsonl");
    const gn_dataset_options first = options_of(files, 1);
    gn_dataset_options variants[7];
    for (int i = 0; i < 7; i++) {
        variants[i] = first;
        variants[i].cache_dir = cache;
    }
    variants[1].source_max_len = 40;
    variants[2].target_max_len = 40;
    variants[3].train_on_source = true;
    variants[4].chat_template = "vicuna";
    variants[5].threads = 1; /* changes nothing */
    variants[6].max_len = 100;
    static const int entries[] = {1, 2, 3, 4, 5, 5, 6};
    for (int i = 0; i < 7; i++) {
        gn_dataset_close(open_with(&variants[i]));
        cr_expect_eq(n_cached(cache), entries[i], "variant %d: %d", i, n_cached(cache));
    }
    test_write_text("a.jsonl", "{\"messages\":[{\"role\":\"assistant\",\"content\":\"a\"}]}");
    gn_dataset_close(open_with(&variants[0]));
    cr_expect_eq(n_cached(cache), 7);
    /* A cache that cannot be written is no error. */
    test_write_text("file", "");
    variants[0].cache_dir = test_path("file");
    notes[0] = 0;
    gn_dataset_close(open_with(&variants[0]));
    cr_expect(strstr(notes, "is not kept"), "%s", notes);
}

/* Rows that were skipped once are an error for who does not skip them. */
Test(dataset, cached_bad_rows) {
    test_write_text("a.jsonl", "{\"output\":\"a\"}\n{\"output\":}\n");
    const char *files[] = {test_path("a.jsonl")};
    gn_dataset_options o = options_of(files, 1);
    o.cache_dir = test_path("cache");
    o.skip_bad_rows = true;
    gn_dataset_close(open_with(&o));
    gn_dataset_close(open_with(&o));
    cr_expect(strstr(notes, "tokenized before"), "%s", notes);
    o.skip_bad_rows = false;
    refused(&o, GN_EFORMAT, "a.jsonl:2: not valid JSON");
}

static gn_dataset *open_numbers(int n) {
    char *text = malloc(32 * (size_t)n + 1);
    size_t used = 0;
    for (int i = 0; i < n; i++) used += (size_t)sprintf(text + used, "{\"output\":\"%d\"}\n", i);
    gn_dataset *d = open_text("n.jsonl", text, 16, 16);
    free(text);
    return d;
}

Test(dataset, splits) {
    gn_dataset *d = open_numbers(100);
    gn_split s, again, other;
    gn_error err = {0};
    const gn_split_options o = {.eval_size = 20, .max_eval = 5, .max_train = 50, .seed = 7};
    cr_assert_eq(gn_split_open(&s, d, &o, &err), GN_OK, "%s", err.message);
    cr_assert(s.n_train == 50 && s.n_eval == 5);
    char seen[100] = {0};
    for (int i = 0; i < 50; i++) seen[s.train[i]]++;
    for (int i = 0; i < 5; i++) seen[s.eval[i]]++;
    for (int i = 0; i < 100; i++) cr_expect_leq(seen[i], 1);
    for (int i = 1; i < 50; i++) cr_expect_gt(s.train[i], s.train[i - 1]);
    cr_assert_eq(gn_split_open(&again, d, &o, &err), GN_OK);
    cr_expect(!memcmp(s.train, again.train, 50 * sizeof *s.train));
    const gn_split_options reseeded = {.eval_size = 20, .max_eval = 5, .max_train = 50, .seed = 8};
    cr_assert_eq(gn_split_open(&other, d, &reseeded, &err), GN_OK);
    cr_expect(memcmp(s.train, other.train, 50 * sizeof *s.train));
    gn_split_close(&s);
    gn_split_close(&again);
    gn_split_close(&other);

    const gn_split_options first = {.max_train = 3, .first = true};
    cr_assert_eq(gn_split_open(&s, d, &first, &err), GN_OK);
    cr_assert(s.n_train == 3 && s.n_eval == 0 && s.train[2] == 2);
    gn_split_close(&s);
    const gn_split_options everything = {.eval_size = 100};
    cr_assert_eq(gn_split_open(&s, d, &everything, &err), GN_EINVAL);
    cr_expect(strstr(err.message, "some must be trained on"), "%s", err.message);
    gn_dataset_close(d);
}

/* ---- real data, where it is ---- */

Test(dataset, real_files) {
    static const struct {
        const char *file;
        gn_format format;
        int64_t rows, samples;
    } real[] = {
        {"alpaca_en_demo.json", GN_FORMAT_ALPACA, 999, 999},
        {"oa_guanaco_format.jsonl", GN_FORMAT_INPUT_OUTPUT, 953, 953},
        {"oasst_en_100_tree.jsonl", GN_FORMAT_OASST1, 100, 100},
        {"self_instruct_seed_tasks.jsonl", GN_FORMAT_SELF_INSTRUCT, 175, 175},
        {"glaive_toolcall_en_demo.json", GN_FORMAT_SHAREGPT, 300, 300},
    };
    for (size_t i = 0; i < sizeof real / sizeof *real; i++) {
        char path[512];
        const char *files[] = {path};
        snprintf(path, sizeof path, SHARED "%s", real[i].file);
        if (access(path, F_OK)) continue;
        gn_dataset_options o = options_of(files, 1);
        o.source_max_len = o.target_max_len = 1 << 20;
        gn_dataset *d = open_with(&o);
        const gn_dataset_file f = gn_dataset_file_at(d, 0);
        cr_expect(f.format == real[i].format && f.counts.rows == real[i].rows &&
                      f.n == real[i].samples && f.counts.bad_rows == 0 && f.counts.truncated == 0,
                  "%s", real[i].file);
        for (int64_t k = 0; k < f.n; k++) {
            const gn_sample s = gn_dataset_sample(d, k);
            cr_assert(s.ids[0] == BOS && s.ids[s.n - 1] == EOS && s.labels[s.n - 1] == EOS);
        }
        gn_dataset_close(d);
    }
}
