/* decoder_product.cuh - a phase of decoder.cu that multiplies: x into registers, steps of weights,
 * the sums of a block's warps, and what becomes of them. */
#ifndef GN_CUDA_DECODER_PRODUCT_CUH
#define GN_CUDA_DECODER_PRODUCT_CUH

#include "decoder_lora.cuh"

/* ---- x ---- */

/* 16 columns of a block. */
struct columns {
    uint4 low, high;
};

static __device__ __forceinline__ struct columns fetch_columns(const bf16 *at, bool exists) {
    struct columns x = {};
    if (exists) x = {load_fresh16(at), load_fresh16(at + 8)};
    return x;
}

static __device__ __forceinline__ void place(uint32_t x[8], struct columns from) {
    x[0] = from.low.x, x[1] = from.low.y, x[2] = from.low.z, x[3] = from.low.w;
    x[4] = from.high.x, x[5] = from.high.y, x[6] = from.high.z, x[7] = from.high.w;
}

/* The lane's part of the B operand: of row lane / 4, 16 columns of each of the UNITS blocks from
 * `block` on. */
static __device__ __forceinline__ void load_rows(uint32_t x[UNITS][8], const struct program &p,
                                                 const struct phase &ph, int block, int end_block,
                                                 int lane) {
    const int t = lane / 4;
    const bf16 *from = ph.x + ((int64_t)t * ph.blocks + block) * GN_BLOCK + lane % 4 * 16;
#pragma unroll
    for (int j = 0; j < UNITS; j++)
        place(x[j], fetch_columns(from + j * GN_BLOCK, t < p.T && block + j < end_block));
}

/* A single row has its blocks in columns of their own: block j in column 2j, and zeros elsewhere.
 * So a lane has 16 columns of one block, or zeros. */
static __device__ __forceinline__ struct columns fetch_row(const struct phase &ph, int block,
                                                           int end_block, int lane) {
    const int g = lane / 4, j = g / 2;
    return fetch_columns(ph.x + (block + j) * GN_BLOCK + lane % 4 * 16,
                         g % 2 == 0 && block + j < end_block);
}
static __device__ __forceinline__ void place_row(uint32_t x[UNITS][8], struct columns own,
                                                 int lane) {
#pragma unroll
    for (int j = 0; j < UNITS; j++) {
        const struct columns none = {};
        place(x[j], lane / 8 == j ? own : none);
    }
}

/* RMSNorm's factors, a warp a row. */
template <int MOST>
static __device__ __forceinline__ void load_factors(const struct program &p, int warp, int lane) {
    if (warp >= rows_of<MOST>(p)) return;
    const int n = p.hidden / GROUP_ROWS;
    float sum = 0.0f;
#pragma unroll 8
    for (int i = lane; i < n; i += WARP) sum += __ldcg(p.squares + warp * n + i);
    sum = warp_sum(sum);
    if (lane == 0) ((float *)(shared + FACTORS_AT))[warp] = rsqrtf(sum / (float)p.hidden + p.eps);
}

/* ---- the product ---- */

/* The table, and what decodes scales. Lanes' copies are written 16 bytes at a time, turned by the
 * entry so that a warp's stores do not meet in a bank. */
static __device__ void fill_tables(const struct program &p) {
    uint8_t *table = shared + (TABLE - shared_address(shared));
    const int entry = (int)threadIdx.x / 2, half = (int)threadIdx.x % 2;
    const uint32_t pair = pack_bf16(__ldg(p.code + entry / 16), __ldg(p.code + entry % 16));
    for (int i = 0; i < 4; i++)
        *(uint4 *)(table + entry * ENTRY_BYTES + half * 64 + (i + entry) % 4 * 16) =
            make_uint4(pair, pair, pair, pair);
    if (p.nested_code && threadIdx.x < 256)
        ((float *)(shared + NESTED_AT))[threadIdx.x] = __ldg(p.nested_code + threadIdx.x);
}

/* own: the address of the lane's copy of the first entry. */
static __device__ __forceinline__ uint32_t look_up(uint32_t word, int byte, uint32_t own) {
    return load_shared(__byte_perm(word, own, 0x7604 | byte << 4));
}

/* The scale of row g of half h, block c, for lane 4g + c; anything where the step has no block c.
 */
template <bool DQ> static __device__ __forceinline__ float scale_of(const struct step &s, int h) {
    if (!DQ) return s.absmax[h];
    const float nested = ((const float *)(shared + NESTED_AT))[s.scales[h]];
    return __fadd_rn(__fmul_rn(nested, s.absmax[h]), s.offset[h]);
}

