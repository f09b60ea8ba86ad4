/* generation.h - one request for text: its choices in the engine, and the response they make.
 *
 * Shared by both completion families. A family says how a choice looks in JSON; everything else
 * is here: encoding the prompts (long ones on a worker thread), submitting, collecting, streaming,
 * stopping when the client leaves. */
#ifndef GN_GENERATION_H
#define GN_GENERATION_H

#include <uv.h>

#include "server/mailbox.h"
#include "server/params.h"

typedef struct gn_generation gn_generation;

/* What is known of a choice and not yet written. The lists are JSON arrays without brackets. */
typedef struct gn_choice {
    gn_generation *generation;
    int index, prompt; /* which prompt it answers */
    gn_ticket *ticket; /* NULL when it has ended */
    uint64_t id;       /* the engine's */
    gn_buffer text;
    gn_buffer tokens;               /* chat: the entries of logprobs.content */
    gn_buffer probs, tops, offsets; /* legacy logprobs, beside the tokens */
    int64_t characters;             /* of the tokens so far; where the next one begins */
    gn_finish finish;
    int32_t prompt_tokens, cached_tokens, completion_tokens;
} gn_choice;

typedef struct gn_family {
    const char *id_prefix, *object, *chunk_object;
    /* Adds a token to the choice's lists. `first`: a prompt's first token, which has no
     * probability. Only called when logprobs were asked for. */
    void (*add_token)(gn_choice *c, gn_token_prob token, const gn_token_prob *top, int32_t n_top);
    /* The JSON object of a choice: whole, or the part of it that a stream sends now. */
    void (*write_choice)(gn_buffer *b, gn_choice *c);
    void (*write_part)(gn_buffer *b, gn_choice *c);
    /* What a stream says first and last about a choice. */
    void (*write_first)(gn_buffer *b, gn_choice *c); /* may be NULL */
    void (*write_last)(gn_buffer *b, gn_choice *c);
} gn_family;

typedef struct gn_prompt {
    const char *text; /* borrowed; NULL: the ids were given, or a conversation was */
    size_t size;
    int32_t *ids; /* owned */
    int32_t n_ids;
} gn_prompt;

struct gn_generation {
    gn_exchange *exchange; /* NULL: the client left while a worker was encoding */
    gn_server *server;
    const gn_family *family;
    cJSON *json; /* the request, kept until it is submitted */
    gn_params params;
    bool echo;

    gn_prompt *prompts;
    int n_prompts;
    gn_message *messages; /* chat: a conversation is the only prompt */
    int n_messages;
    gn_buffer joined; /* texts made of several parts, each ended by a zero byte */

    gn_choice *choices;
    int n_choices, remaining;
    char id[48];
    char model[160];
    int64_t created;
    gn_buffer chunk; /* the event being written */
    gn_buffer head;  /* what every event of the stream begins with */
    uv_work_t work;
    gn_error encode_error;
};

/* Begins with the request's JSON, which is taken over. NULL: the error was answered already. */
gn_generation *gn_generation_open(gn_exchange *x, const gn_family *family);
/* Encodes, submits and answers. params, and prompts or messages, are filled. */
void gn_generation_start(gn_generation *g);
/* Answers with x->refusal instead. */
void gn_generation_refuse(gn_generation *g);

/* "stop", "length", or null while it runs; with quotes. */
const char *gn_finish_json(gn_finish finish);

#endif
