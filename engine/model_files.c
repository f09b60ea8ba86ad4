/* model_files.c - copying by name: what else a folder holds, such as weights in another form, is
 * not taken along. */
#include "engine/model_files.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/bnb.h"
#include "engine/json_file.h"
#include "engine/save_folder.h"

static gn_status copy_bytes(const char *from, const char *to, gn_error *err) {
    char buffer[1 << 16];
    FILE *in = fopen(from, "rbe");
    if (!in)
        return gn_fail(err, errno == ENOENT ? GN_ENOENT : GN_EIO, "%s: %s", from, strerror(errno));
    FILE *out = fopen(to, "wbe");
    bool ok = out != NULL;
    for (size_t n; ok && (n = fread(buffer, 1, sizeof buffer, in)) > 0;)
        ok = fwrite(buffer, 1, n, out) == n;
    const bool is_read = !ferror(in);
    if (ok && is_read) ok = fflush(out) == 0 && fsync(fileno(out)) == 0;
    const gn_status status =
        ok && is_read ? GN_OK
                      : gn_fail(err, GN_EIO, "%s: %s", is_read ? to : from, strerror(errno));
    fclose(in);
    if (out) fclose(out);
    return status;
}

static gn_status copy_file(const char *from, const char *to, const char *name, gn_error *err) {
    char *old = gn_path_join(from, name), *new = gn_path_join(to, name);
    const gn_status status =
        old && new ? copy_bytes(old, new, err) : gn_fail(err, GN_ENOMEM, "%s: out of memory", to);
    free(old);
    free(new);
    return status;
}

gn_status gn_model_files_copy(const char *from, const char *to, gn_error *err) {
    static const char *const names[] = {
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.json",
        "generation_config.json",
        "added_tokens.json",
        "tokenizer.json",
        "LICENSE",
        "LICENSE.txt",
        "README.md",
        "USE_POLICY.md",
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        gn_error cause = {0};
        const gn_status status = copy_file(from, to, names[i], &cause);
        if (status && status != GN_ENOENT) return gn_fail(err, status, "%s", cause.message);
    }
    return GN_OK;
}

gn_status gn_model_config_copy(const char *from, const char *to, gn_error *err) {
    return copy_file(from, to, "config.json", err);
}

/* An object that repeats a key has all of them taken out. */
static void take_out(cJSON *root, const char *key) {
    while (cJSON_GetObjectItemCaseSensitive(root, key))
        cJSON_DeleteItemFromObjectCaseSensitive(root, key);
}

gn_status gn_model_config_write(const char *from, const char *to, gn_dtype dtype, gn_error *err) {
    char *old = gn_path_join(from, "config.json"), *new = gn_path_join(to, "config.json"),
         *text = NULL;
    cJSON *root = NULL;
    gn_status status = old && new ? gn_json_read(&root, old, err)
                                  : gn_fail(err, GN_ENOMEM, "%s: out of memory", to);
    if (!status) {
        const char *key = cJSON_GetObjectItemCaseSensitive(root, "dtype") ? "dtype" : "torch_dtype";
        take_out(root, "quantization_config");
        take_out(root, "torch_dtype");
        take_out(root, "dtype");
        if (cJSON_AddStringToObject(root, key, gn_torch_dtype_name(dtype)))
            text = cJSON_Print(root);
        status =
            text ? gn_text_write(new, text, err) : gn_fail(err, GN_ENOMEM, "%s: out of memory", to);
    }
    cJSON_free(text);
    cJSON_Delete(root);
    free(old);
    free(new);
    return status;
}
