/* bench_weights.h - random NF4 weights and activations for benchmarks of products. */
#ifndef GN_TEST_BENCH_WEIGHTS_H
#define GN_TEST_BENCH_WEIGHTS_H

#include <stdio.h>
#include <stdlib.h>

#include "kernels/ops.h"

static inline void check(gn_status status, const char *what) {
    if (status == GN_OK) return;
    fprintf(stderr, "bench: %s: %s\n", what, gn_status_text(status));
    exit(1);
}

static inline uint32_t random_bits(void) {
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

static inline void *device_copy(gn_ctx *ctx, const void *host, size_t bytes) {
    void *memory = gn_ctx_alloc(ctx, bytes);
    if (!memory) check(GN_ENOMEM, "device memory");
    check(gn_ctx_write(ctx, memory, host, bytes), "upload");
    return memory;
}

static inline void *random_activations(gn_ctx *ctx, gn_dtype dtype, size_t n) {
    void *host = malloc(n * gn_dtype_size(dtype));
    for (size_t i = 0; i < n; i++) {
        const float v = (float)(int32_t)random_bits() * 0x1p-31f;
        if (dtype == GN_F32)
            ((float *)host)[i] = v;
        else
            ((uint16_t *)host)[i] = gn_f32_to_bf16(v);
    }
    void *memory = device_copy(ctx, host, n * gn_dtype_size(dtype));
    free(host);
    return memory;
}

static inline gn_matrix random_weight(int64_t n, int64_t k) {
    gn_matrix m = {};
    m.qtype = GN_Q_NF4;
    m.dtype = GN_BF16;
    m.rows = n;
    m.cols = k;
    const gn_quant_sizes sizes = gn_quant_sizes_of(m.qtype, true, n, k);
    uint32_t *data = (uint32_t *)malloc(sizes.data);
    uint8_t *scales = (uint8_t *)malloc(sizes.absmax_u8);
    float *nested = (float *)malloc(sizes.nested_absmax);
    for (size_t i = 0; i < sizes.data / 4; i++) data[i] = random_bits();
    for (size_t i = 0; i < sizes.absmax_u8; i++) scales[i] = (uint8_t)random_bits();
    for (size_t i = 0; i < sizes.nested_absmax / sizeof *nested; i++) nested[i] = 0.01f;
    m.data = data;
    m.absmax_u8 = scales;
    m.nested_absmax = nested;
    m.code = gn_code_values(m.qtype);
    m.nested_code = gn_dynamic_map();
    m.offset = 0.02f;
    return m;
}

static inline void free_weight(const gn_matrix *m) {
    free((void *)m->data);
    free((void *)m->absmax_u8);
    free((void *)m->nested_absmax);
}

#endif
