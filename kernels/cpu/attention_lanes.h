/* attention_lanes.h - causal attention of one item.
 *
 * Compiled once per instruction set, as the function ATTENTION_NAME in vectors of
 * ATTENTION_LANES floats, with ATTENTION_FMA(v, f, sum) for v * f + sum.
 *
 * Three steps: scores of every position, softmax, weighted sum of the values. The cache is read
 * twice, a vector's worth of positions at a time, widened to float32 once for all queries of
 * the item (the heads of a GQA group, and several rows of a prefill). Keys are turned, so that a
 * lane is a position and scores need no sums across lanes. A query never looks past its own
 * position, not even to multiply by zero: what lies there is not initialised.
 *
 * Order: a score sums dimensions in order; the softmax sums position p in lane p % LANES, then
 * the lanes in order; an output sums positions in order. */
#include "attention.h"
#include "exp.h"

#include <math.h>
#include <string.h>

enum { LANES = ATTENTION_LANES, MAX_GROUPS = GN_MAX_HEAD_DIM / LANES, ABREAST = 4 };

typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t word_lanes __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t half_lanes __attribute__((vector_size(LANES * sizeof(uint16_t))));
typedef uint8_t byte_lanes __attribute__((vector_size(LANES)));
typedef float four __attribute__((vector_size(4 * sizeof(float))));

/* A query, an output, a key or a value: groups of LANES dimensions, padded with zeros. */
typedef struct {
    lanes v[MAX_GROUPS];
} row;

/* Keys of LANES positions, by dimension. */
typedef struct {
    lanes v[GN_MAX_HEAD_DIM];
} turned;

static int groups_of(const gn_attention_item *item) {
    return (int)(gn_cpu_round_up(item->q->shape[2], LANES) / LANES);
}

/* As gn_f8_to_f32. */
static lanes widen_codes(const char *src) {
    byte_lanes codes;
    lanes v;
    memcpy(&codes, src, sizeof codes);
    const word_lanes wide = __builtin_convertvector(codes, word_lanes);
    const word_lanes bits = (wide & 0x80) << 24 | (wide & 0x7f) << 20;
    memcpy(&v, &bits, sizeof v);
    return v * 0x1p120f;
}

/* dst = D floats, bfloat16s or codes, widened. */
static void widen_row(row *dst, const char *src, gn_dtype dtype, int64_t D) {
    const int64_t whole = D / LANES;
    for (int64_t g = 0; g < whole; g++) {
        if (dtype == GN_F32) {
            memcpy(&dst->v[g], src + g * (int64_t)sizeof(lanes), sizeof(lanes));
        } else if (dtype == GN_F8) {
            dst->v[g] = widen_codes(src + g * LANES);
        } else {
            half_lanes h;
            memcpy(&h, src + g * (int64_t)sizeof h, sizeof h);
            const word_lanes bits = __builtin_convertvector(h, word_lanes) << 16;
            memcpy(&dst->v[g], &bits, sizeof bits);
        }
    }
    if (D % LANES) {
        float tail[LANES] = {0};
        gn_widen(tail, src + (size_t)(whole * LANES) * gn_dtype_size(dtype), dtype, D % LANES);
        memcpy(&dst->v[whole], tail, sizeof tail);
    }
}

/* Positions [p0, p0+n) of the item's kv head; zeros for the rest. */
static void load_positions(row out[LANES], const gn_attention_item *item, const gn_tensor *cache,
                           const gn_tensor *scales, int64_t p0, int n) {
    const int64_t tokens = cache->shape[2], D = cache->shape[3];
    for (int i = 0; i < n; i++) {
        const int64_t p = p0 + i, block = item->blocks[p / tokens];
        const int64_t in_block = item->kv_head * tokens + p % tokens;
        const int64_t at = block * cache->ld + in_block * D;
        widen_row(&out[i], (const char *)cache->data + (size_t)at * gn_dtype_size(cache->dtype),
                  cache->dtype, D);
        if (cache->dtype != GN_F8) continue;
        const float scale = ((const float *)scales->data)[block * scales->ld + in_block];
        for (int g = 0; g < groups_of(item); g++) out[i].v[g] *= scale;
    }
    for (int i = n; i < LANES; i++) memset(&out[i], 0, sizeof(lanes) * (size_t)groups_of(item));
}

/* to[d] lane i = from[i] dimension d, in squares of 4. */
static void turn(turned *to, const row from[LANES], int groups) {
    for (int i = 0; i < LANES; i += 4)
        for (int d = 0; d < groups * LANES; d += 4) {
            four a[4], b[4];
            for (int r = 0; r < 4; r++) memcpy(&a[r], (const float *)&from[i + r] + d, sizeof a[r]);
            b[0] = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5);
            b[1] = __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7);
            b[2] = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5);
            b[3] = __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
            a[0] = __builtin_shufflevector(b[0], b[2], 0, 1, 4, 5);
            a[1] = __builtin_shufflevector(b[0], b[2], 2, 3, 6, 7);
            a[2] = __builtin_shufflevector(b[1], b[3], 0, 1, 4, 5);
            a[3] = __builtin_shufflevector(b[1], b[3], 2, 3, 6, 7);
            for (int r = 0; r < 4; r++) memcpy((float *)&to->v[d + r] + i, &a[r], sizeof a[r]);
        }
}

