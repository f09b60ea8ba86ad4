/* step.c - steps on their way, at most two: the one whose tokens come next, and the one after. */
#include "engine/step.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/draw.h"
#include "engine/schedule.h"

/* A sequence's part in a step. */
typedef struct part {
    gn_sequence *s;     /* NULL: it has ended since */
    int32_t row0, rows; /* in the batch */
    int32_t position;   /* of the first row */
    bool complete;      /* no token of the sequence is left to compute */
    int32_t draw;       /* which of the step's draws is its; -1: none */
} part;

typedef struct flight {
    part *parts; /* (max_seqs) */
    int32_t n;   /* 0: none is on its way */
    int32_t n_drawn;
    gn_status status;
    double start;
} flight;

struct gn_stepper {
    gn_model *model;
    gn_stepper_options options;
    gn_forward *forward;
    gn_kv_pool *pool;
    gn_schedule schedule;
    gn_draw *draw;

    flight flights[2], *current, *next;
    const gn_token_prob *tokens, *tops; /* of the current one's draws */

    /* A batch: (max_rows) and (max_seqs) entries. */
    int32_t *ids, *row0, *pos0, *blocks, *use0;
    int32_t max_blocks;
    gn_adapter_use *uses;
    /* A draw: (max_seqs). */
    gn_sequence **drawing;
    int32_t *rows;

    bool failed; /* a waiting sequence's failure is set */
    gn_engine_stats stats;
    double counted; /* model_seconds go up to here */
    int64_t launched_ahead;
};

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- sequences ---- */

static void end_sequence(gn_stepper *e, gn_sequence *s) {
    gn_schedule_remove(&e->schedule, s);
    gn_draw_forget(e->draw, s);
    if (s->acquired) gn_forward_release(e->forward, s->uses, s->n_uses);
    for (int f = 0; f < 2; f++)
        for (int32_t i = 0; i < e->flights[f].n; i++)
            if (e->flights[f].parts[i].s == s) e->flights[f].parts[i].s = NULL;
    e->options.on_end(e->options.user, s);
}

static void abort_sequence(gn_stepper *e, gn_sequence *s, gn_finish finish, const gn_error *error) {
    gn_sequence_abort(s, finish, error);
    end_sequence(e, s);
}

void gn_stepper_add(gn_stepper *e, gn_sequence *s) {
    gn_schedule_add(&e->schedule, s);
}

void gn_stepper_cancel(gn_stepper *e, bool all) {
    for (gn_sequence *s = e->schedule.waiting, *next; s; s = next) {
        next = s->next;
        if (all || atomic_load(&s->canceled)) abort_sequence(e, s, GN_FINISH_CANCEL, NULL);
    }
    for (int32_t i = e->schedule.n_running - 1; i >= 0; i--) {
        gn_sequence *s = e->schedule.running[i];
        if (all || atomic_load(&s->canceled)) abort_sequence(e, s, GN_FINISH_CANCEL, NULL);
    }
}

/* ---- adapters ---- */

/* The room is released when the sequence ends. */
static gn_fetch acquire_adapters(gn_stepper *e, gn_sequence *s, bool may_take) {
    if (!may_take && !gn_forward_holds(e->forward, s->uses, s->n_uses)) return GN_FETCH_FULL;
    const gn_status status = gn_forward_acquire(e->forward, s->uses, s->n_uses, &s->failure);
    s->failure.status = status == GN_EBUSY ? GN_OK : status;
    s->acquired = !status;
    return status == GN_EBUSY ? GN_FETCH_FULL : GN_FETCH_COMING;
}

static gn_fetch fetch_adapters(void *user, gn_sequence *s, bool may_take) {
    gn_stepper *e = user;
    gn_error *failure = &s->failure;
    bool ready = false;
    gn_fetch fetched = GN_FETCH_COMING;
    if (!s->acquired && !failure->status) fetched = acquire_adapters(e, s, may_take);
    if (s->acquired && !failure->status)
        failure->status = gn_forward_poll(e->forward, s->uses, s->n_uses, &ready, failure);
    if (failure->status) {
        e->failed = true;
        return GN_FETCH_FAILED;
    }
    return ready ? GN_FETCH_READY : fetched;
}

