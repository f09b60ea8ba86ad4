/* emulator.h - runs kernels of kernels/cuda on the CPU, so that tests need no GPU.
 *
 * A source of kernels includes nothing but CUDA's own headers, which the host's compiler takes as
 * they are, and ptx.cuh. So a file that includes this header and then a source is that source for
 * the CPU: what a kernel calls without asking for it in a header is defined here.
 *
 *   - A thread is a fiber. Those of a block take turns on one thread of the host; a warp runs as
 *     long as one of its lanes can, then any other one. Up to RESIDENT_BLOCKS run at once, each on
 *     a thread of the host, so a grid of so many may wait for itself.
 *   - What lanes do together (shuffles, votes, matrix products) is done when the last one of the
 *     mask is there. Lanes that meet at different instructions, and threads that all wait, end the
 *     program with a message; so does, through the compiler's sanitizer, what is not aligned.
 *   - A copy into shared memory is done when it is waited for, not before; until then its place
 *     holds NaN. Dynamic shared memory begins as NaN, and what is past its end must stay so.
 *
 * So barriers, waits and copies that are missing are seen, but not all: shuffles and matrix
 * products hold lanes together like a __syncwarp, and fences do nothing that the host would not do.
 * Clusters, mbarriers, wgmma and caches are not emulated. */
#ifndef GN_TEST_EMULATOR_H
#define GN_TEST_EMULATOR_H

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

/* In place of device_launch_parameters.h, whose include guard it takes; of the fiber that runs. */
#define __DEVICE_LAUNCH_PARAMETERS_H__
#include <vector_types.h>
extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim;

#include "kernels/cuda/cuda.h"

namespace emulator {

enum { LANES = 32, RESIDENT_BLOCKS = 16, SHARED_LIMIT = 227 << 10 };

/* ---- who runs ---- */

/* Runs `kernel` for every thread. */
cudaError_t run(dim3 blocks, dim3 threads, size_t shared, const std::function<void()> &kernel);

template <typename... P, typename... A>
cudaError_t launch(const cudaLaunchConfig_t *config, void (*kernel)(P...), A... args) {
    return run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
               [=] { kernel((P)args...); });
}

void sync_block();
bool all_of_block(bool vote);
void let_others_run(); /* of this block, and other blocks */

[[noreturn]] void fail(const char *what);

/* ---- what lanes do together ---- */

/* One lane's part of it: `run` is called once, with those of all lanes in `mask`. */
struct meeting {
    void (*run)(meeting *const lanes[LANES], uint32_t mask);
};
void meet(meeting *mine, uint32_t mask);

inline int lane() {
    return (int)(threadIdx.x % LANES);
}

uint64_t exchange(uint32_t mask, uint64_t value, int from); /* gives the value of lane `from` */
uint32_t ballot(uint32_t mask, bool vote);
void sync_warp(uint32_t mask);

template <typename T> T shuffle(uint32_t mask, T v, int from) {
    static_assert(sizeof v <= sizeof(uint64_t), "a register or two");
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof v);
    bits = exchange(mask, bits, from);
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* ---- memory ---- */

/* A zero `from` copies zeros. */
void copy_async(void *to, const void *from, int bytes);
void commit_copies();
void wait_for_copies(int groups);

} // namespace emulator

/* ---- CUDA C++ ---- */

/* A block has a thread of the host, which has its shared memory. All arrays of dynamic shared
 * memory are one: a source that has some is included after this macro with their type and name. */
#define GN_EMULATED_SHARED(type, name) extern thread_local type name[] __asm__("gn_emulated_shared")
GN_EMULATED_SHARED(uint8_t, shared);

#undef __shared__
#undef __launch_bounds__
#define __shared__ thread_local
#define __launch_bounds__(...)
#define __syncthreads          emulator::sync_block
#define __syncthreads_and      emulator::all_of_block
#define __syncthreads_or(vote) (!emulator::all_of_block(!(vote)))
#define __ballot_sync          emulator::ballot
#define __shfl_sync            emulator::shuffle
#define __expf                 expf
#define __fdividef(x, y)       ((x) / (y))

#define cudaLaunchKernelEx                    emulator::launch
#define cudaFuncSetAttribute(...)             cudaSuccess
#define cudaStreamIsCapturing(stream, status) (*(status) = cudaStreamCaptureStatusNone, cudaSuccess)

static inline void __syncwarp(uint32_t mask = ~0u) {
    emulator::sync_warp(mask);
}
template <typename T> static inline T __shfl_xor_sync(uint32_t mask, T v, int by) {
    return emulator::shuffle(mask, v, emulator::lane() ^ by);
}
template <typename T> static inline T __shfl_up_sync(uint32_t mask, T v, int by) {
    const int lane = emulator::lane();
    return emulator::shuffle(mask, v, lane >= by ? lane - by : lane);
}

static inline void __threadfence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
static inline uint32_t atomicAdd(uint32_t *at, uint32_t by) {
    return __atomic_fetch_add(at, by, __ATOMIC_RELAXED);
}
template <typename T> static inline T __ldg(const T *at) {
    return *at;
}
template <typename T> static inline T __ldcg(const T *at) {
    return *at;
}
template <typename T> static inline void __stcg(T *at, T v) {
    *at = v;
}
template <typename T> static inline T __ldcs(const T *at) {
    return *at;
}

static inline float rsqrtf(float x) {
    return 1.0f / sqrtf(x);
}
static inline float __fmul_rn(float a, float b) {
    return a * b;
}
static inline float __fadd_rn(float a, float b) {
    return a + b;
}
static inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static inline int __ffs(uint32_t x) {
    return __builtin_ffs((int)x);
}
static inline uint32_t __umulhi(uint32_t a, uint32_t b) {
    return (uint32_t)(((uint64_t)a * b) >> 32);
}
static inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selectors) {
    const uint64_t bytes = (uint64_t)high << 32 | low;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t selector = selectors >> 4 * i & 15;
        uint8_t byte = (uint8_t)(bytes >> 8 * (selector & 7));
        if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
        out |= (uint32_t)byte << 8 * i;
    }
    return out;
}
template <typename A, typename B> static inline auto min(A a, B b) {
    return a < b ? a : b;
}
template <typename A, typename B> static inline auto max(A a, B b) {
    return a > b ? a : b;
}

#include "tests/emulated/ptx.h"

#endif
