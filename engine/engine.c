/* engine.c - the engine's thread and the calls that reach it.
 *
 * Any thread may submit and cancel: a submitted sequence goes into a locked inbox, and a
 * cancellation is a flag on a sequence in the locked list of all. Everything else belongs to the
 * engine's thread, which repeats: empty the inbox, drop what was canceled, one step (step.h).
 * Callbacks run on that thread with no lock held. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "engine/adapter_memory.h"
#include "engine/memory_plan.h"
#include "engine/step.h"

struct gn_engine {
    gn_model *model;
    gn_engine_options options; /* with defaults filled in */
    gn_memory_plan memory;
    gn_stepper *stepper;

    pthread_t thread;
    bool started;
    pthread_mutex_t lock; /* of all below */
    pthread_cond_t wake;
    bool stopping;
    uint64_t last_id;
    gn_sequence *newest;             /* all sequences, linked by older/newer */
    gn_sequence *inbox, *inbox_last; /* not yet seen by the thread */
    int32_t live;
    gn_engine_stats stats;
};

/* ---- the thread ---- */

static void forget_sequence(void *user, gn_sequence *s) {
    gn_engine *e = user;
    pthread_mutex_lock(&e->lock);
    if (s->newer)
        s->newer->older = s->older;
    else
        e->newest = s->older;
    if (s->older) s->older->newer = s->newer;
    e->live--;
    pthread_mutex_unlock(&e->lock);
    gn_sequence_close(s);
}

static void publish_stats(gn_engine *e) {
    pthread_mutex_lock(&e->lock);
    gn_stepper_read_stats(e->stepper, &e->stats);
    e->stats.waiting = e->live - e->stats.running;
    pthread_mutex_unlock(&e->lock);
}

static void *run(void *argument) {
    gn_engine *e = argument;
    for (bool idle = false;;) {
        pthread_mutex_lock(&e->lock);
        while (idle && !e->inbox && !e->stopping) pthread_cond_wait(&e->wake, &e->lock);
        gn_sequence *inbox = e->inbox;
        const bool stopping = e->stopping;
        e->inbox = e->inbox_last = NULL;
        pthread_mutex_unlock(&e->lock);

        for (gn_sequence *s = inbox, *next; s; s = next) {
            next = s->next;
            gn_stepper_add(e->stepper, s);
        }
        gn_stepper_cancel(e->stepper, stopping);
        if (stopping) break;
        idle = !gn_stepper_run(e->stepper);
        publish_stats(e); /* before anybody hears of the step */
        gn_stepper_report(e->stepper);
        publish_stats(e);
    }
    return NULL;
}

/* ---- open and close ---- */

static gn_status fill_defaults(gn_engine_options *o, const gn_model *model, gn_error *err) {
    const int positions = model->config.max_positions;
    const bool is_host = gn_ctx_is_host(model->ctx);
    if (o->max_seqs <= 0) o->max_seqs = 64;
    /* Products on a GPU come near their rate at some 2000 rows, and are done with them in tens of
     * milliseconds. On a CPU 512 are enough for that, and more would make others wait. */
    if (o->max_batch_tokens <= 0) o->max_batch_tokens = is_host ? 512 : 2048;
    if (o->max_batch_tokens < o->max_seqs) o->max_batch_tokens = o->max_seqs;
    /* The gap between two tokens of a reply grows with it. On a GPU 1024 rows take little more than
     * half as long as 2048, but 256 twice as long for each. */
    if (o->prefill_chunk <= 0)
        o->prefill_chunk = (int32_t)gn_max(o->max_batch_tokens / (is_host ? 8 : 2), 16);
    if (o->max_queue <= 0) o->max_queue = 1024;
    if (o->context <= 0) o->context = positions;
    if (o->context <= positions) return GN_OK;
    return gn_fail(err, GN_EINVAL, "a context of %d tokens is more than the model's %d", o->context,
                   positions);
}

static gn_status plan_memory(gn_engine *e, gn_error *err) {
    const gn_forward_options limits = {.max_rows = e->options.max_batch_tokens,
                                       .max_seqs = e->options.max_seqs,
                                       .max_logits = e->options.max_seqs,
                                       .context = e->options.context,
                                       .kv_dtype = e->options.kv_dtype};
    gn_status status = gn_memory_plan_model(&e->memory, e->model, &limits, &e->options, err);
    for (int32_t i = 0; i < e->options.n_adapters && !status; i++)
        status = gn_engine_check_adapter(e, e->options.adapters[i], err);
    e->options.adapters = NULL; /* borrowed */
    return status;
}

/* On the host adapters are used in place. A device without memory for them takes none. */
static int64_t adapter_bytes(const gn_engine *e) {
    if (gn_ctx_is_host(e->model->ctx)) return 0;
    return e->memory.adapters > 0 ? e->memory.adapters : -1;
}

