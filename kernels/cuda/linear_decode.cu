/* linear_decode.cu - products of 1 to 16 rows of x with 4-bit weights in tiles: a step of decoding.
 *
 * Bound by reading the weights once, so everything is made to keep loads in flight:
 *   - One block an SM. It owns whole groups of 16 weight rows (32 with more than 8 rows of x; half
 *     of them gate's and half up's for SWIGLU), so that no sum crosses blocks. For large x blocks
 *     form clusters that share groups, each with a slice of K: less of x a block, finer dealing.
 *   - A unit is a group by 64 columns. Each warp takes a run of consecutive units, equally many:
 *     few warps meet in a group, and their sums meet in shared memory, in a fixed order, once.
 *   - Before it waits for its predecessor (pdl_wait) a block has its first weights in registers,
 *     the next ones on their way into L2, scales decoded and the table below filled.
 *   - Weights are the mma's A operand (16 rows), tokens its B operand (8 columns; the unused ones
 *     are zero and cost nothing). A packed byte becomes two bf16 codes by one lookup in a table of
 *     256 pairs, of which every lane has a copy in its own bank. Entries are 256 bytes apart: the
 *     address is then (byte << 8 | 4 * lane), which one byte permutation makes. A block's scale
 *     multiplies its float32 sums. The entries' upper halves hold the scales.
 *   - RMSNorm's factor, one number a row of x, is applied to the sums: x is read only once.
 * What then limits it is shared memory: of the ~31 cycles that 512 bytes take an SM of an H200 at
 * full bandwidth, lookups take 16, weights passing through 4, x 2 (1 row) to 8, scales 1.
 *
 * LoRA's terms are the work of HELPERS warps a block beside the others: they compute u = A x,
 * spread over all blocks, then wait for all of u and add B u for the rows of their block. */
#include "linear.h"
#include "linear_decode_lora.cuh"
#include "linear_decode_weights.cuh"

/* ---- before the wait ---- */

/* The table, and what decodes scales. Lanes' copies are written 16 bytes at a time, turned by the
 * entry so that writes of a warp spread over the banks. */
static __device__ void fill_tables(const struct product &p, const struct work &w) {
    const struct matrix &first = p.part[w.part].m[0];
    const int entry = (int)threadIdx.x / 2, half = (int)threadIdx.x % 2;
    const uint32_t pair = pack_bf16(__ldg(first.code + entry / 16), __ldg(first.code + entry % 16));
    for (int i = 0; i < 4; i++)
        *(uint4 *)(shared + entry * ENTRY_BYTES + half * 64 + (i + entry) % 4 * 16) =
            make_uint4(pair, pair, pair, pair);
    const int m = (int)threadIdx.x / 256, i = (int)threadIdx.x % 256;
    const float *nested_code = p.part[w.part].m[m].nested_code;
    if (nested_code) ((float *)(shared + p.nested))[m * 256 + i] = __ldg(nested_code + i);
    if (threadIdx.x < MAX_TOKENS * WARPS) ((float *)(shared + p.squares))[threadIdx.x] = 0.0f;
    if (p.norm && (int)threadIdx.x * WARP < w.ks * GN_BLOCK)
        prefetch_line(p.norm + w.k0 * GN_BLOCK + threadIdx.x * WARP);
}

/* ---- x ---- */

/* An item of x is 256 columns of a row, 8 a lane. Where a lane's are, if it has any. */
struct item {
    int t, col;
    bool exists;
};

static __device__ __forceinline__ struct item item_of(const struct product &p, const struct work &w,
                                                      int i, int lane) {
    const int columns = w.ks * GN_BLOCK, chunks = (columns + 255) / 256;
    const int t = i / chunks, col = (i - t * chunks) * 256 + lane * 8;
    return {t, col, t < p.T && col < columns};
}

static __device__ __forceinline__ uint4 *staged(const struct product &p, struct item item) {
    return (uint4 *)(shared + p.x_at + item.t * p.pitch + item.col * 2);
}

