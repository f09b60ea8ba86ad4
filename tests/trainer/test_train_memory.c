/* How training divides memory: what is predicted is what is allocated, to the byte, on a device
 * that counts; every budget is kept to or refused with what is missing; what is kept for a budget
 * is also kept for a larger one; and results are the same bits for all of them. */
#include <criterion/criterion.h>

#include "engine/memory_plan.h"
#include "kernels/backend.h"
#include "tests/trainer/lora_run.h"
#include "tests/support/late_pages.h"

#define MIB ((int64_t)1 << 20)
#define GIB ((int64_t)1 << 30)

#define CONTEXT (600 * MIB)

enum { RANK = 8, TOKENS = 48, MAX_BLOCKS = 4096 };

/* ---- a device that counts: the CPU's ops, and memory that is not the host's ---- */

static struct {
    gn_backend table;
    gn_model *model;
    int64_t total, live, peak;
    void *blocks[MAX_BLOCKS];
    size_t bytes[MAX_BLOCKS];
    int n;
} device;

static void *count_alloc(gn_ctx *ctx, size_t bytes) {
    void *memory = gn_cpu_backend.alloc(ctx, bytes);
    cr_assert(device.n < MAX_BLOCKS);
    device.blocks[device.n] = memory;
    device.bytes[device.n++] = bytes;
    device.live += (int64_t)bytes;
    if (device.live > device.peak) device.peak = device.live;
    return memory;
}

static void count_free(gn_ctx *ctx, void *memory) {
    int i = 0;
    while (i < device.n && device.blocks[i] != memory) i++;
    if (i < device.n) { /* else it was there before counting began */
        device.live -= (int64_t)device.bytes[i];
        device.n--;
        device.blocks[i] = device.blocks[device.n];
        device.bytes[i] = device.bytes[device.n];
    }
    gn_cpu_backend.free(ctx, memory);
}

static gn_status count_memory(gn_ctx *ctx, gn_ctx_memory *memory) {
    (void)ctx;
    *memory =
        (gn_ctx_memory){.free = device.total - CONTEXT - device.model->owned_bytes - device.live,
                        .total = device.total,
                        .opened = CONTEXT};
    return GN_OK;
}

/* From now on what the model's context allocates is counted, and it says that it is no host. */
static void start_counting(gn_model *model, int64_t total) {
    device.table = *model->ctx->backend;
    device.table.alloc = count_alloc;
    device.table.free = count_free;
    device.table.read_memory = count_memory;
    device.model = model;
    device.total = total;
    device.live = device.peak = device.n = 0;
    model->ctx->backend = &device.table;
    model->ctx->cuda = (struct gn_cuda *)1;
}

static void stop_counting(gn_model *model) {
    model->ctx->backend = &gn_cpu_backend;
    model->ctx->cuda = NULL;
}

/* ---- what is wanted ---- */

/* With pages as small as they can be. */
static gn_train_wanted wanted_of(const lora_list *list, int accumulation) {
    gn_train_wanted w = want_lora(list, 1, TOKENS, accumulation);
    w.optimizer.page_bytes = 1;
    return w;
}

static gn_train_memory plan_ok(gn_model *model, const gn_train_wanted *w, int64_t budget) {
    gn_train_memory m;
    gn_error err = {0};
    cr_assert_eq(gn_train_memory_plan(&m, model, w, budget, &err), GN_OK, "%s", err.message);
    cr_assert_leq(gn_train_memory_sum(&m), m.budget);
    if (budget > 0) cr_assert_eq(m.budget, budget);
    return m;
}

typedef struct devices {
    gn_page_device *at[2];
} devices;

static devices open_devices(gn_model *model) {
    return (devices){{test_late_pages(model->ctx), test_late_pages(model->ctx)}};
}

static void close_devices(devices *d) {
    gn_page_device_close(d->at[0]);
    gn_page_device_close(d->at[1]);
}

/* All but what was there before; and the optimizer's eight bytes for a sum. */
static int64_t predicted(const gn_train_memory *m) {
    return m->adapters + m->gradients + m->optimizer + m->inputs + m->kept + m->scratch +
           m->workspace;
}

/* ---- tests ---- */

