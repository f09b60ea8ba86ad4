/* test_safetensors.c - the reader takes what the format allows and refuses the rest with the
 * tensor's name; the writer leaves a whole file or none. */
#include <criterion/criterion.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/tensor_file.h"
#include "tests/support/folder.h"

TestSuite(safetensors, .init = test_folder_make, .fini = test_folder_remove);

static gn_status try_open(const char *name, gn_error *err) {
    gn_tensor_file *file = NULL;
    *err = (gn_error){0};
    const gn_status status = gn_safetensors_open(&file, test_path(name), err);
    cr_assert_eq(status, err->status);
    cr_assert_eq(file != NULL, status == GN_OK);
    gn_tensor_file_close(file);
    return status;
}

static gn_tensor_file *must_open_dir(void) {
    gn_tensor_file *file = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_open_dir(&file, test_path(""), &err), GN_OK, "%s", err.message);
    return file;
}

static void expect_dir_error(gn_status expected, const char *part) {
    gn_tensor_file *file = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_open_dir(&file, test_path(""), &err), expected, "%s: %s", part,
                 err.message);
    cr_assert(strstr(err.message, part), "\"%s\" lacks \"%s\"", err.message, part);
}

/* ---- reading ---- */

/* A mapping would end the program here. */
Test(safetensors, what_is_read_stays_when_the_file_is_cut) {
    gn_tensor_file *file = NULL;
    gn_error err = {0};
    test_write_safetensors(
        "x", "{\"a\":{\"dtype\":\"U8\",\"shape\":[9000],\"data_offsets\":[0,9000]}}", 9000);
    cr_assert_eq(gn_safetensors_read(&file, test_path("x"), &err), GN_OK, "%s", err.message);
    cr_assert_eq(truncate(test_path("x"), 0), 0);
    const uint8_t *bytes = gn_tensor_file_find(file, "a")->data;
    for (int i = 0; i < 9000; i++) cr_assert_eq(bytes[i], i & 255);
    gn_tensor_file_close(file);
    cr_assert_eq(gn_safetensors_read(&file, test_path("x"), &err), GN_EFORMAT);
    cr_assert_eq(gn_safetensors_read(&file, test_path("none"), &err), GN_ENOENT);
}

Test(safetensors, every_dtype_and_number_of_dimensions_is_read) {
    test_write_safetensors(
        "x",
        "{\"__metadata__\":{\"format\":\"pt\"},"
        "\"z\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[0,8]},"
        "\"a\":{\"dtype\":\"BF16\",\"shape\":[],\"data_offsets\":[8,10]},"
        "\"h\":{\"dtype\":\"F16\",\"shape\":[1,1,1,1],\"data_offsets\":[10,12]},"
        "\"none\":{\"dtype\":\"I8\",\"shape\":[3,0],\"data_offsets\":[12,12]},"
        "\"i\":{\"dtype\":\"I8\",\"shape\":[1],\"data_offsets\":[12,13]},"
        "\"u\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[13,14]},"
        "\"n\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[14,18]},"
        "\"l\\u00e9\\\\u0000\":{\"data_offsets\":[18,26],\"dtype\":\"I64\",\"shape\":[1]}}  \n",
        26);
    gn_tensor_file *file = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_open(&file, test_path("x"), &err), GN_OK, "%s", err.message);
    cr_assert_eq(gn_tensor_file_count(file), 8);
    for (size_t i = 1; i < 8; i++)
        cr_assert(strcmp(gn_tensor_file_at(file, i - 1)->name, gn_tensor_file_at(file, i)->name) <
                  0);
    cr_assert_null(gn_tensor_file_at(file, 8));
    const gn_file_tensor *t = gn_tensor_file_find(file, "h");
    cr_assert(t && t->dtype == GN_F16 && t->ndim == 4 && t->bytes == 2);
    cr_assert_eq(memcmp(t->data, "\x0a\x0b", 2), 0);
    t = gn_tensor_file_find(file, "z");
    cr_assert(t && t->dtype == GN_F32 && t->ndim == 2 && t->shape[0] == 1 && t->shape[1] == 2);
    t = gn_tensor_file_find(file, "a");
    cr_assert(t && t->dtype == GN_BF16 && t->ndim == 0 && t->bytes == 2);
    t = gn_tensor_file_find(file, "none");
    cr_assert(t && t->bytes == 0 && t->shape[0] == 3 && t->shape[1] == 0);
    t = gn_tensor_file_find(file, "l\xc3\xa9\\u0000");
    cr_assert(t && t->dtype == GN_I64 && !strcmp(t->path, test_path("x")));
    cr_assert_null(gn_tensor_file_find(file, "missing"));
    gn_file_tensor_release(t);
    cr_assert_eq(memcmp(t->data, "\x12\x13\x14\x15\x16\x17\x18\x19", 8), 0);
    gn_tensor_file_close(file);
    gn_tensor_file_close(NULL);
}

