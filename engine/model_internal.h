/* model_internal.h - shared by the ways a model comes to be: from a folder, and at random. */
#ifndef GN_MODEL_INTERNAL_H
#define GN_MODEL_INTERNAL_H

#include "engine/model.h"

/* A zeroed model with its context open and room for its layers; gn_model_close frees it. */
GN_CHECKED gn_status gn_model_new(gn_model **out, const char *dir, const gn_config *config,
                                  const gn_model_options *options, gn_error *err);
/* Device memory that lives as long as the model; NULL when there is none left. */
void *gn_model_own(gn_model *model, size_t bytes);
/* Takes at once what the next calls of gn_model_own will ask for, the sum of gn_model_owned_size: a
 * device gives memory in blocks of megabytes, and the last of each allocation is half empty. A CPU
 * needs none of it. */
GN_CHECKED gn_status gn_model_reserve(gn_model *model, size_t bytes, gn_error *err);
size_t gn_model_owned_size(size_t bytes);
/* That sum for all norms and inv_freq. */
size_t gn_model_vectors_size(const gn_model *model);
/* The same in the host's reach, to be filled; where the device's memory is not, it lives until the
 * next gn_model_place. */
void *gn_model_own_host(gn_model *model, size_t bytes);
/* Moves a weight made of host memory to the device, where it lives as long as the model. */
GN_CHECKED gn_status gn_model_place(gn_model *model, gn_matrix *w, gn_error *err);
/* The same for n floats. */
GN_CHECKED gn_status gn_model_place_vector(gn_model *model, gn_tensor *out, const float *values,
                                           int64_t n, gn_error *err);
/* The weight `name` of a folder, a float tensor of the shape that config.json gives it: (rows), or
 * (rows, cols) when ndim is 2. `where` names the folder. */
GN_CHECKED gn_status gn_model_find_weight(const gn_file_tensor **out, const gn_tensor_file *file,
                                          const char *where, const char *name, int ndim,
                                          int64_t rows, int64_t cols, gn_error *err);
/* A tensor of a folder that the model computes or copies itself. */
bool gn_model_is_redundant(const gn_config *config, const char *name);
/* Once all weights are in place: sets inv_freq, counts parameters and bytes, frees what loading
 * needed. */
GN_CHECKED gn_status gn_model_finish(gn_model *model, gn_error *err);

#endif
