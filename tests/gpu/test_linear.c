/* gn_linear on the GPU against the CPU: weight types x shapes x rows, then norms, parts, LoRA terms
 * and epilogues, then LLaMA's shapes; every weight by itself; and that in float32 a row's bits
 * depend on nothing but the row. */
#include "linear_cases.h"

static const gn_dtype computes[] = {GN_BF16, GN_F32};
static const int all_rows[] = {1,  2,  3,  5,   8,   9,   15,  16,  17,  31,
                               33, 64, 65, 127, 128, 130, 200, 256, 300, 512};

static void check_call(tally *t, const sides *s, const weights *w, call c, uint64_t seed) {
    problem p = make_problem(s, w, c, seed);
    check_problem(t, &p);
    free_problem(&p);
}

static void settle_weights(tally *t, weights *w, const char *what) {
    const verdict v = {.name = "weights"};
    if (!guards_stand(&w->memory)) settle(t, &v, what);
    free_weights(w);
}

/* ---- tests ---- */

/* Every type meets every shape; they share out the numbers of rows, and how x and y lie. */
Test(gpu_linear, every_type_and_shape) {
    const weight_shape shapes[] = {
        {1, {1}, 1},    {63, {5}, 1},    {64, {8}, 1},    {65, {17}, 1},   {128, {64}, 1},
        {192, {33}, 1}, {320, {130}, 1}, {512, {257}, 1}, {2048, {96}, 1}, {2112, {40}, 1}};
    const int step = is_brief() ? 7 : 1, row_step = is_brief() ? 6 : 2;
    tally t = {0};
    for (int c = 0; c < COUNT(computes); c++) {
        sides s = open_sides(computes[c]);
        for (int i = 0; i < COUNT(types) * COUNT(shapes); i += step) {
            weights w = make_weights(&s, shapes[i % COUNT(shapes)], types[i / COUNT(shapes)],
                                     (uint64_t)(1 + i));
            for (int j = (i + i / COUNT(shapes) + c) % row_step; j < COUNT(all_rows);
                 j += row_step) {
                const int lie = (i + j / row_step) % 4; /* in line; padded; out of line */
                const call k = {.T = all_rows[j],
                                .f32_out = (i + j) % 3 == 0,
                                .pad = lie == 1   ? 8
                                       : lie == 2 ? 3
                                                  : 0,
                                .shift = lie == 3 ? 1 : 0};
                check_call(&t, &s, &w, k, (uint64_t)(100 * i + j));
            }
            settle_weights(&t, &w, "a guard of the weights is written");
        }
        close_sides(&s);
    }
    conclude(&t, "types and shapes");
}

static const struct composition {
    weight_shape shape;
    bool norm, f32_out;
    gn_epilogue epilogue;
} compositions[] = {
    {{128, {40, 8, 8}, 3}, true, false, GN_STORE},
    {{192, {64, 16, 16}, 3}, false, false, GN_STORE},
    {{100, {33, 5, 70}, 3}, true, false, GN_STORE},
    {{192, {50, 50}, 2}, true, false, GN_SWIGLU},
    {{256, {64, 64}, 2}, false, false, GN_SWIGLU},
    {{90, {30, 30}, 2}, true, false, GN_SWIGLU},
    {{320, {37}, 1}, false, false, GN_ADD},
    {{256, {256}, 1}, false, false, GN_ADD},
    {{448, {48, 24}, 2}, true, false, GN_ADD},
    {{192, {130}, 1}, true, true, GN_STORE},
};

