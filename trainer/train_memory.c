/* train_memory.c - a budget, divided: what must be there, and then one use after the other.
 *
 * A use is a page that stays on the device or a tensor that a layer keeps. Uses stand in the order
 * of the time that a byte of them saves, and are taken as long as they fit; after the first that
 * does not, only pages are, so that what is kept for a budget is also kept for a larger one. */
#include "trainer/train_memory.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/memory_plan.h"

#define MIB   ((int64_t)1 << 20)
#define LEAST (192 * MIB) /* of the reserve */
#define BLOCK (2 * MIB)   /* in such the driver gives memory, but for what is small */

/* Rates of today's GPUs, as ratios: operations of products in the time that a byte takes over the
 * bus, and in the time that one takes to or from memory; attention runs at a third of products'
 * rate. */
enum { PER_BUS_BYTE = 12000, PER_MEMORY_BYTE = 190, ATTENTION_COST = 3 };

enum {
    MARGIN_SHARE = 64, /* of the device, where no budget is given */
    MIN_PAGES = 3,     /* one in use, one coming, one leaving */
    ADVICE = 320
};

/* A use's kinds: gn_keep, then these. LODGERS: pages of the optimizer that need no room, as they
 * may lodge in layers' inputs, but save their trips when there is some. */
enum { GRADIENTS = GN_KEEP_COUNT, OPTIMIZER, LODGERS, KINDS };

typedef struct use {
    int64_t unit;       /* bytes of one, as they are taken */
    int64_t page;       /* bytes of its page, if it is one */
    int64_t least, all; /* how many: at least, at most */
    int64_t whole;      /* bytes of all of them */
    double saves;       /* operations a byte, or as much time, in an update */
    int64_t taken;
} use;

typedef struct needs {
    const gn_train_wanted *wanted;
    bool is_host;
    int64_t available, budget;
    gn_train_memory fixed;
    use uses[KINDS];
} needs;

int64_t gn_train_memory_sum(const gn_train_memory *m) {
    return m->weights + m->embeddings + m->adapters + m->gradients + m->optimizer + m->inputs +
           m->kept + m->scratch + m->workspace + m->context + m->reserve;
}

/* ---- what is needed ---- */

static int64_t matrix_bytes(const gn_matrix *m) {
    return m->rows * m->cols * (int64_t)gn_dtype_size(m->dtype);
}

/* Operations that computing it again takes, in one layer and one micro-batch. */
static double recomputation(const gn_model *model, const gn_train_limits *limits, gn_keep what) {
    const gn_config *c = &model->config;
    const double rows = limits->max_rows, hidden = c->hidden, inter = c->intermediate;
    const double dim = (double)c->heads * c->head_dim, kv = (double)c->kv_heads * c->head_dim;
    const double value = (double)gn_dtype_size(gn_ctx_activation(model->ctx));
    switch (what) {
    case GN_KEEP_QKV: return 2 * rows * hidden * (dim + 2 * kv);
    case GN_KEEP_ATTENTION: return ATTENTION_COST * 2 * rows * limits->context * dim;
    case GN_KEEP_RESIDUAL: return 2 * rows * dim * hidden;
    case GN_KEEP_GATE_UP: return 4 * rows * hidden * inter;
    default: return PER_MEMORY_BYTE * 3 * rows * inter * value;
    }
}

static void find_kept(needs *n, const gn_model *model) {
    const gn_train_wanted *w = n->wanted;
    for (int i = 0; i < GN_KEEP_COUNT; i++) {
        const int64_t unit = gn_train_keep_bytes(model, &w->limits, (gn_keep)i);
        const int64_t all = model->config.layers - 1;
        n->uses[i] = (use){.unit = unit, .all = all, .whole = all * unit};
        n->uses[i].saves =
            w->accumulation * recomputation(model, &w->limits, (gn_keep)i) / (double)unit;
    }
}

