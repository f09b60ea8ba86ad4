/* The small ops against plain loops, the exponential's accuracy, and calls that every backend
 * must refuse. gn_linear and gn_attention have files of their own. */
#include "cases.h"

#include "kernels/backend.h"
#include "kernels/cpu/exp.h"

static const double EPS = 0x1p-23;

Test(ops, every_backend_has_every_op) {
    const gn_backend *backends[] = {&gn_cpu_backend};
    for (int i = 0; i < COUNT(backends); i++) {
#define X(name, parameters) cr_assert_not_null(backends[i]->name, #name);
        GN_BACKEND_OPS(X)
#undef X
        cr_assert_not_null(backends[i]->linear_workspace);
        cr_assert_not_null(backends[i]->attention_workspace);
        cr_assert_not_null(backends[i]->alloc);
        cr_assert_not_null(backends[i]->free);
    }
}

Test(ops, embed_copies_rows_in_every_dtype) {
    const gn_dtype dtypes[] = {GN_F32, GN_F16, GN_BF16};
    const int32_t ids[] = {6, 0, -2, 3, -1}, drawn[] = {5, 2}, expected[] = {6, 0, 2, 3, 5};
    enum { V = 7, C = 33, T = COUNT(ids), LD = C + 2 };
    gn_ctx *ctx = open_ctx(best_isa(), GN_F32, 2);
    for (int i = 0; i < COUNT(dtypes); i++) {
        rng r = {(uint64_t)i};
        random_matrix table = make_matrix(&r, GN_Q_NONE, false, dtypes[i], V, C);
        guarded y = guarded_alloc(T * LD);
        gn_tensor ty = {y.data, GN_F32, 2, {T, C, 1, 1}, LD};
        cr_assert_eq(gn_embed(ctx, &ty, &table.m, ids, drawn, 2), GN_OK);
        guarded_check(&y, "y");
        for (int t = 0; t < T; t++) {
            float row[C];
            gn_dequantize(row, &table.m, expected[t] * C, C);
            cr_assert(memcmp(row, y.data + t * LD, sizeof row) == 0);
            cr_assert(is_guard(y.data + t * LD + C, (LD - C) * sizeof(float)));
        }
        guarded_free(&y);
        free_matrix(&table);
    }
    gn_ctx_close(ctx);
}

Test(ops, rmsnorm_matches_plain_loops_alone_and_in_place) {
    const int Cs[] = {1, 2, 7, 8, 63, 320, 2048}, Ts[] = {1, 3, 40};
    for (int threads = 1; threads <= 3; threads++) {
        gn_ctx *ctx = open_ctx(best_isa(), GN_F32, threads);
        for (int i = 0; i < COUNT(Cs) * COUNT(Ts); i++) {
            const int C = Cs[i / COUNT(Ts)], T = Ts[i % COUNT(Ts)];
            rng r = {(uint64_t)i};
            float *x = random_floats(&r, (size_t)(T * C)), *w = random_floats(&r, (size_t)C);
            guarded y = guarded_alloc((size_t)(T * C));
            gn_tensor ty = gn_tensor_2d(y.data, GN_F32, T, C);
            gn_tensor tx = gn_tensor_2d(x, GN_F32, T, C);
            const gn_tensor tw = gn_tensor_1d(w, GN_F32, C);
            cr_assert_eq(gn_rmsnorm(ctx, &ty, &tx, &tw, 1e-5f), GN_OK);
            guarded_check(&y, "y");
            for (int t = 0; t < T; t++) {
                double sum = 0;
                for (int c = 0; c < C; c++) sum += (double)x[t * C + c] * x[t * C + c];
                for (int c = 0; c < C; c++) {
                    const double e = x[t * C + c] / sqrt(sum / C + 1e-5f) * w[c];
                    cr_assert(fabs(y.data[t * C + c] - e) <= 2 * EPS * fabs(e) + 1e-40);
                }
            }
            cr_assert_eq(gn_rmsnorm(ctx, &tx, &tx, &tw, 1e-5f), GN_OK);
            cr_assert(memcmp(x, y.data, (size_t)(T * C) * sizeof *x) == 0, "in place");
            guarded_free(&y);
            free(x);
            free(w);
        }
        gn_ctx_close(ctx);
    }
}

