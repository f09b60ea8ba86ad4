/* pickle.c - the stack machine behind gn_pickle_read.
 *
 * Values live in one array and refer to each other by index, so nothing is walked recursively,
 * cycles are harmless, and everything is freed at once. Index 0 is None, which is also what a
 * failed step yields: the first failure sticks in `status` and ends the loop. Lists, floats and
 * object states are recognised and forgotten, as no tensor depends on them. */
#include "engine/pickle.h"

#include <stdlib.h>
#include <string.h>

#include "engine/bytes.h"

enum {
    MAX_VALUES = 1 << 22, /* about 20 for a tensor */
    MAX_STACK = 1 << 16,  /* Python writes dicts in batches of 1000 items */
    MAX_MARKS = 64,
    MAX_NAME = 512,
    NOWHERE = UINT32_MAX,
};

typedef uint32_t ref;

typedef enum { NONE, BOOL, INT, FLOAT, STRING, TUPLE, LIST, DICT, GLOBAL, STORAGE, TENSOR } kind;

typedef enum { ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER, STORAGE_TYPE } meaning;

typedef struct {
    const char *module, *name;
    meaning meaning;
    gn_dtype dtype; /* of a STORAGE_TYPE */
} global;

static const global globals[] = {
    {"collections", "OrderedDict", ORDERED_DICT, 0},
    {"torch._utils", "_rebuild_tensor_v2", REBUILD_TENSOR, 0},
    {"torch._utils", "_rebuild_parameter", REBUILD_PARAMETER, 0},
    {"torch", "FloatStorage", STORAGE_TYPE, GN_F32},
    {"torch", "HalfStorage", STORAGE_TYPE, GN_F16},
    {"torch", "BFloat16Storage", STORAGE_TYPE, GN_BF16},
    {"torch", "LongStorage", STORAGE_TYPE, GN_I64},
    {"torch", "IntStorage", STORAGE_TYPE, GN_I32},
    {"torch", "CharStorage", STORAGE_TYPE, GN_I8},
    {"torch", "ByteStorage", STORAGE_TYPE, GN_U8},
};

typedef struct {
    kind kind;
    union {
        int64_t integer;
        struct {
            const char *text;
            uint32_t len;
        } string;
        struct {
            uint32_t first, count; /* of `items` */
        } tuple;
        struct {
            uint32_t head, tail; /* of `pairs`, or NOWHERE */
        } dict;
        const global *global;
        struct {
            gn_dtype dtype;
            ref key;
            int64_t numel;
        } storage;
        uint32_t tensor; /* of `tensors` */
    };
} value;

typedef struct {
    ref key, value;
    uint32_t next;
} pair;

/* A growing array. */
typedef struct {
    void *data;
    size_t count, capacity;
} array;

typedef struct {
    const unsigned char *data;
    size_t bytes, at;
    const char *path;
    gn_error *err;
    gn_status status;
    array values, stack, memo, items, pairs, tensors;
    uint32_t marks[MAX_MARKS]; /* stack heights */
    int n_marks;
    bool done;
} machine;

#define FAIL(m, code, ...)                                                                         \
    do {                                                                                           \
        if ((m)->status == GN_OK) (m)->status = gn_fail((m)->err, code, __VA_ARGS__);              \
    } while (0)

static void malformed(machine *m, const char *what) {
    FAIL(m, GN_EFORMAT, "%s: malformed pickle: %s before byte %zu", m->path, what, m->at);
}

/* ---- values, stack, memo ---- */

/* Makes room for `more` elements and counts them; returns the first, or NULL after failing. */
static void *extend(machine *m, array *a, size_t more, size_t size) {
    if (more > MAX_VALUES - a->count) {
        FAIL(m, GN_ETOOBIG, "%s: the pickle holds over %d values", m->path, (int)MAX_VALUES);
        return NULL;
    }
    if (a->count + more > a->capacity) {
        size_t capacity = a->capacity ? a->capacity : 64;
        while (capacity < a->count + more) capacity *= 2;
        void *data = realloc(a->data, capacity * size);
        if (!data) {
            FAIL(m, GN_ENOMEM, "%s: out of memory", m->path);
            return NULL;
        }
        a->data = data;
        a->capacity = capacity;
    }
    a->count += more;
    return (char *)a->data + (a->count - more) * size;
}

