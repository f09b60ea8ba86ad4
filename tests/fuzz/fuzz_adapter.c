/* fuzz_adapter.c - bytes as one file of an adapter folder whose other file is sound: a config when
 * they begin like JSON, legacy weights when like a zip file, else safetensors. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/adapter.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define KEY "base_model.model.model.layers.0.self_attn.q_proj.lora_"

static const char sound_config[] =
    "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 4, \"rank_pattern\": {\"v_proj\": 1}}";
static const char sound_header[] =
    "{\"" KEY
    "A.weight\": {\"dtype\": \"F32\", \"shape\": [2, 8], \"data_offsets\": [0, 64]}, \"" KEY
    "B.weight\": {\"dtype\": \"F32\", \"shape\": [8, 2], \"data_offsets\": [64, 128]}}";
static const gn_config base = {.layers = 2,
                               .hidden = 8,
                               .intermediate = 12,
                               .heads = 4,
                               .kv_heads = 2,
                               .head_dim = 2,
                               .vocab = 16};

static char dir[64];

static void remove_dir(void) {
    static const char *const names[] = {"adapter_config.json", "adapter_model.safetensors",
                                        "adapter_model.bin"};
    char path[128];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, names[i]);
        unlink(path);
    }
    rmdir(dir);
}

static void make_dir(void) {
    if (*dir) return;
    snprintf(dir, sizeof dir, "%s/fuzz-adapter-XXXXXX", P_tmpdir);
    if (!mkdtemp(dir) || atexit(remove_dir)) abort();
}

/* A missing file when data is NULL. */
static void put_file(const char *name, const void *data, size_t size) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    unlink(path);
    if (!data) return;
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, size, f) != size || fclose(f)) abort();
}

static void put_sound_weights(void) {
    unsigned char file[8 + sizeof sound_header - 1 + 128] = {0};
    const size_t n = sizeof sound_header - 1;
    file[0] = (unsigned char)n;
    file[1] = (unsigned char)(n >> 8);
    memcpy(file + 8, sound_header, n);
    put_file("adapter_model.safetensors", file, sizeof file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    make_dir();
    const bool is_config = size && *data == '{', is_zip = size && *data == 'P';
    put_file("adapter_config.json", is_config ? (const void *)data : sound_config,
             is_config ? size : sizeof sound_config - 1);
    put_file("adapter_model.bin", is_zip ? data : NULL, size);
    if (is_config)
        put_sound_weights();
    else
        put_file("adapter_model.safetensors", is_zip || !size ? NULL : data, size);
    gn_adapter *adapter = NULL;
    gn_error err = {0};
    const gn_status status = gn_adapter_load(&adapter, &base, "the base", dir, &err);
    if (status != err.status || (status == GN_OK) != (adapter != NULL)) abort();
    gn_adapter_close(adapter);
    return 0;
}
