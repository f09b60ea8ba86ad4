/* attention.h - what the ways to attention share: their arguments, and how a batch is cut.
 *
 * A step may be recorded and replayed for later batches of as many rows and sequences. So a grid
 * depends on nothing but those two numbers and the context's bucket, and blocks find out on the
 * device which rows are theirs; those for which none are left do nothing. Only whether a batch
 * has short or long sequences at all is decided on the host: equal keys must agree on that. */
#ifndef GN_CUDA_ATTENTION_H
#define GN_CUDA_ATTENTION_H

#include "f8.cuh"

enum {
    GN_CUDA_KV_TOKENS = 16,    /* of a cache block, on the fast ways */
    GN_CUDA_DECODE_ROWS = 15,  /* a sequence with more rows in the batch is a prefill */
    GN_CUDA_BUCKET_BEGIN = 256 /* the least context bucket */
};

static const float LOG2_E = 1.44269504f; /* exponentials are powers of two */

/* Device pointers; steps in elements. */
typedef struct gn_cuda_attention_args {
    void *y;
    const void *q, *k, *v;
    const float *k_scales, *v_scales; /* (blocks, kv_heads, tokens), of an F8 cache */
    int64_t y_ld, q_ld, k_ld, v_ld;   /* of a row; of a cache block */
    int rows, heads, kv_heads, D;
    int tokens; /* of a cache block */
    int n_seqs, max_blocks;
    gn_cuda_batch batch;
    float scale;
} gn_cuda_attention_args;

/* attention_prefill.cu: the sequences with more than GN_CUDA_DECODE_ROWS rows. has_codes: the cache
 * is F8, else BF16. */
gn_status gn_cuda_attention_prefill(gn_ctx *ctx, const gn_cuda_attention_args *args,
                                    bool has_codes);

/* The longest context after this batch, rounded up to a power of two: what a grid may know about
 * positions. */
static inline int64_t gn_cuda_context_bucket(const gn_seqs *seqs) {
    int64_t longest = 0, bucket = GN_CUDA_BUCKET_BEGIN;
    for (int32_t i = 0; i < seqs->n; i++) {
        const int64_t end = (int64_t)seqs->pos0[i] + seqs->row0[i + 1] - seqs->row0[i];
        if (end > longest) longest = end;
    }
    while (bucket < longest) bucket *= 2;
    return bucket;
}

/* Some consecutive queries of one sequence; a query is one row for one head of a group. */
typedef struct tile_of_seq {
    int seq; /* -1: none */
    int rows;
    int first; /* query, of the sequence's rows * per_row */
} tile_of_seq;

/* Tile `index`, of `size` queries each, of the sequences that have from min_rows to max_rows rows.
 * Called by whole warps. */
static __device__ __forceinline__ tile_of_seq find_tile(const int32_t *row0, int n_seqs, int index,
                                                        int min_rows, int max_rows, int per_row,
                                                        int size) {
    const int lane = threadIdx.x % WARP;
    for (int base = 0; base < n_seqs; base += WARP) {
        const int seq = base + lane;
        const int rows = seq < n_seqs ? row0[seq + 1] - row0[seq] : 0;
        const bool mine = rows >= min_rows && rows <= max_rows;
        const int tiles = mine ? (rows * per_row + size - 1) / size : 0;
        int end = tiles;
#pragma unroll
        for (int d = 1; d < WARP; d *= 2) {
            const int before = __shfl_up_sync(0xffffffffu, end, d);
            if (lane >= d) end += before;
        }
        const uint32_t past = __ballot_sync(0xffffffffu, end > index);
        if (past) {
            const int at = __ffs((int)past) - 1;
            const int begin = __shfl_sync(0xffffffffu, end - tiles, at);
            return {base + at, __shfl_sync(0xffffffffu, rows, at), (index - begin) * size};
        }
        index -= __shfl_sync(0xffffffffu, end, WARP - 1);
    }
    return {-1, 0, 0};
}

/* What position `at` of a cache block is multiplied by, for one kv head. */
template <typename C>
static __device__ __forceinline__ float
scale_of(const gn_cuda_attention_args &a, const float *scales, int64_t block, int kv_head, int at) {
    if constexpr (is_f8<C>) return __ldcg(scales + (block * a.kv_heads + kv_head) * a.tokens + at);
    return 1.0f;
}

#endif
