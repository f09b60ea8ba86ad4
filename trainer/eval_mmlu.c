/* eval_mmlu.c - MMLU: how often a model, or an adapter, knows which of four answers is right. */
#include <math.h>
#include <stdio.h>

#include "engine/sample.h"
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

/* A question that is being asked. */
typedef struct asked {
    gn_mmlu_question question;
    const int32_t *letters;
    int vocab;
    float nll[GN_MMLU_CHOICES];
    double loss;
} asked;

/* Behind the prompt the letters are compared; there and from then on losses add up. */
static void take_row(void *user, int32_t position, const float *logits) {
    asked *a = user;
    const gn_mmlu_question *q = &a->question;
    if (position + 1 == q->source)
        for (int i = 0; i < GN_MMLU_CHOICES; i++)
            a->nll[i] = (float)-gn_logprob(logits, a->vocab, a->letters[i]);
    if (position + 1 < q->n) a->loss -= gn_logprob(logits, a->vocab, q->ids[position + 1]);
}

static gn_status ask_all(gn_mmlu *mmlu, gn_model *model, gn_scorer *scorer, gn_adapter *adapter,
                         gn_error *err) {
    const int64_t n = gn_mmlu_count(mmlu);
    const gn_adapter_use use = {adapter, 1};
    asked a = {.letters = gn_mmlu_letters(mmlu), .vocab = gn_model_describe(model).vocab};
    for (int64_t i = 0; i < n; i++) {
        a.question = gn_mmlu_at(mmlu, i);
        a.loss = 0;
        const gn_status status =
            gn_scorer_run(scorer, a.question.ids, a.question.n, a.question.source - 1, &use,
                          adapter ? 1 : 0, take_row, &a);
        if (status)
            return gn_fail(err, status, "cannot score a question: %s", gn_status_text(status));
        gn_mmlu_add(mmlu, i, a.nll);
        gn_mmlu_add_loss(mmlu, a.loss);
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
    if (!status) status = ask_all(mmlu, model, scorer, adapter, err);
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
