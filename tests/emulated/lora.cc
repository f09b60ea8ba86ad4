/* lora.cc - kernels/cuda/lora.cu on the CPU. */
#include "tests/emulated/emulator.h"

extern "C" { /* for tests in C */
#include "kernels/cuda/linear.h"
}

#include "kernels/cuda/lora.cu"
