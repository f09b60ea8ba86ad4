/* attention_train.cu - causal attention within the sequences of a batch, forward and backward.
 * Twin: cpu/attention_train.c, whose head has the formulas.
 *
 * In bfloat16 both are flash attention on the matrix units. Forward is that of
 * attention_tiles.cuh. Backward recomputes the weights P from the scores and lse.
 *
 * A unit of it is 128 keys of a sequence under one kv head, or 64 where a chip has little shared
 * memory; a block keeps their dK and dV in registers and passes over the queries that see them, 64
 * at a time, for every head of the group. P and dS go through shared memory, which turns them. So
 * scores are computed once and there are five products, where a pass of its own for dQ would take
 * seven.
 *
 * dQ of 64 queries is a sum over units, in float32 in global memory and in a fixed order: from the
 * diagonal down to the first keys. A counter of each such tile says how many have added theirs. As
 * every unit begins at its diagonal, units that start together reach a tile in that order, and
 * hardly ever wait. Blocks take units from a ticket, a sequence's last keys first, so that those a
 * block may wait for are never behind it. The last one to add writes dQ.
 *
 * Exact, for float32 and every shape that those do not take: a warp per query, and per key for dK
 * and dV, in float32. A row's result depends on its sequence alone. */
#include "attention_tiles.cuh"

#include <limits.h>

enum { OWN_DIMS = GN_MAX_HEAD_DIM / WARP, EXACT_THREADS = 128, EXACT_WARPS = EXACT_THREADS / WARP };

/* What the kernels are told. Working memory: stats (heads, T), a query's lse and delta, the sum of
 * dy y; arrived (heads, T), of the tile of queries that begins at this row, how many units have
 * added to its dq; ticket, the next unit; sums (T, heads, D), dq so far. */
typedef struct train_args {
    gn_tensor q, k, v, y, lse, dy, dq, dk, dv;
    int rows, heads, kv_heads, D, n_seqs;
    gn_cuda_batch batch;
    float scale;
    float *sums;
    float2 *stats;
    uint32_t *arrived, *ticket;
} train_args;

/* The first of a head's values in a row. */
template <typename T>
static __device__ __forceinline__ T *head_row(const gn_tensor &t, int64_t row, int head) {
    return (T *)t.data + row * t.ld + head * t.shape[2];
}

/* ---- exact ---- */

/* A lane's values of a head's row: lane, lane + 32, ... */
typedef struct {
    float v[OWN_DIMS];
} own_dims;

static __device__ own_dims load_own(const gn_tensor &t, int64_t row, int head) {
    own_dims x = {};
#pragma unroll
    for (int i = 0; i < OWN_DIMS; i++) {
        const int d = threadIdx.x % WARP + i * WARP;
        if (d < t.shape[2])
            x.v[i] = t.dtype == GN_F32 ? head_row<float>(t, row, head)[d]
                                       : to_float(head_row<bf16>(t, row, head)[d]);
    }
    return x;
}

static __device__ void store_own(const gn_tensor &t, int64_t row, int head, const own_dims &x,
                                 float scale) {
#pragma unroll
    for (int i = 0; i < OWN_DIMS; i++) {
        const int d = threadIdx.x % WARP + i * WARP;
        if (d >= t.shape[2]) break;
        if (t.dtype == GN_F32)
            head_row<float>(t, row, head)[d] = x.v[i] * scale;
        else
            head_row<bf16>(t, row, head)[d] = from_float<bf16>(x.v[i] * scale);
    }
}

static __device__ float dot_own(const own_dims &a, const own_dims &b) {
    float sum = 0.0f;
    for (int i = 0; i < OWN_DIMS; i++) sum += a.v[i] * b.v[i];
    return warp_sum(sum);
}

static __device__ void add_own(own_dims &to, const own_dims &x, float by) {
    for (int i = 0; i < OWN_DIMS; i++) to.v[i] += by * x.v[i];
}

