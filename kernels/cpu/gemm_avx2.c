/* gemm_avx2.c - gemm_lanes.h compiled for AVX2 and FMA. */
#if defined(__AVX2__)
#include <immintrin.h>

#define GEMM_NAME           gn_gemm_avx2
#define GEMM_LANES          8
#define GEMM_FMA(v, f, sum) _mm256_fmadd_ps(v, _mm256_set1_ps(f), sum)
#include "gemm_lanes.h"
#endif
