/* The training step against PEFT, bitsandbytes and torch (golden/data/train.safetensors), and
 * against itself: gradients add up over micro-batches, packed samples do not see each other,
 * dropout is the same forward and backward, and results do not depend on the number of threads.
 * On the device that GN_TEST_DEVICE names, else the CPU. */
#include "trainer/step.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/adapter.h"
#include "kernels/adamw.h"

#define DATA GN_SOURCE_DIR "/tests/golden/data/"

enum {
    STEPS = 20,
    SAMPLES = 4,
    TOKENS = 64,
    ROWS = SAMPLES * TOKENS,
    MAX_SAMPLES = SAMPLES + 1, /* so many rows that a GPU takes the way of many */
    MAX_ROWS = MAX_SAMPLES * TOKENS,
    MAX_PARAMS = 64,
    MAX_COPIES = 256
};

/* ---- what is trained ---- */

typedef struct param {
    char name[96];
    gn_tensor weight, grad;
    gn_tensor m, v; /* moments */
} param;

typedef struct run {
    gn_model *model;
    gn_train_step *step;
    gn_trained trained;
    gn_lora_pair *pairs, *grads;
    gn_layer_grads *layers;
    param params[MAX_PARAMS];
    int n;
    gn_lora_pair *placed; /* pairs, where the device reads them */
} run;

static float *zeros(int64_t n) {
    float *p = calloc((size_t)n, sizeof *p);
    cr_assert_not_null(p);
    return p;
}

/* Memory of the device, zeroed. */
static void *device_zeros(const run *r, size_t bytes) {
    void *p = gn_ctx_alloc(r->model->ctx, bytes);
    cr_assert_not_null(p);
    cr_assert_eq(gn_ctx_zero(r->model->ctx, p, bytes), GN_OK);
    return p;
}

static void set_values(const run *r, const gn_tensor *t, const float *values) {
    const size_t bytes = (size_t)gn_tensor_numel(t) * sizeof *values;
    cr_assert_eq(gn_ctx_write(r->model->ctx, t->data, values, bytes), GN_OK);
}

/* A copy on the host of a dense tensor, as floats. */
static float *values_of(const run *r, const gn_tensor *t) {
    const int64_t n = gn_tensor_numel(t);
    const size_t bytes = (size_t)n * gn_dtype_size(t->dtype);
    float *values = zeros(n);
    void *raw = malloc(bytes);
    cr_assert_eq(gn_ctx_read(r->model->ctx, raw, t->data, bytes), GN_OK);
    gn_widen(values, raw, t->dtype, n);
    free(raw);
    return values;
}

/* A parameter of a tensor's shape with these values. */
static param *add_param(run *r, const gn_tensor *like, const float *values, const char *name) {
    cr_assert(r->n < MAX_PARAMS);
    param *p = &r->params[r->n++];
    const int64_t n = gn_tensor_numel(like);
    const size_t bytes = (size_t)n * sizeof *values;
    snprintf(p->name, sizeof p->name, "%s", name);
    p->weight = p->grad = *like;
    p->weight.dtype = p->grad.dtype = GN_F32;
    p->weight.data = device_zeros(r, bytes);
    p->grad.data = device_zeros(r, bytes);
    p->m = gn_tensor_1d(device_zeros(r, bytes), GN_F32, n);
    p->v = gn_tensor_1d(device_zeros(r, bytes), GN_F32, n);
    set_values(r, &p->weight, values);
    return p;
}

/* keep: what layers keep; NULL: nothing. */
static run open_run(const char *base, gn_compute compute, int threads, int rank,
                    const int32_t *keep) {
    run r = {0};
    gn_error err = {0};
    char dir[512];
    snprintf(dir, sizeof dir, DATA "%s", base);
    const char *device = getenv("GN_TEST_DEVICE");
    const gn_model_options options = {.device = device ? device : "cpu",
                                      .compute = compute,
                                      .as_stored = true,
                                      .threads = threads};
    cr_assert_eq(gn_model_open(&r.model, dir, &options, &err), GN_OK, "%s", err.message);
    gn_train_limits limits = {
        .max_rows = MAX_ROWS, .max_seqs = MAX_SAMPLES, .context = TOKENS, .max_rank = rank};
    if (keep) memcpy(limits.keep, keep, sizeof limits.keep);
    cr_assert_eq(gn_train_step_open(&r.step, r.model, &limits, &err), GN_OK, "%s", err.message);
    return r;
}

