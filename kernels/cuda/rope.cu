/* rope.cu - rotary positions, the keys' and values' way into the paged cache, and the way back.
 * Twin: cpu/rope.c.
 *
 * For inference one launch rotates q in place, and k on its way into the cache beside v. A thread
 * takes some dimensions of a head and those that they are paired with, half a head further: 16
 * bytes of each where alignment allows, else one element. With an F8 cache, whose rows have a
 * scale, a warp takes a head. Bound by memory, and for a few rows by the launch. */
#include "f8.cuh"
#include "rows.cuh"

enum { THREADS = 256 };

/* ---- the angles ---- */

static __global__ void __launch_bounds__(THREADS)
    table_kernel(float *cosines, int64_t cos_ld, float *sines, int64_t sin_ld,
                 const float *inv_freq, int rows, int half, const int32_t *row_pos) {
    pdl_trigger();
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    const int64_t row = at / half;
    const int j = (int)(at % half);
    float c = 0.0f, s = 0.0f;
    if (row < rows) { /* the angle is rounded to float32, as transformers does */
        const float angle = __fmul_rn((float)row_pos[row], inv_freq[j]);
        c = cosf(angle);
        s = sinf(angle);
    }
    pdl_wait(); /* for the tables' readers */
    if (row < rows) {
        cosines[row * cos_ld + j] = c;
        sines[row * sin_ld + j] = s;
    }
}

gn_status gn_cuda_rope_table(gn_ctx *ctx, gn_tensor *cos, gn_tensor *sin, const gn_tensor *inv_freq,
                             const gn_seqs *seqs) {
    (void)seqs; /* staged */
    const int64_t rows = cos->shape[0], half = cos->shape[1];
    const int64_t blocks = (rows * half + THREADS - 1) / THREADS;
    return launch(ctx, table_kernel, dim3((unsigned)blocks), dim3(THREADS), 0, (float *)cos->data,
                  cos->ld, (float *)sin->data, sin->ld, (const float *)inv_freq->data, (int)rows,
                  (int)half, ctx->cuda->batch.row_pos);
}

/* ---- rotation ---- */

/* Device pointers; steps in elements. */
typedef struct rope_args {
    void *q, *k_cache, *v_cache;
    float *k_scales, *v_scales;
    const void *k, *v;
    const float *cosines, *sines;
    int64_t q_ld, k_ld, v_ld, cos_ld, sin_ld; /* of a row */
    int64_t k_block, v_block;                 /* of a cache block */
    int heads, kv_heads, half;
    int tokens; /* of a cache block */
    int max_blocks;
    gn_cuda_batch batch;
} rope_args;

/* Of a row's heads, q's first, then k's, then v's. */
typedef struct role {
    bool is_there, is_q, is_k;
    int head; /* of q, of k or of v */
} role;

static __device__ __forceinline__ role role_of(const rope_args &a, int index) {
    const int behind = index - a.heads;
    const bool is_q = behind < 0, is_k = !is_q && behind < a.kv_heads;
    return {behind < 2 * a.kv_heads, is_q, is_k,
            is_q   ? index
            : is_k ? behind
                   : behind - a.kv_heads};
}

/* Where the head's row belongs in the cache. */
typedef struct place {
    int64_t block;
    int row; /* of the block, over heads and tokens */
} place;

static __device__ __forceinline__ place place_of(const rope_args &a, int64_t row, int kv_head) {
    const int position = a.batch.row_pos[row];
    const int64_t entry = a.batch.row_seq[row] * (int64_t)a.max_blocks + position / a.tokens;
    return {a.batch.blocks[entry], kv_head * a.tokens + position % a.tokens};
}

template <typename T>
static __device__ __forceinline__ T *source_of(const rope_args &a, int64_t row, role r) {
    const int64_t at = (int64_t)r.head * 2 * a.half;
    if (r.is_q) return (T *)a.q + row * a.q_ld + at;
    return r.is_k ? (T *)a.k + row * a.k_ld + at : (T *)a.v + row * a.v_ld + at;
}

template <typename C>
static __device__ __forceinline__ C *target_of(const rope_args &a, place p, role r) {
    C *block = r.is_k ? (C *)a.k_cache + p.block * a.k_block : (C *)a.v_cache + p.block * a.v_block;
    return block + (int64_t)p.row * 2 * a.half;
}

/* Dimension j of a row's head and the one that it is paired with. */
static __device__ __forceinline__ void rotate(const rope_args &a, int64_t row, int j, float *low,
                                              float *high) {
    const float c = a.cosines[row * a.cos_ld + j], s = a.sines[row * a.sin_ld + j];
    const float x = *low, y = *high;
    *low = x * c - y * s;
    *high = y * c + x * s;
}

/* N elements that are read and written at once. */
template <typename T, int N> struct alignas(sizeof(T) * N) pack { T v[N]; };

/* Elements at `from` as float32. */
template <int N, typename T>
static __device__ __forceinline__ void read(float x[N], const T *from) {
    const pack<T, N> p = *(const pack<T, N> *)from;
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = to_float(p.v[i]);
}

