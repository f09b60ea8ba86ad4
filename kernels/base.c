/* base.c - statuses, errors, dtypes and small floats. */
#include "base.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

const char *gn_status_name(gn_status status) {
    switch (status) {
#define X(name, value, text)                                                                       \
    case GN_##name: return #name;
        GN_STATUS_MAP(X)
#undef X
    }
    return "EUNKNOWN";
}

const char *gn_status_text(gn_status status) {
    switch (status) {
#define X(name, value, text)                                                                       \
    case GN_##name: return text;
        GN_STATUS_MAP(X)
#undef X
    }
    return "unknown status";
}

gn_status gn_fail(gn_error *err, gn_status status, const char *fmt, ...) {
    if (err) {
        err->status = status;
        va_list args;
        va_start(args, fmt);
        vsnprintf(err->message, sizeof err->message, fmt, args);
        va_end(args);
    }
    return status;
}

size_t gn_dtype_size(gn_dtype dtype) {
    static const size_t sizes[] = {
#define X(name, size, text) size,
        GN_DTYPE_MAP(X)
#undef X
    };
    return sizes[dtype];
}

const char *gn_dtype_name(gn_dtype dtype) {
    static const char *const names[] = {
#define X(name, size, text) text,
        GN_DTYPE_MAP(X)
#undef X
    };
    return names[dtype];
}

static float float_of_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static uint32_t bits_of_float(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

float gn_f16_to_f32(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    const uint32_t exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu;
    if (exponent == 0x1f) return float_of_bits(sign | 0x7f800000u | (mantissa << 13));
    if (exponent == 0) { /* zero or subnormal: mantissa * 2^-24 is exact in float32 */
        const float f = (float)mantissa * 0x1p-24f;
        return float_of_bits(sign | bits_of_float(f));
    }
    return float_of_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

uint16_t gn_f32_to_f16(float f) {
    const uint32_t u = bits_of_float(f);
    const uint16_t sign = (uint16_t)((u >> 16) & 0x8000u);
    const uint32_t a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* rounds past 65504 */
    if (a < 0x38800000u) { /* subnormal: let float addition do the rounding, ulp 2^-24 */
        const float magic = 0.5f;
        const uint32_t r = bits_of_float(float_of_bits(a) + magic) - bits_of_float(magic);
        return (uint16_t)(sign | r);
    }
    const uint32_t rounded = a + 0xfffu + ((a >> 13) & 1u);
    return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

uint8_t gn_f32_to_f8(float f) {
    const uint32_t u = bits_of_float(f), a = u & 0x7fffffffu;
    const uint8_t sign = (uint8_t)((u >> 24) & 0x80u);
    if (a > 0x7f800000u) return sign | 0x7f;
    if (a >= 0x43e80000u) return sign | 0x7e; /* rounds past 448 */
    if (a < 0x3c800000u) { /* subnormal: let float addition do the rounding, ulp 2^-9 */
        const float magic = 0x1p14f;
        return (uint8_t)(sign | (bits_of_float(float_of_bits(a) + magic) - bits_of_float(magic)));
    }
    const uint32_t rounded = a + 0x7ffffu + ((a >> 20) & 1u);
    return (uint8_t)(sign | ((rounded - 0x3c000000u) >> 20));
}

static void widen_f8(float *dst, const uint8_t *codes, int64_t n) {
    for (int64_t i = 0; i < n; i++) dst[i] = gn_f8_to_f32(codes[i]);
}

static void narrow_f8(uint8_t *codes, const float *src, int64_t n) {
    for (int64_t i = 0; i < n; i++) codes[i] = gn_f32_to_f8(src[i]);
}

void gn_widen(float *dst, const void *src, gn_dtype dtype, int64_t n) {
    if (dtype == GN_F32) {
        memcpy(dst, src, (size_t)n * sizeof *dst);
        return;
    }
    if (dtype == GN_F8) {
        widen_f8(dst, src, n);
        return;
    }
    const char *bytes = src;
    for (int64_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, bytes + 2 * i, sizeof h);
        dst[i] = dtype == GN_BF16 ? gn_bf16_to_f32(h) : gn_f16_to_f32(h);
    }
}

void gn_narrow(void *dst, gn_dtype dtype, const float *src, int64_t n) {
    if (dtype == GN_F32) {
        memcpy(dst, src, (size_t)n * sizeof *src);
        return;
    }
    if (dtype == GN_F8) {
        narrow_f8(dst, src, n);
        return;
    }
    char *bytes = dst;
    for (int64_t i = 0; i < n; i++) {
        const uint16_t h = dtype == GN_BF16 ? gn_f32_to_bf16(src[i]) : gn_f32_to_f16(src[i]);
        memcpy(bytes + 2 * i, &h, sizeof h);
    }
}

int64_t gn_find_not_finite(const void *src, gn_dtype dtype, int64_t n) {
    enum { PIECE = 1024 };
    float values[PIECE];
    const char *bytes = src;
    for (int64_t at = 0; at < n; at += PIECE) {
        const int64_t some = n - at < PIECE ? n - at : PIECE;
        bool finite = true;
        gn_widen(values, bytes + (size_t)at * gn_dtype_size(dtype), dtype, some);
        for (int64_t i = 0; i < some; i++) finite &= isfinite(values[i]) != 0;
        for (int64_t i = 0; !finite && i < some; i++)
            if (!isfinite(values[i])) return at + i;
    }
    return -1;
}
