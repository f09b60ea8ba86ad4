/* manifest.h - a folder's list of its own files, with their lengths and hashes. */
#ifndef GN_MANIFEST_H
#define GN_MANIFEST_H

#include "kernels/base.h"

/* Lists all files of a folder in its manifest.json, which is synced. */
GN_CHECKED gn_status gn_manifest_write(const char *dir, gn_error *err);

/* Is each file what the manifest says, and are the files in `needed` (NULL-terminated) among
 * them? A difference is GN_EFORMAT, naming the file. */
GN_CHECKED gn_status gn_manifest_check(const char *dir, const char *const *needed, gn_error *err);

#endif
