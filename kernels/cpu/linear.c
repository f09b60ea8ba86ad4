/* linear.c - products with quantized weights: working memory, tiles, threads.
 *
 * A call has three steps, each split over the threads, with a barrier between:
 *   1. rows of x are normalised, rounded to the compute dtype and laid out as operands;
 *   2. u = scale * A x for every LoRA term, on the rows it covers;
 *   3. weight rows, 16 at a time: a few tokens multiply them as they are stored; for more
 *      tokens they are decoded once into a panel that stays in cache. To a tile's sums comes
 *      B u, as if K were longer by the rank, and then the epilogue. */
#include "linear.h"

#include "exp.h"

#include <stdatomic.h>
#include <string.h>

enum {
    PANEL_ROWS = 16,
    PREFETCH_TILES = 4,
    SHARES = 4,                /* of step 3 for each thread, in case one is held up */
    RANK_STEP = GN_TILE_LANES, /* u is padded with zeros to whole vectors */
};

/* A weight, or a term's A, as a source of tiles. */
struct weight {
    const gn_matrix *m; /* NULL: stored rows from here on, `ld` apart */
    const char *data;
    gn_dtype dtype, compute;
    int64_t rows, cols, ld;
    gn_linear_source source;
    bool ragged; /* blocks of 64 do not line up with rows: a row is dequantized in plain C */
};

/* The terms [first, last) that may touch a chunk of tokens, and where the first one's u is. */
struct span {
    int first, last;
    int64_t u;
};

/* What one thread works in. */
struct scratch {
    char *panel;   /* (PANEL_ROWS, padded) operands */
    float *scales; /* (PANEL_ROWS, padded / 64) */
    float *row;    /* (padded) */
};

struct call {
    const gn_linear_args *args;
    const gn_linear_kernel *kernel, *lora_kernel; /* the latter's operands are float32 */
    gn_dtype compute;
    int64_t T, K, padded;         /* K in whole blocks and groups */
    bool lora, dropout, prepared; /* any LoRA terms; their x is masked; step 1 is done */
    struct weight weight[GN_MAX_PARTS];
    float *x;                        /* (T, padded) as products see it, float32 in order */
    float *lora_x[GN_MAX_PARTS];     /* the same with dropout; x without */
    char *plain, *nibbles;           /* (T, padded) operands; NULL where no part needs them */
    float *u[GN_MAX_PARTS];          /* by term: (rows, rank in whole vectors) */
    struct span *span[GN_MAX_PARTS]; /* by chunk of kernel->tile_tokens tokens */
    char *scratch;
    size_t scratch_bytes;  /* a thread */
    atomic_int next_share; /* of step 3; whichever thread is free takes it */
};

/* K in whole blocks, and in whole groups of nibbles. */
static int64_t padded_columns(int64_t K) {
    return gn_cpu_round_up(K, 2 * GN_BLOCK);
}

/* Bytes from one row of operands to the next: an odd number of cache lines, because rows at
 * multiples of 4 KiB would drive each other out of the first cache. */
static size_t operand_stride(int64_t padded, int operand_bytes) {
    return ((size_t)padded * (size_t)operand_bytes) | 64;
}

/* ---- weights ---- */

static gn_linear_source source_of(const gn_linear_kernel *kernel, gn_qtype qtype, gn_dtype dtype,
                                  gn_dtype compute) {
    if (qtype == GN_Q_INT8) return GN_SOURCE_INT8;
    if (qtype != GN_Q_NONE) return GN_SOURCE_NIBBLES;
    const bool is_operand = kernel->operand_bytes == sizeof(float)
                                ? dtype == GN_F32 && compute == GN_F32
                                : dtype == GN_BF16;
    return is_operand ? GN_SOURCE_OPERANDS : GN_SOURCE_STORED;
}

static struct weight weight_of_matrix(const gn_linear_kernel *kernel, const gn_matrix *m,
                                      gn_dtype compute) {
    return (struct weight){.m = m->qtype == GN_Q_NONE ? NULL : m,
                           .data = m->data,
                           .dtype = m->dtype,
                           .compute = compute,
                           .rows = m->rows,
                           .cols = m->cols,
                           .ld = m->cols,
                           .source = source_of(kernel, m->qtype, m->dtype, compute),
                           .ragged = m->cols % GN_BLOCK != 0};
}