Test(gpu_linear, norms_parts_lora_and_epilogues) {
    const int rows[] = {1, 4, 8, 11, 16, 17, 33, 64, 130};
    const int used[] = {0, 1, 8, 10, 12, 15, 16}; /* types */
    const int step = is_brief() ? 29 : 1;
    tally t = {0};
    for (int c = 0; c < COUNT(computes); c++) {
        sides s = open_sides(computes[c]);
        for (int i = 0; i < COUNT(compositions) * COUNT(used); i++) {
            const struct composition *k = &compositions[i % COUNT(compositions)];
            if (is_brief() && i % 5 != 0) continue;
            weights w =
                make_weights(&s, k->shape, types[used[i / COUNT(compositions)]], (uint64_t)i);
            for (int j = is_brief() ? i % step : 0; j < COUNT(rows) * LAYOUTS; j += step) {
                const int lie = (i + j) % 8;
                const call one = {.T = rows[j / LAYOUTS],
                                  .norm = k->norm,
                                  .f32_out = k->f32_out,
                                  .epilogue = k->epilogue,
                                  .lora = (layout)(j % LAYOUTS),
                                  .lora_dtype = (i + j) % 3 == 0 ? GN_F32 : GN_BF16,
                                  .pad = lie == 1   ? 16
                                         : lie == 5 ? 5
                                                    : 0};
                check_call(&t, &s, &w, one, (uint64_t)(5000 + 100 * i + j));
            }
            settle_weights(&t, &w, "a guard of the weights is written");
        }
        close_sides(&s);
    }
    conclude(&t, "compositions");
}

/* Rows on both sides of where LoRA changes its ways. */
Test(gpu_linear, many_adapters) {
    const struct composition shapes[] = {
        {{1024, {136, 40, 24}, 3}, true, false, GN_STORE},
        {{2048, {128}, 1}, false, false, GN_ADD},
        {{1024, {96, 96}, 2}, true, false, GN_SWIGLU},
        {{1000, {70, 33}, 2}, true, true, GN_STORE},
        {{4096, {24}, 1}, false, true, GN_STORE},
    };
    const int rows[] = {12, 17, 24, 40, 64, 65, 100, 129, 256, 257, 300};
    const layout layouts[] = {WIDE_ADAPTER, ODD_RANKS, MANY, PILE};
    tally t = {0};
    sides s = open_sides(GN_BF16);
    for (int i = 0; i < COUNT(shapes); i++) {
        const struct composition *k = &shapes[i];
        weights w = make_weights(&s, k->shape, types[i % 2 ? 15 : 0], (uint64_t)(300 + i));
        for (int j = 0; j < COUNT(rows) * COUNT(layouts); j++) {
            if (is_brief() && (i + j) % 9 != 0) continue;
            const call one = {.T = rows[j / COUNT(layouts)],
                              .norm = k->norm,
                              .f32_out = k->f32_out,
                              .epilogue = k->epilogue,
                              .lora = layouts[j % COUNT(layouts)],
                              .lora_dtype = (i + j) % 7 == 0 ? GN_F32 : GN_BF16};
            check_call(&t, &s, &w, one, (uint64_t)(30000 + 100 * i + j));
        }
        settle_weights(&t, &w, "a guard of the weights is written");
    }
    close_sides(&s);
    conclude(&t, "many adapters");
}

static const struct composition llama[] = {
    {{4096, {4096, 4096, 4096}, 3}, true, false, GN_STORE}, /* 7B */
    {{4096, {4096}, 1}, false, false, GN_ADD},
    {{4096, {11008, 11008}, 2}, true, false, GN_SWIGLU},
    {{11008, {4096}, 1}, false, false, GN_ADD},
    {{2048, {2048, 256, 256}, 3}, true, false, GN_STORE}, /* 1.1B */
    {{2048, {5632, 5632}, 2}, true, false, GN_SWIGLU},
    {{5632, {2048}, 1}, false, false, GN_ADD},
    {{288, {288, 288, 288}, 3}, true, false, GN_STORE}, /* the bootstrap model */
    {{768, {288}, 1}, false, false, GN_ADD},
};