static value *at(const machine *m, ref r) {
    return (value *)m->values.data + r;
}
static ref *stack(const machine *m) {
    return m->stack.data;
}
static ref item(const machine *m, const value *tuple, uint32_t i) {
    return ((ref *)m->items.data)[tuple->tuple.first + i];
}

static void push(machine *m, ref r) {
    if (m->stack.count >= MAX_STACK) {
        FAIL(m, GN_ETOOBIG, "%s: the pickle's stack is over %d deep", m->path, (int)MAX_STACK);
        return;
    }
    ref *top = extend(m, &m->stack, 1, sizeof *top);
    if (top) *top = r;
}

static ref add_value(machine *m, value v) {
    value *new = extend(m, &m->values, 1, sizeof *new);
    if (!new) return 0;
    *new = v;
    return (ref)(m->values.count - 1);
}

static void push_value(machine *m, value v) {
    push(m, add_value(m, v));
}

static void push_dict(machine *m) {
    push_value(m, (value){.kind = DICT, .dict = {NOWHERE, NOWHERE}});
}

/* Values above the innermost mark. */
static size_t available(const machine *m) {
    return m->stack.count - (m->n_marks ? m->marks[m->n_marks - 1] : 0);
}

static ref pop(machine *m) {
    if (available(m) == 0) {
        malformed(m, "nothing on the stack");
        return 0;
    }
    return stack(m)[--m->stack.count];
}

static ref top(machine *m) {
    if (available(m) == 0) {
        malformed(m, "nothing on the stack");
        return 0;
    }
    return stack(m)[m->stack.count - 1];
}

static void mark(machine *m) {
    if (m->n_marks == MAX_MARKS)
        FAIL(m, GN_ETOOBIG, "%s: the pickle nests over %d deep", m->path, (int)MAX_MARKS);
    else
        m->marks[m->n_marks++] = (uint32_t)m->stack.count;
}

/* Pops back to the mark. The values stay readable at stack(m)[m->stack.count ...] until the next
 * push. */
static size_t pop_to_mark(machine *m) {
    if (m->n_marks == 0) {
        malformed(m, "no mark on the stack");
        return 0;
    }
    const size_t height = m->marks[--m->n_marks], n = m->stack.count - height;
    m->stack.count = height;
    return n;
}

static void remember(machine *m, uint32_t index) {
    if (index >= MAX_VALUES) {
        FAIL(m, GN_ETOOBIG, "%s: the pickle's memo is over %d long", m->path, (int)MAX_VALUES);
        return;
    }
    const ref r = top(m);
    if (index >= m->memo.count) {
        const size_t more = index + 1 - m->memo.count;
        ref *new = extend(m, &m->memo, more, sizeof *new);
        if (!new) return;
        memset(new, 0xff, more * sizeof *new);
    }
    ((ref *)m->memo.data)[index] = r;
}

static void recall(machine *m, uint32_t index) {
    const ref r = index < m->memo.count ? ((ref *)m->memo.data)[index] : NOWHERE;
    if (r == NOWHERE)
        malformed(m, "an unknown memo entry");
    else
        push(m, r);
}

/* ---- operands ---- */

static const unsigned char *take(machine *m, uint64_t n) {
    if (!gn_within(m->at, n, m->bytes)) {
        malformed(m, "cut short");
        return NULL;
    }
    const unsigned char *p = m->data + m->at;
    m->at += n;
    return p;
}

/* A little-endian number of 1, 2, 4 or 8 bytes; 0 after failing. */
static uint64_t number(machine *m, int bytes) {
    const unsigned char *p = take(m, (uint64_t)bytes);
    uint64_t n = 0;
    for (int i = 0; p && i < bytes; i++) n |= (uint64_t)p[i] << (8 * i);
    return n;
}

