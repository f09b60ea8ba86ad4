/* data_choice.c - opens the data sets that a command line names. */
#include "trainer/data_choice.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/config.h"
#include "trainer/trainer.h"

static void print_note(void *user, const char *text) {
    (void)user;
    gn_progress("%s", "");
    fprintf(stderr, "%s\n", text);
}

static void show_progress(void *user, int64_t done, int64_t total) {
    (void)user;
    if (done < total)
        gn_progress("tokenizing: %.0f%%", 100.0 * (double)done / (double)total);
    else
        gn_progress("%s", "");
}

/* *dir is malloc'ed; NULL: no cache. */
static gn_status find_cache(const char *chosen, char **dir, gn_error *err) {
    const char *base = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    int n = 0;
    *dir = NULL;
    if (chosen && !strcmp(chosen, "none")) return GN_OK;
    if (chosen)
        n = asprintf(dir, "%s", chosen);
    else if (base && *base)
        n = asprintf(dir, "%s/guanaco", base);
    else if (home && *home)
        n = asprintf(dir, "%s/.cache/guanaco", home);
    if (n >= 0) return GN_OK;
    *dir = NULL;
    return gn_fail(err, GN_ENOMEM, "out of memory");
}

gn_status gn_data_choice_open(const gn_data_choice *choice, const char *model_dir, int threads,
                              gn_dataset **out, gn_error *err) {
    gn_config config;
    char *cache = NULL;
    *out = NULL;
    gn_status status = gn_config_read(&config, model_dir, err);
    if (!status) status = find_cache(choice->cache_dir, &cache, err);
    if (status) return status;
    const gn_dataset_options options = {.files = choice->files.items,
                                        .n_files = choice->files.n,
                                        .format = (gn_format)choice->format,
                                        .model_dir = model_dir,
                                        .chat_template = choice->chat_template,
                                        .vocab = config.vocab,
                                        .source_max_len = choice->source_max_len,
                                        .target_max_len = choice->target_max_len,
                                        .max_len = config.max_positions,
                                        .train_on_source = choice->train_on_source,
                                        .skip_bad_rows = choice->skip_bad_rows,
                                        .threads = threads,
                                        .cache_dir = cache,
                                        .note = print_note,
                                        .progress = show_progress};
    status = gn_dataset_open(out, &options, err);
    free(cache);
    return status;
}
