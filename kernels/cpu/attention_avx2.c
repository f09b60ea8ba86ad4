/* attention_avx2.c - attention_lanes.h compiled for AVX2. */
#if defined(__AVX2__)
#define ATTENTION_NAME gn_attention_avx2
#include "attention_lanes.h"
#endif
