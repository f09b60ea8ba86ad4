/* device.cc - the device "cuda" of programs that are linked with this instead of backend.cu: its
 * kernels are emulated, its memory is the CPU's. Ops that are not emulated are the CPU's own, which
 * do not read weights in tiles. A test that needs another number of multiprocessors writes it
 * into ctx->cuda. */
#include "tests/emulated/emulator.h"

#include <vector>

extern "C" { /* for tests in C */
#include "kernels/cuda/linear.h"
}

/* What gn_cuda_batch points to. */
struct staged {
    struct gn_cuda cuda;
    gn_backend table;
    std::vector<int32_t> ids, row_seq, row_pos, row0, pos0, blocks;
    std::vector<gn_lora> terms;
    std::vector<uint32_t> counters;
};

static staged *staged_of(gn_ctx *ctx) {
    return (staged *)ctx->cuda;
}

static gn_status stage(gn_ctx *ctx, const int32_t *ids, const gn_seqs *seqs, const gn_lora *terms,
                       int32_t n_terms) {
    staged *s = staged_of(ctx);
    s->row_seq.clear();
    s->row_pos.clear();
    for (int32_t i = 0; i < seqs->n; i++)
        for (int32_t row = seqs->row0[i]; row < seqs->row0[i + 1]; row++) {
            s->row_seq.push_back(i);
            s->row_pos.push_back(seqs->pos0[i] + row - seqs->row0[i]);
        }
    s->ids.assign(ids, ids + seqs->row0[seqs->n]);
    s->row0.assign(seqs->row0, seqs->row0 + seqs->n + 1);
    s->pos0.assign(seqs->pos0, seqs->pos0 + seqs->n);
    s->blocks.assign(seqs->blocks, seqs->blocks + (int64_t)seqs->n * seqs->max_blocks);
    s->terms.assign(terms, terms + n_terms);
    gn_cuda_batch *batch = &s->cuda.batch;
    batch->ids = s->ids.data();
    batch->row_seq = s->row_seq.data();
    batch->row_pos = s->row_pos.data();
    batch->row0 = s->row0.data();
    batch->pos0 = s->pos0.data();
    batch->blocks = s->blocks.data();
    batch->terms = s->terms.data();
    return GN_OK;
}

/* The blocks of a weight, in whole tiles where it stands in tiles. */
static int64_t placed_blocks(const gn_matrix *m) {
    if (!gn_cuda_is_tiled(m)) return (m->rows * m->cols + GN_BLOCK - 1) / GN_BLOCK;
    return (m->rows + GN_CUDA_TILE_ROWS - 1) / GN_CUDA_TILE_ROWS * GN_CUDA_TILE_ROWS *
           (m->cols / GN_BLOCK);
}

static size_t code_bytes(const gn_matrix *m) {
    if (gn_qtype_is_4bit(m->qtype)) return (size_t)placed_blocks(m) * (GN_BLOCK / 2);
    return m->qtype == GN_Q_NONE ? gn_matrix_bytes(m) : (size_t)(m->rows * m->cols + 3) / 4 * 4;
}

static size_t place_bytes(const gn_ctx *, const gn_matrix *host) {
    size_t scales = host->qtype == GN_Q_INT8 ? (size_t)host->rows * sizeof(float) : 0;
    if (gn_qtype_is_4bit(host->qtype))
        scales = (size_t)placed_blocks(host) * (host->absmax_u8 ? 1 : sizeof(float));
    return code_bytes(host) + scales;
}

/* Codes, then scales, those of tiles in the order that cuda.h describes. */
static gn_status place(gn_ctx *, gn_matrix *out, const gn_matrix *host, void *memory) {
    uint8_t *codes = (uint8_t *)memory, *scales = codes + code_bytes(host);
    *out = *host;
    out->data = codes;
    if (!gn_cuda_is_tiled(host)) {
        const gn_quant_sizes sizes =
            gn_quant_sizes_of(host->qtype, host->absmax_u8 != NULL, host->rows, host->cols);
        memcpy(codes, host->data, host->qtype == GN_Q_NONE ? gn_matrix_bytes(host) : sizes.data);
        if (host->absmax_u8)
            memcpy(scales, host->absmax_u8, sizes.absmax_u8);
        else if (host->absmax)
            memcpy(scales, host->absmax, sizes.absmax);
    }
    const int64_t blocks = host->cols / GN_BLOCK, bytes = GN_BLOCK / 2;
    for (int64_t i = 0; gn_cuda_is_tiled(host) && i < host->rows * blocks; i++) {
        const int64_t row = i / blocks;
        const int64_t to = (row / GN_CUDA_TILE_ROWS * blocks + i % blocks) * GN_CUDA_TILE_ROWS +
                           row % GN_CUDA_TILE_ROWS;
        memcpy(codes + to * bytes, (const uint8_t *)host->data + i * bytes, (size_t)bytes);
        if (host->absmax_u8)
            scales[to] = host->absmax_u8[i];
        else
            ((float *)scales)[to] = host->absmax[i];
    }
    if (host->absmax_u8)
        out->absmax_u8 = scales;
    else if (host->absmax)
        out->absmax = (float *)scales;
    return GN_OK;
}

