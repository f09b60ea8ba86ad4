/* test_options.c - command-line tables: values, ranges, slips, help. */
#include "engine/options.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct fields {
    const char *text;
    int number;
    int64_t large;
    float real;
    bool flag, truth;
    int64_t size;
    int choice;
    gn_strings list;
} fields;

static const gn_option table[] = {
    GN_OPTION_GROUP("Things"),
    {GN_OPT_STRING, "text", offsetof(fields, text), .initial = "abc", .help = "a text"},
    {GN_OPT_INT, "port", offsetof(fields, number), .initial = "8080", .min = 1, .max = 65535,
     .help = "a port"},
    {GN_OPT_INT64, "seed", offsetof(fields, large), .help = "any number"},
    {GN_OPT_FLOAT, "lora-alpha", offsetof(fields, real), .initial = "0.5", .min = 0,
     .max = INFINITY, .help = "a real number whose help line is so long that it has to be wrapped"},
    GN_OPTION_GROUP("Others"),
    {GN_OPT_FLAG, "json", offsetof(fields, flag), .help = "for machines"},
    {GN_OPT_BOOL, "double-quant", offsetof(fields, truth), .initial = "true", .help = "twice"},
    {GN_OPT_SIZE, "kv-cache", offsetof(fields, size), .initial = "1GiB", .help = "bytes"},
    {GN_OPT_CHOICE, "device", offsetof(fields, choice), .choices = "auto|cpu|cuda",
     .help = "where"},
    {GN_OPT_LIST, "adapter", offsetof(fields, list), .value = "NAME=DIR", .help = "adapters"},
    GN_OPTION_END};

/* Parses a command line written as one string. */
static gn_status parse(fields *f, const char *line, bool *help, gn_error *err) {
    static char copy[512]; /* strings stay valid after the call */
    char *args[32];
    int n = 0;
    snprintf(copy, sizeof copy, "%s", line);
    for (char *word = strtok(copy, " "); word; word = strtok(NULL, " ")) args[n++] = word;
    return gn_options_parse(table, f, n, args, help, err);
}

Test(options, defaults) {
    fields f;
    memset(&f, 0x55, sizeof f);
    bool help = true;
    gn_error err = {0};
    cr_assert_eq(gn_options_parse(table, &f, 0, NULL, &help, &err), GN_OK, "%s", err.message);
    cr_assert_not(help);
    cr_assert_str_eq(f.text, "abc");
    cr_assert_eq(f.number, 8080);
    cr_assert_eq(f.large, 0);
    cr_assert_eq(f.real, 0.5f);
    cr_assert_not(f.flag);
    cr_assert(f.truth);
    cr_assert_eq(f.size, (int64_t)1 << 30);
    cr_assert_eq(f.choice, 0);
    cr_assert_eq(f.list.n, 0);
    gn_options_free(table, &f);
}

Test(options, every_kind) {
    fields f;
    bool help;
    gn_error err = {0};
    cr_assert_eq(parse(&f,
                       "--text=--x --port 1 --seed -9007199254740993 --lora_alpha 1e2 --json "
                       "--double_quant False --kv-cache 1.5MiB --device cuda --adapter a=b "
                       "--adapter=c=d --text -y",
                       &help, &err),
                 GN_OK, "%s", err.message);
    cr_assert_str_eq(f.text, "-y"); /* the last one counts */
    cr_assert_eq(f.number, 1);
    cr_assert_eq(f.large, -9007199254740993);
    cr_assert_eq(f.real, 100.0f);
    cr_assert(f.flag);
    cr_assert_not(f.truth);
    cr_assert_eq(f.size, 3 << 19);
    cr_assert_eq(f.choice, 2);
    cr_assert_eq(f.list.n, 2);
    cr_assert_str_eq(f.list.items[0], "a=b");
    cr_assert_str_eq(f.list.items[1], "c=d");
    gn_options_free(table, &f);
    cr_assert_null(f.list.items);

    /* As transformers' parser has it, a truth value may be left out. */
    cr_assert_eq(parse(&f, "--double-quant --json", &help, &err), GN_OK);
    cr_assert(f.truth && f.flag);
    cr_assert_eq(parse(&f, "--double-quant no --json=false", &help, &err), GN_OK);
    cr_assert(!f.truth && !f.flag);
}

Test(options, sizes) {
    static const struct {
        const char *line;
        int64_t bytes;
    } cases[] = {{"--kv-cache 4096", 4096},      {"--kv-cache 2KiB", 2048},
                 {"--kv-cache 2k", 2048},        {"--kv-cache 3M", 3 << 20},
                 {"--kv-cache 0.5GiB", 1 << 29}, {"--kv-cache 100gib", (int64_t)100 << 30}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        fields f;
        bool help;
        cr_assert_eq(parse(&f, cases[i].line, &help, NULL), GN_OK, "%s", cases[i].line);
        cr_assert_eq(f.size, cases[i].bytes, "%s", cases[i].line);
    }
}

