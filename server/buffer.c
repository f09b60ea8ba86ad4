/* buffer.c - growing bytes, and JSON written into them. */
#include "server/buffer.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/utf8.h"

enum { SMALLEST = 256 };

void gn_buffer_free(gn_buffer *b) {
    free(b->data);
    *b = (gn_buffer){0};
}

void gn_buffer_clear(gn_buffer *b, size_t keep) {
    if (b->capacity > keep) gn_buffer_free(b);
    b->size = 0;
    b->failed = false;
}

char *gn_buffer_reserve(gn_buffer *b, size_t more) {
    if (b->failed) return NULL;
    if (more <= b->capacity - b->size && b->data) return b->data + b->size;
    size_t capacity = b->capacity ? b->capacity : SMALLEST;
    while (capacity - b->size < more && capacity <= SIZE_MAX / 2) capacity *= 2;
    char *data = capacity - b->size < more ? NULL : realloc(b->data, capacity);
    if (!data) {
        b->failed = true;
        return NULL;
    }
    b->data = data;
    b->capacity = capacity;
    return data + b->size;
}

void gn_buffer_append(gn_buffer *b, const void *data, size_t size) {
    if (size == 0) return;
    char *end = gn_buffer_reserve(b, size);
    if (!end) return;
    memcpy(end, data, size);
    b->size += size;
}

void gn_buffer_text(gn_buffer *b, const char *text) {
    gn_buffer_append(b, text, strlen(text));
}

void gn_buffer_format(gn_buffer *b, const char *fmt, ...) {
    va_list args, again;
    va_start(args, fmt);
    va_copy(again, args);
    const int n = vsnprintf(NULL, 0, fmt, args);
    va_end(args);
    char *end = n < 0 ? NULL : gn_buffer_reserve(b, (size_t)n + 1);
    if (end) {
        vsnprintf(end, (size_t)n + 1, fmt, again);
        b->size += (size_t)n;
    }
    va_end(again);
}

void gn_buffer_consume(gn_buffer *b, size_t n) {
    b->size -= n;
    if (b->size) memmove(b->data, b->data + n, b->size);
}

/* Writes what must be escaped; returns how many bytes it took from p. */
static size_t escape(gn_buffer *b, const char *p, size_t size) {
    static const char hex[] = "0123456789abcdef";
    const unsigned char c = (unsigned char)*p;
    switch (c) {
    case '"': gn_buffer_append(b, "\\\"", 2); return 1;
    case '\\': gn_buffer_append(b, "\\\\", 2); return 1;
    case '\n': gn_buffer_append(b, "\\n", 2); return 1;
    case '\r': gn_buffer_append(b, "\\r", 2); return 1;
    case '\t': gn_buffer_append(b, "\\t", 2); return 1;
    }
    if (c < 0x20 || c == 0x7f) {
        const char code[6] = {'\\', 'u', '0', '0', hex[c >> 4], hex[c & 15]};
        gn_buffer_append(b, code, sizeof code);
        return 1;
    }
    const int n = gn_utf8_length(p, size);
    gn_buffer_append(b, n ? p : "\xef\xbf\xbd", n ? (size_t)n : 3);
    return n ? (size_t)n : 1;
}

void gn_buffer_json(gn_buffer *b, const char *text, size_t size) {
    gn_buffer_append(b, "\"", 1);
    size_t at = 0;
    while (at < size) {
        size_t plain = at; /* runs of plain ASCII go in one piece */
        while (plain < size && (unsigned char)text[plain] >= 0x20 &&
               (unsigned char)text[plain] < 0x7f && text[plain] != '"' && text[plain] != '\\')
            plain++;
        gn_buffer_append(b, text + at, plain - at);
        at = plain;
        if (at < size) at += escape(b, text + at, size - at);
    }
    gn_buffer_append(b, "\"", 1);
}

void gn_buffer_json_text(gn_buffer *b, const char *text) {
    if (text)
        gn_buffer_json(b, text, strlen(text));
    else
        gn_buffer_text(b, "null");
}

void gn_buffer_json_float(gn_buffer *b, float value) {
    if (isnan(value))
        gn_buffer_text(b, "null");
    else if (isinf(value))
        gn_buffer_text(b, value < 0 ? "-9999.0" : "9999.0");
    else
        gn_buffer_format(b, "%.9g", (double)value);
}
