/* adapters.c - POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them.
 *
 * Files are read on a worker thread; the name changes hands on the loop's thread, at once for
 * every request that comes later. Requests that run keep the adapter they began with. When two
 * loads of one name overlap, the one that ends first wins, and the other is refused unless it said
 * load_inplace. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "server/json.h"
#include "server/routes.h"
#include "server/state.h"

typedef struct load_job {
    uv_work_t work;
    gn_server *server;
    gn_exchange *exchange; /* NULL: the client left */
    char *name, *dir;
    bool replace;
    gn_adapter *adapter;
    gn_error error;
} load_job;

static void free_job(load_job *job) {
    if (!job) return;
    free(job->name);
    free(job->dir);
    gn_adapter_close(job->adapter);
    free(job);
}

static bool may_load(gn_exchange *x) {
    const gn_server_options *o = &x->server->options;
    if (o->allow_adapter_loading && o->adapter_dir) return true;
    return gn_http_fail(&x->refusal, 403, "adapter_loading_off", "",
                        "Adapters cannot be changed over HTTP; start the server with "
                        "--allow-adapter-loading and --adapter-dir DIR to allow it.");
}

static bool check_name(gn_exchange *x, const char *name, bool replace) {
    const gn_server *s = x->server;
    gn_http_error *e = &x->refusal;
    if (!name || !*name)
        return gn_http_fail(e, 400, NULL, "lora_name", "lora_name must be a name.");
    if (!gn_registry_name_ok(name))
        return gn_http_fail(e, 400, NULL, "lora_name",
                            "lora_name may have 1 to 128 letters, digits and . _ - : / +.");
    if (strcmp(name, s->model_name) == 0)
        return gn_http_fail(e, 400, NULL, "lora_name", "\"%s\" is the base's name.", name);
    if (!replace && gn_registry_find(&s->registry, name))
        return gn_http_fail(e, 400, "adapter_exists", "lora_name",
                            "The lora adapter '%s' has already been loaded. Unload it first, or "
                            "give \"load_inplace\": true.",
                            name);
    return true;
}

static void respond_text(gn_exchange *x, const char *name, const char *done) {
    char text[256];
    const int n =
        snprintf(text, sizeof text, "Success: LoRA adapter '%s' %s successfully.", name, done);
    gn_respond(x, 200, "text/plain; charset=utf-8", NULL, text, (size_t)n);
}

/* ---- load ---- */

static void read_files(uv_work_t *work) {
    load_job *job = work->data;
    gn_status status = gn_adapter_open(&job->adapter, job->server->model, job->dir, &job->error);
    if (!status) status = gn_engine_check_adapter(job->server->engine, job->adapter, &job->error);
    job->error.status = status;
}

static void install(load_job *job) {
    gn_exchange *x = job->exchange;
    gn_adapter *adapter = job->adapter;
    if (job->error.status) {
        const bool missing = job->error.status == GN_ENOENT;
        gn_http_fail(&x->refusal, missing ? 404 : 400, missing ? "not_found" : "bad_adapter",
                     "lora_path", "%s", job->error.message);
        return;
    }
    if (!check_name(x, job->name, job->replace)) return;
    job->adapter = NULL;
    if (gn_registry_put(&x->server->registry, job->name, job->dir, adapter, (int64_t)time(NULL)))
        gn_http_no_memory(&x->refusal);
}

static void files_were_read(uv_work_t *work, int canceled) {
    load_job *job = work->data;
    gn_exchange *x = job->exchange;
    gn_server *s = job->server;
    if (canceled) job->error.status = gn_fail(&job->error, GN_ECANCELED, "shutting down");
    if (x) {
        install(job);
        if (x->refusal.status)
            gn_respond_error(x, &x->refusal);
        else
            respond_text(x, job->name, "added");
    }
    free_job(job);
    gn_connections_flush(s);
}

static void on_abort(void *user) {
    load_job *job = user;
    job->exchange = NULL;
}

static void start_load(gn_exchange *x, const char *name, const char *path, bool replace) {
    gn_error err = {0};
    load_job *job = calloc(1, sizeof *job);
    if (job) {
        job->name = strdup(name);
        const gn_status status =
            gn_path_below(&job->dir, x->server->options.adapter_dir, path, &err);
        if (status) gn_http_fail_with(&x->refusal, "lora_path", &err);
    }
    if (!job || !job->name) gn_http_no_memory(&x->refusal);
    if (!x->refusal.status) {
        job->server = x->server;
        job->exchange = x;
        job->replace = replace;
        job->work.data = job;
        x->on_abort = on_abort;
        x->user = job;
        if (uv_queue_work(&x->server->loop, &job->work, read_files, files_were_read) == 0) return;
        gn_http_no_memory(&x->refusal);
    }
    free_job(job);
    gn_respond_error(x, &x->refusal);
}

void gn_post_load_adapter(gn_exchange *x) {
    static const char *const fields[] = {"lora_name", "lora_path", "load_inplace"};
    cJSON *json = may_load(x) ? gn_json_body(x) : NULL;
    const gn_json j = {json, &x->refusal};
    const char *name = NULL, *path = NULL;
    bool replace = false;
    if (json) {
        gn_json_known(&j, fields, 3, NULL, 0);
        gn_json_string(&j, "lora_name", &name);
        gn_json_string(&j, "lora_path", &path);
        gn_json_bool(&j, "load_inplace", &replace);
        if (!j.error->status) check_name(x, name, replace);
        if (!path || !*path)
            gn_http_fail(j.error, 400, NULL, "lora_path", "lora_path must be a folder's path.");
    }
    if (x->refusal.status)
        gn_respond_error(x, &x->refusal);
    else
        start_load(x, name, path, replace);
    cJSON_Delete(json);
}

/* ---- unload ---- */

void gn_post_unload_adapter(gn_exchange *x) {
    static const char *const fields[] = {"lora_name"}, *const ignored[] = {"lora_int_id"};
    cJSON *json = may_load(x) ? gn_json_body(x) : NULL;
    const gn_json j = {json, &x->refusal};
    const char *name = NULL;
    if (json) {
        gn_json_known(&j, fields, 1, ignored, 1);
        gn_json_string(&j, "lora_name", &name);
        if (!name || !*name)
            gn_http_fail(j.error, 400, NULL, "lora_name", "lora_name must be a name.");
        else if (!x->refusal.status && !gn_registry_remove(&x->server->registry, name))
            gn_http_fail(j.error, 404, "not_found", "lora_name",
                         "The lora adapter '%.128s' cannot be found.", name);
    }
    if (x->refusal.status)
        gn_respond_error(x, &x->refusal);
    else
        respond_text(x, name, "removed");
    cJSON_Delete(json);
}
