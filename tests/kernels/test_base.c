/* base.c: small floats against a reference that only knows ldexp and doubles; status strings. */
#include "kernels/base.h"

#include <criterion/criterion.h>
#include <float.h>
#include <math.h>
#include <string.h>

typedef struct format {
    gn_dtype dtype;
    int exponent_bits, mantissa_bits;
} format;

static const format formats[] = {{GN_F16, 5, 10}, {GN_BF16, 8, 7}};

static float widen(gn_dtype dtype, uint16_t h) {
    return dtype == GN_F16 ? gn_f16_to_f32(h) : gn_bf16_to_f32(h);
}

static uint16_t narrow(gn_dtype dtype, float f) {
    return dtype == GN_F16 ? gn_f32_to_f16(f) : gn_f32_to_bf16(f);
}

static uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static float of_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* The magnitude that the lower 15 bits of a finite value stand for. Given those of infinity, where
 * a next binade would begin: what rounding to nearest takes infinity for. */
static double magnitude(format f, uint32_t bits) {
    const int exponent = (int)(bits >> f.mantissa_bits);
    const int bias = (1 << (f.exponent_bits - 1)) - 1;
    const double mantissa = bits & ((1u << f.mantissa_bits) - 1), one = 1 << f.mantissa_bits;
    return exponent == 0 ? ldexp(mantissa / one, 1 - bias)
                         : ldexp(1 + mantissa / one, exponent - bias);
}

static uint32_t infinity_of(format f) {
    return ((1u << f.exponent_bits) - 1) << f.mantissa_bits;
}

/* The nearest of all magnitudes, found by bisection; of two the even one. */
static uint16_t nearest(format f, float x) {
    const double a = fabs((double)x);
    uint32_t below = 0, above = infinity_of(f);
    const uint16_t sign = signbit(x) ? 0x8000 : 0;
    if (a >= magnitude(f, above)) return (uint16_t)(sign | above);
    while (above - below > 1) {
        const uint32_t middle = (below + above) / 2;
        if (magnitude(f, middle) <= a)
            below = middle;
        else
            above = middle;
    }
    const double down = a - magnitude(f, below), up = magnitude(f, above) - a;
    const bool take_above = up < down || (up == down && below & 1);
    return (uint16_t)(sign | (take_above ? above : below));
}

static void check_narrow(format f, float x) {
    cr_assert_eq(narrow(f.dtype, x), nearest(f, x), "%s of %a is %04x, not %04x",
                 gn_dtype_name(f.dtype), (double)x, narrow(f.dtype, x), nearest(f, x));
}

Test(base, every_16_bit_float_widens_exactly_and_narrows_back) {
    for (int k = 0; k < 2; k++) {
        const format f = formats[k];
        for (uint32_t h = 0; h <= UINT16_MAX; h++) {
            const float x = widen(f.dtype, (uint16_t)h);
            const uint32_t m = h & 0x7fff;
            cr_assert_eq(signbit(x) != 0, h >> 15, "%04x", h);
            if (m > infinity_of(f)) {
                cr_assert(isnan(x), "%04x", h);
                const uint32_t back = narrow(f.dtype, x);
                cr_assert((back & 0x7fff) > infinity_of(f), "NaN %04x became %04x", h, back);
                continue;
            }
            const double expected = m == infinity_of(f) ? INFINITY : magnitude(f, m);
            cr_assert_eq(fabs((double)x), expected, "%04x is %a", h, (double)x);
            cr_assert_eq(narrow(f.dtype, x), h, "%04x", h);
        }
    }
}

/* Every place where rounding changes its mind: each midpoint and the float32 on either side. */
Test(base, narrowing_rounds_to_nearest_even_around_every_midpoint) {
    for (int k = 0; k < 2; k++) {
        const format f = formats[k];
        for (uint32_t m = 0; m < infinity_of(f); m++) {
            const double middle = (magnitude(f, m) + magnitude(f, m + 1)) / 2;
            const float x = (float)middle;
            cr_assert_eq((double)x, middle); /* a float32 has bits enough for it */
            const float near[] = {x, nextafterf(x, 0.0f), nextafterf(x, INFINITY)};
            for (int i = 0; i < 3; i++) {
                check_narrow(f, near[i]);
                check_narrow(f, -near[i]);
            }
        }
    }
}