template <int N, typename T> static __device__ __forceinline__ void write(T *to, const float x[N]) {
    pack<T, N> p;
#pragma unroll
    for (int i = 0; i < N; i++) p.v[i] = from_float<T>(x[i]);
    *(pack<T, N> *)to = p;
}

/* grid: rows, pieces of the row's (heads + 2 kv_heads) half / N items: those of q, k, v. */
template <typename T, typename C, int N>
static __global__ void __launch_bounds__(THREADS) rope_kernel(const rope_args a) {
    pdl_trigger();
    const int64_t row = blockIdx.x;
    const int item = blockIdx.y * THREADS + threadIdx.x, per_head = a.half / N;
    const int j = item % per_head * N;
    const role r = role_of(a, item / per_head);
    place p = {};
    if (r.is_there && !r.is_q) p = place_of(a, row, r.head);
    pdl_wait();
    if (!r.is_there) return;

    T *from = source_of<T>(a, row, r) + j;
    float x0[N], x1[N];
    read<N>(x0, from);
    read<N>(x1, from + a.half);
    if (r.is_q || r.is_k) {
#pragma unroll
        for (int i = 0; i < N; i++) rotate(a, row, j + i, &x0[i], &x1[i]);
    }
    if (r.is_q) {
        write<N>(from, x0);
        write<N>(from + a.half, x1);
    } else {
        C *to = target_of<C>(a, p, r) + j;
        write<N>(to, x0);
        write<N>(to + a.half, x1);
    }
}

enum { HEADS_ABREAST = THREADS / WARP, MAX_PAIRS = GN_MAX_HEAD_DIM / 2 / WARP };

/* The same into an F8 cache. grid: rows, pieces of the row's heads + 2 kv_heads. */
template <typename T>
static __global__ void __launch_bounds__(THREADS) rope_f8_kernel(const rope_args a) {
    pdl_trigger();
    const int64_t row = blockIdx.x;
    const int lane = threadIdx.x % WARP;
    const role r = role_of(a, blockIdx.y * HEADS_ABREAST + threadIdx.x / WARP);
    place p = {};
    if (r.is_there && !r.is_q) p = place_of(a, row, r.head);
    pdl_wait();
    if (!r.is_there) return;

    T *from = source_of<T>(a, row, r);
    float x0[MAX_PAIRS], x1[MAX_PAIRS], top = 0.0f;
#pragma unroll
    for (int i = 0; i < MAX_PAIRS; i++) {
        const int j = lane + i * WARP;
        if (j >= a.half) break;
        x0[i] = to_float(from[j]);
        x1[i] = to_float(from[j + a.half]);
        if (r.is_q || r.is_k) rotate(a, row, j, &x0[i], &x1[i]);
        top = fmaxf(top, fmaxf(fabsf(x0[i]), fabsf(x1[i])));
    }
    top = warp_max(top);
    const bool is_zero = top < GN_KV_LEAST;
    const float over_scale = is_zero ? 0.0f : GN_F8_MAX / top;
    f8 *to = r.is_q ? NULL : target_of<f8>(a, p, r);
#pragma unroll
    for (int i = 0; i < MAX_PAIRS; i++) {
        const int j = lane + i * WARP;
        if (j >= a.half) break;
        if (r.is_q) {
            from[j] = from_float<T>(x0[i]);
            from[j + a.half] = from_float<T>(x1[i]);
        } else {
            to[j] = from_float<f8>(x0[i] * over_scale);
            to[j + a.half] = from_float<f8>(x1[i] * over_scale);
        }
    }
    if (r.is_q || lane > 0) return;
    float *scales = r.is_k ? a.k_scales : a.v_scales;
    scales[p.block * a.kv_heads * a.tokens + p.row] = is_zero ? 0.0f : top / GN_F8_MAX;
}

static bool is_aligned(const void *p, int64_t ld, gn_dtype dtype, int64_t n) {
    return (uintptr_t)p % (n * gn_dtype_size(dtype)) == 0 && ld % n == 0;
}

/* Whether n elements may be read and written at once, everywhere. */
static bool moves_together(const rope_args *a, gn_dtype dtype, gn_dtype cache, int64_t n) {
    return a->half % n == 0 && is_aligned(a->q, a->q_ld, dtype, n) &&
           is_aligned(a->k, a->k_ld, dtype, n) && is_aligned(a->v, a->v_ld, dtype, n) &&
           is_aligned(a->k_cache, a->k_block, cache, n) &&
           is_aligned(a->v_cache, a->v_block, cache, n);
}

template <typename T, typename C, int N>
static gn_status launch_rope(gn_ctx *ctx, const rope_args *args, int64_t rows) {
    const int64_t items = ((int64_t)args->heads + 2 * args->kv_heads) * (args->half / N);
    const int64_t pieces = (items + THREADS - 1) / THREADS;
    if (pieces > 0xffff) return GN_EINVAL;
    return launch(ctx, rope_kernel<T, C, N>, dim3((unsigned)rows, (unsigned)pieces), dim3(THREADS),
                  0, *args);
}

