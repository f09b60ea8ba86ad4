/* decoder.cu - a step of decoding, through all layers, as one kernel.
 *
 * Decoding is bound by reading the weights once, so nothing may interrupt the reading. A layer is
 * five phases that need each other's results whole (q k v, attention, o, gate and up, down): as
 * five launches, each would begin and end with some microseconds in which no weights come. Here
 * one block an SM stays for all of them and meets the others at a barrier in global memory, while
 * the first weights of what comes next are on their way already.
 *
 *   - A phase's groups (two tiles of 8 rows of weights) are dealt to the blocks, and a group's
 *     columns to the block's warps. So a warp meets the same columns in every group and keeps its
 *     part of x in registers, as the mma's B operand: rows of x are the mma's columns, of which
 *     there are 8; unused ones are zero and cost nothing.
 *   - A step is a group by up to 256 columns, 2 KiB. A warp loads the next one's blocks into the
 *     registers of those that it has multiplied, also across barriers, and has the one after it
 *     fetched into L2. (Through shared memory, cp.async would cost as much of its bandwidth as
 *     all lookups.)
 *   - A packed byte becomes two bf16 codes by one lookup in a table of 256 pairs, of which every
 *     lane has a copy in its own bank. Entries are 256 bytes apart: the address, the byte's then 4
 *     times the lane, is one byte permutation. A block's scale multiplies its float32 sums.
 *   - Warps' sums meet in shared memory in a fixed order. Rotation and the cache, SwiGLU, or the
 *     residual addition follow; who adds to the residual stream also leaves what the next product
 *     reads, in bf16 times the norm's weights, and the squares for the norm's factor, which is
 *     applied to that product's sums: all blocks read x at once, so it has to be small.
 *
 * Blocks wait for each other, so all must be resident: one an SM, and nothing else that stays. */
#include "decoder.cuh"

#include <stdlib.h>
#include <string.h>

#include "decoder_attention.cuh"
#include "decoder_product.cuh"

/* ---- the grid ---- */

/* Everything that all blocks wrote before is to be seen after. `meetings`: of the program so far,
 * with this one. While the others come, the cache that the next phase reads is fetched. */
static __device__ __forceinline__ void meet(const struct program &p, const struct phase &next,
                                            uint32_t meetings, int warp, int lane) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(&p.sync[0], 1u);
    }
    if (next.kind == ATTEND) prefetch_cache(p, next, warp, lane);
    if (threadIdx.x == 0) {
        while (load_relaxed(&p.sync[0]) < meetings * gridDim.x) {
        }
        __threadfence();
    }
    __syncthreads();
}

/* The last block to leave makes the counters ready for the next program. */
static __device__ __forceinline__ void leave(const struct program &p) {
    if (threadIdx.x != 0 || atomicAdd(&p.sync[1], 1u) != gridDim.x - 1) return;
    p.sync[0] = p.sync[1] = p.sync[2] = 0;
}

/* What all layers need of the rows' positions. */
template <int MOST> static __device__ __forceinline__ void note_positions(const struct program &p) {
    const int t = threadIdx.x, half = p.D / 2;
    if (t < rows_of<MOST>(p)) {
        const int position = p.batch.row_pos[t];
        const int32_t *blocks = p.batch.blocks + p.batch.row_seq[t] * (int64_t)p.max_blocks;
        *slot_of(t) = {blocks[position / TOKENS], position % TOKENS};
    }
    for (int i = threadIdx.x; i < rows_of<MOST>(p) * half; i += THREADS) {
        const int row = i / half, j = i % half;
        *angle_of(row, j) = make_float2(p.cosines[row * p.cos_ld + j], p.sines[row * p.sin_ld + j]);
    }
}

/* Asks for phase i, by a warp. */
static __device__ __forceinline__ void load_phase(const struct program &p, int i, int lane) {
    if (i < p.n_phases && lane < (int)sizeof(struct phase) / 16)
        copy_async<16>((uint4 *)phase_at(i) + lane, (const uint4 *)(p.phases + i) + lane);
}

