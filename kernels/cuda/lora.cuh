/* lora.cuh - what lora.cu and lora_prefill.cu share: a call's terms as kernels see them, and who
 * does what of them. Kernels look the terms up on the device, so that a recorded launch serves
 * other adapters of the same ranks on other rows. */
#ifndef GN_CUDA_LORA_CUH
#define GN_CUDA_LORA_CUH

#include "linear.cuh"

enum {
    LORA_THREADS = 256,
    LORA_WARPS = LORA_THREADS / WARP,
    LORA_STEP = 16,       /* ranks of a step: k of an mma */
    LORA_MAX_STEPS = 128, /* listed at once */
    LORA_TILE_ROWS = 8,   /* of x: n of an mma */
};

/* Rows of a term are cut into chunks. h = scale A x stands by term, then row of it. */
struct lora_call {
    const gn_lora *terms;
    int n_terms, pair, n_parts;
    int part0; /* the first that a launch computes h of */
    int pitch; /* ranks of a row of h: the call's largest, in whole steps */
    int T, K;
    int64_t x_ld;
    const bf16 *x;
    bf16 *h;            /* (rows of all terms, n_parts, pitch) */
    float *partial;     /* a piece's sums a slot, for a block that sums the pieces */
    uint32_t *counters; /* pieces that are there */
};

static inline __host__ __device__ int whole_steps(int rank) {
    return (rank + LORA_STEP - 1) / LORA_STEP * LORA_STEP;
}

/* Launches get at most so many blocks while several of them share a sum. */
static inline int lora_slots(const gn_ctx *ctx) {
    return 2 * ctx->cuda->sms;
}

/* Pieces of K for each of n sums, so that every SM has work, but no more than `most`. */
static inline int lora_pieces(const gn_ctx *ctx, int64_t n, int64_t most) {
    const int64_t pieces = n > 0 ? lora_slots(ctx) / n : 1;
    return (int)(pieces < 1 || most < 1 ? 1 : pieces < most ? pieces : most);
}

/* ---- the call ---- */

/* Of all terms. */
static inline int64_t covered_rows(const gn_linear_args *args) {
    int64_t n = 0;
    for (int i = 0; i < args->n_lora; i++) n += args->lora[i].rows;
    return n;
}

/* Of h. */
static inline size_t h_bytes(int64_t rows, int64_t pitch) {
    return align_up((size_t)(rows * GN_MAX_PARTS * pitch) * sizeof(bf16));
}

static inline struct lora_call call_of(const gn_ctx *ctx, const gn_linear_args *args, const void *x,
                                       int64_t x_ld, void *scratch) {
    struct lora_call c = {};
    c.terms = ctx->cuda->batch.terms;
    c.n_terms = args->n_lora;
    c.pair = args->pair;
    c.n_parts = args->n_parts;
    c.pitch = whole_steps(max_rank_of(args));
    c.T = (int)args->x.shape[0];
    c.K = (int)args->x.shape[1];
    c.x = (const bf16 *)x;
    c.x_ld = x_ld;
    c.h = (bf16 *)scratch;
    c.partial = (float *)((char *)scratch + h_bytes(covered_rows(args), c.pitch));
    c.counters = ctx->cuda->counters;
    return c;
}

/* lora_prefill.cu: h of any number of rows, made for many. */
gn_status gn_cuda_lora_shrink_many(gn_ctx *ctx, const gn_linear_args *args,
                                   const struct lora_call *c, int n_parts);
size_t gn_cuda_lora_partial_bytes(const gn_ctx *ctx);

static __device__ __forceinline__ gn_tensor x_of(const struct lora_call &c) {
    return {(void *)c.x, GN_BF16, 2, {c.T, c.K, 1, 1}, c.x_ld};
}

/* ---- chunks of terms ---- */

/* Some rows of a term. */
struct chunk {
    const gn_lora *term; /* NULL: there is no such chunk */
    int row, rows;       /* of the batch */
    int h_row;
};

