/* masters.c - read, narrowed, written: one tensor at a time. */
#include "trainer/masters.h"

#include <stdlib.h>
#include <string.h>

gn_file_tensor gn_master_tensor(const gn_parameter *item, const char *name, gn_dtype dtype) {
    gn_file_tensor t = {.name = name, .dtype = dtype, .ndim = item->ndim};
    t.bytes = (size_t)item->numel * gn_dtype_size(dtype);
    memcpy(t.shape, item->shape, sizeof t.shape);
    return t;
}

gn_status gn_master_write(gn_safetensors_writer *w, gn_optimizer *o, size_t i, gn_dtype dtype,
                          gn_error *err) {
    const gn_parameter *item = &gn_optimizer_parameters(o)->items[i];
    const size_t bytes = (size_t)item->numel * gn_dtype_size(dtype);
    float *values = malloc((size_t)item->numel * sizeof *values);
    void *narrow = malloc(bytes);
    gn_status status = values && narrow ? GN_OK : GN_ENOMEM;
    if (!status) status = gn_optimizer_get(o, GN_STATE_MASTER, i, values);
    if (status) {
        gn_fail(err, status, "%s: %s", item->name, gn_status_text(status));
    } else {
        gn_narrow(narrow, dtype, values, item->numel);
        status = gn_safetensors_write(w, narrow, bytes, err);
    }
    free(values);
    free(narrow);
    return status;
}
