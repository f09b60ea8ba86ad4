/* mailbox.h - what the engine's thread has to say, for the loop's thread.
 *
 * An event is copied into one growing buffer under a lock; the loop takes the whole buffer at
 * once, so that a burst of tokens costs one wake-up and, once warm, no allocation. A ticket stands
 * for one submitted request and lives until its last event was delivered, whoever lost interest
 * before. */
#ifndef GN_MAILBOX_H
#define GN_MAILBOX_H

#include <uv.h>

#include "engine/guanaco.h"
#include "server/buffer.h"

typedef struct gn_ticket gn_ticket;

typedef struct gn_mailbox {
    uv_async_t wake;
    uv_mutex_t lock;
    gn_buffer filling, emptying; /* filling and lost are under the lock */
    gn_ticket *lost;             /* ended, with no memory to say so */
    int tickets;
    void (*delivered)(void *user); /* after each delivery */
    void *user;
} gn_mailbox;

GN_CHECKED gn_status gn_mailbox_open(gn_mailbox *m, uv_loop_t *loop, void (*delivered)(void *),
                                     void *user);
/* After gn_engine_close: delivers what is left, then closes the handle. */
void gn_mailbox_close(gn_mailbox *m);

/* Called on the loop's thread. Pointers in the event are good for the call. */
typedef void (*gn_deliver)(void *user, const gn_event *event);

/* NULL when memory is short. */
gn_ticket *gn_ticket_open(gn_mailbox *m, gn_deliver deliver, void *user);
/* No event will be delivered any more. */
void gn_ticket_mute(gn_ticket *ticket);
void gn_ticket_close(gn_ticket *ticket); /* only when its request was refused */
/* For gn_request.on_event, with the ticket as `user`. */
void gn_ticket_on_event(void *ticket, const gn_event *event);

#endif