/* sum += a block's codes times x. */
static __device__ __forceinline__ void multiply_unit(float sum[4], const uint32_t x[8],
                                                     const uint2 codes[2], uint32_t own) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const uint32_t up = k < 2 ? codes[0].x : codes[0].y, down = k < 2 ? codes[1].x : codes[1].y;
        const int byte = k % 2 * 2;
        const uint32_t a[4] = {look_up(up, byte, own), look_up(down, byte, own),
                               look_up(up, byte + 1, own), look_up(down, byte + 1, own)};
        mma_bf16(sum, a, x + 2 * k);
    }
}

/* The step that registers hold, of N blocks or, where N < UNITS, of the first n: its sums of rows
 * g and g + 8 for rows 2c and 2c + 1 of x or, of a single one, for block c. Each block makes room
 * for one of the m of the cursor's step. */
template <int MOST, int N>
static __device__ __forceinline__ void multiply_step(float acc[4], const uint32_t x[UNITS][8],
                                                     struct step *s, int n, const float scale[2],
                                                     struct halves next, int m, int lane) {
    const uint32_t own = (uint32_t)(TABLE + lane * 4);
    float sum[2][4] = {}; /* two chains of products */
#pragma unroll
    for (int j = 0; j < UNITS; j++) {
        if (j < N && (N == UNITS || j < n)) {
            multiply_unit(sum[j % 2], x[j], s->codes[j], own);
            if constexpr (MOST > 1) {
                const float s0 = __shfl_sync(~0u, scale[0], (lane & ~3) | j),
                            s1 = __shfl_sync(~0u, scale[1], (lane & ~3) | j);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    acc[i] += (i < 2 ? s0 : s1) * sum[j % 2][i];
                    sum[j % 2][i] = 0.0f;
                }
            }
        }
        load_unit(s, next, j, m);
    }
    for (int h = 0; MOST == 1 && h < 2; h++) {
        const float v = (sum[0][2 * h] + sum[1][2 * h]) * scale[h];
        acc[2 * h] = N == UNITS || lane % 4 < n ? v : 0.0f;
    }
}

/* Who leaves sums of a group: the warps that multiply and, as one, those for LoRA. */
template <bool LORA> static constexpr int SLOTS = WARPS + LORA;

/* One's sums of a group: (GROUP_ROWS, 8 rows of x), turned so that neither a column nor an mma's
 * result meets itself in a bank; of a single row of x, (GROUP_ROWS, 4 parts). */
template <int MOST> static constexpr int SUM_FLOATS = GROUP_ROWS *(MOST == 1 ? 4 : 8);

template <int MOST, bool LORA>
static __device__ __forceinline__ float *sums_of(int group, int slot) {
    return (float *)(shared + SUMS_AT) + (group * SLOTS<LORA> + slot) * SUM_FLOATS<MOST>;
}
template <int MOST> static __device__ __forceinline__ int sum_at(int t, int row) {
    return MOST == 1 ? row * 4 : row * 8 + (t + row / 4 * 2) % 8;
}

template <int MOST, bool LORA>
static __device__ __forceinline__ void leave_sums(const float acc[4], int group, bool add, int warp,
                                                  int lane) {
    const int g = lane / 4, c = lane % 4;
    float *sums = sums_of<MOST, LORA>(group, warp);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (MOST == 1) {
            float *to = sums + h * WARP + lane;
            *to = add ? *to + acc[2 * h] : acc[2 * h];
        } else {
            float2 *to = (float2 *)(sums + sum_at<MOST>(2 * c, g + h * GN_CUDA_TILE_ROWS));
            const float2 before = add ? *to : make_float2(0.0f, 0.0f);
            *to = make_float2(before.x + acc[2 * h], before.y + acc[2 * h + 1]);
        }
    }
}

/* What LoRA adds. */
template <int MOST>
static __device__ __forceinline__ void leave_term(int group, int t, int row, float v) {
    float *to = sums_of<MOST, true>(group, WARPS) + sum_at<MOST>(t, row);
    if (MOST == 1)
        *(float4 *)to = make_float4(v, 0.0f, 0.0f, 0.0f);
    else
        *to = v;
}

template <int MOST, bool LORA>
static __device__ __forceinline__ float total(int group, int row, int t) {
    const float *from = sums_of<MOST, LORA>(group, 0) + sum_at<MOST>(t, row);
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < SLOTS<LORA>; w++) {
        if (MOST == 1) {
            const float4 parts = *(const float4 *)(from + w * SUM_FLOATS<MOST>);
            sum += (parts.x + parts.y) + (parts.z + parts.w);
        } else {
            sum += from[w * SUM_FLOATS<MOST>];
        }
    }
    return sum;
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
        const float2 angle = *angle_of(t, j);
        const float x = low;
        low = x * angle.x - high * angle.y;
        high = high * angle.x + x * angle.y;
    }
    bf16 *to = p.q + ((int64_t)t * p.heads + head) * p.D;
    if (which > 0) {
        const struct slot slot = *slot_of(t);
        to = which == 1 ? ph.keys + slot.block * p.k_ld : ph.values + slot.block * p.v_ld;
        to += (head * TOKENS + slot.token) * p.D;
    }
    to[j] = __float2bfloat16(low);
    to[j + half] = __float2bfloat16(high);
}