static void check_llama(gn_dtype compute, weight_type type, const int *rows, int n_rows,
                        int n_shapes, const char *what) {
    tally t = {0};
    sides s = open_sides(compute);
    for (int i = 0; i < n_shapes; i++) {
        const struct composition *k = &llama[i];
        weights w = make_weights(&s, k->shape, type, (uint64_t)(9000 + i));
        for (int j = 0; j < n_rows; j++) {
            const layout lora = (layout)((i + j) % LAYOUTS);
            call one = {
                .T = rows[j], .norm = k->norm, .epilogue = k->epilogue, .lora_dtype = GN_BF16};
            check_call(&t, &s, &w, one, (uint64_t)(9000 + 10 * i + j));
            one.lora = lora == NO_LORA ? BLEND : lora;
            check_call(&t, &s, &w, one, (uint64_t)(9500 + 10 * i + j));
        }
        settle_weights(&t, &w, "a guard of the weights is written");
    }
    close_sides(&s);
    conclude(&t, what);
}

Test(gpu_linear, llama_shapes_in_bfloat16) {
    const int rows[] = {1, 2, 5, 8, 16, 17, 33, 64, 128, 256, 512}, few[] = {1, 16, 64};
    if (is_brief())
        check_llama(GN_BF16, types[0], few, COUNT(few), 1, "LLaMA's shapes");
    else
        check_llama(GN_BF16, types[0], rows, COUNT(rows), COUNT(llama), "LLaMA's shapes");
}

Test(gpu_linear, llama_shapes_without_double_quantization) {
    const int rows[] = {1, 7, 16, 64, 300};
    if (!is_brief())
        check_llama(GN_BF16, types[1], rows, COUNT(rows), COUNT(llama), "single quantization");
}

Test(gpu_linear, llama_shapes_in_float32) {
    const int rows[] = {1, 19};
    if (!is_brief())
        check_llama(GN_F32, types[0], rows, COUNT(rows), COUNT(llama), "LLaMA's shapes, float32");
}

/* The same call again, and what it gave the first time. */
static void check_repetition(tally *tally, const problem *p) {
    float *first[GN_MAX_PARTS] = {0}, *again[GN_MAX_PARTS] = {0};
    for (int i = 0; i < n_outputs(p); i++) {
        first[i] = malloc((size_t)p->c.T * (size_t)p->w->s.N[i] * sizeof(float));
        again[i] = malloc((size_t)p->c.T * (size_t)p->w->s.N[i] * sizeof(float));
    }
    const char *why = solve(p, 0, p->c.T, first);
    if (!why) why = solve(p, 0, p->c.T, again);
    verdict v = {0};
    for (int i = 0; i < n_outputs(p) && !why; i++)
        for (int j = 0; j < p->c.T * p->w->s.N[i]; j++)
            judge(&v, j / p->w->s.N[i], j % p->w->s.N[i], again[i][j], first[i][j], 0);
    snprintf(v.name, sizeof v.name, "again: %s", p->name);
    settle(tally, &v, why);
    for (int i = 0; i < n_outputs(p); i++) {
        free(first[i]);
        free(again[i]);
    }
}

/* Where tiles of outputs end, and who shares them: few that everybody has a part of, many of which
 * everybody has several, and some of both; odd numbers of blocks; parts that end within a tile. */
Test(gpu_linear, many_rows) {
    const struct composition shapes[] = {
        {{8192, {64}, 1}, false, false, GN_ADD},
        {{4352, {200, 72}, 2}, true, false, GN_STORE},
        {{1024, {1500, 1500}, 2}, true, false, GN_SWIGLU},
        {{256, {9001}, 1}, false, true, GN_STORE},
        {{64, {13, 65, 7}, 3}, true, false, GN_STORE},
        {{2048, {3000}, 1}, false, false, GN_ADD},
    };
    const int used[] = {0, 1, 8}, rows[] = {17,  31,  32,  33,  64,  65,  96,  97,  128,
                                            129, 192, 200, 256, 257, 385, 450, 513, 1030};
    tally t = {0};
    sides s = open_sides(GN_BF16);
    for (int i = 0; i < COUNT(shapes) * COUNT(used); i++) {
        const struct composition *k = &shapes[i % COUNT(shapes)];
        if (is_brief() && (i >= COUNT(shapes) || i == 2 || i == 5)) continue;
        weights w = make_weights(&s, k->shape, types[used[i / COUNT(shapes)]], (uint64_t)(70 + i));
        for (int j = is_brief() ? i : 0; j < COUNT(rows); j += is_brief() ? 7 : 1) {
            problem p = make_problem(&s, &w,
                                     (call){.T = rows[j],
                                            .norm = k->norm,
                                            .f32_out = k->f32_out,
                                            .epilogue = k->epilogue,
                                            .lora = j % 4 == 3 ? (layout)(i % LAYOUTS) : NO_LORA,
                                            .lora_dtype = GN_BF16,
                                            .pad = j % 3,
                                            .shift = j % 5 == 0},
                                     (uint64_t)(7000 + 100 * i + j));
            check_problem(&t, &p);
            check_repetition(&t, &p);
            free_problem(&p);
        }
        settle_weights(&t, &w, "a guard of the weights is written");
    }
    close_sides(&s);
    conclude(&t, "many rows");
}

