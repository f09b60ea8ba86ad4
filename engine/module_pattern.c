/* module_pattern.c - the part of Python's regular expressions that occurs in adapter configs.
 *
 * An adapter may come from anywhere, and with regcomp or a backtracking matcher a short pattern
 * can keep a server busy for minutes. So a pattern is compiled to a small program whose threads
 * advance together over the name (Thompson's construction, Pike's machine): whether a whole name
 * matches does not depend on the order in which alternatives are tried. */
#include "engine/module_pattern.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_KEY = 256, MAX_NODES = 4 * MAX_KEY }; /* a character needs at most three nodes */

typedef enum { CHAR, ANY, SET, DIGIT, WORD, BEGIN, END, SPLIT, JUMP, MATCH } op;

typedef struct gn_pattern_node {
    uint8_t op;
    char c;       /* CHAR */
    int16_t a, b; /* SPLIT, JUMP: distances to go; SET: where its text begins and ends in the key */
} node;

typedef struct {
    const char *key, *at;
    node nodes[MAX_NODES];
    int count;
    bool failed;
} compiler;

static bool is_digit(char c) {
    return c >= '0' && c <= '9';
}

static bool is_word(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || is_digit(c) || c == '_';
}

static bool is_plain(const char *key) {
    for (; *key; key++) {
        if (!is_word(*key) && *key != '-' && *key != '.') return false;
    }
    return true;
}

/* ---- compiling ---- */

/* Makes room for one node at `index`. Distances are relative, so what moves stays right. */
static void insert(compiler *c, int index, node n) {
    if (c->count == MAX_NODES) {
        c->failed = true;
        return;
    }
    memmove(&c->nodes[index + 1], &c->nodes[index], (size_t)(c->count - index) * sizeof n);
    c->nodes[index] = n;
    c->count++;
}

static void append(compiler *c, node n) {
    insert(c, c->count, n);
}

/* [...], without escapes or brackets inside; a "]" that comes first is a member. */
static void compile_set(compiler *c) {
    const char *begin = ++c->at;
    if (*c->at == '^') c->at++;
    do {
        if (!*c->at || *c->at == '\\' || *c->at == '[') {
            c->failed = true;
            return;
        }
        c->at++;
    } while (*c->at != ']');
    append(c, (node){.op = SET, .a = (int16_t)(begin - c->key), .b = (int16_t)(c->at - c->key)});
    c->at++;
}

static void compile_escape(compiler *c) {
    const char e = c->at[1];
    if (e == 'd' || e == 'w')
        append(c, (node){.op = e == 'd' ? DIGIT : WORD});
    else if (e && strchr(".-_|()[]^$*+?{}/", e))
        append(c, (node){.op = CHAR, .c = e});
    else
        c->failed = true;
    c->at += 2;
}

static void compile_alternatives(compiler *c);

static void compile_group(compiler *c) {
    c->at++;
    if (*c->at == '?') {
        if (c->at[1] != ':') {
            c->failed = true;
            return;
        }
        c->at += 2;
    }
    compile_alternatives(c);
    if (*c->at != ')')
        c->failed = true;
    else
        c->at++;
}

/* *, + or ? after the atom that begins at `first`. A second sign would make it lazy. */
static void compile_repeat(compiler *c, int first) {
    const char sign = *c->at;
    if (!sign || !strchr("*+?", sign)) return;
    const int length = c->count - first;
    if (sign == '+') {
        append(c, (node){.op = SPLIT, .a = (int16_t)-length, .b = 1});
    } else {
        insert(c, first, (node){.op = SPLIT, .a = 1, .b = (int16_t)(length + 1 + (sign == '*'))});
        if (sign == '*') append(c, (node){.op = JUMP, .a = (int16_t) - (length + 1)});
    }
    c->at++;
    if (*c->at && strchr("*+?", *c->at)) c->failed = true;
}

static void compile_atom(compiler *c) {
    const int first = c->count;
    switch (*c->at) {
    case '(': compile_group(c); break;
    case '[': compile_set(c); break;
    case '\\': compile_escape(c); break;
    case '.':
        append(c, (node){.op = ANY});
        c->at++;
        break;
    case '^':
    case '$':
        append(c, (node){.op = *c->at == '^' ? BEGIN : END});
        c->at++;
        if (*c->at && strchr("*+?", *c->at)) c->failed = true;
        return;
    default:
        if (!is_word(*c->at) && *c->at != '-') c->failed = true;
        append(c, (node){.op = CHAR, .c = *c->at});
        c->at++;
    }
    if (!c->failed) compile_repeat(c, first);
}

