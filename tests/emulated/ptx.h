/* ptx.h - in place of kernels/cuda/ptx.cuh, whose include guard it takes: the same functions, for
 * emulator.h. What they mean is said there. */
#ifndef GN_CUDA_PTX_CUH
#define GN_CUDA_PTX_CUH

namespace emulator {

void mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]);
void load_matrices(uint32_t m[4], const void *row, bool turned);

} // namespace emulator

using emulator::commit_copies;
using emulator::mma_bf16;

/* Row r of the result is column r of what there was. Lane 4r + c has columns 2c and 2c + 1. */
static inline uint32_t turn_matrix(uint32_t x) {
    const int r = emulator::lane() / 4, c = emulator::lane() % 4;
    const uint32_t even = emulator::shuffle(~0u, x, 2 * c * 4 + r / 2) >> r % 2 * 16;
    const uint32_t odd = emulator::shuffle(~0u, x, (2 * c + 1) * 4 + r / 2) >> r % 2 * 16;
    return (even & 0xffff) | odd << 16;
}

static inline float exp2_fast(float x) {
    return exp2f(x);
}

static inline float load_fresh(const float *at) {
    return *at;
}
static inline uint32_t load_acquire(const uint32_t *at) {
    emulator::let_others_run();
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}
static inline uint32_t load_relaxed(const uint32_t *at) {
    return load_acquire(at);
}
template <typename T> static inline void load_once(T &v, const void *at, int n) {
    if (n > 0) v = *(const T *)at;
}
static inline void load_once(uint32_t &v, const uint8_t *at, int n) {
    if (n > 0) v = *at;
}
static inline void keep(int &) {}
static inline void prefetch_line(const void *) {}

/* From the beginning of dynamic shared memory. */
static inline uint32_t shared_address(const void *at) {
    return (uint32_t)((const uint8_t *)at - shared);
}

static inline uint32_t load_shared(uint32_t at) {
    return *(const uint32_t *)(shared + at);
}

template <int BYTES> static inline void copy_async(const void *to, const void *from) {
    emulator::copy_async((void *)to, from, BYTES);
}
static inline void copy_async_or_zeros(uint32_t to, const void *from, bool is_there) {
    emulator::copy_async(shared + to, is_there ? from : NULL, 16);
}
static inline void store_shared(uint32_t to, uint4 v) {
    *(uint4 *)(shared + to) = v;
}
template <int N> static inline void wait_for_copies() {
    emulator::wait_for_copies(N);
}
static inline void wait_for_all_copies() {
    emulator::commit_copies();
    emulator::wait_for_copies(0);
}
static inline void load_matrices(uint32_t m[4], uint32_t row) {
    emulator::load_matrices(m, shared + row, false);
}
static inline void load_turned_matrices(uint32_t m[4], uint32_t row) {
    emulator::load_matrices(m, shared + row, true);
}

static inline void pdl_wait() {}
static inline void pdl_trigger() {}

#endif
