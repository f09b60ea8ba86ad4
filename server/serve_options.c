/* serve_options.c - the command line of `guanaco-server serve`. */
#include "server/serve_options.h"

#include <stdlib.h>

#define FIELD(name) offsetof(gn_serve_options, name)

/* --quant-type's choices: behind auto, gn_qtype's in order. */
#define QUANT_CHOICES   "auto|none|nf4|fp4|fp4-e2m1|fp4-e3m0|int4|int8"
#define COMPUTE_CHOICES "auto|float32|bfloat16"

const gn_option gn_serve_option_table[] = {
    GN_OPTION_GROUP("Model"),
    {GN_OPT_STRING, "model", FIELD(model), .value = "DIR",
     .help = "the base, a Hugging Face folder (default: the small model that comes with Guanaco)"},
    {GN_OPT_STRING, "synthetic", FIELD(synthetic), .value = "SHAPE",
     .help = "for benchmarks, instead of a folder: random weights in the shape of llama-1.1b, -7b, "
             "-13b, -33b or -65b; prompts are token ids, and replies spell theirs"},
    {GN_OPT_STRING, "model-name", FIELD(model_name), .value = "NAME",
     .help = "its name in the API (default: the folder's)"},
    {GN_OPT_STRING, "chat-template", FIELD(chat_template), .value = "NAME",
     .help = "guanaco, vicuna, alpaca, llama-2, llama-3, chatml, mistral, or a file (default: the "
             "model folder's, else guanaco)"},
    {GN_OPT_CHOICE, "quant-type", FIELD(quant), .initial = "auto", .choices = QUANT_CHOICES,
     .help = "how to hold 16- and 32-bit projections; auto is nf4, none leaves them as stored"},
    {GN_OPT_BOOL, "double-quant", FIELD(double_quant), .initial = "true",
     .help = "quantize the 4-bit types' scales too"},
    GN_OPTION_GROUP("Adapters"),
    {GN_OPT_LIST, "adapter", FIELD(adapters), .value = "NAME=DIR",
     .help = "a LoRA adapter (PEFT folder) that requests may name; may be given several times"},
    {GN_OPT_FLAG, "allow-adapter-loading", FIELD(allow_adapter_loading),
     .help = "let clients load and unload adapters from --adapter-dir"},
    {GN_OPT_STRING, "adapter-dir", FIELD(adapter_dir), .value = "DIR",
     .help = "the folder below which clients may load adapters"},
    GN_OPTION_GROUP("Network"),
    {GN_OPT_STRING, "host", FIELD(host), .initial = "127.0.0.1", .value = "ADDRESS",
     .help = "address to listen on; 0.0.0.0 or :: for every network"},
    {GN_OPT_INT, "port", FIELD(port), .initial = "8080", .min = 0, .max = 65535,
     .help = "port to listen on; 0 picks a free one"},
    {GN_OPT_STRING, "api-key", FIELD(api_key), .value = "KEY",
     .help = "what clients must send as a bearer token (default: $GUANACO_API_KEY, else none)"},
    {GN_OPT_STRING, "cors", FIELD(cors), .value = "ORIGIN",
     .help = "an origin whose web pages may use the API, or *"},
    {GN_OPT_SIZE, "max-body", FIELD(max_body), .initial = "8MiB", .min = 1024, .max = 1 << 30,
     .help = "largest request"},
    {GN_OPT_INT, "max-connections", FIELD(max_connections), .initial = "16384", .min = 1,
     .max = 1 << 20, .help = "open connections; more are refused"},
    GN_OPTION_GROUP("Engine"),
    {GN_OPT_STRING, "device", FIELD(device), .initial = "auto", .value = "DEVICE",
     .help = "where to compute: auto (a GPU if there is one), cpu, cuda or cuda:N"},
    {GN_OPT_CHOICE, "compute-dtype", FIELD(compute), .initial = "auto", .choices = COMPUTE_CHOICES,
     .help = "arithmetic"},
    {GN_OPT_INT, "threads", FIELD(threads), .min = 0, .max = 1024, .help = "0: all cores"},
    {GN_OPT_INT, "context", FIELD(context), .min = 0, .max = 1 << 24,
     .help = "tokens of prompt and reply together; 0: the model's"},
    {GN_OPT_INT, "max-seqs", FIELD(max_seqs), .initial = "64", .min = 1, .max = 4096,
     .help = "replies made at the same time"},
    {GN_OPT_INT, "max-batch-tokens", FIELD(max_batch_tokens), .initial = "0", .max = 1 << 16,
     .help = "tokens of one forward pass; 0: 512 on a CPU, 2048 on a GPU"},
    {GN_OPT_INT, "prefill-chunk", FIELD(prefill_chunk), .initial = "0", .max = 1 << 16,
     .help =
         "of them, prompts' in a pass in which replies go on: more makes gaps in replies longer, "
         "fewer the wait for a reply; 0: an eighth on a CPU, a half on a GPU"},
    {GN_OPT_INT, "max-queue", FIELD(max_queue), .initial = "1024", .min = 1, .max = 1 << 20,
     .help = "requests that may wait; more are refused"},
    {GN_OPT_SIZE, "memory-budget", FIELD(memory_budget), .value = "SIZE",
     .help = "of the GPU's memory, for everything together (default: what is free, less a margin); "
             "on a CPU for keys and values, adapters and activations, not for weights (default: no "
             "bound)"},
    {GN_OPT_SIZE, "kv-memory", FIELD(kv_memory), .value = "SIZE",
     .help = "of it, for keys and values (default: what remains, at most what --max-seqs contexts "
             "need; on a CPU without --memory-budget 1GiB)"},
    {GN_OPT_CHOICE, "kv-dtype", FIELD(kv_dtype), .initial = "auto", .choices = GN_KV_CHOICES,
     .help = GN_KV_HELP},
    {GN_OPT_SIZE, "adapter-memory", FIELD(adapter_memory), .value = "SIZE",
     .help = "of it, for the adapters in use on a GPU; others wait in the host's memory (default: "
             "an eighth, or what those of --adapter take, up to half); on a CPU there is no such "
             "limit"},
    {GN_OPT_SIZE, "adapter-host-memory", FIELD(adapter_host_memory), .value = "SIZE",
     .help = "of the host's memory, for adapters; others are read from their folders when they are "
             "needed (default: half of what is free)"},
    {GN_OPT_FLAG, "no-prefix-cache", FIELD(no_prefix_cache),
     .help = "compute every prompt from its beginning"},
    GN_OPTION_GROUP("Output"),
    {GN_OPT_FLAG, "json", FIELD(json), .help = "start-up and access log as JSON lines"},
    {GN_OPT_FLAG, "quiet", FIELD(quiet), .help = "no access log"},
    {GN_OPT_FLAG, "version", FIELD(version), .help = "print the version"},
    GN_OPTION_END};

