/* harness.c - the server over the fake engine, with the adapters "pirate" and "brief". Included by
 * tests. */
#include "tests/server/client.c"
#include "tests/server/fake_engine.c"

static gn_model fake_model;

static void start_server(harness *h, const gn_server_options *options) {
    gn_server_options o = options ? *options : (gn_server_options){0};
    gn_error err = {0};
    gn_engine *engine = NULL;
    o.model_name = "fake";
    open_server(h, &o);
    cr_assert_eq(gn_engine_open(&engine, &fake_model, NULL, &err), GN_OK);
    cr_assert_eq(gn_server_serve(h->server, &fake_model, engine, &err), GN_OK, "%s", err.message);
    add_adapter(h, &fake_model, "pirate", "pirate");
    add_adapter(h, &fake_model, "brief", "brief");
    run_in_thread(h);
}

/* Nothing may be left behind. */
static void stop_server(harness *h) {
    close_server(h);
    cr_assert_eq(fake_live, 0, "%d requests are still in the engine", (int)fake_live);
    cr_assert_eq(fake_adapters, 0, "%d adapters are still open", (int)fake_adapters);
}
