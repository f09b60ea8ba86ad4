/* attention.c - causal attention over the paged cache: cuts a batch into items and gives each
 * to a thread. attention_lanes.h computes one; this file is also its plain build. */
#define ATTENTION_NAME           gn_attention_plain
#define ATTENTION_LANES          4
#define ATTENTION_FMA(v, f, sum) ((v) * (f) + (sum))
#include "attention_lanes.h"

#include <stdatomic.h>

struct attention {
    gn_tensor *y;
    const gn_tensor *q;
    const gn_kv *kv;
    const gn_seqs *seqs;
    gn_attention_fn *compute;
    int heads_per_item, rows_per_item; /* of one GQA group; of one sequence */
    float *scores;
    int64_t score_stride;
    atomic_llong next; /* item; whichever thread is free takes it */
};

static gn_attention_fn *kernel_of(gn_isa isa) {
#if defined(__x86_64__)
    if (isa >= GN_ISA_AVX512) return gn_attention_avx512;
    if (isa >= GN_ISA_AVX2) return gn_attention_avx2;
#endif
    (void)isa;
    return gn_attention_plain;
}

static int64_t divide_up(int64_t n, int64_t by) {
    return (n + by - 1) / by;
}

/* Items of a sequence are numbered row tile by row tile, each tile head by head. */
static void run_sequence(struct attention *op, int32_t seq, int64_t first_item, int64_t *mine,
                         float *scores) {
    const gn_seqs *seqs = op->seqs;
    const int64_t heads = op->q->shape[1], kv_heads = op->kv->k.shape[1], group = heads / kv_heads;
    const int64_t rows = seqs->row0[seq + 1] - seqs->row0[seq];
    const int64_t pieces = divide_up(group, op->heads_per_item); /* of one group */
    const int64_t end = first_item + divide_up(rows, op->rows_per_item) * kv_heads * pieces;
    for (; *mine < end; *mine = atomic_fetch_add(&op->next, 1)) {
        const int64_t i = *mine - first_item, head_piece = i % (kv_heads * pieces);
        const int64_t row = i / (kv_heads * pieces) * op->rows_per_item;
        const int64_t in_group = head_piece % pieces * op->heads_per_item;
        const int64_t rows_left = rows - row, heads_left = group - in_group;
        op->compute(&(gn_attention_item){
            .y = op->y,
            .q = op->q,
            .kv = op->kv,
            .blocks = seqs->blocks + (int64_t)seq * seqs->max_blocks,
            .row0 = seqs->row0[seq] + row,
            .kv_head = head_piece / pieces,
            .head0 = head_piece / pieces * group + in_group,
            .position0 = (int32_t)(seqs->pos0[seq] + row),
            .n_rows = (int)(rows_left < op->rows_per_item ? rows_left : op->rows_per_item),
            .n_heads = (int)(heads_left < op->heads_per_item ? heads_left : op->heads_per_item),
            .scores = scores,
            .score_stride = op->score_stride,
        });
    }
}

static int64_t items_of(const struct attention *op, int32_t seq) {
    const int64_t kv_heads = op->kv->k.shape[1], group = op->q->shape[1] / kv_heads;
    const int64_t rows = op->seqs->row0[seq + 1] - op->seqs->row0[seq];
    return divide_up(rows, op->rows_per_item) * kv_heads * divide_up(group, op->heads_per_item);
}

static void run_items(void *arg, const gn_cpu_team *team) {
    struct attention *op = arg;
    float *scores = op->scores + team->thread * GN_ATTENTION_QUERIES * op->score_stride;
    int64_t mine = atomic_fetch_add(&op->next, 1), first = 0;
    for (int32_t seq = 0; seq < op->seqs->n; seq++) {
        run_sequence(op, seq, first, &mine, scores);
        first += items_of(op, seq);
    }
}

size_t gn_cpu_attention_workspace(const gn_ctx *ctx, int64_t context) {
    const int64_t stride = gn_cpu_round_up(context, GN_ATTENTION_LANES);
    return (size_t)ctx->threads * GN_ATTENTION_QUERIES * (size_t)stride * sizeof(float);
}

gn_status gn_cpu_attention(gn_ctx *ctx, gn_tensor *y, const gn_tensor *q, const gn_kv *kv,
                           const gn_seqs *seqs) {
    int64_t context = 0, work = 0;
    for (int32_t i = 0; i < seqs->n; i++) {
        const int64_t rows = seqs->row0[i + 1] - seqs->row0[i], end = seqs->pos0[i] + rows;
        if (rows > 0 && end > context) context = end;
        work += rows * end * q->shape[1] * q->shape[2];
    }
    if (gn_cpu_attention_workspace(ctx, context) > ctx->workspace_bytes) return GN_ENOMEM;

    const int64_t group = q->shape[1] / kv->k.shape[1];
    const int heads_per_item = (int)(group < GN_ATTENTION_QUERIES ? group : GN_ATTENTION_QUERIES);
    struct attention op = {
        .y = y,
        .q = q,
        .kv = kv,
        .seqs = seqs,
        .compute = kernel_of(ctx->isa),
        .heads_per_item = heads_per_item,
        .rows_per_item = GN_ATTENTION_QUERIES / heads_per_item,
        .scores = ctx->workspace,
        .score_stride = gn_cpu_round_up(context, GN_ATTENTION_LANES),
    };
    gn_cpu_parallel(ctx->pool, work < GN_CPU_SERIAL, run_items, &op);
    return GN_OK;
}