/* A is widened, never rounded: LoRA's arithmetic is float32 whatever the compute dtype. */
static struct weight weight_of_tensor(const gn_linear_kernel *kernel, const gn_tensor *t) {
    return (struct weight){.data = t->data,
                           .dtype = t->dtype,
                           .compute = GN_F32,
                           .rows = t->shape[0],
                           .cols = t->shape[1],
                           .ld = t->ld,
                           .source = source_of(kernel, GN_Q_NONE, t->dtype, GN_F32),
                           .ragged = t->shape[1] % GN_BLOCK != 0};
}

static bool wants_nibbles(const struct weight *w) {
    return w->source == GN_SOURCE_NIBBLES && !w->ragged;
}

/* Of codes or values. */
static int64_t row_bytes(const struct weight *w) {
    switch (w->source) {
    case GN_SOURCE_NIBBLES: return (w->cols + 1) / 2;
    case GN_SOURCE_INT8: return w->cols;
    case GN_SOURCE_OPERANDS:
    case GN_SOURCE_STORED: break;
    }
    return w->cols * (int64_t)gn_dtype_size(w->dtype);
}

static const void *row_data(const struct weight *w, int64_t row) {
    switch (w->source) {
    case GN_SOURCE_NIBBLES: return w->data + row * (w->cols / 2);
    case GN_SOURCE_INT8: return w->data + row * w->cols;
    case GN_SOURCE_OPERANDS:
    case GN_SOURCE_STORED: break;
    }
    return w->data + (size_t)(row * w->ld) * gn_dtype_size(w->dtype);
}

void gn_linear_scales_plain(float *restrict dst, const gn_matrix *m, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; i++) dst[i] = gn_matrix_scale(m, first + i);
}

/* The scales that n rows are decoded with: one for INT8, one a block for nibbles. */
static const float *load_scales(const gn_linear_kernel *kernel, const struct weight *w,
                                int64_t first, int n, float *scratch) {
    if (w->source == GN_SOURCE_INT8)
        for (int i = 0; i < n; i++) scratch[i] = w->m->absmax[first + i] / 127.0f;
    if (w->source != GN_SOURCE_NIBBLES || w->ragged) return scratch;
    const int64_t blocks = w->cols / GN_BLOCK;
    if (!w->m->absmax_u8) return w->m->absmax + first * blocks;
    kernel->scales(scratch, w->m, first * blocks, n * blocks);
    return scratch;
}

static void decode_ragged(const gn_linear_kernel *kernel, const struct weight *w, int64_t row,
                          char *dst, float *scratch) {
    if (w->m)
        gn_dequantize(scratch, w->m, row * w->cols, w->cols);
    else
        gn_widen(scratch, row_data(w, row), w->dtype, w->cols);
    for (int64_t k = 0; k < w->cols; k++) scratch[k] = gn_linear_round(scratch[k], w->compute);
    kernel->encode(dst, scratch, w->cols, false);
}

/* ---- tiles ---- */

/* Up to PANEL_ROWS rows of a weight, ready for tiles. */
struct rows {
    gn_linear_tile tile; /* all but the rows, the tokens and the sums */
    const void *w[PANEL_ROWS];
    const float *scale[PANEL_ROWS];
};

