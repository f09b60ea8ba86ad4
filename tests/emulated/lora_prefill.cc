/* lora_prefill.cc - kernels/cuda/lora_prefill.cu on the CPU. */
#include "tests/emulated/emulator.h"

extern "C" { /* for tests in C */
#include "kernels/cuda/linear.h"
#include "kernels/cuda/operands.h"
}

GN_EMULATED_SHARED(uint8_t, stages);
#include "kernels/cuda/lora_prefill.cu"
