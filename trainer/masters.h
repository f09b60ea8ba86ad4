/* masters.h - trained values, the optimizer's masters, on their way into a file. */
#ifndef GN_MASTERS_H
#define GN_MASTERS_H

#include "engine/tensor_file.h"
#include "trainer/optimizer.h"

/* A parameter as a tensor of the file. The name is borrowed. */
gn_file_tensor gn_master_tensor(const gn_parameter *item, const char *name, gn_dtype dtype);
/* Writes the values of parameter i as F32 or BF16. Pages must be flushed. */
GN_CHECKED gn_status gn_master_write(gn_safetensors_writer *w, gn_optimizer *o, size_t i,
                                     gn_dtype dtype, gn_error *err);

#endif
