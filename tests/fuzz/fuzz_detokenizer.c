/* fuzz_detokenizer.c - lines of stop strings, an empty line, then a stream: fed at once and byte by
 * byte it gives the same text. */
#include <stdlib.h>
#include <string.h>

#include "engine/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_STOPS = 8 };

typedef struct result {
    char *text;
    size_t len;
    bool stopped;
} result;

static void add(result *r, const char *text, size_t len) {
    memcpy(r->text + r->len, text, len);
    r->len += len;
}

static result stream(const char *const *stops, int n_stops, const char *bytes, size_t size,
                     size_t step) {
    result r = {.text = malloc(3 * size + 3)};
    gn_detokenizer *d;
    const char *text;
    size_t len;
    if (!r.text || gn_detokenizer_open(&d, NULL, stops, n_stops, true)) abort();
    for (size_t i = 0; i < size && !r.stopped; i += step) {
        const size_t n = size - i < step ? size - i : step;
        if (gn_detokenizer_feed_bytes(d, bytes + i, n, &text, &len, &r.stopped)) abort();
        add(&r, text, len);
    }
    if (gn_detokenizer_flush(d, &text, &len) || (r.stopped && len)) abort();
    add(&r, text, len);
    gn_detokenizer_close(d);
    return r;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char *input = strndup((const char *)data, size), *stops[MAX_STOPS], *at = input;
    int n_stops = 0;
    if (!input) abort();
    const size_t len = strlen(input);
    for (char *end; n_stops < MAX_STOPS && *at != '\n' && (end = strchr(at, '\n')) != NULL;
         at = end + 1) {
        *end = '\0';
        stops[n_stops++] = at;
    }
    const size_t rest = len - (size_t)(at - input);
    const char *const *all = (const char *const *)stops;
    const result whole = stream(all, n_stops, at, rest, rest + 1),
                 bytes = stream(all, n_stops, at, rest, 1);
    if (whole.len != bytes.len || memcmp(whole.text, bytes.text, whole.len) ||
        whole.stopped != bytes.stopped)
        abort();
    free(whole.text);
    free(bytes.text);
    free(input);
    return 0;
}