Test(ops, rope_tables_are_cosines_and_sines_of_positions) {
    const int32_t row0[] = {0, 3, 3, 5}, pos0[] = {0, 9, 100000};
    const int32_t position[] = {0, 1, 2, 100000, 100001};
    float freq[3] = {1.0f, 0.1f, 1e-4f}, c[15], s[15];
    gn_tensor tc = gn_tensor_2d(c, GN_F32, 5, 3), ts = gn_tensor_2d(s, GN_F32, 5, 3);
    const gn_tensor tf = gn_tensor_1d(freq, GN_F32, 3);
    const gn_seqs seqs = {3, 0, row0, pos0, NULL};
    gn_ctx *ctx = open_ctx(best_isa(), GN_F32, 1);
    cr_assert_eq(gn_rope_table(ctx, &tc, &ts, &tf, &seqs), GN_OK);
    for (int t = 0; t < 5; t++)
        for (int j = 0; j < 3; j++) {
            const float angle = (float)position[t] * freq[j];
            cr_assert(fabs(c[t * 3 + j] - cos((double)angle)) <= EPS);
            cr_assert(fabs(s[t * 3 + j] - sin((double)angle)) <= EPS);
        }
    gn_ctx_close(ctx);
}

Test(ops, exp_is_within_two_ulp) {
    double worst = 0;
    for (float x = -103.0f; x < 88.7f; x += 0.000731f) {
        const double exact = exp((double)x);
        const double ulp = fmax(ldexp(1.0, ilogb(exact) - 23), 0x1p-149);
        worst = fmax(worst, fabs(gn_exp(x) - exact) / ulp);
    }
    cr_assert_leq(worst, 2.0, "%g ulp", worst);
    cr_assert_eq(gn_exp(0.0f), 1.0f);
    cr_assert_eq(gn_exp(-INFINITY), 0.0f);
    cr_assert_eq(gn_exp(-1e30f), 0.0f);
    cr_assert_eq(gn_exp(INFINITY), INFINITY);
    cr_assert_eq(gn_exp(1e30f), INFINITY);
    cr_assert(isnan(gn_exp(NAN)));
    cr_assert_eq(gn_silu(0.0f), 0.0f);
    cr_assert_eq(gn_silu(-1e30f), -0.0f);
    cr_assert_eq(gn_silu(200.0f), 200.0f);
}

/* ---- calls to refuse ---- */

/* A good call of every op, to be spoiled one thing at a time. */
typedef struct {
    gn_ctx *ctx;
    float x[4 * 64], y[2][4 * 64], w[64], cos[8], sin[8], q[16], k[8], v[8], cache[2][64];
    unsigned char codes[64 * 64];
    float absmax[64], a[2 * 64], b[64 * 2];
    int32_t ids[4], row0[2], pos0[1], blocks[4], n_drawn;
    const int32_t *drawn;
    gn_matrix table, m[2];
    gn_lora lora;
    gn_lora_pair pairs[2];
    gn_tensor tx, ty, tw, tc, ts, tf, tq, tk, tv, ta;
    gn_linear_args args;
    gn_seqs seqs;
    gn_kv kv;
} calls;

