/* linear_mma.cu - products of up to some hundred rows of x with 4-bit weights in tiles, on Hopper:
 * prefill of short prompts, decoding of many streams.
 *
 * Past some 50 rows it is the tensor cores that bound a product, before that the memory: so what
 * matters is that neither waits. A weight is decoded once for up to 256 rows of x, in registers.
 *   - wgmma m64nNk16: 64 weight rows, decoded into registers, are its A operand; N rows of x are B,
 *     in shared memory. A warpgroup decodes the next 64-wide block while the tensor cores multiply
 *     this one: by linear_decode.cu's table (a byte, a lookup, two bf16 codes), times the block's
 *     scale as bf16. So sums stay where they are made until a tile of outputs ends, at the price of
 *     three roundings of a weight to bf16 where dequantizing has one.
 *   - Weights lie in memory as lanes hold them: so they are loaded straight into registers, a step
 *     of some blocks ahead, and asked for into L2 some steps ahead. The first do not wait for the
 *     kernel before (pdl_wait).
 *   - x comes through a ring of stages, which the two blocks of a cluster get together, each asking
 *     L2 for half in one copy: x is most of the traffic. One thread copies.
 *   - x comes from a kernel before this one, normalised, rounded, and in the very order that
 *     stages have: by block of K, swizzled, its columns permuted as tiles permute those of weights.
 *     Its blocks have room beside those of products: so it starts while the product before ends,
 *     and the next product while it runs.
 *   - All (tile of outputs, step of K) pairs stand in one line, of which every cluster takes an
 *     equal piece, whatever the shape. Where a piece ends within a tile, its sums go to working
 *     memory; those who share a tile wait for each other when they have nothing else left to do,
 *     and each finishes a part of its outputs, adding in a fixed order.
 *
 * What one 64-wide block of 64 rows costs an SM at least, in cycles, with 64 (256) rows of x: the
 * tensor cores 128 (512); each of four schedulers 48 for lookups and scales, some 50 around them;
 * shared memory 64 for lookups, 64 (256) for B, and x. Reading its 2064 bytes from memory at
 * 4.3 TB/s takes 114. docs/performance.md has what products were measured to take. */
#include "linear_mma_finish.cuh"

/* The table of pairs, a private copy for each lane (see linear_decode.cu), and what decodes scales:
 * of every part, or of gate and up. */
template <int N> static __device__ void fill_tables(const struct product &p, uint32_t base) {
    enum { THREADS = cut<N>::THREADS };
    static_assert(THREADS >= 256, "an entry a thread");
    const int entry = threadIdx.x;
    if (entry < 256) {
        const float *code = p.part[0].m[0].code;
        const uint32_t pair = pack_bf16(__ldg(code + entry / 16), __ldg(code + entry % 16));
        for (int i = 0; i < 8; i++) /* turned, so that a warp's stores do not meet in a bank */
            store_shared(base + TABLE + entry * ENTRY_BYTES + (i + entry) % 8 * 16,
                         make_uint4(pair, pair, pair, pair));
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < 64 * (p.swiglu ? 2 : p.n_parts); i += THREADS) {
        const struct matrix &m = p.swiglu ? p.part[0].m[i / 64] : p.part[i / 64].m[0];
        if (m.nested_code)
            store_shared(base + NESTED_AT + i * 16, __ldg((const uint4 *)m.nested_code + i % 64));
    }
}

/* ---- x ---- */

/* Where a warpgroup is in the run's stages of x, and which one of all x's is copied next. */
struct place {
    uint32_t base;
    int thread; /* of the block */
    struct turn turn;
    int entered, copied, stages; /* of the run */
    int source, period;          /* of all x */
};

