/* test_detokenizer.c - streamed text against a reference that sees the whole string at once. */
#include "engine/tokenizer.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TINY GN_SOURCE_DIR "/tests/golden/data/tiny-bf16"

enum { MAX_TEXT = 4096 };

typedef struct text {
    char data[MAX_TEXT];
    size_t len;
} text;

static void add(text *t, const void *bytes, size_t n) {
    cr_assert_leq(t->len + n, (size_t)MAX_TEXT);
    memcpy(t->data + t->len, bytes, n);
    t->len += n;
}

/* The length of the well-formed character at s, or minus the length of the maximal subpart of one
 * (table 3-7 of the Unicode standard, written out). */
static int character(const unsigned char *s, size_t n) {
    static const unsigned char table[][9] = {
        /* length, then lowest and highest of each byte */
        {1, 0x00, 0x7f},
        {2, 0xc2, 0xdf, 0x80, 0xbf},
        {3, 0xe0, 0xe0, 0xa0, 0xbf, 0x80, 0xbf},
        {3, 0xe1, 0xec, 0x80, 0xbf, 0x80, 0xbf},
        {3, 0xed, 0xed, 0x80, 0x9f, 0x80, 0xbf},
        {3, 0xee, 0xef, 0x80, 0xbf, 0x80, 0xbf},
        {4, 0xf0, 0xf0, 0x90, 0xbf, 0x80, 0xbf, 0x80, 0xbf},
        {4, 0xf1, 0xf3, 0x80, 0xbf, 0x80, 0xbf, 0x80, 0xbf},
        {4, 0xf4, 0xf4, 0x80, 0x8f, 0x80, 0xbf, 0x80, 0xbf},
    };
    for (size_t row = 0; row < sizeof table / sizeof *table; row++) {
        const unsigned char *r = table[row];
        int k = 0;
        while (k < r[0] && (size_t)k < n && s[k] >= r[1 + 2 * k] && s[k] <= r[2 + 2 * k]) k++;
        if (k > 0) return k == r[0] ? k : -k;
    }
    return -1;
}

static text decode(const char *bytes, size_t n) {
    text out = {.len = 0};
    for (size_t i = 0; i < n;) {
        const int k = character((const unsigned char *)bytes + i, n - i);
        if (k > 0)
            add(&out, bytes + i, (size_t)k);
        else
            add(&out, "\xef\xbf\xbd", 3);
        i += (size_t)abs(k);
    }
    return out;
}

/* Where the text ends: before the stop string whose last byte comes first, the longest if several
 * end there; n without one. */
static size_t first_stop(const char *bytes, size_t n, const char *const *stops, int n_stops) {
    for (size_t end = 1; end <= n; end++) {
        size_t longest = 0;
        for (int i = 0; i < n_stops; i++) {
            const size_t len = strlen(stops[i]);
            if (len <= end && len > longest && !memcmp(bytes + end - len, stops[i], len))
                longest = len;
        }
        if (longest) return end - longest;
    }
    return n;
}

static uint64_t state;
static unsigned below(unsigned n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)(state >> 33) % n;
}

static bool is_whole(const char *s, size_t n) {
    const text t = decode(s, n);
    return t.len == n && memcmp(t.data, s, n) == 0;
}

/* Feeds bytes cut at random; every chunk must be whole characters, and none may be late: what is
 * not shown is a possible stop string or an incomplete character. */
static text stream(gn_detokenizer *d, const char *bytes, size_t n, size_t hold, bool *stopped) {
    text out = {.len = 0};
    const char *chunk;
    size_t len;
    *stopped = false;
    for (size_t i = 0; i < n && !*stopped;) {
        size_t k = 1 + below(5);
        if (k > n - i) k = n - i;
        cr_assert_eq(gn_detokenizer_feed_bytes(d, bytes + i, k, &chunk, &len, stopped), GN_OK);
        cr_assert(is_whole(chunk, len), "part of a character was shown");
        add(&out, chunk, len);
        i += k;
        if (!*stopped) cr_assert_leq(i, out.len + hold, "text is held back for too long");
    }
    if (!*stopped) {
        cr_assert_eq(gn_detokenizer_flush(d, &chunk, &len), GN_OK);
        add(&out, chunk, len);
    }
    return out;
}

