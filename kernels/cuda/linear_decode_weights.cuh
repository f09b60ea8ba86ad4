/* linear_decode_weights.cuh - how linear_decode.cu's warps load their weights and scales. */
#ifndef GN_CUDA_LINEAR_DECODE_WEIGHTS_CUH
#define GN_CUDA_LINEAR_DECODE_WEIGHTS_CUH

#include "linear_decode.cuh"

/* ---- weights ---- */

/* The units that a warp loads, one after another: at the same offset from each half's base. Where
 * the last group lacks a half, `most` keeps to the one before. */
template <int R> struct stream {
    const uint8_t *base[2 * R]; /* in the batch's first group */
    int most[2 * R];            /* offset */
    int offset, left;           /* units of the group */
};

/* Bytes from a half's tile in one group to that in the next. */
template <int R> static __device__ __forceinline__ int group_bytes(const struct product &p) {
    return (p.swiglu ? R : 2 * R) * p.blocks * GN_CUDA_TILE_BYTES;
}

template <int R>
static __device__ __forceinline__ void point(struct stream<R> *s, const struct product &p,
                                             const struct work &w, int group0, int unit, int lane) {
    const int in_group = p.swiglu ? R : 2 * R;
#pragma unroll
    for (int h = 0; h < 2 * R; h++) {
        const struct matrix &m = p.part[w.part].m[p.swiglu ? h % 2 : 0];
        const int tiles = (m.rows + GN_CUDA_TILE_ROWS - 1) / GN_CUDA_TILE_ROWS;
        const int tile = min(group0 * in_group + (p.swiglu ? h / 2 : h), tiles - 1);
        s->base[h] = m.tiles + ((int64_t)tile * p.blocks + w.k0) * GN_CUDA_TILE_BYTES + lane * 8;
        keep(s->base[h]);
        s->most[h] =
            (tiles - 1 - tile) / in_group * group_bytes<R>(p) + (w.ks - 1) * GN_CUDA_TILE_BYTES;
    }
    const int group = (int)__umulhi(2 * (uint32_t)unit, w.inverse), k = unit - group * w.ks;
    s->offset = group * group_bytes<R>(p) + k * GN_CUDA_TILE_BYTES;
    s->left = w.ks - k;
}

/* Asks for DEPTH units that begin `ahead` after the next one, if the group has them: each of the
 * first lanes for a line of every half. */
template <int R>
static __device__ __forceinline__ void prefetch_units(const struct stream<R> *s, int ahead,
                                                      int lane) {
    if (s->left < ahead + DEPTH || lane * 128 >= DEPTH * GN_CUDA_TILE_BYTES) return;
    const int offset = s->offset + ahead * GN_CUDA_TILE_BYTES;
#pragma unroll
    for (int h = 0; h < 2 * R; h++)
        prefetch_line(s->base[h] + (h > 0 ? min(offset, s->most[h]) : offset) + lane * (128 - 8));
}

/* The first units of a group. */
template <int R>
static __device__ __forceinline__ void prefetch_group(const struct stream<R> *s, int lane) {
#pragma unroll 1
    for (int ahead = 0; ahead < L2_AHEAD; ahead += DEPTH) prefetch_units<R>(s, ahead, lane);
}

/* `more`: the run goes on after this unit. */
template <int R>
static __device__ __forceinline__ void load_unit(uint2 dst[2 * R], struct stream<R> *s,
                                                 const struct product &p, const struct work &w,
                                                 bool more, int lane) {
    for (int h = 0; h < 2 * R; h++) {
        const int offset = h > 0 ? min(s->offset, s->most[h]) : s->offset;
        dst[h] = load_weights(s->base[h] + (uint32_t)offset);
    }
    s->offset += GN_CUDA_TILE_BYTES;
    if (--s->left == 0) {
        s->offset += group_bytes<R>(p) - w.ks * GN_CUDA_TILE_BYTES;
        s->left = w.ks;
        if (more) prefetch_group<R>(s, here(lane));
    }
}

/* ---- scales ---- */

