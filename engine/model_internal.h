/* model_internal.h - shared by the ways a model comes to be: from a folder, and at random. */
#ifndef GN_MODEL_INTERNAL_H
#define GN_MODEL_INTERNAL_H

#include "engine/model.h"

/* A zeroed model with its context open and room for its layers; gn_model_close frees it. */
GN_CHECKED gn_status gn_model_new(gn_model **out, const char *dir, const gn_config *config,
                                  const gn_model_options *options, gn_error *err);
/* Memory that lives as long as the model; NULL when there is none left. */
void *gn_model_own(gn_model *model, size_t bytes);
/* The weight `name` of a folder, a float tensor of the shape that config.json gives it: (rows), or
 * (rows, cols) when ndim is 2. `where` names the folder. */
GN_CHECKED gn_status gn_model_find_weight(const gn_file_tensor **out, const gn_tensor_file *file,
                                          const char *where, const char *name, int ndim,
                                          int64_t rows, int64_t cols, gn_error *err);
/* Sets inv_freq, and counts parameters and bytes, once all weights are in place. */
GN_CHECKED gn_status gn_model_finish(gn_model *model, gn_error *err);

#endif
