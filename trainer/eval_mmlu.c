/* eval_mmlu.c - MMLU: how often a model, or an adapter, knows which of four answers is right. */
#include <math.h>
#include <stdio.h>

#include "trainer/mmlu.h"
#include "trainer/trainer.h"

typedef struct mmlu_options {
    gn_model_choice model;
    gn_mmlu_choice mmlu;
    bool json;
} mmlu_options;

static const char usage[] =
    "usage: guanaco-trainer eval mmlu --model DIR --mmlu-dataset FILE [options]\n";

static const gn_option table[] = {
    GN_MODEL_OPTIONS(mmlu_options, "auto"),
    GN_ADAPTER_OPTION(mmlu_options),
    GN_MEMORY_OPTION(mmlu_options),
    GN_KV_OPTION(mmlu_options),
    GN_MMLU_OPTIONS(mmlu_options),
    {GN_OPT_FLAG, "json", offsetof(mmlu_options, json), .help = "one JSON object a line"},
    GN_OPTION_END};

static gn_status ask_all(gn_mmlu *mmlu, gn_scorer *scorer, gn_adapter *adapter, gn_error *err) {
    const int64_t n = gn_mmlu_count(mmlu);
    const gn_adapter_use use = {adapter, 1};
    for (int64_t i = 0; i < n; i++) {
        const gn_status status = gn_mmlu_ask(mmlu, i, scorer, &use, adapter ? 1 : 0);
        if (status)
            return gn_fail(err, status, "cannot score a question: %s", gn_status_text(status));
        gn_progress("%lld of %lld questions", (long long)i + 1, (long long)n);
    }
    const double loss = gn_mmlu_read(mmlu).loss;
    return isfinite(loss) ? GN_OK : gn_fail(err, GN_EINVAL, "the loss of the answers is %g", loss);
}

static gn_status report(const mmlu_options *o, gn_model *model, const gn_mmlu *mmlu,
                        gn_error *err) {
    const gn_model_info info = gn_model_describe(model);
    const gn_mmlu_result r = gn_mmlu_read(mmlu);
    cJSON *line = cJSON_CreateObject();
    gn_progress("%s", "");
    if (o->json) {
        cJSON_AddStringToObject(line, "eval", "mmlu");
        cJSON_AddStringToObject(line, "model", info.dir);
        if (o->model.adapter) cJSON_AddStringToObject(line, "adapter", o->model.adapter);
        cJSON_AddStringToObject(line, "quant_type", gn_qtype_name(info.quant));
        cJSON_AddNumberToObject(line, "questions", (double)r.questions);
    }
    gn_mmlu_write(mmlu, line);
    if (o->json) return gn_print_json_take(line, err);
    const cJSON *value;
    cJSON_ArrayForEach(value, line) printf("%-60s %.4f\n", value->string, value->valuedouble);
    printf("%lld questions\n", (long long)r.questions);
    cJSON_Delete(line);
    return GN_OK;
}

static gn_status run(const mmlu_options *o, gn_error *err) {
    gn_model *model;
    gn_adapter *adapter;
    gn_mmlu *mmlu = NULL;
    gn_scorer *scorer = NULL;
    gn_status status = gn_model_choice_open(&o->model, &model, &adapter, err);
    if (status) return status;
    const int32_t context = gn_model_describe(model).context;
    status = gn_mmlu_open(&mmlu, &o->mmlu, o->model.dir, context, err);
    if (!status)
        status =
            gn_model_choice_score(&o->model, &scorer, model, adapter, gn_mmlu_longest(mmlu), err);
    if (!status) status = ask_all(mmlu, scorer, adapter, err);
    if (!status) status = report(o, model, mmlu, err);
    gn_scorer_close(scorer);
    gn_mmlu_close(mmlu);
    gn_adapter_close(adapter);
    gn_model_close(model);
    return status;
}

int gn_eval_mmlu_command(int n, char *const *args) {
    mmlu_options o;
    int exit_status;
    gn_error err = {0};
    if (!gn_command_options(table, &o, usage, n, args, &exit_status)) return exit_status;
    return run(&o, &err) ? gn_command_failed(&err) : 0;
}