static __device__ __forceinline__ float decode_scale(const struct product &p,
                                                     const struct matrix &m, int which, int row,
                                                     int k, uint32_t code) {
    const float *nested = (const float *)(shared + p.nested) + which * 256;
    const int block = min(row, m.rows - 1) * p.blocks + k;
    const float absmax = __ldg(m.nested_absmax + block / GN_NESTED_BLOCK);
    return __fadd_rn(__fmul_rn(nested[code], absmax), m.offset);
}

/* A warp's place for the scales of the 16 rows and 64 columns that are i-th in its run: the first
 * are in the table's entries, two in each, the others in memory of their own. */
static __device__ __forceinline__ uint8_t *scales_at(const struct product &p, int warp, int i) {
    if (i < IN_TABLE)
        return shared + (warp * WARP_ENTRIES + i / 2) * ENTRY_BYTES + ENTRY_BYTES / 2 + i % 2 * 64;
    return shared + p.scales + (warp * p.scale_tiles + i - IN_TABLE) * 64;
}

/* Unit `unit` of a batch. */
struct spot {
    int group, k;
};

static __device__ __forceinline__ struct spot spot_of(const struct work &w, struct batch b,
                                                      int unit) {
    const int group = (int)__umulhi(2 * (uint32_t)unit, w.inverse);
    return {b.group0 + group, w.k0 + unit - group * w.ks};
}

/* A run's scales as they are stored, on their way to where they will be decoded: those of half h 32
 * h bytes on. Two lanes a unit. */
template <int R>
static __device__ __forceinline__ void load_scales(const struct product &p, const struct work &w,
                                                   struct batch b, int first, int n, int warp,
                                                   int lane) {
#pragma unroll 1
    for (int i = lane / 2; i < n; i += WARP / 2) {
        const struct spot s = spot_of(w, b, first + i);
        for (int r = 0; r < R; r++) {
            int m;
            const int tile = tile_of<R>(p, w, s.group, 2 * r + lane % 2, &m);
            const struct matrix &matrix = p.part[w.part].m[m];
            const int64_t at = ((int64_t)tile * p.blocks + s.k) * GN_CUDA_TILE_ROWS;
            uint8_t *to = scales_at(p, warp, i * R + r) + lane % 2 * 32;
            if (matrix.nested_code) {
                copy_async<8>(to, (const uint8_t *)matrix.scales + at);
            } else {
                copy_async<16>(to, (const float *)matrix.scales + at);
                copy_async<16>(to + 16, (const float *)matrix.scales + at + 4);
            }
        }
    }
}

/* Decodes them in place, to (8 rows, 2 halves) floats. Four lanes a unit, with 2 rows each. */
template <int R>
static __device__ __forceinline__ void decode_scales(const struct product &p, const struct work &w,
                                                     struct batch b, int first, int n, int warp,
                                                     int lane) {
    const int q = lane % 4;
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
#pragma unroll 1
    for (int i0 = 0; i0 < n; i0 += WARP / 4) {
        const int i = min(i0 + lane / 4, n - 1);
        const struct spot s = spot_of(w, b, first + i);
        for (int r = 0; r < R; r++) {
            uint8_t *at = scales_at(p, warp, i * R + r);
            float2 scale[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int m;
                const int row = tile_of<R>(p, w, s.group, 2 * r + h, &m) * GN_CUDA_TILE_ROWS;
                const struct matrix &matrix = p.part[w.part].m[m];
                if (matrix.nested_code) {
                    const uint32_t codes = *(const uint16_t *)(at + h * 32 + q * 2);
                    scale[h] =
                        make_float2(decode_scale(p, matrix, m, row + 2 * q, s.k, codes & 255),
                                    decode_scale(p, matrix, m, row + 2 * q + 1, s.k, codes >> 8));
                } else {
                    scale[h] = *(const float2 *)(at + h * 32 + q * 8);
                }
            }
            __syncwarp();
            if (i0 + lane / 4 < n)
                *(float4 *)(at + q * 16) =
                    make_float4(scale[0].x, scale[1].x, scale[0].y, scale[1].y);
        }
        __syncwarp();
    }
}

#endif
