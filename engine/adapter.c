/* adapter.c - loads a PEFT folder for a base.
 *
 * Every tensor of the file must find its place in the base, and everything is copied into one
 * block, so the file can be replaced while the adapter is in use. For a device with memory of its
 * own the block is ready to be uploaded as it is: pinned, and in the dtype that its products use.
 * A block that had to leave comes back the same way; the hash says whether it is what it was. */
#include "engine/adapter.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/hash.h"
#include "engine/model.h"
#include "engine/peft.h"
#include "engine/tensor_file.h"

enum { ALIGNMENT = 64, MAX_MODULE = 64 };

/* The two halves of a pair, as they stand in the file. */
typedef struct {
    const gn_file_tensor *a, *b;
} halves;

typedef struct {
    const gn_config *config;
    const char *where, *dir;
    const gn_model *model;    /* NULL: malloc's memory, for the CPU */
    const gn_adapter *before; /* what the folder must hold; NULL: any adapter */
    gn_error *err;
    gn_peft *peft;
    gn_tensor_file *file;
    halves (*found)[GN_PROJ_COUNT];
    gn_adapter *adapter;
} loader;

/* ---- which file ---- */

static gn_status open_weights(loader *l) {
    char *path = NULL;
    gn_status status = GN_ENOENT;
    for (int legacy = 0; legacy < 2 && status == GN_ENOENT; legacy++) {
        if (asprintf(&path, "%s/adapter_model.%s", l->dir, legacy ? "bin" : "safetensors") < 0)
            return gn_fail(l->err, GN_ENOMEM, "%s: out of memory", l->dir);
        if (access(path, F_OK) == 0)
            status = legacy ? gn_torch_open(&l->file, path, l->err)
                            : gn_safetensors_read(&l->file, path, l->err);
        free(path);
    }
    if (status == GN_ENOENT)
        return gn_fail(l->err, GN_ENOENT,
                       "%s: neither adapter_model.safetensors nor adapter_model.bin is there",
                       l->dir);
    return status;
}

/* ---- which tensor goes where ---- */

typedef struct {
    int64_t layer;
    gn_proj proj;
    bool is_b;
} place;

static bool skip(const char **s, const char *prefix) {
    const size_t n = strlen(prefix);
    if (strncmp(*s, prefix, n) != 0) return false;
    *s += n;
    return true;
}

static bool skip_layer(const char **s, int64_t *layer) {
    const char *p = *s;
    for (*layer = 0; *p >= '0' && *p <= '9' && p - *s < 9; p++) *layer = *layer * 10 + (*p - '0');
    if (p == *s || (**s == '0' && p - *s > 1)) return false;
    *s = p;
    return true;
}

static bool skip_proj(const char **s, gn_proj *proj) {
    for (*proj = GN_Q; *proj < GN_PROJ_COUNT; (*proj)++) {
        if (skip(s, gn_proj_names[*proj])) return true;
    }
    return false;
}

/* base_model.model.model.layers.N.PROJECTION.lora_A.weight, or with the adapter's name before
 * "weight", as PEFT has it in memory. */
static bool parse_key(const char *key, place *p) {
    if (!skip(&key, "base_model.model.model.layers.") || !skip_layer(&key, &p->layer) ||
        !skip(&key, ".") || !skip_proj(&key, &p->proj))
        return false;
    p->is_b = skip(&key, ".lora_B");
    if (!p->is_b && !skip(&key, ".lora_A")) return false;
    if (strcmp(key, ".weight") == 0) return true;
    if (*key++ != '.') return false;
    key = strchr(key, '.');
    return key && strcmp(key, ".weight") == 0;
}

static void module_name(char name[MAX_MODULE], int64_t layer, gn_proj proj) {
    snprintf(name, MAX_MODULE, "model.layers.%lld.%s", (long long)layer, gn_proj_names[proj]);
}

