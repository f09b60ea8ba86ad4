/* linear_mma.cuh - instructions of Hopper (sm_90a) that linear_mma.cu is made of: copies in bulk
 * that count themselves in at a barrier, clusters, and a warpgroup's asynchronous products. */
#ifndef GN_CUDA_LINEAR_MMA_CUH
#define GN_CUDA_LINEAR_MMA_CUH

#include "linear_tiles.cuh"

/* ---- barriers in shared memory: `at` is an address there ---- */

static __device__ __forceinline__ void barrier_init(uint32_t at, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}
/* Makes inits seen by copies and by the cluster's other blocks, once they have synchronised. */
static __device__ __forceinline__ void barriers_ready(void) {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
/* Arrives, and makes the phase wait for so many copied bytes more. */
static __device__ __forceinline__ void barrier_expect(uint32_t at, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
                 : "memory");
}
/* `at` in the cluster's shared memory. What those who wait do next is copy over what this thread
 * has read: nothing that it wrote must be seen, so neither here nor in barrier_wait is there an
 * order over the cluster, which costs a fence, and L1. */
static __device__ __forceinline__ void barrier_arrive_cluster(uint32_t at) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(at) : "memory");
}
/* Until the phase of that parity is over. */
static __device__ __forceinline__ void barrier_wait(uint32_t at, uint32_t parity) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done;\n"
                 "bra again;\n"
                 "done:\n"
                 "}" ::"r"(at),
                 "r"(parity)
                 : "memory");
}

/* Of so many threads of the block, at one of the hardware's barriers. */
static __device__ __forceinline__ void sync_some(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/* ---- clusters ---- */

static __device__ __forceinline__ uint32_t peer_address(uint32_t at, int rank) {
    uint32_t peer;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(at), "r"(rank));
    return peer;
}
/* Nothing that was written need be seen, but what barriers_ready has made ready. */
static __device__ __forceinline__ void arrive_at_cluster(void) {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
static __device__ __forceinline__ void wait_for_cluster(void) {
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

/* ---- copies in bulk: 16-byte aligned, of a multiple of 16 bytes ---- */

/* To the same place of every block in the mask, each counting at its own barrier. */
static __device__ __forceinline__ void copy_bulk_to(uint16_t blocks, uint32_t to, const void *from,
                                                    uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "h"(blocks)
                 : "memory");
}

/* ---- global memory ---- */

/* What the block's other threads wrote before they met this one at a barrier is seen by whoever
 * sees the sum (load_acquire). */
static __device__ __forceinline__ void add_release(uint32_t *at, uint32_t v) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}

/* ---- products of a warpgroup ---- */

/* Describes rows of 128 bytes, swizzled, as the K-major operand: eights of rows 1024 bytes apart.
 */
static __device__ __forceinline__ uint64_t describe_rows(uint32_t at) {
    return (uint64_t)1 << 62 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 16 |
           (uint64_t)((at & 0x3ffff) >> 4);
}

static __device__ __forceinline__ void wgmma_fence(void) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
static __device__ __forceinline__ void wgmma_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/* Until all are done. What is read of c afterwards cannot move before. */
template <int N> static __device__ __forceinline__ void wgmma_wait(float (&c)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");
}

#define GN_C16_0     "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define GN_C16_1     "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define GN_C16_2     "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define GN_C16_3     "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define GN_C4(c, i)  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define GN_C16(c, i) GN_C4(c, i), GN_C4(c, i + 4), GN_C4(c, i + 8), GN_C4(c, i + 12)

/* c (64, n) = a b, or c += a b with `add`: a (64, 16) in registers, b (16, n) as described.
 * Operands after c's are numbered from a0 on. */
#define GN_WGMMA(n, c_list, a0, a1, a2, a3, b, sum, ...)                                           \
    asm volatile("{\n"                                                                             \
                 ".reg .pred p;\n"                                                                 \
                 "setp.ne.b32 p, %" #sum ", 0;\n"                                                  \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" c_list "}, {%" #a0   \
                 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", p, 1, 1, 0;\n"                            \
                 "}"                                                                               \
                 : __VA_ARGS__                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(rows), "r"((int)add))

static __device__ __forceinline__ void wgmma(float (&c)[16], const uint32_t *a, uint64_t rows,
                                             bool add) {
    GN_WGMMA(32, GN_C16_0, 16, 17, 18, 19, 20, 21, GN_C16(c, 0));
}
static __device__ __forceinline__ void wgmma(float (&c)[32], const uint32_t *a, uint64_t rows,
                                             bool add) {
    GN_WGMMA(64, GN_C16_0 "," GN_C16_1, 32, 33, 34, 35, 36, 37, GN_C16(c, 0), GN_C16(c, 16));
}
static __device__ __forceinline__ void wgmma(float (&c)[48], const uint32_t *a, uint64_t rows,
                                             bool add) {
    GN_WGMMA(96, GN_C16_0 "," GN_C16_1 "," GN_C16_2, 48, 49, 50, 51, 52, 53, GN_C16(c, 0),
             GN_C16(c, 16), GN_C16(c, 32));
}
static __device__ __forceinline__ void wgmma(float (&c)[64], const uint32_t *a, uint64_t rows,
                                             bool add) {
    GN_WGMMA(128, GN_C16_0 "," GN_C16_1 "," GN_C16_2 "," GN_C16_3, 64, 65, 66, 67, 68, 69,
             GN_C16(c, 0), GN_C16(c, 16), GN_C16(c, 32), GN_C16(c, 48));
}

#endif
