/* gn_linear's calls one after the other, the next ones announced: what is made of weights ahead
 * of their turn is what the call would have made, whatever is announced and however little room
 * there is; also recorded. */
#include "linear_cases.h"

enum { CALLS = 6, AHEAD = 2 };

typedef enum {
    AS_ANNOUNCED,
    OTHERWISE, /* each call announces weights that do not come */
    RECORDED,
    WAYS
} way;

/* Two layers of a model of three products, not unlike LLaMA's. */
static const struct {
    weight_shape shape;
    bool norm;
    gn_epilogue epilogue;
} products[] = {
    {{512, {512, 128, 128}, 3}, true, GN_STORE},
    {{512, {1408, 1408}, 2}, true, GN_SWIGLU},
    {{1408, {512}, 1}, false, GN_ADD},
};

typedef struct {
    const sides *sides;
    weights w[CALLS];
    problem p[CALLS];
    placed_call *call[CALLS];
    gn_linear_weights next[CALLS][AHEAD];
} chain;

static void open_chain(chain *c, const sides *s, int T, layout lora, way way) {
    *c = (chain){.sides = s};
    for (int i = 0; i < CALLS; i++) {
        const int k = i % COUNT(products);
        c->w[i] = make_weights(s, products[k].shape, types[i == 4 ? 12 : i % 3], (uint64_t)(i + 1));
        const call one = {.T = T,
                          .norm = products[k].norm,
                          .epilogue = products[k].epilogue,
                          .lora = lora,
                          .lora_dtype = GN_BF16};
        c->p[i] = make_problem(s, &c->w[i], one, (uint64_t)(100 + i));
        c->call[i] = place_call(&c->p[i], 0, T);
        reserve(s->gpu, workspace_of(s->gpu, &c->p[i], T));
    }
    for (int i = 0; i < CALLS; i++) {
        gn_linear_args *args = &c->call[i]->args;
        args->next = c->next[i];
        for (int j = i + 1; j < CALLS && args->n_next < AHEAD; j++) {
            gn_linear_weights *next = &c->next[i][args->n_next++];
            const int from = way == OTHERWISE ? (j + i) % CALLS : j;
            next->n = c->w[from].s.n_parts;
            for (int p = 0; p < next->n; p++) next->w[p] = &c->w[from].placed[p];
        }
    }
}

static void close_chain(chain *c) {
    for (int i = 0; i < CALLS; i++) {
        free_call(c->call[i]);
        free_problem(&c->p[i]);
        free_weights(&c->w[i]);
    }
}

static gn_status run_chain(void *arg) {
    chain *c = arg;
    gn_status status = GN_OK;
    for (int i = 0; i < CALLS && status == GN_OK; i++)
        status = gn_linear(c->sides->gpu, &c->call[i]->args);
    return status;
}

static void check_chain(tally *t, const sides *s, int T, layout lora, way way) {
    gn_ctx *gpu = s->gpu;
    chain c;
    open_chain(&c, s, T, lora, way);
    /* All have the same terms, but for what their pairs hold. */
    cr_assert_eq(stage_rows(gpu, T, c.call[0]->terms, c.call[0]->args.n_lora), GN_OK);
    const gn_status status =
        way == RECORDED ? gn_ctx_replay(gpu, (uint64_t)T, run_chain, &c) : run_chain(&c);
    for (int i = 0; i < CALLS; i++) {
        outputs got = make_outputs(&c.p[i]);
        const char *why = ran(gpu, status, c.p[i].name);
        if (!why) why = read_call(&c.p[i], c.call[i], got.y);
        judge_problem(t, &c.p[i], &got, why);
        free_outputs(&got);
    }
    close_chain(&c);
}

Test(gpu_ahead, chains) {
    const int rows[] = {150, 300, 700};
    const int64_t layer = 512 * (512 + 2 * 128) + 3 * 512 * 1408;
    const int64_t room[] = {0, layer / 3, layer, 3 * layer};
    tally t = {0};
    for (int i = 0; i < COUNT(rows) * COUNT(room) * WAYS; i++) {
        if (is_brief() && i % 5 != 0) continue;
        const int T = rows[i % COUNT(rows)];
        sides s = open_sides(GN_BF16);
        cr_assert_eq(gn_linear_reserve_ahead(s.gpu, T, room[i / COUNT(rows) % COUNT(room)]), GN_OK);
        check_chain(&t, &s, T, NO_LORA, (way)(i / (COUNT(rows) * COUNT(room))));
        close_sides(&s);
    }
    conclude(&t, "chains");
}

/* Terms make weights wider, or, of few rows, do not. Their pairs are the call's own: one a chain.
 */
Test(gpu_ahead, lora) {
    const int rows[] = {150, 300};
    tally t = {0};
    for (int i = 0; i < COUNT(rows) * CALLS; i++) {
        if (is_brief() && i % 5 != 0) continue;
        sides s = open_sides(GN_BF16);
        cr_assert_eq(gn_linear_reserve_ahead(s.gpu, rows[i % 2], 4 << 20), GN_OK);
        chain c;
        open_chain(&c, &s, rows[i % 2], WIDE_ADAPTER, AS_ANNOUNCED);
        const int last = i / 2;
        outputs got = make_outputs(&c.p[last]);
        gn_status status = GN_OK;
        for (int j = last > 1 ? last - 2 : 0; j <= last && !status; j++) {
            cr_assert_eq(stage_rows(s.gpu, rows[i % 2], c.call[j]->terms, c.call[j]->args.n_lora),
                         GN_OK);
            status = gn_linear(s.gpu, &c.call[j]->args);
        }
        const char *why = ran(s.gpu, status, c.p[last].name);
        if (!why) why = read_call(&c.p[last], c.call[last], got.y);
        judge_problem(&t, &c.p[last], &got, why);
        free_outputs(&got);
        close_chain(&c);
        close_sides(&s);
    }
    conclude(&t, "LoRA");
}
