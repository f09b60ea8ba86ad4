/* serve_options.h - the command line of `guanaco-server serve`. */
#ifndef GN_SERVE_OPTIONS_H
#define GN_SERVE_OPTIONS_H

#include "engine/options.h"
#include "server/server.h"

typedef struct gn_serve_options {
    const char *model, *synthetic, *model_name;
    gn_strings adapters; /* NAME=DIR */
    const char *adapter_dir;
    bool allow_adapter_loading;

    const char *host, *api_key, *cors;
    int port;
    int64_t max_body;
    int max_connections;

    const char *device, *chat_template;
    int compute, quant, kv_dtype; /* indices into the choices */
    bool double_quant;
    int threads;

    int context, max_seqs, max_batch_tokens, prefill_chunk, max_queue;
    int64_t memory_budget, kv_memory, adapter_memory, adapter_host_memory;
    bool no_prefix_cache;

    bool json, quiet, version;
} gn_serve_options;

extern const gn_option gn_serve_option_table[];

/* What the parts are opened with. Strings are borrowed from the options. */
gn_model_options gn_serve_model_options(const gn_serve_options *o);
gn_engine_options gn_serve_engine_options(const gn_serve_options *o);
gn_server_options gn_serve_server_options(const gn_serve_options *o);

#endif
