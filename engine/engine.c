/* engine.c - the engine's thread and the calls that reach it.
 *
 * Any thread may submit and cancel: a submitted sequence goes into a locked inbox, and a
 * cancellation is a flag on a sequence in the locked list of all. Everything else belongs to the
 * engine's thread, which repeats one step: empty the inbox, drop what was canceled, plan, run the
 * model, sample, report. Callbacks run on that thread with no lock held. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/schedule.h"

struct gn_engine {
    gn_model *model;
    gn_engine_options options; /* with defaults filled in */
    gn_forward *forward;
    gn_kv_pool *pool;
    gn_schedule schedule;

    /* One step's batch: (max_batch_tokens) and (max_seqs) entries. */
    int32_t *ids, *row0, *pos0, *blocks, *use0, *rows;
    int32_t max_blocks, max_logits;
    gn_adapter_use *uses;
    gn_sequence **sampled;
    gn_token_prob *tokens, *tops; /* tops: (max_seqs, GN_MAX_TOP_LOGPROBS) */

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

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- one step ---- */

static void end_sequence(gn_engine *e, gn_sequence *s) {
    gn_schedule_remove(&e->schedule, s);
    for (int i = 0; i < s->n_acquired; i++) gn_forward_release(e->forward, s->uses[i].adapter);
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

static void fill_batch(gn_engine *e, gn_batch *batch) {
    const gn_schedule *plan = &e->schedule;
    int32_t rows = 0, uses = 0;
    for (int32_t i = 0; i < plan->n_planned; i++) {
        const gn_sequence *s = plan->planned[i];
        e->row0[i] = rows;
        e->pos0[i] = s->computed;
        e->use0[i] = uses;
        memcpy(e->ids + rows, s->tokens + s->computed, (size_t)s->rows * sizeof *e->ids);
        memcpy(e->blocks + (size_t)i * (size_t)e->max_blocks, s->blocks,
               (size_t)s->n_blocks * sizeof *e->blocks);
        memcpy(e->uses + uses, s->uses, (size_t)s->n_uses * sizeof *e->uses);
        rows += s->rows;
        uses += s->n_uses;
    }
    e->row0[plan->n_planned] = rows;
    e->use0[plan->n_planned] = uses;
    *batch = (gn_batch){
        .rows = rows,
        .ids = e->ids,
        .seqs = {plan->n_planned, e->max_blocks, e->row0, e->pos0, e->blocks},
        .uses = e->uses,
        .use0 = e->use0,
    };
}

/* What the prompt's rows of this step say about the prompt itself, max_logits rows at a time. */
static gn_status score_prompt(gn_engine *e, gn_sequence *s, int32_t row0) {
    const int vocab = e->model->config.vocab;
    int32_t end = s->computed + s->rows;
    if (end > s->n_prompt - 1) end = s->n_prompt - 1;
    for (int32_t at = s->computed, n; at < end; at += n) {
        n = end - at < e->max_logits ? end - at : e->max_logits;
        for (int32_t i = 0; i < n; i++) e->rows[i] = row0 + at - s->computed + i;
        const float *logits;
        const gn_status status = gn_forward_logits(e->forward, e->rows, n, &logits);
        if (status) return status;
#pragma omp parallel for num_threads(gn_ctx_threads(e->model->ctx))
        for (int32_t i = 0; i < n; i++)
            gn_sequence_score_prompt(s, at + i, logits + (size_t)i * (size_t)vocab, vocab);
    }
    return GN_OK;
}

static gn_status score_prompts(gn_engine *e) {
    for (int32_t i = 0; i < e->schedule.n_planned; i++) {
        gn_sequence *s = e->schedule.planned[i];
        const gn_status status = s->prompt_probs ? score_prompt(e, s, e->row0[i]) : GN_OK;
        if (status) return status;
    }
    return GN_OK;
}

/* Draws a token for each sequence whose last row was computed; returns how many. */
static gn_status sample(gn_engine *e, int32_t *n_sampled) {
    const int vocab = e->model->config.vocab;
    int32_t n = 0;
    for (int32_t i = 0; i < e->schedule.n_planned; i++) {
        gn_sequence *s = e->schedule.planned[i];
        if (s->rows < gn_sequence_pending(s) || s->max_tokens == 0) continue;
        e->rows[n] = e->row0[i] + s->rows - 1;
        e->sampled[n++] = s;
    }
    *n_sampled = n;
    if (n == 0) return GN_OK;
    const float *logits;
    const gn_status status = gn_forward_logits(e->forward, e->rows, n, &logits);
    if (status) return status;
#pragma omp parallel for schedule(dynamic) num_threads(gn_ctx_threads(e->model->ctx))
    for (int32_t i = 0; i < n; i++)
        e->tokens[i] = gn_sequence_sample(e->sampled[i], logits + (size_t)i * (size_t)vocab, vocab,
                                          e->tops + (size_t)i * GN_MAX_TOP_LOGPROBS);
    return GN_OK;
}

/* Reports the step: prompts that are complete, then the sampled tokens. */
static void report(gn_engine *e, int32_t n_sampled) {
    int32_t sampled = 0;
    for (int32_t i = 0; i < e->schedule.n_planned; i++) {
        gn_sequence *s = e->schedule.planned[i];
        const bool complete = s->rows == gn_sequence_pending(s);
        gn_schedule_advance(&e->schedule, s);
        if (!complete) continue;
        gn_finish finish = GN_FINISH_NONE;
        if (s->prompt_probs || s->max_tokens == 0) finish = gn_sequence_report_prompt(s);
        if (sampled < n_sampled && e->sampled[sampled] == s) {
            finish = gn_sequence_accept(s, e->tokens[sampled],
                                        e->tops + (size_t)sampled * GN_MAX_TOP_LOGPROBS);
            sampled++;
        }
        if (finish != GN_FINISH_NONE) end_sequence(e, s);
    }
}

static void fail_planned(gn_engine *e, gn_status status) {
    gn_error error = {status, ""};
    snprintf(error.message, sizeof error.message, "the model failed: %s", gn_status_text(status));
    for (int32_t i = 0; i < e->schedule.n_planned; i++) {
        gn_sequence_abort(e->schedule.planned[i], GN_FINISH_ERROR, &error);
        end_sequence(e, e->schedule.planned[i]);
    }
}

static void count_step(gn_engine *e, double start, int32_t n_sampled) {
    const double elapsed = seconds() - start;
    int64_t prompt = 0, cached = 0;
    for (int32_t i = 0; i < e->schedule.n_planned; i++) {
        const gn_sequence *s = e->schedule.planned[i];
        if (s->computed < s->n_prompt) prompt += s->rows;
        if (s->computed == s->cached_tokens) cached += s->cached_tokens;
    }
    pthread_mutex_lock(&e->lock);
    e->stats.steps++;
    e->stats.model_seconds += elapsed;
    e->stats.prompt_tokens += prompt;
    e->stats.cached_tokens += cached;
    e->stats.completion_tokens += n_sampled;
    pthread_mutex_unlock(&e->lock);
}

static void publish_counts(gn_engine *e) {
    pthread_mutex_lock(&e->lock);
    e->stats.running = e->schedule.n_running;
    e->stats.waiting = e->live - e->schedule.n_running;
    e->stats.kv_blocks_cached = gn_kv_pool_cached(e->pool);
    e->stats.kv_blocks_used = gn_kv_pool_size(e->pool) - gn_kv_pool_free(e->pool);
    pthread_mutex_unlock(&e->lock);
}

/* False when there was nothing to do. */
static bool step(gn_engine *e) {
    gn_schedule_plan(&e->schedule);
    if (e->schedule.n_planned == 0) return false;
    const double start = seconds();
    gn_batch batch;
    int32_t n_sampled = 0;
    fill_batch(e, &batch);
    gn_status status = gn_forward_run(e->forward, &batch);
    if (!status) status = score_prompts(e);
    if (!status) status = sample(e, &n_sampled);
    count_step(e, start, n_sampled);
    if (status)
        fail_planned(e, status);
    else
        report(e, n_sampled);
    return true;
}

/* ---- the thread ---- */

/* Whatever is acquired is released in end_sequence; s->n_acquired counts. */
static gn_status acquire_adapters(gn_engine *e, gn_sequence *s) {
    while (s->n_acquired < s->n_uses) {
        const gn_status status = gn_forward_acquire(e->forward, s->uses[s->n_acquired].adapter);
        if (status) return status;
        s->n_acquired++;
    }
    return GN_OK;
}

static void accept_inbox(gn_engine *e, gn_sequence *inbox) {
    for (gn_sequence *s = inbox, *next; s; s = next) {
        next = s->next;
        const gn_status status = acquire_adapters(e, s);
        if (status == GN_OK) {
            gn_schedule_add(&e->schedule, s);
            continue;
        }
        const gn_error error = {status, "out of memory for the adapter"};
        gn_sequence_abort(s, GN_FINISH_ERROR, &error);
        end_sequence(e, s);
    }
}

static void drop_canceled(gn_engine *e, bool all) {
    for (gn_sequence *s = e->schedule.waiting, *next; s; s = next) {
        next = s->next;
        if (!all && !atomic_load(&s->canceled)) continue;
        gn_sequence_abort(s, GN_FINISH_CANCEL, NULL);
        end_sequence(e, s);
    }
    for (int32_t i = e->schedule.n_running - 1; i >= 0; i--) {
        gn_sequence *s = e->schedule.running[i];
        if (!all && !atomic_load(&s->canceled)) continue;
        gn_sequence_abort(s, GN_FINISH_CANCEL, NULL);
        end_sequence(e, s);
    }
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

        accept_inbox(e, inbox);
        drop_canceled(e, stopping);
        if (stopping) break;
        idle = !step(e);
        publish_counts(e);
    }
    return NULL;
}