/* What an allocation of a GPU's memory takes of it. */
static int64_t taken_by(const needs *n, int64_t bytes) {
    return n->is_host || bytes <= BLOCK / 2 ? bytes : (bytes + BLOCK - 1) / BLOCK * BLOCK;
}

/* A page that stays saves `trips` copies to the device in an update. */
static use pages_of(const needs *n, int64_t page, int64_t count, int64_t whole, bool travel,
                    double trips) {
    const bool stay = !travel || count <= MIN_PAGES || whole <= MIN_PAGES * page;
    return (use){.unit = taken_by(n, page),
                 .page = page,
                 .least = stay ? count : MIN_PAGES,
                 .all = count,
                 .whole = whole,
                 .saves = trips * PER_BUS_BYTE};
}

static void find_optimizer(needs *n, int64_t total) {
    const gn_train_wanted *w = n->wanted;
    const gn_optimizer_size size = gn_optimizer_measure(&w->optimizer, total, w->weights);
    const int64_t page = (int64_t)size.page_bytes, whole = size.pages * taken_by(n, page);
    use *pages = &n->uses[OPTIMIZER], *lodgers = &n->uses[LODGERS];
    *pages = pages_of(n, page, size.pages, whole, w->paged && !n->is_host, 1);
    *lodgers = (use){.unit = pages->unit,
                     .page = page,
                     .all = gn_min(pages->all - pages->least, n->fixed.inputs / page)};
    lodgers->whole = lodgers->all * lodgers->unit;
    pages->all -= lodgers->all;
    pages->whole -= lodgers->whole;
}

static gn_status find_trained(needs *n, gn_error *err) {
    const gn_train_wanted *w = n->wanted;
    const int64_t total = gn_parameters_total(w->items, w->n_items);
    if (total < 1) return gn_fail(err, GN_EINVAL, "nothing to train");
    n->fixed.adapters = total * (int64_t)gn_dtype_size(w->weights);
    const int64_t grads = total * (int64_t)gn_dtype_size(w->grads);
    find_optimizer(n, total);
    if (w->n_groups > 0 && !n->is_host) {
        const int64_t page =
            (int64_t)gn_grad_page_bytes(w->items, w->n_items, w->grads, w->groups, w->n_groups);
        n->uses[GRADIENTS] = pages_of(n, page, (int64_t)w->n_groups, grads, true, 2);
    } else {
        n->uses[GRADIENTS] = pages_of(n, grads, 1, grads, false, 2);
    }
    return GN_OK;
}

static gn_status find_needs(needs *n, const gn_model *model, const gn_train_wanted *wanted,
                            gn_error *err) {
    const gn_train_step_bytes step = gn_train_step_measure(model, &wanted->limits);
    n->wanted = wanted;
    n->fixed.inputs = step.inputs;
    n->fixed.scratch = step.scratch;
    n->fixed.workspace = gn_max(step.workspace, GN_SUM_WORKSPACE);
    find_kept(n, model);
    return find_trained(n, err);
}

/* Of the device, and of what is on it. */
static gn_status find_device(needs *n, gn_model *model, int64_t budget, gn_error *err) {
    gn_ctx_memory memory = {0};
    n->is_host = gn_ctx_is_host(model->ctx);
    const gn_status status = gn_ctx_read_memory(model->ctx, &memory);
    if (status)
        return gn_fail(err, status, "cannot find out how much memory %s has",
                       gn_ctx_device(model->ctx));
    n->available = memory.free;
    n->budget = budget;
    if (n->is_host && budget == 0) n->budget = memory.free / 4 * 3;
    if (!n->is_host) {
        const bool tied = model->lm_head.data == model->embed.data;
        n->fixed.embeddings =
            matrix_bytes(&model->embed) + (tied ? 0 : matrix_bytes(&model->lm_head));
        n->fixed.weights = model->owned_bytes - n->fixed.embeddings;
        n->fixed.context = gn_context_bytes(&memory);
        n->available += model->owned_bytes + n->fixed.context;
        /* Whoever sets a budget knows of the other programs. */
        const int64_t share = budget > 0 ? 0 : memory.total / MARGIN_SHARE;
        n->fixed.reserve = gn_max(LEAST, share);
        if (budget == 0) n->budget = n->available;
    }
    if (n->budget > n->available)
        return gn_fail(err, GN_ENOMEM,
                       "a memory budget of %.1f MiB is more than the %.1f there are",
                       gn_mib(n->budget), gn_mib(n->available));
    return GN_OK;
}

