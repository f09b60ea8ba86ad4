/* linear_mma.cu - products of up to some hundred rows of x with 4-bit weights in tiles, on Hopper:
 * prefill of short prompts, decoding of many streams.
 *
 * Past some 50 rows it is the tensor cores that bound a product, before that the memory: so what
 * matters is that neither waits. A weight is decoded once for up to 128 rows of x, in registers.
 *   - wgmma m64nNk16: 64 weight rows, decoded into registers, are its A operand; N rows of x are B,
 *     in shared memory. Four of them make a 64-wide block's float32 sums, to which the block's
 *     scales are applied as they are added up: exactly, once a sum. Meanwhile the warpgroup decodes
 *     the next block, by linear_decode.cu's table (a byte, a lookup, two bf16 codes).
 *   - Weights lie in memory as lanes hold them: so they are loaded straight into registers, a step
 *     of some blocks ahead, and asked for into L2 some steps ahead. The first do not wait for the
 *     kernel before (pdl_wait).
 *   - x comes through a ring of stages, a step each, which the two blocks of a cluster get
 *     together, each asking L2 for half in one copy: x is most of the traffic. One thread copies.
 *   - x comes from a kernel before this one, normalised, rounded, and in the very order that
 *     stages have: by block of K, swizzled, its columns permuted as tiles permute those of weights.
 *     Its blocks have room beside those of products: so it starts while the product before ends,
 *     and the next product while it runs.
 *   - All (tile of outputs, step of K) pairs stand in one line, of which every cluster takes an
 *     equal piece, whatever the shape. Where a piece ends within a tile, its sums go to working
 *     memory; those who share a tile wait for each other when they have nothing else left to do,
 *     and each finishes a part of its outputs, adding in a fixed order.
 *
 * What one 64-wide block of 64 rows costs an SM at least (docs/performance.md has what it was
 * measured to cost, two to three times that), in cycles, with 64 (128) rows of x: the tensor
 * cores 128 (256); each of four schedulers 32 for lookups, 32 (64) for scales, some 60 around them;
 * shared memory 64 for lookups, 64 (128) for B, and x. Reading its 2064 bytes from memory at
 * 4.3 TB/s takes 114. */
#include "linear_mma_finish.cuh"

/* The table of pairs (see linear_decode.cu), and what decodes scales: of every part, or of gate and
 * up. */
template <int N> static __device__ void fill_tables(const struct product &p) {
    enum { THREADS = cut<N>::THREADS };
    static_assert(THREADS >= 256, "an entry a thread");
    const int entry = threadIdx.x;
    if (entry < 256) {
        const float *code = p.part[0].m[0].code;
        const uint32_t pair = pack_bf16(__ldg(code + entry / 16), __ldg(code + entry % 16));
        for (int i = 0; i < 8; i++) /* turned, so that a warp's stores do not meet in a bank */
            *(uint4 *)(shared + entry * ENTRY_BYTES + (i + entry) % 8 * 16) =
                make_uint4(pair, pair, pair, pair);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < 256 * (p.swiglu ? 2 : p.n_parts); i += THREADS) {
        const struct matrix &m = p.swiglu ? p.part[0].m[i / 256] : p.part[i / 256].m[0];
        if (m.nested_code) *nested_at(i / 256, i % 256) = __ldg(m.nested_code + i % 256);
    }
}

/* ---- x ---- */

/* The run's step i of x, to the cluster: each block copies some blocks of K. By one thread. */
template <int N>
static __device__ __forceinline__ void copy_x(const struct product &p, int i, struct turn t) {
    enum { SHARE = cut<N>::STAGE_BYTES / PEERS };
    const int share = (int)blockIdx.x % PEERS * SHARE;
    const uint8_t *from =
        p.x + (int64_t)(i % (p.token_tiles * p.steps)) * cut<N>::STAGE_BYTES + share;
    barrier_wait(empty_at(t.stage), t.parity);
    barrier_expect(full_at(t.stage), cut<N>::STAGE_BYTES);
    copy_bulk_to((1 << PEERS) - 1, shared_address(stage_at<N>(t.stage) + share), from, SHARE,
                 full_at(t.stage));
}

