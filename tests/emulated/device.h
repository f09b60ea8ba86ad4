/* device.h - a context for kernels that emulator.h runs: the CPU's, but what is placed in it stands
 * in tiles, and what is staged is where kernels look for it. Its ops are the CPU's own, so it takes
 * none that meet a weight. */
#ifndef GN_TEST_EMULATED_DEVICE_H
#define GN_TEST_EMULATED_DEVICE_H

#include "kernels/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* In bfloat16, with so many multiprocessors; closed by gn_ctx_close. NULL: no memory. */
gn_ctx *emulated_open(int sms);

#ifdef __cplusplus
}
#endif

#endif
