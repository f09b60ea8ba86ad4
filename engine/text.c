/* text.c - guanaco.h's text functions, over a model's tokenizer and chat template. */
#include <stdlib.h>
#include <string.h>

#include "engine/model.h"

static gn_status no_tokenizer(gn_error *err) {
    return gn_fail(err, GN_EUNSUPPORTED, "this model has random weights and no tokenizer");
}

gn_status gn_tokenize(const gn_model *m, const char *text, size_t len, bool add_bos, int32_t **ids,
                      int32_t *n, gn_error *err) {
    if (!m->tokenizer) return no_tokenizer(err);
    const gn_status status = gn_tokenizer_encode(m->tokenizer, text, len, ids, n, err);
    const int32_t bos = gn_tokenizer_bos(m->tokenizer);
    if (status || !add_bos || bos < 0) return status;
    int32_t *grown = realloc(*ids, ((size_t)*n + 1) * sizeof *grown);
    if (!grown) {
        free(*ids);
        return gn_fail(err, GN_ENOMEM, "out of memory");
    }
    memmove(grown + 1, grown, (size_t)*n * sizeof *grown);
    grown[0] = bos;
    *ids = grown;
    ++*n;
    return GN_OK;
}

gn_status gn_detokenize(const gn_model *m, const int32_t *ids, int32_t n, char **text, size_t *len,
                        gn_error *err) {
    if (!m->tokenizer) return no_tokenizer(err);
    size_t total = 0, bytes;
    for (int32_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= m->config.vocab)
            return gn_fail(err, GN_EINVAL, "token %d at index %d is outside the vocabulary of %d",
                           ids[i], i, m->config.vocab);
        gn_tokenizer_bytes(m->tokenizer, ids[i], &bytes);
        total += bytes;
    }
    char *out = malloc(total + 1), *end = out;
    if (!out) return gn_fail(err, GN_ENOMEM, "out of memory");
    for (int32_t i = 0; i < n; i++) {
        const char *piece = gn_tokenizer_bytes(m->tokenizer, ids[i], &bytes);
        memcpy(end, piece, bytes);
        end += bytes;
    }
    if (total && out[0] == ' ') memmove(out, out + 1, --total); /* the encoder's own */
    out[total] = '\0';
    *text = out;
    *len = total;
    return GN_OK;
}

const char *gn_token_bytes(const gn_model *m, int32_t id, size_t *len) {
    *len = 0;
    return m->tokenizer ? gn_tokenizer_bytes(m->tokenizer, id, len) : "";
}

gn_status gn_chat_encode(const gn_model *m, const gn_message *messages, int n_messages,
                         int32_t **ids, int32_t *n, gn_error *err) {
    if (!m->chat) return no_tokenizer(err);
    return gn_chat_template_encode(m->chat, m->tokenizer, messages, n_messages, ids, n, err);
}

const char *const *gn_chat_stops(const gn_model *m, int *n) {
    *n = 0;
    return m->chat ? gn_chat_template_stops(m->chat, n) : NULL;
}
