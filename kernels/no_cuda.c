/* no_cuda.c - stands in for kernels/cuda in a build without nvcc. */
#include "backend.h"
#include "decoder.h"
#include "page_device.h"
#include "sample.h"

gn_status gn_cuda_open(gn_ctx *ctx, int index, bool auto_compute, gn_error *err) {
    (void)ctx, (void)auto_compute;
    return gn_fail(
        err, GN_EDEVICE,
        "device cuda:%d: this build has no CUDA support; use \"cpu\" or \"auto\", or build "
        "where nvcc is found",
        index);
}

gn_status gn_cuda_sampler_open(gn_cuda_sampler **out, gn_ctx *ctx, int32_t max_rows,
                               int32_t vocab) {
    (void)out, (void)ctx, (void)max_rows, (void)vocab;
    return GN_EUNSUPPORTED;
}

void gn_cuda_sampler_close(gn_cuda_sampler *s) {
    (void)s;
}

gn_status gn_cuda_sampler_run(gn_cuda_sampler *s, const gn_tensor *logits,
                              const gn_sample_row *rows, int32_t n, uint16_t *const *counts) {
    (void)s, (void)logits, (void)rows, (void)n, (void)counts;
    return GN_EUNSUPPORTED;
}

gn_status gn_cuda_sampler_wait(gn_cuda_sampler *s, const gn_sampled **results) {
    (void)s, (void)results;
    return GN_EUNSUPPORTED;
}

const int32_t *gn_cuda_sampler_ids(const gn_cuda_sampler *s) {
    (void)s;
    return NULL;
}

gn_status gn_cuda_decoder_open(gn_decoder **out, gn_ctx *ctx, const gn_decoder_options *options) {
    (void)out, (void)ctx, (void)options;
    return GN_EUNSUPPORTED;
}

void gn_cuda_decoder_close(gn_decoder *d) {
    (void)d;
}

gn_status gn_cuda_decoder_run(gn_decoder *d, gn_tensor *x, const gn_tensor *cos,
                              const gn_tensor *sin, const gn_seqs *seqs, const gn_lora *lora,
                              int n_lora) {
    (void)d, (void)x, (void)cos, (void)sin, (void)seqs, (void)lora, (void)n_lora;
    return GN_EUNSUPPORTED;
}

gn_status gn_cuda_page_device_open(gn_page_device **out, gn_ctx *ctx) {
    (void)out, (void)ctx;
    return GN_EUNSUPPORTED;
}