/* The row and head of this warp, of `heads`; false past the last. */
static __device__ bool find_own(const train_args &a, int heads, int *row, int *head) {
    const int64_t unit = (int64_t)blockIdx.x * EXACT_WARPS + threadIdx.x / WARP;
    *row = (int)(unit / heads);
    *head = (int)(unit % heads);
    return *row < a.rows;
}

static __global__ void __launch_bounds__(EXACT_THREADS) exact_kernel(const train_args a) {
    int row, head;
    pdl_trigger();
    pdl_wait();
    if (!find_own(a, a.heads, &row, &head)) return;
    const int kv_head = head / (a.heads / a.kv_heads);
    const own_dims q = load_own(a.q, row, head);
    own_dims out = {};
    float top = -INFINITY, sum = 0.0f;
    for (int p = a.batch.row0[a.batch.row_seq[row]]; p <= row; p++) {
        const float score = dot_own(q, load_own(a.k, p, kv_head)) * a.scale;
        const float new_top = fmaxf(top, score), shrink = expf(top - new_top);
        const float weight = expf(score - new_top);
        sum = sum * shrink + weight;
        for (int i = 0; i < OWN_DIMS; i++) out.v[i] *= shrink;
        add_own(out, load_own(a.v, p, kv_head), weight);
        top = new_top;
    }
    store_own(a.y, row, head, out, 1.0f / sum);
    if (threadIdx.x % WARP == 0) ((float *)a.lse.data)[row * a.lse.ld + head] = top + logf(sum);
}

static __global__ void __launch_bounds__(EXACT_THREADS) exact_queries_kernel(const train_args a) {
    int row, head;
    pdl_trigger();
    pdl_wait();
    if (!find_own(a, a.heads, &row, &head)) return;
    const int kv_head = head / (a.heads / a.kv_heads);
    const own_dims q = load_own(a.q, row, head), dy = load_own(a.dy, row, head);
    const float delta = dot_own(dy, load_own(a.y, row, head));
    const float lse = ((const float *)a.lse.data)[row * a.lse.ld + head];
    own_dims dq = {};
    for (int p = a.batch.row0[a.batch.row_seq[row]]; p <= row; p++) {
        const own_dims k = load_own(a.k, p, kv_head);
        const float weight = expf(dot_own(q, k) * a.scale - lse);
        add_own(dq, k, weight * (dot_own(dy, load_own(a.v, p, kv_head)) - delta));
    }
    store_own(a.dq, row, head, dq, a.scale);
    if (threadIdx.x % WARP == 0) a.stats[head * (int64_t)a.rows + row] = make_float2(lse, delta);
}

static __global__ void __launch_bounds__(EXACT_THREADS) exact_keys_kernel(const train_args a) {
    int row, kv_head;
    pdl_trigger();
    pdl_wait();
    if (!find_own(a, a.kv_heads, &row, &kv_head)) return;
    const int group = a.heads / a.kv_heads, end = a.batch.row0[a.batch.row_seq[row] + 1];
    const own_dims k = load_own(a.k, row, kv_head), v = load_own(a.v, row, kv_head);
    own_dims dk = {}, dv = {};
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int p = row; p < end; p++) {
            const own_dims q = load_own(a.q, p, head), dy = load_own(a.dy, p, head);
            const float2 stat = a.stats[head * (int64_t)a.rows + p];
            const float weight = expf(dot_own(q, k) * a.scale - stat.x);
            add_own(dv, dy, weight);
            add_own(dk, q, weight * (dot_own(dy, v) - stat.y));
        }
    store_own(a.dk, row, kv_head, dk, a.scale);
    store_own(a.dv, row, kv_head, dv, 1.0f);
}

static gn_status launch_exact(gn_ctx *ctx, void (*kernel)(train_args), const train_args *args,
                              int heads) {
    const int64_t blocks = ((int64_t)args->rows * heads + EXACT_WARPS - 1) / EXACT_WARPS;
    if (blocks > INT_MAX) return GN_EINVAL;
    return launch(ctx, kernel, dim3((unsigned)blocks), dim3(EXACT_THREADS), 0, *args);
}

