/* attention_lanes.h - causal attention of one item, in vectors of 16 floats.
 *
 * Compiled once per instruction set, as the function ATTENTION_NAME. The vectors are the
 * compiler's own, cut to what the instruction set has, and nothing is contracted to fma, so
 * every build gives the same bits.
 *
 * Three steps: scores of every position, softmax, weighted sum of the values. The cache is
 * read twice, 16 positions at a time, widened to float32 once for all queries of the item
 * (the heads of a GQA group, and several rows of a prefill). A query never looks past its own
 * position, not even to multiply by zero: what lies there is not initialised.
 *
 * Order: a score sums dimension d in lane d % 16, then the lanes in a tree; the softmax sums
 * position p in lane p % 16, then the lanes in order; an output sums positions in order. */
#include "attention.h"
#include "exp.h"

#include <math.h>
#include <string.h>

enum { LANES = GN_ATTENTION_LANES, MAX_GROUPS = GN_MAX_HEAD_DIM / LANES };

typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t word_lanes __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t half_lanes __attribute__((vector_size(LANES * sizeof(uint16_t))));

/* Keys or values of up to 16 positions, and the item's queries or outputs: float32, padded with
 * zeros to whole groups of 16 dimensions. */
typedef struct {
    lanes v[LANES][MAX_GROUPS];
} tile;

/* dst[0..groups) = D floats or bfloat16s, widened. */
static void widen_row(lanes *dst, const char *src, gn_dtype dtype, int64_t D) {
    const int64_t whole = D / LANES;
    for (int64_t g = 0; g < whole; g++) {
        if (dtype == GN_F32) {
            memcpy(&dst[g], src + g * sizeof(lanes), sizeof(lanes));
        } else {
            half_lanes h;
            memcpy(&h, src + g * sizeof h, sizeof h);
            const word_lanes bits = __builtin_convertvector(h, word_lanes) << 16;
            memcpy(&dst[g], &bits, sizeof bits);
        }
    }
    if (D % LANES) {
        float tail[LANES] = {0};
        gn_widen(tail, src + (size_t)(whole * LANES) * gn_dtype_size(dtype), dtype, D % LANES);
        memcpy(&dst[whole], tail, sizeof tail);
    }
}

/* Positions [p0, p0+n) of the item's kv head. */
static void load_positions(tile *out, const gn_attention_item *item, const gn_tensor *cache,
                           int64_t p0, int n) {
    const int64_t tokens = cache->shape[2], D = cache->shape[3];
    for (int i = 0; i < n; i++) {
        const int64_t p = p0 + i;
        const int64_t at =
            item->blocks[p / tokens] * cache->ld + (item->kv_head * tokens + p % tokens) * D;
        widen_row(out->v[i], (const char *)cache->data + (size_t)at * gn_dtype_size(cache->dtype),
                  cache->dtype, D);
    }
}

/* out[i] = the sum of a[i]'s 16 lanes, in the same tree for every i; a is used up. Each level
 * halves the vectors and folds lane l of an input onto lane l + 8, 4, 2, 1. */
