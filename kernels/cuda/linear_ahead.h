/* linear_ahead.h - weights that are dequantized before the turn of their product. */
#ifndef GN_CUDA_LINEAR_AHEAD_H
#define GN_CUDA_LINEAR_AHEAD_H

#include "cuda.h"

enum { GN_CUDA_AHEAD_ITEMS = 4 };

/* The weights of a call, one below the other in bfloat16, rows `ld` apart. */
typedef struct gn_cuda_ahead_item {
    int n;
    const void *data[GN_MAX_PARTS]; /* what they were made of */
    int64_t ld;
    size_t at, bytes;
    cudaEvent_t done;
} gn_cuda_ahead_item;

/* A ring of memory and the items in it, in the order of their calls. */
typedef struct gn_cuda_ahead {
    cudaStream_t stream;
    cudaEvent_t begin; /* everything that used what is free now is over */
    char *memory;
    size_t bytes;
    int first, n;
    bool in_use;   /* the first one, by the last call */
    int even_rows; /* so many rows of x take as long to multiply by a weight as dequantizing it */
    gn_cuda_ahead_item items[GN_CUDA_AHEAD_ITEMS];
} gn_cuda_ahead;

gn_status gn_cuda_ahead_open(struct gn_cuda *cuda);
void gn_cuda_ahead_close(struct gn_cuda *cuda); /* accepts one that is not open */

/* Forgets all items. What is still written to the ring is over for later ops. */
gn_status gn_cuda_ahead_drop(struct gn_cuda *cuda);

/* *w: the weights of a call that is about to run, all parts one below the other; NULL: they are not
 * in tiles, or there is no room. Items that come before them are dropped. */
gn_status gn_cuda_ahead_take(gn_ctx *ctx, const gn_linear_args *args, int64_t ld, const void **w);
/* Begins with args->next, of calls of as many rows whose weights are made wider by as much. */
gn_status gn_cuda_ahead_begin(gn_ctx *ctx, const gn_linear_args *args, int64_t wider);
/* SMs for a product of T rows: those that the ring's work leaves; 0: all. */
int gn_cuda_ahead_sms_left(const gn_ctx *ctx, int64_t T);

#endif