static void push_integer(machine *m, int64_t n) {
    push_value(m, (value){.kind = INT, .integer = n});
}

static void push_long(machine *m) {
    const uint64_t bytes = number(m, 1);
    if (bytes > 8) {
        malformed(m, "an integer of over 64 bits");
        return;
    }
    const unsigned char *p = take(m, bytes);
    uint64_t n = p && bytes && p[bytes - 1] & 0x80 ? UINT64_MAX : 0;
    for (uint64_t i = bytes; p && i-- > 0;) n = n << 8 | p[i];
    push_integer(m, (int64_t)n);
}

static void push_string(machine *m, uint64_t len) {
    const unsigned char *p = take(m, len);
    if (p) push_value(m, (value){.kind = STRING, .string = {(const char *)p, (uint32_t)len}});
}

/* ---- containers ---- */

static void push_tuple(machine *m, size_t n) {
    if (n > available(m)) {
        malformed(m, "nothing on the stack");
        return;
    }
    const uint32_t first = (uint32_t)m->items.count;
    m->stack.count -= n;
    if (n) {
        ref *items = extend(m, &m->items, n, sizeof *items);
        if (items) memcpy(items, stack(m) + m->stack.count, n * sizeof *items);
    }
    push_value(m, (value){.kind = TUPLE, .tuple = {first, (uint32_t)n}});
}

static void push_marked_tuple(machine *m) {
    const size_t n = pop_to_mark(m);
    m->stack.count += n; /* still there; the mark is gone */
    push_tuple(m, n);
}

static void dict_add(machine *m, ref dict, ref key, ref val) {
    pair *new = extend(m, &m->pairs, 1, sizeof *new);
    if (!new) return;
    *new = (pair){key, val, NOWHERE};
    const uint32_t index = (uint32_t)(m->pairs.count - 1);
    value *d = at(m, dict);
    if (d->dict.head == NOWHERE)
        d->dict.head = index;
    else
        ((pair *)m->pairs.data)[d->dict.tail].next = index;
    d->dict.tail = index;
}

static void set_item(machine *m) {
    const ref val = pop(m), key = pop(m), dict = top(m);
    if (at(m, dict)->kind != DICT)
        malformed(m, "items for something that is no dict");
    else
        dict_add(m, dict, key, val);
}

static void set_items(machine *m) {
    const size_t n = pop_to_mark(m);
    const ref dict = top(m);
    if (n % 2 || at(m, dict)->kind != DICT) {
        malformed(m, "items for something that is no dict");
        return;
    }
    const ref *items = stack(m) + m->stack.count;
    for (size_t i = 0; i < n; i += 2) dict_add(m, dict, items[i], items[i + 1]);
}

static void push_marked_dict(machine *m) {
    const size_t n = pop_to_mark(m);
    const size_t first = m->stack.count;
    if (n % 2) {
        malformed(m, "a key without a value");
        return;
    }
    const ref dict = add_value(m, (value){.kind = DICT, .dict = {NOWHERE, NOWHERE}});
    for (size_t i = 0; m->status == GN_OK && i < n; i += 2)
        dict_add(m, dict, stack(m)[first + i], stack(m)[first + i + 1]);
    push(m, dict);
}

static void check_list(machine *m) {
    if (at(m, top(m))->kind != LIST) malformed(m, "items for something that is no list");
}

static void build(machine *m) {
    (void)pop(m); /* a dict's attributes, such as torch's _metadata */
    if (at(m, top(m))->kind != DICT)
        FAIL(m, GN_EUNSUPPORTED, "%s: the pickle sets the state of an object: refusing to run code",
             m->path);
}

/* ---- globals and calls ---- */

static bool text_is(const char *text, size_t len, const char *s) {
    return len == strlen(s) && memcmp(text, s, len) == 0;
}

static bool is_string(const value *v, const char *s) {
    return v->kind == STRING && text_is(v->string.text, v->string.len, s);
}

