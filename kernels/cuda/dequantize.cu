/* dequantize.cu - weights, or regions of them, as plain values, for cuBLAS.
 *
 * A weight in tiles is bound by memory: codes and scales are read once, values written once. A
 * block fills an SM and stays, so that it may also run on a few SMs beside a product
 * (linear_ahead.cu). Its warps take four neighbouring tiles at a time and fetch the next four
 * before they write: each lane has four bytes of codes of a row, which become 16 bytes of bf16, so
 * that 8 lanes write a line. A lane has the scale of one row of one tile and hands it out. */
#include "linear.cuh"
#include "operands.h"

enum {
    THREADS = 256,
    RESIDENT_THREADS = 1024,
    RESIDENT_WARPS = RESIDENT_THREADS / WARP,
    GROUP = 4, /* tiles of a warp: as many rows as there are lanes */
    WORD_CODES = 8,
    ROW_WORDS = GN_BLOCK / WORD_CODES,
    WORDS = GN_CUDA_TILE_BYTES / (int)sizeof(uint32_t) / WARP, /* of a tile, for a lane */
    CLUSTER = 2, /* SMs that are left free come in pairs */
};

/* ---- in tiles ---- */

struct piece {
    gn_matrix m;
    gn_cuda_region r;
    void *to;
    int64_t ld;
    int first, across; /* group of tiles of all pieces; groups side by side */
};

struct pieces {
    struct piece piece[GN_MAX_PARTS];
    int n, groups;
};

/* Four tiles side by side, or those that are left in a row of tiles. */
struct group {
    int piece, tiles;
    int64_t row, block; /* of the region */
    uint32_t words[GROUP][WORDS];
    uint32_t scale; /* of row lane % 8 of tile lane / 8: a code, or a float's bits */
    float nested;
};