Test(options, refusals) {
    static const struct {
        const char *line, *message;
    } cases[] = {
        {"--prot 1", "unknown option --prot (did you mean --port?)"},
        {"--lora_alhpa 1", "unknown option --lora_alhpa (did you mean --lora-alpha?)"},
        {"--zzzzzzzz", "unknown option --zzzzzzzz"},
        {"--port", "--port needs a value (--port=VALUE when it starts with --)"},
        {"--port --json", "--port needs a value (--port=VALUE when it starts with --)"},
        {"--port 0", "--port: expected a whole number from 1 to 65535, found '0'"},
        {"--port 8o", "--port: expected a whole number from 1 to 65535, found '8o'"},
        {"--port=", "--port: expected a whole number from 1 to 65535, found ''"},
        {"--seed 9223372036854775808",
         "--seed: expected a whole number, found '9223372036854775808'"},
        {"--lora-alpha nan", "--lora-alpha: expected a number of at least 0, found 'nan'"},
        {"--lora-alpha -1", "--lora-alpha: expected a number of at least 0, found '-1'"},
        {"--kv-cache 3TB", "--kv-cache: expected a size such as 512MiB, found '3TB'"},
        {"--kv-cache -3", "--kv-cache: expected a size such as 512MiB, found '-3'"},
        {"--kv-cache 1e40", "--kv-cache: expected a size such as 512MiB, found '1e40'"},
        {"--double-quant maybe", "--double-quant: expected true or false, found 'maybe'"},
        {"--json=2", "--json: expected true or false, found '2'"},
        {"--device gpu", "--device: expected one of auto|cpu|cuda, found 'gpu'"},
        {"--device cp", "--device: expected one of auto|cpu|cuda, found 'cp'"},
        {"serve", "'serve' is not an option (options start with --)"},
        {"--", "'--' is not an option (options start with --)"},
        {"--json true", "'true' is not an option (options start with --)"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        fields f;
        bool help;
        gn_error err = {0};
        cr_expect_eq(parse(&f, cases[i].line, &help, &err), GN_EINVAL, "%s", cases[i].line);
        cr_expect_str_eq(err.message, cases[i].message);
        gn_options_free(table, &f);
    }
    /* A name longer than any option's is cut in the message, not overrun. */
    char line[400];
    memset(line, 'x', sizeof line);
    memcpy(line, "--", 2);
    line[sizeof line - 1] = '\0';
    fields f;
    bool help;
    cr_assert_eq(parse(&f, line, &help, NULL), GN_EINVAL);
}

Test(options, set_one) {
    fields f;
    bool help;
    gn_error err = {0};
    cr_assert_eq(parse(&f, "--port 7", &help, &err), GN_OK);
    cr_assert_eq(gn_options_set(table, &f, "lora_alpha", "2", &err), GN_OK);
    cr_assert_eq(f.number, 7);
    cr_assert_eq(f.real, 2.0f);
    cr_assert_eq(gn_options_set(table, &f, "lora-alpha", "x", &err), GN_EINVAL);
    cr_assert_eq(gn_options_set(table, &f, "lora", "1", &err), GN_EINVAL);
    cr_assert_eq(f.real, 2.0f);
}

Test(options, help) {
    fields f;
    bool help = false;
    cr_assert_eq(parse(&f, "--port 1 --help --nonsense", &help, NULL), GN_OK);
    cr_assert(help);
    char *text = gn_options_help(table, "usage: test [options]\n");
    cr_assert_not_null(text);
    cr_assert_str_eq(
        text, "usage: test [options]\n"
              "\nThings\n"
              "  --text TEXT                 a text (default abc)\n"
              "  --port N                    a port (from 1 to 65535; default 8080)\n"
              "  --seed N                    any number\n"
              "  --lora-alpha X              a real number whose help line is so long that it\n"
              "                              has to be wrapped (of at least 0; default 0.5)\n"
              "\nOthers\n"
              "  --json                      for machines\n"
              "  --double-quant true|false   twice (default true)\n"
              "  --kv-cache SIZE             bytes (default 1GiB)\n"
              "  --device auto|cpu|cuda      where\n"
              "  --adapter NAME=DIR          adapters\n");
    free(text);
}

Test(options, nearest) {
    static const char *const words[] = {"serve", "chat", "quantize", "eval", "bench"};
    cr_assert_str_eq(gn_nearest("sevre", words, 5), "serve");
    cr_assert_str_eq(gn_nearest("quantise", words, 5), "quantize");
    cr_assert_null(gn_nearest("dance", words, 2));
    cr_assert_null(gn_nearest("", words, 5));
}
