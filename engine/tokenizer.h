/* tokenizer.h - SentencePiece behind a C interface, and the streaming detokenizer.
 *
 * The shim (tokenizer.cc) is the project's only C++; no exception leaves it. */
#ifndef GN_TOKENIZER_H
#define GN_TOKENIZER_H

#include "kernels/base.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct gn_tokenizer gn_tokenizer;

/* Opens DIR/tokenizer.model. `vocab` is the model's: a tokenizer with more pieces is refused. */
GN_CHECKED gn_status gn_tokenizer_open(gn_tokenizer **out, const char *dir, int vocab,
                                       gn_error *err);
void gn_tokenizer_close(gn_tokenizer *t);
int gn_tokenizer_size(const gn_tokenizer *t);
int32_t gn_tokenizer_bos(const gn_tokenizer *t); /* -1: none */
int32_t gn_tokenizer_eos(const gn_tokenizer *t);
/* The id of a control or user-defined piece with exactly this text, or -1. */
int32_t gn_tokenizer_special(const gn_tokenizer *t, const char *piece, size_t len);

/* Encodes text (any bytes; invalid UTF-8 goes through byte fallback or U+FFFD), no BOS. Control
 * pieces in it are plain text. *ids is malloc'ed. */
GN_CHECKED gn_status gn_tokenizer_encode(const gn_tokenizer *t, const char *text, size_t len,
                                         int32_t **ids, int32_t *n, gn_error *err);
/* The bytes one piece stands for; control pieces are empty; ids past the end too. */
const char *gn_tokenizer_bytes(const gn_tokenizer *t, int32_t id, size_t *len);

/* Turns a stream of tokens into text that can be shown at once: never part of a UTF-8 character,
 * never text that may yet become a stop string. Bytes that are not UTF-8 come out as U+FFFD. */
typedef struct gn_detokenizer gn_detokenizer;

/* The tokenizer is borrowed for the detokenizer's life; the stop strings are copied. Empty stop
 * strings are GN_EINVAL. `strip_space`: a leading space of the first token is dropped. */
GN_CHECKED gn_status gn_detokenizer_open(gn_detokenizer **out, const gn_tokenizer *t,
                                         const char *const *stop, int n_stop, bool strip_space);
void gn_detokenizer_close(gn_detokenizer *d);
/* Feeds one token. *text (borrowed until the next call) is what became certain. *stopped is set
 * when a stop string is complete: text ends before it, and nothing more may be fed. */
GN_CHECKED gn_status gn_detokenizer_feed(gn_detokenizer *d, int32_t id, const char **text,
                                         size_t *len, bool *stopped);
/* The rest, at the end of a reply that no stop string ended. */
GN_CHECKED gn_status gn_detokenizer_flush(gn_detokenizer *d, const char **text, size_t *len);

#ifdef __cplusplus
}
#endif
#endif