static void make_calls(calls *c) { /* T 4, K 64, N 64; 2 heads of 2 on 1 kv head */
    memset(c, 0, sizeof *c);
    c->ctx = open_ctx(best_isa(), GN_F32, 1);
    c->table = (gn_matrix){.dtype = GN_F32, .rows = 2, .cols = 64, .data = c->a};
    for (int i = 0; i < 2; i++)
        c->m[i] = (gn_matrix){.qtype = GN_Q_NF4,
                              .dtype = GN_BF16,
                              .rows = 64,
                              .cols = 64,
                              .data = c->codes,
                              .code = gn_code_values(GN_Q_NF4),
                              .absmax = c->absmax};
    c->tx = gn_tensor_2d(c->x, GN_F32, 4, 64);
    c->ty = gn_tensor_2d(c->y[0], GN_F32, 4, 64);
    c->tw = gn_tensor_1d(c->w, GN_F32, 64);
    for (int i = 0; i < 2; i++)
        c->pairs[i] = (gn_lora_pair){2, 1.0f, gn_tensor_2d(c->a, GN_F32, 2, 64),
                                     gn_tensor_2d(c->b, GN_F32, 64, 2)};
    c->lora = (gn_lora){.row0 = 1, .rows = 3, .scale = 1.0f, .pairs = c->pairs};
    c->args = (gn_linear_args){.x = c->tx,
                               .norm = &c->tw,
                               .epilogue = GN_SWIGLU,
                               .lora = &c->lora,
                               .n_lora = 1,
                               .n_parts = 2};
    for (int i = 0; i < 2; i++)
        c->args.part[i] = (struct gn_linear_part){gn_tensor_2d(c->y[i], GN_F32, 4, 64), &c->m[i]};
    c->drawn = c->blocks;
    c->row0[1] = 4;
    c->pos0[0] = 3;
    for (int i = 0; i < 4; i++) c->blocks[i] = 3 - i;
    c->seqs = (gn_seqs){1, 4, c->row0, c->pos0, c->blocks};
    c->tc = gn_tensor_2d(c->cos, GN_F32, 4, 1);
    c->ts = gn_tensor_2d(c->sin, GN_F32, 4, 1);
    c->tf = gn_tensor_1d(c->w, GN_F32, 1);
    c->tq = (gn_tensor){c->q, GN_F32, 3, {4, 2, 2, 1}, 4};
    c->ta = (gn_tensor){c->y[1], GN_F32, 3, {4, 2, 2, 1}, 4};
    c->tk = (gn_tensor){c->k, GN_F32, 3, {4, 1, 2, 1}, 2};
    c->tv = (gn_tensor){c->v, GN_F32, 3, {4, 1, 2, 1}, 2};
    c->kv.k = (gn_tensor){c->cache[0], GN_F32, 4, {4, 1, 2, 2}, 4};
    c->kv.v = (gn_tensor){c->cache[1], GN_F32, 4, {4, 1, 2, 2}, 4};
    const size_t linear = gn_linear_workspace(c->ctx, 4, 64, 128, 2, 1);
    const size_t attention = gn_attention_workspace(c->ctx, 8);
    cr_assert_eq(gn_ctx_reserve(c->ctx, linear + attention), GN_OK);
}

static void make_f8(calls *c) {
    c->kv.k.dtype = c->kv.v.dtype = GN_F8;
    c->kv.k_scales = (gn_tensor){c->a, GN_F32, 3, {4, 1, 2, 1}, 2};
    c->kv.v_scales = (gn_tensor){c->b, GN_F32, 3, {4, 1, 2, 1}, 2};
}

static gn_status embed(calls *c) {
    return gn_embed(c->ctx, &c->ty, &c->table, c->ids, c->drawn, c->n_drawn);
}
static gn_status rmsnorm(calls *c) {
    return gn_rmsnorm(c->ctx, &c->ty, &c->tx, &c->tw, 1e-5f);
}
static gn_status linear(calls *c) {
    return gn_linear(c->ctx, &c->args);
}
static gn_status rope_table(calls *c) {
    return gn_rope_table(c->ctx, &c->tc, &c->ts, &c->tf, &c->seqs);
}
static gn_status rope_store(calls *c) {
    return gn_rope_store(c->ctx, &c->tq, &c->tk, &c->tv, &c->tc, &c->ts, &c->seqs, &c->kv);
}
static gn_status attention(calls *c) {
    return gn_attention(c->ctx, &c->ta, &c->tq, &c->kv, &c->seqs);
}