/* Nests no deeper than the key is long. */
static void compile_alternatives(compiler *c) {
    const int first = c->count;
    while (!c->failed && *c->at && *c->at != '|' && *c->at != ')') compile_atom(c);
    if (c->failed || *c->at != '|') return;
    c->at++;
    insert(c, first, (node){.op = SPLIT, .a = 1, .b = (int16_t)(c->count - first + 2)});
    const int jump = c->count;
    append(c, (node){.op = JUMP});
    compile_alternatives(c);
    if (!c->failed) c->nodes[jump].a = (int16_t)(c->count - jump);
}

gn_status gn_module_pattern_open(gn_module_pattern *pattern, const char *key, const char *where,
                                 gn_error *err) {
    *pattern = (gn_module_pattern){.key = key};
    const size_t len = strlen(key);
    if (len == 0 || len > MAX_KEY)
        return gn_fail(err, GN_EUNSUPPORTED, "%s: a key of %zu characters (1 to %d are read)",
                       where, len, MAX_KEY);
    if (is_plain(key)) return GN_OK;
    compiler c = {.key = key, .at = key};
    compile_alternatives(&c);
    append(&c, (node){.op = MATCH});
    if (c.failed || *c.at)
        return gn_fail(err, GN_EUNSUPPORTED,
                       "%s: the pattern \"%s\" is not understood (write module names, or a simple "
                       "regular expression)",
                       where, key);
    pattern->program = malloc((size_t)c.count * sizeof *pattern->program);
    if (!pattern->program) return gn_fail(err, GN_ENOMEM, "%s: out of memory", where);
    memcpy(pattern->program, c.nodes, (size_t)c.count * sizeof *pattern->program);
    pattern->nodes = c.count;
    return GN_OK;
}

void gn_module_pattern_close(gn_module_pattern *pattern) {
    free(pattern->program);
    *pattern = (gn_module_pattern){0};
}

/* ---- matching ---- */

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

static bool in_set(const char *p, const char *end, char c) {
    const bool negated = *p == '^';
    bool found = false;
    for (p += negated; p < end; p++) {
        if (p + 2 < end && p[1] == '-') {
            found |= *p <= c && c <= p[2];
            p += 2;
        } else {
            found |= *p == c;
        }
    }
    return found != negated;
}

static bool takes(const gn_module_pattern *pattern, const node *n, char c) {
    switch ((op)n->op) {
    case CHAR: return c == n->c;
    case ANY: return true;
    case SET: return in_set(pattern->key + n->a, pattern->key + n->b, c);
    case DIGIT: return is_digit(c);
    case WORD: return is_word(c);
    default: return false;
    }
}

/* The nodes at which a thread waits for the next character. */
typedef struct {
    int16_t at[MAX_NODES];
    int count;
    bool seen[MAX_NODES];
} threads;

/* Adds a thread at `first` and wherever it gets from there without a character. Each node is
 * entered once and leads to two at most. */
static void spawn(threads *t, const node *program, int first, bool begin, bool end) {
    int16_t pending[2 * MAX_NODES];
    int n = 0;
    pending[n++] = (int16_t)first;
    while (n) {
        const int16_t i = pending[--n];
        if (t->seen[i]) continue;
        t->seen[i] = true;
        const node *p = &program[i];
        switch ((op)p->op) {
        case SPLIT: pending[n++] = (int16_t)(i + p->b); /* fall through */
        case JUMP: pending[n++] = (int16_t)(i + p->a); break;
        case BEGIN:
            if (begin) pending[n++] = (int16_t)(i + 1);
            break;
        case END:
            if (end) pending[n++] = (int16_t)(i + 1);
            break;
        default: t->at[t->count++] = i;
        }
    }
}

static void clear(threads *t, int nodes) {
    t->count = 0;
    memset(t->seen, 0, (size_t)nodes * sizeof *t->seen);
}

bool gn_module_pattern_match(const gn_module_pattern *pattern, const char *module) {
    if (!pattern->program) return match_plain(pattern->key, module);
    const node *program = pattern->program;
    threads lists[2], *now = &lists[0], *next = &lists[1];
    clear(now, pattern->nodes);
    for (const char *s = module;; s++) {
        if (s == module || s[-1] == '.') spawn(now, program, 0, s == module, !*s);
        if (!*s) break;
        clear(next, pattern->nodes);
        for (int i = 0; i < now->count; i++) {
            if (takes(pattern, &program[now->at[i]], *s))
                spawn(next, program, now->at[i] + 1, false, !s[1]);
        }
        threads *swap = now;
        now = next;
        next = swap;
    }
    return now->seen[pattern->nodes - 1];
}
