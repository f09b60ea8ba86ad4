/* bench_sample.c - how long sampling takes on the GPU; run by hand, not a test.
 *
 * Microseconds a call, launch and wait included, for rows of logits like a model's: a bell of
 * deviation 2.5, with a few that stand out. What an empty wait costs is a part of each. */
#include "kernels/sample.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "tests/gpu/bench.h"

enum { MAX_N = 256, RUNS = 300 };

static float normal(void) {
    const double u = (rand() + 1.0) / (RAND_MAX + 1.0), v = (rand() + 1.0) / (RAND_MAX + 1.0);
    return (float)(sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
}

static double time_of(gn_device_sampler *s, const gn_tensor *logits, gn_sample_row row, int n) {
    gn_sample_row rows[MAX_N];
    const gn_sampled *results;
    double best = INFINITY;
    for (int i = 0; i < n; i++) rows[i] = row;
    for (int run = 0; run < RUNS; run++) {
        for (int i = 0; i < n; i++) rows[i].step = run;
        const double start = seconds();
        check(gn_device_sample(s, logits, rows, n), NULL);
        check(gn_device_sample_wait(s, &results), NULL);
        const double t = seconds() - start;
        best = t < best ? t : best;
    }
    return best * 1e6;
}

int main(void) {
    static const int vocabs[] = {32000, 128256}, ns[] = {1, 8, 16, 64, 128, 256};
    static const struct {
        const char *name;
        gn_sample_row row;
    } kinds[] = {
        {"greedy",
         {.top_p = 1, .typical_p = 1, .repetition_penalty = 1, .counts = -1, .given = -1}},
        {"draw", GN_SAMPLE_ROW_DEFAULT},
        {"top_k 40",
         {.temperature = 0.8f,
          .top_k = 40,
          .top_p = 1,
          .typical_p = 1,
          .repetition_penalty = 1,
          .counts = -1,
          .given = -1}},
        {"top_p 0.95",
         {.temperature = 0.8f,
          .top_p = 0.95f,
          .typical_p = 1,
          .repetition_penalty = 1,
          .counts = -1,
          .given = -1}},
        {"all",
         {.temperature = 0.8f,
          .top_k = 200,
          .top_p = 0.95f,
          .typical_p = 0.9f,
          .min_p = 0.02f,
          .repetition_penalty = 1,
          .counts = -1,
          .given = -1}},
        {"top 20",
         {.temperature = 1,
          .top_p = 1,
          .typical_p = 1,
          .repetition_penalty = 1,
          .counts = -1,
          .given = -1,
          .n_top = 20,
          .logprob = true}},
    };
    enum { KINDS = sizeof kinds / sizeof *kinds };
    gn_error err = {0};
    gn_ctx *ctx;
    const gn_ctx_options options = {.device = "cuda", .auto_compute = true};
    if (gn_ctx_open(&ctx, &options, &err) != GN_OK) {
        fprintf(stderr, "bench_sample: %s\n", err.message);
        return 1;
    }
    printf("%s, us a call\n%7s %5s", gn_ctx_device(ctx), "vocab", "rows");
    for (int k = 0; k < KINDS; k++) printf(" %10s", kinds[k].name);
    for (size_t v = 0; v < sizeof vocabs / sizeof *vocabs; v++) {
        const size_t bytes = MAX_N * (size_t)vocabs[v] * sizeof(float);
        float *host = malloc(bytes);
        void *device = gn_ctx_alloc(ctx, bytes);
        gn_device_sampler *s;
        if (!host || !device) check(GN_ENOMEM, NULL);
        for (size_t i = 0; i < bytes / sizeof *host; i++)
            host[i] = 2.5f * normal() + (i % 3000 == 0 ? 8 : 0);
        check(gn_ctx_write(ctx, device, host, bytes), NULL);
        check(gn_device_sampler_open(&s, ctx, MAX_N, vocabs[v]), NULL);
        for (size_t i = 0; i < sizeof ns / sizeof *ns; i++) {
            const gn_tensor logits = gn_tensor_2d(device, GN_F32, ns[i], vocabs[v]);
            printf("\n%7d %5d", vocabs[v], ns[i]);
            for (int k = 0; k < KINDS; k++)
                printf(" %10.1f", time_of(s, &logits, kinds[k].row, ns[i]));
        }
        gn_device_sampler_close(s);
        gn_ctx_free(ctx, device);
        free(host);
    }
    printf("\n");
    gn_ctx_close(ctx);
    return 0;
}