/* ---- forward ---- */

enum { TALL = 2 };

/* grid: heads, tiles. */
template <int D>
static __global__ void __launch_bounds__(THREADS, 2) forward_kernel(const train_args a) {
    extern __shared__ __align__(128) char memory[];
    pdl_trigger();
    /* A sequence's last rows have most to do: they go first. */
    const tile_of_seq tile =
        find_tile(a.batch.row0, a.n_seqs, gridDim.y - 1 - blockIdx.y, 1, INT_MAX, 1, ROWS<TALL>);
    pdl_wait();
    if (tile.seq < 0) return;
    const int head = blockIdx.x, kv_head = head / (a.heads / a.kv_heads);
    const int first_row = a.batch.row0[tile.seq], row0 = first_row + tile.first;
    const int n_rows = min(ROWS<TALL>, tile.rows - tile.first), end = tile.first + n_rows;
    const uint32_t at = shared_address(memory);
    const bf16 *k = head_row<bf16>(a.k, first_row, kv_head);
    const bf16 *v = head_row<bf16>(a.v, first_row, kv_head);
    copy_rows<D, ROWS<TALL>, THREADS>(at, head_row<bf16>(a.q, row0, head), a.q.ld, n_rows);
    attended<D, TALL> mine = {};
    attend(mine, at, tile.first, (end + KEYS - 1) / KEYS, a.scale * LOG2_E,
           [&](uint32_t keys, uint32_t values, int j) {
               const int p0 = j * KEYS;
               copy_rows<D, KEYS, THREADS>(keys, k + p0 * a.k.ld, a.k.ld, end - p0);
               copy_rows<D, KEYS, THREADS>(values, v + p0 * a.v.ld, a.v.ld, end - p0);
           });
    store_attended(head_row<bf16>(a.y, row0, head), a.y.ld, n_rows, mine, memory);
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int x = 0; x < 2 * TALL; x++) {
        const int row = threadIdx.x / WARP * 16 * TALL + 8 * x + lane / 4;
        if (lane % 4 == 0 && row < n_rows)
            ((float *)a.lse.data)[(row0 + row) * a.lse.ld + head] =
                mine.top[x / 2][x % 2] * a.scale + logf(mine.sum[x / 2][x % 2]);
    }
}

template <int D> static gn_status launch_forward(gn_ctx *ctx, const train_args *args) {
    const int64_t tiles = max_tiles(args->rows, args->n_seqs, 1, ROWS<TALL>);
    if (tiles > 0xffff) return GN_EINVAL;
    const gn_status status = gn_cuda_status(cudaFuncSetAttribute(
        forward_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED<D, TALL>));
    return status ? status
                  : launch(ctx, forward_kernel<D>, dim3((unsigned)args->heads, (unsigned)tiles),
                           dim3(THREADS), SHARED<D, TALL>, *args);
}

/* ---- backward ---- */

enum {
    STATS_THREADS = 256,
    STATS_LANES = 16, /* of a query: 8 values each */
    MANY_KEYS = 128,  /* of a unit */
    FEW_KEYS = 64,
    BWD_ROWS = 64, /* of a tile of queries */
};

/* N: keys of a unit. Warps stand in two rows of N / 32. */
template <int N> constexpr int COLUMNS = N / 32;
template <int N> constexpr int BWD_THREADS = 2 * COLUMNS<N> *WARP;
/* Tiles of queries and of dy: one pair is multiplied, another one may be under way. */
template <int N> constexpr int STAGES = N / FEW_KEYS;

/* Of the 16-column pieces of a row: a warp's, where two share them, and where a row of warps does.
 */
template <int D> constexpr int HALF = (D / 16 + 1) / 2;
template <int D, int N> constexpr int PART = (D / 16 + COLUMNS<N> - 1) / COLUMNS<N>;