static void load_rows(struct rows *out, const struct call *op, const gn_linear_kernel *kernel,
                      const struct weight *w, int64_t first, int n, int64_t tokens,
                      const struct scratch *scratch) {
    const int64_t blocks = (w->cols + GN_BLOCK - 1) / GN_BLOCK;
    const int64_t row_scales = w->source == GN_SOURCE_NIBBLES ? blocks : 1;
    const float *scales = load_scales(kernel, w, first, n, scratch->scales);
    const size_t stride = operand_stride(op->padded, kernel->operand_bytes);
    out->tile = (gn_linear_tile){.source = w->source,
                                 .dtype = w->dtype,
                                 .compute = w->compute,
                                 .blocks = blocks,
                                 .code = w->m ? w->m->code : NULL,
                                 .ahead = PREFETCH_TILES * GN_TILE_ROWS * row_bytes(w)};
    const bool in_place = w->source == GN_SOURCE_OPERANDS || tokens <= kernel->direct_tokens;
    for (int i = 0; i < n; i++) {
        char *dst = scratch->panel + (size_t)i * stride;
        out->w[i] = dst;
        out->scale[i] = scales + i * row_scales;
        if (w->ragged) {
            decode_ragged(kernel, w, first + i, dst, scratch->row);
            continue;
        }
        out->w[i] = row_data(w, first + i);
        if (in_place) continue;
        out->tile.w[0] = out->w[i];
        out->tile.scale[0] = out->scale[i];
        kernel->decode(dst, &out->tile);
        out->w[i] = dst;
    }
    if (!w->ragged && in_place) return;
    out->tile.ahead = 0;
    if (wants_nibbles(w)) out->tile.blocks = gn_cpu_round_up(blocks, kernel->ways / 2);
    out->tile.source = GN_SOURCE_OPERANDS;
}

/* The sums of rows [r, r+4) of `rows`, of which n exist, with `tokens` rows of operands. */
static void multiply(float *sums, const gn_linear_kernel *kernel, struct rows *rows, int r, int n,
                     const char *x, size_t x_stride, int tokens) {
    gn_linear_tile *tile = &rows->tile;
    for (int i = 0; i < GN_TILE_ROWS; i++) {
        const int row = r + i < n ? r + i : n - 1; /* the last one again: its sums are dropped */
        tile->w[i] = rows->w[row];
        tile->scale[i] = rows->scale[row];
    }
    tile->x = x;
    tile->x_stride = (int64_t)x_stride;
    tile->tokens = tokens;
    tile->sums = sums;
    kernel->multiply(tile);
}

static int min_int(int64_t a, int64_t b) {
    return (int)(a < b ? a : b);
}

/* ---- step 1: operands ---- */

/* Row t of x or lora_x. */
static float *x_row(const struct call *op, float *x, int64_t t) {
    return x + t * (int64_t)(operand_stride(op->padded, sizeof(float)) / sizeof(float));
}

void gn_linear_input_row(float *dst, const gn_linear_args *args, int64_t t, gn_dtype compute) {
    const float *x = gn_cpu_row(&args->x, t);
    const int64_t K = args->x.shape[1];
    if (args->norm) {
        gn_cpu_rmsnorm_row(dst, x, args->norm->data, args->eps, K);
        x = dst;
    }
    for (int64_t k = 0; k < K; k++) dst[k] = gn_linear_round(x[k], compute);
}

void gn_linear_drop_row(float *dst, const float *x, const gn_linear_args *args, int part,
                        int64_t t) {
    const int64_t K = args->x.shape[1];
    for (int64_t k = 0; k < K; k += 4) {
        float factor[4];
        gn_dropout_quad(factor, &args->dropout, (uint32_t)(args->pair + part), (uint32_t)t,
                        (uint32_t)(k / 4));
        for (int i = 0; i < 4 && k + i < K; i++) dst[k + i] = x[k + i] * factor[i];
    }
}

static void prepare_rows(const struct call *op, const gn_cpu_team *team) {
    const size_t stride = operand_stride(op->padded, op->kernel->operand_bytes);
    const int64_t last = gn_cpu_share(op->T, team->thread + 1, team->n_threads);
    for (int64_t t = gn_cpu_share(op->T, team->thread, team->n_threads); t < last; t++) {
        float *x = x_row(op, op->x, t);
        gn_linear_input_row(x, op->args, t, op->compute);
        memset(x + op->K, 0, (size_t)(op->padded - op->K) * sizeof *x);
        for (int i = 0; op->dropout && i < op->args->n_parts; i++) {
            float *dropped = x_row(op, op->lora_x[i], t);
            gn_linear_drop_row(dropped, x, op->args, i, t);
            memset(dropped + op->K, 0, (size_t)(op->padded - op->K) * sizeof *dropped);
        }
        if (op->plain && op->plain != (char *)op->x)
            op->kernel->encode(op->plain + (size_t)t * stride, x, op->K, false);
        if (op->nibbles) op->kernel->encode(op->nibbles + (size_t)t * stride, x, op->K, true);
    }
}