/* This block's columns of a bf16 x to shared memory. */
static __device__ __forceinline__ void copy_x(const struct product &p, const struct work &w, int n,
                                              int warp, int lane) {
    enum { AT_ONCE = 3 };
    const bf16 *x = (const bf16 *)p.x + w.k0 * GN_BLOCK;
#pragma unroll 1
    for (int i0 = warp; i0 < n; i0 += AT_ONCE * WARPS) {
        uint4 v[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const struct item item = item_of(p, w, i0 + j * WARPS, lane);
            if (item.exists) v[j] = load_fresh16(x + item.t * p.x_ld + item.col);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const struct item item = item_of(p, w, i0 + j * WARPS, lane);
            if (item.exists) *staged(p, item) = v[j];
        }
    }
}

static __device__ __forceinline__ float4 scaled(uint4 x, float4 weight, float *squares) {
    const float4 v = make_float4(__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z),
                                 __uint_as_float(x.w));
    *squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    return make_float4(v.x * weight.x, v.y * weight.y, v.z * weight.z, v.w * weight.w);
}

/* The same of a float32 x, times the norm's weights, and each warp's sums of squares. */
static __device__ __forceinline__ void scale_x(const struct product &p, const struct work &w, int n,
                                               int warp, int lane) {
    const float *x = (const float *)p.x + w.k0 * GN_BLOCK;
    float *all = (float *)(shared + p.squares);
#pragma unroll 1
    for (int i = warp; i < n; i += WARPS) {
        const struct item item = item_of(p, w, i, lane);
        float squares = 0.0f;
        if (item.exists) {
            const float *at = x + item.t * p.x_ld + item.col;
            const uint4 x0 = load_fresh16(at), x1 = load_fresh16(at + 4);
            float4 w0 = make_float4(1.0f, 1.0f, 1.0f, 1.0f), w1 = w0;
            if (p.norm) {
                const float4 *weights = (const float4 *)(p.norm + w.k0 * GN_BLOCK + item.col);
                w0 = __ldg(weights);
                w1 = __ldg(weights + 1);
            }
            const float4 y0 = scaled(x0, w0, &squares), y1 = scaled(x1, w1, &squares);
            *staged(p, item) = make_uint4(pack_bf16(y0.x, y0.y), pack_bf16(y0.z, y0.w),
                                          pack_bf16(y1.x, y1.y), pack_bf16(y1.z, y1.w));
        }
        squares = warp_sum(squares);
        if (lane == 0) all[item.t * WARPS + warp] += squares;
    }
}

static __device__ __forceinline__ void stage_x(const struct product &p, const struct work &w,
                                               int warp, int lane) {
    const int items = p.T * ((w.ks * GN_BLOCK + 255) / 256);
    if (p.x_f32)
        scale_x(p, w, items, warp, lane);
    else
        copy_x(p, w, items, warp, lane);
}

/* ---- the product ---- */

static __device__ __forceinline__ uint32_t look_up(uint32_t word, int byte, uint32_t lane4) {
    return *(const uint32_t *)(shared + __byte_perm(word, lane4, 0x5504 | byte << 4));
}

/* acc += a unit; `scales` are the lane's, for rows g and g + 8. */
template <int R, int NT>
static __device__ __forceinline__ void multiply(float acc[R][NT][4], const uint2 unit[2 * R],
                                                uint32_t x[NT][8], const uint8_t *scales,
                                                uint32_t lane4) {
#pragma unroll
    for (int r = 0; r < R; r++) {
        float c[NT][4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t top = j < 2 ? unit[2 * r].x : unit[2 * r].y;
            const uint32_t bottom = j < 2 ? unit[2 * r + 1].x : unit[2 * r + 1].y;
            const int byte = j % 2 * 2;
            const uint32_t a[4] = {look_up(top, byte, lane4), look_up(bottom, byte, lane4),
                                   look_up(top, byte + 1, lane4), look_up(bottom, byte + 1, lane4)};
#pragma unroll
            for (int n = 0; n < NT; n++) mma_bf16(c[n], a, &x[n][2 * j]);
        }
        const float2 scale = *(const float2 *)(scales + r * 64);
#pragma unroll
        for (int n = 0; n < NT; n++)
            for (int i = 0; i < 4; i++) acc[r][n][i] += (i < 2 ? scale.x : scale.y) * c[n][i];
    }
}

/* A warp's run of units of a batch. */
template <int R> struct run {
    int first, n;
    struct stream<R> stream;
    uint2 ahead[DEPTH][2 * R];
};