template <int MOST> static __device__ __forceinline__ int by_rows(const struct program &p, int i) {
    return MOST == 1 ? i : quotient(i, p.by_T);
}

/* One output of the residual stream, of the groups from `first` on. */
struct output {
    int group, row, t, n; /* group of the batch; its row; row and column of x */
};

template <int MOST>
static __device__ __forceinline__ struct output output_of(const struct program &p, int first,
                                                          int i) {
    struct output o;
    o.row = i % GROUP_ROWS;
    o.group = by_rows<MOST>(p, i / GROUP_ROWS);
    o.t = i / GROUP_ROWS - o.group * rows_of<MOST>(p);
    o.n = (first + o.group) * GROUP_ROWS + o.row;
    return o;
}

/* What an output is added to, and the next norm's weight. */
struct before {
    float x, norm;
};

static __device__ __forceinline__ struct before before_of(const struct program &p,
                                                          const struct phase &ph, struct output o) {
    return {__ldcg(p.x + o.t * p.x_ld + o.n), ph.norm ? __ldg(ph.norm + o.n) : 0.0f};
}

/* The residual stream's outputs of n groups from `first` on, with sums to be added or, in PREPARE,
 * without; the thread's first one is added to `early`. */
template <int MOST, bool LORA>
static __device__ __forceinline__ void finish_stream(const struct program &p,
                                                     const struct phase &ph, int first, int n,
                                                     struct before early) {
    for (int i = threadIdx.x; i < n * GROUP_ROWS * rows_of<MOST>(p); i += THREADS) {
        const struct output o = output_of<MOST>(p, first, i);
        const struct before before = i < THREADS ? early : before_of(p, ph, o);
        float x = before.x;
        if (ph.kind == ADD) {
            x += total<MOST, LORA>(o.group, o.row, o.t);
            p.x[o.t * p.x_ld + o.n] = x;
        }
        p.normed[(int64_t)o.t * p.hidden + o.n] = __float2bfloat16(x * before.norm);
        float square = x * x;
        const uint32_t half = 0xffffu << (threadIdx.x & 16);
#pragma unroll
        for (int d = GROUP_ROWS / 2; d > 0; d /= 2) square += __shfl_xor_sync(half, square, d);
        if (o.row == 0) p.squares[(o.t * p.hidden + o.n) / GROUP_ROWS] = square;
    }
}

/* The outputs of n groups of q, k and v or of gate and up from `first` on. */
template <int MOST, bool LORA>
static __device__ __forceinline__ void finish_pairs(const struct program &p, const struct phase &ph,
                                                    int first, int n) {
    for (int i = threadIdx.x; i < n * GN_CUDA_TILE_ROWS * rows_of<MOST>(p); i += THREADS) {
        const int row = i % GN_CUDA_TILE_ROWS, group = by_rows<MOST>(p, i / GN_CUDA_TILE_ROWS);
        const int t = i / GN_CUDA_TILE_ROWS - group * rows_of<MOST>(p);
        const float factor = ((const float *)(shared + FACTORS_AT))[t];
        const float v = total<MOST, LORA>(group, row, t) * factor;
        const float other = total<MOST, LORA>(group, row + GN_CUDA_TILE_ROWS, t) * factor;
        if (ph.kind == SWIGLU)
            p.h[(int64_t)t * p.intermediate + (first + group) * GN_CUDA_TILE_ROWS + row] =
                __float2bfloat16(v / (1.0f + __expf(-v)) * other);
        else
            finish_heads(p, ph, first + group, row, t, v, other);
    }
}

/* Multiplies the step that registers hold, and asks for another in its place. */
template <int MOST, bool DQ>
static __device__ __forceinline__ void
take_step(float acc[4], const uint32_t x[UNITS][8], const struct program &p, int current, int n,
          struct step *s, struct cursor *cur, int warp, int lane) {
    const int m = next_units(cur, p, current, warp, lane);
    const float scale[2] = {scale_of<DQ>(*s, 0), scale_of<DQ>(*s, 1)};
    const struct halves next = load_scales<DQ>(s, cur, m, lane);
    if (n == UNITS)
        multiply_step<MOST, UNITS>(acc, x, s, n, scale, next, m, lane);
    else
        multiply_step<MOST, UNITS - 1>(acc, x, s, n, scale, next, m, lane);
    cur->holds = m > 0;
    if (m > 0) advance(cur, lane);
}

