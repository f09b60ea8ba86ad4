/* attention.cc - kernels/cuda/attention.cu on the CPU. */
#include "tests/emulated/emulator.h"

GN_EMULATED_SHARED(float, records);
#include "kernels/cuda/attention.cu"