/* Everything on its way that needs nothing but weights. */
template <int R>
static __device__ __forceinline__ void begin(struct run<R> *run, const struct product &p,
                                             const struct work &w, struct batch b, int movers,
                                             int warp, int lane) {
    const int units = b.groups * w.ks;
    run->first = first_unit(units, warp, movers);
    run->n = first_unit(units, warp + 1, movers) - run->first;
    point<R>(&run->stream, p, w, b.group0, run->first, lane);
#pragma unroll
    for (int j = 0; j < DEPTH; j++)
        if (j < run->n) load_unit<R>(run->ahead[j], &run->stream, p, w, false, lane);
    if (run->n > DEPTH) prefetch_group<R>(&run->stream, lane);
    load_scales<R>(p, w, b, run->first, run->n, warp, lane);
}

/* Sums of a warp's part of a group, (16 R rows, T): slot warp + group is its own, because where a
 * run passes from one group to the next, or units pass from one warp to the next, that grows. */
static __device__ __forceinline__ float *slot_at(const struct product &p, int slot, int rows) {
    return (float *)(shared + p.slots) + slot * rows * p.T;
}

template <int R, int NT>
static __device__ __forceinline__ void flush(float acc[R][NT][4], float *slot, int T, int lane) {
    const int g = lane / 4, c = lane % 4;
#pragma unroll
    for (int r = 0; r < R; r++)
        for (int n = 0; n < NT; n++)
            for (int i = 0; i < 4; i++) {
                const int t = 8 * n + 2 * c + i % 2;
                if (t < T) slot[(16 * r + g + i / 2 * 8) * T + t] = acc[r][n][i];
                acc[r][n][i] = 0.0f;
            }
}

template <int R, int NT>
static __device__ __forceinline__ void multiply_run(struct run<R> *run, const struct product &p,
                                                    const struct work &w, struct batch b, int warp,
                                                    int lane) {
    const int g = lane / 4, n = run->n;
    uint32_t lane4 = lane * 4;
    uint32_t x_row = shared_address(shared + p.x_at) + g * p.pitch + lane % 4 * 32;
    keep(lane4);
    keep(x_row);
    float acc[R][NT][4] = {};
    uint32_t x[NT][8] = {};
    int k = run->first - (int)__umulhi(2 * (uint32_t)run->first, w.inverse) * w.ks;
#pragma unroll 1
    for (int i0 = 0; i0 < n; i0 += DEPTH) {
        const uint8_t *scales = scales_at(p, warp, i0 * R) + g * 8;
        const int two = i0 * R < IN_TABLE ? ENTRY_BYTES : 128; /* from two scales to the next two */
        if (i0 + DEPTH + L2_AHEAD < n) prefetch_units<R>(&run->stream, L2_AHEAD, here(lane));
#pragma unroll
        for (int j = 0; j < DEPTH; j++) {
            const int i = i0 + j;
            if (i >= n) break;
#pragma unroll
            for (int t = 0; t < NT; t++)
                load_x(x[t], x_row + 8 * t * p.pitch + k * (GN_BLOCK * 2), g + 8 * t < p.T);
            multiply<R, NT>(acc, run->ahead[j], x, scales + j * R / 2 * two + j * R % 2 * 64,
                            lane4);
            if (i + DEPTH < n)
                load_unit<R>(run->ahead[j], &run->stream, p, w, i + DEPTH + 1 < n, lane);
            k++;
            if (k == w.ks || i + 1 == n) {
                const int group = (int)__umulhi(2 * (uint32_t)(run->first + i), w.inverse);
                flush<R, NT>(acc, slot_at(p, warp + group, 16 * R), p.T, here(lane));
                k = 0;
            }
        }
    }
}

/* ---- the end ---- */

/* A group's sum at one place of its slots, over the cluster's blocks and their warps, in order. */
static __device__ __forceinline__ float sum_slots(const struct product &p, struct batch b,
                                                  int group, int rows, int at, int movers) {
    float sum = 0.0f;
    for (int rank = 0; rank < p.ranks; rank++) {
        const int ks = first_block(p, rank + 1) - first_block(p, rank);
        const int units = b.groups * ks, last = warp_of(units, (group + 1) * ks - 1, movers);
        for (int warp = warp_of(units, group * ks, movers); warp <= last; warp++) {
            if (first_unit(units, warp, movers) == first_unit(units, warp + 1, movers)) continue;
            const float *slot = slot_at(p, warp + group, rows) + at;
            sum += p.ranks == 1 ? *slot : load_peer(slot, rank);
        }
    }
    return sum;
}

