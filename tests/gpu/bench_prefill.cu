/* bench_prefill.cu - a 7B layer's products by way of linear_dense.cu; run by hand, not a test.
 *
 * First dequantizing alone, on all SMs and, beside nothing, on a few. Then for several numbers of
 * rows the four calls of some layers, one after the other, as a forward pass makes them: without
 * a ring for weights, with one, and with the following calls announced, for several shares of the
 * SMs. Prints microseconds a layer, what the operations make of them, and how far the outputs of
 * the last way are from those of the first, as a share of their norm. */
#include <math.h>

#include "kernels/cuda/linear_ahead.h"
#include "kernels/cuda/operands.h"
#include "tests/gpu/bench_weights.h"

enum { LAYERS = 4, CALLS = 4, MAX_T = 2048, ROUNDS = 5, HIDDEN = 4096, INTERMEDIATE = 11008 };

static const struct shape {
    int K, N, n_parts;
    bool norm;
    gn_epilogue epilogue;
} shapes[CALLS] = {{HIDDEN, HIDDEN, 3, true, GN_STORE},
                   {HIDDEN, HIDDEN, 1, false, GN_ADD},
                   {HIDDEN, INTERMEDIATE, 2, true, GN_SWIGLU},
                   {INTERMEDIATE, HIDDEN, 1, false, GN_ADD}};
static const int rows[] = {256, 512, 1024, 2048}, even_rows[] = {15, 30, 45, 60, 80, 110, 160};

struct bench {
    gn_ctx *ctx;
    gn_matrix w[LAYERS][CALLS][GN_MAX_PARTS];
    gn_linear_weights call[LAYERS * CALLS];
    gn_tensor norm;
    void *x, *qkv, *a, *h;
};

static int64_t values_of(const struct shape *s) {
    return (int64_t)s->K * s->N * s->n_parts;
}

static void make_weights(struct bench *b) {
    for (int c = 0; c < CALLS; c++) {
        const struct shape *s = &shapes[c];
        const gn_matrix host = random_weight(s->N, s->K);
        for (int layer = 0; layer < LAYERS; layer++) {
            gn_linear_weights *call = &b->call[layer * CALLS + c];
            call->n = s->n_parts;
            for (int i = 0; i < s->n_parts; i++) {
                gn_matrix *w = &b->w[layer][c][i];
                void *memory = gn_ctx_alloc(b->ctx, gn_place_bytes(b->ctx, &host));
                if (!memory) check(GN_ENOMEM, "weights");
                check(gn_place(b->ctx, w, &host, memory), "placing weights");
                call->w[i] = w;
            }
        }
        free_weight(&host);
    }
}

/* ---- timing ---- */

typedef void work_fn(struct bench *b, int how);

/* Microseconds of the fastest round. */
static double time_of(struct bench *b, work_fn *work, int how, cudaStream_t stream) {
    cudaEvent_t begin, end;
    double best = INFINITY;
    if (cudaEventCreate(&begin) != cudaSuccess || cudaEventCreate(&end) != cudaSuccess)
        check(GN_EDEVICE, "events");
    for (int i = 0; i <= ROUNDS; i++) {
        float ms = 0;
        (void)cudaEventRecord(begin, stream);
        work(b, how);
        (void)cudaEventRecord(end, stream);
        if (cudaEventSynchronize(end) != cudaSuccess) check(GN_EDEVICE, "a round");
        (void)cudaEventElapsedTime(&ms, begin, end);
        if (i > 0 && ms < best) best = ms; /* the first warms up */
    }
    (void)cudaEventDestroy(begin);
    (void)cudaEventDestroy(end);
    return 1e3 * best;
}

/* ---- dequantizing ---- */

static void dequantize_all(struct bench *b, int sms) {
    gn_cuda_ahead *ahead = b->ctx->cuda->ahead;
    const gn_cuda_beside beside = {ahead->stream, sms};
    for (int i = 0; i < LAYERS * CALLS; i++)
        check(gn_cuda_dequantize_product(b->ctx, &b->call[i], ahead->memory, shapes[i % CALLS].K,
                                         sms ? &beside : NULL),
              "dequantizing");
}

static void bench_dequantize(struct bench *b) {
    double values = 0;
    for (int c = 0; c < CALLS; c++) values += (double)values_of(&shapes[c]);
    for (int sms = 0; sms <= 32; sms = sms ? 2 * sms : 2) {
        const double us = time_of(b, dequantize_all, sms,
                                  sms ? b->ctx->cuda->ahead->stream : gn_cuda_stream(b->ctx)) /
                          LAYERS;
        printf("dequantize on %3d SMs  %7.1f us a layer  %5.0f GB/s written (%.1f an SM)\n",
               sms ? sms : b->ctx->cuda->sms, us, 2 * values / us * 1e-3,
               2 * values / us * 1e-3 / (sms ? sms : b->ctx->cuda->sms));
    }
}

/* ---- layers ---- */

static int T, announced;

