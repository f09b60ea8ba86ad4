/* train.c - opening a run, and its loop.
 *
 * Gradients of a step's micro-batches are those of summed losses. Only once all are there is it
 * known over how many tokens the loss is averaged, here and on other processes; the division is
 * part of the factor by which the update scales gradients. */
#include "trainer/train.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "trainer/gradients.h"
#include "trainer/train_run.h"

/* Memory of a GPU that is left alone: for what the driver and libraries take as they go. */
#define SPARE_BYTES ((int64_t)256 << 20)
/* The least that pages of optimizer state get: a few of them. */
#define LEAST_PAGE_BYTES ((int64_t)64 << 20)

static gn_ctx *ctx_of(const gn_train_run *run) {
    return gn_trainable_model(run->trainable)->ctx;
}

/* "step N: what failed". */
static gn_status step_failed(const gn_train_run *run, gn_status status, const char *what) {
    return gn_fail(run->err, status, "step %lld: %s: %s", (long long)run->state.step + 1, what,
                   gn_status_text(status));
}

/* ---- opening ---- */

static gn_status open_trainable(gn_train_run *run) {
    const gn_train_options *o = run->o;
    gn_model_choice choice = o->model;
    if (o->mode == GN_TRAIN_FULL)
        return gn_trainable_open_full(&run->trainable, &choice, o->random_init, (uint64_t)o->seed,
                                      run->err);
    gn_config config;
    const gn_status status = gn_config_read(&config, choice.dir, run->err);
    if (status) return status;
    if (o->mode == GN_TRAIN_LORA && config.bnb_4bit)
        return gn_fail(run->err, GN_EINVAL,
                       "%s: its weights are 4-bit: --mode lora trains over 16- or 32-bit ones",
                       choice.dir);
    if (o->mode == GN_TRAIN_QLORA && choice.quant == GN_Q_NONE && !config.bnb_4bit)
        choice.quant = GN_Q_NF4;
    const gn_lora_options lora = {.rank = o->rank,
                                  .alpha = gn_train_decimal(o->alpha),
                                  .dropout = gn_train_decimal(o->dropout),
                                  .rslora = o->rslora,
                                  .modules = o->modules,
                                  .init_adapter = o->init_adapter,
                                  .seed = (uint64_t)o->seed};
    return gn_trainable_open_lora(&run->trainable, &choice, &lora, run->err);
}

static gn_train_limits step_limits(const gn_train_run *run) {
    const gn_batch_limits *limits = &run->data.limits;
    return (gn_train_limits){.max_rows = limits->rows,
                             .max_seqs = limits->seqs,
                             .context = limits->seq_rows,
                             .max_rank = gn_trainable_max_rank(run->trainable)};
}

static gn_optimizer_options optimizer_options(const gn_train_run *run) {
    const gn_train_options *o = run->o;
    return (gn_optimizer_options){.eight_bit = gn_train_is_8bit(o),
                                  .beta1 = o->beta1,
                                  .beta2 = o->beta2,
                                  .eps = o->epsilon,
                                  .weight_decay = o->weight_decay};
}

static gn_status plan_memory(gn_train_run *run) {
    gn_model *model = gn_trainable_model(run->trainable);
    gn_train_wanted wanted = {.limits = step_limits(run),
                              .weights = gn_ctx_activation(model->ctx),
                              .grads = GN_F32,
                              .optimizer = optimizer_options(run),
                              .paged = gn_train_is_paged(run->o),
                              .accumulation = run->o->accumulation};
    wanted.items = gn_trainable_items(run->trainable, &wanted.n_items);
    wanted.groups = gn_trainable_groups(run->trainable, &wanted.n_groups);
    return gn_train_memory_plan(&run->memory, model, &wanted, run->o->model.memory, run->err);
}

