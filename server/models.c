/* models.c - GET /v1/models and /v1/models/{id}: the base and each adapter. */
#include <string.h>

#include "server/routes.h"
#include "server/state.h"

static void write_model(gn_buffer *b, const gn_server *s, const char *id, const char *root,
                        const char *parent, int64_t created) {
    gn_buffer_text(b, "{\"id\":");
    gn_buffer_json_text(b, id);
    gn_buffer_format(b, ",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"guanaco\",\"root\":",
                     (long long)created);
    gn_buffer_json_text(b, root);
    gn_buffer_text(b, ",\"parent\":");
    gn_buffer_json_text(b, parent);
    gn_buffer_format(b, ",\"max_model_len\":%d}", gn_engine_read_stats(s->engine).context);
}

static void write_base(gn_buffer *b, const gn_server *s) {
    write_model(b, s, s->model_name, gn_model_describe(s->model).dir, NULL, s->created);
}

static void write_adapter(gn_buffer *b, const gn_server *s, const gn_registered *item) {
    write_model(b, s, item->name, item->dir, s->model_name, item->created);
}

void gn_get_models(gn_exchange *x) {
    const gn_server *s = x->server;
    gn_buffer body = {0};
    gn_buffer_text(&body, "{\"object\":\"list\",\"data\":[");
    write_base(&body, s);
    for (int i = 0; i < s->registry.n; i++) {
        gn_buffer_text(&body, ",");
        write_adapter(&body, s, &s->registry.items[i]);
    }
    gn_buffer_text(&body, "]}");
    gn_respond_json(x, 200, &body);
    gn_buffer_free(&body);
}

void gn_get_model(gn_exchange *x) {
    const gn_server *s = x->server;
    const gn_registered *item = gn_registry_find(&s->registry, x->rest);
    gn_buffer body = {0};
    if (item) {
        write_adapter(&body, s, item);
    } else if (strcmp(x->rest, s->model_name) == 0) {
        write_base(&body, s);
    } else {
        gn_http_fail(&x->refusal, 404, "model_not_found", "model",
                     "There is no model \"%.128s\" here.", x->rest);
        gn_respond_error(x, &x->refusal);
        return;
    }
    gn_respond_json(x, 200, &body);
    gn_buffer_free(&body);
}
