/* Training on a GPU within budgets: what is kept, recomputed or travels in pages changes no bit,
 * and pages take no more than was planned. bench_train_memory holds large models to their plans. */
#include <criterion/criterion.h>

#include "tests/trainer/lora_run.h"

enum { RANK = 8, SEQS = 3, TOKENS = 100, MICRO_BATCHES = 2, UPDATES = 2, BUDGETS = 6 };

typedef struct outcome {
    double loss;
    uint16_t *weights;
    size_t bytes;
    int64_t evictions; /* of optimizer pages */
} outcome;

static outcome train(gn_model *model, const lora_list *list, const gn_train_wanted *w,
                     const gn_train_memory *plan) {
    gn_page_device *pages[2];
    gn_train_measured found;
    lora_run r;
    outcome result;
    for (int i = 0; i < 2; i++) cr_assert_eq(gn_page_device_open(&pages[i], model->ctx), GN_OK);
    open_planned(&r, model, list, w, plan, pages);
    for (int i = 0; i < UPDATES; i++) update_lora(&r, i, MICRO_BATCHES, SEQS, TOKENS);
    result.loss = r.loss;
    result.weights = read_weights(&r, &result.bytes);
    result.evictions = gn_pages_read_stats(gn_optimizer_pages(r.o)).evictions;
    cr_assert_eq(gn_train_memory_measure(&found, plan, model, r.p, r.o), GN_OK);
    cr_assert_eq(found.optimizer, (int64_t)plan->optimizer_budget);
    cr_assert_eq(found.gradients, plan->grads_travel ? (int64_t)plan->grad_budget : -1);
    close_lora(&r);
    for (int i = 0; i < 2; i++) gn_page_device_close(pages[i]);
    return result;
}

static gn_train_memory plan_ok(gn_model *model, const gn_train_wanted *w, int64_t budget) {
    gn_train_memory plan;
    gn_error err = {0};
    cr_assert_eq(gn_train_memory_plan(&plan, model, w, budget, &err), GN_OK, "%s", err.message);
    return plan;
}

/* The least budget that is not refused, to the byte; `enough` is not. */
static int64_t least_budget(gn_model *model, const gn_train_wanted *w, int64_t enough) {
    int64_t refused = 0;
    while (enough - refused > 1) {
        const int64_t middle = refused + (enough - refused) / 2;
        gn_train_memory plan;
        gn_error err = {0};
        *(gn_train_memory_plan(&plan, model, w, middle, &err) ? &refused : &enough) = middle;
    }
    return enough;
}

/* From a budget that everything fits in down to the least. */
static void check(const char *shape, gn_compute compute) {
    gn_model *model = open_shape(shape, "cuda", compute);
    lora_list list = list_lora(model, RANK);
    gn_train_wanted w = want_lora(&list, SEQS, TOKENS, MICRO_BATCHES);
    w.optimizer.page_bytes = 1;
    gn_train_memory plan = plan_ok(model, &w, 0);
    plan = plan_ok(model, &w, gn_train_memory_sum(&plan)); /* whose reserve is a budget's */
    cr_assert_eq(plan.recomputed, 0);
    cr_assert(!plan.grads_travel);
    const int64_t most = gn_train_memory_sum(&plan), least = least_budget(model, &w, most);
    const outcome expected = train(model, &list, &w, &plan);
    cr_assert_eq(expected.evictions, 0);
    for (int64_t i = 1; i <= BUDGETS; i++) {
        const int64_t budget = most - (most - least) * i / BUDGETS;
        plan = plan_ok(model, &w, budget);
        const outcome found = train(model, &list, &w, &plan);
        cr_assert_eq(found.loss, expected.loss, "%lld bytes: %.17g, not %.17g", (long long)budget,
                     found.loss, expected.loss);
        cr_assert(!memcmp(found.weights, expected.weights, expected.bytes), "%lld bytes",
                  (long long)budget);
        cr_assert_gt(plan.recomputed, i == BUDGETS ? 0.99 : 0);
        if (i == BUDGETS) cr_assert_gt(found.evictions, 0);
        free(found.weights);
    }
    /* A page stays of each of three layers. */
    cr_assert_eq(plan.grads_travel, model->config.layers > 3);
    free(expected.weights);
    free_list(&list);
    gn_model_close(model);
}

Test(gpu_train_memory, budgets_change_no_bit) {
    check("llama-tiny", GN_COMPUTE_F32);
    check("llama-tiny", GN_COMPUTE_BF16);
    check("llama-1.1b", GN_COMPUTE_BF16);
}

/* What is reserved for weights is what they take. */
static void check_weights(gn_model *model) {
    cr_assert_eq(model->n_owned, 1);
    cr_assert_eq(model->reserved_bytes, 0);
    gn_model_close(model);
}

Test(gpu_train_memory, weights_are_one_allocation) {
    static const struct {
        const char *dir;
        bool as_stored;
        gn_qtype quant;
        bool no_double_quant;
    } cases[] = {{"tiny-bf16", true, GN_Q_NONE, false},
                 {"tiny-bf16", false, GN_Q_NF4, false},
                 {"tiny-bf16", false, GN_Q_FP4, true},
                 {"tiny-bf16", false, GN_Q_INT8, false},
                 {"tiny-bnb-nf4", true, GN_Q_NONE, false}};
    check_weights(open_shape("llama-tiny", "cuda", GN_COMPUTE_BF16));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const gn_model_options options = {.device = "cuda",
                                          .as_stored = cases[i].as_stored,
                                          .quant = cases[i].quant,
                                          .no_double_quant = cases[i].no_double_quant};
        char dir[512];
        gn_model *model;
        gn_error err = {0};
        snprintf(dir, sizeof dir, "%s/tests/golden/data/%s", GN_SOURCE_DIR, cases[i].dir);
        cr_assert_eq(gn_model_open(&model, dir, &options, &err), GN_OK, "%s", err.message);
        check_weights(model);
    }
}