/* The sums of groups [begin, end) of the phase. x holds the columns of the only blocks, with has_x,
 * or `ahead` those of a single row. */
template <int MOST, bool DQ, bool LORA>
static __device__ __forceinline__ void
multiply_batch(uint32_t x[UNITS][8], struct columns *ahead, const struct program &p, int current,
               struct range blocks, int begin, int end, bool has_x, struct step *s,
               struct cursor *cur, int warp, int lane) {
    const struct phase &ph = *phase_at(current);
    for (int block = blocks.begin; block < blocks.end; block += UNITS) {
        const int n = min(UNITS, blocks.end - block);
        if (MOST == 1 && !has_x) {
            place_row(x, *ahead, lane);
            const int next = block + UNITS < blocks.end ? block + UNITS : blocks.begin;
            if (next != block) *ahead = fetch_row(ph, next, blocks.end, lane);
        } else if (!has_x) {
            load_rows(x, p, ph, block, blocks.end, lane);
        }
#pragma unroll 1
        for (int group = begin; group < end; group++) {
            float acc[4] = {};
            take_step<MOST, DQ>(acc, x, p, current, n, s, cur, warp, lane);
            leave_sums<MOST, LORA>(acc, group - begin, block > blocks.begin, warp, lane);
        }
    }
    if (blocks.begin < blocks.end) return;
    const float none[4] = {};
    for (int group = begin; group < end; group++)
        leave_sums<MOST, LORA>(none, group - begin, false, warp, lane);
}

/* What the warps that multiply do in a phase, and what its helpers do: they meet at the same
 * barriers. */
template <int MOST, bool DQ, bool LORA>
static __device__ __forceinline__ void multiply(const struct program &p, int current,
                                                struct step *s, struct cursor *cur, int warp,
                                                int lane) {
    const struct phase &ph = *phase_at(current);
    const struct range groups = groups_of(ph), blocks = blocks_of(ph, warp);
    const bool once = blocks.end - blocks.begin <= UNITS;
    uint32_t x[UNITS][8];
    struct columns ahead = {};
    if (MOST == 1) ahead = fetch_row(ph, blocks.begin, blocks.end, lane);
    if (ph.kind != ADD) load_factors<MOST>(p, warp, lane);
    for (int begin = groups.begin; begin < groups.end; begin += p.batch_groups) {
        const int end = min(begin + p.batch_groups, groups.end), n = end - begin;
        struct before early = {};
        if (ph.kind == ADD && (int)threadIdx.x < n * GROUP_ROWS * rows_of<MOST>(p))
            early = before_of(p, ph, output_of<MOST>(p, begin, threadIdx.x));
        multiply_batch<MOST, DQ, LORA>(x, &ahead, p, current, blocks, begin, end,
                                       once && begin > groups.begin, s, cur, warp, lane);
        __syncthreads();
        if (ph.kind == ADD)
            finish_stream<MOST, LORA>(p, ph, begin, n, early);
        else
            finish_pairs<MOST, LORA>(p, ph, begin, n);
        if (end < groups.end) __syncthreads();
    }
}

/* `times`: products of the program so far, with this one. */
template <int MOST>
static __device__ __forceinline__ void help(const struct program &p, int current, uint32_t times,
                                            int helper, int lane) {
    const struct phase &ph = *phase_at(current);
    const struct range groups = groups_of(ph);
    shrink(p, ph, (int)blockIdx.x * HELPERS + helper, (int)gridDim.x * HELPERS, lane);
    meet_helpers(p, times, lane);
    for (int begin = groups.begin; begin < groups.end; begin += p.batch_groups) {
        const int end = min(begin + p.batch_groups, groups.end);
        expand(p, ph, begin, end - begin, helper, lane, leave_term<MOST>);
        __syncthreads();
        if (end < groups.end) __syncthreads();
    }
}

/* What the first product needs of the embeddings. */
template <int MOST, bool LORA>
static __device__ __forceinline__ void prepare(const struct program &p, const struct phase &ph) {
    const struct range groups = groups_of(ph);
    const int n = groups.end - groups.begin;
    struct before early = {};
    if ((int)threadIdx.x < n * GROUP_ROWS * rows_of<MOST>(p))
        early = before_of(p, ph, output_of<MOST>(p, groups.begin, threadIdx.x));
    finish_stream<MOST, LORA>(p, ph, groups.begin, n, early);
}

#endif