static gn_status check_shape(const loader *l, const gn_file_tensor *t, const place *p,
                             const char *module) {
    const int64_t rank = gn_peft_rank(l->peft, module);
    const int64_t rows = p->is_b ? gn_proj_rows(l->config, p->proj) : rank;
    const int64_t cols = p->is_b ? rank : gn_proj_cols(l->config, p->proj);
    if (!gn_dtype_is_float(t->dtype))
        return gn_fail(l->err, GN_EUNSUPPORTED, "%s: %s is %s, expected F32, F16 or BF16", t->path,
                       t->name, gn_dtype_name(t->dtype));
    if (t->ndim != 2)
        return gn_fail(l->err, GN_EMISMATCH, "%s: %s has %d dimensions, expected (%lld, %lld)",
                       t->path, t->name, t->ndim, (long long)rows, (long long)cols);
    if (t->shape[0] == rows && t->shape[1] == cols) return GN_OK;
    const bool other_base = p->is_b ? t->shape[0] != rows : t->shape[1] != cols;
    return gn_fail(l->err, other_base ? GN_EMISMATCH : GN_EFORMAT,
                   "%s: %s is (%lld, %lld), expected (%lld, %lld)%s%s", t->path, t->name,
                   (long long)t->shape[0], (long long)t->shape[1], (long long)rows, (long long)cols,
                   other_base ? ": the adapter was trained for another base than "
                              : ": the rank is not the one in ",
                   other_base ? l->where : gn_peft_path(l->peft));
}

static gn_status place_tensor(const loader *l, const gn_file_tensor *t) {
    place p;
    if (!parse_key(t->name, &p))
        return gn_fail(l->err, GN_EMISMATCH,
                       "%s: %s is not a LoRA weight of one of the seven projections of %s", t->path,
                       t->name, l->where);
    if (p.layer >= l->config->layers)
        return gn_fail(l->err, GN_EMISMATCH,
                       "%s: %s: %s has %d layers: the adapter was trained for another base",
                       t->path, t->name, l->where, l->config->layers);
    char module[MAX_MODULE];
    module_name(module, p.layer, p.proj);
    if (!gn_peft_targets(l->peft, module))
        return gn_fail(l->err, GN_EFORMAT, "%s: %s is not among the target_modules of %s", t->path,
                       t->name, gn_peft_path(l->peft));
    halves *h = &l->found[p.layer][p.proj];
    const gn_file_tensor **half = p.is_b ? &h->b : &h->a;
    if (*half)
        return gn_fail(l->err, GN_EFORMAT, "%s: %s and %s are the same weight", t->path,
                       (*half)->name, t->name);
    *half = t;
    return check_shape(l, t, &p, module);
}

static gn_status place_tensors(loader *l) {
    const size_t n = gn_tensor_file_count(l->file);
    if (n == 0) return gn_fail(l->err, GN_EFORMAT, "%s: the adapter holds no weights", l->dir);
    for (size_t i = 0; i < n; i++) {
        const gn_status status = place_tensor(l, gn_tensor_file_at(l->file, i));
        if (status) return status;
    }
    for (int i = 0; i < l->config->layers * GN_PROJ_COUNT; i++) {
        const halves *h = &l->found[i / GN_PROJ_COUNT][i % GN_PROJ_COUNT];
        if (!h->a == !h->b) continue;
        const gn_file_tensor *alone = h->a ? h->a : h->b;
        return gn_fail(l->err, GN_EFORMAT, "%s: %s is there without its lora_%c", alone->path,
                       alone->name, h->a ? 'B' : 'A');
    }
    return GN_OK;
}

/* ---- copying ---- */

/* A and B of a pair share a dtype: the device's, or their own, or F32 when it is F16 or differs. */
static gn_dtype pair_dtype(const loader *l, const halves *h) {
    if (l->model && !gn_ctx_is_host(l->model->ctx)) return gn_ctx_compute(l->model->ctx);
    return h->a->dtype == h->b->dtype && h->a->dtype == GN_BF16 ? GN_BF16 : GN_F32;
}