template <int MOST, bool DQ, bool LORA>
static __global__ void __launch_bounds__(THREADS + LORA * HELPERS * WARP, 1)
    decoder_kernel(const __grid_constant__ struct program p) {
    pdl_trigger();
    const int warp = __shfl_sync(~0u, threadIdx.x / WARP, 0);
    int lane = threadIdx.x % WARP;
    keep(lane);
    const bool helps = LORA && warp >= WARPS;
    struct step step = {};
    struct cursor cur = {};
    cur.at = -1;
    if (warp < PHASES - 1) load_phase(p, warp, lane);
    wait_for_all_copies();
    __syncthreads();
    if (!helps) {
        load_step<DQ>(&step, &cur, p, 0, warp, lane);
        fill_tables(p);
    }
    if (threadIdx.x == 0) *first_item() = item_of(p, blockIdx.x);
    pdl_wait();
    if (!helps) note_positions<MOST>(p);
    __syncthreads();
    uint32_t products = 0;
#pragma unroll 1
    for (int i = 0; i < p.n_phases; i++) {
        if (i > 0) meet(p, *phase_at(i), (uint32_t)i, warp, lane);
        const enum kind kind = phase_at(i)->kind;
        if (warp == 0) load_phase(p, i + PHASES - 1, lane);
        if (!helps && kind != ATTEND) load_step<DQ>(&step, &cur, p, i, warp, lane);
        if (kind == ATTEND) {
            struct cursor *saved = (struct cursor *)(shared + CURSORS_AT) + warp;
            if (!helps) {
                if (next_units(&cur, p, i, warp, lane) > 0) prefetch_step(&cur, 0, lane);
                if (lane == 0) *saved = cur;
                __syncwarp();
            }
            attend(p, *phase_at(i), warp, lane);
            step = {};
            if (!helps) {
                cur = *saved;
                load_step<DQ>(&step, &cur, p, i, warp, lane);
            }
        } else if (kind == PREPARE && !helps) {
            prepare<MOST, LORA>(p, *phase_at(i));
        } else if (kind != PREPARE && helps) {
            help<MOST>(p, i, ++products, warp - WARPS, lane);
        } else if (kind != PREPARE) {
            multiply<MOST, DQ, LORA>(p, i, &step, &cur, warp, lane);
        }
        if (warp == 0) wait_for_all_copies();
    }
    leave(p);
}

/* ---- the host's part ---- */

struct gn_decoder {
    gn_ctx *ctx;
    struct program program; /* but for what a call brings */
    void *phases;
};

static struct weight placed_weight(const gn_matrix *m) {
    struct weight w = {};
    w.tiles = (const uint8_t *)m->data;
    w.scales = m->absmax_u8 ? m->absmax_u8 : (const uint8_t *)m->absmax;
    w.nested_absmax = m->nested_absmax;
    w.offset = m->offset;
    return w;
}

enum { LAYER_PHASES = 5, PROJECTIONS = 7 };

static void list_weights(const gn_matrix *w[PROJECTIONS], const gn_decoder_layer *layer) {
    const gn_matrix *all[] = {layer->q,    layer->k,  layer->v,   layer->o,
                              layer->gate, layer->up, layer->down};
    memcpy(w, all, sizeof all);
}

/* A product with n weights of `rows` rows together. */
static void plan_product(struct phase *ph, enum kind kind, const gn_matrix *const w[], int n,
                         int64_t rows, const bf16 *x, int pair, int sms) {
    const int groups = (int)(rows / GROUP_ROWS);
    ph->kind = kind;
    for (int i = 0; i < n; i++) ph->w[i] = placed_weight(w[i]);
    ph->groups_each = groups / sms;
    ph->groups_left = groups % sms;
    ph->blocks = (int)(w[0]->cols / GN_BLOCK);
    ph->x = x;
    ph->pair = pair;
    ph->n_parts = n;
}

