/* assets.h - the files of the web page, built into the program.
 *
 * The table is generated from web/ at build time (cmake/embed.cmake); the bytes live in read-only
 * memory for the life of the process. */
#ifndef GN_ASSETS_H
#define GN_ASSETS_H

#include <stddef.h>

typedef struct gn_asset {
    const char *path;          /* as requested: "/app.js", "/vendor/x.js"; "/" for index.html */
    const char *type;          /* Content-Type, with charset */
    const unsigned char *data; /* size bytes, followed by a zero byte */
    size_t size;
    const char *etag; /* quoted SHA-256 of data, a strong validator */
} gn_asset;

extern const gn_asset gn_assets[];
extern const size_t gn_assets_count;

#endif