static gn_status open_optimizer(gn_train_run *run) {
    gn_optimizer_options options = optimizer_options(run);
    options.budget = run->memory.optimizer_budget;
    gn_status status = gn_page_device_open(&run->device, ctx_of(run));
    if (status) return gn_fail(run->err, status, "pages: %s", gn_status_text(status));
    status = gn_optimizer_open(&run->optimizer, gn_trainable_parameters(run->trainable), &options,
                               run->device, run->err);
    if (!status) gn_trainable_lodge(run->trainable, gn_optimizer_pages(run->optimizer));
    return status;
}

static gn_status open_step(gn_train_run *run) {
    gn_train_limits limits = step_limits(run);
    memcpy(limits.keep, run->memory.keep, sizeof limits.keep);
    return gn_train_step_open(&run->step, gn_trainable_model(run->trainable), &limits, run->err);
}

static void set_schedule(gn_train_run *run) {
    const gn_train_options *o = run->o;
    const int64_t batches = gn_batcher_epoch_batches(run->data.train);
    const int64_t per_step = (int64_t)o->accumulation * run->c->size;
    const int64_t per_epoch = (batches + per_step - 1) / per_step;
    const int64_t total =
        o->max_steps > 0 ? o->max_steps : (int64_t)ceil((double)o->epochs * (double)per_epoch);
    run->state = (gn_train_state){
        .seed = (uint64_t)o->seed,
        .best_loss = INFINITY,
        .schedule = {.kind = (gn_lr_kind)o->scheduler,
                     .peak = gn_train_decimal(o->learning_rate),
                     .warmup = o->warmup_steps > 0
                                   ? o->warmup_steps
                                   : gn_lr_warmup_steps(gn_train_decimal(o->warmup_ratio), total),
                     .total = total}};
}

static gn_status open_run(gn_train_run *run) {
    gn_status status = gn_train_check_output(run);
    if (!status) status = gn_train_data_open(&run->data, run->o, run->c->size, run->err);
    if (!status) status = open_trainable(run);
    if (!status) status = plan_memory(run);
    if (!status) status = gn_trainable_allocate(run->trainable, &run->memory, run->err);
    if (!status) status = open_optimizer(run);
    if (!status) status = open_step(run);
    if (status) return status;
    set_schedule(run);
    return gn_train_begin(run);
}

static void close_run(gn_train_run *run) {
    gn_metrics_close(run->metrics);
    gn_train_state_close(&run->state);
    gn_train_step_close(run->step);
    gn_optimizer_close(run->optimizer);
    gn_page_device_close(run->device);
    gn_trainable_close(run->trainable);
    gn_train_data_close(&run->data);
}

/* ---- a step ---- */

/* Numbers that processes add up. */
enum { LOSS, WEIGHT, ROWS, SUMS };

static gn_train_batch batch_of(const gn_micro_batch *micro) {
    return (gn_train_batch){.rows = micro->rows,
                            .ids = micro->ids,
                            .labels = micro->labels,
                            .seqs = {.n = micro->n_seqs, .row0 = micro->row0, .pos0 = micro->pos0}};
}

/* Adds a micro-batch's loss and gradients: a sum over tokens of weight 1, or a mean of weight 1. */
static gn_status run_micro_batch(gn_train_run *run, const gn_micro_batch *micro, bool is_last,
                                 double *sums) {
    gn_train_batch batch = batch_of(micro);
    const bool is_mean = run->o->average_micro_batches && micro->n_learned > 0;
    double loss;
    batch.scale = is_mean ? 1 / (float)micro->n_learned : 1;
    batch.number = (uint32_t)run->state.micro_batches;
    batch.is_last = is_last;
    gn_status status = is_last ? gn_optimizer_prefetch(run->optimizer) : GN_OK;
    if (!status)
        status = gn_train_step_run(run->step, &batch, gn_trainable_views(run->trainable), &loss);
    if (status) return step_failed(run, status, "forward and backward");
    sums[LOSS] += is_mean ? loss / micro->n_learned : loss;
    sums[WEIGHT] += is_mean ? 1 : micro->n_learned;
    sums[ROWS] += micro->rows;
    return GN_OK;
}

/* Gradients and sums of a step's micro-batches: as many as there are to be, or to the epoch's
 * end. */