/* LoRA from adapter-init-r8 over the NF4 weights. B is zero there; `random_b` gives it values. */
static run open_lora_keeping(gn_compute compute, int threads, bool random_b, const int32_t *keep) {
    run r = open_run("tiny-bnb-nf4", compute, threads, 8, keep);
    gn_error err = {0};
    gn_adapter *init = NULL;
    cr_assert_eq(gn_adapter_open(&init, r.model, DATA "adapter-init-r8", &err), GN_OK, "%s",
                 err.message);
    const int n = r.model->config.layers * GN_PROJ_COUNT;
    r.pairs = calloc((size_t)n, sizeof *r.pairs);
    r.grads = calloc((size_t)n, sizeof *r.grads);
    for (int i = 0; i < n; i++) {
        const gn_lora_pair *from = &init->pairs[i / GN_PROJ_COUNT][i % GN_PROJ_COUNT];
        gn_lora_pair *pair = &r.pairs[i], *grad = &r.grads[i];
        *pair = *grad = *from;
        for (int b = 0; b < 2; b++) {
            char name[96];
            snprintf(name, sizeof name, "base_model.model.model.layers.%d.%s.lora_%c.weight",
                     i / GN_PROJ_COUNT, gn_proj_names[i % GN_PROJ_COUNT], b ? 'B' : 'A');
            const gn_tensor *like = b ? &from->b : &from->a;
            float *values = zeros(gn_tensor_numel(like));
            gn_widen(values, like->data, like->dtype, gn_tensor_numel(like));
            for (int64_t j = 0; b && random_b && j < gn_tensor_numel(like); j++)
                values[j] = 0.02f * sinf((float)(j * 7 + i));
            const param *p = add_param(&r, like, values, name);
            *(b ? &pair->b : &pair->a) = p->weight;
            *(b ? &grad->b : &grad->a) = p->grad;
            free(values);
        }
    }
    gn_adapter_close(init);
    r.placed = device_zeros(&r, (size_t)n * sizeof *r.pairs);
    cr_assert_eq(gn_ctx_write(r.model->ctx, r.placed, r.pairs, (size_t)n * sizeof *r.pairs), GN_OK);
    r.trained = (gn_trained){.pairs = r.pairs, .placed = r.placed, .grads = r.grads};
    return r;
}

static run open_lora(gn_compute compute, int threads, bool random_b) {
    return open_lora_keeping(compute, threads, random_b, NULL);
}

/* A float32 copy of a weight takes its place in the model. */
static gn_tensor train_matrix(run *r, gn_matrix *w) {
    const gn_tensor from = gn_tensor_2d((void *)w->data, w->dtype, w->rows, w->cols);
    float *values = values_of(r, &from);
    const param *p = add_param(r, &from, values, "weight");
    free(values);
    w->data = p->weight.data;
    w->dtype = GN_F32;
    return p->grad;
}

static gn_tensor train_vector(run *r, gn_tensor *w) {
    float *values = values_of(r, w);
    const param *p = add_param(r, w, values, "norm");
    free(values);
    w->data = p->weight.data;
    return p->grad;
}

static run open_full(const int32_t *keep) {
    run r = open_run("tiny-bf16", GN_COMPUTE_F32, 0, 0, keep);
    const int n = r.model->config.layers;
    r.layers = calloc((size_t)n, sizeof *r.layers);
    r.trained = (gn_trained){.embed = train_matrix(&r, &r.model->embed),
                             .lm_head = train_matrix(&r, &r.model->lm_head),
                             .norm = train_vector(&r, &r.model->norm),
                             .layers = r.layers};
    for (int i = 0; i < n; i++) {
        gn_layer *layer = &r.model->layers[i];
        r.layers[i].attn_norm = train_vector(&r, &layer->attn_norm);
        r.layers[i].mlp_norm = train_vector(&r, &layer->mlp_norm);
        for (int p = 0; p < GN_PROJ_COUNT; p++)
            r.layers[i].proj[p] = train_matrix(&r, &layer->proj[p]);
    }
    return r;
}