/* ---- open and close ---- */

static gn_status fill_defaults(gn_engine_options *o, const gn_model *model, int32_t *kv_blocks,
                               gn_error *err) {
    const int positions = model->config.max_positions;
    if (o->max_seqs <= 0) o->max_seqs = 64;
    if (o->max_batch_tokens <= 0) o->max_batch_tokens = 512;
    if (o->max_batch_tokens < o->max_seqs) o->max_batch_tokens = o->max_seqs;
    if (o->max_queue <= 0) o->max_queue = 1024;
    if (o->kv_bytes <= 0) o->kv_bytes = (int64_t)1 << 30;
    if (o->context <= 0) o->context = positions;
    if (o->context > positions)
        return gn_fail(err, GN_EINVAL, "a context of %d tokens is more than the model's %d",
                       o->context, positions);
    const int64_t block = (int64_t)gn_forward_kv_block_bytes(model);
    const int64_t per_seq = (o->context + GN_KV_BLOCK_TOKENS - 1) / GN_KV_BLOCK_TOKENS;
    int64_t blocks = o->kv_bytes / block;
    if (blocks < per_seq)
        return gn_fail(err, GN_EINVAL,
                       "a KV cache of %.1f MiB does not hold one context of %d tokens, which takes "
                       "%.1f MiB; give it more memory or a shorter context",
                       (double)o->kv_bytes / 0x1p20, o->context,
                       (double)(per_seq * block) / 0x1p20);
    if (blocks > per_seq * o->max_seqs) blocks = per_seq * o->max_seqs;
    *kv_blocks = (int32_t)blocks;
    return GN_OK;
}

