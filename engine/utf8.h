/* utf8.h - is it UTF-8? */
#ifndef GN_UTF8_H
#define GN_UTF8_H

#include <stddef.h>

/* Length of the UTF-8 character at p, or 0 when what stands there is not one (overlong forms,
 * surrogates and values past U+10FFFF are not). */
int gn_utf8_length(const char *p, size_t size);
/* The offset of the first byte that is not UTF-8; `size` when all is well. */
size_t gn_utf8_check(const char *p, size_t size);

#endif
