/* detokenizer.c - tokens to text that can be shown at once.
 *
 * Every stop string is matched by a Knuth-Morris-Pratt automaton fed byte by byte. The longest
 * partial match of any of them is held back, and since those bytes are by definition the beginning
 * of that stop string, they need no buffer: what is held is (stop string, length). Bytes that leave
 * it pass through a UTF-8 decoder that holds an incomplete character. So a byte costs one step per
 * stop string, amortized, however the stream is cut. */
#include "engine/tokenizer.h"

#include <stdlib.h>
#include <string.h>

typedef struct stop {
    char *text;
    size_t len;
    size_t *border; /* border[i]: length of the longest proper border of text[0..i] */
    size_t matched; /* bytes of text that the stream ends with */
    int32_t id;     /* the control piece with this text, or -1 */
} stop;

struct gn_detokenizer {
    const gn_tokenizer *tokenizer;
    stop *stops;
    int n_stops, held_by; /* held back: the first `held` bytes of stops[held_by] */
    size_t held;
    bool strip_space, ended;
    /* The incomplete character, and what its next byte may be. */
    unsigned char tail[4];
    int tail_len, tail_need;
    unsigned char next_min, next_max;
    char *text;
    size_t text_len, text_room;
};

static size_t longest_stop(const gn_detokenizer *d) {
    size_t longest = 0;
    for (int i = 0; i < d->n_stops; i++)
        if (d->stops[i].len > longest) longest = d->stops[i].len;
    return longest;
}

/* Room for everything that `n` more bytes can release: each byte, also of those held back, comes
 * out as itself or as the three bytes of U+FFFD. */
static bool reserve(gn_detokenizer *d, size_t n) {
    const size_t held = d->held + (size_t)d->tail_len;
    if (n > SIZE_MAX / 8 - held) return false;
    const size_t need = 3 * (held + n);
    if (need <= d->text_room) return true;
    char *text = realloc(d->text, 2 * need);
    if (!text) return false;
    d->text = text;
    d->text_room = 2 * need;
    return true;
}

static gn_status copy_stop(stop *s, const char *text) {
    s->len = strlen(text);
    if (s->len == 0) return GN_EINVAL;
    s->text = strdup(text);
    s->border = calloc(s->len, sizeof *s->border);
    if (!s->text || !s->border) return GN_ENOMEM;
    for (size_t i = 1, k = 0; i < s->len; i++) {
        while (k > 0 && text[i] != text[k]) k = s->border[k - 1];
        if (text[i] == text[k]) k++;
        s->border[i] = k;
    }
    return GN_OK;
}

static gn_status copy_stops(gn_detokenizer *d, const char *const *texts, int n) {
    if (n < 0) return GN_EINVAL;
    if (n == 0) return GN_OK;
    d->stops = calloc((size_t)n, sizeof *d->stops);
    if (!d->stops) return GN_ENOMEM;
    d->n_stops = n;
    for (int i = 0; i < n; i++) {
        stop *s = &d->stops[i];
        const gn_status status = copy_stop(s, texts[i]);
        if (status) return status;
        s->id = d->tokenizer ? gn_tokenizer_special(d->tokenizer, s->text, s->len) : -1;
        /* Whether EOS ends a reply is the engine's business (ignore_eos). */
        if (s->id >= 0 && s->id == gn_tokenizer_eos(d->tokenizer)) s->id = -1;
    }
    return GN_OK;
}

gn_status gn_detokenizer_open(gn_detokenizer **out, const gn_tokenizer *t, const char *const *stops,
                              int n_stops, bool strip_space) {
    *out = NULL;
    gn_detokenizer *d = calloc(1, sizeof *d);
    if (!d) return GN_ENOMEM;
    d->tokenizer = t;
    d->strip_space = strip_space;
    gn_status status = copy_stops(d, stops, n_stops);
    /* Enough for pieces of the usual length, so that decoding allocates nothing. */
    if (!status && !reserve(d, longest_stop(d) + 64)) status = GN_ENOMEM;
    if (status) {
        gn_detokenizer_close(d);
        return status;
    }
    *out = d;
    return GN_OK;
}

void gn_detokenizer_close(gn_detokenizer *d) {
    if (!d) return;
    for (int i = 0; i < d->n_stops; i++) {
        free(d->stops[i].text);
        free(d->stops[i].border);
    }
    free(d->stops);
    free(d->text);
    free(d);
}

