/* samples.h - tokens with labels, many samples one after another; and their cache on disk. */
#ifndef GN_SAMPLES_H
#define GN_SAMPLES_H

#include "engine/hash.h"
#include "kernels/base.h"

enum { GN_NOT_LEARNED = -100 }; /* a label */

typedef struct gn_sample_counts {
    int64_t rows;      /* of the file */
    int64_t bad_rows;  /* that were skipped */
    int64_t left_out;  /* rows and examples in which nothing is to be learned */
    int64_t truncated; /* samples */
    int64_t learned;   /* tokens */
} gn_sample_counts;

/* Sample i is ids and labels [starts[i], starts[i+1]) and came from the row on lines[i]. A label is
 * the token's own id or GN_NOT_LEARNED, but in tokenized rows whatever the row says. */
typedef struct gn_samples {
    int32_t *ids, *labels; /* (n_tokens) */
    int64_t *starts;       /* (n + 1); NULL while n is 0 */
    int64_t *lines;        /* (n) */
    int64_t n, n_tokens;
    int64_t room, token_room;
    gn_sample_counts counts;
} gn_samples; /* zeroed: empty */

void gn_samples_free(gn_samples *s);
/* Makes room for n more tokens, behind n_tokens. */
GN_CHECKED gn_status gn_samples_reserve(gn_samples *s, int64_t n);
/* Makes the n tokens behind n_tokens, which are filled in, a sample, and counts those learned. */
GN_CHECKED gn_status gn_samples_commit(gn_samples *s, int64_t n, int64_t line);
/* Adds copies of another's samples and its counts. */
GN_CHECKED gn_status gn_samples_append(gn_samples *s, const gn_samples *other);

/* The file DIR/KEY.samples. Reading checks every length, id and the content's hash: what is not
 * whole, or another machine's, is GN_EFORMAT; no file is GN_ENOENT. Writing makes the folder where
 * needed, and replaces the file at once; there is at least one sample. */
GN_CHECKED gn_status gn_samples_read(gn_samples *s, const char *dir, const gn_hash *key, int vocab,
                                     gn_error *err);
GN_CHECKED gn_status gn_samples_write(const gn_samples *s, const char *dir, const gn_hash *key,
                                      gn_error *err);

#endif