Test(safetensors, golden_files_are_read) {
    static const char *const files[] = {"tiny-bf16/model.safetensors",
                                        "tiny-bnb-nf4/model.safetensors",
                                        "adapter-all-r8/adapter_model.safetensors"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char path[512];
        gn_tensor_file *file = NULL;
        gn_error err = {0};
        snprintf(path, sizeof path, GN_SOURCE_DIR "/tests/golden/data/%s", files[i]);
        cr_assert_eq(gn_safetensors_open(&file, path, &err), GN_OK, "%s", err.message);
        cr_assert_gt(gn_tensor_file_count(file), 10);
        for (size_t k = 0; k < gn_tensor_file_count(file); k++) {
            const gn_file_tensor *t = gn_tensor_file_at(file, k);
            cr_assert_eq(gn_tensor_file_find(file, t->name), t);
        }
        gn_tensor_file_close(file);
    }
}

Test(safetensors, malformed_headers_are_refused) {
#define A(entry)    "{\"a\":{" entry "}}"
#define U8(shape)   "\"dtype\":\"U8\",\"shape\":" shape ",\"data_offsets\":"
#define B(from, to) "\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[" #from "," #to "]}"
    static const struct {
        const char *header;
        size_t bytes;
        gn_status status;
        const char *part; /* of the message */
    } cases[] = {
        {"", 0, GN_EFORMAT, "JSON"},
        {"[]", 0, GN_EFORMAT, "JSON"},
        {" {}", 0, GN_EFORMAT, "JSON"},
        {"{}x", 0, GN_EFORMAT, "JSON"},
        {"{}{}", 0, GN_EFORMAT, "JSON"},
        {"{\"a\":", 0, GN_EFORMAT, "JSON"},
        {"{}", 1, GN_EFORMAT, "1 bytes at the end"},
        {"{\"a\":3}", 0, GN_EFORMAT, "tensor a"},
        {"{\"a\":[1,2,3]}", 0, GN_EFORMAT, "tensor a"},
        {A("\"shape\":[1],\"data_offsets\":[0,1]"), 1, GN_EFORMAT, "tensor a"},
        {A("\"dtype\":\"U8\",\"data_offsets\":[0,1]"), 1, GN_EFORMAT, "tensor a"},
        {A("\"dtype\":\"U8\",\"shape\":[1]"), 1, GN_EFORMAT, "tensor a"},
        {A(U8("[1]") "[0,1],\"more\":1"), 1, GN_EFORMAT, "tensor a"},
        {A(U8("[1]") "[0,1],\"dtype\":\"I8\""), 1, GN_EFORMAT, "tensor a"},
        {A("\"dtype\":8,\"shape\":[1],\"data_offsets\":[0,1]"), 1, GN_EFORMAT, "no dtype"},
        {A("\"dtype\":\"F64\",\"shape\":[1],\"data_offsets\":[0,8]"), 8, GN_EUNSUPPORTED,
         "tensor a has dtype F64"},
        {A("\"dtype\":\"BOOL\",\"shape\":[1],\"data_offsets\":[0,1]"), 1, GN_EUNSUPPORTED, "BOOL"},
        {A("\"dtype\":\"f32\",\"shape\":[1],\"data_offsets\":[0,4]"), 4, GN_EUNSUPPORTED, "f32"},
        {A(U8("[1,1,1,1,1]") "[0,1]"), 1, GN_EUNSUPPORTED, "dimensions"},
        {A(U8("1") "[0,1]"), 1, GN_EFORMAT, "shape"},
        {A(U8("[-1]") "[0,1]"), 1, GN_EFORMAT, "shape"},
        {A(U8("[0.5]") "[0,1]"), 1, GN_EFORMAT, "shape"},
        {A(U8("[\"1\"]") "[0,1]"), 1, GN_EFORMAT, "shape"},
        {A(U8("[1e400]") "[0,1]"), 1, GN_EFORMAT, "shape"},
        {A(U8("[9007199254740993]") "[0,1]"), 1, GN_EFORMAT, "tensor a"},
        {A(U8("[4294967296,4294967296]") "[0,0]"), 0, GN_EFORMAT, "impossible shape"},
        {A(U8("[9007199254740992,1024]") "[0,0]"), 0, GN_EFORMAT, "impossible shape"},
        {A(U8("[2]") "[0,1]"), 1, GN_EFORMAT, "its shape needs 2"},
        {A(U8("[1]") "[0,2]"), 2, GN_EFORMAT, "its shape needs 1"},
        {A(U8("[1]") "[0]"), 1, GN_EFORMAT, "data_offsets"},
        {A(U8("[1]") "[0,1,2]"), 1, GN_EFORMAT, "data_offsets"},
        {A(U8("[1]") "[-1,0]"), 1, GN_EFORMAT, "data_offsets"},
        {A(U8("[1]") "[1,0]"), 1, GN_EFORMAT, "data_offsets"},
        {A(U8("[1]") "{\"x\":0,\"y\":1}"), 1, GN_EFORMAT, "data_offsets"},
        {A(U8("[1]") "[0.5,1.5]"), 1, GN_EFORMAT, "data_offsets"},
        {A(U8("[1]") "[18446744073709551615,18446744073709551616]"), 1, GN_EFORMAT, "data_offsets"},
        {A(U8("[1]") "[1,2]"), 1, GN_EFORMAT, "truncated"},
        {A(U8("[1]") "[1,2]"), 2, GN_EFORMAT, "belong to no tensor"},
        {A(U8("[1]") "[0,1]"), 2, GN_EFORMAT, "1 bytes at the end"},
        {"{\"a\":{" U8("[2]") "[0,2]}," B(1, 3) "}", 3, GN_EFORMAT, "a and b overlap"},
        {"{\"a\":{" U8("[3]") "[0,3]}," B(0, 2) "}", 3, GN_EFORMAT, "overlap"},
        {"{\"a\":{" U8("[2]") "[0,2]}," B(0, 2) "}", 2, GN_EFORMAT, "overlap"},
        {"{\"a\":{" U8("[2]") "[0,2]}," B(3, 5) "}", 5, GN_EFORMAT, "before tensor b"},
        {"{" B(0, 2) "," B(2, 4) "}", 4, GN_EFORMAT, "tensor b stands there twice"},
        {"{\"a\\u0000b\":{" U8("[1]") "[0,1]}}", 1, GN_EFORMAT, "NUL"},
        {"{\"a\\\\\\u0000\":{" U8("[1]") "[0,1]}}", 1, GN_EFORMAT, "NUL"},
        {"{\"a\xff\":{\"dtype\":\"U8\"}}", 0, GN_EFORMAT, "tensor a"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gn_error err;
        test_write_safetensors("x", cases[i].header, cases[i].bytes);
        cr_assert_eq(try_open("x", &err), cases[i].status, "%s: %s", cases[i].header, err.message);
        cr_assert(strstr(err.message, test_path("x")), "%s", err.message);
        cr_assert(strstr(err.message, cases[i].part), "%s: \"%s\" lacks \"%s\"", cases[i].header,
                  err.message, cases[i].part);
    }
}

Test(safetensors, header_lengths_outside_the_file_are_refused) {
    for (int shift = 0; shift < 64; shift++) {
        for (int less = 0; less < 2; less++) {
            const uint64_t length = ((uint64_t)1 << shift) - (uint64_t)less;
            unsigned char file[10] = "01234567{}";
            gn_error err;
            if (length == 2) continue;
            for (int b = 0; b < 8; b++) file[b] = (unsigned char)(length >> (8 * b));
            test_write("x", file, sizeof file);
            cr_assert_eq(try_open("x", &err), GN_EFORMAT, "%llu", (unsigned long long)length);
        }
    }
}

Test(safetensors, raw_nul_and_deep_nesting_are_refused) {
    static char deep[200000];
    gn_error err;
    test_write("x", "\x03\0\0\0\0\0\0\0{}\0", 11);
    cr_assert_eq(try_open("x", &err), GN_EFORMAT);
    cr_assert(strstr(err.message, "NUL"), "%s", err.message);
    memset(deep, '[', sizeof deep - 1);
    memcpy(deep, "{\"a\":", 5);
    test_write_safetensors("x", deep, 0);
    cr_assert_eq(try_open("x", &err), GN_EFORMAT, "%s", err.message);
}

/* No prefix of a file is a file. */
Test(safetensors, every_truncation_is_refused) {
    static const char header[] =
        "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},"
        "\"b\":{\"dtype\":\"F32\",\"shape\":[2,1],\"data_offsets\":[2,10]}}";
    const size_t size = 8 + sizeof header - 1 + 10;
    gn_error err;
    for (size_t n = 0; n <= size; n++) {
        test_write_safetensors("x", header, 10);
        cr_assert_eq(truncate(test_path("x"), (off_t)n), 0);
        cr_assert_eq(try_open("x", &err), n < size ? GN_EFORMAT : GN_OK, "%zu bytes: %s", n,
                     err.message);
    }
}

Test(safetensors, what_is_no_file_is_refused) {
    gn_error err;
    cr_assert_eq(try_open("missing", &err), GN_ENOENT, "%s", err.message);
    cr_assert(strstr(err.message, "missing"), "%s", err.message);
    cr_assert_eq(try_open("", &err), GN_EIO, "%s", err.message);
    cr_assert_eq(mkfifo(test_path("fifo"), 0600), 0);
    cr_assert_eq(try_open("fifo", &err), GN_EIO, "%s",
                 err.message); /* does not wait for a writer */
}

/* ---- shards ---- */

#define ONE(name) "{\"" name "\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}"
#define INDEX     "model.safetensors.index.json"

Test(safetensors, shards_are_one_set) {
    test_write_safetensors("one.safetensors", ONE("a"), 2);
    test_write_safetensors("two.safetensors", ONE("b"), 2);
    test_write_text(INDEX, "{\"metadata\":{\"total_size\":4},\"weight_map\":{"
                           "\"a\":\"one.safetensors\",\"b\":\"two.safetensors\"}}");
    gn_tensor_file *file = must_open_dir();
    cr_assert_eq(gn_tensor_file_count(file), 2);
    cr_assert_str_eq(gn_tensor_file_find(file, "b")->path, test_path("two.safetensors"));
    gn_tensor_file_close(file);
    test_write_safetensors("model.safetensors", ONE("c"), 2); /* a single file comes first */
    file = must_open_dir();
    cr_assert_eq(gn_tensor_file_count(file), 1);
    gn_tensor_file_close(file);
}

Test(safetensors, bad_indexes_are_refused) {
    static const struct {
        const char *map;
        gn_status status;
        const char *part;
    } cases[] = {
        {"{\"weight_map\":{\"a\":\"../one.safetensors\"}}", GN_EFORMAT, "tensor a"},
        {"{\"weight_map\":{\"a\":\"/one.safetensors\"}}", GN_EFORMAT, "tensor a"},
        {"{\"weight_map\":{\"a\":\"..\"}}", GN_EFORMAT, "tensor a"},
        {"{\"weight_map\":{\"a\":\"\"}}", GN_EFORMAT, "tensor a"},
        {"{\"weight_map\":{\"a\":1}}", GN_EFORMAT, "tensor a"},
        {"{\"weight_map\":{\"a\":\"lost.safetensors\"}}", GN_ENOENT, "lost.safetensors"},
        {"{\"weight_map\":{\"x\":\"one.safetensors\"}}", GN_EFORMAT, "tensor x is not in"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"c\":\"two.safetensors\"}}", GN_EFORMAT,
         "tensor c is not in two.safetensors"},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"same.safetensors\"}}", GN_EFORMAT,
         "tensor a stands there twice"},
        {"{\"weight_map\":[]}", GN_EFORMAT, "weight_map"},
        {"{}", GN_EFORMAT, "weight_map"},
        {"[]", GN_EFORMAT, INDEX},
    };
    expect_dir_error(GN_ENOENT, test_path(""));
    test_write_safetensors("one.safetensors", ONE("a"), 2);
    test_write_safetensors("two.safetensors", ONE("b"), 2);
    test_write_safetensors("same.safetensors", ONE("a"), 2);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        test_write_text(INDEX, cases[i].map);
        expect_dir_error(cases[i].status, cases[i].part);
    }
}

