/* attention_avx2.c - attention_lanes.h compiled for AVX2. */
#if defined(__AVX2__)
#include <immintrin.h>

#define ATTENTION_NAME           gn_attention_avx2
#define ATTENTION_LANES          8
#define ATTENTION_FMA(v, f, sum) _mm256_fmadd_ps(v, _mm256_set1_ps(f), sum)
#include "attention_lanes.h"
#endif
