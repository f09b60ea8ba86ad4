/* decoder.c - checks a call, then hands it to the device that has a decoder. */
#include "decoder.h"

#include "backend.h"

gn_status gn_decoder_open(gn_decoder **out, gn_ctx *ctx, const gn_decoder_options *o) {
    if (!out || !ctx || !o || !o->layers || o->n_layers < 1 || o->heads < 1 || o->kv_heads < 1 ||
        o->heads % o->kv_heads != 0 || o->head_dim < 1)
        return GN_EINVAL;
    *out = NULL;
    return ctx->cuda ? gn_cuda_decoder_open(out, ctx, o) : GN_EUNSUPPORTED;
}

void gn_decoder_close(gn_decoder *d) {
    gn_cuda_decoder_close(d);
}

gn_status gn_decoder_run(gn_decoder *d, gn_tensor *x, const gn_tensor *cos, const gn_tensor *sin,
                         const gn_seqs *seqs, const gn_lora *lora, int n_lora) {
    if (!d || !x || !cos || !sin || !seqs || x->dtype != GN_F32 || x->shape[0] < 1 ||
        x->shape[0] > GN_DECODER_MAX_ROWS || seqs->n != x->shape[0] || x->ld % 4 != 0 ||
        n_lora < 0 || (n_lora > 0 && !lora))
        return GN_EINVAL;
    return gn_cuda_decoder_run(d, x, cos, sin, seqs, lora, n_lora);
}
