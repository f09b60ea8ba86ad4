/* device.cc - the tables and tiles of an emulated device. */
#include "tests/emulated/device.h"

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
    s->cuda.batch = {NULL,           s->row_seq.data(), s->row_pos.data(), s->row0.data(),
                     s->pos0.data(), s->terms.data(),   s->blocks.data()};
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
    gn_cpu_backend.close(ctx);
}

gn_ctx *emulated_open(int sms) {
    gn_ctx *ctx = NULL;
    gn_error err;
    gn_ctx_options options = {};
    options.device = "cpu";
    options.compute = GN_BF16;
    options.threads = 1;
    if (gn_ctx_open(&ctx, &options, &err)) return NULL;
    staged *s = new staged();
    s->counters.resize(GN_CUDA_COUNTERS);
    s->cuda.sms = sms;
    s->cuda.shared_limit = emulator::SHARED_LIMIT;
    s->cuda.counters = s->counters.data();
    s->table = gn_cpu_backend;
    s->table.stage = stage;
    s->table.place_bytes = place_bytes;
    s->table.place = place;
    s->table.close = close;
    ctx->backend = &s->table;
    ctx->cuda = &s->cuda;
    return ctx;
}
