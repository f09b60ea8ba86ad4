/* uploads.h - for tests: uploads that take their time, on the CPU. */
#ifndef GN_TEST_UPLOADS_H
#define GN_TEST_UPLOADS_H

#include "kernels/ctx.h"

/* From now on an upload of this context is done, and its bytes are there, at the `polls`th poll
 * of it, or when it is closed. One context of a process at a time. */
void test_delay_uploads(gn_ctx *ctx, int polls);
/* Uploads begun since, and those of them not yet closed. */
int test_uploads_begun(void);
int test_uploads_open(void);

#endif