/* Alphabets that make stop strings, their overlaps, and broken characters likely. */
static const char *const alphabets[] = {"ab", "ab#", "a\xc3\xa9\xf0\x9f\xa6\x99",
                                        "\xe0\xa0\x80\xed\xf4\xff z", "abcdefgh"};

static void random_string(char *s, size_t n, const char *alphabet) {
    const unsigned letters = (unsigned)strlen(alphabet);
    for (size_t i = 0; i < n; i++) s[i] = alphabet[below(letters)];
    s[n] = '\0';
}

Test(detokenizer, equals_the_whole_string_however_it_is_cut) {
    int stopped_count = 0;
    state = 1;
    for (int round = 0; round < 20000; round++) {
        const char *alphabet = alphabets[below(sizeof alphabets / sizeof *alphabets)];
        char bytes[160], stop[4][16];
        const char *stops[4] = {stop[0], stop[1], stop[2], stop[3]};
        const int n_stops = (int)below(5);
        const size_t n = below(120);
        size_t hold = 3;
        random_string(bytes, n, alphabet);
        for (int i = 0; i < n_stops; i++) {
            random_string(stop[i], 1 + below(8), alphabet);
            if (strlen(stop[i]) + 2 > hold) hold = strlen(stop[i]) + 2;
        }
        const bool strip = below(2);
        const size_t skip = strip && n > 0 && bytes[0] == ' ';
        const size_t end = first_stop(bytes + skip, n - skip, stops, n_stops);
        const text want = decode(bytes + skip, end);

        gn_detokenizer *d;
        cr_assert_eq(gn_detokenizer_open(&d, NULL, stops, n_stops, strip), GN_OK);
        bool stopped;
        const text got = stream(d, bytes, n, hold + skip, &stopped);
        cr_assert(got.len == want.len && !memcmp(got.data, want.data, got.len),
                  "round %d: %zu bytes instead of %zu", round, got.len, want.len);
        cr_assert(stopped || end == n - skip);
        stopped_count += stopped;
        gn_detokenizer_close(d);
    }
    cr_expect(stopped_count > 2000 && stopped_count < 18000, "the cases are lopsided: %d stopped",
              stopped_count);
}

static void feed(gn_detokenizer *d, const char *bytes, const char *want, bool want_stopped) {
    const char *chunk;
    size_t len;
    bool stopped;
    cr_assert_eq(gn_detokenizer_feed_bytes(d, bytes, strlen(bytes), &chunk, &len, &stopped), GN_OK);
    cr_expect(len == strlen(want) && !memcmp(chunk, want, len), "'%s' gave '%.*s', not '%s'", bytes,
              (int)len, chunk, want);
    cr_expect_eq(stopped, want_stopped);
}

static gn_detokenizer *open_stops(const char *a, const char *b, bool strip) {
    const char *stops[] = {a, b};
    gn_detokenizer *d;
    cr_assert_eq(gn_detokenizer_open(&d, NULL, stops, (a != NULL) + (b != NULL), strip), GN_OK);
    return d;
}

Test(detokenizer, holds_back_no_more_than_needed) {
    gn_detokenizer *d = open_stops("### Human:", "\n\n", false);
    feed(d, "Hi #", "Hi ", false);
    feed(d, "#", "", false);
    feed(d, "## H", "#", false);
    feed(d, "a", "### Ha", false);
    feed(d, "\n", "", false);
    feed(d, "x\n", "\nx", false);
    feed(d, "### Human", "\n", false);
    feed(d, ": not shown", "", true);
    const char *chunk;
    size_t len;
    bool stopped;
    cr_expect_eq(gn_detokenizer_feed_bytes(d, "x", 1, &chunk, &len, &stopped), GN_EINVAL);
    cr_expect_eq(gn_detokenizer_flush(d, &chunk, &len), GN_OK);
    cr_expect_eq(len, 0u);
    gn_detokenizer_close(d);
}

