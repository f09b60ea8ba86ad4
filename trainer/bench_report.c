/* bench_report.c - prompts, floors, memory, and the fields every report line has. */
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "trainer/bench.h"

void gn_bench_prompt(int32_t *ids, int n, int vocab, uint32_t seed) {
    for (int i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        ids[i] = (int32_t)((seed >> 8) % (uint32_t)vocab);
    }
}

double gn_bench_floor(const gn_bench *b, double bytes, double flop) {
    const double reading = bytes / b->rates.read_bytes;
    return b->rates.flop > 0 ? fmax(reading, flop / b->rates.flop) : reading;
}

void gn_bench_heading(const gn_bench *b) {
    if (b->json) return;
    printf("%s: %s on %s\n  reads at %.1f GB/s, copies at %.1f GB/s", b->kind, b->name,
           gn_model_describe(b->model).device, 1e-9 * b->rates.read_bytes,
           1e-9 * b->rates.copy_bytes);
    if (b->rates.flop > 0) printf(", products at %.2f TFLOP/s", 1e-12 * b->rates.flop);
    printf("\n");
}

cJSON *gn_bench_line(const gn_bench *b) {
    const gn_model_info info = gn_model_describe(b->model);
    cJSON *line = cJSON_CreateObject();
    cJSON_AddStringToObject(line, "bench", b->kind);
    cJSON_AddStringToObject(line, "model", b->name);
    cJSON_AddStringToObject(line, "quant_type", gn_qtype_name(info.quant));
    cJSON_AddStringToObject(line, "device", info.device);
    cJSON_AddNumberToObject(line, "read_gb_s", 1e-9 * b->rates.read_bytes);
    cJSON_AddNumberToObject(line, "copy_gb_s", 1e-9 * b->rates.copy_bytes);
    if (b->rates.flop > 0) cJSON_AddNumberToObject(line, "peak_tflop_s", 1e-12 * b->rates.flop);
    return line;
}

/* Lets the peak count from now on; where the kernel does not allow it, it counts from the start. */
static void reset_peak(void) {
    const int fd = open("/proc/self/clear_refs", O_WRONLY);
    if (fd < 0) return;
    const ssize_t written = write(fd, "5", 1); /* proc(5): resets VmHWM */
    (void)written;
    close(fd);
}

gn_status gn_round_begin(gn_bench *b) {
    const gn_status status = gn_measure_rates(b->model->ctx, &b->rates);
    reset_peak();
    return status ? gn_fail(b->err, status, "measuring the device: %s", gn_status_text(status))
                  : GN_OK;
}

void gn_round_end(gn_bench *b) {
    gn_ctx *ctx = b->model->ctx;
    const double held =
        gn_ctx_is_host(ctx) ? gn_resident_peak(getpid()) : (double)gn_measure_used_bytes(ctx);
    b->peak_bytes = fmax(b->peak_bytes, held);
}