static void fail_waiting(gn_stepper *e) {
    for (gn_sequence *s = e->schedule.waiting, *next; s; s = next) {
        next = s->next;
        if (s->failure.status) abort_sequence(e, s, GN_FINISH_ERROR, &s->failure);
    }
    e->failed = false;
}

/* Nothing can be computed before some adapter is here. */
static void pause_briefly(void) {
    const struct timespec t = {.tv_nsec = 50000};
    nanosleep(&t, NULL);
}

/* ---- launching ---- */

/* A token that is drawn but not known is named by its place in the draw. */
static void fill_ids(const gn_sequence *s, int32_t *ids) {
    const int32_t known = s->rows - (s->computed + s->rows > s->n_tokens);
    memcpy(ids, s->tokens + s->computed, (size_t)known * sizeof *ids);
    if (known < s->rows) ids[known] = -1 - s->draw;
}

static void fill_batch(gn_stepper *e, gn_batch *batch) {
    const gn_schedule *plan = &e->schedule;
    int32_t rows = 0, uses = 0;
    for (int32_t i = 0; i < plan->n_planned; i++) {
        const gn_sequence *s = plan->planned[i];
        e->row0[i] = rows;
        e->pos0[i] = s->computed;
        e->use0[i] = uses;
        fill_ids(s, e->ids + rows);
        memcpy(e->blocks + (size_t)i * (size_t)e->max_blocks, s->blocks,
               (size_t)s->n_blocks * sizeof *e->blocks);
        memcpy(e->uses + uses, s->uses, (size_t)s->n_uses * sizeof *e->uses);
        rows += s->rows;
        uses += s->n_uses;
    }
    e->row0[plan->n_planned] = rows;
    e->use0[plan->n_planned] = uses;
    const int32_t *drawn = gn_draw_ids(e->draw);
    *batch = (gn_batch){
        .rows = rows,
        .ids = e->ids,
        .drawn = drawn,
        .n_drawn = drawn ? e->options.max_seqs : 0,
        .seqs = {plan->n_planned, e->max_blocks, e->row0, e->pos0, e->blocks},
        .uses = e->uses,
        .use0 = e->use0,
    };
}

static void fill_parts(gn_stepper *e, flight *f) {
    f->n = e->schedule.n_planned;
    for (int32_t i = 0; i < f->n; i++) {
        gn_sequence *s = e->schedule.planned[i];
        f->parts[i] = (part){.s = s,
                             .row0 = e->row0[i],
                             .rows = s->rows,
                             .position = s->computed,
                             .complete = s->rows == gn_sequence_pending(s),
                             .draw = -1};
    }
}

static void count_prompt(gn_stepper *e, const gn_sequence *s) {
    if (s->computed < s->n_prompt) e->stats.prompt_tokens += s->rows;
    if (s->computed == s->cached_tokens) e->stats.cached_tokens += s->cached_tokens;
}

/* Starts to compute what is planned. */
static void launch(gn_stepper *e, flight *f) {
    gn_batch batch;
    f->start = seconds();
    f->n_drawn = 0;
    fill_batch(e, &batch);
    fill_parts(e, f);
    f->status = gn_forward_run(e->forward, &batch);
    if (f->status) return;
    for (int32_t i = 0; i < f->n; i++) {
        count_prompt(e, f->parts[i].s);
        gn_schedule_advance(&e->schedule, f->parts[i].s);
    }
}

static void launch_next(gn_stepper *e) {
    gn_schedule_plan(&e->schedule, false);
    if (e->schedule.n_planned == 0) return;
    launch(e, e->next);
    e->launched_ahead++;
}

/* ---- drawing ---- */

/* What the part's rows say about the prompt itself. */
static gn_status score_prompt(gn_stepper *e, const part *p) {
    int32_t end = p->position + p->rows;
    if (end > p->s->n_prompt - 1) end = p->s->n_prompt - 1;
    return gn_draw_score(e->draw, p->s, p->position, p->row0, end - p->position);
}