/* ---- dividing ---- */

/* All of a kind may be less than whole pages: then it is one array. */
static int64_t bytes_of(const use *u, int64_t count) {
    return count == u->all ? u->whole : gn_min(count * u->unit, u->whole);
}

static int64_t taken_bytes(const use *u) {
    return bytes_of(u, u->taken);
}

static int64_t least_sum(const needs *n) {
    int64_t sum = gn_train_memory_sum(&n->fixed);
    for (int i = 0; i < KINDS; i++) sum += bytes_of(&n->uses[i], n->uses[i].least);
    return sum;
}

/* As many more of a use as fit; false: not all do. */
static bool take(use *u, int64_t *left) {
    while (u->taken < u->all) {
        const int64_t more = bytes_of(u, u->taken + 1) - taken_bytes(u);
        if (more > *left) return false;
        *left -= more;
        u->taken++;
    }
    return true;
}

static bool is_better(const use *a, const use *b) {
    return a->saves > b->saves;
}

/* The uses, best first. */
static void sort_uses(use *uses, use *order[KINDS]) {
    for (int i = 0; i < KINDS; i++) {
        int at = i;
        for (; at > 0 && is_better(&uses[i], order[at - 1]); at--) order[at] = order[at - 1];
        order[at] = &uses[i];
    }
}

static void divide(needs *n) {
    use *order[KINDS];
    int64_t left = n->budget - least_sum(n);
    bool fits = true;
    for (int i = 0; i < KINDS; i++) n->uses[i].taken = n->uses[i].least;
    sort_uses(n->uses, order);
    for (int i = 0; i < KINDS; i++) {
        const bool is_kept = order[i] < &n->uses[GN_KEEP_COUNT];
        if (fits || !is_kept) fits = take(order[i], &left) && fits;
    }
}

/* Of the layers' forward passes. */
static double recomputed_share(const needs *n) {
    double all = 0, again = 0;
    for (int i = 0; i < GN_KEEP_COUNT; i++) {
        const use *u = &n->uses[i];
        all += u->saves * (double)(u->unit * u->all);
        again += u->saves * (double)(u->unit * (u->all - u->taken));
    }
    return all > 0 ? again / all : 0;
}

static gn_train_memory result_of(const needs *n) {
    const use *grads = &n->uses[GRADIENTS], *optimizer = &n->uses[OPTIMIZER];
    const use *lodgers = &n->uses[LODGERS];
    gn_train_memory m = n->fixed;
    m.budget = n->budget;
    m.available = n->available;
    m.gradients = taken_bytes(grads);
    m.optimizer = taken_bytes(optimizer) + taken_bytes(lodgers);
    for (int i = 0; i < GN_KEEP_COUNT; i++) {
        m.keep[i] = (int32_t)n->uses[i].taken;
        m.kept += taken_bytes(&n->uses[i]);
    }
    m.grads_travel = grads->taken < grads->all;
    m.grad_budget = (size_t)(grads->taken * grads->page);
    m.optimizer_budget = (size_t)((optimizer->taken + lodgers->taken) * optimizer->page);
    m.recomputed = recomputed_share(n);
    return m;
}

/* ---- refusing ---- */

/* Whether training as `changed` says would fit. */
static bool would_fit(const needs *n, const gn_model *model, const gn_train_wanted *changed) {
    needs other = *n;
    gn_error ignored;
    return find_needs(&other, model, changed, &ignored) == GN_OK && least_sum(&other) <= n->budget;
}