/* RMSNorm's factor of a row. */
static __device__ __forceinline__ float factor_of(const struct product &p, int t) {
    const float *squares = (const float *)(shared + p.squares) + MAX_TOKENS * WARPS + t;
    float sum = 0.0f;
    for (int rank = 0; rank < p.ranks; rank++)
        sum += p.ranks == 1 ? *squares : load_peer(squares, rank);
    return rsqrtf(sum / (float)(p.blocks * GN_BLOCK) + p.eps);
}

/* One output of those that a block finishes: of the batch's groups, every ranks-th one. */
struct output {
    int group, row, t; /* group of the batch, row of its slots (of the gate's) */
    int64_t at;        /* in y */
    bool exists;
};

template <int R>
static __device__ __forceinline__ struct output
output_of(const struct product &p, const struct work &w, struct batch b, int i) {
    const int in_group = p.swiglu ? 8 * R : 16 * R;
    const int row = i % in_group, rest = i / in_group;
    struct output o;
    o.t = rest % p.T;
    o.group = w.rank + rest / p.T * p.ranks;
    o.row = p.swiglu ? row / 8 * 16 + row % 8 : row;
    const int n = (b.group0 + o.group) * in_group + row;
    o.at = o.t * p.part[w.part].y_ld + n;
    o.exists = o.group < b.groups && n < p.part[w.part].m[0].rows;
    return o;
}

template <int R, bool LORA>
static __device__ __forceinline__ void finish(const struct product &p, const struct work &w,
                                              struct batch b, bool has_residual, int movers) {
    const int owned = (b.groups - w.rank + p.ranks - 1) >> p.rank_bits;
    const int n = owned * p.T * (p.swiglu ? 8 * R : 16 * R);
    const float *lora = (const float *)(shared + p.lora);
    void *y = p.part[w.part].y;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        const struct output o = output_of<R>(p, w, b, i);
        if (!o.exists) continue;
        const int at = o.row * p.T + o.t, up_at = at + 8 * p.T;
        float v = sum_slots(p, b, o.group, 16 * R, at, movers), up = 0.0f;
        if (p.swiglu) up = sum_slots(p, b, o.group, 16 * R, up_at, movers);
        if (LORA) {
            const float *sums = lora + (o.group >> p.rank_bits) * 16 * R * p.T;
            v += sums[at];
            if (p.swiglu) up += sums[up_at];
        }
        if (p.norm) {
            const float factor = factor_of(p, o.t);
            v *= factor;
            up *= factor;
        }
        if (p.swiglu) v = v / (1.0f + __expf(-v)) * up;
        if (p.add)
            v += has_residual && i < THREADS ? ((const float *)(shared + p.residual))[i]
                                             : load_fresh((const float *)y + o.at);
        if (p.y_f32)
            ((float *)y)[o.at] = v;
        else
            ((bf16 *)y)[o.at] = from_float<bf16>(v);
    }
}

/* What the product needs of other kernels' results: x, and what ADD adds to. */
template <int R>
static __device__ __forceinline__ void stage(const struct product &p, const struct work &w,
                                             struct batch b, int warp, int lane) {
    float residual = 0.0f;
    if (p.add) {
        const struct output o = output_of<R>(p, w, b, threadIdx.x);
        if (o.exists) residual = load_fresh((const float *)p.part[w.part].y + o.at);
    }
    stage_x(p, w, warp, lane);
    if (p.add) ((float *)(shared + p.residual))[threadIdx.x] = residual;
    __syncthreads();
    if (threadIdx.x < MAX_TOKENS) {
        float *squares = (float *)(shared + p.squares), sum = 0.0f;
        for (int i = 0; i < WARPS; i++) sum += squares[threadIdx.x * WARPS + i];
        squares[MAX_TOKENS * WARPS + threadIdx.x] = sum;
    }
}

/* What one warp does. Helpers' code is apart from that of the warps that multiply, which would else
 * lose registers to it; they meet at the block's barriers. */
