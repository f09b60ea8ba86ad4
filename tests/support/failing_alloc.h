/* failing_alloc.h - for a program whose allocations are counted, and of which one fails: its own
 * malloc stands before the C library's. Included by one file of the program. Sanitizers bring a
 * malloc of theirs that cannot be asked to fail: under them CAN_FAIL is false and nothing is
 * counted. */
#ifndef GN_TEST_FAILING_ALLOC_H
#define GN_TEST_FAILING_ALLOC_H

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

static bool watching;
static long calls, fail_at, live; /* while watching; fail_at 0: none fails */

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define CAN_FAIL true

void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t n, size_t bytes);
void *__libc_realloc(void *p, size_t bytes);
void *__libc_memalign(size_t alignment, size_t bytes);
void __libc_free(void *p);

static bool fails(void) {
    if (!watching || ++calls != fail_at) return false;
    errno = ENOMEM;
    return true;
}

static void *counted(void *p) {
    if (watching && p) live++;
    return p;
}

void *malloc(size_t bytes) {
    return fails() ? NULL : counted(__libc_malloc(bytes));
}

void *calloc(size_t n, size_t bytes) {
    return fails() ? NULL : counted(__libc_calloc(n, bytes));
}

void *realloc(void *p, size_t bytes) {
    if (fails()) return NULL;
    return p ? __libc_realloc(p, bytes) : counted(__libc_realloc(p, bytes));
}

void *aligned_alloc(size_t alignment, size_t bytes) {
    return fails() ? NULL : counted(__libc_memalign(alignment, bytes));
}

int posix_memalign(void **out, size_t alignment, size_t bytes) {
    if (fails()) return ENOMEM;
    *out = counted(__libc_memalign(alignment, bytes));
    return *out ? 0 : ENOMEM;
}

void free(void *p) {
    if (watching && p) live--;
    __libc_free(p);
}
#else
#define CAN_FAIL false
#endif

#endif