static void add_draw(gn_stepper *e, flight *f, part *p) {
    gn_sequence *s = p->s;
    const gn_status status = gn_draw_prepare(e->draw, s);
    if (status) {
        const gn_error error = {status, "out of memory for the penalties' counts"};
        abort_sequence(e, s, GN_FINISH_ERROR, &error);
        return;
    }
    p->draw = s->draw = f->n_drawn++;
    s->drawn = gn_sequence_reply(s) + 1 < s->max_tokens;
    e->drawing[p->draw] = s;
    e->rows[p->draw] = p->row0 + p->rows - 1;
}

/* Starts to draw a token for each sequence whose last row is computed. */
static gn_status draw(gn_stepper *e, flight *f) {
    for (int32_t i = 0; i < f->n; i++) {
        part *p = &f->parts[i];
        const gn_status status = p->s && p->s->prompt_probs ? score_prompt(e, p) : GN_OK;
        if (status) return status;
        if (p->s && p->complete && p->s->max_tokens > 0) add_draw(e, f, p);
    }
    return f->n_drawn ? gn_draw_start(e->draw, e->drawing, e->rows, f->n_drawn) : GN_OK;
}

/* Times do not overlap: the next step's begins when this one's ends. */
static void count_step(gn_stepper *e, const flight *f) {
    const double now = seconds();
    e->stats.steps++;
    e->stats.model_seconds += now - (f->start > e->counted ? f->start : e->counted);
    e->stats.completion_tokens += f->n_drawn;
    e->counted = now;
}

bool gn_stepper_run(gn_stepper *e) {
    flight *f = e->current;
    if (f->n == 0) {
        gn_schedule_plan(&e->schedule, true);
        if (e->schedule.n_planned == 0) {
            if (e->schedule.waiting && !e->failed) pause_briefly();
            return e->schedule.waiting != NULL;
        }
        launch(e, f);
    }
    if (!f->status) f->status = draw(e, f);
    if (!f->status && f->n_drawn > 0 && e->options.ahead) launch_next(e);
    if (!f->status)
        f->status = f->n_drawn > 0 ? gn_draw_wait(e->draw, &e->tokens, &e->tops)
                                   : gn_ctx_wait(e->model->ctx);
    count_step(e, f);
    return true;
}

/* ---- reporting ---- */

static void report_part(gn_stepper *e, const part *p) {
    gn_sequence *s = p->s;
    gn_finish finish = GN_FINISH_NONE;
    gn_schedule_publish(&e->schedule, s);
    if (p->complete && (s->prompt_probs || s->max_tokens == 0))
        finish = gn_sequence_report_prompt(s);
    if (p->draw >= 0)
        finish = gn_sequence_accept(s, e->tokens[p->draw],
                                    e->tops + (size_t)p->draw * GN_MAX_TOP_LOGPROBS);
    if (finish != GN_FINISH_NONE) end_sequence(e, s);
}

static void fail_part(gn_stepper *e, const part *p, gn_status status) {
    gn_error error = {status, ""};
    snprintf(error.message, sizeof error.message, "the model failed: %s", gn_status_text(status));
    abort_sequence(e, p->s, GN_FINISH_ERROR, &error);
}

void gn_stepper_report(gn_stepper *e) {
    flight *f = e->current;
    for (int32_t i = 0; i < f->n; i++) {
        const part *p = &f->parts[i];
        if (!p->s) continue;
        if (f->status)
            fail_part(e, p, f->status);
        else
            report_part(e, p);
    }
    f->n = 0;
    e->current = e->next;
    e->next = f;
    if (e->failed) fail_waiting(e);
}

