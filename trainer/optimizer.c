/* optimizer.c - where each kind of state lies in its page, and the sweep over the pages. */
#include "trainer/optimizer.h"

#include "trainer/gradients.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = GN_MOMENT_BLOCK, DEFAULT_PAGE_BYTES = 16 << 20, PREFETCH = 2 /* pages ahead */ };

struct gn_optimizer {
    gn_parameters *parameters;
    gn_optimizer_options options;
    bool has_masters; /* in the pages; else the weights are F32 and their own masters */
    int64_t steps;
    int64_t total;   /* elements */
    int64_t stretch; /* elements of a page, whole blocks */
    int n_pages;
    size_t offset[GN_STATE_COUNT]; /* in a page */
    gn_pages *pages;
    double *sum; /* on the device */
};

/* ---- layout ---- */

const char *gn_state_name(gn_state state) {
    static const char *const names[] = {
#define X(name, text) text,
        GN_STATE_MAP(X)
#undef X
    };
    return names[state];
}

static bool is_absmax(gn_state state) {
    return state == GN_STATE_M_ABSMAX || state == GN_STATE_V_ABSMAX;
}

gn_dtype gn_optimizer_state_dtype(const gn_optimizer *o, gn_state state) {
    const bool is_moment = state == GN_STATE_M || state == GN_STATE_V;
    return is_moment && o->options.eight_bit ? GN_U8 : GN_F32;
}

/* Is it kept in the pages? */
static bool is_paged(const gn_optimizer *o, gn_state state) {
    if (state == GN_STATE_MASTER) return o->has_masters;
    return !is_absmax(state) || o->options.eight_bit;
}

/* Bytes of a state for `n` elements, n in whole blocks. */
static size_t state_bytes(const gn_optimizer *o, gn_state state, int64_t n) {
    const int64_t count = is_absmax(state) ? n / BLOCK : n;
    return (size_t)count * gn_dtype_size(gn_optimizer_state_dtype(o, state));
}

static size_t paged_bytes(const gn_optimizer *o, int64_t n) {
    size_t bytes = 0;
    for (int s = 0; s < GN_STATE_COUNT; s++)
        if (is_paged(o, s)) bytes += state_bytes(o, s, n);
    return bytes;
}

/* Pages of as many blocks as fit in page_bytes, of 16 at least, so that every array in a page is
 * aligned to 64 bytes. Returns the bytes of a page. */
static size_t lay_out(gn_optimizer *o) {
    enum { STEP = 16 * BLOCK };
    const size_t wanted = o->options.page_bytes ? o->options.page_bytes : DEFAULT_PAGE_BYTES;
    const int64_t fit = (int64_t)(wanted / paged_bytes(o, STEP)) * STEP;
    const int64_t all = (o->total + STEP - 1) / STEP * STEP;
    o->stretch = fit < STEP ? STEP : fit < all ? fit : all;
    size_t bytes = 0;
    for (int s = 0; s < GN_STATE_COUNT; s++) {
        o->offset[s] = bytes;
        if (is_paged(o, s)) bytes += state_bytes(o, s, o->stretch);
    }
    return bytes;
}

static int64_t page_count(const gn_optimizer *o) {
    return (o->total + o->stretch - 1) / o->stretch;
}

gn_optimizer_size gn_optimizer_measure(const gn_optimizer_options *options, int64_t total,
                                       gn_dtype weights) {
    gn_optimizer o = {.options = *options, .has_masters = weights == GN_BF16, .total = total};
    const size_t page_bytes = lay_out(&o);
    return (gn_optimizer_size){page_count(&o), page_bytes};
}

/* ---- open and close ---- */

static gn_status copy_masters(gn_optimizer *o) {
    gn_status status = GN_OK;
    const gn_tensor *w = &o->parameters->weights;
    uint16_t *values = malloc((size_t)o->stretch * sizeof *values);
    if (!values) return GN_ENOMEM;
    for (int i = 0; i < o->n_pages && !status; i++) {
        const int64_t first = i * o->stretch;
        const int64_t n = o->total - first < o->stretch ? o->total - first : o->stretch;
        status = gn_ctx_read(o->parameters->ctx, values, (uint16_t *)w->data + first,
                             (size_t)n * sizeof *values);
        float *masters = (float *)((char *)gn_pages_host(o->pages, i) + o->offset[GN_STATE_MASTER]);
        if (!status) gn_widen(masters, values, GN_BF16, n);
    }
    free(values);
    return status;
}

/* Padding shares blocks with parameters, and must be zero when state is set into those. */
static void clear_codes(gn_optimizer *o) {
    for (int i = 0; i < o->n_pages; i++)
        memset((char *)gn_pages_host(o->pages, i) + o->offset[GN_STATE_M], GN_ZERO_CODE,
               (size_t)o->stretch);
}

