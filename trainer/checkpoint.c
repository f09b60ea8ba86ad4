/* checkpoint.c - saving, finding and loading checkpoints. manifest.c knows which are whole. */
#include "trainer/checkpoint.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "engine/json_file.h"
#include "engine/save_folder.h"
#include "engine/tensor_file.h"
#include "trainer/manifest.h"

#define PREFIX  "checkpoint-"
#define PARTIAL ".partial"

static const char optimizer_file[] = "optimizer.safetensors", state_file[] = "state.json";

static gn_status no_memory(const char *where, gn_error *err) {
    return gn_fail(err, GN_ENOMEM, "%s: out of memory", where);
}

void gn_train_state_close(gn_train_state *state) {
    cJSON_Delete(state->options);
    state->options = NULL;
}

/* ---- state.json ---- */

#define MAX_EXACT 9007199254740992.0 /* 2^53: JSON's numbers are doubles */

static bool add_schedule(cJSON *root, const gn_lr_schedule *s) {
    cJSON *object = cJSON_AddObjectToObject(root, "schedule");
    return object && cJSON_AddStringToObject(object, "kind", gn_lr_name(s->kind)) &&
           cJSON_AddNumberToObject(object, "peak", s->peak) &&
           cJSON_AddNumberToObject(object, "warmup", (double)s->warmup) &&
           cJSON_AddNumberToObject(object, "total", (double)s->total);
}

static char *print_state(const gn_train_state *state) {
    char seed[32];
    cJSON *root = cJSON_CreateObject();
    bool ok = root != NULL;
#define X(name) ok = ok && cJSON_AddNumberToObject(root, #name, (double)state->name);
    GN_TRAIN_COUNTERS(X)
#undef X
    snprintf(seed, sizeof seed, "%llu", (unsigned long long)state->seed);
    ok = ok && cJSON_AddStringToObject(root, "seed", seed);
    if (ok && isfinite(state->best_loss))
        ok = cJSON_AddNumberToObject(root, "best_loss", state->best_loss) != NULL;
    ok = ok && add_schedule(root, &state->schedule);
    cJSON *options = !ok              ? NULL
                     : state->options ? cJSON_Duplicate(state->options, true)
                                      : cJSON_CreateObject();
    ok = options && cJSON_AddItemToObject(root, "options", options);
    char *text = ok ? cJSON_Print(root) : NULL;
    cJSON_Delete(root);
    return text;
}

static gn_status write_state(const char *path, const gn_train_state *state, gn_error *err) {
    char *text = print_state(state);
    if (!text) return no_memory(path, err);
    const gn_status status = gn_text_write(path, text, err);
    cJSON_free(text);
    return status;
}

static bool read_count(const cJSON *object, const char *name, int64_t *value) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0) || item->valuedouble > MAX_EXACT ||
        item->valuedouble != floor(item->valuedouble))
        return false;
    *value = (int64_t)item->valuedouble;
    return true;
}

static bool read_schedule(const cJSON *object, gn_lr_schedule *s) {
    const cJSON *kind = cJSON_GetObjectItemCaseSensitive(object, "kind");
    const cJSON *peak = cJSON_GetObjectItemCaseSensitive(object, "peak");
    if (!cJSON_IsString(kind) || gn_lr_parse(&s->kind, kind->valuestring) != GN_OK ||
        !cJSON_IsNumber(peak))
        return false;
    s->peak = peak->valuedouble;
    return read_count(object, "warmup", &s->warmup) && read_count(object, "total", &s->total);
}

static bool read_seed(const cJSON *root, uint64_t *seed) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(root, "seed");
    char *end;
    if (!cJSON_IsString(item)) return false;
    errno = 0;
    *seed = strtoull(item->valuestring, &end, 10);
    return end != item->valuestring && *end == 0 && errno == 0;
}