static bool printable(const char *s, size_t len) {
    for (size_t i = 0; i < len; i++) {
        if (s[i] < 0x20 || s[i] > 0x7e) return false;
    }
    return true;
}

static void push_global(machine *m, const char *module, size_t module_len, const char *name,
                        size_t name_len) {
    for (size_t i = 0; i < sizeof globals / sizeof *globals; i++) {
        const global *g = &globals[i];
        if (!text_is(module, module_len, g->module) || !text_is(name, name_len, g->name)) continue;
        push_value(m, (value){.kind = GLOBAL, .global = g});
        return;
    }
    if (module_len + name_len > 200 || !printable(module, module_len) ||
        !printable(name, name_len)) {
        module = name = "?";
        module_len = name_len = 1;
    }
    FAIL(m, GN_EUNSUPPORTED,
         "%s: the pickle names %.*s.%.*s: refusing to run code, only plain tensors are read "
         "(convert the file to safetensors where you trust it)",
         m->path, (int)module_len, module, (int)name_len, name);
}

/* The rest of a line, as GLOBAL has its operands. */
static const char *line(machine *m, size_t *len) {
    const unsigned char *p = m->data + m->at;
    const unsigned char *end = memchr(p, '\n', m->bytes - m->at);
    if (!end) {
        malformed(m, "cut short");
        return NULL;
    }
    *len = (size_t)(end - p);
    m->at += *len + 1;
    return (const char *)p;
}

static void read_global(machine *m) {
    size_t module_len, name_len;
    const char *module = line(m, &module_len);
    const char *name = module ? line(m, &name_len) : NULL;
    if (name) push_global(m, module, module_len, name, name_len);
}

static void stack_global(machine *m) {
    const value *name = at(m, pop(m)), *module = at(m, pop(m));
    if (name->kind != STRING || module->kind != STRING)
        malformed(m, "a global whose name is no string");
    else
        push_global(m, module->string.text, module->string.len, name->string.text,
                    name->string.len);
}

/* ("storage", type, key, device, numel) */
static void persistent_storage(machine *m) {
    const value *id = at(m, pop(m));
    if (id->kind != TUPLE || id->tuple.count != 5 || !is_string(at(m, item(m, id, 0)), "storage")) {
        malformed(m, "a persistent id that is no storage");
        return;
    }
    const value *type = at(m, item(m, id, 1)), *key = at(m, item(m, id, 2)),
                *numel = at(m, item(m, id, 4));
    if (type->kind != GLOBAL || type->global->meaning != STORAGE_TYPE || key->kind != STRING ||
        numel->kind != INT || numel->integer < 0) {
        malformed(m, "a storage whose description makes no sense");
        return;
    }
    push_value(m, (value){.kind = STORAGE,
                          .storage = {type->global->dtype, item(m, id, 2), numel->integer}});
}

/* Reads shape and strides; false when they are not those of a row-major tensor. */
static bool read_shape(const machine *m, const value *shape, const value *strides,
                       gn_pickle_tensor *t, int64_t *numel) {
    t->ndim = (int)shape->tuple.count;
    *numel = 1;
    bool empty = false;
    for (uint32_t i = 0; i < shape->tuple.count; i++) {
        const value *n = at(m, item(m, shape, i));
        if (n->kind != INT || n->integer < 0) return false;
        t->shape[i] = n->integer;
        empty |= n->integer == 0;
    }
    for (uint32_t i = shape->tuple.count; i-- > 0;) {
        const value *stride = at(m, item(m, strides, i));
        if (stride->kind != INT) return false;
        if (!empty && t->shape[i] != 1 && stride->integer != *numel) return false;
        if (__builtin_mul_overflow(*numel, empty ? 0 : t->shape[i], numel)) return false;
    }
    return true;
}