/* ---- step 2: u = scale * A x ---- */

static int64_t rank_stride(const gn_lora_pair *pair) {
    return gn_cpu_round_up(pair->rank, RANK_STEP);
}

/* Columns [r, r+n) of a term's u, n <= 4. */
static void project_rows(const struct call *op, int part, const gn_lora *term, float *u, int64_t r,
                         int n, const struct scratch *scratch) {
    const gn_lora_pair *pair = &term->pairs[op->args->pair + part];
    const gn_linear_kernel *kernel = op->lora_kernel;
    const struct weight a = weight_of_tensor(kernel, &pair->a);
    const float scale = term->scale * pair->scale;
    struct rows rows;
    load_rows(&rows, op, kernel, &a, r, n, 1, scratch);
    const int most =
        rows.tile.source == GN_SOURCE_OPERANDS ? kernel->tile_tokens : kernel->direct_tokens;
    for (int64_t t = 0; t < term->rows; t += most) {
        const int tokens = min_int(term->rows - t, most);
        float sums[GN_TILE_TOKENS * GN_TILE_ROWS * GN_TILE_LANES];
        float values[GN_TILE_TOKENS][GN_TILE_ROWS];
        multiply(sums, kernel, &rows, 0, n,
                 (const char *)x_row(op, op->lora_x[part], term->row0 + t),
                 operand_stride(op->padded, sizeof(float)), tokens);
        kernel->finish(values[0], sums, tokens);
        for (int i = 0; i < tokens; i++)
            for (int j = 0; j < n; j++)
                u[(t + i) * rank_stride(pair) + r + j] = scale * values[i][j];
    }
}

static void clear_padding(const gn_lora_pair *pair, int64_t rows, float *u) {
    const int64_t rank = pair->rank, stride = rank_stride(pair);
    for (int64_t t = 0; t < rows; t++)
        memset(u + t * stride + rank, 0, (size_t)(stride - rank) * sizeof *u);
}

/* The ranks of all terms, four by four, dealt out to the threads in turn. */
static void project(const struct call *op, const gn_cpu_team *team, const struct scratch *scratch) {
    int turn = 0;
    for (int part = 0; part < op->args->n_parts; part++) {
        float *u = op->u[part];
        for (int i = 0; i < op->args->n_lora; i++) {
            const gn_lora *term = &op->args->lora[i];
            const gn_lora_pair *pair = gn_linear_pair(op->args, part, i);
            const int64_t rank = pair->rank;
            for (int64_t r = 0; r < rank; r += GN_TILE_ROWS, turn = (turn + 1) % team->n_threads) {
                if (turn != team->thread) continue;
                if (r == 0) clear_padding(pair, term->rows, u);
                project_rows(op, part, term, u, r, min_int(rank - r, GN_TILE_ROWS), scratch);
            }
            u += term->rows * rank_stride(pair);
        }
    }
}

/* ---- step 3: W x + B u, and the epilogue ---- */

/* sums += B u for the terms that cover some of the tokens [t0, t0 + tokens). */
static void add_lora(const struct call *op, int part, float *sums, int64_t t0, int tokens,
                     int64_t n0, int n) {
    const struct span *span = &op->span[part][t0 / op->kernel->tile_tokens];
    const float *u = op->u[part] + span->u;
    for (int i = span->first; i < span->last; i++) {
        const gn_lora *term = &op->args->lora[i];
        const gn_lora_pair *pair = gn_linear_pair(op->args, part, i);
        const int64_t stride = rank_stride(pair), row1 = (int64_t)term->row0 + term->rows;
        const int64_t from = t0 > term->row0 ? t0 : term->row0;
        const int64_t to = t0 + tokens < row1 ? t0 + tokens : row1;
        if (pair->rank > 0 && from < to) {
            const void *b[GN_TILE_ROWS];
            for (int r = 0; r < GN_TILE_ROWS; r++) {
                const int64_t row = n0 + (r < n ? r : n - 1);
                b[r] = (const char *)pair->b.data +
                       (size_t)(row * pair->b.ld) * gn_dtype_size(pair->b.dtype);
            }
            op->kernel->add_low_rank(sums + (from - t0) * GN_TILE_ROWS * op->kernel->lanes,
                                     (int)(to - from), b, pair->b.dtype,
                                     u + (from - term->row0) * stride, stride, pair->rank);
        }
        u += term->rows * stride;
    }
}

