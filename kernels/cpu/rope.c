/* rope.c - rotary positions, the keys' and values' way into the paged cache, and the way back. */
#include "cpu.h"

#include <math.h>

gn_status gn_cpu_rope_table(gn_ctx *ctx, gn_tensor *cos, gn_tensor *sin, const gn_tensor *inv_freq,
                            const gn_seqs *seqs) {
    (void)ctx;
    const float *freq = inv_freq->data;
    for (int32_t i = 0; i < seqs->n; i++)
        for (int32_t t = seqs->row0[i]; t < seqs->row0[i + 1]; t++) {
            const float position = (float)(seqs->pos0[i] + (t - seqs->row0[i]));
            float *c = gn_cpu_row(cos, t), *s = gn_cpu_row(sin, t);
            for (int64_t j = 0; j < inv_freq->shape[0]; j++) {
                const float angle = position * freq[j];
                c[j] = cosf(angle);
                s[j] = sinf(angle);
            }
        }
    return GN_OK;
}

struct rope {
    const gn_tensor *q, *k, *v, *cos, *sin;
    const gn_seqs *seqs;
    const gn_kv *kv;
};

static void rotate(float *y, const float *x, const float *c, const float *s, int64_t half) {
    for (int64_t j = 0; j < half; j++) {
        const float a = x[j], b = x[j + half];
        y[j] = a * c[j] - b * s[j];
        y[j + half] = b * c[j] + a * s[j];
    }
}

/* Codes of D values; returns what they are to be multiplied by. */
static float store_f8(uint8_t *codes, const float *x, int64_t D) {
    float top = 0;
    for (int64_t i = 0; i < D; i++) top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
    const float over_scale = top < GN_KV_LEAST ? 0 : GN_F8_MAX / top;
    for (int64_t i = 0; i < D; i++) codes[i] = gn_f32_to_f8(x[i] * over_scale);
    return top < GN_KV_LEAST ? 0 : top / GN_F8_MAX;
}

/* To where a head's row at `position` of sequence `seq` lies in one of the cache's tensors. */
static void store_row(const gn_tensor *cache, const gn_tensor *scales, const gn_seqs *seqs,
                      int32_t seq, int32_t position, int64_t head, const float *x) {
    const int64_t tokens = cache->shape[2], D = cache->shape[3];
    const int64_t block = seqs->blocks[(int64_t)seq * seqs->max_blocks + position / tokens];
    const int64_t row = head * tokens + position % tokens, at = block * cache->ld + row * D;
    void *to = (char *)cache->data + (size_t)at * gn_dtype_size(cache->dtype);
    if (cache->dtype == GN_F8)
        ((float *)scales->data)[block * scales->ld + row] = store_f8(to, x, D);
    else
        gn_narrow(to, cache->dtype, x, D);
}

static void rope_row(const struct rope *op, int64_t t, int32_t seq) {
    const int64_t heads = op->q->shape[1], kv_heads = op->k->shape[1], D = op->q->shape[2];
    const int32_t position = op->seqs->pos0[seq] + ((int32_t)t - op->seqs->row0[seq]);
    const float *c = gn_cpu_row(op->cos, t), *s = gn_cpu_row(op->sin, t);
    float *q = gn_cpu_row(op->q, t);
    const float *k = gn_cpu_row(op->k, t), *v = gn_cpu_row(op->v, t);
    float rotated[GN_MAX_HEAD_DIM];

    for (int64_t h = 0; h < heads; h++) rotate(q + h * D, q + h * D, c, s, D / 2);
    for (int64_t h = 0; h < kv_heads; h++) {
        rotate(rotated, k + h * D, c, s, D / 2);
        store_row(&op->kv->k, &op->kv->k_scales, op->seqs, seq, position, h, rotated);
        store_row(&op->kv->v, &op->kv->v_scales, op->seqs, seq, position, h, v + h * D);
    }
}

static void rope_rows(void *arg, const gn_cpu_team *team) {
    const struct rope *op = arg;
    const int64_t T = op->q->shape[0];
    const int64_t last = gn_cpu_share(T, team->thread + 1, team->n_threads);
    int32_t seq = 0;
    for (int64_t t = gn_cpu_share(T, team->thread, team->n_threads); t < last; t++) {
        seq = gn_cpu_seq_of_row(op->seqs, seq, t);
        rope_row(op, t, seq);
    }
}

gn_status gn_cpu_rope_store(gn_ctx *ctx, gn_tensor *q, const gn_tensor *k, const gn_tensor *v,
                            const gn_tensor *cos, const gn_tensor *sin, const gn_seqs *seqs,
                            gn_kv *kv) {
    struct rope op = {q, k, v, cos, sin, seqs, kv};
    gn_cpu_parallel(ctx->pool, gn_tensor_numel(q) < GN_CPU_SERIAL, rope_rows, &op);
    return GN_OK;
}

/* Rotates x's rows in place by their angles, or by the negatives. */
struct turn {
    const gn_tensor *x, *cos, *sin;
    float sign;
};

static void turn_rows(void *arg, const gn_cpu_team *team) {
    const struct turn *op = arg;
    const int64_t T = op->x->shape[0], heads = op->x->shape[1], D = op->x->shape[2];
    const int64_t last = gn_cpu_share(T, team->thread + 1, team->n_threads);
    for (int64_t t = gn_cpu_share(T, team->thread, team->n_threads); t < last; t++) {
        const float *c = gn_cpu_row(op->cos, t), *sines = gn_cpu_row(op->sin, t);
        float s[GN_MAX_HEAD_DIM / 2];
        for (int64_t j = 0; j < D / 2; j++) s[j] = op->sign * sines[j];
        float *x = gn_cpu_row(op->x, t);
        for (int64_t h = 0; h < heads; h++) rotate(x + h * D, x + h * D, c, s, D / 2);
    }
}

static gn_status turn(gn_ctx *ctx, const gn_tensor *x, const gn_tensor *cos, const gn_tensor *sin,
                      float sign) {
    struct turn op = {x, cos, sin, sign};
    gn_cpu_parallel(ctx->pool, gn_tensor_numel(x) < GN_CPU_SERIAL, turn_rows, &op);
    return GN_OK;
}

gn_status gn_cpu_rope(gn_ctx *ctx, gn_tensor *x, const gn_tensor *cos, const gn_tensor *sin) {
    return turn(ctx, x, cos, sin, 1);
}

gn_status gn_cpu_rope_bwd(gn_ctx *ctx, gn_tensor *dx, const gn_tensor *cos, const gn_tensor *sin) {
    return turn(ctx, dx, cos, sin, -1);
}