/* ---- warpgroups that multiply ---- */

/* What a lane multiplies with x: of rows g and g + 8 of its warp. And the scales that it loads: of
 * one row of the warp, of half a step's blocks. */
struct source {
    const uint8_t *tiles[2]; /* its bytes of a row's first block of K */
    const uint8_t *scales;
    const float *nested_absmax; /* NULL: scales are stored as they are */
    float offset;
    int block0, table;
};

template <int N>
static __device__ __forceinline__ struct source source_of(const struct product &p, int tile,
                                                          int warpgroup, int warp, int lane) {
    const struct group g = group_of<N>(p, tile, warpgroup);
    struct source s = {};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int which;
        const int t = tile_of(p, g, warp * 2 + h, &which);
        const struct matrix &m = p.part[g.part].m[which];
        s.tiles[h] = m.tiles + (int64_t)t * p.blocks * GN_CUDA_TILE_BYTES + lane * 8;
        if (h != lane / 16) continue;
        const int row = lane % 16 / 2;
        const int64_t at = (int64_t)t * p.blocks * GN_CUDA_TILE_ROWS + row;
        s.scales = (const uint8_t *)m.scales + at * (m.nested_code ? 1 : (int)sizeof(float));
        s.nested_absmax = m.nested_code ? m.nested_absmax : NULL;
        s.offset = m.offset;
        s.block0 = min(t * GN_CUDA_TILE_ROWS + row, m.rows - 1) * p.blocks;
        s.table = p.swiglu ? which : g.part;
    }
    return s;
}

/* As it is stored, and what it is in units of; or itself. */
struct stored_scale {
    uint32_t value;
    float absmax;
};

static __device__ __forceinline__ float decode_scale(const struct source &s,
                                                     struct stored_scale stored) {
    if (!s.nested_absmax) return stored.absmax;
    return __fadd_rn(__fmul_rn(*nested_at(s.table, stored.value), stored.absmax), s.offset);
}

/* A step's weights: of each block, the lane's bytes of two tiles. */
template <int STEP> struct step_weights {
    uint2 block[STEP][2];
    struct stored_scale scale[STEP / 2];
};

/* Block j of a step, if the step exists; past the last block, where x is zero, what was there. */
template <int STEP>
static __device__ __forceinline__ void load_block(struct step_weights<STEP> &w,
                                                  const struct product &p, const struct source &s,
                                                  int step, int j, bool exists = true) {
    const int k = step * STEP, n = exists ? p.blocks - k - j : 0;
#pragma unroll
    for (int h = 0; h < 2; h++)
        load_once(w.block[j][h],
                  s.tiles[h] + (int64_t)k * GN_CUDA_TILE_BYTES + j * GN_CUDA_TILE_BYTES, n);
}

/* The lane's scales of a step, and as with blocks. */
template <int STEP>
static __device__ __forceinline__ void load_scales(struct step_weights<STEP> &w,
                                                   const struct product &p, const struct source &s,
                                                   int step, int lane) {
    const int k = step * STEP + lane % 2 * (STEP / 2);
#pragma unroll
    for (int i = 0; i < STEP / 2; i++) {
        struct stored_scale &to = w.scale[i];
        const int n = p.blocks - k - i, at = (k + i) * GN_CUDA_TILE_ROWS;
        if (s.nested_absmax) {
            load_once(to.value, s.scales + at, n);
            load_once(to.absmax, s.nested_absmax + (uint32_t)(s.block0 + k + i) / GN_NESTED_BLOCK,
                      n);
        } else {
            load_once(to.absmax, (const float *)s.scales + at, n);
        }
    }
}