static inline void sum_lanes(lanes *out, lanes a[LANES]) {
#define FOLD(dst, x, y, ...) dst = __builtin_shufflevector(x, y, __VA_ARGS__)
    for (int i = 0; i < 8; i++) {
        lanes low, high;
        FOLD(low, a[i], a[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        FOLD(high, a[i], a[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        a[i] = low + high;
    }
    for (int i = 0; i < 4; i++) {
        lanes low, high;
        FOLD(low, a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        FOLD(high, a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
        a[i] = low + high;
    }
    for (int i = 0; i < 2; i++) {
        lanes low, high;
        FOLD(low, a[i], a[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        FOLD(high, a[i], a[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        a[i] = low + high;
    }
    lanes low, high;
    FOLD(low, a[0], a[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    FOLD(high, a[0], a[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#undef FOLD
    *out = low + high;
}

/* How many of the 16 positions from p0 the row may see. */
static inline int visible(const gn_attention_item *item, int row, int64_t p0) {
    const int64_t n = item->position0 + row + 1 - p0;
    return n < 0 ? 0 : n < LANES ? (int)n : LANES;
}

static void score_positions(const gn_attention_item *item, const tile *queries, const tile *keys,
                            int64_t p0) {
    const int64_t D = item->q->shape[2];
    const int groups = (int)(gn_cpu_round_up(D, LANES) / LANES);
    const float scale = (float)(1.0 / sqrt((double)D));
    for (int i = 0; i < item->n_rows * item->n_heads; i++) {
        const int n = visible(item, i / item->n_heads, p0);
        if (n == 0) continue;
        lanes dot[LANES] = {0}, sums;
        for (int j = 0; j < n; j++)
            for (int g = 0; g < groups; g++) dot[j] += queries->v[i][g] * keys->v[j][g];
        sum_lanes(&sums, dot);
        sums *= scale;
        float *scores = item->scores + i * item->score_stride + p0;
        memcpy(scores, &sums, sizeof sums);
        for (int j = n; j < LANES; j++) scores[j] = -INFINITY;
    }
}

/* Replaces n scores, padded with -infinity to whole groups, by their exponentials and returns
 * one over their sum. */
static float softmax(float *scores, int64_t n) {
    float top = scores[0];
    for (int64_t i = 1; i < n; i++) top = scores[i] > top ? scores[i] : top;
    float sum[LANES] = {0};
    for (int64_t i = 0; i < n; i += LANES)
        for (int j = 0; j < LANES; j++) {
            scores[i + j] = gn_exp(scores[i + j] - top);
            sum[j] += scores[i + j];
        }
    float total = 0;
    for (int j = 0; j < LANES; j++) total += sum[j];
    return 1.0f / total;
}

static void add_values(const gn_attention_item *item, tile *outputs, const tile *values,
                       int64_t p0) {
    const int groups = (int)(gn_cpu_round_up(item->q->shape[2], LANES) / LANES);
    for (int i = 0; i < item->n_rows * item->n_heads; i++) {
        const int n = visible(item, i / item->n_heads, p0);
        const float *p = item->scores + i * item->score_stride + p0;
        for (int g = 0; g < groups; g++) {
            lanes sum = outputs->v[i][g];
            for (int j = 0; j < n; j++) sum += p[j] * values->v[j][g];
            outputs->v[i][g] = sum;
        }
    }
}

void ATTENTION_NAME(const gn_attention_item *item) {
    const int64_t D = item->q->shape[2], end = item->position0 + item->n_rows;
    const int n_queries = item->n_rows * item->n_heads;
    tile queries, cached, outputs;

    for (int i = 0; i < n_queries; i++) {
        const int64_t row = item->row0 + i / item->n_heads, head = item->head0 + i % item->n_heads;
        widen_row(queries.v[i], (const char *)(gn_cpu_row(item->q, row) + head * D), GN_F32, D);
        memset(outputs.v[i], 0, sizeof outputs.v[i]);
    }
    for (int64_t p0 = 0; p0 < end; p0 += LANES) {
        load_positions(&cached, item, &item->kv->k, p0, end - p0 < LANES ? (int)(end - p0) : LANES);
        score_positions(item, &queries, &cached, p0);
    }
    float over_sum[GN_ATTENTION_QUERIES];
    for (int i = 0; i < n_queries; i++)
        over_sum[i] =
            softmax(item->scores + i * item->score_stride, item->position0 + i / item->n_heads + 1);
    for (int64_t p0 = 0; p0 < end; p0 += LANES) {
        load_positions(&cached, item, &item->kv->v, p0, end - p0 < LANES ? (int)(end - p0) : LANES);
        add_values(item, &outputs, &cached, p0);
    }
    for (int i = 0; i < n_queries; i++) {
        const int64_t row = item->row0 + i / item->n_heads, head = item->head0 + i % item->n_heads;
        for (int g = 0; g < MAX_GROUPS; g++) outputs.v[i][g] *= over_sum[i];
        memcpy(gn_cpu_row(item->y, row) + head * D, outputs.v[i], (size_t)D * sizeof(float));
    }
}
