/* zip.h - the directory of a zip file whose entries are stored, not compressed: what torch.save
 * writes. Layout as in PKWARE's APPNOTE 6.3.9, with zip64. */
#ifndef GN_ZIP_H
#define GN_ZIP_H

#include "kernels/base.h"

typedef struct gn_zip_entry {
    const char *name; /* in the file, not terminated */
    size_t name_len;
    size_t header; /* offset of its local header */
    size_t data;   /* offset of its bytes */
    size_t bytes;
} gn_zip_entry;

typedef struct gn_zip {
    gn_zip_entry *entries; /* sorted by name */
    size_t count;
} gn_zip;

/* Reads the directory of a whole file in memory, which must outlive the gn_zip. Every entry was
 * checked to lie inside the file and apart from the others, under a name of its own. Damage is
 * GN_EFORMAT; compression, encryption and several volumes are GN_EUNSUPPORTED. `path` is for
 * messages. */
GN_CHECKED gn_status gn_zip_open(gn_zip *zip, const unsigned char *data, size_t bytes,
                                 const char *path, gn_error *err);
void gn_zip_close(gn_zip *zip);
const gn_zip_entry *gn_zip_find(const gn_zip *zip, const char *name, size_t name_len); /* or NULL */

#endif
