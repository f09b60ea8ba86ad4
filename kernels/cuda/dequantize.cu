/* dequantize.cu - weights, or regions of them, as plain values, for cuBLAS.
 *
 * A weight in tiles is bound by memory: codes and scales are read once, values written once. A warp
 * takes four neighbouring tiles: each lane has four bytes of codes of a row, which become 16 bytes
 * of bf16, so that 8 lanes write a line. A lane has the scale of one row of one tile and hands it
 * out. */
#include "linear.cuh"
#include "operands.h"

enum {
    THREADS = 256,
    WARPS = THREADS / WARP,
    GROUP = 4, /* tiles of a warp: as many rows as there are lanes */
    WORD_CODES = 8,
    ROW_WORDS = GN_BLOCK / WORD_CODES,
    WORDS = GN_CUDA_TILE_BYTES / (int)sizeof(uint32_t) / WARP, /* of a tile, for a lane */
};

/* ---- in tiles ---- */

struct tiles {
    gn_matrix m;
    gn_cuda_region r;
    void *to;
    int64_t ld;
    uint32_t across, groups; /* groups of tiles side by side; all of them */
};

/* Tiles side by side, or those that are left in a row of tiles. */
struct group {
    int tiles;
    int64_t row, block; /* of the region */
    uint32_t words[GROUP][WORDS];
    uint32_t scale; /* of row lane % 8 of tile lane / 8: a code, or a float's bits */
    float nested;
};

static __device__ __forceinline__ struct group fetch(const struct tiles &all, uint32_t index) {
    struct group g = {};
    const int lane = threadIdx.x % WARP;
    const uint32_t down = index / all.across;
    g.row = (int64_t)down * GN_CUDA_TILE_ROWS;
    g.block = (int64_t)(index - down * all.across) * GROUP;
    g.tiles = (int)min((int64_t)GROUP, all.r.cols / GN_BLOCK - g.block);
    const int64_t per_row = all.m.cols / GN_BLOCK, block = all.r.col0 / GN_BLOCK + g.block;
    const int64_t tile = (all.r.row0 + g.row) / GN_CUDA_TILE_ROWS * per_row + block;
    const uint32_t *words = (const uint32_t *)all.m.data + tile * WORDS * WARP + lane;
#pragma unroll
    for (int i = 0; i < GROUP; i++)
#pragma unroll
        for (int j = 0; j < WORDS; j++)
            if (i < g.tiles) g.words[i][j] = __ldcs(words + (i * WORDS + j) * WARP);
    const int64_t scale = tile * GN_CUDA_TILE_ROWS + lane;
    const int64_t row = all.r.row0 + g.row + lane % GN_CUDA_TILE_ROWS;
    if (lane / GN_CUDA_TILE_ROWS >= g.tiles || row >= all.m.rows) return g;
    if (all.m.absmax_u8) {
        g.scale = all.m.absmax_u8[scale];
        g.nested = __ldg(all.m.nested_absmax +
                         (row * per_row + block + lane / GN_CUDA_TILE_ROWS) / GN_NESTED_BLOCK);
    } else {
        g.scale = __float_as_uint(all.m.absmax[scale]);
    }
    return g;
}

static __device__ __forceinline__ void store(bf16 *to, const float v[WORD_CODES]) {
    bf162 pairs[WORD_CODES / 2];
#pragma unroll
    for (int i = 0; i < WORD_CODES / 2; i++)
        pairs[i] = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
    *(uint4 *)to = *(const uint4 *)pairs;
}
static __device__ __forceinline__ void store(float *to, const float v[WORD_CODES]) {
#pragma unroll
    for (int i = 0; i < WORD_CODES / 4; i++)
        ((float4 *)to)[i] = make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
}

/* What codes and codes of scales mean. */
struct tables {
    float code[16], nested[256];
};

