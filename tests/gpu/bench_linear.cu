/* bench_linear.cu - products of 16 to some hundred rows with NF4 weights; run by hand, not a test.
 *
 * Each shape and number of rows goes through linear_mma.cu and through linear_dense.cu, in trains
 * of calls recorded as a graph, each call with another copy of the weights, so that they come from
 * memory. Prints microseconds a call, what the weights' bytes and the operations make of them, the
 * floor (bytes at GB_S or operations at TFLOPS, whichever takes longer), its share, and how far
 * apart the two results are, as a share of their norm.
 *
 * usage: bench_linear [GB_S TFLOPS [SHAPE [ROWS]]]: 4300 and 785, an H200's, by default; only one
 * shape, only one number of rows */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/linear.h"
#include "kernels/ops.h"

enum { MAX_T = 2048, MAX_COPIES = 64, TRAINS = 5 };

static const struct shape {
    const char *name;
    int K, N[3], n_parts;
    bool norm;
    gn_epilogue epilogue;
} shapes[] = {
    {"7b qkv", 4096, {4096, 4096, 4096}, 3, true, GN_STORE},
    {"7b o", 4096, {4096}, 1, false, GN_ADD},
    {"7b gate+up", 4096, {11008, 11008}, 2, true, GN_SWIGLU},
    {"7b down", 11008, {4096}, 1, false, GN_ADD},
    {"22016x8192", 8192, {22016}, 1, false, GN_STORE},
};
static const int rows[] = {16, 17, 32, 48, 64, 96, 128, 192, 256, 384, 512, 2048};

typedef gn_status linear_fn(gn_ctx *ctx, const gn_linear_args *args);

/* ---- random values on the device ---- */

static void check(gn_status status, const char *what) {
    if (status == GN_OK) return;
    fprintf(stderr, "bench_linear: %s: %s\n", what, gn_status_text(status));
    exit(1);
}

