/* attention_tiles.cuh - flash attention's tiles in shared memory, in bfloat16, and what a warp of a
 * block multiplies of them on the matrix units.
 *
 * Rows of a tile are whole 16-byte chunks, an odd number of them or permuted, so that the 8 rows
 * that one matrix load reads lie in different banks. Lane 4g + c of a warp holds, of a fragment
 * of 16 rows by 8 columns, rows g (elements 0 and 1) and g + 8 (2 and 3), columns 2c and 2c + 1. */
#ifndef GN_CUDA_ATTENTION_TILES_CUH
#define GN_CUDA_ATTENTION_TILES_CUH

#include "attention.h"

/* Of a row of D values: its chunks, and the step to the next row in bytes. */
template <int D> constexpr int CHUNKS = D / 8;
template <int D> constexpr int STEP = (D % 64 == 0 ? CHUNKS<D> : CHUNKS<D> | 1) * 16;

/* Byte of a chunk in a tile. */
template <int D> static __device__ __forceinline__ int chunk_at(int row, int chunk) {
    return row * STEP<D> + (D % 64 == 0 ? chunk ^ (row % 8) : chunk) * 16;
}

/* Starts copying ROWS rows of D values, by a block of THREADS; zeros from row n on. */
template <int D, int ROWS, int THREADS>
static __device__ __forceinline__ void copy_rows(uint32_t to, const bf16 *from, int64_t ld, int n) {
#pragma unroll
    for (int i = 0; i < (ROWS * CHUNKS<D> + THREADS - 1) / THREADS; i++) {
        const int at = threadIdx.x + i * THREADS, row = at / CHUNKS<D>, chunk = at % CHUNKS<D>;
        if (ROWS * CHUNKS<D> % THREADS != 0 && row >= ROWS) break;
        copy_async_or_zeros(to + chunk_at<D>(row, chunk),
                            from + (row < n ? row : 0) * ld + chunk * 8, row < n);
    }
}

/* c += a b^T, of 16 M rows of one tile and 16 N rows of another. */
template <int D, int M, int N>
static __device__ __forceinline__ void multiply_turned(float c[M][2 * N][4], uint32_t a_rows,
                                                       uint32_t b_rows) {
    const int lane = threadIdx.x % WARP;
    const int a_row = lane % 16, a_chunk = lane / 16;
    const int b_row = lane / 16 * 8 + lane % 8, b_chunk = lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
            load_matrices(a[m], a_rows + 16 * m * STEP<D> + chunk_at<D>(a_row, 2 * k + a_chunk));
#pragma unroll
        for (int n = 0; n < N; n++) {
            uint32_t b[4];
            load_matrices(b, b_rows + 16 * n * STEP<D> + chunk_at<D>(b_row, 2 * k + b_chunk));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(c[m][2 * n], a[m], b);
                mma_bf16(c[m][2 * n + 1], a[m], b + 2);
            }
        }
    }
}

/* c += a b, of 16 rows of a tile: their columns from 16 `first` on, as many of 16 N as there are;
 * a D that is a multiple of 64 has them all. */
template <int D, int M, int N>
static __device__ __forceinline__ void multiply(float c[M][2 * N][4], const uint32_t a[M][4],
                                                uint32_t b_rows, int first) {
    const int row = threadIdx.x % 16, chunk = threadIdx.x % WARP / 16;
#pragma unroll
    for (int n = 0; n < N; n++) {
        if (D % 64 != 0 && first + n >= D / 16) break;
        uint32_t b[4];
        load_turned_matrices(b, b_rows + chunk_at<D>(row, 2 * (first + n) + chunk));
#pragma unroll
        for (int m = 0; m < M; m++) {
            mma_bf16(c[m][2 * n], a[m], b);
            mma_bf16(c[m][2 * n + 1], a[m], b + 2);
        }
    }
}

/* ---- forward ----
 *
 * A block takes 64 or 128 rows of one sequence and head, and passes over the keys and values 64
 * positions at a time with a running maximum and sum. It is bound by matrix operations (4 D of
 * them a query and position); then by shared memory, whose fragments of keys and values a warp
 * uses for 32 rows where there are enough rows to fill the device. While one tile of keys and
 * values is multiplied the next is copied; two blocks to an SM fill each other's gaps. */

enum { WARPS = 4, THREADS = WARPS * WARP, KEYS = 64 };

/* M: pieces of 16 rows a warp. */
template <int M> constexpr int ROWS = M * 16 * WARPS;
/* Rows of the queries' tile, then two tiles each of keys and of values. */
template <int D, int M> constexpr int SHARED = (ROWS<M> + 4 * KEYS) * STEP<D>;

/* What a warp has of its rows 16m + g + 8 half: the sum of weighted values, the greatest score, and
 * the lane's part of the sum of weights. */
template <int D, int M> struct attended { float out[M][D / 8][4], top[M][2], sum[M][2]; };

template <int D, int M>
static __device__ __forceinline__ void
multiply_values(float out[M][D / 8][4], const float weight[M][KEYS / 8][4], uint32_t values) {
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *w = &weight[m][2 * k + i / 2][i % 2 * 2];
                a[m][i] = pack_bf16(w[0], w[1]);
            }
        multiply<D, M, D / 16>(out, a, values + 16 * k * STEP<D>, 0);
    }
}