/* What the model's context keeps for the ops. */
static void drop_workspace(gn_ctx *ctx) {
    gn_ctx_free(ctx, ctx->workspace);
    ctx->workspace = NULL;
    ctx->workspace_bytes = 0;
}

/* The table of pairs that a run places. */
static int64_t placed_bytes(const gn_model *model) {
    return model->config.layers * GN_PROJ_COUNT * (int64_t)sizeof(gn_lora_pair);
}

typedef struct outcome {
    double loss;
    uint16_t *weights;
} outcome;

/* Trains within a plan, and comes to the same as before. */
static void check_run(gn_model *model, const lora_list *list, const gn_train_wanted *w,
                      const gn_train_memory *m, outcome *before) {
    lora_run r;
    gn_train_measured found;
    size_t bytes;
    devices d = open_devices(model);
    device.peak = device.live;
    open_planned(&r, model, list, w, m, d.at);
    for (int i = 0; i < 2; i++) update_lora(&r, i, 2, 1, TOKENS);
    const int64_t peak = device.peak - placed_bytes(model);
    cr_assert_geq(peak, predicted(m));
    cr_assert_leq(peak, predicted(m) + (int64_t)sizeof(double) + GN_SUM_WORKSPACE);
    cr_assert_eq(gn_train_memory_measure(&found, m, model, r.p, r.o), GN_OK);
    cr_assert_eq(found.optimizer, m->optimizer);
    cr_assert_eq(found.gradients, m->grads_travel ? m->gradients : -1);
    cr_assert_eq(found.sum - placed_bytes(model) - (int64_t)sizeof(double),
                 gn_train_memory_sum(m) - m->reserve);
    uint16_t *weights = read_weights(&r, &bytes);
    if (before->weights) {
        cr_assert_eq(r.loss, before->loss);
        cr_assert(!memcmp(weights, before->weights, bytes), "of %lld", (long long)m->budget);
        free(weights);
    } else {
        *before = (outcome){r.loss, weights};
    }
    close_lora(&r);
    close_devices(&d);
    drop_workspace(model->ctx);
    cr_assert_eq(device.live, 0);
}

static void check_refusal(gn_model *model, const gn_train_wanted *w, int64_t budget,
                          const gn_error *err) {
    double missing;
    cr_assert_eq(err->status, GN_ENOMEM);
    cr_assert_eq(sscanf(err->message, "%*f MiB of memory are %lf too few", &missing), 1, "%s",
                 err->message);
    plan_ok(model, w, budget + (int64_t)((missing + 0.051) * 0x1p20));
}

/* Every budget, from too little to more than enough. */
static void sweep(gn_model *model, const lora_list *list, const gn_train_wanted *w,
                  outcome *result) {
    enum { STEP = 8000, RUN_EACH = 40 };
    const gn_train_memory most = plan_ok(model, w, 4 * GIB);
    const int64_t enough = gn_train_memory_sum(&most);
    gn_train_memory before = {.recomputed = 1};
    int refused = 0, kept = 0;
    cr_assert_eq(most.recomputed, 0);
    cr_assert(!most.grads_travel);
    for (int64_t budget = enough - 4 * MIB; budget <= enough + STEP; budget += STEP) {
        gn_train_memory m;
        gn_error err = {0};
        if (gn_train_memory_plan(&m, model, w, budget, &err)) {
            cr_assert_eq(kept, 0, "a smaller budget was enough");
            check_refusal(model, w, budget, &err);
            refused++;
            continue;
        }
        cr_assert_leq(gn_train_memory_sum(&m), budget);
        cr_assert_leq(m.recomputed, before.recomputed);
        for (int i = 0; i < GN_KEEP_COUNT; i++) cr_assert_geq(m.keep[i], before.keep[i]);
        before = m;
        if (kept++ % RUN_EACH == 0) check_run(model, list, w, &m, result);
    }
    cr_assert(refused > 10 && kept > 100, "%d refused, %d kept", refused, kept);
    cr_assert_eq(before.recomputed, 0, "at last all is kept");
    check_run(model, list, w, &before, result);
}

