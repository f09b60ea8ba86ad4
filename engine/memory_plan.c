/* memory_plan.c - a budget, divided. */
#include "engine/memory_plan.h"

#include <stdio.h>
#include <stdlib.h>

#include "engine/adapter_memory.h"

#define MIB           ((int64_t)1 << 20)
#define MIN_MARGIN    (256 * MIB)
#define HOST_KV_BYTES (1024 * MIB) /* where no budget says more */

enum { MARGIN_SHARE = 64, ADAPTER_SHARE = 8, MAX_ADAPTER_SHARE = 2, DESCRIPTION = 320 };

/* Blocks of one whole context. */
static int64_t context_blocks(const gn_memory_needs *n) {
    return (n->context + GN_KV_BLOCK_TOKENS - 1) / GN_KV_BLOCK_TOKENS;
}

/* ---- refusing ---- */

/* What would fit, where `missing` bytes do not, `kv` of which keys and values would get. */
static void write_advice(char *text, size_t size, const gn_memory_needs *n, int64_t kv,
                         int64_t missing) {
    const int64_t spare = kv - context_blocks(n) * n->block; /* beyond one context */
    text[0] = 0;
    if (missing <= spare) {
        snprintf(text, size, "; %.1f MiB for keys and values would fit", gn_mib(kv - missing));
        return;
    }
    const int64_t blocks = context_blocks(n) - (missing - spare + n->block - 1) / n->block;
    const int64_t seqs = n->max_seqs - (missing - spare + n->row - 1) / n->row;
    int used = 0;
    if (blocks > 0)
        used = snprintf(text, size, "; a context of %lld tokens would fit",
                        (long long)(blocks * GN_KV_BLOCK_TOKENS));
    if (seqs > 0)
        snprintf(text + used, size - (size_t)used, "%s %lld sequence%s at a time would fit",
                 used ? ", or" : ";", (long long)seqs, seqs == 1 ? "" : "s");
}

static gn_status refuse(const gn_memory_plan *p, const gn_memory_needs *n, gn_error *err) {
    const int64_t missing = p->weights + p->scratch + p->reserve + p->adapters + p->kv - p->budget;
    char advice[DESCRIPTION];
    write_advice(advice, sizeof advice, n, p->kv, missing);
    return gn_fail(err, GN_ENOMEM,
                   "%.1f MiB of memory are %.1f too few: weights %.1f, activations and scratch "
                   "%.1f, context and reserve %.1f, adapters %.1f, keys and values %.1f (a context "
                   "of %d tokens takes %.1f)%s",
                   gn_mib(p->budget), gn_mib(missing), gn_mib(p->weights), gn_mib(p->scratch),
                   gn_mib(p->reserve), gn_mib(p->adapters), gn_mib(p->kv), n->context,
                   gn_mib(context_blocks(n) * n->block), advice);
}

static gn_status check_budget(const gn_memory_needs *n, int64_t there, gn_error *err) {
    if (n->budget == 0 || n->budget <= there) return GN_OK;
    return gn_fail(err, GN_ENOMEM, "a memory budget of %.1f MiB is more than the %.1f there are",
                   gn_mib(n->budget), gn_mib(there));
}

static gn_status check_kv(const gn_memory_needs *n, gn_error *err) {
    const int64_t one = context_blocks(n) * n->block;
    if (n->kv == 0 || n->kv >= one) return GN_OK;
    return gn_fail(err, GN_EINVAL,
                   "a KV cache of %.1f MiB does not hold one context of %d tokens, which takes "
                   "%.1f MiB; give it more memory or a shorter context",
                   gn_mib(n->kv), n->context, gn_mib(one));
}

/* ---- dividing ---- */

static int64_t adapter_bytes(const gn_memory_needs *n, int64_t rest) {
    if (n->is_host) return n->present;
    if (n->adapters != 0) return gn_max(n->adapters, 0);
    const int64_t wanted = gn_max(n->present, rest / ADAPTER_SHARE);
    return gn_max(0, gn_min(wanted, rest / MAX_ADAPTER_SHARE));
}

