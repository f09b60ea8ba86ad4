/* Calls of the training ops that every backend must refuse. */
#include "cases.h"

#include "kernels/backend.h"

/* A good call of every op, to be spoiled one thing at a time: T 4, K 64, N 64, vocabulary 16; 2
 * heads of 4 on 1 kv head. */
typedef struct {
    gn_ctx *ctx;
    float f[16][4 * 64], w[64 * 64], a[2 * 64], b[64 * 2];
    int32_t ids[4], labels[4], row0[3], pos0[2];
    gn_matrix m;
    gn_lora lora[2];
    gn_lora_pair pair;
    gn_linear_args args;
    gn_linear_grads grads;
    gn_tensor x, y, dx, rounded, dy, norm, dnorm, dtable, q, k, dq, dk, dv, da, cos, sin;
    gn_attention_rows rows;
    gn_cross_entropy_args loss;
    gn_seqs seqs;
} calls;

static void make_calls(calls *c) {
    memset(c, 0, sizeof *c);
    c->ctx = open_ctx(GN_ISA_REFERENCE, GN_F32, 1);
    c->m = (gn_matrix){.dtype = GN_F32, .rows = 64, .cols = 64, .data = c->w};
    c->x = rows2(c->f[0], 4, 64);
    c->y = rows2(c->f[1], 4, 64);
    c->dx = rows2(c->f[2], 4, 64);
    c->dy = rows2(c->f[3], 4, 64);
    c->rounded = rows2(c->f[12], 4, 64);
    c->norm = gn_tensor_1d(c->f[4], GN_F32, 64);
    c->dnorm = gn_tensor_1d(c->f[5], GN_F32, 64);
    c->dtable = rows2(c->f[6], 4, 64);
    c->pair = (gn_lora_pair){2, 1, rows2(c->a, 2, 64), rows2(c->b, 64, 2)};
    c->lora[0] = c->lora[1] = (gn_lora){.rows = 4, .scale = 1, .pairs = &c->pair};
    c->args = (gn_linear_args){.x = c->x, .lora = c->lora, .n_lora = 1, .n_parts = 1};
    c->args.part[0] = (struct gn_linear_part){c->y, &c->m};
    c->grads.dx = c->dx;
    c->grads.part[0].dy = c->dy;
    c->grads.part[0].da = rows2(c->f[7], 2, 64);
    c->grads.part[0].db = rows2(c->f[8], 64, 2);
    c->grads.part[0].dw = rows2(c->w, 64, 64);
    c->q = rows3(c->f[0], 4, 2, 4);
    c->k = rows3(c->f[1], 4, 1, 4);
    c->dq = rows3(c->f[2], 4, 2, 4);
    c->dk = rows3(c->f[3], 4, 1, 4);
    c->dv = rows3(c->f[4], 4, 1, 4);
    c->da = rows3(c->f[5], 4, 2, 4);
    c->cos = rows2(c->f[6], 4, 2);
    c->sin = rows2(c->f[7], 4, 2);
    c->row0[1] = 1;
    c->row0[2] = 4;
    c->seqs = (gn_seqs){.n = 2, .row0 = c->row0, .pos0 = c->pos0};
    c->rows = (gn_attention_rows){.q = c->q,
                                  .y = rows3(c->f[8], 4, 2, 4),
                                  .k = c->k,
                                  .v = rows3(c->f[9], 4, 1, 4),
                                  .lse = rows2(c->f[10], 4, 2),
                                  .seqs = &c->seqs};
    c->loss = (gn_cross_entropy_args){.x = c->x,
                                      .lm_head = &c->m,
                                      .labels = c->labels,
                                      .scale = 1,
                                      .loss = gn_tensor_1d(c->f[9], GN_F32, 4),
                                      .dx = c->dx,
                                      .dw = rows2(c->w, 64, 64)};
    const size_t bytes = gn_linear_bwd_workspace(c->ctx, 4, 64, 64, 2) +
                         gn_attention_train_workspace(c->ctx, 4, 2, 4, 4) +
                         gn_cross_entropy_workspace(c->ctx, 64, 64);
    cr_assert_eq(gn_ctx_reserve(c->ctx, bytes), GN_OK);
}

