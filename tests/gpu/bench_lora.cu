/* bench_lora.cu - what LoRA terms cost on the GPU, in LLaMA-7B's shapes; run by hand, not a test.
 *
 * `lora` is what the terms add by themselves, from a recording that goes through so many adapters
 * that no cache holds them; GB/s counts A and B once a call, and the floor is reading those at
 * 4.3 TB/s. `without` and `with` are whole products of NF4 weights. All in microseconds a call. */
#include "kernels/cuda/linear.h"

#include <stdio.h>
#include <stdlib.h>

static const double READ_BYTES_PER_US = 4.3e6;
static const int64_t COLD_BYTES = 256 << 20;

enum { MAX_TERMS = 64, MAX_SETS = 64, MAX_WEIGHTS = 16, MAX_ROWS = 2048, WARM_UP = 3, RUNS = 20 };

typedef struct shape {
    const char *name;
    bool norm;
    gn_epilogue epilogue;
    int64_t K;
    int n_parts;
    int64_t N[GN_MAX_PARTS];
} shape;

static const shape shapes[] = {
    {"q k v", true, GN_STORE, 4096, 3, {4096, 4096, 4096}},
    {"o", false, GN_ADD, 4096, 1, {4096}},
    {"gate up", true, GN_SWIGLU, 4096, 2, {11008, 11008}},
    {"down", false, GN_ADD, 11008, 1, {4096}},
};

static const struct load {
    int terms, rows, rank; /* rows of a term */
} loads[] = {{64, 1, 16}, {16, 8, 16}, {1, 64, 64}, {64, 4, 16}, {1, 2048, 64}};

static void check(gn_status status, const char *what) {
    if (status == GN_OK) return;
    fprintf(stderr, "bench_lora: %s: %s\n", what, gn_status_text(status));
    exit(1);
}

static void *allocate(gn_ctx *ctx, int64_t bytes) {
    void *memory = gn_ctx_alloc(ctx, (size_t)bytes);
    if (!memory) check(GN_ENOMEM, "allocating");
    check(gn_cuda_status(cudaMemsetAsync(memory, 0x3c, (size_t)bytes, gn_cuda_stream(ctx))),
          "filling"); /* 0.0115 */
    return memory;
}

/* Terms side by side, `sets` times for each part. */
typedef struct adapters {
    gn_lora terms[MAX_TERMS];
    gn_lora_pair *pairs;
    void *placed, *values;
    int sets;
    int64_t set_bytes;
} adapters;

static adapters make_adapters(gn_ctx *ctx, const shape *s, const struct load *load) {
    adapters a = {};
    const int64_t size = sizeof(uint16_t);
    for (int i = 0; i < s->n_parts; i++)
        a.set_bytes += load->terms * load->rank * (s->K + s->N[i]) * size;
    const int64_t sets = (COLD_BYTES + a.set_bytes - 1) / a.set_bytes;
    a.sets = (int)(sets < MAX_SETS ? sets : MAX_SETS);
    const int n_pairs = a.sets * s->n_parts;
    const size_t pair_bytes = (size_t)(load->terms * n_pairs) * sizeof *a.pairs;
    a.pairs = (gn_lora_pair *)malloc(pair_bytes);
    a.placed = allocate(ctx, (int64_t)pair_bytes);
    a.values = allocate(ctx, a.set_bytes * a.sets);
    char *at = (char *)a.values;
    for (int i = 0; i < load->terms * n_pairs; i++) {
        const int64_t N = s->N[i % s->n_parts];
        gn_lora_pair *pair = &a.pairs[i];
        pair->rank = load->rank;
        pair->scale = 1;
        pair->a = gn_tensor_2d(at, GN_BF16, load->rank, s->K);
        at += load->rank * s->K * size;
        pair->b = gn_tensor_2d(at, GN_BF16, N, load->rank);
        at += N * load->rank * size;
    }
    check(gn_ctx_write(ctx, a.placed, a.pairs, pair_bytes), "placing");
    for (int i = 0; i < load->terms; i++) {
        a.terms[i].row0 = i * load->rows;
        a.terms[i].rows = load->rows;
        a.terms[i].scale = 1;
        a.terms[i].pairs = a.pairs + i * n_pairs;
        a.terms[i].placed = (const gn_lora_pair *)a.placed + i * n_pairs;
    }
    return a;
}

static void stage(gn_ctx *ctx, int32_t rows, const gn_lora *terms, int n) {
    static int32_t ids[MAX_ROWS];
    static const int32_t pos0[] = {0}, blocks[] = {0};
    const int32_t row0[] = {0, rows};
    const gn_seqs seqs = {1, 1, row0, pos0, blocks};
    check(gn_stage(ctx, ids, &seqs, terms, n), "staging");
}

