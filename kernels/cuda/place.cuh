/* place.cuh - what placing and quantizing weights share; for those two files, and for measuring. */
#ifndef GN_CUDA_PLACE_CUH
#define GN_CUDA_PLACE_CUH

#include "common.cuh"

/* Bytes of the host's arrays that cross the bus before a kernel puts them in their places. */
enum { GN_CUDA_CHUNK = 16 << 20 };

/* The blocks of a 4-bit weight: `rows` of `per_row` each, which tiles of GN_CUDA_TILE_ROWS rows
 * reorder. A row-major weight counts as rows of a single block: tiles of those are the file's
 * order. `padded` blocks make whole tiles. */
typedef struct gn_cuda_blocks {
    int64_t rows, per_row, padded;
} gn_cuda_blocks;

static inline gn_cuda_blocks gn_cuda_blocks_of(const gn_matrix *m) {
    const int64_t all = (m->rows * m->cols + GN_BLOCK - 1) / GN_BLOCK;
    gn_cuda_blocks b = {all, 1, 0};
    if (gn_cuda_is_tiled(m)) {
        b.rows = m->rows;
        b.per_row = m->cols / GN_BLOCK;
    }
    const int64_t tile_rows = (b.rows + GN_CUDA_TILE_ROWS - 1) / GN_CUDA_TILE_ROWS;
    b.padded = tile_rows * GN_CUDA_TILE_ROWS * b.per_row;
    return b;
}

/* Points the arrays of m, whose qtype, dtype and shape are set, into `memory`, and returns how many
 * bytes they take there. `nested`: it is 4-bit with double quantization. */
size_t gn_cuda_lay_out(gn_matrix *m, bool nested, void *memory);

/* Device memory for the use of placing, kept for the next weight. What used it before has to be
 * in the stream already. */
gn_status gn_cuda_scratch(gn_ctx *ctx, void **scratch, size_t bytes);
/* Frees it, for when all weights are loaded. */
void gn_cuda_upload_trim(struct gn_cuda *cuda);

/* What quantizing gathers on the device. */
typedef struct gn_cuda_tally {
    double sum;                   /* of the scales */
    int32_t lowest;               /* exponent of the lowest bit that is set in any of them */
    uint32_t arrived;             /* thread blocks that have added theirs */
    unsigned long long first_bad; /* a value at or soon after this one is not finite */
    float offset;                 /* the scales' mean */
} gn_cuda_tally;

/* A weight being quantized. The steps are asynchronous; gn_cuda_quantize_place takes them all. */
typedef struct gn_cuda_quantizer {
    gn_matrix m; /* as laid out; its offset stays in the tally */
    gn_dtype dtype;
    float *absmax; /* in the order of tiles: the weight's own, or scratch when they are nested */
    gn_cuda_tally *tally;
} gn_cuda_quantizer;

/* Bytes of scratch that a quantizer of m needs, a multiple of 256. */
size_t gn_cuda_quantizer_bytes(const gn_matrix *m, bool nested);
/* Sets it up: m is laid out, and gets its tables. */
gn_status gn_cuda_quantizer_begin(gn_ctx *ctx, gn_cuda_quantizer *q, const gn_matrix *m,
                                  gn_dtype dtype, void *scratch);
/* Values [first, first + n) of the flattened weight, which `src` on the device begins with, 16-byte
 * aligned. first is a multiple of gn_cuda_quantizer_step; so is n, except at the end, and then
 * zeros follow them up to the next multiple. */
gn_status gn_cuda_quantizer_encode(gn_ctx *ctx, const gn_cuda_quantizer *q, const void *src,
                                   int64_t first, int64_t n);
int64_t gn_cuda_quantizer_step(const gn_cuda_quantizer *q);
/* Quantizes the scales, when all are there; without double quantization there is nothing to do. */
gn_status gn_cuda_quantizer_end(gn_ctx *ctx, const gn_cuda_quantizer *q);

#endif