/* A part's way into y. SwiGLU is two: silu of the gate is stored, and up multiplied onto it. */
enum sink { STORE, ADD, SILU, MULTIPLY };

static void write_values(float *y, const float *values, int n, enum sink sink) {
    switch (sink) {
    case STORE:
    case SILU: /* a whole panel at once, later */
        for (int i = 0; i < n; i++) y[i] = values[i];
        return;
    case ADD:
        for (int i = 0; i < n; i++) y[i] += values[i];
        return;
    case MULTIPLY:
        for (int i = 0; i < n; i++) y[i] *= values[i];
        return;
    }
}

static void apply_silu(const gn_tensor *y, int64_t n0, int n) {
    for (int64_t t = 0; t < y->shape[0]; t++) {
        float *row = gn_cpu_row(y, t) + n0;
        for (int i = 0; i < n; i++) row[i] = gn_silu(row[i]);
    }
}

/* Columns [n0, n0+n) of a part's product, n <= PANEL_ROWS, for all tokens. */
static void multiply_panel(const struct call *op, int part, int64_t n0, int n, const gn_tensor *y,
                           enum sink sink, const struct scratch *scratch) {
    const gn_linear_kernel *kernel = op->kernel;
    const struct weight *w = &op->weight[part];
    const char *x = wants_nibbles(w) ? op->nibbles : op->plain;
    const size_t stride = operand_stride(op->padded, kernel->operand_bytes);
    struct rows rows;
    load_rows(&rows, op, kernel, w, n0, n, op->T, scratch);
    for (int64_t t = 0; t < op->T; t += kernel->tile_tokens) {
        const int tokens = min_int(op->T - t, kernel->tile_tokens);
        for (int r = 0; r < n; r += GN_TILE_ROWS) {
            float sums[GN_TILE_TOKENS * GN_TILE_ROWS * GN_TILE_LANES];
            float values[GN_TILE_TOKENS][GN_TILE_ROWS];
            const int left = min_int(n - r, GN_TILE_ROWS);
            multiply(sums, kernel, &rows, r, n, x + (size_t)t * stride, stride, tokens);
            if (op->args->n_lora) add_lora(op, part, sums, t, tokens, n0 + r, left);
            kernel->finish(values[0], sums, tokens);
            for (int i = 0; i < tokens; i++)
                write_values(gn_cpu_row(y, t + i) + n0 + r, values[i], left, sink);
        }
    }
    if (sink == SILU) apply_silu(y, n0, n);
}

static int64_t panels_of(const struct weight *w) {
    return (w->rows + PANEL_ROWS - 1) / PANEL_ROWS;
}

/* The panel of `w` that is first at or after byte `at` of it. */
static int64_t panel_at(const struct weight *w, int64_t at) {
    const int64_t bytes = PANEL_ROWS * row_bytes(w), panel = (at + bytes - 1) / bytes;
    return at <= 0 ? 0 : panel < panels_of(w) ? panel : panels_of(w);
}

/* Share `share` of `of` of all the call's weight bytes, read from end to end. */
static void multiply_share(const struct call *op, int share, int of,
                           const struct scratch *scratch) {
    const gn_linear_args *args = op->args;
    const bool swiglu = args->epilogue == GN_SWIGLU;
    const int n_parts = swiglu ? 1 : args->n_parts;
    const enum sink sink = swiglu ? SILU : args->epilogue == GN_ADD ? ADD : STORE;
    int64_t total = 0;
    for (int i = 0; i < n_parts; i++)
        total += panels_of(&op->weight[i]) * PANEL_ROWS * row_bytes(&op->weight[i]);
    int64_t from = gn_cpu_share(total, share, of);
    int64_t to = gn_cpu_share(total, share + 1, of);
    for (int i = 0; i < n_parts; i++) {
        const struct weight *w = &op->weight[i];
        const gn_tensor *y = &args->part[i].y;
        const int64_t last = panel_at(w, to);
        for (int64_t panel = panel_at(w, from); panel < last; panel++) {
            const int64_t n0 = panel * PANEL_ROWS;
            const int n = min_int(w->rows - n0, PANEL_ROWS);
            multiply_panel(op, i, n0, n, y, sink, scratch);
            if (swiglu) multiply_panel(op, 1, n0, n, y, MULTIPLY, scratch);
        }
        const int64_t bytes = panels_of(w) * PANEL_ROWS * row_bytes(w);
        from -= bytes;
        to -= bytes;
    }
}

