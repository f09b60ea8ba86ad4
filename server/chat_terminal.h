/* chat_terminal.h - what a chat in the terminal waits for: a line, text from the engine, Ctrl-C.
 *
 * SIGINT is blocked and read from a descriptor, so that no handler and no global state is needed;
 * open the terminal before anything that starts threads. */
#ifndef GN_CHAT_TERMINAL_H
#define GN_CHAT_TERMINAL_H

#include <pthread.h>

#include "engine/guanaco.h"

typedef struct gn_terminal {
    int signals, wake; /* descriptors: SIGINT; something came from the engine */
    bool interactive;  /* stdin is a terminal: prompts and notices are for a person */
    bool colour;       /* stdout may be coloured */
    char *input;       /* what was read from stdin and is not yet used */
    size_t input_len, input_size;
    bool input_ended;

    pthread_mutex_t lock; /* over what follows, which the engine's thread writes */
    char *text;           /* of the reply, not yet printed */
    size_t text_len, text_size;
    bool finished, lost; /* lost: memory was short for some text */
    gn_finish finish;
    gn_error error;
} gn_terminal;

typedef enum gn_wake { GN_WAKE_LINE, GN_WAKE_END, GN_WAKE_INTERRUPT } gn_wake;

GN_CHECKED gn_status gn_terminal_open(gn_terminal *t, gn_error *err);
void gn_terminal_close(gn_terminal *t);

/* Whether Ctrl-C was pressed since the last look. */
bool gn_terminal_interrupted(gn_terminal *t);
/* Waits for a line of input; *line is malloc'ed, without its end. GN_ENOMEM counts as the end. */
gn_wake gn_terminal_read_line(gn_terminal *t, char **line);

/* A gn_request's on_event, with the terminal as its user. */
void gn_terminal_on_event(void *user, const gn_event *event);
/* Makes ready for the next reply. */
void gn_terminal_expect(gn_terminal *t);
/* Waits for text of the reply (malloc'ed and terminated; may be NULL) or for Ctrl-C, which is
 * told by *interrupted. False once the reply is complete; its finish and error stand in t. */
bool gn_terminal_next_text(gn_terminal *t, char **text, bool *interrupted);

#endif