/* Tiles of keys and of values, then of queries and of dy, then of P and of dS. */
template <int D, int N>
constexpr int BWD_SHARED = (2 * N + 2 * STAGES<N> * BWD_ROWS) * STEP<D> + 2 * BWD_ROWS *STEP<N>;

/* stats of every query; nobody has arrived yet. */
static __global__ void __launch_bounds__(STATS_THREADS) stats_kernel(const train_args a) {
    pdl_trigger();
    const int64_t thread = (int64_t)blockIdx.x * STATS_THREADS + threadIdx.x;
    const int64_t query = thread / STATS_LANES, row = query / a.heads;
    const int head = (int)(query % a.heads), d = (int)(thread % STATS_LANES) * 8;
    float sum = 0.0f;
    pdl_wait();
    if (row < a.rows && d < a.D) {
        const uint4 y = *(const uint4 *)(head_row<bf16>(a.y, row, head) + d);
        const uint4 dy = *(const uint4 *)(head_row<bf16>(a.dy, row, head) + d);
        const bf16 *values = (const bf16 *)&y, *slopes = (const bf16 *)&dy;
#pragma unroll
        for (int i = 0; i < 8; i++) sum += to_float(values[i]) * to_float(slopes[i]);
    }
#pragma unroll
    for (int by = STATS_LANES / 2; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
    if (thread == 0) *a.ticket = 0;
    if (row >= a.rows || d > 0) return;
    const float lse = ((const float *)a.lse.data)[row * a.lse.ld + head];
    a.stats[head * (int64_t)a.rows + row] = make_float2(lse * LOG2_E, sum);
    a.arrived[head * (int64_t)a.rows + row] = 0;
}

/* 32 rows by 32 keys of P or dS from registers to their tile. */
template <int N>
static __device__ __forceinline__ void store_patch(char *tile, const float v[2][4][4], int row0,
                                                   int key0) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int x = 0; x < 16; x++) {
        const int m = x / 8, n = x / 2 % 4, half = x % 2;
        *(uint32_t *)(tile + chunk_at<N>(row0 + 16 * m + 8 * half + lane / 4, key0 / 8 + n) +
                      lane % 4 * 4) = pack_bf16(v[m][n][2 * half], v[m][n][2 * half + 1]);
    }
}

/* c += a^T b: the 32 keys from key0 on of P or dS, over the tile's queries. */
template <int D, int N>
static __device__ __forceinline__ void multiply_by_key(float c[2][2 * HALF<D>][4], uint32_t a_tile,
                                                       int key0, uint32_t b_rows, int first) {
    const int lane = threadIdx.x % WARP, row = lane / 16 * 8 + lane % 8, chunk = lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < BWD_ROWS / 16; k++) {
        uint32_t a[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++)
            load_turned_matrices(a[m],
                                 a_tile + chunk_at<N>(16 * k + row, key0 / 8 + 2 * m + chunk));
        multiply<D, 2, HALF<D>>(c, a, b_rows + 16 * k * STEP<D>, first);
    }
}

/* 32 rows by 16 HALF columns of a tile from registers to n rows of memory, by way of that part of a
 * tile in shared memory, for whole chunks at once. */
template <int D>
static __device__ __forceinline__ void store_sums(bf16 *to, int64_t ld, int n, char *tile,
                                                  const float v[2][2 * HALF<D>][4], int row0,
                                                  int first, float scale) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int x = 0; x < 2 * 2 * HALF<D> * 2; x++) {
        const int m = x / (4 * HALF<D>), d = x / 2 % (2 * HALF<D>), half = x % 2;
        if (D % 64 != 0 && 2 * first + d >= CHUNKS<D>) continue;
        *(uint32_t *)(tile + chunk_at<D>(row0 + 16 * m + 8 * half + lane / 4, 2 * first + d) +
                      lane % 4 * 4) =
            pack_bf16(v[m][d][2 * half] * scale, v[m][d][2 * half + 1] * scale);
    }
    __syncwarp();
    for (int at = lane; at < 32 * 2 * HALF<D>; at += WARP) {
        const int row = row0 + at / (2 * HALF<D>), chunk = 2 * first + at % (2 * HALF<D>);
        if (row < n && chunk < CHUNKS<D>)
            *(uint4 *)(to + row * ld + chunk * 8) =
                *(const uint4 *)(tile + chunk_at<D>(row, chunk));
    }
}

