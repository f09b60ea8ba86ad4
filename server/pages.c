/* pages.c - the web page's files. */
#include <stdio.h>
#include <string.h>

#include "server/assets.h"
#include "server/routes.h"

/* What the page may do: run its own scripts and styles, talk to this server, nothing else. Model
 * output that became markup by mistake still could not run or send anything. */
static const char policy[] =
    "Content-Security-Policy: default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; font-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'\r\n"
    "X-Content-Type-Options: nosniff\r\n"
    "Referrer-Policy: no-referrer\r\n"
    "Cache-Control: no-cache\r\n";

static const gn_asset *find_asset(const char *path) {
    for (size_t i = 0; i < gn_assets_count; i++) {
        if (strcmp(gn_assets[i].path, path) == 0) return &gn_assets[i];
    }
    return NULL;
}

/* Is the asset's tag in the list of If-None-Match? */
static bool is_known(const gn_exchange *x, const gn_asset *asset) {
    const char *tags = gn_http_header(x, "if-none-match");
    return tags && (strcmp(tags, "*") == 0 || strstr(tags, asset->etag));
}

void gn_get_page(gn_exchange *x) {
    const gn_asset *asset = find_asset(x->path);
    char headers[640];
    snprintf(headers, sizeof headers, "%sETag: %s\r\n", policy, asset->etag);
    if (is_known(x, asset))
        gn_respond(x, 304, NULL, headers, "", 0);
    else
        gn_respond(x, 200, asset->type, headers, asset->data, asset->size);
}
