/* Allocations of a run: a step makes none, and whichever fails from a model's opening to its
 * saving, that ends with an error and leaves nothing behind: a sample of them. (Not those of the
 * data: SentencePiece does not survive them.) Under sanitizers nothing is counted and nothing
 * fails. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#include "tests/support/failing_alloc.h"
#include "tests/support/folder.h"
#include "trainer/model_writer.h"
#include "trainer/train.h"
#include "trainer/trainable.h"

#define DATA GN_SOURCE_DIR "/tests/golden/data/"

TestSuite(train_alloc, .init = test_folder_make, .fini = test_folder_remove);

/* ---- steps ---- */

/* Allocations of a run of so many steps, of which only the last is logged. */
static long count_calls(const char *steps, const char *mode) {
    const char *args[] = {"--device",
                          "cpu",
                          "--threads",
                          "1",
                          "--compute-dtype",
                          "float32",
                          "--cache-dir",
                          "none",
                          "--model",
                          DATA "tiny-bf16",
                          "--dataset",
                          test_path("data.jsonl"),
                          "--dataset-format",
                          "tokenized",
                          "--lora-r",
                          "2",
                          "--max-steps",
                          steps,
                          "--logging-steps",
                          "1000",
                          "--lora-dropout",
                          "0.1",
                          "--output-dir",
                          test_path(steps),
                          "--mode",
                          mode,
                          "--gradient-accumulation-steps",
                          "2"};
    gn_train_options o;
    gn_communicator alone = gn_communicator_alone();
    gn_error err = {0};
    bool help;
    cr_assert_eq(
        gn_train_options_read(&o, sizeof args / sizeof *args, (char *const *)args, &help, &err),
        GN_OK, "%s", err.message);
    calls = 0;
    watching = true;
    const gn_status status = gn_train(&o, &alone, &err);
    watching = false;
    cr_assert_eq(status, GN_OK, "%s", err.message);
    gn_train_options_free(&o);
    return calls;
}

static void expect_no_more(const char *mode) {
    const long few = count_calls("2", mode), many = count_calls("9", mode);
    cr_assert_eq(few, many, "%s: %ld allocations, %ld", mode, few, many);
}

Test(train_alloc, lora_steps_allocate_nothing) {
    test_write_text("data.jsonl", "{\"input_ids\":[1,5,6,7,8,9]}\n{\"input_ids\":[1,15,16,17]}\n");
    count_calls("1", "lora"); /* what is allocated once a process */
    expect_no_more("lora");
}

Test(train_alloc, full_steps_allocate_nothing) {
    test_write_text("data.jsonl", "{\"input_ids\":[1,5,6,7,8,9]}\n{\"input_ids\":[1,15,16,17]}\n");
    count_calls("1", "full");
    expect_no_more("full");
}

/* ---- failures ---- */

static gn_status open_and_save(const char *model) {
    const gn_model_choice choice = {
        .dir = DATA "tiny-bf16", .compute = GN_COMPUTE_F32, .device = "cpu", .threads = 1};
    const gn_optimizer_options adamw = {.budget = SIZE_MAX};
    gn_trainable *t = NULL;
    gn_optimizer *o = NULL;
    gn_error err = {0};
    gn_status status = gn_trainable_open_full(&t, &choice, false, 0, &err);
    if (!status) status = gn_trainable_allocate(t, &(gn_train_memory){0}, &err);
    if (!status) status = gn_optimizer_open(&o, gn_trainable_parameters(t), &adamw, NULL, &err);
    if (!status) status = gn_trainable_start(t, o, &err);
    if (!status) status = gn_model_save(model, choice.dir, GN_BF16, o, &err);
    gn_optimizer_close(o);
    gn_trainable_close(t);
    cr_assert_eq(status, err.status);
    cr_assert(!status == !*err.message);
    return status;
}

Test(train_alloc, every_allocation_may_fail, .timeout = 300) {
    const char *model = test_path("model");
    gn_status status = open_and_save(model);
    cr_assert_eq(status, GN_OK);
    bool all_made = !CAN_FAIL;
    for (long nth = 1; !all_made; nth += 1 + nth / 16) { /* each time, files are synced */
        calls = live = 0;
        fail_at = nth;
        watching = true;
        status = open_and_save(model);
        watching = false;
        fail_at = 0;
        all_made = calls < nth;
        cr_assert(!all_made || status == GN_OK);
        cr_assert_eq(live, 0, "%ld blocks are left when allocation %ld fails", live, nth);
    }
    cr_assert(!CAN_FAIL || calls > 100, "%ld allocations", calls);
}
