/* decoder_product.cuh - a phase of decoder.cu that multiplies: x into registers, steps of weights,
 * the sums of a block's warps, and what becomes of them. */
#ifndef GN_CUDA_DECODER_PRODUCT_CUH
#define GN_CUDA_DECODER_PRODUCT_CUH

#include "decoder_lora.cuh"

/* A kernel for up to MOST rows of x has them in so many tiles of 8. */
template <int MOST> static constexpr int TILES = (MOST + 7) / 8;

/* ---- x ---- */

/* Rows of x that a warp asks for at once. */
template <int MOST> static constexpr int AT_ONCE = MOST == 1 ? 1 : 4;

/* The lane's 8 columns, of the UNITS blocks from `block` on, of rows from `first` on. */
template <int MOST>
static __device__ __forceinline__ void fetch_x(uint4 a[AT_ONCE<MOST>], const struct program &p,
                                               const struct phase &ph, int first, int block,
                                               int end_block, int lane) {
    const int col = block * GN_BLOCK + lane * 8;
    const bf16 *from = ph.x + (int64_t)first * ph.blocks * GN_BLOCK + col;
#pragma unroll
    for (int i = 0; i < AT_ONCE<MOST>; i++) {
        a[i] = make_uint4(0, 0, 0, 0);
        if (first + i < rows_of<MOST>(p) && col < end_block * GN_BLOCK)
            a[i] = load_fresh16(from + i * ph.blocks * GN_BLOCK);
    }
}

/* Through the warp's scratch, to the lanes that multiply row t: those of g = t % 8. A single row
 * has its blocks in columns of their own: block j in that of g = 2j, and zeros elsewhere. */
template <int MOST>
static __device__ __forceinline__ void deal(uint32_t x[UNITS][8], uint4 columns, int t,
                                            uint8_t *scratch, int lane) {
    const int g = lane / 4, c = lane % 4;
    __syncwarp();
    *(uint4 *)(scratch + lane * 16) = columns;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < UNITS; j++) {
        if (g != (MOST == 1 ? 2 * j : t % 8)) continue;
        const uint4 *from = (const uint4 *)(scratch + j * GN_BLOCK * 2 + c * 32);
        const uint4 low = from[0], high = from[1];
        x[j][0] = low.x, x[j][1] = low.y, x[j][2] = low.z, x[j][3] = low.w;
        x[j][4] = high.x, x[j][5] = high.y, x[j][6] = high.z, x[j][7] = high.w;
    }
}

/* The warp's UNITS blocks of columns from `block` on, as the mma's B operand, for all rows. `ahead`
 * has those of the first rows. */
template <int MOST>
static __device__ __forceinline__ void
load_x(uint32_t x[TILES<MOST>][UNITS][8], const struct program &p, const struct phase &ph,
       int block, int end_block, const uint4 ahead[AT_ONCE<MOST>], int warp, int lane) {
    uint8_t *scratch = shared + SCRATCH_AT + warp * SCRATCH_BYTES;
#pragma unroll
    for (int n = 0; n < TILES<MOST>; n++)
#pragma unroll 1
        for (int first = 8 * n; first < min(8 * n + 8, rows_of<MOST>(p)); first += AT_ONCE<MOST>) {
            uint4 a[AT_ONCE<MOST>];
            if (first > 0) fetch_x<MOST>(a, p, ph, first, block, end_block, lane);
#pragma unroll
            for (int i = 0; i < AT_ONCE<MOST>; i++)
                if (first + i < rows_of<MOST>(p))
                    deal<MOST>(x[n], first > 0 ? a[i] : ahead[i], first + i, scratch, lane);
        }
}

/* RMSNorm's factors, a warp a row. */
template <int MOST>
static __device__ __forceinline__ void load_factors(const struct program &p, int warp, int lane) {
    if (warp >= rows_of<MOST>(p)) return;
    float sum = 0.0f;
    for (int i = lane; i < (int)gridDim.x; i += WARP)
        sum += __ldcg(p.squares + warp * gridDim.x + i);
    sum = warp_sum(sum);
    if (lane == 0) ((float *)(shared + FACTORS_AT))[warp] = rsqrtf(sum / (float)p.hidden + p.eps);
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
template <bool DQ> static __device__ __forceinline__ float scale_of(const struct step &s, int h) {
    if (!DQ) return __uint_as_float(s.scales[h]);
    const float nested = ((const float *)(shared + NESTED_AT))[s.scales[h]];
    return __fadd_rn(__fmul_rn(nested, s.absmax[h]), s.offset[h]);
}

/* sum += a block's codes times x. */
template <int MOST>
static __device__ __forceinline__ void multiply_unit(float sum[TILES<MOST>][4],
                                                     const uint32_t x[TILES<MOST>][UNITS][8], int j,
                                                     const uint2 codes[2], int lane) {
    const uint32_t lane4 = lane * 4;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const uint32_t up = k < 2 ? codes[0].x : codes[0].y, down = k < 2 ? codes[1].x : codes[1].y;
        const int byte = k % 2 * 2;
        const uint32_t a[4] = {look_up(up, byte, lane4), look_up(down, byte, lane4),
                               look_up(up, byte + 1, lane4), look_up(down, byte + 1, lane4)};
#pragma unroll
        for (int n = 0; n < TILES<MOST>; n++) mma_bf16(sum[n], a, &x[n][j][2 * k]);
    }
}

