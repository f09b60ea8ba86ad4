/* adapter_writer.c - the two files of a PEFT folder, in the form that PEFT gives them: keys sorted,
 * every option spelled out, tensors by name. */
#include "trainer/adapter_writer.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/save_folder.h"
#include "trainer/masters.h"

/* ---- adapter_config.json ---- */

/* Without a layer: q_proj ... down_proj. */
static const char *const modules[] = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                      "gate_proj", "up_proj", "down_proj"};

static bool is_adapted(const gn_parameters *p, const char *module) {
    char part[32];
    snprintf(part, sizeof part, ".%s.lora_A.", module);
    for (size_t i = 0; i < p->n; i++)
        if (strstr(p->items[i].name, part)) return true;
    return false;
}

/* As Python prints it: the shortest digits that give the same number, and a point. */
static void print_float(FILE *f, double x) {
    char text[40];
    int digits = 1;
    do snprintf(text, sizeof text, "%.*g", digits, x);
    while (strtod(text, NULL) != x && ++digits <= 17);
    fprintf(f, "%s%s", text, strpbrk(text, ".en") ? "" : ".0");
}

static bool print_string(FILE *f, const char *text) {
    cJSON *string = cJSON_CreateString(text);
    char *quoted = string ? cJSON_PrintUnformatted(string) : NULL;
    if (quoted) fputs(quoted, f);
    cJSON_free(quoted);
    cJSON_Delete(string);
    return quoted != NULL;
}

static bool print_config(FILE *f, const gn_adapter_config *config, const gn_parameters *p) {
    fputs("{\n"
          "  \"alora_invocation_tokens\": null,\n"
          "  \"alpha_pattern\": {},\n"
          "  \"arrow_config\": null,\n"
          "  \"auto_mapping\": null,\n"
          "  \"base_model_name_or_path\": ",
          f);
    const bool ok = print_string(f, config->base);
    fputs(",\n"
          "  \"bias\": \"none\",\n"
          "  \"corda_config\": null,\n"
          "  \"ensure_weight_tying\": false,\n"
          "  \"eva_config\": null,\n"
          "  \"exclude_modules\": null,\n"
          "  \"fan_in_fan_out\": false,\n"
          "  \"inference_mode\": true,\n"
          "  \"init_lora_weights\": true,\n"
          "  \"kasa_config\": null,\n"
          "  \"layer_replication\": null,\n"
          "  \"layers_pattern\": null,\n"
          "  \"layers_to_transform\": null,\n"
          "  \"loftq_config\": {},\n"
          "  \"lora_alpha\": ",
          f);
    if (config->alpha == (double)(int64_t)config->alpha)
        fprintf(f, "%lld", (long long)config->alpha);
    else
        print_float(f, config->alpha);
    fputs(",\n  \"lora_bias\": false,\n  \"lora_dropout\": ", f);
    print_float(f, config->dropout);
    fprintf(f,
            ",\n"
            "  \"lora_ga_config\": null,\n"
            "  \"megatron_config\": null,\n"
            "  \"megatron_core\": \"megatron.core\",\n"
            "  \"modules_to_save\": null,\n"
            "  \"monteclora_config\": null,\n"
            "  \"peft_type\": \"LORA\",\n"
            "  \"peft_version\": \"0.21.0\",\n"
            "  \"qalora_group_size\": 16,\n"
            "  \"r\": %d,\n"
            "  \"rank_pattern\": {},\n"
            "  \"revision\": null,\n"
            "  \"target_modules\": [",
            config->rank);
    const char *separator = "\n";
    for (size_t i = 0; i < sizeof modules / sizeof *modules; i++) {
        if (!is_adapted(p, modules[i])) continue;
        fprintf(f, "%s    \"%s\"", separator, modules[i]);
        separator = ",\n";
    }
    fprintf(f,
            "\n  ],\n"
            "  \"target_parameters\": null,\n"
            "  \"task_type\": \"CAUSAL_LM\",\n"
            "  \"trainable_token_indices\": null,\n"
            "  \"use_bdlora\": null,\n"
            "  \"use_dora\": false,\n"
            "  \"use_qalora\": false,\n"
            "  \"use_rslora\": %s,\n"
            "  \"velora_config\": null\n"
            "}",
            config->rslora ? "true" : "false");
    return ok;
}