static void run_layers(struct bench *b, int) {
    for (int at = 0; at < LAYERS * CALLS; at++) {
        const struct shape *s = &shapes[at % CALLS];
        const int left = LAYERS * CALLS - 1 - at;
        void *inputs[] = {b->x, b->a, b->x, b->h}, *outputs[] = {b->qkv, b->x, b->h, b->x};
        gn_linear_args args = {};
        args.x = gn_tensor_2d(inputs[at % CALLS], s->norm ? GN_F32 : GN_BF16, T, s->K);
        args.norm = s->norm ? &b->norm : NULL;
        args.eps = 1e-5f;
        args.epilogue = s->epilogue;
        args.n_parts = s->n_parts;
        args.next = &b->call[at + 1];
        args.n_next = announced < left ? announced : left;
        for (int i = 0; i < s->n_parts; i++) {
            gn_tensor *y = &args.part[i].y;
            args.part[i].w = b->call[at].w[i];
            *y = gn_tensor_2d(outputs[at % CALLS], s->epilogue == GN_ADD ? GN_F32 : GN_BF16, T,
                              s->N);
            if (s->epilogue != GN_STORE) continue;
            y->ld = 3 * HIDDEN;
            y->data = (uint16_t *)y->data + i * HIDDEN;
        }
        check(gn_linear(b->ctx, &args), "a product");
    }
}

/* The residual stream after one pass over zeros. */
static float *outputs_of(struct bench *b) {
    const size_t bytes = (size_t)T * HIDDEN * sizeof(float);
    float *x = (float *)malloc(bytes);
    check(gn_ctx_zero(b->ctx, b->x, bytes), "x");
    run_layers(b, 0);
    check(gn_ctx_read(b->ctx, x, b->x, bytes), "x");
    return x;
}

static void print_time(const char *how, double us, double flop) {
    printf("%5d rows  %-28s %7.1f us a layer  %4.0f TFLOP/s", T, how, us, flop / us * 1e-6);
}

static void bench_rows(struct bench *b, double flop) {
    const cudaStream_t stream = gn_cuda_stream(b->ctx);
    gn_cuda_ahead *ahead = b->ctx->cuda->ahead;
    const size_t bytes = ahead->bytes;
    char *memory = ahead->memory;
    announced = 0;
    ahead->memory = NULL;
    check(gn_cuda_ahead_drop(b->ctx->cuda), "the ring");
    float *u = outputs_of(b);
    print_time("a weight at a time", time_of(b, run_layers, 0, stream) / LAYERS, flop);
    ahead->memory = memory;
    ahead->bytes = bytes;
    print_time("\n            a call at a time", time_of(b, run_layers, 0, stream) / LAYERS, flop);
    printf("\n");
    for (size_t i = 0; i < sizeof even_rows / sizeof *even_rows; i++) {
        char how[32];
        announced = 2;
        ahead->even_rows = even_rows[i];
        float *v = outputs_of(b);
        double off = 0, all = 0;
        for (size_t j = 0; j < (size_t)T * HIDDEN; j++) {
            off += (double)(u[j] - v[j]) * (u[j] - v[j]);
            all += (double)u[j] * u[j];
        }
        free(v);
        snprintf(how, sizeof how, "ahead, even at %d rows", even_rows[i]);
        print_time(how, time_of(b, run_layers, 0, stream) / LAYERS, flop);
        printf("  off %.1e\n", sqrt(off / all));
    }
    free(u);
}

int main(void) {
    gn_error err = {};
    struct bench b = {};
    gn_ctx_options options = {};
    options.device = "cuda";
    options.compute = GN_BF16;
    if (gn_ctx_open(&b.ctx, &options, &err) != GN_OK) {
        fprintf(stderr, "bench: %s\n", err.message);
        return 1;
    }
    double values = 0;
    for (int c = 0; c < CALLS; c++) values += (double)values_of(&shapes[c]);
    check(gn_ctx_reserve(b.ctx,
                         gn_linear_workspace(b.ctx, MAX_T, INTERMEDIATE, 2 * INTERMEDIATE, 0, 0)),
          "workspace");
    check(gn_linear_reserve_ahead(b.ctx, MAX_T, (int64_t)values), "the ring");
    make_weights(&b);
    b.x = gn_ctx_alloc(b.ctx, (size_t)MAX_T * HIDDEN * sizeof(float));
    b.qkv = gn_ctx_alloc(b.ctx, (size_t)MAX_T * 3 * HIDDEN * sizeof(uint16_t));
    b.a = random_activations(b.ctx, GN_BF16, (size_t)MAX_T * HIDDEN);
    b.h = gn_ctx_alloc(b.ctx, (size_t)MAX_T * INTERMEDIATE * sizeof(uint16_t));
    b.norm = gn_tensor_1d(random_activations(b.ctx, GN_F32, HIDDEN), GN_F32, HIDDEN);
    if (!b.x || !b.qkv || !b.h) check(GN_ENOMEM, "activations");
    printf("%s\n", gn_ctx_device(b.ctx));
    bench_dequantize(&b);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        T = rows[i];
        bench_rows(&b, 2.0 * T * values);
    }
    return 0;
}
