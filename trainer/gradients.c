/* gradients.c - which page a gradient is in. */
#include "trainer/gradients.h"

#include <stdlib.h>

enum { ALIGN = 64 };

struct gn_grad_pages {
    gn_pages *pages;
    size_t n;
    int64_t *first; /* (n + 1) elements */
    char **at;      /* (n) an acquired group's memory, or NULL */
    bool *is_zero;  /* (n) since the last clearing nobody had it */
};

/* ---- open and close ---- */

static bool are_groups(const gn_grad_options *o, size_t n) {
    if (o->n_groups < 1 || o->n_groups > INT32_MAX || o->groups[0] != 0) return false;
    for (size_t i = 1; i < o->n_groups; i++)
        if (o->groups[i] <= o->groups[i - 1] || o->groups[i] >= n) return false;
    return true;
}

/* Bytes of a page that holds so many gradients. */
static size_t page_of(int64_t numel, gn_dtype dtype) {
    return ((size_t)numel * gn_dtype_size(dtype) + ALIGN - 1) / ALIGN * ALIGN;
}

size_t gn_grad_page_bytes(const gn_parameter *items, size_t n, gn_dtype dtype, const size_t *groups,
                          size_t n_groups) {
    int64_t most = 0;
    for (size_t i = 0; i < n_groups; i++) {
        const size_t end = i + 1 < n_groups ? groups[i + 1] : n;
        const int64_t numel = gn_parameters_total(items + groups[i], end - groups[i]);
        if (numel > most) most = numel;
    }
    return page_of(most, dtype);
}

static gn_status open_parts(gn_grad_pages *g, const gn_parameters *p, const gn_grad_options *o,
                            gn_error *err) {
    g->n = o->n_groups;
    g->first = calloc(g->n + 1, sizeof *g->first);
    g->at = calloc(g->n, sizeof *g->at);
    g->is_zero = calloc(g->n, sizeof *g->is_zero);
    if (!g->first || !g->at || !g->is_zero)
        return gn_fail(err, GN_ENOMEM, "out of memory for gradients");
    for (size_t i = 0; i < g->n; i++) g->first[i] = p->items[o->groups[i]].first;
    g->first[g->n] = p->grads.shape[0];
    const size_t bytes = gn_grad_page_bytes(p->items, p->n, p->grads.dtype, o->groups, o->n_groups);
    return gn_pages_open(&g->pages, o->device, (int)g->n, bytes, o->budget, err);
}

gn_status gn_grad_pages_open(gn_grad_pages **out, const gn_parameters *p,
                             const gn_grad_options *options, gn_error *err) {
    *out = NULL;
    if (!are_groups(options, p->n))
        return gn_fail(err, GN_EINVAL, "%zu groups of %zu parameters", options->n_groups, p->n);
    gn_grad_pages *g = calloc(1, sizeof *g);
    if (!g) return gn_fail(err, GN_ENOMEM, "out of memory for gradients");
    const gn_status status = open_parts(g, p, options, err);
    if (status)
        gn_grad_pages_close(g);
    else
        *out = g;
    return status;
}

void gn_grad_pages_close(gn_grad_pages *g) {
    if (!g) return;
    gn_pages_close(g->pages);
    free(g->first);
    free(g->at);
    free(g->is_zero);
    free(g);
}

/* ---- groups ---- */

size_t gn_grads_groups(const gn_parameters *p) {
    return p->grad_pages ? p->grad_pages->n : 1;
}

int64_t gn_grads_first(const gn_parameters *p, size_t group) {
    if (p->grad_pages) return p->grad_pages->first[group];
    return group == 0 ? 0 : p->grads.shape[0];
}

size_t gn_grads_group(const gn_parameters *p, int64_t element) {
    size_t low = 0, high = gn_grads_groups(p);
    while (high - low > 1) {
        const size_t middle = low + (high - low) / 2;
        *(gn_grads_first(p, middle) <= element ? &low : &high) = middle;
    }
    return low;
}

gn_pages *gn_grads_pages(const gn_parameters *p) {
    return p->grad_pages ? p->grad_pages->pages : NULL;
}

/* The page of a group. */
static int page_of_group(const gn_grad_pages *g, size_t group) {
    return (int)(g->n - 1 - group);
}

/* ---- use ---- */

gn_status gn_grads_clear(gn_parameters *p) {
    gn_grad_pages *g = p->grad_pages;
    if (!g)
        return gn_ctx_zero(p->ctx, p->grads.data,
                           (size_t)p->grads.shape[0] * gn_dtype_size(p->grads.dtype));
    gn_status status = GN_OK;
    for (size_t i = 0; i < g->n && !status; i++) {
        status = gn_pages_discard(g->pages, page_of_group(g, i));
        g->is_zero[i] = true;
    }
    return status;
}

gn_status gn_grads_prefetch(gn_parameters *p, size_t group) {
    const gn_grad_pages *g = p->grad_pages;
    return g ? gn_pages_prefetch(g->pages, page_of_group(g, group)) : GN_OK;
}

gn_status gn_grads_acquire(gn_parameters *p, size_t group) {
    gn_grad_pages *g = p->grad_pages;
    if (!g) return GN_OK;
    void *memory;
    gn_status status = gn_pages_acquire(g->pages, page_of_group(g, group), &memory);
    if (status) return status;
    const int64_t numel = g->first[group + 1] - g->first[group];
    if (g->is_zero[group])
        status = gn_ctx_zero(p->ctx, memory, (size_t)numel * gn_dtype_size(p->grads.dtype));
    if (!status) {
        g->at[group] = memory;
        return GN_OK;
    }
    const gn_status released = gn_pages_release(g->pages, page_of_group(g, group), false);
    return released ? released : status;
}

gn_status gn_grads_release(gn_parameters *p, size_t group, bool written) {
    gn_grad_pages *g = p->grad_pages;
    if (!g) return GN_OK;
    const bool was_zero = g->is_zero[group]; /* which only the device's copy is */
    g->at[group] = NULL;
    g->is_zero[group] = false;
    return gn_pages_release(g->pages, page_of_group(g, group), written || was_zero);
}

gn_tensor gn_grads_piece(const gn_parameters *p, int64_t first, int64_t n) {
    const gn_grad_pages *g = p->grad_pages;
    if (!g) return gn_tensor_piece(&p->grads, first, n);
    const size_t group = gn_grads_group(p, first);
    const gn_tensor page =
        gn_tensor_1d(g->at[group], p->grads.dtype, g->first[group + 1] - g->first[group]);
    return gn_tensor_piece(&page, first - g->first[group], n);
}
