/* sequence.c - from a request to a sequence, and from sampled tokens to events. */
#include "engine/sequence.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/adapter.h"

static gn_status check_tokens(const char *what, const int32_t *ids, int32_t n, int vocab,
                              gn_error *err) {
    for (int32_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= vocab)
            return gn_fail(err, GN_EINVAL,
                           "%s: token %d at index %d is outside the vocabulary of %d", what, ids[i],
                           i, vocab);
    }
    return GN_OK;
}

/* Samplers edit so many logits of a row and no more; those that stop ids take while they are banned
 * are counted. */
static gn_status check_edits(const gn_request *r, const gn_config *c, gn_error *err) {
    const int64_t eos = r->ignore_eos ? 0 : c->n_eos;
    const int64_t banned = r->min_tokens > 0 ? eos + r->n_stop_ids : 0;
    if (r->sampling.n_bias + banned <= GN_SAMPLE_MAX_EDITS) return GN_OK;
    return gn_fail(err, GN_EINVAL,
                   "logit_bias has %d entries, and min_tokens bans %d stop tokens; together they "
                   "may be %d",
                   r->sampling.n_bias, (int)banned, GN_SAMPLE_MAX_EDITS);
}

static gn_status check_request(const gn_request *r, const gn_model *model, int32_t context,
                               gn_error *err) {
    const int vocab = model->config.vocab;
    if (r->n_prompt < 1) return gn_fail(err, GN_EINVAL, "the prompt is empty");
    if (r->n_prompt > context || (r->n_prompt == context && r->max_tokens != 0))
        return gn_fail(err, GN_ETOOBIG, "the prompt has %d tokens, and the context is %d%s",
                       r->n_prompt, context,
                       r->n_prompt == context ? ", which leaves none for a reply" : "");
    if (r->max_tokens < -1)
        return gn_fail(err, GN_EINVAL, "max_tokens is %d; it must be at least 0", r->max_tokens);
    if (r->min_tokens < 0)
        return gn_fail(err, GN_EINVAL, "min_tokens is %d; it must be at least 0", r->min_tokens);
    if (r->logprobs < -1 || r->logprobs > GN_MAX_TOP_LOGPROBS)
        return gn_fail(err, GN_EINVAL, "logprobs is %d; it must be 0 to %d", r->logprobs,
                       GN_MAX_TOP_LOGPROBS);
    if (r->n_adapters < 0 || r->n_adapters > GN_MAX_ADAPTERS)
        return gn_fail(err, GN_EINVAL, "%d adapters; a request may have up to %d", r->n_adapters,
                       GN_MAX_ADAPTERS);
    for (int i = 0; i < r->n_adapters; i++) {
        if (!isfinite(r->adapters[i].scale))
            return gn_fail(err, GN_EINVAL, "adapters[%d].scale is not finite", i);
    }
    if (r->n_stop && !model->tokenizer)
        return gn_fail(err, GN_EINVAL, "stop strings need a tokenizer, and this model has none");
    gn_status status = check_tokens("prompt", r->prompt, r->n_prompt, vocab, err);
    if (!status) status = check_tokens("stop_token_ids", r->stop_ids, r->n_stop_ids, vocab, err);
    return status ? status : check_edits(r, &model->config, err);
}

static bool copy_stop_ids(gn_sequence *s, const gn_request *r, const gn_config *c) {
    s->stop_ids = malloc((size_t)(c->n_eos + r->n_stop_ids + 1) * sizeof *s->stop_ids);
    if (!s->stop_ids) return false;
    memcpy(s->stop_ids, c->eos, (size_t)c->n_eos * sizeof *s->stop_ids);
    if (r->n_stop_ids)
        memcpy(s->stop_ids + c->n_eos, r->stop_ids, (size_t)r->n_stop_ids * sizeof *s->stop_ids);
    s->n_eos = c->n_eos;
    s->n_stop_ids = c->n_eos + r->n_stop_ids;
    return true;
}

static void take_adapters(gn_sequence *s, const gn_request *r) {
    s->adapters = (gn_hash)GN_HASH_INIT;
    for (int i = 0; i < r->n_adapters; i++) {
        s->uses[s->n_uses] = r->adapters[i];
        gn_adapter_ref(s->uses[s->n_uses].adapter);
        gn_hash_add(&s->adapters, s->uses[s->n_uses].adapter->hash, sizeof(uint64_t[2]));
        gn_hash_add(&s->adapters, &s->uses[s->n_uses].scale, sizeof(float));
        s->n_uses++;
    }
}