Test(base, narrowing_agrees_over_all_of_float32) {
    for (int k = 0; k < 2; k++) {
        for (uint64_t u = 0; u <= UINT32_MAX; u += 4093) { /* a prime: all low bits occur */
            const float x = of_bits((uint32_t)u);
            if (!isnan(x)) check_narrow(formats[k], x);
        }
    }
}

Test(base, the_ends_of_the_range) {
    const float ends[] = {0.0f,     -0.0f,      FLT_TRUE_MIN, FLT_MIN,     FLT_MAX,  -FLT_MAX,
                          INFINITY, -INFINITY,  65504.0f,     65519.99f,   65520.0f, 0x1p-24f,
                          0x1p-25f, 0x1.8p-25f, 0x1p-14f,     0x1.ffcp-15f};
    for (int k = 0; k < 2; k++)
        for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) check_narrow(formats[k], ends[i]);
    cr_assert_eq(gn_f32_to_f16(65519.99f), 0x7bff);
    cr_assert_eq(gn_f32_to_f16(65520.0f), 0x7c00);
    cr_assert_eq(gn_f32_to_f16(0x1p-25f), 0);
    cr_assert_eq(gn_f32_to_bf16(FLT_MAX), 0x7f80);
}

Test(base, nan_stays_nan_whatever_its_payload) {
    for (uint32_t payload = 1; payload < 1u << 23; payload *= 2) {
        for (uint32_t sign = 0; sign < 2; sign++) {
            const float nan = of_bits(sign << 31 | 0x7f800000u | payload);
            for (int k = 0; k < 2; k++) {
                const uint16_t h = narrow(formats[k].dtype, nan);
                cr_assert((h & 0x7fffu) > infinity_of(formats[k]), "payload %x: %04x", payload, h);
                cr_assert_eq(h >> 15, sign);
            }
        }
    }
}

/* ---- e4m3: no infinities, so that the largest magnitude stands for all beyond ---- */

static const format e4m3 = {GN_F8, 4, 3};
enum { LARGEST_CODE = 0x7e };

/* By trying all of them. */
static uint8_t nearest_code(float x) {
    const double a = fabs((double)x);
    uint32_t best = 0;
    for (uint32_t code = 1; code <= LARGEST_CODE; code++) {
        const double old = fabs(a - magnitude(e4m3, best)), off = fabs(a - magnitude(e4m3, code));
        if (off < old || (off == old && code % 2 == 0)) best = code;
    }
    return (uint8_t)((signbit(x) ? 0x80 : 0) | best);
}

Test(base, e4m3_is_exact_one_way_and_nearest_even_the_other) {
    for (uint32_t code = 0; code < 256; code++) {
        if ((code & 0x7f) > LARGEST_CODE) continue;
        const float x = gn_f8_to_f32((uint8_t)code);
        cr_assert_eq(signbit(x) != 0, code >> 7);
        cr_assert_eq(fabs((double)x), magnitude(e4m3, code & 0x7f));
        cr_assert_eq(gn_f32_to_f8(x), code);
    }
    cr_assert_eq(gn_f8_to_f32(LARGEST_CODE), GN_F8_MAX);
    for (uint64_t u = 0; u <= UINT32_MAX; u += 65521) { /* a prime */
        const float x = of_bits((uint32_t)u);
        if (!isfinite(x)) continue;
        cr_assert_eq(gn_f32_to_f8(x), nearest_code(x), "%a", (double)x);
    }
    for (uint32_t code = 0; code < LARGEST_CODE; code++) {
        const float middle = (float)((magnitude(e4m3, code) + magnitude(e4m3, code + 1)) / 2);
        const float near[] = {middle, nextafterf(middle, 0.0f), nextafterf(middle, INFINITY)};
        for (int i = 0; i < 3; i++)
            cr_assert_eq(gn_f32_to_f8(-near[i]), nearest_code(-near[i]), "%a", (double)near[i]);
    }
    const float ends[] = {INFINITY, -INFINITY, 463.99997f, 464.0f, 480.0f, FLT_MAX, FLT_TRUE_MIN};
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        cr_assert_eq(gn_f32_to_f8(ends[i]), isinf(ends[i])
                                                ? nearest_code(copysignf(GN_F8_MAX, ends[i]))
                                                : nearest_code(ends[i]));
    cr_assert_eq(gn_f32_to_f8(NAN) & 0x7f, LARGEST_CODE + 1);
}

