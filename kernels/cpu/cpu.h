/* cpu.h - the CPU backend's ops, and what they share; for kernels/cpu only.
 *
 * Two rules hold everywhere here. Work is split over threads by output row or item, never
 * inside a sum, and sums run in an order that only the row's own length decides: so a row's
 * result is the same bits whatever the batch and however many the threads. */
#ifndef GN_CPU_H
#define GN_CPU_H

#include "kernels/backend.h"
#include "kernels/cpu/parallel.h"

#define X(name, parameters) gn_status gn_cpu_##name parameters;
GN_BACKEND_OPS(X)
#undef X
size_t gn_cpu_linear_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                               int64_t max_rank, int max_terms);
size_t gn_cpu_attention_workspace(const gn_ctx *ctx, int64_t context);
size_t gn_cpu_linear_bwd_workspace(const gn_ctx *ctx, int64_t rows, int64_t max_k, int64_t max_n,
                                   int64_t max_rank);
size_t gn_cpu_attention_train_workspace(const gn_ctx *ctx, int64_t rows, int64_t heads,
                                        int64_t head_dim, int64_t context);
size_t gn_cpu_cross_entropy_workspace(const gn_ctx *ctx, int64_t max_c, int64_t vocab);
size_t gn_cpu_place_bytes(const gn_ctx *ctx, const gn_matrix *host);
gn_status gn_cpu_place(gn_ctx *ctx, gn_matrix *out, const gn_matrix *host, void *memory);
size_t gn_cpu_quantize_place_bytes(const gn_ctx *ctx, gn_qtype type, bool double_quant,
                                   int64_t rows, int64_t cols);
gn_status gn_cpu_quantize_place(gn_ctx *ctx, gn_matrix *out, gn_qtype type, bool double_quant,
                                const void *src, gn_dtype dtype, int64_t rows, int64_t cols,
                                void *memory, gn_error *err);
void *gn_cpu_alloc(gn_ctx *ctx, size_t bytes);
void gn_cpu_free(gn_ctx *ctx, void *memory);
gn_status gn_cpu_copy(gn_ctx *ctx, void *dst, const void *src, size_t bytes);
gn_status gn_cpu_upload_begin(gn_ctx *ctx, void **event, void *dst, const void *src, size_t bytes);
gn_status gn_cpu_upload_poll(gn_ctx *ctx, void *event, bool *ready);
void gn_cpu_upload_end(gn_ctx *ctx, void *event);
gn_status gn_cpu_read_memory(gn_ctx *ctx, gn_ctx_memory *memory);
gn_status gn_cpu_measure_rates(gn_ctx *ctx, gn_rates *rates);
gn_status gn_cpu_measure_quantize(gn_ctx *ctx, gn_qtype type, bool double_quant, int64_t rows,
                                  int64_t cols, double *quantize, double *dequantize);

/* Elements under which an op's work is not worth waking a second thread for (a microsecond). */
enum { GN_CPU_SERIAL = 16384 };

static inline int64_t gn_cpu_round_up(int64_t n, int64_t step) {
    return (n + step - 1) / step * step;
}

/* Row `row` of a tensor of one or more dimensions. */
static inline float *gn_cpu_row(const gn_tensor *t, int64_t row) {
    return (float *)t->data + row * t->ld;
}

/* y = x / sqrt(mean(x^2) + eps) * w; y may be x. */
void gn_cpu_rmsnorm_row(float *y, const float *x, const float *w, float eps, int64_t n);

/* Sequences own consecutive rows; calls for increasing rows walk on from *seq. */
static inline int32_t gn_cpu_seq_of_row(const gn_seqs *seqs, int32_t seq, int64_t row) {
    while (seqs->row0[seq + 1] <= row) seq++;
    return seq;
}

#endif
