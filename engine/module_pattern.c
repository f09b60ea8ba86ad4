/* module_pattern.c - Python's regular expressions, as far as they occur in adapter configs, on
 * POSIX's.
 *
 * Whether a whole name matches does not depend on how alternatives are tried, so the two agree
 * wherever the syntax means the same. A translation refuses everything else, rather than letting
 * regcomp read it its own way. Length bounds the nesting. */
#include "engine/module_pattern.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

enum { MAX_KEY = 256, MAX_REGEX = 12 * MAX_KEY + 16 }; /* \w becomes 12 characters */

static bool is_plain(const char *key) {
    for (; *key; key++) {
        if (!isalnum((unsigned char)*key) && !strchr("_-.", *key)) return false;
    }
    return true;
}

/* The bracket expression at *in, copied. Escapes, classes and ranges of brackets are refused. */
static bool copy_bracket(const char **in, char **out) {
    const char *p = *in;
    do {
        *(*out)++ = *p++;
        if (!*p || *p == '\\' || *p == '[') return false;
    } while (*p != ']' || p == *in + 1 || (p == *in + 2 && p[-1] == '^'));
    *(*out)++ = *p++;
    *in = p;
    return true;
}

static bool copy_escape(const char **in, char **out) {
    const char c = (*in)[1];
    *in += 2;
    if (c == 'd')
        *out = stpcpy(*out, "[0-9]");
    else if (c == 'w')
        *out = stpcpy(*out, "[A-Za-z0-9_]");
    else if (c && strchr(".-_|()[]^$*+?{}/", c))
        *out += sprintf(*out, strchr("-_/", c) ? "%c" : "\\%c", c);
    else
        return false;
    return true;
}

/* Writes a key to `out` as a POSIX extended expression; returns its end, or NULL. */
static char *translate(const char *key, char *out) {
    bool repeatable = false; /* does an atom stand before? */
    int depth = 0;
    while (*key) {
        const char c = *key;
        if (c == ')' && depth-- == 0) return NULL; /* glibc would take it for itself */
        if (strchr("*+?", c)) {
            if (!repeatable) return NULL; /* also lazy and possessive: a second sign */
            repeatable = false;
            *out++ = *key++;
        } else if (c == '[') {
            if (!copy_bracket(&key, &out)) return NULL;
            repeatable = true;
        } else if (c == '\\') {
            if (!copy_escape(&key, &out)) return NULL;
            repeatable = true;
        } else if (c == '(') {
            if (key[1] == '?' && key[2] != ':') return NULL;
            depth++;
            *out++ = *key++;
            if (*key == '?') key += 2;
            repeatable = false;
        } else if (strchr("|^$", c)) {
            *out++ = *key++;
            repeatable = false;
        } else if (c == ')' || c == '.' || is_plain((const char[]){c, 0})) {
            *out++ = *key++;
            repeatable = true;
        } else {
            return NULL;
        }
    }
    return depth == 0 ? out : NULL;
}

gn_status gn_module_pattern_open(gn_module_pattern *pattern, const char *key, const char *where,
                                 gn_error *err) {
    *pattern = (gn_module_pattern){.key = key, .plain = true};
    const size_t len = strlen(key);
    if (len == 0 || len > MAX_KEY)
        return gn_fail(err, GN_EUNSUPPORTED, "%s: a key of %zu characters (1 to %d are read)",
                       where, len, MAX_KEY);
    if (is_plain(key)) return GN_OK;
    char regex[MAX_REGEX];
    char *end = translate(key, stpcpy(regex, "^(.*\\.)?("));
    if (end) {
        stpcpy(end, ")$");
        pattern->plain = regcomp(&pattern->regex, regex, REG_EXTENDED | REG_NOSUB) != 0;
    }
    if (pattern->plain)
        return gn_fail(err, GN_EUNSUPPORTED,
                       "%s: the pattern \"%s\" is not understood (write module names, or a simple "
                       "regular expression)",
                       where, key);
    return GN_OK;
}

/* The last parts of the name, where the key's "." stands for any character as in any regular
 * expression. */
static bool match_plain(const char *key, const char *module) {
    const size_t key_len = strlen(key), len = strlen(module);
    if (key_len > len) return false;
    const char *tail = module + len - key_len;
    if (tail > module && tail[-1] != '.') return false;
    for (size_t i = 0; i < key_len; i++) {
        if (key[i] != '.' && key[i] != tail[i]) return false;
    }
    return true;
}

bool gn_module_pattern_match(const gn_module_pattern *pattern, const char *module) {
    if (pattern->plain) return match_plain(pattern->key, module);
    return regexec(&pattern->regex, module, 0, NULL, 0) == 0;
}

void gn_module_pattern_close(gn_module_pattern *pattern) {
    if (!pattern->plain) regfree(&pattern->regex);
    *pattern = (gn_module_pattern){.plain = true};
}