/* Weights of a step, if they exist before block `end`, on their way to L2. */
template <int STEP>
static __device__ __forceinline__ void prefetch_step(const struct source &s, int step, int end,
                                                     int lane) {
    enum { LINES = STEP * GN_CUDA_TILE_BYTES / LINE };
    const int line = lane % LINES, k = step * STEP;
    if (lane < 2 * LINES && k + line * LINE / GN_CUDA_TILE_BYTES < end)
        prefetch_line((lane < LINES ? s.tiles[0] : s.tiles[1]) + (int64_t)k * GN_CUDA_TILE_BYTES +
                      line * LINE);
}

/* At the beginning of a tile, of which the run has steps [step, end): the first steps that
 * registers do not ask for themselves, and all scales. */
template <int STEP>
static __device__ __forceinline__ void
prefetch_tile(const struct product &p, const struct source &s, int step, int end, int lane) {
    const int scale_bytes = GN_CUDA_TILE_ROWS * (s.nested_absmax ? 1 : (int)sizeof(float));
    const int last = min(end * STEP, p.blocks);
#pragma unroll 1
    for (int i = step * STEP * scale_bytes + lane % 16 * LINE; i < last * scale_bytes;
         i += 16 * LINE)
        prefetch_line(s.scales + i);
#pragma unroll 1
    for (int i = 1; i < L2_BLOCKS / STEP; i++) prefetch_step<STEP>(s, step + i, last, lane);
}

static __device__ __forceinline__ uint32_t look_up(uint32_t word, int byte, uint32_t lane4) {
    return *(const uint32_t *)(shared + __byte_perm(word, lane4, 0x5504 | byte << 4));
}

/* The A operands of a warp's 16 rows and 64 columns. */
static __device__ __forceinline__ void decode(uint32_t a[16], const uint2 codes[2],
                                              uint32_t lane4) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const uint32_t t = j < 2 ? codes[0].x : codes[0].y, b = j < 2 ? codes[1].x : codes[1].y;
        const int byte = j % 2 * 2;
        a[4 * j] = look_up(t, byte, lane4);
        a[4 * j + 1] = look_up(b, byte, lane4);
        a[4 * j + 2] = look_up(t, byte + 1, lane4);
        a[4 * j + 3] = look_up(b, byte + 1, lane4);
    }
}

/* Starts c = a times a block of x, as described. */
template <int N>
static __device__ __forceinline__ void start(float (&c)[N / 2], const uint32_t a[16],
                                             uint64_t rows) {
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; j++) wgmma(c, a + 4 * j, rows + j * (32 >> 4), j > 0);
    wgmma_commit();
}

/* Waits for c, and adds it. */
template <int N>
static __device__ __forceinline__ void add_up(float (&acc)[N / 2], float (&c)[N / 2], float top,
                                              float bottom) {
    wgmma_wait(c);
#pragma unroll
    for (int i = 0; i < N / 2; i++) acc[i] += (i % 4 < 2 ? top : bottom) * c[i];
}

