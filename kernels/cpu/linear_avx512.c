/* linear_avx512.c - products of float32 with AVX-512, and what both AVX-512 kernels do with
 * their sums.
 *
 * 4-bit weights are looked up in a register of their block's 16 values. Where the compute dtype
 * is bfloat16, values are rounded to it and stay float32. */
#if defined(__AVX512F__)
#include <immintrin.h>
#include <string.h>

typedef __m512 operand;
typedef __m512 sum;
typedef float elem;
#define VECTORS     4
#define WAYS        2
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
    return _mm512_loadu_ps(p);
}

INLINE void store_operand(elem *p, operand v) {
    _mm512_storeu_ps(p, v);
}

INLINE sum dot(sum s, operand a, operand b) {
    return _mm512_fmadd_ps(a, b, s);
}

INLINE elem elem_of(float x) {
    return x;
}

/* As gn_f32_to_bf16, staying float32. */
INLINE __m512 round_bf16(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_castsi512_ps(_mm512_and_si512(kept, _mm512_set1_epi32((int)0xffff0000)));
}

INLINE __m512 round_to(__m512 v, gn_dtype dtype) {
    if (dtype == GN_BF16) return round_bf16(v);
    if (dtype == GN_F16)
        return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return v;
}

INLINE __m512 widen(const void *p, gn_dtype dtype, int64_t at) {
    if (dtype == GN_F32) return _mm512_loadu_ps((const float *)p + at);
    const __m256i half = _mm256_loadu_si256((const void *)((const uint16_t *)p + at));
    if (dtype == GN_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE void load_group(operand w[VECTORS], const gn_linear_tile *tile, int r, int64_t b,
                       gn_dtype dtype, bool whole) {
    (void)whole; /* a group is a block */
    const __m512 values =
        _mm512_mul_ps(_mm512_loadu_ps(tile->code), _mm512_set1_ps(tile->scale[r][b]));
    const __m512 table = round_to(round_to(values, dtype), tile->compute);
    const char *p = (const char *)tile->w[r] + b * (GN_BLOCK / 2);
    for (int i = 0; i < 2; i++) { /* a permutation looks at an index's low 4 bits only */
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p + i));
        w[i] = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table);
        w[i + 2] = _mm512_permutexvar_ps(bytes, table);
    }
}

INLINE void load_block(operand w[VECTORS], const gn_linear_tile *tile, int r, int64_t b,
                       gn_linear_source source) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
        const int64_t at = b * GN_BLOCK + v * (GN_BLOCK / VECTORS);
        if (source == GN_SOURCE_INT8) {
            const __m128i codes = _mm_loadu_si128((const void *)((const int8_t *)tile->w[r] + at));
            const __m512 values = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)),
                                                _mm512_set1_ps(*tile->scale[r]));
            w[v] = round_to(round_to(values, tile->dtype), tile->compute);
        } else {
            w[v] = round_to(widen(tile->w[r], tile->dtype, at), tile->compute);
        }
    }
}

#include "linear_simd.h"

/* 16 values from `at`, of which only `left` exist. */
INLINE __m512 widen_some(const void *p, gn_dtype dtype, int64_t at, int64_t left) {
    if (left >= 16) return widen(p, dtype, at);
    const __mmask16 mask = (__mmask16)((1u << left) - 1);
    if (dtype == GN_F32) return _mm512_maskz_loadu_ps(mask, (const float *)p + at);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)p + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE __m512 look_up_64(const __m512 table[4], __m512i i) {
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(i, _mm512_set1_epi32(32)),
                                _mm512_permutex2var_ps(table[0], i, table[1]),
                                _mm512_permutex2var_ps(table[2], i, table[3]));
}

INLINE __m512 look_up_128(const __m512 table[8], __m512i i) {
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(i, _mm512_set1_epi32(64)),
                                look_up_64(table, i), look_up_64(table + 4, i));
}

/* From a table in half of all registers: three times as fast as a gather. */
INLINE __m512 look_up_256(const __m512 table[16], __m512i i) {
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(i, _mm512_set1_epi32(128)),
                                look_up_128(table, i), look_up_128(table + 8, i));
}

/* 16 blocks from a multiple of 16 on have the same nested scale. Each step is rounded, as in
 * gn_matrix_scale. */
void gn_linear_scales_avx512(float *dst, const gn_matrix *m, int64_t first, int64_t n) {
    __m512 table[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) table[i] = _mm512_loadu_ps(m->nested_code + 16 * i);
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 mask = (__mmask16)(n - i >= 16 ? 0xffff : (1u << (n - i)) - 1);
        const uint8_t *at = m->absmax_u8 + first + i;
        __builtin_prefetch((const void *)((uintptr_t)at + (uintptr_t)n)); /* for the next call */
        const __m512i codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, at));
        const __m512 nested = _mm512_set1_ps(m->nested_absmax[(first + i) / GN_NESTED_BLOCK]);
        const __m512 v = _mm512_mul_ps(look_up_256(table, codes), nested);
        _mm512_mask_storeu_ps(dst + i, mask, _mm512_add_ps(v, _mm512_set1_ps(m->offset)));
    }
}

void gn_linear_add_low_rank_avx512(float *sums, int tokens, const void *const b[GN_TILE_ROWS],
                                   gn_dtype dtype, const float *u, int64_t u_stride, int64_t rank) {
    for (int64_t k = 0; k < rank; k += 16) {
        __m512 w[GN_TILE_ROWS];
        for (int r = 0; r < GN_TILE_ROWS; r++) w[r] = widen_some(b[r], dtype, k, rank - k);
        for (int t = 0; t < tokens; t++) {
            const __m512 x = _mm512_loadu_ps(u + t * u_stride + k);
            for (int r = 0; r < GN_TILE_ROWS; r++) {
                float *at = sums + (t * GN_TILE_ROWS + r) * 16;
                _mm512_storeu_ps(at, _mm512_fmadd_ps(w[r], x, _mm512_loadu_ps(at)));
            }
        }
    }
}

INLINE __m128 fold(__m512 v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

void gn_linear_finish_avx512(float *values, const float *sums, int tokens) {
    for (int t = 0; t < tokens; t++, sums += 4 * 16) {
        __m128 a = fold(_mm512_loadu_ps(sums)), b = fold(_mm512_loadu_ps(sums + 16));
        __m128 c = fold(_mm512_loadu_ps(sums + 32)), d = fold(_mm512_loadu_ps(sums + 48));
        _MM_TRANSPOSE4_PS(a, b, c, d);
        _mm_storeu_ps(values + t * GN_TILE_ROWS, _mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d)));
    }
}

const gn_linear_kernel gn_linear_avx512 = {
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