static size_t lay_out_scratch(struct scratch *scratch, char *memory, int64_t padded) {
    size_t total = 0;
    const size_t panel =
        gn_linear_piece(&total, PANEL_ROWS * operand_stride(padded, sizeof(float)));
    const size_t scales =
        gn_linear_piece(&total, PANEL_ROWS * (size_t)(padded / GN_BLOCK) * sizeof(float));
    const size_t row = gn_linear_piece(&total, (size_t)padded * sizeof(float));
    if (memory)
        *scratch =
            (struct scratch){memory + panel, (float *)(memory + scales), (float *)(memory + row)};
    return total;
}

static void run(void *arg, const gn_cpu_team *team) {
    struct call *op = arg;
    struct scratch scratch;
    lay_out_scratch(&scratch, op->scratch + (size_t)team->thread * op->scratch_bytes, op->padded);
    if (!op->prepared) {
        prepare_rows(op, team);
        gn_cpu_barrier(team);
    }
    if (op->lora) {
        project(op, team, &scratch);
        gn_cpu_barrier(team);
    }
    const int shares = team->n_threads == 1 ? 1 : SHARES * team->n_threads;
    for (int share; (share = atomic_fetch_add(&op->next_share, 1)) < shares;)
        multiply_share(op, share, shares, &scratch);
}

/* ---- the call ---- */

static int64_t chunks_of(const struct call *op) {
    return (op->T + op->kernel->tile_tokens - 1) / op->kernel->tile_tokens;
}

static size_t u_floats(const gn_linear_args *args, int part) {
    size_t n = 0;
    for (int i = 0; i < args->n_lora; i++)
        n += (size_t)args->lora[i].rows * (size_t)rank_stride(gn_linear_pair(args, part, i));
    return n;
}

/* Points op into `memory`; with NULL only counts. */
static size_t lay_out(struct call *op, char *memory, int threads) {
    bool plain = false, nibbles = false;
    for (int i = 0; i < op->args->n_parts; i++) {
        if (wants_nibbles(&op->weight[i]))
            nibbles = true;
        else
            plain = true;
    }
    const int operand_bytes = op->kernel->operand_bytes;
    const size_t operands = (size_t)op->T * operand_stride(op->padded, operand_bytes);
    size_t total = 0;
    const size_t x =
        gn_linear_piece(&total, (size_t)op->T * operand_stride(op->padded, sizeof(float)));
    if (memory) op->x = (float *)(memory + x);
    for (int i = 0; i < op->args->n_parts; i++) {
        size_t at = x;
        if (op->dropout)
            at = gn_linear_piece(&total, (size_t)op->T * operand_stride(op->padded, sizeof(float)));
        if (memory) op->lora_x[i] = (float *)(memory + at);
    }
    if (plain && operand_bytes == sizeof(float)) {
        op->plain = (char *)op->x;
    } else if (plain) {
        const size_t at = gn_linear_piece(&total, operands);
        if (memory) op->plain = memory + at;
    }
    if (nibbles) {
        const size_t at = gn_linear_piece(&total, operands);
        if (memory) op->nibbles = memory + at;
    }
    for (int i = 0; i < op->args->n_parts; i++) {
        if (op->args->n_lora == 0) continue;
        const size_t u = gn_linear_piece(&total, u_floats(op->args, i) * sizeof(float));
        const size_t span = gn_linear_piece(&total, (size_t)chunks_of(op) * sizeof(struct span));
        if (!memory) continue;
        op->u[i] = (float *)(memory + u);
        op->span[i] = (struct span *)(memory + span);
    }
    op->scratch_bytes = lay_out_scratch(NULL, NULL, op->padded);
    const size_t scratch = gn_linear_piece(&total, (size_t)threads * op->scratch_bytes);
    if (memory) op->scratch = memory + scratch;
    return total;
}

