/* registry.c - the adapters a request may name. */
#include "server/registry.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void clear(gn_registered *item) {
    free(item->name);
    free(item->dir);
    gn_adapter_close(item->adapter);
}

void gn_registry_close(gn_registry *r) {
    for (int i = 0; i < r->n; i++) clear(&r->items[i]);
    free(r->items);
    *r = (gn_registry){0};
}

gn_registered *gn_registry_find(const gn_registry *r, const char *name) {
    for (int i = 0; i < r->n; i++) {
        if (strcmp(r->items[i].name, name) == 0) return &r->items[i];
    }
    return NULL;
}

static gn_registered *grow(gn_registry *r) {
    if (r->n == r->capacity) {
        const int capacity = r->capacity ? 2 * r->capacity : 8;
        gn_registered *items = realloc(r->items, (size_t)capacity * sizeof *items);
        if (!items) return NULL;
        r->items = items;
        r->capacity = capacity;
    }
    return &r->items[r->n];
}

gn_status gn_registry_put(gn_registry *r, const char *name, const char *dir, gn_adapter *adapter,
                          int64_t created) {
    gn_registered item = {strdup(name), strdup(dir), adapter, created};
    gn_registered *old = gn_registry_find(r, name), *place = old ? old : grow(r);
    if (!item.name || !item.dir || !place) {
        clear(&item);
        return GN_ENOMEM;
    }
    if (old)
        clear(old);
    else
        r->n++;
    *place = item;
    return GN_OK;
}

bool gn_registry_remove(gn_registry *r, const char *name) {
    gn_registered *item = gn_registry_find(r, name);
    if (!item) return false;
    clear(item);
    r->n--;
    memmove(item, item + 1, (size_t)(r->items + r->n - item) * sizeof *item);
    return true;
}

bool gn_registry_name_ok(const char *name) {
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
    const size_t size = strlen(name);
    if (size == 0 || size > 128 || !strchr(letters, name[0])) return false;
    for (const char *c = name; *c; c++) {
        if (!strchr(letters, *c) && !strchr("._-:/+", *c)) return false;
    }
    return true;
}

/* `path` in or below `root`; both are real paths. */
static bool is_below(const char *path, const char *root) {
    const size_t n = strlen(root);
    if (strcmp(root, "/") == 0) return true;
    return strncmp(path, root, n) == 0 && (path[n] == 0 || path[n] == '/');
}

gn_status gn_path_below(char **real, const char *root, const char *path, gn_error *err) {
    char *real_root = realpath(root, NULL), *joined = NULL, *found = NULL;
    if (!real_root) return gn_fail(err, GN_EIO, "%s: %s", root, strerror(errno));
    if (path[0] != '/' && asprintf(&joined, "%s/%s", root, path) < 0) joined = NULL;
    if (joined || path[0] == '/') found = realpath(joined ? joined : path, NULL);
    const bool below = found && is_below(found, real_root);
    free(joined);
    free(real_root);
    if (below) {
        *real = found;
        return GN_OK;
    }
    free(found);
    return gn_fail(err, GN_ENOENT, "%s: no such folder below the server's adapter folder", path);
}