/* The run's next stage of x, to both blocks of the cluster: each copies its share. */
template <int N>
static __device__ __forceinline__ void copy_x(const struct product &p, struct place &at,
                                              struct turn t) {
    enum { SHARE = cut<N>::STAGE_BYTES / PEERS };
    if (at.copied == at.stages) return;
    if (at.thread == 0) {
        const int share = (int)blockIdx.x % PEERS * SHARE;
        const uint32_t full = full_at(at.base, t.stage);
        barrier_wait(empty_at(at.base, t.stage), t.parity);
        barrier_expect(full, cut<N>::STAGE_BYTES);
        copy_bulk_to((1 << PEERS) - 1, stage_at<N>(at.base, t.stage) + share,
                     p.x + (int64_t)at.source * cut<N>::STAGE_BYTES + share, SHARE, full);
    }
    __syncwarp();
    at.copied++;
    at.source = at.source + 1 < at.period ? at.source + 1 : 0;
}

/* At the beginning of a run, whose first stages it copies. */
template <int N>
static __device__ __forceinline__ struct place place_of(const struct product &p, struct run run,
                                                        uint32_t base) {
    typedef cut<N> C;
    struct place at = {};
    at.base = base;
    at.thread = threadIdx.x;
    keep(at.thread); /* or it is read again from where it is slow */
    at.stages = (run.end - run.first) * C::STEP_STAGES;
    at.period = p.token_tiles * p.steps * C::STEP_STAGES;
    at.source = run.first * C::STEP_STAGES % at.period;
#pragma unroll 1
    for (int i = 0; i < C::X_AHEAD; i++) copy_x<N>(p, at, {i, 1}); /* all are empty */
    return at;
}

/* ---- warpgroups that multiply ---- */

/* What a lane multiplies with x: of rows g and g + 8 of its warp. And the scales that it loads: of
 * one row of the warp, of half a step's blocks. */
struct source {
    const uint8_t *tiles[2]; /* its bytes of a row's next step */
    const uint8_t *scales;   /* of the next step */
    const float *nested_absmax;
    float offset;
    int block;          /* counted as nested_absmax is, of the next step */
    uint32_t nested;    /* the address of the table that decodes scales */
    const uint8_t *far; /* a line of weights to fetch into L2, of a step some steps ahead */
};

template <int N, bool DQ>
static __device__ __forceinline__ struct source source_of(const struct product &p, int tile,
                                                          int step, uint32_t base, int warpgroup,
                                                          int warp, int lane) {
    enum { STEP = cut<N>::STEP, SCALE = DQ ? 1 : (int)sizeof(float) };
    const struct group g = group_of<N>(p, tile, warpgroup);
    struct source s = {};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int which;
        const int t = tile_of(p, g, warp * 2 + h, &which);
        const struct matrix &m = p.part[g.part].m[which];
        const int64_t first = ((int64_t)t * p.steps + step) * STEP;
        s.tiles[h] = m.tiles + first * GN_CUDA_TILE_BYTES + lane * 8;
        if (h != lane / 16) continue;
        const int row = lane % 16 / 2, half = lane % 2 * (STEP / 2);
        s.scales = (const uint8_t *)m.scales + ((first + half) * GN_CUDA_TILE_ROWS + row) * SCALE;
        s.nested_absmax = m.nested_absmax;
        s.offset = m.offset;
        s.block = (min(t * GN_CUDA_TILE_ROWS + row, m.rows - 1) * p.steps + step) * STEP + half;
        s.nested = base + NESTED_AT + (p.swiglu ? which : g.part) * NESTED_BYTES;
    }
    const int line = lane % (STEP * GN_CUDA_TILE_BYTES / LINE) * LINE;
    s.far = (lane * LINE < STEP * GN_CUDA_TILE_BYTES ? s.tiles[0] : s.tiles[1]) - lane * 8 + line;
    return s;
}

/* That line, and the one a step further is next. */
template <int STEP>
static __device__ __forceinline__ void prefetch_step(struct source &s, bool exists, int lane) {
    if (exists && lane < 2 * STEP * GN_CUDA_TILE_BYTES / LINE) prefetch_line(s.far);
    s.far += STEP * GN_CUDA_TILE_BYTES;
}

