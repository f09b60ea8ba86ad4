/* model_copy.h - a model folder made of another, tensor by tensor: for quantize.h and merge.h.
 *
 * A copy's maker says what the seven projections of each layer become; every other tensor stays as
 * it is stored, and the files beside the weights come along. Memory holds one tensor at a time. The
 * folder appears whole or not at all. */
#ifndef GN_MODEL_COPY_H
#define GN_MODEL_COPY_H

#include <cjson/cJSON.h>

#include "engine/config.h"
#include "engine/tensor_file.h"

enum { GN_COPY_MAX_TENSORS = 6 };

/* A weight of the model as it is stored, and what stands for it in the copy. */
typedef struct gn_copy_item {
    int layer; /* -1: no projection */
    gn_proj proj;
    int n_from, n_to, shard;
    const gn_file_tensor *from[GN_COPY_MAX_TENSORS]; /* one, or bitsandbytes' form, codes first */
    gn_file_tensor to[GN_COPY_MAX_TENSORS];          /* names are owned */
} gn_copy_item;

typedef struct gn_model_copy gn_model_copy;

typedef struct gn_copy_maker {
    /* Adds the tensors that a projection becomes (gn_copy_add). */
    gn_status (*plan)(gn_model_copy *copy, gn_copy_item *item);
    /* Writes their data, in that order. */
    gn_status (*write)(gn_model_copy *copy, const gn_copy_item *item, gn_safetensors_writer *w);
    /* Writes config.json, and whatever else the folder is to say (gn_copy_write_text). */
    gn_status (*describe)(gn_model_copy *copy);
} gn_copy_maker;

struct gn_model_copy {
    const char *in, *out; /* `out` must not exist */
    gn_copy_maker maker;
    void *user;              /* the maker's */
    int64_t max_shard_bytes; /* of tensors a file; 0: 5 GB. A larger tensor has a file of its own */
    /* Bytes read so far, of all. May be NULL. */
    void (*progress)(void *progress_user, int64_t done, int64_t total);
    void *progress_user;
    gn_error *err;

    /* From here on: there once gn_model_copy_open was called. */
    gn_config config;
    gn_tensor_file *file;
    gn_copy_item *items;
    size_t n_items;
    int n_shards;
    char *folder; /* "OUT.partial" */
    int64_t bytes_in, bytes_out, done;
};

/* Reads config.json and finds every weight: the projections must be there, in the shape that it
 * gives them. */
GN_CHECKED gn_status gn_model_copy_open(gn_model_copy *copy);
GN_CHECKED gn_status gn_model_copy_run(gn_model_copy *copy);
void gn_model_copy_close(gn_model_copy *copy); /* also after an error */

/* The name is that of the stored weight and the suffix. */
GN_CHECKED gn_status gn_copy_add(gn_model_copy *copy, gn_copy_item *item, const char *suffix,
                                 gn_dtype dtype, int ndim, const int64_t *shape);

/* For `describe`: files of the new folder. */
GN_CHECKED gn_status gn_copy_write_text(gn_model_copy *copy, const char *name, const char *text);
GN_CHECKED gn_status gn_copy_write_json(gn_model_copy *copy, const char *name, const cJSON *root);

#endif
