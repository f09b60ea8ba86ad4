/* pickle.h - finds the tensors in a pickled state dict without running anything.
 *
 * A pickle is a program for a stack machine that may call any function of Python. This reader
 * knows only the instructions and the few names by which torch.save describes tensors; another
 * name or instruction ends it with an error that says which. */
#ifndef GN_PICKLE_H
#define GN_PICKLE_H

#include "kernels/base.h"

/* A contiguous tensor: elements [offset, offset + product of shape) of a storage. */
typedef struct gn_pickle_tensor {
    const char *name; /* printable ASCII in the pickle, not terminated */
    size_t name_len;
    const char *storage; /* the storage's key, likewise */
    size_t storage_len;
    gn_dtype dtype;
    int ndim;
    int64_t shape[GN_MAX_DIMS];
    int64_t offset;
    int64_t storage_numel; /* offset and shape were checked against it */
} gn_pickle_tensor;

typedef struct gn_pickle {
    gn_pickle_tensor *tensors; /* in file order; names may repeat */
    size_t count;
} gn_pickle;

/* Reads a pickle (protocol 2 to 5) of a dict of tensors; `data` must outlive the gn_pickle.
 * Malformed is GN_EFORMAT; calls, other objects and strided tensors are GN_EUNSUPPORTED; too deep
 * or too large GN_ETOOBIG. `path` is for messages. */
GN_CHECKED gn_status gn_pickle_read(gn_pickle *pickle, const unsigned char *data, size_t bytes,
                                    const char *path, gn_error *err);
void gn_pickle_free(gn_pickle *pickle);

#endif