/* While a block is multiplied the next one is decoded, and the one a step further asked for. */
template <int N>
static __device__ __forceinline__ void multiply_run(const struct product &p, struct run run,
                                                    int warpgroup, int thread) {
    typedef cut<N> C;
    constexpr int STEP = C::STEP;
    const int lane = thread % WARP, warp = thread / WARP;
    const uint32_t lane4 = lane * 4, peer_empty = peer_address(empty_at(0), lane % PEERS);
    float acc[N / 2] = {}, c[N / 2] = {};
    uint32_t a[2][16];
    int step = run.first % p.steps;
    int end = min(p.steps, step + run.end - run.first); /* of the run in the tile */
    struct source source = source_of<N>(p, run.first / p.steps, warpgroup, warp, lane);
    struct step_weights<STEP> w = {};
#pragma unroll
    for (int j = 0; j < STEP; j++) load_block(w, p, source, step, j);
    load_scales(w, p, source, step, lane);
    prefetch_tile<STEP>(p, source, step, end, lane);
    fill_tables<N>(p);
    __syncthreads();
    wait_for_cluster(); /* its barriers are ready */
    pdl_wait();
    struct turn t = {0, 0};
#pragma unroll 1
    for (int i = 0; i < min(run.end - run.first, C::X_AHEAD); i++)
        if (threadIdx.x == 0) copy_x<N>(p, run.first + i, {i, 1}); /* all stages are empty */
    decode(a[0], w.block[0], lane4);
    load_block(w, p, source, step + 1, 0, step + 1 < end);
#pragma unroll 1
    for (int i = run.first; i < run.end; i++) {
        if (threadIdx.x == 0 && i + C::X_AHEAD < run.end)
            copy_x<N>(p, i + C::X_AHEAD, to_fill<N>(t));
        float scale[STEP / 2];
#pragma unroll
        for (int j = 0; j < STEP / 2; j++) scale[j] = decode_scale(source, w.scale[j]);
        const bool leaves = step + 1 == end;
        if (!leaves) {
            prefetch_step<STEP>(source, ++step + C::L2_STEPS - 1, min(end * STEP, p.blocks), lane);
        } else if (i + 1 < run.end) {
            step = 0;
            end = min(p.steps, run.end - i - 1);
            int same = thread; /* so that nothing made of it waits through the loop */
            keep(same);
            source = source_of<N>(p, (i + 1) / p.steps, warpgroup, same / WARP, same % WARP);
            prefetch_tile<STEP>(p, source, step, end, lane);
            load_block(w, p, source, step, 0);
        } /* else: what was there, in vain */
        load_scales(w, p, source, step, lane);
        const uint64_t rows = describe_rows(shared_address(stage_at<N>(t.stage)));
        __syncwarp();
        barrier_wait(full_at(t.stage), t.parity);
#pragma unroll
        for (int j = 0; j < STEP; j++) {
            start<N>(c, a[j % 2], rows + j * (C::X_BYTES >> 4));
            const int by = lane / 4 * 2 + j / (STEP / 2);
            const float top = __shfl_sync(0xffffffffu, scale[j % (STEP / 2)], by),
                        bottom = __shfl_sync(0xffffffffu, scale[j % (STEP / 2)], by + 16);
            decode(a[(j + 1) % 2], w.block[(j + 1) % STEP], lane4);
            if (j + 1 < STEP)
                load_block(w, p, source, step, j + 1);
            else
                load_block(w, p, source, step + 1, 0, step + 1 < end);
            add_up<N>(acc, c, top, bottom);
        }
        if (lane < PEERS && i + C::STAGES < run.end) /* or else nobody waits for it */
            barrier_arrive_cluster(peer_empty + t.stage * 8);
        t = next<N>(t);
        if (leaves) leave<N>(p, acc, run, i, warpgroup, thread);
    }
}

/* The tiles that a run shares with others. */
template <int N>
static __device__ __forceinline__ void finish_run(const struct product &p, struct run run,
                                                  int warpgroup, int thread) {
#pragma unroll 1
    for (int tile = run.first / p.steps; tile * p.steps < run.end; tile++)
        if (run.first > tile * p.steps || run.end < (tile + 1) * p.steps)
            finish_shared<N>(p, tile, warpgroup, thread);
}

