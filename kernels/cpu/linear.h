/* linear.h - what the files of the CPU's gn_linear share.
 *
 *   linear.c             lays out working memory, cuts the product into tiles, runs threads
 *   linear_reference.c   the whole op in plain loops with double sums: the yardstick, and all
 *                        there is on machines without SIMD code here
 *   linear_simd.h        the inner loops, written once over a few vector primitives
 *   linear_ISA.c         those primitives for one instruction set */
#ifndef GN_CPU_LINEAR_H
#define GN_CPU_LINEAR_H

#include "cpu.h"

/* Bytes of working memory, each piece on cache lines of its own; both return how many. */
static inline size_t gn_linear_piece(size_t *total, size_t bytes) {
    const size_t at = *total;
    *total += (bytes + 63) / 64 * 64;
    return at;
}

gn_status gn_cpu_linear_reference(gn_ctx *ctx, const gn_linear_args *args);
size_t gn_cpu_linear_reference_workspace(const gn_ctx *ctx, const gn_linear_args *args);

/* Rounds to the compute dtype, staying float32. */
static inline float gn_linear_round(float x, gn_dtype compute) {
    return compute == GN_BF16 ? gn_bf16_to_f32(gn_f32_to_bf16(x)) : x;
}

/* dst = row t of x, normalised if asked, rounded to the compute dtype. */
void gn_linear_input_row(float *dst, const gn_linear_args *args, int64_t t, gn_dtype compute);

#endif