/* op, what is spoiled */
#define BAD_CALLS(X)                                                                               \
    X(embed, c->ty.dtype = GN_BF16)                                                                \
    X(embed, c->ty.ndim = 1)                                                                       \
    X(embed, c->ty.shape[1] = 63)                                                                  \
    X(embed, c->ty.ld = 63)                                                                        \
    X(embed, c->ty.data = NULL)                                                                    \
    X(embed, c->ty.data = (char *)c->y + 1)                                                        \
    X(embed, c->ty.shape[0] = -1)                                                                  \
    X(embed, c->ids[2] = 2)                                                                        \
    X(embed, c->ids[3] = -1)                                                                       \
    X(embed, c->ids[3] = -2; c->n_drawn = 1)                                                       \
    X(embed, c->ids[3] = -1; c->n_drawn = 1; c->drawn = NULL)                                      \
    X(embed, c->n_drawn = -1)                                                                      \
    X(embed, c->table.qtype = GN_Q_INT8; c->table.absmax = c->absmax)                              \
    X(embed, c->table.data = NULL)                                                                 \
    X(embed, c->table.dtype = GN_I8)                                                               \
    X(embed, c->table.rows = 0)                                                                    \
    X(rmsnorm, c->tx.dtype = GN_F16)                                                               \
    X(rmsnorm, c->tx.shape[1] = 0)                                                                 \
    X(rmsnorm, c->ty.shape[0] = 3)                                                                 \
    X(rmsnorm, c->ty.shape[1] = 32)                                                                \
    X(rmsnorm, c->tw.shape[0] = 63)                                                                \
    X(rmsnorm, c->tw.dtype = GN_BF16)                                                              \
    X(rmsnorm, c->tw.data = NULL)                                                                  \
    X(linear, c->args.n_parts = 0)                                                                 \
    X(linear, c->args.n_parts = 1)                                                                 \
    X(linear, c->args.n_parts = 3)                                                                 \
    X(linear, c->args.epilogue = GN_STORE; c->args.n_parts = 4)                                    \
    X(linear, c->args.epilogue = (gn_epilogue)3)                                                   \
    X(linear, c->args.x.dtype = GN_BF16)                                                           \
    X(linear, c->args.x.shape[1] = 63)                                                             \
    X(linear, c->args.x.shape[0] = INT64_MAX / 64)                                                 \
    X(linear, c->tw.shape[0] = 32)                                                                 \
    X(linear, c->args.part[0].w = NULL)                                                            \
    X(linear, c->args.part[0].y.shape[0] = 3)                                                      \
    X(linear, c->args.part[0].y.shape[1] = 65)                                                     \
    X(linear, c->args.part[0].y.dtype = GN_BF16)                                                   \
    X(linear, c->args.epilogue = GN_ADD; c->args.part[1].y.data = NULL)                            \
    X(linear, c->m[0].cols = 128)                                                                  \
    X(linear, c->m[1].rows = 32; c->pairs[1].b.shape[0] = 32)                                      \
    X(linear, c->m[0].qtype = GN_QTYPE_COUNT)                                                      \
    X(linear, c->m[0].dtype = GN_U8)                                                               \
    X(linear, c->m[0].data = NULL)                                                                 \
    X(linear, c->m[0].code = NULL)                                                                 \
    X(linear, c->m[0].absmax = NULL)                                                               \
    X(linear, c->m[1].absmax = (float *)(c->codes + 1))                                            \
    X(linear, c->m[1].absmax_u8 = c->codes)                                                        \
    X(linear, c->m[1].absmax_u8 = c->codes; c->m[1].nested_code = c->absmax)                       \
    X(linear, c->m[1].qtype = GN_Q_INT8; c->m[1].absmax = NULL)                                    \
    X(linear, c->args.n_lora = -1)                                                                 \
    X(linear, c->args.pair = -1)                                                                   \
    X(linear, c->args.lora = NULL)                                                                 \
    X(linear, c->lora.pairs = NULL)                                                                \
    X(linear, c->lora.row0 = -1)                                                                   \
    X(linear, c->lora.rows = -1)                                                                   \
    X(linear, c->lora.rows = 4)                                                                    \
    X(linear, c->lora.row0 = INT32_MAX)                                                            \
    X(linear, c->pairs[1].a.shape[1] = 63)                                                         \
    X(linear, c->pairs[0].rank = -1)                                                               \
    X(linear, c->pairs[1].a.shape[0] = 1)                                                          \
    X(linear, c->pairs[1].b.shape[0] = 63)                                                         \
    X(linear, c->pairs[1].a.dtype = GN_BF16)                                                       \
    X(linear, c->pairs[1].a.dtype = c->pairs[1].b.dtype = GN_F16)                                  \
    X(linear, c->pairs[1].b.data = NULL)                                                           \
    X(rope_table, c->tc.shape[1] = 2)                                                              \
    X(rope_table, c->ts.shape[0] = 3)                                                              \
    X(rope_table, c->tf.shape[0] = 2)                                                              \
    X(rope_table, c->row0[0] = 1)                                                                  \
    X(rope_table, c->row0[1] = 3)                                                                  \
    X(rope_table, c->pos0[0] = -1)                                                                 \
    X(rope_table, c->pos0[0] = INT32_MAX)                                                          \
    X(rope_table, c->seqs.n = 0)                                                                   \
    X(rope_table, c->seqs.n = -1)                                                                  \
    X(rope_table, c->seqs.row0 = NULL)                                                             \
    X(rope_table, c->seqs.pos0 = NULL)                                                             \
    X(rope_store, c->tq.shape[0] = 3)                                                              \
    X(rope_store, c->tq.shape[2] = 1)                                                              \
    X(rope_store, c->tk.shape[1] = 2; c->tk.ld = 4)                                                \
    X(rope_store, c->tv.dtype = GN_BF16)                                                           \
    X(rope_store, c->tc.shape[1] = 2)                                                              \
    X(rope_store, c->blocks[3] = 4)                                                                \
    X(rope_store, c->blocks[2] = -1)                                                               \
    X(rope_store, c->seqs.max_blocks = 3)                                                          \
    X(rope_store, c->seqs.blocks = NULL)                                                           \
    X(rope_store, c->kv.k.shape[3] = 4)                                                            \
    X(rope_store, c->kv.v.shape[2] = 1)                                                            \
    X(rope_store, c->kv.v.dtype = GN_BF16)                                                         \
    X(rope_store, c->kv.k.ld = 3)                                                                  \
    X(rope_store, c->kv.k.data = NULL)                                                             \
    X(attention, c->tq.ndim = 2)                                                                   \
    X(attention, c->ta.shape[1] = 1)                                                               \
    X(attention, c->ta.data = NULL)                                                                \
    X(attention, c->kv.k.dtype = c->kv.v.dtype = GN_F16)                                           \
    X(attention, c->kv.k.dtype = c->kv.v.dtype = GN_U8)                                            \
    X(attention, make_f8(c); c->kv.v.dtype = GN_BF16)                                              \
    X(attention, make_f8(c); c->kv.k_scales.dtype = GN_BF16)                                       \
    X(attention, make_f8(c); c->kv.v_scales.data = NULL)                                           \
    X(attention, make_f8(c); c->kv.v_scales.shape[0] = 3)                                          \
    X(rope_store, make_f8(c); c->kv.k_scales.ld = 3)                                               \
    X(rope_store, make_f8(c); c->kv.k_scales.shape[2] = 1; c->kv.k_scales.ld = 1)                  \
    X(attention, c->kv.k.shape[1] = c->kv.v.shape[1] = 3; c->kv.k.ld = c->kv.v.ld = 12)            \
    X(attention, c->kv.k.shape[0] = c->kv.v.shape[0] = 3)                                          \
    X(attention, c->kv.k.shape[2] = 0)                                                             \
    X(attention, c->pos0[0] = 5)                                                                   \
    X(attention, c->row0[1] = 5)

