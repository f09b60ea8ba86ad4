/* linear_reference.c - gn_linear in plain loops with double sums.
 *
 * What the SIMD paths are held to. Threads share the work by rows of the weight, which are
 * dequantized one at a time. */
#include "exp.h"
#include "linear.h"

struct reference {
    const gn_linear_args *args;
    gn_dtype compute;
    int64_t T, K;
    float *x;               /* (T, K) as products see it */
    float *dropped;         /* (threads, K): a row of it with dropout */
    float *u[GN_MAX_PARTS]; /* A x of a part's terms, one after another: (rows, r) each */
    float *w;               /* (threads, K): the weight's row that a thread is at */
};

static size_t lora_floats(const gn_linear_args *args, int part) {
    size_t n = 0;
    for (int i = 0; i < args->n_lora; i++)
        n += (size_t)args->lora[i].rows * (size_t)gn_linear_pair(args, part, i)->rank;
    return n;
}

/* Points op into `memory`, or only counts with NULL. */
static size_t lay_out(struct reference *op, char *memory, int threads) {
    size_t total = 0;
    const size_t x = gn_linear_piece(&total, (size_t)op->T * (size_t)op->K * sizeof(float));
    const size_t row_of_each = (size_t)threads * (size_t)op->K * sizeof(float);
    const size_t w = gn_linear_piece(&total, row_of_each);
    const bool drops = op->args->n_lora > 0 && op->args->dropout.p > 0;
    const size_t dropped = gn_linear_piece(&total, drops ? row_of_each : 0);
    size_t u[GN_MAX_PARTS];
    for (int i = 0; i < op->args->n_parts; i++)
        u[i] = gn_linear_piece(&total, lora_floats(op->args, i) * sizeof(float));
    if (!memory) return total;
    op->x = (float *)(memory + x);
    op->w = (float *)(memory + w);
    op->dropped = (float *)(memory + dropped);
    for (int i = 0; i < op->args->n_parts; i++) op->u[i] = (float *)(memory + u[i]);
    return total;
}

static double dot(const float *a, const float *b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)a[i] * b[i];
    return sum;
}

/* The same with a row of `a` widened on the way. */
static double dot_row(const gn_tensor *a, int64_t row, const float *b) {
    const size_t size = gn_dtype_size(a->dtype);
    const char *data = (const char *)a->data + (size_t)(row * a->ld) * size;
    double sum = 0;
    for (int64_t i = 0; i < a->shape[1]; i++) {
        float v;
        gn_widen(&v, data + (size_t)i * size, a->dtype, 1);
        sum += (double)v * b[i];
    }
    return sum;
}

/* Row t of x as A of `part` multiplies it. */
static const float *lora_input(const struct reference *op, int part, int64_t t, int thread) {
    const float *x = op->x + t * op->K;
    if (op->args->dropout.p == 0) return x;
    float *dropped = op->dropped + thread * op->K;
    gn_linear_drop_row(dropped, x, op->args, part, t);
    return dropped;
}

static void project_lora(const struct reference *op, int part, const gn_cpu_team *team) {
    float *u = op->u[part];
    for (int i = 0; i < op->args->n_lora; i++) {
        const gn_lora *term = &op->args->lora[i];
        const gn_lora_pair *pair = gn_linear_pair(op->args, part, i);
        const int64_t r = pair->rank;
        const int64_t last = gn_cpu_share(term->rows, team->thread + 1, team->n_threads);
        for (int64_t t = gn_cpu_share(term->rows, team->thread, team->n_threads); t < last; t++) {
            const float *x = lora_input(op, part, term->row0 + t, team->thread);
            for (int64_t j = 0; j < r; j++) u[t * r + j] = (float)dot_row(&pair->a, j, x);
        }
        u += term->rows * r;
    }
}

/* Row t of the product with the weight row w, which is row n of the part's weight. */
static float product(const struct reference *op, int part, const float *w, int64_t n, int64_t t) {
    double sum = dot(w, op->x + t * op->K, op->K);
    const float *u = op->u[part];
    for (int i = 0; i < op->args->n_lora; i++) {
        const gn_lora *term = &op->args->lora[i];
        const gn_lora_pair *pair = gn_linear_pair(op->args, part, i);
        const int64_t r = pair->rank, row = t - term->row0;
        if (r > 0 && row >= 0 && row < term->rows)
            sum += (double)term->scale * pair->scale * dot_row(&pair->b, n, u + row * r);
        u += term->rows * r;
    }
    return (float)sum;
}

static void load_weight(const struct reference *op, int part, int64_t n, float *w) {
    gn_dequantize(w, op->args->part[part].w, n * op->K, op->K);
    for (int64_t k = 0; k < op->K; k++) w[k] = gn_linear_round(w[k], op->compute);
}

static void multiply(const struct reference *op, int part, float *w, const gn_cpu_team *team) {
    const gn_tensor *y = &op->args->part[part].y;
    const int64_t N = op->args->part[part].w->rows,
                  last = gn_cpu_share(N, team->thread + 1, team->n_threads);
    for (int64_t n = gn_cpu_share(N, team->thread, team->n_threads); n < last; n++) {
        load_weight(op, part, n, w);
        for (int64_t t = 0; t < op->T; t++) {
            float *out = gn_cpu_row(y, t) + n;
            const float value = product(op, part, w, n, t);
            *out = op->args->epilogue == GN_ADD ? *out + value : value;
        }
    }
}

/* Part 0 leaves the gate in y, part 1 multiplies it by up: the same thread does both. */
static void multiply_swiglu(const struct reference *op, float *w, const gn_cpu_team *team) {
    const gn_tensor *y = &op->args->part[0].y;
    multiply(op, 0, w, team);
    const int64_t N = op->args->part[1].w->rows,
                  last = gn_cpu_share(N, team->thread + 1, team->n_threads);
    for (int64_t n = gn_cpu_share(N, team->thread, team->n_threads); n < last; n++) {
        load_weight(op, 1, n, w);
        for (int64_t t = 0; t < op->T; t++) {
            float *out = gn_cpu_row(y, t) + n;
            *out = gn_silu(*out) * product(op, 1, w, n, t);
        }
    }
}

static void run(void *arg, const gn_cpu_team *team) {
    const struct reference *op = arg;
    const int64_t last = gn_cpu_share(op->T, team->thread + 1, team->n_threads);
    for (int64_t t = gn_cpu_share(op->T, team->thread, team->n_threads); t < last; t++)
        gn_linear_input_row(op->x + t * op->K, op->args, t, op->compute);
    gn_cpu_barrier(team);
    for (int i = 0; i < op->args->n_parts; i++) project_lora(op, i, team);
    gn_cpu_barrier(team);
    float *w = op->w + team->thread * op->K;
    if (op->args->epilogue == GN_SWIGLU) {
        multiply_swiglu(op, w, team);
        return;
    }
    for (int i = 0; i < op->args->n_parts; i++) multiply(op, i, w, team);
}

static struct reference reference_of(const gn_ctx *ctx, const gn_linear_args *args) {
    return (struct reference){
        .args = args, .compute = ctx->compute, .T = args->x.shape[0], .K = args->x.shape[1]};
}

gn_status gn_cpu_linear_reference(gn_ctx *ctx, const gn_linear_args *args) {
    struct reference op = reference_of(ctx, args);
    if (lay_out(&op, NULL, ctx->threads) > ctx->workspace_bytes) return GN_ENOMEM;
    lay_out(&op, ctx->workspace, ctx->threads);
    gn_cpu_parallel(ctx->pool, gn_linear_is_small(args), run, &op);
    return GN_OK;
}
