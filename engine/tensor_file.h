/* tensor_file.h - named tensors in a file, whichever format it has.
 *
 * A gn_tensor_file is an immutable set of named tensors. Every offset, length, dtype, shape and
 * overlap was checked when it was opened, so readers may trust what they find. Files are mapped, or
 * read where others may write over them meanwhile: a mapping would end the program then. */
#ifndef GN_TENSOR_FILE_H
#define GN_TENSOR_FILE_H

#include "kernels/base.h"

typedef struct gn_tensor_file gn_tensor_file;

typedef struct gn_file_tensor {
    const char *name;
    gn_dtype dtype;
    int ndim; /* 0 (a scalar) to GN_MAX_DIMS */
    int64_t shape[GN_MAX_DIMS];
    const void *data; /* may be unaligned */
    size_t bytes;
    const char *path; /* the file it stands in, for messages */
} gn_file_tensor;

/* One .safetensors file, mapped. */
GN_CHECKED gn_status gn_safetensors_open(gn_tensor_file **out, const char *path, gn_error *err);
/* The same, read. */
GN_CHECKED gn_status gn_safetensors_read(gn_tensor_file **out, const char *path, gn_error *err);
/* A model folder, mapped: model.safetensors, or model.safetensors.index.json and its shards (each
 * tensor must stand in the shard the index names; shard names may not leave the folder). */
GN_CHECKED gn_status gn_safetensors_open_dir(gn_tensor_file **out, const char *dir, gn_error *err);
/* A file written by torch.save: a zip of storages and a pickle of a state dict. Only the
 * opcodes that rebuild tensors are understood; nothing in the file is ever run. It is read. */
GN_CHECKED gn_status gn_torch_open(gn_tensor_file **out, const char *path, gn_error *err);
void gn_tensor_file_close(gn_tensor_file *file);

size_t gn_tensor_file_count(const gn_tensor_file *file);
const gn_file_tensor *gn_tensor_file_at(const gn_tensor_file *file, size_t index); /* by name */
const gn_file_tensor *gn_tensor_file_find(const gn_tensor_file *file,
                                          const char *name); /* or NULL */

/* Lets the pages of a mapped tensor leave memory, when it will not be read soon; reading brings
 * them back. */
void gn_file_tensor_release(const gn_file_tensor *tensor);

/* Writes a .safetensors file tensor by tensor, under a temporary name until committed. */
typedef struct gn_safetensors_writer gn_safetensors_writer;
/* Entries give name, dtype, ndim, shape and bytes; data and path are ignored. Data must then be
 * written in this order. metadata: NULL-terminated key, value, key, value ... or NULL. */
GN_CHECKED gn_status gn_safetensors_create(gn_safetensors_writer **out, const char *path,
                                           const gn_file_tensor *entries, size_t n,
                                           const char *const *metadata, gn_error *err);
/* The next bytes of the current tensor; a tensor may be written in pieces. */
GN_CHECKED gn_status gn_safetensors_write(gn_safetensors_writer *w, const void *data, size_t bytes,
                                          gn_error *err);
/* Checks that all was written, syncs, renames into place and frees; on failure removes the file. */
GN_CHECKED gn_status gn_safetensors_commit(gn_safetensors_writer *w, gn_error *err);
void gn_safetensors_abort(gn_safetensors_writer *w); /* removes the temporary file; accepts NULL */

#endif
