/* linear_avx2.c - products of float32 with AVX2 and FMA.
 *
 * As linear_avx512.c with vectors half as long: a block's 16 values are two registers, and
 * bit 3 of a code says which one its value is in. */
#if defined(__AVX2__)
#include <immintrin.h>
#include <string.h>

typedef __m256 operand;
typedef __m256 sum;
typedef float elem;
#define VECTORS     8
#define WAYS        2
#define TILE_TOKENS 2

#define INLINE static inline __attribute__((always_inline))
#include "linear.h"

INLINE sum zero_sum(void) {
    return _mm256_setzero_ps();
}

INLINE void store_sum(float *dst, sum s) {
    _mm256_storeu_ps(dst, s);
}

INLINE operand load_operand(const elem *p) {
    return _mm256_loadu_ps(p);
}

INLINE void store_operand(elem *p, operand v) {
    _mm256_storeu_ps(p, v);
}

INLINE sum dot(sum s, operand a, operand b) {
    return _mm256_fmadd_ps(a, b, s);
}

INLINE elem elem_of(float x) {
    return x;
}

/* As gn_f32_to_bf16, staying float32. */
INLINE __m256 round_bf16(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 quiet = _mm256_or_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x400000)));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256 kept = _mm256_blendv_ps(_mm256_castsi256_ps(up), quiet, nan);
    return _mm256_and_ps(kept, _mm256_castsi256_ps(_mm256_set1_epi32((int)0xffff0000)));
}

INLINE __m256 round_to(__m256 v, gn_dtype dtype) {
    if (dtype == GN_BF16) return round_bf16(v);
    if (dtype == GN_F16) return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    return v;
}

INLINE __m256 widen(const void *p, gn_dtype dtype, int64_t at) {
    if (dtype == GN_F32) return _mm256_loadu_ps((const float *)p + at);
    const __m128i half = _mm_loadu_si128((const void *)((const uint16_t *)p + at));
    if (dtype == GN_F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE __m256 look_up(__m256 low, __m256 high, __m256i codes) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes),
                            _mm256_permutevar8x32_ps(high, codes),
                            _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}

INLINE void load_group(operand w[VECTORS], const gn_linear_tile *tile, int r, int64_t b,
                       gn_dtype dtype, bool whole) {
    (void)whole; /* a group is a block */
    const __m256 scale = _mm256_set1_ps(tile->scale[r][b]);
    const __m256 first = _mm256_mul_ps(_mm256_loadu_ps(tile->code), scale);
    const __m256 second = _mm256_mul_ps(_mm256_loadu_ps(tile->code + 8), scale);
    const __m256 low = round_to(round_to(first, dtype), tile->compute);
    const __m256 high = round_to(round_to(second, dtype), tile->compute);
    const char *p = (const char *)tile->w[r] + b * (GN_BLOCK / 2);
    for (int i = 0; i < 4; i++) {
        const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(p + 8 * i)));
        w[i] = look_up(low, high, _mm256_srli_epi32(bytes, 4));
        w[i + 4] = look_up(low, high, bytes);
    }
}

INLINE void load_block(operand w[VECTORS], const gn_linear_tile *tile, int r, int64_t b,
                       gn_linear_source source) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
        const int64_t at = b * GN_BLOCK + v * (GN_BLOCK / VECTORS);
        if (source == GN_SOURCE_INT8) {
            const __m128i codes = _mm_loadl_epi64((const void *)((const int8_t *)tile->w[r] + at));
            const __m256 values = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)),
                                                _mm256_set1_ps(*tile->scale[r]));
            w[v] = round_to(round_to(values, tile->dtype), tile->compute);
        } else {
            w[v] = round_to(widen(tile->w[r], tile->dtype, at), tile->compute);
        }
    }
}

#include "linear_simd.h"

/* 8 values from `at`, of which only `left` exist. */
INLINE __m256 widen_some(const void *p, gn_dtype dtype, int64_t at, int64_t left) {
    if (left >= 8) return widen(p, dtype, at);
    float some[8] = {0};
    const size_t size = dtype == GN_F32 ? sizeof(float) : sizeof(uint16_t);
    gn_widen(some, (const char *)p + (size_t)at * size, dtype, left);
    return _mm256_loadu_ps(some);
}

static void add_low_rank(float *sums, int tokens, const void *const b[GN_TILE_ROWS], gn_dtype dtype,
                         const float *u, int64_t u_stride, int64_t rank) {
    for (int64_t k = 0; k < rank; k += 8) {
        __m256 w[GN_TILE_ROWS];
        for (int r = 0; r < GN_TILE_ROWS; r++) w[r] = widen_some(b[r], dtype, k, rank - k);
        for (int t = 0; t < tokens; t++) {
            const __m256 x = _mm256_loadu_ps(u + t * u_stride + k);
            for (int r = 0; r < GN_TILE_ROWS; r++) {
                float *at = sums + (t * GN_TILE_ROWS + r) * 8;
                _mm256_storeu_ps(at, _mm256_fmadd_ps(w[r], x, _mm256_loadu_ps(at)));
            }
        }
    }
}

INLINE __m128 fold(__m256 v) {
    return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}

static void finish(float *values, const float *sums, int tokens) {
    for (int t = 0; t < tokens; t++, sums += 4 * 8) {
        __m128 a = fold(_mm256_loadu_ps(sums)), b = fold(_mm256_loadu_ps(sums + 8));
        __m128 c = fold(_mm256_loadu_ps(sums + 16)), d = fold(_mm256_loadu_ps(sums + 24));
        _MM_TRANSPOSE4_PS(a, b, c, d);
        _mm_storeu_ps(values + t * GN_TILE_ROWS, _mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d)));
    }
}

const gn_linear_kernel gn_linear_avx2 = {
    .operand_bytes = sizeof(elem),
    .lanes = sizeof(sum) / sizeof(float),
    .ways = WAYS,
    .tile_tokens = TILE_TOKENS,
    .direct_tokens = DIRECT_TOKENS,
    .multiply = multiply,
    .decode = decode,
    .encode = encode,
    .scales = gn_linear_scales_plain,
    .add_low_rank = add_low_rank,
    .finish = finish,
};
#endif
