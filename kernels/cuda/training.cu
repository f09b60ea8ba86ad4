/* training.cu - the ops of ops_train.h, which this backend does not have yet: each says so. */
#include "cuda.h"

gn_status gn_cuda_embed_bwd(gn_ctx *, gn_tensor *, const gn_tensor *, const int32_t *) {
    return GN_EUNSUPPORTED;
}

gn_status gn_cuda_rmsnorm_bwd(gn_ctx *, gn_tensor *, gn_tensor *, const gn_tensor *,
                              const gn_tensor *, const gn_tensor *, const gn_tensor *, float) {
    return GN_EUNSUPPORTED;
}

gn_status gn_cuda_linear_bwd(gn_ctx *, const gn_linear_args *, const gn_linear_grads *) {
    return GN_EUNSUPPORTED;
}

size_t gn_cuda_linear_bwd_workspace(const gn_ctx *, int64_t, int64_t, int64_t, int64_t) {
    return 0;
}

gn_status gn_cuda_swiglu(gn_ctx *, gn_tensor *, const gn_tensor *, const gn_tensor *) {
    return GN_EUNSUPPORTED;
}

gn_status gn_cuda_swiglu_bwd(gn_ctx *, gn_tensor *, gn_tensor *, const gn_tensor *,
                             const gn_tensor *, const gn_tensor *) {
    return GN_EUNSUPPORTED;
}

gn_status gn_cuda_rope(gn_ctx *, gn_tensor *, const gn_tensor *, const gn_tensor *) {
    return GN_EUNSUPPORTED;
}

gn_status gn_cuda_rope_bwd(gn_ctx *, gn_tensor *, const gn_tensor *, const gn_tensor *) {
    return GN_EUNSUPPORTED;
}

gn_status gn_cuda_cross_entropy(gn_ctx *, const gn_cross_entropy_args *) {
    return GN_EUNSUPPORTED;
}

size_t gn_cuda_cross_entropy_workspace(const gn_ctx *, int64_t, int64_t) {
    return 0;
}
