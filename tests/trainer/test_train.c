/* test_train.c - whole runs: what they come to, what they leave, how they go on. */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/trainer/train_lines.h"

TestSuite(train, .init = test_folder_make, .fini = test_folder_remove);

/* Of all tensors of two safetensors files: the largest relative L2 difference. */
static double difference(const char *a, const char *b) {
    gn_tensor_file *x, *y;
    gn_error err = {0};
    double worst = 0;
    cr_assert_eq(gn_safetensors_open(&x, a, &err), GN_OK, "%s", err.message);
    cr_assert_eq(gn_safetensors_open(&y, b, &err), GN_OK, "%s", err.message);
    cr_assert_eq(gn_tensor_file_count(x), gn_tensor_file_count(y));
    for (size_t i = 0; i < gn_tensor_file_count(x); i++) {
        const gn_file_tensor *s = gn_tensor_file_at(x, i), *t = gn_tensor_file_find(y, s->name);
        double sum = 0, norm = 0;
        cr_assert(t && t->dtype == GN_F32 && s->dtype == GN_F32 && t->bytes == s->bytes);
        for (size_t k = 0; k < s->bytes / sizeof(float); k++) {
            float u, v;
            memcpy(&u, (const char *)s->data + k * sizeof u, sizeof u);
            memcpy(&v, (const char *)t->data + k * sizeof v, sizeof v);
            sum += ((double)u - v) * ((double)u - v);
            norm += (double)v * v;
        }
        worst = fmax(worst, sqrt(sum / fmax(norm, 1e-30)));
    }
    gn_tensor_file_close(x);
    gn_tensor_file_close(y);
    return worst;
}

/* ---- against torch, PEFT and bitsandbytes ---- */

Test(train, follows_the_golden_run) {
    gn_tensor_file *file;
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_open(&file, DATA "train.safetensors", &err), GN_OK, "%s",
                 err.message);
    write_golden(file);
    run(GOLDEN "--output-dir @lora --model " DATA "tiny-bnb-nf4 --init-adapter " DATA
               "adapter-init-r8 --learning_rate 0.002");
    compare_golden(file, "", "lora", 1e-4, 1e-3);
    run(GOLDEN "--output-dir @full --model " DATA "tiny-bf16 --mode full --learning_rate 0.001");
    compare_golden(file, "full.", "full", 1e-4, 1e-3);
    gn_tensor_file_close(file);
}

/* The golden run's last weights, under the names that PEFT gives them. */
Test(train, leaves_the_golden_runs_adapter) {
    gn_tensor_file *file, *adapter;
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_open(&file, DATA "train.safetensors", &err), GN_OK);
    write_golden(file);
    run(GOLDEN "--output-dir @out --model " DATA "tiny-bnb-nf4 --init-adapter " DATA
               "adapter-init-r8 --learning_rate 0.002");
    cr_assert_eq(
        gn_safetensors_open(&adapter, test_path("out/adapter/adapter_model.safetensors"), &err),
        GN_OK);
    cr_assert_eq(gn_tensor_file_count(adapter), 42);
    for (size_t i = 0; i < gn_tensor_file_count(adapter); i++) {
        char name[128];
        double sum = 0, norm = 0;
        const gn_file_tensor *t = gn_tensor_file_at(adapter, i);
        snprintf(name, sizeof name, "final.%s", t->name);
        const gn_file_tensor *expected = gn_tensor_file_find(file, name);
        cr_assert(expected && expected->bytes == t->bytes, "%s", name);
        for (size_t k = 0; k < t->bytes; k += sizeof(float)) {
            float u, v;
            memcpy(&u, (const char *)t->data + k, sizeof u);
            memcpy(&v, (const char *)expected->data + k, sizeof v);
            sum += ((double)u - v) * ((double)u - v);
            norm += (double)v * v;
        }
        cr_assert(sqrt(sum / norm) < 1e-2, "%s: %g", name, sqrt(sum / norm));
    }
    gn_tensor_file_close(adapter);
    gn_tensor_file_close(file);
}

/* ---- learning ---- */

