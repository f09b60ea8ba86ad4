/* Safetensors files, good and hostile: everything malformed is refused with the file's name. */
#include "engine/tensor_file.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define DATA GN_SOURCE_DIR "/tests/golden/data/"

static char folder[64];

static void make_folder(void) {
    strcpy(folder, "/tmp/gn-safetensors-XXXXXX");
    cr_assert(mkdtemp(folder));
}

static void remove_folder(void) {
    char command[128];
    snprintf(command, sizeof command, "rm -r '%s'", folder);
    cr_assert_eq(system(command), 0);
}

static const char *path_of(const char *name) {
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void write_file(const char *path, const void *data, size_t bytes) {
    FILE *f = fopen(path, "wb");
    cr_assert(f);
    cr_assert_eq(fwrite(data, 1, bytes, f), bytes);
    fclose(f);
}

/* A file with this header and `bytes` bytes of data. */
static const char *file_with(const char *header, size_t bytes) {
    static char buffer[1 << 16];
    const size_t length = strlen(header);
    cr_assert_lt(8 + length + bytes, sizeof buffer);
    memset(buffer, 0, sizeof buffer);
    for (int i = 0; i < 8; i++) buffer[i] = (char)(length >> (8 * i));
    memcpy(buffer + 8, header, length);
    const char *path = path_of("x.safetensors");
    write_file(path, buffer, 8 + length + bytes);
    return path;
}

TestSuite(safetensors, .init = make_folder, .fini = remove_folder);

Test(safetensors, reads_the_golden_folders) {
    static const char *const files[] = {"tiny-bf16/model.safetensors",
                                        "tiny-bnb-nf4/model.safetensors",
                                        "adapter-all-r8/adapter_model.safetensors"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char path[512];
        gn_tensor_file *file = NULL;
        gn_error err = {0};
        snprintf(path, sizeof path, DATA "%s", files[i]);
        cr_assert_eq(gn_safetensors_open(&file, path, &err), GN_OK, "%s", err.message);
        cr_assert_gt(gn_tensor_file_count(file), 10);
        for (size_t k = 0; k < gn_tensor_file_count(file); k++) {
            const gn_file_tensor *t = gn_tensor_file_at(file, k);
            cr_assert_eq(gn_tensor_file_find(file, t->name), t);
        }
        cr_assert_null(gn_tensor_file_find(file, "no such tensor"));
        gn_tensor_file_close(file);
    }
}

Test(safetensors, refuses_what_is_malformed) {
    static const struct {
        const char *header;
        size_t bytes;
        const char *says;
    } cases[] = {
        {"", 0, "JSON"},
        {"[]", 0, "JSON"},
        {"{\"a\":1}", 0, "dtype"},
        {"{\"a\":{\"dtype\":\"F64\",\"shape\":[1],\"data_offsets\":[0,8]}}", 8, "F64"},
        {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "no shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", 4, "whole numbers"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1.5],\"data_offsets\":[0,4]}}", 4, "whole numbers"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1],\"data_offsets\":[0,4]}}", 4,
         "dimensions"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", 0,
         "impossible"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", 4, "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}}", 4, "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 4, "truncated"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4, "needs 8"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
         "\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[2,6]}}",
         6, "overlap"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},"
         "\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[4,6]}}",
         6, "belong to no tensor"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", 3, "at the end"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},"
         "\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}",
         2, "twice"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gn_tensor_file *file = NULL;
        gn_error err = {0};
        const char *path = file_with(cases[i].header, cases[i].bytes);
        cr_assert_neq(gn_safetensors_open(&file, path, &err), GN_OK, "%s", cases[i].header);
        cr_assert(strstr(err.message, cases[i].says), "%s: %s", cases[i].header, err.message);
        cr_assert(strstr(err.message, "x.safetensors"), "%s", err.message);
    }
}

