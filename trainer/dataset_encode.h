/* dataset_encode.h - examples to tokens and labels.
 *
 * A prompt is BOS and its tokens, cut at source_max_len; a reply is its tokens and EOS, cut at
 * target_max_len. The original cut EOS off with the rest, which taught long replies not to end;
 * here EOS stays, as the last of the target_max_len. A conversation goes through the chat template
 * and is cut at source_max_len + target_max_len in the same way: what is learned last is EOS.
 * Tokens are taken as they are, up to max_len.
 *
 * Learned is the reply, or what the assistant says in all of its turns; with train_on_source
 * everything. */
#ifndef GN_DATASET_ENCODE_H
#define GN_DATASET_ENCODE_H

#include "engine/chat.h"
#include "trainer/dataset_format.h"
#include "trainer/samples.h"

typedef struct gn_encoding {
    const gn_tokenizer *tokenizer;
    const gn_chat_template *chat;
    int source_max_len, target_max_len; /* at least 1 */
    int max_len;                        /* of tokenized rows */
    int vocab;
    bool train_on_source;
} gn_encoding;

/* Adds the example's sample to `out`; one in which nothing is learned is counted there as left out
 * instead. GN_EFORMAT: a tokenized row is empty, too long, or has ids outside the vocabulary or
 * other than one label a token. */
GN_CHECKED gn_status gn_example_encode(const gn_encoding *e, const gn_example *example,
                                       int64_t line, gn_samples *out, gn_error *err);

#endif