static __device__ __forceinline__ int2 warp_scan(int2 v, int lane) {
#pragma unroll
    for (int d = 1; d < WARP; d *= 2) {
        const int x = __shfl_up_sync(0xffffffffu, v.x, d);
        const int y = __shfl_up_sync(0xffffffffu, v.y, d);
        if (lane >= d) v.x += x, v.y += y;
    }
    return v;
}

/* Chunk `index` of all terms' rows, cut into chunks of `size`. The whole warp calls. */
static __device__ struct chunk find_chunk(const struct lora_call &c, int index, int size) {
    const int lane = threadIdx.x % WARP;
    int2 before = {};
    for (int base = 0; base < c.n_terms; base += WARP) {
        const int rows = base + lane < c.n_terms ? c.terms[base + lane].rows : 0;
        const int2 own = {(rows + size - 1) / size, rows};
        const int2 sum = warp_scan(own, lane);
        const uint32_t hits = __ballot_sync(0xffffffffu, before.x + sum.x > index);
        if (hits) {
            const int at = __ffs(hits) - 1;
            const int within = index - before.x - __shfl_sync(0xffffffffu, sum.x - own.x, at);
            const int h_row = before.y + __shfl_sync(0xffffffffu, sum.y - own.y, at);
            const gn_lora *term = &c.terms[base + at];
            const int first = within * size;
            return {term, term->row0 + first, min(term->rows - first, size), h_row + first};
        }
        before.x += __shfl_sync(0xffffffffu, sum.x, WARP - 1);
        before.y += __shfl_sync(0xffffffffu, sum.y, WARP - 1);
    }
    return {};
}

/* No launch needs more: chunks of `size` of n_terms terms that cover `covered` rows together. */
static inline int64_t chunks_bound(int64_t n_terms, int64_t covered, int size) {
    return n_terms + covered / size;
}

/* ---- values ---- */

/* Two values as bf16 from element i on, of which n exist; the others are zero. */
static __device__ __forceinline__ uint32_t load_pair(const gn_tensor &m, int64_t i, int n) {
    float v[2];
#pragma unroll
    for (int j = 0; j < 2; j++)
        v[j] = j >= n              ? 0.0f
               : m.dtype == GN_F32 ? ((const float *)m.data)[i + j]
                                   : to_float(((const bf16 *)m.data)[i + j]);
    const bf162 pair = __floats2bfloat162_rn(v[0], v[1]);
    return *(const uint32_t *)&pair;
}

/* Four or eight of them. VECTOR: they stand aligned in bf16, and all or none exist; they are read
 * once, so they stay out of L1. */
template <bool VECTOR>
static __device__ __forceinline__ uint2 load4(const gn_tensor &m, int64_t i, int n) {
    uint2 v = {};
    if (!VECTOR) return {load_pair(m, i, n), load_pair(m, i + 2, n - 2)};
    load_once(v, (const bf16 *)m.data + i, n);
    return v;
}

template <bool VECTOR>
static __device__ __forceinline__ uint4 load8(const gn_tensor &m, int64_t i, int n) {
    uint4 v = {};
    if (!VECTOR) {
        const uint2 low = load4<false>(m, i, n), high = load4<false>(m, i + 4, n - 4);
        return {low.x, low.y, high.x, high.y};
    }
    load_once(v, (const bf16 *)m.data + i, n);
    return v;
}

/* Rows of m begin and end at multiples of n values, in bf16. */
static __device__ __forceinline__ bool is_vector(const gn_tensor &m, int n) {
    return m.dtype == GN_BF16 && m.ld % n == 0 && m.shape[1] % n == 0 &&
           (uintptr_t)m.data % (n * sizeof(bf16)) == 0;
}

/* ---- h ---- */

static __device__ __forceinline__ bf16 *h_at(const struct lora_call &c, int64_t row, int part) {
    return c.h + (row * c.n_parts + part) * c.pitch;
}

/* Of the blocks that computed pieces of one sum the last to call adds them up, in their order:
 * h of the chunk, ranks [rank0, rank0 + ranks). partial: (pieces, rows of `size`, width). */