/* (storage, offset, shape, strides, requires_grad, hooks[, metadata]) */
static void rebuild_tensor(machine *m, const value *args) {
    if (args->tuple.count < 6 || args->tuple.count > 7) {
        malformed(m, "a tensor with a wrong number of arguments");
        return;
    }
    const value *storage = at(m, item(m, args, 0)), *offset = at(m, item(m, args, 1)),
                *shape = at(m, item(m, args, 2)), *strides = at(m, item(m, args, 3));
    if (storage->kind != STORAGE || offset->kind != INT || offset->integer < 0 ||
        shape->kind != TUPLE || strides->kind != TUPLE ||
        shape->tuple.count != strides->tuple.count) {
        malformed(m, "a tensor whose description makes no sense");
        return;
    }
    if (shape->tuple.count > GN_MAX_DIMS) {
        FAIL(m, GN_EUNSUPPORTED, "%s: a tensor of over %d dimensions", m->path, GN_MAX_DIMS);
        return;
    }
    const value *key = at(m, storage->storage.key);
    gn_pickle_tensor t = {.storage = key->string.text,
                          .storage_len = key->string.len,
                          .dtype = storage->storage.dtype,
                          .offset = offset->integer,
                          .storage_numel = storage->storage.numel};
    int64_t numel;
    if (!read_shape(m, shape, strides, &t, &numel)) {
        FAIL(m, GN_EUNSUPPORTED,
             "%s: a tensor before byte %zu of the pickle is not contiguous (save it after "
             ".contiguous())",
             m->path, m->at);
        return;
    }
    if (!gn_within((uint64_t)t.offset, (uint64_t)numel, (uint64_t)t.storage_numel)) {
        malformed(m, "a tensor reaches past the end of its storage");
        return;
    }
    gn_pickle_tensor *new = extend(m, &m->tensors, 1, sizeof *new);
    if (!new) return;
    *new = t;
    push_value(m, (value){.kind = TENSOR, .tensor = (uint32_t)(m->tensors.count - 1)});
}

static void reduce(machine *m) {
    const value *args = at(m, pop(m)), *callee = at(m, pop(m));
    if (args->kind != TUPLE || callee->kind != GLOBAL) {
        malformed(m, "a call of something that is no function");
        return;
    }
    switch (callee->global->meaning) {
    case ORDERED_DICT:
        if (args->tuple.count)
            malformed(m, "an OrderedDict with arguments");
        else
            push_dict(m);
        return;
    case REBUILD_TENSOR: rebuild_tensor(m, args); return;
    case REBUILD_PARAMETER:
        if (args->tuple.count != 3 || at(m, item(m, args, 0))->kind != TENSOR)
            malformed(m, "a parameter that is no tensor");
        else
            push(m, item(m, args, 0));
        return;
    case STORAGE_TYPE: malformed(m, "a call of a storage type"); return;
    }
}

/* ---- the loop ---- */

static void protocol(machine *m) {
    const uint64_t version = number(m, 1);
    if (version < 2 || version > 5)
        FAIL(m, GN_EUNSUPPORTED, "%s: pickle protocol %d (2 to 5 are read)", m->path, (int)version);
}

/* Frames only help to read a stream; the file is in memory already. */
static void frame(machine *m) {
    const uint64_t bytes = number(m, 8);
    if (bytes > m->bytes - m->at) malformed(m, "a frame reaches past the end");
}