gn_status gn_memory_plan_make(gn_memory_plan *plan, const gn_memory_needs *n, gn_error *err) {
    const int64_t one = context_blocks(n); /* these two are blocks */
    const int64_t most = gn_min(one * n->max_seqs, INT32_MAX);
    const int64_t context = n->is_host ? 0 : gn_context_bytes(&n->memory);
    const int64_t there = n->memory.free + (n->is_host ? 0 : n->weights + context);
    const bool is_bound = n->budget > 0 || !n->is_host;
    gn_memory_plan p = {.scratch = n->scratch};
    gn_status status = check_budget(n, there, err);
    if (!status) status = check_kv(n, err);
    if (status) return status;
    if (!n->is_host) {
        p.weights = n->weights;
        /* Whoever sets a budget knows of the other programs. */
        const int64_t share = n->budget > 0 ? 0 : n->memory.total / MARGIN_SHARE;
        p.reserve = context + gn_max(MIN_MARGIN, share);
    }
    if (is_bound) p.budget = n->budget > 0 ? n->budget : there;
    int64_t rest = p.budget - p.weights - p.scratch - p.reserve;
    p.adapters = adapter_bytes(n, rest);
    rest -= p.adapters;
    const int64_t asked = n->kv > 0 ? n->kv : is_bound ? gn_max(rest, 0) : HOST_KV_BYTES;
    p.kv = gn_max(one, gn_min(asked / n->block, most)) * n->block;
    p.kv_tokens = p.kv / n->block * GN_KV_BLOCK_TOKENS;
    if (is_bound && p.kv > rest) return refuse(&p, n, err);
    *plan = p;
    return GN_OK;
}

gn_status gn_memory_plan_model(gn_memory_plan *plan, gn_model *model,
                               const gn_forward_options *limits, const gn_engine_options *options,
                               gn_error *err) {
    gn_ctx_memory memory = {0};
    const bool is_host = gn_ctx_is_host(model->ctx),
               is_bound = !is_host || options->memory_bytes > 0;
    const gn_status status = is_bound ? gn_ctx_read_memory(model->ctx, &memory) : GN_OK;
    if (status)
        return gn_fail(err, status, "cannot find out how much memory %s has",
                       gn_ctx_device(model->ctx));
    gn_memory_needs n = {
        .is_host = is_host,
        .memory = memory,
        .weights = model->owned_bytes,
        .scratch = (int64_t)gn_forward_scratch_bytes(model, limits),
        .row = (int64_t)sizeof(float) * (model->config.hidden + model->config.vocab),
        .block = (int64_t)gn_forward_kv_block_bytes(model, limits->kv_dtype),
        .budget = options->memory_bytes,
        .kv = options->kv_bytes,
        .adapters = options->adapter_bytes,
        .context = limits->context,
        .max_seqs = limits->max_seqs,
    };
    for (int32_t i = 0; i < options->n_adapters; i++)
        n.present += gn_adapter_memory_bytes(options->adapters[i]);
    if (is_host) n.present = gn_min(n.present, gn_adapter_host_budget(model->adapters));
    return gn_memory_plan_make(plan, &n, err);
}

/* ---- telling ---- */

static void write_row(FILE *f, const char *name, int64_t bytes) {
    if (bytes > 0) fprintf(f, "  %-24s %10.1f MiB\n", name, gn_mib(bytes));
}

char *gn_memory_plan_text(const gn_memory_plan *p) {
    char *text = NULL, name[64];
    size_t size;
    FILE *f = open_memstream(&text, &size);
    if (!f) return NULL;
    fprintf(f, "memory%s:\n", p->budget > 0 ? "" : ", without a bound");
    write_row(f, "weights", p->weights);
    write_row(f, "adapters", p->adapters);
    write_row(f, "activations and scratch", p->scratch);
    write_row(f, "context and reserve", p->reserve);
    snprintf(name, sizeof name, "KV of %lld tokens", (long long)p->kv_tokens);
    write_row(f, name, p->kv);
    write_row(f, "together", p->weights + p->adapters + p->scratch + p->reserve + p->kv);
    write_row(f, "of", p->budget);
    if (fclose(f) == 0) return text;
    free(text);
    return NULL;
}
