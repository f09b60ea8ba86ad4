/* quantize.cu - quantizing 16- and 32-bit weights on the GPU, while they are loaded.
 *
 * The codes and scales are those of kernels/blockquant.c, to the bit: every step is the same
 * operation in IEEE arithmetic, but for finding the code. Twin: gn_quantize.
 *
 * A tile of 8 rows by a block belongs to a warp, four lanes a row: absmax takes two shuffles, and
 * codes and scales land where the tile wants them. That kernel is meant to be bound by memory, at
 * 2.5 bytes a 16-bit value, which leaves about 14 instructions a value. So codes are not found by
 * 15 comparisons but in a table of 32 cells of [-1, 1], one a lane: cells are narrower than the
 * gaps between thresholds, so that one comparison settles each.
 *
 * Double quantization needs the mean of the scales before the first of them can be quantized, and
 * the CPU's mean is a sum in order, in double. Nearly always that sum is exact: a scale has few
 * bits, and a double 53. Then the order means nothing and thousands of threads add it up; if not,
 * which is checked, one thread adds in the CPU's order. */
#include <cuda_fp16.h>
#include <math.h>

#include "kernels/quant_tables.h"
#include "place.cuh"

enum {
    THREADS = 256,
    WARPS = THREADS / WARP,
    ENCODERS = 6, /* thread blocks a multiprocessor holds of encode_kernel */
    LANE_VALUES = GN_BLOCK / 4,
    NO_BIT = 128, /* above every bit of a float */
};

static __device__ __forceinline__ float to_float(__half x) {
    return __half2float(x);
}

/* fmaxf that keeps NaN */
static __device__ __forceinline__ float max_nan(float a, float b) {
    float m;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
    return m;
}

static __device__ __forceinline__ bool is_bad(float absmax) {
    return (__float_as_uint(absmax) & 0x7fffffffu) >= 0x7f800000u;
}

/* Where block `block` of the file stands in tiles. */
static __device__ __forceinline__ int64_t tile_place(uint32_t block, uint32_t per_row) {
    const uint32_t row = block / per_row, s = block % per_row;
    return ((int64_t)(row / GN_CUDA_TILE_ROWS) * per_row + s) * GN_CUDA_TILE_ROWS +
           row % GN_CUDA_TILE_ROWS;
}

/* ---- codes ---- */

/* A gn_code_rule as kernels take it. */
typedef struct encoder {
    float thresholds[15]; /* an unused one is infinite */
    uint32_t codes[7];    /* of magnitudes above each of 7, in a type with a sign bit */
} encoder;

/* Part of a weight: tiles in a row of the weight's tiles. */
typedef struct tiles {
    uint8_t *codes; /* of the part's first tile */
    float *absmax;
    const void *src; /* whole tiles too */
    int64_t first;   /* the weight's value that src begins with */
    uint32_t count, per_row;
    gn_cuda_tally *tally;
} tiles;

/* v = src[0..8), aligned to 16 bytes and read once. */
template <typename T> static __device__ __forceinline__ void load8(float v[8], const T *src) {
    alignas(16) T values[8];
#pragma unroll
    for (int i = 0; i < (int)(sizeof values / sizeof(uint4)); i++)
        ((uint4 *)values)[i] = __ldcs((const uint4 *)src + i);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = to_float(values[i]);
}

/* The cell of x in [-1, 1], 1/15 wide, in the low five bits. All that matters is that cells ascend
 * with x and hold one threshold at most. */
static __device__ __forceinline__ int cell_of(float x) {
    return __float_as_int(__fmaf_rn(x, 15.0f, 0x1p23f + 16.0f));
}

/* A lane's cell: the threshold in it, or an infinite one, and how many are below. */
typedef struct cell {
    float threshold;
    int below;
} cell;

