/* stage.cu - hands a batch's ids, positions, blocks and LoRA terms to the device.
 *
 * All of it is one buffer, written on the host into pinned memory and copied at once. The copy is
 * asynchronous, so there are two such buffers in turn, each with an event that says when its copy
 * is done. Arrays stand at fixed offsets, the longest one last, so that only what is used of it
 * travels. */
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

enum { BUFFERS = 2 };

struct gn_cuda_stage {
    gn_stage_limits limits;
    char *device, *host[BUFFERS];
    cudaEvent_t copied[BUFFERS];
    size_t bytes;
    int next;
};

/* Adds a piece of n elements and returns where it begins. */
static size_t piece(size_t *total, int64_t n, size_t size) {
    const size_t at = *total;
    *total = (at + (size_t)n * size + 15) / 16 * 16;
    return at;
}

/* Points the batch's arrays into `memory`. */
static size_t lay_out(gn_cuda_batch *batch, char *memory, const gn_stage_limits *limits) {
    size_t total = 0;
    const size_t ids = piece(&total, limits->rows, sizeof *batch->ids);
    const size_t row_seq = piece(&total, limits->rows, sizeof *batch->row_seq);
    const size_t row_pos = piece(&total, limits->rows, sizeof *batch->row_pos);
    const size_t row0 = piece(&total, (int64_t)limits->seqs + 1, sizeof *batch->row0);
    const size_t pos0 = piece(&total, limits->seqs, sizeof *batch->pos0);
    const size_t terms = piece(&total, limits->terms, sizeof *batch->terms);
    const size_t blocks =
        piece(&total, (int64_t)limits->seqs * limits->max_blocks, sizeof *batch->blocks);
    batch->ids = (int32_t *)(memory + ids);
    batch->row_seq = (int32_t *)(memory + row_seq);
    batch->row_pos = (int32_t *)(memory + row_pos);
    batch->row0 = (int32_t *)(memory + row0);
    batch->pos0 = (int32_t *)(memory + pos0);
    batch->terms = (gn_lora *)(memory + terms);
    batch->blocks = (int32_t *)(memory + blocks);
    return total;
}

void gn_cuda_stage_close(struct gn_cuda *cuda) {
    struct gn_cuda_stage *stage = cuda->stage;
    if (!stage) return;
    for (int i = 0; i < BUFFERS; i++) {
        if (stage->copied[i]) (void)cudaEventDestroy(stage->copied[i]);
        (void)cudaFreeHost(stage->host[i]);
    }
    (void)cudaFree(stage->device);
    free(stage);
    cuda->stage = NULL;
}

gn_status gn_cuda_stage_reserve(gn_ctx *ctx, const gn_stage_limits *limits) {
    struct gn_cuda *cuda = ctx->cuda;
    (void)cudaStreamSynchronize(cuda->stream);
    gn_cuda_graphs_close(cuda); /* they know the old addresses */
    gn_cuda_stage_close(cuda);
    struct gn_cuda_stage *stage = (struct gn_cuda_stage *)calloc(1, sizeof *stage);
    if (!stage) return GN_ENOMEM;
    cuda->stage = stage;
    stage->limits = *limits;
    stage->bytes = lay_out(&cuda->batch, NULL, limits);
    gn_status status = gn_cuda_status(cudaMalloc((void **)&stage->device, stage->bytes));
    for (int i = 0; i < BUFFERS && !status; i++) {
        status = gn_cuda_status(cudaMallocHost((void **)&stage->host[i], stage->bytes));
        if (!status)
            status =
                gn_cuda_status(cudaEventCreateWithFlags(&stage->copied[i], cudaEventDisableTiming));
    }
    if (status)
        gn_cuda_stage_close(cuda);
    else
        lay_out(&cuda->batch, stage->device, limits);
    return status;
}

static void fill(gn_cuda_batch *to, const int32_t *ids, const gn_seqs *seqs, const gn_lora *terms,
                 int32_t n_terms) {
    const int32_t rows = seqs->row0[seqs->n];
    memcpy(to->ids, ids, (size_t)rows * sizeof *ids);
    memcpy(to->row0, seqs->row0, (size_t)(seqs->n + 1) * sizeof *to->row0);
    memcpy(to->pos0, seqs->pos0, (size_t)seqs->n * sizeof *to->pos0);
    memcpy(to->terms, terms, (size_t)n_terms * sizeof *terms);
    if (seqs->max_blocks > 0)
        memcpy(to->blocks, seqs->blocks,
               (size_t)seqs->n * (size_t)seqs->max_blocks * sizeof *to->blocks);
    for (int32_t i = 0; i < seqs->n; i++)
        for (int32_t row = seqs->row0[i]; row < seqs->row0[i + 1]; row++) {
            to->row_seq[row] = i;
            to->row_pos[row] = seqs->pos0[i] + row - seqs->row0[i];
        }
}

gn_status gn_cuda_stage(gn_ctx *ctx, const int32_t *ids, const gn_seqs *seqs, const gn_lora *terms,
                        int32_t n_terms) {
    struct gn_cuda_stage *stage = ctx->cuda->stage;
    if (!stage || seqs->row0[seqs->n] > stage->limits.rows || seqs->n > stage->limits.seqs ||
        seqs->max_blocks > stage->limits.max_blocks || n_terms > stage->limits.terms)
        return GN_EINVAL;
    const int i = stage->next;
    stage->next = (i + 1) % BUFFERS;
    gn_status status = gn_cuda_status(cudaEventSynchronize(stage->copied[i]));
    if (status) return status;
    gn_cuda_batch host;
    lay_out(&host, stage->host[i], &stage->limits);
    fill(&host, ids, seqs, terms, n_terms);
    const int32_t *end = host.blocks + (int64_t)seqs->n * seqs->max_blocks;
    status = gn_cuda_status(cudaMemcpyAsync(stage->device, stage->host[i],
                                            (size_t)((const char *)end - stage->host[i]),
                                            cudaMemcpyHostToDevice, ctx->cuda->stream));
    return status ? status : gn_cuda_status(cudaEventRecord(stage->copied[i], ctx->cuda->stream));
}