void gn_stepper_read_stats(const gn_stepper *e, gn_engine_stats *stats) {
    stats->running = e->schedule.n_running;
    stats->kv_blocks = gn_kv_pool_size(e->pool);
    stats->kv_blocks_used = gn_kv_pool_size(e->pool) - gn_kv_pool_free(e->pool);
    stats->kv_blocks_cached = gn_kv_pool_cached(e->pool);
    stats->kv_block_tokens = GN_KV_BLOCK_TOKENS;
    stats->prompt_tokens = e->stats.prompt_tokens;
    stats->cached_tokens = e->stats.cached_tokens;
    stats->completion_tokens = e->stats.completion_tokens;
    stats->steps = e->stats.steps;
    stats->model_seconds = e->stats.model_seconds;
}

int64_t gn_stepper_launched_ahead(const gn_stepper *e) {
    return e->launched_ahead;
}

/* ---- open and close ---- */

static bool allocate(gn_stepper *e) {
    const size_t seqs = (size_t)e->options.max_seqs, rows = (size_t)e->options.max_rows;
    e->max_blocks = e->options.context / GN_KV_BLOCK_TOKENS + 1;
    for (int f = 0; f < 2; f++) e->flights[f].parts = malloc(seqs * sizeof(part));
    e->ids = malloc(rows * sizeof *e->ids);
    e->row0 = malloc((seqs + 1) * sizeof *e->row0);
    e->use0 = malloc((seqs + 1) * sizeof *e->use0);
    e->pos0 = malloc(seqs * sizeof *e->pos0);
    e->blocks = calloc(seqs * (size_t)e->max_blocks, sizeof *e->blocks);
    e->uses = malloc(seqs * GN_MAX_ADAPTERS * sizeof *e->uses);
    e->drawing = malloc(seqs * sizeof *e->drawing);
    e->rows = malloc(seqs * sizeof *e->rows);
    return e->flights[0].parts && e->flights[1].parts && e->ids && e->row0 && e->use0 && e->pos0 &&
           e->blocks && e->uses && e->drawing && e->rows;
}

static gn_status open_parts(gn_stepper *e, gn_error *err) {
    const gn_stepper_options *o = &e->options;
    const gn_forward_options limits = {.max_rows = o->max_rows,
                                       .max_seqs = o->max_seqs,
                                       .max_logits = o->max_seqs,
                                       .kv_blocks = o->kv_blocks,
                                       .context = o->context,
                                       .kv_dtype = o->kv_dtype,
                                       .adapter_bytes = o->adapter_bytes};
    gn_status status = gn_forward_open(&e->forward, e->model, &limits, err);
    if (status) return status;
    status = gn_draw_open(&e->draw, e->model, e->forward, o->max_seqs);
    if (!status) status = gn_kv_pool_open(&e->pool, o->kv_blocks, o->prefix_cache);
    if (!status)
        status =
            gn_schedule_open(&e->schedule, e->pool, o->max_seqs, o->max_rows, o->prefill_chunk);
    e->schedule.fetch = fetch_adapters;
    e->schedule.user = e;
    if (!status && !allocate(e)) status = GN_ENOMEM;
    return status ? gn_fail(err, status, "%s", gn_status_text(status)) : GN_OK;
}

gn_status gn_stepper_open(gn_stepper **out, gn_model *model, const gn_stepper_options *options,
                          gn_error *err) {
    gn_stepper *e = calloc(1, sizeof *e);
    if (!e) return gn_fail(err, GN_ENOMEM, "out of memory");
    e->model = model;
    e->options = *options;
    e->current = &e->flights[0];
    e->next = &e->flights[1];
    const gn_status status = open_parts(e, err);
    if (status) {
        gn_stepper_close(e);
        return status;
    }
    e->options.ahead &= gn_draw_ids(e->draw) != NULL;
    *out = e;
    return GN_OK;
}

void gn_stepper_close(gn_stepper *e) {
    if (!e) return;
    gn_schedule_close(&e->schedule);
    gn_kv_pool_close(e->pool);
    gn_draw_close(e->draw);
    gn_forward_close(e->forward);
    void *arrays[] = {e->ids, e->row0, e->use0, e->pos0, e->blocks, e->uses, e->drawing, e->rows};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) free(arrays[i]);
    for (int f = 0; f < 2; f++) free(e->flights[f].parts);
    free(e);
}
