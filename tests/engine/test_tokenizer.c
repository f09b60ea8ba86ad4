/* test_tokenizer.c - the SentencePiece shim: ids, pieces, refusals. */
#include "engine/tokenizer.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define TINY      GN_SOURCE_DIR "/tests/golden/data/tiny-bf16"
#define LLAMA_DIR GN_SOURCE_DIR "/../shared/data/tokenizer"

static gn_tokenizer *open_tiny(void) {
    gn_tokenizer *t;
    gn_error err = {0};
    cr_assert_eq(gn_tokenizer_open(&t, TINY, 512, &err), GN_OK, "%s", err.message);
    return t;
}

/* A folder of this process with the given bytes as tokenizer.model. */
static const char *folder_with(const void *data, size_t n) {
    static char dir[64];
    char path[96];
    snprintf(dir, sizeof dir, "/tmp/gn_tokenizer_%d", (int)getpid());
    mkdir(dir, 0700);
    snprintf(path, sizeof path, "%s/tokenizer.model", dir);
    FILE *f = fopen(path, "wb");
    cr_assert(f && fwrite(data, 1, n, f) == n && fclose(f) == 0);
    return dir;
}

static void remove_folder(const char *dir) {
    char path[96];
    snprintf(path, sizeof path, "%s/tokenizer.model", dir);
    cr_assert(unlink(path) == 0 && rmdir(dir) == 0);
}

static char *read_all(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    char *data = malloc(1 << 20);
    *n = fread(data, 1, (1 << 20) - 1, f);
    data[*n] = '\0';
    fclose(f);
    return data;
}

static char *decode(const gn_tokenizer *t, const int32_t *ids, int32_t n) {
    char *text = calloc(1, 4096), *end = text;
    for (int32_t i = 0; i < n; i++) {
        size_t len;
        const char *bytes = gn_tokenizer_bytes(t, ids[i], &len);
        cr_assert_leq((size_t)(end - text) + len, (size_t)4095);
        memcpy(end, bytes, len);
        end += len;
    }
    return text;
}

Test(tokenizer, special_pieces) {
    gn_tokenizer *t = open_tiny();
    cr_expect_eq(gn_tokenizer_size(t), 512);
    cr_expect_eq(gn_tokenizer_bos(t), 1);
    cr_expect_eq(gn_tokenizer_eos(t), 2);
    cr_expect_eq(gn_tokenizer_special(t, "<s>", 3), 1);
    cr_expect_eq(gn_tokenizer_special(t, "</s>", 4), 2);
    cr_expect_eq(gn_tokenizer_special(t, "</s", 3), -1);
    cr_expect_eq(gn_tokenizer_special(t, "<0x41>", 6), -1, "a byte piece is not special");
    cr_expect_eq(gn_tokenizer_special(t, "", 0), -1);
    gn_tokenizer_close(t);
    gn_tokenizer_close(NULL);
}

Test(tokenizer, piece_bytes) {
    gn_tokenizer *t = open_tiny();
    size_t len;
    const int32_t empty[] = {0, 1, 2, -1, 512, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < sizeof empty / sizeof *empty; i++) {
        gn_tokenizer_bytes(t, empty[i], &len);
        cr_expect_eq(len, 0u, "id %d has %zu bytes", (int)empty[i], len);
    }
    for (int b = 0; b < 256; b++) { /* byte pieces follow <unk>, <s>, </s> */
        const char *bytes = gn_tokenizer_bytes(t, 3 + b, &len);
        cr_assert_eq(len, 1u);
        cr_expect_eq((unsigned char)bytes[0], b);
    }
    gn_tokenizer_close(t);
}

Test(tokenizer, text_survives_a_round_trip) {
    static const char *const texts[] = {
        "",
        "a",
        "hello world",
        "  two  spaces ",
        "### Human: hi\n### Assistant:",
        "\t\n\r ",
        "½ 🦙 нещо 我",
        "</s><s><unk>",
        "\x7f\x01",
    };
    gn_tokenizer *t = open_tiny();
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        int32_t *ids, n;
        gn_error err = {0};
        cr_assert_eq(gn_tokenizer_encode(t, texts[i], strlen(texts[i]), &ids, &n, &err), GN_OK,
                     "%s", err.message);
        char *text = decode(t, ids, n);
        /* SentencePiece puts a space before a text that is not empty. */
        cr_expect_str_eq(text + (text[0] == ' '), texts[i]);
        for (int32_t k = 0; k < n; k++) cr_expect(ids[k] > 2, "a control id in %s", texts[i]);
        free(text);
        free(ids);
    }
    gn_tokenizer_close(t);
}

Test(tokenizer, any_bytes_are_text) {
    gn_tokenizer *t = open_tiny();
    int32_t *ids, n;
    cr_assert_eq(gn_tokenizer_encode(t, "a\0b", 3, &ids, &n, NULL), GN_OK);
    cr_expect_eq(ids[n - 2], 3, "the zero byte is piece <0x00>");
    free(ids);
    cr_assert_eq(gn_tokenizer_encode(t, "a\xff", 2, &ids, &n, NULL), GN_OK);
    char *text = decode(t, ids, n);
    cr_expect_str_eq(text, " a\xef\xbf\xbd");
    free(text);
    free(ids);
    gn_tokenizer_close(t);
}