/* One load on one shape. */
typedef struct job {
    gn_ctx *ctx;
    const shape *s;
    gn_linear_args args;
    const gn_matrix (*weights)[GN_MAX_PARTS];
    int n_weights, sets;
    void *x, *w, *scratch; /* operands of LoRA by itself */
    float *out;
} job;

/* As linear_dense.cu has it done. */
static gn_status lora_alone(const job *j, const gn_linear_args *args) {
    const int64_t K = j->s->K;
    if (args->x.shape[0] <= 256) return gn_cuda_lora(j->ctx, args, j->x, K, j->scratch, j->out);
    const int64_t ld = gn_cuda_lora_extended(args);
    gn_status status = gn_cuda_lora_shrink(j->ctx, args, 0, args->n_parts, j->x, ld, j->scratch);
    for (int i = 0; i < args->n_parts && !status; i++)
        status = gn_cuda_lora_extend(j->ctx, args, i, j->scratch, j->x, ld, j->w, 0,
                                     args->part[i].w->rows, ld);
    return status;
}

static gn_status run_lora(void *arg) {
    const job *j = (const job *)arg;
    gn_status status = GN_OK;
    for (int set = 0; set < j->sets && !status; set++) {
        gn_linear_args args = j->args;
        args.pair = set * j->s->n_parts;
        status = lora_alone(j, &args);
    }
    return status;
}

static gn_status run_product(void *arg) {
    const job *j = (const job *)arg;
    gn_status status = GN_OK;
    for (int set = 0; set < j->sets && !status; set++) {
        gn_linear_args args = j->args;
        args.pair = set * j->s->n_parts;
        for (int i = 0; i < args.n_parts; i++) args.part[i].w = &j->weights[set % j->n_weights][i];
        status = gn_linear(j->ctx, &args);
    }
    return status;
}

/* Microseconds a call of those that fn makes. */
static double time_of(job *j, gn_ctx_ops *fn) {
    static uint64_t key;
    const cudaStream_t stream = gn_cuda_stream(j->ctx);
    cudaEvent_t events[2];
    float ms;
    key++;
    for (int i = 0; i < 2; i++) check(gn_cuda_status(cudaEventCreate(&events[i])), "an event");
    for (int i = 0; i < WARM_UP; i++) check(gn_ctx_replay(j->ctx, key, fn, j), "a call");
    check(gn_cuda_status(cudaEventRecord(events[0], stream)), "an event");
    for (int i = 0; i < RUNS; i++) check(gn_ctx_replay(j->ctx, key, fn, j), "a call");
    check(gn_cuda_status(cudaEventRecord(events[1], stream)), "an event");
    check(gn_ctx_wait(j->ctx), "running");
    check(gn_cuda_status(cudaEventElapsedTime(&ms, events[0], events[1])), "an event");
    for (int i = 0; i < 2; i++) (void)cudaEventDestroy(events[i]);
    return ms * 1e3 / RUNS / j->sets;
}

/* As many copies of a shape's weights as no cache holds. */
static int make_weights(gn_ctx *ctx, const shape *s, gn_matrix w[][GN_MAX_PARTS],
                        void *memory[][GN_MAX_PARTS]) {
    const int64_t numel = s->K * (s->n_parts * s->N[0]);
    int n = (int)(COLD_BYTES / (numel / 2));
    n = n < 2 ? 2 : n < MAX_WEIGHTS ? n : MAX_WEIGHTS;
    float *values = (float *)malloc((size_t)(s->K * s->N[0]) * sizeof *values);
    for (int64_t i = 0; i < s->K * s->N[0]; i++) values[i] = (float)(rand() % 2001 - 1000) * 1e-5f;
    for (int i = 0; i < n * s->n_parts; i++) {
        gn_error err = {};
        void **at = &memory[i / s->n_parts][i % s->n_parts];
        *at = allocate(ctx, (int64_t)gn_quantize_place_bytes(ctx, GN_Q_NF4, true, s->N[0], s->K));
        check(gn_quantize_place(ctx, &w[i / s->n_parts][i % s->n_parts], GN_Q_NF4, true, values,
                                GN_F32, s->N[0], s->K, *at, &err),
              "quantizing");
    }
    free(values);
    return n;
}

/* What a layer's products take, all of them. */
typedef struct totals {
    double lora, floor, without, with;
} totals;

