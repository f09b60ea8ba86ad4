/* device.cc - the device "cuda" of programs that are linked with this instead of backend.cu: its
 * kernels are emulated, its memory is the CPU's. Ops that are not emulated are the CPU's own, which
 * do not read weights in tiles. A test that needs another number of multiprocessors writes it
 * into ctx->cuda. */
#include "tests/emulated/emulator.h"

#include <vector>

/* What gn_cuda_batch points to. */
struct staged {
    struct gn_cuda cuda;
    gn_backend table;
    std::vector<int32_t> row_seq, row_pos, row0, pos0, blocks;
    std::vector<gn_lora> terms;
    std::vector<uint32_t> counters;
};

static staged *staged_of(gn_ctx *ctx) {
    return (staged *)ctx->cuda;
}

static gn_status stage(gn_ctx *ctx, const int32_t *, const gn_seqs *seqs, const gn_lora *terms,
                       int32_t n_terms) {
    staged *s = staged_of(ctx);
    s->row_seq.clear();
    s->row_pos.clear();
    for (int32_t i = 0; i < seqs->n; i++)
        for (int32_t row = seqs->row0[i]; row < seqs->row0[i + 1]; row++) {
            s->row_seq.push_back(i);
            s->row_pos.push_back(seqs->pos0[i] + row - seqs->row0[i]);
        }
    s->row0.assign(seqs->row0, seqs->row0 + seqs->n + 1);
    s->pos0.assign(seqs->pos0, seqs->pos0 + seqs->n);
    s->blocks.assign(seqs->blocks, seqs->blocks + (int64_t)seqs->n * seqs->max_blocks);
    s->terms.assign(terms, terms + n_terms);
    gn_cuda_batch *batch = &s->cuda.batch;
    batch->row_seq = s->row_seq.data();
    batch->row_pos = s->row_pos.data();
    batch->row0 = s->row0.data();
    batch->pos0 = s->pos0.data();
    batch->blocks = s->blocks.data();
    batch->terms = s->terms.data();
    return GN_OK;
}

static size_t place_bytes(const gn_ctx *, const gn_matrix *host) {
    const gn_quant_sizes sizes =
        gn_quant_sizes_of(host->qtype, host->absmax_u8 != NULL, host->rows, host->cols);
    return sizes.data + (host->absmax_u8 ? sizes.absmax_u8 : sizes.absmax);
}

/* Whole tiles only; codes, then scales, in the order that cuda.h describes. */
static gn_status place(gn_ctx *, gn_matrix *out, const gn_matrix *host, void *memory) {
    if (!gn_cuda_is_tiled(host) || host->rows % GN_CUDA_TILE_ROWS != 0) return GN_EUNSUPPORTED;
    const int64_t blocks = host->cols / GN_BLOCK, code_bytes = GN_BLOCK / 2;
    uint8_t *codes = (uint8_t *)memory, *scales = codes + host->rows * blocks * code_bytes;
    for (int64_t i = 0; i < host->rows * blocks; i++) {
        const int64_t row = i / blocks;
        const int64_t to = (row / GN_CUDA_TILE_ROWS * blocks + i % blocks) * GN_CUDA_TILE_ROWS +
                           row % GN_CUDA_TILE_ROWS;
        memcpy(codes + to * code_bytes, (const uint8_t *)host->data + i * code_bytes,
               (size_t)code_bytes);
        if (host->absmax_u8)
            scales[to] = host->absmax_u8[i];
        else
            ((float *)scales)[to] = host->absmax[i];
    }
    *out = *host;
    out->data = codes;
    if (host->absmax_u8)
        out->absmax_u8 = scales;
    else
        out->absmax = (float *)scales;
    return GN_OK;
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