/* One row's turn: scores become weights against the new maximum, what was summed shrinks to it.
 * Its elements are score[n][2 half], score[n][2 half + 1] of four lanes. `scale`: to powers of 2.
 */
template <int D>
static __device__ __forceinline__ void soften(float score[KEYS / 8][4], float out[D / 8][4],
                                              int half, float *top, float *sum, float scale) {
    float new_top = *top;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
        new_top = fmaxf(new_top, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
    new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, 1));
    new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, 2));
    const float shrink = exp2_fast((*top - new_top) * scale), base = new_top * scale;
    float added = 0.0f;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; i++) {
            score[n][i] = exp2_fast(score[n][i] * scale - base);
            added += score[n][i];
        }
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        out[n][2 * half] *= shrink;
        out[n][2 * half + 1] *= shrink;
    }
    *sum = *sum * shrink + added;
    *top = new_top;
}

/* The block's rows, which stand at position0 and on, over n_tiles of keys and values. `memory`: the
 * shared memory that SHARED counts, into which copies of the queries are under way.
 * copy_tiles(keys, values, j) starts copying tile j. scale_scores(score, j, are_weights) multiplies
 * scores by what tile j's keys are to be multiplied by, or weights by what its values are. */
template <int D, int M, typename C, typename S>
static __device__ __forceinline__ void attend(attended<D, M> &a, uint32_t memory, int position0,
                                              int n_tiles, float scale, C copy_tiles,
                                              S scale_scores) {
    const uint32_t keys = memory + ROWS<M> * STEP<D>, values = keys + 2 * KEYS * STEP<D>;
    copy_tiles(keys, values, 0);
    const int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * 16 * M;
#pragma unroll
    for (int m = 0; m < M; m++)
        for (int half = 0; half < 2; half++) a.top[m][half] = -INFINITY, a.sum[m][half] = 0.0f;

    for (int j = 0; j < n_tiles; j++) {
        const int now = j % 2 * KEYS * STEP<D>, then = KEYS * STEP<D> - now;
        wait_for_all_copies();
        __syncthreads(); /* everybody's are there, and nobody reads the other pair of tiles */
        if (j + 1 < n_tiles) copy_tiles(keys + then, values + then, j + 1);
        if (j * KEYS > position0 + warp_row + 16 * M - 1) continue; /* all after the warp's rows */
        float score[M][KEYS / 8][4] = {};
        multiply_turned<D, M, KEYS / 16>(score, memory + warp_row * STEP<D>, keys + now);
        scale_scores(score, j, false);
        if ((j + 1) * KEYS - 1 > position0 + warp_row) {
#pragma unroll
            for (int x = 0; x < M * KEYS / 8 * 4; x++) {
                const int m = x / (KEYS / 8 * 4), n = x / 4 % (KEYS / 8), i = x % 4;
                const int row = warp_row + 16 * m + lane / 4 + i / 2 * 8;
                const int p = j * KEYS + 8 * n + lane % 4 * 2 + i % 2;
                if (p > position0 + row) score[m][n][i] = -INFINITY;
            }
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                soften<D>(score[m], a.out[m], half, &a.top[m][half], &a.sum[m][half], scale);
        scale_scores(score, j, true);
        multiply_values<D, M>(a.out, score, values + now);
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            for (int by = 1; by < 4; by *= 2)
                a.sum[m][half] += __shfl_xor_sync(0xffffffffu, a.sum[m][half], by);
}

/* The same of keys and values as they are. */
template <int D, int M, typename C>
static __device__ __forceinline__ void attend(attended<D, M> &a, uint32_t memory, int position0,
                                              int n_tiles, float scale, C copy_tiles) {
    attend(a, memory, position0, n_tiles, scale, copy_tiles,
           [](float(*)[KEYS / 8][4], int, bool) {});
}

/* Weighted values over their sum, as the first n of the block's rows at y; by way of the warp's own
 * queries, which are no longer needed, for whole rows at once. */
template <int D, int M>
static __device__ __forceinline__ void store_attended(bf16 *y, int64_t ld, int n,
                                                      const attended<D, M> &a, char *memory) {
    const int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * 16 * M;
    char *mine = memory + warp_row * STEP<D>;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float over = 1.0f / a.sum[m][half];
            const int row = 16 * m + 8 * half + lane / 4;
#pragma unroll
            for (int d = 0; d < D / 8; d++)
                *(uint32_t *)(mine + chunk_at<D>(row, d) + lane % 4 * 4) =
                    pack_bf16(a.out[m][d][2 * half] * over, a.out[m][d][2 * half + 1] * over);
        }
    __syncwarp();
    for (int at = lane; at < 16 * M * CHUNKS<D>; at += WARP) {
        const int row = at / CHUNKS<D>, chunk = at % CHUNKS<D>;
        if (warp_row + row >= n) break;
        *(uint4 *)(y + (warp_row + row) * ld + chunk * 8) =
            *(const uint4 *)(mine + chunk_at<D>(row, chunk));
    }
}

/* No more tiles of `size` rows than this, whatever rows each of `seqs` sequences, of min_rows at
 * least, has of T. */
static inline int64_t max_tiles(int64_t T, int64_t seqs, int64_t min_rows, int64_t size) {
    const int64_t most = T / min_rows;
    return (T + (size - 1) * (seqs < most ? seqs : most)) / size;
}

#endif
