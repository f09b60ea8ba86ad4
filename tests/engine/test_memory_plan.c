/* How memory is divided: sums never exceed the budget, what is asked for is given or refused, and a
 * refusal's advice holds. */
#include "engine/memory_plan.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "engine/score.h"
#include "kernels/backend.h"

#define MIB ((int64_t)1 << 20)
#define GIB ((int64_t)1 << 30)

#define CONTEXT (512 * MIB)

/* A 7B model of 4-bit weights on a GPU of 24 GiB. */
static gn_memory_needs needs_7b(void) {
    return (gn_memory_needs){.memory = {.free = 19 * GIB, .total = 24 * GIB, .opened = CONTEXT},
                             .weights = 3700 * MIB,
                             .scratch = 400 * MIB,
                             .row = 4 * (4096 + 32000),
                             .block = 8 * MIB,
                             .context = 2048,
                             .max_seqs = 64};
}

static gn_memory_plan plan_ok(const gn_memory_needs *n) {
    gn_memory_plan p;
    gn_error err = {0};
    cr_assert_eq(gn_memory_plan_make(&p, n, &err), GN_OK, "%s", err.message);
    cr_assert_eq(p.kv % n->block, 0);
    cr_assert_eq(p.kv_tokens, p.kv / n->block * GN_KV_BLOCK_TOKENS);
    cr_assert_geq(p.kv_tokens, n->context);
    if (p.budget > 0)
        cr_assert_leq(p.weights + p.kv + p.adapters + p.scratch + p.reserve, p.budget);
    return p;
}

static gn_error refused(const gn_memory_needs *n, gn_status status) {
    gn_memory_plan p;
    gn_error err = {0};
    cr_assert_eq(gn_memory_plan_make(&p, n, &err), status);
    cr_assert_eq(err.status, status);
    return err;
}

Test(memory_plan, a_gpu_gives_what_remains_to_keys_and_values) {
    gn_memory_needs n = needs_7b();
    gn_memory_plan p = plan_ok(&n);
    const int64_t rest = p.budget - p.weights - p.scratch - p.reserve;
    cr_assert_geq(p.budget, n.memory.free + n.weights);
    cr_assert_geq(p.reserve, 256 * MIB);
    cr_assert_eq(p.adapters, rest / 8);
    cr_assert_gt(p.kv + n.block, rest - p.adapters);

    /* A larger context leaves less, unless it is so large that others must be there, too. */
    n.memory.opened = CONTEXT + 100 * MIB;
    cr_assert_eq(plan_ok(&n).reserve, p.reserve + 100 * MIB);
    n.memory.opened = 4 * GIB;
    cr_assert_eq(plan_ok(&n).reserve, p.reserve - CONTEXT + GN_CONTEXT_BYTES);
    n.memory.opened = CONTEXT;

    n.adapters = -1;
    cr_assert_eq(plan_ok(&n).adapters, 0);
    n.adapters = 3 * GIB;
    cr_assert_eq(plan_ok(&n).adapters, 3 * GIB);
    n.adapters = 0;
    n.present = rest / 4;
    cr_assert_eq(plan_ok(&n).adapters, rest / 4, "room for those that there are");
    n.present = 100 * GIB;
    cr_assert_eq(plan_ok(&n).adapters, rest / 2, "but no more than half");

    n = needs_7b();
    n.max_seqs = 2;
    cr_assert_eq(plan_ok(&n).kv, 2 * 128 * n.block, "no more than all sequences need");
    n.kv = 1025 * MIB;
    cr_assert_eq(plan_ok(&n).kv, 1024 * MIB, "whole blocks of what is asked");
}

