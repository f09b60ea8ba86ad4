/* attention_train.cc - kernels/cuda/attention_train.cu on the CPU. */
#include "tests/emulated/emulator.h"

GN_EMULATED_SHARED(char, memory);
#include "kernels/cuda/attention_train.cu"
