/* metrics.c - GET /health for people and load balancers, GET /metrics for Prometheus. */
#include "server/routes.h"
#include "server/state.h"

void gn_get_health(gn_exchange *x) {
    const gn_server *s = x->server;
    const gn_engine_stats e = gn_engine_read_stats(s->engine);
    const gn_model_info m = gn_model_describe(s->model);
    gn_buffer b = {0};
    gn_buffer_format(&b, "{\"status\":\"%s\",\"version\":\"" GN_VERSION "\",\"model\":",
                     s->stops ? "stopping" : "ok");
    gn_buffer_json_text(&b, s->model_name);
    gn_buffer_format(&b, ",\"device\":\"%s\",\"quant_type\":\"%s\",\"parameters\":%lld", m.device,
                     gn_qtype_name(m.quant), (long long)m.parameters);
    gn_buffer_format(&b,
                     ",\"engine\":{\"running\":%d,\"waiting\":%d,\"max_seqs\":%d,\"context\":%d,"
                     "\"kv_blocks\":%d,\"kv_blocks_used\":%d,\"kv_blocks_cached\":%d,",
                     e.running, e.waiting, e.max_seqs, e.context, e.kv_blocks, e.kv_blocks_used,
                     e.kv_blocks_cached);
    gn_buffer_format(&b,
                     "\"requests\":%lld,\"prompt_tokens\":%lld,\"cached_tokens\":%lld,"
                     "\"completion_tokens\":%lld},\"adapters\":%d,\"connections\":%d}",
                     (long long)e.requests, (long long)e.prompt_tokens, (long long)e.cached_tokens,
                     (long long)e.completion_tokens, s->registry.n, s->n_connections);
    gn_respond_json(x, 200, &b);
    gn_buffer_free(&b);
}

/* Prometheus's text format. */
static void write_metric(gn_buffer *b, const char *name, const char *type, const char *help,
                         double value) {
    gn_buffer_format(b, "# HELP guanaco_%s %s\n# TYPE guanaco_%s %s\nguanaco_%s %.17g\n", name,
                     help, name, type, name, value);
}

static void write_engine(gn_buffer *b, const gn_engine_stats *e) {
    write_metric(b, "requests_running", "gauge", "Requests in the batch.", e->running);
    write_metric(b, "requests_waiting", "gauge", "Requests in the queue.", e->waiting);
    write_metric(b, "kv_blocks", "gauge", "Blocks of the KV cache.", e->kv_blocks);
    write_metric(b, "kv_blocks_used", "gauge", "Blocks that running requests hold.",
                 e->kv_blocks_used);
    write_metric(b, "kv_blocks_cached", "gauge", "Blocks kept for prompts seen before.",
                 e->kv_blocks_cached);
    write_metric(b, "prompt_tokens_total", "counter", "Prompt tokens computed.",
                 (double)e->prompt_tokens);
    write_metric(b, "cached_tokens_total", "counter", "Prompt tokens found in the prefix cache.",
                 (double)e->cached_tokens);
    write_metric(b, "completion_tokens_total", "counter", "Tokens sampled.",
                 (double)e->completion_tokens);
    write_metric(b, "engine_requests_total", "counter", "Sequences submitted.",
                 (double)e->requests);
    write_metric(b, "engine_steps_total", "counter", "Forward passes.", (double)e->steps);
    write_metric(b, "engine_busy_seconds_total", "counter", "Time in forward passes and sampling.",
                 e->model_seconds);
    write_metric(b, "adapter_host_bytes", "gauge", "Adapters in the host's memory.",
                 (double)e->adapter_host_bytes);
    write_metric(b, "adapter_reads_total", "counter", "Adapters read from their folders again.",
                 (double)e->adapter_reads);
}

static void write_memory(gn_buffer *b, const gn_memory_plan *p) {
    const struct {
        const char *use;
        int64_t bytes;
    } parts[] = {{"weights", p->weights},
                 {"kv", p->kv},
                 {"adapters", p->adapters},
                 {"scratch", p->scratch},
                 {"reserve", p->reserve}};
    gn_buffer_text(b, "# HELP guanaco_memory_bytes The device's memory, as planned at start.\n"
                      "# TYPE guanaco_memory_bytes gauge\n");
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        gn_buffer_format(b, "guanaco_memory_bytes{use=\"%s\"} %lld\n", parts[i].use,
                         (long long)parts[i].bytes);
}

static void write_server(gn_buffer *b, gn_server *s) {
    const gn_counters *c = &s->counters;
    write_metric(b, "connections", "gauge", "Open connections.", s->n_connections);
    write_metric(b, "connections_total", "counter", "Connections accepted.",
                 (double)c->connections);
    gn_buffer_text(b, "# HELP guanaco_http_requests_total Responses by status.\n"
                      "# TYPE guanaco_http_requests_total counter\n");
    for (int i = 2; i < GN_STATUS_CLASSES; i++)
        gn_buffer_format(b, "guanaco_http_requests_total{status=\"%dxx\"} %lld\n", i,
                         (long long)c->requests[i]);
    write_metric(b, "http_canceled_total", "counter", "Requests whose client left.",
                 (double)c->canceled);
    write_metric(b, "http_received_bytes_total", "counter", "Bytes read from clients.",
                 (double)c->bytes_received);
    write_metric(b, "http_sent_bytes_total", "counter", "Bytes sent to clients.",
                 (double)c->bytes_sent);
    write_metric(b, "loop_idle_seconds_total", "counter", "Time the HTTP thread had nothing to do.",
                 (double)uv_metrics_idle_time(&s->loop) * 1e-9);
    write_metric(b, "adapters", "gauge", "Adapters that requests may name.", s->registry.n);
    write_metric(b, "start_time_seconds", "gauge", "When the server started, seconds since 1970.",
                 (double)s->created);
}

void gn_get_metrics(gn_exchange *x) {
    const gn_engine_stats stats = gn_engine_read_stats(x->server->engine);
    gn_buffer b = {0};
    const gn_memory_plan memory = gn_engine_memory(x->server->engine);
    write_engine(&b, &stats);
    write_memory(&b, &memory);
    write_server(&b, x->server);
    gn_respond(x, 200, "text/plain; version=0.0.4; charset=utf-8", NULL, b.data, b.size);
    gn_buffer_free(&b);
}
