/* page_device.c - which contexts have one. */
#include "page_device.h"

gn_status gn_page_device_open(gn_page_device **out, gn_ctx *ctx) {
    *out = NULL;
    return gn_ctx_is_host(ctx) ? GN_OK : gn_cuda_page_device_open(out, ctx);
}

void gn_page_device_close(gn_page_device *device) {
    if (device) device->close(device);
}
