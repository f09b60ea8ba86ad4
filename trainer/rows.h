/* rows.h - a data set's file as rows.
 *
 * The file's name says what it is: .json (an array of objects; else as .jsonl), .jsonl (an object a
 * line), .csv or .tsv (RFC 4180; the first record names the columns, and a row becomes an object of
 * strings). The file is held in memory and cut into rows without being parsed, so that rows can be
 * parsed by several threads, and a malformed row need not harm the next. */
#ifndef GN_ROWS_H
#define GN_ROWS_H

#include <cjson/cJSON.h>

#include "engine/hash.h"
#include "kernels/base.h"

typedef struct gn_rows gn_rows;

/* GN_EUNSUPPORTED: the name ends in none of these. GN_EFORMAT: there are no rows, a .json array
 * does not end where the file does, or the columns have no names. */
GN_CHECKED gn_status gn_rows_open(gn_rows **out, const char *path, gn_error *err);
/* The same for text in memory: malloc'ed, `size` bytes and a zero byte, and the rows' from now on
 * whatever comes back. `path` says the kind and stands in messages. */
GN_CHECKED gn_status gn_rows_open_take(gn_rows **out, const char *path, char *text, size_t size,
                                       gn_error *err);
void gn_rows_close(gn_rows *rows);
int64_t gn_rows_count(const gn_rows *rows);
const char *gn_rows_path(const gn_rows *rows);
int64_t gn_rows_line(const gn_rows *rows, int64_t i); /* in the file, from 1, where row i begins */
void gn_rows_add_to_hash(const gn_rows *rows, gn_hash *hash); /* the file's contents and kind */

/* Row i, to be freed by cJSON_Delete. A row that is not JSON or not an object, is not UTF-8, holds
 * a zero character, is over 64 MiB or has another number of fields than there are columns is
 * GN_EFORMAT; the message leaves it to the caller to name file and line. From any thread. */
GN_CHECKED gn_status gn_rows_parse(const gn_rows *rows, int64_t i, cJSON **row, gn_error *err);

#endif
