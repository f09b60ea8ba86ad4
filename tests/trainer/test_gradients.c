/* Gradients in pages: training is the same bits as with gradients that stay, on a device with room
 * for a few layers' at a time; what is cleared is not copied. */
#include <criterion/criterion.h>

#include "tests/support/late_pages.h"
#include "tests/trainer/lora_run.h"

enum { RANK = 4, TOKENS = 40, MICRO_BATCHES = 2, UPDATES = 3, LAYERS = 3 };

/* room: groups that may stay on the device; 0: gradients are in one array. */
static void open_run(lora_run *r, gn_model *model, int room, const gn_page_device *device) {
    lora_list list = list_lora(model, RANK);
    cr_assert_eq(list.layers, LAYERS);
    const size_t page = gn_grad_page_bytes(list.items, list.n, GN_F32, list.groups, list.layers);
    const gn_grad_options grads = {list.groups, list.layers, (size_t)room * page, device};
    const lora_options options = {
        .grads = room ? &grads : NULL,
        .optimizer = {.beta1 = 0.9f,
                      .beta2 = 0.999f,
                      .eps = 1e-8f,
                      .budget = SIZE_MAX,
                      .page_bytes = 300000}, /* not whole layers */
        .limits = {.max_rows = TOKENS, .max_seqs = 1, .context = TOKENS, .max_rank = RANK},
    };
    open_lora(r, model, &list, &options);
    free_list(&list);
}

static void expect_same_weights(const lora_run *a, const lora_run *b, const char *what) {
    cr_assert_eq(a->loss, b->loss, "%s", what);
    size_t bytes;
    uint16_t *x = read_weights(a, &bytes), *y = read_weights(b, &bytes);
    cr_assert(!memcmp(x, y, bytes), "%s", what);
    free(x);
    free(y);
}

static void update_all(lora_run *r) {
    for (int i = 0; i < UPDATES; i++) update_lora(r, i, MICRO_BATCHES, 1, TOKENS);
}

Test(gradients, in_pages_are_the_same) {
    gn_model *model = open_tiny();
    lora_run whole, paged;
    open_run(&whole, model, 0, NULL);
    cr_assert_null(gn_grads_pages(whole.p));
    update_all(&whole);
    for (int room = 1; room <= LAYERS; room++) {
        gn_page_device *device = test_late_pages(model->ctx);
        open_run(&paged, model, room, device);
        cr_assert_null(paged.p->grads.data);
        update_all(&paged);
        expect_same_weights(&whole, &paged, "pages that travel");
        const gn_page_stats s = gn_pages_read_stats(gn_grads_pages(paged.p));
        const int64_t page = (int64_t)s.peak / room;
        cr_assert_eq(s.peak % (size_t)room, 0);
        if (room == LAYERS)
            cr_assert(s.uploaded == 0 && s.downloaded == 0, "all layers have room");
        else
            cr_assert_leq(s.uploaded, UPDATES * (MICRO_BATCHES - 1 + 2) * LAYERS * page,
                          "the first micro-batch's zeros are not copied");
        close_lora(&paged);
        gn_page_device_close(device);
    }
    open_run(&paged, model, 1, NULL);
    update_all(&paged);
    expect_same_weights(&whole, &paged, "pages used where they are");
    close_lora(&paged);
    close_lora(&whole);
    gn_model_close(model);
}

Test(gradients, the_norm_is_that_of_all) {
    gn_model *model = open_tiny();
    lora_run whole, paged;
    double a, b;
    open_run(&whole, model, 0, NULL);
    gn_page_device *device = test_late_pages(model->ctx);
    open_run(&paged, model, 2, device);
    update_lora(&whole, 0, 1, 1, TOKENS);
    update_lora(&paged, 0, 1, 1, TOKENS);
    cr_assert_eq(gn_optimizer_grad_norm(whole.o, &a), GN_OK);
    cr_assert_eq(gn_optimizer_grad_norm(paged.o, &b), GN_OK);
    cr_assert(a > 0 && fabs(a - b) < 1e-12 * a, "%.17g and %.17g", a, b);
    cr_assert_eq(gn_grads_clear(paged.p), GN_OK);
    cr_assert_eq(gn_optimizer_grad_norm(paged.o, &b), GN_OK);
    cr_assert_eq(b, 0);
    close_lora(&whole);
    close_lora(&paged);
    gn_page_device_close(device);
    gn_model_close(model);
}

Test(gradients, groups_that_make_no_sense_are_refused) {
    static const gn_parameter items[] = {{.name = "a", .ndim = 1, .shape = {300}},
                                         {.name = "b", .ndim = 1, .shape = {5}},
                                         {.name = "c", .ndim = 1, .shape = {7}}};
    static const size_t late[] = {1, 2}, twice[] = {0, 1, 1}, beyond[] = {0, 3}, good[] = {0, 2};
    const struct {
        const size_t *groups;
        size_t n;
    } bad[] = {{late, 2}, {twice, 3}, {beyond, 2}, {good, 0}};
    gn_ctx *ctx;
    gn_parameters *p;
    gn_error err = {0};
    cr_assert_eq(gn_ctx_open(&ctx, &(gn_ctx_options){.device = "cpu", .threads = 1}, &err), GN_OK);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const gn_grad_options o = {bad[i].groups, bad[i].n, SIZE_MAX, NULL};
        cr_assert_eq(gn_parameters_open_paged(&p, ctx, items, 3, GN_F32, GN_F32, &o, &err),
                     GN_EINVAL);
    }
    const gn_grad_options o = {good, 2, SIZE_MAX, NULL};
    cr_assert_eq(gn_parameters_open_paged(&p, ctx, items, 3, GN_F32, GN_F32, &o, &err), GN_OK);
    cr_assert_eq(gn_grads_groups(p), 2);
    cr_assert_eq(gn_grads_first(p, 1), 768);
    cr_assert_eq(gn_grads_first(p, 2), 1024);
    cr_assert_eq(gn_grads_group(p, 767), 0);
    cr_assert_eq(gn_grads_group(p, 768), 1);
    cr_assert_eq(gn_grad_page_bytes(items, 3, GN_F32, good, 2), 768 * sizeof(float));
    gn_parameters_close(p);
    gn_ctx_close(ctx);
}