static size_t aligned_bytes(const gn_file_tensor *t, gn_dtype dtype) {
    const size_t bytes = (size_t)t->shape[0] * (size_t)t->shape[1] * gn_dtype_size(dtype);
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static gn_status allocate(loader *l) {
    size_t total = 0; /* no overflow: ranks are bounded by 2^16, the base's sizes by 2^20 */
    for (int i = 0; i < l->config->layers * GN_PROJ_COUNT; i++) {
        const halves *h = &l->found[i / GN_PROJ_COUNT][i % GN_PROJ_COUNT];
        if (!h->a) continue;
        total += aligned_bytes(h->a, pair_dtype(l, h)) + aligned_bytes(h->b, pair_dtype(l, h));
    }
    gn_adapter_host *host = l->model ? l->model->adapters : NULL;
    if (host && (int64_t)total > gn_adapter_host_budget(host))
        return gn_fail(l->err, GN_ETOOBIG,
                       "%s: the adapter takes %.1f MiB, and the host's memory for adapters is "
                       "%.1f MiB",
                       l->dir, (double)total / 0x1p20,
                       (double)gn_adapter_host_budget(host) / 0x1p20);
    l->adapter->host = host;
    l->adapter->memory = host ? gn_adapter_host_take(host, total) : aligned_alloc(ALIGNMENT, total);
    if (!l->adapter->memory)
        return gn_fail(l->err, GN_ENOMEM, "%s: no memory for %zu bytes of weights", l->dir, total);
    l->adapter->bytes = total;
    return GN_OK;
}

static gn_status convert(gn_tensor *out, const gn_file_tensor *t) {
    const int64_t n = gn_tensor_numel(out);
    if (out->dtype == t->dtype) {
        memcpy(out->data, t->data, t->bytes);
    } else if (out->dtype == GN_F32) {
        gn_widen(out->data, t->data, t->dtype, n);
    } else {
        float *values = malloc((size_t)n * sizeof *values);
        if (!values) return GN_ENOMEM;
        gn_widen(values, t->data, t->dtype, n);
        gn_narrow(out->data, out->dtype, values, n);
        free(values);
    }
    return GN_OK;
}

static gn_status copy(const loader *l, gn_tensor *out, const gn_file_tensor *t, gn_dtype dtype,
                      char **free_memory) {
    *out = gn_tensor_2d(*free_memory, dtype, t->shape[0], t->shape[1]);
    *free_memory += aligned_bytes(t, dtype);
    const gn_status status = convert(out, t);
    if (status) return gn_fail(l->err, status, "%s: out of memory for %s", t->path, t->name);
    if (gn_find_not_finite(out->data, out->dtype, gn_tensor_numel(out)) >= 0)
        return gn_fail(l->err, GN_EFORMAT, "%s: %s holds values that are not finite", t->path,
                       t->name);
    return GN_OK;
}

static void add_to_hash(gn_hash *hash, int layer, int proj, const gn_lora_pair *pair) {
    uint32_t scale;
    memcpy(&scale, &pair->scale, sizeof scale);
    const uint64_t head[] = {(uint64_t)layer, (uint64_t)proj, pair->a.dtype, (uint64_t)pair->rank,
                             scale};
    const size_t size = gn_dtype_size(pair->a.dtype);
    gn_hash_add(hash, head, sizeof head);
    gn_hash_add(hash, pair->a.data, (size_t)gn_tensor_numel(&pair->a) * size);
    gn_hash_add(hash, pair->b.data, (size_t)gn_tensor_numel(&pair->b) * size);
}

static gn_status copy_pairs(loader *l) {
    gn_adapter *adapter = l->adapter;
    char *free_memory = adapter->memory;
    gn_hash hash = GN_HASH_INIT, ranks = GN_HASH_INIT;
    for (int i = 0; i < l->config->layers * GN_PROJ_COUNT; i++) {
        const int layer = i / GN_PROJ_COUNT, proj = i % GN_PROJ_COUNT;
        const halves *h = &l->found[layer][proj];
        if (!h->a) continue;
        char module[MAX_MODULE];
        module_name(module, layer, (gn_proj)proj);
        gn_lora_pair *pair = &adapter->pairs[layer][proj];
        pair->rank = gn_peft_rank(l->peft, module);
        pair->scale = gn_peft_scale(l->peft, module);
        gn_status status = copy(l, &pair->a, h->a, pair_dtype(l, h), &free_memory);
        if (status == GN_OK) status = copy(l, &pair->b, h->b, pair_dtype(l, h), &free_memory);
        if (status) return status;
        if (pair->rank > adapter->max_rank) adapter->max_rank = pair->rank;
        add_to_hash(&hash, layer, proj, pair);
        const uint64_t rank[] = {(uint64_t)i, (uint64_t)pair->rank};
        gn_hash_add(&ranks, rank, sizeof rank);
    }
    adapter->ranks_hash = ranks.h[0];
    memcpy(adapter->hash, hash.h, sizeof adapter->hash);
    return GN_OK;
}

static gn_status check_same(const loader *l) {
    if (!l->before || memcmp(l->before->hash, l->adapter->hash, sizeof l->adapter->hash) == 0)
        return GN_OK;
    return gn_fail(l->err, GN_EMISMATCH,
                   "%s, or %s, is not what it was when the adapter was loaded; load it again",
                   gn_tensor_file_at(l->file, 0)->path, gn_peft_path(l->peft));
}

/* ---- open and close ---- */

static gn_status load(loader *l) {
    const size_t layers = (size_t)l->config->layers;
    l->adapter = calloc(1, sizeof *l->adapter);
    l->found = calloc(layers, sizeof *l->found);
    if (l->adapter) l->adapter->pairs = calloc(layers, sizeof *l->adapter->pairs);
    if (l->adapter) l->adapter->dir = strdup(l->dir);
    if (!l->found || !l->adapter || !l->adapter->pairs || !l->adapter->dir)
        return gn_fail(l->err, GN_ENOMEM, "%s: out of memory", l->dir);
    atomic_init(&l->adapter->refs, 1);
    l->adapter->layers = l->config->layers;
    gn_status status = gn_peft_open(&l->peft, l->dir, l->err);
    if (status == GN_OK) status = open_weights(l);
    if (status == GN_OK) status = place_tensors(l);
    if (status == GN_OK) status = allocate(l);
    if (status == GN_OK) status = copy_pairs(l);
    if (status == GN_OK) status = check_same(l);
    return status;
}

static gn_status run(loader *l, gn_adapter **out) {
    *out = NULL;
    const gn_status status = load(l);
    free(l->found);
    gn_tensor_file_close(l->file);
    gn_peft_close(l->peft);
    if (status)
        gn_adapter_close(l->adapter);
    else
        *out = l->adapter;
    return status;
}

gn_status gn_adapter_load(gn_adapter **out, const gn_config *config, const char *where,
                          const char *dir, gn_error *err) {
    loader l = {.config = config, .where = where, .dir = dir, .err = err};
    return run(&l, out);
}

gn_status gn_adapter_open(gn_adapter **out, const gn_model *model, const char *dir, gn_error *err) {
    loader l = {
        .config = &model->config, .where = model->dir, .dir = dir, .model = model, .err = err};
    const gn_status status = run(&l, out);
    if (status == GN_OK) gn_adapter_host_add(model->adapters, *out);
    return status;
}

gn_status gn_adapter_read_again(gn_adapter **out, const gn_adapter *adapter, const gn_model *model,
                                gn_error *err) {
    loader l = {.config = &model->config,
                .where = model->dir,
                .dir = adapter->dir,
                .model = model,
                .before = adapter,
                .err = err};
    return run(&l, out);
}

gn_adapter *gn_adapter_ref(gn_adapter *adapter) {
    atomic_fetch_add_explicit(&adapter->refs, 1, memory_order_relaxed);
    return adapter;
}

void gn_adapter_close(gn_adapter *adapter) {
    if (!adapter || atomic_fetch_sub_explicit(&adapter->refs, 1, memory_order_acq_rel) > 1) return;
    if (adapter->host) gn_adapter_host_remove(adapter->host, adapter);
    if (adapter->host && adapter->memory)
        gn_adapter_host_give(adapter->host, adapter->memory, adapter->bytes);
    if (!adapter->host) free(adapter->memory);
    free(adapter->pairs);
    free(adapter->dir);
    free(adapter);
}

size_t gn_adapter_bytes(const gn_adapter *adapter) {
    return adapter->bytes;
}
int gn_adapter_max_rank(const gn_adapter *adapter) {
    return adapter->max_rank;
}