Test(train_memory, budgets_are_kept_to_and_change_no_bit) {
    gn_model *model = open_tiny();
    lora_list list = list_lora(model, RANK);
    outcome result = {0};
    start_counting(model, 4 * GIB);
    for (int accumulation = 1; accumulation <= 64; accumulation *= 64) {
        const gn_train_wanted w = wanted_of(&list, accumulation);
        sweep(model, &list, &w, &result);
    }
    stop_counting(model);
    free(result.weights);
    free_list(&list);
    gn_model_close(model);
}

/* Optimizer pages that lodge in layers' inputs come during the backward pass, and change no bit;
 * they are back when the step that lent the memory is gone. */
Test(train_memory, pages_lodge_in_layers_inputs) {
    enum { LONG = 240, UPDATES = 3 };
    gn_model *model = open_tiny();
    lora_list list = list_lora(model, RANK);
    outcome results[2];
    start_counting(model, 4 * GIB);
    gn_train_wanted w = want_lora(&list, 1, LONG, 1);
    w.optimizer.page_bytes = 1;
    const gn_train_memory all = plan_ok(model, &w, 0);
    gn_train_memory least;
    gn_error err = {0};
    int64_t budget = gn_train_memory_sum(&all) - 40 * MIB;
    while (gn_train_memory_plan(&least, model, &w, budget, &err)) budget += 10000;
    for (int lodges = 0; lodges < 2; lodges++) {
        size_t bytes;
        lora_run r;
        devices d = open_devices(model);
        open_planned(&r, model, &list, &w, &least, d.at);
        if (!lodges) r.trained.lodger = NULL;
        for (int i = 0; i < UPDATES; i++) {
            const int64_t before = gn_pages_read_stats(gn_optimizer_pages(r.o)).uploaded;
            accumulate_lora(&r, i, 2, 1, LONG);
            const int64_t came = gn_pages_read_stats(gn_optimizer_pages(r.o)).uploaded - before;
            const int64_t pages = came / (int64_t)gn_pages_page_bytes(gn_optimizer_pages(r.o));
            if (lodges)
                cr_assert_geq(pages, 6, "%lld pages", (long long)pages); /* 3 inputs of 2 pages */
            else
                cr_assert_eq(pages, 0);
            apply_lora(&r);
        }
        gn_train_step_close(r.step);
        r.step = NULL;
        cr_assert_eq(gn_pages_flush(gn_optimizer_pages(r.o)), GN_OK);
        results[lodges] = (outcome){r.loss, read_weights(&r, &bytes)};
        if (lodges) {
            cr_assert_eq(results[0].loss, results[1].loss);
            cr_assert(!memcmp(results[0].weights, results[1].weights, bytes));
        }
        const gn_page_stats s = gn_pages_read_stats(gn_optimizer_pages(r.o));
        cr_assert_eq(s.peak, (size_t)least.optimizer);
        float *masters = malloc((size_t)r.p->items[0].numel * sizeof *masters);
        cr_assert_eq(gn_optimizer_get(r.o, GN_STATE_MASTER, 0, masters), GN_OK);
        for (int64_t j = 0; j < r.p->items[0].numel; j++)
            cr_assert_eq(gn_f32_to_bf16(masters[j]), results[lodges].weights[j]);
        free(masters);
        close_lora(&r);
        close_devices(&d);
    }
    free(results[0].weights);
    free(results[1].weights);
    stop_counting(model);
    free_list(&list);
    gn_model_close(model);
}