static gn_status open_state(gn_optimizer *o, const gn_page_device *device, gn_error *err) {
    gn_ctx *ctx = o->parameters->ctx;
    const size_t page_bytes = lay_out(o);
    const int64_t n_pages = page_count(o);
    if (n_pages > INT32_MAX)
        return gn_fail(err, GN_EINVAL, "%lld parameters in pages of %zu bytes", (long long)o->total,
                       page_bytes);
    o->n_pages = (int)n_pages;
    gn_status status =
        gn_pages_open(&o->pages, device, o->n_pages, page_bytes, o->options.budget, err);
    if (status) return status;
    o->sum = gn_ctx_alloc(ctx, sizeof *o->sum);
    status = o->sum ? gn_ctx_reserve(ctx, GN_SUM_WORKSPACE) : GN_ENOMEM;
    if (o->options.eight_bit) clear_codes(o);
    if (!status && o->has_masters) status = copy_masters(o);
    return status ? gn_fail(err, status, "optimizer: %s", gn_status_text(status)) : GN_OK;
}

gn_status gn_optimizer_open(gn_optimizer **out, gn_parameters *parameters,
                            const gn_optimizer_options *options, const gn_page_device *device,
                            gn_error *err) {
    *out = NULL;
    if (parameters->weights.shape[0] < 1) return gn_fail(err, GN_EINVAL, "nothing to train");
    gn_optimizer *o = calloc(1, sizeof *o);
    if (!o) return gn_fail(err, GN_ENOMEM, "out of memory");
    o->parameters = parameters;
    o->options = *options;
    o->has_masters = parameters->weights.dtype == GN_BF16;
    o->total = parameters->weights.shape[0];
    const gn_status status = open_state(o, device, err);
    if (status)
        gn_optimizer_close(o);
    else
        *out = o;
    return status;
}

void gn_optimizer_close(gn_optimizer *o) {
    if (!o) return;
    gn_ctx_free(o->parameters->ctx, o->sum);
    gn_pages_close(o->pages);
    free(o);
}

int64_t gn_optimizer_steps(const gn_optimizer *o) {
    return o->steps;
}

void gn_optimizer_set_steps(gn_optimizer *o, int64_t steps) {
    o->steps = steps;
}

const gn_parameters *gn_optimizer_parameters(const gn_optimizer *o) {
    return o->parameters;
}

gn_pages *gn_optimizer_pages(gn_optimizer *o) {
    return o->pages;
}

/* ---- a step ---- */

/* The squares of a group's gradients. */
static gn_status add_squares(gn_optimizer *o, size_t group) {
    gn_parameters *p = o->parameters;
    gn_status status = gn_grads_acquire(p, group);
    if (status) return status;
    const int64_t first = gn_grads_first(p, group), end = gn_grads_first(p, group + 1);
    const gn_tensor grads = gn_grads_piece(p, first, end - first);
    if (group > 0) status = gn_grads_prefetch(p, group - 1);
    if (!status) status = gn_sum_squares(p->ctx, o->sum, &grads);
    const gn_status released = gn_grads_release(p, group, false);
    return status ? status : released;
}

gn_status gn_optimizer_grad_norm(gn_optimizer *o, double *norm) {
    gn_ctx *ctx = o->parameters->ctx;
    double sum = 0;
    gn_status status = gn_ctx_zero(ctx, o->sum, sizeof *o->sum);
    for (size_t i = gn_grads_groups(o->parameters); i-- > 0 && !status;) status = add_squares(o, i);
    if (!status) status = gn_ctx_read(ctx, &sum, o->sum, sizeof sum);
    *norm = sqrt(sum);
    return status;
}

static gn_status prefetch(gn_optimizer *o, int from) {
    gn_status status = GN_OK;
    for (int i = from; i < from + PREFETCH && i < o->n_pages && !status; i++)
        status = gn_pages_prefetch(o->pages, i);
    return status;
}

gn_status gn_optimizer_prefetch(gn_optimizer *o) {
    return prefetch(o, 0);
}

/* n elements of a moment, from element `at` of its page on. */
static gn_moment moment(const gn_optimizer *o, char *page, gn_state values, gn_state absmax,
                        int64_t at, int64_t n) {
    char *first = page + o->offset[values] + state_bytes(o, values, at);
    return (gn_moment){gn_tensor_1d(first, gn_optimizer_state_dtype(o, values), n),
                       is_paged(o, absmax)
                           ? (float *)(page + o->offset[absmax] + state_bytes(o, absmax, at))
                           : NULL};
}

/* What an update says of n parameters from `first` on, whose state stands in `page`, the i-th. */
static gn_status update_piece(const gn_optimizer *o, gn_adamw_args *args, int i, char *page,
                              int64_t first, int64_t n) {
    const gn_parameters *p = o->parameters;
    const int64_t at = first - i * o->stretch;
    args->master = gn_tensor_piece(&p->weights, first, n);
    args->grad = gn_grads_piece(p, first, n);
    args->m = moment(o, page, GN_STATE_M, GN_STATE_M_ABSMAX, at, n);
    args->v = moment(o, page, GN_STATE_V, GN_STATE_V_ABSMAX, at, n);
    if (o->has_masters) {
        args->weight = args->master;
        args->master = gn_tensor_1d((float *)(page + o->offset[GN_STATE_MASTER]) + at, GN_F32, n);
    }
    return gn_adamw(p->ctx, args);
}

