/* folder.h - for tests: a folder that lasts as long as one test, and weights to damage in it. */
#ifndef GN_TEST_FOLDER_H
#define GN_TEST_FOLDER_H

#include "engine/tensor_file.h"

/* For TestSuite's .init and .fini. */
void test_folder_make(void);
void test_folder_remove(void); /* with all that is in it; also frees what test_alloc gave */

/* Zeroed, with one more zero byte behind its end; lasts as long as the test. */
void *test_alloc(size_t bytes);

/* The path of a name in the folder ("" for the folder itself). */
const char *test_path(const char *name);
void test_write(const char *name, const void *data, size_t n);
void test_write_text(const char *name, const char *text);
void test_copy(const char *from, const char *name);
bool test_exists(const char *name);
void test_remove(const char *name); /* a file, or a folder with all that is in it */

/* A safetensors file of exactly this header and n bytes of data, which count up. */
void test_write_safetensors(const char *name, const char *header, size_t n);

/* What stands in a file's tensors, to be changed and written again. */
typedef struct test_tensors {
    gn_file_tensor tensors[256]; /* data and name are from test_alloc */
    size_t n;
} test_tensors;
void test_tensors_read(test_tensors *set, const char *path);
/* The padding makes the header so much longer. */
void test_tensors_write(const test_tensors *set, const char *name, size_t padding);
gn_file_tensor *test_tensor(test_tensors *set, const char *name); /* fails the test when missing */
void test_tensor_remove(test_tensors *set, const char *name);
void test_tensor_add(test_tensors *set, const char *name, gn_dtype dtype, int64_t n);

/* A model folder of zeros, which take no room on the disk. Returns the bytes of its tensors. */
int64_t test_zeros_model(const char *name, int hidden, int intermediate, int layers);

#endif