/* acc = the n blocks that registers hold; each makes room for one of the m blocks that the cursor
 * is at. */
template <int MOST>
static __device__ __forceinline__ void
multiply_rows(float acc[TILES<MOST>][4], const uint32_t x[TILES<MOST>][UNITS][8], struct step *s,
              int n, const float scale[2], struct halves next, int m, int lane) {
#pragma unroll
    for (int j = 0; j < UNITS; j++) {
        if (j < n) {
            float sum[TILES<MOST>][4] = {};
            multiply_unit<MOST>(sum, x, j, s->codes[j], lane);
            const float s0 = __shfl_sync(~0u, scale[0], (lane & ~3) | j),
                        s1 = __shfl_sync(~0u, scale[1], (lane & ~3) | j);
#pragma unroll
            for (int t = 0; t < TILES<MOST>; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[t][i] += (i < 2 ? s0 : s1) * sum[t][i];
        }
        if (j < m) load_unit(s, next, j);
    }
}

/* The same for a single row, whose block j is in the sums of lane 4g + j alone. */
static __device__ __forceinline__ void multiply_row(float acc[1][4], const uint32_t x[1][UNITS][8],
                                                    struct step *s, int n, const float scale[2],
                                                    struct halves next, int m, int lane) {
    float sum[2][1][4] = {};
#pragma unroll
    for (int j = 0; j < UNITS; j++) {
        if (j < n) multiply_unit<1>(sum[j % 2], x, j, s->codes[j], lane);
        if (j < m) load_unit(s, next, j);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float v = lane % 4 < n ? (sum[0][0][2 * h] + sum[1][0][2 * h]) * scale[h] : 0.0f;
        v += __shfl_xor_sync(~0u, v, 1);
        acc[0][2 * h] = v + __shfl_xor_sync(~0u, v, 2);
    }
}

/* Who leaves sums of a group: the warps that multiply and, as one, those for LoRA. */
template <bool LORA> static constexpr int SLOTS = WARPS + LORA;

/* A warp's sums of a group: (tiles of x, GROUP_ROWS, 8 rows of x and one float between); of a
 * single row (GROUP_ROWS). */
template <int MOST> static constexpr int ROW_FLOATS = MOST == 1 ? 1 : 9;
template <int MOST> static constexpr int SUM_FLOATS = TILES<MOST> *GROUP_ROWS *ROW_FLOATS<MOST>;

/* Where a warp's sum of (t, row) is, in a batch's group. */
template <int MOST, bool LORA>
static __device__ __forceinline__ float *sum_at(int group, int warp, int t, int row) {
    return sums() + (group * SLOTS<LORA> + warp) * SUM_FLOATS<MOST> +
           (t / 8 * GROUP_ROWS + row) * ROW_FLOATS<MOST> + t % 8;
}

template <int MOST, bool LORA>
static __device__ __forceinline__ void leave_sums(const struct program &p,
                                                  const float acc[TILES<MOST>][4], int group,
                                                  bool add, int warp, int lane) {
    const int g = lane / 4, c = lane % 4;
#pragma unroll
    for (int n = 0; n < TILES<MOST>; n++) {
        if (8 * n + 2 * c >= rows_of<MOST>(p)) continue;
#pragma unroll
        for (int i = 0; i < 4; i += MOST == 1 ? 2 : 1) {
            float *to = sum_at<MOST, LORA>(group, warp, 8 * n + 2 * c + i % 2,
                                           g + i / 2 * GN_CUDA_TILE_ROWS);
            *to = add ? *to + acc[n][i] : acc[n][i];
        }
    }
}

template <int MOST, bool LORA>
static __device__ __forceinline__ float total(int group, int row, int t) {
    const float *from = sum_at<MOST, LORA>(group, 0, t, row);
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < SLOTS<LORA>; w++) sum += from[w * SUM_FLOATS<MOST>];
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
    float *squares = (float *)(shared + SQUARES_AT);
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
        if (o.row == 0) squares[o.group * rows_of<MOST>(p) + o.t] = square;
    }
}

/* The sum of a batch's squares, for thread t = row t. */
template <int MOST>
static __device__ __forceinline__ float sum_squares(const struct program &p, int n) {
    float sum = 0.0f;
    if ((int)threadIdx.x < rows_of<MOST>(p))
        for (int i = 0; i < n; i++)
            sum += ((const float *)(shared + SQUARES_AT))[i * rows_of<MOST>(p) + threadIdx.x];
    return sum;
}