Test(memory_plan, a_budget_bounds_everything) {
    gn_memory_needs n = needs_7b();
    for (int64_t budget = 100 * MIB; budget < 23 * GIB; budget += 37 * MIB) {
        gn_memory_plan p;
        gn_error err = {0};
        n.budget = budget;
        n.max_seqs = 1 + (int32_t)(budget / MIB % 100);
        const gn_status status = gn_memory_plan_make(&p, &n, &err);
        if (status) {
            cr_assert_eq(status, GN_ENOMEM);
            cr_assert_lt(budget, 8 * GIB, "%s", err.message);
        } else {
            cr_assert_eq(plan_ok(&n).budget, budget);
        }
    }
    n.budget = 6 * GIB;
    n.max_seqs = 1;
    n.adapters = -1;
    cr_assert_eq(plan_ok(&n).kv_tokens, 1 * 2048, "7B within 6 GiB");
}

static int64_t number_after(const char *text, const char *words) {
    const char *at = strstr(text, words);
    cr_assert_not_null(at, "'%s' in: %s", words, text);
    return strtoll(at + strlen(words), NULL, 10);
}

Test(memory_plan, a_refusal_says_what_would_fit) {
    gn_memory_needs n = needs_7b();
    n.adapters = 512 * MIB;
    n.budget = 6 * GIB;
    n.max_seqs = 1;
    gn_error err = refused(&n, GN_ENOMEM);
    cr_assert(strstr(err.message, "6144.0 MiB of memory are 260.0 too few"), "%s", err.message);
    n.context = (int32_t)number_after(err.message, "; a context of ");
    plan_ok(&n);
    n.context += GN_KV_BLOCK_TOKENS;
    refused(&n, GN_ENOMEM);

    /* Many sequences whose logits alone take memory. */
    n = needs_7b();
    n.adapters = -1;
    n.max_seqs = 4096;
    n.scratch = 400 * MIB + n.max_seqs * n.row;
    n.budget = 6200 * MIB;
    err = refused(&n, GN_ENOMEM);
    n.max_seqs = (int32_t)number_after(err.message, "would fit, or ");
    n.scratch = 400 * MIB + n.max_seqs * n.row;
    plan_ok(&n);

    /* A cache of a size that does not fit, where a smaller one does. */
    n = needs_7b();
    n.budget = 10 * GIB;
    n.kv = 8 * GIB;
    err = refused(&n, GN_ENOMEM);
    cr_assert(strstr(err.message, "MiB for keys and values would fit"), "%s", err.message);

    /* Nothing fits. */
    n = needs_7b();
    n.budget = 4 * GIB;
    err = refused(&n, GN_ENOMEM);
    cr_assert(!strstr(err.message, "would fit"), "%s", err.message);

    n = needs_7b();
    n.budget = 40 * GIB;
    err = refused(&n, GN_ENOMEM);
    cr_assert(strstr(err.message, "40960.0 MiB is more than"), "%s", err.message);
    n.budget = 0;
    n.kv = 100 * MIB;
    err = refused(&n, GN_EINVAL);
    cr_assert(strstr(err.message, "does not hold one context of 2048 tokens"), "%s", err.message);
}

Test(memory_plan, a_cpu_counts_no_weights) {
    gn_memory_needs n = needs_7b();
    n.is_host = true;
    n.present = 300 * MIB;
    n.adapters = 5 * GIB;
    gn_memory_plan p = plan_ok(&n);
    cr_assert_eq(p.budget, 0);
    cr_assert_eq(p.weights + p.reserve, 0);
    cr_assert_eq(p.adapters, 300 * MIB, "they are where they are");
    cr_assert_eq(p.kv, 1 * GIB);
    n.context = 4096; /* 2 GiB */
    cr_assert_eq(plan_ok(&n).kv, 2 * GIB, "at least one context");
    n.budget = 4 * GIB;
    p = plan_ok(&n);
    cr_assert_gt(p.kv + n.block, p.budget - p.scratch - p.adapters);
    n.budget = 2 * GIB;
    refused(&n, GN_ENOMEM);
}