/* How many of the LANES positions from p0 query i may see. */
static inline int visible(const gn_attention_item *item, int i, int64_t p0) {
    const int64_t n = item->position0 + i / item->n_heads + 1 - p0;
    return n < 0 ? 0 : n < LANES ? (int)n : LANES;
}

static void score_positions(const gn_attention_item *item, const row *queries, const turned *keys,
                            int64_t p0) {
    const int64_t D = item->q->shape[2];
    const int n_queries = item->n_rows * item->n_heads;
    const float scale = (float)(1.0 / sqrt((double)D));
    for (int i = 0; i < n_queries; i += ABREAST) {
        lanes sums[ABREAST] = {0};
        const float *q[ABREAST];
        for (int c = 0; c < ABREAST; c++) /* past the end the last one again, for nothing */
            q[c] = (const float *)&queries[i + c < n_queries ? i + c : n_queries - 1];
        for (int64_t d = 0; d < D; d++)
            for (int c = 0; c < ABREAST; c++) sums[c] = ATTENTION_FMA(keys->v[d], q[c][d], sums[c]);
        for (int c = 0; c < ABREAST && i + c < n_queries; c++) {
            const int n = visible(item, i + c, p0);
            if (n == 0) continue;
            float *scores = item->scores + (i + c) * item->score_stride + p0;
            sums[c] *= scale;
            memcpy(scores, &sums[c], sizeof sums[c]);
            for (int j = n; j < LANES; j++) scores[j] = -INFINITY;
        }
    }
}

/* Replaces n scores, padded with -infinity to whole groups, by their exponentials and returns
 * one over their sum. */
static float softmax(float *scores, int64_t n) {
    float top[LANES], sum[LANES] = {0};
    for (int j = 0; j < LANES; j++) top[j] = -INFINITY;
    for (int64_t i = 0; i < n; i += LANES)
        for (int j = 0; j < LANES; j++)
            top[j] = gn_exp_choose(scores[i + j] > top[j], scores[i + j], top[j]);
    for (int j = 1; j < LANES; j++) top[0] = top[j] > top[0] ? top[j] : top[0];
    for (int64_t i = 0; i < n; i += LANES)
        for (int j = 0; j < LANES; j++) {
            scores[i + j] = gn_exp(scores[i + j] - top[0]);
            sum[j] += scores[i + j];
        }
    float total = 0;
    for (int j = 0; j < LANES; j++) total += sum[j];
    return 1.0f / total;
}

/* `n_groups` groups of one output, which stay in registers. */
static inline __attribute__((always_inline)) void
add_groups(row *output, const row *values, const float *p, int n, int group, int n_groups) {
    lanes sums[ABREAST];
    for (int c = 0; c < n_groups; c++) sums[c] = output->v[group + c];
    for (int j = 0; j < n; j++)
        for (int c = 0; c < n_groups; c++)
            sums[c] = ATTENTION_FMA(values[j].v[group + c], p[j], sums[c]);
    for (int c = 0; c < n_groups; c++) output->v[group + c] = sums[c];
}

static void add_values(const gn_attention_item *item, row *outputs, const row values[LANES],
                       int64_t p0) {
    const int groups = groups_of(item);
    for (int i = 0; i < item->n_rows * item->n_heads; i++) {
        const int n = visible(item, i, p0);
        const float *p = item->scores + i * item->score_stride + p0;
        int g = 0;
        for (; g + ABREAST <= groups; g += ABREAST)
            add_groups(&outputs[i], values, p, n, g, ABREAST);
        for (; g < groups; g++) add_groups(&outputs[i], values, p, n, g, 1);
    }
}

static float *head_of(const gn_tensor *t, const gn_attention_item *item, int i) {
    const int64_t head = item->head0 + i % item->n_heads;
    return gn_cpu_row(t, item->row0 + i / item->n_heads) + head * t->shape[2];
}

void ATTENTION_NAME(const gn_attention_item *item) {
    const int64_t D = item->q->shape[2], end = item->position0 + item->n_rows;
    const int n_queries = item->n_rows * item->n_heads, groups = groups_of(item);
    row queries[GN_ATTENTION_QUERIES], outputs[GN_ATTENTION_QUERIES], cached[LANES];
    turned keys;
    float over_sum[GN_ATTENTION_QUERIES];

    for (int i = 0; i < n_queries; i++) {
        widen_row(&queries[i], (const char *)head_of(item->q, item, i), GN_F32, D);
        memset(&outputs[i], 0, sizeof outputs[i]);
    }
    for (int64_t p0 = 0; p0 < end; p0 += LANES) {
        load_positions(cached, item, &item->kv->k, &item->kv->k_scales, p0,
                       end - p0 < LANES ? (int)(end - p0) : LANES);
        turn(&keys, cached, groups);
        score_positions(item, queries, &keys, p0);
    }
    for (int i = 0; i < n_queries; i++)
        over_sum[i] =
            softmax(item->scores + i * item->score_stride, item->position0 + i / item->n_heads + 1);
    for (int64_t p0 = 0; p0 < end; p0 += LANES) {
        load_positions(cached, item, &item->kv->v, &item->kv->v_scales, p0,
                       end - p0 < LANES ? (int)(end - p0) : LANES);
        add_values(item, outputs, cached, p0);
    }
    for (int i = 0; i < n_queries; i++) {
        for (int g = 0; g < groups; g++) outputs[i].v[g] *= over_sum[i];
        memcpy(head_of(item->y, item, i), &outputs[i], (size_t)D * sizeof(float));
    }
}
