/* train_report.c - lines of metrics.jsonl, and what a person sees. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "kernels/measure.h"
#include "trainer/report.h"
#include "trainer/train_run.h"

enum { SECONDS_BETWEEN_LINES = 30 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (double)t.tv_sec + 1e-3 * (double)(t.tv_nsec / 1000000);
}

/* What a GPU holds; on a CPU, the most that this process has held. */
static double used_bytes(const gn_train_run *run) {
    gn_ctx *ctx = gn_trainable_model(run->trainable)->ctx;
    return gn_ctx_is_host(ctx) ? gn_resident_peak(getpid()) : (double)gn_measure_used_bytes(ctx);
}

/* On a terminal after every step, else a line now and then. */
static void show_progress(gn_train_run *run, const gn_step_result *r) {
    const gn_train_state *s = &run->state;
    const int64_t total = s->schedule.total;
    const double left =
        run->seconds / (double)(s->step - run->begin) * (double)(total - s->step) + 0.5;
    const long minutes = (long)(left / 60);
    const bool is_terminal = isatty(STDERR_FILENO);
    char text[160];
    if (!is_terminal && run->seconds - run->shown_at < SECONDS_BETWEEN_LINES) return;
    run->shown_at = run->seconds;
    snprintf(text, sizeof text,
             "step %lld of %lld  loss %.4f  %.0f tok/s  %.2f GiB  %ld:%02ld:%02ld left",
             (long long)s->step, (long long)total, r->loss,
             (double)run->tokens_since / run->since_log, used_bytes(run) / 0x1p30, minutes / 60,
             minutes % 60, (long)fmod(left, 60));
    if (is_terminal)
        gn_progress("%s", text);
    else
        fprintf(stderr, "%s\n", text);
}

static gn_status write_step(const gn_train_run *run, const gn_step_result *r) {
    cJSON *line = cJSON_CreateObject();
    cJSON_AddNumberToObject(line, "step", (double)run->state.step);
    cJSON_AddNumberToObject(line, "loss", r->loss);
    cJSON_AddNumberToObject(line, "grad_norm", r->grad_norm);
    cJSON_AddNumberToObject(line, "learning_rate", r->learning_rate);
    cJSON_AddNumberToObject(line, "tok_s", (double)run->tokens_since / run->since_log);
    cJSON_AddNumberToObject(line, "device_bytes", used_bytes(run));
    cJSON_AddNumberToObject(line, "time", now());
    return gn_metrics_write_take(run->metrics, line, run->o->json, run->err);
}

gn_status gn_train_report_step(gn_train_run *run, const gn_step_result *result, double seconds,
                               int64_t tokens) {
    const gn_train_state *s = &run->state;
    run->seconds += seconds;
    run->since_log += seconds;
    run->tokens_since += tokens;
    if (!run->metrics) return GN_OK;
    show_progress(run, result);
    if (s->step % run->o->logging_steps != 0 && s->step != s->schedule.total) return GN_OK;
    const gn_status status = write_step(run, result);
    run->since_log = 0;
    run->tokens_since = 0;
    return status;
}

gn_status gn_train_report_evaluation(gn_train_run *run, double loss, int64_t tokens) {
    if (!run->metrics) return GN_OK;
    gn_progress("%s", "");
    fprintf(stderr, "step %lld: held-out loss %.4f, perplexity %.4f (%lld tokens)\n",
            (long long)run->state.step, loss, exp(loss), (long long)tokens);
    cJSON *line = cJSON_CreateObject();
    cJSON_AddNumberToObject(line, "step", (double)run->state.step);
    cJSON_AddNumberToObject(line, "eval_loss", loss);
    cJSON_AddNumberToObject(line, "eval_ppl", exp(loss));
    cJSON_AddNumberToObject(line, "time", now());
    return gn_metrics_write_take(run->metrics, line, run->o->json, run->err);
}

gn_status gn_train_report_mmlu(gn_train_run *run) {
    const gn_mmlu_result r = gn_mmlu_read(run->data.mmlu);
    if (!run->metrics) return GN_OK;
    gn_progress("%s", "");
    fprintf(stderr, "step %lld: MMLU (%s) accuracy %.2f %%, loss %.4f (%lld questions)\n",
            (long long)run->state.step, r.split, 100 * r.accuracy, r.loss, (long long)r.questions);
    cJSON *line = cJSON_CreateObject();
    cJSON_AddNumberToObject(line, "step", (double)run->state.step);
    gn_mmlu_write(run->data.mmlu, line);
    cJSON_AddNumberToObject(line, "time", now());
    return gn_metrics_write_take(run->metrics, line, run->o->json, run->err);
}

void gn_train_report_start(const gn_train_run *run) {
    const gn_model_info info = gn_model_describe(gn_trainable_model(run->trainable));
    const gn_parameters *p = gn_trainable_parameters(run->trainable);
    int64_t trained = 0;
    if (!run->metrics) return;
    for (size_t i = 0; i < p->n; i++) trained += p->items[i].numel;
    fprintf(stderr, "%s on %s, weights %s, %lld of them trained", info.dir, info.device,
            gn_qtype_name(info.quant), (long long)trained);
    fprintf(stderr, "; %lld step%s", (long long)run->state.schedule.total,
            run->state.schedule.total == 1 ? "" : "s");
    if (run->state.step > 0) fprintf(stderr, ", from step %lld", (long long)run->state.step);
    fprintf(stderr, "\n");
    if (run->data.limits.seq_rows > info.context)
        fprintf(stderr, "samples of up to %d tokens: the model was made for %d\n",
                run->data.limits.seq_rows, info.context);
}

void gn_train_report_memory(const gn_train_run *run) {
    gn_model *model = gn_trainable_model(run->trainable);
    gn_train_measured measured;
    const bool has_run = run->seconds > 0;
    /* On a CPU nothing is measured, and who set no budget need not hear of one. */
    const bool is_host = gn_ctx_is_host(model->ctx);
    if (!run->metrics || (is_host && (has_run || run->o->model.memory == 0))) return;
    if (has_run &&
        gn_train_memory_measure(&measured, &run->memory, model,
                                gn_trainable_parameters(run->trainable), run->optimizer) != GN_OK)
        return;
    char *text = gn_train_memory_text(&run->memory, has_run ? &measured : NULL);
    gn_progress("%s", "");
    if (text) fputs(text, stderr);
    free(text);
}

void gn_train_report_page(const gn_train_run *run) {
    gn_error err = {0};
    if (gn_report_write(run->o->output, &err)) {
        gn_progress("%s", "");
        fprintf(stderr, "guanaco-trainer: report.html: %s\n", err.message);
    }
}