gn_status gn_cuda_upload(gn_ctx *, void *dst, const void *src, size_t bytes) {
    memcpy(dst, src, bytes);
    return GN_OK;
}

/* Few rows take other ways on a GPU, which are not emulated. */
static gn_status linear(gn_ctx *ctx, const gn_linear_args *args) {
    return ctx->compute == GN_F32 ? gn_cuda_linear_exact(ctx, args)
                                  : gn_cuda_linear_dense(ctx, args);
}

extern "C" {
size_t gn_cuda_linear_mma_workspace(const gn_ctx *, int64_t, int64_t, int64_t, int64_t, int) {
    return 0;
}
size_t gn_cuda_linear_decode_workspace(int64_t, int) {
    return 0;
}
}

static size_t linear_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                               int64_t max_rank, int max_terms) {
    return ctx->compute == GN_F32
               ? gn_cuda_linear_exact_workspace(rows, max_k, max_n, max_rank, max_terms)
               : gn_cuda_linear_dense_workspace(ctx, rows, max_k, max_n, max_rank, max_terms);
}

static void close(gn_ctx *ctx) {
    delete staged_of(ctx);
}

gn_status gn_cuda_open(gn_ctx *ctx, int index, bool auto_compute, gn_error *err) {
    if (index != 0) return gn_fail(err, GN_EDEVICE, "only one device is emulated");
    if (auto_compute) ctx->compute = GN_BF16;
    staged *s = new staged();
    s->counters.resize(GN_CUDA_COUNTERS);
    s->cuda.sms = emulator::RESIDENT_BLOCKS;
    s->cuda.shared_limit = emulator::SHARED_LIMIT;
    s->cuda.counters = s->counters.data();
    s->table = gn_cpu_backend;
    s->table.rope_table = gn_cuda_rope_table;
    s->table.rope_store = gn_cuda_rope_store;
    s->table.attention = gn_cuda_attention;
    s->table.attention_workspace = gn_cuda_attention_workspace;
    s->table.embed = gn_cuda_embed;
    s->table.embed_bwd = gn_cuda_embed_bwd;
    s->table.rmsnorm = gn_cuda_rmsnorm;
    s->table.rmsnorm_bwd = gn_cuda_rmsnorm_bwd;
    s->table.linear = linear;
    s->table.linear_workspace = linear_workspace;
    s->table.linear_bwd = gn_cuda_linear_bwd;
    s->table.linear_bwd_workspace = gn_cuda_linear_bwd_workspace;
    s->table.convert = gn_cuda_convert;
    s->table.swiglu = gn_cuda_swiglu;
    s->table.swiglu_bwd = gn_cuda_swiglu_bwd;
    s->table.rope = gn_cuda_rope;
    s->table.rope_bwd = gn_cuda_rope_bwd;
    s->table.cross_entropy = gn_cuda_cross_entropy;
    s->table.cross_entropy_workspace = gn_cuda_cross_entropy_workspace;
    s->table.attention_train = gn_cuda_attention_train;
    s->table.attention_bwd = gn_cuda_attention_bwd;
    s->table.attention_train_workspace = gn_cuda_attention_train_workspace;
    s->table.stage = stage;
    s->table.place_bytes = place_bytes;
    s->table.place = place;
    s->table.close = close;
    ctx->backend = &s->table;
    ctx->cuda = &s->cuda;
    return GN_OK;
}

gn_status gn_cuda_status(cudaError_t error) {
    return error == cudaSuccess ? GN_OK : GN_EDEVICE;
}
