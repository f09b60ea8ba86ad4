/* backend.cu - opening a GPU: its stream, its memory, its table of ops. */
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>

#include "place.cuh"

enum { BLAS_WORKSPACE = 32 << 20 };

gn_status gn_cuda_status(cudaError_t error) {
    if (error == cudaSuccess) return GN_OK;
    return error == cudaErrorMemoryAllocation ? GN_ENOMEM : GN_EDEVICE;
}

/* ---- memory ---- */

static void *cuda_alloc(gn_ctx *ctx, size_t bytes) {
    void *memory = NULL;
    if (cudaSetDevice(ctx->cuda->device) != cudaSuccess) return NULL;
    if (cudaMalloc(&memory, bytes ? bytes : 1) == cudaSuccess) return memory;
    (void)cudaGetLastError(); /* a failed allocation is reported here and nowhere else */
    return NULL;
}

static void cuda_free(gn_ctx *ctx, void *memory) {
    (void)cudaStreamSynchronize(ctx->cuda->stream);
    if (memory == ctx->workspace) gn_cuda_graphs_close(ctx->cuda); /* they know its address */
    (void)cudaFree(memory);
}

static gn_status cuda_write(gn_ctx *ctx, void *dst, const void *src, size_t bytes) {
    return gn_cuda_upload(ctx, dst, src, bytes);
}

static gn_status cuda_read(gn_ctx *ctx, void *dst, const void *src, size_t bytes) {
    const gn_status status =
        gn_cuda_status(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, ctx->cuda->stream));
    return status ? status : gn_cuda_status(cudaStreamSynchronize(ctx->cuda->stream));
}

static gn_status cuda_copy(gn_ctx *ctx, void *dst, const void *src, size_t bytes) {
    return gn_cuda_status(
        cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, ctx->cuda->stream));
}

static gn_status cuda_zero(gn_ctx *ctx, void *dst, size_t bytes) {
    return gn_cuda_status(cudaMemsetAsync(dst, 0, bytes, ctx->cuda->stream));
}

static gn_status cuda_wait(gn_ctx *ctx) {
    return gn_cuda_status(cudaStreamSynchronize(ctx->cuda->stream));
}

static void cuda_trim(gn_ctx *ctx) {
    gn_cuda_upload_trim(ctx->cuda);
}

static gn_status cuda_read_memory(gn_ctx *ctx, gn_ctx_memory *memory) {
    size_t available = 0, total = 0;
    cudaError_t error = cudaSetDevice(ctx->cuda->device);
    if (error == cudaSuccess) error = cudaMemGetInfo(&available, &total);
    *memory = {(int64_t)available, (int64_t)total, ctx->cuda->opened};
    return error == cudaSuccess ? GN_OK : GN_EIO;
}

/* ---- open and close ---- */

static void cuda_close(gn_ctx *ctx) {
    struct gn_cuda *cuda = ctx->cuda;
    if (!cuda) return;
    if (cuda->stream) (void)cudaStreamSynchronize(cuda->stream);
    gn_cuda_graphs_close(cuda);
    gn_cuda_stage_close(cuda);
    gn_cuda_upload_close(cuda);
    if (cuda->blas) (void)cublasDestroy(cuda->blas);
    (void)cudaFree(cuda->blas_workspace);
    (void)cudaFree(cuda->counters);
    if (cuda->stream) (void)cudaStreamDestroy(cuda->stream);
    if (cuda->transfers) (void)cudaStreamDestroy(cuda->transfers);
    free(cuda);
    ctx->cuda = NULL;
}

static const gn_backend cuda_backend = {
#define X(name, parameters) .name = gn_cuda_##name,
    GN_BACKEND_OPS(X)
#undef X
        .linear_workspace = gn_cuda_linear_workspace,
    .attention_workspace = gn_cuda_attention_workspace,
    .linear_bwd_workspace = gn_cuda_linear_bwd_workspace,
    .attention_train_workspace = gn_cuda_attention_train_workspace,
    .cross_entropy_workspace = gn_cuda_cross_entropy_workspace,
    .alloc = cuda_alloc,
    .free = cuda_free,
    .write = cuda_write,
    .read = cuda_read,
    .copy = cuda_copy,
    .zero = cuda_zero,
    .wait = cuda_wait,
    .alloc_host = gn_cuda_alloc_host,
    .free_host = gn_cuda_free_host,
    .upload_begin = gn_cuda_transfer_begin,
    .upload_poll = gn_cuda_transfer_poll,
    .upload_end = gn_cuda_transfer_end,
    .trim = cuda_trim,
    .replay = gn_cuda_replay,
    .stage_reserve = gn_cuda_stage_reserve,
    .stage = gn_cuda_stage,
    .place_bytes = gn_cuda_place_bytes,
    .place = gn_cuda_place,
    .quantize_place_bytes = gn_cuda_quantize_place_bytes,
    .quantize_place = gn_cuda_quantize_place,
    .measure_rates = gn_cuda_measure_rates,
    .measure_quantize = gn_cuda_measure_quantize,
    .read_memory = cuda_read_memory,
    .close = cuda_close,
};

