/* fuzz_safetensors.c - bytes as a safetensors file: refused with a reason, or every byte that a
 * tensor claims can be read. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine/hash.h"
#include "engine/tensor_file.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char path[64];
    const int fd = memfd_create("fuzz_safetensors", MFD_CLOEXEC);
    if (fd < 0 || write(fd, data, size) != (ssize_t)size) abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    gn_tensor_file *file = NULL;
    gn_error err = {0};
    gn_hash hash = GN_HASH_INIT;
    const gn_status status = gn_safetensors_open(&file, path, &err);
    if (status != err.status || (status == GN_OK) != (file != NULL)) abort();
    for (size_t i = 0; file && i < gn_tensor_file_count(file); i++) {
        const gn_file_tensor *t = gn_tensor_file_at(file, i);
        if (gn_tensor_file_find(file, t->name) != t) abort();
        gn_hash_add(&hash, t->data, t->bytes);
    }
    gn_tensor_file_close(file);
    close(fd);
    return 0;
}
