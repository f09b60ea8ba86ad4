/* no_cuda.c - stands in for kernels/cuda in a build without nvcc. */
#include "backend.h"

gn_status gn_cuda_open(gn_ctx *ctx, int index, bool auto_compute, gn_error *err) {
    (void)ctx, (void)auto_compute;
    return gn_fail(err, GN_EDEVICE,
                   "device cuda:%d: this build has no CUDA support; use \"cpu\" or \"auto\", or build "
                   "where nvcc is found",
                   index);
}
