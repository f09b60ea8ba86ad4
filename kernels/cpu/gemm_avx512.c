/* gemm_avx512.c - gemm_lanes.h compiled for AVX-512. */
#if defined(__AVX512F__)
#include <immintrin.h>

#define GEMM_NAME           gn_gemm_avx512
#define GEMM_LANES          16
#define GEMM_FMA(v, f, sum) _mm512_fmadd_ps(v, _mm512_set1_ps(f), sum)
#include "gemm_lanes.h"
#endif