template <int R, int NT, bool LORA, bool HELPS>
static __device__ __forceinline__ void work_through(const struct product &p, int warp, int lane) {
    const int movers = LORA ? WARPS - HELPERS : WARPS, helper = warp - movers;
    const struct work w = work_of(p);
    struct run<R> run;
    struct items items = {};
    for (int group = 0; group < w.groups; group += p.batch) {
        const struct batch b = batch_of(p, w, group);
        if (!HELPS) begin<R>(&run, p, w, b, movers, warp, lane);
        if (group == 0) {
            fill_tables(p, w);
            if (HELPS) {
                items = items_of(p, w, helper, list_terms(p, lane));
                prefetch_items(p, w, items, lane);
                prefetch_rows<R>(p, w, b, helper, lane);
            }
            __syncthreads();
        }
        if (!HELPS) decode_scales<R>(p, w, b, run.first, run.n, warp, lane);
        if (group == 0) {
            pdl_wait();
            stage<R>(p, w, b, warp, lane);
            if (HELPS) project_items(p, w, items, lane);
        }
        const bool last = group + p.batch >= w.groups;
        if (!HELPS) multiply_run<R, NT>(&run, p, w, b, warp, lane);
        if (HELPS) add_rows<R>(p, w, b, items.pieces * p.ranks, helper, lane);
        if (HELPS && last) leave_u(p, lane);
        sync_ranks(p.ranks);
        finish<R, LORA>(p, w, b, group == 0, movers);
        if (!last || p.ranks > 1) sync_ranks(p.ranks); /* all sums have been read */
    }
}

/* R: 16-row tiles in a group. NT: columns of x, in eights. */
template <int R, int NT, bool LORA>
static __global__ void __launch_bounds__(THREADS, NT == 1 ? 2 : 1)
    decode_kernel(const __grid_constant__ struct product p) {
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / WARP, 0), lane = threadIdx.x % WARP;
    pdl_trigger();
    if (LORA && warp >= WARPS - HELPERS)
        work_through<R, NT, LORA, true>(p, warp, lane);
    else
        work_through<R, NT, LORA, false>(p, warp, lane);
}

/* ---- the call ---- */

typedef void decode_fn(const struct product);

/* How a call is cut up. */
struct plan {
    decode_fn *kernel;
    int rows;   /* of a group: 16 R */
    int movers; /* warps that multiply */
    size_t shared_bytes;
    double ns; /* estimate */
};

static int piece(int *total, int64_t bytes) {
    const int at = *total;
    *total = (int)(at + (bytes + 15) / 16 * 16);
    return at;
}

/* Lays out a block's shared memory and returns how much it is. */
static int lay_out(struct product *p, const struct plan *plan, int ks) {
    const int slot = plan->rows * p->T * (int)sizeof(float);
    const bool lora = p->n_terms > 0;
    int total = TABLE_BYTES;
    const int tiles = plan->rows / 16 * ((p->batch * ks + plan->movers - 1) / plan->movers);
    p->scale_tiles = tiles > IN_TABLE ? tiles - IN_TABLE : 0;
    p->scales = piece(&total, (int64_t)p->scale_tiles * plan->movers * 64);
    p->nested = piece(&total, 2 * 256 * sizeof(float));
    p->squares = piece(&total, MAX_TOKENS * (WARPS + 1) * sizeof(float));
    p->residual = piece(&total, p->add ? THREADS * sizeof(float) : 0);
    p->slots = piece(&total, (int64_t)(plan->movers + p->batch - 1) * slot);
    p->lora = piece(&total, lora ? (p->batch + p->ranks - 1) / p->ranks * slot : 0);
    p->u = piece(&total, lora ? HELPERS * p->T * RANK_STEP * sizeof(float) : 0);
    p->terms = piece(&total, (int64_t)p->n_terms * p->n_pairs * sizeof(struct term));
    p->pitch = ks * GN_BLOCK * 2 + 16; /* lanes of two rows then read different banks */
    p->x_at = piece(&total, (int64_t)p->T * p->pitch);
    return total;
}

/* Clusters of p->ranks blocks that run at once. Pairs of SMs are always together; how many fours
 * and eights there are depends on the chip. */
static int clusters_at_once(const gn_ctx *ctx, const struct product *p, decode_fn *kernel) {
    const int most = ctx->cuda->sms / p->ranks;
    if (p->ranks <= 2) return most;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = (unsigned)p->ranks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)p->ranks, (unsigned)most);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = ctx->cuda->shared_limit; /* so that no SM counts twice */
    config.attrs = &attribute;
    config.numAttrs = 1;
    int n = 0;
    if (cudaOccupancyMaxActiveClusters(&n, kernel, &config) != cudaSuccess) {
        (void)cudaGetLastError();
        return 0;
    }
    return n < most ? n : most;
}