/* ROUNDS: values are rounded to the weight's dtype before they become T. */
template <typename T, bool ROUNDS>
static __device__ __forceinline__ void write(const struct group &g, const struct tiles &all,
                                             const struct tables &t) {
    const int lane = threadIdx.x % WARP, word = lane % ROW_WORDS;
    const float mine = all.m.absmax_u8
                           ? __fadd_rn(__fmul_rn(t.nested[g.scale], g.nested), all.m.offset)
                           : __uint_as_float(g.scale);
    T *to = (T *)all.to + g.row * all.ld + g.block * GN_BLOCK + word * WORD_CODES;
#pragma unroll
    for (int i = 0; i < GROUP; i++)
#pragma unroll
        for (int j = 0; j < WORDS; j++) {
            if (i >= g.tiles) return;
            const int row = j * (WARP / ROW_WORDS) + lane / ROW_WORDS;
            const float scale = __shfl_sync(0xffffffffu, mine, i * GN_CUDA_TILE_ROWS + row);
            /* Bytes from the table's beginning, 4 a code. */
            const uint32_t even = g.words[i][j] >> 2 & 0x3c3c3c3cu;
            const uint32_t odd = g.words[i][j] << 2 & 0x3c3c3c3cu;
            float v[WORD_CODES];
#pragma unroll
            for (int b = 0; b < WORD_CODES / 2; b++) {
                const char *codes = (const char *)t.code;
                v[2 * b] = __fmul_rn(*(const float *)(codes + (even >> 8 * b & 0xff)), scale);
                v[2 * b + 1] = __fmul_rn(*(const float *)(codes + (odd >> 8 * b & 0xff)), scale);
                if (ROUNDS) {
                    v[2 * b] = round_to(v[2 * b], all.m.dtype);
                    v[2 * b + 1] = round_to(v[2 * b + 1], all.m.dtype);
                }
            }
            if (g.row + row < all.r.rows) store(to + row * all.ld + i * GN_BLOCK, v);
        }
}

template <typename T>
static __global__ void __launch_bounds__(THREADS)
    dequantize_tiles_kernel(const __grid_constant__ struct tiles all) {
    __shared__ struct tables t;
    pdl_trigger();
    pdl_wait();
    const uint32_t at = blockIdx.x * WARPS + threadIdx.x / WARP;
    struct group g = {};
    if (at < all.groups) g = fetch(all, at);
    if (threadIdx.x < 16) t.code[threadIdx.x] = all.m.code[threadIdx.x];
    if (all.m.absmax_u8) t.nested[threadIdx.x] = all.m.nested_code[threadIdx.x];
    __syncthreads();
    if (at >= all.groups) return;
    if (all.m.dtype == GN_F16 || (sizeof(T) > sizeof(bf16) && all.m.dtype == GN_BF16))
        write<T, true>(g, all, t);
    else
        write<T, false>(g, all, t);
}

template <typename T>
static gn_status dequantize_tiles(gn_ctx *ctx, const gn_matrix *m, const gn_cuda_region *r, T *to,
                                  int64_t ld) {
    const int64_t across = (r->cols / GN_BLOCK + GROUP - 1) / GROUP;
    const int64_t groups = (r->rows + GN_CUDA_TILE_ROWS - 1) / GN_CUDA_TILE_ROWS * across;
    if (groups > INT32_MAX) return GN_ETOOBIG;
    const struct tiles all = {*m, *r, to, ld, (uint32_t)across, (uint32_t)groups};
    return launch(ctx, dequantize_tiles_kernel<T>, dim3((unsigned)((groups + WARPS - 1) / WARPS)),
                  dim3(THREADS), 0, all);
}

/* ---- anything else ---- */

template <typename T>
static __global__ void __launch_bounds__(THREADS)
    dequantize_kernel(T *to, int64_t ld, gn_matrix m, gn_cuda_region r) {
    pdl_trigger();
    pdl_wait();
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= r.rows * r.cols) return;
    const int64_t row = i / r.cols, col = i % r.cols;
    to[row * ld + col] = from_float<T>(weight_value(m, false, r.row0 + row, r.col0 + col));
}

/* ---- calls ---- */

template <typename T>
static gn_status dequantize(gn_ctx *ctx, const gn_matrix *m, const gn_cuda_region *r, T *to,
                            int64_t ld) {
    if (gn_cuda_is_tiled(m)) return dequantize_tiles(ctx, m, r, to, ld);
    const int64_t n = r->rows * r->cols;
    return launch(ctx, dequantize_kernel<T>, dim3((unsigned)((n + THREADS - 1) / THREADS)),
                  dim3(THREADS), 0, to, ld, *m, *r);
}

gn_status gn_cuda_dequantize(gn_ctx *ctx, const gn_matrix *m, const gn_cuda_region *r, void *to,
                             int64_t ld, gn_dtype dtype) {
    return dtype == GN_F32 ? dequantize(ctx, m, r, (float *)to, ld)
                           : dequantize(ctx, m, r, (bf16 *)to, ld);
}