static gn_status allocate(gn_sequence *s, const gn_request *r, const gn_model *model) {
    const size_t capacity = (size_t)r->n_prompt + (size_t)s->max_tokens;
    s->tokens = malloc(capacity * sizeof *s->tokens);
    s->blocks = malloc((capacity / GN_KV_BLOCK_TOKENS + 1) * sizeof *s->blocks);
    if (!s->tokens || !s->blocks || !copy_stop_ids(s, r, &model->config)) return GN_ENOMEM;
    memcpy(s->tokens, r->prompt, (size_t)r->n_prompt * sizeof *s->tokens);
    if (r->prompt_logprobs) {
        const size_t n = (size_t)r->n_prompt, top = r->logprobs > 0 ? (size_t)r->logprobs : 0;
        s->prompt_probs = calloc(n, sizeof *s->prompt_probs);
        s->prompt_top = calloc(n * top + 1, sizeof *s->prompt_top);
        if (!s->prompt_probs || !s->prompt_top) return GN_ENOMEM;
        s->prompt_probs[0] = (gn_token_prob){r->prompt[0], NAN};
    }
    return GN_OK;
}

gn_status gn_sequence_open(gn_sequence **out, const gn_request *r, const gn_model *model,
                           int32_t context, gn_error *err) {
    gn_status status = check_request(r, model, context, err);
    if (status) return status;
    gn_sequence *s = calloc(1, sizeof *s);
    if (!s) return gn_fail(err, GN_ENOMEM, "out of memory");
    const int32_t room = context - r->n_prompt;
    s->n_prompt = s->n_tokens = r->n_prompt;
    s->max_tokens = r->max_tokens < 0 || r->max_tokens > room ? room : r->max_tokens;
    s->min_tokens = r->min_tokens;
    s->logprobs = r->logprobs;
    s->counts = GN_SAMPLE_NO_COUNTS;
    s->ignore_eos = r->ignore_eos;
    s->on_event = r->on_event;
    s->user = r->user;
    take_adapters(s, r);
    status = allocate(s, r, model);
    if (status) gn_fail(err, status, "out of memory");
    if (!status) status = gn_sampler_open(&s->sampler, &r->sampling, model->config.vocab, err);
    if (!status && model->tokenizer) {
        status = gn_detokenizer_open(&s->detokenizer, model->tokenizer, r->stop, r->n_stop,
                                     r->strip_space);
        if (status) gn_fail(err, status, "stop: strings must not be empty");
    }
    if (status) {
        gn_sequence_close(s);
        return status;
    }
    for (int32_t i = 0; i < s->n_prompt; i++) gn_sampler_accept(s->sampler, s->tokens[i], false);
    *out = s;
    return GN_OK;
}

void gn_sequence_close(gn_sequence *s) {
    if (!s) return;
    for (int i = 0; i < s->n_uses; i++) gn_adapter_close(s->uses[i].adapter);
    gn_sampler_close(s->sampler);
    gn_detokenizer_close(s->detokenizer);
    free(s->tokens);
    free(s->blocks);
    free(s->prompt_probs);
    free(s->prompt_top);
    free(s->stop_ids);
    free(s);
}

static gn_event event_of(const gn_sequence *s) {
    return (gn_event){.id = s->id,
                      .text = "",
                      .prompt_tokens = s->n_prompt,
                      .cached_tokens = s->cached_tokens,
                      .completion_tokens = gn_sequence_reply(s)};
}

/* The ids that end the reply; a request that ignores EOS has only its own. */
static const int32_t *stop_ids(const gn_sequence *s, int32_t *n) {
    const int32_t skip = s->ignore_eos ? s->n_eos : 0;
    *n = s->n_stop_ids - skip;
    return s->stop_ids + skip;
}

/* Those that must not be sampled next. */
static const int32_t *banned_ids(const gn_sequence *s, int32_t *n) {
    const int32_t *ids = stop_ids(s, n);
    if (gn_sequence_reply(s) >= s->min_tokens) *n = 0;
    return ids;
}

gn_token_prob gn_sequence_sample(gn_sequence *s, const float *logits, int vocab,
                                 gn_token_prob *top) {
    int32_t n_banned = 0;
    const int32_t *banned = banned_ids(s, &n_banned);
    gn_token_prob token = {
        gn_sampler_draw(s->sampler, logits, gn_sequence_reply(s), banned, n_banned), 0};
    if (s->logprobs >= 0) token.logprob = gn_logprob(logits, vocab, token.id);
    if (s->logprobs > 0) gn_top_logprobs(logits, vocab, s->logprobs, top);
    return token;
}