static gn_status call_convert(calls *c) {
    return gn_convert(c->ctx, &c->y, &c->x);
}
static gn_status call_embed(calls *c) {
    return gn_embed_bwd(c->ctx, &c->dtable, &c->dy, c->ids);
}
static gn_status call_rmsnorm(calls *c) {
    return gn_rmsnorm_bwd(c->ctx, &c->dx, &c->rounded, &c->dnorm, &c->dy, &c->y, &c->x, &c->norm,
                          1e-5f);
}
static gn_status call_linear(calls *c) {
    return gn_linear_bwd(c->ctx, &c->args, &c->grads);
}
static gn_status call_swiglu(calls *c) {
    return gn_swiglu(c->ctx, &c->dx, &c->x, &c->y);
}
static gn_status call_swiglu_bwd(calls *c) {
    return gn_swiglu_bwd(c->ctx, &c->dx, &c->dtable, &c->dy, &c->x, &c->y);
}
static gn_status call_rope(calls *c) {
    return gn_rope(c->ctx, &c->q, &c->cos, &c->sin);
}
static gn_status call_rope_bwd(calls *c) {
    return gn_rope_bwd(c->ctx, &c->q, &c->cos, &c->sin);
}
static gn_status call_attention(calls *c) {
    return gn_attention_train(c->ctx, &c->rows);
}
static gn_status call_attention_bwd(calls *c) {
    return gn_attention_bwd(c->ctx, &c->dq, &c->dk, &c->dv, &c->da, &c->rows);
}
static gn_status call_loss(calls *c) {
    return gn_cross_entropy(c->ctx, &c->loss);
}

/* op, what is spoiled */
#define BAD_CALLS(X)                                                                               \
    X(convert, c->y.shape[0] = 3)                                                                  \
    X(convert, c->x.shape[1] = 63)                                                                 \
    X(convert, c->x.dtype = GN_F16)                                                                \
    X(convert, c->y.dtype = GN_I32)                                                                \
    X(convert, c->y.data = NULL)                                                                   \
    X(embed, c->ids[1] = -1)                                                                       \
    X(embed, c->ids[3] = 4)                                                                        \
    X(embed, c->dtable.shape[1] = 63)                                                              \
    X(embed, c->dtable.dtype = GN_BF16)                                                            \
    X(embed, c->dtable.data = NULL)                                                                \
    X(rmsnorm, c->dx.shape[0] = 3)                                                                 \
    X(rmsnorm, c->rounded.shape[0] = 3)                                                            \
    X(rmsnorm, c->rounded.dtype = GN_BF16)                                                         \
    X(rmsnorm, c->dy.shape[1] = 32)                                                                \
    X(rmsnorm, c->y.shape[0] = 3)                                                                  \
    X(rmsnorm, c->dnorm.shape[0] = 63)                                                             \
    X(rmsnorm, c->norm.data = NULL)                                                                \
    X(rmsnorm, c->x.dtype = GN_BF16)                                                               \
    X(linear, c->args.part[0].w = NULL)                                                            \
    X(linear, c->args.x_spare = 1)                                                                 \
    X(linear, c->args.x_spare = -1)                                                                \
    X(linear, c->grads.part[0].dy_spare = 1)                                                       \
    X(linear, c->grads.part[0].dy_spare = -1)                                                      \
    X(linear, c->args.n_lora = 2)                                                                  \
    X(linear, c->args.dropout.p = 1)                                                               \
    X(linear, c->args.dropout.p = -0.1f)                                                           \
    X(linear, c->args.dropout.p = NAN)                                                             \
    X(linear, c->args.epilogue = GN_SWIGLU; c->args.part[1] = c->args.part[0];                     \
      c->args.n_parts = 2)                                                                         \
    X(linear, c->grads.dx.shape[1] = 63)                                                           \
    X(linear, c->grads.dx.dtype = GN_F16)                                                          \
    X(linear, c->grads.part[0].dy.shape[1] = 63)                                                   \
    X(linear, c->grads.part[0].dy.data = NULL)                                                     \
    X(linear, c->grads.part[0].da.shape[0] = 3)                                                    \
    X(linear, c->grads.part[0].db.shape[0] = 63)                                                   \
    X(linear, c->grads.part[0].db.dtype = GN_BF16)                                                 \
    X(linear, c->grads.part[0].dw.shape[0] = 63)                                                   \
    X(linear, c->m.qtype = GN_Q_INT8; c->m.absmax = c->w)                                          \
    X(linear, c->pair.rank = 0)                                                                    \
    X(linear, c->args.n_lora = 0)                                                                  \
    X(swiglu, c->x.shape[1] = 63)                                                                  \
    X(swiglu, c->y.ndim = 1)                                                                       \
    X(swiglu, c->dx.data = NULL)                                                                   \
    X(swiglu_bwd, c->dx.shape[1] = 63)                                                             \
    X(swiglu_bwd, c->dtable.shape[0] = 3)                                                          \
    X(swiglu_bwd, c->dy.dtype = GN_I32)                                                            \
    X(swiglu_bwd, c->y.data = NULL)                                                                \
    X(rope, c->cos.shape[1] = 1)                                                                   \
    X(rope, c->sin.shape[0] = 3)                                                                   \
    X(rope, c->q.ndim = 2)                                                                         \
    X(rope, c->q.shape[2] = 3)                                                                     \
    X(rope_bwd, c->cos.data = NULL)                                                                \
    X(rope_bwd, c->q.dtype = GN_F16)                                                               \
    X(rope_bwd, c->q.shape[2] = 2 * GN_MAX_HEAD_DIM; c->q.ld *= 99;                                \
      c->cos.shape[1] = c->cos.ld = c->sin.shape[1] = c->sin.ld = GN_MAX_HEAD_DIM)                 \
    X(attention, c->rows.y.shape[1] = 1)                                                           \
    X(attention, c->rows.v.shape[2] = 2)                                                           \
    X(attention, c->rows.q.shape[1] = c->rows.y.shape[1] = 3; c->rows.k.shape[1] = 2)              \
    X(attention, c->rows.lse.shape[1] = 1)                                                         \
    X(attention, c->rows.seqs = NULL)                                                              \
    X(attention, c->row0[1] = 5)                                                                   \
    X(attention, c->row0[2] = 3)                                                                   \
    X(attention_bwd, c->dq.shape[1] = 1)                                                           \
    X(attention_bwd, c->dk.data = NULL)                                                            \
    X(attention_bwd, c->dv.shape[2] = 2)                                                           \
    X(attention_bwd, c->da.shape[0] = 3)                                                           \
    X(attention_bwd, c->rows.lse.data = NULL)                                                      \
    X(loss, c->labels[2] = 64)                                                                     \
    X(loss, c->labels[2] = -1)                                                                     \
    X(loss, c->loss.labels = NULL)                                                                 \
    X(loss, c->loss.loss.shape[0] = 3)                                                             \
    X(loss, c->loss.dx.shape[1] = 63)                                                              \
    X(loss, c->loss.dw.shape[0] = 63)                                                              \
    X(loss, c->loss.dx.data = NULL)                                                                \
    X(loss, c->loss.lm_head = NULL)                                                                \
    X(loss, c->m.qtype = GN_Q_INT8; c->m.absmax = c->w)                                            \
    X(loss, c->m.cols = 63)

