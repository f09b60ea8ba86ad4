/* decoder.cc - kernels/cuda/decoder.cu on the CPU. */
#include "tests/emulated/emulator.h"

#include "kernels/cuda/decoder.cu"
