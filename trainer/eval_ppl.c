/* eval_ppl.c - perplexity of a model on a text.
 *
 * A document counts as BOS, its tokens and EOS, cut at the model's context; every token after
 * BOS is predicted, EOS too. The perplexity of a set is exp of the mean over all its tokens,
 * not over documents. Plain text has no documents: it is cut into windows that each start
 * with BOS and have no EOS. */
#include "trainer/trainer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct ppl_options {
    gn_model_choice model;
    const char *text;
    bool json;
} ppl_options;

static const char usage[] = "usage: guanaco-trainer eval ppl --model DIR --text FILE [options]\n";

static const gn_option table[] = {
    GN_MODEL_OPTIONS(ppl_options, "float32"),
    GN_ADAPTER_OPTION(ppl_options),
    GN_MEMORY_OPTION(ppl_options),
    GN_KV_OPTION(ppl_options),
    {GN_OPT_STRING, "text", offsetof(ppl_options, text), .value = "FILE",
     .help = "a JSON array of documents, a JSON object of such arrays (one result each), or plain "
             "text, which is scored in windows of the model's context"},
    {GN_OPT_FLAG, "json", offsetof(ppl_options, json), .help = "one JSON object a line"},
    GN_OPTION_END};

typedef struct evaluation {
    const ppl_options *options;
    gn_model *model;
    gn_scorer *scorer;
    gn_adapter_use use;
    int32_t n_uses, context;
    gn_error *err;
} evaluation;

typedef struct result {
    int64_t documents, tokens;
    double nll;
} result;

/* ---- input ---- */

/* *json is NULL for plain text. A name that ends in .json promises JSON. */
static gn_status parse_text(const char *path, const char *text, size_t size, cJSON **json,
                            gn_error *err) {
    const char *suffix = strrchr(path, '.');
    const bool promised = suffix && strcmp(suffix, ".json") == 0;
    const char first = text[strspn(text, " \t\r\n")];
    const char *end = text;
    *json = promised || first == '[' || first == '{'
                ? cJSON_ParseWithLengthOpts(text, size, &end, false)
                : NULL;
    if (promised && !*json)
        return gn_fail(err, GN_EFORMAT, "%s: not JSON at byte %td", path, end - text);
    return GN_OK;
}

/* ---- scoring ---- */

static gn_status score(evaluation *e, const int32_t *ids, int32_t n, result *sum) {
    double nll = 0;
    if (n < 2) return GN_OK; /* nothing to predict */
    const gn_status status = gn_scorer_nll(e->scorer, ids, n, &e->use, e->n_uses, &nll);
    if (status) return gn_fail(e->err, status, "cannot score a text: %s", gn_status_text(status));
    sum->documents++;
    sum->tokens += n - 1;
    sum->nll += nll;
    return GN_OK;
}

static gn_status score_document(evaluation *e, const char *text, result *sum) {
    int32_t *ids, n;
    gn_status status = gn_tokenize(e->model, text, strlen(text), true, &ids, &n, e->err);
    if (status) return status;
    if (n < e->context) {
        int32_t *longer = realloc(ids, ((size_t)n + 1) * sizeof *ids);
        if (!longer) {
            free(ids);
            return gn_fail(e->err, GN_ENOMEM, "out of memory");
        }
        ids = longer;
        const int32_t eos = gn_tokenizer_eos(e->model->tokenizer);
        if (eos >= 0) ids[n++] = eos;
    } else {
        n = e->context;
    }
    status = score(e, ids, n, sum);
    free(ids);
    return status;
}

static gn_status score_documents(evaluation *e, const cJSON *list, const char *name, result *sum) {
    const char *path = e->options->text;
    if (!cJSON_IsArray(list))
        return gn_fail(e->err, GN_EFORMAT, "%s: %s: expected an array of strings", path, name);
    const int total = cJSON_GetArraySize(list);
    const cJSON *item;
    int done = 0;
    cJSON_ArrayForEach(item, list) {
        if (!cJSON_IsString(item))
            return gn_fail(e->err, GN_EFORMAT, "%s: %s: document %d is not a string", path, name,
                           done);
        const gn_status status = score_document(e, item->valuestring, sum);
        if (status) return status;
        gn_progress("%s: %d of %d documents, ppl %.4f", name, ++done, total,
                    exp(sum->nll / (double)sum->tokens));
    }
    return GN_OK;
}

