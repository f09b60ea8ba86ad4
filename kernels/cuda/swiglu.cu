/* swiglu.cu - SwiGLU by itself, for training: inference has it in gn_linear's epilogue. Twin:
 * cpu/swiglu.c. Bound by memory: each value is read once and written once. */
#include "rows.cuh"

enum { THREADS = 256 };

struct swiglu {
    struct rows a, b;        /* y; or dgate, dup */
    struct rows dy;          /* backward */
    struct rows gate, up;    /* which a and b may be */
    int64_t per_row, pieces; /* of N columns: of a row, and of all rows */
};

/* Where this thread works; false: nowhere. */
template <int N>
static __device__ __forceinline__ bool find(const struct swiglu &o, int64_t *row, int64_t *col) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    *row = i / o.per_row;
    *col = i % o.per_row * N;
    return i < o.pieces;
}

static __device__ __forceinline__ float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

template <int N>
static __global__ void __launch_bounds__(THREADS) swiglu_kernel(const struct swiglu o) {
    int64_t row, col;
    float gate[N], up[N];
    pdl_trigger();
    pdl_wait();
    if (!find<N>(o, &row, &col)) return;
    load<N>(gate, o.gate, row, col);
    load<N>(up, o.up, row, col);
#pragma unroll
    for (int i = 0; i < N; i++) gate[i] *= sigmoid(gate[i]) * up[i];
    store<N>(o.a, row, col, gate);
}

/* silu(g) = g s with s = sigmoid(g), so silu'(g) = s (1 + g (1 - s)). */
template <int N>
static __global__ void __launch_bounds__(THREADS) swiglu_bwd_kernel(const struct swiglu o) {
    int64_t row, col;
    float gate[N], up[N], dy[N];
    pdl_trigger();
    pdl_wait();
    if (!find<N>(o, &row, &col)) return;
    load<N>(gate, o.gate, row, col);
    load<N>(up, o.up, row, col);
    load<N>(dy, o.dy, row, col);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float g = gate[i], s = sigmoid(g);
        gate[i] = dy[i] * up[i] * (s * (1.0f + g * (1.0f - s)));
        up[i] = dy[i] * (g * s);
    }
    store<N>(o.a, row, col, gate);
    store<N>(o.b, row, col, up);
}

static gn_status run(gn_ctx *ctx, void (*vector_kernel)(struct swiglu),
                     void (*plain_kernel)(struct swiglu), struct swiglu o, bool vectors, int64_t T,
                     int64_t C) {
    o.per_row = C / (vectors ? ROW_VECTOR : 1);
    o.pieces = T * o.per_row;
    return launch(ctx, vectors ? vector_kernel : plain_kernel,
                  dim3((unsigned)((o.pieces + THREADS - 1) / THREADS)), dim3(THREADS), 0, o);
}

gn_status gn_cuda_swiglu(gn_ctx *ctx, gn_tensor *y, const gn_tensor *gate, const gn_tensor *up) {
    const int64_t C = y->shape[1];
    struct swiglu o = {};
    o.a = rows_of(y);
    o.gate = rows_of(gate);
    o.up = rows_of(up);
    return run(ctx, swiglu_kernel<ROW_VECTOR>, swiglu_kernel<1>, o,
               in_vectors(o.a, C) && in_vectors(o.gate, C) && in_vectors(o.up, C), y->shape[0], C);
}

gn_status gn_cuda_swiglu_bwd(gn_ctx *ctx, gn_tensor *dgate, gn_tensor *dup, const gn_tensor *dy,
                             const gn_tensor *gate, const gn_tensor *up) {
    const int64_t C = dy->shape[1];
    struct swiglu o = {};
    o.a = rows_of(dgate);
    o.b = rows_of(dup);
    o.dy = rows_of(dy);
    o.gate = rows_of(gate);
    o.up = rows_of(up);
    const bool vectors = in_vectors(o.a, C) && in_vectors(o.b, C) && in_vectors(o.dy, C) &&
                         in_vectors(o.gate, C) && in_vectors(o.up, C);
    return run(ctx, swiglu_bwd_kernel<ROW_VECTOR>, swiglu_bwd_kernel<1>, o, vectors, dy->shape[0],
               C);
}