static __device__ __forceinline__ struct group fetch(const struct pieces &all, int index) {
    struct group g = {};
    while (g.piece + 1 < all.n && index >= all.piece[g.piece + 1].first) g.piece++;
    const struct piece &p = all.piece[g.piece];
    const int lane = threadIdx.x % WARP, at = index - p.first;
    const int down = at / p.across, blocks = (int)(p.r.cols / GN_BLOCK);
    g.row = (int64_t)down * GN_CUDA_TILE_ROWS;
    g.block = (at - down * p.across) * GROUP;
    g.tiles = min((int)GROUP, blocks - (int)g.block);
    const int64_t per_row = p.m.cols / GN_BLOCK, block = p.r.col0 / GN_BLOCK + g.block;
    const int64_t tile = (p.r.row0 + g.row) / GN_CUDA_TILE_ROWS * per_row + block;
    const uint32_t *words = (const uint32_t *)p.m.data + tile * WORDS * WARP + lane;
#pragma unroll
    for (int i = 0; i < GROUP; i++)
#pragma unroll
        for (int j = 0; j < WORDS; j++)
            if (i < g.tiles) g.words[i][j] = __ldcs(words + (i * WORDS + j) * WARP);
    const int64_t scale = tile * GN_CUDA_TILE_ROWS + lane;
    const int64_t row = p.r.row0 + g.row + lane % GN_CUDA_TILE_ROWS;
    if (lane / GN_CUDA_TILE_ROWS >= g.tiles || row >= p.m.rows) return g;
    if (p.m.absmax_u8) {
        g.scale = p.m.absmax_u8[scale];
        g.nested = __ldg(p.m.nested_absmax +
                         (row * per_row + block + lane / GN_CUDA_TILE_ROWS) / GN_NESTED_BLOCK);
    } else {
        g.scale = __float_as_uint(p.m.absmax[scale]);
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

/* What pieces' codes and codes of scales mean. */
struct tables {
    float code[GN_MAX_PARTS][16], nested[GN_MAX_PARTS][256];
};

/* ROUNDS: values are rounded to the weight's dtype before they become T. */
template <typename T, bool ROUNDS>
static __device__ __forceinline__ void write(const struct group &g, const struct piece &p,
                                             const struct tables &t) {
    const int lane = threadIdx.x % WARP, word = lane % ROW_WORDS;
    const float mine = p.m.absmax_u8
                           ? __fadd_rn(__fmul_rn(t.nested[g.piece][g.scale], g.nested), p.m.offset)
                           : __uint_as_float(g.scale);
    const uint32_t table = 0x01010101u * (uint32_t)sizeof t.code[0] * (uint32_t)g.piece;
    T *to = (T *)p.to + g.row * p.ld + g.block * GN_BLOCK + word * WORD_CODES;
#pragma unroll
    for (int i = 0; i < GROUP; i++)
#pragma unroll
        for (int j = 0; j < WORDS; j++) {
            if (i >= g.tiles) return;
            const int row = j * (WARP / ROW_WORDS) + lane / ROW_WORDS;
            const float scale = __shfl_sync(0xffffffffu, mine, i * GN_CUDA_TILE_ROWS + row);
            /* Bytes from the first table on, 4 a code. */
            const uint32_t even = (g.words[i][j] >> 2 & 0x3c3c3c3cu) | table;
            const uint32_t odd = (g.words[i][j] << 2 & 0x3c3c3c3cu) | table;
            float v[WORD_CODES];
#pragma unroll
            for (int b = 0; b < WORD_CODES / 2; b++) {
                const char *codes = (const char *)t.code;
                v[2 * b] = __fmul_rn(*(const float *)(codes + (even >> 8 * b & 0xff)), scale);
                v[2 * b + 1] = __fmul_rn(*(const float *)(codes + (odd >> 8 * b & 0xff)), scale);
                if (ROUNDS) {
                    v[2 * b] = round_to(v[2 * b], p.m.dtype);
                    v[2 * b + 1] = round_to(v[2 * b + 1], p.m.dtype);
                }
            }
            if (g.row + row < p.r.rows) store(to + row * p.ld + i * GN_BLOCK, v);
        }
}

template <typename T>
static __global__ void __launch_bounds__(RESIDENT_THREADS, 1)
    dequantize_tiles_kernel(const __grid_constant__ struct pieces all) {
    __shared__ struct tables t;
    for (int i = threadIdx.x; i < all.n * 16; i += RESIDENT_THREADS)
        t.code[i / 16][i % 16] = all.piece[i / 16].m.code[i % 16];
    for (int i = threadIdx.x; i < all.n * 256; i += RESIDENT_THREADS)
        if (all.piece[i / 256].m.absmax_u8)
            t.nested[i / 256][i % 256] = all.piece[i / 256].m.nested_code[i % 256];
    __syncthreads();
    pdl_trigger();
    pdl_wait();
    const int step = (int)gridDim.x * RESIDENT_WARPS;
    int at = (int)blockIdx.x * RESIDENT_WARPS + (int)threadIdx.x / WARP;
    if (at >= all.groups) return;
    struct group now = fetch(all, at);
    while (true) {
        at += step;
        struct group then = {};
        if (at < all.groups) then = fetch(all, at);
        const struct piece &p = all.piece[now.piece];
        if (p.m.dtype == GN_F16 || (sizeof(T) > sizeof(bf16) && p.m.dtype == GN_BF16))
            write<T, true>(now, p, t);
        else
            write<T, false>(now, p, t);
        if (at >= all.groups) return;
        now = then;
    }
}

static gn_status add_piece(struct pieces *all, const gn_matrix *m, const gn_cuda_region *r,
                           void *to, int64_t ld) {
    const int64_t across = (r->cols / GN_BLOCK + GROUP - 1) / GROUP;
    const int64_t down = (r->rows + GN_CUDA_TILE_ROWS - 1) / GN_CUDA_TILE_ROWS;
    /* Their number fits, and stays so where a warp looks for the next one. */
    if (all->groups + down * across > INT32_MAX / 2) return GN_ETOOBIG;
    all->piece[all->n++] = {*m, *r, to, ld, all->groups, (int)across};
    all->groups += (int)(down * across);
    return GN_OK;
}

static int blocks_for(const struct pieces *all, int sms) {
    const int most = (all->groups + RESIDENT_WARPS - 1) / RESIDENT_WARPS;
    return most < sms ? most : sms;
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
    if (gn_cuda_is_tiled(m)) {
        struct pieces all = {};
        const gn_status status = add_piece(&all, m, r, to, ld);
        return status ? status
                      : launch(ctx, dequantize_tiles_kernel<T>,
                               dim3((unsigned)blocks_for(&all, ctx->cuda->sms)),
                               dim3(RESIDENT_THREADS), 0, all);
    }
    const int64_t n = r->rows * r->cols;
    return launch(ctx, dequantize_kernel<T>, dim3((unsigned)((n + THREADS - 1) / THREADS)),
                  dim3(THREADS), 0, to, ld, *m, *r);
}

gn_status gn_cuda_dequantize(gn_ctx *ctx, const gn_matrix *m, const gn_cuda_region *r, void *to,
                             int64_t ld, gn_dtype dtype) {
    return dtype == GN_F32 ? dequantize(ctx, m, r, (float *)to, ld)
                           : dequantize(ctx, m, r, (bf16 *)to, ld);
}

gn_status gn_cuda_dequantize_product(gn_ctx *ctx, const gn_linear_weights *w, void *to, int64_t ld,
                                     const gn_cuda_beside *beside) {
    struct pieces all = {};
    gn_status status = GN_OK;
    for (int i = 0; i < w->n && !status; i++) {
        const gn_cuda_region whole = {0, w->w[i]->rows, 0, w->w[i]->cols};
        status = add_piece(&all, w->w[i], &whole, to, ld);
        to = (bf16 *)to + w->w[i]->rows * ld;
    }
    if (status) return status;
    if (!beside)
        return launch(ctx, dequantize_tiles_kernel<bf16>,
                      dim3((unsigned)blocks_for(&all, ctx->cuda->sms)), dim3(RESIDENT_THREADS), 0,
                      all);
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {CLUSTER, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)beside->sms / CLUSTER * CLUSTER);
    config.blockDim = dim3(RESIDENT_THREADS);
    config.stream = beside->stream;
    config.attrs = &cluster;
    config.numAttrs = ctx->cuda->overlaps ? 1 : 0; /* clusters came with Hopper, too */
    return gn_cuda_status(cudaLaunchKernelEx(&config, dequantize_tiles_kernel<bf16>, all));
}