/* ---- writing ---- */

static const char *const metadata[] = {"format", "pt", NULL};
static const float values[] = {1.5f, -2.0f, 3.0f};
static const gn_file_tensor entries[] = {
    {.name = "a \"quoted\" \\ name", .dtype = GN_F32, .ndim = 2, .shape = {3, 1}, .bytes = 12},
    {.name = "scalar", .dtype = GN_U8, .ndim = 0, .bytes = 1},
    {.name = "empty", .dtype = GN_BF16, .ndim = 1, .shape = {0}, .bytes = 0},
};

static gn_safetensors_writer *create(const char *name) {
    gn_safetensors_writer *w = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_create(&w, test_path(name), entries, 3, metadata, &err), GN_OK,
                 "%s", err.message);
    return w;
}

Test(safetensors, what_is_written_is_read) {
    test_write_text("x", "an older file");
    gn_safetensors_writer *w = create("x");
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_write(w, values, 5, &err), GN_OK); /* in pieces */
    cr_assert_eq(gn_safetensors_write(w, (const char *)values + 5, 7, &err), GN_OK);
    cr_assert_eq(gn_safetensors_write(w, "\x07", 1, &err), GN_OK);
    cr_assert_eq(try_open("x", &err), GN_EFORMAT); /* the older one still */
    cr_assert_eq(gn_safetensors_commit(w, &err), GN_OK, "%s", err.message);
    gn_tensor_file *file = NULL;
    cr_assert_eq(gn_safetensors_open(&file, test_path("x"), &err), GN_OK, "%s", err.message);
    cr_assert_eq(gn_tensor_file_count(file), 3);
    for (int i = 0; i < 3; i++) {
        const gn_file_tensor *t = gn_tensor_file_find(file, entries[i].name);
        cr_assert(t && t->dtype == entries[i].dtype && t->ndim == entries[i].ndim);
        cr_assert_eq(t->bytes, entries[i].bytes);
    }
    const gn_file_tensor *t = gn_tensor_file_find(file, entries[0].name);
    cr_assert_eq((uintptr_t)t->data % 8, 0);
    cr_assert_eq(memcmp(t->data, values, sizeof values), 0);
    gn_tensor_file_close(file);
    cr_assert_not(test_exists("x.partial"));
}