/* Also on the host, where pages do not travel, and for other shapes. */
Test(train_memory, prediction_is_what_is_allocated) {
    static const struct {
        int rows, seqs, context, rank;
        bool eight_bit;
        int32_t accumulation;
    } cases[] = {{1, 1, 1, 1, false, 1}, {300, 5, 100, 8, true, 4}, {77, 3, 512, 16, false, 2}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gn_model *model = open_tiny();
        lora_list list = list_lora(model, cases[i].rank);
        gn_train_wanted w = wanted_of(&list, cases[i].accumulation);
        w.limits = (gn_train_limits){.max_rows = cases[i].rows,
                                     .max_seqs = cases[i].seqs,
                                     .context = cases[i].context,
                                     .max_rank = cases[i].rank};
        w.optimizer.eight_bit = cases[i].eight_bit;
        const gn_train_memory m = plan_ok(model, &w, 0);
        cr_assert_eq(m.weights + m.embeddings + m.context + m.reserve, 0);
        cr_assert(!m.grads_travel);
        lora_options o = {.optimizer = w.optimizer, .limits = w.limits};
        memcpy(o.limits.keep, m.keep, sizeof o.limits.keep);
        start_counting(model, GIB);
        model->ctx->cuda = NULL; /* a host after all */
        lora_run r;
        open_lora(&r, model, &list, &o);
        const int64_t pages = m.optimizer;
        const gn_optimizer_size size =
            gn_optimizer_measure(&w.optimizer, r.p->weights.shape[0], GN_BF16);
        cr_assert_eq(pages, size.pages * (int64_t)size.page_bytes);
        cr_assert_eq(device.live, predicted(&m) - pages + (int64_t)sizeof(double));
        close_lora(&r);
        stop_counting(model);
        char *table = gn_train_memory_text(&m, NULL);
        cr_assert(strstr(table, "trained weights") && strstr(table, "together"), "%s", table);
        cr_assert_null(strstr(table, "measured"));
        free(table);
        free_list(&list);
        gn_model_close(model);
    }
}

static int number_after(const char *text, const char *words) {
    const char *at = strstr(text, words);
    cr_assert_not_null(at, "'%s' in: %s", words, text);
    return atoi(at + strlen(words));
}

static gn_error refusal(gn_model *model, const gn_train_wanted *w, int64_t budget) {
    gn_train_memory m;
    gn_error err = {0};
    cr_assert_eq(gn_train_memory_plan(&m, model, w, budget, &err), GN_ENOMEM);
    return err;
}

Test(train_memory, a_refusal_says_what_would_fit) {
    gn_model *model = open_tiny();
    lora_list list = list_lora(model, RANK), small;
    start_counting(model, 4 * GIB);
    gn_train_wanted w = wanted_of(&list, 1), other;
    w.limits.max_rows = 4096;
    w.limits.max_seqs = 16;
    w.limits.context = 256;
    gn_train_memory m;
    gn_error err = {0};
    int64_t least = CONTEXT;
    while (gn_train_memory_plan(&m, model, &w, least, &err)) least += MIB;
    err = refusal(model, &w, least - 4 * MIB);

    other = w;
    other.limits.max_seqs = number_after(err.message, "micro-batches of ");
    other.limits.max_rows = 256 * other.limits.max_seqs;
    plan_ok(model, &other, least - 4 * MIB);
    other.limits.max_rows += 256;
    refusal(model, &other, least - 4 * MIB);

    other = w;
    other.limits.context = number_after(err.message, "samples of ");
    other.limits.max_rows = 16 * other.limits.context;
    plan_ok(model, &other, least - 4 * MIB);
    other.limits.max_rows += 16;
    refusal(model, &other, least - 4 * MIB);

    /* So little is missing that a smaller rank or another optimizer is enough. */
    w.paged = false;
    least = CONTEXT;
    while (gn_train_memory_plan(&m, model, &w, least, &err)) least += 10000;
    err = refusal(model, &w, least - 30000);
    cr_assert(strstr(err.message, "fit: an optimizer in pages, or micro-batches"), "%s",
              err.message);
    other = w;
    other.paged = true;
    plan_ok(model, &other, least - 30000);
    small = list_lora(model, number_after(err.message, "rank "));
    cr_assert_eq(small.rank, RANK / 2);
    other = w;
    other.items = small.items;
    other.limits.max_rank = small.rank;
    plan_ok(model, &other, least - 30000);

    /* Not even the weights fit; the device itself is smaller; nothing is trained. */
    err = refusal(model, &w, CONTEXT);
    cr_assert_null(strstr(err.message, "would fit"), "%s", err.message);
    err = refusal(model, &w, 5 * GIB);
    cr_assert(strstr(err.message, "5120.0 MiB is more than the 4096.0"), "%s", err.message);
    w.n_items = 0;
    cr_assert_eq(gn_train_memory_plan(&m, model, &w, 0, &err), GN_EINVAL);
    stop_counting(model);
    free_list(&small);
    free_list(&list);
    gn_model_close(model);
}

/* ---- large models, whose weights nobody loads ---- */