Test(ops, bad_calls_are_refused) {
    gn_status (*const ops[])(calls *) = {embed, rmsnorm, linear, rope_table, rope_store, attention};
    calls call, *c = &call;
    for (int i = 0; i < COUNT(ops); i++) {
        make_calls(c);
        cr_assert_eq(ops[i](c), GN_OK, "good call %d", i);
        make_f8(c);
        cr_assert_eq(ops[i](c), GN_OK, "good call %d with an F8 cache", i);
        gn_ctx *ctx = c->ctx;
        c->ctx = NULL;
        cr_assert_eq(ops[i](c), GN_EINVAL, "no context, call %d", i);
        gn_ctx_close(ctx);
    }
#define X(op, ...)                                                                                 \
    make_calls(c);                                                                                 \
    __VA_ARGS__;                                                                                   \
    cr_assert_eq(op(c), GN_EINVAL, "%s: %s", #op, #__VA_ARGS__);                                   \
    gn_ctx_close(c->ctx);
    BAD_CALLS(X)
#undef X
}

Test(ops, no_rows_are_no_work) {
    calls call, *c = &call;
    make_calls(c);
    c->tx.shape[0] = c->ty.shape[0] = c->args.x.shape[0] = c->args.part[0].y.shape[0] = 0;
    c->tc.shape[0] = c->ts.shape[0] = c->tq.shape[0] = c->tk.shape[0] = c->tv.shape[0] = 0;
    c->ta.shape[0] = 0;
    c->row0[1] = c->lora.row0 = c->lora.rows = 0;
    cr_assert_eq(embed(c), GN_OK);
    cr_assert_eq(rmsnorm(c), GN_OK);
    cr_assert_eq(linear(c), GN_OK);
    cr_assert_eq(rope_table(c), GN_OK);
    cr_assert_eq(rope_store(c), GN_OK);
    cr_assert_eq(attention(c), GN_OK);
    gn_ctx_close(c->ctx);
}