static gn_status accumulate(gn_train_run *run, double *sums) {
    const int64_t n = (int64_t)run->o->accumulation * run->c->size;
    gn_status status = GN_OK;
    run->epoch_ended = false;
    for (int64_t i = 0; i < n && !run->epoch_ended && !status; i++, run->state.micro_batches++) {
        const gn_micro_batch micro = gn_batcher_next(run->data.train);
        run->epoch_ended = micro.ends_epoch;
        const bool is_last = i + run->c->size >= n || micro.ends_epoch;
        if (i % run->c->size == run->c->rank) status = run_micro_batch(run, &micro, is_last, sums);
    }
    return status;
}

/* Activations, or another program, may have left less of a GPU's memory than there was: then pages
 * of optimizer state make room. */
static gn_status make_room(const gn_train_run *run) {
    gn_ctx_memory memory;
    if (!run->device || !gn_train_is_paged(run->o)) return GN_OK;
    gn_status status = gn_ctx_read_memory(ctx_of(run), &memory);
    if (status) return step_failed(run, status, "reading how much memory is free");
    if (memory.free >= SPARE_BYTES / 2) return GN_OK;
    gn_pages *pages = gn_optimizer_pages(run->optimizer);
    const int64_t resident = (int64_t)gn_pages_read_stats(pages).resident;
    const int64_t left = resident - (SPARE_BYTES - memory.free);
    status =
        gn_pages_set_budget(pages, (size_t)(left > LEAST_PAGE_BYTES ? left : LEAST_PAGE_BYTES));
    return status ? step_failed(run, status, "evicting optimizer state") : GN_OK;
}

static gn_status check_finite(const gn_train_run *run, double x, const char *what) {
    if (isfinite(x)) return GN_OK;
    return gn_fail(run->err, GN_EINVAL,
                   "step %lld: the %s is %g: training has diverged. Nothing of this step was "
                   "applied or saved; a lower --learning-rate may help",
                   (long long)run->state.step + 1, what, x);
}

static gn_status update(gn_train_run *run, double weight, gn_step_result *result) {
    double norm;
    gn_status status = gn_optimizer_grad_norm(run->optimizer, &norm);
    if (status) return step_failed(run, status, "gradients");
    result->grad_norm = norm / weight;
    status = check_finite(run, result->grad_norm, "gradient norm");
    if (!status) status = make_room(run);
    if (status) return status;
    const double clip = gn_clip_scale(result->grad_norm, gn_train_decimal(run->o->max_grad_norm));
    status = gn_optimizer_step(run->optimizer, result->learning_rate, (float)(clip / weight));
    if (!status) status = gn_trainable_refresh(run->trainable);
    if (!status) status = gn_grads_clear(gn_trainable_parameters(run->trainable));
    return status ? step_failed(run, status, "update") : GN_OK;
}

static gn_status run_step(gn_train_run *run) {
    const double begin = gn_seconds();
    double sums[SUMS] = {0};
    gn_step_result result = {.learning_rate = gn_lr_at(&run->state.schedule, run->state.step)};
    gn_status status = accumulate(run, sums);
    if (status) return status;
    status = gn_exchange_gradients(run->c, gn_trainable_parameters(run->trainable), sums, SUMS);
    if (status) return step_failed(run, status, "exchanging gradients");
    const double weight = fmax(sums[WEIGHT], 1);
    result.loss = sums[LOSS] / weight;
    status = check_finite(run, result.loss, "loss");
    if (!status) status = update(run, weight, &result);
    if (status) return status;
    run->state.step++;
    run->state.tokens += (int64_t)sums[ROWS];
    return gn_train_report_step(run, &result, gn_seconds() - begin, (int64_t)sums[ROWS]);
}

/* ---- evaluation ---- */

