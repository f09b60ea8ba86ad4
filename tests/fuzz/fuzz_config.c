/* fuzz_config.c - bytes as a config.json: refused with a reason, or numbers in their bounds. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "engine/config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char dir[64], path[128];

static void clean_up(void) {
    unlink(path);
    rmdir(dir);
}

static void check(const gn_config *c) {
    static float inv_freq[512];
    if (c->head_dim < 2 || c->head_dim > 1024 || c->heads % c->kv_heads) abort();
    if (c->n_eos < 0 || c->n_eos > GN_MAX_EOS || c->bos >= c->vocab) abort();
    for (int p = 0; p < GN_PROJ_COUNT; p++) {
        const int64_t rows = gn_proj_rows(c, (gn_proj)p), cols = gn_proj_cols(c, (gn_proj)p);
        if (rows < 1 || cols < 1 || rows > 1 << 20 || cols > 1 << 20) abort();
    }
    gn_config_inv_freq(c, inv_freq);
    for (int i = 0; i < c->head_dim / 2; i++)
        if (!isfinite(inv_freq[i])) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!*dir) {
        snprintf(dir, sizeof dir, "%s/fuzz-config-XXXXXX", P_tmpdir);
        if (!mkdtemp(dir) || atexit(clean_up)) abort();
        snprintf(path, sizeof path, "%s/config.json", dir);
    }
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, size, f) != size || fclose(f)) abort();
    gn_config config;
    gn_error err = {0};
    const gn_status status = gn_config_read(&config, dir, &err);
    if (status != err.status) abort();
    if (status == GN_OK) check(&config);
    return 0;
}