Test(detokenizer, characters_are_whole) {
    gn_detokenizer *d = open_stops(NULL, NULL, false);
    feed(d, "\xf0\x9f", "", false);
    feed(d, "\xa6", "", false);
    feed(d, "\x99\xc3", "\xf0\x9f\xa6\x99", false);
    feed(d, "(", "\xef\xbf\xbd(", false);
    feed(d, "\xed\xa0\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd", false);
    feed(d, "\xe2\x82", "", false);
    const char *chunk;
    size_t len;
    cr_assert_eq(gn_detokenizer_flush(d, &chunk, &len), GN_OK);
    cr_expect(len == 3 && !memcmp(chunk, "\xef\xbf\xbd", 3));
    gn_detokenizer_close(d);
}

Test(detokenizer, strips_one_space_once) {
    gn_detokenizer *d = open_stops("  x", NULL, true);
    feed(d, "", "", false);
    feed(d, " ", "", false);
    feed(d, " a  ", " a", false);
    feed(d, "x", "", true);
    gn_detokenizer_close(d);
    d = open_stops(NULL, NULL, false);
    feed(d, " a", " a", false);
    gn_detokenizer_close(d);
}

Test(detokenizer, refuses_empty_stop_strings) {
    const char *stops[] = {"a", ""};
    gn_detokenizer *d;
    cr_expect_eq(gn_detokenizer_open(&d, NULL, stops, 2, false), GN_EINVAL);
    cr_expect_null(d);
    gn_detokenizer_close(NULL);
}

/* With a tokenizer: pieces, a control piece that is a stop string, EOS that is not. */
Test(detokenizer, tokens) {
    static const char sentence[] = "Führer 🦙 </s> ok";
    gn_tokenizer *t;
    cr_assert_eq(gn_tokenizer_open(&t, TINY, 512, NULL), GN_OK);
    int32_t *ids, n;
    cr_assert_eq(gn_tokenizer_encode(t, sentence, strlen(sentence), &ids, &n, NULL), GN_OK);
    const char *stops[] = {"</s>", "<s>"}, *chunk;
    size_t len;
    bool stopped;
    gn_detokenizer *d;
    cr_assert_eq(gn_detokenizer_open(&d, t, stops + 1, 1, true), GN_OK);
    text out = {.len = 0};
    for (int32_t i = 0; i < n; i++) {
        cr_assert_eq(gn_detokenizer_feed(d, ids[i], &chunk, &len, &stopped), GN_OK);
        cr_assert_not(stopped);
        add(&out, chunk, len);
    }
    cr_expect(out.len == strlen(sentence) && !memcmp(out.data, sentence, out.len));
    cr_assert_eq(gn_detokenizer_feed(d, 2, &chunk, &len, &stopped), GN_OK);
    cr_expect_not(stopped);
    cr_assert_eq(gn_detokenizer_feed(d, 3 + '<', &chunk, &len, &stopped), GN_OK);
    cr_expect_eq(len, 0u);
    cr_assert_eq(gn_detokenizer_feed(d, 1, &chunk, &len, &stopped), GN_OK);
    cr_expect(stopped && len == 1 && *chunk == '<', "the control piece is its stop string");
    cr_expect_eq(gn_detokenizer_feed(d, 1, &chunk, &len, &stopped), GN_EINVAL);
    gn_detokenizer_close(d);

    cr_assert_eq(gn_detokenizer_open(&d, t, stops, 1, true), GN_OK);
    cr_assert_eq(gn_detokenizer_feed(d, 2, &chunk, &len, &stopped), GN_OK);
    cr_expect_not(stopped, "EOS is the engine's business");
    gn_detokenizer_close(d);
    free(ids);
    gn_tokenizer_close(t);
}
