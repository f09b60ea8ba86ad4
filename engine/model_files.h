/* model_files.h - the files of a model folder beside its weights, on their way to another. */
#ifndef GN_MODEL_FILES_H
#define GN_MODEL_FILES_H

#include "kernels/base.h"

/* Copies what says how to use the model and on which terms: tokenizer, chat template, licence ...,
 * but not config.json. Files that are not there are none. */
GN_CHECKED gn_status gn_model_files_copy(const char *from, const char *to, gn_error *err);
/* Copies config.json as it is. */
GN_CHECKED gn_status gn_model_config_copy(const char *from, const char *to, gn_error *err);
/* Writes config.json for weights that are stored as `dtype`, whatever they were before. */
GN_CHECKED gn_status gn_model_config_write(const char *from, const char *to, gn_dtype dtype,
                                           gn_error *err);

#endif