Test(train, every_mode_lowers_the_loss) {
    static const char *const modes[] = {
        "--mode qlora --model " DATA "tiny-bnb-nf4", "--mode qlora --model " DATA "tiny-bf16",
        "--mode lora --model " DATA "tiny-bf16", "--mode full --model " DATA "tiny-bf16",
        "--mode full --random-init --model " DATA "tiny-bf16"};
    static const char *const optims[] = {"paged_adamw_32bit", "adamw_8bit"};
    write_data("data.jsonl", 16);
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        for (int k = 0; k < 2; k++) {
            char line[1024], output[32];
            snprintf(output, sizeof output, "out%zu-%d", i, k);
            snprintf(line, sizeof line, SMALL "--max-steps 20 --output-dir @%s --optim %s %s",
                     output, optims[k], modes[i]);
            run(line);
            cr_assert_eq(read_metrics(output), 20);
            cr_assert(value(19, "loss") < value(0, "loss") - 0.5, "%s: %g, then %g", line,
                      value(0, "loss"), value(19, "loss"));
            cr_assert(value(3, "tok_s") > 0 && value(3, "device_bytes") > 0);
            cr_assert_eq(value(3, "learning_rate"), 0.01);
        }
    }
}

/* What full training leaves is a model folder, to the bit its masters. */
Test(train, a_trained_model_can_be_trained_on) {
    write_data("data.jsonl", 16);
    run(SMALL "--mode full --random-init --model " DATA "tiny-bf16 --output-dir @a");
    cr_assert(test_exists("a/model/config.json") && test_exists("a/model/tokenizer.model"));
    cr_assert(test_exists("a/report.html") && test_exists("a/train_config.json"));
    cr_assert_not(test_exists("a/checkpoint-6/adapter_config.json"));
    char line[1024];
    snprintf(line, sizeof line,
             SMALL "--mode full --max-steps 1 --learning-rate 0 --model %s --output-dir @b",
             test_path("a/model"));
    run(line);
    cr_assert(same_files("a/model/model.safetensors", "b/model/model.safetensors"));
}

/* From a folder without weights, whose embeddings are the output's, too. */
Test(train, a_new_model_with_tied_embeddings) {
    write_data("data.jsonl", 16);
    mkdir(test_path("shape"), 0777);
    test_copy(DATA "tiny-bf16/tokenizer.model", "shape/tokenizer.model");
    test_write_text("shape/config.json",
                    "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\","
                    "\"hidden_size\":64,\"intermediate_size\":96,\"num_hidden_layers\":2,"
                    "\"num_attention_heads\":4,\"num_key_value_heads\":2,\"vocab_size\":512,"
                    "\"hidden_act\":\"silu\",\"rms_norm_eps\":1e-06,\"bos_token_id\":1,"
                    "\"eos_token_id\":2,\"tie_word_embeddings\":true}");
    char line[1024];
    snprintf(line, sizeof line,
             SMALL "--mode full --random-init --max-steps 20 --model %s --output-dir @out",
             test_path("shape"));
    run(line);
    read_metrics("out");
    cr_assert(fabs(value(0, "loss") - log(512)) < 0.5); /* it knows nothing */
    cr_assert(value(19, "loss") < value(0, "loss") - 0.5);
    gn_tensor_file *file;
    gn_error err = {0};
    cr_assert_eq(gn_safetensors_open(&file, test_path("out/model/model.safetensors"), &err), GN_OK);
    cr_assert_eq(gn_tensor_file_count(file), 2 + 2 * 9);
    cr_assert_null(gn_tensor_file_find(file, "lm_head.weight"));
    gn_tensor_file_close(file);
    snprintf(line, sizeof line, SMALL "--mode qlora --max-steps 1 --model %s --output-dir @over",
             test_path("out/model"));
    run(line);
    read_metrics("over");
    cr_assert(value(0, "loss") < log(512) - 0.3);
}

Test(train, seeds_repeat_to_the_bit) {
    write_data("data.jsonl", 24);
    run(SMALL "--lora-dropout 0.2 --output-dir @a");
    run(SMALL "--lora-dropout 0.2 --output-dir @b --threads 1");
    run(SMALL "--lora-dropout 0.2 --output-dir @c --seed 7");
    cr_assert(
        same_files("a/adapter/adapter_model.safetensors", "b/adapter/adapter_model.safetensors"));
    cr_assert_not(
        same_files("a/adapter/adapter_model.safetensors", "c/adapter/adapter_model.safetensors"));
}