/* next_norm: of the next layer, or NULL. */
static void plan_layer(struct phase ph[LAYER_PHASES], const struct program *p,
                       const gn_decoder_layer *layer, const gn_tensor *next_norm, int pair,
                       int sms) {
    const gn_matrix *w[PROJECTIONS];
    list_weights(w, layer);
    plan_product(&ph[0], QKV, w, 3, w[0]->rows + w[1]->rows + w[2]->rows, p->normed, pair, sms);
    ph[1].kind = ATTEND;
    plan_product(&ph[2], ADD, w + 3, 1, w[3]->rows, p->attended, pair + 3, sms);
    ph[2].norm = (const float *)layer->mlp_norm->data;
    plan_product(&ph[3], SWIGLU, w + 4, 2, 2 * w[4]->rows, p->normed, pair + 4, sms);
    plan_product(&ph[4], ADD, w + 6, 1, w[6]->rows, p->h, pair + 6, sms);
    ph[4].norm = next_norm ? (const float *)next_norm->data : NULL;
    for (int i = 0; i < LAYER_PHASES; i++) {
        ph[i].keys = (bf16 *)layer->kv->k.data;
        ph[i].values = (bf16 *)layer->kv->v.data;
    }
}

static void plan(struct phase *phases, const struct program *p, const gn_decoder_options *o,
                 int sms) {
    struct phase *first = phases;
    const int groups = p->hidden / GROUP_ROWS;
    first->kind = PREPARE;
    first->norm = (const float *)o->layers[0].attn_norm->data;
    first->groups_each = groups / sms;
    first->groups_left = groups % sms;
    for (int i = 0; i < o->n_layers; i++)
        plan_layer(phases + 1 + i * LAYER_PHASES, p, &o->layers[i],
                   i + 1 < o->n_layers ? o->layers[i + 1].attn_norm : NULL, i * PROJECTIONS, sms);
}

/* Whether two device arrays hold the same floats; a failure to read them counts as no. */
static bool same_floats(gn_ctx *ctx, const float *a, const float *b, int n) {
    float values[2][256];
    if (a == b) return true;
    return a && b && gn_ctx_read(ctx, values[0], a, (size_t)n * sizeof *a) == GN_OK &&
           gn_ctx_read(ctx, values[1], b, (size_t)n * sizeof *b) == GN_OK &&
           memcmp(values[0], values[1], (size_t)n * sizeof *a) == 0;
}

static bool is_weight(gn_ctx *ctx, const gn_matrix *m, const gn_matrix *like) {
    return gn_cuda_is_tiled(m) && m->rows % GROUP_ROWS == 0 &&
           m->rows * (m->cols / GN_BLOCK) <
               INT32_MAX / GN_CUDA_TILE_ROWS && /* counted in 32 bits */
           !m->absmax_u8 == !like->absmax_u8 &&
           same_floats(ctx, m->code, like->code, 16) &&
           same_floats(ctx, m->nested_code, like->nested_code, 256);
}

static bool is_layer(gn_ctx *ctx, const gn_decoder_layer *layer, const gn_decoder_layer *first,
                     int D) {
    const gn_matrix *w[PROJECTIONS];
    list_weights(w, layer);
    for (int i = 0; i < PROJECTIONS; i++)
        if (!is_weight(ctx, w[i], first->q)) return false;
    const gn_kv *kv = layer->kv;
    return kv->k.dtype == GN_BF16 && kv->v.dtype == GN_BF16 && kv->k.shape[2] == TOKENS &&
           kv->k.shape[3] == D && kv->k.ld == first->kv->k.ld && kv->v.ld == first->kv->v.ld &&
           kv->k.ld % 8 == 0 && kv->v.ld % 8 == 0;
}

static bool is_supported(gn_ctx *ctx, const gn_decoder_options *o) {
    const int D = o->head_dim;
    if (!ctx->cuda || ctx->compute != GN_BF16 || ctx->cuda->shared_limit < SHARED_BYTES ||
        ctx->cuda->shared_reserved > RESERVED_BYTES || (D != 64 && D != 80 && D != 96 && D != 128))
        return false;
    for (int i = 0; i < o->n_layers; i++)
        if (!is_layer(ctx, &o->layers[i], &o->layers[0], D)) return false;
    return true;
}

