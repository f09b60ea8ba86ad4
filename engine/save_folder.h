/* save_folder.h - folders of files that appear whole or not at all.
 *
 * A folder is filled under a temporary name beside its final one, synced, and moved into place:
 * whatever happens on the way (an error, a full disk, a kill, a power cut), the final name shows
 * the old folder, complete, or the new one. */
#ifndef GN_SAVE_FOLDER_H
#define GN_SAVE_FOLDER_H

#include "kernels/base.h"

typedef struct gn_save_folder {
    char *path;      /* where it will stand */
    char *temporary; /* "PATH.partial": where its files are to be written */
} gn_save_folder;

/* GN_EEXIST where something stands that must not be replaced: other than an empty folder, which is
 * removed, or one that holds `file` and so is a `kind` ("adapter"). */
GN_CHECKED gn_status gn_save_folder_check(const char *path, const char *file, const char *kind,
                                          gn_error *err);
/* Makes the temporary folder; what an interrupted call left there is removed. */
GN_CHECKED gn_status gn_save_folder_open(gn_save_folder *f, const char *path, gn_error *err);
/* Syncs the folder (its files are synced by who writes them) and puts it into place of whatever
 * folder stands there; on failure removes it. */
GN_CHECKED gn_status gn_save_folder_commit(gn_save_folder *f, gn_error *err);
/* Removes it. Nothing happens after a commit. */
void gn_save_folder_abort(gn_save_folder *f);

/* "DIR/NAME", malloc'ed; NULL: no memory. */
char *gn_path_join(const char *dir, const char *name);
/* Writes and syncs a file. */
GN_CHECKED gn_status gn_text_write(const char *path, const char *text, gn_error *err);
/* The same, in place of the file that stands there, whole or not at all. */
GN_CHECKED gn_status gn_text_replace(const char *path, const char *text, gn_error *err);
/* Makes a folder and those above it, where they are not there. */
GN_CHECKED gn_status gn_folder_make(const char *path, gn_error *err);
/* The files in a folder, then the folder; folders in it are left alone, and it with them. */
void gn_folder_remove(const char *path);

#endif
