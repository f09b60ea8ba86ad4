/* gemm.h - products of float32 matrices, C = alpha A B or C += alpha A B, for the backward pass.
 *
 * Operands are given by their strides, so that a transposed one is the same call. The sum over k
 * runs in order, in blocks that only its length decides: an element of C is the same bits whatever
 * the other rows and columns and however many the threads. */
#ifndef GN_CPU_GEMM_H
#define GN_CPU_GEMM_H

#include "cpu.h"

/* Element (i, j) is at data[i * row + j * col]. */
typedef struct gn_operand {
    const float *data;
    int64_t row, col;
} gn_operand;

typedef struct gn_gemm {
    int64_t m, n, k;
    gn_operand a, b; /* (m, k), (k, n) */
    float *c;        /* (m, n), rows c_row apart */
    int64_t c_row;
    float alpha;
    bool add; /* to what c holds */
} gn_gemm;

static inline gn_operand gn_turned(gn_operand x) {
    return (gn_operand){x.data, x.col, x.row};
}

static inline gn_gemm gn_gemm_of(int64_t m, int64_t n, int64_t k, gn_operand a, gn_operand b,
                                 float *c, int64_t c_row, float alpha, bool add) {
    return (gn_gemm){m, n, k, a, b, c, c_row, alpha, add};
}

enum { GN_GEMM_ROWS = 6, GN_GEMM_MAX_COLUMNS = 32 };

/* tile[i][j] = sum over p of a[p][i] * b[p][j]: GN_GEMM_ROWS by `columns`, both packed by p. */
typedef struct gn_gemm_kernel {
    int columns;
    void (*multiply)(float *tile, const float *a, const float *b, int64_t k);
} gn_gemm_kernel;
extern const gn_gemm_kernel gn_gemm_plain, gn_gemm_avx2, gn_gemm_avx512;

const gn_gemm_kernel *gn_gemm_kernel_of(gn_isa isa);

/* Working memory of one thread. */
size_t gn_gemm_scratch_bytes(void);

/* The team's product: called by every thread of it with scratch of its own, without a barrier
 * before or after. A team of one computes it alone. */
void gn_gemm_run(const gn_gemm *op, const gn_gemm_kernel *kernel, const gn_cpu_team *team,
                 float *scratch);

/* Rows [first, first + n) of a weight as operands, rounded to the compute dtype: the team's share
 * of each thread, without a barrier. to: (n, cols). */
void gn_gemm_load_weight(float *to, const gn_matrix *w, int64_t first, int64_t n, gn_dtype compute,
                         const gn_cpu_team *team);

#endif