gn_model_options gn_serve_model_options(const gn_serve_options *o) {
    const gn_qtype quant = o->quant > 0 ? (gn_qtype)(o->quant - 1) : GN_Q_NONE;
    return (gn_model_options){.device = o->device,
                              .compute = (gn_compute)o->compute,
                              .as_stored = o->quant > 0 && quant == GN_Q_NONE,
                              .quant = quant,
                              .no_double_quant = !o->double_quant,
                              .threads = o->threads,
                              .adapter_host_bytes = o->adapter_host_memory,
                              .chat_template = o->chat_template};
}

gn_engine_options gn_serve_engine_options(const gn_serve_options *o) {
    const bool has_adapters = o->adapters.n > 0 || o->allow_adapter_loading;
    return (gn_engine_options){.max_seqs = o->max_seqs,
                               .max_batch_tokens = o->max_batch_tokens,
                               .prefill_chunk = o->prefill_chunk,
                               .max_queue = o->max_queue,
                               .memory_bytes = o->memory_budget,
                               .kv_bytes = o->kv_memory,
                               .kv_dtype = (gn_kv_dtype)o->kv_dtype,
                               .adapter_bytes = has_adapters ? o->adapter_memory : -1,
                               .context = o->context,
                               .no_prefix_cache = o->no_prefix_cache};
}

gn_server_options gn_serve_server_options(const gn_serve_options *o) {
    const char *key = o->api_key ? o->api_key : getenv("GUANACO_API_KEY");
    return (gn_server_options){.host = o->host,
                               .port = o->port,
                               .model_name = o->model_name,
                               .api_key = key && *key ? key : NULL,
                               .cors = o->cors,
                               .allow_adapter_loading = o->allow_adapter_loading,
                               .adapter_dir = o->adapter_dir,
                               .max_body = o->max_body,
                               .max_connections = o->max_connections,
                               .log = o->json ? stdout : stderr,
                               .json_log = o->json,
                               .quiet = o->quiet};
}
