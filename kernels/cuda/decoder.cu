/* decoder.cu - a step of decoding, through all layers, as one kernel.
 *
 * Decoding is bound by reading the weights once, so nothing may interrupt the reading. A layer is
 * five phases that need each other's results whole (q k v, attention, o, gate and up, down): as
 * five launches, each would begin and end with some microseconds in which no weights come. Here
 * one block an SM stays for all of them and meets the others at a barrier in global memory, while
 * the first weights of what comes next are on their way into shared memory already.
 *
 *   - A phase's groups (two tiles of 8 rows of weights) are dealt to the blocks, and a group's
 *     columns to the block's warps. So a warp meets the same columns in every group and keeps its
 *     part of x in registers, as the mma's B operand: tokens are the mma's columns, of which there
 *     are 8 or 16; unused ones are zero and cost nothing.
 *   - A step is a group by up to 256 columns, 2 KiB. A warp has STAGES of them under way
 * (cp.async), 150 KiB an SM, enough to span a barrier.
 *   - A packed byte becomes two bf16 codes by one lookup in a table of 256 pairs, of which every
 *     lane has a copy in its own bank. Entries are 256 bytes apart: the address is then (byte << 8
 * | 4 lane), which one byte permutation makes. A block's scale multiplies its float32 sums.
 *   - Warps' sums meet in shared memory in a fixed order; RMSNorm's factor, one number a row of x,
 *     is applied there; rotation and the cache, SwiGLU, or the residual addition follow.
 *
 * Blocks wait for each other, so all must be resident: one an SM, and nothing else that stays. */
#include "decoder.cuh"

#include <stdlib.h>
#include <string.h>

#include "decoder_attention.cuh"

/* A kernel for up to MOST rows of x has them in so many tiles of 8. */
template <int MOST> static constexpr int TILES = (MOST + 7) / 8;

/* ---- x ---- */

static __device__ __forceinline__ uint32_t pack_squared(float low, float high, float2 weight,
                                                        float *squares) {
    *squares += low * low + high * high;
    return pack_bf16(low * weight.x, high * weight.y);
}

/* 8 columns of a row: times the norm's weights, and the sum of their squares. */
static __device__ __forceinline__ uint4 scale_columns(uint4 a, uint4 b, const float4 weight[2],
                                                      float *squares) {
    uint4 v;
    v.x = pack_squared(__uint_as_float(a.x), __uint_as_float(a.y),
                       make_float2(weight[0].x, weight[0].y), squares);
    v.y = pack_squared(__uint_as_float(a.z), __uint_as_float(a.w),
                       make_float2(weight[0].z, weight[0].w), squares);
    v.z = pack_squared(__uint_as_float(b.x), __uint_as_float(b.y),
                       make_float2(weight[1].x, weight[1].y), squares);
    v.w = pack_squared(__uint_as_float(b.z), __uint_as_float(b.w),
                       make_float2(weight[1].z, weight[1].w), squares);
    return v;
}

/* 8 columns a lane, through the warp's scratch, to the lanes that multiply row t: g = t % 8. */
static __device__ __forceinline__ void deal(uint32_t x[UNITS][8], uint4 columns, int t,
                                            uint8_t *scratch, int lane) {
    __syncwarp();
    *(uint4 *)(scratch + lane * 16) = columns;
    __syncwarp();
    if (lane / 4 != t % 8) return;
#pragma unroll
    for (int j = 0; j < UNITS; j++) {
        const uint4 *from = (const uint4 *)(scratch + j * GN_BLOCK * 2 + lane % 4 * 32);
        const uint4 low = from[0], high = from[1];
        x[j][0] = low.x, x[j][1] = low.y, x[j][2] = low.z, x[j][3] = low.w;
        x[j][4] = high.x, x[j][5] = high.y, x[j][6] = high.z, x[j][7] = high.w;
    }
}

/* Rows [t0, end) of up to 8, of the residual stream: times the norm's weights; row t's squares are
 * added to squares[t] of the warp, if it is not NULL. */
