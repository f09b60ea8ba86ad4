/* linear_decode_lora.cuh - LoRA's terms beside a product of few rows: what the helpers of
 * linear_decode.cu do. First u = A x, 8 ranks by a piece of K an item, dealt out to the helpers of
 * all blocks; then, when all of u is there, B u for the rows that the block finishes. Nothing waits
 * for it but the end of the block. counters[0] counts the items done, counters[1] the helpers that
 * are done with u; the last of those sets both back to zero. */
#ifndef GN_CUDA_LINEAR_DECODE_LORA_CUH
#define GN_CUDA_LINEAR_DECODE_LORA_CUH

#include "linear_decode.cuh"

/* A term's pair for one matrix. */
struct term {
    const gn_lora_pair *pair;
    int row0, rows, rank;
    float scale;
    int tile0; /* 8 ranks of A are a tile; those of the terms before */
    int u0;    /* where its u begins, for one piece of K: (rows, rank rounded up to 8) */
};

static __device__ __forceinline__ float element(const gn_tensor *t, int64_t i) {
    return t->dtype == GN_F32 ? __ldg((const float *)t->data + i)
                              : to_float(((const bf16 *)t->data)[i]);
}

static __device__ __forceinline__ bool is_bf16_vector(const gn_tensor *t, int64_t i) {
    return t->dtype == GN_BF16 && (uintptr_t)((const bf16 *)t->data + i) % 16 == 0;
}

/* Eight values, of which n exist, as bf16 pairs; the others are zero. */
static __device__ __forceinline__ uint4 load_bf16x8(const gn_tensor *t, int64_t i, int n) {
    if (n >= 8 && is_bf16_vector(t, i)) return __ldg((const uint4 *)((const bf16 *)t->data + i));
    float v[8];
    for (int j = 0; j < 8; j++) v[j] = j < n ? element(t, i + j) : 0.0f;
    return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                      pack_bf16(v[6], v[7]));
}

static __device__ __forceinline__ void load_f32x8(float v[8], const gn_tensor *t, int64_t i,
                                                  int n) {
    if (n >= 8 && is_bf16_vector(t, i)) {
        const uint4 eight = __ldg((const uint4 *)((const bf16 *)t->data + i));
        const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
        for (int j = 0; j < 4; j++) v[2 * j] = low_of(pairs[j]), v[2 * j + 1] = high_of(pairs[j]);
        return;
    }
    for (int j = 0; j < 8; j++) v[j] = j < n ? element(t, i + j) : 0.0f;
}

static __device__ __forceinline__ struct term *terms_of(const struct product &p) {
    return (struct term *)(shared + p.terms);
}

/* Lists the terms' pairs in shared memory and returns the tiles of all their A. Every helper writes
 * the same and needs no other. */
static __device__ int list_terms(const struct product &p, int lane) {
    const int n = p.n_terms * p.n_pairs;
    int tiles = 0, u = 0;
    for (int base = 0; base < n; base += WARP) {
        const int i = base + lane;
        struct term term = {};
        if (i < n) {
            const gn_lora *lora = &p.lora_terms[i / p.n_pairs];
            term.pair = lora->placed + p.pair + i % p.n_pairs;
            term.row0 = lora->row0;
            term.rows = lora->rows;
            term.rank = lora->rows > 0 ? term.pair->rank : 0;
            term.scale = lora->scale * term.pair->scale;
        }
        const int own = (term.rank + 7) / 8, own_u = own * 8 * term.rows;
        int tile_sum = own, u_sum = own_u;
        for (int d = 1; d < WARP; d *= 2) {
            const int more = __shfl_up_sync(0xffffffffu, tile_sum, d);
            const int more_u = __shfl_up_sync(0xffffffffu, u_sum, d);
            if (lane >= d) tile_sum += more, u_sum += more_u;
        }
        term.tile0 = tiles + tile_sum - own;
        term.u0 = u + u_sum - own_u;
        if (i < n) terms_of(p)[i] = term;
        tiles += __shfl_sync(0xffffffffu, tile_sum, WARP - 1);
        u += __shfl_sync(0xffffffffu, u_sum, WARP - 1);
    }
    __syncwarp();
    return tiles;
}

/* Pieces of a block's columns: so many that every helper has an item, a tile by a piece. */
static __device__ __forceinline__ int pieces_of(const struct product &p, int tiles) {
    if (tiles == 0) return 1;
    return max(1, min(p.clusters * HELPERS / tiles, MAX_PIECES / p.ranks));
}

static __device__ __forceinline__ float *u_at(const struct product &p, const struct term &term,
                                              int pieces, int piece, int row) {
    const int width = (term.rank + 7) / 8 * 8;
    return p.lora_u + (int64_t)term.u0 * pieces + ((int64_t)piece * term.rows + row) * width;
}

/* The last term that begins at or before a tile: it has it, for the others there are empty. */
static __device__ const struct term &term_of(const struct product &p, int tile, int lane) {
    const int n = p.n_terms * p.n_pairs;
    int before = 0;
    for (int base = 0; base < n; base += WARP)
        before += __popc(
            __ballot_sync(0xffffffffu, base + lane < n && terms_of(p)[base + lane].tile0 <= tile));
    return terms_of(p)[before - 1];
}

