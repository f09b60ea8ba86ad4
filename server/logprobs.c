/* logprobs.c - tokens and their probabilities, in the forms of both completion families. */
#include "server/logprobs.h"

#include <math.h>
#include <string.h>

#include "engine/utf8.h"
#include "server/state.h"

static const char *bytes_of(const gn_choice *c, int32_t id, size_t *size) {
    return gn_token_bytes(c->generation->server->model, id, size);
}

static void separate(gn_buffer *b) {
    if (b->size) gn_buffer_append(b, ",", 1);
}

/* A token's text; a part of a character is spelled as OpenAI does: \xe2\x82 after `prefix`. */
static void write_token(gn_buffer *b, const char *bytes, size_t size, const char *prefix) {
    if (gn_utf8_check(bytes, size) == size) {
        gn_buffer_json(b, bytes, size);
        return;
    }
    gn_buffer_format(b, "\"%s", prefix);
    for (size_t i = 0; i < size; i++) gn_buffer_format(b, "\\\\x%02x", (unsigned char)bytes[i]);
    gn_buffer_append(b, "\"", 1);
}

/* ---- chat ---- */

/* The fields of a token, without the closing brace. */
static void write_chat_token(gn_buffer *b, const gn_choice *c, gn_token_prob p) {
    size_t size = 0;
    const char *bytes = bytes_of(c, p.id, &size);
    gn_buffer_text(b, "{\"token\":");
    write_token(b, bytes, size, "");
    gn_buffer_text(b, ",\"logprob\":");
    gn_buffer_json_float(b, p.logprob);
    gn_buffer_text(b, ",\"bytes\":[");
    for (size_t i = 0; i < size; i++)
        gn_buffer_format(b, "%s%d", i ? "," : "", (unsigned char)bytes[i]);
    gn_buffer_text(b, "]");
}

void gn_logprobs_add_chat(gn_choice *c, gn_token_prob token, const gn_token_prob *top,
                          int32_t n_top) {
    gn_buffer *b = &c->tokens;
    separate(b);
    write_chat_token(b, c, token);
    gn_buffer_text(b, ",\"top_logprobs\":[");
    for (int32_t i = 0; i < n_top; i++) {
        if (i) gn_buffer_text(b, ",");
        write_chat_token(b, c, top[i]);
        gn_buffer_text(b, "}");
    }
    gn_buffer_text(b, "]}");
}

void gn_logprobs_write_chat(gn_buffer *b, const gn_choice *c) {
    if (c->generation->params.request.logprobs < 0) {
        gn_buffer_text(b, "null");
        return;
    }
    gn_buffer_text(b, "{\"content\":[");
    gn_buffer_append(b, c->tokens.data, c->tokens.size);
    gn_buffer_text(b, "],\"refusal\":null}");
}

/* ---- legacy ---- */

/* An object's keys must differ: of alternatives that read the same, the likelier one stays. */
static bool is_repeated(const gn_choice *c, const gn_token_prob *top, int32_t at) {
    size_t size = 0, other = 0;
    const char *bytes = bytes_of(c, top[at].id, &size);
    for (int32_t i = 0; i < at; i++) {
        const char *before = bytes_of(c, top[i].id, &other);
        if (other == size && memcmp(before, bytes, size) == 0) return true;
    }
    return false;
}

static void write_alternative(gn_buffer *b, const gn_choice *c, gn_token_prob p, bool *any) {
    size_t size = 0;
    const char *bytes = bytes_of(c, p.id, &size);
    if (*any) gn_buffer_text(b, ",");
    *any = true;
    write_token(b, bytes, size, "bytes:");
    gn_buffer_text(b, ":");
    gn_buffer_json_float(b, p.logprob);
}

/* The token itself is listed too when it is not among the likeliest. */
static void write_alternatives(gn_buffer *b, const gn_choice *c, gn_token_prob token,
                               const gn_token_prob *top, int32_t n_top) {
    bool any = false, listed = false;
    size_t size = 0, other = 0;
    const char *bytes = bytes_of(c, token.id, &size);
    gn_buffer_text(b, "{");
    for (int32_t i = 0; i < n_top; i++) {
        if (is_repeated(c, top, i)) continue;
        const char *alternative = bytes_of(c, top[i].id, &other);
        listed |= other == size && memcmp(alternative, bytes, size) == 0;
        write_alternative(b, c, top[i], &any);
    }
    if (!listed) write_alternative(b, c, token, &any);
    gn_buffer_text(b, "}");
}

static int64_t characters(const char *bytes, size_t size) {
    int64_t n = 0;
    for (size_t i = 0; i < size; i++) n += ((unsigned char)bytes[i] & 0xc0) != 0x80;
    return n;
}

void gn_logprobs_add_legacy(gn_choice *c, gn_token_prob token, const gn_token_prob *top,
                            int32_t n_top) {
    size_t size = 0;
    const char *bytes = bytes_of(c, token.id, &size);
    separate(&c->tokens);
    write_token(&c->tokens, bytes, size, "bytes:");
    separate(&c->probs);
    gn_buffer_json_float(&c->probs, token.logprob);
    separate(&c->tops);
    if (isnan(token.logprob))
        gn_buffer_text(&c->tops, "null");
    else
        write_alternatives(&c->tops, c, token, top, n_top);
    separate(&c->offsets);
    gn_buffer_format(&c->offsets, "%lld", (long long)c->characters);
    c->characters += characters(bytes, size);
}

static void write_list(gn_buffer *b, const char *name, const gn_buffer *list) {
    gn_buffer_format(b, "\"%s\":[", name);
    gn_buffer_append(b, list->data, list->size);
    gn_buffer_text(b, "]");
}

void gn_logprobs_write_legacy(gn_buffer *b, const gn_choice *c) {
    if (c->generation->params.request.logprobs < 0) {
        gn_buffer_text(b, "null");
        return;
    }
    gn_buffer_text(b, "{");
    write_list(b, "tokens", &c->tokens);
    gn_buffer_text(b, ",");
    write_list(b, "token_logprobs", &c->probs);
    gn_buffer_text(b, ",");
    write_list(b, "top_logprobs", &c->tops);
    gn_buffer_text(b, ",");
    write_list(b, "text_offset", &c->offsets);
    gn_buffer_text(b, "}");
}