static __device__ void finish_pieces(const struct lora_call &c, const struct chunk &chunk, int part,
                                     float scale, int rank0, int ranks, const float *partial,
                                     int pieces, int size, int width, uint32_t *counter) {
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(counter, 1) + 1 == (uint32_t)pieces;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    for (int i = threadIdx.x; i < chunk.rows * ranks; i += LORA_THREADS) {
        const int row = i / ranks, rank = i % ranks;
        const float *at = partial + row * width + rank;
        float sum = 0.0f;
#pragma unroll 4
        for (int piece = 0; piece < pieces; piece++)
            sum += __ldcg(at + (int64_t)piece * size * width);
        h_at(c, chunk.h_row + row, part)[rank0 + rank] = from_float<bf16>(scale * sum);
    }
    if (threadIdx.x == 0) *counter = 0;
}

/* ---- steps ---- */

/* Some rows of the batch meet 16 ranks of a term. */
struct step {
    gn_tensor b;  /* (N, ranks) */
    int64_t h;    /* element of h for the first of the rows, were it covered */
    int from, to; /* those of the rows that the term covers */
    bool vector;
};

/* Both sums over the threads before this one; *all: over all of the block. */
static __device__ int2 block_scan(int2 own, int2 *all) {
    __shared__ int2 sums[LORA_WARPS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int2 sum = warp_scan(own, lane);
    __syncthreads(); /* of an earlier call's readers */
    if (lane == WARP - 1) sums[warp] = sum;
    __syncthreads();
    int2 before = {sum.x - own.x, sum.y - own.y};
    *all = {};
    for (int i = 0; i < LORA_WARPS; i++) {
        if (i < warp) before.x += sums[i].x, before.y += sums[i].y;
        all->x += sums[i].x, all->y += sums[i].y;
    }
    return before;
}

static __device__ struct step step_of(const struct lora_call &c, const gn_lora &term,
                                      const gn_lora_pair &pair, int part, int row0, int rows,
                                      int h_row, int rank) {
    struct step s;
    s.b = pair.b;
    s.b.data = (char *)pair.b.data + rank * (pair.b.dtype == GN_F32 ? 4 : 2);
    s.b.shape[1] = min(pair.rank - rank, LORA_STEP);
    s.h = h_at(c, h_row + row0 - term.row0, part) - c.h + rank;
    s.from = max(term.row0 - row0, 0);
    s.to = min(term.row0 + term.rows - row0, rows);
    s.vector = is_vector(s.b, 4);
    return s;
}

/* The steps of rows [row0, row0 + rows), in the terms' order: of all of them, whose number it
 * returns, those from `first` on that there is room for. The whole block calls; the steps are there
 * for all threads. *vector: those listed are all vectors. */
static __device__ int list_steps(struct step steps[LORA_MAX_STEPS], const struct lora_call &c,
                                 int part, int row0, int rows, int first, bool *vector) {
    int n = 0, h_row = 0;
    bool all_vectors = true;
    for (int base = 0; base < c.n_terms; base += LORA_THREADS) {
        const int i = base + (int)threadIdx.x;
        gn_lora term = {};
        gn_lora_pair pair = {};
        if (i < c.n_terms) term = c.terms[i];
        if (max(term.row0, row0) < min(term.row0 + term.rows, row0 + rows))
            pair = term.placed[c.pair + part];
        int2 all;
        const int2 own = {whole_steps(pair.rank) / LORA_STEP, term.rows};
        const int2 before = block_scan(own, &all);
        for (int j = 0; j < own.x; j++) {
            const int at = n + before.x + j - first;
            if (at < 0 || at >= LORA_MAX_STEPS) continue;
            steps[at] = step_of(c, term, pair, part, row0, rows, h_row + before.y, j * LORA_STEP);
            all_vectors &= steps[at].vector;
        }
        n += all.x;
        h_row += all.y;
    }
    *vector = __syncthreads_and(all_vectors);
    return n;
}

#endif