/* A tile's dq, complete but for these last terms or not: where it is summed, or in its place. */
template <int D, int N>
static __device__ __forceinline__ void
store_queries(const train_args &a, const float v[2][2 * PART<D, N>][4], int64_t row0, int n,
              int head, int first, bool is_complete) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int x = 0; x < 2 * 2 * PART<D, N> * 2; x++) {
        const int m = x / (4 * PART<D, N>), i = x / 2 % (2 * PART<D, N>), half = x % 2;
        const int row = 16 * m + 8 * half + lane / 4, d = 16 * first + 8 * i + lane % 4 * 2;
        if (row >= n || (D % 64 != 0 && d >= D)) continue;
        const float2 pair = make_float2(v[m][i][2 * half], v[m][i][2 * half + 1]);
        if (is_complete)
            *(uint32_t *)(head_row<bf16>(a.dq, row0 + row, head) + d) =
                pack_bf16(pair.x * a.scale, pair.y * a.scale);
        else
            __stcg((float2 *)(a.sums + ((row0 + row) * a.heads + head) * D + d), pair);
    }
}

template <int D, int N>
static __device__ __forceinline__ void load_queries(const train_args &a,
                                                    float v[2][2 * PART<D, N>][4], int64_t row0,
                                                    int n, int head, int first) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int x = 0; x < 2 * 2 * PART<D, N> * 2; x++) {
        const int m = x / (4 * PART<D, N>), i = x / 2 % (2 * PART<D, N>), half = x % 2;
        const int row = 16 * m + 8 * half + lane / 4, d = 16 * first + 8 * i + lane % 4 * 2;
        if (row >= n || (D % 64 != 0 && d >= D)) continue;
        const float2 pair =
            __ldcg((const float2 *)(a.sums + ((row0 + row) * a.heads + head) * D + d));
        v[m][i][2 * half] = pair.x;
        v[m][i][2 * half + 1] = pair.y;
    }
}

/* After a barrier: what the block has added to a tile is there for whoever sees it counted. */
static __device__ __forceinline__ void count_tile(uint32_t *arrived) {
    if (threadIdx.x != 0) return;
    __threadfence();
    atomicAdd(arrived, 1u);
}