/* The most sequences that fit in a micro-batch, fewer than there are; 0: not even one. */
static int32_t fitting_seqs(const needs *n, const gn_model *model) {
    gn_train_wanted w = *n->wanted;
    const int32_t seqs = w.limits.max_seqs, rows = w.limits.max_rows;
    int32_t low = 0, high = seqs;
    while (high - low > 1) {
        const int32_t middle = low + (high - low) / 2;
        w.limits.max_seqs = middle;
        w.limits.max_rows = (int32_t)(((int64_t)rows * middle + seqs - 1) / seqs);
        *(would_fit(n, model, &w) ? &low : &high) = middle;
    }
    return low;
}

/* The longest context that fits, shorter than it is; 0: none. */
static int32_t fitting_context(const needs *n, const gn_model *model) {
    gn_train_wanted w = *n->wanted;
    const int32_t context = w.limits.context, rows = w.limits.max_rows;
    int32_t low = 0, high = context;
    while (high - low > 1) {
        const int32_t middle = low + (high - low) / 2;
        w.limits.context = middle;
        w.limits.max_rows = (int32_t)(((int64_t)rows * middle + context - 1) / context);
        *(would_fit(n, model, &w) ? &low : &high) = middle;
    }
    return low;
}

/* Which dimension of a parameter is LoRA's rank; -1: none. */
static int rank_dimension(const gn_parameter *item) {
    if (strstr(item->name, ".lora_A.")) return 0;
    return strstr(item->name, ".lora_B.") ? 1 : -1;
}

/* The largest half, quarter ... of the rank that fits; 0: none. */
static int fitting_rank(const needs *n, const gn_model *model) {
    gn_train_wanted w = *n->wanted;
    gn_parameter *items = malloc((w.n_items ? w.n_items : 1) * sizeof *items);
    int rank = items ? w.limits.max_rank / 2 : 0;
    for (; rank > 0; rank /= 2) {
        for (size_t i = 0; i < w.n_items; i++) {
            items[i] = w.items[i];
            const int d = rank_dimension(&items[i]);
            if (d >= 0) items[i].shape[d] = gn_min(items[i].shape[d], rank);
        }
        w.items = items;
        w.limits.max_rank = rank;
        if (would_fit(n, model, &w)) break;
        w.items = n->wanted->items;
    }
    free(items);
    return rank;
}

static const char *fitting_optimizer(const needs *n, const gn_model *model) {
    gn_train_wanted w = *n->wanted;
    w.paged = true;
    if (would_fit(n, model, &w)) return "an optimizer in pages";
    w.paged = n->wanted->paged;
    w.optimizer.eight_bit = true;
    if (would_fit(n, model, &w)) return "an 8-bit optimizer";
    w.paged = true;
    return would_fit(n, model, &w) ? "an 8-bit optimizer in pages" : NULL;
}

typedef struct advice {
    char text[ADVICE];
    int used;
} advice;

static void advise(advice *a, const char *fmt, ...) GN_PRINTF(2, 3);

static void advise(advice *a, const char *fmt, ...) {
    va_list args;
    const size_t room = sizeof a->text - (size_t)a->used;
    int n = snprintf(a->text + a->used, room, a->used ? ", or " : "; what would fit: ");
    va_start(args, fmt);
    n += vsnprintf(a->text + a->used + n, room - (size_t)n, fmt, args);
    va_end(args);
    a->used += n;
}

static advice find_advice(const needs *n, const gn_model *model) {
    advice a = {0};
    const char *optimizer = fitting_optimizer(n, model);
    const int32_t seqs = fitting_seqs(n, model), context = fitting_context(n, model);
    const int rank = fitting_rank(n, model);
    if (optimizer) advise(&a, "%s", optimizer);
    if (seqs > 0) advise(&a, "micro-batches of %d", seqs);
    if (context > 0) advise(&a, "samples of %d tokens", context);
    if (rank > 0) advise(&a, "rank %d", rank);
    return a;
}

