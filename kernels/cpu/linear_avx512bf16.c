/* linear_avx512bf16.c - products of bfloat16 with vdpbf16ps: 64 a instruction.
 *
 * 4-bit weights go two blocks, 64 bytes, at a time. Their values (code * scale, rounded: one
 * multiplication a block, one conversion) are a table of 32 words. The bytes are 32 words of
 * four codes, of which the lower 16 belong to the first block. Masked, shifted, and with bit 4
 * set in the upper lanes, they are indices into the table: 4 permutations for 128 weights. */
#if defined(__AVX512BF16__)
#include <immintrin.h>
#include <stdint.h>

typedef __m512bh operand;
typedef __m512 sum;
typedef uint16_t elem;
#define VECTORS     2
#define WAYS        4
#define TILE_TOKENS 6

#define INLINE static inline __attribute__((always_inline))
#include "linear.h"

INLINE sum zero_sum(void) {
    return _mm512_setzero_ps();
}

INLINE void store_sum(float *dst, sum s) {
    _mm512_storeu_ps(dst, s);
}

INLINE operand load_operand(const elem *p) {
    return (operand)_mm512_loadu_si512(p);
}

INLINE void store_operand(elem *p, operand v) {
    _mm512_storeu_si512(p, (__m512i)v);
}

INLINE sum dot(sum s, operand a, operand b) {
    return _mm512_dpbf16_ps(s, a, b);
}

INLINE elem elem_of(float x) {
    union {
        float f;
        uint32_t u;
    } v = {x};
    return (elem)(v.u >> 16);
}

INLINE __m512 round_f16(__m512 v) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* What the codes of a block stand for. */
INLINE __m512 block_values(const gn_linear_tile *tile, float scale, gn_dtype dtype) {
    const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(tile->code), _mm512_set1_ps(scale));
    return dtype == GN_F16 ? round_f16(v) : v;
}

/* Not whole: a last block, and zeros. */
INLINE void load_group(operand w[4], const gn_linear_tile *tile, int r, int64_t b, gn_dtype dtype,
                       bool whole) {
    const __m512 first = block_values(tile, tile->scale[r][b], dtype);
    const __m512 second = block_values(tile, whole ? tile->scale[r][b + 1] : 0.0f, dtype);
    const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    const char *p = (const char *)tile->w[r] + b * (GN_BLOCK / 2);
    const __m512i words =
        whole ? _mm512_loadu_si512(p) : _mm512_zextsi256_si512(_mm256_loadu_si256((const void *)p));
    /* In either byte of a word: the code, and bit 4 for the second block. A permutation looks
     * at the low 5 bits of a word. */
    const __m512i codes = _mm512_set1_epi8(15);
    const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(16), 1);
    const int and_or = 0xea; /* (a & b) | c */
    const __m512i even =
        _mm512_ternarylogic_epi64(_mm512_srli_epi16(words, 4), codes, upper, and_or);
    const __m512i odd = _mm512_ternarylogic_epi64(words, codes, upper, and_or);
    w[0] = (operand)_mm512_permutexvar_epi16(even, table);
    w[1] = (operand)_mm512_permutexvar_epi16(odd, table);
    w[2] = (operand)_mm512_permutexvar_epi16(_mm512_srli_epi16(even, 8), table);
    w[3] = (operand)_mm512_permutexvar_epi16(_mm512_srli_epi16(odd, 8), table);
}

/* 16 values from `at`, rounded to the weight's dtype, or to bfloat16 as they will be next. */
INLINE __m512 load_values(const gn_linear_tile *tile, int r, int64_t at, gn_linear_source source) {
    if (source == GN_SOURCE_INT8) {
        const __m128i codes = _mm_loadu_si128((const void *)((const int8_t *)tile->w[r] + at));
        const __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)),
                                       _mm512_set1_ps(*tile->scale[r]));
        return tile->dtype == GN_F16 ? round_f16(v) : v;
    }
    if (tile->dtype == GN_F32) return _mm512_loadu_ps((const float *)tile->w[r] + at);
    const uint16_t *half = (const uint16_t *)tile->w[r] + at; /* stored bfloat16 is an operand */
    return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)half));
}

INLINE void load_block(operand w[VECTORS], const gn_linear_tile *tile, int r, int64_t b,
                       gn_linear_source source) {
    for (int v = 0; v < VECTORS; v++) {
        const int64_t at = b * GN_BLOCK + v * (GN_BLOCK / VECTORS);
        w[v] = _mm512_cvtne2ps_pbh(load_values(tile, r, at + 16, source),
                                   load_values(tile, r, at, source));
    }
}

#include "linear_simd.h"

const gn_linear_kernel gn_linear_avx512bf16 = {
    .operand_bytes = sizeof(elem),
    .lanes = sizeof(sum) / sizeof(float),
    .ways = WAYS,
    .tile_tokens = TILE_TOKENS,
    .direct_tokens = DIRECT_TOKENS,
    .multiply = multiply,
    .decode = decode,
    .encode = encode,
    .scales = gn_linear_scales_avx512,
    .add_low_rank = gn_linear_add_low_rank_avx512,
    .finish = gn_linear_finish_avx512,
};
#endif
