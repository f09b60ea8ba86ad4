/* eval_logits.c - a model's logits for given tokens: to write down, or to compare with others'. */
#include "trainer/trainer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "engine/tensor_file.h"

typedef struct logits_options {
    gn_model_choice model;
    const char *ids, *out, *against;
    bool json;
} logits_options;

static const char usage[] = "usage: guanaco-trainer eval logits --model DIR --ids FILE|LIST [--out "
                            "FILE] [--against FILE]\n";

static const gn_option table[] = {
    GN_MODEL_OPTIONS(logits_options, "float32"),
    GN_ADAPTER_OPTION(logits_options),
    GN_MEMORY_OPTION(logits_options),
    GN_KV_OPTION(logits_options),
    {GN_OPT_STRING, "ids", offsetof(logits_options, ids), .value = "FILE|LIST",
     .help = "token ids: 1,15,7 or a file of such numbers, or FILE.safetensors[:TENSOR] (default "
             "tensor: input_ids)"},
    {GN_OPT_STRING, "out", offsetof(logits_options, out), .value = "FILE",
     .help = "safetensors file to write: tensor logits (1, tokens, vocabulary)"},
    {GN_OPT_STRING, "against", offsetof(logits_options, against), .value = "FILE",
     .help = "FILE.safetensors[:TENSOR] (default tensor: logits) to compare with: prints the "
             "relative L2 difference"},
    {GN_OPT_FLAG, "json", offsetof(logits_options, json), .help = "one JSON object a line"},
    GN_OPTION_END};

typedef struct id_list {
    int32_t *ids;
    int32_t n;
} id_list;

/* ---- tensors named on the command line ---- */

/* Finds FILE[:TENSOR]; the file must be closed by the caller. */
static gn_status find_tensor(const char *name, const char *default_tensor, gn_tensor_file **file,
                             const gn_file_tensor **tensor, gn_error *err) {
    char path[4096];
    const char *colon = strrchr(name, ':');
    const char *wanted = colon ? colon + 1 : default_tensor;
    const size_t length = colon ? (size_t)(colon - name) : strlen(name);
    if (length >= sizeof path) return gn_fail(err, GN_EINVAL, "%.100s...: path too long", name);
    memcpy(path, name, length);
    path[length] = '\0';
    const gn_status status = gn_safetensors_open(file, path, err);
    if (status) return status;
    *tensor = gn_tensor_file_find(*file, wanted);
    if (*tensor) return GN_OK;
    gn_tensor_file_close(*file);
    *file = NULL;
    return gn_fail(err, GN_ENOENT, "%s: no tensor named '%s'", path, wanted);
}

static int64_t count_of(const gn_file_tensor *t) {
    return (int64_t)(t->bytes / gn_dtype_size(t->dtype));
}

/* ---- ids ---- */

static gn_status ids_of_tensor(const char *name, id_list *list, gn_error *err) {
    gn_tensor_file *file;
    const gn_file_tensor *t;
    gn_status status = find_tensor(name, "input_ids", &file, &t, err);
    if (status) return status;
    const int64_t n = count_of(t);
    if (t->dtype != GN_I64 && t->dtype != GN_I32)
        status = gn_fail(err, GN_EINVAL, "%s: token ids are I64 or I32, not %s", name,
                         gn_dtype_name(t->dtype));
    else if (n > INT32_MAX || !(list->ids = malloc(((size_t)n + 1) * sizeof *list->ids)))
        status = gn_fail(err, GN_ENOMEM, "%s: no memory for %lld ids", name, (long long)n);
    for (int64_t i = 0; !status && i < n; i++) {
        int64_t wide = 0;
        int32_t narrow;
        memcpy(&narrow, (const char *)t->data + 4 * (t->dtype == GN_I64 ? 2 * i : i), 4);
        if (t->dtype == GN_I64) memcpy(&wide, (const char *)t->data + 8 * i, 8);
        if (t->dtype == GN_I64 && wide != narrow)
            status = gn_fail(err, GN_EINVAL, "%s: %lld is no token id", name, (long long)wide);
        list->ids[list->n++] = narrow;
    }
    gn_tensor_file_close(file);
    return status;
}

/* Numbers with commas, spaces, brackets or newlines between them. */
static gn_status ids_of_text(const char *text, const char *name, id_list *list, gn_error *err) {
    static const char between[] = ", \t\r\n[]";
    list->ids = malloc((strlen(text) + 1) * sizeof *list->ids); /* an id has a digit at least */
    if (!list->ids) return gn_fail(err, GN_ENOMEM, "out of memory");
    for (text += strspn(text, between); *text; text += strspn(text, between)) {
        char *end;
        const long id = strtol(text, &end, 10);
        if (end == text || (*end && !strchr(between, *end)) || id < 0 || id > INT32_MAX)
            return gn_fail(err, GN_EINVAL, "%s: '%.20s' is no token id", name, text);
        list->ids[list->n++] = (int32_t)id;
        text = end;
    }
    return GN_OK;
}

static gn_status read_ids(const char *source, id_list *list, gn_error *err) {
    struct stat info;
    if (strstr(source, ".safetensors")) return ids_of_tensor(source, list, err);
    if (stat(source, &info) != 0) return ids_of_text(source, "--ids", list, err);
    char *text;
    size_t size;
    gn_status status = gn_read_text(source, &text, &size, err);
    if (status) return status;
    status = ids_of_text(text, source, list, err);
    free(text);
    return status;
}

/* ---- logits ---- */

typedef struct logits {
    float *values;
    int64_t rows, vocab;
} logits;