static int max_splits(const gn_ctx *ctx, const gn_decoder_options *o, int T) {
    enum { MOST = 8 };
    const int group = o->heads / o->kv_heads;
    const int units = T * o->kv_heads * ((group + QUERIES - 1) / QUERIES);
    const int splits = ctx->cuda->sms / units;
    return splits < 1 ? 1 : splits > MOST ? MOST : splits;
}

static size_t partial_bytes(const gn_ctx *ctx, const gn_decoder_options *o) {
    size_t most = 0;
    for (int T = 1; T <= MAX_T; T++) {
        const size_t n = (size_t)(T * max_splits(ctx, o, T));
        if (n > most) most = n;
    }
    return most * (size_t)(o->heads * (o->head_dim + 4)) * sizeof(float);
}

static gn_status allocate(void **out, gn_ctx *ctx, size_t bytes) {
    *out = gn_ctx_alloc(ctx, bytes);
    return *out ? GN_OK : GN_ENOMEM;
}

typedef void decoder_fn(const struct program);

template <bool DQ, bool LORA> static decoder_fn *kernel_of(int T) {
    return T <= 1 ? decoder_kernel<1, DQ, LORA> : decoder_kernel<MAX_T, DQ, LORA>;
}

static decoder_fn *kernel_for(int T, bool double_quant, bool lora) {
    if (lora) return double_quant ? kernel_of<true, true>(T) : kernel_of<false, true>(T);
    return double_quant ? kernel_of<true, false>(T) : kernel_of<false, false>(T);
}

/* How many groups leave their sums at once. */
static int batch_groups(int T, bool lora) {
    return SUMS_FLOATS /
           ((T <= 1 ? SUM_FLOATS<1> : SUM_FLOATS<MAX_T>)*(lora ? SLOTS<true> : SLOTS<false>));
}

/* x / d for x d < 2^32. */
static struct divisor divide_by(int d) {
    return {d, (uint32_t)((0x100000000u + (uint64_t)d - 1) / (uint64_t)d)};
}

static gn_status open_program(gn_decoder *d, const gn_decoder_options *o) {
    const gn_decoder_layer *first = &o->layers[0];
    struct program *p = &d->program;
    p->heads = o->heads;
    p->kv_heads = o->kv_heads;
    p->D = o->head_dim;
    p->hidden = (int)first->q->cols;
    p->intermediate = (int)first->gate->rows;
    p->eps = o->eps;
    p->k_ld = first->kv->k.ld;
    p->v_ld = first->kv->v.ld;
    p->code = first->q->code;
    p->nested_code = first->q->absmax_u8 ? first->q->nested_code : NULL;
    p->by_half = divide_by(p->D / GROUP_ROWS);
    p->by_D = divide_by(p->D);
    p->n_phases = 1 + o->n_layers * LAYER_PHASES;
    const size_t rows = MAX_T, dim = (size_t)(p->heads * p->D);
    const size_t groups = (size_t)(p->hidden / GROUP_ROWS);
    const size_t phase_bytes = (size_t)p->n_phases * sizeof(struct phase);
    const struct {
        void **at;
        size_t bytes;
        bool zero;
    } parts[] = {
        {(void **)&p->normed, rows * (size_t)p->hidden * sizeof *p->normed, false},
        {(void **)&p->squares, rows * groups * sizeof *p->squares, false},
        {(void **)&p->q, rows * dim * sizeof *p->q, false},
        {(void **)&p->attended, rows * dim * sizeof *p->attended, false},
        {(void **)&p->h, rows * (size_t)p->intermediate * sizeof *p->h, false},
        {(void **)&p->partials, partial_bytes(d->ctx, o), false},
        {(void **)&p->splits_done, rows * (size_t)p->heads * sizeof *p->splits_done, true},
        {(void **)&p->sync, 3 * sizeof *p->sync, true},
        {&d->phases, phase_bytes, false},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        gn_status status = allocate(parts[i].at, d->ctx, parts[i].bytes);
        if (!status && parts[i].zero) status = gn_ctx_zero(d->ctx, *parts[i].at, parts[i].bytes);
        if (status) return status;
    }
    p->phases = (const struct phase *)d->phases;
    struct phase *phases = (struct phase *)calloc((size_t)p->n_phases, sizeof *phases);
    if (!phases) return GN_ENOMEM;
    plan(phases, p, o, d->ctx->cuda->sms);
    const gn_status status = gn_ctx_write(d->ctx, d->phases, phases, phase_bytes);
    free(phases);
    return status;
}

