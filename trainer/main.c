/* main.c - guanaco-trainer: makes and measures models. */
#include "trainer/trainer.h"

static int eval_command(int n, char *const *args) {
    static const gn_command commands[] = {
        {"ppl", gn_eval_ppl_command, "perplexity on a text"},
        {"logits", gn_eval_logits_command, "logits for given tokens, written or compared"},
        {"mmlu", gn_eval_mmlu_command, "which of four answers it knows to be right"},
        {0}};
    return gn_command_run(commands, "guanaco-trainer eval", n, args);
}

int main(int argc, char **argv) {
    static const gn_command commands[] = {
        {"train", gn_train_command, "make an adapter, or train a whole model, from data sets"},
        {"quantize", gn_quantize_command, "write a 4-bit copy of a model folder"},
        {"merge", gn_merge_command, "add an adapter into its base's weights"},
        {"data", gn_data_command, "what training makes of data sets"},
        {"report", gn_report_command, "make the page of a training run anew"},
        {"eval", eval_command, "perplexity, logits or MMLU of a model"},
        {"bench", gn_bench_command, "speed of decoding, prefill, the server or single operations"},
        {0}};
    return gn_command_run(commands, "guanaco-trainer", argc - 1, argv + 1);
}
