/* json_file.h - a JSON file of a model or adapter folder, in memory. */
#ifndef GN_JSON_FILE_H
#define GN_JSON_FILE_H

#include <cjson/cJSON.h>

#include "kernels/base.h"

/* A whole file of at most 16 MiB. *text is malloc'ed, and terminated at *len. */
GN_CHECKED gn_status gn_text_read(char **text, size_t *len, const char *path, gn_error *err);
/* Reads a file that holds exactly one JSON object, of at most 16 MiB. *out is freed by
 * cJSON_Delete. Missing is GN_ENOENT; malformed or something else than an object GN_EFORMAT, with
 * the line. cJSON keeps repeated keys: who walks an object takes the last, as Python does. */
GN_CHECKED gn_status gn_json_read(cJSON **out, const char *path, gn_error *err);

#endif
