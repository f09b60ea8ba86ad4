/* dropout.h - masks that are computed anew wherever they are needed, and never stored.
 *
 * Whether an element is dropped is a function of the seed, the step, the module (a projection of a
 * layer) and the element's row and column: a Philox 4x32-10 counter (Salmon et al., SC11), whose
 * four words decide four neighbouring columns. So the backward pass finds the forward pass's mask,
 * on any device and whatever the threads. */
#ifndef GN_DROPOUT_H
#define GN_DROPOUT_H

#include <stdint.h>

#if defined(__CUDACC__)
#define GN_HOST_DEVICE __host__ __device__
#else
#define GN_HOST_DEVICE
#endif

typedef struct gn_dropout {
    float p; /* the share that is dropped, in [0, 1); 0: none. What is kept grows by 1/(1-p) */
    uint32_t step; /* a number of its own for every batch */
    uint64_t seed;
} gn_dropout;

static inline GN_HOST_DEVICE void gn_philox(uint32_t out[4], const uint32_t counter[4],
                                            uint64_t key) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int i = 0; i < 4; i++) out[i] = counter[i];
    for (int round = 0; round < 10; round++, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
        const uint64_t a = (uint64_t)0xd2511f53u * out[0], b = (uint64_t)0xcd9e8d57u * out[2];
        out[0] = (uint32_t)(b >> 32) ^ out[1] ^ k0;
        out[2] = (uint32_t)(a >> 32) ^ out[3] ^ k1;
        out[1] = (uint32_t)b;
        out[3] = (uint32_t)a;
    }
}

/* What columns 4 * quad ... 4 * quad + 3 of a row are multiplied by: 0 or 1/(1-p). */
static inline GN_HOST_DEVICE void gn_dropout_quad(float factor[4], const gn_dropout *dropout,
                                                  uint32_t module, uint32_t row, uint32_t quad) {
    const uint32_t counter[4] = {quad, row, module, dropout->step};
    const uint32_t limit = (uint32_t)((double)dropout->p * 4294967296.0);
    uint32_t bits[4];
    gn_philox(bits, counter, dropout->seed);
    for (int i = 0; i < 4; i++) factor[i] = bits[i] < limit ? 0.0f : 1.0f / (1.0f - dropout->p);
}

#endif