static gn_status write_config(const char *dir, const gn_adapter_config *config,
                              const gn_parameters *p, gn_error *err) {
    char *path, *text = NULL;
    size_t length;
    if (asprintf(&path, "%s/adapter_config.json", dir) < 0)
        return gn_fail(err, GN_ENOMEM, "%s: out of memory", dir);
    FILE *f = open_memstream(&text, &length);
    bool ok = f && print_config(f, config, p);
    if (f && fclose(f) != 0) ok = false;
    const gn_status status =
        ok ? gn_text_write(path, text, err) : gn_fail(err, GN_ENOMEM, "%s: out of memory", path);
    free(text);
    free(path);
    return status;
}

/* ---- adapter_model.safetensors ---- */

typedef struct entry {
    gn_file_tensor tensor;
    size_t parameter;
} entry;

static int by_name(const void *a, const void *b) {
    return strcmp(((const entry *)a)->tensor.name, ((const entry *)b)->tensor.name);
}

static void free_entries(entry *entries, size_t n) {
    for (size_t i = 0; entries && i < n; i++) free((char *)entries[i].tensor.name);
    free(entries);
}

/* The file's tensors, sorted by name; NULL without memory. */
static entry *make_entries(const gn_parameters *p, gn_dtype dtype) {
    entry *entries = calloc(p->n + 1, sizeof *entries);
    for (size_t i = 0; entries && i < p->n; i++) {
        const gn_parameter *item = &p->items[i];
        char *name;
        if (asprintf(&name, "base_model.model.%s", item->name) < 0) {
            free_entries(entries, p->n);
            return NULL;
        }
        entries[i] = (entry){gn_master_tensor(item, name, dtype), i};
    }
    if (entries) qsort(entries, p->n, sizeof *entries, by_name);
    return entries;
}

static gn_status write_tensors(const char *path, gn_optimizer *o, const entry *entries,
                               gn_error *err) {
    static const char *const metadata[] = {"format", "pt", NULL};
    const size_t n = gn_optimizer_parameters(o)->n;
    gn_safetensors_writer *w;
    gn_file_tensor *tensors = calloc(n + 1, sizeof *tensors);
    if (!tensors) return gn_fail(err, GN_ENOMEM, "%s: out of memory", path);
    for (size_t i = 0; i < n; i++) tensors[i] = entries[i].tensor;
    gn_status status = gn_safetensors_create(&w, path, tensors, n, metadata, err);
    free(tensors);
    if (status) return status;
    for (size_t i = 0; i < n && !status; i++)
        status = gn_master_write(w, o, entries[i].parameter, entries[i].tensor.dtype, err);
    if (!status) return gn_safetensors_commit(w, err);
    gn_safetensors_abort(w);
    return status;
}

static gn_status write_model(const char *dir, const gn_adapter_config *config, gn_optimizer *o,
                             gn_error *err) {
    const gn_parameters *p = gn_optimizer_parameters(o);
    char *path;
    if (asprintf(&path, "%s/adapter_model.safetensors", dir) < 0)
        return gn_fail(err, GN_ENOMEM, "%s: out of memory", dir);
    gn_status status = gn_pages_flush(gn_optimizer_pages(o));
    entry *entries = status ? NULL : make_entries(p, config->dtype);
    if (!status && !entries) status = GN_ENOMEM;
    if (status)
        gn_fail(err, status, "%s: %s", path, gn_status_text(status));
    else
        status = write_tensors(path, o, entries, err);
    free_entries(entries, p->n);
    free(path);
    return status;
}

/* ---- the folder ---- */

gn_status gn_adapter_write(const char *dir, const gn_adapter_config *config, gn_optimizer *o,
                           gn_error *err) {
    const gn_status status = write_config(dir, config, gn_optimizer_parameters(o), err);
    return status ? status : write_model(dir, config, o, err);
}

gn_status gn_adapter_save(const char *dir, const gn_adapter_config *config, gn_optimizer *o,
                          gn_error *err) {
    gn_save_folder folder;
    gn_status status = gn_save_folder_check(dir, "adapter_config.json", "adapter", err);
    if (!status) status = gn_save_folder_open(&folder, dir, err);
    if (status) return status;
    status = gn_adapter_write(folder.temporary, config, o, err);
    if (!status) return gn_save_folder_commit(&folder, err);
    gn_save_folder_abort(&folder);
    return status;
}
