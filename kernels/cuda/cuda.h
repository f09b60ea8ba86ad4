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

enum { GN_CUDA_TILE_ROWS = 8, GN_CUDA_TILE_BYTES = 256 };

/* The staged batch, as kernels see it: device arrays at addresses that never change, so that a
 * recorded graph finds the next step's values there. */
typedef struct gn_cuda_batch {
    int32_t *ids;      /* (rows) */
    int32_t *row_seq;  /* (rows) sequence of each row */
    int32_t *row_pos;  /* (rows) its position */
    int32_t *row0;     /* (n_seqs + 1) */
    int32_t *pos0;     /* (n_seqs) */
    gn_lora *terms;    /* (n_terms), with ->placed valid on the device */
    int32_t *blocks;   /* (n_seqs, max_blocks) */
} gn_cuda_batch;

struct gn_cuda {
    int device, sms;
    size_t shared_limit; /* bytes of shared memory a block may ask for */
    bool overlaps;       /* kernels may start while the one before drains (Hopper on) */
    cudaStream_t stream;
    cublasHandle_t blas;
    gn_cuda_batch batch;
    struct gn_cuda_stage *stage;  /* cuda/stage.cu */
    struct gn_cuda_graph *graphs; /* cuda/graph.cu */
};

#define X(name, parameters) gn_status gn_cuda_##name parameters;
GN_BACKEND_OPS(X)
#undef X

/* GN_EDEVICE unless `error` is success. */
gn_status gn_cuda_status(cudaError_t error);

static inline cudaStream_t gn_cuda_stream(const gn_ctx *ctx) {
    return ctx->cuda->stream;
}

/* A 4-bit weight in tiles (see above); else it is row-major. */
static inline bool gn_cuda_is_tiled(const gn_matrix *m) {
    return gn_qtype_is_4bit(m->qtype) && m->cols % GN_BLOCK == 0;
}

#endif