/* The head is wide and not quantized. */
Test(gpu_linear, logits) {
    const weight_shape shape = {1024, {is_brief() ? 3001 : 32003}, 1};
    const int rows[] = {1, 3, 16, 64, 128};
    tally t = {0};
    for (int c = 0; c < COUNT(computes); c++) {
        sides s = open_sides(computes[c]);
        for (int type = 15; type < COUNT(types); type++) {
            weights w = make_weights(&s, shape, types[type], (uint64_t)(77 + type));
            for (int j = 0; j < COUNT(rows); j += is_brief() ? 3 : 1)
                check_call(&t, &s, &w, (call){.T = rows[j], .norm = j % 2, .f32_out = true},
                           (uint64_t)(770 + j));
            settle_weights(&t, &w, "a guard of the weights is written");
        }
        close_sides(&s);
    }
    conclude(&t, "logits");
}

/* x of one 1 a row: row k of y is column k of W, each weight by itself. In float32 to the bit. */
static void check_weights_one_by_one(tally *tally, const sides *s, const weights *w, int rows) {
    const int K = w->s.K, N = w->s.N[0];
    float *dense = malloc((size_t)N * (size_t)K * sizeof *dense);
    float *y = malloc((size_t)rows * (size_t)N * sizeof *y), *outputs[GN_MAX_PARTS] = {y};
    gn_dequantize(dense, &w->host[0].m, 0, (int64_t)N * K);
    round_floats(dense, s->compute, (int64_t)N * K);
    const bool is_exact = s->compute == GN_F32 || w->type.qtype == GN_Q_NONE;
    problem p = make_problem(s, w, (call){.T = K, .f32_out = true}, 1);
    memset(p.x, 0, (size_t)K * (size_t)K * sizeof *p.x);
    for (int k = 0; k < K; k++) p.x[k * K + k] = 1;
    verdict v = {0};
    const char *why = NULL;
    for (int t0 = 0; t0 < K && !why; t0 += rows) {
        const int n = K - t0 < rows ? K - t0 : rows;
        snprintf(v.name, sizeof v.name, "identity, %d rows at a time: %s", rows, p.name);
        const int roundings = rounds_scales(w, n) ? 4 : 2;
        why = solve(&p, t0, n, outputs);
        for (int t = 0; t < n && !why; t++)
            for (int i = 0; i < N; i++) {
                const double expected = dense[i * K + t0 + t];
                /* what is expected is rounded, and a code; a scale is a sum with an offset */
                const double off = is_exact ? 0 : roundings * U16 * fabs(expected) + 2 * U32;
                judge(&v, t0 + t, i, y[t * N + i], expected, off);
            }
    }
    settle(tally, &v, why);
    free_problem(&p);
    free(dense);
    free(y);
}