gn_sample_row gn_sequence_row(const gn_sequence *s) {
    gn_sample_row row = gn_sampler_row(s->sampler);
    row.step = gn_sequence_reply(s);
    row.banned = banned_ids(s, &row.n_banned);
    row.counts = s->counts;
    row.logprob = s->logprobs >= 0;
    row.n_top = s->logprobs > 0 ? s->logprobs : 0;
    return row;
}

/* Feeds the detokenizer; returns STOP when a stop string is complete. */
static gn_finish feed(gn_sequence *s, int32_t id, gn_event *event) {
    bool stopped = false;
    if (!s->detokenizer) {
        event->text = s->id_text;
        event->text_len = (size_t)snprintf(s->id_text, sizeof s->id_text, " %d", id);
        return GN_FINISH_NONE;
    }
    if (gn_detokenizer_feed(s->detokenizer, id, &event->text, &event->text_len, &stopped))
        return GN_FINISH_ERROR;
    return stopped ? GN_FINISH_STOP : GN_FINISH_NONE;
}

static bool is_stop_id(const gn_sequence *s, int32_t id) {
    int32_t n = 0;
    const int32_t *ids = stop_ids(s, &n);
    for (int32_t i = 0; i < n; i++) {
        if (ids[i] == id) return true;
    }
    return false;
}

gn_finish gn_sequence_accept(gn_sequence *s, gn_token_prob token, const gn_token_prob *top) {
    static const gn_error no_memory = {GN_ENOMEM, "out of memory while decoding the reply"};
    s->tokens[s->n_tokens++] = token.id;
    s->drawn = 0;
    gn_sampler_accept(s->sampler, token.id, true);
    gn_event event = event_of(s);
    event.has_token = true;
    event.token = token;
    event.n_top = s->logprobs > 0 ? s->logprobs : 0;
    event.top = top;

    const bool stop_id = is_stop_id(s, token.id);
    gn_finish finish = stop_id ? GN_FINISH_STOP : feed(s, token.id, &event);
    if (finish == GN_FINISH_NONE && gn_sequence_reply(s) >= s->max_tokens)
        finish = GN_FINISH_LENGTH;
    if (finish == GN_FINISH_ERROR) event.error = &no_memory;
    const bool flush = s->detokenizer && (stop_id || finish == GN_FINISH_LENGTH);
    if (!flush) {
        event.finish = finish;
        s->on_event(s->user, &event);
        return finish;
    }
    /* Two events, because the token's text and the text held back are borrowed one at a time. */
    s->on_event(s->user, &event);
    gn_event last = event_of(s);
    last.finish = finish;
    if (gn_detokenizer_flush(s->detokenizer, &last.text, &last.text_len)) {
        last.finish = GN_FINISH_ERROR;
        last.error = &no_memory;
    }
    s->on_event(s->user, &last);
    return last.finish;
}

void gn_sequence_score_prompt(gn_sequence *s, int32_t position, const float *logits, int vocab) {
    const int32_t next = position + 1;
    s->prompt_probs[next] =
        (gn_token_prob){s->tokens[next], gn_logprob(logits, vocab, s->tokens[next])};
    if (s->logprobs > 0)
        gn_top_logprobs(logits, vocab, s->logprobs,
                        s->prompt_top + (size_t)next * (size_t)s->logprobs);
}

gn_finish gn_sequence_report_prompt(gn_sequence *s) {
    gn_event event = event_of(s);
    event.n_prompt = s->prompt_probs ? s->n_prompt : 0;
    event.prompt = s->prompt_probs;
    event.prompt_top = s->prompt_top;
    event.n_top = s->logprobs > 0 ? s->logprobs : 0;
    event.finish = s->max_tokens == 0 ? GN_FINISH_LENGTH : GN_FINISH_NONE;
    s->on_event(s->user, &event);
    free(s->prompt_probs);
    free(s->prompt_top);
    s->prompt_probs = s->prompt_top = NULL;
    return event.finish;
}

void gn_sequence_abort(gn_sequence *s, gn_finish finish, const gn_error *error) {
    gn_event event = event_of(s);
    event.finish = finish;
    event.error = error;
    s->on_event(s->user, &event);
}