static uint32_t random_bits(void) {
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

static void *device_copy(gn_ctx *ctx, const void *host, size_t bytes) {
    void *memory = gn_ctx_alloc(ctx, bytes);
    if (!memory) check(GN_ENOMEM, "device memory");
    check(gn_ctx_write(ctx, memory, host, bytes), "upload");
    return memory;
}

static void *random_activations(gn_ctx *ctx, gn_dtype dtype, size_t n) {
    void *host = malloc(n * gn_dtype_size(dtype));
    for (size_t i = 0; i < n; i++) {
        const float v = (float)(int32_t)random_bits() * 0x1p-31f;
        if (dtype == GN_F32)
            ((float *)host)[i] = v;
        else
            ((uint16_t *)host)[i] = gn_f32_to_bf16(v);
    }
    void *memory = device_copy(ctx, host, n * gn_dtype_size(dtype));
    free(host);
    return memory;
}

/* ---- weights ---- */

static gn_matrix random_weight(int64_t n, int64_t k) {
    gn_matrix m = {};
    m.qtype = GN_Q_NF4;
    m.dtype = GN_BF16;
    m.rows = n;
    m.cols = k;
    const gn_quant_sizes sizes = gn_quant_sizes_of(m.qtype, true, n, k);
    uint32_t *data = (uint32_t *)malloc(sizes.data);
    uint8_t *scales = (uint8_t *)malloc(sizes.absmax_u8);
    float *nested = (float *)malloc(sizes.nested_absmax);
    for (size_t i = 0; i < sizes.data / 4; i++) data[i] = random_bits();
    for (size_t i = 0; i < sizes.absmax_u8; i++) scales[i] = (uint8_t)random_bits();
    for (size_t i = 0; i < sizes.nested_absmax / sizeof *nested; i++) nested[i] = 0.01f;
    m.data = data;
    m.absmax_u8 = scales;
    m.nested_absmax = nested;
    m.code = gn_code_values(m.qtype);
    m.nested_code = gn_dynamic_map();
    m.offset = 0.02f;
    return m;
}

static void free_weight(const gn_matrix *m) {
    free((void *)m->data);
    free((void *)m->absmax_u8);
    free((void *)m->nested_absmax);
}

/* A shape's weights, several times. */
struct weights {
    int n;
    double bytes; /* of one copy */
    gn_matrix m[MAX_COPIES][3];
    void *memory[MAX_COPIES][3];
};

static void make_weights(gn_ctx *ctx, const struct shape *s, struct weights *w) {
    gn_matrix host[3];
    w->bytes = 0;
    for (int i = 0; i < s->n_parts; i++) {
        host[i] = random_weight(s->N[i], s->K);
        w->bytes += (double)gn_matrix_bytes(&host[i]);
    }
    w->n = (int)ceil(256e6 / w->bytes);
    for (int j = 0; j < w->n; j++)
        for (int i = 0; i < s->n_parts; i++) {
            w->memory[j][i] = gn_ctx_alloc(ctx, gn_place_bytes(ctx, &host[i]));
            if (!w->memory[j][i]) check(GN_ENOMEM, "weights");
            check(gn_place(ctx, &w->m[j][i], &host[i], w->memory[j][i]), "placing weights");
        }
    for (int i = 0; i < s->n_parts; i++) free_weight(&host[i]);
}

static void free_weights(gn_ctx *ctx, const struct shape *s, struct weights *w) {
    for (int j = 0; j < w->n; j++)
        for (int i = 0; i < s->n_parts; i++) gn_ctx_free(ctx, w->memory[j][i]);
}

/* ---- one shape and number of rows ---- */

struct bench {
    gn_ctx *ctx;
    const struct shape *s;
    struct weights *w;
    gn_linear_args args;
    gn_tensor norm;
};

static int64_t columns_of(const struct bench *b) {
    int64_t n = 0;
    for (int i = 0; i < b->s->n_parts; i++) n += b->s->N[i];
    return n;
}

static void point(struct bench *b, int copy, int T, void *x, void *y) {
    const struct shape *s = b->s;
    gn_linear_args *args = &b->args;
    const gn_dtype dtype = s->epilogue == GN_ADD ? GN_F32 : GN_BF16;
    args->x = gn_tensor_2d(x, s->norm ? GN_F32 : GN_BF16, T, s->K);
    args->norm = s->norm ? &b->norm : NULL;
    args->eps = 1e-5f;
    args->epilogue = s->epilogue;
    args->n_parts = s->n_parts;
    for (int i = 0; i < s->n_parts; i++) {
        args->part[i].w = &b->w->m[copy][i];
        args->part[i].y = gn_tensor_2d(y, dtype, T, s->N[i]);
        y = (char *)y + (size_t)T * (size_t)s->N[i] * gn_dtype_size(dtype);
    }
}

/* Microseconds a call. */
static double time_of(struct bench *b, linear_fn *linear, int T, void *x, void *y) {
    cudaStream_t stream = gn_cuda_stream(b->ctx);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t begin, end;
    if (cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) != cudaSuccess)
        check(GN_EDEVICE, "capture");
    const int n = 2 * b->w->n > 40 ? 2 * b->w->n : 40;
    for (int i = 0; i < n; i++) {
        point(b, i % b->w->n, T, x, y);
        check(linear(b->ctx, &b->args), b->s->name);
    }
    if (cudaStreamEndCapture(stream, &graph) != cudaSuccess ||
        cudaGraphInstantiate(&exec, graph, 0) != cudaSuccess ||
        cudaEventCreate(&begin) != cudaSuccess || cudaEventCreate(&end) != cudaSuccess)
        check(GN_EDEVICE, "recording");
    double best = INFINITY;
    for (int i = 0; i <= TRAINS; i++) {
        float ms = 0;
        (void)cudaEventRecord(begin, stream);
        (void)cudaGraphLaunch(exec, stream);
        (void)cudaEventRecord(end, stream);
        if (cudaEventSynchronize(end) != cudaSuccess) check(GN_EDEVICE, b->s->name);
        (void)cudaEventElapsedTime(&ms, begin, end);
        if (i > 0 && ms < best) best = ms; /* the first warms up */
    }
    (void)cudaEventDestroy(begin);
    (void)cudaEventDestroy(end);
    (void)cudaGraphExecDestroy(exec);
    (void)cudaGraphDestroy(graph);
    return 1e3 * best / n;
}