/* Arrays may start at any byte: a mapped file owes nobody alignment. */
Test(base, arrays_convert_like_single_values_at_any_alignment) {
    enum { N = 67 };
    float values[N], back[N];
    for (int i = 0; i < N; i++) values[i] = ldexpf((float)(i - 33) / 7, i % 40 - 20);
    const gn_dtype dtypes[] = {GN_F32, GN_F16, GN_BF16, GN_F8};
    for (int k = 0; k < 4; k++) {
        for (int shift = 0; shift < 4; shift++) {
            unsigned char bytes[4 * N + 8];
            memset(bytes, 0xa5, sizeof bytes);
            const size_t size = gn_dtype_size(dtypes[k]);
            gn_narrow(bytes + shift, dtypes[k], values, N);
            for (int i = 0; i < shift; i++) cr_assert_eq(bytes[i], 0xa5);
            cr_assert_eq(bytes[(size_t)shift + N * size], 0xa5);
            gn_widen(back, bytes + shift, dtypes[k], N);
            for (int i = 0; i < N; i++) {
                const float expected = k == 0   ? values[i]
                                       : k == 3 ? gn_f8_to_f32(gn_f32_to_f8(values[i]))
                                                : widen(dtypes[k], narrow(dtypes[k], values[i]));
                cr_assert_eq(bits_of(back[i]), bits_of(expected));
            }
        }
    }
}

Test(base, every_status_has_a_name_and_a_text) {
#define X(name, value, text)                                                                       \
    cr_assert_eq((int)GN_##name, value);                                                           \
    cr_assert_str_eq(gn_status_name(GN_##name), #name);                                            \
    cr_assert_str_eq(gn_status_text(GN_##name), text);
    GN_STATUS_MAP(X)
#undef X
    cr_assert_str_eq(gn_status_name((gn_status)-1000), "EUNKNOWN");
    cr_assert_str_eq(gn_status_text((gn_status)-1000), "unknown status");
}

Test(base, dtypes_have_sizes_and_names) {
#define X(name, size, text)                                                                        \
    cr_assert_eq(gn_dtype_size(GN_##name), size);                                                  \
    cr_assert_str_eq(gn_dtype_name(GN_##name), text);
    GN_DTYPE_MAP(X)
#undef X
}

Test(base, failing_fills_the_error_and_returns_the_status) {
    gn_error err = {0};
    cr_assert_eq(gn_fail(&err, GN_EFORMAT, "%s: expected %d", "a.bin", 7), GN_EFORMAT);
    cr_assert_eq(err.status, GN_EFORMAT);
    cr_assert_str_eq(err.message, "a.bin: expected 7");
    cr_assert_eq(gn_fail(NULL, GN_EIO, "nobody listens"), GN_EIO);

    char long_text[2 * sizeof err.message];
    memset(long_text, 'x', sizeof long_text - 1);
    long_text[sizeof long_text - 1] = '\0';
    cr_assert_eq(gn_fail(&err, GN_EINVAL, "%s", long_text), GN_EINVAL);
    cr_assert_eq(strlen(err.message), sizeof err.message - 1);
}