static gn_status read_state(const char *path, gn_train_state *state, gn_error *err) {
    cJSON *root;
    const gn_status status = gn_json_read(&root, path, err);
    if (status) return status;
    const char *missing = NULL;
#define X(name)                                                                                    \
    if (!read_count(root, #name, &state->name)) missing = #name;
    GN_TRAIN_COUNTERS(X)
#undef X
    if (!read_seed(root, &state->seed)) missing = "seed";
    if (!read_schedule(cJSON_GetObjectItemCaseSensitive(root, "schedule"), &state->schedule))
        missing = "schedule";
    const cJSON *loss = cJSON_GetObjectItemCaseSensitive(root, "best_loss");
    state->best_loss = cJSON_IsNumber(loss) ? loss->valuedouble : INFINITY;
    state->options = cJSON_DetachItemFromObjectCaseSensitive(root, "options");
    if (!cJSON_IsObject(state->options)) missing = "options";
    cJSON_Delete(root);
    if (!missing) return GN_OK;
    gn_train_state_close(state);
    return gn_fail(err, GN_EFORMAT, "%s: \"%s\" is missing or makes no sense", path, missing);
}

gn_status gn_train_options_check(const cJSON *saved, const cJSON *now, gn_error *err) {
    const cJSON *const sets[] = {saved, now};
    for (int i = 0; i < 2; i++) {
        const cJSON *option;
        cJSON_ArrayForEach(option, sets[i]) {
            const cJSON *was = cJSON_GetObjectItemCaseSensitive(saved, option->string);
            const cJSON *is = cJSON_GetObjectItemCaseSensitive(now, option->string);
            if (was && is && cJSON_Compare(was, is, true)) continue;
            char *before = was ? cJSON_PrintUnformatted(was) : NULL;
            char *after = is ? cJSON_PrintUnformatted(is) : NULL;
            gn_fail(err, GN_EMISMATCH, "%s is %.100s, but was %.100s when the checkpoint was saved",
                    option->string, after ? after : "not set", before ? before : "not set");
            cJSON_free(before);
            cJSON_free(after);
            return GN_EMISMATCH;
        }
    }
    return GN_OK;
}

/* ---- optimizer.safetensors ---- */

/* The tensor that holds a parameter's state; false: it has none. The name is malloc'ed. */
static bool entry_of(const gn_optimizer *o, gn_state state, size_t i, gn_file_tensor *t,
                     bool *no_memory) {
    const gn_parameter *item = &gn_optimizer_parameters(o)->items[i];
    const int64_t count = gn_optimizer_state_count(o, state, i);
    if (count == 0) return false;
    char *name;
    if (asprintf(&name, "%s.%s", item->name, gn_state_name(state)) < 0) {
        *no_memory = true;
        return false;
    }
    *t = (gn_file_tensor){.name = name, .dtype = gn_optimizer_state_dtype(o, state), .ndim = 1};
    t->shape[0] = count;
    t->bytes = (size_t)count * gn_dtype_size(t->dtype);
    return true;
}

/* All state, in the order it is written. */
typedef struct entries {
    gn_file_tensor *tensors;
    gn_state *states;
    size_t *parameters;
    size_t n;
} entries;

static void free_entries(entries *e) {
    for (size_t i = 0; i < e->n; i++) free((char *)e->tensors[i].name);
    free(e->tensors);
    free(e->states);
    free(e->parameters);
}

static gn_status list_entries(entries *e, const gn_optimizer *o, gn_error *err) {
    const size_t n = gn_optimizer_parameters(o)->n, most = n * GN_STATE_COUNT + 1;
    *e = (entries){calloc(most, sizeof *e->tensors), calloc(most, sizeof *e->states),
                   calloc(most, sizeof *e->parameters), 0};
    bool failed = !e->tensors || !e->states || !e->parameters;
    for (int s = 0; s < GN_STATE_COUNT && !failed; s++) {
        for (size_t i = 0; i < n && !failed; i++) {
            if (!entry_of(o, s, i, &e->tensors[e->n], &failed)) continue;
            e->states[e->n] = s;
            e->parameters[e->n++] = i;
        }
    }
    if (!failed) return GN_OK;
    free_entries(e);
    return no_memory(optimizer_file, err);
}

static gn_status write_entry(gn_safetensors_writer *w, gn_optimizer *o, const entries *e, size_t i,
                             gn_error *err) {
    void *data = malloc(e->tensors[i].bytes);
    if (!data) return no_memory(e->tensors[i].name, err);
    gn_status status = gn_optimizer_get(o, e->states[i], e->parameters[i], data);
    if (status)
        gn_fail(err, status, "%s: %s", e->tensors[i].name, gn_status_text(status));
    else
        status = gn_safetensors_write(w, data, e->tensors[i].bytes, err);
    free(data);
    return status;
}

static gn_status write_optimizer(const char *path, gn_optimizer *o, gn_error *err) {
    entries e;
    gn_safetensors_writer *w = NULL;
    gn_status status = gn_pages_flush(gn_optimizer_pages(o));
    if (status) return gn_fail(err, status, "optimizer state: %s", gn_status_text(status));
    status = list_entries(&e, o, err);
    if (status) return status;
    status = gn_safetensors_create(&w, path, e.tensors, e.n, NULL, err);
    for (size_t i = 0; i < e.n && !status; i++) status = write_entry(w, o, &e, i, err);
    free_entries(&e);
    if (!status) return gn_safetensors_commit(w, err);
    gn_safetensors_abort(w);
    return status;
}

static gn_status set_entry(const gn_tensor_file *file, const char *path, gn_optimizer *o,
                           const entries *e, size_t i, gn_error *err) {
    const gn_file_tensor *want = &e->tensors[i];
    const gn_file_tensor *t = gn_tensor_file_find(file, want->name);
    if (!t || t->dtype != want->dtype || t->ndim != 1 || t->shape[0] != want->shape[0])
        return gn_fail(err, GN_EMISMATCH,
                       "%s: this run needs %s as %lld numbers of %s, and the checkpoint %s", path,
                       want->name, (long long)want->shape[0], gn_dtype_name(want->dtype),
                       t ? "has others" : "has none");
    const gn_status status = gn_optimizer_set(o, e->states[i], e->parameters[i], t->data);
    return status ? gn_fail(err, status, "%s: %s", want->name, gn_status_text(status)) : GN_OK;
}

static gn_status read_optimizer(const char *path, gn_optimizer *o, gn_error *err) {
    entries e;
    gn_tensor_file *file;
    gn_status status = gn_safetensors_open(&file, path, err);
    if (status) return status;
    status = list_entries(&e, o, err);
    if (!status) {
        for (size_t i = 0; i < e.n && !status; i++) status = set_entry(file, path, o, &e, i, err);
        if (!status && gn_tensor_file_count(file) != e.n)
            status = gn_fail(err, GN_EMISMATCH, "%s: %zu tensors; this run has %zu", path,
                             gn_tensor_file_count(file), e.n);
        free_entries(&e);
    }
    gn_tensor_file_close(file);
    return status;
}

/* ---- which checkpoints there are ---- */

typedef struct steps {
    int64_t *items; /* ascending */
    size_t n;
} steps;

static int by_step(const void *a, const void *b) {
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* The step of a folder's name as gn_checkpoint_save gives it; `suffix` follows. */
static bool parse_name(const char *name, const char *suffix, int64_t *step) {
    char again[64];
    if (strncmp(name, PREFIX, strlen(PREFIX)) != 0) return false;
    *step = strtoll(name + strlen(PREFIX), NULL, 10);
    snprintf(again, sizeof again, PREFIX "%lld%s", (long long)*step, suffix);
    return *step >= 0 && strcmp(name, again) == 0;
}

static gn_status list_steps(steps *list, const char *output, gn_error *err) {
    *list = (steps){0};
    DIR *d = opendir(output);
    if (!d)
        return gn_fail(err, errno == ENOENT ? GN_ENOENT : GN_EIO, "%s: %s", output,
                       strerror(errno));
    gn_status status = GN_OK;
    for (struct dirent *entry; !status && (entry = readdir(d));) {
        int64_t step;
        if (!parse_name(entry->d_name, "", &step)) continue;
        int64_t *grown = realloc(list->items, (list->n + 1) * sizeof *grown);
        if (!grown) {
            status = no_memory(output, err);
            break;
        }
        list->items = grown;
        list->items[list->n++] = step;
    }
    closedir(d);
    if (list->n) qsort(list->items, list->n, sizeof *list->items, by_step);
    return status;
}

static char *path_of(const char *output, int64_t step) {
    char *path;
    return asprintf(&path, "%s/" PREFIX "%lld", output, (long long)step) < 0 ? NULL : path;
}

/* Removal is no part of what a save promises: what cannot be removed stays. */
static void remove_old(const char *output, int64_t step, int limit) {
    steps list;
    if (limit < 1 || list_steps(&list, output, NULL) != GN_OK) return;
    size_t upto = 0; /* checkpoints up to this step */
    while (upto < list.n && list.items[upto] <= step) upto++;
    for (size_t i = 0; i + (size_t)limit < upto; i++) {
        char *path = path_of(output, list.items[i]);
        if (path) gn_folder_remove(path);
        free(path);
    }
    free(list.items);
}

static void remove_leftovers(const char *output) {
    DIR *d = opendir(output);
    for (struct dirent *entry; d && (entry = readdir(d));) {
        int64_t step;
        if (!parse_name(entry->d_name, PARTIAL, &step)) continue;
        char *path = gn_path_join(output, entry->d_name);
        if (path) gn_folder_remove(path);
        free(path);
    }
    if (d) closedir(d);
}

/* ---- save ---- */

static gn_status fill(const char *dir, const gn_adapter_config *adapter,
                      const gn_train_state *state, gn_optimizer *o, gn_error *err) {
    char *optimizer_path = gn_path_join(dir, optimizer_file),
         *state_path = gn_path_join(dir, state_file);
    gn_status status = optimizer_path && state_path ? GN_OK : no_memory(dir, err);
    if (!status && adapter) status = gn_adapter_write(dir, adapter, o, err);
    if (!status) status = write_optimizer(optimizer_path, o, err);
    if (!status) status = write_state(state_path, state, err);
    if (!status) status = gn_manifest_write(dir, err);
    free(optimizer_path);
    free(state_path);
    return status;
}

gn_status gn_checkpoint_save(const gn_checkpoint_options *options, const gn_train_state *state,
                             gn_optimizer *o, gn_error *err) {
    gn_save_folder folder;
    if (mkdir(options->output, 0777) != 0 && errno != EEXIST)
        return gn_fail(err, GN_EIO, "%s: %s", options->output, strerror(errno));
    char *path = path_of(options->output, state->step);
    if (!path) return no_memory(options->output, err);
    remove_leftovers(options->output);
    gn_status status = gn_save_folder_open(&folder, path, err);
    free(path);
    if (status) return status;
    status = fill(folder.temporary, options->adapter, state, o, err);
    if (status)
        gn_save_folder_abort(&folder);
    else
        status = gn_save_folder_commit(&folder, err);
    if (!status) remove_old(options->output, state->step, options->limit);
    return status;
}

/* ---- find and load ---- */

/* GN_OK with *whole false: it is broken, and `warn` was told. */
static gn_status check(const char *path, bool *whole, gn_checkpoint_warning *warn, void *user,
                       gn_error *err) {
    static const char *const needed[] = {optimizer_file, state_file, NULL};
    gn_error broken = {0};
    const gn_status status = gn_manifest_check(path, needed, &broken);
    *whole = status == GN_OK;
    if (status == GN_ENOMEM) return no_memory(path, err);
    if (status && warn) warn(user, broken.message);
    return GN_OK;
}

static gn_status find_whole(char **path, const steps *list, const char *output,
                            gn_checkpoint_warning *warn, void *user, gn_error *err) {
    for (size_t i = list->n; i-- > 0;) {
        bool whole = false;
        *path = path_of(output, list->items[i]);
        const gn_status status =
            *path ? check(*path, &whole, warn, user, err) : no_memory(output, err);
        if (whole) return GN_OK;
        free(*path);
        *path = NULL;
        if (status) return status;
    }
    return list->n ? gn_fail(err, GN_EFORMAT, "%s: every checkpoint is broken", output)
                   : gn_fail(err, GN_ENOENT, "%s: there is no checkpoint", output);
}

gn_status gn_checkpoint_find(char **path, const char *output, gn_checkpoint_warning *warn,
                             void *user, gn_error *err) {
    steps list;
    *path = NULL;
    gn_status status = list_steps(&list, output, err);
    if (!status) status = find_whole(path, &list, output, warn, user, err);
    free(list.items);
    return status;
}

gn_status gn_checkpoint_load(const char *path, gn_train_state *state, gn_optimizer *o,
                             gn_error *err) {
    char *optimizer_path = gn_path_join(path, optimizer_file),
         *state_path = gn_path_join(path, state_file);
    *state = (gn_train_state){0};
    gn_status status = optimizer_path && state_path ? GN_OK : no_memory(path, err);
    if (!status) status = read_state(state_path, state, err);
    if (!status) status = read_optimizer(optimizer_path, o, err);
    if (status)
        gn_train_state_close(state);
    else
        gn_optimizer_set_steps(o, state->step);
    free(optimizer_path);
    free(state_path);
    return status;
}
