/* linear_avx512bf16.c - products of bfloat16 with vdpbf16ps: 64 a instruction.
 *
 * A block of 4-bit weights costs a table of its 16 values (code * scale, rounded: one multiply,
 * one conversion) and then, for 64 weights, one widening load, one shift and two permutations
 * that look words up in it. */
#if defined(__AVX512BF16__)
#include <immintrin.h>
#include <stdint.h>

typedef __m512bh operand;
typedef __m512 sum;
typedef uint16_t elem;
#define VECTORS     2
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

/* 16 floats rounded to the weight's dtype and then to bfloat16; from float32 or bfloat16 that
 * is one rounding. */
INLINE __m256i to_bf16(__m512 v, gn_dtype dtype) {
    if (dtype == GN_F16)
        v = _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return (__m256i)_mm512_cvtneps_pbh(v);
}

INLINE operand join(__m256i low, __m256i high) {
    return (operand)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

INLINE void load_nibbles(operand w[VECTORS], const gn_linear_tile *tile, int r, int64_t b) {
    const __m512 values =
        _mm512_mul_ps(_mm512_loadu_ps(tile->code), _mm512_set1_ps(tile->scale[r][b]));
    const __m256i half = to_bf16(values, tile->dtype);
    /* Twice, so that bit 4 of an index does not matter. */
    const __m512i table = (__m512i)join(half, half);
    const char *p = (const char *)tile->w[r] + b * (GN_BLOCK / 2);
    const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)p));
    w[0] = (operand)_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
    w[1] = (operand)_mm512_permutexvar_epi16(bytes, table);
    _mm_prefetch(p + tile->prefetch, _MM_HINT_T0);
}

INLINE __m512 load_int8(const gn_linear_tile *tile, int r, int64_t at) {
    const __m128i codes = _mm_loadu_si128((const void *)((const int8_t *)tile->w[r] + at));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)),
                         _mm512_set1_ps(*tile->scale[r]));
}

INLINE __m256i load_stored(const gn_linear_tile *tile, int r, int64_t at) {
    if (tile->dtype == GN_F32)
        return to_bf16(_mm512_loadu_ps((const float *)tile->w[r] + at), GN_F32);
    const __m256i half = _mm256_loadu_si256((const void *)((const uint16_t *)tile->w[r] + at));
    return tile->dtype == GN_BF16 ? half : to_bf16(_mm512_cvtph_ps(half), GN_F32);
}

INLINE void load_block(operand w[VECTORS], const gn_linear_tile *tile, int r, int64_t b,
                       gn_linear_source source) {
    if (source == GN_SOURCE_NIBBLES) {
        load_nibbles(w, tile, r, b);
        return;
    }
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) {
        const int64_t at = b * GN_BLOCK + v * (GN_BLOCK / VECTORS);
        if (source == GN_SOURCE_INT8)
            w[v] = join(to_bf16(load_int8(tile, r, at), tile->dtype),
                        to_bf16(load_int8(tile, r, at + 16), tile->dtype));
        else
            w[v] = join(load_stored(tile, r, at), load_stored(tile, r, at + 16));
    }
}

#include "linear_simd.h"

const gn_linear_kernel gn_linear_avx512bf16 = {
    .operand_bytes = sizeof(elem),
    .lanes = sizeof(sum) / sizeof(float),
    .tile_tokens = TILE_TOKENS,
    .direct_tokens = DIRECT_TOKENS,
    .multiply = multiply,
    .decode = decode,
    .encode = encode,
    .add_low_rank = gn_linear_add_low_rank_avx512,
    .finish = gn_linear_finish_avx512,
};
#endif
