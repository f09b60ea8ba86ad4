/* ptx.cuh - instructions that CUDA C++ has no words for, as kernels use them. Those of kernels that
 * tests/emulated runs on the CPU are all here: its ptx.h does the same there. */
#ifndef GN_CUDA_PTX_CUH
#define GN_CUDA_PTX_CUH

#include <stdint.h>

/* ---- matrix units ---- */

/* c += a b, with a 16x16 and b 16x8 in bf16, c 16x8 in float32. */
static __device__ __forceinline__ void mma_bf16(float c[4], const uint32_t a[4],
                                                const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* An 8x8 matrix of 16-bit values, a row to four lanes, turned. */
static __device__ __forceinline__ uint32_t turn_matrix(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

/* Four 8x8 matrices; each lane gives the address of a row, lanes 8i to 8i + 7 those of matrix i. */
static __device__ __forceinline__ void load_matrices(uint32_t m[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
}
static __device__ __forceinline__ void load_turned_matrices(uint32_t m[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
}

/* 2^x, within 2 ulp; 0 for -infinity. */
static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* ---- global memory ---- */

/* What other kernels or blocks write: from L2, never from a stale L1. */
static __device__ __forceinline__ float load_fresh(const float *at) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(at) : "memory");
    return v;
}

static __device__ __forceinline__ uint32_t load_acquire(const uint32_t *at) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}

static __device__ __forceinline__ uint32_t load_relaxed(const uint32_t *at) {
    uint32_t v;
    asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}

/* What is read once, so that it stays out of L1, where n > 0; else v keeps what it has. */
static __device__ __forceinline__ void load_once(uint2 &v, const void *at, int n) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.gt.s32 p, %3, 0;\n"
                 "@p ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];\n"
                 "}"
                 : "+r"(v.x), "+r"(v.y)
                 : "l"(at), "r"(n));
}
static __device__ __forceinline__ void load_once(uint4 &v, const void *at, int n) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.gt.s32 p, %5, 0;\n"
                 "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 "}"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "l"(at), "r"(n));
}

static __device__ __forceinline__ void load_once(uint32_t &v, const uint8_t *at, int n) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.gt.s32 p, %2, 0;\n"
                 "@p ld.global.nc.u8 %0, [%1];\n"
                 "}"
                 : "+r"(v)
                 : "l"(at), "r"(n));
}
static __device__ __forceinline__ void load_once(float &v, const float *at, int n) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.gt.s32 p, %2, 0;\n"
                 "@p ld.global.nc.f32 %0, [%1];\n"
                 "}"
                 : "+f"(v)
                 : "l"(at), "r"(n));
}

static __device__ __forceinline__ void prefetch_line(const void *at) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

/* ---- registers ---- */

/* v stays in its register: the compiler cannot make it anew from where it came. */
static __device__ __forceinline__ void keep(int &v) {
    asm volatile("" : "+r"(v));
}

/* ---- shared memory ---- */

static __device__ __forceinline__ uint32_t load_shared(uint32_t at) {
    uint32_t v;
    asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
    return v;
}

static __device__ __forceinline__ uint32_t shared_address(const void *at) {
    return (uint32_t)__cvta_generic_to_shared(at);
}

template <int BYTES>
static __device__ __forceinline__ void copy_async(const void *to, const void *from) {
    const uint32_t at = shared_address(to);
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES)
                     : "memory");
}

/* 16 bytes, or as many zeros. */
static __device__ __forceinline__ void copy_async_or_zeros(uint32_t to, const void *from,
                                                           bool is_there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(is_there ? 16 : 0)
                 : "memory");
}

static __device__ __forceinline__ void store_shared(uint32_t to, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
}

/* What this thread has asked for since the last time becomes a group. */
static __device__ __forceinline__ void commit_copies(void) {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Until all of its groups but the last N are there. */
template <int N> static __device__ __forceinline__ void wait_for_copies(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* Until all this thread's copies are there. */
static __device__ __forceinline__ void wait_for_all_copies(void) {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* ---- dependent launches ---- */

/* Waits for everything that earlier kernels of the stream wrote. On chips before Hopper kernels
 * do not overlap and there is nothing to wait for. */
static __device__ __forceinline__ void pdl_wait(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Lets the next kernel start its preamble when every block of this one got here. */
static __device__ __forceinline__ void pdl_trigger(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif
