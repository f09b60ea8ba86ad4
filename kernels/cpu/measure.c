/* measure.c - what this machine can do at best: memory reads, copies and multiply-adds.
 *
 * How fast memory is may double from one minute to the next where others share it: who compares
 * with it measures it again beside every round. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* The best of several short rounds is one that nobody interrupted. */
enum { MEMORY_ROUNDS = 5, FLOP_ROUNDS = 300, ITERATIONS = 100000, QUANTIZE_ROUNDS = 5 };
static const size_t ARRAY_BYTES = (size_t)1 << 30;

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- memory ---- */

typedef uint64_t words __attribute__((vector_size(16)));

static uint64_t read_all(const void *data, size_t bytes) {
    const words *p = data, *end = p + bytes / sizeof *p / 8 * 8;
    words sum[8] = {{0}};
    for (; p < end; p += 8)
        for (int i = 0; i < 8; i++) sum[i] ^= p[i];
    for (int i = 1; i < 8; i++) sum[0] ^= sum[i];
    return sum[0][0] ^ sum[0][1];
}

static double read_once(const char *array, int threads, volatile uint64_t *sink) {
    const size_t share = ARRAY_BYTES / (size_t)threads / 128 * 128;
    const double begin = seconds_now();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < threads; i++) {
        const uint64_t sum = read_all(array + (size_t)i * share, share);
#pragma omp atomic
        *sink ^= sum;
    }
    return (double)(share * (size_t)threads) / (seconds_now() - begin);
}

static double copy_once(char *array, int threads) {
    const size_t half = ARRAY_BYTES / 2, share = half / (size_t)threads / 128 * 128;
    const double begin = seconds_now();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < threads; i++)
        memcpy(array + half + (size_t)i * share, array + (size_t)i * share, share);
    return 2.0 * (double)(share * (size_t)threads) / (seconds_now() - begin);
}

static gn_status measure_memory(gn_rates *rates, int threads) {
    char *array =
        mmap(NULL, ARRAY_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (array == MAP_FAILED) return GN_ENOMEM;
    madvise(array, ARRAY_BYTES, MADV_HUGEPAGE);
    memset(array, 1, ARRAY_BYTES); /* pages exist once they are written */
    volatile uint64_t sink = 0;
    for (int i = 0; i < MEMORY_ROUNDS; i++) {
        rates->read_bytes = fmax(rates->read_bytes, read_once(array, threads, &sink));
        rates->copy_bytes = fmax(rates->copy_bytes, copy_once(array, threads));
    }
    munmap(array, ARRAY_BYTES);
    return GN_OK;
}

/* ---- multiply-adds ---- */

#if defined(__x86_64__)
/* Twelve independent sums, enough to cover the latency of two units. They are named one by one,
 * for an array of them would live in memory, and the empty asm keeps each in its register. */
#define EACH_SUM(X, arg)                                                                           \
    X(0, arg)                                                                                      \
    X(1, arg)                                                                                      \
    X(2, arg)                                                                                      \
    X(3, arg) X(4, arg) X(5, arg) X(6, arg) X(7, arg) X(8, arg) X(9, arg) X(10, arg) X(11, arg)
#define DECLARE(i, type) type s##i = {0};
#define ADVANCE(i, step)                                                                           \
    s##i = step(s##i);                                                                             \
    __asm__ volatile("" : "+v"(s##i));

/* Returns the operations done. */
#define CHAINS(name, isa, type, step, flop)                                                        \
    __attribute__((target(isa))) static double name(void) {                                        \
        EACH_SUM(DECLARE, type)                                                                    \
        for (int n = 0; n < ITERATIONS; n++) {                                                     \
            EACH_SUM(ADVANCE, step)                                                                \
        }                                                                                          \
        return (double)ITERATIONS * 12 * (flop);                                                   \
    }
#define STEP_AVX2(s)   _mm256_fmadd_ps(s, s, s)
#define STEP_AVX512(s) _mm512_fmadd_ps(s, s, s)
#define STEP_BF16(s)   _mm512_dpbf16_ps(s, (__m512bh)s, (__m512bh)s)

CHAINS(chains_avx2, "avx2,fma", __m256, STEP_AVX2, 16)
CHAINS(chains_avx512, "avx512f", __m512, STEP_AVX512, 32)
CHAINS(chains_bf16, "avx512f,avx512bf16", __m512, STEP_BF16, 64)
#endif

typedef double (*chains)(void);

static chains widest_chains(const gn_ctx *ctx) {
#if defined(__x86_64__)
    switch (gn_ctx_isa(ctx)) {
    case GN_ISA_AVX512BF16: return gn_ctx_compute(ctx) == GN_BF16 ? chains_bf16 : chains_avx512;
    case GN_ISA_AVX512: return chains_avx512;
    case GN_ISA_AVX2: return chains_avx2;
    case GN_ISA_REFERENCE: break;
    }
#else
    (void)ctx;
#endif
    return NULL;
}

/* Cores do not share arithmetic units, so each thread's best round counts by itself. */
static double measure_flop(const gn_ctx *ctx) {
    const chains run = widest_chains(ctx);
    const int threads = gn_ctx_threads(ctx);
    double sum = 0;
    if (!run) return 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : sum)
    for (int i = 0; i < threads; i++) {
        double best = 0;
        for (int round = 0; round < FLOP_ROUNDS; round++) {
            const double begin = seconds_now();
            const double flop = run();
            best = fmax(best, flop / (seconds_now() - begin));
        }
        sum += best;
    }
    return sum;
}

gn_status gn_cpu_measure_rates(gn_ctx *ctx, gn_rates *rates) {
    *rates = (gn_rates){.flop = measure_flop(ctx)};
    return measure_memory(rates, gn_ctx_threads(ctx));
}

/* ---- quantizing ---- */

static void *take(char **at, size_t bytes) {
    void *piece = *at;
    *at += (bytes + 63) / 64 * 64;
    return piece;
}

gn_status gn_cpu_measure_quantize(gn_ctx *ctx, gn_qtype type, bool double_quant, int64_t rows,
                                  int64_t cols, double *quantize, double *dequantize) {
    const gn_quant_sizes sizes = gn_quant_sizes_of(type, double_quant, rows, cols);
    const size_t absmax = gn_quant_sizes_of(type, false, rows, cols).absmax;
    const size_t values = (size_t)(rows * cols);
    uint16_t *src = malloc(values * sizeof *src);
    char *memory = malloc(sizes.data + absmax + sizes.absmax_u8 + sizes.nested_absmax + 4 * 64);
    gn_status status = src && memory ? GN_OK : GN_ENOMEM;
    if (!status) {
        char *at = memory;
        gn_quant_out out = {.data = take(&at, sizes.data), .absmax = take(&at, absmax)};
        if (double_quant) {
            out.absmax_u8 = take(&at, sizes.absmax_u8);
            out.nested_absmax = take(&at, sizes.nested_absmax);
        }
        uint32_t bits = 1;
        for (size_t i = 0; i < values; i++) {
            bits = bits * 1664525u + 1013904223u;
            src[i] = gn_f32_to_bf16((float)(int32_t)bits * 0x1p-31f);
        }
        *quantize = INFINITY;
        *dequantize = 0;
        for (int i = 0; !status && i < QUANTIZE_ROUNDS; i++) {
            const double begin = seconds_now();
            status = gn_quantize(&out, type, src, GN_BF16, rows, cols, ctx->threads, NULL);
            *quantize = fmin(*quantize, seconds_now() - begin);
        }
    }
    free(src);
    free(memory);
    return status;
}