static void close_run(run *r) {
    gn_ctx *ctx = r->model->ctx;
    for (int i = 0; i < r->n; i++) {
        gn_ctx_free(ctx, r->params[i].weight.data);
        gn_ctx_free(ctx, r->params[i].grad.data);
        gn_ctx_free(ctx, r->params[i].m.data);
        gn_ctx_free(ctx, r->params[i].v.data);
    }
    gn_ctx_free(ctx, r->placed);
    free(r->pairs);
    free(r->grads);
    free(r->layers);
    gn_train_step_close(r->step);
    gn_model_close(r->model);
}

static gn_tensor flat(const gn_tensor *t) {
    return gn_tensor_1d(t->data, t->dtype, gn_tensor_numel(t));
}

static void clear_grads(run *r) {
    for (int i = 0; i < r->n; i++) {
        const gn_tensor *grad = &r->params[i].grad;
        const size_t bytes = (size_t)gn_tensor_numel(grad) * sizeof(float);
        cr_assert_eq(gn_ctx_zero(r->model->ctx, grad->data, bytes), GN_OK);
    }
}

static double grad_norm(const run *r) {
    double sum = 0;
    for (int i = 0; i < r->n; i++) {
        float *grad = values_of(r, &r->params[i].grad);
        for (int64_t j = 0; j < gn_tensor_numel(&r->params[i].grad); j++)
            sum += (double)grad[j] * grad[j];
        free(grad);
    }
    return sqrt(sum);
}

static void update(run *r, int step, float lr, float grad_scale) {
    for (int i = 0; i < r->n; i++) {
        const param *p = &r->params[i];
        gn_adamw_args args = {.lr = lr,
                              .beta1 = 0.9f,
                              .beta2 = 0.999f,
                              .eps = 1e-8f,
                              .grad_scale = grad_scale,
                              .step = step,
                              .master = flat(&p->weight),
                              .grad = flat(&p->grad),
                              .m = {.values = flat(&p->m)},
                              .v = {.values = flat(&p->v)}};
        cr_assert_eq(gn_adamw(r->model->ctx, &args), GN_OK);
    }
}

/* ---- the golden run ---- */

typedef struct golden {
    gn_tensor_file *file;
    const int32_t *ids, *labels; /* [STEPS][ROWS] */
    void *copies[MAX_COPIES];
    int n_copies;
} golden;

/* An aligned copy, which lives as long as g. */
static const void *tensor(golden *g, const char *prefix, const char *name, size_t bytes) {
    char full[160];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    const gn_file_tensor *t = gn_tensor_file_find(g->file, full);
    cr_assert(t && t->bytes == bytes, "%s", full);
    cr_assert(g->n_copies < MAX_COPIES);
    return g->copies[g->n_copies++] = memcpy(malloc(bytes), t->data, bytes);
}

static void close_golden(golden *g) {
    for (int i = 0; i < g->n_copies; i++) free(g->copies[i]);
    gn_tensor_file_close(g->file);
}

static golden open_golden(void) {
    golden g = {0};
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_open(&g.file, DATA "train.safetensors", &err), GN_OK, "%s",
                 err.message);
    g.ids = tensor(&g, "", "input_ids", STEPS * ROWS * sizeof *g.ids);
    g.labels = tensor(&g, "", "labels", STEPS * ROWS * sizeof *g.labels);
    return g;
}

static const int32_t row0[] = {0, 64, 128, 192, 256, 320}, pos0[] = {0, 0, 0, 0, 0};

static gn_train_batch batch_of(const int32_t *ids, const int32_t *labels, int n) {
    gn_train_batch b = {.rows = n * TOKENS,
                        .ids = ids,
                        .labels = labels,
                        .seqs = {.n = n, .row0 = row0, .pos0 = pos0}};
    b.scale = 1.0f / (float)gn_train_count(&b);
    return b;
}

static double relative_l2(const float *x, const float *reference, int64_t n) {
    double difference = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        difference += ((double)x[i] - reference[i]) * ((double)x[i] - reference[i]);
        norm += (double)reference[i] * reference[i];
    }
    return norm > 0 ? sqrt(difference / norm) : sqrt(difference);
}