/* Deals the parts' groups to clusters of p->ranks blocks, no cluster to two parts. False if that
 * does not fit. */
static bool deal(struct product *p, struct plan *plan, const gn_ctx *ctx) {
    const int most = clusters_at_once(ctx, p, plan->kernel);
    if (most < p->n_parts || p->ranks > p->blocks) return false;
    for (p->per_cluster = 1;; p->per_cluster++) {
        p->clusters = 0;
        for (int i = 0; i < p->n_parts; i++) {
            p->part[i].cluster0 = p->clusters;
            p->clusters += (p->part[i].groups + p->per_cluster - 1) / p->per_cluster;
        }
        if (p->clusters <= most) break;
    }
    const int limit = (int)ctx->cuda->shared_limit, ks = (p->blocks + p->ranks - 1) / p->ranks;
    for (p->batch = p->per_cluster; p->batch > 0; p->batch--)
        if (lay_out(p, plan, ks) <= limit) break;
    if (p->batch == 0) return false;
    plan->shared_bytes = (size_t)lay_out(p, plan, ks);
    /* An H200's SM reads 33 bytes a ns from memory and about 40 from L2. Blocks that leave room for
     * the next kernel's hide its start. */
    const bool leaves_room =
        p->T <= 8 && plan->shared_bytes <= (ctx->cuda->shared_limit + 1024) / 2 - 1024;
    const int batches = (p->per_cluster + p->batch - 1) / p->batch;
    plan->ns = p->per_cluster * (double)ks * plan->rows * 32 / 33.0 +
               p->T * (double)ks * GN_BLOCK * (p->x_f32 ? 4 : 2) / 40.0 + (batches - 1) * 1500 +
               (p->ranks > 1 ? 300 : 0) + (leaves_room ? 0 : 700);
    return true;
}

/* The cut that should be fastest. */
static bool choose(struct product *p, struct plan *plan, const gn_ctx *ctx) {
    bool found = false;
    for (int bits = 0; bits <= (ctx->cuda->overlaps ? MAX_RANK_BITS : 0); bits++) {
        if (found && bits > 1 && p->T <= 4) break;
        struct product other = *p;
        struct plan other_plan = *plan;
        other.rank_bits = bits;
        other.ranks = 1 << bits;
        for (int i = 0; i < 2; i++) {
            const uint32_t ks = (uint32_t)(p->blocks >> bits) + (uint32_t)i;
            other.inverse[i] = ks > 0 ? (0x80000000u + ks - 1) / ks : 0;
        }
        if (!deal(&other, &other_plan, ctx) || (found && other_plan.ns >= plan->ns)) continue;
        *p = other;
        *plan = other_plan;
        found = true;
    }
    return found;
}

static struct product product_of(const gn_ctx *ctx, const gn_linear_args *args, int group_rows) {
    struct product p = {};
    p.x = args->x.data;
    p.x_ld = args->x.ld;
    p.x_f32 = args->x.dtype == GN_F32;
    p.norm = args->norm ? (const float *)args->norm->data : NULL;
    p.eps = args->eps;
    p.T = (int)args->x.shape[0];
    p.blocks = (int)(args->x.shape[1] / GN_BLOCK);
    p.swiglu = args->epilogue == GN_SWIGLU;
    p.add = args->epilogue == GN_ADD;
    p.y_f32 = args->part[0].y.dtype == GN_F32;
    p.n_parts = p.swiglu ? 1 : args->n_parts;
    for (int i = 0; i < p.n_parts; i++) {
        const int rows = p.swiglu ? group_rows / 2 : group_rows;
        p.part[i].m[0] = matrix_of(args->part[i].w);
        if (p.swiglu) p.part[i].m[1] = matrix_of(args->part[1].w);
        p.part[i].y = args->part[i].y.data;
        p.part[i].y_ld = args->part[i].y.ld;
        p.part[i].groups = (p.part[i].m[0].rows + rows - 1) / rows;
    }
    p.lora_terms = ctx->cuda->batch.terms;
    p.n_terms = args->lora ? args->n_lora : 0;
    p.n_pairs = args->n_parts;
    p.pair = args->pair;
    p.lora_u = (float *)ctx->workspace;
    p.counters = ctx->cuda->counters;
    return p;
}

