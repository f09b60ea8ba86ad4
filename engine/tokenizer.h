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

/* Opens DIR/tokenizer.model. `vocab` is the model's: a tokenizer with more pieces is refused
 * (GN_EMISMATCH). A file that SentencePiece does not accept is GN_EFORMAT. */
GN_CHECKED gn_status gn_tokenizer_open(gn_tokenizer **out, const char *dir, int vocab,
                                       gn_error *err);
void gn_tokenizer_close(gn_tokenizer *t);
int gn_tokenizer_size(const gn_tokenizer *t);
int32_t gn_tokenizer_bos(const gn_tokenizer *t); /* -1: none */
int32_t gn_tokenizer_eos(const gn_tokenizer *t);
/* The id of a control or user-defined piece with exactly this text, or -1. */
int32_t gn_tokenizer_special(const gn_tokenizer *t, const char *piece, size_t len);

/* Encodes text (any bytes; SentencePiece reads each invalid one as U+FFFD), no BOS. Control pieces
 * and user-defined markers (<...>, [...]) in it are plain text. *ids is malloc'ed. */
GN_CHECKED gn_status gn_tokenizer_encode(const gn_tokenizer *t, const char *text, size_t len,
                                         int32_t **ids, int32_t *n, gn_error *err);
/* The same, and the byte of the text at which each token begins: *begins is malloc'ed. */
GN_CHECKED gn_status gn_tokenizer_encode_places(const gn_tokenizer *t, const char *text, size_t len,
                                                int32_t **ids, int32_t **begins, int32_t *n,
                                                gn_error *err);
/* The bytes one piece stands for, not terminated; control pieces and the unknown piece are empty,
 * as Hugging Face decodes with skip_special_tokens; ids past the end too. */
const char *gn_tokenizer_bytes(const gn_tokenizer *t, int32_t id, size_t *len);

/* Turns a stream of tokens into text that can be shown at once: never part of a UTF-8 character,
 * never text that may yet become a stop string. Bytes that are not UTF-8 come out as U+FFFD, one
 * for each maximal subpart of a character (as the WHATWG decoder).
 *
 * Stop strings are looked for in the bytes, so it does not matter how the text is cut into tokens:
 * the one whose last byte comes first ends the text, the longest if several end there. A stop
 * string that is the text of a control piece other than EOS is also complete when that piece is
 * fed ("<|im_end|>"). */
typedef struct gn_detokenizer gn_detokenizer;

/* The tokenizer is borrowed for the detokenizer's life; the stop strings are copied. Empty stop
 * strings are GN_EINVAL. `strip_space`: a space that begins the text is dropped. */
GN_CHECKED gn_status gn_detokenizer_open(gn_detokenizer **out, const gn_tokenizer *t,
                                         const char *const *stop, int n_stop, bool strip_space);
void gn_detokenizer_close(gn_detokenizer *d);
/* Feeds one token. *text (borrowed until the next call) is what became certain. *stopped is set
 * when a stop string is complete: text ends before it, and feeding more is GN_EINVAL. On GN_ENOMEM
 * nothing was fed. */
GN_CHECKED gn_status gn_detokenizer_feed(gn_detokenizer *d, int32_t id, const char **text,
                                         size_t *len, bool *stopped);
/* The same for bytes that come from elsewhere. */
GN_CHECKED gn_status gn_detokenizer_feed_bytes(gn_detokenizer *d, const char *bytes, size_t n,
                                               const char **text, size_t *len, bool *stopped);
/* The rest, at the end of a reply that no stop string ended. Nothing more may be fed. */
GN_CHECKED gn_status gn_detokenizer_flush(gn_detokenizer *d, const char **text, size_t *len);

#ifdef __cplusplus
}
#endif
#endif