/* Working memory as the CUDA backend asks for it, roughly: the operands of one product and a piece
 * of a weight; float32 sums of attention's gradients; logits of some rows. */
static size_t large_linear(const gn_ctx *ctx, int64_t rows, int64_t k, int64_t n, int64_t rank) {
    (void)ctx;
    return (size_t)(rows * (k + (k < n ? k : n)) + (48 << 20) + (k + n + 2 * rows) * rank) * 2;
}

static size_t large_attention(const gn_ctx *ctx, int64_t rows, int64_t heads, int64_t head_dim,
                              int64_t context) {
    (void)ctx, (void)context;
    return (size_t)(rows * heads * (head_dim + 3)) * sizeof(float);
}

static size_t large_loss(const gn_ctx *ctx, int64_t c, int64_t vocab) {
    (void)ctx, (void)c;
    return (size_t)(1024 * vocab * 6);
}

/* LLaMA in NF4 with double quantization, on a GPU of 80 GiB. */
static void open_large(gn_model *model, gn_ctx *ctx, int hidden, int inter, int layers, int heads) {
    const int64_t vocab = 32000, h = hidden, i = inter;
    *model = (gn_model){.ctx = ctx};
    model->config = (gn_config){.layers = layers,
                                .hidden = hidden,
                                .intermediate = inter,
                                .heads = heads,
                                .kv_heads = heads,
                                .head_dim = hidden / heads,
                                .vocab = (int)vocab};
    model->embed = model->lm_head =
        (gn_matrix){.dtype = GN_BF16, .rows = vocab, .cols = hidden, .data = "e"};
    model->lm_head.data = "h";
    model->layers = calloc((size_t)layers, sizeof *model->layers);
    const int64_t sizes[GN_PROJ_COUNT][2] = {{h, h}, {h, h}, {h, h}, {h, h},
                                             {i, h}, {i, h}, {h, i}};
    model->owned_bytes = 2 * vocab * h * 2;
    for (int l = 0; l < layers; l++) {
        for (int p = 0; p < GN_PROJ_COUNT; p++) {
            const int64_t n = sizes[p][0] * sizes[p][1];
            model->layers[l].proj[p].rows = sizes[p][0];
            model->layers[l].proj[p].cols = sizes[p][1];
            model->owned_bytes += n / 2 + n / 64 + n / 64 / 256 * 4;
        }
    }
    *ctx = (gn_ctx){.backend = &device.table, .compute = GN_BF16, .cuda = (struct gn_cuda *)1};
    device.table = gn_cpu_backend;
    device.table.read_memory = count_memory;
    device.table.linear_bwd_workspace = large_linear;
    device.table.attention_train_workspace = large_attention;
    device.table.cross_entropy_workspace = large_loss;
    device.model = model;
    device.total = 80 * GIB;
    device.live = 0;
}

static gn_train_memory plan_large(gn_model *model, int seqs, int accumulation, double gib) {
    lora_list list = list_lora(model, 64);
    const gn_train_wanted w = want_lora(&list, seqs, 512, accumulation);
    const gn_train_memory m = plan_ok(model, &w, (int64_t)(gib * 0x1p30));
    char *table = gn_train_memory_text(&m, NULL);
    fprintf(stderr, "%d layers of %d, %d x 512 in %.1f GiB: %s", model->config.layers,
            model->config.hidden, seqs, gib, table);
    free(table);
    free_list(&list);
    return m;
}

/* The goals that DESIGN.md sets for r = 64 on all projections. */
Test(train_memory, large_models_fit_where_they_should) {
    gn_model model;
    gn_ctx ctx;
    open_large(&model, &ctx, 4096, 11008, 32, 32);
    gn_train_memory m = plan_large(&model, 16, 1, 8.5);
    cr_assert_gt(m.recomputed, 0.95);
    m = plan_large(&model, 16, 1, 50);
    cr_assert_eq(m.recomputed, 0);
    free(model.layers);
    open_large(&model, &ctx, 8192, 22016, 80, 64);
    plan_large(&model, 1, 16, 36);
    plan_large(&model, 1, 16, 38);
    plan_large(&model, 8, 2, 44);
    free(model.layers);
}
