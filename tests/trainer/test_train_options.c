/* test_train_options.c - options of `train`: presets, the names of qlora.py, and refusals. */
#include "trainer/train_options.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_ARGUMENTS = 128 };

/* Splits at spaces; the words live until the next call. */
static int split(const char *line, char **args) {
    static char words[4096];
    char *rest = NULL;
    int n = 0;
    cr_assert(strlen(line) < sizeof words);
    strcpy(words, line);
    for (char *word = strtok_r(words, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
        cr_assert(n < MAX_ARGUMENTS);
        args[n++] = word;
    }
    return n;
}

static gn_status read_line(gn_train_options *o, const char *line, gn_error *err) {
    char *args[MAX_ARGUMENTS];
    bool help;
    const int n = split(line, args);
    *err = (gn_error){0};
    return gn_train_options_read(o, n, args, &help, err);
}

/* What the line says, besides a model and a data set. */
static gn_train_options options_of(const char *rest) {
    char line[4096];
    gn_train_options o;
    gn_error err;
    snprintf(line, sizeof line, "--model m --dataset d.jsonl %s", rest);
    cr_assert_eq(read_line(&o, line, &err), GN_OK, "%s: %s", rest, err.message);
    gn_train_options_free(&o);
    return o;
}

static void refused(const char *rest, const char *why) {
    char line[4096];
    gn_train_options o;
    gn_error err;
    snprintf(line, sizeof line, "--model m --dataset d.jsonl %s", rest);
    cr_assert(read_line(&o, line, &err) != GN_OK, "%s was taken", rest);
    cr_assert(strstr(err.message, why), "%s: %s", rest, err.message);
    gn_train_options_free(&o);
}

static bool near(double a, double b) {
    return a == gn_train_decimal((float)b);
}

Test(train_options, defaults) {
    const gn_train_options o = options_of("");
    cr_assert_eq(o.mode, GN_TRAIN_QLORA);
    cr_assert_eq(o.model.quant, GN_Q_NONE);
    cr_assert(o.rank == 64 && o.alpha == 16 && o.dropout == 0);
    cr_assert(o.batch_size == 1 && o.accumulation == 16 && o.max_steps == 0 && o.epochs == 3);
    cr_assert(near(2e-4, o.learning_rate) && near(0.3, o.max_grad_norm));
    cr_assert_eq(o.optim, GN_PAGED_ADAMW_32BIT);
    cr_assert_eq(o.scheduler, GN_LR_CONSTANT);
    cr_assert_eq(o.data_seed, o.seed);
    cr_assert_eq(o.save_dtype, GN_BF16);
    cr_assert(o.shuffle && !o.evaluates && !o.resume && !o.average_micro_batches);
}

Test(train_options, presets) {
    static const struct {
        const char *name;
        double learning_rate, dropout;
    } presets[] = {{"guanaco-7b", 2e-4, 0.1},
                   {"guanaco-13b", 2e-4, 0.1},
                   {"guanaco-33b", 1e-4, 0.05},
                   {"guanaco-65b", 1e-4, 0.05}};
    for (size_t i = 0; i < sizeof presets / sizeof *presets; i++) {
        char rest[64];
        snprintf(rest, sizeof rest, "--preset %s", presets[i].name);
        const gn_train_options o = options_of(rest);
        cr_assert(near(presets[i].learning_rate, o.learning_rate) &&
                  near(presets[i].dropout, o.dropout));
        cr_assert(o.rank == 64 && o.alpha == 16 && o.max_steps == 1875);
        cr_assert_eq(o.batch_size * o.accumulation, 16);
        cr_assert(near(0.999, o.beta2) && near(0.3, o.max_grad_norm));
        cr_assert(o.scheduler == GN_LR_CONSTANT && o.group_by_length);
        cr_assert(o.data.source_max_len == 16 && o.data.target_max_len == 512);
    }
    /* Wherever it stands, what is given beside it counts. */
    gn_train_options o = options_of("--lora-r 8 --preset guanaco-65b --max_steps 5");
    cr_assert(o.rank == 8 && o.max_steps == 5 && near(1e-4, o.learning_rate));
    refused("--preset guanaco-8b", "guanaco-7b");
}

/* scripts/finetune_guanaco_7b.sh of the original, but for its data set. */
Test(train_options, the_originals_command_line) {
    const gn_train_options preset = options_of("--preset guanaco-7b");
    gn_train_options o;
    gn_error err;
    cr_assert_eq(
        read_line(
            &o,
            "--model_name_or_path llama --output_dir ./output/guanaco-7b --logging_steps 10 "
            "--save_strategy steps --data_seed 42 --save_steps 500 --save_total_limit 40 "
            "--evaluation_strategy steps --eval_dataset_size 1024 --max_eval_samples 1000 "
            "--per_device_eval_batch_size 4 --max_new_tokens 32 --dataloader_num_workers 3 "
            "--group_by_length --logging_strategy steps --remove_unused_columns False "
            "--do_train --do_eval --do_mmlu_eval --lora_r 64 --lora_alpha 16 --lora_modules all "
            "--double_quant --quant_type nf4 --bf16 --bits 4 --warmup_ratio 0.03 "
            "--lr_scheduler_type constant --gradient_checkpointing --dataset oasst1.jsonl "
            "--dataset_format oasst1 --source_max_len 16 --target_max_len 512 "
            "--per_device_train_batch_size 4 --gradient_accumulation_steps 4 "
            "--max_steps 1875 --eval_steps 187 --learning_rate 0.0002 --adam_beta2 0.999 "
            "--max_grad_norm 0.3 --lora_dropout 0.1 --weight_decay 0.0 --seed 0",
            &err),
        GN_OK, "%s", err.message);
    cr_assert_str_eq(o.model.dir, "llama");
    cr_assert_str_eq(o.output, "./output/guanaco-7b");
    cr_assert(o.mode == GN_TRAIN_QLORA && o.model.quant == GN_Q_NF4 && o.model.double_quant);
    cr_assert_eq(o.model.compute, GN_COMPUTE_BF16);
    cr_assert(o.evaluates && o.eval_when == GN_WHEN_STEPS && o.eval_size == 1024);
    cr_assert(o.does_mmlu && o.mmlu.split == 0 && o.mmlu.max_samples == 0);
    cr_assert(!strcmp(o.mmlu.dataset, "mmlu-fs") && o.mmlu.source_max_len == 2048);
    cr_assert(o.max_eval == 1000 && o.eval_steps == 187 && o.eval_batch_size == 4);
    cr_assert(o.save_when == GN_WHEN_STEPS && o.save_steps == 500 && o.save_limit == 40);
    cr_assert(o.seed == 0 && o.data_seed == 42 && o.logging_steps == 10);
    cr_assert(o.data.format == GN_FORMAT_OASST1 && o.data.files.n == 1);
    cr_assert(o.rank == preset.rank && o.alpha == preset.alpha && o.dropout == preset.dropout);
    cr_assert(o.max_steps == preset.max_steps && o.learning_rate == preset.learning_rate);
    cr_assert(o.batch_size == preset.batch_size && o.accumulation == preset.accumulation);
    gn_train_options_free(&o);
}

Test(train_options, what_the_originals_names_mean) {
    gn_train_options o = options_of("--bits 8");
    cr_assert(o.mode == GN_TRAIN_QLORA && o.model.quant == GN_Q_INT8);
    cr_assert_eq(options_of("--bits 16").mode, GN_TRAIN_LORA);
    cr_assert_eq(options_of("--full_finetune --bits 16").mode, GN_TRAIN_FULL);
    cr_assert_eq(options_of("--full_finetune True").mode, GN_TRAIN_FULL);
    cr_assert_eq(options_of("--mode lora --bits 32").mode, GN_TRAIN_LORA);
    cr_assert_eq(options_of("--adam8bit").optim, GN_PAGED_ADAMW_8BIT);
    cr_assert_eq(options_of("--adam8bit --optim adamw_32bit").optim, GN_ADAMW_8BIT);
    cr_assert_eq(options_of("--max_memory_MB 80000").model.memory, 80000000000);
    cr_assert_eq(options_of("--do_eval").eval_size, 1024);
    cr_assert_eq(options_of("--do_eval --eval_dataset_size 7").eval_size, 7);
    cr_assert_eq(options_of("--do_eval --eval_strategy epoch").eval_when, GN_WHEN_EPOCH);
    cr_assert_eq(options_of("--do_eval --evaluation_strategy no").eval_when, GN_WHEN_NEVER);
    cr_assert(options_of("--resume_from_checkpoint true").resume);
    cr_assert_not(options_of("--resume_from_checkpoint False").resume);
    cr_assert(options_of("--loss-average micro-batch").average_micro_batches);
    o = options_of("--eval-dataset e.jsonl");
    cr_assert(o.evaluates && o.eval_size == 0);
    /* One value means something here. */
    options_of("--report_to none --temperature 1 --top_p 1 --num_beams 1 --do_mmlu_eval False");
    /* MMLU is an evaluation, alone or beside another. */
    o = options_of("--do_mmlu_eval --mmlu_split test --mmlu_dataset m.json --max_mmlu_samples 9 "
                   "--mmlu_source_max_len 700 --evaluation_strategy epoch");
    cr_assert(o.evaluates && o.does_mmlu && o.mmlu.split == 1 && o.mmlu.max_samples == 9);
    cr_assert(!strcmp(o.mmlu.dataset, "m.json") && o.mmlu.source_max_len == 700);
    cr_assert_eq(o.eval_when, GN_WHEN_EPOCH);
}

Test(train_options, refusals) {
    refused("--do_train False", "trains");
    refused("--do_predict", "nothing is generated");
    refused("--predict_with_generate True", "nothing is generated");
    refused("--report_to wandb", "metrics.jsonl");
    refused("--fp16", "--bf16");
    refused("--gradient_checkpointing False", "computed again");
    refused("--trust_remote_code", "ever run");
    refused("--temperature 0.7", "nothing is generated");
    refused("--max_mmlu_samples 3", "--do-mmlu-eval");
    refused("--mmlu_dataset m.json", "--do-mmlu-eval");
    refused("--do_mmlu_eval --mmlu_split dev", "eval|test");
    refused("--do_mmlu_eval --early-stopping-patience 3", "--eval-dataset");
    refused("--deepspeed x.json", "one process");
    refused("--overwrite_output_dir", "never written over");
    refused("--resume_from_checkpoint out/checkpoint-3", "newest");
    refused("--bits 3", "4, 8, 16 or 32");
    refused("--bits 8 --quant_type nf4", "--bits 8");
    refused("--full_finetune --bits 4", "--bits 4");
    refused("--mode qlora --bits 16", "--mode");
    refused("--mode lora --quant-type nf4", "--mode qlora");
    refused("--random-init", "--mode full");
    refused("--mode full --init-adapter x", "--init-adapter");
    refused("--bf16 --compute-dtype float32", "which");
    refused("--shuffle false --group_by_length", "order");
    refused("--early-stopping-patience 3", "--eval-dataset");
    refused("--load_best_model_at_end", "--eval-dataset");
    refused("--eval-dataset e.jsonl --eval-dataset-size 3", "only one");
    refused("--lora_dropout 1", "0.99");
    refused("--optim sgd", "paged_adamw_32bit");
    refused("--lora_rr 3", "--lora-r");
    refused("--dataset alpaca", "--dataset-format alpaca");
    gn_train_options o;
    gn_error err;
    cr_assert_eq(read_line(&o, "--dataset d.jsonl", &err), GN_EINVAL);
    cr_assert(strstr(err.message, "--model"), "%s", err.message);
    gn_train_options_free(&o);
    cr_assert_eq(read_line(&o, "--model m", &err), GN_EINVAL);
    cr_assert(strstr(err.message, "--dataset"), "%s", err.message);
    gn_train_options_free(&o);
}
