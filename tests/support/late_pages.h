/* late_pages.h - for tests: a page device whose copies run as late as they may: when an op is to
 * use their slot, and in order. So whoever does not wait for a copy is found out. */
#ifndef GN_TEST_LATE_PAGES_H
#define GN_TEST_LATE_PAGES_H

#include "kernels/page_device.h"

/* Its memory on the device is ctx's. Closed by gn_page_device_close. */
gn_page_device *test_late_pages(gn_ctx *ctx);

#endif