template <typename T>
static gn_status launch_rope_f8(gn_ctx *ctx, const rope_args *args, int64_t rows) {
    const int64_t heads = (int64_t)args->heads + 2 * args->kv_heads;
    const int64_t pieces = (heads + HEADS_ABREAST - 1) / HEADS_ABREAST;
    if (pieces > 0xffff) return GN_EINVAL;
    return launch(ctx, rope_f8_kernel<T>, dim3((unsigned)rows, (unsigned)pieces), dim3(THREADS), 0,
                  *args);
}

gn_status gn_cuda_rope_store(gn_ctx *ctx, gn_tensor *q, const gn_tensor *k, const gn_tensor *v,
                             const gn_tensor *cos, const gn_tensor *sin, const gn_seqs *seqs,
                             gn_kv *kv) {
    rope_args args = {};
    args.q = q->data;
    args.k = k->data;
    args.v = v->data;
    args.k_cache = kv->k.data;
    args.v_cache = kv->v.data;
    args.k_scales = (float *)kv->k_scales.data;
    args.v_scales = (float *)kv->v_scales.data;
    args.cosines = (const float *)cos->data;
    args.sines = (const float *)sin->data;
    args.q_ld = q->ld;
    args.k_ld = k->ld;
    args.v_ld = v->ld;
    args.cos_ld = cos->ld;
    args.sin_ld = sin->ld;
    args.k_block = kv->k.ld;
    args.v_block = kv->v.ld;
    args.heads = (int)q->shape[1];
    args.kv_heads = (int)k->shape[1];
    args.half = (int)(q->shape[2] / 2);
    args.tokens = (int)kv->k.shape[2];
    args.max_blocks = seqs->max_blocks;
    args.batch = ctx->cuda->batch;

    const int64_t rows = q->shape[0];
    const gn_dtype dtype = q->dtype, cache = kv->k.dtype;
    if (dtype == GN_BF16 && cache == GN_BF16 && moves_together(&args, dtype, cache, 8))
        return launch_rope<bf16, bf16, 8>(ctx, &args, rows);
    GN_FOR_FLOAT(dtype, {
        if (cache == GN_F8) return launch_rope_f8<T>(ctx, &args, rows);
        return cache == GN_F32 ? launch_rope<T, float, 1>(ctx, &args, rows)
                               : launch_rope<T, bf16, 1>(ctx, &args, rows);
    });
    return GN_OK;
}

/* ---- training ---- */

struct turn {
    struct rows x; /* (T, heads, 2 half) */
    const float *cosines, *sines;
    int64_t cos_ld, sin_ld, items; /* N dimensions and their pairs each */
    int heads, half;
    float sign; /* -1: back */
};

template <int N>
static __global__ void __launch_bounds__(THREADS) turn_kernel(const struct turn o) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    const int per_head = o.half / N, per_row = o.heads * per_head;
    const int64_t row = i / per_row;
    const int item = (int)(i % per_row), j = item % per_head * N;
    const int64_t col = (int64_t)(item / per_head) * 2 * o.half + j;
    pdl_trigger();
    pdl_wait();
    if (i >= o.items) return;
    float low[N], high[N];
    load<N>(low, o.x, row, col);
    load<N>(high, o.x, row, col + o.half);
#pragma unroll
    for (int k = 0; k < N; k++) {
        const float c = o.cosines[row * o.cos_ld + j + k];
        const float s = o.sign * o.sines[row * o.sin_ld + j + k];
        const float a = low[k], b = high[k];
        low[k] = a * c - b * s;
        high[k] = b * c + a * s;
    }
    store<N>(o.x, row, col, low);
    store<N>(o.x, row, col + o.half, high);
}

static gn_status turn(gn_ctx *ctx, const gn_tensor *x, const gn_tensor *cos, const gn_tensor *sin,
                      float sign) {
    struct turn o = {};
    o.x = rows_of(x);
    o.cosines = (const float *)cos->data;
    o.sines = (const float *)sin->data;
    o.cos_ld = cos->ld;
    o.sin_ld = sin->ld;
    o.heads = (int)x->shape[1];
    o.half = (int)(x->shape[2] / 2);
    o.sign = sign;
    const bool vectors = in_vectors(o.x, o.half);
    o.items = x->shape[0] * o.heads * (o.half / (vectors ? ROW_VECTOR : 1));
    return launch(ctx, vectors ? turn_kernel<ROW_VECTOR> : turn_kernel<1>,
                  dim3((unsigned)((o.items + THREADS - 1) / THREADS)), dim3(THREADS), 0, o);
}

gn_status gn_cuda_rope(gn_ctx *ctx, gn_tensor *x, const gn_tensor *cos, const gn_tensor *sin) {
    return turn(ctx, x, cos, sin, 1);
}

gn_status gn_cuda_rope_bwd(gn_ctx *ctx, gn_tensor *dx, const gn_tensor *cos, const gn_tensor *sin) {
    return turn(ctx, dx, cos, sin, -1);
}