static void append(gn_detokenizer *d, const void *bytes, size_t n) {
    memcpy(d->text + d->text_len, bytes, n);
    d->text_len += n;
}

/* An incomplete character that will not be completed. */
static void replace_tail(gn_detokenizer *d) {
    if (d->tail_len > 0) append(d, "\xef\xbf\xbd", 3);
    d->tail_len = 0;
}

/* The UTF-8 decoder of the WHATWG Encoding standard: after E0, F0 the next byte must not make an
 * overlong form, after ED no surrogate, after F4 nothing above U+10FFFF. */
static void decode(gn_detokenizer *d, unsigned char c) {
    if (d->tail_len > 0 && (c < d->next_min || c > d->next_max)) replace_tail(d);
    if (d->tail_len > 0) {
        d->tail[d->tail_len++] = c;
        d->next_min = 0x80, d->next_max = 0xbf;
        if (d->tail_len < d->tail_need) return;
        append(d, d->tail, (size_t)d->tail_len);
        d->tail_len = 0;
        return;
    }
    if (c < 0x80) {
        append(d, &c, 1);
        return;
    }
    d->tail[0] = c;
    d->tail_len = 1;
    d->tail_need = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : 2;
    d->next_min = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80;
    d->next_max = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
    if (c < 0xc2 || c > 0xf4) replace_tail(d); /* no lead byte */
}

/* Lets the first n of the held bytes go. The caller sets what is held now. */
static void release(gn_detokenizer *d, size_t n) {
    for (size_t i = 0; i < n; i++) decode(d, (unsigned char)d->stops[d->held_by].text[i]);
}

static void end_text(gn_detokenizer *d) {
    release(d, d->held);
    d->held = 0;
    replace_tail(d);
    d->ended = true;
}

static void advance(stop *s, char c) {
    while (s->matched > 0 && s->text[s->matched] != c) s->matched = s->border[s->matched - 1];
    if (s->text[s->matched] == c) s->matched++;
}

/* Feeds one byte; false when it completes a stop string. */
static bool feed_byte(gn_detokenizer *d, char c) {
    size_t longest = 0, complete = 0;
    int by = 0;
    for (int i = 0; i < d->n_stops; i++) {
        stop *s = &d->stops[i];
        advance(s, c);
        if (s->matched == s->len && s->len > complete) complete = s->len;
        if (s->matched > longest) longest = s->matched, by = i;
    }
    /* The held bytes and c hold the new match, because the old one was the longest. */
    if (complete > 0) {
        release(d, d->held + 1 - complete);
        d->held = 0;
        return false;
    }
    if (longest == 0) {
        release(d, d->held);
        decode(d, (unsigned char)c);
    } else {
        release(d, d->held + 1 - longest);
    }
    d->held = longest;
    d->held_by = by;
    return true;
}

gn_status gn_detokenizer_feed_bytes(gn_detokenizer *d, const char *bytes, size_t n,
                                    const char **text, size_t *len, bool *stopped) {
    *text = "";
    *len = 0;
    *stopped = false;
    if (d->ended) return GN_EINVAL;
    if (!reserve(d, n)) return GN_ENOMEM;
    d->text_len = 0;
    for (size_t i = 0; i < n && !*stopped; i++) {
        const bool strip = d->strip_space && bytes[i] == ' ';
        d->strip_space = false;
        if (!strip) *stopped = !feed_byte(d, bytes[i]);
    }
    if (*stopped) end_text(d);
    *text = d->text;
    *len = d->text_len;
    return GN_OK;
}

static bool is_stop_piece(const gn_detokenizer *d, int32_t id) {
    for (int i = 0; i < d->n_stops; i++)
        if (d->stops[i].id == id) return true;
    return false;
}

gn_status gn_detokenizer_feed(gn_detokenizer *d, int32_t id, const char **text, size_t *len,
                              bool *stopped) {
    if (id >= 0 && !d->ended && is_stop_piece(d, id)) {
        *stopped = true;
        return gn_detokenizer_flush(d, text, len);
    }
    size_t n;
    const char *bytes = gn_tokenizer_bytes(d->tokenizer, id, &n);
    return gn_detokenizer_feed_bytes(d, bytes, n, text, len, stopped);
}

gn_status gn_detokenizer_flush(gn_detokenizer *d, const char **text, size_t *len) {
    *text = "";
    *len = 0;
    if (!reserve(d, 0)) return GN_ENOMEM;
    d->text_len = 0;
    end_text(d);
    *text = d->text;
    *len = d->text_len;
    return GN_OK;
}