static totals bench_load(gn_ctx *ctx, const shape *s, const struct load *load,
                         const gn_matrix weights[][GN_MAX_PARTS], int n_weights) {
    const int rows = load->terms * load->rows;
    int64_t columns = 0;
    for (int i = 0; i < s->n_parts; i++) columns += s->N[i];
    adapters a = make_adapters(ctx, s, load);
    job j = {};
    j.ctx = ctx;
    j.s = s;
    j.weights = weights;
    j.n_weights = n_weights;
    j.sets = a.sets;
    const int64_t wide = s->K + s->K / 8;
    j.x = allocate(ctx, rows * wide * 4);
    j.w = allocate(ctx, s->N[0] * wide * 2);
    j.out = (float *)allocate(ctx, rows * columns * 4);
    j.scratch = allocate(ctx, (int64_t)gn_cuda_lora_bytes(ctx, rows, load->rank, 1));
    const gn_tensor norm = gn_tensor_1d(j.x, GN_F32, s->K);
    j.args.x = gn_tensor_2d(j.x, s->norm ? GN_F32 : GN_BF16, rows, s->K);
    j.args.norm = s->norm ? &norm : NULL;
    j.args.epilogue = s->epilogue;
    j.args.n_parts = s->n_parts;
    for (int i = 0, at = 0; i < s->n_parts; at += (int)(rows * s->N[i++])) {
        const gn_dtype dtype = s->epilogue == GN_ADD ? GN_F32 : GN_BF16;
        j.args.part[i].y = gn_tensor_2d(j.out + at, dtype, rows, s->N[i]);
        j.args.part[i].w = &weights[0][i];
    }
    check(gn_ctx_reserve(ctx, gn_linear_workspace(ctx, rows, s->K, columns, load->rank, 1)),
          "reserving");
    stage(ctx, rows, a.terms, load->terms);
    totals t = {};
    t.without = time_of(&j, run_product);
    j.args.lora = a.terms;
    j.args.n_lora = load->terms;
    t.lora = time_of(&j, run_lora);
    t.with = time_of(&j, run_product);
    t.floor = (double)a.set_bytes / READ_BYTES_PER_US;
    gn_ctx_free(ctx, j.x);
    gn_ctx_free(ctx, j.w);
    gn_ctx_free(ctx, j.out);
    gn_ctx_free(ctx, j.scratch);
    gn_ctx_free(ctx, a.placed);
    gn_ctx_free(ctx, a.values);
    free(a.pairs);
    return t;
}

static void print(const char *name, const struct load *load, totals t) {
    printf("%3d x %4d rows, r=%-3d %-8s %8.2f %8.0f %6.2f %9.2f %9.2f %6.1f %%\n", load->terms,
           load->rows, load->rank, name, t.lora, t.floor * READ_BYTES_PER_US / t.lora * 1e-3,
           t.floor / t.lora, t.without, t.with, 100 * (t.with / t.without - 1));
}

int main(void) {
    enum { SHAPES = sizeof shapes / sizeof *shapes, LOADS = sizeof loads / sizeof *loads };
    static gn_matrix weights[MAX_WEIGHTS][GN_MAX_PARTS];
    static void *memory[MAX_WEIGHTS][GN_MAX_PARTS];
    gn_error err = {};
    gn_ctx *ctx;
    gn_ctx_options options = {};
    options.device = "cuda";
    options.auto_compute = true;
    if (gn_ctx_open(&ctx, &options, &err) != GN_OK) {
        fprintf(stderr, "bench_lora: %s\n", err.message);
        return 1;
    }
    const gn_stage_limits limits = {MAX_ROWS, 1, 1, MAX_TERMS};
    check(gn_stage_reserve(ctx, &limits), "reserving");
    printf("%s, us a call\n%-30s %8s %8s %6s %9s %9s %8s\n", gn_ctx_device(ctx), "", "lora", "GB/s",
           "floor", "without", "with", "more");
    totals all[LOADS] = {};
    for (int i = 0; i < SHAPES; i++) {
        const int n = make_weights(ctx, &shapes[i], weights, memory);
        for (int l = 0; l < LOADS; l++) {
            const totals t = bench_load(ctx, &shapes[i], &loads[l], weights, n);
            print(shapes[i].name, &loads[l], t);
            all[l].lora += t.lora;
            all[l].floor += t.floor;
            all[l].without += t.without;
            all[l].with += t.with;
        }
        for (int k = 0; k < n * shapes[i].n_parts; k++)
            gn_ctx_free(ctx, memory[k / shapes[i].n_parts][k % shapes[i].n_parts]);
    }
    for (int l = 0; l < LOADS; l++) print("a layer", &loads[l], all[l]);
    gn_ctx_close(ctx);
    return 0;
}