Test(safetensors, refuses_every_truncation_and_any_header_length) {
    static const char header[] =
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]}}";
    char whole[8 + sizeof header - 1 + 16] = {(char)(sizeof header - 1)};
    memcpy(whole + 8, header, sizeof header - 1);
    gn_tensor_file *file = NULL;
    const char *path = path_of("x.safetensors");
    for (size_t n = 0; n < sizeof whole; n++) {
        gn_error err = {0};
        write_file(path, whole, n);
        cr_assert_neq(gn_safetensors_open(&file, path, &err), GN_OK, "%zu bytes", n);
        cr_assert(strstr(err.message, "x.safetensors"), "%s", err.message);
    }
    write_file(path, whole, sizeof whole);
    cr_assert_eq(gn_safetensors_open(&file, path, NULL), GN_OK);
    gn_tensor_file_close(file);
    for (int shift = 0; shift < 64; shift++) {
        const uint64_t length = (uint64_t)1 << shift;
        memcpy(whole, &length, sizeof length);
        write_file(path, whole, sizeof whole);
        cr_assert_neq(gn_safetensors_open(&file, path, NULL), GN_OK);
    }
}

Test(safetensors, shards_stay_in_their_folder_and_hold_what_the_index_says) {
    static const struct {
        const char *index, *says;
    } cases[] = {
        {"{}", "weight_map"},
        {"{\"weight_map\":{\"a\":\"../x.safetensors\"}}", "shard name"},
        {"{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "shard name"},
        {"{\"weight_map\":{\"a\":7}}", "shard name"},
        {"{\"weight_map\":{\"a\":\"gone.safetensors\"}}", "gone.safetensors"},
        {"{\"weight_map\":{\"b\":\"x.safetensors\"}}", "tensor b is not in"},
    };
    gn_tensor_file *file = NULL;
    file_with("{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", 2);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gn_error err = {0};
        write_file(path_of("model.safetensors.index.json"), cases[i].index, strlen(cases[i].index));
        cr_assert_neq(gn_safetensors_open_dir(&file, folder, &err), GN_OK, "%s", cases[i].index);
        cr_assert(strstr(err.message, cases[i].says), "%s", err.message);
    }
    static const char good[] = "{\"weight_map\":{\"a\":\"x.safetensors\"}}";
    write_file(path_of("model.safetensors.index.json"), good, sizeof good - 1);
    cr_assert_eq(gn_safetensors_open_dir(&file, folder, NULL), GN_OK);
    gn_tensor_file_close(file);
}

Test(safetensors, what_is_written_reads_back) {
    static const float a[6] = {1, 2, 3, 4, 5, 6};
    static const uint8_t b[3] = {7, 8, 9};
    const gn_file_tensor entries[] = {
        {.name = "a", .dtype = GN_F32, .ndim = 2, .shape = {2, 3}, .bytes = sizeof a},
        {.name = "b", .dtype = GN_U8, .ndim = 1, .shape = {3}, .bytes = sizeof b}};
    gn_safetensors_writer *w;
    gn_tensor_file *file;
    const char *path = path_of("out.safetensors");
    cr_assert_eq(gn_safetensors_create(&w, path, entries, 2, NULL, NULL), GN_OK);
    cr_assert_eq(access(path, F_OK), -1, "nothing under the final name before the commit");
    cr_assert_eq(gn_safetensors_write(w, a, 8, NULL), GN_OK);
    cr_assert_eq(gn_safetensors_write(w, a + 2, sizeof a - 8, NULL), GN_OK);
    cr_assert_eq(gn_safetensors_write(w, b, sizeof b, NULL), GN_OK);
    cr_assert_eq(gn_safetensors_commit(w, NULL), GN_OK);
    cr_assert_eq(gn_safetensors_open(&file, path, NULL), GN_OK);
    cr_assert_arr_eq(gn_tensor_file_find(file, "a")->data, a, sizeof a);
    cr_assert_arr_eq(gn_tensor_file_find(file, "b")->data, b, sizeof b);
    gn_tensor_file_close(file);

    gn_error err = {0};
    path = path_of("short.safetensors");
    cr_assert_eq(gn_safetensors_create(&w, path, entries, 2, NULL, NULL), GN_OK);
    cr_assert_eq(gn_safetensors_write(w, a, 8, NULL), GN_OK);
    cr_assert_neq(gn_safetensors_commit(w, &err), GN_OK, "bytes are missing");
    cr_assert_eq(access(path, F_OK), -1);
    cr_assert_eq(access(path_of("short.safetensors.partial"), F_OK), -1);
}
