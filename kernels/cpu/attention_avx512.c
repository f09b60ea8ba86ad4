/* attention_avx512.c - attention_lanes.h compiled for AVX-512. */
#if defined(__AVX512F__)
#define ATTENTION_NAME gn_attention_avx512
#include "attention_lanes.h"
#endif
