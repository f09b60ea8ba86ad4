/* MMLU: what questions become, what is refused, how answers are counted, and that training's own
 * evaluation and `eval mmlu`'s way of scoring come to the same. */
#include "engine/adapter.h"
#include "tests/trainer/train_lines.h"
#include "trainer/mmlu.h"

TestSuite(mmlu, .init = test_folder_make, .fini = test_folder_remove);

#define MODEL DATA "tiny-bnb-nf4"

static gn_mmlu *open_questions(const char *name, int64_t max_samples, int source_max_len,
                               int32_t max_len) {
    const gn_mmlu_choice choice = {
        .dataset = test_path(name), .max_samples = max_samples, .source_max_len = source_max_len};
    gn_mmlu *m;
    gn_error err = {0};
    cr_assert_eq(gn_mmlu_open(&m, &choice, MODEL, max_len, &err), GN_OK, "%s", err.message);
    return m;
}

static void write_text(const char *name, const char *text) {
    FILE *f = fopen(test_path(name), "wb");
    cr_assert(f && fputs(text, f) >= 0);
    cr_assert_eq(fclose(f), 0);
}

#define ROW(output, subject)                                                                       \
    "{\"input\":\"One or two?\\nAnswer:\",\"output\":\"" output "\",\"subject\":\"" subject "\"}"  \
    "\n"

/* ---- reading ---- */

Test(mmlu, a_question_is_prompt_letter_and_eos) {
    static const char prompt[] = "One or two?\nAnswer:";
    gn_tokenizer *t;
    gn_error err = {0};
    int32_t *ids, n, *letter, one;
    write_text("q.json", ROW("C", "sums") ROW("A", "sums"));
    cr_assert_eq(gn_tokenizer_open(&t, MODEL, 512, &err), GN_OK);
    cr_assert_eq(gn_tokenizer_encode(t, prompt, strlen(prompt), &ids, &n, &err), GN_OK);
    cr_assert_eq(gn_tokenizer_encode(t, "C", 1, &letter, &one, &err), GN_OK);
    cr_assert_eq(one, 1);
    gn_mmlu *m = open_questions("q.json", 0, 2048, 0);
    cr_assert_eq(gn_mmlu_count(m), 2);
    gn_mmlu_question q = gn_mmlu_at(m, 0);
    cr_assert(q.source == n + 1 && q.n == n + 3 && gn_mmlu_longest(m) == q.n);
    cr_assert_eq(q.ids[0], gn_tokenizer_bos(t));
    cr_assert(!memcmp(q.ids + 1, ids, (size_t)n * sizeof *ids));
    cr_assert(q.ids[n + 1] == *letter && gn_mmlu_letters(m)[2] == *letter);
    cr_assert_eq(q.ids[n + 2], gn_tokenizer_eos(t));
    gn_mmlu_close(m);

    /* Of a prompt that is too long the end is kept, behind BOS; the model's own bound counts, too.
     */
    for (int i = 0; i < 2; i++) {
        m = open_questions("q.json", 1, i ? 2048 : 5, i ? 7 : 0);
        q = gn_mmlu_at(m, 0);
        cr_assert(gn_mmlu_count(m) == 1 && q.source == 5 && q.n == 7);
        cr_assert_eq(q.ids[0], gn_tokenizer_bos(t));
        cr_assert(!memcmp(q.ids + 1, ids + n - 4, 4 * sizeof *ids));
        gn_mmlu_close(m);
    }
    free(letter);
    free(ids);
    gn_tokenizer_close(t);
}

static void refused_file(const char *text, const char *why) {
    write_text("bad.json", text);
    const gn_mmlu_choice choice = {.dataset = test_path("bad.json"), .source_max_len = 100};
    gn_mmlu *m;
    gn_error err = {0};
    cr_assert_eq(gn_mmlu_open(&m, &choice, MODEL, 0, &err), GN_EFORMAT, "%s", text);
    cr_assert(!m && strstr(err.message, why), "%s, not %s", err.message, why);
}

Test(mmlu, bad_rows_are_named) {
    char many[300 * 100] = "";
    refused_file("", "no rows");
    refused_file(ROW("A", "x") "{\n", "bad.json:2: not valid JSON");
    refused_file(ROW("A", "x") "\n[1]\n", "bad.json:3: a row must be a JSON object");
    refused_file(ROW("E", "x"), "bad.json:1: \"output\" is 'E'");
    refused_file(ROW("AB", "x"), "bad.json:1: \"output\" is 'AB'");
    refused_file(ROW("", "x"), "bad.json:1: \"output\" is ''");
    refused_file(ROW("A", ""), "bad.json:1: \"subject\" has 0 bytes");
    refused_file("{\"input\":\"x\",\"output\":\"A\"}", "bad.json:1: \"subject\" is missing");
    refused_file("{\"output\":\"A\",\"subject\":\"s\"}", "bad.json:1: \"input\" is missing");
    refused_file("{\"input\":\"x\",\"output\":1,\"subject\":\"s\"}",
                 "bad.json:1: \"output\" is missing or not a string");
    for (int i = 0; i < 300; i++)
        sprintf(many + strlen(many),
                "{\"input\":\"x\",\"output\":\"A\",\"subject\":\"subject %d\"}\n", i);
    refused_file(many, "bad.json:257: over 256 subjects");
    gn_error err = {0};
    gn_mmlu *m;
    const gn_mmlu_choice named = {.dataset = "mmlu-zs", .split = 1, .source_max_len = 100};
    cr_assert_eq(gn_mmlu_open(&m, &named, MODEL, 0, &err), GN_EIO);
    cr_assert(strstr(err.message, "data/mmlu/zero_shot_mmlu_test.json"), "%s", err.message);
}