/* Goes a step further. */
template <int STEP, bool DQ> static __device__ __forceinline__ void advance(struct source &s) {
    s.tiles[0] += STEP * GN_CUDA_TILE_BYTES;
    s.tiles[1] += STEP * GN_CUDA_TILE_BYTES;
    s.scales += STEP * GN_CUDA_TILE_ROWS * (DQ ? 1 : (int)sizeof(float));
    s.block += STEP;
}

/* A step's weights: of each block, the lane's bytes of two tiles. And its scales, as they are
 * stored; with double quantization, what they are in units of. */
template <int STEP> struct step_weights {
    uint2 block[STEP][2];
    uint32_t codes[STEP / 2];
    float absmax[STEP / 2];
};

/* Block j of the source's step. */
template <int STEP>
static __device__ __forceinline__ void load_block(struct step_weights<STEP> &w,
                                                  const struct source &s, int j) {
#pragma unroll
    for (int h = 0; h < 2; h++) w.block[j][h] = load_weights(s.tiles[h] + j * GN_CUDA_TILE_BYTES);
}

/* The lane's scales of the source's step. Its blocks have one nested_absmax. */
template <int STEP, bool DQ>
static __device__ __forceinline__ void load_scales(struct step_weights<STEP> &w,
                                                   const struct source &s) {
#pragma unroll
    for (int i = 0; i < STEP / 2; i++) {
        if (DQ)
            w.codes[i] = __ldg(s.scales + i * GN_CUDA_TILE_ROWS);
        else
            w.absmax[i] = __ldg((const float *)s.scales + i * GN_CUDA_TILE_ROWS);
    }
    if (DQ) w.absmax[0] = __ldg(s.nested_absmax + (uint32_t)s.block / GN_NESTED_BLOCK);
}

/* They as pairs of bf16. */
template <int STEP, bool DQ>
static __device__ __forceinline__ void decode_scales(uint32_t pairs[STEP / 2],
                                                     const struct source &s,
                                                     const struct step_weights<STEP> &w) {
#pragma unroll
    for (int i = 0; i < STEP / 2; i++) {
        float scale = w.absmax[i];
        if (DQ)
            scale = __fadd_rn(
                __fmul_rn(__uint_as_float(load_shared(s.nested + w.codes[i] * 4)), w.absmax[0]),
                s.offset);
        pairs[i] = pack_bf16(scale, scale);
    }
}

/* Two weights: of a byte of codes the pair in the table, times the scale. `own` is the address of
 * the lane's word of the first entry. */
static __device__ __forceinline__ uint32_t look_up(uint32_t word, int byte, uint32_t own,
                                                   uint32_t scale) {
    uint32_t v = load_shared(__byte_perm(word, own, 0x7604 | byte << 4));
    asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(v) : "r"(scale));
    return v;
}

/* The A operands of a warp's 16 rows and 64 columns, block j of a step. */
template <int STEP>
static __device__ __forceinline__ void decode(uint32_t (&a)[16], const struct step_weights<STEP> &w,
                                              int j, const uint32_t scales[STEP / 2], int by,
                                              uint32_t own) {
    const uint2 *codes = w.block[j];
    const uint32_t scale = scales[j % (STEP / 2)];
    const uint32_t top = __shfl_sync(0xffffffffu, scale, by + j / (STEP / 2));
    const uint32_t bottom = __shfl_sync(0xffffffffu, scale, by + j / (STEP / 2) + 16);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t t = i < 2 ? codes[0].x : codes[0].y, b = i < 2 ? codes[1].x : codes[1].y;
        const int byte = i % 2 * 2;
        a[4 * i] = look_up(t, byte, own, top);
        a[4 * i + 1] = look_up(b, byte, own, bottom);
        a[4 * i + 2] = look_up(t, byte + 1, own, top);
        a[4 * i + 3] = look_up(b, byte + 1, own, bottom);
    }
}

