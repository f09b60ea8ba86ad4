/* options.h - command lines as tables.
 *
 * A program declares its options once, as an array of gn_option ending with GN_OPTION_END; from
 * it come parsing, range checks, error messages and the --help text. Nothing here prints or
 * exits.
 *
 *   typedef struct serve_options { int port; const char *host; gn_strings adapters; } ...;
 *   static const gn_option table[] = {
 *       GN_OPTION_GROUP("Network"),
 *       {GN_OPT_INT, "port", offsetof(serve_options, port), .initial = "8080", .min = 0,
 *        .max = 65535, .value = "N", .help = "port to listen on"},
 *       {GN_OPT_LIST, "adapter", offsetof(serve_options, adapters), .value = "NAME=DIR",
 *        .help = "an adapter to load"},
 *       GN_OPTION_END};
 *
 * `--name value` and `--name=value` mean the same, and so do `--lora-r` and `--lora_r`. */
#ifndef GN_OPTIONS_H
#define GN_OPTIONS_H

#include "kernels/base.h"

typedef enum gn_option_kind {
    GN_OPT_END,
    GN_OPT_GROUP,  /* only a heading for --help: `name` */
    GN_OPT_STRING, /* const char *, borrowed from argv or the table */
    GN_OPT_INT,    /* int */
    GN_OPT_INT64,  /* int64_t */
    GN_OPT_FLOAT,  /* float; finite */
    GN_OPT_FLAG,   /* bool; takes no value, given means true */
    GN_OPT_BOOL,   /* bool; true or false (yes, no, 1, 0); no value means true */
    GN_OPT_SIZE,   /* int64_t bytes: 1048576, 512MiB, 1.5GiB */
    GN_OPT_CHOICE, /* int: which of `choices`, from 0 */
    GN_OPT_LIST    /* gn_strings: every use of the option adds one */
} gn_option_kind;

typedef struct gn_option {
    gn_option_kind kind;
    const char *name;    /* without dashes in front */
    size_t offset;       /* of the field in the program's struct */
    const char *initial; /* the default, written as a user would; NULL: zero, false or none */
    double min, max;     /* of numbers and sizes, inclusive; both 0: whatever the field holds */
    const char *choices; /* "auto|cpu" */
    const char *value;   /* what --help calls the value, as "DIR"; NULL: by kind */
    const char *help;
} gn_option;

#define GN_OPTION_GROUP(heading)                                                                   \
    { .kind = GN_OPT_GROUP, .name = (heading) }
#define GN_OPTION_END                                                                              \
    { .kind = GN_OPT_END }

/* Strings are borrowed; the array is not. */
typedef struct gn_strings {
    const char **items;
    int n;
} gn_strings;

/* Sets every field to its default, then reads the n arguments (no program name among them).
 * *help tells whether -h or --help was among them; parsing stops there. An argument that
 * is no option, an unknown option (with the nearest known one), a missing or unwanted value and a
 * value out of range are GN_EINVAL. Whatever comes back, gn_options_free may follow. */
GN_CHECKED gn_status gn_options_parse(const gn_option *table, void *fields, int n,
                                      char *const *args, bool *help, gn_error *err);
/* Sets one field as `--name value` would, and leaves the others. */
GN_CHECKED gn_status gn_options_set(const gn_option *table, void *fields, const char *name,
                                    const char *value, gn_error *err);
/* Frees the lists. */
void gn_options_free(const gn_option *table, void *fields);

/* The --help text: `usage` as it is, then the options by group with defaults and ranges, in 80
 * columns. malloc'ed; NULL when memory is short. */
char *gn_options_help(const gn_option *table, const char *usage);

/* The word nearest to `word` when it is near enough to be a slip, else NULL. */
const char *gn_nearest(const char *word, const char *const *words, int n);

/* --kv-dtype: gn_kv_dtype's values in order. */
#define GN_KV_CHOICES "auto|bf16|fp8"
#define GN_KV_HELP                                                                                 \
    "how to keep keys and values: auto is as products are computed, fp8 takes half of bf16's "     \
    "memory, and precision"

#endif