static void step(machine *m) {
    const unsigned char *p = take(m, 1);
    if (!p) return;
    switch (*p) {
    case 0x80: protocol(m); return;
    case 0x95: frame(m); return;
    case '.': m->done = true; return;
    case '(': mark(m); return;
    case 'N': push(m, 0); return;
    case 0x88: push_value(m, (value){.kind = BOOL, .integer = 1}); return;
    case 0x89: push_value(m, (value){.kind = BOOL, .integer = 0}); return;
    case 'K': push_integer(m, (int64_t)number(m, 1)); return;
    case 'M': push_integer(m, (int64_t)number(m, 2)); return;
    case 'J': push_integer(m, (int32_t)number(m, 4)); return;
    case 0x8a: push_long(m); return;
    case 'G':
        (void)take(m, 8);
        push_value(m, (value){.kind = FLOAT});
        return;
    case 'X': push_string(m, number(m, 4)); return;
    case 0x8c: push_string(m, number(m, 1)); return;
    case ')': push_tuple(m, 0); return;
    case 't': push_marked_tuple(m); return;
    case 0x85: push_tuple(m, 1); return;
    case 0x86: push_tuple(m, 2); return;
    case 0x87: push_tuple(m, 3); return;
    case ']': push_value(m, (value){.kind = LIST}); return;
    case 'l':
        (void)pop_to_mark(m);
        push_value(m, (value){.kind = LIST});
        return;
    case 'a':
        (void)pop(m);
        check_list(m);
        return;
    case 'e':
        (void)pop_to_mark(m);
        check_list(m);
        return;
    case '}': push_dict(m); return;
    case 'd': push_marked_dict(m); return;
    case 's': set_item(m); return;
    case 'u': set_items(m); return;
    case 'q': remember(m, (uint32_t)number(m, 1)); return;
    case 'r': remember(m, (uint32_t)number(m, 4)); return;
    case 0x94: remember(m, (uint32_t)m->memo.count); return;
    case 'h': recall(m, (uint32_t)number(m, 1)); return;
    case 'j': recall(m, (uint32_t)number(m, 4)); return;
    case 'c': read_global(m); return;
    case 0x93: stack_global(m); return;
    case 'Q': persistent_storage(m); return;
    case 'R': reduce(m); return;
    case 'b': build(m); return;
    default:
        FAIL(m, GN_EUNSUPPORTED,
             "%s: opcode 0x%02x at byte %zu of the pickle is none that a state dict needs: "
             "refusing to run code",
             m->path, *p, m->at - 1);
    }
}

/* The dict left on the stack, as tensors in its order. */
static void collect(machine *m, gn_pickle *pickle) {
    if (m->n_marks || m->stack.count != 1 || at(m, stack(m)[0])->kind != DICT) {
        FAIL(m, GN_EUNSUPPORTED, "%s: the pickle is not one dict of tensors", m->path);
        return;
    }
    array out = {0};
    for (uint32_t i = at(m, stack(m)[0])->dict.head; i != NOWHERE;) {
        const pair *p = (pair *)m->pairs.data + i;
        const value *key = at(m, p->key), *val = at(m, p->value);
        i = p->next;
        if (key->kind != STRING || key->string.len == 0 || key->string.len > MAX_NAME ||
            !printable(key->string.text, key->string.len)) {
            malformed(m, "a tensor's name is not printable ASCII");
            break;
        }
        if (val->kind != TENSOR) {
            FAIL(m, GN_EUNSUPPORTED, "%s: \"%.*s\" is not a tensor (expected a plain state dict)",
                 m->path, (int)key->string.len, key->string.text);
            break;
        }
        gn_pickle_tensor *t = extend(m, &out, 1, sizeof *t);
        if (!t) break;
        *t = ((gn_pickle_tensor *)m->tensors.data)[val->tensor];
        t->name = key->string.text;
        t->name_len = key->string.len;
    }
    pickle->tensors = out.data;
    pickle->count = out.count;
}

gn_status gn_pickle_read(gn_pickle *pickle, const unsigned char *data, size_t bytes,
                         const char *path, gn_error *err) {
    *pickle = (gn_pickle){0};
    machine m = {.data = data, .bytes = bytes, .path = path, .err = err};
    add_value(&m, (value){.kind = NONE});
    if (bytes == 0 || data[0] != 0x80) malformed(&m, "no protocol");
    while (m.status == GN_OK && !m.done) step(&m);
    if (m.status == GN_OK) collect(&m, pickle);
    free(m.values.data);
    free(m.stack.data);
    free(m.memo.data);
    free(m.items.data);
    free(m.pairs.data);
    free(m.tensors.data);
    if (m.status) gn_pickle_free(pickle);
    return m.status;
}

void gn_pickle_free(gn_pickle *pickle) {
    free(pickle->tensors);
    *pickle = (gn_pickle){0};
}
