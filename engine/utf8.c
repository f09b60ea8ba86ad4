/* utf8.c - as the Unicode standard's table of well-formed byte sequences says. */
#include "engine/utf8.h"

int gn_utf8_length(const char *p, size_t size) {
    const unsigned char *u = (const unsigned char *)p;
    if (size == 0) return 0;
    if (u[0] < 0x80) return 1;
    const int n = u[0] >= 0xf0 ? 4 : u[0] >= 0xe0 ? 3 : 2;
    if (u[0] < 0xc2 || u[0] > 0xf4 || size < (size_t)n) return 0;
    for (int i = 1; i < n; i++) {
        if ((u[i] & 0xc0) != 0x80) return 0;
    }
    if (u[0] == 0xe0 && u[1] < 0xa0) return 0; /* overlong */
    if (u[0] == 0xed && u[1] > 0x9f) return 0; /* surrogate */
    if (u[0] == 0xf0 && u[1] < 0x90) return 0; /* overlong */
    if (u[0] == 0xf4 && u[1] > 0x8f) return 0; /* past U+10FFFF */
    return n;
}

size_t gn_utf8_check(const char *p, size_t size) {
    size_t at = 0;
    while (at < size) {
        const int n = gn_utf8_length(p + at, size - at);
        if (n == 0) return at;
        at += (size_t)n;
    }
    return size;
}
