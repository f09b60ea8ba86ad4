/* guanaco.h - the public interface: one 4-bit base model, many LoRA adapters, an engine
 * that serves them together.
 *
 *   gn_model   a base: weights on a device, tokenizer, chat template. Immutable.
 *   gn_adapter LoRA weights for one base. Immutable, reference-counted, known by content.
 *   gn_engine  one thread that owns the device, the KV cache and the schedule; takes
 *              requests (request.h) from any thread and answers through a callback.
 *
 * The library never prints and never exits. Strings are UTF-8. Unless a comment says
 * otherwise, pointers passed in are borrowed for the call only, functions may be called
 * from any thread, and a gn_error may be NULL. */
#ifndef GUANACO_H
#define GUANACO_H

#include "engine/request.h"
#include "kernels/base.h"
#include "kernels/blockquant.h" /* gn_qtype */

#ifdef __cplusplus
extern "C" {
#endif

/* ---- model ---- */

typedef struct gn_model gn_model;

typedef enum gn_compute { GN_COMPUTE_AUTO, GN_COMPUTE_F32, GN_COMPUTE_BF16 } gn_compute;

typedef struct gn_model_options {
    const char *device;   /* "auto" (NULL: the first GPU, else the CPU), "cpu", "cuda", "cuda:N" */
    gn_compute compute;   /* AUTO: bf16 where the device multiplies it natively, else f32 */
    bool as_stored;       /* keep 16/32-bit projections as they are; else quantize to `quant` */
    gn_qtype quant;       /* with as_stored false; GN_Q_NONE means NF4 */
    bool no_double_quant; /* keep float32 absmax (4-bit types made while loading) */
    int threads;          /* 0: all cores */
    const char *chat_template; /* file or built-in name; NULL: the folder's, else by model */
    /* Of the host's memory for adapters' weights; those that find no room are read from their
     * folders again when they are needed. 0: half of what is free. */
    int64_t adapter_host_bytes;
    /* Progress while weights are made ready: done of total bytes. May be NULL. */
    void (*progress)(void *user, int64_t done, int64_t total);
    void *user;
} gn_model_options;

/* Opens a Hugging Face folder (16/32-bit, or bitsandbytes' serialized 4-bit form). Zeroed
 * options are the defaults. */
GN_CHECKED gn_status gn_model_open(gn_model **out, const char *dir, const gn_model_options *options,
                                   gn_error *err);
/* Random weights in the shape of "llama-1.1b", "llama-7b", "-13b", "-33b" or "-65b", for
 * benchmarks; no tokenizer: requests take ids, and a reply's text is its tokens' numbers. */
GN_CHECKED gn_status gn_model_synthetic(gn_model **out, const char *shape,
                                        const gn_model_options *options, gn_error *err);
void gn_model_close(gn_model *model); /* after every adapter and engine that uses it */

typedef struct gn_model_info {
    const char *dir, *device;
    gn_qtype quant;
    gn_compute compute;
    int64_t parameters, weight_bytes;
    int layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, context;
} gn_model_info;
gn_model_info gn_model_describe(const gn_model *model); /* strings live as long as the model */

/* ---- text ---- */

/* *ids is malloc'ed (caller frees). Control tokens in `text` are plain text. */
GN_CHECKED gn_status gn_tokenize(const gn_model *model, const char *text, size_t len, bool add_bos,
                                 int32_t **ids, int32_t *n, gn_error *err);
/* *text is malloc'ed and terminated. An id outside the vocabulary is GN_EINVAL. */
GN_CHECKED gn_status gn_detokenize(const gn_model *model, const int32_t *ids, int32_t n,
                                   char **text, size_t *len, gn_error *err);
/* The bytes one token stands for ("▁" is a space, <0x0A> is a newline; control tokens are
 * empty). Borrowed from the model. */
const char *gn_token_bytes(const gn_model *model, int32_t id, size_t *len);

typedef struct gn_message {
    const char *role; /* "system", "user" or "assistant" */
    const char *content;
} gn_message;
/* Renders a conversation through the chat template and tokenizes it, BOS included, ready
 * for the assistant's turn. *ids is malloc'ed. */
GN_CHECKED gn_status gn_chat_encode(const gn_model *model, const gn_message *messages,
                                    int n_messages, int32_t **ids, int32_t *n, gn_error *err);
/* Strings that end the assistant's turn under the template. Borrowed from the model. */
const char *const *gn_chat_stops(const gn_model *model, int *n);

/* ---- adapters ---- */

/* Loads a PEFT folder made for this base. One reference belongs to the caller. */
GN_CHECKED gn_status gn_adapter_open(gn_adapter **out, const gn_model *model, const char *dir,
                                     gn_error *err);
gn_adapter *gn_adapter_ref(gn_adapter *adapter);
void gn_adapter_close(gn_adapter *adapter); /* drops a reference; accepts NULL */
size_t gn_adapter_bytes(const gn_adapter *adapter);
int gn_adapter_max_rank(const gn_adapter *adapter);

/* ---- engine ---- */

typedef struct gn_engine gn_engine;

/* How keys and values are kept. FP8 (e4m3, a scale a token and head) takes half of BF16's memory;
 * docs/performance.md says what it costs. */
typedef enum gn_kv_dtype {
    GN_KV_AUTO, /* as products are computed: float32 or bf16 */
    GN_KV_BF16,
    GN_KV_FP8
} gn_kv_dtype;

typedef struct gn_engine_options {
    int32_t max_seqs;         /* sequences in one batch; 0: 64 */
    int32_t max_batch_tokens; /* rows of one forward; 0: 512 on a CPU, 2048 on a GPU */
    int32_t prefill_chunk;    /* of them prompts' while replies are made, too; 0: an eighth of them
                               * on a CPU, a half on a GPU */
    int32_t max_queue;        /* waiting requests before GN_EBUSY; 0: 1024 */
    /* All of the device's memory together; 0: on a GPU what is free, less a margin, on a CPU no
     * bound. A CPU's weights are not counted. */
    int64_t memory_bytes;
    /* Of it the KV cache; 0: what remains, or 1 GiB where nothing bounds it. No more than max_seqs
     * contexts need. */
    int64_t kv_bytes;
    gn_kv_dtype kv_dtype;
    /* Of it a GPU's adapters; 0: what those of `adapters` need, or an eighth if that is more; less:
     * none, and no request has any. A CPU uses adapters where they are. */
    int64_t adapter_bytes;
    gn_adapter *const *adapters; /* that are there already, for the two above */
    int32_t n_adapters;
    int32_t context; /* tokens a sequence may have; 0: the model's */
    bool no_prefix_cache;
} gn_engine_options;

/* How the memory is divided; bytes. */
typedef struct gn_memory_plan {
    int64_t budget; /* the sum's bound; 0: none */
    int64_t weights, kv, adapters, scratch, reserve;
    int64_t kv_tokens;
} gn_memory_plan;

/* GN_ENOMEM says how much memory is missing, and what would fit. */
GN_CHECKED gn_status gn_engine_open(gn_engine **out, gn_model *model,
                                    const gn_engine_options *options, gn_error *err);
void gn_engine_close(gn_engine *engine); /* cancels what runs, then waits for the thread */
/* GN_ETOOBIG, with both sizes, when the device's memory for adapters is too small for this one, so
 * that no request can have it. gn_engine_open refuses such `adapters` itself. */
GN_CHECKED gn_status gn_engine_check_adapter(const gn_engine *engine, const gn_adapter *adapter,
                                             gn_error *err);

/* Copies the request and queues it. Refuses at once what can never run (GN_EINVAL, GN_ETOOBIG,
 * GN_EBUSY). After GN_OK exactly one event with a finish reason will come. */
GN_CHECKED gn_status gn_engine_submit(gn_engine *engine, const gn_request *request, uint64_t *id,
                                      gn_error *err);
/* Asks for GN_FINISH_CANCEL; nothing happens when the request has ended already. */
void gn_engine_cancel(gn_engine *engine, uint64_t id);

typedef struct gn_engine_stats {
    int32_t running, waiting;
    int32_t kv_blocks, kv_blocks_used, kv_blocks_cached, kv_block_tokens;
    int64_t prompt_tokens, cached_tokens, completion_tokens, requests; /* since start */
    int64_t steps;
    double model_seconds; /* spent in forward passes and sampling */
    int32_t context, max_seqs;
    /* Of the model's adapters: bytes in the host's memory, and folders read again. */
    int64_t adapter_host_bytes, adapter_reads;
} gn_engine_stats;
gn_engine_stats gn_engine_read_stats(gn_engine *engine);
gn_memory_plan gn_engine_memory(const gn_engine *engine);
/* The plan as a table to be read; malloc'ed, NULL when memory is short. */
char *gn_memory_plan_text(const gn_memory_plan *plan);

#ifdef __cplusplus
}
#endif
#endif
