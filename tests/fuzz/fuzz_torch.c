/* fuzz_torch.c - bytes as a zip directory, as a pickle, and as a file for gn_torch_open. The first
 * two see a heap copy of exact size, so that the address sanitizer finds any read past its end. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine/hash.h"
#include "engine/pickle.h"
#include "engine/tensor_file.h"
#include "engine/zip.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void read_in_memory(const uint8_t *data, size_t size) {
    unsigned char *copy = malloc(size ? size : 1);
    if (!copy) abort();
    if (size) memcpy(copy, data, size);
    gn_zip zip;
    if (gn_zip_open(&zip, copy, size, "file", NULL) == GN_OK) {
        for (size_t i = 0; i < zip.count; i++) {
            const gn_zip_entry *e = &zip.entries[i];
            if (e->data > size || e->bytes > size - e->data) abort();
            if (gn_zip_find(&zip, e->name, e->name_len) != e) abort();
        }
    }
    gn_zip_close(&zip);
    gn_pickle pickle;
    if (gn_pickle_read(&pickle, copy, size, "file", NULL) != GN_OK && pickle.tensors) abort();
    gn_pickle_free(&pickle);
    free(copy);
}

static void read_file(const uint8_t *data, size_t size) {
    const int fd = memfd_create("fuzz_torch", MFD_CLOEXEC);
    if (fd < 0 || write(fd, data, size) != (ssize_t)size) abort();
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    gn_tensor_file *file = NULL;
    gn_error err = {0};
    const gn_status status = gn_torch_open(&file, path, &err);
    if (status != err.status || (status == GN_OK) != (file != NULL)) abort();
    gn_hash hash = GN_HASH_INIT; /* every byte that a tensor claims can be read */
    for (size_t i = 0; file && i < gn_tensor_file_count(file); i++) {
        const gn_file_tensor *t = gn_tensor_file_at(file, i);
        gn_hash_add(&hash, t->data, t->bytes);
    }
    gn_tensor_file_close(file);
    close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    read_in_memory(data, size);
    read_file(data, size);
    return 0;
}