static gn_status score_windows(evaluation *e, const char *text, size_t size, result *sum) {
    int32_t *ids, n;
    gn_status status = gn_tokenize(e->model, text, size, true, &ids, &n, e->err);
    if (status) return status;
    /* A window borrows the last token of the one before as the place for its BOS. */
    const int32_t bos = gn_tokenizer_bos(e->model->tokenizer);
    for (int32_t at = 0; !status && at < n - 1; at += e->context - 1) {
        const int32_t rows = n - at < e->context ? n - at : e->context;
        if (bos >= 0) ids[at] = bos;
        status = score(e, ids + at, rows, sum);
        gn_progress("%d of %d tokens, ppl %.4f", at, n, exp(sum->nll / (double)sum->tokens));
    }
    free(ids);
    return status;
}

/* ---- results ---- */

static gn_status report(const evaluation *e, const char *name, const result *sum) {
    gn_progress("%s", "");
    if (sum->tokens == 0)
        return gn_fail(e->err, GN_EINVAL, "%s: %s holds no token to predict", e->options->text,
                       name);
    const gn_model_info info = gn_model_describe(e->model);
    const double nll = sum->nll / (double)sum->tokens;
    if (!e->options->json) {
        printf("%s: %lld tokens in %lld texts, nll %.6f, ppl %.4f\n", name, (long long)sum->tokens,
               (long long)sum->documents, nll, exp(nll));
        return GN_OK;
    }
    cJSON *line = cJSON_CreateObject();
    cJSON_AddStringToObject(line, "eval", "ppl");
    cJSON_AddStringToObject(line, "name", name);
    cJSON_AddStringToObject(line, "model", info.dir);
    if (e->options->model.adapter)
        cJSON_AddStringToObject(line, "adapter", e->options->model.adapter);
    cJSON_AddStringToObject(line, "quant_type", gn_qtype_name(info.quant));
    cJSON_AddNumberToObject(line, "texts", (double)sum->documents);
    cJSON_AddNumberToObject(line, "tokens", (double)sum->tokens);
    cJSON_AddNumberToObject(line, "nll", nll);
    cJSON_AddNumberToObject(line, "ppl", exp(nll));
    return gn_print_json_take(line, e->err);
}

static gn_status evaluate(evaluation *e, const char *text, size_t size, const cJSON *json) {
    if (!json || cJSON_IsArray(json)) {
        result sum = {0};
        const gn_status status =
            json ? score_documents(e, json, "text", &sum) : score_windows(e, text, size, &sum);
        return status ? status : report(e, "text", &sum);
    }
    const cJSON *list;
    cJSON_ArrayForEach(list, json) {
        result sum = {0};
        gn_status status = score_documents(e, list, list->string ? list->string : "value", &sum);
        if (!status) status = report(e, list->string, &sum);
        if (status) return status;
    }
    return GN_OK;
}

static gn_status run(const ppl_options *o, gn_error *err) {
    if (!o->text) return gn_fail(err, GN_EINVAL, "--text FILE is missing");
    char *text;
    size_t size;
    cJSON *json = NULL;
    gn_adapter *adapter = NULL;
    evaluation e = {.options = o, .err = err};
    gn_status status = gn_read_text(o->text, &text, &size, err);
    if (status) return status;
    status = parse_text(o->text, text, size, &json, err);
    if (!status) status = gn_model_choice_open(&o->model, &e.model, &adapter, err);
    if (!status) {
        e.context = gn_model_describe(e.model).context;
        e.use = (gn_adapter_use){adapter, 1};
        e.n_uses = adapter ? 1 : 0;
        status = gn_model_choice_score(&o->model, &e.scorer, e.model, adapter, e.context, err);
    }
    if (!status) status = evaluate(&e, text, size, json);
    gn_scorer_close(e.scorer);
    gn_adapter_close(adapter);
    gn_model_close(e.model);
    cJSON_Delete(json);
    free(text);
    return status;
}

int gn_eval_ppl_command(int n, char *const *args) {
    ppl_options o;
    int exit_status;
    gn_error err = {0};
    if (!gn_command_options(table, &o, usage, n, args, &exit_status)) return exit_status;
    return run(&o, &err) ? gn_command_failed(&err) : 0;
}