static bool is_call(const gn_ctx *ctx, const gn_linear_args *args) {
    const gn_tensor *x = &args->x;
    const int64_t per_16 = x->dtype == GN_F32 ? 4 : 8;
    if (ctx->compute != GN_BF16 || x->shape[0] > MAX_TOKENS || x->dtype == GN_F16 ||
        x->ld % per_16 || !is_aligned(x->data, 16) || (args->norm && x->dtype != GN_F32))
        return false;
    if (args->norm && !is_aligned(args->norm->data, 16)) return false;
    if (args->lora && args->n_lora > MAX_TERMS) return false;
    for (int i = 0; i < args->n_parts; i++) {
        if (!is_matrix(args->part[i].w)) return false;
        if (args->epilogue == GN_SWIGLU && i > 0) continue;
        if (args->part[i].y.dtype != args->part[0].y.dtype || args->part[i].y.dtype == GN_F16)
            return false;
    }
    return args->epilogue != GN_SWIGLU || args->part[0].w->qtype == args->part[1].w->qtype;
}

/* Everything but the launch; false where this kernel is not for it. */
static bool prepare(const gn_ctx *ctx, const gn_linear_args *args, struct product *p,
                    struct plan *plan) {
    if (!is_call(ctx, args)) return false;
    const bool few = args->x.shape[0] <= 8, lora = args->lora && args->n_lora > 0;
    *plan = {};
    plan->rows = few ? 16 : 32;
    plan->movers = lora ? WARPS - HELPERS : WARPS;
    plan->kernel = few ? (lora ? decode_kernel<1, 1, true> : decode_kernel<1, 1, false>)
                       : (lora ? decode_kernel<2, 2, true> : decode_kernel<2, 2, false>);
    *p = product_of(ctx, args, plan->rows);
    /* All the SM's memory for sharing: a split that differs from the last kernel's would have to
     * wait for it. */
    if (cudaFuncSetAttribute(plan->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)ctx->cuda->shared_limit) != cudaSuccess ||
        cudaFuncSetAttribute(plan->kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared) != cudaSuccess) {
        (void)cudaGetLastError();
        return false;
    }
    return choose(p, plan, ctx);
}

bool gn_cuda_linear_decode_fits(const gn_ctx *ctx, const gn_linear_args *args) {
    struct product p;
    struct plan plan;
    return prepare(ctx, args, &p, &plan);
}

/* For u: every row of every term, in pieces. */
size_t gn_cuda_linear_decode_workspace(int64_t max_rank, int max_terms) {
    const int64_t rank = (max_rank + 7) / 8 * 8;
    return sizeof(float) * GN_MAX_PARTS * MAX_PIECES * MAX_TOKENS * (size_t)(rank * max_terms);
}

static size_t u_bytes(const gn_linear_args *args) {
    size_t n = 0;
    for (int i = 0; args->lora && i < args->n_lora; i++)
        for (int j = 0; j < args->n_parts; j++) {
            const gn_lora *term = &args->lora[i];
            n += (size_t)term->rows * (size_t)((term->pairs[args->pair + j].rank + 7) / 8 * 8);
        }
    return n * MAX_PIECES * sizeof(float);
}

gn_status gn_cuda_linear_decode(gn_ctx *ctx, const gn_linear_args *args) {
    struct product p;
    struct plan plan;
    if (!prepare(ctx, args, &p, &plan)) return GN_EUNSUPPORTED;
    if (u_bytes(args) > ctx->workspace_bytes) return GN_ENOMEM;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)p.ranks, (unsigned)p.clusters);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = gn_cuda_stream(ctx);
    config.attrs = attributes;
    if (ctx->cuda->overlaps) {
        attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[0].val.programmaticStreamSerializationAllowed = 1;
        config.numAttrs = 1;
    }
    if (p.ranks > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = (unsigned)p.ranks;
        attributes[config.numAttrs].val.clusterDim.y = 1;
        attributes[config.numAttrs].val.clusterDim.z = 1;
        config.numAttrs++;
    }
    return gn_cuda_status(cudaLaunchKernelEx(&config, plan.kernel, p));
}
