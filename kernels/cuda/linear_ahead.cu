/* linear_ahead.cu - weights that are dequantized before the turn of their product.
 *
 * Dequantizing is bound by memory, a product of many rows by the tensor cores: together they take
 * little longer than the product alone. A stream of its own writes the weights of the calls that
 * follow into a ring, on a few SMs that the products are told to leave (cuBLAS's blocks fill an
 * SM's registers, so that the two cannot share one). With s of S SMs it is as fast as the products
 * when s : S - s is the work on a weight of one to that of the other, which depends on the rows
 * alone; where a call is short and the next one's weights are large, the ring evens it out.
 *
 * Both streams meet twice a call: the ring's waits until the product that used the memory it takes
 * next is over, and the product until its weights are there. All of it may be recorded. */
#include "linear_ahead.h"

#include <stdlib.h>

#include "linear.cuh"
#include "operands.h"

/* Of an H200: its SMs multiply at 5.9 TFLOP/s and write at some 100 GB/s each. */
enum { EVEN_ROWS = 59 };

gn_status gn_cuda_ahead_open(struct gn_cuda *cuda) {
    gn_cuda_ahead *a = (gn_cuda_ahead *)calloc(1, sizeof *a);
    if (!a) return GN_ENOMEM;
    cuda->ahead = a;
    a->even_rows = EVEN_ROWS;
    int least, most; /* priority */
    gn_status status = gn_cuda_status(cudaDeviceGetStreamPriorityRange(&least, &most));
    if (!status)
        status =
            gn_cuda_status(cudaStreamCreateWithPriority(&a->stream, cudaStreamNonBlocking, most));
    if (!status)
        status = gn_cuda_status(cudaEventCreateWithFlags(&a->begin, cudaEventDisableTiming));
    for (int i = 0; i < GN_CUDA_AHEAD_ITEMS && !status; i++)
        status =
            gn_cuda_status(cudaEventCreateWithFlags(&a->items[i].done, cudaEventDisableTiming));
    return status;
}

void gn_cuda_ahead_close(struct gn_cuda *cuda) {
    gn_cuda_ahead *a = cuda->ahead;
    if (!a) return;
    if (a->stream) (void)cudaStreamSynchronize(a->stream);
    for (int i = 0; i < GN_CUDA_AHEAD_ITEMS; i++)
        if (a->items[i].done) (void)cudaEventDestroy(a->items[i].done);
    if (a->begin) (void)cudaEventDestroy(a->begin);
    if (a->stream) (void)cudaStreamDestroy(a->stream);
    (void)cudaFree(a->memory);
    free(a);
    cuda->ahead = NULL;
}

/* ---- room ---- */

size_t gn_cuda_linear_ahead_bytes(const gn_ctx *ctx, int64_t rows, int64_t values) {
    if (ctx->compute != GN_BF16 || rows <= GN_CUDA_MMA_ROWS) return 0;
    return align_up((size_t)values * sizeof(bf16));
}

gn_status gn_cuda_linear_reserve_ahead(gn_ctx *ctx, int64_t rows, int64_t values) {
    gn_cuda_ahead *a = ctx->cuda->ahead;
    if (values > (int64_t)(PTRDIFF_MAX / sizeof(bf16))) return GN_ENOMEM;
    const size_t bytes = gn_cuda_linear_ahead_bytes(ctx, rows, values);
    if (bytes <= a->bytes) return GN_OK;
    char *memory = (char *)gn_ctx_alloc(ctx, bytes); /* first, so that a failure changes nothing */
    if (!memory) return GN_ENOMEM;
    gn_cuda_graphs_close(ctx->cuda); /* they know its address */
    gn_ctx_free(ctx, a->memory);
    a->memory = memory;
    a->bytes = bytes;
    return GN_OK;
}

/* ---- items ---- */

static gn_cuda_ahead_item *item_at(gn_cuda_ahead *a, int i) {
    return &a->items[(a->first + i) % GN_CUDA_AHEAD_ITEMS];
}

gn_status gn_cuda_ahead_drop(struct gn_cuda *cuda) {
    gn_cuda_ahead *a = cuda->ahead;
    const bool pending = a->n > (a->in_use ? 1 : 0);
    const cudaEvent_t last = item_at(a, a->n + GN_CUDA_AHEAD_ITEMS - 1)->done;
    a->first = a->n = 0;
    a->in_use = false;
    return pending ? gn_cuda_status(cudaStreamWaitEvent(cuda->stream, last, 0)) : GN_OK;
}

/* Behind the last item, or at the beginning again. */
static bool find_room(gn_cuda_ahead *a, size_t bytes, size_t *at) {
    *at = 0;
    if (a->n == 0) return bytes <= a->bytes;
    const size_t begin = item_at(a, 0)->at;
    const gn_cuda_ahead_item *last = item_at(a, a->n - 1);
    const size_t end = last->at + last->bytes;
    const bool wraps = last->at < begin;
    if (!wraps && bytes > a->bytes - end) return bytes <= begin;
    *at = end;
    return bytes <= (wraps ? begin : a->bytes) - end;
}

