/* test_torch_file.c - files written by torch.save: every dialect torch writes is read, everything
 * that is not a plain state dict is refused, and no damage reads past an end. Buffers have exactly
 * their size on the heap, so that the address sanitizer sees any such read. */
#include <criterion/criterion.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/pickle.h"
#include "engine/tensor_file.h"
#include "engine/zip.h"

#define GOLDEN GN_SOURCE_DIR "/tests/golden/data/adapter-all-r16-bin/adapter_model.bin"

/* ---- building pickles and zip files ---- */

typedef struct {
    unsigned char *data;
    size_t size;
} blob;

static void put(blob *b, const void *data, size_t n) {
    b->data = realloc(b->data, b->size + n + (b->size + n == 0));
    cr_assert(b->data);
    if (n) memcpy(b->data + b->size, data, n);
    b->size += n;
}

#define PUT(b, literal) put(b, literal, sizeof literal - 1)

static void put_number(blob *b, uint64_t n, int bytes) {
    for (int i = 0; i < bytes; i++) put(b, &(unsigned char){(unsigned char)(n >> 8 * i)}, 1);
}

static void put_text(blob *b, const char *s) {
    PUT(b, "X");
    put_number(b, strlen(s), 4);
    put(b, s, strlen(s));
}

static void put_int(blob *b, int32_t n) {
    PUT(b, "J");
    put_number(b, (uint32_t)n, 4);
}

static void put_pair(blob *b, const int32_t v[2]) {
    put_int(b, v[0]);
    put_int(b, v[1]);
    PUT(b, "\x86");
}

typedef struct {
    const char *type, *key;
    int32_t numel, offset, shape[2], stride[2];
} tensor_spec;

static void put_tensor(blob *b, tensor_spec t) {
    PUT(b, "ctorch._utils\n_rebuild_tensor_v2\n((");
    put_text(b, "storage");
    PUT(b, "ctorch\n");
    put(b, t.type, strlen(t.type));
    PUT(b, "\n");
    put_text(b, t.key);
    put_text(b, "cpu");
    put_int(b, t.numel);
    PUT(b, "tQ");
    put_int(b, t.offset);
    put_pair(b, t.shape);
    put_pair(b, t.stride);
    PUT(b, "\x89"
           "ccollections\nOrderedDict\n)RtR");
}

static const tensor_spec plain = {"FloatStorage", "0", 8, 2, {2, 3}, {3, 1}};

/* {"w": tensor} */
static blob pickle_of(tensor_spec t) {
    blob b = {0};
    PUT(&b, "\x80\x02}");
    put_text(&b, "w");
    put_tensor(&b, t);
    PUT(&b, "s.");
    return b;
}

enum { MAX_ENTRIES = 6 };

typedef struct {
    blob file, directory;
    int count;
    size_t local[MAX_ENTRIES], entry[MAX_ENTRIES]; /* entry: offset in the directory */
    size_t directory_at, end_at;
} zip_builder;

