/* Training on a GPU within budgets: what is kept, recomputed or travels in pages changes no bit,
 * and pages take no more than was planned. bench_train_memory holds large models to their plans. */
#include <criterion/criterion.h>

#include "tests/trainer/lora_run.h"

enum { RANK = 8, SEQS = 3, TOKENS = 100, MICRO_BATCHES = 2, UPDATES = 2 };

typedef struct outcome {
    double loss;
    uint16_t *weights;
    size_t bytes;
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
    cr_assert_eq(gn_train_memory_measure(&found, plan, model, r.p, r.o), GN_OK);
    cr_assert_eq(found.optimizer, plan->optimizer);
    if (plan->grads_travel) cr_assert_eq(found.gradients, plan->gradients);
    close_lora(&r);
    for (int i = 0; i < 2; i++) gn_page_device_close(pages[i]);
    return result;
}

static void check(gn_compute compute) {
    gn_model *model = open_shape("llama-tiny", "cuda", compute);
    lora_list list = list_lora(model, RANK);
    gn_train_wanted w = want_lora(&list, SEQS, TOKENS, MICRO_BATCHES);
    gn_train_memory all, plan;
    gn_error err = {0};
    w.optimizer.page_bytes = 1;
    cr_assert_eq(gn_train_memory_plan(&all, model, &w, 0, &err), GN_OK, "%s", err.message);
    cr_assert_eq(all.recomputed, 0);
    const outcome expected = train(model, &list, &w, &all);
    int different = 0;
    for (int64_t less = 0; less < 16; less++) {
        const int64_t budget = gn_train_memory_sum(&all) - (less << 19);
        if (gn_train_memory_plan(&plan, model, &w, budget, &err)) break;
        const outcome found = train(model, &list, &w, &plan);
        cr_assert_eq(found.loss, expected.loss, "%lld half MiB less: %.17g, not %.17g",
                     (long long)less, found.loss, expected.loss);
        cr_assert(!memcmp(found.weights, expected.weights, expected.bytes), "%lld half MiB less",
                  (long long)less);
        different += plan.recomputed > 0;
        free(found.weights);
    }
    cr_assert_gt(different, 0);
    free(expected.weights);
    free_list(&list);
    gn_model_close(model);
}

Test(gpu_train_memory, budgets_change_no_bit) {
    check(GN_COMPUTE_F32);
    check(GN_COMPUTE_BF16);
}
