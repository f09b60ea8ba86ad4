/* quantize.h - a 4-bit copy of a model folder, in bitsandbytes' serialized form. */
#ifndef GN_QUANTIZE_H
#define GN_QUANTIZE_H

#include "kernels/blockquant.h"

typedef struct gn_quantize_options {
    const char *in, *out; /* `out` must not exist; it appears whole or not at all */
    gn_qtype type;        /* NF4 or FP4 */
    bool double_quant;
    int threads;             /* 0: all cores */
    int64_t max_shard_bytes; /* of tensors a file; 0: 5 GB. A larger tensor has a file of its own */
    /* Bytes read so far, of all. May be NULL. */
    void (*progress)(void *user, int64_t done, int64_t total);
    void *user;
} gn_quantize_options;

typedef struct gn_quantize_result {
    int64_t bytes_in, bytes_out; /* of tensors */
} gn_quantize_result;

/* Streams tensor by tensor: memory holds one at a time. What is no projection is copied as stored.
 */
GN_CHECKED gn_status gn_quantize_folder(const gn_quantize_options *options,
                                        gn_quantize_result *result, gn_error *err);

#endif
