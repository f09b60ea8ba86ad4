/* save_folder.c - mkdir, fsync, rename. */
#include "engine/save_folder.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/tensor_file_internal.h"

char *gn_path_join(const char *dir, const char *name) {
    char *path;
    return asprintf(&path, "%s/%s", dir, name) < 0 ? NULL : path;
}

gn_status gn_text_write(const char *path, const char *text, gn_error *err) {
    FILE *f = fopen(path, "wbe");
    const bool ok = f && fputs(text, f) >= 0 && fflush(f) == 0 && fsync(fileno(f)) == 0;
    const gn_status status = ok ? GN_OK : gn_fail(err, GN_EIO, "%s: %s", path, strerror(errno));
    if (f) fclose(f);
    return status;
}

gn_status gn_text_replace(const char *path, const char *text, gn_error *err) {
    char *temporary;
    if (asprintf(&temporary, "%s.partial", path) < 0)
        return gn_fail(err, GN_ENOMEM, "%s: out of memory", path);
    gn_status status = gn_text_write(temporary, text, err);
    if (!status && rename(temporary, path) != 0)
        status = gn_fail(err, GN_EIO, "%s: %s", path, strerror(errno));
    if (status) unlink(temporary);
    free(temporary);
    return status ? status : gn_sync_parent(path, err);
}

gn_status gn_folder_make(const char *dir, gn_error *err) {
    if (!*dir) return gn_fail(err, GN_EINVAL, "a folder's name is empty");
    char *path = strdup(dir);
    if (!path) return gn_fail(err, GN_ENOMEM, "out of memory");
    gn_status status = GN_OK;
    for (char *at = path + 1; !status; at++) {
        const char c = *at;
        if (c != '/' && c != 0) continue;
        *at = 0;
        if (mkdir(path, 0777) != 0 && errno != EEXIST)
            status = gn_fail(err, GN_EIO, "%s: %s", path, strerror(errno));
        *at = c;
        if (c == 0) break;
    }
    free(path);
    return status;
}

void gn_folder_remove(const char *path) {
    DIR *d = opendir(path);
    for (struct dirent *entry; d && (entry = readdir(d));) {
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
            unlinkat(dirfd(d), entry->d_name, 0);
    }
    if (d) closedir(d);
    rmdir(path);
}

static void free_names(gn_save_folder *f) {
    free(f->path);
    free(f->temporary);
    *f = (gn_save_folder){0};
}

gn_status gn_save_folder_check(const char *path, const char *file, const char *kind,
                               gn_error *err) {
    if (access(path, F_OK) != 0 || rmdir(path) == 0) return GN_OK;
    char *inside = gn_path_join(path, file);
    if (!inside) return gn_fail(err, GN_ENOMEM, "%s: out of memory", path);
    const bool is_kind = access(inside, F_OK) == 0;
    free(inside);
    return is_kind ? GN_OK : gn_fail(err, GN_EEXIST, "%s exists already, and is no %s", path, kind);
}

gn_status gn_save_folder_open(gn_save_folder *f, const char *path, gn_error *err) {
    *f = (gn_save_folder){0};
    size_t length = strlen(path);
    while (length > 1 && path[length - 1] == '/') length--;
    f->path = strndup(path, length);
    if (!f->path || asprintf(&f->temporary, "%s.partial", f->path) < 0) {
        f->temporary = NULL;
        free_names(f);
        return gn_fail(err, GN_ENOMEM, "%s: out of memory", path);
    }
    gn_folder_remove(f->temporary);
    if (mkdir(f->temporary, 0777) == 0) return GN_OK;
    gn_fail(err, GN_EIO, "%s: %s", f->temporary, strerror(errno));
    free_names(f);
    return GN_EIO;
}

/* Where a folder stands already, the two change places. A file system that cannot exchange loses
 * the old one a moment before the new one is there. */
static bool put_into_place(const gn_save_folder *f) {
    if (rename(f->temporary, f->path) == 0) return true;
    if (errno != ENOTEMPTY && errno != EEXIST) return false;
    if (renameat2(AT_FDCWD, f->temporary, AT_FDCWD, f->path, RENAME_EXCHANGE) == 0) {
        gn_folder_remove(f->temporary);
        return true;
    }
    if (errno != EINVAL && errno != ENOSYS) return false;
    gn_folder_remove(f->path);
    return rename(f->temporary, f->path) == 0;
}

static gn_status sync_and_move(const gn_save_folder *f, gn_error *err) {
    char *inside;
    if (asprintf(&inside, "%s/.", f->temporary) < 0)
        return gn_fail(err, GN_ENOMEM, "%s: out of memory", f->path);
    const gn_status status = gn_sync_parent(inside, err);
    free(inside);
    if (status) return status;
    if (!put_into_place(f)) return gn_fail(err, GN_EIO, "%s: %s", f->path, strerror(errno));
    return gn_sync_parent(f->path, err);
}

gn_status gn_save_folder_commit(gn_save_folder *f, gn_error *err) {
    const gn_status status = sync_and_move(f, err);
    if (status) gn_folder_remove(f->temporary);
    free_names(f);
    return status;
}

void gn_save_folder_abort(gn_save_folder *f) {
    if (f->temporary) gn_folder_remove(f->temporary);
    free_names(f);
}