static bool allocate_batch(gn_engine *e) {
    const size_t seqs = (size_t)e->options.max_seqs, rows = (size_t)e->options.max_batch_tokens;
    e->ids = malloc(rows * sizeof *e->ids);
    e->rows = malloc(rows * sizeof *e->rows);
    e->row0 = malloc((seqs + 1) * sizeof *e->row0);
    e->use0 = malloc((seqs + 1) * sizeof *e->use0);
    e->pos0 = malloc(seqs * sizeof *e->pos0);
    e->blocks = calloc(seqs * (size_t)e->max_blocks, sizeof *e->blocks);
    e->uses = malloc(seqs * GN_MAX_ADAPTERS * sizeof *e->uses);
    e->sampled = malloc(seqs * sizeof *e->sampled);
    e->tokens = malloc(seqs * sizeof *e->tokens);
    e->tops = malloc(seqs * GN_MAX_TOP_LOGPROBS * sizeof *e->tops);
    return e->ids && e->rows && e->row0 && e->use0 && e->pos0 && e->blocks && e->uses &&
           e->sampled && e->tokens && e->tops;
}

static gn_status open_parts(gn_engine *e, gn_error *err) {
    int32_t kv_blocks = 0;
    gn_status status = fill_defaults(&e->options, e->model, &kv_blocks, err);
    if (status) return status;
    e->max_logits = e->options.max_seqs;
    e->max_blocks = e->options.context / GN_KV_BLOCK_TOKENS + 1;
    e->stats.kv_blocks = kv_blocks;
    e->stats.kv_block_tokens = GN_KV_BLOCK_TOKENS;
    e->stats.context = e->options.context;
    e->stats.max_seqs = e->options.max_seqs;
    const gn_forward_options limits = {.max_rows = e->options.max_batch_tokens,
                                       .max_seqs = e->options.max_seqs,
                                       .max_logits = e->max_logits,
                                       .kv_blocks = kv_blocks,
                                       .context = e->options.context};
    status = gn_forward_open(&e->forward, e->model, &limits, err);
    if (status) return status;
    if (gn_kv_pool_open(&e->pool, kv_blocks, !e->options.no_prefix_cache) != GN_OK ||
        gn_schedule_open(&e->schedule, e->pool, e->options.max_seqs, e->options.max_batch_tokens) !=
            GN_OK ||
        !allocate_batch(e))
        return gn_fail(err, GN_ENOMEM, "out of memory");
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
    gn_schedule_close(&e->schedule);
    gn_kv_pool_close(e->pool);
    gn_forward_close(e->forward);
    void *arrays[] = {e->ids,  e->rows, e->row0,    e->use0,   e->pos0,
                      e->uses, e->tops, e->sampled, e->tokens, e->blocks};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) free(arrays[i]);
    pthread_cond_destroy(&e->wake);
    pthread_mutex_destroy(&e->lock);
    free(e);
}

/* ---- calls from other threads ---- */

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
    const gn_engine_stats stats = e->stats;
    pthread_mutex_unlock(&e->lock);
    return stats;
}
