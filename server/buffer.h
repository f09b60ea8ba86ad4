/* buffer.h - growing bytes, and JSON written into them.
 *
 * A failed allocation marks the buffer and leaves it as it was; later appends do nothing. So a
 * writer appends freely and looks at `failed` once, at the end. */
#ifndef GN_BUFFER_H
#define GN_BUFFER_H

#include "kernels/base.h"

typedef struct gn_buffer {
    char *data; /* not terminated */
    size_t size, capacity;
    bool failed;
} gn_buffer;

void gn_buffer_free(gn_buffer *b); /* and makes it empty again */
/* Empties it, keeping up to `keep` bytes of memory. */
void gn_buffer_clear(gn_buffer *b, size_t keep);
/* Room for `more` bytes behind the end; NULL when memory is short. The caller adds to `size`. */
char *gn_buffer_reserve(gn_buffer *b, size_t more);
void gn_buffer_append(gn_buffer *b, const void *data, size_t size);
void gn_buffer_text(gn_buffer *b, const char *text);
void gn_buffer_format(gn_buffer *b, const char *fmt, ...) GN_PRINTF(2, 3);
/* Drops the first n bytes. */
void gn_buffer_consume(gn_buffer *b, size_t n);

/* A quoted JSON string. Bytes that are not UTF-8 become U+FFFD. */
void gn_buffer_json(gn_buffer *b, const char *text, size_t size);
void gn_buffer_json_text(gn_buffer *b, const char *text); /* NULL is null */
/* A JSON number that reads back as the same float; NaN and infinities, which JSON lacks, are
 * null and +-9999 (OpenAI's floor for logarithms). */
void gn_buffer_json_float(gn_buffer *b, float value);

#endif