static __device__ __forceinline__ void load_stream(uint32_t x[UNITS][8], const struct program &p,
                                                   const struct phase &ph, int t0, int end, int col,
                                                   bool has_columns, float *squares,
                                                   uint8_t *scratch, int lane) {
    enum { AT_ONCE = 4 };
    float4 weight[2] = {};
    if (has_columns) {
        weight[0] = __ldg((const float4 *)(ph.norm + col));
        weight[1] = __ldg((const float4 *)(ph.norm + col) + 1);
    }
#pragma unroll 1
    for (int first = t0; first < end; first += AT_ONCE) {
        uint4 a[AT_ONCE] = {}, b[AT_ONCE] = {};
        const float *from = p.x + first * p.x_ld + col;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (first + i >= end || !has_columns) continue;
            a[i] = load_fresh16(from + i * p.x_ld);
            b[i] = load_fresh16(from + i * p.x_ld + 4);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (first + i >= end) break;
            float sum = 0.0f;
            const uint4 columns = scale_columns(a[i], b[i], weight, &sum);
            if (squares) {
                sum = warp_sum(sum);
                if (lane == 0) squares[first + i] += sum;
            }
            deal(x, columns, first + i, scratch, lane);
        }
    }
}

/* The same of what attention gave. */
static __device__ __forceinline__ void load_attention(uint32_t x[UNITS][8], const struct program &p,
                                                      int t0, int end, int col, bool has_columns,
                                                      uint8_t *scratch, int lane) {
#pragma unroll 1
    for (int t = t0; t < end; t++) {
        uint4 columns = make_uint4(0, 0, 0, 0);
        if (has_columns) columns = read_attention(p, t, col);
        deal(x, columns, t, scratch, lane);
    }
}

enum { AHEAD = 2 };

/* The lane's columns of h, of rows [first, first + AHEAD) that are before `end`. */
static __device__ __forceinline__ void fetch_h(uint4 a[AHEAD], const struct program &p, int first,
                                               int end, int block, int end_block, int lane) {
    const int col = block * GN_BLOCK + lane * 8;
    const bf16 *from = p.h + (int64_t)first * p.intermediate + col;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        a[i] = make_uint4(0, 0, 0, 0);
        if (first + i < end && col < end_block * GN_BLOCK)
            a[i] = load_fresh16(from + i * p.intermediate);
    }
}

/* The same of h; `ahead` has the columns of its first rows, for t0 = 0. */
static __device__ __forceinline__ void load_h(uint32_t x[UNITS][8], const struct program &p, int t0,
                                              int end, int block, int end_block,
                                              const uint4 ahead[AHEAD], uint8_t *scratch,
                                              int lane) {
#pragma unroll 1
    for (int first = t0; first < end; first += AHEAD) {
        uint4 a[AHEAD];
        if (first > 0) fetch_h(a, p, first, end, block, end_block, lane);
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (first + i < end) deal(x, first > 0 ? a[i] : ahead[i], first + i, scratch, lane);
    }
}

/* The warp's blocks of columns from `block` on, as the mma's B operand, for all rows. `ahead` is
 * what of them is here already, where x is h, and becomes that of the next blocks. */
template <int MOST>
static __device__ __forceinline__ void
load_x(uint32_t x[TILES<MOST>][UNITS][8], const struct program &p, const struct phase &ph,
       int block, int end_block, uint4 ahead[AHEAD], float *squares, int warp, int lane) {
    const int col = block * GN_BLOCK + lane * 8;
    const bool has_columns = col < end_block * GN_BLOCK;
    uint8_t *scratch = shared + SCRATCH_AT + warp * SCRATCH_BYTES;
#pragma unroll
    for (int i = 0; i < TILES<MOST>; i++) {
        const int end = min(8 * i + 8, rows_of<MOST>(p));
        if (ph.norm)
            load_stream(x[i], p, ph, 8 * i, end, col, has_columns, squares, scratch, lane);
        else if (ph.x_is_attention)
            load_attention(x[i], p, 8 * i, end, col, has_columns, scratch, lane);
        else
            load_h(x[i], p, 8 * i, end, block, end_block, ahead, scratch, lane);
    }
}

/* ---- the product ---- */

/* The table, and what decodes scales. Lanes' copies are written 16 bytes at a time, turned by the
 * entry so that a warp's stores do not meet in a bank. */