/* The largest relative difference of any parameter, or gradient, from PREFIX + its name. */
static double worst_of(const run *r, golden *g, const char *prefix, bool grads) {
    double worst = 0;
    for (int i = 0; i < r->n; i++) {
        const gn_tensor *t = grads ? &r->params[i].grad : &r->params[i].weight;
        const int64_t n = gn_tensor_numel(t);
        const float *expected = tensor(g, prefix, r->params[i].name, (size_t)n * sizeof(float));
        float *found = values_of(r, t);
        worst = fmax(worst, relative_l2(found, expected, n));
        free(found);
    }
    return worst;
}

/* Trains for STEPS steps. Tolerances, all relative: of a loss, of a gradient norm, and of the first
 * gradients (L2). The losses are about 6, so 1e-5 of one is less than 1e-4. */
static void follow_golden(run *r, golden *g, const char *prefix, double lr, double loss_tolerance,
                          double norm_tolerance, double grad_tolerance) {
    const float *loss = tensor(g, prefix, "loss", STEPS * sizeof *loss);
    const float *norm = tensor(g, prefix, "grad_norm", STEPS * sizeof *norm);
    double worst_loss = 0, worst_norm = 0;
    for (int i = 0; i < STEPS; i++) {
        const gn_train_batch b = batch_of(g->ids + i * ROWS, g->labels + i * ROWS, SAMPLES);
        double sum = 0;
        clear_grads(r);
        cr_assert_eq(gn_train_step_run(r->step, &b, &r->trained, &sum), GN_OK);
        if (i == 0 && r->pairs) {
            const double worst = worst_of(r, g, "grad0.", true);
            fprintf(stderr, "first gradients: relative L2 at most %.2e\n", worst);
            cr_assert(worst < grad_tolerance, "first gradients: relative L2 %g", worst);
        }
        const double found = grad_norm(r);
        worst_loss = fmax(worst_loss, fabs(sum * b.scale - loss[i]) / loss[i]);
        worst_norm = fmax(worst_norm, fabs(found - norm[i]) / norm[i]);
        update(r, i + 1, (float)lr, gn_clip_scale(found, 0.3));
    }
    fprintf(stderr, "%slosses within %.2e, gradient norms within %.2e\n", prefix, worst_loss,
            worst_norm);
    cr_assert(worst_loss < loss_tolerance, "losses: %g", worst_loss);
    cr_assert(worst_norm < norm_tolerance, "gradient norms: %g", worst_norm);
}

Test(train_step, qlora_follows_the_golden_run) {
    golden g = open_golden();
    run r = open_lora(GN_COMPUTE_F32, 0, false);
    follow_golden(&r, &g, "", 2e-3, 1e-5, 1e-3, 1e-4);
    const double worst = worst_of(&r, &g, "final.", false);
    fprintf(stderr, "final weights: relative L2 at most %.2e\n", worst);
    cr_assert(worst < 1e-2, "final weights: relative L2 %g", worst);
    close_run(&r);
    close_golden(&g);
}

/* Products round what they multiply to bfloat16 in the forward pass. */
Test(train_step, in_bfloat16_losses_are_within_1_percent) {
    golden g = open_golden();
    run r = open_lora(GN_COMPUTE_BF16, 0, false);
    follow_golden(&r, &g, "", 2e-3, 0.01, 0.01, 0.02);
    close_run(&r);
    close_golden(&g);
}

Test(train_step, full_training_follows_the_golden_run) {
    golden g = open_golden();
    run r = open_full(NULL);
    follow_golden(&r, &g, "full.", 1e-3, 1e-5, 1e-3, 1e-4);
    close_run(&r);
    close_golden(&g);
}

/* ---- against itself ---- */

static float *copy_grads(const run *r) {
    int64_t n = 0, at = 0;
    for (int i = 0; i < r->n; i++) n += gn_tensor_numel(&r->params[i].grad);
    float *copy = zeros(n);
    for (int i = 0; i < r->n; i++) {
        const gn_tensor *grad = &r->params[i].grad;
        const size_t bytes = (size_t)gn_tensor_numel(grad) * sizeof *copy;
        cr_assert_eq(gn_ctx_read(r->model->ctx, copy + at, grad->data, bytes), GN_OK);
        at += gn_tensor_numel(grad);
    }
    return copy;
}

