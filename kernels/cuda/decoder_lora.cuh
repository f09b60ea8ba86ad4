/* decoder_lora.cuh - LoRA within decoder.cu, by warps of its own beside those that multiply.
 *
 * A phase's terms need u = A x whole before B u. The helpers of all blocks share A's rows, a row
 * and a term at a time, count themselves at a counter when their part of u is in memory, and wait
 * there for the others; then those of each block add B u for its groups. All that takes less time
 * than the phase's weights, so it costs little but its bytes. */
#ifndef GN_CUDA_DECODER_LORA_CUH
#define GN_CUDA_DECODER_LORA_CUH

#include "decoder.cuh"

static __device__ __forceinline__ const gn_lora_pair &
pair_of(const struct program &p, const struct phase &ph, int term, int part) {
    return p.batch.terms[term].placed[ph.pair + part];
}

/* 8 products of bf16. */
static __device__ __forceinline__ float dot8(uint4 a, uint4 b) {
    const bf162 *x = (const bf162 *)&a, *y = (const bf162 *)&b;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 u = __bfloat1622float2(x[i]), v = __bfloat1622float2(y[i]);
        sum += u.x * v.x + u.y * v.y;
    }
    return sum;
}

/* u of one row of A, for the term's rows of x: rows of u[r] are `rows` floats apart. */
static __device__ __forceinline__ void shrink_row(const struct phase &ph, const gn_lora &term,
                                                  const gn_lora_pair &pair, int r, float *u,
                                                  int lane) {
    enum { AT_ONCE = 4 };
    const int K = ph.blocks * GN_BLOCK;
    const bf16 *a = (const bf16 *)pair.a.data + r * pair.a.ld;
    for (int t0 = 0; t0 < term.rows; t0 += AT_ONCE) {
        float sums[AT_ONCE] = {};
        const bf16 *x = ph.x + (int64_t)(term.row0 + t0) * K;
#pragma unroll 4
        for (int k = lane * 8; k < K; k += WARP * 8) {
            const uint4 weights = __ldg((const uint4 *)(a + k));
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (t0 + i < term.rows)
                    sums[i] += dot8(weights, load_fresh16(x + (int64_t)i * K + k));
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const float sum = warp_sum(sums[i]);
            if (lane == 0 && t0 + i < term.rows) u[r * term.rows + t0 + i] = sum;
        }
    }
}

/* This helper's rows of A; helper `mine` of `all`. */
static __device__ __forceinline__ void shrink(const struct program &p, const struct phase &ph,
                                              int mine, int all, int lane) {
    float *u = p.u;
    int next = mine; /* counting the rows of A of what is still to come */
    for (int i = 0; i < p.n_terms; i++)
        for (int part = 0; part < ph.n_parts; part++) {
            const gn_lora &term = p.batch.terms[i];
            const gn_lora_pair &pair = pair_of(p, ph, i, part);
            for (; next < pair.rank; next += all) shrink_row(ph, term, pair, next, u, lane);
            next -= pair.rank;
            u += pair.rank * term.rows;
        }
}

/* All helpers' u is there. `times`: that this was waited for, with this one. */
static __device__ __forceinline__ void meet_helpers(const struct program &p, uint32_t times,
                                                    int lane) {
    __syncwarp();
    if (lane == 0) {
        __threadfence();
        atomicAdd(&p.sync[2], 1u);
        while (load_acquire(&p.sync[2]) < times * gridDim.x * HELPERS) {
        }
        __threadfence();
    }
    __syncwarp();
}

/* The part that row `row` of a group belongs to, and its number there. */
struct part_row {
    int part, n;
};

static __device__ __forceinline__ struct part_row
part_row_of(const struct program &p, const struct phase &ph, int group, int row) {
    const int h = row / GN_CUDA_TILE_ROWS, in_tile = row % GN_CUDA_TILE_ROWS;
    if (ph.kind == ADD) return {0, group * GROUP_ROWS + row};
    if (ph.kind == SWIGLU) return {h, group * GN_CUDA_TILE_ROWS + in_tile};
    int first;
    const int part = head_weight(p, group, &first), i = group - first;
    const int in_head = i - quotient(i, p.by_half) * p.by_half.d;
    const int tile = 2 * i - in_head + h * p.by_half.d;
    return {part, tile * GN_CUDA_TILE_ROWS + in_tile};
}

/* Half of row n of B times u, whose ranks are `rows` floats apart. */
static __device__ __forceinline__ float expand_row(const gn_lora_pair &pair, int n, const float *u,
                                                   int rows, int half) {
    const bf16 *b = (const bf16 *)pair.b.data + n * pair.b.ld;
    const int middle = (pair.rank + 15) / 16 * 8;
    const int end = half ? pair.rank : min(middle, pair.rank);
    const bool is_aligned = pair.b.ld % 8 == 0 && (uintptr_t)pair.b.data % 16 == 0;
    float sum = 0.0f;
    int r = half ? middle : 0;
#pragma unroll 2
    for (; is_aligned && r + 8 <= end; r += 8) {
        const uint4 eight = __ldg((const uint4 *)(b + r));
        const bf16 *values = (const bf16 *)&eight;
#pragma unroll
        for (int i = 0; i < 8; i++) sum += to_float(values[i]) * __ldcg(u + (r + i) * rows);
    }
    for (; r < end; r++) sum += to_float(b[r]) * __ldcg(u + r * rows);
    return sum;
}

/* What the terms add to groups first + helper, + HELPERS, ... of n, as the sums of one more warp.
 * Two lanes a row of the group, half of the ranks each. */
template <typename Leave>
static __device__ __forceinline__ void expand(const struct program &p, const struct phase &ph,
                                              int first, int n, int helper, int lane, Leave leave) {
    const int row = lane % GROUP_ROWS, half = lane / GROUP_ROWS;
    for (int group = helper; group < n; group += HELPERS) {
        const struct part_row at = part_row_of(p, ph, first + group, row);
        for (int t = 0; t < p.T; t++) {
            const float *u = p.u;
            float sum = 0.0f;
            for (int i = 0; i < p.n_terms; i++) {
                const gn_lora &term = p.batch.terms[i];
                for (int part = 0; part < ph.n_parts; part++) {
                    const gn_lora_pair &pair = pair_of(p, ph, i, part);
                    if (part == at.part && t >= term.row0 && t < term.row0 + term.rows)
                        sum += term.scale * pair.scale *
                               expand_row(pair, at.n, u + t - term.row0, term.rows, half);
                    u += pair.rank * term.rows;
                }
            }
            sum += __shfl_xor_sync(~0u, sum, GROUP_ROWS);
            if (half == 0) leave(group, t, row, sum);
        }
    }
}

#endif