static __device__ __forceinline__ cell cell_of_lane(const encoder &e, int lane) {
    cell c = {INFINITY, 0};
#pragma unroll
    for (int t = 0; t < 15; t++) {
        const int at = cell_of(e.thresholds[t]) & 31;
        if (e.thresholds[t] == INFINITY) continue;
        c.below += at < lane;
        if (at == lane) c.threshold = e.thresholds[t];
    }
    return c;
}

/* Packed codes of 8 values, in a type whose code is the number of thresholds exceeded, or by
 * magnitude in one with a sign bit. */
template <bool SIGN_BIT>
static __device__ __forceinline__ uint32_t encode8(const float v[8], float inverse, cell mine,
                                                   const encoder &e) {
    uint32_t packed = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float x = __fmul_rn(v[i], inverse);
        const int shift = i / 2 * 8 + (i % 2 ? 0 : 4);
        if (SIGN_BIT) {
            uint32_t code = 0; /* that of no threshold exceeded */
#pragma unroll
            for (int t = 0; t < 7; t++) code = fabsf(x) > e.thresholds[t] ? e.codes[t] : code;
            packed += code << shift;
            if (x < 0.0f) packed += 8u << shift;
        } else {
            const int at = cell_of(x); /* shuffles look at the low five bits */
            packed += __shfl_sync(0xffffffffu, mine.below, at) << shift;
            if (x > __shfl_sync(0xffffffffu, mine.threshold, at)) packed += 1u << shift;
        }
    }
    return packed;
}

/* What stands for v when the reciprocal of absmax is infinite: v times it is an infinity, or NaN
 * for zero, which exceeds no threshold. */
template <bool SIGN_BIT> static __device__ __forceinline__ float sign_of(float v) {
    return v > 0.0f ? 1.0f : v < 0.0f || !SIGN_BIT ? -1.0f : 0.0f;
}

template <typename T, bool SIGN_BIT>
static __global__ __launch_bounds__(THREADS, ENCODERS) void encode_kernel(const tiles part,
                                                                          const encoder e) {
    const int lane = threadIdx.x % WARP, row = lane / 4, quarter = lane % 4;
    const cell mine = SIGN_BIT ? cell{} : cell_of_lane(e, lane);
    const uint32_t warps = gridDim.x * WARPS, S = part.per_row;
    const T *src = (const T *)part.src + 8 * quarter;
    uint32_t *codes = (uint32_t *)part.codes + 8 * row + quarter;
    uint32_t tile = blockIdx.x * WARPS + threadIdx.x / WARP;
    uint32_t t = tile / S, s = tile % S;
    const uint32_t t_step = warps / S, s_step = warps % S;
    pdl_wait();
    pdl_trigger();
    for (; tile < part.count; tile += warps) {
        const uint32_t block = (t * GN_CUDA_TILE_ROWS + row) * S + s;
        /* Each load takes whole sectors: 8 columns a lane of either half of the block. */
        const T *at = src + (int64_t)block * GN_BLOCK;
        float v[LANE_VALUES];
        load8(v, at);
        load8(v + 8, at + GN_BLOCK / 2);
        float absmax = 0.0f;
#pragma unroll
        for (int i = 0; i < LANE_VALUES; i++) absmax = max_nan(absmax, fabsf(v[i]));
        absmax = max_nan(absmax, __shfl_xor_sync(0xffffffffu, absmax, 1));
        absmax = max_nan(absmax, __shfl_xor_sync(0xffffffffu, absmax, 2));
        float inverse = __frcp_rn(absmax);
        if (inverse == INFINITY) {
#pragma unroll
            for (int i = 0; i < LANE_VALUES; i++) v[i] = sign_of<SIGN_BIT>(v[i]);
            inverse = 1.0f;
        }
        uint32_t *to = codes + (int64_t)tile * (GN_CUDA_TILE_BYTES / 4);
        to[0] = encode8<SIGN_BIT>(v, inverse, mine, e);
        to[4] = encode8<SIGN_BIT>(v + 8, inverse, mine, e);
        if (quarter == 0) {
            part.absmax[(int64_t)tile * GN_CUDA_TILE_ROWS + row] = absmax;
            if (is_bad(absmax))
                atomicMin(&part.tally->first_bad,
                          (unsigned long long)part.first + (int64_t)block * GN_BLOCK);
        }
        t += t_step;
        s += s_step;
        if (s >= S) {
            s -= S;
            t++;
        }
    }
}

