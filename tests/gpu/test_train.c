/* Training runs on a GPU: the golden run in float32 and bfloat16, and runs that go on to the bit.
 */
#define TRAIN_DEVICE "cuda"
#include "tests/trainer/train_lines.h"

TestSuite(train, .init = test_folder_make, .fini = test_folder_remove, .timeout = 300);

static gn_tensor_file *open_golden(void) {
    gn_tensor_file *file;
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_open(&file, DATA "train.safetensors", &err), GN_OK, "%s",
                 err.message);
    write_golden(file);
    return file;
}

#define LORA                                                                                       \
    GOLDEN "--model " DATA "tiny-bnb-nf4 --init-adapter " DATA                                     \
           "adapter-init-r8 --learning_rate 0.002 "
#define FULL GOLDEN "--model " DATA "tiny-bf16 --mode full --learning_rate 0.001 "

Test(train, follows_the_golden_run) {
    gn_tensor_file *file = open_golden();
    run(LORA "--output-dir @lora");
    compare_golden(file, "", "lora", 1e-4, 1e-3);
    run(FULL "--output-dir @full");
    compare_golden(file, "full.", "full", 1e-4, 1e-3);
    gn_tensor_file_close(file);
}

/* Losses are about 6: 0.06 is 1 %. */
Test(train, in_bfloat16_losses_are_within_1_percent) {
    gn_tensor_file *file = open_golden();
    run(LORA "--output-dir @lora --compute-dtype bfloat16");
    compare_golden(file, "", "lora", 0.06, 0.05);
    run(FULL "--output-dir @full --compute-dtype bfloat16");
    compare_golden(file, "full.", "full", 0.06, 0.05);
    gn_tensor_file_close(file);
}

/* In each mode, with each optimizer: the same again, and from a checkpoint, gives the same bits. */
Test(train, goes_on_to_the_bit) {
    static const char *const modes[] = {"--mode qlora --model " DATA "tiny-bnb-nf4",
                                        "--mode lora --model " DATA "tiny-bf16",
                                        "--mode full --random-init --model " DATA "tiny-bf16"};
    static const char *const optims[] = {"paged_adamw_32bit", "paged_adamw_8bit", "adamw_32bit",
                                         "adamw_8bit"};
    write_data("data.jsonl", 24);
    for (size_t i = 0; i < 3; i++) {
        for (size_t k = 0; k < 4; k++) {
            char line[4][1024], name[2][96];
            for (int part = 0; part < 4; part++)
                snprintf(line[part], sizeof line[part],
                         SMALL "%s --compute-dtype bfloat16 --lora-dropout 0.1 --optim %s "
                               "--output-dir @%s%zu%zu %s",
                         modes[i], optims[k],
                         part == 1  ? "again"
                         : part > 1 ? "cut"
                                    : "whole",
                         i, k,
                         part == 2   ? "--max-steps 3"
                         : part == 3 ? "--resume"
                                     : "");
            for (int part = 0; part < 4; part++) run(line[part]);
            for (int other = 0; other < 2; other++) {
                snprintf(name[0], sizeof *name, "whole%zu%zu/checkpoint-6/optimizer.safetensors", i,
                         k);
                snprintf(name[1], sizeof *name, "%s%zu%zu/checkpoint-6/optimizer.safetensors",
                         other ? "cut" : "again", i, k);
                cr_assert(same_files(name[0], name[1]), "%s and %s", name[0], name[1]);
            }
        }
    }
}