static __device__ void fill_tables(const struct program &p) {
    const int entry = (int)threadIdx.x / 2, half = (int)threadIdx.x % 2;
    const uint32_t pair = pack_bf16(__ldg(p.code + entry / 16), __ldg(p.code + entry % 16));
    for (int i = 0; i < 4; i++)
        *(uint4 *)(shared + entry * ENTRY_BYTES + half * 64 + (i + entry) % 4 * 16) =
            make_uint4(pair, pair, pair, pair);
    if (p.nested_code && threadIdx.x < 256)
        ((float *)(shared + NESTED_AT))[threadIdx.x] = __ldg(p.nested_code + threadIdx.x);
}

static __device__ __forceinline__ uint32_t look_up(uint32_t word, int byte, uint32_t lane4) {
    return *(const uint32_t *)(shared + __byte_perm(word, lane4, 0x5504 | byte << 4));
}

/* The scale of row g of half h, block c, for lane 4g + c; anything where the step has no block c.
 */
template <bool DQ>
static __device__ __forceinline__ float scale_of(const uint8_t *stage, int h, int lane) {
    const int at = (h * UNITS + lane % 4) * GN_CUDA_TILE_ROWS + lane / 4;
    const float *floats = (const float *)(stage + STAGE_ABSMAX);
    if (!DQ) return floats[at];
    const float *nested = (const float *)(shared + NESTED_AT);
    return __fadd_rn(__fmul_rn(nested[stage[STAGE_CODES + at]], floats[h * WARP + lane]),
                     ((const float *)(stage + STAGE_OFFSETS))[h]);
}

/* acc += block j of a step. */
template <int MOST>
static __device__ __forceinline__ void
multiply_unit(float acc[TILES<MOST>][4], const uint32_t x[TILES<MOST>][UNITS][8],
              const uint8_t *stage, int j, const float scale[2], int lane) {
    const uint8_t *at = stage + j * GN_CUDA_TILE_BYTES + lane * 8;
    const uint2 top = *(const uint2 *)at,
                bottom = *(const uint2 *)(at + UNITS * GN_CUDA_TILE_BYTES);
    const uint32_t lane4 = lane * 4;
    float sum[TILES<MOST>][4] = {};
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const uint32_t up = k < 2 ? top.x : top.y, down = k < 2 ? bottom.x : bottom.y;
        const int byte = k % 2 * 2;
        const uint32_t a[4] = {look_up(up, byte, lane4), look_up(down, byte, lane4),
                               look_up(up, byte + 1, lane4), look_up(down, byte + 1, lane4)};
#pragma unroll
        for (int n = 0; n < TILES<MOST>; n++) mma_bf16(sum[n], a, &x[n][j][2 * k]);
    }
    const float s0 = __shfl_sync(~0u, scale[0], (lane & ~3) | j),
                s1 = __shfl_sync(~0u, scale[1], (lane & ~3) | j);
#pragma unroll
    for (int n = 0; n < TILES<MOST>; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[n][i] += (i < 2 ? s0 : s1) * sum[n][i];
}

/* Where a warp's sum of (t, row) is, in a batch's group. */
template <int MOST>
static __device__ __forceinline__ uint8_t *sum_at(const struct program &p, int group, int warp,
                                                  int t, int row) {
    return shared + (group * WARPS + warp) * sums_bytes(rows_of<MOST>(p)) + t / 2 * ENTRY_BYTES +
           ENTRY_BYTES / 2 + (t % 2 * GROUP_ROWS + row) * (int)sizeof(float);
}

template <int MOST>
static __device__ __forceinline__ void leave_sums(const struct program &p,
                                                  const float acc[TILES<MOST>][4], int group,
                                                  bool add, int warp, int lane) {
    const int g = lane / 4, c = lane % 4;
    uint8_t *sums = sum_at<MOST>(p, group, warp, 2 * c, g);
#pragma unroll
    for (int n = 0; n < TILES<MOST>; n++) {
        if (8 * n + 2 * c >= rows_of<MOST>(p)) continue;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float *to = (float *)(sums + n * 4 * ENTRY_BYTES) + i % 2 * GROUP_ROWS +
                        i / 2 * GN_CUDA_TILE_ROWS;
            *to = add ? *to + acc[n][i] : acc[n][i];
        }
    }
}

template <int MOST>
static __device__ __forceinline__ float total(const struct program &p, int group, int row, int t) {
    const uint8_t *sums = sum_at<MOST>(p, group, 0, t, row);
    const int step = sums_bytes(rows_of<MOST>(p));
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += *(const float *)(sums + w * step);
    return sum;
}