/* What is kept, and what is computed again, changes no bit. */
Test(train, budgets_do_not_change_results) {
    write_data("data.jsonl", 24);
    run(SMALL "--lora-dropout 0.2 --output-dir @free");
    run(SMALL "--lora-dropout 0.2 --output-dir @tight --memory-budget 6MiB");
    cr_assert(same_files("free/adapter/adapter_model.safetensors",
                         "tight/adapter/adapter_model.safetensors"));
}

/* ---- batches ---- */

#define ORDERED                                                                                    \
    "--device cpu --compute-dtype float32 --cache-dir none --model " DATA "tiny-bnb-nf4 "          \
    "--dataset @data.jsonl --dataset-format tokenized --lora-r 4 --learning-rate 0.001 "           \
    "--max-steps 3 --shuffle false "                                                               \
    "--save-dtype float32 "

Test(train, accumulated_micro_batches_are_one_batch) {
    write_data("data.jsonl", 24);
    run(ORDERED "--output-dir @one --per-device-train-batch-size 8 "
                "--gradient-accumulation-steps 1");
    run(ORDERED "--output-dir @many --per-device-train-batch-size 2 "
                "--gradient-accumulation-steps 4");
    run(ORDERED "--output-dir @mean --per-device-train-batch-size 2 "
                "--gradient-accumulation-steps 4 --loss-average micro-batch");
    double one[3];
    cr_assert_eq(read_metrics("one"), 3);
    for (int i = 0; i < 3; i++) one[i] = value(i, "loss");
    cr_assert_eq(read_metrics("many"), 3);
    for (int i = 0; i < 3; i++) cr_assert(fabs(value(i, "loss") - one[i]) < 1e-5);
    const double worst = difference(test_path("many/adapter/adapter_model.safetensors"),
                                    test_path("one/adapter/adapter_model.safetensors"));
    cr_assert(worst < 1e-4, "%g", worst);
    /* Micro-batches of different length do not count alike. */
    read_metrics("mean");
    cr_assert(fabs(value(0, "loss") - one[0]) > 1e-5);
}

/* Adds up over two processes, through memory that they share. */
typedef struct shared_sums {
    pthread_barrier_t barrier;
    double values[2][1 << 16];
} shared_sums;

static shared_sums *sums;

static gn_status sum_numbers(gn_communicator *c, double *numbers, int n) {
    cr_assert(n <= 1 << 16);
    memcpy(sums->values[c->rank], numbers, (size_t)n * sizeof *numbers);
    pthread_barrier_wait(&sums->barrier);
    for (int i = 0; i < n; i++) numbers[i] = sums->values[0][i] + sums->values[1][i];
    pthread_barrier_wait(&sums->barrier);
    return GN_OK;
}

static gn_status sum_floats(gn_communicator *c, gn_ctx *ctx, const gn_tensor *array) {
    const int64_t n = gn_tensor_numel(array);
    double *wide = test_alloc((size_t)n * sizeof *wide);
    float *values = array->data;
    cr_assert(gn_ctx_is_host(ctx) && array->dtype == GN_F32);
    for (int64_t i = 0; i < n; i++) wide[i] = values[i];
    const gn_status status = sum_numbers(c, wide, (int)n);
    for (int64_t i = 0; i < n; i++) values[i] = (float)wide[i];
    return status;
}

#define MMLU "--do-mmlu-eval --mmlu-dataset @mmlu.json"

static double any_loss(int line) {
    return value(line, has(line, "loss")        ? "loss"
                       : has(line, "eval_loss") ? "eval_loss"
                                                : "mmlu_loss");
}