static int64_t count_grads(const run *r) {
    int64_t n = 0;
    for (int i = 0; i < r->n; i++) n += gn_tensor_numel(&r->params[i].grad);
    return n;
}

/* Loss and a copy of the gradients. */
static float *step_grads(run *r, const gn_train_batch *b, double *loss) {
    clear_grads(r);
    cr_assert_eq(gn_train_step_run(r->step, b, &r->trained, loss), GN_OK);
    return copy_grads(r);
}

Test(train_step, micro_batches_add_up) {
    golden g = open_golden();
    run r = open_lora(GN_COMPUTE_F32, 2, true);
    const gn_train_batch whole = batch_of(g.ids, g.labels, SAMPLES);
    double loss, first, second;
    float *expected = step_grads(&r, &whole, &loss);
    clear_grads(&r);
    for (int i = 0; i < 2; i++) {
        gn_train_batch half = batch_of(g.ids + i * ROWS / 2, g.labels + i * ROWS / 2, SAMPLES / 2);
        half.scale = whole.scale;
        cr_assert_eq(gn_train_step_run(r.step, &half, &r.trained, i ? &second : &first), GN_OK);
    }
    float *found = copy_grads(&r);
    cr_assert(fabs(first + second - loss) < 1e-9 * loss);
    cr_assert(relative_l2(found, expected, count_grads(&r)) < 1e-6);
    free(expected);
    free(found);
    close_run(&r);
    close_golden(&g);
}

Test(train_step, packed_samples_are_as_alone) {
    static const int32_t first[] = {0, 5, 6, 40, 90}, zero[4] = {0};
    golden g = open_golden();
    run r = open_lora(GN_COMPUTE_F32, 2, true);
    gn_train_batch packed = batch_of(g.ids, g.ids, 1);
    packed.rows = first[4];
    packed.seqs = (gn_seqs){.n = 4, .row0 = first, .pos0 = zero};
    packed.scale = 0.01f;
    cr_assert_eq(gn_train_count(&packed), 90 - 4);
    double loss, sum = 0;
    float *expected = step_grads(&r, &packed, &loss);
    clear_grads(&r);
    for (int i = 0; i < 4; i++) {
        const int32_t ends[] = {0, first[i + 1] - first[i]};
        gn_train_batch one = packed;
        one.rows = ends[1];
        one.ids = one.labels = g.ids + first[i];
        one.seqs = (gn_seqs){.n = 1, .row0 = ends, .pos0 = zero};
        double part;
        cr_assert_eq(gn_train_step_run(r.step, &one, &r.trained, &part), GN_OK);
        sum += part;
    }
    float *found = copy_grads(&r);
    cr_assert(fabs(sum - loss) < 1e-12 * loss, "%.17g and %.17g", sum, loss);
    cr_assert(relative_l2(found, expected, count_grads(&r)) < 1e-6);
    free(expected);
    free(found);
    close_run(&r);
    close_golden(&g);
}

Test(train_step, gradients_do_not_depend_on_the_threads) {
    golden g = open_golden();
    const gn_train_batch b = batch_of(g.ids, g.labels, SAMPLES);
    float *expected = NULL;
    double expected_loss = 0;
    for (int threads = 1; threads <= 3; threads++) {
        run r = open_lora(GN_COMPUTE_F32, threads, true);
        double loss;
        r.trained.dropout = 0.1f;
        float *grads = step_grads(&r, &b, &loss);
        if (threads > 1) {
            cr_assert_eq(loss, expected_loss);
            cr_assert(!memcmp(grads, expected, (size_t)count_grads(&r) * sizeof *grads));
            free(grads);
        } else {
            expected = grads;
            expected_loss = loss;
        }
        close_run(&r);
    }
    free(expected);
    close_golden(&g);
}

/* Loss and gradients are the same bits whatever the layers keep, one thing at a time, all, or some
 * of each; dropout and the training of all weights included. */
