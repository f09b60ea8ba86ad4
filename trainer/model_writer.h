/* model_writer.h - trained weights as a Hugging Face folder. */
#ifndef GN_MODEL_WRITER_H
#define GN_MODEL_WRITER_H

#include "trainer/optimizer.h"

/* Writes, atomically, the masters of parameters that are called as in a model folder, in `dtype`
 * (F32 or BF16); config.json and the files beside it come from the folder `base`. What stands in
 * `dir` is replaced if it is a model. */
GN_CHECKED gn_status gn_model_save(const char *dir, const char *base, gn_dtype dtype,
                                   gn_optimizer *o, gn_error *err);

#endif