/* What every op finds in place: a stream that cuBLAS uses too, with working memory of its own so
 * that it may be recorded, and counters at zero. */
static gn_status open_parts(struct gn_cuda *cuda) {
    gn_status status =
        gn_cuda_status(cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking));
    if (!status)
        status = gn_cuda_status(cudaStreamCreateWithFlags(&cuda->transfers, cudaStreamNonBlocking));
    if (!status) status = gn_cuda_status(cudaMalloc(&cuda->blas_workspace, BLAS_WORKSPACE));
    if (!status)
        status = gn_cuda_status(
            cudaMalloc((void **)&cuda->counters, GN_CUDA_COUNTERS * sizeof *cuda->counters));
    if (!status)
        status = gn_cuda_status(cudaMemsetAsync(
            cuda->counters, 0, GN_CUDA_COUNTERS * sizeof *cuda->counters, cuda->stream));
    if (status) return status;
    gn_cuda_linear_mma_open(cuda);
    if (cublasCreate(&cuda->blas) != CUBLAS_STATUS_SUCCESS ||
        cublasSetStream(cuda->blas, cuda->stream) != CUBLAS_STATUS_SUCCESS ||
        cublasSetWorkspace(cuda->blas, cuda->blas_workspace, BLAS_WORKSPACE) !=
            CUBLAS_STATUS_SUCCESS)
        return GN_EDEVICE;
    return gn_cuda_upload_open(cuda);
}

gn_status gn_cuda_open(gn_ctx *ctx, int index, bool auto_compute, gn_error *err) {
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
        int driver = 0;
        const bool missing = cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0;
        return gn_fail(err, GN_EDEVICE, "device cuda:%d: %s; use \"cpu\" or \"auto\"", index,
                       missing ? "this machine has no NVIDIA driver" : cudaGetErrorString(error));
    }
    if (index >= count)
        return gn_fail(err, GN_EDEVICE, "device cuda:%d: this machine has %d GPU%s, from cuda:0 on",
                       index, count, count == 1 ? "" : "s");
    cudaDeviceProp properties;
    error = cudaSetDevice(index);
    if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, index);
    if (error != cudaSuccess)
        return gn_fail(err, GN_EDEVICE, "device cuda:%d: %s", index, cudaGetErrorString(error));
    if (properties.major < 8)
        return gn_fail(err, GN_EDEVICE,
                       "device cuda:%d, %s, has compute capability %d.%d; 8.0 or later is needed",
                       index, properties.name, properties.major, properties.minor);
    struct gn_cuda *cuda = (struct gn_cuda *)calloc(1, sizeof *cuda);
    if (!cuda) return gn_fail(err, GN_ENOMEM, "out of memory opening a context");
    cuda->device = index;
    cuda->sms = properties.multiProcessorCount;
    cuda->shared_limit = properties.sharedMemPerBlockOptin;
    cuda->shared_reserved = properties.reservedSharedMemPerBlock;
    cuda->overlaps = properties.major >= 9;
    ctx->cuda = cuda;
    ctx->backend = &cuda_backend;
    if (auto_compute) ctx->compute = GN_BF16;
    snprintf(ctx->device, sizeof ctx->device, "cuda:%d (%.40s)", index, properties.name);
    gn_ctx_memory memory;
    gn_status status = open_parts(cuda);
    if (!status) status = cuda_read_memory(ctx, &memory);
    if (status)
        return gn_fail(err, status, "device cuda:%d: cannot set up %s: %s", index, properties.name,
                       gn_status_text(status));
    cuda->opened = memory.total - memory.free;
    return GN_OK;
}
