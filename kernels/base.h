/* base.h - what every part of Guanaco shares: statuses, errors, dtypes, tensor views.
 *
 * Nothing here allocates, prints or exits. Functions return a gn_status, zero for
 * success; those that read files or parse text also fill a gn_error that names the
 * file, the item, what was expected and what was found. */
#ifndef GN_BASE_H
#define GN_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* name, value, what it means */
#define GN_STATUS_MAP(X)                                                                           \
    X(OK, 0, "success")                                                                            \
    X(ENOMEM, -1, "out of memory")                                                                 \
    X(EINVAL, -2, "invalid argument")                                                              \
    X(EIO, -3, "input/output error")                                                               \
    X(ENOENT, -4, "no such file or name")                                                          \
    X(EFORMAT, -5, "malformed file or text")                                                       \
    X(EMISMATCH, -6, "does not fit the base model")                                                \
    X(EUNSUPPORTED, -7, "not supported")                                                           \
    X(EBUSY, -8, "queue is full")                                                                  \
    X(ETOOBIG, -9, "exceeds a limit")                                                              \
    X(ECANCELED, -10, "canceled")                                                                  \
    X(EEXIST, -11, "already exists")                                                               \
    X(EDEVICE, -12, "device error")

typedef enum gn_status {
#define X(name, value, text) GN_##name = value,
    GN_STATUS_MAP(X)
#undef X
} gn_status;

#if defined(__GNUC__)
#define GN_CHECKED            __attribute__((warn_unused_result))
#define GN_PRINTF(fmt, first) __attribute__((format(printf, fmt, first)))
#else
#define GN_CHECKED
#define GN_PRINTF(fmt, first)
#endif

/* Static strings: "EINVAL" and "invalid argument". */
const char *gn_status_name(gn_status status);
const char *gn_status_text(gn_status status);

/* What went wrong, for a person. Zero-initialise; `message` is always terminated. */
typedef struct gn_error {
    gn_status status;
    char message[512];
} gn_error;

/* Fills err (which may be NULL) and returns status, so that a function can end with
 * `return gn_fail(err, GN_EFORMAT, "%s: ...", path)`. */
gn_status gn_fail(gn_error *err, gn_status status, const char *fmt, ...) GN_PRINTF(3, 4);

/* name, size in bytes, safetensors' name */
#define GN_DTYPE_MAP(X)                                                                            \
    X(F32, 4, "F32")                                                                               \
    X(F16, 2, "F16")                                                                               \
    X(BF16, 2, "BF16")                                                                             \
    X(F8, 1, "F8_E4M3")                                                                            \
    X(I64, 8, "I64")                                                                               \
    X(I32, 4, "I32")                                                                               \
    X(I8, 1, "I8")                                                                                 \
    X(U8, 1, "U8")

typedef enum gn_dtype {
#define X(name, size, text) GN_##name,
    GN_DTYPE_MAP(X)
#undef X
        GN_DTYPE_COUNT
} gn_dtype;

size_t gn_dtype_size(gn_dtype dtype);      /* bytes */
const char *gn_dtype_name(gn_dtype dtype); /* "F32" ... as safetensors writes it */

static inline int64_t gn_min(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static inline int64_t gn_max(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static inline bool gn_dtype_is_float(gn_dtype dtype) {
    return dtype == GN_F32 || dtype == GN_F16 || dtype == GN_BF16;
}

#define GN_MAX_DIMS 4

/* A view: shape over borrowed memory, row-major. `ld` is the number of elements from
 * one index of the first dimension to the next; the inner dimensions are contiguous. */
typedef struct gn_tensor {
    void *data;
    gn_dtype dtype;
    int ndim;
    int64_t shape[GN_MAX_DIMS];
    int64_t ld;
} gn_tensor;

static inline gn_tensor gn_tensor_1d(void *data, gn_dtype dtype, int64_t n) {
    gn_tensor t = {data, dtype, 1, {n, 1, 1, 1}, 1};
    return t;
}

static inline gn_tensor gn_tensor_2d(void *data, gn_dtype dtype, int64_t rows, int64_t cols) {
    gn_tensor t = {data, dtype, 2, {rows, cols, 1, 1}, cols};
    return t;
}

static inline int64_t gn_tensor_numel(const gn_tensor *t) {
    int64_t n = 1;
    for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
    return n;
}

/* Conversions between 16-bit floats and float32, rounding to nearest even. NaN stays NaN. */
static inline float gn_bf16_to_f32(uint16_t h) {
    union {
        uint32_t u;
        float f;
    } v = {(uint32_t)h << 16};
    return v.f;
}

static inline uint16_t gn_f32_to_bf16(float f) {
    union {
        float f;
        uint32_t u;
    } v = {f};
    if ((v.u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((v.u >> 16) | 0x40u);
    return (uint16_t)((v.u + 0x7fffu + ((v.u >> 16) & 1u)) >> 16);
}

float gn_f16_to_f32(uint16_t h);
uint16_t gn_f32_to_f16(float f);

/* e4m3: a sign, four bits of exponent, three of mantissa; from 2^-9 to 448. What is beyond becomes
 * 448. NaN has a code, which counts as 480 on the way back. */
#define GN_F8_MAX 448.0f
static inline float gn_f8_to_f32(uint8_t code) {
    union {
        uint32_t u;
        float f;
    } v = {(uint32_t)(code & 0x80) << 24 | (uint32_t)(code & 0x7f) << 20};
    return v.f * 0x1p120f; /* exponents are biased by 7 and 127 */
}
uint8_t gn_f32_to_f8(float f);

/* dst[0..n) = src[0..n) as float32 / from float32; src and dst need no alignment.
 * dtype is one of F32, F16, BF16, F8. */
void gn_widen(float *dst, const void *src, gn_dtype dtype, int64_t n);
void gn_narrow(void *dst, gn_dtype dtype, const float *src, int64_t n);
/* The first of n values that is not finite, or -1. */
int64_t gn_find_not_finite(const void *src, gn_dtype dtype, int64_t n);

#ifdef __cplusplus
}
#endif
#endif