/* Starts acc += a times a block of x, as described. */
template <int N>
static __device__ __forceinline__ void start(float (&acc)[N / 2], const uint32_t a[16],
                                             uint32_t rows) {
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; j++) wgmma(acc, a + 4 * j, rows + j * (32 >> 4));
    wgmma_commit();
}

/* acc += weights times x, of n steps of a tile, whose first one is in w; `s` is at the next, or
 * where there is none at the last. While a block is multiplied the next one is decoded, and the one
 * a step further asked for. */
template <int N, bool DQ>
static __device__ __forceinline__ void
multiply_steps(const struct product &p, struct source &s, struct step_weights<cut<N>::STEP> &w,
               int n, float (&acc)[N / 2], struct place &at, int lane) {
    typedef cut<N> C;
    constexpr int STEP = C::STEP;
    const uint32_t peer_empty = peer_address(empty_at(at.base, 0), lane % PEERS);
    const uint32_t own = at.base + TABLE + lane * 4;
    const int by = lane / 4 * 2;
    uint32_t a[2][16], scales[STEP / 2];
    decode_scales<STEP, DQ>(scales, s, w);
    decode(a[0], w, 0, scales, by, own);
    load_block(w, s, 0);
    load_scales<STEP, DQ>(w, s);
#pragma unroll 1
    for (; n > 0; n--) {
        prefetch_step<STEP>(s, n > C::L2_STEPS, lane);
#pragma unroll
        for (int j = 0; j < STEP; j++) {
            const bool enters = j % C::STAGE_BLOCKS == 0;
            if (enters) barrier_wait(full_at(at.base, at.turn.stage), at.turn.parity);
            start<N>(acc, a[j % 2],
                     describe_rows(stage_at<N>(at.base, at.turn.stage) +
                                   j % C::STAGE_BLOCKS * C::X_BYTES));
            wgmma_wait_but_one(a[(j + 1) % 2]);
            if (enters) {
                if (at.entered > 0 && lane < PEERS) /* the stage before has been read */
                    barrier_arrive_cluster(peer_empty + before<N>(at.turn) * 8);
                copy_x<N>(p, at, to_fill<N>(at.turn));
            }
            if (j + 1 == STEP) {
                decode_scales<STEP, DQ>(scales, s, w);
                if (n > 2) advance<STEP, DQ>(s);
                load_scales<STEP, DQ>(w, s);
            }
            decode(a[(j + 1) % 2], w, (j + 1) % STEP, scales, by, own);
            load_block(w, s, (j + 1) % STEP);
            if ((j + 1) % C::STAGE_BLOCKS == 0) {
                at.turn = next<N>(at.turn);
                at.entered++;
            }
        }
    }
}

/* A tile's part of a run. */
struct piece {
    int tile, step, n; /* its first step, how many */
};

static __device__ __forceinline__ struct piece piece_of(const struct product &p, struct run run,
                                                        int i) {
    const int step = i % p.steps;
    return {i / p.steps, step, min(p.steps - step, run.end - i)};
}

/* Asks for its first step; and into L2 for its scales and for what registers do not ask for
 * themselves before it is too late. */
template <int N, bool DQ>
static __device__ __forceinline__ void enter(const struct product &p, struct piece piece,
                                             struct source &s, struct step_weights<cut<N>::STEP> &w,
                                             uint32_t base, int warpgroup, int thread) {
    typedef cut<N> C;
    enum { STEP = C::STEP, SCALES = STEP * GN_CUDA_TILE_ROWS * (DQ ? 1 : (int)sizeof(float)) };
    const int lane = thread % WARP;
    s = source_of<N, DQ>(p, piece.tile, piece.step, base, warpgroup, thread / WARP, lane);
#pragma unroll
    for (int j = 0; j < STEP; j++) load_block(w, s, j);
    load_scales<STEP, DQ>(w, s);
    for (int i = lane % 16 * LINE; i < piece.n * SCALES; i += 16 * LINE)
        prefetch_line(s.scales + i);
    for (int i = 0; i < C::L2_STEPS; i++) prefetch_step<STEP>(s, i < piece.n, lane);
    if (piece.n > 1) advance<STEP, DQ>(s);
}

