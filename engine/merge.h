/* merge.h - an adapter added into its base's weights: a model folder that needs no adapter. */
#ifndef GN_MERGE_H
#define GN_MERGE_H

#include "kernels/blockquant.h"

typedef struct gn_merge_options {
    const char *model, *adapter, *out; /* `out` must not exist; it appears whole or not at all */
    /* What the adapter was trained over: all projections are rounded to that type, and it is added
     * to what they are then. NONE: to what is stored; a folder in 4 bits is dequantized. */
    gn_qtype quant;
    bool double_quant;
    /* The projections' dtype, with set_dtype; else that of the stored ones, or BF16 where they were
     * dequantized. Other weights stay as they are. */
    bool set_dtype;
    gn_dtype dtype;
    int threads;             /* 0: all cores */
    int64_t max_shard_bytes; /* of tensors a file; 0: 5 GB. A larger tensor has a file of its own */
    /* Bytes read so far, of all. May be NULL. */
    void (*progress)(void *user, int64_t done, int64_t total);
    void *user;
} gn_merge_options;

typedef struct gn_merge_result {
    int64_t bytes_in, bytes_out; /* of tensors */
    int projections, rank;       /* adapted ones, and the adapter's largest rank */
    gn_qtype over;               /* what was dequantized; NONE: weights as stored */
    bool double_quant;
    gn_dtype dtype; /* of the projections; the first one's, should they differ */
} gn_merge_result;

/* W + scale * B A, summed in float32 and rounded once. Memory holds the adapter and one tensor at a
 * time. The folder's merge.json says what was added to what. */
GN_CHECKED gn_status gn_merge_folder(const gn_merge_options *options, gn_merge_result *result,
                                     gn_error *err);

#endif