Test(train, two_processes_are_as_one) {
    sums = mmap(NULL, sizeof *sums, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    cr_assert(sums != MAP_FAILED);
    pthread_barrierattr_t shared;
    pthread_barrierattr_init(&shared);
    pthread_barrierattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(&sums->barrier, &shared, 2);
    write_data("data.jsonl", 24);
    write_questions("mmlu.json", 11);
    run(ORDERED "--output-dir @one --per-device-train-batch-size 4 --threads 1 "
                "--gradient-accumulation-steps 2 --eval-dataset @data.jsonl " MMLU);
    const pid_t child = fork();
    gn_communicator c = {
        .rank = child ? 0 : 1, .size = 2, .sum = sum_floats, .sum_numbers = sum_numbers};
    gn_error err;
    const gn_status status =
        run_with(&c,
                 ORDERED "--output-dir @two --per-device-train-batch-size 4 --threads 1 "
                         "--gradient-accumulation-steps 1 --eval-dataset @data.jsonl " MMLU,
                 &err);
    if (!child) _exit(status ? 1 : 0);
    int how;
    cr_assert_eq(waitpid(child, &how, 0), child);
    cr_assert(status == GN_OK && how == 0, "%s", err.message);
    const double worst = difference(test_path("two/adapter/adapter_model.safetensors"),
                                    test_path("one/adapter/adapter_model.safetensors"));
    cr_assert(worst < 1e-4, "%g", worst);
    enum { LINES = 3 + 2 * 2 }; /* steps, evaluations of both kinds */
    double one[LINES];
    cr_assert_eq(read_metrics("one"), LINES);
    for (int i = 0; i < LINES; i++) one[i] = any_loss(i);
    const double accuracy = value(LINES - 1, "mmlu_eval_accuracy");
    cr_assert_eq(read_metrics("two"), LINES);
    for (int i = 0; i < LINES; i++) cr_assert(fabs(any_loss(i) - one[i]) < 1e-5);
    cr_assert_eq(value(LINES - 1, "mmlu_eval_accuracy"), accuracy);
    munmap(sums, sizeof *sums);
}

/* A step ends with its epoch: 5 samples in steps of 4 are 2 steps an epoch. */
Test(train, epochs) {
    write_data("data.jsonl", 5);
    run(SMALL "--max-steps 0 --num-train-epochs 2 --save-strategy epoch --output-dir @out");
    cr_assert_eq(read_metrics("out"), 4);
    cr_assert(test_exists("out/checkpoint-2") && test_exists("out/checkpoint-4"));
    cr_assert_not(test_exists("out/checkpoint-3"));
    cr_assert_eq(value(3, "step"), 4);
}

/* ---- evaluation ---- */

Test(train, evaluates_and_keeps_the_best) {
    write_data("data.jsonl", 24);
    run(SMALL "--output-dir @out --eval-dataset-size 6 --eval-steps 2 --logging-steps 3 "
              "--load-best-model-at-end");
    double best = INFINITY;
    int evaluations = 0;
    const int n = read_metrics("out");
    for (int i = 0; i < n; i++) {
        if (!has(i, "eval_loss")) continue;
        cr_assert_eq(value(i, "step"), 2 * evaluations++);
        cr_assert(fabs(value(i, "eval_ppl") - exp(value(i, "eval_loss"))) < 1e-9);
        best = fmin(best, value(i, "eval_loss"));
    }
    cr_assert(evaluations == 4 && n == 4 + 2);
    cr_assert(best < value(0, "eval_loss"));
    cr_assert_eq(best, value(n - 1, "eval_loss")); /* six steps are not enough to get worse */
    cr_assert(same_files("out/adapter/adapter_model.safetensors",
                         "out/checkpoint-6/adapter_model.safetensors"));
}

/* A rate so high that it only gets worse. */
Test(train, stops_early) {
    write_data("data.jsonl", 24);
    run(SMALL "--learning-rate 3 --max-steps 50 --output-dir @out --eval-dataset-size 6 "
              "--eval-steps 1 --early-stopping-patience 3 --load-best-model-at-end");
    const int n = read_metrics("out");
    const double last = value(n - 1, "step");
    cr_assert(last >= 3 && last < 50, "%g", last);
    char name[64];
    snprintf(name, sizeof name, "out/checkpoint-%.0f", last);
    cr_assert(test_exists(name));
    /* And does not go on. */
    run(SMALL "--learning-rate 3 --max-steps 50 --output-dir @out --eval-dataset-size 6 "
              "--eval-steps 1 --early-stopping-patience 3 --load-best-model-at-end --resume");
    cr_assert_eq(read_metrics("out"), n);
}

/* ---- going on ---- */

#define LONG                                                                                       \
    SMALL "--max-steps 12 --save-steps 3 --lora-dropout 0.1 --eval-dataset-size 5 "                \
          "--eval-steps 4 --lr-scheduler-type cosine --logging-steps 2 "

/* The first lines of a run and of one that went on, but for times and speeds. */
static void expect_same_metrics(const char *a, const char *b) {
    static const char *const names[] = {"step", "loss", "grad_norm", "learning_rate", "eval_loss"};
    double values[MAX_LINES][5];
    const int n = read_metrics(a);
    for (int i = 0; i < n; i++)
        for (int k = 0; k < 5; k++) values[i][k] = has(i, names[k]) ? value(i, names[k]) : -1;
    cr_assert_eq(read_metrics(b), n);
    for (int i = 0; i < n; i++)
        for (int k = 0; k < 5; k++)
            cr_assert_eq(has(i, names[k]) ? value(i, names[k]) : -1, values[i][k], "line %d, %s", i,
                         names[k]);
}

/* Runs in a child that is ended, as if killed, when the step's checkpoint is there. After a fork
 * OpenMP's threads are gone. */
static void run_until(const char *line, const char *checkpoint) {
    const pid_t child = fork();
    if (child == 0) {
        gn_error err;
        char *alone;
        if (asprintf(&alone, "%s --threads 1", line) < 0) _exit(1);
        _exit(try_run(alone, &err) == GN_OK ? 0 : 1);
    }
    while (!test_exists(checkpoint)) {
        cr_assert_eq(waitpid(child, NULL, WNOHANG), 0, "ended without %s", checkpoint);
        usleep(1000);
    }
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
}

Test(train, goes_on_to_the_bit) {
    write_data("data.jsonl", 30);
    run(LONG "--output-dir @whole");
    run_until(LONG "--output-dir @cut", "cut/checkpoint-6/manifest.json");
    run(LONG "--output-dir @cut --resume");
    cr_assert(same_files("whole/adapter/adapter_model.safetensors",
                         "cut/adapter/adapter_model.safetensors"));
    cr_assert(same_files("whole/checkpoint-12/optimizer.safetensors",
                         "cut/checkpoint-12/optimizer.safetensors"));
    expect_same_metrics("whole", "cut");
    /* Once done, there is nothing to do. */
    run(LONG "--output-dir @cut --resume");
    expect_same_metrics("whole", "cut");
}

Test(train, full_training_goes_on_to_the_bit) {
    static const char line[] = LONG "--mode full --random-init --model " DATA "tiny-bf16 ";
    char whole[1024], cut[1024], on[1024];
    snprintf(whole, sizeof whole, "%s--output-dir @whole", line);
    snprintf(cut, sizeof cut, "%s--output-dir @cut", line);
    snprintf(on, sizeof on, "%s--output-dir @cut --resume", line);
    write_data("data.jsonl", 30);
    run(whole);
    run_until(cut, "cut/checkpoint-6/manifest.json");
    run(on);
    cr_assert(same_files("whole/model/model.safetensors", "cut/model/model.safetensors"));
}

Test(train, a_broken_checkpoint_is_passed_over) {
    write_data("data.jsonl", 30);
    run(LONG "--output-dir @whole");
    run(LONG "--output-dir @cut");
    cr_assert_eq(truncate(test_path("cut/checkpoint-12/optimizer.safetensors"), 1000), 0);
    cr_assert_eq(unlink(test_path("cut/checkpoint-9/state.json")), 0);
    run(LONG "--output-dir @cut --resume");
    cr_assert(same_files("whole/checkpoint-12/optimizer.safetensors",
                         "cut/checkpoint-12/optimizer.safetensors"));
    expect_same_metrics("whole", "cut");
}

/* A run whose rate is constant may become longer. */
Test(train, a_longer_run) {
    write_data("data.jsonl", 30);
    run(SMALL "--max-steps 9 --output-dir @long");
    run(SMALL "--max-steps 5 --output-dir @short");
    run(SMALL "--max-steps 9 --output-dir @short --resume");
    cr_assert(same_files("long/adapter/adapter_model.safetensors",
                         "short/adapter/adapter_model.safetensors"));
}

Test(train, what_must_not_change_when_going_on) {
    write_data("data.jsonl", 30);
    write_data("other.jsonl", 31);
    run(LONG "--output-dir @out");
    refused(LONG "--output-dir @out", GN_EEXIST, "--resume");
    refused(LONG "--output-dir @out --resume --lora-r 5", GN_EMISMATCH, "lora_");
    refused(LONG "--output-dir @out --resume --max-grad-norm 1", GN_EMISMATCH, "max_grad_norm");
    refused(LONG "--output-dir @out --resume --seed 1 --data-seed 42", GN_EMISMATCH, "seed");
    refused(LONG "--output-dir @out --resume --max-steps 13", GN_EMISMATCH, "13 steps");
    refused(LONG "--output-dir @out --resume --learning-rate 1", GN_EMISMATCH, "learning rate");
    refused(LONG "--output-dir @out --resume --dataset @other.jsonl", GN_EMISMATCH, "other data");
    refused(LONG "--output-dir @out --resume --optim adamw_8bit", GN_EMISMATCH, "optimizer");
    /* Without --resume nothing was touched; with it, what may change may. */
    run(LONG "--output-dir @out --resume --optim adamw_32bit --save-steps 1 --threads 1");
}

Test(train, goes_on_from_nothing) {
    write_data("data.jsonl", 8);
    run(SMALL "--output-dir @new/folder --resume");
    cr_assert(test_exists("new/folder/adapter/adapter_model.safetensors"));
}

/* ---- what goes wrong ---- */

/* A rate at which weights leave what float32 can hold. */
Test(train, a_loss_that_is_not_a_number_ends_the_run) {
    write_data("data.jsonl", 30);
    refused(SMALL "--mode full --model " DATA "tiny-bf16 --learning-rate 100000 --max-grad-norm 0 "
                  "--max-steps 500 --save-steps 1 --save-total-limit 2 --output-dir @out",
            GN_EINVAL, "step ");
    const int n = read_metrics("out");
    char line[1024], name[64];
    snprintf(name, sizeof name, "out/checkpoint-%.0f/manifest.json", value(n - 1, "step"));
    cr_assert(test_exists(name), "%s", name);
    cr_assert_not(test_exists("out/model"));
    snprintf(line, sizeof line,
             SMALL "--mode full --model " DATA "tiny-bf16 --learning-rate 100000 --max-grad-norm 0 "
                   "--max-steps %.0f --save-steps 1 --output-dir @out --resume",
             value(n - 1, "step"));
    run(line); /* what was saved is whole */
}

/* A copy of a model with one value of a tensor that is not a number. */
static void write_spoiled(const char *base, const char *tensor, const char *name) {
    static const char *const files[] = {"config.json", "tokenizer.model"};
    char from[512], to[512];
    mkdir(test_path(name), 0777);
    for (int i = 0; i < 2; i++) {
        snprintf(from, sizeof from, DATA "%s/%s", base, files[i]);
        snprintf(to, sizeof to, "%s/%s", name, files[i]);
        test_copy(from, to);
    }
    test_tensors set;
    snprintf(from, sizeof from, DATA "%s/model.safetensors", base);
    snprintf(to, sizeof to, "%s/model.safetensors", name);
    test_tensors_read(&set, from);
    uint16_t *values = (uint16_t *)test_tensor(&set, tensor)->data;
    values[5] = 0x7fc0; /* in BF16 */
    test_tensors_write(&set, to, 0);
}

Test(train, a_base_weight_that_is_not_a_number) {
    write_data("data.jsonl", 8);
    write_spoiled("tiny-bf16", "model.layers.1.mlp.up_proj.weight", "projection");
    write_spoiled("tiny-bnb-nf4", "model.embed_tokens.weight", "embedding");
    static const struct {
        const char *rest, *name;
        gn_status status;
    } cases[] = {
        {"--mode qlora --model @projection", "model.layers.1.mlp.up_proj.weight", GN_EINVAL},
        {"--mode lora --model @projection", "model.layers.1.mlp.up_proj.weight", GN_EFORMAT},
        {"--mode full --model @projection", "model.layers.1.mlp.up_proj.weight", GN_EFORMAT},
        {"--mode qlora --model @embedding", "model.embed_tokens.weight", GN_EFORMAT}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char line[1024];
        snprintf(line, sizeof line, SMALL "--output-dir @out %s", cases[i].rest);
        refused(line, cases[i].status, cases[i].name);
    }
    cr_assert_not(test_exists("out"));
}

Test(train, a_broken_model_is_not_evaluated) {
    write_data("data.jsonl", 8);
    refused(SMALL "--output-dir @out --max-steps 1 --lora-alpha 1e30 --eval-dataset-size 2 "
                  "--load-best-model-at-end",
            GN_EINVAL, "step 1: the held-out loss is");
}

Test(train, what_cannot_be_trained) {
    write_data("data.jsonl", 8);
    test_write_text("empty.jsonl", "");
    test_write_text("cut.jsonl", "{\"input_ids\":[1,2,3]}\n{\"input_ids\":[1,2,");
    refused(SMALL "--output-dir @out --mode lora", GN_EINVAL, "4-bit");
    refused(SMALL "--output-dir @out --mode full", GN_EINVAL, "4-bit");
    refused(SMALL "--output-dir @out --quant-type fp4", GN_EINVAL, "nf4");
    refused(SMALL "--output-dir @out --lora-modules q_proj,x_proj", GN_EINVAL, "x_proj");
    refused(SMALL "--output-dir @out --init-adapter @none", GN_ENOENT, "none");
    refused(SMALL "--output-dir @out --memory-budget 1MiB", GN_ENOMEM, "too few");
    refused(SMALL "--output-dir @out --eval-dataset-size 8", GN_EINVAL, "held out");
    refused(SMALL "--output-dir @data.jsonl", GN_EIO, "data.jsonl");
    refused("--cache-dir none --model " DATA "tiny-bnb-nf4 --output-dir @out --device cpu "
            "--dataset @empty.jsonl",
            GN_EFORMAT, "empty.jsonl");
    refused("--cache-dir none --model " DATA "tiny-bnb-nf4 --output-dir @out --device cpu "
            "--dataset @cut.jsonl",
            GN_EFORMAT, "cut.jsonl:2");
    run(SMALL "--dataset @cut.jsonl --skip-bad-rows --output-dir @out");
}

/* Files of a child may not grow over so many bytes. */
Test(train, a_full_disk_ends_the_run_and_harms_nothing) {
    write_data("data.jsonl", 8);
    run(SMALL "--max-steps 2 --output-dir @out");
    size_t length;
    char *before = contents("out/checkpoint-2/adapter_model.safetensors", &length);
    const pid_t child = fork();
    if (child == 0) {
        gn_error err;
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &(struct rlimit){20000, 20000});
        const gn_status status =
            try_run(SMALL "--max-steps 4 --output-dir @out --resume --threads 1", &err);
        _exit(status == GN_EIO && strstr(err.message, "checkpoint-4.partial") ? 0 : 1);
    }
    int how;
    cr_assert_eq(waitpid(child, &how, 0), child);
    cr_assert_eq(how, 0);
    cr_assert_not(test_exists("out/checkpoint-4"));
    size_t same;
    char *after = contents("out/checkpoint-2/adapter_model.safetensors", &same);
    cr_assert(same == length && memcmp(before, after, length) == 0);
    free(before);
    free(after);
    run(SMALL "--max-steps 4 --output-dir @out --resume");
}

Test(train, one_process_a_folder) {
    write_data("data.jsonl", 8);
    run(SMALL "--output-dir @out");
    const int fd = open(test_path("out/metrics.jsonl"), O_RDONLY);
    cr_assert(fd >= 0 && flock(fd, LOCK_EX) == 0);
    refused(SMALL "--output-dir @out --resume", GN_EBUSY, "another process");
    close(fd);
}