/* Adds one for the weights, if they are in tiles and there is room; NULL: not so. */
static gn_cuda_ahead_item *add_item(gn_cuda_ahead *a, const gn_linear_weights *w, int64_t ld) {
    int64_t rows = 0, values;
    for (int i = 0; i < w->n; i++) {
        if (!gn_cuda_is_tiled(w->w[i])) return NULL;
        rows += w->w[i]->rows;
    }
    size_t at;
    if (a->n == GN_CUDA_AHEAD_ITEMS || __builtin_mul_overflow(rows, ld, &values) ||
        values > PTRDIFF_MAX / (int64_t)sizeof(bf16))
        return NULL;
    const size_t bytes = align_up((size_t)values * sizeof(bf16));
    if (!find_room(a, bytes, &at)) return NULL;
    gn_cuda_ahead_item *item = item_at(a, a->n++);
    item->n = w->n;
    for (int i = 0; i < w->n; i++) item->data[i] = w->w[i]->data;
    item->ld = ld;
    item->at = at;
    item->bytes = bytes;
    return item;
}

static bool is_of(const gn_cuda_ahead_item *item, const gn_linear_weights *w, int64_t ld) {
    bool same = item->n == w->n && item->ld == ld;
    for (int i = 0; same && i < w->n; i++) same = item->data[i] == w->w[i]->data;
    return same;
}

/* ---- calls ---- */

gn_status gn_cuda_ahead_take(gn_ctx *ctx, const gn_linear_args *args, int64_t ld, const void **w) {
    gn_cuda_ahead *a = ctx->cuda->ahead;
    gn_linear_weights weights = {};
    weights.n = args->n_parts;
    for (int i = 0; i < args->n_parts; i++) weights.w[i] = args->part[i].w;
    *w = NULL;
    if (!a->memory) return GN_OK;
    if (a->in_use) { /* the call before is over where this one begins */
        a->first = (a->first + 1) % GN_CUDA_AHEAD_ITEMS;
        a->n--;
        a->in_use = false;
    }
    gn_status status;
    const gn_cuda_ahead_item *item = item_at(a, 0);
    if (a->n > 0 && is_of(item, &weights, ld)) {
        status = gn_cuda_status(cudaStreamWaitEvent(ctx->cuda->stream, item->done, 0));
    } else {
        status = gn_cuda_ahead_drop(ctx->cuda);
        item = add_item(a, &weights, ld);
        if (status || !item) return status;
        status = gn_cuda_dequantize_product(ctx, &weights, a->memory + item->at, ld, NULL);
    }
    a->in_use = true;
    *w = a->memory + item->at;
    return status;
}

static int sms_of(const gn_ctx *ctx, int64_t T) {
    const int64_t S = ctx->cuda->sms, even = ctx->cuda->ahead->even_rows;
    const int64_t sms = (S * even + (T + even) / 2) / (T + even);
    return (int)(sms < 2 ? 2 : (sms + 1) / 2 * 2);
}

gn_status gn_cuda_ahead_begin(gn_ctx *ctx, const gn_linear_args *args, int64_t wider) {
    gn_cuda_ahead *a = ctx->cuda->ahead;
    gn_cuda_beside beside = {};
    beside.stream = a->stream;
    beside.sms = sms_of(ctx, args->x.shape[0]);
    bool begun = false;
    gn_status status = GN_OK;
    for (int i = 0; a->in_use && i < args->n_next && !status; i++) {
        const gn_linear_weights *next = &args->next[i];
        const int64_t ld = next->w[0]->cols + wider;
        if (i + 1 < a->n && is_of(item_at(a, i + 1), next, ld)) continue;
        if (i + 1 < a->n) break; /* other calls were promised */
        const gn_cuda_ahead_item *item = add_item(a, next, ld);
        if (!item) break;
        if (!begun) {
            status = gn_cuda_status(cudaEventRecord(a->begin, ctx->cuda->stream));
            if (!status) status = gn_cuda_status(cudaStreamWaitEvent(a->stream, a->begin, 0));
            begun = true;
        }
        if (!status)
            status = gn_cuda_dequantize_product(ctx, next, a->memory + item->at, ld, &beside);
        if (!status) status = gn_cuda_status(cudaEventRecord(item->done, a->stream));
        if (status) a->n--;
    }
    return status;
}

int gn_cuda_ahead_sms_left(const gn_ctx *ctx, int64_t T) {
    const gn_cuda_ahead *a = ctx->cuda->ahead;
    return a->n > (a->in_use ? 1 : 0) ? ctx->cuda->sms - sms_of(ctx, T) : 0;
}
