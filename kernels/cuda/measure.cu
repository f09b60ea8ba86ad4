/* measure.cu - what this GPU can do at best, and how fast it quantizes, by its own clock.
 *
 * Products multiply random values: a GPU that multiplies zeros draws less power, and so runs at
 * clocks that it cannot hold with real ones. */
#include <math.h>

#include "operands.h"
#include "place.cuh"

enum { THREADS = 256, READS = 8, ROUNDS = 10, EDGE = 8192, EDGE_F32 = 4096 };
static const size_t MOST_BYTES = (size_t)4 << 30, LEAST_BYTES = (size_t)512 << 20;

/* What a measurement works on. */
typedef struct subject {
    char *array;
    size_t bytes;
    uint32_t *sink;
    const gn_cuda_quantizer *quantizer;
} subject;

typedef gn_status measured(gn_ctx *ctx, const subject *s);

/* Seconds of the fastest of some runs: one that nobody interrupted. */
static gn_status time_best(gn_ctx *ctx, measured *run, const subject *s, double *seconds) {
    cudaEvent_t begin = NULL, end = NULL;
    gn_status status = gn_cuda_status(cudaEventCreate(&begin));
    if (!status) status = gn_cuda_status(cudaEventCreate(&end));
    *seconds = INFINITY;
    for (int i = 0; i < ROUNDS && !status; i++) {
        float ms = 0;
        status = gn_cuda_status(cudaEventRecord(begin, gn_cuda_stream(ctx)));
        if (!status) status = run(ctx, s);
        if (!status) status = gn_cuda_status(cudaEventRecord(end, gn_cuda_stream(ctx)));
        if (!status) status = gn_cuda_status(cudaEventSynchronize(end));
        if (!status) status = gn_cuda_status(cudaEventElapsedTime(&ms, begin, end));
        *seconds = fmin(*seconds, 1e-3 * (double)ms);
    }
    if (begin) (void)cudaEventDestroy(begin);
    if (end) (void)cudaEventDestroy(end);
    return status;
}

/* ---- memory ---- */

/* Pairs of bfloat16 of random signs and magnitudes of 0.5 to 1; as float32, of 0.5 to 0.53. */
static __global__ void __launch_bounds__(THREADS) fill_kernel(uint32_t *to, int64_t n) {
    pdl_wait();
    const int64_t step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += step) {
        uint32_t bits = (uint32_t)i * 0x9e3779b9u;
        bits = (bits ^ bits >> 16) * 0x85ebca6bu;
        bits = (bits ^ bits >> 13) * 0xc2b2ae35u;
        to[i] = ((bits ^ bits >> 16) & 0x807f807fu) | 0x3f003f00u;
    }
}

static gn_status fill(gn_ctx *ctx, void *to, size_t bytes) {
    return launch(ctx, fill_kernel, dim3((unsigned)ctx->cuda->sms * 8), dim3(THREADS), 0,
                  (uint32_t *)to, (int64_t)(bytes / sizeof(uint32_t)));
}

/* n is a multiple of what a block reads in one go. */
static __global__ void __launch_bounds__(THREADS)
    read_kernel(uint32_t *sink, const uint4 *data, int64_t n) {
    const int64_t step = (int64_t)gridDim.x * THREADS * READS;
    uint32_t sum = 0;
    pdl_wait();
    for (int64_t at = (int64_t)blockIdx.x * THREADS * READS; at < n; at += step) {
        uint4 v[READS];
#pragma unroll
        for (int i = 0; i < READS; i++) v[i] = __ldcs(data + at + i * THREADS + threadIdx.x);
#pragma unroll
        for (int i = 0; i < READS; i++) sum += v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    }
    if (sum == 1) *sink = sum; /* so that reading is not left out */
}

static gn_status read_all(gn_ctx *ctx, const subject *s) {
    return launch(ctx, read_kernel, dim3((unsigned)ctx->cuda->sms * 8), dim3(THREADS), 0, s->sink,
                  (const uint4 *)s->array, (int64_t)(s->bytes / sizeof(uint4)));
}

static gn_status copy_half(gn_ctx *ctx, const subject *s) {
    return gn_ctx_copy(ctx, s->array + s->bytes / 2, s->array, s->bytes / 2);
}

/* ---- products ---- */

static int edge_of(const gn_ctx *ctx) {
    return ctx->compute == GN_BF16 ? EDGE : EDGE_F32;
}

