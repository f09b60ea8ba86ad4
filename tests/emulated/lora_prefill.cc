/* lora_prefill.cc - kernels/cuda/lora_prefill.cu on the CPU. */
#include "tests/emulated/emulator.h"

extern "C" { /* for tests in C */
#include "kernels/cuda/linear.h"
}

#define stages shared
#include "kernels/cuda/lora_prefill.cu"
