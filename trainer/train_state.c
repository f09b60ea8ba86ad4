/* train_state.c - what a run saves, and how it goes on. */
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/save_folder.h"
#include "trainer/model_writer.h"
#include "trainer/train_run.h"

static gn_status no_memory(const gn_train_run *run) {
    return gn_fail(run->err, GN_ENOMEM, "out of memory");
}

/* ---- options that must stay as they are ---- */

static void add_text(cJSON *options, const char *name, const char *text) {
    if (text) cJSON_AddStringToObject(options, name, text);
}

/* What decides results, but for what the state holds itself; NULL without memory. Paging, the
 * device and how often something is logged or saved may change. */
static cJSON *describe(const gn_train_run *run) {
    static const char *const modes[] = {"auto", "qlora", "lora", "full"};
    const gn_train_options *o = run->o;
    const gn_model_info info = gn_model_describe(gn_trainable_model(run->trainable));
    const gn_adapter_config *adapter = gn_trainable_adapter(run->trainable);
    cJSON *options = cJSON_CreateObject();
    add_text(options, "model", o->model.dir);
    add_text(options, "mode", modes[o->mode]);
    add_text(options, "quant_type", gn_qtype_name(info.quant));
    cJSON_AddBoolToObject(options, "double_quant", o->model.double_quant);
    add_text(options, "compute_dtype", info.compute == GN_COMPUTE_BF16 ? "bfloat16" : "float32");
    if (adapter) {
        cJSON_AddNumberToObject(options, "lora_r", adapter->rank);
        cJSON_AddNumberToObject(options, "lora_alpha", adapter->alpha);
        cJSON_AddNumberToObject(options, "lora_dropout", adapter->dropout);
        cJSON_AddBoolToObject(options, "rslora", adapter->rslora);
        add_text(options, "init_adapter", o->init_adapter);
    } else {
        cJSON_AddBoolToObject(options, "random_init", o->random_init);
    }
    cJSON_AddNumberToObject(options, "gradient_accumulation_steps", o->accumulation);
    cJSON_AddNumberToObject(options, "processes", run->c->size);
    add_text(options, "loss_average", o->average_micro_batches ? "micro-batch" : "token");
    add_text(options, "optim", gn_train_is_8bit(o) ? "adamw_8bit" : "adamw_32bit");
    cJSON_AddNumberToObject(options, "adam_beta1", gn_train_decimal(o->beta1));
    cJSON_AddNumberToObject(options, "adam_beta2", gn_train_decimal(o->beta2));
    cJSON_AddNumberToObject(options, "adam_epsilon", gn_train_decimal(o->epsilon));
    cJSON_AddNumberToObject(options, "weight_decay", gn_train_decimal(o->weight_decay));
    cJSON_AddNumberToObject(options, "max_grad_norm", gn_train_decimal(o->max_grad_norm));
    return options;
}

/* ---- the output folder ---- */

gn_status gn_train_check_output(const gn_train_run *run) {
    const char *output = run->o->output;
    DIR *d = run->o->resume ? NULL : opendir(output);
    if (!d && !run->o->resume && errno != ENOENT)
        return gn_fail(run->err, GN_EIO, "%s: %s", output, strerror(errno));
    gn_status status = GN_OK;
    for (struct dirent *entry; d && !status && (entry = readdir(d));) {
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
            status = gn_fail(run->err, GN_EEXIST,
                             "%s is not empty: --resume goes on with the run in it, another "
                             "--output-dir begins a new one",
                             output);
    }
    if (d) closedir(d);
    return status;
}

/* OUTPUT/train_config.json, for people and reports: what state.json holds of them, and more. */
static gn_status write_settings(const gn_train_run *run) {
    const gn_train_options *o = run->o;
    const gn_lr_schedule *schedule = &run->state.schedule;
    char *path;
    cJSON *settings = describe(run);
    cJSON_AddItemToObject(settings, "dataset",
                          cJSON_CreateStringArray(o->data.files.items, o->data.files.n));
    cJSON_AddNumberToObject(settings, "source_max_len", o->data.source_max_len);
    cJSON_AddNumberToObject(settings, "target_max_len", o->data.target_max_len);
    cJSON_AddNumberToObject(settings, "per_device_train_batch_size", o->batch_size);
    cJSON_AddNumberToObject(settings, "steps", (double)schedule->total);
    cJSON_AddNumberToObject(settings, "learning_rate", schedule->peak);
    add_text(settings, "lr_scheduler_type", gn_lr_name(schedule->kind));
    cJSON_AddNumberToObject(settings, "warmup_steps", (double)schedule->warmup);
    cJSON_AddNumberToObject(settings, "seed", (double)o->seed);
    add_text(settings, "device", gn_model_describe(gn_trainable_model(run->trainable)).device);
    char *text = settings ? cJSON_Print(settings) : NULL;
    if (asprintf(&path, "%s/train_config.json", o->output) < 0) path = NULL;
    const gn_status status = text && path ? gn_text_replace(path, text, run->err) : no_memory(run);
    free(path);
    cJSON_free(text);
    cJSON_Delete(settings);
    return status;
}

/* ---- going on ---- */

static void warn_broken(void *user, const char *message) {
    (void)user;
    fprintf(stderr, "guanaco-trainer: passed over: %s\n", message);
}