/* RMSNorm's factor of a row. */
static __device__ __forceinline__ float factor_of(const struct program &p, int t) {
    const float *squares = (const float *)(shared + SQUARES_AT);
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += squares[w * MAX_T + t];
    return rsqrtf(sum / (float)p.hidden + p.eps);
}

/* Rows j and j + D/2 of a head: q rotated, k rotated into the cache, v into the cache. */
static __device__ __forceinline__ void finish_heads(const struct program &p, const struct phase &ph,
                                                    int group, int row, int t, float low,
                                                    float high) {
    int first;
    const int which = head_weight(p, group, &first), half = p.D / 2;
    const int head = quotient(group - first, p.by_half);
    const int j = (group - first - head * p.by_half.d) * GN_CUDA_TILE_ROWS + row;
    if (which < 2) {
        const float c = p.cosines[t * p.cos_ld + j], s = p.sines[t * p.sin_ld + j], x = low;
        low = x * c - high * s;
        high = high * c + x * s;
    }
    bf16 *to = p.q + ((int64_t)t * p.heads + head) * p.D;
    if (which > 0) {
        const int position = p.batch.row_pos[t];
        const int64_t block =
            p.batch.blocks[p.batch.row_seq[t] * (int64_t)p.max_blocks + position / TOKENS];
        to = which == 1 ? ph.keys + block * p.k_ld : ph.values + block * p.v_ld;
        to += (head * TOKENS + position % TOKENS) * p.D;
    }
    to[j] = __float2bfloat16(low);
    to[j + half] = __float2bfloat16(high);
}

template <int MOST> static __device__ __forceinline__ int by_rows(const struct program &p, int i) {
    return MOST == 1 ? i : quotient(i, p.by_T);
}

/* What ADD adds to: output i of the groups from `first` on. */
template <int MOST>
static __device__ __forceinline__ float *stream_at(const struct program &p, int first, int i) {
    const int group = by_rows<MOST>(p, i / GROUP_ROWS),
              t = i / GROUP_ROWS - group * rows_of<MOST>(p);
    return p.x + t * p.x_ld + (first + group) * GROUP_ROWS + i % GROUP_ROWS;
}

/* Results of groups first ... first + n - 1, whose sums are in the gaps. `before` is what the
 * thread's first output is added to. */
template <int MOST>
static __device__ __forceinline__ void finish(const struct program &p, const struct phase &ph,
                                              int first, int n, float before) {
    if (ph.kind == ADD) {
        for (int i = threadIdx.x; i < n * GROUP_ROWS * rows_of<MOST>(p); i += THREADS) {
            const int group = by_rows<MOST>(p, i / GROUP_ROWS),
                      t = i / GROUP_ROWS - group * rows_of<MOST>(p);
            float *x = stream_at<MOST>(p, first, i);
            *x = (i < THREADS ? before : __ldcg(x)) + total<MOST>(p, group, i % GROUP_ROWS, t);
        }
        return;
    }
    for (int i = threadIdx.x; i < n * GN_CUDA_TILE_ROWS * rows_of<MOST>(p); i += THREADS) {
        const int row = i % GN_CUDA_TILE_ROWS, group = by_rows<MOST>(p, i / GN_CUDA_TILE_ROWS);
        const int t = i / GN_CUDA_TILE_ROWS - group * rows_of<MOST>(p);
        const float factor = factor_of(p, t);
        const float v = total<MOST>(p, group, row, t) * factor;
        const float other = total<MOST>(p, group, row + GN_CUDA_TILE_ROWS, t) * factor;
        if (ph.kind == SWIGLU)
            p.h[(int64_t)t * p.intermediate + (first + group) * GN_CUDA_TILE_ROWS + row] =
                __float2bfloat16(v / (1.0f + __expf(-v)) * other);
        else
            finish_heads(p, ph, first + group, row, t, v, other);
    }
}

/* The oldest step: multiplies it, and asks for another in its place. */
template <int MOST, bool DQ>
static __device__ __forceinline__ void
take_step(float acc[TILES<MOST>][4], const uint32_t x[TILES<MOST>][UNITS][8],
          const struct program &p, int current, int n, struct cursor *cur, int warp, int lane) {
    await(cur);
    const uint8_t *stage = stage_at(cur->taken, warp);
    const float scale[2] = {scale_of<DQ>(stage, 0, lane), scale_of<DQ>(stage, 1, lane)};
    if (n == UNITS) {
#pragma unroll
        for (int j = 0; j < UNITS; j++) multiply_unit<MOST>(acc, x, stage, j, scale, lane);
    } else {
#pragma unroll
        for (int j = 0; j < UNITS - 1; j++)
            if (j < n) multiply_unit<MOST>(acc, x, stage, j, scale, lane);
    }
    __syncwarp();
    cur->taken++;
    ask<DQ>(cur, p, current, warp, lane);
}