template <int N>
static __global__ void __maxnreg__(cut<N>::REGISTERS)
    mma_kernel(const __grid_constant__ struct product p) {
    typedef cut<N> C;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / WARP, 0);
    const int warpgroup = warp / (GROUP_THREADS / WARP);
    const struct run run = run_of(p, (int)blockIdx.x / PEERS);
    pdl_trigger();
    if (threadIdx.x < C::STAGES) {
        barrier_init(full_at(threadIdx.x), 1);
        barrier_init(empty_at(threadIdx.x), PEERS * C::GROUPS * (GROUP_THREADS / WARP));
        barriers_ready();
    }
    arrive_at_cluster();
    int thread = threadIdx.x % GROUP_THREADS;
    keep(thread); /* or it is made again in each step */
    multiply_run<N>(p, run, warpgroup, thread);
    arrive_at_cluster();
    finish_run<N>(p, run, warpgroup, thread);
    wait_for_cluster(); /* the other has what this one copied, and has arrived where it is to */
}

/* ---- the call ---- */

typedef void mma_fn(const struct product);

/* A kernel, by how many tokens its tiles have. */
struct variant {
    mma_fn *kernel;
    int tokens, groups, step, threads, shared_bytes;
};

template <int N> static struct variant variant_of(void) {
    typedef cut<N> C;
    return {mma_kernel<N>, N, C::GROUPS, C::STEP, C::THREADS, C::SHARED_BYTES};
}

static struct variant variant_for(int tokens) {
    return tokens <= 32   ? variant_of<32>()
           : tokens <= 64 ? variant_of<64>()
           : tokens <= 96 ? variant_of<96>()
                          : variant_of<128>();
}

static cudaLaunchConfig_t config_of(const struct variant *v, int clusters,
                                    cudaLaunchAttribute *attributes) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = PEERS;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)(clusters * PEERS));
    config.blockDim = dim3((unsigned)v->threads);
    config.dynamicSmemBytes = (size_t)v->shared_bytes;
    config.attrs = attributes;
    config.numAttrs = 1;
    return config;
}

/* All the SM's memory for sharing: a split that differs from the last kernel's waits for it. */
static bool set_shared(const void *kernel, int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) ==
               cudaSuccess &&
           cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                cudaSharedmemCarveoutMaxShared) == cudaSuccess;
}

/* Also on chips whose code is not here, which is no failure. */
void gn_cuda_linear_mma_open(struct gn_cuda *cuda) {
    int least = cuda->sms / PEERS;
    if (!set_shared((const void *)pack_kernel<float>, 0) ||
        !set_shared((const void *)pack_kernel<bf16>, 0))
        least = 0;
    for (int tokens = 32; tokens <= MAX_TOKENS; tokens += 32) {
        const struct variant v = variant_for(tokens);
        cudaLaunchAttribute attributes[1] = {};
        const cudaLaunchConfig_t config = config_of(&v, cuda->sms / PEERS, attributes);
        int n = 0;
        if (!set_shared((const void *)v.kernel, v.shared_bytes) ||
            cudaOccupancyMaxActiveClusters(&n, v.kernel, &config) != cudaSuccess)
            n = 0;
        least = n < least ? n : least;
    }
    (void)cudaGetLastError();
    cuda->mma_clusters = least;
}

/* How a call is cut up, and what of the working memory it takes. */
struct plan {
    struct variant variant;
    int token_tiles, tiles, steps, clusters;
    size_t x_bytes, dense_bytes, sums_bytes, partials_bytes;
};

static struct plan plan_of(const gn_ctx *ctx, int64_t rows, int64_t K, int64_t columns,
                           int64_t groups, bool lora) {
    struct plan plan = {};
    plan.token_tiles = (int)((rows + MAX_TOKENS - 1) / MAX_TOKENS);
    plan.variant = variant_for((int)((rows + plan.token_tiles - 1) / plan.token_tiles));
    const int64_t tile_groups = plan.variant.groups * PEERS;
    plan.tiles = (int)((groups + tile_groups - 1) / tile_groups) * plan.token_tiles;
    plan.steps = (int)((K / GN_BLOCK + plan.variant.step - 1) / plan.variant.step);
    const int64_t all = (int64_t)plan.tiles * plan.steps;
    plan.clusters = (int)(all < ctx->cuda->mma_clusters ? all : ctx->cuda->mma_clusters);
    plan.x_bytes =
        (size_t)plan.token_tiles * plan.variant.tokens * plan.steps * plan.variant.step * ROW_BYTES;
    plan.dense_bytes = lora ? (size_t)(rows * K) * sizeof(bf16) : 0;
    plan.sums_bytes = lora ? (size_t)(rows * columns) * sizeof(float) : 0;
    plan.partials_bytes = (size_t)plan.clusters * PEERS * 2 * plan.variant.groups * GROUP_ROWS *
                          plan.variant.tokens * sizeof(float);
    return plan;
}