static void zip_add(zip_builder *z, const char *name, const void *data, size_t n, bool wide) {
    blob *f = &z->file, *d = &z->directory;
    const uint64_t size = wide ? UINT32_MAX : n, at = f->size;
    z->local[z->count] = f->size;
    PUT(f, "PK\3\4\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    put_number(f, strlen(name), 2);
    put_number(f, 3, 2);
    put(f, name, strlen(name));
    PUT(f, "pad");
    put(f, data, n);
    z->entry[z->count++] = d->size;
    PUT(d, "PK\1\2\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    put_number(d, size, 4);
    put_number(d, size, 4);
    put_number(d, strlen(name), 2);
    put_number(d, wide ? 28 + 4 : 4, 2);
    PUT(d, "\0\0\0\0\0\0\0\0\0\0");
    put_number(d, wide ? UINT32_MAX : at, 4);
    put(d, name, strlen(name));
    PUT(d, "FB\0\0"); /* an extra field to step over */
    if (!wide) return;
    PUT(d, "\1\0\x18\0");
    put_number(d, n, 8);
    put_number(d, n, 8);
    put_number(d, at, 8);
}

static void zip_end(zip_builder *z, const char *comment) {
    blob *f = &z->file;
    z->directory_at = f->size;
    put(f, z->directory.data, z->directory.size);
    z->end_at = f->size;
    PUT(f, "PK\5\6\0\0\0\0");
    put_number(f, (uint64_t)z->count, 2);
    put_number(f, (uint64_t)z->count, 2);
    put_number(f, z->directory.size, 4);
    put_number(f, z->directory_at, 4);
    put_number(f, strlen(comment), 2);
    put(f, comment, strlen(comment));
}

/* What torch.save would write for one tensor of 6 floats in a storage of 8. */
static zip_builder torch_zip(blob pickle, const char *byteorder, bool wide) {
    const float values[8] = {-1, 0, 1, 2, 3, 4, 5, 6};
    zip_builder z = {0};
    zip_add(&z, "archive/data.pkl", pickle.data, pickle.size, wide);
    if (byteorder) zip_add(&z, "archive/byteorder", byteorder, strlen(byteorder), wide);
    zip_add(&z, "archive/data/0", values, sizeof values, wide);
    zip_add(&z, "archive/version", "3\n", 2, wide);
    zip_end(&z, "");
    free(pickle.data);
    return z;
}

static void zip_free(zip_builder *z) {
    free(z->file.data);
    free(z->directory.data);
}

/* ---- reading them ---- */

static char temporary[64];

static void make_temporary(void) {
    snprintf(temporary, sizeof temporary, "%s/guanaco-XXXXXX", P_tmpdir);
    const int fd = mkstemp(temporary);
    cr_assert(fd >= 0);
    close(fd);
}

static void remove_temporary(void) {
    unlink(temporary);
}

TestSuite(torch_file, .init = make_temporary, .fini = remove_temporary);

static gn_status open_bytes(gn_tensor_file **out, const void *data, size_t n, gn_error *err) {
    FILE *f = fopen(temporary, "wb");
    cr_assert(f);
    cr_assert_eq(fwrite(data, 1, n, f), n);
    cr_assert_eq(fclose(f), 0);
    *err = (gn_error){0};
    return gn_torch_open(out, temporary, err);
}

static void expect_refused(const char *what, const void *data, size_t n, gn_status status,
                           const char *says) {
    gn_tensor_file *file = NULL;
    gn_error err;
    cr_assert_eq(open_bytes(&file, data, n, &err), status, "%s: %s", what, err.message);
    cr_assert_null(file);
    cr_assert_eq(err.status, status, "%s", what);
    cr_assert(strstr(err.message, says), "%s: \"%s\" should say \"%s\"", what, err.message, says);
    cr_assert(strstr(err.message, temporary), "%s: \"%s\" names no file", what, err.message);
}

static void expect_plain(const char *what, const blob *b) {
    gn_tensor_file *file = NULL;
    gn_error err;
    cr_assert_eq(open_bytes(&file, b->data, b->size, &err), GN_OK, "%s: %s", what, err.message);
    cr_assert_eq(gn_tensor_file_count(file), 1, "%s", what);
    const gn_file_tensor *t = gn_tensor_file_find(file, "w");
    cr_assert(t && t->dtype == GN_F32 && t->ndim == 2 && t->shape[0] == 2 && t->shape[1] == 3, "%s",
              what);
    float values[6];
    cr_assert_eq(t->bytes, sizeof values, "%s", what);
    memcpy(values, t->data, sizeof values);
    for (int i = 0; i < 6; i++) cr_assert_eq(values[i], (float)(i + 1), "%s", what);
    gn_tensor_file_close(file);
}

static gn_status read_pickle(gn_pickle *pickle, blob *b, gn_error *err) {
    *err = (gn_error){0};
    return gn_pickle_read(pickle, b->data, b->size, "file", err);
}

/* ---- what is read ---- */

static float float_at(const gn_file_tensor *t, size_t i) {
    float f;
    memcpy(&f, (const char *)t->data + i * sizeof f, sizeof f);
    return f;
}

Test(torch_file, golden) {
    gn_tensor_file *file = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_torch_open(&file, GOLDEN, &err), GN_OK, "%s", err.message);
    cr_assert_eq(gn_tensor_file_count(file), 42);
    /* Values as Python's zipfile and struct read them from data/0 and data/41. */
    const gn_file_tensor *t =
        gn_tensor_file_find(file, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight");
    cr_assert(t && t->dtype == GN_F32 && t->ndim == 2 && t->bytes == 8192);
    cr_assert(t->shape[0] == 16 && t->shape[1] == 128);
    cr_assert_eq(float_at(t, 0), -0x1.22p-4f);
    cr_assert_eq(float_at(t, 1), 0x1.08p-5f);
    cr_assert_eq(float_at(t, 2047), 0x1.06p-4f);
    t = gn_tensor_file_find(file, "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight");
    cr_assert(t && t->shape[0] == 128 && t->shape[1] == 16);
    cr_assert_eq(float_at(t, 0), -0x1.06p-5f);
    cr_assert_eq(float_at(t, 2047), 0x1.62p-6f);
    gn_tensor_file_close(file);
}

Test(torch_file, containers) {
    zip_builder z = torch_zip(pickle_of(plain), "little", false);
    expect_plain("as torch writes it now", &z.file);
    zip_free(&z);
    z = torch_zip(pickle_of(plain), NULL, false);
    expect_plain("as older torch writes it, without byteorder", &z.file);
    zip_free(&z);
    z = torch_zip(pickle_of(plain), "little", true);
    expect_plain("with zip64 fields", &z.file);
    zip_free(&z);
    z = torch_zip(pickle_of(plain), "little", false);
    z.file.data[z.end_at + 20] = 9;
    PUT(&z.file, "PK\5\6 text");
    expect_plain("with a comment that looks like an end", &z.file);
    zip_free(&z);
}

/* The same dict as protocol 4 writes it: frames, short strings, MEMOIZE, STACK_GLOBAL. */
static blob pickle_protocol_4(void) {
    blob b = {0};
    PUT(&b, "\x80\x04\x95\x05\0\0\0\0\0\0\0}\x94(\x8c\x01w\x94");
    PUT(&b, "\x8c\x0ctorch._utils\x94\x8c\x12_rebuild_tensor_v2\x94\x93\x94(");
    PUT(&b, "(\x8c\x07storage\x94\x8c\x05torch\x94\x8c\x0c"
            "FloatStorage\x94\x93\x94\x8c\x01"
            "0\x94\x8c\x03"
            "cpu\x94K\x08t\x94Q");
    PUT(&b, "K\x02\x8a\x01\x02M\x03\0\x86\x94K\x03K\x01\x86\x94\x89");
    PUT(&b, "\x8c\x0b"
            "collections\x94\x8c\x0bOrderedDict\x94\x93\x94)R\x94t\x94R\x94u.");
    return b;
}

/* An OrderedDict with its _metadata, holding a Parameter: what state_dict() returns. */
static blob pickle_ordered(void) {
    blob b = {0};
    PUT(&b, "\x80\x02"
            "ccollections\nOrderedDict\nr\5\0\0\0)Rq\6(");
    put_text(&b, "w");
    PUT(&b, "ctorch._utils\n_rebuild_parameter\n(");
    put_tensor(&b, plain);
    PUT(&b, "\x88j\5\0\0\0)RtRu}");
    put_text(&b, "_metadata");
    PUT(&b, "h\5)R(");
    put_text(&b, "a");
    PUT(&b, "}K\1](K\1NG\0\0\0\0\0\0\0\0es");
    put_text(&b, "b");
    PUT(&b, "(K\1K\2l]a");
    put_text(&b, "c");
    PUT(&b, "K\1\x85usb.");
    return b;
}

Test(torch_file, pickles) {
    zip_builder z = torch_zip(pickle_protocol_4(), "little", false);
    expect_plain("protocol 4", &z.file);
    zip_free(&z);

    z = torch_zip(pickle_ordered(), "little", false);
    expect_plain("an OrderedDict", &z.file);
    zip_free(&z);

    blob b = {0};
    PUT(&b, "\x80\x02(");
    put_text(&b, "w");
    put_tensor(&b, plain);
    PUT(&b, "d.");
    z = torch_zip(b, "little", false);
    expect_plain("a dict made from a mark", &z.file);
    zip_free(&z);
}

/* Tensors without elements and of every type, strides that do not matter, a shared storage. */
Test(torch_file, shapes) {
    static const struct {
        tensor_spec spec;
        gn_dtype dtype;
    } cases[] = {
        {{"FloatStorage", "0", 8, 0, {8, 1}, {1, 77}}, GN_F32},
        {{"FloatStorage", "0", 8, 0, {1, 8}, {0, 1}}, GN_F32},
        {{"FloatStorage", "0", 8, 8, {0, 5}, {9, 9}}, GN_F32},
        {{"HalfStorage", "0", 16, 15, {1, 1}, {1, 1}}, GN_F16},
        {{"BFloat16Storage", "0", 16, 4, {3, 4}, {4, 1}}, GN_BF16},
        {{"LongStorage", "0", 4, 0, {2, 2}, {2, 1}}, GN_I64},
        {{"IntStorage", "0", 8, 0, {2, 2}, {2, 1}}, GN_I32},
        {{"CharStorage", "0", 32, 0, {2, 16}, {16, 1}}, GN_I8},
        {{"ByteStorage", "0", 32, 31, {1, 1}, {1, 1}}, GN_U8},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const tensor_spec *s = &cases[i].spec;
        zip_builder z = torch_zip(pickle_of(*s), "little", false);
        gn_tensor_file *file = NULL;
        gn_error err;
        cr_assert_eq(open_bytes(&file, z.file.data, z.file.size, &err), GN_OK, "%zu: %s", i,
                     err.message);
        const gn_file_tensor *t = gn_tensor_file_at(file, 0);
        cr_assert_eq(t->dtype, cases[i].dtype, "%zu", i);
        cr_assert(t->shape[0] == s->shape[0] && t->shape[1] == s->shape[1], "%zu", i);
        cr_assert_eq(t->bytes, (size_t)s->shape[0] * (size_t)s->shape[1] * gn_dtype_size(t->dtype),
                     "%zu", i);
        gn_tensor_file_close(file);
        zip_free(&z);
    }
}

/* ---- what is refused ---- */

Test(torch_file, code_is_never_run) {
    static const struct {
        const char *what, *pickle;
        size_t size;
        const char *says;
    } cases[] = {
#define CASE(what, pickle, says) {what, pickle, sizeof pickle - 1, says}
        CASE("os.system",
             "\x80\x02"
             "cos\nsystem\nX\2\0\0\0id\x85R.",
             "os.system"),
        CASE("eval",
             "\x80\x02"
             "c__builtin__\neval\n.",
             "__builtin__.eval"),
        CASE("a part of an allowed name",
             "\x80\x02"
             "ctorch._utils\n_rebuild_tensor\n.",
             "torch._utils._rebuild_tensor:"),
        CASE("an allowed name of another module",
             "\x80\x02"
             "cos\nOrderedDict\n.",
             "os.OrderedDict"),
        CASE("a name with control characters",
             "\x80\x02"
             "cos\n\33[2Jsystem\n.",
             "?.?"),
        CASE("STACK_GLOBAL", "\x80\x04\x8c\5posix\x8c\6system\x93.", "posix.system"),
        CASE("INST", "\x80\x02(ios\nsystem\n.", "opcode 0x69"),
        CASE("OBJ", "\x80\x02(N)o.", "opcode 0x6f"),
        CASE("NEWOBJ", "\x80\x02N)\x81.", "opcode 0x81"),
        CASE("EXT1", "\x80\x02\x82\1.", "opcode 0x82"),
        CASE("PERSID", "\x80\x02Pid\n.", "opcode 0x50"),
        CASE("BUILD of a list", "\x80\x02]}b.", "refusing to run code"),
        CASE("an unknown opcode", "\x80\x02\xff.", "opcode 0xff"),
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        blob b = {0};
        put(&b, cases[i].pickle, cases[i].size);
        zip_builder z = torch_zip(b, "little", false);
        expect_refused(cases[i].what, z.file.data, z.file.size, GN_EUNSUPPORTED, cases[i].says);
        expect_refused(cases[i].what, z.file.data, z.file.size, GN_EUNSUPPORTED,
                       "refusing to run code");
        zip_free(&z);
    }
}

Test(torch_file, malformed_pickles) {
    static const struct {
        const char *what, *pickle;
        size_t size;
        gn_status status;
    } cases[] = {
#undef CASE
#define CASE(what, pickle, status) {what, pickle, sizeof pickle - 1, status}
        CASE("empty", "", GN_EFORMAT),
        CASE("no protocol", "}.", GN_EFORMAT),
        CASE("protocol 1", "\x80\1}.", GN_EUNSUPPORTED),
        CASE("protocol 6", "\x80\6}.", GN_EUNSUPPORTED),
        CASE("no end", "\x80\2}", GN_EFORMAT),
        CASE("nothing left", "\x80\2.", GN_EUNSUPPORTED),
        CASE("two values left", "\x80\2}}.", GN_EUNSUPPORTED),
        CASE("a mark left", "\x80\2}(.", GN_EUNSUPPORTED),
        CASE("not a dict", "\x80\2].", GN_EUNSUPPORTED),
        CASE("pop of an empty stack", "\x80\2a.", GN_EFORMAT),
        CASE("pop across a mark", "\x80\2}K\1(K\1s.", GN_EFORMAT),
        CASE("no mark", "\x80\2}u.", GN_EFORMAT),
        CASE("tuple without a mark", "\x80\2t.", GN_EFORMAT),
        CASE("tuple of too few", "\x80\2K\1\x87.", GN_EFORMAT),
        CASE("odd items", "\x80\2}(K\1u.", GN_EFORMAT),
        CASE("odd dict",
             "\x80\2(K\1"
             "d.",
             GN_EFORMAT),
        CASE("items for an integer", "\x80\2K\1(K\1K\1u.", GN_EFORMAT),
        CASE("an item for an integer", "\x80\2K\1K\1K\1s.", GN_EFORMAT),
        CASE("append to a dict",
             "\x80\2}K\1"
             "a.",
             GN_EFORMAT),
        CASE("unknown memo", "\x80\2h\7.", GN_EFORMAT),
        CASE("a gap in the memo", "\x80\2}q\7h\3.", GN_EFORMAT),
        CASE("memo of nothing", "\x80\2q\0.", GN_EFORMAT),
        CASE("a huge memo index", "\x80\2}r\xff\xff\xff\xff.", GN_ETOOBIG),
        CASE("a long string",
             "\x80\2X\xff\xff\xff\xff"
             "abc.",
             GN_EFORMAT),
        CASE("a long frame", "\x80\4\x95\xff\xff\xff\xff\xff\xff\xff\xff}.", GN_EFORMAT),
        CASE("a wide integer",
             "\x80\2\x8a\x09"
             "123456789.",
             GN_EFORMAT),
        CASE("a global without end",
             "\x80\2"
             "ctorch\nFloat",
             GN_EFORMAT),
        CASE("a global named by numbers", "\x80\4K\1K\1\x93.", GN_EFORMAT),
        CASE("a call of a dict", "\x80\2})R.", GN_EFORMAT),
        CASE("a call without a tuple",
             "\x80\2"
             "ccollections\nOrderedDict\nNR.",
             GN_EFORMAT),
        CASE("a call of a storage type",
             "\x80\2"
             "ctorch\nFloatStorage\n)R.",
             GN_EFORMAT),
        CASE("OrderedDict of items",
             "\x80\2"
             "ccollections\nOrderedDict\n]\x85R.",
             GN_EFORMAT),
        CASE("a tensor of nothing",
             "\x80\2"
             "ctorch._utils\n_rebuild_tensor_v2\n)R.",
             GN_EFORMAT),
        CASE("a tensor of Nones",
             "\x80\2"
             "ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR.",
             GN_EFORMAT),
        CASE("a parameter of nothing",
             "\x80\2"
             "ctorch._utils\n_rebuild_parameter\n)R.",
             GN_EFORMAT),
        CASE("a persistent id that is no tuple", "\x80\2NQ.", GN_EFORMAT),
        CASE("a persistent id of Nones", "\x80\2(NNNNNtQ.", GN_EFORMAT),
        CASE("a value that is no tensor", "\x80\2}X\1\0\0\0aNs.", GN_EUNSUPPORTED),
        CASE("a name that is no string", "\x80\2}K\1Ns.", GN_EFORMAT),
        CASE("an empty name", "\x80\2}X\0\0\0\0Ns.", GN_EFORMAT),
        CASE("a name with a zero", "\x80\2}X\1\0\0\0\0Ns.", GN_EFORMAT),
        CASE("a name beyond ASCII", "\x80\2}X\2\0\0\0\xc3\xa4Ns.", GN_EFORMAT),
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        blob b = {0};
        put(&b, cases[i].pickle, cases[i].size);
        gn_pickle pickle;
        gn_error err;
        cr_assert_eq(read_pickle(&pickle, &b, &err), cases[i].status, "%s: %s", cases[i].what,
                     err.message);
        cr_assert(strstr(err.message, "file: ") == err.message, "%s: %s", cases[i].what,
                  err.message);
        cr_assert_null(pickle.tensors);
        free(b.data);
    }
}

/* A list that holds itself, depth, width: bounded, and no recursion. */
Test(torch_file, pickles_that_grow) {
    gn_pickle pickle;
    gn_error err;
    blob b = {0};
    PUT(&b, "\x80\2]q\0h\0a0");
    cr_assert_eq(read_pickle(&pickle, &b, &err), GN_EUNSUPPORTED);
    free(b.data);

    static char many[9 << 20];
    static const struct {
        const char *what;
        char opcode;
        size_t n;
    } cases[] = {{"marks", '(', 65}, {"stack", 'N', 65537}, {"tuples", '\x85', 5 << 20}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        memset(many, cases[i].opcode, sizeof many);
        memcpy(many, "\x80\2N", 3);
        b = (blob){0};
        put(&b, many, 3 + cases[i].n);
        cr_assert_eq(read_pickle(&pickle, &b, &err), GN_ETOOBIG, "%s: %s", cases[i].what,
                     err.message);
        free(b.data);
    }
}

Test(torch_file, tensors_that_do_not_fit) {
    static const struct {
        const char *what;
        tensor_spec spec;
        gn_status status;
        const char *says;
    } cases[] = {
        {"transposed", {"FloatStorage", "0", 8, 0, {2, 3}, {1, 2}}, GN_EUNSUPPORTED, "contiguous"},
        {"expanded", {"FloatStorage", "0", 8, 0, {2, 3}, {0, 1}}, GN_EUNSUPPORTED, "contiguous"},
        {"every other", {"FloatStorage", "0", 8, 0, {2, 2}, {4, 2}}, GN_EUNSUPPORTED, "contiguous"},
        {"negative size",
         {"FloatStorage", "0", 8, 0, {-2, 3}, {3, 1}},
         GN_EUNSUPPORTED,
         "contiguous"},
        {"past the end", {"FloatStorage", "0", 8, 3, {2, 3}, {3, 1}}, GN_EFORMAT, "past the end"},
        {"far past the end",
         {"FloatStorage", "0", 8, 2147483647, {2, 3}, {3, 1}},
         GN_EFORMAT,
         "past the end"},
        {"negative offset", {"FloatStorage", "0", 8, -1, {2, 3}, {3, 1}}, GN_EFORMAT, "sense"},
        {"negative storage", {"FloatStorage", "0", -8, 0, {2, 3}, {3, 1}}, GN_EFORMAT, "sense"},
        {"a larger storage than stored",
         {"FloatStorage", "0", 9, 0, {2, 3}, {3, 1}},
         GN_EFORMAT,
         "expected 9 numbers of 4"},
        {"a storage of another type",
         {"HalfStorage", "0", 8, 0, {2, 3}, {3, 1}},
         GN_EFORMAT,
         "expected 8 numbers of 2"},
        {"no such storage",
         {"FloatStorage", "1", 8, 0, {2, 3}, {3, 1}},
         GN_EFORMAT,
         "storage of w is missing"},
        {"another entry as storage",
         {"FloatStorage", "../version", 8, 0, {2, 3}, {3, 1}},
         GN_EFORMAT,
         "storage of w is missing"},
        {"double precision",
         {"DoubleStorage", "0", 4, 0, {2, 2}, {2, 1}},
         GN_EUNSUPPORTED,
         "torch.DoubleStorage"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        zip_builder z = torch_zip(pickle_of(cases[i].spec), "little", false);
        expect_refused(cases[i].what, z.file.data, z.file.size, cases[i].status, cases[i].says);
        zip_free(&z);
    }
    blob twice = pickle_of(plain);
    twice.size -= 1;
    put_text(&twice, "w");
    put_tensor(&twice, plain);
    PUT(&twice, "s.");
    zip_builder z = torch_zip(twice, "little", false);
    expect_refused("a name twice", z.file.data, z.file.size, GN_EFORMAT, "twice");
    zip_free(&z);
}

/* Sizes whose product overflows must not wrap round to something small. */
Test(torch_file, sizes_that_overflow) {
    blob b = {0};
    PUT(&b, "\x80\2}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storage");
    PUT(&b, "ctorch\nFloatStorage\nX\1\0\0\0"
            "0X\0\0\0\0K\x08tQK\0");
    PUT(&b, "\x8a\5\0\0\0\0\1\x8a\5\0\0\0\0\1\x86\x8a\5\0\0\0\0\1K\1\x86\x89}tRs.");
    gn_pickle pickle;
    gn_error err;
    cr_assert_eq(read_pickle(&pickle, &b, &err), GN_EUNSUPPORTED, "%s", err.message);
    free(b.data);
}

Test(torch_file, other_files) {
    static const unsigned char old[] = {0x80, 2,    0x8a, 10,   0x6c, 0xfc, 0x9c, 0x46,
                                        0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, '.'};
    expect_refused("before torch 1.6", old, sizeof old, GN_EUNSUPPORTED, "safetensors");
    expect_refused("empty", "", 0, GN_EFORMAT, "torch.save");
    expect_refused("text", "hello", 5, GN_EFORMAT, "torch.save");
    zip_builder z = {0};
    zip_add(&z, "word/document.xml", "x", 1, false);
    zip_end(&z, "");
    expect_refused("another zip", z.file.data, z.file.size, GN_EFORMAT, "data.pkl");
    zip_free(&z);
    z = torch_zip(pickle_of(plain), "big", false);
    expect_refused("big-endian", z.file.data, z.file.size, GN_EUNSUPPORTED, "byteorder");
    zip_free(&z);
    gn_tensor_file *file = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_torch_open(&file, "/nonexistent/file.bin", &err), GN_ENOENT);
    cr_assert(strstr(err.message, "/nonexistent/file.bin"));
}

/* ---- damage ---- */

Test(torch_file, damaged_directories) {
    enum { FILE_START, LOCAL, ENTRY, END }; /* what an offset counts from; entries are the second */
    static const struct {
        const char *what;
        int from;
        size_t offset;
        uint32_t value;
        int bytes;
        gn_status status;
        const char *says;
    } cases[] = {
        {"count", END, 10, 5, 2, GN_EFORMAT, "no entry"},
        {"fewer entries", END, 10, 3, 2, GN_EFORMAT, "more than its number"},
        {"count without room", END, 10, 60000, 2, GN_EFORMAT, "too small"},
        {"directory size", END, 12, 1u << 30, 4, GN_EFORMAT, "past its end"},
        {"directory offset", END, 16, 0xfffffff0u, 4, GN_EFORMAT, "past its end"},
        {"volume", END, 4, 1, 2, GN_EUNSUPPORTED, "volumes"},
        {"comment length", END, 20, 1, 2, GN_EFORMAT, "cut short"},
        {"compression", ENTRY, 10, 8, 2, GN_EUNSUPPORTED, "compressed"},
        {"encryption", ENTRY, 8, 1, 2, GN_EUNSUPPORTED, "encrypted"},
        {"one of two sizes", ENTRY, 20, 1, 4, GN_EFORMAT, "sizes differ"},
        {"name length", ENTRY, 28, 60000, 2, GN_EFORMAT, "cut short"},
        {"extra length", ENTRY, 30, 3, 2, GN_EFORMAT, "no entry"},
        {"zip64 size without its field", ENTRY, 24, 0xffffffffu, 4, GN_EFORMAT, "extra field"},
        {"header offset", ENTRY, 42, 7, 4, GN_EFORMAT, "header is not where"},
        {"far header offset", ENTRY, 42, 0xfffffff0u, 4, GN_EFORMAT, "header is not where"},
        {"header of another entry", ENTRY, 42, 0, 4, GN_EFORMAT, "differently"},
        {"entry signature", ENTRY, 0, 0, 4, GN_EFORMAT, "no entry"},
        {"local signature", LOCAL, 0, 0, 4, GN_EFORMAT, "header is not where"},
        {"local name", LOCAL, 30, 0x20202020, 4, GN_EFORMAT, "differently"},
        {"local name length", LOCAL, 26, 65535, 2, GN_EFORMAT, "past the end"},
        {"local extra length", LOCAL, 28, 20, 2, GN_EFORMAT, "overlap"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        zip_builder z = torch_zip(pickle_of(plain), "little", false);
        const size_t from[] = {0, z.local[1], z.directory_at + z.entry[1], z.end_at};
        for (int k = 0; k < cases[i].bytes; k++)
            z.file.data[from[cases[i].from] + cases[i].offset + (size_t)k] =
                (unsigned char)(cases[i].value >> 8 * k);
        expect_refused(cases[i].what, z.file.data, z.file.size, cases[i].status, cases[i].says);
        zip_free(&z);
    }
}

Test(torch_file, entries_that_clash) {
    zip_builder z = {0};
    zip_add(&z, "a/data.pkl", "x", 1, false);
    zip_add(&z, "a/data.pkl", "y", 1, false);
    zip_end(&z, "");
    expect_refused("one name twice", z.file.data, z.file.size, GN_EFORMAT, "the same name");
    zip_free(&z);

    z = (zip_builder){0};
    zip_add(&z, "a/data.pkl", "x", 1, false);
    zip_add(&z, "b/data.pkl", "y", 1, false);
    zip_end(&z, "");
    expect_refused("two pickles", z.file.data, z.file.size, GN_EFORMAT, "more than one data.pkl");
    zip_free(&z);

    z = torch_zip(pickle_of(plain), "little", false);
    unsigned char *entry = z.file.data + z.directory_at + z.entry[2];
    entry[20]++; /* both sizes of the storage */
    entry[24]++;
    expect_refused("an entry into the next", z.file.data, z.file.size, GN_EFORMAT, "overlap");
    zip_free(&z);
}

/* Every length of a small file, through every layer: none but the whole is read. */
Test(torch_file, cut_at_every_length) {
    zip_builder z = torch_zip(pickle_of(plain), "little", true);
    blob pickle = pickle_ordered();
    for (size_t n = 0; n < z.file.size; n++) {
        blob cut = {0};
        put(&cut, z.file.data, n);
        gn_zip zip;
        gn_error err = {0};
        cr_assert_eq(gn_zip_open(&zip, cut.data, n, "file", &err), GN_EFORMAT, "%zu: %s", n,
                     err.message);
        gn_tensor_file *file = NULL;
        cr_assert_eq(open_bytes(&file, cut.data, n, &err), GN_EFORMAT, "%zu: %s", n, err.message);
        free(cut.data);
    }
    for (size_t n = 0; n < pickle.size; n++) {
        blob cut = {0};
        put(&cut, pickle.data, n);
        gn_pickle out;
        gn_error err;
        cr_assert_eq(read_pickle(&out, &cut, &err), GN_EFORMAT, "%zu: %s", n, err.message);
        free(cut.data);
    }
    free(pickle.data);
    zip_free(&z);
}

/* Every byte of a small file changed in every bit: read or refused, and nothing else. */
Test(torch_file, every_bit_flipped) {
    zip_builder z = torch_zip(pickle_of(plain), "little", true);
    for (size_t bit = 0; bit < 8 * z.file.size; bit++) {
        z.file.data[bit / 8] ^= (unsigned char)(1 << bit % 8);
        gn_tensor_file *file = NULL;
        gn_error err;
        const gn_status status = open_bytes(&file, z.file.data, z.file.size, &err);
        cr_assert_eq(status == GN_OK, file != NULL);
        cr_assert_eq(err.status, status);
        gn_tensor_file_close(file);
        z.file.data[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
    zip_free(&z);
}

/* The golden file, cut anywhere in its directory and at steps before. */
Test(torch_file, golden_cut) {
    FILE *f = fopen(GOLDEN, "rb");
    cr_assert(f);
    static unsigned char data[1 << 20];
    const size_t size = fread(data, 1, sizeof data, f);
    fclose(f);
    cr_assert(size > 400000 && size < sizeof data);
    for (size_t n = 0; n < size; n += n + 4000 < size ? 9973 : 1) {
        gn_tensor_file *file = NULL;
        gn_error err;
        cr_assert_eq(open_bytes(&file, data, n, &err), GN_EFORMAT, "%zu: %s", n, err.message);
    }
}