template <int MOST, bool DQ>
static __device__ __forceinline__ void multiply(const struct program &p, int current,
                                                struct cursor *cur, int warp, int lane) {
    const struct phase &ph = *phase_at(current);
    const struct range groups = groups_of(ph), blocks = blocks_of(ph, warp);
    float *squares = (float *)(shared + SQUARES_AT) + warp * MAX_T;
    const bool is_h = !ph.norm && !ph.x_is_attention;
    uint32_t x[TILES<MOST>][UNITS][8] = {};
    uint4 ahead[AHEAD];
    if (is_h) fetch_h(ahead, p, 0, rows_of<MOST>(p), blocks.begin, blocks.end, lane);
    if (lane < MAX_T) squares[lane] = 0.0f;
    __syncwarp();
    for (int begin = groups.begin; begin < groups.end; begin += p.batch_groups) {
        const int end = min(begin + p.batch_groups, groups.end);
        const bool is_first = begin == groups.begin, once = blocks.end - blocks.begin <= UNITS;
        float before = 0.0f;
        if (ph.kind == ADD && (int)threadIdx.x < (end - begin) * GROUP_ROWS * rows_of<MOST>(p))
            before = __ldcg(stream_at<MOST>(p, begin, threadIdx.x));
        for (int block = blocks.begin; block < blocks.end; block += UNITS) {
            const int n = min(UNITS, blocks.end - block);
            if (is_first || !once) {
                load_x<MOST>(x, p, ph, block, blocks.end, ahead, is_first ? squares : NULL, warp,
                             lane);
                if (is_h) {
                    const int next = n < blocks.end - block ? block + UNITS : blocks.begin;
                    fetch_h(ahead, p, 0, rows_of<MOST>(p), next, blocks.end, lane);
                }
            }
#pragma unroll 1
            for (int group = begin; group < end; group++) {
                float acc[TILES<MOST>][4] = {};
                take_step<MOST, DQ>(acc, x, p, current, n, cur, warp, lane);
                leave_sums<MOST>(p, acc, group - begin, block > blocks.begin, warp, lane);
            }
        }
        if (blocks.begin == blocks.end) {
            const float none[TILES<MOST>][4] = {};
            for (int group = begin; group < end; group++)
                leave_sums<MOST>(p, none, group - begin, false, warp, lane);
        }
        __syncthreads();
        finish<MOST>(p, ph, begin, end - begin, before);
        __syncthreads();
    }
}

/* ---- the grid ---- */

static __device__ __forceinline__ void prefetch_norm(const struct phase &ph, int warp, int lane) {
    const struct range blocks = blocks_of(ph, warp);
    for (int i = blocks.begin * 2 + lane; i < blocks.end * 2; i += WARP) /* 128 bytes each */
        prefetch_line(ph.norm + i * (GN_BLOCK / 2));
}

/* Everything that all blocks wrote before is to be seen after. `meetings`: of the program so far,
 * with this one. While the others come, what the next phase reads that nobody writes is fetched. */
static __device__ __forceinline__ void meet(const struct program &p, const struct phase &next,
                                            uint32_t meetings, int warp, int lane) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(&p.sync[0], 1u);
    }
    if (next.kind == ATTEND) prefetch_cache(p, next, warp, lane);
    if (next.norm) prefetch_norm(next, warp, lane);
    if (threadIdx.x == 0) {
        while (load_acquire(&p.sync[0]) < meetings * gridDim.x) {
        }
        __threadfence();
    }
    __syncthreads();
}

/* The last block to leave makes the counters ready for the next program. */
static __device__ __forceinline__ void leave(const struct program &p) {
    if (threadIdx.x != 0 || atomicAdd(&p.sync[1], 1u) != gridDim.x - 1) return;
    p.sync[0] = p.sync[1] = 0;
}