template <int D, int N>
static __global__ void __launch_bounds__(BWD_THREADS<N>, 1) backward_kernel(const train_args a) {
    extern __shared__ __align__(128) char memory[];
    __shared__ uint32_t ticket;
    pdl_trigger();
    pdl_wait();
    if (threadIdx.x == 0) ticket = atomicAdd(a.ticket, 1u);
    __syncthreads();
    const tile_of_seq tile =
        find_tile(a.batch.row0, a.n_seqs, (int)(ticket / a.kv_heads), 1, INT_MAX, 1, N);
    if (tile.seq < 0) return;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int kv_head = (int)(ticket % a.kv_heads), group = a.heads / a.kv_heads;
    const int row0 = a.batch.row0[tile.seq], rows = tile.rows;
    const int unit = (rows - 1) / N - tile.first / N, key0 = unit * N;

    char *weights = memory + (2 * N + 2 * STAGES<N> * BWD_ROWS) * STEP<D>; /* P */
    char *slopes = weights + BWD_ROWS * STEP<N>;                           /* dS */
    const uint32_t keys = shared_address(memory), values = keys + N * STEP<D>;
    const uint32_t queries = values + N * STEP<D>, dys = queries + STAGES<N> * BWD_ROWS * STEP<D>;
    const int64_t first_key = (int64_t)row0 + key0;
    copy_rows<D, N, BWD_THREADS<N>>(keys, head_row<bf16>(a.k, first_key, kv_head), a.k.ld,
                                    rows - key0);
    copy_rows<D, N, BWD_THREADS<N>>(values, head_row<bf16>(a.v, first_key, kv_head), a.v.ld,
                                    rows - key0);

    /* Step i: one tile of queries, from the unit's own on, of one head. */
    const int n_tiles = (rows - key0 + BWD_ROWS - 1) / BWD_ROWS, n_steps = group * n_tiles;
    const auto head_of = [=](int i) { return kv_head * group + i / n_tiles; };
    const auto row_of = [=](int i) { return key0 + i % n_tiles * BWD_ROWS; };
    const auto arrived_of = [=](int i) {
        return a.arrived + head_of(i) * (int64_t)a.rows + row0 + row_of(i);
    };
    const auto copy_step = [=](int i) {
        const int64_t row = (int64_t)row0 + row_of(i);
        const int to = i % STAGES<N> * BWD_ROWS * STEP<D>, n = rows - row_of(i);
        copy_rows<D, BWD_ROWS, BWD_THREADS<N>>(queries + to, head_row<bf16>(a.q, row, head_of(i)),
                                               a.q.ld, n);
        copy_rows<D, BWD_ROWS, BWD_THREADS<N>>(dys + to, head_row<bf16>(a.dy, row, head_of(i)),
                                               a.dy.ld, n);
    };
    copy_step(0);

    /* Of P and dS a warp computes 32 rows by 32 keys; of dK and dV 32 keys by half the columns; of
     * dQ 32 rows by its part of them. */
    const int warp_row = warp / COLUMNS<N> * 32, warp_key = warp % COLUMNS<N> * 32;
    const int half = warp / COLUMNS<N> * HALF<D>, part = warp % COLUMNS<N> * PART<D, N>;
    const float scale = a.scale * LOG2_E;
    float dk[2][2 * HALF<D>][4] = {}, dv[2][2 * HALF<D>][4] = {};
    for (int i = 0; i < n_steps; i++) {
        const int head = head_of(i), row = row_of(i); /* of the sequence */
        const int now = i % STAGES<N> * BWD_ROWS * STEP<D>;
        float2 stat[4];
#pragma unroll
        for (int x = 0; x < 4; x++) {
            const int mine = row + warp_row + 8 * x + lane / 4;
            stat[x] = mine < rows ? a.stats[head * (int64_t)a.rows + row0 + mine]
                                  : make_float2(0.0f, 0.0f);
        }
        if (STAGES<N> == 1 && i > 0) {
            __syncthreads(); /* nobody reads what the last step did */
            copy_step(i);
        }
        wait_for_all_copies();
        __syncthreads(); /* everybody's are there, and nobody reads what the last step did */
        if (i > 0 && unit > 0) count_tile(arrived_of(i - 1));
        if (STAGES<N> == 2 && i + 1 < n_steps) copy_step(i + 1);

        /* Rows that are not there have zeros for q, dy and stats, so that they add nothing. */
        float weight[2][4][4] = {}, slope[2][4][4] = {};
        const int past = key0 + warp_key - (row + warp_row); /* of the first row's own key */
        if (past < 32) {
            multiply_turned<D, 2, 2>(weight, queries + now + warp_row * STEP<D>,
                                     keys + warp_key * STEP<D>);
#pragma unroll
            for (int x = 0; x < 32; x++) {
                const int m = x / 16, n = x / 4 % 4, j = x % 4;
                const bool is_seen =
                    past + 8 * n + lane % 4 * 2 + j % 2 <= 16 * m + j / 2 * 8 + lane / 4;
                const float power = weight[m][n][j] * scale - stat[2 * m + j / 2].x;
                weight[m][n][j] = is_seen ? exp2_fast(power) : 0.0f;
            }
            multiply_turned<D, 2, 2>(slope, dys + now + warp_row * STEP<D>,
                                     values + warp_key * STEP<D>);
#pragma unroll
            for (int x = 0; x < 32; x++) {
                const int m = x / 16, n = x / 4 % 4, j = x % 4;
                slope[m][n][j] = weight[m][n][j] * (slope[m][n][j] - stat[2 * m + j / 2].y);
            }
        }
        store_patch<N>(weights, weight, warp_row, warp_key);
        store_patch<N>(slopes, slope, warp_row, warp_key);

        /* Those before this unit are the ones from the queries' own keys on. */
        const int n_before = row / N - unit, n_rows = rows - row - warp_row;
        float dq[2][2 * PART<D, N>][4] = {};
        if (n_before > 0) {
            while (load_acquire(arrived_of(i)) < (uint32_t)n_before) continue;
            load_queries<D, N>(a, dq, (int64_t)row0 + row + warp_row, n_rows, head, part);
        }
        __syncthreads();
        if (key0 + warp_key < row + BWD_ROWS) {
            multiply_by_key<D, N>(dv, shared_address(weights), warp_key, dys + now, half);
            multiply_by_key<D, N>(dk, shared_address(slopes), warp_key, queries + now, half);
        }
#pragma unroll
        for (int k = 0; k < N / 16; k++) {
            if (key0 + 16 * k > row + warp_row + 31) break;
            uint32_t s[2][4];
#pragma unroll
            for (int m = 0; m < 2; m++)
                load_matrices(s[m],
                              shared_address(slopes) +
                                  chunk_at<N>(warp_row + 16 * m + lane % 16, 2 * k + lane / 16));
            multiply<D, 2, PART<D, N>>(dq, s, keys + 16 * k * STEP<D>, part);
        }
        store_queries<D, N>(a, dq, (int64_t)row0 + row + warp_row, n_rows, head, part, unit == 0);
    }
    __syncthreads();
    if (unit > 0) count_tile(arrived_of(n_steps - 1));
    char *dk_tile = memory, *dv_tile = memory + N * STEP<D>;
    store_sums<D>(head_row<bf16>(a.dk, first_key, kv_head), a.dk.ld, rows - key0, dk_tile, dk,
                  warp_key, half, a.scale);
    store_sums<D>(head_row<bf16>(a.dv, first_key, kv_head), a.dv.ld, rows - key0, dv_tile, dv,
                  warp_key, half, 1.0f);
}

