/* dequantize.cc - kernels/cuda/dequantize.cu on the CPU. */
#include "tests/emulated/emulator.h"

extern "C" { /* for tests in C */
#include "kernels/cuda/operands.h"
}

#include "kernels/cuda/dequantize.cu"
