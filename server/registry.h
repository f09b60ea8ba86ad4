/* registry.h - the adapters a request may name. */
#ifndef GN_REGISTRY_H
#define GN_REGISTRY_H

#include "engine/guanaco.h"

typedef struct gn_registered {
    char *name, *dir;
    gn_adapter *adapter; /* one reference */
    int64_t created;     /* seconds since 1970 */
} gn_registered;

typedef struct gn_registry {
    gn_registered *items; /* in the order they were added */
    int n, capacity;
} gn_registry;

void gn_registry_close(gn_registry *r);
/* NULL when there is none. Good until the next change. */
gn_registered *gn_registry_find(const gn_registry *r, const char *name);
/* Adds or replaces; the reference is taken over, also when it fails. */
GN_CHECKED gn_status gn_registry_put(gn_registry *r, const char *name, const char *dir,
                                     gn_adapter *adapter, int64_t created);
bool gn_registry_remove(gn_registry *r, const char *name); /* false: there was none */

/* A name is 1 to 128 letters, digits and . _ - : / +, and begins with a letter or digit. */
bool gn_registry_name_ok(const char *name);

/* The real path of `path`, taken relative to `root` unless absolute, when it lies in or below
 * `root` after all symbolic links; *real is malloc'ed. A path that leads elsewhere is GN_ENOENT
 * just like one that leads nowhere, so that nobody can ask which files exist. */
GN_CHECKED gn_status gn_path_below(char **real, const char *root, const char *path, gn_error *err);

#endif