/* Of a model that is there: the engine divides as planned, and keeps to it. */
Test(memory_plan, of_an_engine_and_of_a_scorer) {
    const gn_model_options options = {.device = "cpu", .compute = GN_COMPUTE_F32};
    gn_model *model;
    gn_adapter *adapter;
    gn_error err = {0};
    cr_assert_eq(gn_model_open(&model, GN_SOURCE_DIR "/models/bootstrap-13m-nf4", &options, &err),
                 GN_OK, "%s", err.message);
    cr_assert_eq(gn_adapter_open(&adapter, model, GN_SOURCE_DIR "/models/adapters/pirate", &err),
                 GN_OK, "%s", err.message);
    gn_engine *engine;
    gn_engine_options o = {
        .memory_bytes = 128 * MIB, .max_seqs = 1024, .adapters = &adapter, .n_adapters = 1};
    cr_assert_eq(gn_engine_open(&engine, model, &o, &err), GN_OK, "%s", err.message);
    const gn_memory_plan p = gn_engine_memory(engine);
    const gn_engine_stats stats = gn_engine_read_stats(engine);
    cr_assert_eq(p.budget, 128 * MIB);
    cr_assert(p.adapters >= (int64_t)gn_adapter_bytes(adapter) && p.scratch > 0 && p.kv > 0);
    cr_assert_leq(p.adapters + p.scratch + p.kv, p.budget);
    cr_assert_eq((int64_t)stats.kv_blocks * stats.kv_block_tokens, p.kv_tokens);
    char *table = gn_memory_plan_text(&p);
    cr_assert(strstr(table, "adapters") && strstr(table, "together") && strstr(table, "128.0 MiB"));
    cr_assert_null(strstr(table, "weights"));
    free(table);
    gn_engine_close(engine);

    o.memory_bytes = 1 * MIB;
    engine = NULL;
    cr_assert_eq(gn_engine_open(&engine, model, &o, &err), GN_ENOMEM);
    cr_assert_null(engine);
    cr_assert(strstr(err.message, "too few: weights 0.0"), "%s", err.message);

    gn_memory_plan s;
    cr_assert_eq(gn_scorer_plan(&s, model, 100, GN_KV_AUTO, 32 * MIB, &adapter, 1, &err), GN_OK,
                 "%s", err.message);
    cr_assert_eq(s.kv_tokens, 112);
    cr_assert_eq(s.adapters, p.adapters);
    cr_assert_eq(gn_scorer_plan(&s, model, 100, GN_KV_AUTO, 1 * MIB, &adapter, 1, &err), GN_ENOMEM);
    gn_adapter_close(adapter);
    gn_model_close(model);
}

static gn_backend counting;
static int64_t allocated;

static void *count_alloc(gn_ctx *ctx, size_t bytes) {
    allocated += (int64_t)bytes;
    return gn_cpu_backend.alloc(ctx, bytes);
}

/* What a forward pass allocates is what the plan says, to the byte. */
Test(memory_plan, scratch_is_what_is_allocated) {
    static const gn_forward_options cases[] = {
        {.max_rows = 1, .max_seqs = 1, .max_logits = 1, .kv_blocks = 1, .context = 16},
        {.max_rows = 512, .max_seqs = 64, .max_logits = 64, .kv_blocks = 10, .context = 100},
        {.max_rows = 16, .max_seqs = 1, .max_logits = 40, .kv_blocks = 64, .context = 1024},
        {.max_rows = 16,
         .max_seqs = 2,
         .max_logits = 2,
         .kv_blocks = 9,
         .context = 64,
         .kv_dtype = GN_KV_FP8},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const gn_model_options options = {.device = "cpu"};
        gn_model *model;
        gn_forward *forward;
        gn_error err = {0};
        cr_assert_eq(gn_model_synthetic(&model, "llama-tiny", &options, &err), GN_OK, "%s",
                     err.message);
        counting = *model->ctx->backend;
        counting.alloc = count_alloc;
        model->ctx->backend = &counting;
        allocated = 0;
        cr_assert_eq(gn_forward_open(&forward, model, &cases[i], &err), GN_OK, "%s", err.message);
        const int64_t kv =
            (int64_t)gn_forward_kv_block_bytes(model, cases[i].kv_dtype) * cases[i].kv_blocks;
        cr_assert_eq(allocated, kv + (int64_t)gn_forward_scratch_bytes(model, &cases[i]));
        gn_forward_close(forward);
        gn_model_close(model);
    }
}
