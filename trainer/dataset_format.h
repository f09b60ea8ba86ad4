/* dataset_format.h - what the rows of the known data sets mean.
 *
 * A row becomes examples, each a prompt and its reply, a conversation, or tokens. Fields and
 * prompts are those of the original qlora.py where it knows the format:
 *
 *   input-output   input and output, as they are (longform has these, too)
 *   alpaca         instruction, perhaps input, in Stanford's prompt; output
 *   self-instruct  prompt and completion; or instruction and instances of input and output, in
 *                  self-instruct's prompt
 *   chip2          text: what follows "<human>: ", and "<bot>: "
 *   hh-rlhf        chosen: all of it is the reply
 *   oasst1         text: all of it is the reply (Guanaco's flat form); or a message tree: the
 *                  conversation along the replies of the best rank
 *   sharegpt       conversations of from and value; perhaps system and tools, as system messages
 *   messages       messages of role and content, as OpenAI's API takes them; an assistant message
 *                  of weight 0 is not learned
 *   tokenized      input_ids and perhaps labels (-100: not learned) */
#ifndef GN_DATASET_FORMAT_H
#define GN_DATASET_FORMAT_H

#include "engine/guanaco.h"
#include "trainer/rows.h"

/* name in C, on the command line */
#define GN_FORMAT_MAP(X)                                                                           \
    X(AUTO, "auto")                                                                                \
    X(INPUT_OUTPUT, "input-output")                                                                \
    X(ALPACA, "alpaca")                                                                            \
    X(ALPACA_CLEAN, "alpaca-clean") /* a name of the original's; the same as alpaca */             \
    X(SELF_INSTRUCT, "self-instruct")                                                              \
    X(CHIP2, "chip2")                                                                              \
    X(HH_RLHF, "hh-rlhf")                                                                          \
    X(LONGFORM, "longform")                                                                        \
    X(OASST1, "oasst1")                                                                            \
    X(SHAREGPT, "sharegpt")                                                                        \
    X(MESSAGES, "messages")                                                                        \
    X(TOKENIZED, "tokenized")

typedef enum gn_format {
#define X(name, text) GN_FORMAT_##name,
    GN_FORMAT_MAP(X)
#undef X
        GN_FORMAT_COUNT
} gn_format;

/* For an option's choices. */
#define GN_FORMAT_CHOICES                                                                          \
    "auto|input-output|alpaca|alpaca-clean|self-instruct|chip2|hh-rlhf|longform|oasst1|sharegpt|"  \
    "messages|tokenized"

const char *gn_format_name(gn_format format);
/* The format that has the row's fields; GN_EFORMAT, naming the fields, when none has. */
GN_CHECKED gn_status gn_format_detect(const cJSON *row, gn_format *format, gn_error *err);

/* One of: source and target; messages; ids. */
typedef struct gn_example {
    const char *source, *target;
    const gn_message *messages;
    const bool *learn; /* (n_messages) which assistant messages are learned */
    int n_messages;
    const cJSON *ids, *labels; /* arrays; labels may be NULL: the same as ids */
} gn_example;

/* What takes an example; everything in it is borrowed for the call. */
typedef gn_status gn_example_fn(void *user, const gn_example *example, gn_error *err);

/* Calls take for each example of the row, which may be none (a tree that was not released).
 * GN_EFORMAT when a field is missing or of another type; the message leaves it to the caller to
 * name file and line. format is not AUTO. */
GN_CHECKED gn_status gn_format_row(gn_format format, const cJSON *row, gn_example_fn *take,
                                   void *user, gn_error *err);

#endif