static void keep_row(void *user, int32_t position, const float *row) {
    logits *l = user;
    memcpy(l->values + position * l->vocab, row, (size_t)l->vocab * sizeof *row);
}

static gn_status compute(const logits_options *o, const id_list *list, logits *l, gn_error *err) {
    gn_model *model;
    gn_adapter *adapter;
    gn_scorer *scorer = NULL;
    gn_status status = gn_model_choice_open(&o->model, &model, &adapter, err);
    if (status) return status;
    const gn_adapter_use use = {adapter, 1};
    l->rows = list->n;
    l->vocab = gn_model_describe(model).vocab;
    for (int32_t i = 0; !status && i < list->n; i++)
        if (list->ids[i] >= l->vocab)
            status = gn_fail(err, GN_EINVAL, "id %d is outside the vocabulary of %lld",
                             list->ids[i], (long long)l->vocab);
    l->values = calloc((size_t)l->rows, (size_t)l->vocab * sizeof *l->values);
    if (!status && !l->values) status = gn_fail(err, GN_ENOMEM, "no memory for the logits");
    if (!status) status = gn_model_choice_score(&o->model, &scorer, model, adapter, list->n, err);
    if (!status) {
        status = gn_scorer_run(scorer, list->ids, list->n, 0, &use, adapter ? 1 : 0, keep_row, l);
        if (status) gn_fail(err, status, "cannot run the model: %s", gn_status_text(status));
    }
    gn_scorer_close(scorer);
    gn_adapter_close(adapter);
    gn_model_close(model);
    return status;
}

static gn_status write_logits(const char *path, const logits *l, gn_error *err) {
    const gn_file_tensor entry = {.name = "logits",
                                  .dtype = GN_F32,
                                  .ndim = 3,
                                  .shape = {1, l->rows, l->vocab},
                                  .bytes = (size_t)(l->rows * l->vocab) * sizeof(float)};
    gn_safetensors_writer *writer;
    gn_status status = gn_safetensors_create(&writer, path, &entry, 1, NULL, err);
    if (status) return status;
    status = gn_safetensors_write(writer, l->values, entry.bytes, err);
    if (!status) return gn_safetensors_commit(writer, err);
    gn_safetensors_abort(writer);
    return status;
}

/* |ours - theirs| / |theirs| over all values. */
static gn_status compare(const char *name, const logits *l, double *difference, gn_error *err) {
    gn_tensor_file *file;
    const gn_file_tensor *t;
    gn_status status = find_tensor(name, "logits", &file, &t, err);
    if (status) return status;
    float *theirs = malloc((size_t)l->vocab * sizeof *theirs);
    if (!theirs)
        status = gn_fail(err, GN_ENOMEM, "out of memory");
    else if (!gn_dtype_is_float(t->dtype) || count_of(t) != l->rows * l->vocab)
        status = gn_fail(err, GN_EMISMATCH, "%s: expected %lld x %lld floats, found %lld of %s",
                         name, (long long)l->rows, (long long)l->vocab, (long long)count_of(t),
                         gn_dtype_name(t->dtype));
    double error = 0, norm = 0;
    for (int64_t row = 0; !status && row < l->rows; row++) {
        const size_t row_bytes = (size_t)l->vocab * gn_dtype_size(t->dtype);
        gn_widen(theirs, (const char *)t->data + (size_t)row * row_bytes, t->dtype, l->vocab);
        for (int64_t i = 0; i < l->vocab; i++) {
            const double d = (double)l->values[row * l->vocab + i] - (double)theirs[i];
            error += d * d;
            norm += (double)theirs[i] * (double)theirs[i];
        }
    }
    *difference = sqrt(error / norm);
    free(theirs);
    gn_tensor_file_close(file);
    return status;
}

static gn_status report(const logits_options *o, const logits *l, double difference,
                        gn_error *err) {
    if (!o->json) {
        printf("%lld tokens", (long long)l->rows);
        if (o->against) printf(", relative L2 difference %.3e", difference);
        if (o->out) printf(", logits in %s", o->out);
        putchar('\n');
        return GN_OK;
    }
    cJSON *line = cJSON_CreateObject();
    cJSON_AddStringToObject(line, "eval", "logits");
    cJSON_AddStringToObject(line, "model", o->model.dir);
    cJSON_AddNumberToObject(line, "tokens", (double)l->rows);
    if (o->against) cJSON_AddNumberToObject(line, "relative_l2", difference);
    if (o->out) cJSON_AddStringToObject(line, "out", o->out);
    return gn_print_json_take(line, err);
}

static gn_status run(const logits_options *o, gn_error *err) {
    if (!o->ids) return gn_fail(err, GN_EINVAL, "--ids FILE|LIST is missing");
    if (!o->out && !o->against)
        return gn_fail(err, GN_EINVAL, "nothing to do: give --out FILE, --against FILE, or both");
    id_list list = {0};
    logits l = {0};
    double difference = 0;
    gn_status status = read_ids(o->ids, &list, err);
    if (!status && list.n == 0) status = gn_fail(err, GN_EINVAL, "--ids: no token id in it");
    if (!status) status = compute(o, &list, &l, err);
    if (!status && o->out) status = write_logits(o->out, &l, err);
    if (!status && o->against) status = compare(o->against, &l, &difference, err);
    if (!status) status = report(o, &l, difference, err);
    free(l.values);
    free(list.ids);
    return status;
}

int gn_eval_logits_command(int n, char *const *args) {
    logits_options o;
    int exit_status;
    gn_error err = {0};
    if (!gn_command_options(table, &o, usage, n, args, &exit_status)) return exit_status;
    return run(&o, &err) ? gn_command_failed(&err) : 0;
}