static size_t bytes_of(const gn_ctx *ctx, const struct plan *plan, int64_t rows, int64_t max_rank,
                       int max_terms) {
    return align_up(plan->x_bytes) + align_up(plan->dense_bytes) + align_up(plan->sums_bytes) +
           align_up(plan->partials_bytes) +
           (max_rank > 0 ? gn_cuda_lora_bytes(ctx, rows, max_rank, max_terms) : 0);
}

size_t gn_cuda_linear_mma_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                                    int64_t max_rank, int max_terms) {
    if (ctx->cuda->mma_clusters == 0) return 0;
    const int64_t groups = max_n / GROUP_ROWS + GN_MAX_PARTS;
    size_t most = 0;
    for (int64_t n = 32; n <= GN_CUDA_MMA_ROWS; n += 32) {
        const int64_t used = rows < n ? rows : n;
        const struct plan plan = plan_of(ctx, used, max_k, max_n, groups, max_rank > 0);
        const size_t bytes = bytes_of(ctx, &plan, used, max_rank, max_terms);
        most = bytes > most ? bytes : most;
    }
    return most;
}

/* Groups of 64 rows; of gate and up together, 32 of each. */
static int64_t groups_of(const gn_linear_args *args) {
    const bool swiglu = args->epilogue == GN_SWIGLU;
    const int64_t in_group = swiglu ? GROUP_ROWS / 2 : GROUP_ROWS;
    int64_t n = 0;
    for (int i = 0; i < (swiglu ? 1 : args->n_parts); i++)
        n += (args->part[i].w->rows + in_group - 1) / in_group;
    return n;
}

bool gn_cuda_linear_mma_fits(const gn_ctx *ctx, const gn_linear_args *args) {
    const gn_tensor *x = &args->x;
    if (ctx->cuda->mma_clusters == 0 || ctx->compute != GN_BF16 || x->shape[0] > GN_CUDA_MMA_ROWS ||
        x->dtype == GN_F16)
        return false;
    for (int i = 0; i < args->n_parts; i++) {
        const gn_matrix *w = args->part[i].w;
        if (!is_matrix(w) || !is_aligned(w->data, 16) || w->qtype != args->part[0].w->qtype)
            return false;
        if (args->epilogue == GN_SWIGLU && i > 0) continue;
        const gn_dtype dtype = args->part[i].y.dtype;
        if (x->shape[0] * args->part[i].y.ld >= INT32_MAX) return false;
        if (dtype != args->part[0].y.dtype || dtype == GN_F16 ||
            (args->epilogue == GN_ADD && dtype != GN_F32))
            return false;
    }
    const struct plan plan = plan_of(ctx, x->shape[0], x->shape[1], 0, groups_of(args), false);
    return plan.tiles <= GN_CUDA_COUNTERS / (2 * PEERS) &&
           (int64_t)plan.tiles * plan.steps < INT32_MAX / (plan.clusters + 1);
}

