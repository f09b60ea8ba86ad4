/* bench.h - what the benchmarks share: floors measured in the same run, and reporting. */
#ifndef GN_BENCH_H
#define GN_BENCH_H

#include "engine/model.h"
#include "kernels/measure.h"
#include "trainer/bench_times.h"
#include "trainer/trainer.h"

typedef struct gn_bench {
    const char *kind, *name; /* "decode"; the model's name for reports */
    gn_model *model;
    gn_adapter *adapter; /* or NULL */
    gn_rates rates;      /* what the device can do at best */
    double peak_bytes;   /* of the device's memory; on a CPU, of what this process held */
    /* Tokens of a prompt and of a reply; requests at a time. In training a batch is `streams`
     * sequences of `prompt` tokens. */
    int prompt, tokens, streams;
    int rank;             /* of the LoRA that is trained */
    float dropout;        /* likewise */
    int max_batch_tokens; /* 0: the engine's default */
    int64_t memory;       /* a budget; 0: the engine's default */
    gn_kv_dtype kv_dtype;
    bool json;
    gn_error *err;
} gn_bench;

GN_CHECKED gn_status gn_bench_decode(gn_bench *b);
GN_CHECKED gn_status gn_bench_prefill(gn_bench *b);
GN_CHECKED gn_status gn_bench_ops(gn_bench *b);
GN_CHECKED gn_status gn_bench_train(gn_bench *b);

/* `bench serve`, which loads no model itself. */
int gn_bench_serve_command(int n, char *const *args);

/* n ids; any will do, as long as no two prompts of different seeds begin alike. */
void gn_bench_prompt(int32_t *ids, int n, int vocab, uint32_t seed);
/* Seconds that moving `bytes` and computing `flop` must take. */
double gn_bench_floor(const gn_bench *b, double bytes, double flop);
/* Prints what is measured, on what, and what that can do at best; nothing with --json. */
void gn_bench_heading(const gn_bench *b);
/* A report line with what all have in common; the caller adds its own and prints it. */
cJSON *gn_bench_line(const gn_bench *b);

/* Around a round: measures b->rates, then forgets the memory that took; and afterwards raises
 * b->peak_bytes to the most memory that the round held. */
GN_CHECKED gn_status gn_round_begin(gn_bench *b);
void gn_round_end(gn_bench *b);

#endif
