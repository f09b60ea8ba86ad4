/* gemm.c - products of float32 matrices: blocks, packing, threads.
 *
 * C is cut into blocks of BLOCK_M by BLOCK_N, which the threads take in turn. For each BLOCK_K of
 * the sum, the operands' parts of a block are packed in the order in which the inner loop reads
 * them, padded with zeros to whole tiles. This file is also the inner loop's plain build. */
#define GEMM_NAME           gn_gemm_plain
#define GEMM_LANES          4
#define GEMM_FMA(v, f, sum) ((v) * (f) + (sum))
#include "gemm_lanes.h"

enum { BLOCK_M = 16 * GN_GEMM_ROWS, BLOCK_N = 8 * GN_GEMM_MAX_COLUMNS, BLOCK_K = 256 };

const gn_gemm_kernel *gn_gemm_kernel_of(gn_isa isa) {
#if defined(__x86_64__)
    if (isa >= GN_ISA_AVX512) return &gn_gemm_avx512;
    if (isa >= GN_ISA_AVX2) return &gn_gemm_avx2;
#endif
    (void)isa;
    return &gn_gemm_plain;
}

size_t gn_gemm_scratch_bytes(void) {
    return (size_t)(BLOCK_M + BLOCK_N) * BLOCK_K * sizeof(float);
}

/* Panels of `width` lines, each with the k elements of its lines side by side. Element (line, p)
 * is at from[line * line_step + p * p_step]. */
static void pack(float *to, const float *from, int64_t lines, int64_t line_step, int64_t k,
                 int64_t p_step, int width) {
    for (int64_t first = 0; first < lines; first += width, to += k * width) {
        const int64_t left = lines - first < width ? lines - first : width;
        const float *panel = from + first * line_step;
        for (int64_t p = 0; p < k; p++) {
            float *line = to + p * width;
            if (line_step == 1)
                memcpy(line, panel + p * p_step, (size_t)left * sizeof *line);
            else
                for (int64_t i = 0; i < left; i++) line[i] = panel[i * line_step + p * p_step];
            for (int64_t i = left; i < width; i++) line[i] = 0;
        }
    }
}

static const float *element(const gn_operand *x, int64_t i, int64_t j) {
    return x->data + i * x->row + j * x->col;
}

static void write_tile(const gn_gemm *op, const float *tile, int columns, int64_t i0, int64_t j0,
                       bool add) {
    const int64_t rows = gn_min(op->m - i0, GN_GEMM_ROWS), n = gn_min(op->n - j0, columns);
    for (int64_t i = 0; i < rows; i++) {
        float *c = op->c + (i0 + i) * op->c_row + j0;
        const float *from = tile + i * columns;
        if (add)
            for (int64_t j = 0; j < n; j++) c[j] += op->alpha * from[j];
        else
            for (int64_t j = 0; j < n; j++) c[j] = op->alpha * from[j];
    }
}

static void run_block(const gn_gemm *op, const gn_gemm_kernel *kernel, int64_t i0, int64_t j0,
                      float *scratch) {
    const int64_t m = gn_min(op->m - i0, BLOCK_M), n = gn_min(op->n - j0, BLOCK_N);
    float *a = scratch, *b = scratch + BLOCK_M * BLOCK_K;
    float tile[GN_GEMM_ROWS * GN_GEMM_MAX_COLUMNS];
    for (int64_t p = 0; p < op->k; p += BLOCK_K) {
        const int64_t k = gn_min(op->k - p, BLOCK_K);
        pack(a, element(&op->a, i0, p), m, op->a.row, k, op->a.col, GN_GEMM_ROWS);
        pack(b, element(&op->b, p, j0), n, op->b.col, k, op->b.row, kernel->columns);
        for (int64_t j = 0; j < n; j += kernel->columns)
            for (int64_t i = 0; i < m; i += GN_GEMM_ROWS) {
                kernel->multiply(tile, a + i * k, b + j * k, k);
                write_tile(op, tile, kernel->columns, i0 + i, j0 + j, op->add || p > 0);
            }
    }
}

void gn_gemm_run(const gn_gemm *op, const gn_gemm_kernel *kernel, const gn_cpu_team *team,
                 float *scratch) {
    const int64_t across = (op->n + BLOCK_N - 1) / BLOCK_N;
    const int64_t blocks = (op->m + BLOCK_M - 1) / BLOCK_M * across;
    for (int64_t i = team->thread; i < blocks; i += team->n_threads)
        run_block(op, kernel, i / across * BLOCK_M, i % across * BLOCK_N, scratch);
}

void gn_gemm_load_weight(float *to, const gn_matrix *w, int64_t first, int64_t n, gn_dtype compute,
                         const gn_cpu_team *team) {
    const int64_t last = gn_cpu_share(n, team->thread + 1, team->n_threads);
    for (int64_t i = gn_cpu_share(n, team->thread, team->n_threads); i < last; i++) {
        float *row = to + i * w->cols;
        gn_dequantize(row, w, (first + i) * w->cols, w->cols);
        for (int64_t k = 0; compute == GN_BF16 && k < w->cols; k++)
            row[k] = gn_bf16_to_f32(gn_f32_to_bf16(row[k]));
    }
}