/* ---- counting ---- */

/* Accuracy is the mean over subjects, however many questions each has. */
Test(mmlu, results) {
    static const float first[] = {1, 2, 3, 4}, third[] = {4, 3, 1, 2};
    write_text("q.json", ROW("A", "x") ROW("C", "x") ROW("C", "x") ROW("C", "y"));
    gn_mmlu *m = open_questions("q.json", 0, 100, 0);
    for (int round = 0; round < 2; round++) { /* the second counts alone */
        gn_mmlu_clear(m);
        for (int64_t i = 0; i < 4; i++) gn_mmlu_add(m, i, i == 1 ? third : first);
        gn_mmlu_add_loss(m, 12);
    }
    const gn_mmlu_result r = gn_mmlu_read(m);
    cr_assert_eq(r.questions, 4);
    cr_assert_float_eq(r.accuracy, (2.0 / 3 + 0) / 2, 1e-12);
    cr_assert_float_eq(r.loss, 12.0 / 8, 1e-12); /* letters and EOS */
    lines[0] = cJSON_CreateObject();
    gn_mmlu_write(m, lines[0]);
    cr_assert_eq(value(0, "mmlu_loss"), r.loss);
    cr_assert_eq(value(0, "mmlu_eval_accuracy"), r.accuracy);
    cr_assert_float_eq(value(0, "mmlu_eval_accuracy_x"), 2.0 / 3, 1e-12);
    cr_assert_eq(value(0, "mmlu_eval_accuracy_y"), 0);
    gn_mmlu_close(m);
}

/* ---- in training ---- */

/* As `eval mmlu` scores it. */
static gn_mmlu_result score(const char *questions, const char *adapter_dir) {
    const gn_model_options options = {
        .device = "cpu", .compute = GN_COMPUTE_F32, .as_stored = true, .threads = 2};
    gn_model *model;
    gn_adapter *adapter = NULL;
    gn_scorer *scorer;
    gn_error err = {0};
    gn_mmlu *m = open_questions(questions, 0, 2048, 0);
    cr_assert_eq(gn_model_open(&model, MODEL, &options, &err), GN_OK, "%s", err.message);
    if (adapter_dir) cr_assert_eq(gn_adapter_open(&adapter, model, adapter_dir, &err), GN_OK);
    cr_assert_eq(gn_scorer_open(&scorer, model, gn_mmlu_longest(m), GN_KV_AUTO, &err), GN_OK);
    const gn_adapter_use use = {adapter, 1};
    for (int64_t i = 0; i < gn_mmlu_count(m); i++)
        cr_assert_eq(gn_mmlu_ask(m, i, scorer, &use, adapter != NULL), GN_OK);
    const gn_mmlu_result r = gn_mmlu_read(m);
    gn_scorer_close(scorer);
    gn_adapter_close(adapter);
    gn_model_close(model);
    gn_mmlu_close(m);
    return r;
}

static void check_line(int line, double step, gn_mmlu_result expected) {
    cr_assert_eq(value(line, "step"), step);
    cr_assert_float_eq(value(line, "mmlu_loss"), expected.loss, 1e-4, "%g, not %g",
                       value(line, "mmlu_loss"), expected.loss);
    cr_assert_eq(value(line, "mmlu_eval_accuracy"), expected.accuracy);
    cr_assert(has(line, "mmlu_eval_accuracy_sums") && has(line, "mmlu_eval_accuracy_more_sums"));
}

/* Before the first step, every two, and after the last; with held-out samples or without. Training
 * itself is not touched, though questions are longer than its batches. */
Test(mmlu, training_asks_too) {
    write_data("data.jsonl", 24);
    write_questions("mmlu.json", 23);
    run(SMALL "--output-dir @plain");
    run(SMALL "--output-dir @out --eval-steps 4 --do-mmlu-eval --mmlu-dataset @mmlu.json");
    cr_assert_eq(read_metrics("out"), 6 + 3);
    check_line(0, 0, score("mmlu.json", NULL));
    cr_assert(has(4, "loss") && value(5, "step") == 4 && has(5, "mmlu_loss"));
    check_line(8, 6, score("mmlu.json", test_path("out/adapter")));
    cr_assert(same_files("plain/adapter/adapter_model.safetensors",
                         "out/adapter/adapter_model.safetensors"));

    run(SMALL "--output-dir @both --eval-steps 6 --eval-dataset @data.jsonl --do_mmlu_eval "
              "--mmlu_split test --mmlu_dataset @mmlu.json --max_mmlu_samples 5");
    cr_assert_eq(read_metrics("both"), 6 + 4);
    cr_assert(has(0, "eval_loss") && has(1, "mmlu_test_accuracy") && has(9, "mmlu_loss"));

    char *page = contents("both/report.html", &(size_t){0});
    cr_assert(strstr(page, "\"mmlu_test_accuracy\":[[0,"), "the page has its curve");
    free(page);
    refused(SMALL "--output-dir @none --do-mmlu-eval --mmlu-dataset @data.jsonl", GN_EFORMAT,
            "data.jsonl:1: \"input\" is missing");
}