/* A lane's part of phase i, on its way to its place. */
static __device__ __forceinline__ uint4 load_phase(const struct program &p, int i, int lane) {
    if (i >= p.n_phases || lane >= (int)sizeof(struct phase) / 16) return make_uint4(0, 0, 0, 0);
    return __ldg((const uint4 *)(p.phases + i) + lane);
}
static __device__ __forceinline__ void store_phase(int i, uint4 part, int lane) {
    if (lane < (int)sizeof(struct phase) / 16) ((uint4 *)phase_at(i))[lane] = part;
}

template <int MOST, bool DQ>
static __global__ void __launch_bounds__(THREADS, 1)
    decoder_kernel(const __grid_constant__ struct program p) {
    pdl_trigger();
    const int warp = __shfl_sync(~0u, threadIdx.x / WARP, 0), lane = threadIdx.x % WARP;
    struct cursor cur = {};
    cur.at = -1;
    for (int i = warp; i < min(PHASES - 1, p.n_phases); i += WARPS)
        store_phase(i, load_phase(p, i, lane), lane);
    __syncthreads();
    ask<DQ>(&cur, p, 0, warp, lane);
    fill_tables(p);
    if (threadIdx.x == 0) *first_item() = item_of(p, blockIdx.x);
    __syncthreads();
    pdl_wait();
#pragma unroll 1
    for (int i = 0; i < p.n_phases; i++) {
        if (i > 0) meet(p, *phase_at(i), (uint32_t)i, warp, lane);
        const int coming = i + PHASES - 1;
        uint4 phase;
        if (warp == 0) phase = load_phase(p, coming, lane);
        ask<DQ>(&cur, p, i, warp, lane);
        if (phase_at(i)->kind != ATTEND)
            multiply<MOST, DQ>(p, i, &cur, warp, lane);
        else if (p.D <= 64)
            attend<64>(p, *phase_at(i), warp, lane);
        else
            attend<128>(p, *phase_at(i), warp, lane);
        if (warp == 0) store_phase(coming, phase, lane);
    }
    leave(p);
}

/* ---- the host's part ---- */

struct gn_decoder {
    gn_ctx *ctx;
    struct program program; /* but for what a call brings */
    void *phases;
};

static struct weight placed_weight(const gn_matrix *m) {
    struct weight w = {};
    w.tiles = (const uint8_t *)m->data;
    w.scales = m->absmax_u8 ? m->absmax_u8 : (const uint8_t *)m->absmax;
    w.nested_absmax = m->nested_absmax;
    w.offset = m->offset;
    w.rows = (int)m->rows;
    return w;
}

enum { LAYER_PHASES = 5, PROJECTIONS = 7 };

static void list_weights(const gn_matrix *w[PROJECTIONS], const gn_decoder_layer *layer) {
    const gn_matrix *all[] = {layer->q,    layer->k,  layer->v,   layer->o,
                              layer->gate, layer->up, layer->down};
    memcpy(w, all, sizeof all);
}

static void deal_groups(struct phase *ph, int64_t rows, int group_rows, int sms) {
    const int groups = (int)(rows / group_rows);
    ph->groups_each = groups / sms;
    ph->groups_left = groups % sms;
}

static void plan_layer(struct phase ph[LAYER_PHASES], const gn_decoder_layer *layer, int sms) {
    const gn_matrix *w[PROJECTIONS];
    list_weights(w, layer);
    memset(ph, 0, LAYER_PHASES * sizeof *ph);
    for (int i = 0; i < LAYER_PHASES; i++) {
        ph[i].keys = (bf16 *)layer->kv->k.data;
        ph[i].values = (bf16 *)layer->kv->v.data;
    }
    ph[0].kind = QKV;
    ph[0].norm = (const float *)layer->attn_norm->data;
    for (int i = 0; i < 3; i++) ph[0].w[i] = placed_weight(w[i]);
    deal_groups(&ph[0], w[0]->rows + w[1]->rows + w[2]->rows, GROUP_ROWS, sms);
    ph[0].blocks = (int)(w[0]->cols / GN_BLOCK);
    ph[1].kind = ATTEND;
    ph[2].kind = ADD;
    ph[2].w[0] = placed_weight(layer->o);
    deal_groups(&ph[2], layer->o->rows, GROUP_ROWS, sms);
    ph[2].blocks = (int)(layer->o->cols / GN_BLOCK);
    ph[2].x_is_attention = true;
    ph[3].kind = SWIGLU;
    ph[3].norm = (const float *)layer->mlp_norm->data;
    ph[3].w[0] = placed_weight(layer->gate);
    ph[3].w[1] = placed_weight(layer->up);
    deal_groups(&ph[3], layer->gate->rows, GN_CUDA_TILE_ROWS, sms);
    ph[3].blocks = (int)(layer->gate->cols / GN_BLOCK);
    ph[4].kind = ADD;
    ph[4].w[0] = placed_weight(layer->down);
    deal_groups(&ph[4], layer->down->rows, GROUP_ROWS, sms);
    ph[4].blocks = (int)(layer->down->cols / GN_BLOCK);
}