/* Sums over the batches of one pass. */
static gn_status run_evaluation(gn_train_run *run, double *sums) {
    const int64_t n = gn_batcher_epoch_batches(run->data.eval);
    for (int64_t i = 0; i < n; i++) {
        const gn_micro_batch micro = gn_batcher_next(run->data.eval);
        if (i % run->c->size != run->c->rank) continue;
        const gn_train_batch batch = batch_of(&micro);
        double loss;
        const gn_status status =
            gn_train_step_loss(run->step, &batch, gn_trainable_views(run->trainable), &loss);
        if (status) return step_failed(run, status, "evaluation");
        sums[LOSS] += loss;
        sums[WEIGHT] += micro.n_learned;
        if (run->metrics)
            gn_progress("evaluating: %lld of %lld batches", (long long)i + 1, (long long)n);
    }
    if (run->c->size == 1) return GN_OK;
    const gn_status status = run->c->sum_numbers(run->c, sums, SUMS);
    return status ? step_failed(run, status, "evaluation") : GN_OK;
}

static gn_status evaluate_loss(gn_train_run *run) {
    double sums[SUMS] = {0};
    gn_status status = run_evaluation(run, sums);
    if (status) return status;
    const double loss = sums[LOSS] / fmax(sums[WEIGHT], 1);
    if (!isfinite(loss))
        return gn_fail(run->err, GN_EINVAL,
                       "step %lld: the held-out loss is %g: training has diverged, or the base "
                       "model is broken. What was saved before stays; a lower --learning-rate may "
                       "help",
                       (long long)run->state.step, loss);
    const bool is_better = loss < run->state.best_loss;
    status = gn_train_report_evaluation(run, loss, (int64_t)sums[WEIGHT]);
    run->state.evaluations_lost = is_better ? 0 : run->state.evaluations_lost + 1;
    if (is_better) run->state.best_loss = loss;
    if (!status && is_better && run->o->keep_best) status = gn_train_save_result(run);
    return status;
}

static gn_status evaluate(gn_train_run *run) {
    const gn_status status = run->data.eval ? evaluate_loss(run) : GN_OK;
    return status || !run->data.mmlu ? status : gn_train_mmlu(run);
}

/* ---- the loop ---- */

static bool has_stopped(const gn_train_run *run) {
    return run->o->patience > 0 && run->state.evaluations_lost >= run->o->patience;
}

static bool is_last(const gn_train_run *run) {
    return run->state.step >= run->state.schedule.total;
}

/* After a step, but for the last. */
static bool is_due(const gn_train_run *run, int when, int64_t steps) {
    return when == GN_WHEN_STEPS   ? run->state.step % steps == 0
           : when == GN_WHEN_EPOCH ? run->epoch_ended
                                   : false;
}

static gn_status run_steps(gn_train_run *run) {
    const gn_train_options *o = run->o;
    gn_status status = GN_OK;
    while (!status && !is_last(run) && !has_stopped(run)) {
        status = run_step(run);
        if (!status && o->evaluates && (is_last(run) || is_due(run, o->eval_when, o->eval_steps)))
            status = evaluate(run);
        if (!status &&
            (is_last(run) || has_stopped(run) || is_due(run, o->save_when, o->save_steps)))
            status = gn_train_save(run);
    }
    return status;
}

static gn_status run_all(gn_train_run *run) {
    gn_train_report_start(run);
    gn_train_report_memory(run);
    gn_status status = run->o->evaluates && run->state.step == 0 ? evaluate(run) : GN_OK;
    if (!status) status = run_steps(run);
    if (!status && !run->o->keep_best) status = gn_train_save_result(run);
    if (!status && run->metrics) {
        gn_train_report_memory(run);
        gn_progress("%s", "");
        fprintf(stderr, "%s after step %lld: %s\n", is_last(run) ? "done" : "stopped early",
                (long long)run->state.step, run->o->output);
    }
    return status;
}

gn_status gn_train(const gn_train_options *o, gn_communicator *c, gn_error *err) {
    gn_train_run run = {.o = o, .c = c, .err = err};
    gn_status status = open_run(&run);
    if (!status) status = run_all(&run);
    close_run(&run);
    return status;
}