template <int D, int N> static gn_status launch_units(gn_ctx *ctx, const train_args *args) {
    const int64_t queries = (int64_t)args->rows * args->heads;
    const int64_t units = max_tiles(args->rows, args->n_seqs, 1, N) * args->kv_heads;
    const int64_t blocks = (queries * STATS_LANES + STATS_THREADS - 1) / STATS_THREADS;
    if (units > INT_MAX || blocks > INT_MAX) return GN_EINVAL;
    gn_status status = gn_cuda_status(cudaFuncSetAttribute(
        backward_kernel<D, N>, cudaFuncAttributeMaxDynamicSharedMemorySize, BWD_SHARED<D, N>));
    if (!status)
        status = launch(ctx, stats_kernel, dim3((unsigned)blocks), dim3(STATS_THREADS), 0, *args);
    return status ? status
                  : launch(ctx, backward_kernel<D, N>, dim3((unsigned)units), dim3(BWD_THREADS<N>),
                           BWD_SHARED<D, N>, *args);
}

template <int D> static gn_status launch_backward(gn_ctx *ctx, const train_args *args) {
    const bool has_room = BWD_SHARED<D, MANY_KEYS> < ctx->cuda->shared_limit;
    return has_room ? launch_units<D, MANY_KEYS>(ctx, args) : launch_units<D, FEW_KEYS>(ctx, args);
}

/* ---- which way ---- */

static bool is_fast_shape(const gn_ctx *ctx, int64_t D) {
    return gn_ctx_activation(ctx) == GN_BF16 && (D == 64 || D == 80 || D == 96 || D == 128);
}

static bool is_fast_tensor(const gn_tensor *t) {
    return t->dtype == GN_BF16 && (uintptr_t)t->data % 16 == 0 && t->ld % 8 == 0;
}