/* u of 8 ranks for all rows of x, over the k-blocks [first, last) of the block: an mma with x as A
 * and the ranks as B. Then stores the rows that the term covers. */
static __device__ void project(const struct product &p, const struct work &w,
                               const struct term &term, int tile, int first, int last, int pieces,
                               int piece, int lane) {
    const int g = lane / 4, c = lane % 4;
    const gn_tensor a = term.pair->a;
    const int rank = min((tile - term.tile0) * 8 + g, term.rank - 1);
    const int64_t from = rank * a.ld + w.k0 * GN_BLOCK + 16 * c;
    const uint32_t x_row = shared_address(shared + p.x_at) + g * p.pitch + c * 32;
    float sums[4] = {};
    uint32_t x[2][8] = {};
#pragma unroll 2
    for (int k = first; k < last; k++) {
        const uint4 low = load_bf16x8(&a, from + k * GN_BLOCK, 8);
        const uint4 high = load_bf16x8(&a, from + k * GN_BLOCK + 8, 8);
        const uint32_t b[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        for (int n = 0; n < 2; n++)
            load_x(x[n], x_row + 8 * n * p.pitch + k * (GN_BLOCK * 2), g + 8 * n < p.T);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t rows[4] = {x[0][2 * j], x[1][2 * j], x[0][2 * j + 1], x[1][2 * j + 1]};
            mma_bf16(sums, rows, &b[2 * j]);
        }
    }
    for (int i = 0; i < 2; i++) {
        const int row = g + 8 * i - term.row0;
        if (row < 0 || row >= term.rows) continue;
        float *u = u_at(p, term, pieces, piece, row) + (tile - term.tile0) * 8 + 2 * c;
        *(float2 *)u = make_float2(sums[2 * i], sums[2 * i + 1]);
    }
}

/* The items of all blocks with the same columns, dealt out among their helpers. */
struct items {
    int first, n, step, tiles, pieces;
};

static __device__ struct items items_of(const struct product &p, const struct work &w, int helper,
                                        int tiles) {
    const int pieces = pieces_of(p, tiles);
    return {w.cluster + helper * p.clusters, tiles * pieces, p.clusters * HELPERS, tiles, pieces};
}

/* Asks for the A of this helper's items. */
static __device__ void prefetch_items(const struct product &p, const struct work &w,
                                      const struct items &items, int lane) {
    for (int i = items.first; i < items.n; i += items.step) {
        const int tile = i % items.tiles, piece = i / items.tiles;
        const struct term &term = term_of(p, tile, lane);
        const gn_tensor *a = &term.pair->a;
        const int rank = min((tile - term.tile0) * 8 + lane / 4, term.rank - 1);
        const int last = w.ks * (piece + 1) / items.pieces;
        for (int k = w.ks * piece / items.pieces + lane % 4; k < last; k += 4)
            prefetch_line((const char *)a->data + (rank * a->ld + (int64_t)(w.k0 + k) * GN_BLOCK) *
                                                      (a->dtype == GN_F32 ? 4 : 2));
    }
}

/* All blocks are resident, or will be when the kernel before is done, and the next kernel's start
 * only when all of these run: so this ends. */
static __device__ void wait_for_u(const struct product &p, const struct items &items, int lane) {
    if (lane == 0)
        while (load_acquire(&p.counters[0]) < (uint32_t)(items.n * p.ranks)) __nanosleep(64);
    __syncwarp();
}

/* Computes this helper's items, counts them as done and waits for everybody's. */
static __device__ void project_items(const struct product &p, const struct work &w,
                                     const struct items &items, int lane) {
    for (int i = items.first; i < items.n; i += items.step) {
        const int tile = i % items.tiles, piece = i / items.tiles;
        project(p, w, term_of(p, tile, lane), tile, w.ks * piece / items.pieces,
                w.ks * (piece + 1) / items.pieces, items.pieces * p.ranks,
                w.rank * items.pieces + piece, lane);
        __syncwarp();
        if (lane == 0) {
            __threadfence();
            atomicAdd(&p.counters[0], 1);
        }
    }
    wait_for_u(p, items, lane);
}

/* The last helper of all to be done with u sets the counters back, for the next op or replay. */
static __device__ void leave_u(const struct product &p, int lane) {
    __syncwarp();
    if (lane != 0) return;
    __threadfence();
    if (atomicAdd(&p.counters[1], 1) + 1 < gridDim.x * gridDim.y * HELPERS) return;
    p.counters[0] = 0;
    p.counters[1] = 0;
}

/* Ranks [rank0, rank0 + RANK_STEP) of a term's u times its scale: (rows, RANK_STEP), zero where
 * there is no such rank. */
static __device__ void stage_u(float *u, const struct product &p, const struct term &term,
                               int pieces, int rank0, int lane) {
    __syncwarp();
    for (int i = lane; i < term.rows * RANK_STEP; i += WARP) {
        const int row = i / RANK_STEP, rank = rank0 + i % RANK_STEP;
        float sum = 0.0f;
        if (rank < term.rank)
            for (int piece = 0; piece < pieces; piece++)
                sum += load_fresh(u_at(p, term, pieces, piece, row) + rank);
        u[i] = sum * term.scale;
    }
    __syncwarp();
}

