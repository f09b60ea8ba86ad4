/* test_trainable.c - what is trained, apart from a run: gradients in pages, and which modules. */
#include "trainer/trainable.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/folder.h"
#include "trainer/gradients.h"

#define DATA GN_SOURCE_DIR "/tests/golden/data/"

enum { TOKENS = 12, UPDATES = 3 };

TestSuite(trainable, .init = test_folder_make, .fini = test_folder_remove);

static gn_trainable *open_lora(const char *modules, const char *init) {
    const gn_model_choice choice = {
        .dir = DATA "tiny-bnb-nf4", .compute = GN_COMPUTE_F32, .device = "cpu", .threads = 2};
    const gn_lora_options lora = {
        .rank = 4, .alpha = 8, .dropout = 0.1, .modules = modules, .init_adapter = init, .seed = 3};
    gn_trainable *t;
    gn_error err = {0};
    cr_assert_eq(gn_trainable_open_lora(&t, &choice, &lora, &err), GN_OK, "%s", err.message);
    return t;
}

/* Some updates; the weights then, malloc'ed. */
static float *train(gn_trainable *t, bool paged, int64_t *n) {
    static const int32_t row0[] = {0, TOKENS}, pos0[] = {0};
    const gn_train_memory plan = {.grads_travel = paged};
    const gn_optimizer_options adamw = {.beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f};
    const gn_train_limits limits = {
        .max_rows = TOKENS, .max_seqs = 1, .context = TOKENS, .max_rank = gn_trainable_max_rank(t)};
    gn_optimizer *o;
    gn_train_step *step;
    gn_error err = {0};
    cr_assert_eq(gn_trainable_allocate(t, &plan, &err), GN_OK, "%s", err.message);
    gn_parameters *p = gn_trainable_parameters(t);
    cr_assert_eq(gn_grads_pages(p) != NULL, paged);
    cr_assert_eq(gn_optimizer_open(&o, p, &adamw, NULL, &err), GN_OK);
    gn_trainable_lodge(t, gn_optimizer_pages(o));
    cr_assert_eq(gn_train_step_open(&step, gn_trainable_model(t), &limits, &err), GN_OK);
    cr_assert_eq(gn_trainable_start(t, o, &err), GN_OK);
    for (int i = 0; i < UPDATES; i++) {
        int32_t ids[TOKENS];
        double loss;
        for (int k = 0; k < TOKENS; k++) ids[k] = 3 + 7 * i + k;
        const gn_train_batch batch = {.rows = TOKENS,
                                      .ids = ids,
                                      .labels = ids,
                                      .seqs = {.n = 1, .row0 = row0, .pos0 = pos0},
                                      .scale = 1,
                                      .number = (uint32_t)i,
                                      .is_last = true};
        cr_assert_eq(gn_train_step_run(step, &batch, gn_trainable_views(t), &loss), GN_OK);
        cr_assert_eq(gn_optimizer_step(o, 0.01, 1), GN_OK);
        cr_assert_eq(gn_trainable_refresh(t), GN_OK);
        cr_assert_eq(gn_grads_clear(p), GN_OK);
    }
    *n = p->weights.shape[0];
    float *weights = malloc((size_t)*n * sizeof *weights);
    memcpy(weights, p->weights.data, (size_t)*n * sizeof *weights);
    gn_train_step_close(step);
    gn_optimizer_close(o);
    gn_trainable_close(t);
    return weights;
}

Test(trainable, gradients_in_pages_are_the_same) {
    static const char *const modules[] = {"all", "v_proj,down_proj"};
    for (int i = 0; i < 2; i++) {
        int64_t n, m;
        float *array = train(open_lora(modules[i], NULL), false, &n);
        float *pages = train(open_lora(modules[i], NULL), true, &m);
        cr_assert(n == m && memcmp(array, pages, (size_t)n * sizeof *array) == 0);
        free(array);
        free(pages);
    }
}

Test(trainable, which_modules) {
    static const struct {
        const char *modules;
        size_t n;
    } cases[] = {{"all", 42}, {"q_proj", 6}, {"v_proj,q_proj", 12}, {"down_proj,down_proj", 6}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t n, layers;
        gn_trainable *t = open_lora(cases[i].modules, NULL);
        const gn_parameter *items = gn_trainable_items(t, &n);
        const size_t *groups = gn_trainable_groups(t, &layers);
        cr_assert_eq(n, cases[i].n, "%s: %zu", cases[i].modules, n);
        cr_assert_eq(layers, 3);
        for (size_t k = 0; k < layers; k++) {
            char layer[64];
            snprintf(layer, sizeof layer, "model.layers.%zu.", k);
            cr_assert_eq(groups[k], k * n / 3);
            cr_assert_eq(strncmp(items[groups[k]].name, layer, strlen(layer)), 0);
        }
        gn_trainable_close(t);
    }
}

Test(trainable, an_adapter_to_start_from_decides) {
    size_t n;
    gn_trainable *t = open_lora("all", DATA "adapter-attn-r4");
    const gn_adapter_config *config = gn_trainable_adapter(t);
    (void)gn_trainable_items(t, &n);
    cr_assert(config->rank == 4 && !config->rslora);
    cr_assert_eq(n, 12); /* q and v */
    gn_trainable_close(t);
    t = open_lora("all", DATA "adapter-rslora-r16");
    config = gn_trainable_adapter(t);
    cr_assert(config->rank == 16 && config->rslora);
    gn_trainable_close(t);
}
