/* parameters.c - layout of the flat arrays. */
#include "trainer/parameters.h"

#include "trainer/gradients.h"

#include <stdlib.h>
#include <string.h>

/* Elements of one item; -1 for a shape that makes no sense. */
static int64_t numel_of(const gn_parameter *item) {
    int64_t numel = 1;
    if (item->ndim < 1 || item->ndim > GN_MAX_DIMS) return -1;
    for (int d = 0; d < item->ndim; d++)
        if (item->shape[d] < 1 || __builtin_mul_overflow(numel, item->shape[d], &numel)) return -1;
    return numel;
}

/* Places the items, where `placed` is not NULL; the total, or -1. */
static int64_t lay_out(const gn_parameter *items, size_t n, gn_parameter *placed) {
    int64_t total = 0;
    for (size_t i = 0; i < n; i++) {
        const int64_t numel = numel_of(&items[i]), limit = INT64_MAX / 16 - total;
        if (numel < 0 || numel > limit - GN_PARAMETER_ALIGN) return -1;
        if (placed) {
            placed[i].first = total;
            placed[i].numel = numel;
        }
        total += (numel + GN_PARAMETER_ALIGN - 1) / GN_PARAMETER_ALIGN * GN_PARAMETER_ALIGN;
    }
    return total;
}

int64_t gn_parameters_total(const gn_parameter *items, size_t n) {
    return lay_out(items, n, NULL);
}

static gn_status copy_items(gn_parameters *p, const gn_parameter *items, size_t n, gn_error *err) {
    p->items = calloc(n ? n : 1, sizeof *p->items);
    if (!p->items) return gn_fail(err, GN_ENOMEM, "out of memory for %zu parameters", n);
    for (; p->n < n; p->n++) {
        gn_parameter *item = &p->items[p->n];
        *item = items[p->n];
        item->name = strdup(items[p->n].name);
        if (!item->name) return gn_fail(err, GN_ENOMEM, "out of memory for %zu parameters", n);
    }
    return GN_OK;
}

static gn_status alloc_array(gn_parameters *p, gn_tensor *array, gn_dtype dtype, int64_t total,
                             const char *what, gn_error *err) {
    const size_t bytes = (size_t)total * gn_dtype_size(dtype);
    *array = gn_tensor_1d(gn_ctx_alloc(p->ctx, bytes), dtype, total);
    if (!array->data) return gn_fail(err, GN_ENOMEM, "no memory for %zu bytes of %s", bytes, what);
    const gn_status status = gn_ctx_zero(p->ctx, array->data, bytes);
    return status ? gn_fail(err, status, "clearing %s: %s", what, gn_status_text(status)) : GN_OK;
}

static gn_status open_grads(gn_parameters *p, gn_dtype dtype, int64_t total,
                            const gn_grad_options *options, gn_error *err) {
    p->grads = gn_tensor_1d(NULL, dtype, total);
    return options ? gn_grad_pages_open(&p->grad_pages, p, options, err)
                   : alloc_array(p, &p->grads, dtype, total, "gradients", err);
}

gn_status gn_parameters_open_paged(gn_parameters **out, gn_ctx *ctx, const gn_parameter *items,
                                   size_t n, gn_dtype weights, gn_dtype grads,
                                   const gn_grad_options *options, gn_error *err) {
    *out = NULL;
    gn_parameters *p = calloc(1, sizeof *p);
    if (!p) return gn_fail(err, GN_ENOMEM, "out of memory for %zu parameters", n);
    p->ctx = ctx;
    gn_status status = copy_items(p, items, n, err);
    const int64_t total = status ? 0 : lay_out(p->items, n, p->items);
    if (total < 0) status = gn_fail(err, GN_EINVAL, "a parameter's shape makes no sense");
    if (!status) status = alloc_array(p, &p->weights, weights, total, "trained weights", err);
    if (!status) status = open_grads(p, grads, total, options, err);
    if (status)
        gn_parameters_close(p);
    else
        *out = p;
    return status;
}

gn_status gn_parameters_open(gn_parameters **out, gn_ctx *ctx, const gn_parameter *items, size_t n,
                             gn_dtype weights, gn_dtype grads, gn_error *err) {
    return gn_parameters_open_paged(out, ctx, items, n, weights, grads, NULL, err);
}

void gn_parameters_close(gn_parameters *p) {
    if (!p) return;
    gn_ctx_free(p->ctx, p->weights.data);
    gn_ctx_free(p->ctx, p->grads.data);
    gn_grad_pages_close(p->grad_pages);
    for (size_t i = 0; i < p->n; i++) free((char *)p->items[i].name);
    free(p->items);
    free(p);
}

/* An item's tensor, whose first element is at `data`. */
static gn_tensor view(const gn_parameter *item, void *data, gn_dtype dtype) {
    gn_tensor t = {
        .data = data, .dtype = dtype, .ndim = item->ndim, .ld = item->numel / item->shape[0]};
    for (int d = 0; d < GN_MAX_DIMS; d++) t.shape[d] = d < item->ndim ? item->shape[d] : 1;
    return t;
}

gn_tensor gn_parameter_weight(const gn_parameters *p, size_t i) {
    const gn_parameter *item = &p->items[i];
    const gn_tensor at = gn_tensor_piece(&p->weights, item->first, item->numel);
    return view(item, at.data, at.dtype);
}

gn_tensor gn_parameter_grad(const gn_parameters *p, size_t i) {
    const gn_parameter *item = &p->items[i];
    const gn_tensor at = gn_grads_piece(p, item->first, item->numel);
    return view(item, at.data, at.dtype);
}