Test(train_calls, bad_calls_are_refused) {
    gn_status (*const ops[])(calls *) = {call_convert,       call_embed,    call_rmsnorm,
                                         call_linear,        call_swiglu,   call_swiglu_bwd,
                                         call_rope,          call_rope_bwd, call_attention,
                                         call_attention_bwd, call_loss};
    calls *c = malloc(sizeof *c);
    for (int i = 0; i < COUNT(ops); i++) {
        make_calls(c);
        cr_assert_eq(ops[i](c), GN_OK, "good call %d", i);
        gn_ctx *ctx = c->ctx;
        c->ctx = NULL;
        cr_assert_eq(ops[i](c), GN_EINVAL, "no context, call %d", i);
        gn_ctx_close(ctx);
    }
#define X(op, ...)                                                                                 \
    make_calls(c);                                                                                 \
    __VA_ARGS__;                                                                                   \
    cr_assert_eq(call_##op(c), GN_EINVAL, "%s: %s", #op, #__VA_ARGS__);                            \
    gn_ctx_close(c->ctx);
    BAD_CALLS(X)
#undef X
    free(c);
}

Test(train_calls, too_little_working_memory_is_said) {
    gn_status (*const ops[])(calls *) = {call_rmsnorm, call_linear, call_attention,
                                         call_attention_bwd, call_loss};
    calls *c = malloc(sizeof *c);
    make_calls(c);
    c->ctx->workspace_bytes = 8;
    for (int i = 0; i < COUNT(ops); i++) cr_assert_eq(ops[i](c), GN_ENOMEM, "call %d", i);
    gn_ctx_close(c->ctx);
    free(c);
}
