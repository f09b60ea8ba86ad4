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
 * This is the lower half of a descriptor; 16 bytes further it is one more. */
static __device__ __forceinline__ uint32_t describe_rows(uint32_t at) {
    return 1 << 16 | (at & 0x3ffff) >> 4;
}
/* The upper half, which is always the same. */
enum { ROWS_UPPER = 1 << 30 | 1024 >> 4 };

static __device__ __forceinline__ void wgmma_fence(void) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
static __device__ __forceinline__ void wgmma_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/* Until all but the last group are done. Only then is `a`, an operand of the one before, written.
 */
template <int N> static __device__ __forceinline__ void wgmma_wait_but_one(uint32_t (&a)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(a[i])::"memory");
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
#define GN_C16_4     "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define GN_C16_5     "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define GN_C16_6     "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define GN_C16_7     "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define GN_C64_0     GN_C16_0 "," GN_C16_1 "," GN_C16_2 "," GN_C16_3
#define GN_C4(c, i)  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define GN_C16(c, i) GN_C4(c, i), GN_C4(c, i + 4), GN_C4(c, i + 8), GN_C4(c, i + 12)
#define GN_C64(c)    GN_C16(c, 0), GN_C16(c, 16), GN_C16(c, 32), GN_C16(c, 48)

/* c (64, n) += a b: a (64, 16) in registers, b (16, n) as described. Operands after c's are
 * numbered from a0 on. */
#define GN_WGMMA(n, c_list, a0, a1, a2, a3, b, ...)                                                \
    asm volatile("{\n"                                                                             \
                 ".reg .pred p;\n"                                                                 \
                 "setp.eq.b32 p, 0, 0;\n"                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" c_list "}, {%" #a0   \
                 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", p, 1, 1, 0;\n"                            \
                 "}"                                                                               \
                 : __VA_ARGS__                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),                                     \
                   "l"((uint64_t)ROWS_UPPER << 32 | rows))

static __device__ __forceinline__ void wgmma(float (&c)[16], const uint32_t *a, uint32_t rows) {
    GN_WGMMA(32, GN_C16_0, 16, 17, 18, 19, 20, GN_C16(c, 0));
}
static __device__ __forceinline__ void wgmma(float (&c)[32], const uint32_t *a, uint32_t rows) {
    GN_WGMMA(64, GN_C16_0 "," GN_C16_1, 32, 33, 34, 35, 36, GN_C16(c, 0), GN_C16(c, 16));
}
static __device__ __forceinline__ void wgmma(float (&c)[64], const uint32_t *a, uint32_t rows) {
    GN_WGMMA(128, GN_C64_0, 64, 65, 66, 67, 68, GN_C64(c));
}
static __device__ __forceinline__ void wgmma(float (&c)[96], const uint32_t *a, uint32_t rows) {
    GN_WGMMA(192, GN_C64_0 "," GN_C16_4 "," GN_C16_5, 96, 97, 98, 99, 100, GN_C64(c), GN_C16(c, 64),
             GN_C16(c, 80));
}
static __device__ __forceinline__ void wgmma(float (&c)[128], const uint32_t *a, uint32_t rows) {
    GN_WGMMA(256, GN_C64_0 "," GN_C16_4 "," GN_C16_5 "," GN_C16_6 "," GN_C16_7, 128, 129, 130, 131,
             132, GN_C64(c), GN_C16(c, 64), GN_C16(c, 80), GN_C16(c, 96), GN_C16(c, 112));
}

#endif
