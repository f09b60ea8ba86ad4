/* bench_train_memory.c - training of a large model within a budget: the plan beside what was
 * measured, when memory was taken, and tokens a second; run by hand, not a test.
 *
 * usage: bench_train_memory [SHAPE [SEQUENCES [BUDGET_GIB [ACCUMULATION [TOKENS]]]]]
 * (llama-7b 16 8.5 1 512: LoRA of rank 64 on all projections, paged AdamW). Exits with 1 when more
 * was taken than the budget allows, or when plan and measurement differ by more than 5 %. */
#include <stdio.h>

#include "engine/memory_plan.h"
#include "kernels/measure.h"
#include "tests/trainer/lora_run.h"
#include "tests/gpu/bench.h"

enum { RANK = 64, WARM = 1, UPDATES = 4 };

static const char *argument(int argc, char **argv, int i, const char *otherwise) {
    return argc > i ? argv[i] : otherwise;
}

/* What the device holds by now, and how much more than `before` that is. */
static int64_t show_used(const char *when, gn_ctx *ctx, int64_t before) {
    const int64_t used = (int64_t)gn_measure_used_bytes(ctx);
    printf("  %-26s %10.1f MiB %+10.1f\n", when, gn_mib(used), gn_mib(used - before));
    return used;
}

static void show(const char *what, gn_pages *pages, double updates) {
    if (!pages) return;
    const gn_page_stats s = gn_pages_read_stats(pages);
    printf("%s: %.2f GB up and %.2f GB down an update\n", what, (double)s.uploaded / updates / 1e9,
           (double)s.downloaded / updates / 1e9);
}

int main(int argc, char **argv) {
    const char *shape = argument(argc, argv, 1, "llama-7b");
    const int seqs = atoi(argument(argc, argv, 2, "16"));
    const double gib = atof(argument(argc, argv, 3, "8.5"));
    const int accumulation = atoi(argument(argc, argv, 4, "1"));
    const int tokens = atoi(argument(argc, argv, 5, "512"));
    gn_model *model;
    gn_page_device *pages[2];
    gn_error err = {0};
    const gn_model_options options = {.device = "cuda"};
    must(gn_model_synthetic(&model, shape, &options, &err), &err);
    lora_list list = list_lora(model, RANK);
    const gn_train_wanted w = want_lora(&list, seqs, tokens, accumulation);
    gn_train_memory plan;
    gn_ctx_memory memory;
    must(gn_ctx_read_memory(model->ctx, &memory), NULL);
    printf("in use, and by how much more:\n  %-26s %10.1f MiB\n", "context is open",
           gn_mib(memory.opened));
    int64_t used = show_used("weights are there", model->ctx, memory.opened);
    must(gn_train_memory_plan(&plan, model, &w, (int64_t)(gib * 0x1p30), &err), &err);
    for (int i = 0; i < 2; i++) must(gn_page_device_open(&pages[i], model->ctx), NULL);

    lora_run r;
    open_planned(&r, model, &list, &w, &plan, pages);
    used = show_used("training is open", model->ctx, used);
    double begin = 0;
    for (int i = -WARM; i < UPDATES; i++) {
        if (i == 0) {
            must(gn_ctx_wait(model->ctx), NULL);
            used = show_used("an update has run", model->ctx, used);
            begin = seconds();
        }
        update_lora(&r, i + WARM, accumulation, seqs, tokens);
    }
    must(gn_ctx_wait(model->ctx), NULL);
    const double took = seconds() - begin;
    show_used("all have run", model->ctx, used);

    gn_train_measured found;
    must(gn_train_memory_measure(&found, &plan, model, r.p, r.o), NULL);
    char *table = gn_train_memory_text(&plan, &found);
    printf("%s, %d x %d tokens, %d micro-batches an update, %.1f GiB\n%s", shape, seqs, tokens,
           accumulation, gib, table ? table : "");
    show("gradients", gn_grads_pages(r.p), WARM + UPDATES);
    show("optimizer", gn_optimizer_pages(r.o), WARM + UPDATES);
    printf("%.0f tok/s\n", (double)UPDATES * accumulation * seqs * tokens / took);
    const double share = (double)found.sum / (double)gn_train_memory_sum(&plan);
    const bool fits = found.sum <= plan.budget, right = share > 0.95 && share < 1.05;
    printf("%.1f %% of what was planned%s%s\n", 100 * share, fits ? "" : "; over the budget",
           right ? "" : "; not within 5 %");
    free(table);
    close_lora(&r);
    for (int i = 0; i < 2; i++) gn_page_device_close(pages[i]);
    free_list(&list);
    gn_model_close(model);
    return fits && right ? 0 : 1;
}