/* All outputs of one call, from y of zeros. */
static float *outputs_of(struct bench *b, linear_fn *linear, int T, void *x, void *y) {
    const size_t n = (size_t)T * (size_t)columns_of(b);
    const gn_dtype dtype = b->s->epilogue == GN_ADD ? GN_F32 : GN_BF16;
    void *raw = calloc(n, gn_dtype_size(dtype));
    float *out = (float *)malloc(n * sizeof *out);
    check(gn_ctx_write(b->ctx, y, raw, n * gn_dtype_size(dtype)), "y");
    point(b, 0, T, x, y);
    check(linear(b->ctx, &b->args), b->s->name);
    check(gn_ctx_read(b->ctx, raw, y, n * gn_dtype_size(dtype)), b->s->name);
    gn_widen(out, raw, dtype, (int64_t)n);
    free(raw);
    return out;
}

static double distance(struct bench *b, int T, void *x, void *y) {
    float *u = outputs_of(b, gn_cuda_linear_mma, T, x, y);
    float *v = outputs_of(b, gn_cuda_linear_dense, T, x, y);
    double off = 0, all = 0;
    for (size_t i = 0; i < (size_t)T * (size_t)columns_of(b); i++) {
        off += (double)(u[i] - v[i]) * (u[i] - v[i]);
        all += (double)v[i] * v[i];
    }
    free(u);
    free(v);
    return sqrt(off / all);
}

/* only: one number of rows, or 0 for all. */
static void bench_shape(gn_ctx *ctx, const struct shape *s, int only, double gb_s, double tflops) {
    struct weights w;
    struct bench b = {};
    b.ctx = ctx;
    b.s = s;
    b.w = &w;
    make_weights(ctx, s, &w);
    void *x = random_activations(ctx, s->norm ? GN_F32 : GN_BF16, (size_t)MAX_T * (size_t)s->K);
    b.norm = gn_tensor_1d(random_activations(ctx, GN_F32, (size_t)s->K), GN_F32, s->K);
    void *y = gn_ctx_alloc(ctx, (size_t)MAX_T * (size_t)columns_of(&b) * sizeof(float));
    if (!y) check(GN_ENOMEM, "outputs");
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const int T = rows[i];
        if (only != 0 && T != only) continue;
        const double flop = 2.0 * T * (double)columns_of(&b) * s->K;
        const double floor = fmax(w.bytes / gb_s * 1e-3, flop / tflops * 1e-6);
        const double dense = time_of(&b, gn_cuda_linear_dense, T, x, y);
        point(&b, 0, T, x, y);
        if (!gn_cuda_linear_mma_fits(ctx, &b.args)) {
            printf("%-11s %4d  floor %7.1f  dense %7.1f us\n", s->name, T, floor, dense);
            continue;
        }
        const double mma = time_of(&b, gn_cuda_linear_mma, T, x, y);
        printf(
            "%-11s %4d  %7.1f us %5.0f GB/s %4.0f TFLOP/s  floor %7.1f (%3.0f %%)  dense %7.1f us "
            "(%.2f times)  off %.1e\n",
            s->name, T, mma, w.bytes / mma * 1e-3, flop / mma * 1e-6, floor, 100 * floor / mma,
            dense, dense / mma, distance(&b, T, x, y));
        fflush(stdout);
    }
    free_weights(ctx, s, &w);
    gn_ctx_free(ctx, x);
    gn_ctx_free(ctx, b.norm.data);
    gn_ctx_free(ctx, y);
}

int main(int argc, char **argv) {
    const double gb_s = argc > 2 ? atof(argv[1]) : 4300, tflops = argc > 2 ? atof(argv[2]) : 785;
    gn_error err = {};
    gn_ctx *ctx;
    gn_ctx_options options = {};
    options.device = "cuda";
    options.compute = GN_BF16;
    if (gn_ctx_open(&ctx, &options, &err) != GN_OK) {
        fprintf(stderr, "bench_linear: %s\n", err.message);
        return 1;
    }
    check(gn_ctx_reserve(ctx, gn_linear_workspace(ctx, MAX_T, 11008, 22016, 0, 0)), "workspace");
    printf("%s\n", gn_ctx_device(ctx));
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        if (argc <= 3 || strcmp(argv[3], shapes[i].name) == 0)
            bench_shape(ctx, &shapes[i], argc > 4 ? atoi(argv[4]) : 0, gb_s, tflops);
    gn_ctx_close(ctx);
    return 0;
}
