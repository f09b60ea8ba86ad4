/* gemm_lanes.h - the inner loop of gemm.c, compiled once per instruction set as GEMM_NAME, in
 * vectors of GEMM_LANES floats, with GEMM_FMA(v, f, sum) for v * f + sum. */
#include "gemm.h"

#include <string.h>

enum { LANES = GEMM_LANES, COLUMNS = 2 * LANES };

typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));

static void multiply(float *tile, const float *a, const float *b, int64_t k) {
    lanes sum[GN_GEMM_ROWS][2] = {0};
    for (int64_t p = 0; p < k; p++, a += GN_GEMM_ROWS, b += COLUMNS) {
        lanes v[2];
        memcpy(v, b, sizeof v);
        for (int i = 0; i < GN_GEMM_ROWS; i++) {
            sum[i][0] = GEMM_FMA(v[0], a[i], sum[i][0]);
            sum[i][1] = GEMM_FMA(v[1], a[i], sum[i][1]);
        }
    }
    memcpy(tile, sum, sizeof sum);
}

const gn_gemm_kernel GEMM_NAME = {COLUMNS, multiply};
