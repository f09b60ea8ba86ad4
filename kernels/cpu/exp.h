/* exp.h - the exponential that softmax and silu share, on every instruction set.
 *
 * Branch-free, so that the compiler turns a loop of it into vectors, and without fma, so that
 * it gives the same bits everywhere. e^x = 2^n * e^r with n = round(x / ln 2); e^r is Cephes'
 * polynomial (|r| <= ln 2 / 2). Within 2 ulp; overflows to infinity, underflows to zero through
 * the subnormals; NaN gives NaN. */
#ifndef GN_CPU_EXP_H
#define GN_CPU_EXP_H

#include <stdint.h>
#include <string.h>

static inline uint32_t gn_exp_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static inline float gn_exp_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* condition ? a : b without the branch that compilers make of it where comparisons may trap. */
static inline float gn_exp_choose(int condition, float a, float b) {
    const uint32_t mask = -(uint32_t)condition;
    return gn_exp_float((gn_exp_bits(a) & mask) | (gn_exp_bits(b) & ~mask));
}

static inline float gn_exp_power_of_2(uint32_t n) { /* n in [-126, 127], as a two's complement */
    return gn_exp_float((n + 127u) << 23);
}

static inline float gn_exp(float x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it leaves an integer in the low bits */
    x = gn_exp_choose(x < -104.0f, -104.0f, x);
    x = gn_exp_choose(x > 89.0f, 89.0f, x);
    const float t = x * 1.44269504f + shift;
    const float n = t - shift;
    const uint32_t k = gn_exp_bits(t) - gn_exp_bits(shift);

    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;

    /* Two factors, because 2^n alone leaves the range of a float before the product does. */
    const uint32_t half = (uint32_t)((int32_t)k >> 1);
    return p * gn_exp_power_of_2(half) * gn_exp_power_of_2(k - half);
}

static inline float gn_silu(float x) {
    return x / (1.0f + gn_exp(-x));
}

#endif