Test(gpu_linear, each_weight_by_itself) {
    const weight_shape shapes[] = {{192, {43}, 1}, {77, {20}, 1}, {256, {144}, 1}};
    const int rows[] = {1, 7, 16, 48, 256};
    tally t = {0};
    for (int c = 0; c < COUNT(computes); c++) {
        sides s = open_sides(computes[c]);
        for (int i = 0; i < COUNT(types) * COUNT(shapes); i++) {
            if (is_brief() && i % 11 != 0) continue;
            weights w = make_weights(&s, shapes[i % COUNT(shapes)], types[i / COUNT(shapes)],
                                     (uint64_t)(40 + i));
            for (int j = 0; j < COUNT(rows); j++) {
                if (rows[j] < 16 && (is_brief() || i % 5 != 0)) continue; /* many calls */
                check_weights_one_by_one(&t, &s, &w, rows[j]);
            }
            settle_weights(&t, &w, "a guard of the weights is written");
        }
        close_sides(&s);
    }
    conclude(&t, "each weight");
}

/* All rows at once, then a few at a time. */
static void check_independence(tally *tally, const problem *p) {
    float *whole[GN_MAX_PARTS] = {0}, *some[GN_MAX_PARTS] = {0};
    for (int i = 0; i < p->w->s.n_parts; i++) {
        whole[i] = malloc((size_t)p->c.T * (size_t)p->w->s.N[i] * sizeof(float));
        some[i] = malloc((size_t)p->c.T * (size_t)p->w->s.N[i] * sizeof(float));
    }
    const char *why = solve(p, 0, p->c.T, whole);
    const int sizes[] = {1, 5, 20};
    verdict v = {0};
    for (int k = 0; k < COUNT(sizes); k++)
        for (int t = 0; t < p->c.T && !why; t += sizes[k]) {
            const int n = p->c.T - t < sizes[k] ? p->c.T - t : sizes[k];
            why = solve(p, t, n, some);
            for (int i = 0; i < n_outputs(p) && !why; i++)
                for (int j = 0; j < n * p->w->s.N[i]; j++)
                    judge(&v, t + j / p->w->s.N[i], j % p->w->s.N[i], some[i][j],
                          whole[i][t * p->w->s.N[i] + j], 0);
        }
    snprintf(v.name, sizeof v.name, "rows alone: %s", p->name);
    settle(tally, &v, why);
    for (int i = 0; i < p->w->s.n_parts; i++) {
        free(whole[i]);
        free(some[i]);
    }
}

Test(gpu_linear, in_float32_a_row_does_not_depend_on_the_batch) {
    const struct composition shapes[] = {
        {{2048, {70}, 1}, false, false, GN_STORE},
        {{704, {129, 40, 41}, 3}, true, false, GN_STORE},
        {{353, {100, 100}, 2}, false, false, GN_SWIGLU},
        {{1024, {256}, 1}, false, false, GN_ADD},
    };
    const int used[] = {0, 3, 12, 15, 16};
    sides s = open_sides(GN_F32);
    tally t = {0};
    for (int i = 0; i < COUNT(shapes) * COUNT(used); i++) {
        if (is_brief() && i % 7 != 0) continue;
        const struct composition *k = &shapes[i % COUNT(shapes)];
        weights w = make_weights(&s, k->shape, types[used[i / COUNT(shapes)]], (uint64_t)(60 + i));
        problem p = make_problem(&s, &w,
                                 (call){.T = 37,
                                        .norm = k->norm,
                                        .epilogue = k->epilogue,
                                        .lora = (layout)(i % LAYOUTS),
                                        .lora_dtype = i % 2 ? GN_F32 : GN_BF16},
                                 (uint64_t)(600 + i));
        check_independence(&t, &p);
        free_problem(&p);
        free_weights(&w);
    }
    close_sides(&s);
    conclude(&t, "rows alone");
}

/* No more than was asked for, in a context that never had more. */
Test(gpu_linear, the_workspace_asked_for_is_enough) {
    const int rows[] = {1, 16, 64, 300};
    const weight_shape shape = {1024, {96, 40, 24}, 3};
    tally t = {0};
    for (int i = 0; i < COUNT(rows) * 2 * COUNT(computes); i++) {
        if (is_brief() && i % 5 != 0) continue;
        sides s = open_sides(computes[i % 2]);
        weights w = make_weights(&s, shape, types[i / 2 % 2 ? 0 : 16], (uint64_t)i);
        check_call(&t, &s, &w,
                   (call){.T = rows[i / 4], .norm = true, .lora = ODD_RANKS, .lora_dtype = GN_BF16},
                   (uint64_t)i);
        free_weights(&w);
        close_sides(&s);
    }
    conclude(&t, "workspace");
}

