/* mailbox.c - what the engine's thread has to say, for the loop's thread. */
#include "server/mailbox.h"

#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 16, KEEP_BYTES = 1 << 20 };

struct gn_ticket {
    gn_mailbox *mailbox;
    gn_deliver deliver; /* NULL: muted */
    void *user;
    bool losing;     /* an event found no memory; only the engine's thread looks */
    gn_ticket *next; /* among the lost */
};

/* An event in the buffer; behind it n_top, n_prompt and n_prompt * n_top entries, the error and
 * the text. */
typedef struct record {
    size_t size;
    gn_ticket *ticket;
    gn_event event;
} record;

static size_t probs_of(const gn_event *e) {
    return (size_t)(e->top ? e->n_top : 0) +
           (size_t)e->n_prompt * (1 + (size_t)(e->prompt_top ? e->n_top : 0));
}

static char *put(char *at, const void *data, size_t size) {
    if (size) memcpy(at, data, size);
    return at + size;
}

static char *put_probs(char *at, const gn_token_prob *p, int64_t n) {
    return put(at, p, p ? (size_t)n * sizeof *p : 0);
}

/* Copies an event; false when memory is short. */
static bool append(gn_buffer *b, gn_ticket *ticket, const gn_event *e) {
    const size_t error = e->error ? sizeof *e->error : 0;
    size_t size = sizeof(record) + probs_of(e) * sizeof(gn_token_prob) + error + e->text_len;
    size = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    char *at = gn_buffer_reserve(b, size);
    if (!at) return false;
    const record head = {size, ticket, *e};
    at = put(at, &head, sizeof head);
    at = put_probs(at, e->top, e->n_top);
    at = put_probs(at, e->prompt, e->n_prompt);
    at = put_probs(at, e->prompt_top, (int64_t)e->n_prompt * e->n_top);
    at = put(at, e->error, error);
    put(at, e->text, e->text_len);
    b->size += size;
    return true;
}

static const void *take(const char **at, size_t size) {
    const char *p = *at;
    *at += size;
    return p;
}

/* Points the copy's pointers at what was copied behind it. */
static gn_event event_at(const char *at) {
    const record *r = (const record *)at;
    gn_event e = r->event;
    at += sizeof *r;
    const size_t top = (size_t)e.n_top, prompt = (size_t)e.n_prompt;
    if (e.top) e.top = take(&at, top * sizeof *e.top);
    if (e.prompt) e.prompt = take(&at, prompt * sizeof *e.prompt);
    if (e.prompt_top) e.prompt_top = take(&at, prompt * top * sizeof *e.prompt_top);
    if (e.error) e.error = take(&at, sizeof *e.error);
    e.text = at;
    return e;
}

void gn_ticket_on_event(void *user, const gn_event *event) {
    gn_ticket *ticket = user;
    gn_mailbox *m = ticket->mailbox;
    uv_mutex_lock(&m->lock);
    const bool idle = m->filling.size == 0 && !m->lost;
    if (!ticket->losing && !append(&m->filling, ticket, event)) {
        ticket->losing = true;
        m->filling.failed = false;
    }
    if (ticket->losing && event->finish != GN_FINISH_NONE) {
        ticket->next = m->lost;
        m->lost = ticket;
    }
    if (idle) uv_async_send(&m->wake);
    uv_mutex_unlock(&m->lock);
}

static void deliver(gn_ticket *ticket, const gn_event *event) {
    if (ticket->deliver) ticket->deliver(ticket->user, event);
    if (event->finish != GN_FINISH_NONE) gn_ticket_close(ticket);
}

static void deliver_lost(gn_ticket *lost) {
    static const gn_error no_memory = {GN_ENOMEM, "out of memory while passing on the reply"};
    const gn_event event = {.text = "", .finish = GN_FINISH_ERROR, .error = &no_memory};
    for (gn_ticket *next; lost; lost = next) {
        next = lost->next;
        deliver(lost, &event);
    }
}

static void deliver_all(gn_mailbox *m) {
    uv_mutex_lock(&m->lock);
    const gn_buffer full = m->filling;
    m->filling = m->emptying;
    m->emptying = full;
    gn_ticket *lost = m->lost;
    m->lost = NULL;
    uv_mutex_unlock(&m->lock);

    for (size_t at = 0; at < full.size;) {
        const record *r = (const record *)(full.data + at);
        const gn_event event = event_at(full.data + at);
        at += r->size;
        deliver(r->ticket, &event);
    }
    deliver_lost(lost);
    gn_buffer_clear(&m->emptying, KEEP_BYTES);
    if (m->delivered) m->delivered(m->user);
}

static void on_wake(uv_async_t *wake) {
    deliver_all(wake->data);
}

gn_status gn_mailbox_open(gn_mailbox *m, uv_loop_t *loop, void (*delivered)(void *), void *user) {
    *m = (gn_mailbox){.delivered = delivered, .user = user};
    if (uv_mutex_init(&m->lock)) return GN_ENOMEM;
    if (uv_async_init(loop, &m->wake, on_wake)) {
        uv_mutex_destroy(&m->lock);
        return GN_ENOMEM;
    }
    m->wake.data = m;
    return GN_OK;
}

void gn_mailbox_close(gn_mailbox *m) {
    deliver_all(m);
    uv_close((uv_handle_t *)&m->wake, NULL);
    uv_mutex_destroy(&m->lock);
    gn_buffer_free(&m->filling);
    gn_buffer_free(&m->emptying);
}

gn_ticket *gn_ticket_open(gn_mailbox *m, gn_deliver deliver_fn, void *user) {
    gn_ticket *ticket = calloc(1, sizeof *ticket);
    if (!ticket) return NULL;
    *ticket = (gn_ticket){.mailbox = m, .deliver = deliver_fn, .user = user};
    m->tickets++;
    return ticket;
}

void gn_ticket_mute(gn_ticket *ticket) {
    ticket->deliver = NULL;
}

void gn_ticket_close(gn_ticket *ticket) {
    ticket->mailbox->tickets--;
    free(ticket);
}