/* ---- double quantization ---- */

/* Exponent of the lowest bit set in a >= 0. */
static __device__ __forceinline__ int lowest_bit(float a) {
    const uint32_t bits = __float_as_uint(a), exponent = bits >> 23;
    const uint32_t mantissa = (bits & 0x7fffffu) | (exponent ? 0x800000u : 0u);
    return mantissa ? (int)(exponent ? exponent : 1) - 150 + __ffs((int)mantissa) - 1 : NO_BIT;
}

/* The sum of the scales in the file's order, as thread 0 gets it. */
static __device__ double sum_in_order(const float *absmax, int64_t blocks, uint32_t per_row) {
    __shared__ float part[1024];
    double sum = 0.0;
    for (int64_t first = 0; first < blocks; first += 1024) {
        const int n = (int)(blocks - first < 1024 ? blocks - first : 1024);
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += THREADS)
            part[i] = absmax[tile_place((uint32_t)(first + i), per_row)];
        __syncthreads();
        if (threadIdx.x == 0)
            for (int i = 0; i < n; i++) sum += (double)part[i];
    }
    return sum;
}

/* The mean of the scales, as the last thread block to arrive works it out: it leaves the sum as it
 * was found, for the next weight. */
static __global__ __launch_bounds__(THREADS) void mean_kernel(gn_cuda_tally *tally,
                                                              const float *absmax, int64_t blocks,
                                                              int64_t padded, uint32_t per_row) {
    __shared__ double sums[WARPS];
    __shared__ int lowests[WARPS];
    __shared__ bool is_last;
    const int warp = threadIdx.x / WARP;
    pdl_wait();
    pdl_trigger();
    double sum = 0.0;
    int lowest = NO_BIT;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < padded;
         i += (int64_t)gridDim.x * THREADS) {
        const float a = absmax[i];
        sum += (double)a;
        lowest = min(lowest, lowest_bit(a));
    }
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, d);
        lowest = min(lowest, __shfl_xor_sync(0xffffffffu, lowest, d));
    }
    if (threadIdx.x % WARP == 0) {
        sums[warp] = sum;
        lowests[warp] = lowest;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < WARPS; i++) {
            sum += sums[i];
            lowest = min(lowest, lowests[i]);
        }
        atomicAdd(&tally->sum, sum);
        atomicMin(&tally->lowest, lowest);
        __threadfence();
        is_last = atomicAdd(&tally->arrived, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    sum = __ldcg(&tally->sum);
    /* While sums stay below 2^53 of the lowest bits, none was ever rounded. */
    const bool exact = sum < ldexp(1.0, __ldcg(&tally->lowest) + 53);
    if (!exact) sum = sum_in_order(absmax, blocks, per_row);
    __syncthreads(); /* all have read it */
    if (threadIdx.x != 0) return;
    tally->offset = (float)(sum / (double)blocks);
    tally->sum = 0.0;
    tally->lowest = NO_BIT;
    tally->arrived = 0;
}

/* The code of the nearest value of an ascending map of 256, as blockquant.c finds it. */
static __device__ __forceinline__ uint8_t nearest(const float *map, float x) {
    int below = 0;
#pragma unroll
    for (int step = 128; step > 0; step /= 2)
        if (x > map[below + step]) below += step;
    if (below == 255) return 255;
    const float middle = __fmul_rn(__fadd_rn(map[below], map[below + 1]), 0.5f);
    return (uint8_t)(below + ((x > middle) | ((x == middle) & below & 1)));
}