static gn_status multiply(gn_ctx *ctx, const subject *s) {
    const float one = 1, zero = 0;
    const int n = edge_of(ctx);
    const cudaDataType_t type = ctx->compute == GN_BF16 ? CUDA_R_16BF : CUDA_R_32F;
    const size_t bytes = (size_t)n * (size_t)n * gn_dtype_size(ctx->compute);
    const cublasStatus_t status =
        cublasGemmEx(ctx->cuda->blas, CUBLAS_OP_T, CUBLAS_OP_N, n, n, n, &one, s->array, type, n,
                     s->array + bytes, type, n, &zero, s->array + 2 * bytes, type, n,
                     CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    return status == CUBLAS_STATUS_SUCCESS ? GN_OK : GN_EDEVICE;
}

/* ---- rates ---- */

static gn_status measure(gn_ctx *ctx, const subject *s, gn_rates *rates) {
    double reading, copying, multiplying;
    gn_status status = fill(ctx, s->array, s->bytes);
    if (!status) status = time_best(ctx, read_all, s, &reading);
    if (!status) status = time_best(ctx, copy_half, s, &copying);
    if (!status) status = time_best(ctx, multiply, s, &multiplying);
    if (status) return status;
    rates->read_bytes = (double)s->bytes / reading;
    rates->copy_bytes = (double)s->bytes / copying;
    rates->flop = 2 * pow(edge_of(ctx), 3) / multiplying;
    return GN_OK;
}

gn_status gn_cuda_measure_rates(gn_ctx *ctx, gn_rates *rates) {
    subject s = {};
    s.sink = (uint32_t *)gn_ctx_alloc(ctx, sizeof *s.sink);
    for (s.bytes = MOST_BYTES; s.bytes >= LEAST_BYTES && !s.array; s.bytes /= 2)
        s.array = (char *)gn_ctx_alloc(ctx, s.bytes);
    s.bytes *= 2; /* the loop's last step */
    const gn_status status = s.sink && s.array ? measure(ctx, &s, rates) : GN_ENOMEM;
    gn_ctx_free(ctx, s.array);
    gn_ctx_free(ctx, s.sink);
    return status;
}

/* ---- quantizing ---- */

static gn_status quantize(gn_ctx *ctx, const subject *s) {
    const gn_matrix *m = &s->quantizer->m;
    const gn_status status =
        gn_cuda_quantizer_encode(ctx, s->quantizer, s->array, 0, m->rows * m->cols);
    return status ? status : gn_cuda_quantizer_end(ctx, s->quantizer);
}

/* Over the values that it came from. */
static gn_status dequantize(gn_ctx *ctx, const subject *s) {
    const gn_matrix *m = &s->quantizer->m;
    const gn_cuda_region all = {0, m->rows, 0, m->cols};
    return gn_cuda_dequantize(ctx, m, &all, s->array, m->cols, GN_BF16);
}

gn_status gn_cuda_measure_quantize(gn_ctx *ctx, gn_qtype type, bool double_quant, int64_t rows,
                                   int64_t cols, double *quantize_s, double *dequantize_s) {
    gn_cuda_quantizer q = {};
    q.m.qtype = type;
    q.m.dtype = GN_BF16;
    q.m.rows = rows;
    q.m.cols = cols;
    if (gn_cuda_blocks_of(&q.m).padded > UINT32_MAX) return GN_ETOOBIG;
    const int64_t step = gn_cuda_quantizer_step(&q);
    subject s = {};
    s.bytes = (size_t)((rows * cols + step - 1) / step * step) * sizeof(bf16);
    s.array = (char *)gn_ctx_alloc(ctx, s.bytes);
    s.quantizer = &q;
    void *memory = gn_ctx_alloc(ctx, gn_cuda_lay_out(&q.m, double_quant, NULL));
    if (memory) gn_cuda_lay_out(&q.m, double_quant, memory);
    void *scratch = gn_ctx_alloc(ctx, gn_cuda_quantizer_bytes(&q.m, double_quant));
    gn_status status = s.array && memory && scratch ? GN_OK : GN_ENOMEM;
    if (!status) status = fill(ctx, s.array, s.bytes);
    if (!status) status = gn_cuda_quantizer_begin(ctx, &q, &q.m, GN_BF16, scratch);
    if (!status) status = time_best(ctx, quantize, &s, quantize_s);
    if (!status) status = time_best(ctx, dequantize, &s, dequantize_s);
    gn_ctx_free(ctx, scratch);
    gn_ctx_free(ctx, memory);
    gn_ctx_free(ctx, s.array);
    return status;
}