Test(train_step, what_is_kept_changes_no_bit) {
    static const int32_t keeps[][GN_KEEP_COUNT] = {
        {0},
        {[GN_KEEP_QKV] = 1},
        {[GN_KEEP_ATTENTION] = 2},
        {[GN_KEEP_RESIDUAL] = 2},
        {[GN_KEEP_GATE_UP] = 1},
        {[GN_KEEP_SWIGLU] = 2},
        {[GN_KEEP_QKV] = 2, [GN_KEEP_RESIDUAL] = 1},
        {[GN_KEEP_QKV] = 1, [GN_KEEP_ATTENTION] = 2, [GN_KEEP_SWIGLU] = 1},
        {2, 1, 2, 1, 2},
        {2, 2, 2, 2, 2},
    };
    golden g = open_golden();
    const gn_train_batch b = batch_of(g.ids, g.labels, MAX_SAMPLES);
    for (int mode = 0; mode < 3; mode++) {
        float *expected = NULL;
        double expected_loss = 0;
        for (size_t k = 0; k < sizeof keeps / sizeof *keeps; k++) {
            run r = mode == 2 ? open_full(keeps[k])
                              : open_lora_keeping(mode ? GN_COMPUTE_BF16 : GN_COMPUTE_F32, 2, true,
                                                  keeps[k]);
            double loss;
            r.trained.dropout = 0.1f;
            free(step_grads(&r, &b, &loss)); /* leaves values behind that must not be used */
            float *grads = step_grads(&r, &b, &loss);
            if (k > 0) {
                cr_assert_eq(loss, expected_loss, "mode %d, keeping %zu", mode, k);
                cr_assert(!memcmp(grads, expected, (size_t)count_grads(&r) * sizeof *grads),
                          "mode %d, keeping %zu", mode, k);
                free(grads);
            } else {
                expected = grads;
                expected_loss = loss;
            }
            close_run(&r);
        }
        free(expected);
    }
    close_golden(&g);
}

/* Of so many rows that a GPU takes the way of many. */
Test(train_step, many_rows_in_bfloat16_are_near_float32) {
    golden g = open_golden();
    const gn_train_batch b = batch_of(g.ids, g.labels, MAX_SAMPLES);
    float *grads[2];
    double loss[2], off = 0;
    for (int i = 0; i < 2; i++) {
        run r = open_lora(i ? GN_COMPUTE_BF16 : GN_COMPUTE_F32, 2, true);
        grads[i] = step_grads(&r, &b, &loss[i]);
        if (i) off = relative_l2(grads[1], grads[0], count_grads(&r));
        close_run(&r);
    }
    fprintf(stderr, "many rows in bfloat16: loss within %.2e, gradients %.2e\n",
            fabs(loss[1] - loss[0]) / loss[0], off);
    cr_assert(fabs(loss[1] - loss[0]) < 0.01 * loss[0]);
    cr_assert(off < 0.03, "gradients: relative L2 %g", off);
    free(grads[0]);
    free(grads[1]);
    close_golden(&g);
}

static void move_along(run *r, float *const v[], float by) {
    for (int i = 0; i < r->n; i++) {
        const gn_tensor *weight = &r->params[i].weight;
        float *values = values_of(r, weight);
        for (int64_t j = 0; j < gn_tensor_numel(weight); j++) values[j] += by * v[i][j];
        set_values(r, weight, values);
        free(values);
    }
}

/* The loss along a direction of all A and B, moved by `by`. */
static double loss_along(run *r, const gn_train_batch *b, float *const v[], float by) {
    double loss;
    move_along(r, v, by);
    cr_assert_eq(gn_train_step_run(r->step, b, &r->trained, &loss), GN_OK);
    move_along(r, v, -by);
    return loss;
}

