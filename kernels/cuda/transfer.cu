/* transfer.cu - copies to the device beside the ops.
 *
 * They have a stream of their own and read pinned memory, so that the ops' stream goes on. A
 * transfer begins when the ops launched before it are done, for they may still read what it writes
 * over. Ops that read it are launched when the host has seen its event, and need no other order. */
#include "cuda.h"

/* The batches of steps share the bus's copy engine, which takes turns between copies and not
 * within one: at 50 GB/s a piece holds up a batch for 20 microseconds. */
enum { PIECE = 1 << 20 };

void *gn_cuda_alloc_host(gn_ctx *ctx, size_t bytes) {
    void *memory = NULL;
    if (cudaSetDevice(ctx->cuda->device) != cudaSuccess) return NULL;
    if (cudaMallocHost(&memory, bytes ? bytes : 1) == cudaSuccess) return memory;
    (void)cudaGetLastError(); /* a failed allocation is reported here and nowhere else */
    return NULL;
}

void gn_cuda_free_host(gn_ctx *ctx, void *memory) {
    (void)cudaSetDevice(ctx->cuda->device);
    (void)cudaFreeHost(memory);
}

static gn_status copy(cudaStream_t stream, char *dst, const char *src, size_t bytes) {
    gn_status status = GN_OK;
    for (size_t at = 0; at < bytes && !status; at += PIECE) {
        const size_t left = bytes - at, n = left < PIECE ? left : (size_t)PIECE;
        status =
            gn_cuda_status(cudaMemcpyAsync(dst + at, src + at, n, cudaMemcpyHostToDevice, stream));
    }
    return status;
}

gn_status gn_cuda_transfer_begin(gn_ctx *ctx, void **event, void *dst, const void *src,
                                 size_t bytes) {
    const struct gn_cuda *cuda = ctx->cuda;
    cudaEvent_t done;
    gn_status status = gn_cuda_status(cudaSetDevice(cuda->device));
    if (!status) status = gn_cuda_status(cudaEventCreateWithFlags(&done, cudaEventDisableTiming));
    if (status) return status;
    /* First it says when the ops are done, and then, recorded anew, when the copy is. */
    status = gn_cuda_status(cudaEventRecord(done, cuda->stream));
    if (!status) status = gn_cuda_status(cudaStreamWaitEvent(cuda->transfers, done, 0));
    if (!status) status = copy(cuda->transfers, (char *)dst, (const char *)src, bytes);
    if (!status) status = gn_cuda_status(cudaEventRecord(done, cuda->transfers));
    if (status) {
        (void)cudaStreamSynchronize(cuda->transfers); /* pieces may be on their way */
        (void)cudaEventDestroy(done);
        return status;
    }
    *event = done;
    return GN_OK;
}

gn_status gn_cuda_transfer_poll(gn_ctx *ctx, void *event, bool *ready) {
    (void)ctx;
    const cudaError_t error = cudaEventQuery((cudaEvent_t)event);
    *ready = error == cudaSuccess;
    if (error != cudaErrorNotReady) return gn_cuda_status(error);
    (void)cudaGetLastError(); /* it counts as an error, which the next launch would find */
    return GN_OK;
}

void gn_cuda_transfer_end(gn_ctx *ctx, void *event) {
    (void)ctx;
    (void)cudaEventSynchronize((cudaEvent_t)event);
    (void)cudaEventDestroy((cudaEvent_t)event);
}