/* One warp a nested block. Scales of blocks that only fill tiles become zero. */
static __global__ __launch_bounds__(THREADS) void scales_kernel(
    uint8_t *scales, float *nested_absmax, const float *absmax, const float *nested_code,
    const gn_cuda_tally *tally, int64_t blocks, int64_t padded, uint32_t per_row) {
    enum { EACH = GN_NESTED_BLOCK / WARP };
    __shared__ float map[256];
    const int lane = threadIdx.x % WARP;
    const int64_t nested = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    pdl_wait();
    pdl_trigger();
    map[threadIdx.x] = nested_code[threadIdx.x];
    __syncthreads();
    if (nested * GN_NESTED_BLOCK >= padded) return;
    const float offset = tally->offset;
    float differences[EACH], max = 0.0f;
    int64_t places[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int64_t block = nested * GN_NESTED_BLOCK + i * WARP + lane;
        places[i] = block < padded ? tile_place((uint32_t)block, per_row) : 0;
        differences[i] = block < blocks ? __fsub_rn(absmax[places[i]], offset) : 0.0f;
        max = fmaxf(max, fabsf(differences[i]));
    }
    max = warp_max(max);
    const float inverse = __frcp_rn(max);
    if (lane == 0) nested_absmax[nested] = max;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int64_t block = nested * GN_NESTED_BLOCK + i * WARP + lane;
        if (block < padded)
            scales[places[i]] =
                block < blocks ? nearest(map, __fmul_rn(differences[i], inverse)) : 0;
    }
}

/* ---- int8 ---- */

/* A row a thread block. The division is in double, where a tie is a tie. */
template <typename T>
static __global__ __launch_bounds__(THREADS) void int8_kernel(int8_t *codes, float *absmax,
                                                              const T *src, int64_t cols,
                                                              int64_t first, gn_cuda_tally *tally) {
    __shared__ float maxima[WARPS];
    const int64_t at = (int64_t)blockIdx.x * cols;
    pdl_wait();
    float max = 0.0f;
    for (int64_t i = threadIdx.x; i < cols; i += THREADS)
        max = max_nan(max, fabsf(to_float(src[at + i])));
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) max = max_nan(max, __shfl_xor_sync(0xffffffffu, max, d));
    if (threadIdx.x % WARP == 0) maxima[threadIdx.x / WARP] = max;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) max = max_nan(max, maxima[i]);
    if (threadIdx.x == 0) absmax[blockIdx.x] = max;
    if (is_bad(max)) {
        if (threadIdx.x == 0) atomicMin(&tally->first_bad, (unsigned long long)(first + at));
        return;
    }
    const double divisor = max > 0.0f ? (double)max : 1.0;
    for (int64_t i = threadIdx.x; i < cols; i += THREADS)
        codes[at + i] = (int8_t)(int)rint(127.0 * (double)to_float(src[at + i]) / divisor);
}

/* ---- the steps ---- */

