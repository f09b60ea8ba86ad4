/* attention_avx512.c - attention_lanes.h compiled for AVX-512. */
#if defined(__AVX512F__)
#include <immintrin.h>

#define ATTENTION_NAME           gn_attention_avx512
#define ATTENTION_LANES          16
#define ATTENTION_FMA(v, f, sum) _mm512_fmadd_ps(v, _mm512_set1_ps(f), sum)
#include "attention_lanes.h"
#endif