/* A page's parameters, those of each group by themselves. */
static gn_status update(gn_optimizer *o, gn_adamw_args *args, int i, char *page) {
    gn_parameters *p = o->parameters;
    int64_t first = i * o->stretch;
    const int64_t end = o->total - first < o->stretch ? o->total : first + o->stretch;
    gn_status status = GN_OK;
    while (first < end && !status) {
        const size_t group = gn_grads_group(p, first);
        const int64_t next = gn_grads_first(p, group + 1), to = next < end ? next : end;
        status = gn_grads_acquire(p, group);
        if (status) return status;
        status = update_piece(o, args, i, page, first, to - first);
        const gn_status released = gn_grads_release(p, group, false);
        if (!status) status = released;
        first = to;
    }
    return status;
}

gn_status gn_optimizer_step(gn_optimizer *o, double lr, float grad_scale) {
    gn_adamw_args args = {
        .lr = (float)lr,
        .beta1 = o->options.beta1,
        .beta2 = o->options.beta2,
        .eps = o->options.eps,
        .weight_decay = o->options.weight_decay,
        .grad_scale = grad_scale,
        .step = o->steps + 1,
    };
    for (int i = 0; i < o->n_pages; i++) {
        void *page;
        gn_status status = gn_pages_acquire(o->pages, i, &page);
        if (status) return status;
        status = prefetch(o, i + 1);
        if (!status) status = update(o, &args, i, page);
        const gn_status released = gn_pages_release(o->pages, i, true);
        if (status || released) return status ? status : released;
    }
    o->steps++;
    return GN_OK;
}

/* ---- state, parameter by parameter ---- */

int64_t gn_optimizer_state_count(const gn_optimizer *o, gn_state state, size_t parameter) {
    const int64_t n = o->parameters->items[parameter].numel;
    if (is_absmax(state)) return o->options.eight_bit ? (n + BLOCK - 1) / BLOCK : 0;
    return n;
}

/* Copies a parameter's state between its pages on the host and `memory`. */
static void copy_paged(gn_optimizer *o, gn_state state, size_t parameter, char *memory,
                       bool to_pages) {
    const gn_parameter *item = &o->parameters->items[parameter];
    const int64_t unit = is_absmax(state) ? BLOCK : 1; /* parameters that share an element */
    const size_t size = gn_dtype_size(gn_optimizer_state_dtype(o, state));
    for (int64_t at = item->first, end = at + item->numel; at < end;) {
        const int64_t in_page = at % o->stretch;
        const int64_t n = end - at < o->stretch - in_page ? end - at : o->stretch - in_page;
        const size_t bytes = (size_t)((n + unit - 1) / unit) * size;
        char *page = (char *)gn_pages_host(o->pages, (int)(at / o->stretch)) + o->offset[state] +
                     (size_t)(in_page / unit) * size;
        memcpy(to_pages ? page : memory, to_pages ? memory : page, bytes);
        memory += bytes;
        at += n;
    }
}

gn_status gn_optimizer_get(gn_optimizer *o, gn_state state, size_t parameter, void *dst) {
    if (state == GN_STATE_MASTER && !o->has_masters) {
        const gn_tensor w = gn_parameter_weight(o->parameters, parameter);
        return gn_ctx_read(o->parameters->ctx, dst, w.data,
                           (size_t)gn_tensor_numel(&w) * sizeof(float));
    }
    if (is_paged(o, state)) copy_paged(o, state, parameter, dst, false);
    return GN_OK;
}

static gn_status set_weight(const gn_parameters *p, size_t i, const float *values) {
    const gn_tensor w = gn_parameter_weight(p, i);
    const size_t bytes = (size_t)gn_tensor_numel(&w) * gn_dtype_size(w.dtype);
    if (w.dtype == GN_F32) return gn_ctx_write(p->ctx, w.data, values, bytes);
    void *narrow = malloc(bytes);
    if (!narrow) return GN_ENOMEM;
    gn_narrow(narrow, w.dtype, values, gn_tensor_numel(&w));
    const gn_status status = gn_ctx_write(p->ctx, w.data, narrow, bytes);
    free(narrow);
    return status;
}

gn_status gn_optimizer_set(gn_optimizer *o, gn_state state, size_t parameter, const void *src) {
    if (is_paged(o, state)) copy_paged(o, state, parameter, (char *)src, true);
    return state == GN_STATE_MASTER ? set_weight(o->parameters, parameter, src) : GN_OK;
}