/* Whether two device arrays hold the same floats; a failure to read them counts as no. */
static bool same_floats(gn_ctx *ctx, const float *a, const float *b, int n) {
    float values[2][256];
    if (a == b) return true;
    return a && b && gn_ctx_read(ctx, values[0], a, (size_t)n * sizeof *a) == GN_OK &&
           gn_ctx_read(ctx, values[1], b, (size_t)n * sizeof *b) == GN_OK &&
           memcmp(values[0], values[1], (size_t)n * sizeof *a) == 0;
}

static bool is_weight(gn_ctx *ctx, const gn_matrix *m, const gn_matrix *like) {
    return gn_cuda_is_tiled(m) && m->rows % GROUP_ROWS == 0 && !m->absmax_u8 == !like->absmax_u8 &&
           same_floats(ctx, m->code, like->code, 16) &&
           same_floats(ctx, m->nested_code, like->nested_code, 256);
}

static bool is_layer(gn_ctx *ctx, const gn_decoder_layer *layer, const gn_decoder_layer *first,
                     int D) {
    const gn_matrix *w[PROJECTIONS];
    list_weights(w, layer);
    for (int i = 0; i < PROJECTIONS; i++)
        if (!is_weight(ctx, w[i], first->q)) return false;
    const gn_kv *kv = layer->kv;
    return kv->k.dtype == GN_BF16 && kv->v.dtype == GN_BF16 && kv->k.shape[2] == TOKENS &&
           kv->k.shape[3] == D && kv->k.ld == first->kv->k.ld && kv->v.ld == first->kv->v.ld &&
           kv->k.ld % 8 == 0 && kv->v.ld % 8 == 0;
}

static bool is_supported(gn_ctx *ctx, const gn_decoder_options *o) {
    const int D = o->head_dim;
    if (!ctx->cuda || ctx->compute != GN_BF16 || ctx->cuda->shared_limit < SHARED_BYTES ||
        (D != 64 && D != 80 && D != 96 && D != 128))
        return false;
    for (int i = 0; i < o->n_layers; i++)
        if (!is_layer(ctx, &o->layers[i], &o->layers[0], D)) return false;
    return true;
}

static int max_splits(const gn_ctx *ctx, const gn_decoder_options *o, int T) {
    enum { MOST = 4 }; /* each is read by every block */
    const int group = o->heads / o->kv_heads;
    const int units = T * o->kv_heads * ((group + QUERIES - 1) / QUERIES);
    const int splits = ctx->cuda->sms / units;
    return splits < 1 ? 1 : splits > MOST ? MOST : splits;
}

static size_t partial_bytes(const gn_ctx *ctx, const gn_decoder_options *o) {
    size_t most = 0;
    for (int T = 1; T <= MAX_T; T++) {
        const size_t n = (size_t)(T * max_splits(ctx, o, T));
        if (n > most) most = n;
    }
    return most * (size_t)(o->heads * (o->head_dim + 4)) * sizeof(float);
}

static gn_status allocate(void **out, gn_ctx *ctx, size_t bytes) {
    *out = gn_ctx_alloc(ctx, bytes);
    return *out ? GN_OK : GN_ENOMEM;
}

typedef void decoder_fn(const struct program);

static decoder_fn *kernel_for(int T, bool double_quant) {
    if (T <= 1) return double_quant ? decoder_kernel<1, true> : decoder_kernel<1, false>;
    if (T <= 8) return double_quant ? decoder_kernel<8, true> : decoder_kernel<8, false>;
    return double_quant ? decoder_kernel<16, true> : decoder_kernel<16, false>;
}

