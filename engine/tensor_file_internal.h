/* tensor_file_internal.h - what stands behind a gn_tensor_file, for the readers of each format.
 *
 * A reader maps its files, adds what it found in any order, then seals: from there on the set is
 * immutable and sorted. Whoever fails on the way closes the half-built file. Implemented in
 * tensor_file.c. */
#ifndef GN_TENSOR_FILE_INTERNAL_H
#define GN_TENSOR_FILE_INTERNAL_H

#include "engine/tensor_file.h"

typedef struct gn_mapping {
    unsigned char *data; /* NULL for an empty file */
    size_t bytes;
    char *path; /* owned */
} gn_mapping;

struct gn_tensor_file {
    bool reads;              /* files, instead of mapping them */
    gn_file_tensor *tensors; /* sorted by name once sealed; each name is a malloc'ed copy */
    size_t count, capacity;
    gn_mapping *mappings;
    size_t n_mappings;
};

/* An empty set; gn_tensor_file_close frees it at any stage. */
GN_CHECKED gn_status gn_tensor_file_new(gn_tensor_file **out, bool reads, gn_error *err);
/* Maps or reads a regular file. *mapping is a copy, good until the set is closed. */
GN_CHECKED gn_status gn_tensor_file_map(gn_tensor_file *file, const char *path, gn_mapping *mapping,
                                        gn_error *err);
/* Adds a copy of *tensor. Its name is copied; its data and path point into a mapping of this set
 * and were checked by the caller. */
GN_CHECKED gn_status gn_tensor_file_add(gn_tensor_file *file, const gn_file_tensor *tensor,
                                        gn_error *err);
/* Syncs the folder that path stands in, so that a rename into it outlives a power cut. */
GN_CHECKED gn_status gn_sync_parent(const char *path, gn_error *err);
/* Sorts by name. Two tensors of one name are GN_EFORMAT, naming path and tensor. */
GN_CHECKED gn_status gn_tensor_file_seal(gn_tensor_file *file, gn_error *err);

#endif