static struct product product_of(const gn_ctx *ctx, const gn_linear_args *args,
                                 const struct plan *plan) {
    const gn_cuda_parts parts = parts_of(args);
    struct product p = {};
    p.swiglu = args->epilogue == GN_SWIGLU;
    p.add = args->epilogue == GN_ADD;
    p.y_f32 = args->part[0].y.dtype == GN_F32;
    p.n_parts = p.swiglu ? 1 : args->n_parts;
    for (int i = 0; i < p.n_parts; i++) {
        struct part *part = &p.part[i];
        const int64_t in_group = p.swiglu ? GROUP_ROWS / 2 : GROUP_ROWS;
        for (int j = 0; j < (p.swiglu ? 2 : 1); j++) {
            part->m[j] = matrix_of(args->part[i + j].w);
            part->column[j] = (int)parts.first[i + j];
        }
        part->y = args->part[i].y.data;
        part->y_ld = args->part[i].y.ld;
        part->group0 = p.groups;
        p.groups += (int)((part->m[0].rows + in_group - 1) / in_group);
    }
    p.T = (int)args->x.shape[0];
    p.blocks = (int)(args->x.shape[1] / GN_BLOCK);
    p.token_tiles = plan->token_tiles;
    p.steps = plan->steps;
    p.tiles = plan->tiles;
    p.clusters = plan->clusters;
    p.lora_ld = parts.first[parts.n];
    p.counters = ctx->cuda->counters;
    return p;
}

/* x as `to` and `dense` have it. */
static gn_status pack_x(gn_ctx *ctx, const gn_linear_args *args, const struct plan *plan, void *to,
                        bf16 *dense) {
    const gn_tensor *x = &args->x;
    struct x_source s = {};
    s.x = x->data;
    s.ld = x->ld;
    s.norm = args->norm ? (const float *)args->norm->data : NULL;
    s.eps = args->eps;
    s.T = (int)x->shape[0];
    s.blocks = (int)(x->shape[1] / GN_BLOCK);
    s.all_blocks = plan->steps * plan->variant.step;
    s.in_pairs = x->ld % 2 == 0 && is_aligned(x->data, 2 * gn_dtype_size(x->dtype)) &&
                 is_aligned(s.norm, sizeof(float2));
    const int tokens = plan->variant.tokens, chunks = s.all_blocks * 8;
    const dim3 grid((unsigned)(plan->token_tiles * tokens),
                    s.norm ? 1 : (unsigned)((chunks + PACK_THREADS - 1) / PACK_THREADS));
    gn_status status = GN_OK;
    GN_FOR_FLOAT(x->dtype, status = launch(ctx, pack_kernel<T>, grid, dim3(PACK_THREADS), 0,
                                           (uint4 *)to, dense, s, tokens));
    return status;
}

gn_status gn_cuda_linear_mma(gn_ctx *ctx, const gn_linear_args *args) {
    const int64_t T = args->x.shape[0], K = args->x.shape[1];
    const int rank = max_rank_of(args);
    const struct plan plan =
        plan_of(ctx, T, K, parts_of(args).first[args->n_parts], groups_of(args), rank > 0);
    if (bytes_of(ctx, &plan, T, rank, gn_cuda_lora_terms_a_row(args)) > ctx->workspace_bytes)
        return GN_ENOMEM;
    struct product p = product_of(ctx, args, &plan);
    char *at = (char *)ctx->workspace;
    char *x = carve(&at, plan.x_bytes);
    bf16 *dense = (bf16 *)carve(&at, plan.dense_bytes);
    float *lora = (float *)carve(&at, plan.sums_bytes);
    p.x = (const uint8_t *)x;
    p.partials = (float4 *)carve(&at, plan.partials_bytes);
    gn_status status = pack_x(ctx, args, &plan, x, rank > 0 ? dense : NULL);
    if (!status && rank > 0) {
        p.lora = lora;
        status = gn_cuda_lora(ctx, args, dense, args->x.shape[1], at, lora);
    }
    if (status) return status;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = config_of(&plan.variant, plan.clusters, attributes);
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 2;
    config.stream = gn_cuda_stream(ctx);
    return gn_cuda_status(cudaLaunchKernelEx(&config, plan.variant.kernel, p));
}