gn_status gn_cuda_decoder_open(gn_decoder **out, gn_ctx *ctx, const gn_decoder_options *options) {
    if (!is_supported(ctx, options)) return GN_EUNSUPPORTED;
    for (int i = 0; i < 8; i++)
        if (cudaFuncSetAttribute(kernel_for(1 + i / 4, i % 2, i / 2 % 2),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 SHARED_BYTES) != cudaSuccess)
            return GN_EUNSUPPORTED;
    gn_decoder *d = (gn_decoder *)calloc(1, sizeof *d);
    if (!d) return GN_ENOMEM;
    d->ctx = ctx;
    const gn_status status = open_program(d, options);
    if (status)
        gn_cuda_decoder_close(d);
    else
        *out = d;
    return status;
}

void gn_cuda_decoder_close(gn_decoder *d) {
    if (!d) return;
    const struct program *p = &d->program;
    void *memory[] = {p->normed,   p->squares,     p->q,    p->attended, p->h,
                      p->partials, p->splits_done, p->sync, d->phases};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) gn_ctx_free(d->ctx, memory[i]);
    free(d);
}

/* Whether the kernel can read all of a term's matrices. */
static bool is_term(const struct program *p, const gn_lora *term) {
    const int n = p->n_phases / LAYER_PHASES * PROJECTIONS;
    for (int i = 0; i < n; i++) {
        const gn_tensor *a = &term->pairs[i].a, *b = &term->pairs[i].b;
        if (term->pairs[i].rank > 0 && (a->dtype != GN_BF16 || b->dtype != GN_BF16 ||
                                        a->ld % 8 != 0 || (uintptr_t)a->data % 16 != 0))
            return false;
    }
    return true;
}

/* For u of any phase. */
static size_t u_bytes(const struct program *p, const gn_lora *terms, int n_terms) {
    const int n = p->n_phases / LAYER_PHASES * PROJECTIONS;
    size_t floats = 0;
    for (int i = 0; i < n_terms; i++) {
        int most = 0;
        for (int j = 0; j < n; j++)
            most = terms[i].pairs[j].rank > most ? terms[i].pairs[j].rank : most;
        floats += (size_t)(GN_MAX_PARTS * terms[i].rows * most);
    }
    return floats * sizeof(float);
}

gn_status gn_cuda_decoder_run(gn_decoder *d, gn_tensor *x, const gn_tensor *cos,
                              const gn_tensor *sin, const gn_seqs *seqs, const gn_lora *terms,
                              int n_terms) {
    struct program p = d->program;
    for (int i = 0; i < n_terms; i++)
        if (!is_term(&p, &terms[i])) return GN_EUNSUPPORTED;
    if (u_bytes(&p, terms, n_terms) > d->ctx->workspace_bytes) return GN_ENOMEM;
    const bool lora = n_terms > 0;
    p.T = (int)x->shape[0];
    p.x = (float *)x->data;
    p.x_ld = x->ld;
    p.cosines = (const float *)cos->data;
    p.sines = (const float *)sin->data;
    p.cos_ld = cos->ld;
    p.sin_ld = sin->ld;
    p.max_blocks = seqs->max_blocks;
    p.batch = d->ctx->cuda->batch;
    p.n_terms = n_terms;
    p.u = (float *)d->ctx->workspace;
    p.batch_groups = batch_groups(p.T, lora);
    p.by_T = divide_by(p.T);
    const gn_decoder_options shape = {NULL, 0, p.heads, p.kv_heads, p.D, p.eps};
    p.splits = max_splits(d->ctx, &shape, p.T);
    return launch(d->ctx, kernel_for(p.T, p.nested_code != NULL, lora),
                  dim3((unsigned)d->ctx->cuda->sms), dim3(THREADS + (lora ? HELPERS * WARP : 0)),
                  SHARED_BYTES, p);
}