/* A constant rate does not depend on how many steps there are to be. */
static gn_status check_schedule(const gn_train_run *run, const gn_lr_schedule *saved) {
    const gn_lr_schedule *now = &run->state.schedule;
    const bool decays = now->kind == GN_LR_LINEAR || now->kind == GN_LR_COSINE;
    const bool warms_up = now->kind != GN_LR_CONSTANT;
    if (now->kind == saved->kind && now->peak == saved->peak &&
        (!decays || now->total == saved->total) && (!warms_up || now->warmup == saved->warmup))
        return GN_OK;
    return gn_fail(run->err, GN_EMISMATCH,
                   "the learning rate is %s %g over %lld steps (warm-up %lld), but was %s %g over "
                   "%lld (%lld) when the checkpoint was saved",
                   gn_lr_name(now->kind), now->peak, (long long)now->total, (long long)now->warmup,
                   gn_lr_name(saved->kind), saved->peak, (long long)saved->total,
                   (long long)saved->warmup);
}

/* Takes over a checkpoint's state, which must be that of this run. */
static gn_status adopt(gn_train_run *run, gn_train_state *saved) {
    gn_batch_position position = {.epoch = saved->epoch, .row = saved->position};
    cJSON *key = cJSON_DetachItemFromObjectCaseSensitive(saved->options, "data");
    if (cJSON_IsString(key)) position.key = strtoull(key->valuestring, NULL, 16);
    cJSON_Delete(key);
    gn_status status = gn_train_options_check(saved->options, run->state.options, run->err);
    if (!status && saved->seed != run->state.seed)
        status = gn_fail(run->err, GN_EMISMATCH,
                         "--seed is %" PRIu64 ", but was %" PRIu64 " when the checkpoint was saved",
                         run->state.seed, saved->seed);
    if (!status) status = check_schedule(run, &saved->schedule);
    if (!status) status = gn_batcher_seek(run->data.train, &position, run->err);
    if (status) return status;
    cJSON *options = run->state.options;
    const gn_lr_schedule schedule = run->state.schedule;
    gn_train_state_close(saved);
    run->state = *saved;
    run->state.options = options;
    run->state.schedule = schedule;
    return GN_OK;
}

/* *found says whether there was a checkpoint to go on from. */
static gn_status go_on(gn_train_run *run, bool *found) {
    char *path;
    gn_train_state saved;
    *found = false;
    gn_status status = gn_checkpoint_find(&path, run->o->output, warn_broken, NULL, run->err);
    if (status) return status == GN_ENOENT ? GN_OK : status;
    status = gn_checkpoint_load(path, &saved, run->optimizer, run->err);
    if (!status) {
        status = adopt(run, &saved);
        if (status) gn_train_state_close(&saved);
    }
    if (!status) status = gn_trainable_refresh(run->trainable);
    free(path);
    *found = true;
    return status;
}

gn_status gn_train_begin(gn_train_run *run) {
    bool found = false;
    gn_status status = GN_OK;
    run->state.options = describe(run);
    if (!run->state.options) return no_memory(run);
    if (run->o->resume) status = go_on(run, &found);
    if (!status && !found) status = gn_trainable_start(run->trainable, run->optimizer, run->err);
    if (status) return status;
    run->begin = run->state.step;
    if (run->c->rank != 0) return GN_OK;
    status = gn_folder_make(run->o->output, run->err);
    if (!status)
        status = gn_metrics_open(&run->metrics, run->o->output, run->state.metrics_bytes, run->err);
    return status ? status : write_settings(run);
}

/* ---- saving ---- */

static bool note_data(const gn_train_run *run) {
    char key[20];
    snprintf(key, sizeof key, "%016" PRIx64, gn_batcher_position(run->data.train).key);
    cJSON_DeleteItemFromObjectCaseSensitive(run->state.options, "data");
    return cJSON_AddStringToObject(run->state.options, "data", key) != NULL;
}

/* In the dtype that results are saved in. */
static gn_adapter_config adapter_config(const gn_train_run *run) {
    gn_adapter_config config = *gn_trainable_adapter(run->trainable);
    config.dtype = (gn_dtype)run->o->save_dtype;
    return config;
}

gn_status gn_train_save(gn_train_run *run) {
    const gn_batch_position position = gn_batcher_position(run->data.train);
    gn_train_state *s = &run->state;
    s->epoch = position.epoch;
    s->position = position.row;
    if (!run->metrics) return GN_OK;
    if (!note_data(run)) return no_memory(run);
    const bool is_lora = gn_trainable_adapter(run->trainable) != NULL;
    const gn_adapter_config config = is_lora ? adapter_config(run) : (gn_adapter_config){0};
    const gn_checkpoint_options options = {
        .output = run->o->output, .adapter = is_lora ? &config : NULL, .limit = run->o->save_limit};
    gn_status status = gn_metrics_sync(run->metrics, &s->metrics_bytes, run->err);
    if (!status) status = gn_checkpoint_save(&options, s, run->optimizer, run->err);
    if (!status) gn_train_report_page(run);
    return status;
}

gn_status gn_train_save_result(gn_train_run *run) {
    const bool is_lora = gn_trainable_adapter(run->trainable) != NULL;
    gn_status status;
    if (!run->metrics) return GN_OK;
    char *path = gn_path_join(run->o->output, is_lora ? "adapter" : "model");
    if (!path) return no_memory(run);
    if (is_lora) {
        const gn_adapter_config config = adapter_config(run);
        status = gn_adapter_save(path, &config, run->optimizer, run->err);
    } else {
        status = gn_model_save(path, run->o->model.dir, (gn_dtype)run->o->save_dtype,
                               run->optimizer, run->err);
    }
    free(path);
    return status;
}