Test(tokenizer, refusals_name_the_file) {
    gn_tokenizer *t;
    gn_error err = {0};
    cr_expect_eq(gn_tokenizer_open(&t, "/nonexistent", 512, &err), GN_ENOENT);
    cr_expect(strstr(err.message, "/nonexistent/tokenizer.model"), "%s", err.message);
    cr_expect_null(t);
    cr_expect_eq(gn_tokenizer_open(&t, TINY, 511, &err), GN_EMISMATCH);
    cr_expect(strstr(err.message, "512") && strstr(err.message, "511"), "%s", err.message);

    static const struct {
        const char *data;
        size_t n;
    } bad[] = {{"", 0},
               {"{\"not\": \"protobuf\"}", 19},
               {"\x0a\xff\xff\xff\xff\x0f", 6},
               {"\x0a\x00", 2},
               {"\x08\x01", 2}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const char *dir = folder_with(bad[i].data, bad[i].n);
        cr_expect_eq(gn_tokenizer_open(&t, dir, 512, &err), GN_EFORMAT, "case %zu", i);
        cr_expect(strstr(err.message, dir), "%s", err.message);
        cr_expect_null(t);
        remove_folder(dir);
    }
}

Test(tokenizer, every_cut_file_is_refused_or_smaller) {
    size_t n = 0;
    char *data = read_all(TINY "/tokenizer.model", &n);
    cr_assert(data);
    for (size_t cut = 0; cut < n; cut += 37) {
        gn_tokenizer *t;
        const char *dir = folder_with(data, cut);
        if (!gn_tokenizer_open(&t, dir, 512, NULL)) cr_expect_leq(gn_tokenizer_size(t), 512);
        gn_tokenizer_close(t);
        remove_folder(dir);
    }
    free(data);
}

/* A user-defined chat marker is a special piece, but text does not contain it. */
Test(tokenizer, user_defined_markers_are_not_parsed) {
    size_t n;
    char *data = read_all(TINY "/tokenizer.model", &n);
    cr_assert(data);
    /* SentencePiece { piece: "<|im_end|>" score: 0 type: USER_DEFINED }, and "ab" likewise. */
    static const char marker[] = "\x0a\x13\x0a\x0a<|im_end|>\x15\0\0\0\0\x18\x04"
                                 "\x0a\x0b\x0a\x02zq\x15\0\0\0\0\x18\x04";
    char *larger = malloc(n + sizeof marker);
    memcpy(larger, data, n);
    memcpy(larger + n, marker, sizeof marker - 1);
    const char *dir = folder_with(larger, n + sizeof marker - 1);
    gn_tokenizer *t;
    gn_error err = {0};
    cr_assert_eq(gn_tokenizer_open(&t, dir, 514, &err), GN_OK, "%s", err.message);
    cr_expect_eq(gn_tokenizer_special(t, "<|im_end|>", 10), 512);
    cr_expect_eq(gn_tokenizer_special(t, "zq", 2), 513);
    size_t len;
    const char *bytes = gn_tokenizer_bytes(t, 512, &len);
    cr_expect(len == 10 && memcmp(bytes, "<|im_end|>", 10) == 0, "its text is visible");

    int32_t *ids, count;
    cr_assert_eq(gn_tokenizer_encode(t, "a<|im_end|>zq", 13, &ids, &count, NULL), GN_OK);
    for (int32_t i = 0; i < count; i++) cr_expect_neq(ids[i], 512);
    cr_expect_eq(ids[count - 1], 513, "other user-defined pieces are");
    free(ids);
    gn_tokenizer_close(t);
    remove_folder(dir);
    free(larger);
    free(data);
}

/* `line`: the expected ids. */
static void check_case(const gn_tokenizer *t, const char *text, size_t len, const char *line) {
    int32_t *ids, n;
    cr_assert_eq(gn_tokenizer_encode(t, text, len, &ids, &n, NULL), GN_OK);
    char *end = (char *)line;
    for (int32_t i = 0; i < n; i++) {
        const char *at = end;
        const long want = strtol(at, &end, 10);
        cr_assert(end != at, "'%.*s': more than the expected ids", (int)len, text);
        cr_assert_eq(ids[i], want, "'%.*s': id %d is %d, not %ld", (int)len, text, (int)i,
                     (int)ids[i], want);
    }
    cr_assert_eq(*end, '\n', "'%.*s': fewer ids than expected", (int)len, text);
    free(ids);
}

/* llama.cpp's cases for LLaMA's tokenizer, where they lie beside the project. */
Test(tokenizer, llama_cases) {
    static const char separator[] = "\n__ggml_vocab_test__\n";
    size_t n_model, n_in, n_out;
    char *model = read_all(LLAMA_DIR "/llama.model", &n_model);
    if (!model) {
        cr_log_info("llama_cases: not there, not checked");
        return;
    }
    char *in = read_all(LLAMA_DIR "/llama_cases.inp", &n_in);
    char *out = read_all(LLAMA_DIR "/llama_cases.out", &n_out);
    cr_assert(in && out);
    const char *dir = folder_with(model, n_model);
    gn_tokenizer *t;
    gn_error err = {0};
    cr_assert_eq(gn_tokenizer_open(&t, dir, 32000, &err), GN_OK, "%s", err.message);
    int cases = 0;
    const char *line = out;
    for (const char *text = in, *end; (end = strstr(text, separator)) != NULL;
         text = end + sizeof separator - 1, cases++) {
        check_case(t, text, (size_t)(end - text), line);
        line = strchr(line, '\n');
        cr_assert_not_null(line);
        line++;
    }
    cr_expect_eq(cases, 46);
    gn_tokenizer_close(t);
    remove_folder(dir);
    free(model);
    free(in);
    free(out);
}
