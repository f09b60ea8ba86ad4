/* bnb.h - bitsandbytes' serialized 4-bit form of one weight (docs/formats.md). */
#ifndef GN_BNB_H
#define GN_BNB_H

#include "engine/tensor_file.h"
#include "kernels/blockquant.h"

/* The tensors of a weight, checked against the expected shape: types, lengths, block sizes and
 * the JSON of the quant state. All pointers are into the file. */
typedef struct gn_bnb_weight {
    gn_qtype qtype;
    gn_dtype dtype; /* the type the weight was made from */
    const gn_file_tensor *codes, *state, *quant_map, *absmax;
    const gn_file_tensor *nested_absmax, *nested_quant_map; /* NULL without double quantization */
    float offset;
} gn_bnb_weight;

/* `where` names the file or folder in the message about a missing tensor. */
GN_CHECKED gn_status gn_bnb_find(gn_bnb_weight *out, const gn_tensor_file *file, const char *where,
                                 const char *name, int64_t rows, int64_t cols, gn_error *err);

/* "float32", "float16" or "bfloat16", as torch and config.json write it. */
const char *gn_torch_dtype_name(gn_dtype dtype);

/* What stands behind X in the names of the tensors; the state's is followed by the type's name. */
#define GN_BNB_QUANT_MAP        ".quant_map"
#define GN_BNB_ABSMAX           ".absmax"
#define GN_BNB_NESTED_ABSMAX    ".nested_absmax"
#define GN_BNB_NESTED_QUANT_MAP ".nested_quant_map"
#define GN_BNB_STATE            ".quant_state.bitsandbytes__"

/* The state's JSON as bitsandbytes writes it; returns its length (below `size`). */
int gn_bnb_write_state(char *json, size_t size, gn_qtype qtype, gn_dtype dtype, int64_t rows,
                       int64_t cols, bool nested, float offset);

#endif
