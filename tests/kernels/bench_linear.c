/* bench_linear.c - how fast gn_linear is in LLaMA-1.1B's shapes; run by hand, not a test.
 *
 *   bench_linear [threads [f32|bf16]]
 *
 * First a plain read loop over 1 GiB, which is what decoding is held to; then each product of
 * a layer, and the output layer, at 1, 4, 16 and 128 tokens, and what a whole model's products
 * come to. Weights are many copies of each shape in turn, so that they come from memory as in
 * a model. Best of a few runs: the machine may be shared. */
#include "kernels/ops.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { HIDDEN = 2048, INTER = 5632, KV = 256, LAYERS = 22, VOCAB = 32000, MAX_T = 128, RUNS = 7 };

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *allocate(gn_ctx *ctx, size_t bytes) {
    void *p = gn_ctx_alloc(ctx, bytes);
    if (!p) {
        fprintf(stderr, "bench_linear: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return p;
}

/* ---- what memory gives ---- */

typedef long long words __attribute__((vector_size(64)));

__attribute__((target("avx512f"))) static long long sum_words(const words *p, size_t n) {
    words sum[4] = {0};
    for (size_t i = 0; i + 4 <= n; i += 4)
        for (int j = 0; j < 4; j++) sum[j] += p[i + j];
    sum[0] += sum[1] + sum[2] + sum[3];
    return sum[0][0] + sum[0][1] + sum[0][2] + sum[0][3];
}

struct reading {
    const words *data;
    size_t share;     /* words a thread */
    atomic_llong sum; /* so that reading is not left out */
};

static void read_share(void *arg, int64_t i) {
    struct reading *r = arg;
    atomic_fetch_add(&r->sum, sum_words(r->data + (size_t)i * r->share, r->share));
}

static double read_bandwidth(gn_ctx *ctx, int threads) {
    const size_t bytes = (size_t)1 << 30;
    char *data = memset(allocate(ctx, bytes), 1, bytes);
    struct reading r = {.data = (const words *)data,
                        .share = bytes / sizeof(words) / (size_t)threads};
    double best = 1e9;
    for (int run = 0; run < RUNS; run++) {
        const double start = seconds();
        gn_ctx_for(ctx, threads, read_share, &r);
        const double took = seconds() - start;
        if (took < best) best = took;
    }
    gn_ctx_free(ctx, data);
    return (double)bytes / best;
}

/* ---- products ---- */

struct product {
    const char *name;
    gn_qtype qtype;
    int64_t K, N[3];
    int n_parts, per_model;
    gn_epilogue epilogue;
    bool norm;
};

static const struct product products[] = {
    {"qkv", GN_Q_NF4, HIDDEN, {HIDDEN, KV, KV}, 3, LAYERS, GN_STORE, true},
    {"o", GN_Q_NF4, HIDDEN, {HIDDEN}, 1, LAYERS, GN_ADD, false},
    {"gate+up", GN_Q_NF4, HIDDEN, {INTER, INTER}, 2, LAYERS, GN_SWIGLU, true},
    {"down", GN_Q_NF4, INTER, {HIDDEN}, 1, LAYERS, GN_ADD, false},
    {"lm_head", GN_Q_NONE, HIDDEN, {VOCAB}, 1, 1, GN_STORE, true},
};

static gn_matrix make_matrix(gn_ctx *ctx, gn_qtype qtype, int64_t rows, int64_t cols) {
    gn_matrix m = {.qtype = qtype, .dtype = GN_BF16, .rows = rows, .cols = cols};
    if (qtype == GN_Q_NONE) {
        const size_t bytes = (size_t)(rows * cols) * sizeof(uint16_t);
        m.data = memset(allocate(ctx, bytes), 0x3c, bytes);
        return m;
    }
    const gn_quant_sizes sizes = gn_quant_sizes_of(qtype, true, rows, cols);
    unsigned char *data = allocate(ctx, sizes.data);
    for (size_t i = 0; i < sizes.data; i++) data[i] = (unsigned char)(i * 2654435761u >> 13);
    float *nested = allocate(ctx, sizes.nested_absmax);
    for (size_t i = 0; i < sizes.nested_absmax / sizeof *nested; i++) nested[i] = 0.01f;
    m.data = data;
    m.code = gn_code_values(qtype);
    m.absmax_u8 = memset(allocate(ctx, sizes.absmax_u8), 77, sizes.absmax_u8);
    m.nested_code = gn_dynamic_map();
    m.nested_absmax = nested;
    m.offset = 0.02f;
    return m;
}

/* Seconds of one product: best of RUNS passes over enough copies to leave the caches. */
static double time_product(gn_ctx *ctx, const struct product *p, gn_linear_args *copies, int n,
                           int T) {
    double best = 1e9;
    for (int i = 0; i < n; i++) {
        copies[i].x.shape[0] = T;
        for (int part = 0; part < p->n_parts; part++) copies[i].part[part].y.shape[0] = T;
    }
    for (int run = 0; run < (T > 16 ? 3 : RUNS); run++) {
        const int used = T > 16 && n > 4 ? 4 : n;
        const double start = seconds();
        for (int i = 0; i < used; i++)
            if (gn_linear(ctx, &copies[i]) != GN_OK) exit(1);
        const double took = (seconds() - start) / used;
        if (took < best) best = took;
    }
    return best;
}

int main(int argc, char **argv) {
    const gn_ctx_options options = {.threads = argc > 1 ? atoi(argv[1]) : 0,
                                    .auto_compute = argc <= 2,
                                    .compute =
                                        argc > 2 && strcmp(argv[2], "f32") == 0 ? GN_F32 : GN_BF16};
    gn_ctx *ctx;
    gn_error err = {0};
    if (gn_ctx_open(&ctx, &options, &err) != GN_OK) {
        fprintf(stderr, "bench_linear: %s\n", err.message);
        return 1;
    }
    const double bandwidth = read_bandwidth(ctx, gn_ctx_threads(ctx));
    printf("%s, compute %s: reads at %.1f GB/s\n", gn_ctx_device(ctx),
           gn_dtype_name(gn_ctx_compute(ctx)), bandwidth * 1e-9);
    if (gn_ctx_reserve(ctx, gn_linear_workspace(ctx, MAX_T, INTER, VOCAB, 64, 1)) != GN_OK)
        return 1;
    float *x = allocate(ctx, MAX_T * INTER * sizeof *x),
          *y = allocate(ctx, MAX_T * VOCAB * sizeof *y);
    for (int i = 0; i < MAX_T * INTER; i++) x[i] = (float)(i % 1001) * 0.002f - 1.0f;
    memset(y, 0, MAX_T * VOCAB * sizeof *y);
    gn_tensor norm = gn_tensor_1d(x, GN_F32, HIDDEN);

    const int tokens[] = {1, 4, 16, 128};
    double model_time[4] = {0}, model_bytes = 0, model_flops = 0;
    for (size_t i = 0; i < sizeof products / sizeof *products; i++) {
        const struct product *p = &products[i];
        const int n = p->per_model == 1 ? 2 : p->per_model;
        gn_linear_args copies[LAYERS];
        gn_matrix m[LAYERS][3];
        double bytes = 0, flops = 0;
        for (int c = 0; c < n; c++) {
            copies[c] = (gn_linear_args){.x = gn_tensor_2d(x, GN_F32, MAX_T, p->K),
                                         .norm = p->norm ? &norm : NULL,
                                         .eps = 1e-5f,
                                         .epilogue = p->epilogue,
                                         .n_parts = p->n_parts};
            for (int part = 0; part < p->n_parts; part++) {
                m[c][part] = make_matrix(ctx, p->qtype, p->N[part], p->K);
                copies[c].part[part].w = &m[c][part];
                copies[c].part[part].y = gn_tensor_2d(y, GN_F32, MAX_T, p->N[part]);
                if (c) continue;
                bytes += (double)gn_matrix_bytes(&m[c][part]);
                flops += 2.0 * (double)(p->N[part] * p->K);
            }
        }
        for (int t = 0; t < 4; t++) {
            const double took = time_product(ctx, p, copies, n, tokens[t]);
            printf("%-8s T=%-4d %9.1f us  %6.2f GB/s  %7.1f GFLOP/s\n", p->name, tokens[t],
                   took * 1e6, bytes / took * 1e-9, flops * tokens[t] / took * 1e-9);
            model_time[t] += took * p->per_model;
        }
        model_bytes += bytes * p->per_model;
        model_flops += flops * p->per_model;
    }
    for (int t = 0; t < 4; t++)
        printf("model    T=%-4d %9.2f ms  %6.2f GB/s (%.0f %% of reads)  %7.1f GFLOP/s  "
               "%.1f tok/s\n",
               tokens[t], model_time[t] * 1e3, model_bytes / model_time[t] * 1e-9,
               100 * model_bytes / model_time[t] / bandwidth,
               model_flops * tokens[t] / model_time[t] * 1e-9, tokens[t] / model_time[t]);
    gn_ctx_close(ctx);
    return 0;
}