static gn_status open_parts(gn_engine *e, gn_error *err) {
    gn_status status = fill_defaults(&e->options, e->model, err);
    if (!status) status = plan_memory(e, err);
    if (status) return status;
    e->stats.context = e->options.context;
    e->stats.max_seqs = e->options.max_seqs;
    const gn_stepper_options options = {
        .max_seqs = e->options.max_seqs,
        .max_rows = e->options.max_batch_tokens,
        .prefill_chunk = e->options.prefill_chunk,
        .kv_blocks = (int32_t)(e->memory.kv_tokens / GN_KV_BLOCK_TOKENS),
        .context = e->options.context,
        .kv_dtype = e->options.kv_dtype,
        .adapter_bytes = adapter_bytes(e),
        .prefix_cache = !e->options.no_prefix_cache,
        /* On the host nothing would run meanwhile, and rows too many cost time. */
        .ahead = !gn_ctx_is_host(e->model->ctx),
        .on_end = forget_sequence,
        .user = e,
    };
    status = gn_stepper_open(&e->stepper, e->model, &options, err);
    if (status) return status;
    gn_stepper_read_stats(e->stepper, &e->stats);
    if (pthread_create(&e->thread, NULL, run, e) != 0)
        return gn_fail(err, GN_ENOMEM, "cannot start the engine's thread");
    e->started = true;
    return GN_OK;
}

gn_status gn_engine_open(gn_engine **out, gn_model *model, const gn_engine_options *options,
                         gn_error *err) {
    gn_engine *e = calloc(1, sizeof *e);
    if (!e) return gn_fail(err, GN_ENOMEM, "out of memory");
    e->model = model;
    if (options) e->options = *options;
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->wake, NULL);
    const gn_status status = open_parts(e, err);
    if (status)
        gn_engine_close(e);
    else
        *out = e;
    return status;
}

void gn_engine_close(gn_engine *e) {
    if (!e) return;
    if (e->started) {
        pthread_mutex_lock(&e->lock);
        e->stopping = true;
        pthread_cond_signal(&e->wake);
        pthread_mutex_unlock(&e->lock);
        pthread_join(e->thread, NULL);
    }
    gn_stepper_close(e->stepper);
    pthread_cond_destroy(&e->wake);
    pthread_mutex_destroy(&e->lock);
    free(e);
}

/* ---- calls from other threads ---- */

gn_status gn_engine_check_adapter(const gn_engine *e, const gn_adapter *adapter, gn_error *err) {
    if (gn_ctx_is_host(e->model->ctx)) return GN_OK;
    return gn_adapter_memory_check(e->memory.adapters, adapter, err);
}

static void enqueue(gn_engine *e, gn_sequence *s) {
    s->id = ++e->last_id;
    s->older = e->newest;
    if (e->newest) e->newest->newer = s;
    e->newest = s;
    if (e->inbox_last)
        e->inbox_last->next = s;
    else
        e->inbox = s;
    e->inbox_last = s;
    e->live++;
    e->stats.requests++;
    pthread_cond_signal(&e->wake);
}

gn_status gn_engine_submit(gn_engine *e, const gn_request *request, uint64_t *id, gn_error *err) {
    gn_sequence *s;
    gn_status status = gn_sequence_open(&s, request, e->model, e->options.context, err);
    if (status) return status;
    pthread_mutex_lock(&e->lock);
    if (e->stopping)
        status = gn_fail(err, GN_ECANCELED, "the engine is stopping");
    else if (e->live >= e->options.max_seqs + e->options.max_queue)
        status = gn_fail(err, GN_EBUSY, "%d requests are waiting already; try again later",
                         e->options.max_queue);
    else
        enqueue(e, s);
    if (status == GN_OK && id) *id = s->id;
    pthread_mutex_unlock(&e->lock);
    if (status) gn_sequence_close(s);
    return status;
}

void gn_engine_cancel(gn_engine *e, uint64_t id) {
    pthread_mutex_lock(&e->lock);
    for (gn_sequence *s = e->newest; s && s->id >= id; s = s->older) {
        if (s->id == id) atomic_store(&s->canceled, true);
    }
    pthread_mutex_unlock(&e->lock);
}

gn_engine_stats gn_engine_read_stats(gn_engine *e) {
    pthread_mutex_lock(&e->lock);
    gn_engine_stats stats = e->stats;
    pthread_mutex_unlock(&e->lock);
    const gn_adapter_host_stats host = gn_adapter_host_read_stats(e->model->adapters);
    stats.adapter_host_bytes = host.bytes;
    stats.adapter_reads = host.reads;
    return stats;
}

gn_memory_plan gn_engine_memory(const gn_engine *e) {
    return e->memory;
}