static void find_spans(struct span *spans, int64_t n_spans, int chunk, const gn_linear_args *args,
                       int part) {
    memset(spans, 0, (size_t)n_spans * sizeof *spans);
    int64_t u = 0;
    for (int i = 0; i < args->n_lora; i++) {
        const gn_lora *term = &args->lora[i];
        for (int64_t t = term->row0 / chunk; t * chunk < (int64_t)term->row0 + term->rows; t++) {
            if (spans[t].last == 0) spans[t] = (struct span){.first = i, .u = u};
            spans[t].last = i + 1;
        }
        u += term->rows * rank_stride(gn_linear_pair(args, part, i));
    }
}

static const gn_linear_kernel *kernel_of(gn_isa isa, gn_dtype compute) {
#if defined(__x86_64__)
    if (isa >= GN_ISA_AVX512BF16 && compute == GN_BF16) return &gn_linear_avx512bf16;
    if (isa >= GN_ISA_AVX512) return &gn_linear_avx512;
    if (isa >= GN_ISA_AVX2) return &gn_linear_avx2;
#endif
    (void)isa, (void)compute;
    return NULL;
}

/* For a bound over every call that gn_linear_workspace describes: all that lay_out or the
 * reference may place, each at its largest. */
size_t gn_cpu_linear_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                               int64_t max_rank, int max_terms) {
    (void)max_n;
    const int64_t padded = padded_columns(max_k);
    const int64_t u = rows * max_terms * gn_cpu_round_up(max_rank, RANK_STEP);
    size_t total = 0;
    for (int i = 0; i < 3; i++)
        gn_linear_piece(&total, (size_t)rows * operand_stride(padded, sizeof(float)));
    for (int i = 0; i < GN_MAX_PARTS; i++) {
        gn_linear_piece(&total, (size_t)u * sizeof(float));
        gn_linear_piece(&total, (size_t)rows * sizeof(struct span));
    }
    gn_linear_piece(&total, (size_t)ctx->threads * lay_out_scratch(NULL, NULL, padded));
    return total;
}

bool gn_linear_is_small(const gn_linear_args *args) {
    const int64_t enough = 1 << 17; /* multiplications: a few microseconds */
    int64_t products = 0;
    for (int i = 0; i < args->n_parts; i++)
        products += gn_tensor_numel(&args->x) * args->part[i].w->rows;
    return products < enough;
}

gn_status gn_cpu_linear(gn_ctx *ctx, const gn_linear_args *args) {
    const gn_linear_kernel *kernel = kernel_of(ctx->isa, ctx->compute);
    if (!kernel) return gn_cpu_linear_reference(ctx, args);

    struct call op = {.args = args,
                      .kernel = kernel,
                      .lora_kernel = kernel_of(ctx->isa, GN_F32),
                      .compute = ctx->compute,
                      .T = args->x.shape[0],
                      .K = args->x.shape[1],
                      .padded = padded_columns(args->x.shape[1])};
    op.lora = args->n_lora > 0;
    op.dropout = op.lora && args->dropout.p > 0;
    for (int i = 0; i < args->n_parts; i++)
        op.weight[i] = weight_of_matrix(kernel, args->part[i].w, ctx->compute);
    if (lay_out(&op, NULL, ctx->threads) > ctx->workspace_bytes) return GN_ENOMEM;
    lay_out(&op, ctx->workspace, ctx->threads);
    for (int i = 0; i < args->n_parts; i++)
        if (op.lora) find_spans(op.span[i], chunks_of(&op), kernel->tile_tokens, args, i);
    /* A barrier costs more than a few rows do. */
    if (op.T * op.K < GN_CPU_SERIAL) {
        prepare_rows(&op, &(gn_cpu_team){.n_threads = 1});
        op.prepared = true;
    }
    gn_cpu_parallel(ctx->pool, gn_linear_is_small(args), run, &op);
    return GN_OK;
}