static gn_status refuse(const needs *n, const gn_model *model, gn_error *err) {
    const advice a = find_advice(n, model);
    const gn_train_memory *m = &n->fixed;
    const use *grads = &n->uses[GRADIENTS], *optimizer = &n->uses[OPTIMIZER];
    return gn_fail(
        err, GN_ENOMEM,
        "%.1f MiB of memory are %.1f too few: weights %.1f, embeddings %.1f, trained "
        "weights %.1f, gradients %.1f, optimizer %.1f, layers' inputs %.1f, scratch "
        "%.1f, working memory %.1f, context %.1f, reserve %.1f%s",
        gn_mib(n->budget), gn_mib(least_sum(n) - n->budget), gn_mib(m->weights),
        gn_mib(m->embeddings), gn_mib(m->adapters), gn_mib(bytes_of(grads, grads->least)),
        gn_mib(bytes_of(optimizer, optimizer->least)), gn_mib(m->inputs), gn_mib(m->scratch),
        gn_mib(m->workspace), gn_mib(m->context), gn_mib(m->reserve), a.text);
}

gn_status gn_train_memory_plan(gn_train_memory *out, gn_model *model, const gn_train_wanted *wanted,
                               int64_t budget, gn_error *err) {
    needs n = {0};
    gn_status status = find_device(&n, model, budget, err);
    if (!status) status = find_needs(&n, model, wanted, err);
    if (status) return status;
    if (least_sum(&n) > n.budget) return refuse(&n, model, err);
    divide(&n);
    *out = result_of(&n);
    return GN_OK;
}

/* ---- telling ---- */

static int64_t peak_of(gn_pages *pages) {
    return pages ? (int64_t)gn_pages_read_stats(pages).peak : -1;
}

gn_status gn_train_memory_measure(gn_train_measured *out, const gn_train_memory *plan,
                                  gn_model *model, const gn_parameters *parameters,
                                  gn_optimizer *optimizer) {
    gn_ctx_memory memory;
    *out = (gn_train_measured){-1, -1, -1};
    if (gn_ctx_is_host(model->ctx)) return GN_OK;
    out->gradients = peak_of(gn_grads_pages(parameters));
    out->optimizer = peak_of(gn_optimizer_pages(optimizer));
    const gn_status status = gn_ctx_read_memory(model->ctx, &memory);
    if (!status) out->sum = plan->available - memory.free;
    return status;
}

static void write_row(FILE *f, const char *name, int64_t bytes, int64_t measured) {
    if (bytes <= 0) return;
    fprintf(f, "  %-26s %10.1f MiB", name, gn_mib(bytes));
    if (measured >= 0) fprintf(f, " %10.1f measured", gn_mib(measured));
    fputc('\n', f);
}

char *gn_train_memory_text(const gn_train_memory *p, const gn_train_measured *measured) {
    static const gn_train_measured unknown = {-1, -1, -1};
    const gn_train_measured *m = measured ? measured : &unknown;
    char *text = NULL;
    size_t size;
    FILE *f = open_memstream(&text, &size);
    if (!f) return NULL;
    fprintf(f, "memory; %.0f %% of the forward pass is computed again:\n", 100 * p->recomputed);
    write_row(f, "weights", p->weights, -1);
    write_row(f, "embeddings", p->embeddings, -1);
    write_row(f, "trained weights", p->adapters, -1);
    write_row(f, "gradients", p->gradients, m->gradients);
    write_row(f, "optimizer", p->optimizer, m->optimizer);
    write_row(f, "inputs of layers", p->inputs, -1);
    write_row(f, "activations kept", p->kept, -1);
    write_row(f, "scratch of one layer", p->scratch, -1);
    write_row(f, "working memory", p->workspace, -1);
    write_row(f, "context", p->context, -1);
    write_row(f, "reserve", p->reserve, -1);
    write_row(f, "together", gn_train_memory_sum(p), m->sum);
    write_row(f, "of", p->budget, -1);
    if (fclose(f) == 0) return text;
    free(text);
    return NULL;
}