template <int MOST>
static __device__ __forceinline__ void leave_squares(const struct program &p, float sum) {
    if ((int)threadIdx.x < rows_of<MOST>(p)) p.squares[threadIdx.x * gridDim.x + blockIdx.x] = sum;
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
take_step(float acc[TILES<MOST>][4], const uint32_t x[TILES<MOST>][UNITS][8],
          const struct program &p, int current, int n, struct step *s, struct cursor *cur, int warp,
          int lane) {
    const int m = next_units(cur, p, current, warp, lane);
    const float scale[2] = {scale_of<DQ>(*s, 0), scale_of<DQ>(*s, 1)};
    load_scales<DQ>(s, cur, m, lane);
    const struct halves next = codes_of(cur, lane);
    if constexpr (MOST == 1)
        multiply_row(acc, x, s, n, scale, next, m, lane);
    else
        multiply_rows<MOST>(acc, x, s, n, scale, next, m, lane);
    cur->holds = m > 0;
    if (m > 0) advance(cur, lane);
}

/* The sums of groups [begin, end) of the phase. has_x: x holds the columns already. */
template <int MOST, bool DQ, bool LORA>
static __device__ __forceinline__ void
multiply_batch(uint32_t x[TILES<MOST>][UNITS][8], uint4 ahead[AT_ONCE<MOST>],
               const struct program &p, int current, struct range blocks, int begin, int end,
               bool has_x, struct step *s, struct cursor *cur, int warp, int lane) {
    const struct phase &ph = *phase_at(current);
    for (int block = blocks.begin; block < blocks.end; block += UNITS) {
        const int n = min(UNITS, blocks.end - block);
        if (!has_x) {
            load_x<MOST>(x, p, ph, block, blocks.end, ahead, warp, lane);
            const int next = n < blocks.end - block ? block + UNITS : blocks.begin;
            if (next != block) fetch_x<MOST>(ahead, p, ph, 0, next, blocks.end, lane);
        }
#pragma unroll 1
        for (int group = begin; group < end; group++) {
            float acc[TILES<MOST>][4] = {};
            take_step<MOST, DQ>(acc, x, p, current, n, s, cur, warp, lane);
            leave_sums<MOST, LORA>(p, acc, group - begin, block > blocks.begin, warp, lane);
        }
    }
    if (blocks.begin < blocks.end) return;
    const float none[TILES<MOST>][4] = {};
    for (int group = begin; group < end; group++)
        leave_sums<MOST, LORA>(p, none, group - begin, false, warp, lane);
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
    uint32_t x[TILES<MOST>][UNITS][8] = {};
    uint4 ahead[AT_ONCE<MOST>];
    float squares = 0.0f;
    fetch_x<MOST>(ahead, p, ph, 0, blocks.begin, blocks.end, lane);
    if (ph.kind != ADD) load_factors<MOST>(p, warp, lane);
    for (int begin = groups.begin; begin < groups.end; begin += p.batch_groups) {
        const int end = min(begin + p.batch_groups, groups.end), n = end - begin;
        struct before early = {};
        if (ph.kind == ADD && (int)threadIdx.x < n * GROUP_ROWS * rows_of<MOST>(p))
            early = before_of(p, ph, output_of<MOST>(p, begin, threadIdx.x));
        multiply_batch<MOST, DQ, LORA>(x, ahead, p, current, blocks, begin, end,
                                       once && begin > groups.begin, s, cur, warp, lane);
        __syncthreads();
        if (ph.kind == ADD)
            finish_stream<MOST, LORA>(p, ph, begin, n, early);
        else
            finish_pairs<MOST, LORA>(p, ph, begin, n);
        __syncthreads();
        if (ph.kind == ADD) squares += sum_squares<MOST>(p, n);
    }
    if (ph.kind == ADD) leave_squares<MOST>(p, squares);
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
        const int n = min(p.batch_groups, groups.end - begin);
        expand(p, ph, begin, n, helper, lane,
               [&](int group, int t, int row) { return sum_at<MOST, true>(group, WARPS, t, row); });
        __syncthreads();
        __syncthreads();
    }
}

/* What the first product needs of the embeddings. */
template <int MOST, bool LORA>
static __device__ __forceinline__ void prepare(const struct program &p, const struct phase &ph,
                                               bool helps) {
    const struct range groups = groups_of(ph);
    float squares = 0.0f;
    for (int begin = groups.begin; begin < groups.end; begin += p.batch_groups) {
        const int n = min(p.batch_groups, groups.end - begin);
        struct before early = {};
        if (!helps && (int)threadIdx.x < n * GROUP_ROWS * rows_of<MOST>(p))
            early = before_of(p, ph, output_of<MOST>(p, begin, threadIdx.x));
        if (!helps) finish_stream<MOST, LORA>(p, ph, begin, n, early);
        __syncthreads();
        squares += sum_squares<MOST>(p, n);
        __syncthreads();
    }
    leave_squares<MOST>(p, squares);
}

#endif