static train_args args_of(const gn_ctx *ctx, const gn_attention_rows *rows) {
    train_args args = {};
    args.q = rows->q;
    args.k = rows->k;
    args.v = rows->v;
    args.y = rows->y;
    args.lse = rows->lse;
    args.rows = (int)rows->q.shape[0];
    args.heads = (int)rows->q.shape[1];
    args.kv_heads = (int)rows->k.shape[1];
    args.D = (int)rows->q.shape[2];
    args.n_seqs = rows->seqs->n;
    args.batch = ctx->cuda->batch;
    args.scale = (float)(1.0 / sqrt((double)args.D));
    return args;
}

gn_status gn_cuda_attention_train(gn_ctx *ctx, const gn_attention_rows *rows) {
    const train_args args = args_of(ctx, rows);
    const bool is_fast = is_fast_shape(ctx, args.D) && is_fast_tensor(&rows->q) &&
                         is_fast_tensor(&rows->k) && is_fast_tensor(&rows->v) &&
                         is_fast_tensor(&rows->y);
    if (!is_fast) return launch_exact(ctx, exact_kernel, &args, args.heads);
    switch (args.D) {
    case 64: return launch_forward<64>(ctx, &args);
    case 80: return launch_forward<80>(ctx, &args);
    case 96: return launch_forward<96>(ctx, &args);
    default: return launch_forward<128>(ctx, &args);
    }
}

/* Floats of `sums`; none where no sequence has a second unit. */
static size_t sums_of(const gn_ctx *ctx, int64_t rows, int64_t heads, int64_t D, int64_t context) {
    return is_fast_shape(ctx, D) && context > FEW_KEYS ? (size_t)(rows * heads * D) : 0;
}

size_t gn_cuda_attention_train_workspace(const gn_ctx *ctx, int64_t rows, int64_t heads,
                                         int64_t head_dim, int64_t context) {
    return sums_of(ctx, rows, heads, head_dim, context) * sizeof(float) +
           (size_t)(rows * heads) * (sizeof(float2) + sizeof(uint32_t)) + sizeof(uint32_t);
}

gn_status gn_cuda_attention_bwd(gn_ctx *ctx, gn_tensor *dq, gn_tensor *dk, gn_tensor *dv,
                                const gn_tensor *dy, const gn_attention_rows *rows) {
    train_args args = args_of(ctx, rows);
    args.dy = *dy;
    args.dq = *dq;
    args.dk = *dk;
    args.dv = *dv;
    int64_t context = 0;
    for (int32_t i = 0; i < args.n_seqs; i++) {
        const int64_t n = rows->seqs->row0[i + 1] - rows->seqs->row0[i];
        if (n > context) context = n;
    }
    if (gn_cuda_attention_train_workspace(ctx, args.rows, args.heads, args.D, context) >
        ctx->workspace_bytes)
        return GN_ENOMEM;
    args.stats = (float2 *)ctx->workspace;
    args.sums = (float *)(args.stats + (int64_t)args.rows * args.heads);
    args.arrived = (uint32_t *)(args.sums + sums_of(ctx, args.rows, args.heads, args.D, context));
    args.ticket = args.arrived + (int64_t)args.rows * args.heads;

    const gn_tensor *all[] = {&args.q,  &args.k,  &args.v,  &args.y,
                              &args.dy, &args.dq, &args.dk, &args.dv};
    bool is_fast = is_fast_shape(ctx, args.D);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) is_fast &= is_fast_tensor(all[i]);
    if (!is_fast) {
        const gn_status status = launch_exact(ctx, exact_queries_kernel, &args, args.heads);
        return status ? status : launch_exact(ctx, exact_keys_kernel, &args, args.kv_heads);
    }
    switch (args.D) {
    case 64: return launch_backward<64>(ctx, &args);
    case 80: return launch_backward<80>(ctx, &args);
    case 96: return launch_backward<96>(ctx, &args);
    default: return launch_backward<128>(ctx, &args);
    }
}