/* ---- recordings ---- */

typedef struct {
    gn_ctx *ctx;
    const gn_linear_args *args;
    int calls;
} linear_call;

static gn_status call_linear(void *arg) {
    linear_call *c = arg;
    c->calls++;
    return gn_linear(c->ctx, c->args);
}

/* What a step leaves in y, into `out`. */
static void stage_and_read(linear_call *c, const gn_lora *terms, bool replay, float *out) {
    const gn_linear_args *args = c->args;
    cr_assert_eq(stage_rows(c->ctx, (int)args->x.shape[0], terms, args->n_lora), GN_OK);
    cr_assert_eq(replay ? gn_ctx_replay(c->ctx, 7, call_linear, c) : gn_linear(c->ctx, args),
                 GN_OK);
    cr_assert(read_rows(c->ctx, out, &args->part[0].y));
}

/* A recording made with some terms serves others of the same ranks and as many rows: the same
 * adapters in another order, neighbours' rows shared out otherwise. To the bit. */
static void check_recording(tally *tally, const sides *s, int T) {
    const weight_shape shape = {1024, {160}, 1};
    weights w = make_weights(s, shape, types[0], 5);
    const call one = {.T = T, .f32_out = true, .lora = SIXTEEN, .lora_dtype = GN_BF16};
    problem p = make_problem(s, &w, one, 6);
    device_memory m = {.ctx = s->gpu};
    adapters *placed = place_adapters(&m, p.adapters);
    gn_lora terms[2][MAX_TERMS];
    const int n = placed->n;
    for (int i = 0; i < n; i++) {
        terms[0][i] = terms[1][i] = placed->terms[i];
        const gn_lora *other = &placed->terms[(i + 4) % n];
        terms[1][i].pairs = other->pairs;
        terms[1][i].placed = other->placed;
        if (i % 2) terms[1][i].row0++, terms[1][i].rows--;
        if (i % 2 == 0) terms[1][i].rows++;
    }
    const gn_linear_args args = {
        .x = device_rows(&m, p.x, gn_ctx_activation(s->gpu), T, shape.K, 0, 0),
        .lora = terms[0],
        .n_lora = n,
        .pair = FIRST_PAIR,
        .n_parts = 1,
        .part[0] = {device_rows(&m, NULL, GN_F32, T, shape.N[0], 0, 0), &w.placed[0]}};
    reserve(s->gpu, workspace_of(s->gpu, &p, T));
    linear_call c = {s->gpu, &args, 0};
    float *got = malloc((size_t)T * 160 * sizeof *got);
    float *expected = malloc((size_t)T * 160 * sizeof *expected);
    for (int i = 0; i < 2; i++) {
        verdict v = {0};
        snprintf(v.name, sizeof v.name, "recording, terms %d: %s", i, p.name);
        stage_and_read(&c, terms[i], true, got);
        stage_and_read(&c, terms[i], false, expected);
        for (int j = 0; j < T * 160; j++) judge(&v, j / 160, j % 160, got[j], expected[j], 0);
        settle(tally, &v, c.calls == 1 ? NULL : "not recorded");
    }
    free(got);
    free(expected);
    device_free(&m);
    free(placed);
    free_problem(&p);
    free_weights(&w);
}

Test(gpu_linear, a_recording_serves_other_terms) {
    const int rows[] = {48, 64, 200, 320};
    tally t = {0};
    for (int i = 0; i < COUNT(rows); i++) {
        sides s = open_sides(GN_BF16);
        check_recording(&t, &s, rows[i]);
        close_sides(&s);
    }
    conclude(&t, "recordings");
}