static size_t round_up(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

size_t gn_cuda_quantizer_bytes(const gn_matrix *m, bool nested) {
    const size_t scales = nested ? (size_t)gn_cuda_blocks_of(m).padded * sizeof(float) : 0;
    return round_up(sizeof(gn_cuda_tally)) + round_up(scales);
}

gn_status gn_cuda_quantizer_begin(gn_ctx *ctx, gn_cuda_quantizer *q, const gn_matrix *m,
                                  gn_dtype dtype, void *scratch) {
    const gn_cuda_tally tally = {0.0, NO_BIT, 0, ~0ull, 0.0f};
    q->m = *m;
    q->dtype = dtype;
    q->tally = (gn_cuda_tally *)scratch;
    q->absmax =
        m->absmax_u8 ? (float *)((char *)scratch + round_up(sizeof tally)) : (float *)m->absmax;
    gn_status status = gn_cuda_upload(ctx, q->tally, &tally, sizeof tally);
    if (!status && m->code)
        status = gn_cuda_upload(ctx, (void *)m->code, gn_code_values(m->qtype), 16 * sizeof(float));
    if (!status && m->nested_code)
        status = gn_cuda_upload(ctx, (void *)m->nested_code, gn_dynamic_map(), 256 * sizeof(float));
    return status;
}

int64_t gn_cuda_quantizer_step(const gn_cuda_quantizer *q) {
    if (q->m.qtype == GN_Q_INT8) return q->m.cols;
    return gn_cuda_blocks_of(&q->m).per_row * GN_CUDA_TILE_ROWS * GN_BLOCK;
}

static encoder encoder_of(gn_qtype type) {
    const gn_code_rule *rule = gn_code_rule_of(type);
    encoder e;
    for (int t = 0; t < 15; t++)
        e.thresholds[t] = t < rule->n_thresholds ? rule->thresholds[t] : INFINITY;
    for (int t = 0; t < 7; t++) e.codes[t] = rule->codes[t + 1];
    return e;
}

template <typename T>
static gn_status encode(gn_ctx *ctx, const gn_cuda_quantizer *q, const void *src, int64_t first,
                        int64_t n) {
    const gn_matrix *m = &q->m;
    if (m->qtype == GN_Q_INT8) {
        const int64_t row = first / m->cols;
        return launch(ctx, int8_kernel<T>, (unsigned)(n / m->cols), THREADS, 0,
                      (int8_t *)m->data + first, q->absmax + row, (const T *)src, m->cols, first,
                      q->tally);
    }
    const int64_t step = gn_cuda_quantizer_step(q), tile = GN_CUDA_TILE_ROWS * GN_BLOCK;
    tiles part = {};
    part.codes = (uint8_t *)m->data + first / tile * GN_CUDA_TILE_BYTES;
    part.absmax = q->absmax + first / tile * GN_CUDA_TILE_ROWS;
    part.src = src;
    part.first = first;
    part.count = (uint32_t)((n + step - 1) / step * (step / tile));
    part.per_row = (uint32_t)(step / tile);
    part.tally = q->tally;
    const unsigned all = (part.count + WARPS - 1) / WARPS, most = ctx->cuda->sms * ENCODERS;
    return launch(
        ctx, gn_code_rule_of(m->qtype)->sign_bit ? encode_kernel<T, true> : encode_kernel<T, false>,
        all < most ? all : most, THREADS, 0, part, encoder_of(m->qtype));
}

gn_status gn_cuda_quantizer_encode(gn_ctx *ctx, const gn_cuda_quantizer *q, const void *src,
                                   int64_t first, int64_t n) {
    if (q->dtype == GN_F16) return encode<__half>(ctx, q, src, first, n);
    GN_FOR_FLOAT(q->dtype, return encode<T>(ctx, q, src, first, n));
}

gn_status gn_cuda_quantizer_end(gn_ctx *ctx, const gn_cuda_quantizer *q) {
    const gn_matrix *m = &q->m;
    if (!m->absmax_u8) return GN_OK;
    const gn_cuda_blocks b = gn_cuda_blocks_of(m);
    const int64_t blocks = b.rows * b.per_row, chunks = (b.padded + THREADS - 1) / THREADS;
    const int64_t nested = (b.padded + GN_NESTED_BLOCK - 1) / GN_NESTED_BLOCK;
    const int64_t most = (int64_t)ctx->cuda->sms * 2;
    const gn_status status =
        launch(ctx, mean_kernel, (unsigned)(chunks < most ? chunks : most), THREADS, 0, q->tally,
               q->absmax, blocks, b.padded, (uint32_t)b.per_row);
    if (status) return status;
    return launch(ctx, scales_kernel, (unsigned)((nested + WARPS - 1) / WARPS), THREADS, 0,
                  (uint8_t *)m->absmax_u8, (float *)m->nested_absmax, q->absmax, m->nested_code,
                  q->tally, blocks, b.padded, (uint32_t)b.per_row);
}

/* ---- quantizing while loading ---- */

size_t gn_cuda_quantize_place_bytes(const gn_ctx *ctx, gn_qtype type, bool double_quant,
                                    int64_t rows, int64_t cols) {
    (void)ctx;
    gn_matrix m = {};
    m.qtype = type;
    m.rows = rows;
    m.cols = cols;
    return gn_cuda_lay_out(&m, double_quant, NULL);
}

/* Says which value it was, of those from `first` on. */
static gn_status refuse(const void *src, gn_dtype dtype, int64_t first, int64_t rows, int64_t cols,
                        gn_error *err) {
    for (int64_t i = first; i < rows * cols; i++) {
        float v;
        gn_widen(&v, (const char *)src + (size_t)i * gn_dtype_size(dtype), dtype, 1);
        if (!isfinite(v))
            return gn_fail(err, GN_EINVAL, "the value at row %lld, column %lld is %f",
                           (long long)(i / cols), (long long)(i % cols), (double)v);
    }
    return gn_fail(err, GN_EINVAL, "a value is not finite");
}

/* Chunk by chunk through scratch memory, which the stream's order makes safe to use again. */
static gn_status quantize(gn_ctx *ctx, const gn_matrix *m, const void *src, gn_dtype dtype,
                          gn_cuda_tally *tally) {
    const size_t size = gn_dtype_size(dtype), head = gn_cuda_quantizer_bytes(m, m->absmax_u8);
    gn_cuda_quantizer q = {};
    q.m = *m;
    const int64_t n = m->rows * m->cols, step = gn_cuda_quantizer_step(&q);
    const int64_t fit = (int64_t)(GN_CUDA_CHUNK / size) / step, chunk = (fit > 0 ? fit : 1) * step;
    void *scratch;
    gn_status status = gn_cuda_scratch(ctx, &scratch, head + (size_t)chunk * size);
    if (!status) status = gn_cuda_quantizer_begin(ctx, &q, m, dtype, scratch);
    char *values = (char *)scratch + head;
    for (int64_t first = 0; first < n && !status; first += chunk) {
        const int64_t count = n - first < chunk ? n - first : chunk;
        const int64_t beyond = (step - count % step) % step; /* to the end of the last tiles */
        status = gn_cuda_upload(ctx, values, (const char *)src + (size_t)first * size,
                                (size_t)count * size);
        if (!status && beyond)
            status = gn_cuda_status(cudaMemsetAsync(values + (size_t)count * size, 0,
                                                    (size_t)beyond * size, gn_cuda_stream(ctx)));
        if (!status) status = gn_cuda_quantizer_encode(ctx, &q, values, first, count);
    }
    if (!status) status = gn_cuda_quantizer_end(ctx, &q);
    return status ? status : gn_ctx_read(ctx, tally, q.tally, sizeof *tally);
}

gn_status gn_cuda_quantize_place(gn_ctx *ctx, gn_matrix *out, gn_qtype type, bool double_quant,
                                 const void *src, gn_dtype dtype, int64_t rows, int64_t cols,
                                 void *memory, gn_error *err) {
    gn_matrix m = {};
    gn_cuda_tally tally;
    m.qtype = type;
    m.dtype = dtype;
    m.rows = rows;
    m.cols = cols;
    gn_cuda_lay_out(&m, double_quant, memory);
    if (gn_cuda_blocks_of(&m).padded > UINT32_MAX)
        return gn_fail(err, GN_ETOOBIG, "a weight of %lld by %lld values", (long long)rows,
                       (long long)cols);
    const gn_status status = quantize(ctx, &m, src, dtype, &tally);
    if (status) return gn_fail(err, status, "%s", gn_status_text(status));
    if (tally.first_bad != ~0ull)
        return refuse(src, dtype, (int64_t)tally.first_bad, rows, cols, err);
    m.offset = double_quant ? tally.offset : 0.0f;
    *out = m;
    return GN_OK;
}