Test(safetensors, a_file_is_written_whole_or_not_at_all) {
    gn_error err = {0};
    gn_safetensors_writer *w = create("short");
    cr_assert_eq(gn_safetensors_write(w, values, 12, &err), GN_OK);
    cr_assert_eq(gn_safetensors_commit(w, &err), GN_EINVAL); /* a byte is missing */
    gn_safetensors_abort(create("aborted"));
    gn_safetensors_abort(NULL);
    cr_assert_eq(gn_safetensors_create(&w, test_path("no/folder"), entries, 3, NULL, &err), GN_EIO);
    cr_assert(strstr(err.message, "no/folder"), "%s", err.message);
    cr_assert_eq(rmdir(test_path("")), 0, "something was left"); /* empty folders only */
}

/* A limit on file sizes fails like a full disk: some bytes go out, then none. */
Test(safetensors, a_full_disk_is_reported) {
    static char data[1 << 16];
    const gn_file_tensor big = {
        .name = "big", .dtype = GN_U8, .ndim = 1, .shape = {sizeof data}, .bytes = sizeof data};
    const struct rlimit limit = {10000, 10000};
    signal(SIGXFSZ, SIG_IGN);
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    gn_safetensors_writer *w = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_create(&w, test_path("x"), &big, 1, NULL, &err), GN_OK);
    cr_assert_eq(gn_safetensors_write(w, data, sizeof data, &err), GN_EIO);
    cr_assert(strstr(err.message, test_path("x")), "%s", err.message);
    gn_safetensors_abort(w);
    cr_assert_not(test_exists("x"));
    cr_assert_not(test_exists("x.partial"));
}
