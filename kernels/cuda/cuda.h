/* cuda.h - the CUDA backend's state and the calls between its files; for kernels/cuda only.
 *
 * One stream runs every op in order. Working memory is ctx->workspace, carved anew by each op.
 * Kernels that a step of decoding uses are chained by programmatic dependent launch: a kernel may
 * start while the one before drains, and waits (gn_pdl_wait) before it touches anything that an
 * earlier kernel wrote. Weights, tables and staged batches never change under it.
 *
 * Weights of a 4-bit type whose columns are a multiple of 64 stand in tiles (GN_CUDA_TILE_ROWS
 * rows by a block of 64 columns), the order in which mma.m16n8k16 wants its A operand. Rows are
 * padded with zeros to whole tiles. Tile (t, s), t = row / 8 and s = column / 64, is the 256 bytes
 * at ((t * K/64) + s) * 256: lane l = 4g + c of a warp owns the 8 bytes at 8l, which hold row
 * 8t + g, columns 64s + 16c to 64s + 16c + 15, in order and packed as in the file (the even column
 * in the high nibble). So mma j of 4 takes as k the columns 64s + 16c + 4j + {0, 1} (registers a0,
 * and b0 of x) and {2, 3} (a2, b1): a permutation of the block's columns that x follows, each lane
 * reading 16 columns in a row. Rows g + 8 of the instruction (a1, a3) come from a second tile,
 * whichever the kernel pairs: the next one, up's beside gate's. Scales follow the tiles: those of
 * tile (t, s) are 8 bytes (or floats, without double quantization) at ((t * K/64) + s) * 8, by
 * row. nested_absmax keeps the file's order: row r, block s uses entry (r * K/64 + s) / 256. All
 * other weights stay row-major. */
#ifndef GN_CUDA_H
#define GN_CUDA_H

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include "kernels/backend.h"

enum { GN_CUDA_TILE_ROWS = 8, GN_CUDA_TILE_BYTES = 256, GN_CUDA_COUNTERS = 4096 };

/* The staged batch, as kernels see it: device arrays at addresses that never change, so that a
 * recorded graph finds the next step's values there. */
typedef struct gn_cuda_batch {
    int32_t *ids;     /* (rows) */
    int32_t *row_seq; /* (rows) sequence of each row */
    int32_t *row_pos; /* (rows) its position */
    int32_t *row0;    /* (n_seqs + 1) */
    int32_t *pos0;    /* (n_seqs) */
    gn_lora *terms;   /* (n_terms), with ->placed valid on the device */
    int32_t *blocks;  /* (n_seqs, max_blocks) */
} gn_cuda_batch;

struct gn_cuda {
    int device, sms;
    int64_t opened;         /* bytes of the device in use when the context was open */
    size_t shared_limit;    /* bytes of shared memory a block may ask for */
    size_t shared_reserved; /* that the system has of each block's, at its beginning */
    bool overlaps;          /* kernels may start while the one before drains (Hopper on) */
    cudaStream_t stream;
    cudaStream_t transfers; /* transfer.cu's */
    cublasHandle_t blas;
    void *blas_workspace;
    int mma_clusters;   /* of linear_mma.cu that run at once; 0: it cannot run here */
    uint32_t *counters; /* (GN_CUDA_COUNTERS), zero between ops: whoever counts last resets */
    gn_cuda_batch batch;
    struct gn_cuda_stage *stage;   /* stage.cu */
    struct gn_cuda_graphs *graphs; /* graph.cu */
    struct gn_cuda_upload *upload; /* place.cu */
};

#define X(name, parameters) gn_status gn_cuda_##name parameters;
GN_BACKEND_OPS(X)
#undef X

void gn_cuda_linear_mma_open(struct gn_cuda *cuda); /* sets mma_clusters */
size_t gn_cuda_linear_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                                int64_t max_rank, int max_terms);
size_t gn_cuda_attention_workspace(const gn_ctx *ctx, int64_t context);
size_t gn_cuda_linear_bwd_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                                    int64_t max_rank);
size_t gn_cuda_rmsnorm_bwd_bytes(int64_t rows); /* of working memory, when there is a dw */
size_t gn_cuda_attention_train_workspace(const gn_ctx *ctx, int64_t rows, int64_t heads,
                                         int64_t head_dim, int64_t context);
size_t gn_cuda_cross_entropy_workspace(const gn_ctx *ctx, int64_t max_c, int64_t vocab);

gn_status gn_cuda_stage_reserve(gn_ctx *ctx, const gn_stage_limits *limits);
gn_status gn_cuda_stage(gn_ctx *ctx, const int32_t *ids, const gn_seqs *seqs, const gn_lora *terms,
                        int32_t n_terms);
void gn_cuda_stage_close(struct gn_cuda *cuda);

gn_status gn_cuda_replay(gn_ctx *ctx, uint64_t key, gn_ctx_ops *fn, void *arg);
void gn_cuda_graphs_close(struct gn_cuda *cuda); /* forgets all recordings */

size_t gn_cuda_place_bytes(const gn_ctx *ctx, const gn_matrix *host);
gn_status gn_cuda_place(gn_ctx *ctx, gn_matrix *out, const gn_matrix *host, void *memory);
size_t gn_cuda_quantize_place_bytes(const gn_ctx *ctx, gn_qtype type, bool double_quant,
                                    int64_t rows, int64_t cols);
gn_status gn_cuda_quantize_place(gn_ctx *ctx, gn_matrix *out, gn_qtype type, bool double_quant,
                                 const void *src, gn_dtype dtype, int64_t rows, int64_t cols,
                                 void *memory, gn_error *err);
gn_status gn_cuda_measure_rates(gn_ctx *ctx, gn_rates *rates);
gn_status gn_cuda_measure_quantize(gn_ctx *ctx, gn_qtype type, bool double_quant, int64_t rows,
                                   int64_t cols, double *quantize, double *dequantize);
/* Host to device, in order with the ops; src may be reused on return. */
gn_status gn_cuda_upload(gn_ctx *ctx, void *dst, const void *src, size_t bytes);
gn_status gn_cuda_upload_open(struct gn_cuda *cuda);
void gn_cuda_upload_close(struct gn_cuda *cuda);

/* Host to device beside the ops (transfer.cu). */
void *gn_cuda_alloc_host(gn_ctx *ctx, size_t bytes);
void gn_cuda_free_host(gn_ctx *ctx, void *memory);
gn_status gn_cuda_transfer_begin(gn_ctx *ctx, void **event, void *dst, const void *src,
                                 size_t bytes);
gn_status gn_cuda_transfer_poll(gn_ctx *ctx, void *event, bool *ready);
void gn_cuda_transfer_end(gn_ctx *ctx, void *event);

/* GN_ENOMEM or GN_EDEVICE for a failure. */
gn_status gn_cuda_status(cudaError_t error);

static inline cudaStream_t gn_cuda_stream(const gn_ctx *ctx) {
    return ctx->cuda->stream;
}

/* A 4-bit weight in tiles (see above); else it is row-major. */
static inline bool gn_cuda_is_tiled(const gn_matrix *m) {
    return gn_qtype_is_4bit(m->qtype) && m->cols % GN_BLOCK == 0;
}

#endif
