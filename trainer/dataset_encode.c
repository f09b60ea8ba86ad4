/* dataset_encode.c - examples to tokens and labels. */
#include "trainer/dataset_encode.h"

#include <stdlib.h>
#include <string.h>

static gn_status no_memory(gn_error *err) {
    return gn_fail(err, GN_ENOMEM, "out of memory");
}

/* Makes the n tokens behind the samples a sample, if anything in it is learned. */
static gn_status finish(gn_samples *out, int64_t n, int64_t line, bool truncated, gn_error *err) {
    bool learned = false;
    for (int64_t i = 1; i < n && !learned; i++) /* nothing predicts the first token */
        learned = out->labels[out->n_tokens + i] != GN_NOT_LEARNED;
    if (!learned) {
        out->counts.left_out++;
        return GN_OK;
    }
    out->counts.truncated += truncated;
    return gn_samples_commit(out, n, line) ? no_memory(err) : GN_OK;
}

/* ---- prompt and reply ---- */

static gn_status encode_pair(const gn_encoding *e, const gn_example *x, int64_t line,
                             gn_samples *out, gn_error *err) {
    int32_t *source = NULL, *target = NULL, n_source, n_target;
    const int32_t bos = gn_tokenizer_bos(e->tokenizer), eos = gn_tokenizer_eos(e->tokenizer);
    gn_status status =
        gn_tokenizer_encode(e->tokenizer, x->source, strlen(x->source), &source, &n_source, err);
    if (!status)
        status = gn_tokenizer_encode(e->tokenizer, x->target, strlen(x->target), &target, &n_target,
                                     err);
    if (!status && gn_samples_reserve(out, (int64_t)n_source + n_target + 2))
        status = no_memory(err);
    if (!status) {
        const int64_t from = gn_min(n_source, e->source_max_len - (bos >= 0));
        const int64_t to = gn_min(n_target, e->target_max_len - (eos >= 0));
        int32_t *ids = out->ids + out->n_tokens, *labels = out->labels + out->n_tokens;
        int64_t n = 0;
        if (bos >= 0) ids[n++] = bos;
        memcpy(ids + n, source, (size_t)from * sizeof *ids);
        n += from;
        const int64_t prompt = n;
        memcpy(ids + n, target, (size_t)to * sizeof *ids);
        n += to;
        if (eos >= 0) ids[n++] = eos;
        for (int64_t i = 0; i < n; i++)
            labels[i] = i >= prompt || e->train_on_source ? ids[i] : GN_NOT_LEARNED;
        status = finish(out, n, line, from < n_source || to < n_target, err);
    }
    free(source);
    free(target);
    return status;
}

/* ---- conversations ---- */

/* Cuts a conversation to at most max tokens, of which the last is learned and then EOS. */
static int64_t cut_chat(int32_t *ids, bool *learned, int64_t n, int64_t max, int32_t eos) {
    if (n <= max) return n;
    n = max - (eos >= 0);
    while (n > 0 && !learned[n - 1]) n--;
    if (n == 0 || eos < 0 || ids[n - 1] == eos) return n;
    ids[n] = eos;
    learned[n] = true;
    return n + 1;
}

static gn_status encode_chat(const gn_encoding *e, const gn_example *x, int64_t line,
                             gn_samples *out, gn_error *err) {
    int32_t *ids, n;
    bool *learned;
    const int64_t max = (int64_t)e->source_max_len + e->target_max_len;
    gn_status status = gn_chat_template_encode_learned(e->chat, e->tokenizer, x->messages, x->learn,
                                                       x->n_messages, &ids, &learned, &n, err);
    if (status) return status;
    int64_t kept = cut_chat(ids, learned, n, max, gn_tokenizer_eos(e->tokenizer));
    const bool truncated = n > max;
    if (!e->train_on_source)
        while (kept > 0 && !learned[kept - 1]) kept--; /* no reply follows */
    if (gn_samples_reserve(out, kept)) {
        status = no_memory(err);
    } else {
        for (int64_t i = 0; i < kept; i++) {
            out->ids[out->n_tokens + i] = ids[i];
            out->labels[out->n_tokens + i] =
                learned[i] || e->train_on_source ? ids[i] : GN_NOT_LEARNED;
        }
        status = finish(out, kept, line, truncated, err);
    }
    free(ids);
    free(learned);
    return status;
}

/* ---- tokens ---- */

static bool read_id(const cJSON *item, int vocab, int32_t *id) {
    if (!cJSON_IsNumber(item)) return false;
    const double value = item->valuedouble;
    if (!(value >= 0 && value < vocab) || value != (double)(int32_t)value) return false;
    *id = (int32_t)value;
    return true;
}

static gn_status read_tokens(const gn_encoding *e, const gn_example *x, int64_t n, int32_t *ids,
                             int32_t *labels, gn_error *err) {
    const cJSON *id = x->ids->child, *label = x->labels ? x->labels->child : id;
    for (int64_t i = 0; i < n; i++, id = id->next, label = label->next) {
        if (!read_id(id, e->vocab, &ids[i]))
            return gn_fail(err, GN_EFORMAT, "input_ids[%lld] is not an id below %d", (long long)i,
                           e->vocab);
        labels[i] = GN_NOT_LEARNED;
        if (cJSON_IsNumber(label) && label->valuedouble == GN_NOT_LEARNED) continue;
        if (!read_id(label, e->vocab, &labels[i]))
            return gn_fail(err, GN_EFORMAT, "labels[%lld] is neither -100 nor an id below %d",
                           (long long)i, e->vocab);
    }
    return GN_OK;
}

static gn_status encode_tokens(const gn_encoding *e, const gn_example *x, int64_t line,
                               gn_samples *out, gn_error *err) {
    const int n = cJSON_GetArraySize(x->ids);
    if (n == 0) return gn_fail(err, GN_EFORMAT, "\"input_ids\" is empty");
    if (n > e->max_len)
        return gn_fail(err, GN_EFORMAT, "%d tokens; at most %d are allowed", n, e->max_len);
    if (x->labels && cJSON_GetArraySize(x->labels) != n)
        return gn_fail(err, GN_EFORMAT, "%d input_ids but %d labels", n,
                       cJSON_GetArraySize(x->labels));
    if (gn_samples_reserve(out, n)) return no_memory(err);
    const gn_status status =
        read_tokens(e, x, n, out->ids + out->n_tokens, out->labels + out->n_tokens, err);
    return status ? status : finish(out, n, line, false, err);
}

gn_status gn_example_encode(const gn_encoding *e, const gn_example *example, int64_t line,
                            gn_samples *out, gn_error *err) {
    if (example->ids) return encode_tokens(e, example, line, out, err);
    if (example->messages) return encode_chat(e, example, line, out, err);
    return encode_pair(e, example, line, out, err);
}