/* x / d for x d < 2^32. */
static struct divisor divide_by(int d) {
    return {d, (uint32_t)((0x100000000u + (uint64_t)d - 1) / (uint64_t)d)};
}

static gn_status open_program(gn_decoder *d, const gn_decoder_options *o) {
    const gn_decoder_layer *first = &o->layers[0];
    struct program *p = &d->program;
    p->n_phases = o->n_layers * LAYER_PHASES;
    p->heads = o->heads;
    p->kv_heads = o->kv_heads;
    p->D = o->head_dim;
    p->hidden = (int)first->q->cols;
    p->intermediate = (int)first->gate->rows;
    p->eps = o->eps;
    p->k_ld = first->kv->k.ld;
    p->v_ld = first->kv->v.ld;
    p->code = first->q->code;
    p->nested_code = first->q->absmax_u8 ? first->q->nested_code : NULL;
    p->by_half = divide_by(p->D / GROUP_ROWS);
    p->by_D = divide_by(p->D);
    const uint32_t zeros[2] = {0, 0};
    const size_t rows = MAX_T, bytes = (size_t)p->n_phases * sizeof(struct phase);
    gn_status status =
        allocate((void **)&p->q, d->ctx, rows * (size_t)(p->heads * p->D) * sizeof *p->q);
    if (!status)
        status = allocate((void **)&p->h, d->ctx, rows * (size_t)p->intermediate * sizeof *p->h);
    if (!status) status = allocate((void **)&p->partials, d->ctx, partial_bytes(d->ctx, o));
    if (!status) status = allocate((void **)&p->sync, d->ctx, sizeof zeros);
    if (!status) status = allocate(&d->phases, d->ctx, bytes);
    if (status) return status;
    p->phases = (const struct phase *)d->phases;
    struct phase *phases = (struct phase *)calloc((size_t)p->n_phases, sizeof *phases);
    if (!phases) return GN_ENOMEM;
    for (int i = 0; i < o->n_layers; i++)
        plan_layer(phases + i * LAYER_PHASES, &o->layers[i], d->ctx->cuda->sms);
    status = gn_ctx_write(d->ctx, d->phases, phases, bytes);
    if (!status) status = gn_ctx_write(d->ctx, p->sync, zeros, sizeof zeros);
    free(phases);
    return status;
}

gn_status gn_cuda_decoder_open(gn_decoder **out, gn_ctx *ctx, const gn_decoder_options *options) {
    if (!is_supported(ctx, options)) return GN_EUNSUPPORTED;
    for (int i = 0; i < 6; i++)
        if (cudaFuncSetAttribute(kernel_for(i / 2 * 8, i % 2),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 SHARED_BYTES) != cudaSuccess)
            return GN_EUNSUPPORTED;
    gn_decoder *d = (gn_decoder *)calloc(1, sizeof *d);
    if (!d) return GN_ENOMEM;
    d->ctx = ctx;
    const gn_status status = open_program(d, options);
    if (status)
        gn_cuda_decoder_close(d);
    else
        *out = d;
    return status;
}

void gn_cuda_decoder_close(gn_decoder *d) {
    if (!d) return;
    void *memory[] = {d->program.q, d->program.h, d->program.partials, d->program.sync, d->phases};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) gn_ctx_free(d->ctx, memory[i]);
    free(d);
}

gn_status gn_cuda_decoder_run(gn_decoder *d, gn_tensor *x, const gn_tensor *cos,
                              const gn_tensor *sin, const gn_seqs *seqs) {
    struct program p = d->program;
    p.T = (int)x->shape[0];
    p.x = (float *)x->data;
    p.x_ld = x->ld;
    p.cosines = (const float *)cos->data;
    p.sines = (const float *)sin->data;
    p.cos_ld = cos->ld;
    p.sin_ld = sin->ld;
    p.max_blocks = seqs->max_blocks;
    p.batch = d->ctx->cuda->batch;
    p.batch_groups = TABLE_BYTES / (WARPS * sums_bytes(p.T));
    p.by_T = divide_by(p.T);
    const gn_decoder_options shape = {NULL, 0, p.heads, p.kv_heads, p.D, p.eps};
    p.splits = max_splits(d->ctx, &shape, p.T);
    return launch(d->ctx, kernel_for(p.T, p.nested_code != NULL), dim3((unsigned)d->ctx->cuda->sms),
                  dim3(THREADS), SHARED_BYTES, p);
}
