/* rope.cc - kernels/cuda/rope.cu on the CPU. */
#include "tests/emulated/emulator.h"

#include "kernels/cuda/rope.cu"