/* With dropout: the masks must be the same forward, in the recomputation and backward. */
Test(train_step, gradients_are_finite_differences_of_the_loss) {
    const float h = 0x1p-12f;
    golden g = open_golden();
    run r = open_lora(GN_COMPUTE_F32, 2, true);
    gn_train_batch b = batch_of(g.ids, g.labels, SAMPLES);
    float *v[MAX_PARAMS];
    double loss, slope = 0;
    b.scale = 1;
    b.number = 41;
    r.trained.dropout = 0.2f;
    r.trained.seed = 6;
    clear_grads(&r);
    cr_assert_eq(gn_train_step_run(r.step, &b, &r.trained, &loss), GN_OK);
    for (int i = 0; i < r.n; i++) { /* along the gradient, on the whole */
        const int64_t n = gn_tensor_numel(&r.params[i].grad);
        float *grad = values_of(&r, &r.params[i].grad);
        v[i] = zeros(n);
        for (int64_t j = 0; j < n; j++) {
            v[i][j] = (grad[j] > 0 ? 1.0f : -1.0f) + sinf((float)(j + i));
            slope += (double)grad[j] * v[i][j];
        }
        free(grad);
    }
    const double near = (loss_along(&r, &b, v, h) - loss_along(&r, &b, v, -h)) / (2 * h);
    const double far = (loss_along(&r, &b, v, 2 * h) - loss_along(&r, &b, v, -2 * h)) / (4 * h);
    const double expected = near + (near - far) / 3;
    const double tolerance = fabs(expected - near) + 0x1p-23 * loss / h;
    fprintf(stderr, "slope %.6f, by differences %.6f +- %.1g\n", slope, expected, tolerance);
    cr_assert(fabs(slope - expected) <= tolerance);
    cr_assert(tolerance < 0.01 * slope);
    for (int i = 0; i < r.n; i++) free(v[i]);
    close_run(&r);
    close_golden(&g);
}

Test(train_step, dropout_is_repeatable_and_off_in_evaluation) {
    golden g = open_golden();
    run r = open_lora(GN_COMPUTE_F32, 2, true);
    gn_train_batch b = batch_of(g.ids, g.labels, SAMPLES);
    double plain, evaluated, dropped, again, next;
    free(step_grads(&r, &b, &plain));
    r.trained.dropout = 0.3f;
    float *grads = step_grads(&r, &b, &dropped), *same = step_grads(&r, &b, &again);
    cr_assert_eq(dropped, again);
    cr_assert(!memcmp(grads, same, (size_t)count_grads(&r) * sizeof *grads));
    cr_assert_eq(gn_train_step_loss(r.step, &b, &r.trained, &evaluated), GN_OK);
    cr_assert_eq(evaluated, plain);
    b.number++;
    free(step_grads(&r, &b, &next));
    cr_assert_neq(dropped, next);
    cr_assert_neq(dropped, plain);
    free(grads);
    free(same);
    close_run(&r);
    close_golden(&g);
}

Test(train_step, bad_batches_are_refused) {
    golden g = open_golden();
    run r = open_lora(GN_COMPUTE_F32, 1, true);
    static const int32_t late[] = {1, 64}, short_of[] = {0, 63}, back[] = {0, 40, 30, 64};
    static const int32_t long_one[] = {0, 65}, zero[4] = {0};
    int32_t ids[65] = {0};
    double loss;
#define BAD_BATCHES(X)                                                                             \
    X(b.rows = 0)                                                                                  \
    X(b.rows = MAX_ROWS + 1)                                                                       \
    X(b.ids = NULL)                                                                                \
    X(b.labels = NULL)                                                                             \
    X(b.seqs.n = 0)                                                                                \
    X(b.seqs.n = MAX_SAMPLES + 1)                                                                  \
    X(b.seqs.row0 = late)                                                                          \
    X(b.seqs.row0 = short_of)                                                                      \
    X(b.seqs.row0 = back; b.seqs.n = 3; b.seqs.pos0 = zero)                                        \
    X(b.seqs.row0 = long_one; b.rows = 65)                                                         \
    X(ids[9] = 512)                                                                                \
    X(ids[9] = -1)
#define X(...)                                                                                     \
    {                                                                                              \
        memset(ids, 0, sizeof ids);                                                                \
        gn_train_batch b = batch_of(ids, ids, 1);                                                  \
        cr_assert_eq(gn_train_step_run(r.step, &b, &r.trained, &loss), GN_OK);                     \
        __VA_ARGS__;                                                                               \
        cr_assert_eq(gn_train_step_run(r.step, &b, &r.trained, &loss), GN_EINVAL, "%s",            \
                     #__VA_ARGS__);                                                                \
    }
    BAD_BATCHES(X)
#undef X
    close_golden(&g);
    close_run(&r);
}
