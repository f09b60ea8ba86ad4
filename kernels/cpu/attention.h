/* attention.h - what attention.c hands to the loops of attention_lanes.h. */
#ifndef GN_CPU_ATTENTION_H
#define GN_CPU_ATTENTION_H

#include "cpu.h"

enum {
    GN_ATTENTION_LANES = 16,   /* of the longest vectors */
    GN_ATTENTION_QUERIES = 32, /* query vectors that share one pass over the cache */
};

/* Some heads of some consecutive rows of one sequence, all reading the same kv head. */
typedef struct gn_attention_item {
    const gn_tensor *y, *q;
    const gn_kv *kv;
    const int32_t *blocks; /* of the sequence */
    int64_t row0, head0, kv_head;
    int32_t position0; /* of row0 */
    int n_rows, n_heads;
    float *scores;        /* (n_rows * n_heads, score_stride) scratch */
    int64_t score_stride; /* a multiple of GN_ATTENTION_LANES, at least the last position + 1 */
} gn_attention_item;

typedef void gn_attention_fn(const gn_attention_item *item);
gn_attention_fn gn_attention_plain, gn_attention_avx2, gn_attention_avx512;

#endif
