/* options.c - command lines as tables.
 *
 * A default goes through the same parser as a user's value, so that a table cannot hold a
 * default which the program would refuse, and --help shows what is really used. */
#include "engine/options.h"

#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { MAX_NAME = 64, HELP_COLUMN = 30, HELP_WIDTH = 80 };

/* ---- nearest match ---- */

static char fold(char c) {
    return c == '_' ? '-' : (char)tolower((unsigned char)c);
}

/* Optimal string alignment distance (insert, delete, replace, swap neighbours), case ignored. */
static int edit_distance(const char *a, const char *b) {
    const int n = (int)strnlen(a, MAX_NAME), m = (int)strnlen(b, MAX_NAME);
    int rows[3][MAX_NAME + 1];
    for (int j = 0; j <= m; j++) rows[0][j] = j;
    for (int i = 1; i <= n; i++) {
        const int *before = rows[(i + 1) % 3], *last = rows[(i - 1) % 3];
        int *row = rows[i % 3];
        row[0] = i;
        for (int j = 1; j <= m; j++) {
            const char x = fold(a[i - 1]), y = fold(b[j - 1]);
            int best = last[j - 1] + (x != y);
            if (last[j] + 1 < best) best = last[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            if (i > 1 && j > 1 && x == fold(b[j - 2]) && fold(a[i - 2]) == y &&
                before[j - 2] + 1 < best)
                best = before[j - 2] + 1;
            row[j] = best;
        }
    }
    return rows[n % 3][m];
}

const char *gn_nearest(const char *word, const char *const *words, int n) {
    const int length = (int)strnlen(word, MAX_NAME);
    int best = (length + 2) / 3 + 1; /* a third of the letters may be wrong */
    const char *nearest = NULL;
    for (int i = 0; i < n; i++) {
        const int distance = edit_distance(word, words[i]);
        if (distance >= best) continue;
        best = distance;
        nearest = words[i];
    }
    return nearest;
}

static const char *nearest_option(const gn_option *table, const char *name) {
    const char *nearest = NULL;
    for (const gn_option *o = table; o->kind != GN_OPT_END; o++) {
        if (o->kind == GN_OPT_GROUP) continue;
        const char *pair[2] = {o->name, nearest};
        nearest = gn_nearest(name, pair, nearest ? 2 : 1);
    }
    return nearest;
}

/* ---- values ---- */

static bool has_range(const gn_option *o) {
    return o->min != 0 || o->max != 0;
}

/* " from 1 to 8", " of at least 1", or nothing. */
static const char *range_text(const gn_option *o, char *text, size_t size) {
    text[0] = '\0';
    if (!has_range(o)) return text;
    if (isinf(o->max))
        snprintf(text, size, " of at least %.16g", o->min);
    else
        snprintf(text, size, " from %.16g to %.16g", o->min, o->max);
    return text;
}

static gn_status bad_value(const gn_option *o, const char *what, const char *text, gn_error *err) {
    char range[80];
    return gn_fail(err, GN_EINVAL, "--%s: expected %s%s, found '%.100s'", o->name, what,
                   range_text(o, range, sizeof range), text);
}

static gn_status parse_integer(const gn_option *o, int64_t *out, const char *text, gn_error *err) {
    char *end;
    errno = 0;
    const long long value = strtoll(text, &end, 10);
    const bool fits = o->kind == GN_OPT_INT64 || (value >= INT_MIN && value <= INT_MAX);
    if (end == text || *end || errno || !fits ||
        (has_range(o) && ((double)value < o->min || (double)value > o->max)))
        return bad_value(o, "a whole number", text, err);
    *out = value;
    return GN_OK;
}

static gn_status parse_float(const gn_option *o, float *out, const char *text, gn_error *err) {
    char *end;
    const double value = strtod(text, &end);
    if (end == text || *end || !isfinite((float)value) ||
        (has_range(o) && (value < o->min || value > o->max)))
        return bad_value(o, "a number", text, err);
    *out = (float)value;
    return GN_OK;
}

static gn_status parse_size(const gn_option *o, int64_t *out, const char *text, gn_error *err) {
    static const struct {
        const char *suffix;
        double unit;
    } units[] = {{"", 1},       {"B", 1},        {"K", 0x1p10}, {"KiB", 0x1p10},
                 {"M", 0x1p20}, {"MiB", 0x1p20}, {"G", 0x1p30}, {"GiB", 0x1p30}};
    char *end;
    const double count = strtod(text, &end);
    double bytes = NAN;
    for (size_t i = 0; end != text && i < sizeof units / sizeof *units; i++)
        if (strcasecmp(end, units[i].suffix) == 0) bytes = count * units[i].unit;
    if (!(bytes >= 0 && bytes < 0x1p62) || (has_range(o) && (bytes < o->min || bytes > o->max)))
        return bad_value(o, "a size such as 512MiB", text, err);
    *out = (int64_t)bytes;
    return GN_OK;
}

static gn_status parse_bool(const gn_option *o, bool *out, const char *text, gn_error *err) {
    static const char *const words[] = {"false", "true", "no", "yes", "0", "1"};
    for (int i = 0; i < 6; i++) {
        if (strcasecmp(text, words[i]) != 0) continue;
        *out = i % 2 == 1;
        return GN_OK;
    }
    return bad_value(o, "true or false", text, err);
}

static gn_status parse_choice(const gn_option *o, int *out, const char *text, gn_error *err) {
    const size_t length = strlen(text);
    int index = 0;
    for (const char *word = o->choices; word; index++) {
        const char *bar = strchr(word, '|');
        if ((bar ? (size_t)(bar - word) : strlen(word)) == length &&
            strncmp(word, text, length) == 0) {
            *out = index;
            return GN_OK;
        }
        word = bar ? bar + 1 : NULL;
    }
    return gn_fail(err, GN_EINVAL, "--%s: expected one of %s, found '%.100s'", o->name, o->choices,
                   text);
}

static gn_status add_string(gn_strings *list, const char *text, gn_error *err) {
    const char **items = realloc(list->items, ((size_t)list->n + 1) * sizeof *items);
    if (!items) return gn_fail(err, GN_ENOMEM, "out of memory while reading the command line");
    list->items = items;
    list->items[list->n++] = text;
    return GN_OK;
}

static gn_status set_value(const gn_option *o, void *fields, const char *text, gn_error *err) {
    void *field = (char *)fields + o->offset;
    gn_status status = GN_OK;
    int64_t integer = 0;
    switch (o->kind) {
    case GN_OPT_STRING: *(const char **)field = text; break;
    case GN_OPT_INT:
        status = parse_integer(o, &integer, text, err);
        if (!status) *(int *)field = (int)integer;
        break;
    case GN_OPT_INT64: status = parse_integer(o, field, text, err); break;
    case GN_OPT_FLOAT: status = parse_float(o, field, text, err); break;
    case GN_OPT_FLAG:
    case GN_OPT_BOOL: status = parse_bool(o, field, text, err); break;
    case GN_OPT_SIZE: status = parse_size(o, field, text, err); break;
    case GN_OPT_CHOICE: status = parse_choice(o, field, text, err); break;
    case GN_OPT_LIST: status = add_string(field, text, err); break;
    case GN_OPT_END:
    case GN_OPT_GROUP: break;
    }
    return status;
}

/* Zero of the field's type; what an option without a default starts from. */
static void clear_value(const gn_option *o, void *fields) {
    static const size_t sizes[] = {
        [GN_OPT_STRING] = sizeof(char *),  [GN_OPT_INT] = sizeof(int),
        [GN_OPT_INT64] = sizeof(int64_t),  [GN_OPT_FLOAT] = sizeof(float),
        [GN_OPT_FLAG] = sizeof(bool),      [GN_OPT_BOOL] = sizeof(bool),
        [GN_OPT_SIZE] = sizeof(int64_t),   [GN_OPT_CHOICE] = sizeof(int),
        [GN_OPT_LIST] = sizeof(gn_strings)};
    memset((char *)fields + o->offset, 0, sizes[o->kind]);
}

/* ---- the command line ---- */

static const gn_option *find_option(const gn_option *table, const char *name) {
    for (const gn_option *o = table; o->kind != GN_OPT_END; o++) {
        if (o->kind == GN_OPT_GROUP) continue;
        size_t i = 0;
        while (name[i] &&
               (name[i] == '_' ? '-' : name[i]) == (o->name[i] == '_' ? '-' : o->name[i]))
            i++;
        if (!name[i] && !o->name[i]) return o;
    }
    return NULL;
}

static gn_status require_option(const gn_option *table, const char *name, const gn_option **option,
                                gn_error *err) {
    *option = find_option(table, name);
    if (*option) return GN_OK;
    const char *nearest = nearest_option(table, name);
    if (!nearest) return gn_fail(err, GN_EINVAL, "unknown option --%.64s", name);
    return gn_fail(err, GN_EINVAL, "unknown option --%.64s (did you mean --%s?)", name, nearest);
}

/* One option: args[0] and, when it is its value, args[1]. *used is how many were taken. */
static gn_status parse_one(const gn_option *table, void *fields, int n, char *const *args,
                           int *used, gn_error *err) {
    const char *arg = args[0];
    if (strncmp(arg, "--", 2) != 0 || !arg[2])
        return gn_fail(err, GN_EINVAL, "'%.100s' is not an option (options start with --)", arg);
    char name[MAX_NAME];
    const size_t length = strcspn(arg + 2, "=");
    snprintf(name, sizeof name, "%.*s", (int)(length < MAX_NAME ? length : MAX_NAME - 1), arg + 2);
    const gn_option *o;
    const gn_status status = require_option(table, name, &o, err);
    if (status) return status;
    *used = 1;
    if (arg[2 + length] == '=') return set_value(o, fields, arg + 3 + length, err);
    const bool next_is_value = n > 1 && strncmp(args[1], "--", 2) != 0;
    if (o->kind == GN_OPT_FLAG || (o->kind == GN_OPT_BOOL && !next_is_value))
        return set_value(o, fields, "true", err);
    if (!next_is_value)
        return gn_fail(err, GN_EINVAL, "--%s needs a value (--%s=VALUE when it starts with --)",
                       o->name, o->name);
    *used = 2;
    return set_value(o, fields, args[1], err);
}

gn_status gn_options_parse(const gn_option *table, void *fields, int n, char *const *args,
                           bool *help, gn_error *err) {
    *help = false;
    for (const gn_option *o = table; o->kind != GN_OPT_END; o++)
        if (o->kind != GN_OPT_GROUP) clear_value(o, fields);
    for (const gn_option *o = table; o->kind != GN_OPT_END; o++) {
        if (o->kind == GN_OPT_GROUP || !o->initial) continue;
        const gn_status status = set_value(o, fields, o->initial, err);
        if (status) return status;
    }
    for (int i = 0, used = 0; i < n; i += used) {
        if (strcmp(args[i], "--help") == 0 || strcmp(args[i], "-h") == 0) {
            *help = true;
            return GN_OK;
        }
        const gn_status status = parse_one(table, fields, n - i, args + i, &used, err);
        if (status) return status;
    }
    return GN_OK;
}

gn_status gn_options_set(const gn_option *table, void *fields, const char *name, const char *value,
                         gn_error *err) {
    const gn_option *o;
    const gn_status status = require_option(table, name, &o, err);
    return status ? status : set_value(o, fields, value, err);
}

void gn_options_free(const gn_option *table, void *fields) {
    for (const gn_option *o = table; o->kind != GN_OPT_END; o++) {
        if (o->kind != GN_OPT_LIST) continue;
        free(((gn_strings *)(void *)((char *)fields + o->offset))->items);
        clear_value(o, fields);
    }
}

/* ---- help ---- */

static const char *value_name(const gn_option *o) {
    if (o->value) return o->value;
    switch (o->kind) {
    case GN_OPT_INT:
    case GN_OPT_INT64: return "N";
    case GN_OPT_FLOAT: return "X";
    case GN_OPT_BOOL: return "true|false";
    case GN_OPT_SIZE: return "SIZE";
    case GN_OPT_CHOICE: return o->choices;
    case GN_OPT_FLAG: return "";
    default: return "TEXT";
    }
}

/* Prints `text` from HELP_COLUMN on, broken at spaces before HELP_WIDTH. */
static void print_wrapped(FILE *out, const char *text) {
    int column = HELP_COLUMN;
    while (*text) {
        const int word = (int)strcspn(text, " ");
        if (column > HELP_COLUMN && column + 1 + word > HELP_WIDTH) {
            fprintf(out, "\n%*s", HELP_COLUMN, "");
            column = HELP_COLUMN;
        } else if (column > HELP_COLUMN)
            column += fprintf(out, " ");
        column += fprintf(out, "%.*s", word, text);
        text += word + strspn(text + word, " ");
    }
    fputc('\n', out);
}

static void print_option(FILE *out, const gn_option *o) {
    const char *value = value_name(o);
    const int column = fprintf(out, "  --%s%s%s", o->name, *value ? " " : "", value);
    if (column < HELP_COLUMN - 1)
        fprintf(out, "%*s", HELP_COLUMN - column, "");
    else
        fprintf(out, "\n%*s", HELP_COLUMN, "");
    char range[80], text[640];
    range_text(o, range, sizeof range);
    snprintf(text, sizeof text, "%s%s%s%s%s%s", o->help ? o->help : "",
             *range || o->initial ? " (" : "", *range ? range + 1 : "",
             *range && o->initial ? "; " : "", o->initial ? "default " : "",
             o->initial ? o->initial : "");
    if (*range || o->initial) strncat(text, ")", sizeof text - strlen(text) - 1);
    print_wrapped(out, text);
}

char *gn_options_help(const gn_option *table, const char *usage) {
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    if (!out) return NULL;
    fputs(usage, out);
    for (const gn_option *o = table; o->kind != GN_OPT_END; o++) {
        if (o->kind == GN_OPT_GROUP)
            fprintf(out, "\n%s\n", o->name);
        else
            print_option(out, o);
    }
    const bool failed = ferror(out) != 0;
    if (fclose(out) != 0 || failed) {
        free(text);
        return NULL;
    }
    return text;
}