/* A run from the piece on which w and s begin. */
template <int N, bool DQ>
static __device__ __forceinline__ void
multiply_run(const struct product &p, struct run run, struct source &s,
             struct step_weights<cut<N>::STEP> &w, uint32_t base, int warpgroup, int thread) {
    struct place at = place_of<N>(p, run, base);
    float acc[N / 2] = {};
    int i = run.first;
#pragma unroll 1
    while (true) {
        const struct piece piece = piece_of(p, run, i);
        multiply_steps<N, DQ>(p, s, w, piece.n, acc, at, thread % WARP);
        i += piece.n;
        if (i < run.end) enter<N, DQ>(p, piece_of(p, run, i), s, w, base, warpgroup, thread);
        wgmma_wait(acc);
        leave<N>(p, acc, run, i - 1, warpgroup, thread);
        if (i == run.end) break;
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

template <int N, bool DQ>
static __global__ void __maxnreg__(cut<N>::REGISTERS)
    mma_kernel(const __grid_constant__ struct product p) {
    typedef cut<N> C;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / WARP, 0);
    const int warpgroup = warp / GROUP_WARPS;
    const struct run run = run_of(p, (int)blockIdx.x / PEERS);
    const uint32_t base = base_address();
    pdl_trigger();
    if (threadIdx.x < C::STAGES) {
        barrier_init(full_at(base, threadIdx.x), 1);
        barrier_init(empty_at(base, threadIdx.x), PEERS * C::GROUPS * GROUP_WARPS);
        barriers_ready();
    }
    arrive_at_cluster();
    int thread = threadIdx.x % GROUP_THREADS;
    keep(thread); /* or it is made again in each step */
    struct source source;
    struct step_weights<C::STEP> w = {};
    enter<N, DQ>(p, piece_of(p, run, run.first), source, w, base, warpgroup, thread);
    fill_tables<N>(p, base);
    __syncthreads();
    wait_for_cluster(); /* its barriers are ready */
    pdl_wait();
    multiply_run<N, DQ>(p, run, source, w, base, warpgroup, thread);
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

template <int N> static struct variant variant_of(bool double_quant) {
    typedef cut<N> C;
    return {double_quant ? mma_kernel<N, true> : mma_kernel<N, false>,
            N,
            C::GROUPS,
            C::STEP,
            C::THREADS,
            C::SHARED_BYTES};
}

static struct variant variant_for(int tokens, bool double_quant) {
    return tokens <= 32    ? variant_of<32>(double_quant)
           : tokens <= 64  ? variant_of<64>(double_quant)
           : tokens <= 128 ? variant_of<128>(double_quant)
           : tokens <= 192 ? variant_of<192>(double_quant)
                           : variant_of<256>(double_quant);
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

/* Of the kernels for one kind of scales: how many clusters of any run at once. */
static int open_kernels(const struct gn_cuda *cuda, bool double_quant) {
    int least = cuda->sms / PEERS;
    for (int tokens = 32; tokens <= MAX_TOKENS; tokens += 32) {
        const struct variant v = variant_for(tokens, double_quant);
        cudaLaunchAttribute attributes[1] = {};
        const cudaLaunchConfig_t config = config_of(&v, least, attributes);
        int n = 0;
        if (!set_shared((const void *)v.kernel, v.shared_bytes) ||
            cudaOccupancyMaxActiveClusters(&n, v.kernel, &config) != cudaSuccess)
            return 0;
        least = n < least ? n : least;
    }
    return least;
}

/* Also on chips whose code is not here, which is no failure. */
void gn_cuda_linear_mma_open(struct gn_cuda *cuda) {
    const int with = open_kernels(cuda, true), without = open_kernels(cuda, false);
    const bool fits = cuda->shared_reserved <= RESERVED_BYTES &&
                      set_shared((const void *)pack_kernel<float>, 0) &&
                      set_shared((const void *)pack_kernel<bf16>, 0);
    cuda->mma_clusters = !fits ? 0 : with < without ? with : without;
    (void)cudaGetLastError();
}

/* How a call is cut up, and what of the working memory it takes. */
struct plan {
    struct variant variant;
    int token_tiles, tiles, steps, clusters;
    size_t x_bytes, dense_bytes, sums_bytes, partials_bytes;
};

static struct plan plan_of(const gn_ctx *ctx, int64_t rows, int64_t K, int64_t columns,
                           int64_t groups, bool lora, bool double_quant) {
    struct plan plan = {};
    plan.token_tiles = (int)((rows + MAX_TOKENS - 1) / MAX_TOKENS);
    plan.variant =
        variant_for((int)((rows + plan.token_tiles - 1) / plan.token_tiles), double_quant);
    const int64_t tile_groups = plan.variant.groups * PEERS;
    plan.tiles = (int)((groups + tile_groups - 1) / tile_groups) * plan.token_tiles;
    plan.steps = (int)(K / GN_BLOCK / plan.variant.step);
    const int64_t all = (int64_t)plan.tiles * plan.steps;
    plan.clusters = (int)(all < ctx->cuda->mma_clusters ? all : ctx->cuda->mma_clusters);
    plan.x_bytes = (size_t)plan.token_tiles * plan.variant.tokens * (size_t)K * sizeof(bf16);
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
        const struct plan plan = plan_of(ctx, used, max_k, max_n, groups, max_rank > 0, true);
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
        x->dtype == GN_F16 || x->shape[1] % (MAX_STEP * GN_BLOCK) != 0)
        return false;
    for (int i = 0; i < args->n_parts; i++) {
        const gn_matrix *w = args->part[i].w;
        if (!is_matrix(w) || !is_aligned(w->data, 16) || w->qtype != args->part[0].w->qtype ||
            !w->absmax_u8 != !args->part[0].w->absmax_u8 ||
            (w->absmax_u8 && !is_aligned(w->nested_code, 16)))
            return false;
        if (args->epilogue == GN_SWIGLU && i > 0) continue;
        const gn_dtype dtype = args->part[i].y.dtype;
        if (x->shape[0] * args->part[i].y.ld >= INT32_MAX) return false;
        if (dtype != args->part[0].y.dtype || dtype == GN_F16 ||
            (args->epilogue == GN_ADD && dtype != GN_F32))
            return false;
        if (dtype == GN_BF16 && (w->rows % 2 != 0 || args->part[i].y.ld % 2 != 0 ||
                                 !is_aligned(args->part[i].y.data, 4)))
            return false; /* two at once */
    }
    const struct plan plan =
        plan_of(ctx, x->shape[0], x->shape[1], 0, groups_of(args), false, true);
    /* With more rows than a tile has, dequantizing pays where tiles are few, so that all are
     * shared, and where LoRA then rides in the product. */
    if (plan.token_tiles > 1 && (plan.tiles < plan.clusters || max_rank_of(args) > 0)) return false;
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
    s.in_pairs = x->ld % 2 == 0 && is_aligned(x->data, 2 * gn_dtype_size(x->dtype)) &&
                 is_aligned(s.norm, sizeof(float2));
    const int tokens = plan->variant.tokens, chunks = s.blocks * 8;
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
    const struct plan plan = plan_of(ctx, T, K, parts_of(args).first[args->n_parts],
                                     groups_of(args), rank > 0, args->part[0].w->absmax_u8 != NULL);
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
