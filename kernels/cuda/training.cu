/* training.cu - attention's ops of ops_train.h, which this backend does not have yet: each says so.
 */
#include "cuda.h"

gn_status gn_cuda_attention_train(gn_ctx *, const gn_attention_rows *) {
    return GN_EUNSUPPORTED;
}

gn_status gn_cuda_attention_bwd(gn_ctx *, gn_tensor *, gn_tensor *, gn_tensor *, const gn_tensor *,
                                const gn_attention_rows *) {
    return GN_EUNSUPPORTED;
}

size_t gn_cuda_attention_train_workspace(const gn_ctx *, int64_t) {
    return 0;
}