/* The rows of B that one helper adds: rows [first, last) of those that the block finishes of one
 * matrix, in groups of `in_group`. */
struct rows {
    int m, in_group, first, last;
};

template <int R>
static __device__ struct rows rows_of(const struct product &p, const struct work &w, struct batch b,
                                      int m, int helper) {
    const int in_group = p.swiglu ? 8 * R : 16 * R;
    const int n = ((b.groups - w.rank + p.ranks - 1) >> p.rank_bits) * in_group;
    return {m, in_group, n * helper / HELPERS, n * (helper + 1) / HELPERS};
}

/* Row i of `rows` in the matrix. */
static __device__ __forceinline__ int matrix_row(const struct product &p, const struct work &w,
                                                 struct batch b, const struct rows &rows, int i) {
    const int group = b.group0 + w.rank + i / rows.in_group * p.ranks;
    return min(group * rows.in_group + i % rows.in_group, p.part[w.part].m[rows.m].rows - 1);
}

/* And in the block's LoRA sums, (groups it finishes, 16 R rows, T). */
template <int R>
static __device__ __forceinline__ float *lora_at(const struct product &p, const struct rows &rows,
                                                 int i) {
    const int in_group = i % rows.in_group;
    const int row = p.swiglu ? in_group / 8 * 16 + rows.m * 8 + in_group % 8 : in_group;
    return (float *)(shared + p.lora) + (i / rows.in_group * 16 * R + row) * p.T;
}

static __device__ __forceinline__ const struct term &term_at(const struct product &p,
                                                             const struct work &w, int i, int m) {
    return terms_of(p)[i * p.n_pairs + (p.swiglu ? m : w.part)];
}

/* Asks for those rows of every term's B. */
template <int R>
static __device__ void prefetch_rows(const struct product &p, const struct work &w, struct batch b,
                                     int helper, int lane) {
    for (int i = 0; i < p.n_terms * (p.swiglu ? 2 : 1); i++) {
        const int m = i / p.n_terms;
        const struct term &term = term_at(p, w, i % p.n_terms, m);
        if (term.rank == 0) continue;
        const struct rows rows = rows_of<R>(p, w, b, m, helper);
        const gn_tensor *t = &term.pair->b;
        const int size = t->dtype == GN_F32 ? 4 : 2;
        for (int row = rows.first + lane; row < rows.last; row += WARP) {
            const char *at = (const char *)t->data + matrix_row(p, w, b, rows, row) * t->ld * size;
            for (int line = 0; line < term.rank * size; line += 128) prefetch_line(at + line);
        }
    }
}

/* += scale * B u for one term and matrix. `lanes` lanes share a row, 8 ranks each. */
template <int R>
static __device__ void add_term(const struct product &p, const struct work &w, struct batch b,
                                const struct rows &rows, const struct term &term, int pieces,
                                float *u, int lane) {
    const gn_tensor matrix = term.pair->b;
    for (int rank0 = 0; rank0 < term.rank; rank0 += RANK_STEP) {
        const int left = term.rank - rank0;
        const int lanes = left > 32 ? 8 : left > 16 ? 4 : left > 8 ? 2 : 1;
        const int own = lane % lanes * 8;
        stage_u(u, p, term, pieces, rank0, lane);
#pragma unroll 2
        for (int row0 = rows.first; row0 < rows.last; row0 += WARP / lanes) {
            const int row = row0 + lane / lanes;
            float v[8];
            load_f32x8(v, &matrix,
                       matrix_row(p, w, b, rows, min(row, rows.last - 1)) * matrix.ld + rank0 + own,
                       left - own);
            for (int t = 0; t < term.rows; t++) {
                float sum = 0.0f;
                for (int j = 0; j < 8; j++) sum += v[j] * u[t * RANK_STEP + own + j];
                for (int d = 1; d < lanes; d *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
                if (own == 0 && row < rows.last) lora_at<R>(p, rows, row)[term.row0 + t] += sum;
            }
        }
    }
}

/* LoRA's sums for the helper's rows: of all terms, in their order. */
template <int R>
static __device__ void add_rows(const struct product &p, const struct work &w, struct batch b,
                                int pieces, int helper, int lane) {
    float *u = (float *)(shared + p.u) + helper * p.T * RANK_STEP;
    for (int m = 0; m < (p.swiglu ? 2 : 1); m++) {
        const struct rows rows = rows_of<R>(p, w, b, m, helper);
        for (int i = rows.first + lane; i < rows.last; i += WARP)
            for (int t = 0; t < p.T; t++) lora_at<R>(p, rows, i)[t] = 0.0f;
        for (int i = 0; i < p.n_terms; i++) {
            const struct term &term = term_at(p, w, i, m);
            if (term.rank > 0) add_term<R>(p, w, b, rows, term, pieces, u, lane);
        }
    }
}

#endif
