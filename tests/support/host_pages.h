/* host_pages.h - for tests: a page device whose memory is the host's. Copies run at once. */
#ifndef GN_TEST_HOST_PAGES_H
#define GN_TEST_HOST_PAGES_H

#include "kernels/page_device.h"

gn_page_device *test_host_pages(void);

#endif
