/* Memory of a training step: running allocates nothing, and every allocation of opening one fails
 * once, each time ending with GN_ENOMEM and nothing left behind.
 * Under sanitizers nothing is counted and nothing fails. */
#include <criterion/criterion.h>

#include <stdlib.h>
#include <string.h>

#include "engine/adapter.h"
#include "tests/support/failing_alloc.h"
#include "trainer/gradients.h"
#include "trainer/step.h"

#define DATA GN_SOURCE_DIR "/tests/golden/data/"

enum { TOKENS = 24 };

static const gn_train_limits limits = {
    .max_rows = TOKENS, .max_seqs = 1, .context = TOKENS, .max_rank = 8};

static gn_model *open_model(void) {
    gn_model *model = NULL;
    gn_error err = {0};
    const gn_model_options options = {.device = "cpu", .compute = GN_COMPUTE_F32, .threads = 2};
    cr_assert_eq(gn_model_open(&model, DATA "tiny-bnb-nf4", &options, &err), GN_OK, "%s",
                 err.message);
    return model;
}

Test(step_memory, running_allocates_nothing) {
    static const int32_t row0[] = {0, TOKENS}, pos0[] = {0};
    gn_model *model = open_model();
    gn_adapter *adapter = NULL;
    gn_train_step *step = NULL;
    gn_error err = {0};
    int32_t ids[TOKENS];
    double loss;
    for (int i = 0; i < TOKENS; i++) ids[i] = 3 + i;
    cr_assert_eq(gn_adapter_open(&adapter, model, DATA "adapter-all-r8", &err), GN_OK);
    cr_assert_eq(gn_train_step_open(&step, model, &limits, &err), GN_OK, "%s", err.message);
    const int n = model->config.layers * GN_PROJ_COUNT;
    gn_lora_pair *grads = calloc((size_t)n, sizeof *grads);
    for (int i = 0; i < n; i++) {
        gn_tensor *both[] = {&grads[i].a, &grads[i].b};
        grads[i] = adapter->pairs[i / GN_PROJ_COUNT][i % GN_PROJ_COUNT];
        for (int j = 0; j < 2; j++) {
            both[j]->dtype = GN_F32;
            both[j]->data = calloc((size_t)gn_tensor_numel(both[j]), sizeof(float));
        }
    }
    const gn_trained trained = {
        .pairs = adapter->pairs[0], .placed = adapter->pairs[0], .grads = grads, .dropout = 0.1f};
    const gn_train_batch batch = {.rows = TOKENS,
                                  .ids = ids,
                                  .labels = ids,
                                  .seqs = {.n = 1, .row0 = row0, .pos0 = pos0},
                                  .scale = 1};
    watching = true;
    const gn_status status = gn_train_step_run(step, &batch, &trained, &loss);
    watching = false;
    cr_assert_eq(status, GN_OK);
    cr_assert_eq(calls, 0, "%ld allocations", calls);
    for (int i = 0; i < n; i++) {
        free(grads[i].a.data);
        free(grads[i].b.data);
    }
    free(grads);
    gn_train_step_close(step);
    gn_adapter_close(adapter);
    gn_model_close(model);
}

Test(step_memory, every_allocation_of_opening_fails_once) {
    gn_status status = GN_ENOMEM;
    for (long nth = 1; CAN_FAIL && status != GN_OK; nth++) {
        gn_model *model = open_model();
        gn_train_step *step = NULL;
        gn_error err = {0};
        calls = live = 0;
        fail_at = nth;
        watching = true;
        status = gn_train_step_open(&step, model, &limits, &err);
        const bool all_made = calls < nth;
        gn_train_step_close(step);
        watching = false;
        fail_at = 0;
        cr_assert_eq(status, all_made ? GN_OK : GN_ENOMEM, "allocation %ld", nth);
        /* the model keeps the working memory that the step reserved */
        cr_assert_leq(live, 1, "%ld blocks are left when allocation %ld fails", live, nth);
        gn_model_close(model);
    }
    cr_assert(!CAN_FAIL || calls > 5, "%ld allocations", calls);
}

/* Parameters with their gradients in pages. */
Test(step_memory, every_allocation_of_parameters_fails_once) {
    static const gn_parameter items[] = {{.name = "a", .ndim = 1, .shape = {300}},
                                         {.name = "b", .ndim = 1, .shape = {5}}};
    static const size_t groups[] = {0, 1};
    const gn_grad_options options = {groups, 2, SIZE_MAX, NULL};
    gn_model *model = open_model();
    gn_status status = GN_ENOMEM;
    for (long nth = 1; CAN_FAIL && status != GN_OK; nth++) {
        gn_parameters *p = NULL;
        gn_error err = {0};
        calls = live = 0;
        fail_at = nth;
        watching = true;
        status =
            gn_parameters_open_paged(&p, model->ctx, items, 2, GN_BF16, GN_F32, &options, &err);
        const bool all_made = calls < nth;
        gn_parameters_close(p);
        watching = false;
        fail_at = 0;
        cr_assert_eq(status, all_made ? GN_OK : GN_ENOMEM, "allocation %ld", nth);
        cr_assert_eq(live, 0, "%ld blocks are left when allocation %ld fails", live, nth);
    }
    cr_assert(!CAN_FAIL || calls > 8, "%ld allocations", calls);
    gn_model_close(model);
}
